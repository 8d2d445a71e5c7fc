# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""A run: its configuration, its totals over all phases, and its metrics."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from .arguments import FREE_TO_CHANGE, OF_EVALUATION, OF_ONE_LAUNCH
from .phases import Phase
from .plan import PhasePlan


@dataclass
class Run:
    """
    The settings, totals and metrics that all phases share.

    Args:
        accelerator (`Accelerator`): The processes and the precision.
        output_dir (`Path`): Where the run puts everything.
        arguments (`tuple`): The argument dataclasses of the script.
        phases (`list[Phase]`): The phases, in order.
        plans (`list[PhasePlan]`): What each phase costs; without them, all images are taken to cost the same.
        fingerprint (`str`, *optional*): A digest of all captions, if they are known in advance.
    """

    accelerator: Accelerator
    output_dir: Path
    arguments: tuple
    phases: list[Phase]
    plans: list[PhasePlan] = field(default_factory=list)
    fingerprint: str | None = None

    @property
    def checkpoints(self) -> Path:
        return self.output_dir / "checkpoints"

    @property
    def metrics_path(self) -> Path:
        return self.output_dir / "metrics.jsonl"

    @property
    def config(self) -> dict[str, Any]:
        """The arguments, as `config.yaml` holds them."""
        everything = {name: value for arguments in self.arguments for name, value in asdict(arguments).items()}
        return {name: value for name, value in everything.items() if name not in OF_ONE_LAUNCH}

    @property
    def decisive_config(self) -> dict[str, Any]:
        """The settings that must match for a resumed run to be the same run."""
        config = self.config
        free = FREE_TO_CHANGE - (OF_EVALUATION if config.get("keep_best") else set())
        return {
            **{name: value for name, value in config.items() if name not in free},
            "mixed_precision": self.accelerator.mixed_precision,
            "images per step": {phase.name: self.images_per_step(phase) for phase in self.phases},
            "captions": self.fingerprint,
            "FSDP": self.accelerator.is_fsdp2,
        }

    # ------------------------------------------------------------------------------------------------------------------
    # Totals

    def images_per_step(self, phase: Phase) -> int:
        """The number of images in a step, over all processes."""
        return phase.batch_size * self.accelerator.num_processes * self.accelerator.gradient_accumulation_steps

    def flops_per_step(self, phase: Phase) -> int:
        """The number of operations of a training step; where it is not known, the number of images."""
        if not self.plans:
            return self.images_per_step(phase)
        plan = self.plans[self.phases.index(phase)]
        return self.images_per_step(phase) * plan.train_flops + plan.optimizer_flops

    def total_flops(self, phase: Phase, step: int) -> int:
        """The number of operations up to `step` of `phase`, over all phases."""
        parts = [(earlier, earlier.steps) for earlier in self.phases[: self.phases.index(phase)]] + [(phase, step)]
        return sum(steps * self.flops_per_step(part) for part, steps in parts)

    def total_steps(self, phase: Phase, step: int) -> int:
        """The number of steps up to `step` of `phase`, over all phases."""
        return sum(earlier.steps for earlier in self.phases[: self.phases.index(phase)]) + step

    def minutes_left(self, phase: Phase, step: int, images_per_second: float) -> float:
        """The minutes of training left at this speed, by the number of operations. Validation and samples come on top."""
        last = self.phases[-1]
        left = self.total_flops(last, last.steps) - self.total_flops(phase, step)
        steps_per_second = images_per_second / self.images_per_step(phase)
        return left / (steps_per_second * self.flops_per_step(phase)) / 60

    # ------------------------------------------------------------------------------------------------------------------
    # Metrics

    def log(self, phase: Phase, step: int, **values: float) -> None:
        """Write a line to `metrics.jsonl` and tell the trackers. `flops` and the trackers' steps count over all phases."""
        if self.accelerator.is_main_process:
            flops = {"flops": self.total_flops(phase, step)} if self.plans else {}
            with open(self.metrics_path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"phase": phase.name, "step": step, **flops, **values}) + "\n")
        self.accelerator.log(
            {f"{phase.name}/{name}": value for name, value in values.items()}, step=self.total_steps(phase, step)
        )
