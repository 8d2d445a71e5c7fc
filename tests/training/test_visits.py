# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The draws of each visit of an image: mirror images and crops."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_greedy_grow.training.data.captioned import CaptionedImages
from diffusers_greedy_grow.training.data.visits import Augmentation

from ..data_utils import make_image, make_rows, to_bytes, write_parquet
from .test_loading import load, read


def make_ramp(height: int, width: int) -> torch.Tensor:
    """An image that shows where in it each pixel is: red is the row, green the column."""
    rows = (np.arange(height) + 0.5) / height * 255
    columns = (np.arange(width) + 0.5) / width * 255
    ramp = np.stack(np.broadcast_arrays(rows[:, None], columns, 0 * columns), axis=0)
    return torch.from_numpy(ramp.round().astype(np.uint8))


def test_crops_have_the_sizes_and_places_that_were_asked_for():
    augmentation = Augmentation(random_crop=0.6)
    crops = np.array([augmentation.draw_crop((3, place)) for place in range(4000)])
    parts = crops[crops[:, 2] > 0]
    assert 0.46 < len(parts) / len(crops) < 0.54 and not crops[crops[:, 2] == 0].any()
    top, left, cut = parts.T
    assert 0 < cut.min() < 0.01 and 0.39 < cut.max() <= 0.4 and cut.mean() == pytest.approx(0.2, abs=0.01)
    for start in (top, left):
        assert (start / cut).min() < 0.01 and 0.99 < (start / cut).max() <= 1
        assert (start / cut).mean() == pytest.approx(0.5, abs=0.02)
    assert augmentation.draw_crop((3, 7)) == augmentation.draw_crop((3, 7)) != augmentation.draw_crop((4, 7))


@pytest.mark.parametrize("horizontal_flip", [False, True])
@pytest.mark.parametrize("height,width", [(32, 32), (24, 48)])
def test_the_crop_says_what_is_shown(horizontal_flip, height, width):
    """In the image as it is shown: of a mirror image, the left is what is on the right of the file."""
    augmentation = Augmentation(horizontal_flip, random_crop=0.5)
    ramp = make_ramp(*map(augmentation.size_to_read, (height, width)))
    mirrored = 0
    for place in range(30):
        row = augmentation.apply(ramp, (0, place), height, width)
        top, left, cut = row["crop"].tolist()
        shown = row["pixel_values"].double() / 255
        rows = top + (np.arange(height) + 0.5) / height * (1 - cut)
        columns = left + (np.arange(width) + 0.5) / width * (1 - cut)
        flipped = bool(shown[1, 0, 0] > shown[1, 0, -1])
        columns = 1 - columns if flipped else columns
        mirrored += flipped
        assert shown.shape == (3, height, width)
        assert (shown[0] - torch.from_numpy(rows)[:, None]).abs().max() < 0.03
        assert (shown[1] - torch.from_numpy(columns)).abs().max() < 0.03
    assert (5 < mirrored < 25) == horizontal_flip


def test_without_a_visit_the_whole_image_is_shown():
    """And the smallest part has no fewer pixels than are shown, if the file has them."""
    rows = make_rows([to_bytes(make_image(i, 64)) for i in range(3)])
    images = CaptionedImages(rows, 16, augmentation=Augmentation(True, 0.25))
    assert images.read(0).shape == (3, 64, 64)
    whole = np.asarray(make_image(1, 64).resize((16, 16), Image.Resampling.LANCZOS))
    assert np.array_equal(images[1]["pixel_values"].permute(1, 2, 0), whole) and not images[1]["crop"].any()
    assert images.make_cache() == {}
    limit = 3 * 3 * 16**2  # enough for small images
    assert CaptionedImages(rows, 16, max_cache_bytes=limit).cache == {}
    assert CaptionedImages(rows, 16, max_cache_bytes=limit, augmentation=Augmentation(False, 0.25)).cache is None


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("buckets", [None, "16,16;8,32"])
def test_batches_with_crops_resume(files, streaming, buckets):
    """By any number of workers; the core sees the same parts averaged down. Held-out images are whole."""
    data = load(
        files, horizontal_flip=True, random_crop=0.5, streaming=streaming, aspect_ratio_buckets=buckets,
        num_validation_images=4,
    )  # fmt: skip
    assert "crop" not in data.validation[0]
    images = data.at(1, 16)
    whole, _ = read(images, 0, 8, num_workers=2)
    assert all(batch["crop"].shape == (3, 3) for batch in whole)
    assert 0 < sum(batch["crop"].any(dim=1).sum() for batch in whole) < 3 * len(whole)
    _, loader = read(images, 0, 3, num_workers=2)
    state = loader.state() if streaming else None
    rest, _ = read(images, 3, 8, num_workers=1, state=state)
    small, _ = read(data.at(1, 8), 3, 8, num_workers=1, state=state)
    assert len(rest) == 10
    for batch, other, pooled in zip(rest, whole[6:], small, strict=True):
        assert torch.equal(batch["pixel_values"], other["pixel_values"]) and batch["caption"] == other["caption"]
        assert torch.equal(batch["crop"], other["crop"]) and torch.equal(batch["crop"], pooled["crop"])
        assert pooled["pixel_values"].dtype == torch.float32


def test_without_random_crops_there_is_nothing_to_tell(tmp_path):
    write_parquet(tmp_path / "data.parquet", 40)
    batches, _ = read(load(tmp_path / "data.parquet", horizontal_flip=True).at(1, 16), 0, 2)
    assert all(batch.keys() == {"pixel_values", "caption"} for batch in batches)
