# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

import pytest

from diffusers_greedy_grow.training.run_folder import check_replaced, truncate_metrics


def test_what_no_run_has_made_is_not_replaced(tmp_path):
    (tmp_path / "samples").mkdir()
    with pytest.raises(ValueError, match="holds samples, which this run would replace, but no `config.yaml`"):
        check_replaced(tmp_path, ["checkpoints", "samples"])
    check_replaced(tmp_path, ["checkpoints"])
    (tmp_path / "config.yaml").write_text("")
    check_replaced(tmp_path, ["checkpoints", "samples"])


def test_metrics_after_a_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    truncate_metrics(path, 0, False)  # killed before the first line
    path.write_text("one\ntwo\nthr")
    truncate_metrics(path, 4, False)
    assert path.read_text() == "one\n"
    with pytest.raises(ValueError, match="lacks lines that were there when the checkpoint was saved"):
        truncate_metrics(path, 8, False)
    truncate_metrics(path, 8, resume_with_changes=True)
    assert path.read_text() == "one\n"
