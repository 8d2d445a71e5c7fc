# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Held-out losses, and the shapes scorer's share of attributes that samples get right."""

import math

import torch
from accelerate.utils import gather_object
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from ..flow import shift_sigma
from .data.captioned import CaptionedImages
from .data.images import normalize
from .objective import FlowObjective, LossMeter, flow_loss
from .seeds import sample_generators
from .shapes.scorer import CHANCE, score_images
from .sharding import reshard
from .trained_model import TrainedModel


# Takes the place of the phase's index in the keys of random numbers. Phases have small indices, so no keys are equal.
VALIDATION = 1000
# Noise levels at which grain shows. Training draws them rarely.
LOW_NOISE = 0.02, 0.3


@torch.no_grad()
def held_out_losses(
    objective: FlowObjective,
    module: TrainedModel,
    images: CaptionedImages,
    count: int,
    logit_mean: float,
    logit_std: float,
) -> dict[str, float]:
    """
    Return the held-out loss, spread over the processes. All runs use the same images with the same noise. The noise levels are
    evenly spaced quantiles of one distribution for all phases, so that phases compare; a second pass uses levels in `LOW_NOISE`.

    Args:
        objective (`FlowObjective`): The phase's objective.
        module (`TrainedModel`): The model.
        images (`CaptionedImages`): The held-out images.
        count (`int`): How many of them to use.
        logit_mean (`float`), logit_std (`float`): The distribution of noise levels, in terms of the core's noise level.
    """
    accelerator, phase = objective.accelerator, objective.phase
    images, count = images.at(phase.resolution), min(count, len(images))
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    first, end = count * rank // num_processes, count * (rank + 1) // num_processes
    rows_of_losses: list[list[float]] = []  # per image: low, high, sigma; and the same for low noise
    module.eval()
    for batch in range(math.ceil(math.ceil(count / num_processes) / phase.batch_size)):
        start = first + batch * phase.batch_size
        stop = min(start + phase.batch_size, end)
        is_spare = start >= stop
        if is_spare:  # a sharded model needs all processes in each forward pass
            start, stop = 0, 1
        rows = [images[i] for i in range(start, stop)]
        x0 = normalize(torch.stack([row["pixel_values"] for row in rows]).to(accelerator.device))
        generators = sample_generators((VALIDATION, phase.resolution), start, len(x0))
        noise = randn_tensor(x0.shape, generator=generators, device=accelerator.device)
        # Each image's share of the way through the levels: quantiles are more even than draws.
        shares = (start + 0.5 + torch.arange(len(x0), device=x0.device)) / count
        normal = logit_mean + logit_std * torch.special.ndtri(shares)
        sigma = shift_sigma(torch.sigmoid(normal), objective.shift)
        low_sigma = LOW_NOISE[0] + (LOW_NOISE[1] - LOW_NOISE[0]) * shares
        with accelerator.autocast():
            conditions = objective.encode([row["caption"] for row in rows])
            losses, low_losses = (
                flow_loss(module, x0, noise, levels, objective.band_factor, phase.loss_weighting, **conditions)
                for levels in (sigma, low_sigma)
            )
        if not is_spare:
            rows_of_losses += torch.cat([losses.stack(), low_losses.stack()], dim=1).tolist()
    module.train()
    reshard(module)
    if num_processes > 1:  # the processes may have unequal shares
        rows_of_losses = gather_object(rows_of_losses)
    losses, low_losses = torch.tensor(rows_of_losses).reshape(-1, 6).split(3, dim=1)
    means = {f"val_{name}": value for name, value in LossMeter(losses).compute(accelerator).items()}
    for name, value in LossMeter(low_losses).compute(accelerator).items():
        if "sigma" not in name:
            means[f"val_low_noise_{name}"] = value
    return means


def score_shapes(images: list[Image.Image], captions: list[str], size: int, texture_cells: int) -> dict[str, float]:
    """Return which share of the attributes in `captions` of shapes the `images` show, once enlarged to `size`."""
    images = [image.resize((size, size), Image.Resampling.BICUBIC) for image in images]
    return score_images(images, captions, texture_cells=texture_cells)


def format_scores(scores: dict[str, dict[str, float]]) -> str:
    """Return a table of the scores per phase."""
    names = list(next(iter(scores.values())))
    lines = [f"{'held-out captions':<18}" + "".join(f"{name:>12}" for name in names)]
    for phase, row in {**scores, "chance (1 object)": CHANCE}.items():
        lines.append(f"{phase:<18}" + "".join(f"{row[name]:>12.2f}" if name in row else " " * 12 for name in names))
    return "\n".join(lines)
