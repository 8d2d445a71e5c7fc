# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Whether the weights of a model are where they are looked for, and as they were loaded."""

import torch.nn as nn


def find_offloading(model: nn.Module) -> str | None:
    """Return what has moved weights of a model out of memory, or None if all are there."""
    for module in model.modules():
        hooks = getattr(module, "_diffusers_hook", None)
        hook = None if hooks is None else hooks.get_hook("group_offloading")
        # Between two calls, such tensors are neither the weights nor on the meta device, but memory that nothing was written to.
        if hook is not None and hook.group.offload_to_disk_path is not None:
            return "its weights are on the disk, by group offloading with `offload_to_disk_path`"
    if any(parameter.is_meta for parameter in model.parameters()):
        return "it has weights on the disk or the meta device, by a `device_map` or by `enable_sequential_cpu_offload`"
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
    if any(parameter.dtype.itemsize == 1 for parameter in model.parameters()):
        return find_quantization(model) or "it has weights in eight bits, by `enable_layerwise_casting`"
    return find_quantization(model) or find_offloading(model)


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
