# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Which schedulers and noise levels fit, and the denoising steps at which growth stages join."""

import copy
import inspect
import math
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps

from ..flow import SIGMA_MIN, add_noise, handover_sigma, shift_sigma, velocity_from_clean
from ..models import GrowableUNet2DConditionModel, ShallowUNet2DModel


# The types of arguments that are numbers, numpy's among them
INTEGER = (int, np.integer)
NUMBER = (int, float, np.integer, np.floating)

# The bound of `core_first="auto"`: while a stage is left out, the image's share of the variance in the coarsest detail that
# this stage draws is at most this many times the noise's.
CORE_FIRST_BOUND = 0.01

# The lowest first noise level of a schedule. Sampling starts from pure noise, but solvers that divide by `1 - sigma` begin
# below 1.
FIRST_SIGMA_MIN = 0.9
# The standard deviations of the pixels in a rehearsal: those that a model knows, and those of usual and of hard images.
REHEARSED_DEVIATIONS = (0.0, 0.5, 1.0)
# How much larger they may become. They become 1.2 times as large at most with the good solvers of diffusers, and 2 to 8 times
# with an unstable one.
GROWTH_MAX = 1.6
# The noise that may be left in an image in [-1, 1]: one of 256 gray levels.
GRAY_LEVEL = 2 / 255


def is_positive(value) -> bool:
    """Return whether `value` is a positive, finite number."""
    return isinstance(value, NUMBER) and bool(0 < value < math.inf)


# ----------------------------------------------------------------------------------------------------------------------
# Schedulers


def shift_name(scheduler: SchedulerMixin) -> str:
    """
    Return the config entry that holds a flow-matching scheduler's resolution shift: `shift`, or `flow_shift` for the
    multistep solvers. Raise a `ValueError` for any other scheduler, and for settings that do not fit these models.
    """
    # For a subclass of the user's, the class of diffusers that it extends says what it does.
    kind = next(
        (base for base in type(scheduler).__mro__ if base.__module__.startswith("diffusers.")), type(scheduler)
    )
    config, arguments = scheduler.config, inspect.signature(kind).parameters
    for entry, value in (("use_dynamic_shifting", False), ("invert_sigmas", False), ("num_train_timesteps", 1000)):
        if config.get(entry, value) != value:
            raise ValueError(
                f"`scheduler` has `{entry}={config[entry]}`, but the shift of these models is fixed, and their "
                f"timesteps are 1000 times the noise level: set `{entry}={value}`."
            )

    # A scheduler made from the config of another kind keeps that one's entries: ask which ones its own class takes.
    if kind.__name__.startswith("FlowMatch") and "shift" in arguments:
        name, other = "shift", "flow_shift"
    elif (
        "flow_shift" in arguments
        and config.get("use_flow_sigmas")
        and config.get("prediction_type") == "flow_prediction"
    ):
        name, other = "flow_shift", "shift"
    else:
        raise ValueError(
            f"`scheduler` is a {type(scheduler).__name__} that does not do flow matching. Pass a "
            "FlowMatchEulerDiscreteScheduler, for example, or a multistep solver with `use_flow_sigmas=True`, "
            '`prediction_type="flow_prediction"` and the shift as `flow_shift`.'
        )
    if not is_positive(config[name]):
        raise ValueError(
            f"`scheduler` has `{name}={config[name]!r}`, but must have a positive number: the resolution divided by the "
            "base resolution."
        )
    if config.get(other, config[name]) != config[name]:
        raise ValueError(
            f"`scheduler` has `{name}={config[name]}`, but was made from the config of another kind, with "
            f"`{other}={config[other]}`: pass `{name}={config[other]}` to `from_config`."
        )
    return name


def grow_scheduler(scheduler: SchedulerMixin, inner_sample_size: int, sample_size: int) -> SchedulerMixin:
    """Return the scheduler of a model grown from one resolution to another: the shift is multiplied by their ratio."""
    name = shift_name(scheduler)
    shift = scheduler.config[name] * sample_size / inner_sample_size
    # A scheduler made from the config of another kind has that one's entry, too.
    shifts = {entry: shift for entry in ("shift", "flow_shift") if entry in scheduler.config}
    return type(scheduler).from_config({**scheduler.config, **shifts}, **{name: shift})


def step_arguments(
    scheduler: SchedulerMixin, generator: torch.Generator | list[torch.Generator] | None
) -> dict[str, Any]:
    """Return the arguments of the scheduler's `step` beside the tensors: the generator, if it may add noise."""
    return {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}


def start_scheduler(
    scheduler: SchedulerMixin, schedule: dict[str, Any], device: torch.device | str
) -> tuple[torch.Tensor, int]:
    """
    Set a scheduler's timesteps and let it begin at the first, without a history.

    Args:
        scheduler ([`SchedulerMixin`]): The scheduler.
        schedule (`dict`): The arguments of diffusers' `retrieve_timesteps`.
        device (`torch.device` or `str`): The device of the timesteps.

    Returns:
        All timesteps, and the number of steps.
    """
    timesteps, num_inference_steps = retrieve_timesteps(scheduler, device=device, **schedule)
    begin(scheduler, 0)
    return timesteps, num_inference_steps


