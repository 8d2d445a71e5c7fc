# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Norms that return the dtype of their input."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.utils.torch_utils import torch_device

from diffusers_greedy_grow.models.blocks import residual_block
from diffusers_greedy_grow.models.norms import GroupNorm, LayerNorm


NORMS = {
    "layer": (lambda: LayerNorm(16, eps=1e-6), lambda x, w, b: F.layer_norm(x, (16,), w, b, 1e-6), (2, 5, 16)),
    "group": (lambda: GroupNorm(4, 16, eps=1e-6), lambda x, w, b: F.group_norm(x, 4, w, b, 1e-6), (2, 16, 3, 3)),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(name, autocast, dtype):
    build, reference, shape = NORMS[name]
    norm = build().to(torch_device)
    for parameter in norm.parameters():  # in float32, as in training
        nn.init.normal_(parameter)
    x = torch.randn(shape, device=torch_device)
    with torch.autocast(torch.device(torch_device).type, torch.bfloat16, enabled=autocast):
        y = norm(x.to(dtype))
        y.float().square().sum().backward()
    assert y.dtype == dtype
    tolerance = {} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}
    torch.testing.assert_close(y.float(), reference(x, norm.weight, norm.bias), **tolerance)
    assert norm.weight.grad.dtype == torch.float32 and norm.weight.grad.any()


def test_residual_blocks_have_them():
    block = residual_block(24, 40, 8)
    assert type(block.norm1) is type(block.norm2) is GroupNorm
    assert (block.norm1.num_groups, block.norm2.num_groups) == (8, 8)
    sample, temb = torch.randn(1, 24, 4, 4), torch.randn(1, 8)
    with torch.device("meta"), torch.no_grad():  # runs are planned on the meta device, which has no autocast
        assert residual_block(24, 40, 8)(sample.to("meta"), temb.to("meta")).shape == (1, 40, 4, 4)


def test_the_features_of_a_frozen_core_may_be_in_channels_last():
    """As they are for images that were made of arrays. Without the copy, the process ends in the backward pass."""
    norm, x = GroupNorm(4, 8), torch.randn(2, 8, 4, 4)
    expected = torch.autograd.grad(norm(x.clone().requires_grad_()).square().sum(), list(norm.parameters()))
    norm(x.to(memory_format=torch.channels_last)).square().sum().backward()
    for parameter, gradient in zip(norm.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
