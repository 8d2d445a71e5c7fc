# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""`grow.py --core` with pipelines of diffusers, as they save themselves: small ones with random weights."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from diffusers.utils import is_ftfy_available

from diffusers_greedy_grow import GreedyGrowPipeline
from diffusers_greedy_grow.training.plan import plan_phase
from training_examples import grow

from ..models.test_foreign_cores import grow as grow_model
from ..models.test_foreign_cores import make_foreign
from ..pipelines.test_foreign_pipelines import make_if, make_prx_pixel
from .launching import assert_same_weights, read_metrics, to_flags, weights


STEPS = {
    "resolutions": [16, 32],
    "block_out_channels": "8",
    "detail_steps": 4,
    "train_batch_size": 4,
    "num_validation_images": 8,
    "num_inference_steps": 2,
    "logging_steps": 2,
    "validation_steps": 4,
    "checkpointing_steps": 2,
}


@pytest.fixture(scope="module")
def cores(tmp_path_factory) -> Path:
    """A folder with a `PRXPixelPipeline` and an `IFPipeline`."""
    folder = tmp_path_factory.mktemp("cores")
    make_prx_pixel(prompt_max_tokens=48).save_pretrained(folder / "prx")
    make_if().save_pretrained(folder / "if", variant="fp16")  # as DeepFloyd IF is published
    return folder


@pytest.fixture
def train(data, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(signal, "signal", lambda *args: None)  # Ctrl-C is for pytest

    def train(output_dir: Path, **arguments) -> None:
        arguments = {"output_dir": output_dir, "train_data_dir": data, **STEPS, **arguments}
        grow.main(to_flags(arguments))

    return train


def core_weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return weights(folder / name, "transformer" if name == "prx" else "unet")


def assert_same_core(output: Path, cores: Path, name: str, same: bool = True) -> None:
    """The core in a grown pipeline has the weights of the given one, bit for bit, or some that differ."""
    grown = {key.removeprefix("core."): value for key, value in weights(output).items() if key.startswith("core.")}
    given = core_weights(cores, name)
    assert grown.keys() == given.keys()
    assert all(torch.equal(grown[key], value) for key, value in given.items()) == same


@pytest.mark.skipif(not is_ftfy_available(), reason="PRXPixel cleans prompts by ftfy")
def test_the_stage_trains_around_the_core(cores, train, tmp_path):
    train(tmp_path / "output", core=cores / "prx", hub_model_id="user/grown")
    grown = tmp_path / "output" / "grown-32"
    assert not (tmp_path / "output" / "core").exists() and not (tmp_path / "output" / "grown-32-detail").exists()
    assert_same_core(grown, cores, "prx")
    assert weights(grown)["stages.0.decoder.conv_out.weight"].any()
    losses = [line["loss"] for line in read_metrics(tmp_path / "output") if "loss" in line]
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)
    assert (tmp_path / "output" / "samples" / "grown-32.png").exists()
    assert "user/grown" in (grown / "README.md").read_text()
    pipeline = GreedyGrowPipeline.from_pretrained(grown)
    assert pipeline.config.detail_variances[0] > 0 and pipeline.scheduler.config.shift == 2 * 2 * 3
    assert pipeline.config.max_sequence_length == 48

    # Killed after its first checkpoint, the run ends with the same weights.
    shutil.copytree(tmp_path / "output", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "grown-32")
    train(tmp_path / "resumed", core=cores / "prx", resume_from_checkpoint="grown-32-2")
    assert_same_weights(grown, tmp_path / "resumed" / "grown-32")

    # A grown pipeline is the core of another run, which leaves the core in it alone as well.
    train(tmp_path / "next", core=grown, resolutions=[32, 64], detail_steps=1, num_validation_images=1)
    assert_same_core(tmp_path / "next" / "grown-64", cores, "prx")
    assert not (tmp_path / "next" / "grown-64-detail").exists()


def test_two_stages_cached_embeddings_and_a_joint_phase(cores, train, tmp_path):
    output = tmp_path / "output"
    train(
        output, core=cores / "if", variant="fp16", resolutions=[16, 32, 64], block_out_channels=["32", "8"], detail_steps=1,
        joint_steps=[0, 1], text_embeddings_dir=tmp_path / "embeddings", num_validation_images=1, gradient_checkpointing=True,
    )  # fmt: skip
    assert_same_core(output / "grown-32", cores, "if")
    assert_same_core(output / "grown-64-detail", cores, "if")
    assert_same_core(output / "grown-64", cores, "if", same=False)
    assert GreedyGrowPipeline.from_pretrained(output / "grown-64").unet.sample_sizes == (16, 32, 64)


