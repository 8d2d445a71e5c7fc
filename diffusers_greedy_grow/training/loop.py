# Copyright 2026 The diffusers-greedy-grow authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""What the loops of the training examples share."""

import logging
import math
import signal
import statistics
import sys
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm


class Interrupt:
    """Notes Ctrl-C and SIGTERM, so that the step at hand is finished and a checkpoint is saved."""

    def __init__(self):
        self.signal: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number: int, frame) -> None:
        if self.signal is not None:  # the second time at once
            sys.exit(128 + number)
        self.signal = number


class GradientGuard:
    """
    Refuses gradients that are not finite, and those whose norm is more than `factor` times the median of the last 100
    accepted ones, so that a bad batch costs its step and not the run.

    Args:
        factor (`float`): Far above what norms vary by, such as 20.
        limit (`int`): How many steps in a row may be refused.
    """

    def __init__(self, factor: float, limit: int):
        self.factor, self.limit = factor, limit
        self.norms: list[float] = []
        self.unlogged: list[float] = []
        self.skipped_steps, self.skipped_in_a_row = 0, 0

    def accept(self, norm: float) -> bool:
        """
        Whether to take the step.

        Raises:
            `FloatingPointError`: if this is one refusal in a row more than the limit.
        """
        usual = statistics.median(self.norms) if len(self.norms) >= 20 else math.inf
        self.unlogged.append(norm)
        if math.isfinite(norm) and norm <= self.factor * usual:
            self.norms = [*self.norms[-99:], norm]
            self.skipped_in_a_row = 0
            return True
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.limit:
            raise FloatingPointError(
                f"The gradient's norm was not finite, or over {self.factor:g} times its median ({usual:.3g}), for "
                f"{self.skipped_in_a_row} steps in a row; the last one was {norm:.3g}."
            )
        return False

    def compute(self) -> dict[str, float]:
        """Of the finite ones since the last call the mean `grad_norm` and the largest; `skipped_steps` of the phase."""
        norms = [norm for norm in self.unlogged if math.isfinite(norm)]
        self.unlogged = []
        means = {"grad_norm": statistics.fmean(norms), "grad_norm_max": max(norms)} if norms else {}
        return {**means, "skipped_steps": self.skipped_steps}

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("norms", "unlogged", "skipped_steps", "skipped_in_a_row")}

    def load_state_dict(self, state: dict) -> None:
        self.__dict__.update(state)


@contextmanager
def averaged(ema: EMAModel, parameters: list[torch.nn.Parameter]):
    """Within it, parameters have the values of their moving average."""
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


class TqdmHandler(logging.Handler):
    """Prints log lines above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))
