# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

import os

import pytest

from diffusers_greedy_grow.training import files
from diffusers_greedy_grow.training.files import remove_folder, save_pipeline

from ..testing_utils import make_pipeline


def test_a_saved_pipeline_replaces_an_earlier_one(tmp_path):
    pipeline = make_pipeline()
    save_pipeline(pipeline, tmp_path / "core")
    (tmp_path / "core" / "left over").write_text("")
    save_pipeline(pipeline, tmp_path / "core")
    assert [path.name for path in tmp_path.iterdir()] == ["core"]
    assert not (tmp_path / "core" / "left over").exists() and (tmp_path / "core" / "model_index.json").exists()


def test_a_folder_may_be_a_link_to_a_larger_disk(tmp_path):
    """The content is replaced, the link stays."""
    (tmp_path / "disk" / "core").mkdir(parents=True)
    (tmp_path / "disk" / "core" / "old").touch()
    (tmp_path / "core").symlink_to(tmp_path / "disk" / "core")
    save_pipeline(make_pipeline(), tmp_path / "core")
    assert (tmp_path / "core").is_symlink() and not (tmp_path / "core" / "old").exists()
    assert (tmp_path / "core" / "model_index.json").exists()
    remove_folder(tmp_path / "core")
    assert (tmp_path / "core").is_symlink() and not list((tmp_path / "disk" / "core").iterdir())
    remove_folder(tmp_path / "disk")
    assert not (tmp_path / "disk").exists()


@pytest.mark.parametrize("links", [True, False])
def test_linked_files_stay_when_the_other_is_replaced(links, tmp_path, monkeypatch):
    """Also on a file system without links, and in the place of an earlier file."""

    def refuse(*args):
        raise OSError("Operation not permitted")

    if not links:
        monkeypatch.setattr(files.os, "link", refuse)
    source, target = tmp_path / "a", tmp_path / "b"
    for text in ("1", "2"):
        (tmp_path / "new").write_text(text)
        (tmp_path / "new").replace(source)
        files.link_file(source, target)
        files.link_file(source, target)  # the same file again
        assert target.read_text() == text and os.path.samefile(source, target) == links
    (tmp_path / "new").write_text("3")
    (tmp_path / "new").replace(source)
    assert target.read_text() == "2" and sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
