# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Between two log lines, and between the first and the last denoising step, the host never waits for the GPU."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_greedy_grow import GreedyGrowPipeline
from diffusers_greedy_grow.pipelines.denoising import DenoisingMixin
from diffusers_greedy_grow.training.arguments import TrainingArguments
from diffusers_greedy_grow.training.guard import NumberOnItsWay
from diffusers_greedy_grow.training.loop import TrainingLoop
from diffusers_greedy_grow.training.objective import FlowObjective
from diffusers_greedy_grow.training.optimizer import split_for_muon
from diffusers_greedy_grow.training.phases import Phase
from diffusers_greedy_grow.training.run import Run
from diffusers_greedy_grow.training.text.captions import CaptionEncoder
from diffusers_greedy_grow.training.trained_model import TrainedModel

from .host_syncs import DeviceTensors, HostSync, without_host_syncs
from .models.test_foreign_cores import make_foreign
from .testing_utils import CAPTIONS, make_core, make_grown, make_pipeline


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ----------------------------------------------------------------------------------------------------------------------
# The checker


READS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: (x + 1).cpu(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "assignment by a mask": lambda x: x.detach().clone().index_put_((x > 0,), torch.zeros(3, device=x.device)),
    "tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "to": lambda x: torch.ones(2).to(x.device),
    "gradient": lambda x: torch.autograd.grad((x * 2).sum(), x)[0].max().item(),
}


@pytest.mark.parametrize("name", READS)
def test_what_waits_is_found(name):
    x = torch.ones(3, device=DEVICE, requires_grad=True)
    with pytest.raises(RuntimeError if DEVICE.type == "cuda" else HostSync), without_host_syncs(x):
        READS[name](x)


def test_what_does_not_wait_is_allowed():
    x = torch.ones(3, device=DEVICE, requires_grad=True)
    number = torch.ones(())
    with without_host_syncs(x):
        assert number.item() == 1 and torch.tensor([1.0]).tolist() == [1.0]
        filled = torch.zeros_like(x)
        filled[filled == 0] = 2.0  # without indices
        torch.autograd.grad((x * torch.ones(3).to(x.device, non_blocking=True)).sum(), x)[0].add_(x[:, None][:, 0])


# ----------------------------------------------------------------------------------------------------------------------
# Training


