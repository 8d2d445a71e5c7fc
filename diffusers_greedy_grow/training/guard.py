# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""TODO"""

import math
import statistics


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
