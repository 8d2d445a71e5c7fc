# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
Does growing pay? Growing against training from scratch and against a cascade, at equal numbers of operations.

    python -m benchmarks.grow_vs_scratch                # all factors and seeds; stops and goes on where it was
    python -m benchmarks.grow_vs_scratch --factors 8    # 16 -> 128 px only
    python -m benchmarks.grow_vs_scratch --large --workers 9    # larger models, for a GPU
    python -m benchmarks.grow_vs_scratch --quick        # minutes, to see that it works
    python -m benchmarks.grow_vs_scratch --report       # the table and plot again, from results/
    python -m benchmarks.grow_vs_scratch --time         # what an image of each phase takes, for the table's column of time
    python -m benchmarks.grow_vs_scratch --images     # what the arms draw, as a grid
"""

import argparse
import json
import os
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor

from benchmarks import cascade
from benchmarks.evaluate import draw, held_out
from benchmarks.queue_of_runs import (
    ENVIRONMENT,
    GROW,
    MAX_SEQUENCE_LENGTH,
    TEXT_HIDDEN_SIZE,
    WIDE,
    Job,
    Setting,
    add_queue_arguments,
    core_job,
    find_data,
    find_runs,
    growth_job,
    last_scores,
    places,
    run_queue,
)
from benchmarks.step_time import Steps, timed
from benchmarks.tables import describe_machine, markdown, mean_and_deviation, spread, write_json
from diffusers_greedy_grow import GreedyGrowPipeline, GrowableUNet2DConditionModel
from diffusers_greedy_grow.training.plan import plan_phase
from diffusers_greedy_grow.training.samples import draw_samples


# All at 16 px inside; each stage ends at single pixels.
SETTINGS = {
    2: Setting(resolution=32, block_out_channels="32,64", cascade_channels=(24, 40), batch_size=16),
    4: Setting(resolution=64, block_out_channels="24,48,96", cascade_channels=(24, 32, 48), batch_size=16),
    8: Setting(resolution=128, block_out_channels="24,32,64,96", cascade_channels=(16, 24, 40, 56), batch_size=8),
}
# About as many images from scratch at 64 as at 128 px.
TOTAL_FLOPS = {2: 36e12, 4: 36e12, 8: 72e12}
CAPTION_TOKENS = 10  # of the captions of shapes
# By what `--large` multiplies them; with larger models and batches, that is three quarters of the steps.
LARGE_SCALE = 12.0
LOSSES = {"loss": "val_loss", "low band": "val_loss_low", "high band": "val_loss_high"}
# Of noise. The first is a measurement of its own, below where most of the held-out loss lies.
LEVELS = {
    ".02-.3": "val_low_noise_loss",
    ".3-.6": "val_loss_sigma_0.3_0.6",
    ".6-.8": "val_loss_sigma_0.6_0.8",
    ".8-.9": "val_loss_sigma_0.8_0.9",
    ".9-1": "val_loss_sigma_0.9_1.0",
}


@dataclass
class Arm:
    """
    How an arm spends its operations: a share on the core alone, and of the rest a share on the frozen core. `init` is
    that of growing, or `"cascade"`; `wide` see `growth_job`. `options` are further arguments of grow.py, and `scale` is for
    arms that have not as many operations as the others.
    """

    name: str
    init: str
    core_share: float
    frozen_share: float
    wide: bool
    num_seeds: int = 3
    options: dict = field(default_factory=dict)
    two_stages: bool = False
    scale: float = 1.0


ARMS = (
    Arm("scratch", "preserve", 0.0, 0.0, True),
    Arm("paper's growth", "random", 5 / 12, 0.25, True),
    Arm("cascade", "cascade", 5 / 12, 0.0, True),
    Arm("ours, no detail phase", "preserve", 5 / 12, 0.0, True),
    Arm("ours, short detail phase", "preserve", 5 / 12, 0.25, True),
    Arm("ours, long detail phase", "preserve", 5 / 12, 0.75, True),
    Arm("ours, detail phase only", "preserve", 5 / 12, 1.0, True),
    Arm("ours, detail phase only, half of the operations", "preserve", 1 / 2, 1.0, True, scale=0.5),
    # What else could be done, one thing at a time: one seed, at the largest factor.
    Arm(
        "scratch, broad noise levels",
        "preserve",
        0.0,
        0.0,
        True,
        num_seeds=1,
        options={"logit_mean": [1.0, 0.0], "logit_std": [1.0, 1.6]},
    ),
    Arm("scratch, twice the rate inside", "preserve", 0.0, 0.0, True, num_seeds=1, options={"core_lr_scale": 2.0}),
    *(
        Arm(
            f"scratch, {name} the rate",
            "preserve",
            0.0,
            0.0,
            True,
            num_seeds=num_seeds,
            options={"learning_rate": [rate, rate]},
        )
        for name, rate, num_seeds in (("twice", 3e-3, 1), ("half of", 7.5e-4, 3), ("a quarter of", 3.75e-4, 1))
    ),
    Arm(
        "ours, detail phase only, half of the rate",
        "preserve",
        5 / 12,
        1.0,
        True,
        num_seeds=1,
        options={"learning_rate": [3e-3, 7.5e-4]},  # that of the core as it is by default
    ),
    Arm("paper's growth, full rate inside", "random", 5 / 12, 0.25, True, num_seeds=1, options={"core_lr_scale": 1.0}),
    Arm("ours, detail phase only, the core's noise levels", "preserve", 5 / 12, 1.0, False, num_seeds=1),
    Arm("ours, detail phase only, a third on the core", "preserve", 1 / 3, 1.0, True, num_seeds=1),
    Arm("ours, detail phase only, 21 % on the core", "preserve", 5 / 24, 1.0, True, num_seeds=1),
    Arm("ours, detail phase only, 67 % on the core", "preserve", 2 / 3, 1.0, True, num_seeds=1),
    Arm("ours, detail phase only, two stages", "preserve", 5 / 12, 1.0, True, num_seeds=1, two_stages=True),
    *(
        Arm(f"ours, short detail phase, {name}", "preserve", 5 / 12, 0.25, True, num_seeds=1, options=options)
        for name, options in (
            ("the core's full rate", {"core_lr_scale": 1.0}),
            ("low-resolution loss", {"low_res_loss_weight": 1.0}),
            ("a quarter at low resolution", {"low_res_share": 0.25}),  # whose steps cost less than is counted here
        )
    ),
    *(
        Arm(
            f"ours, detail phase only, {name} weighting",
            "preserve",
            5 / 12,
            1.0,
            True,
            num_seeds=1,
            options={"loss_weighting": ["velocity", name]},
        )
        for name in ("velocity", "cosmap")  # and by default "clean"
    ),
)


def chosen_size(args: argparse.Namespace) -> tuple[dict[int, Setting], list[int], float]:
    """Settings by factor, seeds, and by what the operations are multiplied."""
    settings = {factor: setting.enlarge() for factor, setting in SETTINGS.items()} if args.large else SETTINGS
    scale = LARGE_SCALE if args.large else 1.0
    return (settings, args.seeds[:1], 0.01 * scale) if args.quick else (settings, args.seeds, scale)


def make_jobs(
    setting: Setting, arm: Arm, seed: int, data: Path, core_data: Path, scale: float = 1.0, **more
) -> list[Job]:
    """
    The run of one arm and seed, and before it the core that it grows, which others share; `more` is for grow.py. Empty if
    the arm has fewer seeds, or one and this is not the largest factor.
    """
    if seed >= arm.num_seeds or (arm.num_seeds == 1 and setting.factor < max(SETTINGS)):
        return []
    flops = scale * arm.scale * TOTAL_FLOPS[setting.factor]
    if arm.two_stages:
        more |= in_two_stages(setting, flops * (1 - arm.core_share))
    core = core_job(setting, seed, flops * arm.core_share, core_data) if arm.core_share else None
    if arm.init == "cascade":
        run = cascade_job(setting, arm, seed, flops * (1 - arm.core_share), data, core)
    else:
        run = growth_job(
            setting,
            arm.name,
            seed,
            flops * (1 - arm.core_share),
            arm.frozen_share,
            data,
            core,
            wide=arm.wide,
            init=arm.init,
            **arm.options,
            **more,
        )
    return [core, run] if core else [run]


def in_two_stages(setting: Setting, flops: float) -> dict:
    """The same channels grown in two steps, to twice the core's resolution and on from there, each with half of the `flops`."""
    sizes = [setting.core_resolution, 2 * setting.core_resolution, setting.resolution]
    channels, steps = [setting.channels[-2:], setting.channels[:-2]], []
    with torch.device("meta"):
        unet = setting.build_core()
        for size, block_out_channels in zip(sizes[1:], channels):
            unet = GrowableUNet2DConditionModel.from_core(unet, size, block_out_channels=block_out_channels)
            unet.freeze_core()
            cost = plan_phase("detail", unet, size, 1, 1, 1, MAX_SEQUENCE_LENGTH).train_flops
            steps.append(round(flops / 2 / cost / setting.batch_size))
    return {
        "resolutions": sizes,
        "block_out_channels": [",".join(map(str, one)) for one in channels],
        "detail_steps": steps,
        "joint_steps": [0, 0],
        "train_batch_size": [setting.core_batch_size, setting.batch_size, setting.batch_size],
        **{name: [*values, values[-1]] for name, values in WIDE.items()},
    }


