# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The training images nearest to samples, on real files."""

import math

import numpy as np
import pytest
from accelerate import PartialState
from PIL import Image, ImageOps

from diffusers_greedy_grow.training import nearest
from diffusers_greedy_grow.training.arguments import DataArguments
from diffusers_greedy_grow.training.data.loading import TrainingData, load_training_data
from diffusers_greedy_grow.training.data.rows import BrokenRows
from diffusers_greedy_grow.training.nearest import NearestImages
from diffusers_greedy_grow.training.phases import Phase

from ..data_utils import make_image, write_image_folder


CORE = Phase(0, "core", "core", 0, 8, 20, 2, 1.0, 0.0, 1.0, "velocity")
GROWN = Phase(2, "grown-32", "joint", 1, 32, 20, 2, 1.0, 0.0, 1.0, "velocity")


def load(folder, **kwargs) -> TrainingData:
    data_args = DataArguments(train_data_dir=str(folder), num_validation_images=8, num_scored_images=0, **kwargs)
    return load_training_data(data_args, [8, 32], data_args.train_data_dir, BrokenRows(), 0)


@pytest.fixture
def folder(tmp_path):
    return write_image_folder(tmp_path / "images", count=40)


def numbers(data: TrainingData) -> list[int]:
    return [int(caption.split()[-1]) for caption in data.core.captions]


def test_copies_are_found_and_new_images_are_as_far_as_held_out_ones(folder, tmp_path):
    data = load(folder)
    known, found = numbers(data), NearestImages(tmp_path / "nearest.png", data, seed=0)
    copies = [make_image(known[3]), ImageOps.mirror(make_image(known[5])), make_image(known[8])]
    values = found.draw(GROWN, copies)
    assert values["nearest_distance"] == values["nearest_ratio"] == 0 < values["nearest_distance_held_out"]
    grid = np.asarray(Image.open(tmp_path / "nearest.png"))
    for row, sample in enumerate(copies):
        left = 96 + 132  # the second column
        shown = grid[132 * row : 132 * row + 128, left : left + 128]
        original = make_image(known[(3, 5, 8)[row]]).resize((128, 128), Image.Resampling.NEAREST)
        assert np.array_equal(shown, original) and np.array_equal(grid[132 * row : 132 * row + 128, 96 : 96 + 128],
            sample.resize((128, 128), Image.Resampling.NEAREST))  # fmt: skip
    new = found.draw(GROWN, [make_image(i) for i in range(100, 120)])
    assert new["nearest_ratio"] == pytest.approx(1, abs=0.1)
    assert new["nearest_distance"] == pytest.approx(0.5, abs=0.2)  # noise, averaged over 2 x 2 pixels
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "nearest.png"]


def test_the_distance_is_that_of_pooled_pixels(folder, tmp_path):
    """At a core's resolution, to which the training images are averaged down; by hand."""
    data = load(folder)
    sample = make_image(100, size=8)
    (distance, *_) = NearestImages(tmp_path / "nearest.png", data, seed=0).draw(CORE, [sample]).values()

    def pool(i: int) -> np.ndarray:
        return np.asarray(make_image(i), dtype=np.float64).reshape(8, 4, 8, 4, 3).mean(axis=(1, 3))

    pixels = np.asarray(sample, dtype=np.float64)
    expected = [math.sqrt(((one - pool(i)) ** 2).mean()) for i in numbers(data) for one in (pixels, pixels[:, ::-1])]
    assert distance == pytest.approx(min(expected) / 127.5, rel=1e-5)


def test_some_of_many_images_are_compared_by_the_seed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(nearest, "MAX_IMAGES", 10)
    data = load(folder)
    copies = [make_image(i) for i in numbers(data)]
    rows = []
    for seed in (0, 0, 1):
        found = NearestImages(tmp_path / "nearest.png", data, seed)
        rows.append([found.draw(GROWN, [copy])["nearest_distance"] == 0 for copy in copies])
    assert rows[0] == rows[1] != rows[2] and [sum(row) for row in rows] == [10] * 3


def test_images_of_other_shapes_few_images_and_streams(folder, tmp_path):
    data = load(folder, aspect_ratio_buckets="32,32;16,64")
    assert 0 < NearestImages(tmp_path / "nearest.png", data, 0).draw(GROWN, [make_image(1000)])["nearest_ratio"] < 2
    for path in sorted(folder.glob("*.png"))[2:]:
        path.unlink()
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(lines[:2]))
    few = load(folder)
    assert len(few.core) == 1
    assert NearestImages(tmp_path / "few.png", few, 0).draw(GROWN, [make_image(0)])
    assert Image.open(tmp_path / "few.png").width == 96 + 2 * 132
    write_image_folder(tmp_path / "many", count=40)
    assert NearestImages(tmp_path / "none.png", load(tmp_path / "many", streaming=True), 0).draw(GROWN, []) == {}
    assert not (tmp_path / "none.png").exists()


def test_held_out_images_that_are_trained_on_give_no_ratio(folder, tmp_path, caplog):
    PartialState(cpu=True)  # its logger needs it
    data = load(folder)
    copied = TrainingData(data.core, data.high_res, data.core)
    values = NearestImages(tmp_path / "nearest.png", copied, 0).draw(GROWN, [make_image(100)])
    assert values["nearest_distance_held_out"] == 0 and "nearest_ratio" not in values
    assert "Most held-out images are training images, too" in caplog.text
