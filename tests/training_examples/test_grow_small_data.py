# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The options of `grow.py` for small data sets, in whole runs: mirrored images, dropout, and the weights of the lowest held-out loss."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusers_greedy_grow import GrowableUNet2DConditionModel
from diffusers_greedy_grow.hub.lineage import get_lineage

from .launching import assert_same_weights, read_metrics, refuse, run, weights


# With such rates, held-out losses rise, and whatever a resumed run did otherwise would show.
ARGUMENTS = {
    "learning_rate": 1.0,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "ema_decay": 0.5,
    "validation_steps": 2,
    "checkpointing_steps": 2,
    "checkpoints_total_limit": 99,
    "horizontal_flip": True,
    "core_dropout": 0.3,
    "random_crop": 0.5,
    "keep_best": True,
}
PHASES = ("core", "grown-16-detail", "grown-16")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """The folder of a run that nothing interrupts."""
    output_dir = tmp_path_factory.mktemp("small") / "output"
    run(output_dir, train_data_dir=data, **ARGUMENTS)
    return output_dir


def test_phases_end_with_the_weights_of_their_lowest_held_out_loss(whole):
    metrics, steps = read_metrics(whole), []
    for phase in PHASES:
        lines = [line for line in metrics if line["phase"] == phase]
        best = min((line for line in lines if "val_loss" in line), key=lambda line: line["val_loss"])
        (kept,) = [line for line in lines if "best_step" in line]
        assert (kept["best_step"], kept["best_val_loss"]) == (best["step"], best["val_loss"])
        steps.append(best["step"])
        averages = load_file(whole / "checkpoints" / f"{phase}-{best['step']}" / "ema.safetensors")
        saved = weights(whole / phase)
        trained = {name: value for name, value in averages.items() if name.startswith("unet.")}
        assert trained and all(
            torch.equal(saved[name.removeprefix("unet.")], value) for name, value in trained.items()
        )
        model = json.loads((whole / phase / "unet" / "config.json").read_text())
        entry = model["_lineage"][-1]
        assert (entry["best_step"], entry["best_val_loss"]) == (best["step"], best["val_loss"])
        card = (whole / phase / "README.md").read_text()
        assert f"weights of step {best['step']}, held-out loss {best['val_loss']:.4g}" in card
        assert f"| held-out loss | {round(best['val_loss'], 4)} |" in card
    assert steps != [12, 6, 6]
    assert not list((whole / "checkpoints").glob(".best*"))


def test_the_models_know_of_dropout_and_crops(whole):
    grown = GrowableUNet2DConditionModel.from_pretrained(whole / "grown-16", subfolder="unet")
    untrained = GrowableUNet2DConditionModel.from_config(grown.config)
    for module, other in zip((grown.core, *grown.stages), (untrained.core, *untrained.stages), strict=True):
        weight = module.time_embedding.cond_proj.weight
        assert weight.shape[1] == 3 and weight.abs().max() > 1 > other.time_embedding.cond_proj.weight.abs().max()
    assert grown.config.dropout == 0.3 and [entry.get("phase") for entry in get_lineage(grown)] == [
        "core", None, "grown-16-detail", "grown-16",
    ]  # fmt: skip


@pytest.mark.parametrize("checkpoint", ["core-8", "grown-16-detail-6"])
def test_a_run_with_these_options_resumes_bit_for_bit(whole, data, tmp_path, checkpoint):
    """After the step whose weights are kept, before a later phase, and with what a kill while it saved left behind."""
    shutil.copytree(whole, tmp_path / "output")
    for name in (".best.safetensors", ".best.safetensors.tmp"):
        (tmp_path / "output" / "checkpoints" / name).write_bytes(b"cut off")
    run(tmp_path / "output", train_data_dir=data, resume_from_checkpoint=checkpoint, **ARGUMENTS)
    for phase in PHASES:
        assert_same_weights(whole / phase, tmp_path / "output" / phase)
    names = ("phase", "step", "val_loss", "best_step")
    expected, found = (
        [{name: line.get(name) for name in names} for line in read_metrics(folder)]
        for folder in (whole, tmp_path / "output")
    )
    assert found == expected
    assert not list((tmp_path / "output" / "checkpoints").glob(".*"))


def test_what_decides_which_weights_are_kept_must_not_change(whole, data, tmp_path):
    shutil.copytree(whole, tmp_path / "output")
    arguments = {**ARGUMENTS, "train_data_dir": data, "resume_from_checkpoint": "latest", "validation_steps": 3}
    error = refuse(tmp_path / "output", **arguments)
    assert "was saved with other arguments: validation_steps (2 -> 3)" in error
