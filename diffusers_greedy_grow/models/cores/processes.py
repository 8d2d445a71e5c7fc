# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The processes of foreign cores, as entries of a configuration."""

from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ...flow import RectifiedFlow, VariancePreserving
from ..blocks import check_sizes


# The entries of a scheduler's configuration that say what the model was trained on. The others say how to sample.
SCHEDULER_NAMES = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
    "clip_sample",
    "clip_sample_range",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
)


def describe_process(process: Any) -> dict[str, Any]:
    """
    Return the configuration that [`build_process`] builds a process from.

    Args:
        process (`DDPMScheduler`, `DDIMScheduler` or [`RectifiedFlow`]): The process.

    Raises:
        `TypeError`: if it is something else.
    """
    if isinstance(process, RectifiedFlow):
        return {"_class_name": "RectifiedFlow", "noise_scale": process.noise_scale}
    if isinstance(process, (DDPMScheduler, DDIMScheduler)):
        config = {name: process.config[name] for name in SCHEDULER_NAMES}
        if config["trained_betas"] is not None:
            config["trained_betas"] = [float(beta) for beta in config["trained_betas"]]
        return {"_class_name": "DDPMScheduler", **config}
    raise TypeError(
        f"`process` must be the DDPMScheduler or DDIMScheduler that `core` was trained with, or `RectifiedFlow(noise_scale)` of "
        f"`diffusers_greedy_grow.flow`, which a PRXTransformer2DModel needs, but is a {type(process).__name__}. Another scheduler with "
        "the noise levels of DDPM becomes the first by `DDPMScheduler.from_config(scheduler.config)`."
    )


def build_process(config: dict[str, Any] | None) -> RectifiedFlow | VariancePreserving:
    """
    Build a process from a configuration that [`describe_process`] returned.

    Raises:
        `ValueError`: if the configuration is of something else.
    """
    names = {"RectifiedFlow": {"noise_scale"}, "DDPMScheduler": {*SCHEDULER_NAMES}}
    arguments = dict(config) if isinstance(config, dict) else {}
    name = arguments.pop("_class_name", None)
    if name not in names or arguments.keys() != names[name]:
        raise ValueError(f"`core_process={config!r}` must have the `_class_name` and the entries of one of {names}.")
    if name == "RectifiedFlow":
        return RectifiedFlow(**arguments)
    check_sizes(num_train_timesteps=arguments["num_train_timesteps"])
    with torch.device("cpu"):  # models are also built on the meta device, where a scheduler has no values
        try:
            scheduler = DDPMScheduler(**arguments)
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"`core_process={config!r}` is not the configuration of a DDPMScheduler: {error}"
            ) from error
        return VariancePreserving.from_scheduler(scheduler)
