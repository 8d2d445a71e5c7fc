# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The parts that train and evaluate a phase: the objective on a batch, held-out losses, and samples."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from diffusers_greedy_grow.flow import add_noise, descend, unshift_sigma
from diffusers_greedy_grow.training.arguments import LoraArguments
from diffusers_greedy_grow.training.data.captioned import CaptionedImages
from diffusers_greedy_grow.training.data.images import normalize
from diffusers_greedy_grow.training.data.sources import load_captioned_data
from diffusers_greedy_grow.training.evaluation import LOW_NOISE, VALIDATION, held_out_losses
from diffusers_greedy_grow.training.objective import FlowObjective, draw_noise, flow_loss
from diffusers_greedy_grow.training.phases import Phase
from diffusers_greedy_grow.training.run import Run
from diffusers_greedy_grow.training.samples import SAMPLES, Samples
from diffusers_greedy_grow.training.seeds import sample_generators
from diffusers_greedy_grow.training.text.captions import CaptionEncoder
from diffusers_greedy_grow.training.trained_model import TrainedModel

from ..data_utils import write_image_folder
from ..testing_utils import make_grown, make_pipeline


PHASE = Phase(1, "grown-32", "joint", 1, 32, 20, 2, 1e-3, -0.5, 1.2, "cosmap")
ARGS = LoraArguments(pretrained_model_name_or_path="", seed=3, num_inference_steps=2, guidance_scale=2.5)


@pytest.fixture
def pipeline():
    return make_pipeline(make_grown(), shift=2.0)


@pytest.fixture
def images(tmp_path) -> CaptionedImages:
    folder = write_image_folder(tmp_path / "images", count=12)
    return CaptionedImages(load_captioned_data(None, str(folder), "image", "text", hold_out=False)[0], 32)


class Watched(torch.nn.Module):
    """Calls the model, and keeps with what."""

    def __init__(self, unet: torch.nn.Module):
        super().__init__()
        self.model, self.calls = TrainedModel(unet), []

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, **conditions: torch.Tensor):
        self.calls.append((sample, timestep, conditions))
        return self.model(sample, timestep, **conditions)


def make_objective(pipeline, accelerator: Accelerator, phase: Phase = PHASE, caption_dropout: float = 0.5):
    encode = CaptionEncoder(pipeline, accelerator.device)
    return FlowObjective(phase, accelerator, encode, pipeline.unet, 2.0, seed=3, caption_dropout=caption_dropout)


