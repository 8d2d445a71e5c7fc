# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Norms that stay in the precision of their input."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn as nn
import torch.nn.functional as F


class LayerNorm(nn.LayerNorm):
    """
    Layer norm that returns the dtype of its input. Under autocast on a GPU, torch's own returns float32, and everything up
    to the next matrix product is then computed in float32, which takes longer than the product. Sums are accumulated in
    float32 in any case.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = cast(x.dtype, self.weight, self.bias)
        with without_autocast(x.device.type):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class GroupNorm(nn.GroupNorm):
    """Group norm that returns the dtype of its input, for the same reason as [`LayerNorm`]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu" and not x.requires_grad and torch.is_grad_enabled():
            # Of a frozen core: in channels_last, the backward pass of torch 2.13 on CPUs writes to the gradient that is not there.
            x = x.contiguous()
        weight, bias = cast(x.dtype, self.weight, self.bias)
        with without_autocast(x.device.type):
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


def cast(dtype: torch.dtype, *parameters: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Return the parameters in `dtype`; None stays None."""
    return tuple(None if parameter is None else parameter.to(dtype) for parameter in parameters)


def without_autocast(device_type: str) -> AbstractContextManager:
    """
    Return a context without autocast. Where autocast is off already it does nothing, since entering `torch.autocast` takes
    longer than a small norm. Compiled code always enters it: up to torch 2.11, asking for the state breaks the graph.
    """
    if device_type == "meta":
        return nullcontext()
    if not torch.compiler.is_compiling() and not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