def copy_state(scheduler: SchedulerMixin) -> dict[str, Any]:
    """Return the state of a scheduler whose timesteps are set and that has made no step yet, for [`restart`]."""
    return copy.deepcopy({name: value for name, value in vars(scheduler).items() if name != "_internal_dict"})


def restart(scheduler: SchedulerMixin, start: dict[str, Any], step: int) -> None:
    """
    Let a scheduler begin again, without a history. To set its timesteps again would do the same, but waits for the GPU.

    Args:
        scheduler ([`SchedulerMixin`]): The scheduler.
        start (`dict`): What [`copy_state`] returned for it.
        step (`int`): The index of the first timestep to come.
    """
    vars(scheduler).update(copy.deepcopy(start))
    begin(scheduler, step)


def begin(scheduler: SchedulerMixin, step: int) -> None:
    """Let a scheduler whose timesteps are set begin at the index `step`. It would search for it, which waits for the GPU."""
    scheduler.set_begin_index(step)
    if getattr(scheduler, "solver_p", None) is not None:  # the predictor that UniPC may have
        scheduler.solver_p.set_begin_index(step)


# ----------------------------------------------------------------------------------------------------------------------
# Schedules


@torch.no_grad()
def rehearse(scheduler: SchedulerMixin, timesteps: torch.Tensor) -> list[float]:
    """
    Draw images of independent pixels with the best model that there can be for them. The pixels of an image are normally
    distributed, with one of the [`REHEARSED_DEVIATIONS`]. The scheduler's timesteps must be set, on the CPU.

    Returns:
        For each image, the root mean square over the pixels of the drawn image minus the mean image: where the deviation is 0,
        the noise that is left, and elsewhere the standard deviation that was drawn.
    """
    generator = torch.Generator().manual_seed(0)
    deviation = torch.tensor(REHEARSED_DEVIATIONS, device="cpu").reshape(-1, 1, 1, 1)
    mean = 2 * torch.rand((len(deviation), 3, 16, 16), generator=generator, device="cpu", dtype=torch.float32) - 1
    image, noise = (torch.randn(mean.shape, generator=generator, device="cpu", dtype=torch.float32) for _ in range(2))
    sigmas = (timesteps.to(torch.float32) / 1000).clamp(min=SIGMA_MIN)
    state = add_noise(mean + deviation * image, noise, sigmas[0])
    kwargs = step_arguments(scheduler, generator)
    for timestep, sigma in zip(timesteps, sigmas):
        slope = (1 - sigma) * deviation**2 / ((1 - sigma) ** 2 * deviation**2 + sigma**2)
        pred_original_sample = mean + slope * (state - (1 - sigma) * mean)
        velocity = velocity_from_clean(state, pred_original_sample, sigma)
        state = scheduler.step(velocity, timestep, state, **kwargs, return_dict=False)[0]
    return (state - mean).square().mean(dim=(1, 2, 3)).sqrt().tolist()


def find_fault(scheduler: SchedulerMixin, schedule: dict[str, Any]) -> str | None:
    """
    Say why a scheduler does not draw good images with these models, or return None. It is left with its timesteps set, and
    with the history of a rehearsal: set them again.

    Args:
        scheduler ([`SchedulerMixin`]): A flow-matching scheduler; see [`shift_name`].
        schedule (`dict`): The arguments of diffusers' `retrieve_timesteps`.
    """
    try:
        timesteps, _ = start_scheduler(scheduler, schedule, "cpu")
        sigmas = scheduler.sigmas.tolist()
        levels = [round(sigma, 3) for sigma in sigmas]
        first = 0.0 if "sigmas" in schedule else FIRST_SIGMA_MIN  # levels that were asked for may start anywhere
        falls = all(later <= earlier for earlier, later in zip(sigmas, sigmas[1:]))
        # Float32 rounds the first level of some shifts to a little above 1.
        if not falls or not first <= sigmas[0] <= 1 + 1e-5 or not sigmas[-2] > sigmas[-1] == 0:
            return f"its noise levels {levels} do not fall from 1 to 0"
        # Multistep solvers round timesteps down.
        if not np.allclose(timesteps.tolist(), [1000 * sigma for sigma in sigmas[:-1]], rtol=0, atol=1.01):
            return f"its timesteps {timesteps.tolist()} are not 1000 times its noise levels {levels}"
        left, *spreads = rehearse(scheduler, timesteps)
    except Exception as error:  # diffusers refuses some settings only when it draws, by errors of many types
        return f"it raises {type(error).__name__} ({str(error).rstrip('.')})"
    if not left < GRAY_LEVEL:  # NaN is not less, either
        return f"it leaves noise of the standard deviation {left:.2g} in an image"
    for deviation, spread in zip(REHEARSED_DEVIATIONS[1:], spreads):
        if not spread < GROWTH_MAX * deviation:
            return f"it is unstable: pixels of the standard deviation {deviation} come out with {spread:.2g}"
    return None