def test_the_objective_depends_on_seed_phase_step_and_place(pipeline):
    """With accumulated batches, an image's noise is that of its place in the whole step."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    objective = make_objective(pipeline, accelerator)
    batch = {"pixel_values": torch.arange(2 * 3 * 32 * 32).reshape(2, 3, 32, 32).to(torch.uint8)}
    batch["caption"] = ["a red circle", "a blue square"]
    dropped_at_all = set()
    for step in range(3):
        noise, sigma, dropped = draw_noise(
            (3, 1, step), 0, 4, torch.Size((4, 3, 32, 32)), 2.0, -0.5, 1.2, accelerator.device, 0.5
        )
        for half in (0, 1):
            model, own = Watched(pipeline.unet), slice(2 * half, 2 * half + 2)
            with torch.no_grad():
                losses = objective(model, batch, step, micro_step=2 * step + half)
            ((sample, timestep, conditions),) = model.calls
            x0 = normalize(batch["pixel_values"])
            assert torch.equal(sample, add_noise(x0, noise[own], sigma[own]))
            assert torch.equal(timestep, 1000 * sigma[own]) and torch.equal(losses.sigma, sigma[own])
            captions = ["" if drop else caption for drop, caption in zip(dropped[own], batch["caption"])]
            with torch.no_grad():
                expected = objective.encode(captions)
                same = flow_loss(pipeline.unet, x0, noise[own], sigma[own], 2, "cosmap", **expected)
            assert torch.equal(conditions["encoder_hidden_states"], expected["encoder_hidden_states"])
            assert torch.equal(losses.loss, same.loss) and torch.equal(losses.low, same.low)
            dropped_at_all |= set(dropped[own])
    assert dropped_at_all == {True, False}


def test_bands_are_the_last_growths(pipeline):
    accelerator = Accelerator(cpu=True)
    assert make_objective(make_pipeline(), accelerator).band_factor == 2
    assert make_objective(make_pipeline(make_grown(sample_size=64)), accelerator).band_factor == 4


def test_held_out_losses_compare(pipeline, images):
    """Between phases, by equal noise levels in terms of the core's; between runs, by noise that depends on no seed."""
    accelerator = Accelerator(cpu=True)
    levels = {}
    for phase in (PHASE, replace(PHASE, resolution=16, stage=0, kind="core", logit_mean=9.0)):
        watched = pipeline if phase is PHASE else make_pipeline()
        objective = make_objective(watched, accelerator, phase)
        objective.shift = 2.0 if phase is PHASE else 1.0
        model = Watched(watched.unet).train()
        means = held_out_losses(objective, model, images, count=3, logit_mean=0.5, logit_std=0.9)
        size = phase.resolution
        assert all(not sample.requires_grad and sample.shape[-1] == size for sample, _, _ in model.calls)
        assert model.training and {"val_loss", "val_loss_low", "val_low_noise_loss_high"} <= means.keys()
        assert not any(name.startswith("val_low_noise") and "sigma" in name for name in means)
        sigma = torch.cat([timestep / 1000 for _, timestep, _ in model.calls[::2]])
        levels[size] = unshift_sigma(sigma, objective.shift)
        low = torch.cat([timestep / 1000 for _, timestep, _ in model.calls[1::2]])
        torch.testing.assert_close(low, LOW_NOISE[0] + (LOW_NOISE[1] - LOW_NOISE[0]) * (torch.arange(3) + 0.5) / 3)
        noise = randn_tensor((2, 3, size, size), generator=sample_generators((VALIDATION, size), 0, 2))
        x0 = normalize(torch.stack([images.at(size)[i]["pixel_values"] for i in (0, 1)]))
        assert torch.equal(model.calls[0][0], add_noise(x0, noise, sigma[:2]))
    torch.testing.assert_close(levels[16], levels[32])
    normal = torch.special.ndtri((torch.arange(3) + 0.5) / 3)
    torch.testing.assert_close(levels[16], torch.sigmoid(0.5 + 0.9 * normal))


def test_all_phases_draw_from_the_same_noise(pipeline, tmp_path, monkeypatch):
    accelerator = Accelerator(cpu=True)
    phases = [replace(PHASE, name="core", resolution=16), PHASE]
    run = Run(accelerator, tmp_path, (ARGS,), phases)
    samples = Samples(run, ARGS, ["a red circle", "a blue square"], resolution=32)
    calls, original = [], type(pipeline).__call__

    def draw(self, *args, **kwargs):
        calls.append(kwargs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(pipeline), "__call__", draw)
    images = [samples.draw(one, samples.captions) for one in (make_pipeline(), pipeline)]
    assert [[image.width for image in row] for row in images] == [[16] * 2, [32] * 2]
    assert all((call["num_inference_steps"], call["guidance_scale"]) == (2, 2.5) for call in calls)
    small, large = (call["latents"] for call in calls)
    assert torch.equal(large, randn_tensor((2, 3, 32, 32), generator=sample_generators((3, SAMPLES), 0, 2)))
    torch.testing.assert_close(small, descend(large, torch.ones(1), 2)[0])


def test_the_sample_grid_keeps_rows_of_an_earlier_session(pipeline, tmp_path):
    """But not those of other captions."""
    phases = [replace(PHASE, name="core", resolution=16), PHASE]
    run = Run(Accelerator(cpu=True), tmp_path, (ARGS,), phases)
    captions = ["a red circle", "a blue square"]
    heights = []
    for some, phase, drawn in (
        (captions, phases[0], make_pipeline()),
        (captions, phases[1], pipeline),
        (["another", "caption"], phases[1], pipeline),
    ):
        Samples(run, ARGS, some, 32).add_row(phase, drawn)
        heights.append(Image.open(tmp_path / "samples.png").height)
    assert heights[1] > 1.5 * heights[0] and heights[2] < 1.5 * heights[0]
