# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

import pytest

from diffusers_greedy_grow import GreedyGrowPipeline

from ..testing_utils import make_core, make_grown, make_pipeline


@pytest.fixture(params=[make_core, make_grown], ids=["core", "grown"])
def made(request) -> GreedyGrowPipeline:
    """A pipeline with a core, and one with a grown model."""
    return make_pipeline(request.param())
