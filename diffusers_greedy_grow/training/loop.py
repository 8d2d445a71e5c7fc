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
import signal
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
