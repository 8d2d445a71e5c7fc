# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from .hub_server import HubServer


# The Hub of all tests, before anything imports huggingface_hub, which reads where it is only once.
FOLDER = Path(tempfile.mkdtemp(prefix="greedy-grow-tests-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
HUB = HubServer(FOLDER / "hub", tokens={"hf_of_the_owner": "owner", "hf_of_a_stranger": "stranger"}).__enter__()
os.environ.update(
    HF_ENDPOINT=HUB.url,
    HF_HOME=str(FOLDER / "home"),
    HF_TOKEN="hf_of_the_owner",
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_TELEMETRY="1",
)

import pytest  # noqa: E402

from diffusers_greedy_grow import GreedyGrowPipeline, GrowableUNet2DConditionModel, ShallowUNet2DModel  # noqa: E402

from .testing_utils import make_core, make_grown, make_pipeline  # noqa: E402


@pytest.fixture
def hub() -> HubServer:
    """The loopback Hub, which behaves again after the test."""
    yield HUB
    HUB.faults.clear()


@pytest.fixture
def core() -> ShallowUNet2DModel:
    return make_core()


@pytest.fixture
def grown() -> GrowableUNet2DConditionModel:
    return make_grown()


@pytest.fixture
def pipeline() -> GreedyGrowPipeline:
    return make_pipeline()
