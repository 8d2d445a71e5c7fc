# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Seeds per image that depend neither on the number of processes nor on what was drawn before."""

import numpy as np
import torch


def sample_seeds(key: tuple[int, ...], first: int, count: int) -> list[int]:
    """
    Return a seed per image of a batch.

    Args:
        key (`tuple[int, ...]`): The batch, such as (seed, step).
        first (`int`), count (`int`): The place of the first image in the global batch, and the number of images.
    """
    seeds = np.random.SeedSequence(key).generate_state(first + count, np.uint64)[first:]
    return [int(seed) for seed in seeds >> np.uint64(1)]


def sample_generators(key: tuple[int, ...], first: int, count: int) -> list[torch.Generator]:
    """Return a random generator per image, seeded by [`sample_seeds`], as pipelines take them."""
    return [torch.Generator().manual_seed(seed) for seed in sample_seeds(key, first, count)]
