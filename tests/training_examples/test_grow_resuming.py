# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Runs of `grow.py` that are resumed, interrupted or stopped."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from ..data_utils import write_image_folder
from ..testing_utils import heed_hangups
from .launching import (
    GROW,
    assert_same_weights,
    command,
    environment,
    grow_flags,
    list_files,
    read_metrics,
    refuse,
    run,
)


def test_a_finished_run_resumes_at_its_end(finished, data, tmp_path):
    shutil.copytree(finished[0], tmp_path / "output")
    log = run(tmp_path / "output", train_data_dir=data, resume_from_checkpoint="latest")
    assert "grown-16-6" in log and "core is done" not in log
    assert_same_weights(finished[0] / "grown-16", tmp_path / "output" / "grown-16")
    assert read_metrics(tmp_path / "output") == read_metrics(finished[0])
    # With another batch size, the remaining steps would see other images.
    error = refuse(tmp_path / "output", train_data_dir=data, resume_from_checkpoint="latest", train_batch_size=2)
    assert re.search(
        r"grown-16-6 was saved with other arguments: images per step \(.*'grown-16': 4.*'grown-16': 2", error
    )
    log = run(
        tmp_path / "output", train_data_dir=data, resume_from_checkpoint="latest", learning_rate=1e-4, joint_steps=12,
        resume_with_changes=True, validation_prompts="a cat",
    )  # fmt: skip
    assert "grown-16-6" in log
    step, rate = [(line["step"], line["lr"]) for line in read_metrics(tmp_path / "output") if "lr" in line][-3]
    assert step == 8 and 0 < rate < 1e-4  # the new rate
    # Images of earlier captions do not stand above those of the new one.
    assert (
        Image.open(finished[0] / "samples.png").height
        > 3 * 132
        > 2 * 132
        > Image.open(tmp_path / "output" / "samples.png").height
    )


def test_other_captions_are_refused_and_keep_the_tokenizer(here, tmp_path):
    """The small tokenizer is trained on captions: a new one would give words other numbers than the encoder has learned."""
    folder = write_image_folder(tmp_path / "images", count=60)
    arguments = {"train_data_dir": folder, "detail_steps": 0, "joint_steps": 0}
    run(tmp_path / "output", core_steps=4, **arguments)
    tokenizer = (tmp_path / "output" / "core" / "tokenizer" / "tokenizer.json").read_text()
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(line.replace("image", "painting") for line in lines[10:]))
    (tmp_path / "output" / "checkpoints" / ".DS_Store").write_text("")  # a stray file is ignored
    arguments |= {"core_steps": 8, "resume_from_checkpoint": tmp_path / "output" / "checkpoints" / "core-4"}
    with pytest.raises(ValueError, match=r"core-4 was saved with other arguments: .*captions \(\w+ -> \w+\)"):
        here(tmp_path / "output", **arguments)
    run(tmp_path / "output", resume_with_changes=True, **arguments)
    assert read_metrics(tmp_path / "output")[-1]["step"] == 8
    assert (tmp_path / "output" / "core" / "tokenizer" / "tokenizer.json").read_text() == tokenizer


def test_a_refused_run_keeps_its_checkpoints(finished, data, here, tmp_path):
    shutil.copytree(finished[0], tmp_path / "output")
    checkpoints = sorted((tmp_path / "output" / "checkpoints").iterdir())
    (tmp_path / "output" / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="lacks lines that were there when the checkpoint was saved: put it back"):
        here(tmp_path / "output", train_data_dir=data, resume_from_checkpoint=checkpoints[0])
    assert len(checkpoints) > 1 and sorted((tmp_path / "output" / "checkpoints").iterdir()) == checkpoints


@pytest.mark.slow
def test_muon_resumes_bit_for_bit_and_only_with_muon(data, here, tmp_path):
    arguments = {
        "train_data_dir": data, "optimizer": "muon", "hidden_size": 32, "block_out_channels": "32", "core_steps": 4,
        "detail_steps": 3, "joint_steps": 4, "checkpointing_steps": 2, "checkpoints_total_limit": 9, "lr_warmup_steps": 0,
    }  # fmt: skip
    run(tmp_path / "whole", **arguments)
    for phase in ("core", "grown-16-detail", "grown-16"):
        state = torch.load(tmp_path / "whole" / "checkpoints" / f"{phase}-2" / "optimizer.bin")["state"]
        kinds = {frozenset(values) for values in state.values()}
        assert kinds == {frozenset({"momentum_buffer"}), frozenset({"step", "exp_avg", "exp_avg_sq"})}
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    run(tmp_path / "resumed", resume_from_checkpoint="grown-16-2", **arguments)
    assert_same_weights(tmp_path / "whole" / "grown-16", tmp_path / "resumed" / "grown-16")
    arguments |= {"resume_from_checkpoint": "latest", "resume_with_changes": True, "optimizer": "adamw"}
    files = list_files(tmp_path / "whole")
    with pytest.raises(
        ValueError, match="`optimizer='adamw'`: .*grown-16-4 holds the state of muon, which adamw cannot use"
    ):
        here(tmp_path / "whole", **arguments)
    assert list_files(tmp_path / "whole") == files


