# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Models of diffusers that others have trained in pixel space, as cores to grow around."""

import inspect
from typing import Any

import torch

from ..blocks import check_sizes
from .foreign import Core, ForeignCore
from .processes import describe_process
from .prx import PRXTransformer2DCore
from .unet import UNet2DConditionCore, UNet2DCore


# The only classes that a configuration can name.
CORE_CLASSES: dict[str, type[ForeignCore]] = {
    core_class.model_class.__name__: core_class
    for core_class in (UNet2DCore, UNet2DConditionCore, PRXTransformer2DCore)
}


def list_arguments(name: str) -> set[str]:
    """Return the names of the arguments of a class in [`CORE_CLASSES`]."""
    return inspect.signature(CORE_CLASSES[name].model_class.__init__).parameters.keys() - {"self"}


def build_core(core_config: dict[str, Any], core_process: dict[str, Any] | None, sample_size: int) -> ForeignCore:
    """
    Build a core from the part of a grown model's configuration that describes it.

    Raises:
        `ValueError`: if `core_config` names a class that is not in [`CORE_CLASSES`], or has entries that the class does not
            know or cannot use; if the model or its process is not supported, or does not fit `sample_size`.
    """
    name = core_config.get("_class_name") if isinstance(core_config, dict) else None
    if not isinstance(name, str) or name not in CORE_CLASSES:
        raise ValueError(f"`core_config` must have a `_class_name` of {sorted(CORE_CLASSES)}, but is {core_config!r}.")
    arguments = {key: value for key, value in core_config.items() if key != "_class_name"}
    if unknown := sorted(arguments.keys() - list_arguments(name)):
        raise ValueError(f"`core_config` has {unknown}, which a {name} does not know.")
    check_sizes(sample_size=sample_size)
    try:
        return CORE_CLASSES[name](core_process, sample_size, **arguments)
    except (ArithmeticError, LookupError, TypeError) as error:
        raise ValueError(f"`core_config={core_config!r}` is not the configuration of a {name}: {error!r}") from error


def adopt_core(model: torch.nn.Module, process: Any, sample_size: int | None) -> ForeignCore:
    """
    Make a model of diffusers a core that shares its parameters.

    Args:
        model (a model of [`CORE_CLASSES`]): The model.
        process (`DDPMScheduler`, `DDIMScheduler` or [`RectifiedFlow`]): The process that it was trained on.
        sample_size (`int`, *optional*): The resolution that it was trained at, if its configuration does not say.

    Raises:
        `TypeError`: if `process` is something else.
        `ValueError`: if the model or its process is not supported, or the resolution is missing, does not fit, or is another
            one than in the configuration.
    """
    name = type(model).__name__
    if process is None:
        raise ValueError(
            f"A {name} needs `process`, which it was trained on: its DDPMScheduler or DDIMScheduler, or "
            "`diffusers_greedy_grow.flow.RectifiedFlow(noise_scale=2.0)` for PRXPixel."
        )
    # Entries that this version of the class does not know have no effect on the model, and diffusers has warned of them.
    known = list_arguments(name)
    config = {key: value for key, value in model.config.items() if key in known}
    own_size: Any = config.get("sample_size")
    if isinstance(own_size, (list, tuple)):
        if len({*own_size}) != 1:
            raise ValueError(
                f"`core` is a {name} with `sample_size={own_size}`: the images it was trained on must be square."
            )
        own_size = own_size[0]
    if own_size is None:
        own_size = sample_size
    if own_size is None:
        raise ValueError(f"This {name} does not say at which resolution it was trained: pass `core_sample_size`.")
    if sample_size not in (None, own_size):
        raise ValueError(
            f"`core_sample_size={sample_size}` must be the `sample_size={own_size}` of `core`: leave it out."
        )
    with torch.device("meta"):
        core = build_core({"_class_name": name, **config}, describe_process(process), own_size)
    state = model.state_dict()
    if others := sorted(core.state_dict().keys() ^ state.keys()):
        raise ValueError(f"`core` has other parameters than its configuration describes, such as `{others[0]}`.")
    core.load_state_dict(state, assign=True)
    return core


def is_foreign(model: Any) -> bool:
    """Return whether a model is one of diffusers that [`adopt_core`] makes a core."""
    return any(type(model) is core_class.model_class for core_class in CORE_CLASSES.values())
