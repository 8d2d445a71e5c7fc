# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

from .pipeline_greedy_grow import GreedyGrowPipeline