def make_batches(count: int, size: int, crop: bool) -> list[dict]:
    """Batches as a stream of images yields them: on the host."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        pixel_values = torch.randint(256, (2, 3, size, size), dtype=torch.uint8, generator=generator)
        batches.append({"pixel_values": pixel_values, "caption": CAPTIONS[:2]})
        if crop:
            batches[-1]["crop"] = torch.rand(2, 3, generator=generator)
    return [{name: pin(value) for name, value in batch.items()} for batch in batches]


def pin(value: torch.Tensor | list[str]) -> torch.Tensor | list[str]:
    return value.pin_memory() if isinstance(value, torch.Tensor) and DEVICE.type == "cuda" else value


def make_training(
    folder: Path, kind: str, optimizer: str = "muon", accumulated: int = 1
) -> tuple[TrainingLoop, FlowObjective, TrainedModel]:
    """Return the loop of a phase of one of the three kinds, its loss, and what trains. The text encoder trains with the core."""
    torch.manual_seed(0)
    grown = None if kind == "core" else make_grown(make_core(crop_conditioning=True))
    pipeline = make_pipeline(grown or make_core(crop_conditioning=True))
    unet, trains_text = pipeline.unet.to(DEVICE).train(), kind == "core"
    pipeline.text_encoder.to(DEVICE).requires_grad_(trains_text)
    phase = Phase(0, kind, kind, int(kind != "core"), unet.config.sample_size, 50, 2, 1e-3, 0.0, 1.0, "velocity")
    phase.freeze(unet)
    args = TrainingArguments(optimizer=optimizer, logging_steps=50, checkpointing_steps=50, lr_warmup_steps=0)
    accelerator = Accelerator(gradient_accumulation_steps=accumulated)
    run = Run(accelerator, folder, (args,), [phase])
    module = TrainedModel(unet, pipeline.text_encoder if trains_text else None)
    groups = [{"params": [p for p in module.parameters() if p.requires_grad], "lr": phase.learning_rate}]
    groups = split_for_muon(groups, module) if optimizer == "muon" else groups
    interrupt = SimpleNamespace(noted=lambda accelerator, ask: False)
    loop = TrainingLoop(run, phase, args, module, groups, interrupt)
    encode = CaptionEncoder(pipeline, accelerator.device, trains_text)
    return loop, FlowObjective(phase, accelerator, encode, unet, 1.0, 0, 0.1), module


def read_what_has_arrived(monkeypatch, tensors: DeviceTensors) -> None:
    """Let the host read numbers that a GPU would have copied to it."""
    read = NumberOnItsWay.read

    def allowed(number: NumberOnItsWay) -> float:
        with tensors.arrived():
            return read(number)

    monkeypatch.setattr(NumberOnItsWay, "read", allowed)


@pytest.mark.parametrize(
    "kind,optimizer,accumulated", [("core", "muon", 1), ("detail", "adamw", 1), ("joint", "muon", 2)]
)
def test_training_steps(kind, optimizer, accumulated, tmp_path, monkeypatch):
    loop, objective, module = make_training(tmp_path, kind, optimizer, accumulated)
    loop.notes_late = True
    batches = make_batches(4 * accumulated, objective.phase.resolution, crop=True)
    steps = loop.steps(batches, objective)
    next(steps)  # makes the optimizer's state
    roots = [module.state_dict(), objective.encode.pipeline.text_encoder.state_dict()]
    with without_host_syncs(roots, loop.ema.shadow_params) as tensors:
        read_what_has_arrived(monkeypatch, tensors)
        assert [next(steps).number for _ in range(3)] == [2, 3, 4]
    assert len(loop.guard.norms) == 3  # the last step is still on its way
    means = loop.means()
    assert len(loop.guard.norms) == 4 and means["skipped_steps"] == 0


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_that_is_noted_late_changes_the_weights_no_more_than_one_noted_at_once(optimizer, tmp_path, caplog):
    """The gradients of one step are NaN: it leaves no trace, and the run ends with the same weights, bit for bit."""
    results = []
    for late in (False, True):
        loop, objective, module = make_training(tmp_path, "joint", optimizer)
        loop.notes_late = late

        def lose_one(model, batch, step, micro_step):
            losses = objective(model, batch, step, micro_step)  # noqa: B023
            losses.loss = losses.loss * (float("nan") if step == 2 else 1.0)
            return losses

        caplog.clear()
        weights = []
        for step in loop.steps(make_batches(4, 32, crop=True), lose_one):
            weights.append([parameter.detach().clone() for parameter in module.parameters()])
            noted = len(loop.guard.norms) + loop.guard.skipped_steps
            assert noted == step.number - late
        assert all(map(torch.equal, weights[1], weights[2])) and not all(map(torch.equal, weights[2], weights[3]))
        assert (
            loop.means()["skipped_steps"] == 1
            and "joint: step 3 is skipped, its gradient has the norm nan" in caplog.text
        )
        state = [value for values in loop.optimizer.state.values() for value in values.values()]
        results.append([*weights[-1], *state, torch.tensor(loop.guard.norms)])
    assert all(map(torch.equal, *results))


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def make_foreign_pipeline() -> GreedyGrowPipeline:
    """A pipeline around a UNet of diffusers that predicts noise."""
    core, process = make_foreign("if")
    return make_pipeline(make_grown(core, 32, block_out_channels=(8,), process=process))


@pytest.mark.parametrize(
    "arguments",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 3.0, "guidance_stop": 0.5},
        {"guidance_scale": 3.0, "guidance_resolution": "core"},
        {"guidance_scale": 3.0, "core_first": 0.6},
    ],
    ids=["plain", "guided", "guided at the core", "core first"],
)
@pytest.mark.parametrize("kind", ["ours", "multistep", "foreign"])
def test_denoising_steps(kind, arguments, monkeypatch):
    """UniPC and Heun are left out: diffusers' own code of these waits in each step."""
    pipeline = make_foreign_pipeline() if kind == "foreign" else make_pipeline(make_grown())
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    if kind == "multistep":
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 2.0}
        pipeline.scheduler = DPMSolverMultistepScheduler(**flow)
    pipeline.to(DEVICE).set_progress_bar_config(disable=True)
    denoise, calls = DenoisingMixin.denoise, []

    def checked(self, sampling, latents, *args):
        # Multistep solvers keep their noise levels on the host.
        levels = [] if kind == "multistep" else [sampling.scheduler.sigmas]
        timesteps = sampling.timesteps, sampling.scheduler.timesteps
        roots = self.unet.state_dict(), latents, sampling.text, timesteps, levels
        with without_host_syncs(roots):
            calls.append(sampling.num_stages)
            return denoise(self, sampling, latents, *args)

    monkeypatch.setattr(DenoisingMixin, "denoise", checked)
    text_dim = pipeline.unet.config.cross_attention_dim
    embeds = {name: torch.randn(1, 4, text_dim, device=DEVICE) for name in ("prompt_embeds", "negative_prompt_embeds")}
    images = pipeline(**embeds, num_inference_steps=6, output_type="pt", **arguments).images
    (num_stages,) = calls
    assert torch.isfinite(images).all() and (0 in num_stages) == ("core_first" in arguments)
