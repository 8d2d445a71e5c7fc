# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Training, with the test names of diffusers' own suite."""

import pytest
import torch
from diffusers.training_utils import EMAModel

from ..testing_utils import make_inputs
from .conftest import make_model


def test_training(model_and_inputs):
    model, inputs = model_and_inputs
    model.train()
    model(**inputs).sample.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_training_with_ema(either):
    model, inputs = either
    ema = EMAModel(model.parameters(), decay=0.5)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**inputs).sample.square().mean().backward()
    optimizer.step()
    ema.optimization_step = 100  # in its first steps the average is the new weights
    ema.step(model.parameters())
    for old, shadow, new in zip(before, ema.shadow_params, model.parameters()):
        torch.testing.assert_close(shadow, (old + new.detach()) / 2)


def test_gradient_checkpointing(either):
    model, _ = either
    assert not model.is_gradient_checkpointing
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing


def test_gradient_checkpointing_is_applied(either):
    model, _ = either
    model.enable_gradient_checkpointing()
    enabled = {type(module).__name__ for module in model.modules() if getattr(module, "gradient_checkpointing", False)}
    grown = {"GrowthEncoder", "GrowthDecoder"} if hasattr(model, "stages") else set()
    assert enabled == {"ShallowUNet2DModel"} | grown


@pytest.mark.parametrize("kind", ["core", "preserve", "random", "grown twice"])
def test_gradient_checkpointing_equivalence(kind):
    model, size = make_model(kind)
    inputs = make_inputs(height=size, width=size)

    def gradients():
        model.zero_grad()
        model(**inputs).sample.square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain = gradients()
    calls = []
    model.enable_gradient_checkpointing()
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            function = module._gradient_checkpointing_func
            module._gradient_checkpointing_func = lambda *args, f=function: (calls.append(args[0]), f(*args))[1]
    checkpointed = gradients()
    assert len(calls) >= 2
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_training(either, dtype):
    model, inputs = either
    model(**inputs).sample.square().mean().backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    with torch.autocast("cpu", dtype):
        output = model(**inputs).sample
    assert output.dtype == torch.float32
    output.square().mean().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert torch.cosine_similarity(gradient, expected, dim=0) > 0.99
