# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Which schedulers fit, and the denoising steps at which growth stages join."""

import inspect
import math
from itertools import accumulate

import numpy as np
from diffusers import SchedulerMixin

from ..flow import handover_sigma, shift_sigma
from ..models import GrowableUNet2DConditionModel, ShallowUNet2DModel


# The types of arguments that are numbers, numpy's among them
INTEGER = (int, np.integer)
NUMBER = (int, float, np.integer, np.floating)

# The bound of `core_first="auto"`: while a stage is left out, the image's share of the variance in the coarsest detail that
# this stage draws is at most this many times the noise's.
CORE_FIRST_BOUND = 0.01


# ----------------------------------------------------------------------------------------------------------------------
# Schedulers


def shift_name(scheduler: SchedulerMixin) -> str:
    """
    Return the config entry that holds a flow-matching scheduler's resolution shift: `shift`, or `flow_shift` for the
    multistep solvers. Raise a `ValueError` for any other scheduler, and for settings that do not fit these models.
    """
    config, arguments = scheduler.config, inspect.signature(type(scheduler).__init__).parameters
    for entry, value in (("use_dynamic_shifting", False), ("invert_sigmas", False), ("num_train_timesteps", 1000)):
        if config.get(entry, value) != value:
            raise ValueError(
                f"`scheduler` has `{entry}={config[entry]}`, but the shift of these models is fixed, and their "
                f"timesteps are 1000 times the noise level: set `{entry}={value}`."
            )

    # A scheduler made from the config of another kind keeps that one's entries: ask which ones its own class takes.
    if type(scheduler).__name__.startswith("FlowMatch") and "shift" in arguments:
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


# ----------------------------------------------------------------------------------------------------------------------
# Growth stages


def is_variance(value) -> bool:
    """Return whether `value` is a positive, finite number."""
    return isinstance(value, NUMBER) and bool(0 < value < math.inf)


def get_handover_sigmas(
    core_first: float | str | None,
    unet: ShallowUNet2DModel | GrowableUNet2DConditionModel,
    detail_variances: list[float] | None,
) -> list[float]:
    """
    Return the noise level, at the model's own resolution, at which each growth stage joins, the innermost first. The
    arguments are those of the pipeline; see `core_first` of its `__call__`.

    Raises:
        `ValueError`: if `core_first` is neither `"auto"`, a number in (0, 1] nor None; if it is `"auto"` without
        `detail_variances`; or if the core draws no images of its own.
    """
    sizes = unet.sample_sizes
    if core_first is None:
        return [math.inf] * (len(sizes) - 1)  # not 1: a scheduler's first timestep may be a little above 1000
    if unet.config.get("init") == "random":
        raise ValueError(
            f"`core_first={core_first!r}` needs a core that draws images of its own; in a model grown with "
            '`init="random"` it does not. Pass None.'
        )
    if core_first == "auto":
        if len(detail_variances or ()) != len(sizes) - 1:
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
