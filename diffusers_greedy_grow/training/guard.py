# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Protection of a run against bad batches."""

import math
import statistics


class GradientGuard:
    """
    Rejects a gradient that is not finite, or whose norm is more than `factor` times the median of the last 100 accepted
    norms. A bad batch then costs one step and not the run.

    Args:
        factor (`float`): Well above the usual variation of the norm, such as 20.
        limit (`int`): How many steps in a row may be rejected.
    """

    def __init__(self, factor: float, limit: int):
        self.factor, self.limit = factor, limit
        self.norms: list[float] = []
        self.unlogged: list[float] = []
        self.skipped_steps, self.skipped_in_a_row = 0, 0

    def accept(self, norm: float) -> bool:
        """
        Return whether to take the step whose gradient has this `norm`.

        Raises:
            `FloatingPointError`: if more steps in a row are rejected than the limit.
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
        """Return the mean `grad_norm` and the largest since the last call, and the phase's number of `skipped_steps`."""
        norms = [norm for norm in self.unlogged if math.isfinite(norm)]
        self.unlogged = []
        means = {"grad_norm": statistics.fmean(norms), "grad_norm_max": max(norms)} if norms else {}
        return {**means, "skipped_steps": self.skipped_steps}

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("norms", "unlogged", "skipped_steps", "skipped_in_a_row")}

    def load_state_dict(self, state: dict) -> None:
        self.__dict__.update(state)
