# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
The arms of the training comparisons: how each spends its operations, and the runs that this takes. `grow_vs_scratch` runs
all of them; `few_high_res` and `scale_core` vary some.
"""

import argparse
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import cascade, plain
from benchmarks.queue_of_runs import (
    CASCADE,
    COMMON,
    PLAIN,
    Job,
    Setting,
    core_job,
    growth_job,
)
from diffusers_greedy_grow.training.arguments import ModelArguments
from diffusers_greedy_grow.training.growing import get_text_hidden_size


# By growth factor. All cores work at 16 px; each stage ends at patches of a thirty-second of the side.
SETTINGS = {
    2: Setting(resolution=32, cascade_channels=(40, 64)),
    4: Setting(resolution=64, cascade_channels=(24, 40, 64)),
    8: Setting(resolution=128, cascade_channels=(16, 32, 40, 64)),
}
# What a training takes, the core's included.
TOTAL_FLOPS = {2: 36e12, 4: 36e12, 8: 72e12}
# The factor on the operations with `--large`. Larger models and batches make this three quarters of the steps.
LARGE_SCALE = 12.0


@dataclass
class Arm:
    """
    One way to spend the operations of a comparison.

    Attributes:
        init: How the stage is grown (see `GrowableUNet2DConditionModel.from_core`), `"cascade"`, or one of `plain.MODELS`.
        core_share: Share of the operations that trains the core alone; 0 trains everything from scratch.
        frozen_share: Share of the remaining operations that trains the stage around the frozen core.
        num_seeds: Arms with one seed run at the largest factor only.
        options: Further arguments of `grow.py` or `plain.py`, such as `optimizer` and `learning_rate`.
        equal_time: Train without growing for as long as `REFERENCE` takes, instead of for as many operations.
    """

    name: str
    init: str = "preserve"
    core_share: float = 7 / 12
    frozen_share: float = 1.0
    num_seeds: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    equal_time: bool = False

    @property
    def is_plain(self) -> bool:
        return self.init in plain.MODELS


def from_scratch(name: str, learning_rate: float, num_seeds: int = 1, equal_time: bool = False) -> Arm:
    options = {"learning_rate": [learning_rate, learning_rate]}
    return Arm(name, core_share=0.0, frozen_share=0.0, num_seeds=num_seeds, options=options, equal_time=equal_time)


def plain_arms(model: str) -> list[Arm]:
    """Return the arms of a plain model: three learning rates, and the usual one for an equal time."""
    usual = plain.MODELS[model]
    shared: dict[str, Any] = {"init": model, "core_share": 0.0}
    return [
        Arm(model, num_seeds=3, options={"learning_rate": usual}, **shared),
        Arm(f"{model}, half of the rate", options={"learning_rate": usual / 2}, **shared),
        Arm(f"{model}, twice the rate", options={"learning_rate": usual * 2}, **shared),
        Arm(f"{model}, equal time", num_seeds=3, options={"learning_rate": usual}, equal_time=True, **shared),
    ]


REFERENCE = "ours"
ARMS = (
    Arm(REFERENCE, num_seeds=3),
    from_scratch("scratch", 1.5e-3, num_seeds=3),
    from_scratch("scratch, half of the rate", 7.5e-4),
    from_scratch("scratch, twice the rate", 3e-3),
    from_scratch("scratch, equal time", 1.5e-3, num_seeds=3, equal_time=True),
    Arm("paper's growth", init="random", frozen_share=0.25, num_seeds=3),
    Arm("cascade", init="cascade", frozen_share=0.0, num_seeds=3),
    *plain_arms("transformer-16"),
    *plain_arms("transformer-8"),
    *plain_arms("unet"),
    # One change at a time.
    Arm("ours, AdamW", options={"optimizer": "adamw"}, num_seeds=3),
    Arm("ours, half of the rate", options={"learning_rate": [3e-3, 7.5e-4]}),  # the core's is its usual one
    Arm("ours, twice the rate", options={"learning_rate": [3e-3, 3e-3]}),
    Arm("ours, a third on the core", core_share=1 / 3),
    Arm("ours, two thirds on the core", core_share=2 / 3),
    Arm("ours, long detail phase", frozen_share=0.75),
    Arm("ours, short detail phase", frozen_share=0.25),
    Arm("ours, no detail phase", frozen_share=0.0),
)


def find_arm(name: str) -> Arm:
    (arm,) = (arm for arm in ARMS if arm.name == name)
    return arm


def add_resolutions(parser: argparse.ArgumentParser, default: list[int]) -> None:
    choices = [setting.resolution for setting in SETTINGS.values()]
    parser.add_argument(
        "--resolutions",
        type=int,
        nargs="+",
        default=default,
        choices=choices,
        help="Resolutions to grow to, each from 16 px.",
    )


def chosen_size(args: argparse.Namespace) -> tuple[dict[int, Setting], list[int], float]:
    """Return the settings by growth factor, the seeds, and the factor on the operations."""
    text: dict[str, Any] = {
        "text_encoder": args.text_encoder,
        "text_hidden_size": get_text_hidden_size(ModelArguments(text_encoder=args.text_encoder)),
        "max_sequence_length": args.max_sequence_length,
    }
    settings = {
        factor: replace(setting.enlarge() if args.large else setting, **text) for factor, setting in SETTINGS.items()
    }
    scale = LARGE_SCALE if args.large else 1.0
    return (settings, args.seeds[:1], 0.01 * scale) if args.quick else (settings, args.seeds, scale)


def make_jobs(
    setting: Setting,
    arm: Arm,
    seed: int,
    data: Path,
    core_data: Path,
    scale: float = 1.0,
    seconds: dict[str, list[float]] | None = None,
    **more: Any,
) -> list[Job]:
    """
    Return the run of one arm and seed, and before it the run of the core that it grows, which other arms share.

    The list is empty if the arm does not have this seed, or does not run at this factor, or is to take an equal time and no
    `seconds` of `grow_vs_scratch.time_steps` are given. `more` are further arguments of `grow.py`.
    """
    only_largest = arm.num_seeds == 1 or (arm.is_plain and not plain.fits(arm.init, setting.resolution))
    if seed >= arm.num_seeds or (only_largest and setting.factor < max(SETTINGS)):
        return []
    flops = scale * TOTAL_FLOPS[setting.factor]
    if arm.equal_time:
        kind = arm.init if arm.is_plain else f"{arm.init} joint"
        if not seconds or kind not in seconds:
            return []
        flops = (
            count_seconds(setting, flops, seconds) / statistics.median(seconds[kind]) * flops_per_image(setting, arm)
        )
    if arm.is_plain:
        return [plain_job(setting, arm, seed, round(flops / flops_per_image(setting, arm) / setting.batch_size), data)]
    growth_flops = flops * (1 - arm.core_share)
    core = None
    if arm.core_share:
        core = core_job(setting, seed, flops * arm.core_share, core_data, arm.options.get("optimizer", "muon"))
    if arm.init == "cascade":
        assert core is not None, "A cascade draws on a core."
        return [core, cascade_job(setting, arm, seed, growth_flops, data, core)]
    run = growth_job(
        setting,
        arm.name,
        seed,
        growth_flops,
        arm.frozen_share,
        data,
        core,
        init=arm.init,
        **arm.options,
        **more,
    )
    return [core, run] if core else [run]


def cascade_job(setting: Setting, arm: Arm, seed: int, flops: float, data: Path, core: Job) -> Job:
    """Return the run of a cascade's super-resolution model, which draws on the images of a `core`."""
    channels = setting.cascade_channels
    cost = cascade.count_flops(setting.resolution, channels, setting.text_hidden_size, setting.max_sequence_length)
    steps = round(flops / cost / setting.batch_size)
    return Job(
        name=f"x{setting.factor}-{arm.name.replace(', ', '-').replace(' ', '-')}-{steps}-seed-{seed}",
        arguments={
            "resolution": setting.resolution,
            "block_out_channels": channels,
            "seed": seed,
            "steps": steps,
            "batch_size": setting.batch_size,
        },
        keys={"arm": arm.name, "seed": seed, "factor": setting.factor, "core": core.name},
        data=data,
        core=core.name,
        script=CASCADE,
    )


