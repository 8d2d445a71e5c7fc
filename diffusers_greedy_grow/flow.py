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

Cores that others have trained know other processes. [`RectifiedFlow`] and [`VariancePreserving`] turn a state of ours into
theirs, and their predictions into clean images.
"""

import math
from dataclasses import dataclass
from typing import Any, TypeVar

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


def state_scale(sigma: torch.Tensor, factor: float) -> torch.Tensor:
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


# ----------------------------------------------------------------------------------------------------------------------
# The processes of cores that others have trained


@dataclass(frozen=True)
class RectifiedFlow:
    """
    Rectified flow with scaled noise, `y = (1 - t) x0 + t c e`, for models that predict the clean image, such as PRXPixel. This
    is our process at `c` times the resolution, except that nothing is pooled. Times `t` are in [0, 1].

    Args:
        noise_scale (`float`): `c`, above 0. PRXPixel has 2.

    Raises:
        `ValueError`: if `noise_scale` is not a positive number.
    """

    noise_scale: float

    def __post_init__(self):
        if not isinstance(self.noise_scale, (int, float)) or not 0 < self.noise_scale < math.inf:
            raise ValueError(f"`noise_scale={self.noise_scale!r}` must be a number above 0; PRXPixel has 2.")

    def enter(self, x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return the state of this process, `y = x / n`, in a state of ours.

        Args:
            x (`torch.Tensor` of shape `(B, C, H, W)`): A state `(1 - sigma) x0 + sigma e`, such as [`descend`] returns.
            sigma (`torch.Tensor` of shape `(B,)`): Its noise level, in (0, 1].

        Returns:
            `y`, of the shape of `x`, and its time `(B,)`.
        """
        return x / expand(state_scale(sigma, self.noise_scale), x), unshift_sigma(sigma, self.noise_scale)

    def clean(self, y: torch.Tensor, prediction: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Return the clean image `(B, C, H, W)` of a model's `prediction` for `y`: the prediction itself."""
        return prediction

    def limit(self, x0: torch.Tensor) -> torch.Tensor:
        """Return a predicted clean image as it is: samplers of this process do not limit its values."""
        return x0


def read_limit(config: Any, name: str, highest: float = math.inf) -> float:
    """Return a scheduler's limit to the values of a clean image. Raise a `ValueError` unless it is a number in (0, `highest`]."""
    if not isinstance(config[name], (int, float)) or not 0 < config[name] <= highest:
        raise ValueError(f"`{name}={config[name]!r}` of the scheduler must be a number above 0, at most {highest}.")
    return config[name]


@dataclass(frozen=True, eq=False)
class VariancePreserving:
    """
    A variance-preserving process, `y = alpha x0 + beta e` with `alpha**2 + beta**2 = 1`, of DDPM and DeepFloyd IF. Its times are
    the timesteps of a scheduler; between two of them, `log(beta / alpha)` is interpolated, and outside of them, the nearest
    one is taken. Create one by [`~VariancePreserving.from_scheduler`].

    Args:
        log_ratios (`np.ndarray` of shape `(T,)`): `log(beta / alpha)` at each timestep, increasing.
        first_timestep (`int`): The timestep of the first one.
        prediction_type (`str`): What the model predicts: `"epsilon"`, the noise `e`; `"v_prediction"`, the velocity
            `alpha e - beta x0`; or `"sample"`, the clean image.
        clip_range (`float`, *optional*): The largest absolute value in a clean image; the rest is clipped.
        threshold_ratio (`float`, *optional*), threshold_max (`float`): With a ratio, dynamic thresholding instead (Saharia et
            al., 2022, section 2.3): the image is clipped at this quantile of its absolute values, from 1 to `threshold_max`,
            and divided by it.
    """

    log_ratios: np.ndarray
    first_timestep: int
    prediction_type: str
    clip_range: float | None = None
    threshold_ratio: float | None = None
    threshold_max: float = 1.0

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> "VariancePreserving":
        """
        Read the process off a `DDPMScheduler` or a `DDIMScheduler`.

        Raises:
            `ValueError`: if the scheduler's `prediction_type` is unknown, its noise does not grow with the timestep, or its limits
                to the values of a clean image are not numbers in their range.
        """
        config = scheduler.config
        if config.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(
                f'`prediction_type={config.prediction_type!r}` of the scheduler must be "epsilon", "v_prediction" or "sample".'
            )
        alphas_cumprod = scheduler.alphas_cumprod.double().cpu().numpy()
        # Without any noise, or without any image (`rescale_betas_zero_snr`), there is no finite ratio: such timesteps are left out.
        (timesteps,) = np.nonzero((alphas_cumprod > 0) & (alphas_cumprod < 1))
        log_ratios = np.log((1 - alphas_cumprod[timesteps]) / alphas_cumprod[timesteps]) / 2
        if len(timesteps) < 2 or (np.diff(timesteps) != 1).any() or (np.diff(log_ratios) <= 0).any():
            raise ValueError(
                "The scheduler's `alphas_cumprod` must decrease from timestep to timestep, within (0, 1)."
            )
        limits: dict[str, float] = {}
        if config.thresholding:
            limits = {
                "threshold_ratio": read_limit(config, "dynamic_thresholding_ratio", 1),
                "threshold_max": read_limit(config, "sample_max_value"),
            }
        elif config.clip_sample:
            limits = {"clip_range": read_limit(config, "clip_sample_range")}
        return cls(log_ratios, int(timesteps[0]), config.prediction_type, **limits)

    def enter(self, x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the state of this process in a state of ours, and its fractional timestep; see [`RectifiedFlow.enter`]."""
        scale = torch.sqrt((1 - sigma) ** 2 + sigma**2)
        table = torch.from_numpy(self.log_ratios).to(sigma.device, sigma.dtype, non_blocking=True)
        log_ratio = torch.logit(sigma).clamp(table[0], table[-1])
        above = torch.searchsorted(table, log_ratio).clamp(1, len(table) - 1)
        low, high = table[above - 1], table[above]
        return x / expand(scale, x), self.first_timestep + above - 1 + (log_ratio - low) / (high - low)

    def clean(self, y: torch.Tensor, prediction: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """
        Return the clean image of a model's prediction, without the limits to its values: guidance comes before them.

        Args:
            y (`torch.Tensor` of shape `(B, C, H, W)`): The state that [`~VariancePreserving.enter`] returned.
            prediction (`torch.Tensor` of shape `(B, C, H, W)`): The prediction for it, of `prediction_type`.
            sigma (`torch.Tensor` of shape `(B,)`): The noise level that `enter` got, in our process.
        """
        if self.prediction_type == "sample":
            return prediction
        # As the model's time, the ratio is clamped: at pure noise, there is an image to predict, but none to compute.
        log_ratio = torch.logit(sigma).clamp(self.log_ratios[0], self.log_ratios[-1])
        alpha, beta = (expand(torch.sigmoid(sign * 2 * log_ratio).sqrt(), y) for sign in (-1, 1))
        if self.prediction_type == "epsilon":
            return (y - beta * prediction) / alpha
        return alpha * y - beta * prediction

    def limit(self, x0: torch.Tensor) -> torch.Tensor:
        """Return a predicted (and guided) clean image with its values limited as the scheduler limits them."""
        if self.threshold_ratio is not None:
            quantile = torch.quantile(x0.float().abs().flatten(1), self.threshold_ratio, dim=1)
            threshold = expand(quantile.clamp(1, self.threshold_max), x0).to(x0.dtype)
            return x0.clamp(-threshold, threshold) / threshold
        if self.clip_range is not None:
            return x0.clamp(-self.clip_range, self.clip_range)
        return x0
