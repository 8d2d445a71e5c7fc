# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Protection of a run against bad batches."""

import math
import statistics
from dataclasses import dataclass

import torch


class GradientGuard:
    """
    Rejects a gradient that is not finite, or whose norm is more than `factor` times the median of the last 100 accepted
    norms. A bad batch then costs one step and not the run.

    The device decides, so that it need not wait for the host: [`~GradientGuard.judge`] asks it to, and
    [`~GradientGuard.accept`] notes the same decision on the host once the norm is known.

    Args:
        factor (`float`): Well above the usual variation of the norm, such as 20.
        limit (`int`): How many steps in a row may be rejected.
    """

    def __init__(self, factor: float, limit: int):
        self.factor, self.limit = factor, limit
        self.norms: list[float] = []
        self.unlogged: list[float] = []
        self.skipped_steps, self.skipped_in_a_row = 0, 0

    @property
    def usual(self) -> float:
        """The median of the last 100 accepted norms; infinite before there are 20."""
        return statistics.median(self.norms) if len(self.norms) >= 20 else math.inf

    @property
    def largest(self) -> float:
        """The largest norm to accept, in float32, in which devices compare."""
        return torch.tensor(self.factor * self.usual, dtype=torch.float32, device="cpu").item()

    def judge(self, norm: torch.Tensor) -> torch.Tensor:
        """
        Return whether to reject the step whose gradient has this `norm`, without waiting for its value. All steps before it must
        be noted.

        Args:
            norm (`torch.Tensor` of shape `()`): The norm, float32.

        Returns:
            `torch.Tensor` of shape `()`, float32, on the norm's device: 1 to reject, 0 to accept, as optimizers take `found_inf`.
        """
        return (~(norm.isfinite() & (norm <= self.largest))).float()

    def accept(self, norm: float) -> bool:
        """
        Note the `norm` of a step's gradient, and return whether the step is taken.

        Raises:
            `FloatingPointError`: if more steps in a row are rejected than the limit.
        """
        usual, largest = self.usual, self.largest
        self.unlogged.append(norm)
        if math.isfinite(norm) and norm <= largest:
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
        """Return the mean `grad_norm` and the largest since the last call, and the phase's number of `skipped_steps`."""
        norms = [norm for norm in self.unlogged if math.isfinite(norm)]
        self.unlogged = []
        means = {"grad_norm": statistics.fmean(norms), "grad_norm_max": max(norms)} if norms else {}
        return {**means, "skipped_steps": self.skipped_steps}

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("norms", "unlogged", "skipped_steps", "skipped_in_a_row")}

    def load_state_dict(self, state: dict) -> None:
        self.__dict__.update(state)


class NumberOnItsWay:
    """
    A number that a device may still be computing. It is copied to the host as soon as it is there, and nothing waits for it until
    it is read.

    Args:
        value (`torch.Tensor` of shape `()`): The number.
    """

    def __init__(self, value: torch.Tensor):
        self.copied = torch.cuda.Event() if value.is_cuda else None
        self.value = value.detach().to("cpu", non_blocking=value.is_cuda)  # from a GPU, to pinned memory
        if self.copied is not None:
            self.copied.record()

    def read(self) -> float:
        """Return the number, once it is there."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.value.item()


@dataclass
class JudgedStep:
    """
    A step that the device has judged, or will have.

    Args:
        number (`int`): The number of the step in its phase, from 1.
        norm ([`NumberOnItsWay`]): The norm of its gradient.
        sigma (`torch.Tensor` of shape `(B,)`): The noise levels of its last batch.
    """

    number: int
    norm: NumberOnItsWay
    sigma: torch.Tensor
