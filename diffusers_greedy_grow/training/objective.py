# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The training loss, and what to know about it beyond its mean."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers.training_utils import compute_loss_weighting_for_sd3

from ..flow import add_noise, expand, pool, sample_sigma
from .seeds import sample_seeds


# Below this noise level the weight of the velocity's error, `1 / sigma ** 2`, stops growing.
SIGMA_MIN_OF_LOSS = 0.05


# Edges of the noise-level bins that the loss is reported in. The first holds the levels at which grain would show.
SIGMA_BINS = (0.0, 0.3, 0.6, 0.8, 0.9, 1.0)


WEIGHTINGS = ("velocity", "clean", "sigmoid", "sigma_sqrt", "cosmap")


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
    All that is random in a step, for the images of one process: a function of `key` and of their places in the step's
    whole batch, so neither the number of processes nor what was drawn before makes a difference.

    Args:
        key (`tuple[int, ...]`): Such as (seed, phase, step).
        first (`int`), total (`int`): The first image's place in the whole batch, and how many images that has.
        shape (`torch.Size`): `(B, C, H, W)` of this process's images.
        shift (`float`), logit_mean (`float`), logit_std (`float`): The distribution of levels, see [`sample_sigma`].
        device (`torch.device`): Where noise is drawn. For large images a CPU takes longer than a GPU for the step.
        caption_dropout (`float`): The share of captions to leave empty.

    Returns:
        Noise of that shape, float32, and levels `(B,)`, both on `device`; and for each image whether to drop its caption.
    """
    noise, generator = torch.empty(shape, device=device), torch.Generator(device)
    level_seed, *image_seeds = sample_seeds(key, 0, 1 + first + len(noise))
    for image, seed in zip(noise, image_seeds[first:]):
        image.normal_(generator=generator.manual_seed(seed))
    # These for the whole batch: drawing them one by one would take longer.
    generator = torch.Generator().manual_seed(level_seed)
    sigma = sample_sigma(total, shift, logit_mean, logit_std, generator)[first : first + len(noise)]
    dropped = torch.rand(total, generator=generator)[first : first + len(noise)] < caption_dropout
    return noise, sigma.to(device, non_blocking=True), dropped.tolist()


@dataclass
class FlowLoss:
    """
    The loss of one batch.

    Args:
        loss (`torch.Tensor` of shape `()`): The mean, weighted, to train on.
        low (`torch.Tensor` of shape `(B,)`), high (`torch.Tensor` of shape `(B,)`):
            Each image's error of the velocity in the low band (pooled) and in the high band (the rest).
        sigma (`torch.Tensor` of shape `(B,)`): Each image's noise level.
    """

    loss: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    sigma: torch.Tensor


def flow_loss(
    model: torch.nn.Module,
    x0: torch.Tensor,
    noise: torch.Tensor,
    sigma: torch.Tensor,
    band_factor: int,
    weighting: str = "velocity",
    low_res_weight: float = 0.0,
    num_stages: int | None = None,
    **conditions: torch.Tensor,
) -> FlowLoss:
    r"""
    Mean squared error of the predicted flow velocity, which is that of the clean image over
    `max(sigma, SIGMA_MIN_OF_LOSS) ** 2` (Li & He, JiT, 2025, section 4), weighted by noise level.

    The error of the `"clean"` image gives low noise less weight. There the detail is in the stage's input: by the velocity's
    error, learning to copy it drowns out learning what the text and the core say of it.

    Args:
        model: A [`ShallowUNet2DModel`], a [`GrowableUNet2DConditionModel`], or either prepared by accelerate.
        x0 (`torch.Tensor` of shape `(B, C, H, W)`): Clean images in [-1, 1].
        noise (`torch.Tensor` of shape `(B, C, H, W)`): Standard normal.
        sigma (`torch.Tensor` of shape `(B,)`): Noise levels in (0, 1].
        band_factor (`int`): The pooling that parts the low band from the high one: the growth factor.
        weighting (`str`, defaults to `"velocity"`):
            One of [`WEIGHTINGS`]: the error of the `"velocity"`, that of the `"clean"` image, that of the noise times the
            `"sigmoid"` of minus the log-SNR (Hoogeboom et al., simpler diffusion, 2024), or `"sigma_sqrt"` and `"cosmap"`
            (Esser et al., SD3, 2024, section 3.1).
        low_res_weight (`float`, defaults to 0): The weight of an extra loss, on the error pooled by `band_factor`.
        num_stages (`int`, *optional*):
            How many stages of a grown model take part; with fewer than all, only the pooled images are trained on.
        conditions: `encoder_hidden_states` and `encoder_attention_mask`.
    """
    stages = {} if num_stages is None else {"num_stages": num_stages}
    output = model(add_noise(x0, noise, sigma), 1000 * sigma, **conditions, **stages)
    scale = sigma.clamp(min=SIGMA_MIN_OF_LOSS)
    error = (output.pred_original_sample - x0).float() / expand(scale, x0)
    total = error.square().mean(dim=(1, 2, 3))
    # Nearest-neighbour upsampling keeps the mean square, and the two bands are orthogonal.
    low = pool(error, band_factor).square().mean(dim=(1, 2, 3))
    if num_stages is not None:
        trained = low
    elif low_res_weight:
        trained = total + low_res_weight * low
    else:  # no backward pass through what weighs nothing
        trained = total
    loss = (weigh(scale, weighting) * trained).mean()
    return FlowLoss(loss=loss, low=low.detach(), high=(total - low).detach(), sigma=sigma)


def weigh(sigma: torch.Tensor, weighting: str) -> torch.Tensor:
    """The weight of the velocity's error at noise levels `(B,)`: one of [`WEIGHTINGS`]."""
    if weighting == "velocity":
        return torch.ones_like(sigma)
    if weighting == "clean":
        return sigma**2
    if weighting == "sigmoid":
        return ((1 - sigma) * sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2)
    return compute_loss_weighting_for_sd3(weighting, sigma)


class LossMeter:
    """Means of the loss, of its bands and of its noise-level bins over many batches; what is not finite is left out."""

    def __init__(self, losses: torch.Tensor | None = None):
        self.gathered = torch.empty(0, 3) if losses is None else losses
        self.batches: list[torch.Tensor] = []

    def update(self, losses: torch.Tensor) -> None:
        """Adds a batch: `(B, 3)` with columns low, high, sigma."""
        self.batches.append(losses)

    def gather(self, accelerator: Accelerator) -> torch.Tensor:
        """All that was added since the last [`compute`], on every process that of all: what a checkpoint must hold."""
        if self.batches:
            batches = accelerator.gather(torch.cat(self.batches))
            self.gathered, self.batches = torch.cat([self.gathered, batches.float().cpu()]), []
        return self.gathered

    def compute(self, accelerator: Accelerator) -> dict[str, float]:
        """The means since the last call: `loss`, `loss_low`, `loss_high`, and `loss_sigma_<from>_<to>` where seen."""
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
