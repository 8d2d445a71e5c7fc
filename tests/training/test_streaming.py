# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi

from diffusers_greedy_grow.training.data.images import normalize, to_pixel_values
from diffusers_greedy_grow.training.data.rows import MAX_CAPTION_CHARACTERS, BrokenRows
from diffusers_greedy_grow.training.data.sources import Selection, load_captioned_data
from diffusers_greedy_grow.training.data.streaming import StreamedImages, StreamLoader, load_captioned_stream

from ..data_utils import BROKEN, make_image, write_image_folder, write_parquet, write_rows, write_tar


READ = """
import json, sys
from accelerate import Accelerator
from diffusers_greedy_grow.training.data.captioned import CaptionedImages
from diffusers_greedy_grow.training.data.loading import make_loader
from diffusers_greedy_grow.training.data.sources import load_captioned_data
from diffusers_greedy_grow.training.data.sources import Selection, load_captioned_data
from diffusers_greedy_grow.training.data.streaming import StreamedImages, load_captioned_stream

accelerator = Accelerator()
phase = {"batch_size": 2, "steps_done": 0, "num_steps": 6, "seed": (0,), "gradient_accumulation_steps": 1}
stream, _, first = load_captioned_stream(None, sys.argv[1], "photo", "text", 0)
loader = make_loader(StreamedImages(stream, first, 8), accelerator, num_workers=2, **phase)
captions = [batch["caption"] for batch in loader]
state = loader.state()
rows, _ = load_captioned_data(None, sys.argv[1], "photo", "text")
images = CaptionedImages(rows, 8, buckets=[(8, 8), (4, 16)])
batches = list(make_loader(images, accelerator, num_workers=0, **phase))
shapes = [list(batch["pixel_values"].shape) for batch in batches]
in_order = [batch["caption"] for batch in batches]
with open(f"{sys.argv[2]}/{accelerator.process_index}.json", "w") as file:
    json.dump({"captions": captions, "processes": accelerator.num_processes, "state": state,
        "shapes": shapes, "in_order": in_order}, file)
"""


def open_stream(source: Path, num_held_out: int = 0, image: str = "photo", text: str = "text", **kwargs):
    stream, _, first = load_captioned_stream(None, str(source), image, text, num_held_out)
    return StreamedImages(stream, first, 16, **{"shuffle_buffer_size": 5, **kwargs})


def read(images: StreamedImages, num_batches: int, num_workers: int = 0, batch_size: int = 2, **kwargs):
    place = {"start": 0, "process_index": 0, "num_processes": 1, "seed": (0,), **kwargs}
    loader = StreamLoader(images, batch_size, num_batches=num_batches, num_workers=num_workers, **place)
    return list(loader), loader


# ----------------------------------------------------------------------------------------------------------------------
# What is read


@pytest.mark.slow
def test_two_processes_with_two_workers_each_read_every_row_once(files, tmp_path):
    """Processes as `accelerate launch` starts them. Data in order is dealt to them, too: each step has one shape."""
    (tmp_path / "read.py").write_text(READ)
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, str(tmp_path / "read.py"), str(files), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["processes"] == 2 and first["state"] == second["state"]
    assert first["state"]["lanes"] == len(first["state"]["states"]) == 4
    counts = Counter(caption for part in (first, second) for batch in part["captions"] for caption in batch)
    assert counts == {f"image number {i}": 1 for i in range(24)}
    assert not {*sum(first["captions"], [])} & {*sum(second["captions"], [])}
    # Data in order: accelerate deals the batches of a step, which have one shape, to the processes.
    assert first["shapes"] == second["shapes"] and {tuple(shape[2:]) for shape in first["shapes"]} == {(8, 8), (4, 16)}
    assert len(first["in_order"]) == 6 and not any({*a} & {*b} for a, b in zip(first["in_order"], second["in_order"]))


