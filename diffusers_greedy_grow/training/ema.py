# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""TODO"""

from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel


@contextmanager
def averaged(ema: EMAModel, parameters: list[torch.nn.Parameter]):
    """Within it, parameters have the values of their moving average."""
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)
