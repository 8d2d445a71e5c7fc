# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, Features, Image, List, Value, load_dataset

from diffusers_greedy_grow.training.arguments import DataArguments
from diffusers_greedy_grow.training.data.captioned import CaptionedImages
from diffusers_greedy_grow.training.data.loading import load_training_data, make_loader
from diffusers_greedy_grow.training.data.order import BucketOrder, EpochOrder
from diffusers_greedy_grow.training.data.rows import BrokenRows
from diffusers_greedy_grow.training.data.sources import write_shapes_once
from diffusers_greedy_grow.training.data.streaming import StreamedImages
from diffusers_greedy_grow.training.parsing import parse_arguments

from ..data_utils import make_image, to_bytes, write_parquet, write_rows


def load(folder, resolutions=(8, 16), seed=0, random_crop=1.0, **kwargs):
    data_args = DataArguments(image_column="photo", train_data_dir=str(folder), **kwargs)
    return load_training_data(data_args, list(resolutions), data_args.train_data_dir, BrokenRows(), seed, random_crop)


def digest_of(*sets: CaptionedImages) -> str:
    text = "".join("".join(f"{caption}\0" for caption in images.captions) + "\0" for images in sets)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------------------
# The data of a run


def test_one_source_for_all_phases(tmp_path):
    write_parquet(tmp_path / "data.parquet", 40)
    data = load(tmp_path / "data.parquet")
    assert data.core is data.high_res and not data.streams
    assert (len(data.core), len(data.validation)) == (38, 2)
    assert data.describe() == "Images to train on: 38 at the core's resolution, 38 above it; 2 held out."
    assert data.fingerprint == digest_of(data.core, data.core, data.validation)
    low, high = data.at(0, 8)[3]["pixel_values"], data.at(1, 16)[3]["pixel_values"]
    assert low.shape == (3, 8, 8) and low.dtype == torch.float32
    assert high.shape == (3, 16, 16) and high.dtype == torch.uint8


def test_few_images_above_the_cores_resolution(tmp_path):
    write_parquet(tmp_path / "data.parquet", 40)
    data = load(tmp_path / "data.parquet", num_high_res_images=5, seed=3)
    chosen = np.random.default_rng(3).permutation(38)[:5]
    assert data.high_res.captions == [data.core.captions[i] for i in chosen] == data.at(1, 16).captions
    assert len(data.core) == len(data.at(0, 8)) == 38
    assert data.fingerprint == digest_of(data.core, data.high_res, data.validation)
    assert data.fingerprint != load(tmp_path / "data.parquet").fingerprint


def test_the_core_has_data_of_its_own(tmp_path, caplog):
    """The core's data has the core's resolution, and nothing of it is held out. Held-out captions in it cause a warning."""
    Accelerator(cpu=True)  # which logging asks for
    write_parquet(tmp_path / "core.parquet", 12)
    write_parquet(tmp_path / "high.parquet", 40, first=12)
    files = {"high_res_data_dir": str(tmp_path / "high.parquet"), "aspect_ratio_buckets": "16,16;8,32"}
    data = load(tmp_path / "core.parquet", **files)
    assert (len(data.core), len(data.high_res), len(data.validation)) == (12, 38, 2)
    assert data.core.resolution == 8 and data.core.buckets == [(8, 8), (4, 16)]
    assert data.high_res.resolution == 16 and data.high_res.buckets == [(16, 16), (8, 32)]
    assert data.validation.buckets == [(16, 16)] and not caplog.text
    load(tmp_path / "high.parquet", **files)
    assert "The captions of 2 held-out images are in the core's data, too" in caplog.text


