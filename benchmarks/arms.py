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

import torch

from benchmarks import cascade, plain
from benchmarks.queue_of_runs import (
    CASCADE,
    COMMON,
    PLAIN,
    STAGE_LEVELS,
    Job,
    Setting,
    core_job,
    growth_job,
)
from diffusers_greedy_grow import GrowableUNet2DConditionModel, ShallowUNet2DModel
from diffusers_greedy_grow.training.arguments import ModelArguments
from diffusers_greedy_grow.training.growing import get_text_hidden_size
from diffusers_greedy_grow.training.plan import plan_phase


# By growth factor. All cores work at 16 px; each stage ends at single pixels.
SETTINGS = {
    2: Setting(resolution=32, block_out_channels="32,64", cascade_channels=(24, 40), batch_size=16),
    4: Setting(resolution=64, block_out_channels="24,48,96", cascade_channels=(24, 32, 48), batch_size=16),
    8: Setting(resolution=128, block_out_channels="24,32,64,96", cascade_channels=(16, 24, 40, 56), batch_size=8),
}
# Chosen so that the runs from scratch see about as many images at 64 as at 128 px.
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
        stage_levels: See [`growth_job`].
        num_seeds: Arms with one seed run at the largest factor only.
        options: Further arguments of `grow.py` or `plain.py`, such as `optimizer` and `learning_rate`.
        patches: Whether the stage is that of the present recipe, see [`Setting.read_patches`].
        two_stages: Grow in two steps instead of one.
        scale: Factor on the operations, for arms that have fewer than the others.
        equal_time: Train a plain model for as long as `REFERENCE` takes, instead of for as many operations.
    """

    name: str
    init: str = "preserve"
    core_share: float = 5 / 12
    frozen_share: float = 1.0
    stage_levels: bool = True
    num_seeds: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    patches: bool = False
    two_stages: bool = False
    scale: float = 1.0
    equal_time: bool = False

    @property
    def is_plain(self) -> bool:
        return self.init in plain.MODELS


def from_scratch(name: str, num_seeds: int = 1, patches: bool = False, **options: Any) -> Arm:
    return Arm(name, core_share=0.0, frozen_share=0.0, num_seeds=num_seeds, patches=patches, options=options)


def plain_arms(model: str, optimizer: str) -> list[Arm]:
    """Return the arms of a plain model with one optimizer: three learning rates, and the usual one for an equal time."""
    name, usual = model if optimizer == "adamw" else f"{model}, {optimizer.title()}", plain.MODELS[model]
    options = {"optimizer": optimizer, "learning_rate": usual}
    shared: dict[str, Any] = {"init": model, "core_share": 0.0}
    return [
        Arm(name, num_seeds=3, options=options, **shared),
        Arm(f"{name}, half of the rate", options={**options, "learning_rate": usual / 2}, **shared),
        Arm(f"{name}, twice the rate", options={**options, "learning_rate": usual * 2}, **shared),
        Arm(f"{name}, equal time", num_seeds=3, options=options, equal_time=True, **shared),
    ]


REFERENCE = "ours"
ARMS = (
    # The present recipe.
    Arm(REFERENCE, patches=True, options={"optimizer": "muon"}, num_seeds=3),
    Arm("ours, AdamW", patches=True, num_seeds=3),
    from_scratch("scratch, Muon", num_seeds=3, patches=True, optimizer="muon", learning_rate=[1.5e-3, 1.5e-3]),
    from_scratch("scratch, Muon, twice the rate", patches=True, optimizer="muon", learning_rate=[3e-3, 3e-3]),
    from_scratch("scratch, Muon, half of the rate", patches=True, optimizer="muon", learning_rate=[7.5e-4, 7.5e-4]),
    # An earlier recipe, AdamW, with stages down to single pixels.
    from_scratch("scratch", num_seeds=3),
    Arm("paper's growth", init="random", frozen_share=0.25, num_seeds=3),
    Arm("cascade", init="cascade", frozen_share=0.0, num_seeds=3),
    Arm("ours, no detail phase", frozen_share=0.0, num_seeds=3),
    Arm("ours, short detail phase", frozen_share=0.25, num_seeds=3),
    Arm("ours, long detail phase", frozen_share=0.75, num_seeds=3),
    Arm("ours, detail phase only", num_seeds=3),
    Arm("ours, detail phase only, half of the operations", core_share=1 / 2, num_seeds=3, scale=0.5),
    # One change at a time.
    from_scratch("scratch, broad noise levels", logit_mean=[1.0, 0.0], logit_std=[1.0, 1.6]),
    from_scratch("scratch, twice the rate inside", core_lr_scale=2.0),
    from_scratch("scratch, twice the rate", learning_rate=[3e-3, 3e-3]),
    from_scratch("scratch, half of the rate", num_seeds=3, learning_rate=[7.5e-4, 7.5e-4]),
    from_scratch("scratch, a quarter of the rate", learning_rate=[3.75e-4, 3.75e-4]),
    # The first is the core's default.
    Arm("ours, detail phase only, half of the rate", options={"learning_rate": [3e-3, 7.5e-4]}),
    Arm("paper's growth, full rate inside", init="random", frozen_share=0.25, options={"core_lr_scale": 1.0}),
    Arm("ours, detail phase only, the core's noise levels", stage_levels=False),
    Arm("ours, detail phase only, a third on the core", core_share=1 / 3),
    Arm("ours, detail phase only, 21 % on the core", core_share=5 / 24),
    Arm("ours, detail phase only, 67 % on the core", core_share=2 / 3),
    Arm("ours, detail phase only, two stages", two_stages=True),
    Arm("ours, short detail phase, the core's full rate", frozen_share=0.25, options={"core_lr_scale": 1.0}),
    # The stage's weighting is "clean" by default.
    Arm("ours, detail phase only, velocity weighting", options={"loss_weighting": ["velocity", "velocity"]}),
    Arm("ours, detail phase only, cosmap weighting", options={"loss_weighting": ["velocity", "cosmap"]}),
    *plain_arms("transformer-16", "adamw"),
    *plain_arms("transformer-16", "muon"),
    *plain_arms("transformer-8", "adamw"),
    *plain_arms("transformer-8", "muon"),
    *plain_arms("unet", "adamw"),
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
    if arm.patches:
        setting = setting.read_patches()
    flops = scale * arm.scale * TOTAL_FLOPS[setting.factor]
    if arm.is_plain:
        steps = count_plain_steps(setting, arm, flops, seconds)
        return [] if steps is None else [plain_job(setting, arm, seed, steps, data)]
    growth_flops = flops * (1 - arm.core_share)
    if arm.two_stages:
        more |= two_stage_arguments(setting, growth_flops)
    core = None
    if arm.core_share:
        core = core_job(setting, seed, flops * arm.core_share, core_data, arm.options.get("optimizer", "adamw"))
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
        stage_levels=arm.stage_levels,
        init=arm.init,
        **arm.options,
        **more,
    )
    return [core, run] if core else [run]


def two_stage_arguments(setting: Setting, flops: float) -> dict[str, Any]:
    """Return arguments that grow the same channels in two steps: to twice the core's resolution, then to the last one.

    Each step has half of the `flops`."""
    sizes = [setting.core_resolution, 2 * setting.core_resolution, setting.resolution]
    channels, steps = [setting.channels[-2:], setting.channels[:-2]], []
    with torch.device("meta"):
        unet: ShallowUNet2DModel | GrowableUNet2DConditionModel = setting.build_core()
        for size, block_out_channels in zip(sizes[1:], channels):
            unet = GrowableUNet2DConditionModel.from_core(unet, size, block_out_channels=block_out_channels)
            unet.freeze_core()
            cost = plan_phase("detail", unet, size, 1, 1, 1, setting.max_sequence_length).train_flops
            steps.append(round(flops / 2 / cost / setting.batch_size))
    return {
        "resolutions": sizes,
        "block_out_channels": [",".join(map(str, one)) for one in channels],
        "detail_steps": steps,
        "joint_steps": [0, 0],
        "train_batch_size": [setting.core_batch_size, setting.batch_size, setting.batch_size],
        **{name: [*values, values[-1]] for name, values in STAGE_LEVELS.items()},
    }


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
            "stage_levels": int(arm.stage_levels),
        },
        keys={"arm": arm.name, "seed": seed, "factor": setting.factor, "core": core.name},
        data=data,
        core=core.name,
        script=CASCADE,
    )


def count_plain_steps(setting: Setting, arm: Arm, flops: float, seconds: dict[str, list[float]] | None) -> int | None:
    """Return the steps of a plain model, by its operations or, if the arm asks for it, by the time that `REFERENCE` takes."""
    batch_size = plain_batch_size(setting)
    if not arm.equal_time:
        options = setting.resolution, setting.hidden_size, batch_size, arm.options["optimizer"]
        text = setting.text_hidden_size, setting.max_sequence_length
        return round(flops / plain.count_step(arm.init, *options, *text))
    kind = f"{arm.init}, Muon" if arm.options["optimizer"] == "muon" else arm.init
    if seconds is None or kind not in seconds:
        return None
    reference = find_arm(REFERENCE)
    costs, time = setting.read_patches().plans(optimizer=reference.options["optimizer"]), 0.0
    for phase, share in (("core", reference.core_share), ("detail", 1 - reference.core_share)):
        one = "core, Muon" if phase == "core" else "preserve detail, Muon"
        time += share * flops / costs[phase].flops * costs[phase].images * statistics.median(seconds[one])
    return round(time / statistics.median(seconds[kind]) / batch_size)


def plain_batch_size(setting: Setting) -> int:
    return 2 * setting.batch_size


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
            "batch_size": plain_batch_size(setting),
            "validation_steps": max(steps // 12, 1),
            **arm.options,
        },
        keys={"arm": arm.name, "seed": seed, "factor": setting.factor, "core": None},
        data=data,
        script=PLAIN,
    )
