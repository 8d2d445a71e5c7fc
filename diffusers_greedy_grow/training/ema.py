# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The moving average of the trained weights, which is what is evaluated, sampled and saved; and the best one of a phase."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import save_file

from .files import link_file
from .sharding import gather, scatter_as


@contextmanager
def averaged(ema: EMAModel, parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """Give `parameters` the values of their moving average within the `with` block."""
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


# ----------------------------------------------------------------------------------------------------------------------
# Files of averages


def save_averages(
    accelerator: Accelerator,
    path: Path,
    ema: EMAModel,
    named_parameters: list[tuple[str, torch.nn.Parameter]],
    metadata: dict[str, str] | None = None,
) -> None:
    """Save a moving average by parameter name, under a temporary name first. Called on all processes."""
    shadows = {}
    for (name, _), shadow in zip(named_parameters, ema.shadow_params, strict=True):
        whole = gather(shadow.to(accelerator.device))  # a process may have its averages on the CPU
        if accelerator.is_main_process:
            shadows[name] = whole.cpu().contiguous()
    if accelerator.is_main_process:
        temporary = path.with_name(path.name + ".tmp")
        save_file(shadows, temporary, metadata)
        temporary.replace(path)


def load_averages(path: Path, named_parameters: list[tuple[str, torch.nn.Parameter]]) -> list[torch.Tensor]:
    """
    Load what [`save_averages`] saved, each average on the device of its parameter and sharded as that is.

    Raises:
        `ValueError`: if the averages are of other parameters.
    """
    with safe_open(path, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        if shapes != {name: tuple(parameter.shape) for name, parameter in named_parameters}:
            raise ValueError(f"{path.parent} has a moving average of other parameters than this phase trains.")
        # Matched by name: diffusers matches by position.
        return [scatter_as(file.get_tensor(name), parameter) for name, parameter in named_parameters]


class BestAverage:
    """
    The moving average at a phase's lowest held-out loss so far, in a file beside the checkpoints. Each checkpoint has a copy, so
    that a resumed run knows what was the best at that step, whatever came later.

    Args:
        accelerator (`Accelerator`): The processes.
        folder (`Path`): The folder of the checkpoints.
        checkpoint (`Path`, *optional*): The checkpoint of the phase that the run resumes from.

    Attributes:
        step (`int`, *optional*): The step of the best average; None before the first held-out loss.
        loss (`float`): Its held-out loss.
    """

    NAME = "best.safetensors"

    def __init__(self, accelerator: Accelerator, folder: Path, checkpoint: Path | None = None):
        self.accelerator, self.path = accelerator, folder / f".{self.NAME}"  # hidden: it is not a checkpoint
        self.step: int | None = None
        self.loss = math.inf
        if checkpoint is not None and (checkpoint / self.NAME).exists():
            with safe_open(checkpoint / self.NAME, framework="pt") as file:
                metadata = file.metadata()
            self.step, self.loss = int(metadata["step"]), float(metadata["loss"])
        if accelerator.is_main_process:
            if checkpoint is not None and self.step is not None:
                link_file(checkpoint / self.NAME, self.path)
            else:
                self.remove()

    def offer(
        self, step: int, loss: float, ema: EMAModel, named_parameters: list[tuple[str, torch.nn.Parameter]]
    ) -> None:
        """Save the moving average after `step` if its held-out `loss` is the lowest so far. Called on all processes."""
        if loss < self.loss:
            if self.accelerator.is_main_process:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            metadata = {"step": str(step), "loss": repr(loss)}
            save_averages(self.accelerator, self.path, ema, named_parameters, metadata)
            self.step, self.loss = step, loss

    def copy_into(self, checkpoint: Path) -> None:
        """Add the file to a checkpoint's folder, if there is one. Called on the main process."""
        if self.step is not None:
            link_file(self.path, checkpoint / self.NAME)

    def take(self, named_parameters: list[tuple[str, torch.nn.Parameter]]) -> list[torch.Tensor]:
        """Load the best average and remove its file: the phase is over. Called on all processes."""
        self.accelerator.wait_for_everyone()
        averages = load_averages(self.path, named_parameters)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.remove()
        return averages

    def remove(self) -> None:
        """Remove the file, and what a killed run left of it."""
        for path in (self.path, self.path.with_name(self.path.name + ".tmp")):
            path.unlink(missing_ok=True)