def test_streamed_data(files):
    data = load(files, streaming=True, num_validation_images=9, shuffle_buffer_size=7)
    assert data.streams and data.core is data.high_res and data.core.shuffle_buffer_size == 7
    assert data.validation.captions == [f"image number {i}" for i in range(9)]
    assert data.core.first == (1, 3) and data.fingerprint is None
    assert data.describe() == "Images are streamed; 9 held out."
    assert load(files, streaming=True, num_validation_images=0).core.first == (
        1,
        2,
    )  # at least 8 are held out: their captions are sampled


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--train_data_dir x --dataset_config_name y", "--dataset_config_name y: needs --dataset_name"),
        ("--train_data_dir x --dataset_revision y", "--dataset_revision y: needs --dataset_name"),
        ("--train_data_dir x --train_split y --validation_split y", "are both y: name different splits"),
        ("--max_image_pixels 0", "--max_image_pixels 0: must be at least 1"),
    ],
)
def test_parts_of_data_that_cannot_be_had(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(flags.split(), "")
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_of_other_names(tmp_path, streaming):
    """They are those of the core's own data, too, from which nothing is held out."""
    for folder in ("core", "high"):
        (tmp_path / folder).mkdir()
        for i, name in enumerate(("learn", "check", "rest")):
            write_parquet(tmp_path / folder / f"{name}.parquet", 9, first=9 * i + 100 * (folder == "high"))
    arguments = {"train_split": "learn", "validation_split": "check", "streaming": streaming}
    data = load(tmp_path / "high", **arguments)
    assert list(data.core.captions) == [f"image number {i}" for i in range(100, 109)]
    assert data.validation.captions == [f"image number {i}" for i in range(109, 118)]
    (tmp_path / "core" / "check.parquet").unlink()
    data = load(tmp_path / "core", high_res_data_dir=str(tmp_path / "high"), **arguments)
    assert list(data.core.captions) == [f"image number {i}" for i in range(9)]
    assert data.validation.captions == [f"image number {i}" for i in range(109, 118)]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_most_pixels_of_an_image(tmp_path, streaming):
    """The limit is that of all images of a run: those that are trained on, and those that are held out."""
    write_rows(
        tmp_path / "train.parquet", [(make_image(i, 32 if i < 7 else 40), f"image number {i}") for i in range(8)]
    )
    write_rows(
        tmp_path / "test.parquet", [(make_image(i, 32 if i < 15 else 40), f"image number {i}") for i in range(8, 16)]
    )
    data = load(tmp_path, streaming=streaming, max_image_pixels=32 * 32, num_validation_images=7)
    batches, _ = read(data.at(1, 16), 0, 4)
    assert {caption for batch in batches for caption in batch["caption"]} == {f"image number {i}" for i in range(7)}
    held_out = {data.validation[i]["caption"] for i in range(len(data.validation))}
    assert held_out == {f"image number {i}" for i in range(8, 15)}


# ----------------------------------------------------------------------------------------------------------------------
# Batches


def read(images, steps_done, num_steps, accumulation=2, num_workers=0, state=None, batch_size=3):
    accelerator = Accelerator(cpu=True)
    loader = make_loader(
        images, accelerator, batch_size, steps_done, num_steps, (5, 1), accumulation, num_workers, state
    )
    return list(loader), loader


@pytest.mark.parametrize("buckets", [None, [(16, 16), (8, 32)]])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_after_some_steps_are_those_that_would_have_followed(files, buckets, num_workers):
    """With two batches per step, in an order that depends on the seed alone."""
    data = load(files, aspect_ratio_buckets=buckets and "16,16;8,32")
    images = data.at(1, 16)
    whole, _ = read(images, 0, 7)
    assert len(whole) == 14 and all(len(batch["caption"]) == 3 for batch in whole)
    if buckets is None:
        order = np.array(list(EpochOrder(len(images), 0, 42, (5, 1)))).reshape(14, 3)
    else:
        order = list(BucketOrder(images.shapes, 3, 2, 0, 7, (5, 1)))
        assert len({batch["pixel_values"].shape for batch in whole}) == 2
    assert [batch["caption"] for batch in whole] == [[images.captions[i] for i in batch] for batch in order]
    rest, _ = read(images, 4, 7, num_workers=num_workers)
    assert [batch["caption"] for batch in rest] == [batch["caption"] for batch in whole[8:]]
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(rest, whole[8:]))
    assert read(images, 7, 7)[0] == []