def count_seconds(setting: Setting, flops: float, seconds: dict[str, list[float]]) -> float:
    """Return the time that `REFERENCE` takes for its `flops`, by the `seconds` per image of its core and its detail phase."""
    share, costs, time = find_arm(REFERENCE).core_share, setting.plans(), 0.0
    for phase, kind, part in (("core", "core", share), ("detail", "preserve detail", 1 - share)):
        time += part * flops / costs[phase].flops * costs[phase].images * statistics.median(seconds[kind])
    return time


def flops_per_image(setting: Setting, arm: Arm) -> float:
    """Return the operations of an arm that grows nothing."""
    if not arm.is_plain:
        cost = setting.plans(arm.init)["joint"]
        return cost.flops / cost.images
    options = setting.resolution, setting.hidden_size, setting.batch_size, "muon"
    text = setting.text_hidden_size, setting.max_sequence_length
    return plain.count_step(arm.init, *options, *text) / setting.batch_size


def plain_job(setting: Setting, arm: Arm, seed: int, steps: int, data: Path) -> Job:
    """Return the run of a plain model."""
    words = [f"x{setting.factor}", arm.name.replace(",", "").replace(" ", "-"), steps, "seed", seed]
    return Job(
        name="-".join(map(str, words)),
        arguments={
            **COMMON,
            "model": arm.init,
            "resolution": setting.resolution,
            "factor": setting.factor,
            "hidden_size": setting.hidden_size,
            **setting.text_arguments(),
            "seed": seed,
            "steps": steps,
            "batch_size": setting.batch_size,
            "optimizer": "muon",
            "validation_steps": max(steps // 12, 1),
            **arm.options,
        },
        keys={"arm": arm.name, "seed": seed, "factor": setting.factor, "core": None},
        data=data,
        script=PLAIN,
    )
