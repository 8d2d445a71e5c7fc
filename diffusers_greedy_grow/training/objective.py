# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The training objective: noise, noise levels, caption dropout and the loss; and the means of the loss that are reported."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import compute_loss_weighting_for_sd3

from ..flow import add_noise, expand, pool, sample_sigma
from ..pipelines import GreedyGrowPipeline
from .data.images import normalize
from .phases import Phase
from .seeds import sample_seeds


# Below this noise level the weight of the velocity's error, `1 / sigma ** 2`, stops growing.
SIGMA_MIN_OF_LOSS = 0.05
# Edges of the noise-level bins that the loss is reported in. The first bin holds the levels at which grain would show.
SIGMA_BINS = (0.0, 0.3, 0.6, 0.8, 0.9, 1.0)


# ----------------------------------------------------------------------------------------------------------------------
# Noise


def draw_noise(
    key: tuple[int, ...],
    first: int,
    total: int,
    shape: torch.Size,
    shift: float,
    logit_mean: float,
    logit_std: float,
    device: torch.device,
    caption_dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
    """
    Draw everything that is random in a step, for the images of one process. The result depends only on `key` and on the places
    of these images in the step's whole batch: not on the number of processes, nor on earlier draws.

    Args:
        key (`tuple[int, ...]`): Such as (seed, phase, step).
        first (`int`), total (`int`): The first image's place in the whole batch, and the number of images in that batch.
        shape (`torch.Size`): `(B, C, H, W)` of this process's images.
        shift (`float`), logit_mean (`float`), logit_std (`float`): The distribution of noise levels, see [`sample_sigma`].
        device (`torch.device`): Where noise is drawn. For large images, a CPU takes longer to draw it than a GPU takes for the whole step.
        caption_dropout (`float`): The share of captions to leave empty.

    Returns:
        Noise of that shape in float32, noise levels `(B,)`, both on `device`; and per image whether to drop its caption.
    """
    noise, generator = torch.empty(shape, device=device), torch.Generator(device)
    level_seed, *image_seeds = sample_seeds(key, 0, 1 + first + len(noise))
    for image, seed in zip(noise, image_seeds[first:]):
        image.normal_(generator=generator.manual_seed(seed))
    # Levels and dropout for the whole batch at once: drawing them one by one would take longer.
    generator = torch.Generator().manual_seed(level_seed)
    sigma = sample_sigma(total, shift, logit_mean, logit_std, generator)[first : first + len(noise)]
    dropped = torch.rand(total, generator=generator)[first : first + len(noise)] < caption_dropout
    return noise, sigma.to(device, non_blocking=True), dropped.tolist()


# ----------------------------------------------------------------------------------------------------------------------
# Loss


@dataclass
class FlowLoss:
    """
    The loss of one batch.

    Args:
        loss (`torch.Tensor` of shape `()`): The weighted mean, to train on.
        low (`torch.Tensor` of shape `(B,)`), high (`torch.Tensor` of shape `(B,)`):
            The velocity's error per image in the low-frequency band (pooled) and in the high-frequency band (the rest).
        sigma (`torch.Tensor` of shape `(B,)`): The noise level per image.
    """

    loss: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    sigma: torch.Tensor

    def stack(self) -> torch.Tensor:
        """Return `(B, 3)` with the columns low, high, sigma, as a [`LossMeter`] takes them."""
        return torch.stack([self.low, self.high, self.sigma], dim=1)


def flow_loss(
    model: torch.nn.Module,
    x0: torch.Tensor,
    noise: torch.Tensor,
    sigma: torch.Tensor,
    band_factor: int,
    weighting: str = "velocity",
    **conditions: Any,
) -> FlowLoss:
    r"""
    Return the mean squared error of the predicted flow velocity, weighted by noise level. The velocity's error is the clean
    image's error over `max(sigma, SIGMA_MIN_OF_LOSS)` (Li & He, JiT, 2025, section 4).

    The error of the `"clean"` image gives low noise less weight. At low noise, a stage's input already shows the detail. With the
    velocity's error, learning to copy it would outweigh learning the detail from the text and the core.

    Args:
        model: A [`ShallowUNet2DModel`], a [`GrowableUNet2DConditionModel`], or either prepared by accelerate.
        x0 (`torch.Tensor` of shape `(B, C, H, W)`): Clean images in [-1, 1].
        noise (`torch.Tensor` of shape `(B, C, H, W)`): Standard normal noise.
        sigma (`torch.Tensor` of shape `(B,)`): Noise levels in (0, 1].
        band_factor (`int`): The pooling factor that separates the low-frequency band from the high one: the growth factor.
        weighting (`str`, defaults to `"velocity"`):
            One of `WEIGHTINGS`: the error of the `"velocity"`, the error of the `"clean"` image, the error of the noise times the
            `"sigmoid"` of minus the log-SNR (Hoogeboom et al., simpler diffusion, 2024), or `"sigma_sqrt"` and `"cosmap"`
            (Esser et al., SD3, 2024, section 3.1).
        conditions: `encoder_hidden_states` and `encoder_attention_mask`, or `input_ids` for a [`TrainedModel`] with text encoder;
            `crop`, if the model is told which part of an image it sees; and `core_output`, if the core has been run before.
    """
    output = model(add_noise(x0, noise, sigma), 1000 * sigma, **conditions)
    scale = sigma.clamp(min=SIGMA_MIN_OF_LOSS)
    error = (output.pred_original_sample - x0).float() / expand(scale, x0)
    total = error.square().mean(dim=(1, 2, 3))
    # Nearest-neighbour upsampling keeps the mean square, and the two bands are orthogonal.
    low = pool(error, band_factor).square().mean(dim=(1, 2, 3))
    loss = (weigh(scale, weighting) * total).mean()
    return FlowLoss(loss=loss, low=low.detach(), high=(total - low).detach(), sigma=sigma)


def weigh(sigma: torch.Tensor, weighting: str) -> torch.Tensor:
    """Return the weight of the velocity's error at noise levels `(B,)`; `weighting` is one of `WEIGHTINGS`."""
    if weighting == "velocity":
        return torch.ones_like(sigma)
    if weighting == "clean":
        return sigma**2
    if weighting == "sigmoid":
        return ((1 - sigma) * sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2)
    return compute_loss_weighting_for_sd3(weighting, sigma)


def find_training_shift(pipeline: GreedyGrowPipeline) -> float:
    """
    Return the shift of the noise levels to train on: the scheduler's, or the growth factor around a core that others have trained.
    Their schedulers have a shift of their own, which suits sampling. With it, a stage would hardly see the low noise at which
    detail shows.
    """
    unet = pipeline.unet
    if unet.config.get("core_config") is None:
        return pipeline.scheduler.config.shift
    return unet.sample_sizes[-1] / unet.sample_sizes[0]


class FlowObjective:
    """
    The loss of a phase's batches. Noise, noise levels and dropped captions depend only on the seed, the phase, the step and an
    image's place in the step's batch.

    Args:
        phase (`Phase`): Its noise levels, loss weighting and batch size.
        accelerator (`Accelerator`): The device, the precision and the processes.
        encode (`Callable`): Returns the model's text arguments for a list of captions, see [`CaptionEncoder`].
        unet: The model, for its resolutions.
        shift (`float`): The shift of the noise levels at the model's resolution, see [`find_training_shift`].
        seed (`int`): The run's seed.
        caption_dropout (`float`): The share of captions that are left empty, for classifier-free guidance.
    """

    def __init__(
        self,
        phase: Phase,
        accelerator: Accelerator,
        encode: Callable[[list[str]], dict[str, torch.Tensor]],
        unet,
        shift: float,
        seed: int,
        caption_dropout: float,
    ):
        self.phase, self.accelerator, self.encode = phase, accelerator, encode
        self.shift, self.seed, self.caption_dropout = shift, seed, caption_dropout
        # A core has no growth factor: its bands are separated by factor 2.
        self.band_factor = unet.sample_sizes[-1] // unet.sample_sizes[-2] if len(unet.sample_sizes) > 1 else 2

    def __call__(self, model: torch.nn.Module, batch: dict, step: int, micro_step: int) -> FlowLoss:
        """Return the loss of `model` on this process's `batch`, which is number `micro_step` of the batches since the start."""
        accelerator, phase = self.accelerator, self.phase
        accumulated = micro_step % accelerator.gradient_accumulation_steps
        place = accumulated * accelerator.num_processes + accelerator.process_index
        # The model's dropout draws from torch's own generators: their state must not depend on what else was drawn.
        torch.manual_seed(sample_seeds((self.seed, phase.index, step, 1 + place), 0, 1)[0])
        x0 = normalize(batch["pixel_values"].to(accelerator.device, non_blocking=True))
        noise, sigma, dropped = self.draw(batch, x0.shape, step, place)
        with accelerator.autocast():
            conditions = self.condition(batch, dropped)
            return flow_loss(model, x0, noise, sigma, self.band_factor, phase.loss_weighting, **conditions)

    def draw(
        self, batch: dict, shape: torch.Size, step: int, place: int
    ) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
        """Return what [`draw_noise`] does, for the batch number `place` of a `step`."""
        accelerator, phase = self.accelerator, self.phase
        batches_per_step = accelerator.num_processes * accelerator.gradient_accumulation_steps
        return draw_noise(
            (self.seed, phase.index, step),
            place * phase.batch_size,
            batches_per_step * phase.batch_size,
            shape,
            self.shift,
            phase.logit_mean,
            phase.logit_std,
            accelerator.device,
            self.caption_dropout,
        )

    def condition(self, batch: dict, dropped: list[bool]) -> dict[str, Any]:
        """Return the arguments of the model for a batch besides its state; `dropped` says whose captions are left empty."""
        captions = ["" if drop else caption for drop, caption in zip(dropped, batch["caption"])]
        # Which part of its image each is, for a model that is told.
        crops = {"crop": batch["crop"].to(self.accelerator.device, non_blocking=True)} if "crop" in batch else {}
        return {**self.encode(captions), **crops}


# ----------------------------------------------------------------------------------------------------------------------
# Means


class LossMeter:
    """Computes means of the loss, of its bands and of its noise-level bins over many batches. It leaves out infinities and NaN."""

    def __init__(self, losses: torch.Tensor | None = None):
        self.gathered = torch.empty(0, 3) if losses is None else losses
        self.batches: list[torch.Tensor] = []

    def update(self, losses: torch.Tensor) -> None:
        """Add a batch: `(B, 3)` with the columns low, high, sigma."""
        self.batches.append(losses)

    def gather(self, accelerator: Accelerator) -> torch.Tensor:
        """Return everything added on all processes since the last [`compute`]: what a checkpoint must hold. Called on all processes."""
        if self.batches:
            batches = accelerator.gather(torch.cat(self.batches))
            self.gathered, self.batches = torch.cat([self.gathered, batches.float().cpu()]), []
        return self.gathered

    def compute(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means since the last call: `loss`, `loss_low`, `loss_high`, and `loss_sigma_<from>_<to>` per bin that was hit."""
        losses, self.gathered = self.gather(accelerator), torch.empty(0, 3)
        low, high, sigma = losses[losses.isfinite().all(dim=1)].unbind(dim=1)
        if not len(sigma):
            return {}
        means = {
            "loss": (low + high).mean().item(),
            "loss_low": low.mean().item(),
            "loss_high": high.mean().item(),
        }
        for lower, upper in zip(SIGMA_BINS[:-1], SIGMA_BINS[1:]):
            inside = (sigma > lower) & (sigma <= upper)
            if inside.any():
                means[f"loss_sigma_{lower}_{upper}"] = (low + high)[inside].mean().item()
        return means
