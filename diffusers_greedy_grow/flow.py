# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

r"""
The process: rectified flow in pixel space, and the law that connects its resolutions.

Notation: a clean image `x0` of shape `(B, C, H, W)` in `[-1, 1]`; the noise level `sigma` in `(0, 1]`, a tensor of
shape `(B,)`; noise `e ~ N(0, I)`; the noisy state `x = (1 - sigma) x0 + sigma e`; the flow velocity `u = e - x0`.
`P` is `factor x factor` average pooling, `U` nearest-neighbour upsampling by `factor`, `S` a smooth one; `P U = P S = I`.

Averaging `factor ** 2` independent noises divides their standard deviation by `factor`. So a pooled state is, up to a
scale `n`, a state of the same process at the low resolution, at the lower noise level `sigma_in`:

    P x / n(sigma) = (1 - sigma_in) P x0 + sigma_in e_in,        e_in ~ N(0, I)
    n(sigma) = (1 - sigma) + sigma / factor,      sigma_in = (sigma / factor) / n(sigma)

The map from `sigma_in` back to `sigma` is the timestep shift of `FlowMatchEulerDiscreteScheduler(shift=factor)`, and a
move of `-2 log(factor)` in log-SNR (Hoogeboom et al., simple diffusion, 2023, section 3.1).
"""

import math
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F


# The lowest noise level at which diffusers' schedulers call a model. Some of them round it down to 0, where the velocity is
# undefined.
SIGMA_MIN = 1e-3
# Noise levels of any kind.
Sigma = TypeVar("Sigma", float, np.ndarray, torch.Tensor)