def cascade_job(setting: Setting, arm: Arm, seed: int, flops: float, data: Path, core: Job) -> Job:
    channels = setting.cascade_channels
    cost = cascade.count_flops(setting.resolution, channels, TEXT_HIDDEN_SIZE, MAX_SEQUENCE_LENGTH)
    steps = round(flops / cost / setting.batch_size)
    return Job(
        name=f"x{setting.factor}-{arm.name.replace(', ', '-').replace(' ', '-')}-{steps}-seed-{seed}",
        arguments={
            "resolution": setting.resolution,
            "block_out_channels": channels,
            "seed": seed,
            "steps": steps,
            "batch_size": setting.batch_size,
            "wide": int(arm.wide),
        },
        keys={"arm": arm.name, "seed": seed, "factor": setting.factor, "core": core.name},
        data=data,
        core=core.name,
        script="benchmarks/cascade.py",
    )


# ----------------------------------------------------------------------------------------------------------------------
# Time


def time_steps(setting: Setting, args: argparse.Namespace, repeats: int = 9) -> dict[str, list[float]]:
    """Seconds per image of a training step of each kind of phase, in turn."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32

    models: dict[str, torch.nn.Module] = {}
    for init in ("preserve", "random"):
        models[f"{init} detail"] = detail = setting.grow(setting.build_core(), init)
        models[f"{init} joint"] = setting.grow(setting.build_core(), init)
        detail.freeze_core()
    models["cascade"] = cascade.build_unet(setting.resolution, setting.cascade_channels, TEXT_HIDDEN_SIZE)
    sizes = {name: (model, setting.resolution, setting.batch_size) for name, model in models.items()}
    sizes = {"core": (setting.build_core(), setting.core_resolution, setting.core_batch_size), **sizes}
    steps = {name: Steps(*size, device, dtype, CAPTION_TOKENS) for name, size in sizes.items()}
    if device.type == "cpu" and dtype == torch.bfloat16:  # as the queue's runs have it
        for step in steps.values():
            step.model.set_attention_backend("_native_math")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):  # the first is for warming up
        for name, step in steps.items():
            taken = timed(step.train) / len(step.inputs[0])
            if repeat:
                seconds[name].append(taken)
    return seconds


def read_times(path: Path) -> dict[str, dict]:
    """What `--time` has measured, by factor."""
    return json.loads(path.read_text()) if path.exists() else {}


def training_seconds(run: dict, records: dict[str, dict], seconds: dict[str, list[float]]) -> float | None:
    """What a run's images take, its core's too, by [`time_steps`]; `None` if it had phases that are not timed there."""
    arguments, core = run["arguments"], run["keys"].get("core")
    if len(arguments.get("resolutions", [])) > 2 or arguments.get("low_res_share"):
        return None
    total = sum(records[core]["images"].values()) * statistics.median(seconds["core"]) if core else 0.0
    for phase, images in run["images"].items():
        if phase == "cascade":
            kind = phase
        else:
            is_detail = phase.endswith("-detail") or not arguments["joint_steps"][0]
            kind = f"{arguments['init']} {'detail' if is_detail else 'joint'}"
        total += images * statistics.median(seconds[kind])
    return total


# ----------------------------------------------------------------------------------------------------------------------
# The report


def total_curve(run: dict, records: dict[str, dict]) -> list[tuple[float, dict]]:
    """The held-out losses of a run at its last resolution by the operations spent until then, on its core too."""
    last = f"grown-{SETTINGS[run['keys']['factor']].resolution}"
    core = run["keys"].get("core")
    core_flops = records[core]["keys"]["flops"] if core else 0.0
    return [(core_flops + line["flops"], line) for line in run["curve"] if line["phase"].startswith(last)]


def scores_by_flops(run: dict, records: dict[str, dict]) -> list[tuple[float, dict]]:
    """The scores and distances of each pipeline that a run left, by the operations spent until then, on its core too."""
    curve, core = total_curve(run, records), records.get(run["keys"]["core"])
    if not curve:  # a cascade
        (arm,) = (arm for arm in ARMS if arm.name == run["keys"]["arm"])
        return [(core["keys"]["flops"] / arm.core_share, scores) for scores in run["scores"].values()] if core else []
    ends = {line["phase"]: flops for flops, line in curve}
    return [(ends[phase], scores) for phase, scores in run["scores"].items() if phase in ends]


def flops_to_reach(curve: list[tuple[float, dict]], loss: float) -> float | None:
    """Where a curve first comes down to `loss`, between its points in a straight line."""
    for i, (flops, line) in enumerate(curve):
        here = line["val_loss"]
        if here <= loss:
            if i == 0:
                return flops
            flops_before, before = curve[i - 1][0], curve[i - 1][1]["val_loss"]
            return flops_before + (before - loss) / (before - here) * (flops - flops_before)
    return None


def collect(records: dict[str, dict], factor: int) -> dict[str, dict[int, dict]]:
    """By arm and seed the runs of a factor."""
    runs = {arm.name: find_runs(records, arm.name, factor) for arm in ARMS}
    return {arm: {run["keys"]["seed"]: run for run in seeds} for arm, seeds in runs.items() if seeds}


def best_scratch(by_arm: dict[str, dict[int, dict]]) -> dict[int, dict]:
    """By seed the runs from scratch that all others are held against: of those in the most seeds, the arm of the lowest loss."""
    arms = [runs for arm, runs in by_arm.items() if arm.startswith("scratch")]
    most = max(map(len, arms), default=0)

    def loss(runs: dict[int, dict]) -> float:
        return statistics.mean(run["curve"][-1]["val_loss"] for run in runs.values())

    return min((runs for runs in arms if len(runs) == most), key=loss, default={})


def make_tables(
    records: dict[str, dict], setting: Setting, seconds: dict[str, list[float]] | None
) -> dict[str, list[dict]]:
    """
    Two tables with one row for each arm: what it spent, and the loss that it came to; its losses by noise level, scores and
    distances. Time is there with the `seconds` of [`time_steps`]. A cascade has no losses: given the true low resolution,
    they would compare with nobody's.
    """
    tables: dict[str, list[dict]] = {"compute and loss": [], "noise levels and images": []}
    costs, by_arm = setting.plans(), collect(records, setting.factor)
    cost_ratio = costs["joint"].train_flops / costs["core"].train_flops
    reference = best_scratch(by_arm)
    scratch = {seed: total_curve(run, records)[-1] for seed, run in reference.items()}
    for arm, runs in by_arm.items():
        curves = {seed: curve for seed, run in runs.items() if (curve := total_curve(run, records))}
        ends = [curve[-1] for curve in curves.values()]
        first = next(iter(runs.values()))
        core = records.get(first["keys"].get("core"))
        head = {"growth": f"16 -> {setting.resolution}", "arm": arm, "seeds": len(runs)}
        row = {
            **head,
            "cost ratio": f"{cost_ratio:.1f}",
            "TFLOP": f"{ends[0][0] / 1e12:.0f}" if ends else "",
            "images at 16 px": sum(core["images"].values()) if core else 0,
            f"at {setting.resolution} px": sum(first["images"].values()),
        }
        for label, name in LOSSES.items():
            row[label] = mean_and_deviation([line[name] for _, line in ends], 4) if ends else ""
        pairs = [(curve, scratch[seed]) for seed, curve in curves.items() if seed in scratch]
        ratios = [curve[-1][1]["val_loss"] / end["val_loss"] for curve, (_, end) in pairs]
        row["of the best scratch's loss"] = mean_and_deviation(ratios, 2) if ratios else ""
        reached = [(flops_to_reach(curve, end["val_loss"]), flops) for curve, (flops, end) in pairs]
        row["reaches it at"] = ", ".join("never" if at is None else f"{at / flops:.0%}" for at, flops in reached)
        if seconds and scratch:
            taken, of_scratch = (
                training_seconds(run, records, seconds) for run in (first, next(iter(reference.values())))
            )
            row["time"] = "" if taken is None or of_scratch is None else f"{taken / of_scratch:.2f}"
        tables["compute and loss"].append(row)

        row = dict(head)
        for label, name in LEVELS.items():
            values = [line[name] for _, line in ends if name in line]
            row[f"loss at noise {label}"] = mean_and_deviation(values, 3) if values else ""
        scores = [last_scores(run) for run in runs.values()]
        for name in scores[0]:
            if name in ("color", "shape", "texture"):
                row[name] = mean_and_deviation([one[name] for one in scores], 2)
            elif name.startswith("swd_"):
                row[name.replace("swd_", "SWD ")] = mean_and_deviation([one[name] for one in scores], 0)
        tables["noise levels and images"].append(row)
    return tables


def draw_plot(records: dict[str, dict], path: Path) -> None:
    """Of the arms that have several seeds: held-out losses against compute, each run's, and at the end by noise level."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, ScalarFormatter

    factors = [factor for factor in SETTINGS if collect(records, factor)]
    shown = [arm.name for arm in ARMS if arm.num_seeds > 1 and arm.init != "cascade"]
    size = (22, 4.5 * len(factors) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(factors), 5, squeeze=False)
    lines = {}
    (low_noise, low_noise_name), *levels = LEVELS.items()
    panels = {**LOSSES, f"loss at noise {low_noise}": low_noise_name}
    for row, factor in zip(axes, factors):
        for i, arm in enumerate(shown):
            curves = [total_curve(run, records) for run in find_runs(records, arm, factor)]
            for curve in curves:
                for axis, name in zip(row, panels.values()):
                    x, y = zip(*[(flops / 1e12, line[name]) for flops, line in curve])
                    (lines[arm],) = axis.plot(x, y, color=f"C{i}", alpha=0.8)
            ends = [curve[-1][1] for curve in curves]
            means = {
                label: statistics.mean(line[name] for line in ends)
                for label, name in levels
                if ends and all(name in line for line in ends)
            }
            row[4].plot(list(means), list(means.values()), "o-", color=f"C{i}")
        for axis, label in zip(row, [*panels, "loss at the end, by noise level"]):
            axis.set_title(f"16 -> {SETTINGS[factor].resolution} px: {label}")
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(ScalarFormatter())
            axis.yaxis.set_minor_formatter(ScalarFormatter())
            axis.yaxis.set_minor_locator(LogLocator(subs=(1.5, 2, 3, 4, 5, 6, 8)))
            axis.set_ylabel("held-out error of the velocity")
            axis.set_xlabel("TFLOP")
        row[4].set_xlabel("noise level")
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines))
    figure.savefig(path, dpi=80)