def is_mirrored(images: CaptionedImages, row: dict) -> bool:
    """Whether pixels are the mirror image of the row's image, and not the image."""
    i = images.captions.index(row["caption"])
    pixels, image = row["pixel_values"].double(), images[i]["pixel_values"].double()
    same, mirrored = (torch.allclose(pixels, one, rtol=0, atol=1e-6) for one in (image, image.flip(-1)))
    assert same != mirrored
    return mirrored


@pytest.mark.parametrize("buckets", [None, "16,16;8,32"])
@pytest.mark.parametrize("resolution", [8, 16])
def test_half_of_the_visits_are_mirrored(files, buckets, resolution):
    """By the seed and the place in the phase alone: also after a resume, by any number of workers, and with other batches."""
    data = load(files, aspect_ratio_buckets=buckets, horizontal_flip=True)
    images = data.at(1, resolution)
    assert not data.validation.varies and images.varies
    whole, _ = read(images, 0, 40)

    def list_visits(batches: list[dict]) -> list[tuple]:
        rows = [dict(zip(batch, values)) for batch in batches for values in zip(*batch.values())]
        return [(row["caption"], is_mirrored(images, row)) for row in rows]

    visits = list_visits(whole)
    assert 0.4 < sum(mirrored for _, mirrored in visits) / len(visits) < 0.6
    assert len(set(visits)) == 2 * len(images)  # each image both ways
    assert list_visits(read(images, 17, 40, num_workers=2)[0]) == visits[17 * 6 :]
    assert list_visits(read(images, 17, 40, accumulation=1, batch_size=6)[0]) == visits[17 * 6 :]


def test_half_of_the_visits_of_a_stream_are_mirrored(files):
    """By the seed, the epoch and the row alone: the same after a resume, by any number of workers."""
    images = load(files, streaming=True, horizontal_flip=True, num_validation_images=8).at(1, 16)
    plain = load(files, streaming=True, num_validation_images=8).at(1, 16)
    whole, _ = read(images, 0, 10, num_workers=2)
    other, _ = read(plain, 0, 10, num_workers=2)
    assert [batch["caption"] for batch in whole] == [batch["caption"] for batch in other]
    same = [
        torch.equal(a, b)
        for one, two in zip(whole, other)
        for a, b in zip(one["pixel_values"], two["pixel_values"], strict=True)
    ]
    mirrored = [torch.equal(a["pixel_values"].flip(-1), b["pixel_values"]) for a, b in zip(whole, other)]
    assert 0.3 < sum(same) / len(same) < 0.7 and not all(mirrored)
    _, loader = read(images, 0, 5, num_workers=2)
    rest, _ = read(images, 5, 10, num_workers=1, state=loader.state())
    assert len(rest) == 10
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(rest, whole[10:]))


@pytest.mark.parametrize("buckets", [None, "16,16;8,32"])
def test_one_of_several_captions_is_drawn_per_visit(tmp_path, buckets):
    """By the seed and the place in the phase alone: also after a resume, and with other batches."""
    shapes = [(32, 32), (40, 10)]
    rows = [(make_image(i).resize(shapes[i % 2]), f"caption {k} of {i}") for i in range(12) for k in range(4)]
    write_rows(tmp_path / "data.parquet", rows)
    images = load(tmp_path / "data.parquet", aspect_ratio_buckets=buckets).at(1, 16)
    assert len(images) == 11
    whole, _ = read(images, 0, 40)
    shown = Counter(caption for batch in whole for caption in batch["caption"])
    assert set(shown) == set(images.all_captions) and len(shown) == 44
    for batch in whole:
        numbers = [int(caption.split()[-1]) for caption in batch["caption"]]
        expected = {int(images.captions[i].split()[-1]): images[i]["pixel_values"] for i in range(len(images))}
        assert all(torch.equal(expected[i], pixels) for i, pixels in zip(numbers, batch["pixel_values"]))
    rest, _ = read(images, 17, 40)
    assert [batch["caption"] for batch in rest] == [batch["caption"] for batch in whole[34:]]
    other, _ = read(images, 17, 40, accumulation=1, batch_size=6)
    assert sum((batch["caption"] for batch in other), []) == sum((batch["caption"] for batch in rest), [])


