# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The moving average of the trained weights, which is what is evaluated, sampled and saved."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel


@contextmanager
def averaged(ema: EMAModel, parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """Give `parameters` the values of their moving average within the `with` block."""
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)