def find_settings(scheduler: SchedulerMixin, schedule: dict[str, Any]) -> dict[str, Any]:
    """
    Return the settings that cause a scheduler's fault, as few as possible, with their defaults. The scheduler has no fault
    once they are set to these. If none of its settings is the cause, the result is empty.
    """
    needed = ("num_train_timesteps", "use_flow_sigmas", "prediction_type", shift_name(scheduler))
    parameters = inspect.signature(type(scheduler).__init__).parameters
    settings = {
        name: parameters[name].default
        for name, value in scheduler.config.items()
        if name in parameters and name not in needed and not np.array_equal(value, parameters[name].default)
    }

    def has_fault(defaults: dict[str, Any]) -> bool:
        try:
            return find_fault(type(scheduler).from_config(scheduler.config, **defaults), schedule) is not None
        except Exception:  # some settings do not go together
            return True

    if has_fault(settings):
        return {}
    for name in list(settings):
        others = {other: default for other, default in settings.items() if other != name}
        if not has_fault(others):
            settings = others
    return settings


def check_schedule(scheduler: SchedulerMixin, schedule: dict[str, Any]) -> None:
    """
    Raise a `ValueError` unless a scheduler draws good images with these models: its noise levels fall from 1 to 0, its
    timesteps are 1000 times as high, and a rehearsal on a few pixels succeeds. The error names the settings at fault. The
    scheduler's timesteps must be set again afterwards.

    Args:
        scheduler ([`SchedulerMixin`]): A flow-matching scheduler; see [`shift_name`].
        schedule (`dict`): The arguments of diffusers' `retrieve_timesteps`.
    """
    fault = find_fault(scheduler, schedule)
    if fault is None:
        return
    settings = find_settings(scheduler, schedule)
    if not settings:
        name = shift_name(scheduler)
        raise ValueError(
            f"`scheduler` is a {type(scheduler).__name__} with `{name}={scheduler.config[name]}`, but {fault}: pass another "
            "kind, such as a FlowMatchEulerDiscreteScheduler."
        )
    given = " and ".join(f"`{name}={scheduler.config[name]!r}`" for name in settings)
    defaults = " and ".join(f"`{name}={default!r}`" for name, default in settings.items())
    raise ValueError(f"`scheduler` has {given}, but then {fault}: set {defaults}.")


# ----------------------------------------------------------------------------------------------------------------------
# Growth stages


def get_handover_sigmas(
    core_first: float | str | None,
    unet: ShallowUNet2DModel | GrowableUNet2DConditionModel,
    detail_variances: list[float] | None,
    level: int,
) -> list[float]:
    """
    Return the noise level, at the resolution of a `level`, at which each growth stage inside it joins, the innermost first. The
    other arguments are those of the pipeline; see `core_first` of its `__call__`.

    Raises:
        `ValueError`: if `core_first` is neither `"auto"`, a number in (0, 1] nor None; if it is `"auto"` without
        `detail_variances`; or if the core draws no images of its own.
    """
    sizes = unet.sample_sizes[: level + 1]
    if core_first is None:
        return [math.inf] * (len(sizes) - 1)  # not 1: a scheduler's first timestep may be a little above 1000
    if unet.config.get("init") == "random":
        raise ValueError(
            f"`core_first={core_first!r}` needs a core that draws images of its own; in a model grown with "
            '`init="random"` it does not. Pass None.'
        )
    if core_first == "auto":
        if len(detail_variances or ()) != len(unet.sample_sizes) - 1:
            raise ValueError(
                '`core_first="auto"` needs the `detail_variances` of the images that the model was trained on, one '
                f"for each growth stage, but the pipeline has {detail_variances}. Pass a noise level, such as 0.8."
            )
        levels = [
            handover_sigma(variance, size // inner_size, CORE_FIRST_BOUND)
            for variance, inner_size, size in zip(detail_variances or (), sizes, sizes[1:])
        ]
    elif isinstance(core_first, NUMBER) and core_first is not True and 0 < core_first <= 1:
        levels = [float(core_first)] * (len(sizes) - 1)
    else:
        raise ValueError(f'`core_first={core_first!r}` must be "auto", a noise level in (0, 1], or None.')
    sigmas = [shift_sigma(level, sizes[-1] / size) for level, size in zip(levels, sizes[1:])]
    # A stage needs the stages inside it, so none of them may join later than it does.
    return list(accumulate(reversed(sigmas), max))[::-1]


def count_stages(timesteps: list[float], order: int, handover_sigmas: list[float]) -> list[int]:
    """
    Return how many growth stages take part in each evaluation of the model, from a scheduler's `timesteps` and `order`.
    All evaluations of a step (Heun's has two) have as many as its first.
    """
    counts = [sum(timestep / 1000 <= level for level in handover_sigmas) for timestep in timesteps]
    return [counts[i - i % order] for i in range(len(timesteps))]