def expand(sigma: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Reshape noise levels `(B,)` so that they multiply states `(B, C, H, W)`."""
    return sigma.reshape(-1, *[1] * (x.ndim - 1))


# ----------------------------------------------------------------------------------------------------------------------
# Noise levels across resolutions


def shift_sigma(sigma: Sigma, factor: float) -> Sigma:
    """
    Return the noise level that hides the image at `factor` times the resolution as much as `sigma` does at this one
    (Hoogeboom et al., simple diffusion, 2023, section 3.1). `sigma` is in [0, 1], of any shape, and so is the result.
    """
    return factor * sigma / (1 + (factor - 1) * sigma)


def unshift_sigma(sigma: Sigma, factor: float) -> Sigma:
    """
    Return the noise level of a state pooled by `factor`: the inverse of [`shift_sigma`]. `sigma` is in [0, 1], of any
    shape, and so is the result.
    """
    return sigma / (factor - (factor - 1) * sigma)


def sample_sigma(
    batch_size: int,
    shift: float = 1.0,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """
    Draw noise levels for training: logit-normal at the base resolution (Esser et al., 2024), then shifted.

    Args:
        batch_size (`int`): How many to draw.
        shift (`float`): The resolution divided by the base resolution; `shift` in the scheduler's config.
        logit_mean (`float`), logit_std (`float`): The normal distribution of `logit(sigma)` at the base resolution.
        generator (`torch.Generator`, *optional*): A generator on `device`; torch's global one by default.
        device (`torch.device` or `str`): The device of the result.

    Returns:
        `torch.Tensor` of shape `(batch_size,)` in (0, 1), float32.
    """
    normal = torch.randn(batch_size, generator=generator, device=device)
    return shift_sigma(torch.sigmoid(logit_mean + logit_std * normal), shift)


# ----------------------------------------------------------------------------------------------------------------------
# States across resolutions


def pool(x: torch.Tensor, factor: int) -> torch.Tensor:
    """
    `P`: `(B, C, H, W)` to `(B, C, H / factor, W / factor)` by averaging.

    Raises:
        `ValueError`: if `factor` does not divide `H` and `W`.
    """
    if x.shape[-2] % factor or x.shape[-1] % factor:
        raise ValueError(f"`x` is {x.shape[-2]} x {x.shape[-1]}, which `factor={factor}` does not divide.")
    return F.avg_pool2d(x, factor)


def upsample(x: torch.Tensor, factor: int) -> torch.Tensor:
    """`U`: `(B, C, H, W)` to `(B, C, H * factor, W * factor)` by repeating each pixel."""
    # "nearest" reads at `i / factor`, which rounding may put below a whole number (with factor 41, for example);
    # "nearest-exact" reads half a pixel further on.
    return F.interpolate(x, scale_factor=float(factor), mode="nearest-exact")


def enlarge(x: torch.Tensor, factor: int) -> torch.Tensor:
    """
    `S`: `(B, C, H, W)` to `(B, C, H * factor, W * factor)` by bilinear interpolation, corrected so that `P S = I`. Its
    residual `x0 - S P x0` has a fifth to a half less variance on images than that of repeated pixels, `x0 - U P x0`.
    """
    smooth = F.interpolate(x, scale_factor=float(factor), mode="bilinear")
    return smooth + upsample(x - pool(smooth, factor), factor)


def high_band(x: torch.Tensor, factor: int) -> torch.Tensor:
    """`H = I - U P`: the part of `x` that pooling by `factor` loses."""
    return x - upsample(pool(x, factor), factor)


def state_scale(sigma: torch.Tensor, factor: int) -> torch.Tensor:
    """`n(sigma)`, from `1 / factor` to 1: a pooled state divided by it is a state of the low-resolution process."""
    return (1 - sigma) + sigma / factor


def descend(x: torch.Tensor, sigma: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the low-resolution state inside a high-resolution one.

    Args:
        x (`torch.Tensor` of shape `(B, C, H, W)`): The state.
        sigma (`torch.Tensor` of shape `(B,)`): Its noise level.
        factor (`int`): How many times smaller the low resolution is.

    Returns:
        The state `(B, C, H / factor, W / factor)` and its noise level `(B,)`.
    """
    return pool(x, factor) / expand(state_scale(sigma, factor), x), unshift_sigma(sigma, factor)


def coarsest_step(factor: int) -> int:
    """Return the smallest factor above 1 that divides `factor`: the first step up from the low resolution."""
    return next(step for step in range(2, factor + 1) if factor % step == 0)


def detail_variance(x0: torch.Tensor, factor: int) -> float:
    """
    Return the variance of the coarsest detail above a low resolution: the mean square of the high band at
    [`coarsest_step`] times that resolution. This is the strongest detail of images and the first to emerge from the noise.

    Args:
        x0 (`torch.Tensor` of shape `(B, C, H, W)`): Images in [-1, 1].
        factor (`int`): How many times smaller the low resolution is.
    """
    step = coarsest_step(factor)
    return high_band(pool(x0, factor // step), step).square().mean().item()


def handover_sigma(variance: float, factor: int, bound: float) -> float:
    """
    Return the noise level down to which a low-resolution model is enough, because a state's high band is almost only noise.

    A state pooled to `step` times the low resolution has the high band `(1 - sigma) H x0 + sigma H e`, with its own noise
    level `sigma`. The image's part has the variance `(1 - sigma)**2 v`, the noise's part `sigma**2 (1 - 1 / step**2)`.
    Above the returned level, the first is at most `bound` times the second.

    Args:
        variance (`float`): `v`, the [`detail_variance`] of the images.
        factor (`int`): The growth factor.
        bound (`float`): The largest ratio of the two variances, such as 0.01.

    Returns:
        `float`: A noise level at the high resolution.
    """
    step = coarsest_step(factor)
    noise_over_signal = math.sqrt(variance / (bound * (1 - 1 / step**2)))
    return shift_sigma(noise_over_signal / (1 + noise_over_signal), factor // step)  # type: ignore


# ----------------------------------------------------------------------------------------------------------------------
# Clean images and velocities


def add_noise(x0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Return the state `x = (1 - sigma) x0 + sigma e`, all `(B, C, H, W)`, with `sigma` `(B,)`."""
    sigma = expand(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def velocity_from_clean(x: torch.Tensor, x0: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """
    Return the velocity `u = (x - x0) / sigma` at the state `x`, given its clean image `x0`. `sigma` is clamped to
    [`SIGMA_MIN`] only: with a larger bound, such as a loss needs, a sampler's last step would leave noise in the image.
    """
    return (x - x0) / expand(sigma, x).clamp(min=SIGMA_MIN)
