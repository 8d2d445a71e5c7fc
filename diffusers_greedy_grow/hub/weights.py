# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Whether the weights of a model are where they are looked for, and as they were loaded."""

from collections.abc import Iterator
from typing import Any

import torch.nn as nn


def list_hooks(model: nn.Module, name: str) -> Iterator[Any]:
    """Yield the hooks of diffusers that the modules of a model have under a name."""
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and (hook := registry.get_hook(name)) is not None:
            yield hook


def find_offloading(model: nn.Module) -> str | None:
    """Return what has moved weights of a model out of memory, or None if all are there."""
    # Between two calls, such tensors are neither the weights nor on the meta device, but memory that nothing was written to.
    for hook in list_hooks(model, "group_offloading"):
        if hook.group.offload_to_disk_path is not None:
            return "its weights are on the disk, by group offloading with `offload_to_disk_path`"
    if any(parameter.is_meta for parameter in model.parameters()):
        return "it has weights on the disk or the meta device, by a `device_map` or by `enable_sequential_cpu_offload`"
    return None


def find_casting(model: nn.Module) -> str | None:
    """Return what has cast weights of a model to a narrower dtype between its calls, or None if nothing has."""
    for hook in list_hooks(model, "layerwise_casting"):
        if hook.storage_dtype.itemsize < hook.compute_dtype.itemsize:
            dtype = str(hook.storage_dtype).removeprefix("torch.")
            return f"its weights are rounded to {dtype}, by `enable_layerwise_casting`"
    return None


def find_quantization(model: nn.Module) -> str | None:
    """Return what has quantized weights of a model, or None if none are."""
    if getattr(model, "hf_quantizer", None) is not None:
        return "it is quantized, by a `quantization_config`"
    if kinds := {type(parameter).__name__ for parameter in model.parameters()} - {"Parameter", "Tensor"}:
        return f"it has weights of the type {', '.join(sorted(kinds))}"
    return None


def find_change(model: nn.Module) -> str | None:
    """Return what keeps the weights of a model from being those that were loaded or trained, or None if they are."""
    if (cause := find_quantization(model) or find_casting(model) or find_offloading(model)) is not None:
        return cause
    is_narrow = any(parameter.dtype.itemsize == 1 for parameter in model.parameters())
    return "it has weights in eight bits" if is_narrow else None


def refuse_cast(name: str, model: nn.Module) -> None:
    """Raise a `ValueError` if the weights that are to be saved of a model are not as precise as they were."""
    if (cause := find_casting(model)) is not None:
        raise ValueError(
            f"`{name}` cannot be saved: {cause}, and what they were is lost. Load it again, save it, and enable that afterwards, or when "
            "you load what you saved."
        )


def refuse_offloaded(name: str, model: nn.Module) -> None:
    """Raise a `ValueError` if what is to be saved of a model is not in memory."""
    if (cause := find_offloading(model)) is not None:
        raise ValueError(
            f"`{name}` cannot be saved: {cause}. Load it again without that, and save it before you offload it."
        )


def hint_at_variant(error: Exception) -> str:
    """Return a sentence to add to an error of loading if a file is missing, since it may have another name."""
    if "file named" not in str(error):
        return ""
    return " If the names of its files have a variant, as in diffusion_pytorch_model.fp16.safetensors, pass `variant`: fp16."
