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

import torch
import torch.nn.functional as F


# The lowest noise level that diffusers' schedulers ask for. Some of them round it down to 0, where there is no velocity.
SIGMA_MIN = 1e-3


def expand(sigma: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Reshapes noise levels `(B,)` so that they multiply states `(B, C, H, W)`."""
    return sigma.reshape(-1, *[1] * (x.ndim - 1))


# ----------------------------------------------------------------------------------------------------------------------
# Noise levels across resolutions


def shift_sigma(sigma: torch.Tensor, factor: float) -> torch.Tensor:
    """
    The noise level at `factor` times the resolution that hides the image as much as `sigma` does here (Hoogeboom et al.,
    simple diffusion, 2023, section 3.1). `sigma` and what is returned are in [0, 1], of any shape.
    """
    return factor * sigma / (1 + (factor - 1) * sigma)


def unshift_sigma(sigma: torch.Tensor, factor: float) -> torch.Tensor:
    """
    The inverse of [`shift_sigma`]: the noise level of the state pooled by `factor`. `sigma` and what is returned are in
    [0, 1], of any shape.
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
    Draws training noise levels: logit-normal at the base level (Esser et al., 2024), then shifted to the resolution.

    Args:
        batch_size (`int`): How many to draw.
        shift (`float`): The resolution divided by the base resolution; what the scheduler's config holds as `shift`.
        logit_mean (`float`), logit_std (`float`): The normal distribution of `logit(sigma)` at the base level.
        generator (`torch.Generator`, *optional*): Of `device`; torch's own by default.
        device (`torch.device` or `str`): Where they are drawn and returned.

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
    # "nearest" reads at `i / factor`, which rounding may put below a whole number (factor 41); this, half a pixel on.
    return F.interpolate(x, scale_factor=float(factor), mode="nearest-exact")


def enlarge(x: torch.Tensor, factor: int) -> torch.Tensor:
    """
    `S`: `(B, C, H, W)` to `(B, C, H * factor, W * factor)`, smoothly, and `P S = I` all the same: bilinear interpolation,
    and what its low band lacks of `x`. Images hold a fifth to a half less beyond `S P x0` than beyond `U P x0`.
    """
    smooth = F.interpolate(x, scale_factor=float(factor), mode="bilinear")
    return smooth + upsample(x - pool(smooth, factor), factor)


def high_band(x: torch.Tensor, factor: int) -> torch.Tensor:
    """`H = I - U P`: what pooling by `factor` loses."""
    return x - upsample(pool(x, factor), factor)


def state_scale(sigma: torch.Tensor, factor: int) -> torch.Tensor:
    """`n(sigma)`: what a pooled state is divided by to be a state of the low-resolution process. From `1 / factor` to 1."""
    return (1 - sigma) + sigma / factor


def descend(x: torch.Tensor, sigma: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The low-resolution state inside a high-resolution one.

    Args:
        x (`torch.Tensor` of shape `(B, C, H, W)`): The state.
        sigma (`torch.Tensor` of shape `(B,)`): Its noise level.
        factor (`int`): How many times smaller the low resolution is.

    Returns:
        The state `(B, C, H / factor, W / factor)` and its noise level `(B,)`.
    """
    return pool(x, factor) / expand(state_scale(sigma, factor), x), unshift_sigma(sigma, factor)


def ascend(
    x_in: torch.Tensor, sigma_in: torch.Tensor, factor: int, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    A high-resolution state around a low-resolution one: `x = n U x_in + sigma H e`. [`descend`] undoes it exactly.

    The high band of the image itself, `(1 - sigma) H x0`, is missing, so the higher `sigma`, the better it fits.

    Args:
        x_in (`torch.Tensor` of shape `(B, C, H, W)`): The low-resolution state.
        sigma_in (`torch.Tensor` of shape `(B,)`): Its noise level.
        factor (`int`): How many times larger the high resolution is.
        noise (`torch.Tensor` of shape `(B, C, H * factor, W * factor)`): Standard normal.

    Returns:
        The state `(B, C, H * factor, W * factor)` and its noise level `(B,)`.
    """
    sigma = shift_sigma(sigma_in, factor)
    low = expand(state_scale(sigma, factor), x_in) * upsample(x_in, factor)
    return low + expand(sigma, noise) * high_band(noise, factor), sigma


def coarsest_step(factor: int) -> int:
    """The smallest factor above 1 that divides `factor`: from the low resolution, one step up."""
    return next(step for step in range(2, factor + 1) if factor % step == 0)


def detail_variance(x0: torch.Tensor, factor: int) -> float:
    """
    How much detail there is just above a low resolution: the mean square of what the image has at [`coarsest_step`]
    times the low resolution and not below. There images have the most, and it emerges from the noise first.

    Args:
        x0 (`torch.Tensor` of shape `(B, C, H, W)`): Images in [-1, 1].
        factor (`int`): How many times smaller the low resolution is.
    """
    step = coarsest_step(factor)
    return high_band(pool(x0, factor // step), step).square().mean().item()


def handover_sigma(variance: float, factor: int, bound: float) -> float:
    """
    The noise level down to which a state's high band is noise, up to `bound`, so that a low-resolution model is enough.

    Of a state pooled to `step` times the low resolution, with the noise level `sigma` there, the high band
    `(1 - sigma) H x0 + sigma H e` has the image's variance `(1 - sigma)**2 v` and the noise's
    `sigma**2 (1 - 1 / step**2)`. Above the level returned, the first is at most `bound` times the second.

    Args:
        variance (`float`): `v`, the [`detail_variance`] of the images.
        factor (`int`): The growth factor.
        bound (`float`): For example 0.01.

    Returns:
        `float`: A level of the high resolution.
    """
    step = coarsest_step(factor)
    noise_over_signal = math.sqrt(variance / (bound * (1 - 1 / step**2)))
    return shift_sigma(noise_over_signal / (1 + noise_over_signal), factor // step)  # type: ignore


# ----------------------------------------------------------------------------------------------------------------------
# Clean images and velocities


def add_noise(x0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The state `x = (1 - sigma) x0 + sigma e`, all `(B, C, H, W)`, with `sigma` `(B,)`."""
    sigma = expand(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def velocity_from_clean(x: torch.Tensor, x0: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """
    `u = (x - x0) / sigma`: the velocity at the state `x` that points away from the image `x0`. It has no larger bound on
    sigma, as a loss on it needs one: with that, a sampler's last step would stop short of `x0` and leave noise behind.
    """
    return (x - x0) / expand(sigma, x).clamp(min=SIGMA_MIN)