def test_the_plan_reads_no_weights(cores, train, tmp_path, caplog):
    shutil.copytree(cores / "if", tmp_path / "core")
    for path in (tmp_path / "core").rglob("*.safetensors"):
        path.unlink()
    with caplog.at_level("INFO"):
        train(tmp_path / "output", core=tmp_path / "core", plan=True)
    count = sum(value.numel() for value in core_weights(cores, "if").values())
    assert f"core 16 px {count / 1e6:.2f} M" in caplog.text and "grown-32" in caplog.text
    assert "The core stays as it is; `joint_steps` trains it too" in caplog.text
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("family,deeper", [("unet", {"layers_per_block": 2}), ("if", {}), ("prx", {"depth": 3})])
def test_the_plan_counts_the_core(family, deeper):
    """A detail phase computes the core once, forward, and stores nothing in it."""

    def plan(joint: bool = False, **changes):
        core, process = make_foreign(family, **changes)
        with torch.device("meta"):
            grown = grow_model(core.to("meta"), process)
        grown.unfreeze_core() if joint else grown.freeze_core()
        return plan_phase("phase", grown, 32, 1, 8, 1, num_tokens=6, optimizer="muon", checkpointing=(False,))

    detail, joint = plan(), plan(joint=True)
    assert detail.forward_flops == joint.forward_flops
    assert joint.train_flops - detail.train_flops > detail.forward_flops
    assert (
        detail.trained_parameters < joint.trained_parameters
        and detail.batch_memory[False].activations < joint.batch_memory[False].activations
    )
    assert detail.optimizer_flops == joint.optimizer_flops  # Muon leaves the core's matrices to AdamW
    assert plan(**deeper).batch_memory == detail.batch_memory
    if deeper:
        assert plan(**deeper).forward_flops > detail.forward_flops


@pytest.mark.parametrize("family", ["if", "prx"])
def test_a_frozen_core_stores_nothing_for_the_backward_pass(family):
    core, process = make_foreign(family)
    grown = grow_model(core, process).train()
    grown.freeze_core()
    parameters = {parameter.untyped_storage()._cdata for parameter in grown.core.parameters()}
    saved = []
    inside = []
    grown.core.register_forward_pre_hook(lambda *_: inside.append(True))
    grown.core.register_forward_hook(lambda *_: inside.pop() and None)
    text, mask = torch.randn(2, 6, 32), torch.ones(2, 6, dtype=torch.bool)

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved.append((bool(inside), tensor.untyped_storage()._cdata in parameters))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss = grown(torch.randn(2, 3, 32, 32), 500.0, text, mask).sample.sum()
    loss.backward()
    assert saved and not any(in_core or of_core for in_core, of_core in saved)
    assert all(parameter.grad is None for parameter in grown.core.parameters())
    assert not any(module.training for module in grown.core.modules())


def test_what_is_refused(cores, train, tmp_path):
    for arguments, message in (
        ({"resolutions": [32, 64]}, r"`resolutions=\[32, 64\]` must begin with the resolution of `core=.*if'`, which is 16"),
        ({"hidden_size": 24}, "`hidden_size=24` is not that of `core=.*if'`, which is 16: leave it out"),
        ({"num_layers": 2}, "`num_layers=2` does not apply to `core=.*if'`, a model of diffusers: leave it out"),
        ({"core_dropout": 0.1}, "`core_dropout=0.1` does not apply to `core=.*if'`, a model of diffusers"),
        ({"random_crop": 0.5}, "`random_crop=0.5`: `core=.*if'` was not trained with random crops"),
        ({"init": "random"}, '`init=\'random\'` keeps the transformer of a ShallowUNet2DModel alone'),
        ({"detail_steps": 0}, "There is nothing to train around `core=.*if'`"),
        ({}, "`core=.*if'` cannot be loaded: .* no file named .* pass `variant`: fp16."),
    ):  # fmt: skip
        with pytest.raises((OSError, ValueError), match=message):
            train(tmp_path / "output", core=cores / "if", **arguments)
    DDPMPipeline(make_foreign("unet")[0], DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    with pytest.raises(ValueError, match="`core=.*ddpm'` has no text encoder, but `grow.py` trains on captions"):
        train(tmp_path / "output", core=tmp_path / "ddpm")
    shutil.copytree(cores / "if", tmp_path / "if", ignore=shutil.ignore_patterns("text_encoder"))
    with pytest.raises(
        ValueError, match="`core=.*if'` has no text encoder that can be read, but `grow.py` trains on captions"
    ):
        train(tmp_path / "output", core=tmp_path / "if")
    index = tmp_path / "ddpm" / "model_index.json"
    for changes, message in (
        ({"unet": ["diffusers", "version"]}, "must have one model of UNet2DModel, UNet2DConditionModel"),
        ({"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "version"]}, "not a class of diffusers"),
        ({"_class_name": "StableDiffusionPipeline"}, "holds a StableDiffusionPipeline. Pipelines that can be grown are"),
    ):  # fmt: skip
        index.write_text(json.dumps({**json.loads(index.read_text()), **changes}))
        with pytest.raises(ValueError, match=message):
            train(tmp_path / "output", core=tmp_path / "ddpm")
    assert not (tmp_path / "output").exists()
