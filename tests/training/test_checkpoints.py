# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

import json
import os
import re
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from diffusers_greedy_grow.training.checkpoints import (
    CheckpointFormatError,
    Progress,
    find_checkpoint,
    load_checkpoint,
    remove_newer,
    save_checkpoint,
)

from ..testing_utils import make_grown, make_inputs


def test_checkpoints(tmp_path, monkeypatch):
    accelerator = Accelerator(cpu=True)
    model = make_grown()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    named = list(model.named_parameters())
    ema = EMAModel([parameter for _, parameter in named], decay=0.9, foreach=True)

    def train(steps):
        for step in range(steps):
            model(**make_inputs(height=32, width=32, seed=step)).sample.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.step(model.parameters())

    train(2)

    def save(step, phase="grown-32", phase_index=1):
        progress = Progress(phase, phase_index, step, {"seed": 3}, guard={}, data_state=None, metrics_size=0)
        losses = torch.full((1, 3), step / 3)
        return save_checkpoint(accelerator, tmp_path / "checkpoints", progress, ema, named, losses, total_limit=2)

    path = save(2)
    progress = Progress.read(path)
    assert (progress.phase, progress.step, progress.ema_optimization_step) == ("grown-32", 2, 2)
    assert progress.config == {"seed": 3} and "model.safetensors" in progress.sizes
    train(2)
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    expected_ema = [shadow.clone() for shadow in ema.shadow_params]
    train(1)
    ema, losses = load_checkpoint(accelerator, path, named, 0.9)
    assert torch.equal(losses, torch.full((1, 3), 2 / 3))
    train(2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected))
    assert all(torch.equal(a, b) for a, b in zip(ema.shadow_params, expected_ema))

    with pytest.raises(ValueError, match="a moving average of other parameters"):
        load_checkpoint(accelerator, path, named[1:], 0.9)
    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match="`mixed_precision='fp16'`.* no loss scale"),
    ):
        patch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu"))
        load_checkpoint(accelerator, path, named, 0.9)

    # What was cut off in the middle of being saved or removed is no checkpoint.
    (tmp_path / "checkpoints" / ".grown-32-6.tmp").mkdir()
    save(99, "core", 0)
    for step in (3, 4, 5, 5):
        save(step)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["grown-32-4", "grown-32-5"]
    assert find_checkpoint(tmp_path, "latest").name == "grown-32-5"
    assert find_checkpoint(tmp_path, str(path.with_name("grown-32-4"))).name == "grown-32-4"
    assert find_checkpoint(tmp_path / "elsewhere", "latest") is None
    assert find_checkpoint(tmp_path, "grown-32-4") == tmp_path / "checkpoints" / "grown-32-4"  # by its name
    with pytest.raises(ValueError, match="'core-99'` is not a complete .* has grown-32-4, grown-32-5"):
        find_checkpoint(tmp_path, "core-99")

    # Files that are copied have other times.
    os.utime(path.with_name("grown-32-4") / "progress.json", (2e9, 2e9))
    assert find_checkpoint(tmp_path, "latest").name == "grown-32-5"
    # A run that resumes from an older one, however that is named, will save the newer ones again.
    monkeypatch.chdir(tmp_path)
    remove_newer(tmp_path / "checkpoints", Path("checkpoints/grown-32-5"))
    assert find_checkpoint(tmp_path, "latest").name == "grown-32-5"
    remove_newer(tmp_path / "checkpoints", Path("checkpoints/grown-32-4"))
    assert find_checkpoint(tmp_path, "latest").name == "grown-32-4"


@pytest.mark.parametrize("damage", ["cut off", "missing", "progress", "progress missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(damage, tmp_path, caplog):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(4, 4))
    named = list(model.named_parameters())
    ema = EMAModel([parameter for _, parameter in named], decay=0.9)
    for step in (1, 2):
        progress = Progress("core", 0, step, {}, {}, None, 0)
        save_checkpoint(accelerator, tmp_path / "checkpoints", progress, ema, named, torch.empty(0, 3), total_limit=2)
    newest = find_checkpoint(tmp_path, "latest")
    assert newest.name == "core-2"
    path = newest / ("progress.json" if "progress" in damage else "model.safetensors")
    if "missing" in damage:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-7])

    assert find_checkpoint(tmp_path, "latest").name == "core-1"
    message = {"cut off": r"model.safetensors has \d+ bytes of", "missing": "model.safetensors is missing"}.get(
        damage, "progress.json is missing or cut off"
    )
    assert re.search(f"core-2 is not a complete checkpoint and is ignored: {message}", caplog.text)
    with pytest.raises(ValueError, match="is not a complete checkpoint"):
        find_checkpoint(tmp_path, str(newest))
    # Without a good one the run does not start again, which would remove what may be mended.
    (tmp_path / "checkpoints" / "core-1" / "ema.safetensors").unlink()
    with pytest.raises(ValueError, match="none of the checkpoints in .* is complete: core-1, core-2"):
        find_checkpoint(tmp_path, "latest")


@pytest.mark.parametrize("resume", ["latest", "checkpoints/core-3"])
def test_a_checkpoint_of_another_format_is_refused_by_name(resume, tmp_path, monkeypatch):
    """It is not damaged: nothing is said of files to be put back, and no older checkpoint is used instead."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoints" / "core-3"
    folder.mkdir(parents=True)
    for values in ({"phase": "core", "phase_index": 0, "step": 3, "sizes": {}}, {"format": 2}):
        (folder / "progress.json").write_text(json.dumps(values))
        message = (
            f"core-3 was saved by another version.*format {values.get('format', 0)}; this version resumes format 1"
        )
        with pytest.raises(CheckpointFormatError, match=message):
            find_checkpoint(tmp_path, resume)