def draw_scores(records: dict[str, dict], path: Path) -> None:
    """Of the arms that have several seeds: scores and distances against compute, a point for each pipeline that a run left."""
    from matplotlib.figure import Figure

    factors = [factor for factor in SETTINGS if collect(records, factor)]
    size = (18, 4 * len(factors) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(factors), 4, squeeze=False)
    lines = {}
    for row, factor in zip(axes, factors):
        size = SETTINGS[factor].resolution
        names = {"shape": "shapes right", "texture": "textures right", f"swd_{size}": f"SWD {size}"}
        names[f"swd_{size // 2}"] = f"SWD {size // 2}"
        for i, arm in enumerate(arm.name for arm in ARMS if arm.num_seeds > 1):
            for run in find_runs(records, arm, factor):
                for axis, name in zip(row, names):
                    points = [
                        (flops / 1e12, scores[name])
                        for flops, scores in scores_by_flops(run, records)
                        if name in scores
                    ]
                    if points:
                        (lines[arm],) = axis.plot(*zip(*points), "o-", color=f"C{i}", alpha=0.7)
        for axis, label in zip(row, names.values()):
            axis.set_title(f"16 -> {size} px: {label}")
            axis.set_xlabel("TFLOP")
            axis.set_xlim(left=0)
            axis.set_ylim(bottom=0)
            axis.set_visible(bool(axis.lines))  # no textures at 32 px
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=80)