@pytest.mark.parametrize("lanes", [1, 3, 4, 7])
def test_each_epoch_deals_every_row_to_one_lane(files, lanes):
    """Also where lanes share a file, or have different numbers of files."""
    images = open_stream(files)
    epochs = [
        [[name for name, _ in images.read_rows(lane, lanes, (3,), epoch)] for lane in range(lanes)] for epoch in (0, 1)
    ]
    everything = {f"row {row} of file {file}" for file in range(4) for row in range(6)}
    for epoch in epochs:
        assert Counter(name for lane in epoch for name in lane) == Counter(everything)
    assert epochs[0] != epochs[1] and epochs[0][0] != sorted(epochs[0][0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_shows_what_would_have_been_seen(files, num_workers):
    """From any batch, within an epoch or not, with another number of readers, and with rows of both shapes waiting."""
    buckets = {"buckets": [(16, 16), (8, 32)]}
    whole, _ = read(open_stream(files, **buckets), 20, num_workers=2)
    for stop in (1, 6, 13):
        _, loader = read(open_stream(files, **buckets), stop, num_workers=2)
        state = json.loads(json.dumps(loader.state()))
        rest, _ = read(open_stream(files, **buckets), 20 - stop, num_workers, start=stop, state=state)
        assert [batch["caption"] for batch in rest] == [batch["caption"] for batch in whole[stop:]]
        assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(rest, whole[stop:]))


def test_other_processes_share_the_lanes_of_a_checkpoint(files):
    whole, _ = read(open_stream(files), 12, num_workers=4)
    _, loader = read(open_stream(files), 4, num_workers=4)
    state = loader.state()
    halves = [
        read(open_stream(files), 4, num_workers=2, start=4, state=state, process_index=rank, num_processes=2)[0]
        for rank in (0, 1)
    ]
    together = [batch["caption"] for pair in zip(*halves) for batch in pair]
    assert together == [batch["caption"] for batch in whole[4:]]
    with pytest.raises(
        ValueError, match="read by 4 readers, which 1 processes with `dataloader_num_workers=3` cannot"
    ):
        read(open_stream(files), 4, num_workers=3, start=4, state=state)
    with pytest.raises(
        ValueError, match="data had .*'first row': .0, 0.* now it has .*'first row': .0, 2.*num_validat"
    ):
        read(open_stream(files, num_held_out=2), 4, num_workers=4, start=4, state=state)


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_other_batches_neither_repeat_nor_lose_a_row(files, batch_size):
    """After batches of three, while rows of two shapes wait for a full batch."""
    images = open_stream(files, buckets=[(16, 16), (8, 32)])
    before, loader = read(images, 4, batch_size=3)
    state = json.loads(json.dumps(loader.state()))
    assert state["states"]["0"]["waiting"]
    after, loader = read(images, 36 // batch_size, batch_size=batch_size, start=1, state=state)
    counts = Counter(caption for batch in before + after for caption in batch["caption"])
    (lane,) = loader.state()["states"].values()
    epoch, rows = lane["read"]
    assert sum(counts.values()) == 48 and max(counts.values()) <= epoch + (rows > 0)
    assert 24 * epoch + rows == 48 + len(lane["waiting"])


def test_sources_give_the_same_batches(tmp_path):
    write_parquet(tmp_path / "data.parquet", 12)
    write_tar(tmp_path / "data.tar", ["png"] * 12)
    folder = write_image_folder(tmp_path / "images", 12)
    sources = [
        open_stream(tmp_path / "data.parquet"),
        open_stream(tmp_path / "data.tar", image="png", text="txt"),
        open_stream(folder, image="image"),
    ]
    parquet, tar, images = (read(source, 9)[0] for source in sources)
    assert len({caption for batch in parquet for caption in batch["caption"]}) == 12
    for a, b, c in zip(parquet, tar, images, strict=True):
        assert a["caption"] == b["caption"] == c["caption"]
        assert torch.equal(a["pixel_values"], b["pixel_values"]) and torch.equal(a["pixel_values"], c["pixel_values"])
        for caption, pixels in zip(a["caption"], a["pixel_values"]):
            assert torch.equal(pixels, to_pixel_values(make_image(int(caption.split()[-1])), 16))


def test_from_the_hub(hub, files):
    """Workers read their own files from the Hub."""
    HfApi().create_repo("owner/images", repo_type="dataset")
    HfApi().upload_folder(repo_id="owner/images", repo_type="dataset", folder_path=files)
    stream, _, first = load_captioned_stream("owner/images", None, "photo", "text", 0)
    batches, loader = read(StreamedImages(stream, first, 16), 12, num_workers=2)
    counts = Counter(caption for batch in batches for caption in batch["caption"])
    assert counts == {f"image number {i}": 1 for i in range(24)} and loader.state()["data"]["files"] == 4


def test_a_part_of_a_dataset_on_the_hub(hub, tmp_path):
    """A configuration, a revision, and splits of other names."""
    for i, name in enumerate(("small/learn", "small/check", "large/learn")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_parquet(tmp_path / f"{name}.parquet", 2, first=2 * i)
    parts = {"small": ("learn", "check"), "large": ("learn",)}
    lines = ["---", "configs:"]
    for config, splits in parts.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        lines += [f"  - split: {split}\n    path: {config}/{split}.parquet" for split in splits]
    (tmp_path / "README.md").write_text("\n".join([*lines, "---"]))
    HfApi().create_repo("owner/parts", repo_type="dataset")
    commit = HfApi().upload_folder(repo_id="owner/parts", repo_type="dataset", folder_path=tmp_path)

    def load(**selection):
        rows, held_out = load_captioned_data(
            "owner/parts", None, "photo", "text", hold_out=False, selection=Selection(**selection)
        )
        return [*rows["text"]], [*held_out["text"]]

    first, second, third = ([f"image number {i}" for i in pair] for pair in ((0, 1), (2, 3), (4, 5)))
    assert load(config_name="small", train_split="learn", validation_split="check") == (first, second)
    assert load(config_name="large", train_split="learn", revision=commit.oid) == (third, [])
    stream, held_out, _ = load_captioned_stream(
        "owner/parts", None, "photo", "text", 2, selection=Selection("small", None, "learn", "check")
    )
    assert [row["text"] for row in stream] == first and held_out["text"] == second
    with pytest.raises(ValueError, match="owner/parts has several configurations: pass `dataset_config_name`"):
        load()
    with pytest.raises(ValueError, match=r"no train split, only \['learn'\]: .*pass `train_split`"):
        load(config_name="large")


def test_images_are_averaged_down_where_they_are_read(files):
    full, _ = read(open_stream(files), 3)
    low, _ = read(open_stream(files).at(4), 3)
    for a, b in zip(full, low):
        assert a["pixel_values"].dtype == torch.uint8 and b["pixel_values"].shape == (2, 3, 4, 4)
        assert torch.equal(b["pixel_values"], normalize(a["pixel_values"], 4))


def test_held_out_rows_are_not_trained_on(files, tmp_path):
    stream, held_out, first = load_captioned_stream(None, str(files), "photo", "text", 8)
    assert first == (1, 2) and held_out["text"] == [f"image number {i}" for i in range(8)]
    images = StreamedImages(stream, first, 16)
    expected = {f"image number {i}": 1 for i in range(8, 24)}
    assert Counter(images.captions) == expected
    assert Counter(caption for batch in read(images, 8)[0] for caption in batch["caption"]) == expected
    # If there is a split to hold out, nothing is taken from the stream.
    write_parquet(tmp_path / "train.parquet", 4)
    write_parquet(tmp_path / "test.parquet", 4, first=4)
    stream, held_out, first = load_captioned_stream(None, str(tmp_path), "photo", "text", 3)
    assert first == (0, 0) and held_out["text"] == [f"image number {i}" for i in (4, 5, 6)]
    assert len(list(StreamedImages(stream, first, 16).captions)) == 4


@pytest.mark.parametrize("seed", range(6))
def test_an_epoch_without_a_row_is_passed_over(tmp_path, seed):
    """One file of six is held out, and in some epochs one of four lanes is dealt that file only."""
    for file in range(6):
        write_parquet(tmp_path / f"{file}.parquet", 8, first=8 * file)
    images = open_stream(tmp_path, num_held_out=8)
    lanes, num_batches = 4, 60
    beginning = {"lanes": lanes, "data": {"files": 6, "first row": [0, 8]}, "states": {}}
    batches, _ = read(images, num_batches, seed=(seed,), state=beginning)
    captions = [batch["caption"] for batch in batches]
    passed_over = 0
    for lane in range(lanes):
        shown = [caption for batch in captions[lane::lanes] for caption in batch]
        expected: list[str] = []
        for epoch in itertools.count():
            numbers = [name.split() for name, _ in images.read_rows(lane, lanes, (seed,), epoch)]
            expected += [f"image number {int(row) + 8 * int(file)}" for _, row, _, _, file in numbers]
            if len(expected) >= len(shown):
                break
            passed_over += not numbers
        assert shown == expected[: len(shown)]
    assert passed_over
    for stop in range(0, num_batches, 7):
        _, loader = read(images, stop, seed=(seed,), state=beginning)
        state = json.loads(json.dumps(loader.state()))
        rest, _ = read(images, num_batches - stop, start=stop, seed=(seed,), state=state)
        assert [batch["caption"] for batch in rest] == captions[stop:]


def test_a_stream_that_is_all_held_out(files):
    with pytest.raises(
        ValueError, match="24 rows of the stream are held out, and none is left.*num_validation_images"
    ):
        open_stream(files, num_held_out=24)
    assert len(list(open_stream(files, num_held_out=23).captions)) == 1


@pytest.mark.parametrize("num_files", [1, 3])
def test_a_reader_that_never_gets_a_row(tmp_path, num_files):
    """More readers share a file than it has rows: a reader without a row raises an error at once."""
    for file in range(num_files):
        write_parquet(tmp_path / f"{file}.parquet", 2, first=2 * file)
    images = open_stream(tmp_path)
    for lane in range(4 * num_files):
        rows = images.read_lane(lane, 4 * num_files, 1, (0,), None)
        if lane < 2 * num_files:
            next(rows)
        else:
            with pytest.raises(
                ValueError, match=f"No file has a row for reader {lane + 1} of .*lower `dataloader_num"
            ):
                next(rows)


# ----------------------------------------------------------------------------------------------------------------------
# Captions


@pytest.mark.parametrize("shares", [1, 3, 4, 7])
def test_readers_of_captions_share_the_files(files, rows_read, shares):
    images = open_stream(files, num_held_out=8)
    rows_read.clear()
    counts = Counter(caption for share in range(shares) for caption in images.read_captions(share, shares))
    assert counts == {f"image number {i}": 1 for i in range(8, 24)}
    # No file is read by two readers, unless there are more readers than files, and file 0 is not read: it is held out.
    assert Counter(file for file, _ in rows_read) == {1: 6 * (1 + (shares == 7)), 2: 6 * (1 + (shares == 7)), 3: 6}


# ----------------------------------------------------------------------------------------------------------------------
# Broken rows


def test_broken_rows_are_left_out_and_named(tmp_path):
    rows = [(image, caption) for image, caption, _ in BROKEN.values()]
    write_rows(tmp_path / "data.parquet", rows + [(make_image(i), f"image number {i}") for i in range(6)])
    broken = BrokenRows(tmp_path / "log" / "broken.jsonl", max_share=0.5)
    batches, _ = read(open_stream(tmp_path / "data.parquet", broken=broken), 6)
    counts = Counter(caption for batch in batches for caption in batch["caption"])
    assert counts == {f"image number {i}": 2 for i in range(6)}
    lines = [json.loads(line) for line in broken.path.read_text().splitlines()]
    reasons = {line["row"].split(",")[0]: line["reason"] for line in lines}
    assert len(lines) == 2 * len(BROKEN) and broken.found() == len(reasons) == len(BROKEN)
    for i, (kind, (_, _, reason)) in enumerate(BROKEN.items()):
        assert reason in reasons[f"row {i} of file 0"], kind
    assert any("'the truncated one'" in line["row"] for line in lines)
    assert broken.read == 2 * (6 + len(BROKEN))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_broken_rows_stop_the_run(tmp_path, num_workers):
    rows = [(make_image(i), f"image {i}" if i % 2 else "x" * (MAX_CAPTION_CHARACTERS + 1)) for i in range(40)]
    write_rows(tmp_path / "data.parquet", rows)
    broken = BrokenRows(tmp_path / "broken.jsonl", max_share=0.005)  # of 1000 rows, so 5 may be broken
    images = open_stream(tmp_path / "data.parquet", broken=broken)
    with pytest.raises(ValueError, match=r"6 of \d+ rows read are broken.*`max_broken_share=0.005`.*of 5000 at most"):
        read(images, 20, num_workers)
    assert broken.found() == 6
