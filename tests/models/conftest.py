# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from ..testing_utils import TEXT_DIM, make_core, make_grown, make_inputs


def make_model(kind: str):
    """A model of each kind, with the resolution of its inputs."""
    if kind == "core":
        return make_core(), 16
    if kind == "unconditional":
        return make_grown(make_core(cross_attention_dim=None)), 32
    if kind == "grown twice":
        return make_grown(make_grown(), 64, block_out_channels=(12,)), 64
    return make_grown(init=kind), 32


KINDS = ["core", "preserve", "random", "grown twice", "unconditional"]


def make_model_and_inputs(kind: str):
    model, size = make_model(kind)
    return model, make_inputs(height=size, width=size, text_dim=None if kind == "unconditional" else TEXT_DIM)


@pytest.fixture(params=KINDS)
def model_and_inputs(request):
    return make_model_and_inputs(request.param)


@pytest.fixture(params=["core", "grown twice"])
def either(request):
    """One model of each class, with inputs."""
    return make_model_and_inputs(request.param)


@pytest.fixture(autouse=True)
def the_default_attention():
    """Setting one model's attention backend sets that of all in diffusers."""
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