# ----------------------------------------------------------------------------------------------------------------------
# Interruptions


def interrupt(output_dir: Path, number: int, after: str, launched: bool, **arguments) -> str:
    """
    Run until `after` shows up in the metrics, then send a signal. Return what the run said. `launched` is whether `accelerate
    launch` starts the run.
    """
    log, metrics = output_dir.with_suffix(".log"), output_dir / "metrics.jsonl"
    deadline = time.monotonic() + 240
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command(output_dir, **arguments)
            if launched
            else [sys.executable, str(GROW), *grow_flags(output_dir, **arguments)],
            env=environment(),
            stderr=file,
            stdout=file,
            start_new_session=True,
            preexec_fn=heed_hangups,
        )
        while not metrics.exists() or after not in metrics.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.02)
        # A terminal does the same: a launcher gets the signal and dies at once, and the training gets it too.
        os.killpg(process.pid, number)
        assert process.wait(timeout=60) != 0
        while "--resume_from_checkpoint latest" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
    return log.read_text()


def interrupted_run(data: Path, phase: str) -> dict:
    """The arguments of a run whose `phase` is long enough for a signal to arrive before its end."""
    steps = {"core_steps": 12, "joint_steps": 12, "core_steps" if phase == "core" else "joint_steps": 200}
    never = {"checkpointing_steps": 1000, "validation_steps": 1000}
    return {**steps, "detail_steps": 2, "logging_steps": 1, "train_data_dir": data, **never}


@pytest.fixture(scope="module")
def whole_runs(data, tmp_path_factory) -> dict[str, Path]:
    """The folders of runs that nothing interrupts, by the phase that is long."""
    folders = {phase: tmp_path_factory.mktemp("whole") / "output" for phase in ("core", "grown-16")}
    for phase, output_dir in folders.items():
        run(output_dir, **interrupted_run(data, phase))
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_an_interrupted_run_is_resumed_bit_for_bit(data, whole_runs, tmp_path, name):
    number = getattr(signal, name)
    phase = "grown-16" if number in (signal.SIGTERM, signal.SIGUSR1) else "core"
    arguments, whole = interrupted_run(data, phase), whole_runs[phase]
    after = f'"phase": "{phase}", "step": 20' if phase == "core" else f'"phase": "{phase}", "step": 20,'
    # The loader's workers get the signal too. The current step still needs them.
    launched = number == signal.SIGTERM
    log = interrupt(tmp_path / "output", number, after, launched, dataloader_num_workers=2, **arguments)
    assert f"of {phase}; saved" in log and "--resume_from_checkpoint latest" in log
    (checkpoint,) = (tmp_path / "output" / "checkpoints").glob(f"{phase}-[0-9]*")
    step = int(checkpoint.name.split("-")[-1])
    assert 20 <= step < 200
    by_name = number in (signal.SIGHUP, signal.SIGUSR1)
    run(tmp_path / "output", resume_from_checkpoint=checkpoint.name if by_name else "latest", **arguments)
    assert_same_weights(tmp_path / "output" / "grown-16", whole / "grown-16")
    resumed, expected = read_metrics(tmp_path / "output"), read_metrics(whole)
    assert [(line["phase"], line["step"]) for line in resumed] == [(line["phase"], line["step"]) for line in expected]
    for a, b in zip(resumed, expected):
        assert {k: v for k, v in a.items() if "loss" in k} == {k: v for k, v in b.items() if "loss" in k}


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(data, tmp_path):
    """As when a scheduler requeues a job whose first try is still at work. A run that was killed holds nothing."""
    output_dir, arguments = tmp_path / "output", {"train_data_dir": data, "core_steps": 100_000, "logging_steps": 1}
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, str(GROW), *grow_flags(output_dir, **arguments)],
            env=environment(),
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + 240
        while not list((output_dir / "checkpoints").glob("core-*")):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.1)
        files = list_files(output_dir / "core")
        error = refuse(output_dir, resume_from_checkpoint="latest", **arguments)
        assert f"is in use by process {process.pid} on " in error and process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert list_files(output_dir / "core") == files
    steps = [line["step"] for line in read_metrics(output_dir)]
    assert steps == sorted(steps)
    (newest, *_) = sorted((output_dir / "checkpoints").glob("core-*"), key=lambda path: -int(path.name[5:]))
    step = int(newest.name[5:])
    run(output_dir, resume_from_checkpoint="latest", resume_with_changes=True, **{**arguments, "core_steps": step + 2})


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path):
    error = refuse(
        tmp_path / "output", train_data_dir=data, learning_rate=1e20, lr_warmup_steps=0, checkpointing_steps=1,
        max_grad_norm=1e30, max_skipped_steps=2,
    )  # fmt: skip
    assert re.search(r"core stops at step \d+: The gradient's norm was not finite", error)
    assert re.search(r"for 3 steps in a row; the last one was nan. This batch had the noise levels 0\.\d+", error)
    assert "The last good checkpoint is" in error and "core-1" in error and "`learning_rate`" in error