@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_images_are_not_trained_on(tmp_path, streaming):
    """Five rows per image, all over the data."""
    rows = [(make_image(i), f"caption {k} of {i}") for k in range(5) for i in range(40)]
    for part in range(2):
        write_rows(tmp_path / f"{part}.parquet", rows[100 * part : 100 * (part + 1)])
    data = load(tmp_path, streaming=streaming, num_validation_images=9)
    assert len(data.validation) == (9 if streaming else 2)
    held_out = {caption.split()[-1] for caption in data.validation.captions}
    batches, _ = read(data.at(1, 16), 0, 50)
    trained = {caption.split()[-1] for batch in batches for caption in batch["caption"]}
    assert len(trained) == 40 - len(held_out) and not trained & held_out


def test_a_stream_draws_captions(tmp_path):
    for part in range(2):
        rows = [{"bytes": to_bytes(make_image(i)), "path": None} for i in range(8 * part, 8 * part + 8)]
        texts = [[" ", *(f"caption {k} of {i}" for k in range(4))] for i in range(8 * part, 8 * part + 8)]
        features = Features({"photo": Image(), "text": List(Value("string"))})
        Dataset.from_dict({"photo": rows, "text": texts}, features=features).to_parquet(tmp_path / f"{part}.parquet")
    data = load(tmp_path, streaming=True, num_validation_images=0)
    assert data.validation.caption_lists == [[f"caption {k} of {i}" for k in range(4)] for i in range(8)]
    images = data.at(1, 16)
    expected = {f"caption {k} of {i}" for i in range(8, 16) for k in range(4)}
    assert set(images.all_captions) == expected
    whole, _ = read(images, 0, 30)
    shown = Counter(caption for batch in whole for caption in batch["caption"])
    assert set(shown) == expected and not images.broken.broken
    _, loader = read(images, 0, 11)
    rest, _ = read(images, 11, 30, state=json.loads(json.dumps(loader.state())))
    assert [batch["caption"] for batch in rest] == [batch["caption"] for batch in whole[22:]]


def test_a_stream_resumes_after_some_steps(files):
    images = load(files, streaming=True, num_validation_images=0).at(1, 16)
    assert isinstance(images, StreamedImages)
    whole, _ = read(images, 0, 7)
    assert len(whole) == 14
    _, loader = read(images, 0, 4)
    rest, _ = read(images, 4, 7, state=json.loads(json.dumps(loader.state())))
    assert [batch["caption"] for batch in rest] == [batch["caption"] for batch in whole[8:]]


# ----------------------------------------------------------------------------------------------------------------------
# Captioned shapes


def test_shapes_are_drawn_once(tmp_path):
    Accelerator(cpu=True)  # which logging asks for
    data_args = DataArguments(shapes_images=5, num_scored_images=300, shapes_objects=2)
    folder = write_shapes_once(data_args, [16, 32], 16, seed=4, output_dir=tmp_path)
    assert folder == str(tmp_path / "shapes-32px-16-cells-2-objects-5+300-seed-4")
    rows = load_dataset(folder)
    assert {name: len(split) for name, split in rows.items()} == {"train": 5, "validation": 300}
    assert rows["train"][0]["image"].size == (32, 32)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / folder).iterdir()}
    assert write_shapes_once(data_args, [16, 32], 16, seed=4, output_dir=tmp_path) == folder
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / folder).iterdir()}
    few = DataArguments(shapes_images=2, num_scored_images=0)
    assert write_shapes_once(few, [16], 8, 0, tmp_path).endswith("shapes-16px-8-cells-1-objects-2+256-seed-0")