def draw_grid(jobs: list[Job], args: argparse.Namespace, path: Path, num_captions: int = 6) -> None:
    """One row for each of the `jobs` that has been run: its last pipeline's images, for the same captions and noise."""
    rows, (work_dir, _) = {}, places(args)
    bfloat16 = args.mixed_precision == "bf16"
    captions, _ = held_out(str(jobs[0].data), SETTINGS[jobs[0].keys["factor"]].resolution, num_captions)
    for job in jobs:
        folder = work_dir / job.name
        if not (folder / "result.json").exists():
            continue
        if job.script == GROW:
            last = list(json.loads((folder / "result.json").read_text())["scores"])[-1]
            images = draw(GreedyGrowPipeline.from_pretrained(folder / last), captions, bfloat16)
        else:
            unet = UNet2DConditionModel.from_pretrained(folder / "super-resolution")
            core = GreedyGrowPipeline.from_pretrained(work_dir / job.core / "core")
            images = cascade.draw_cascade(unet, core, captions, bfloat16)
        rows[job.keys["arm"]] = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images))
    draw_samples(rows, captions, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    add_queue_arguments(parser)
    parser.add_argument("--factors", type=int, nargs="+", default=[8, 4, 2], choices=list(SETTINGS))
    parser.add_argument("--arms", nargs="+", default=[arm.name for arm in ARMS], help="Only these.")
    parser.add_argument("--time", action="store_true", help="Only time steps, with nothing else running.")
    parser.add_argument("--images", action="store_true", help="Only draw a grid of the first seed's images.")
    args = parser.parse_args()
    settings, seeds, scale = chosen_size(args)

    _, results = places(args)
    times = results / "grow_vs_scratch_time.json"
    if args.time:
        # That of the queue's runs, which is read as a process starts.
        if not ENVIRONMENT.items() <= os.environ.items():
            command = [sys.executable, "-m", "benchmarks.grow_vs_scratch", *sys.argv[1:]]
            os.execve(sys.executable, command, {**os.environ, **ENVIRONMENT})
        seconds = {factor: time_steps(settings[factor], args) for factor in args.factors}
        rows = [
            {
                "growth": f"16 -> {settings[factor].resolution}",
                "phase": name,
                "ms per image": spread([1000 * one for one in taken]),
            }
            for factor, phases in seconds.items()
            for name, taken in phases.items()
        ]
        print(markdown(rows))
        origin = {"machine": describe_machine(), "mixed_precision": args.mixed_precision}
        measured = {str(factor): {**origin, "seconds": phases} for factor, phases in seconds.items()}
        write_json(times, read_times(times) | measured)
        return

    jobs: dict[str, Job] = {}
    core_data = find_data(args, 128)
    factors = [min(args.factors)] if args.quick else args.factors
    for factor in factors:
        data = find_data(args, settings[factor].resolution)
        for seed in seeds:
            for arm in ARMS:
                if arm.name in args.arms:
                    jobs |= {job.name: job for job in make_jobs(settings[factor], arm, seed, data, core_data, scale)}
    if args.images:
        for factor in factors:
            growths = [
                job for job in jobs.values() if job.keys.get("factor") == factor and job.keys["seed"] == seeds[0]
            ]
            draw_grid(growths, args, results / f"grow_vs_scratch_images_{factor}.png")
        return
    records = run_queue(list(jobs.values()), args)
    measured = read_times(times)
    tables = {
        factor: make_tables(records, setting, measured.get(str(factor), {}).get("seconds"))
        for factor, setting in settings.items()
        if collect(records, factor)
    }
    print("\n\n".join(markdown(rows) for pair in tables.values() for rows in pair.values()) or markdown([]))
    write_json(results / "grow_vs_scratch.json", {"tables": tables})
    if tables:
        draw_plot(records, results / "grow_vs_scratch.png")
        draw_scores(records, results / "grow_vs_scratch_scores.png")


if __name__ == "__main__":
    main()
