# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""TODO"""

import numpy as np
import torch


def sample_seeds(key: tuple[int, ...], first: int, count: int) -> list[int]:
    """
    A seed for each image of a batch, from `key`, such as (seed, step), and from the image's place in the global batch,
    `first` and following: noise depends neither on the number of processes nor on what was drawn before.
    """
    seeds = np.random.SeedSequence(key).generate_state(first + count, np.uint64)[first:]
    return [int(seed) for seed in seeds >> np.uint64(1)]


def sample_generators(key: tuple[int, ...], first: int, count: int) -> list[torch.Generator]:
    """Random generators with the [`sample_seeds`], as pipelines take them."""
    return [torch.Generator().manual_seed(seed) for seed in sample_seeds(key, first, count)]
