# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Whole runs of `grow.py --cache_core_predictions`."""

import os
import re
import shutil
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch

from diffusers_greedy_grow import GreedyGrowPipeline, ShallowUNet2DModel

from ..testing_utils import heed_hangups
from .launching import assert_same_weights, command, environment, read_metrics, run, weights


CACHED = {"cache_core_predictions": 2, "joint_steps": 0, "num_validation_images": 1, "validation_steps": 100}


def test_a_run_with_cached_predictions(finished, data, here, tmp_path, caplog, monkeypatch):
    core, output = finished[0] / "core", tmp_path / "output"
    images_seen: list[int] = []  # by the core

    def note(module: torch.nn.Module, args: tuple) -> None:
        if isinstance(module, ShallowUNet2DModel):
            images_seen.append(len(args[0]))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    with hook, caplog.at_level("INFO"):
        here(
            output, core=core, train_data_dir=data, **CACHED, detail_steps=40, num_inference_steps=1, guidance_scale=1
        )
    # 57 images; a held-out image at two kinds of noise levels; and one sample, since data of this size has three held-out images
    num_images = 57
    predicted = 2 * num_images
    assert predicted < sum(images_seen) < predicted + 10 < 40 * 4
    assert (
        f"The core runs {predicted} times, instead of 160 times in all, which saves {160 - predicted}" in caplog.text
    )
    (folder,) = (output / "core_predictions").iterdir()
    # Per draw, the digest, 3 x 8 x 8 pixels and features of 16 channels on a grid of 4 x 4, all in two bytes
    assert (folder / "predictions.bin").stat().st_size == predicted * (8 + 2 * (3 * 64 + 16 * 16))
    grown, given = weights(output / "grown-16"), weights(core)
    assert all(torch.equal(grown[f"core.{name}"], value) for name, value in given.items())
    assert read_metrics(output)[0]["loss"] > 0
    GreedyGrowPipeline.from_pretrained(output / "grown-16")

    # A run that was killed resumes with the predictions that are there, and ends with the same weights. It needs no more space on
    # the disk, but another run does, which would find out only after it has begun.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(OSError, match="of which 0.0 GB are there already, but only 0.0 GB are free"):
        here(
            tmp_path / "other", core=core, train_data_dir=data, **CACHED, detail_steps=40, seed=1,
            core_predictions_dir=output / "core_predictions",
        )  # fmt: skip
    assert not (tmp_path / "other" / "config.yaml").exists()
    shutil.copytree(output, tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "grown-16")
    images_seen.clear()
    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    with hook:
        here(
            tmp_path / "resumed", core=core, train_data_dir=data, **CACHED, detail_steps=40, num_inference_steps=1,
            guidance_scale=1, resume_from_checkpoint="grown-16-36",
        )  # fmt: skip
    assert sum(images_seen) < 10
    assert_same_weights(output / "grown-16", tmp_path / "resumed" / "grown-16")


@pytest.mark.slow
def test_a_signal_while_predictions_are_computed(finished, data, tmp_path):
    """Both processes stop without an error, and one process continues what they have begun."""
    output, log = tmp_path / "output", tmp_path / "log"
    arguments = {**CACHED, "core": finished[0] / "core", "train_data_dir": data, "cache_core_predictions": 20}
    arguments |= {"detail_steps": 160, "logging_steps": 100, "checkpointing_steps": 1000, "num_scored_images": 0}
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command(output, num_processes=2, **arguments), env=environment(), stderr=file, stdout=file, start_new_session=True,
            preexec_fn=heed_hangups,
        )  # fmt: skip
        deadline = time.monotonic() + 240
        while "grown-16, core:" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=60) != 0
        while "Continue with the same arguments and `--resume_from_checkpoint latest`" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
    said = log.read_text()
    assert (
        "SIGTERM: the run saves its work" in said and "grow.py FAILED" not in said and "Connection closed" not in said
    )
    resumed = run(output, **arguments, train_batch_size=8, resume_from_checkpoint="latest")
    (left,) = map(int, re.findall(r"grown-16: (\d+) predictions of the core are computed", resumed))
    assert 0 < left < 20 * 57
    GreedyGrowPipeline.from_pretrained(output / "grown-16")


def test_the_plan(here, finished, tmp_path, caplog):
    with caplog.at_level("INFO"):
        here(tmp_path, core=finished[0] / "core", plan=True, **CACHED)
    size = 2 * (8 + 2 * (3 * 64 + 16 * 16)) / 1e6
    assert (
        f"grown-16: the core's predictions take {size:.2f} GB on disk per 1000 training images. The core runs 2 times per image, "
        "but not for draws that no step reads, instead of 24 times in all." in caplog.text
    )


def test_what_is_refused(finished, data, here, tmp_path):
    core = {"core": finished[0] / "core"}
    with pytest.raises(ValueError, match=r"`cache_core_predictions=2` .* `joint_steps=\[300\]` trains it"):
        here(tmp_path / "output", **core, **{**CACHED, "joint_steps": 300})
    with pytest.raises(SystemExit):
        here(tmp_path / "output", **core, core_predictions_dir=tmp_path)
    with pytest.raises(OSError, match="The core's predictions need .* GB in .*, but only .* GB are free"):
        many = {"cache_core_predictions": 10**12, "detail_steps": 10**12}
        here(tmp_path / "output", **core, **{**CACHED, **many}, train_data_dir=data)
    assert not (tmp_path / "output" / "config.yaml").exists()
