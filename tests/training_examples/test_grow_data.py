# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The data that `grow.py` reads: streams, other images above the core's resolution, text embeddings, broken rows."""

import json
import os
import re
import signal
import subprocess
import time

import pytest

from diffusers_greedy_grow import GreedyGrowPipeline

from ..data_utils import make_image, write_image_folder, write_rows
from .launching import assert_same_weights, command, environment, read_metrics, refuse, run


@pytest.mark.slow
def test_a_killed_run_on_a_stream_is_resumed_bit_for_bit(tmp_path):
    """There are several files, workers, shapes and broken rows. The kill falls between two checkpoints."""
    (tmp_path / "data").mkdir()
    for file in range(3):
        shapes = [(32, 32) if i % 3 else (40, 12) for i in range(20)]
        rows = [(make_image(20 * file + i).resize(shape), f"number {20 * file + i}") for i, shape in enumerate(shapes)]
        rows[7] = (b"broken", f"the broken one of {file}")
        write_rows(tmp_path / "data" / f"{file}.parquet", rows)
    arguments = {
        "train_data_dir": tmp_path / "data", "image_column": "photo", "streaming": True, "shuffle_buffer_size": 5,
        "dataloader_num_workers": 2, "aspect_ratio_buckets": "16,16;8,24", "core_steps": 120, "max_broken_share": 0.2, "detail_steps": 0,
        "joint_steps": 0, "logging_steps": 1, "checkpointing_steps": 7, "validation_steps": 1000,
    }  # fmt: skip
    log = open(tmp_path / "killed.log", "w", encoding="utf-8")
    metrics = tmp_path / "killed" / "metrics.jsonl"
    process = subprocess.Popen(
        command(tmp_path / "killed", **arguments), env=environment(), stdout=log, stderr=log, start_new_session=True
    )
    while not metrics.exists() or '"step": 17,' not in metrics.read_text():
        assert process.poll() is None, (tmp_path / "killed.log").read_text()[-1200:]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(read_metrics(tmp_path / "killed")) < 120

    said = run(tmp_path / "killed", resume_from_checkpoint="latest", **arguments)
    assert re.search(r"Resuming from .*core-\d+", said) and "Images are streamed; 8 held out" in said
    run(tmp_path / "whole", **arguments)
    resumed, whole = (
        [{key: line[key] for key in line if "loss" in key or key == "step"} for line in read_metrics(tmp_path / name)]
        for name in ("killed", "whole")
    )
    assert resumed == whole and len(whole) == 121
    assert_same_weights(tmp_path / "killed" / "core", tmp_path / "whole" / "core")
    names = {json.loads(line)["row"] for line in (tmp_path / "whole" / "broken_rows.jsonl").read_text().splitlines()}
    assert names == {f"row 7 of file {file}, 'the broken one of {file}'" for file in range(3)}
    assert "3 broken rows were left out so far" in said


@pytest.mark.parametrize("known", [pytest.param(False, marks=pytest.mark.slow), True])
def test_other_images_above_the_cores_resolution(data, tmp_path, known):
    """The core reads its own images at its resolution. Growth and the held-out loss use the others, in several shapes."""
    shapes = ((32, 32), (40, 10), (10, 40))
    flat = [
        (
            make_image(i).resize(shapes[i % 3]).point(lambda value: 100 + value // 64),
            f"{'image number' if known else 'flat'} {i}",
        )
        for i in range(24)
    ]
    write_rows(tmp_path / "flat.parquet", flat, image_column="image")
    folder = write_image_folder(tmp_path / "small", count=30, size=8)
    arguments = {"train_data_dir": folder, "detail_steps": 6, "joint_steps": 0, "core_steps": 8}
    log = run(
        tmp_path / "output", high_res_data_dir=tmp_path / "flat.parquet", aspect_ratio_buckets="16,16;8,32;32,8",
        dataloader_num_workers=1, **arguments,
    )  # fmt: skip
    assert "Images to train on: 30 at the core's resolution, 23 above it; 1 held out" in log
    assert ("The captions of 1 held-out images are in the core's data, too" in log) == known
    (variance,) = GreedyGrowPipeline.from_pretrained(tmp_path / "output" / "grown-16").config.detail_variances
    assert 0 < variance < 1e-4
    lines = read_metrics(tmp_path / "output")
    low, high = (
        [line["loss_high"] for line in lines if line["phase"] == phase and "loss" in line]
        for phase in ("core", "grown-16")
    )
    assert min(low) > 10 * max(high)  # noise has much detail, flat images have hardly any
    assert {line["phase"] for line in lines if "val_loss" in line} == {"core", "grown-16"}


def test_cached_text_embeddings_change_nothing(finished, data, tmp_path):
    """Losses are the same with and without the cache, with caption dropout and for held-out captions."""
    pipeline = GreedyGrowPipeline.from_pretrained(finished[0] / "core")
    pipeline.text_encoder.save_pretrained(tmp_path / "encoder")
    pipeline.tokenizer.save_pretrained(tmp_path / "encoder")
    arguments = {
        "train_data_dir": data, "text_encoder": tmp_path / "encoder", "core_steps": 10, "detail_steps": 2,
        "joint_steps": 0, "caption_dropout": 0.3, "logging_steps": 1,
    }  # fmt: skip
    run(tmp_path / "without", **arguments)
    log = run(tmp_path / "with", text_embeddings_dir=tmp_path / "embeddings", **arguments)
    assert "61 captions embedded" in log  # the empty one too
    a, b = read_metrics(tmp_path / "without"), read_metrics(tmp_path / "with")
    assert len(a) == len(b) >= 12
    for one, other in zip(a, b):
        for name in one:
            if "loss" in name:
                assert other[name] == pytest.approx(one[name], rel=1e-5), name


def test_images_without_detail(here, tmp_path, caplog):
    """They are noticed before the core trains, and do not end the run when the stage is grown."""
    rows = [(make_image(i, size=8).resize((16, 16), resample=0), f"image {i}") for i in range(12)]
    write_rows(tmp_path / "data.parquet", rows, image_column="image")
    steps = {
        "core_steps": 1,
        "detail_steps": 1,
        "joint_steps": 0,
        "num_validation_images": 1,
        "num_inference_steps": 1,
    }
    with caplog.at_level("INFO"):
        here(tmp_path / "output", train_data_dir=tmp_path / "data.parquet", **steps)
    warned, trained = (
        caplog.text.index(text) for text in ("have no detail at 16 px that they lack at 8", "core is done")
    )
    assert warned < trained
    assert GreedyGrowPipeline.from_pretrained(tmp_path / "output" / "grown-16").config.detail_variances is None


def test_broken_data_stops_a_run(tmp_path):
    rows = [(make_image(i), f"image {i}") for i in range(20)] + [(b"", "nothing"), (None, "none")] * 4
    write_rows(tmp_path / "data.parquet", rows)
    arguments = {"train_data_dir": tmp_path / "data.parquet", "image_column": "photo", "max_broken_share": 0.003}
    error = refuse(tmp_path / "output", **arguments)
    assert re.search(r"4 of \d+ rows read are broken, .* `max_broken_share=0.003`.*broken_rows.jsonl names all", error)
    assert len((tmp_path / "output" / "broken_rows.jsonl").read_text().splitlines()) >= 4
