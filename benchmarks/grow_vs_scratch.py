# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
Does growing pay? Growing against training from scratch, a cascade and plain models, at equal numbers of operations.

    python -m benchmarks.grow_vs_scratch                      # all resolutions and seeds; resumes what was stopped
    python -m benchmarks.grow_vs_scratch --resolutions 128    # 16 -> 128 px only
    python -m benchmarks.grow_vs_scratch --plain              # a plain transformer and a UNet instead, at 64 and 128 px
    python -m benchmarks.grow_vs_scratch --large --workers 9    # larger models, for a GPU
    python -m benchmarks.grow_vs_scratch --quick        # minutes, to see that it works
    python -m benchmarks.grow_vs_scratch --report       # report and plots from the records
    python -m benchmarks.grow_vs_scratch --time         # seconds per image of each phase, for the report
    python -m benchmarks.grow_vs_scratch --images       # a grid of the arms' images

On captioned images of one's own, such as the stickers of `training_examples/data/stickers.py`, with a pretrained text encoder:

    python -m benchmarks.grow_vs_scratch --train_data_dir data/stickers --text_encoder FOLDER_OR_REPO --max_sequence_length 24 \
        --resolutions 64 128 --scorer output/stickers_scorer
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor

from benchmarks import cascade, plain
from benchmarks.arms import ARMS, SETTINGS, add_resolutions, chosen_size, find_arm, make_jobs
from benchmarks.evaluate import draw_images, load_held_out
from benchmarks.queue_of_runs import (
    ENVIRONMENT,
    GROW,
    PLAIN,
    Job,
    Setting,
    add_queue_arguments,
    final_scores,
    locate_folders,
    prepare_data,
    read_records,
    run_queue,
    runs_of_arm,
)
from benchmarks.step_time import Steps, time_call
from benchmarks.tables import (
    Record,
    Row,
    Section,
    describe_machine,
    describe_runs,
    mean_and_deviation,
    read_json,
    render_report,
    report_command,
    spread,
    write_json,
    write_reports,
)
from diffusers_greedy_grow import GreedyGrowPipeline
from diffusers_greedy_grow.training.samples import draw_grid


Curve = list[tuple[float, Record]]  # operations spent, and the line of metrics with held-out losses there

CAPTION_TOKENS = 10  # in a caption of shapes
BANDS = {"low band": "val_loss_low", "high band": "val_loss_high"}
LOSSES = {"loss": "val_loss", **BANDS}
# By noise level. The first is measured separately, below the levels that most of the held-out loss is taken at.
LEVELS = {
    ".02-.3": "val_low_noise_loss",
    ".3-.6": "val_loss_sigma_0.3_0.6",
    ".6-.8": "val_loss_sigma_0.6_0.8",
    ".8-.9": "val_loss_sigma_0.8_0.9",
    ".9-1": "val_loss_sigma_0.9_1.0",
}
SCORES = {"shape": "shapes", "texture": "textures", "color": "colors", "size": "sizes", "kid": "KID"}
NOTE = """
*Loss*: mean squared error of the velocity on 128 held-out images, with the same noise in all runs, at the core's noise
levels shifted to the resolution. *Low-noise loss*: the same at noise .02-.3. *Alignment*: mean of the scores of shapes
(shapes, colors, sizes, ...) or, for stickers, the share of names that are retrieved, on 96 held-out captions. *SWD n*: sliced
Wasserstein distance to real images at the pyramid level of n px, in thousandths of the real images' standard deviation.
*Time*: that of training, the core's included, by steps measured alone (`--time`), else as the runs recorded it.

The *baseline* is the best arm without growth, of those with the most seeds: the same model from scratch, a plain transformer or
diffusers' UNet, each with the same operations and its best learning rate of those tried; each seed is compared with the baseline of
the same seed. *Compute to baseline's loss*: operations, the core's included, at which an arm reaches the baseline's final
loss, per seed. The *low band* is what pooling to 16 px leaves, the *high band* the rest. Shapes, textures, ..., style,
category: share of the captions drawn right. *KID*: kernel distance to real images, in thousandths. ± is the standard
deviation over seeds. A cascade has no comparable loss: its second model is given the true low resolution.
""".strip()


# ----------------------------------------------------------------------------------------------------------------------
# Time


def time_steps(setting: Setting, args: argparse.Namespace, repeats: int = 9) -> dict[str, list[float]]:
    """Return the seconds per image of a training step of each kind of phase, measured in turn."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32

    models: dict[str, torch.nn.Module] = {}
    for init in ("preserve", "random"):
        models[f"{init} detail"] = detail = setting.grow(setting.build_core(), init)
        models[f"{init} joint"] = setting.grow(setting.build_core(), init)
        detail.freeze_core()
    models["cascade"] = cascade.build_unet(setting.resolution, setting.cascade_channels, setting.text_hidden_size)
    for name in plain.MODELS:
        if setting.factor == max(SETTINGS) or plain.fits(name, setting.resolution):
            models[name] = plain.build_model(name, setting.resolution, setting.hidden_size, setting.text_hidden_size)
    sizes = {name: (model, setting.resolution, setting.batch_size) for name, model in models.items()}
    sizes = {"core": (setting.build_core(), setting.core_resolution, setting.core_batch_size), **sizes}
    text = CAPTION_TOKENS, setting.text_hidden_size
    steps = {
        name: Steps(*size, device, dtype, *text, "adamw" if name == "cascade" else "muon")
        for name, size in sizes.items()
    }
    if device.type == "cpu" and dtype == torch.bfloat16:  # as in the queue's runs
        for step in steps.values():
            step.model.set_attention_backend("_native_math")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):  # the first one warms up
        for name, step in steps.items():
            taken = time_call(step.train) / len(step.inputs[0])
            if repeat:
                seconds[name].append(taken)
    return seconds


def measure_time(settings: dict[int, Setting], args: argparse.Namespace, path: Path) -> None:
    # The queue's environment, which a process reads as it starts.
    if not ENVIRONMENT.items() <= os.environ.items():
        command = [sys.executable, "-m", "benchmarks.grow_vs_scratch", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **ENVIRONMENT})
    origin = {"machine": describe_machine(), "mixed_precision": args.mixed_precision}
    measured = {str(factor): {**origin, "seconds": time_steps(one, args)} for factor, one in settings.items()}
    write_json(path, (read_json(path) or {}) | measured)


def training_seconds(run: Record, records: dict[str, Record], seconds: dict[str, list[float]] | None) -> float | None:
    """
    Return the time that a run takes to train, its core's included: for its images by the `seconds` of [`time_steps`] if they are
    given, else as recorded. `None` if the run has phases that are not timed there.
    """
    arguments, core = run["arguments"], run["keys"].get("core")
    if not seconds:
        return sum(sum(part["seconds"].values()) for part in (run, records.get(core)) if part)
    if arguments.get("optimizer") == "adamw":
        return None
    total = sum(records[core]["images"].values()) * statistics.median(seconds["core"]) if core else 0.0
    for phase, images in run["images"].items():
        if phase == "cascade":
            kind = phase
        elif phase == "plain":
            kind = arguments["model"]
        else:
            is_detail = phase.endswith("-detail") or not arguments["joint_steps"][0]
            kind = f"{arguments['init']} {'detail' if is_detail else 'joint'}"
        if kind not in seconds:
            return None
        total += images * statistics.median(seconds[kind])
    return total


# ----------------------------------------------------------------------------------------------------------------------
# The report


def total_curve(run: Record, records: dict[str, Record]) -> Curve:
    """Return the held-out losses of a run at its last resolution, by the operations spent until then, its core's included."""
    last = f"grown-{SETTINGS[run['keys']['factor']].resolution}"
    core = run["keys"].get("core")
    core_flops = records[core]["keys"]["flops"] if core else 0.0
    return [(core_flops + line["flops"], line) for line in run["curve"] if line["phase"].startswith((last, "plain"))]


def scores_by_flops(run: Record, records: dict[str, Record]) -> list[tuple[float, dict[str, float]]]:
    """Return the scores of each pipeline that a run left, by the operations spent until then, its core's included."""
    curve, core = total_curve(run, records), records.get(run["keys"]["core"])
    if not curve:  # a cascade
        share = find_arm(run["keys"]["arm"]).core_share
        return [(core["keys"]["flops"] / share, scores) for scores in run["scores"].values()] if core else []
    ends = {line["phase"]: flops for flops, line in curve}
    return [(ends[phase], scores) for phase, scores in run["scores"].items() if phase in ends]


def flops_to_reach(curve: Curve, loss: float) -> float | None:
    """Return the operations at which a curve first reaches `loss`, interpolated between its points."""
    for i, (flops, line) in enumerate(curve):
        here = line["val_loss"]
        if here <= loss:
            if i == 0:
                return flops
            flops_before, before = curve[i - 1][0], curve[i - 1][1]["val_loss"]
            return flops_before + (before - loss) / (before - here) * (flops - flops_before)
    return None


def runs_by_arm(records: dict[str, Record], factor: int) -> dict[str, dict[int, Record]]:
    """Return the runs at a growth factor, by arm and seed."""
    runs = {arm.name: runs_of_arm(records, arm.name, factor) for arm in ARMS}
    return {arm: {run["keys"]["seed"]: run for run in seeds} for arm, seeds in runs.items() if seeds}


def find_baseline(by_arm: dict[str, dict[int, Record]]) -> dict[int, Record]:
    """Return, by seed, the runs that the others are compared with: of those that grow nothing, among the arms with the most
    seeds, the one with the lowest loss."""
    plain_names = {arm.name for arm in ARMS if arm.is_plain}
    longer = {arm.name for arm in ARMS if arm.equal_time}
    arms = [
        runs for arm, runs in by_arm.items() if (arm.startswith("scratch") or arm in plain_names) and arm not in longer
    ]
    most = max(map(len, arms), default=0)

    def loss(runs: dict[int, Record]) -> float:
        return statistics.mean(run["curve"][-1]["val_loss"] for run in runs.values())

    return min((runs for runs in arms if len(runs) == most), key=loss, default={})


def find_alignment(scores: dict[str, float]) -> float | None:
    """Return how well images fit their captions: the retrieval of stickers' names, or the mean of the scores of shapes."""
    shares = [value for name, value in scores.items() if not name.startswith("swd_")]
    return scores.get("retrieval", statistics.mean(shares) if shares else None)


def format_mean(values: Iterable[float | None], digits: int) -> str:
    """Format the mean and the deviation of the values that are there."""
    there = [value for value in values if value is not None]
    return mean_and_deviation(there, digits) if there else ""


def summarize(
    arm: str, runs: list[Record], records: dict[str, Record], seconds: dict[str, list[float]] | None = None
) -> Row:
    """Return the row of an arm in the first table, given its runs and the `seconds` of [`time_steps`], if they are known."""
    ends = [curve[-1][1] for run in runs if (curve := total_curve(run, records))]
    scores = [final_scores(run) for run in runs]
    resolution = SETTINGS[runs[0]["keys"]["factor"]].resolution
    finest = [format_mean((one.get(f"swd_{size}") for one in scores), 0) for size in (resolution, resolution // 2)]
    taken = [training_seconds(run, records, seconds) for run in runs]
    return {
        "arm": arm,
        "loss": format_mean((line["val_loss"] for line in ends), 4),
        "low-noise loss": format_mean((line.get("val_low_noise_loss") for line in ends), 3),
        "alignment": format_mean(map(find_alignment, scores), 2),
        f"SWD {resolution}; {resolution // 2}": "; ".join(finest),
        "time, minutes": format_mean((None if one is None else one / 60 for one in taken), 1),
    }


def detail_scores(runs: list[Record]) -> Row:
    """Return the means of the scores of an arm's runs that are not in the first table."""
    scores, resolution = [final_scores(run) for run in runs], SETTINGS[runs[0]["keys"]["factor"]].resolution
    shown = (f"swd_{resolution}", f"swd_{resolution // 2}")
    names = {
        name: SCORES.get(name, name.replace("swd_", "SWD ")) for one in scores for name in one if name not in shown
    }
    digits = {name: 0 if name.startswith("swd_") else 2 for name in names}
    return {label: format_mean((one.get(name) for one in scores), digits[name]) for name, label in names.items()}


def make_tables(
    records: dict[str, Record], setting: Setting, seconds: dict[str, list[float]] | None
) -> tuple[list[Row], list[Row]]:
    """
    Return two tables of one growth factor with one row per arm: the first one, and one with everything else. Times are those of
    the `seconds` of [`time_steps`] if they are given.
    """
    first_table: list[Row] = []
    details: list[Row] = []
    by_arm = runs_by_arm(records, setting.factor)
    baseline = find_baseline(by_arm)
    baseline_ends = {seed: total_curve(run, records)[-1] for seed, run in baseline.items()}
    for arm, runs in by_arm.items():
        first_table.append(summarize(arm, list(runs.values()), records, seconds))
        curves = {seed: curve for seed, run in runs.items() if (curve := total_curve(run, records))}
        ends = [curve[-1] for curve in curves.values()]
        first = next(iter(runs.values()))
        core = records.get(first["keys"].get("core"))
        row: Row = {
            "arm": arm,
            "seeds": len(runs),
            "TFLOP": f"{ends[0][0] / 1e12:.0f}" if ends else "",
            "images at 16 px": sum(core["images"].values()) if core else 0,
            f"images at {setting.resolution} px": sum(first["images"].values()),
        }
        if seconds and baseline:
            taken, of_baseline = (
                training_seconds(run, records, seconds) for run in (first, next(iter(baseline.values())))
            )
            row["time / baseline's"] = "" if taken is None or of_baseline is None else f"{taken / of_baseline:.2f}"
        pairs = [(curve, baseline_ends[seed]) for seed, curve in curves.items() if seed in baseline_ends]
        row["loss / baseline's"] = format_mean(
            (curve[-1][1]["val_loss"] / end["val_loss"] for curve, (_, end) in pairs), 2
        )
        reached = [(flops_to_reach(curve, end["val_loss"]), flops) for curve, (flops, end) in pairs]
        row["compute to baseline's loss"] = ", ".join(
            "never" if at is None else f"{at / flops:.0%}" for at, flops in reached
        )
        for label, name in BANDS.items():
            row[label] = format_mean((line[name] for _, line in ends), 4)
        for label, name in list(LEVELS.items())[1:]:
            row[f"noise {label}"] = format_mean((line.get(name) for _, line in ends), 3)
        details.append({**row, **detail_scores(list(runs.values()))})
    columns = dict.fromkeys(name for row in details for name in row)  # not every arm has all
    return first_table, [{name: row.get(name, "") for name in columns} for row in details]


def make_reports(args: argparse.Namespace) -> dict[Path, str]:
    """Return the report by the file that it belongs to."""
    _, results = locate_folders(args)
    records, times = read_records(results / "runs.json"), read_json(results / "grow_vs_scratch_time.json") or {}
    sections = []
    for factor, setting in SETTINGS.items():
        runs = [run for seeds in runs_by_arm(records, factor).values() for run in seeds.values()]
        if not runs:
            continue
        growth = f"16 -> {setting.resolution} px"
        first, details = make_tables(records, setting, times.get(str(factor), {}).get("seconds"))
        sections.append(Section(first, growth, f"{describe_runs(runs)}."))
        sections.append(Section(details, f"{growth}: details"))
    for factor, measured in times.items():
        rows = [
            {"phase": phase, "training time, ms per image": spread([1000 * one for one in taken])}
            for phase, taken in measured["seconds"].items()
        ]
        note = f"{measured['machine']}, mixed precision {measured['mixed_precision']}; median, smallest and largest."
        sections.append(Section(rows, f"16 -> {SETTINGS[int(factor)].resolution} px: time", note))
    title = "Does growing pay? Full tables"
    return {
        results / "grow_vs_scratch.md": render_report(report_command("grow_vs_scratch", args), title, sections, NOTE)
    }


def draw_losses(records: dict[str, Record], path: Path) -> None:
    """Plot held-out losses against compute, one line per run of the arms with several seeds, and final losses by noise
    level."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, ScalarFormatter

    factors = [factor for factor in SETTINGS if runs_by_arm(records, factor)]
    shown = [arm.name for arm in ARMS if arm.num_seeds > 1 and arm.init != "cascade"]
    size = (22, 4.5 * len(factors) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(factors), 5, squeeze=False)
    lines = {}
    (low_noise, low_noise_name), *levels = LEVELS.items()
    panels = {**LOSSES, f"loss at noise {low_noise}": low_noise_name}
    for row, factor in zip(axes, factors):
        for i, arm in enumerate(shown):
            curves = [total_curve(run, records) for run in runs_of_arm(records, arm, factor)]
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
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=len(lines))
    figure.savefig(path, dpi=80)


def draw_scores(records: dict[str, Record], path: Path) -> None:
    """Plot scores and distances against compute, one point per pipeline that a run of the arms with several seeds left."""
    from matplotlib.figure import Figure

    factors = [factor for factor in SETTINGS if runs_by_arm(records, factor)]
    figure = Figure(figsize=(18, 4 * len(factors) + 0.5), layout="constrained")
    axes = figure.subplots(len(factors), 4, squeeze=False)
    lines = {}
    for row, factor in zip(axes, factors):
        size = SETTINGS[factor].resolution
        names = {"shape": "shapes right", "texture": "textures right"}
        if any(
            "retrieval" in final_scores(run) for runs in runs_by_arm(records, factor).values() for run in runs.values()
        ):
            names = {"retrieval": "names retrieved", "kid": "KID"}
        names |= {f"swd_{one}": f"SWD {one}" for one in (size, size // 2)}
        for i, arm in enumerate(arm.name for arm in ARMS if arm.num_seeds > 1):
            for run in runs_of_arm(records, arm, factor):
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
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=80)


def draw_last_images(jobs: list[Job], args: argparse.Namespace, path: Path, num_captions: int = 6) -> None:
    """Draw one row per finished job: the images of its last pipeline, for the same captions and noise."""
    rows, (work_dir, _) = {}, locate_folders(args)
    bfloat16 = args.mixed_precision == "bf16"
    captions, _ = load_held_out(str(jobs[0].data), SETTINGS[jobs[0].keys["factor"]].resolution, num_captions)
    for job in jobs:
        folder = work_dir / job.name
        if not (folder / "result.json").exists():
            continue
        if job.script == GROW:
            last = list(json.loads((folder / "result.json").read_text(encoding="utf-8"))["scores"])[-1]
            images = draw_images(GreedyGrowPipeline.from_pretrained(folder / last), captions, bfloat16)
        elif job.script == PLAIN:
            images = draw_images(plain.load_trained(folder, job.arguments), captions, bfloat16)
        else:
            assert job.core is not None
            unet = UNet2DConditionModel.from_pretrained(folder / "super-resolution")
            core = GreedyGrowPipeline.from_pretrained(work_dir / job.core / "core")
            low = draw_images(core, captions, bfloat16)
            images = cascade.draw_cascade(unet, core, low, captions, bfloat16)
        rows[job.keys["arm"]] = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images))
    draw_grid(rows, captions, path)


# ----------------------------------------------------------------------------------------------------------------------
# The command


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    add_queue_arguments(parser)
    add_resolutions(parser, [128, 64, 32])
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=[arm.name for arm in ARMS],
        metavar="ARM",
        help="Run only these arms. By default, all but those of plain models.",
    )
    parser.add_argument(
        "--plain", action="store_true", help="Run all arms of plain models; those of equal time need `--time` first."
    )
    parser.add_argument("--time", action="store_true", help="Only time training steps; run nothing else meanwhile.")
    parser.add_argument("--images", action="store_true", help="Only draw a grid of the first seed's images.")
    return parser.parse_args(argv)


def list_jobs(args: argparse.Namespace, factors: list[int]) -> list[Job]:
    """Return the runs of the arms that the arguments ask for, and say which are left out."""
    settings, seeds, scale = chosen_size(args)
    times = read_json(locate_folders(args)[1] / "grow_vs_scratch_time.json") or {}
    names = args.arms or [arm.name for arm in ARMS if arm.is_plain == args.plain]
    jobs: dict[str, Job] = {}
    core_data = prepare_data(args, 128)
    for factor in factors:
        data, seconds = prepare_data(args, settings[factor].resolution), times.get(str(factor), {}).get("seconds", {})
        for seed in seeds:
            for arm in map(find_arm, names):
                own = make_jobs(settings[factor], arm, seed, data, core_data, scale, seconds)
                jobs |= {job.name: job for job in own}
    ran = {job.keys["arm"] for job in jobs.values()}
    if left_out := [name for name in names if find_arm(name).equal_time and name not in ran]:
        print(f"Left out: {left_out}. Measure the times of training steps first, with `--time`.", flush=True)
    return list(jobs.values())


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    settings, seeds, _ = chosen_size(args)
    _, results = locate_folders(args)
    factors = [resolution // 16 for resolution in args.resolutions]
    if args.quick:
        factors = [max(factors) if args.plain else min(factors)]
    if args.time:
        measure_time({factor: settings[factor] for factor in factors}, args, results / "grow_vs_scratch_time.json")
    elif not args.report:
        jobs = list_jobs(args, factors)
        if args.images:
            for factor in factors:
                growths = [job for job in jobs if job.keys.get("factor") == factor and job.keys["seed"] == seeds[0]]
                draw_last_images(growths, args, results / f"grow_vs_scratch_images_{factor}.png")
            return
        run_queue(jobs, args)

    write_reports(make_reports(args))
    records = read_records(results / "runs.json")
    if any(runs_by_arm(records, factor) for factor in SETTINGS):
        draw_losses(records, results / "grow_vs_scratch.png")
        draw_scores(records, results / "grow_vs_scratch_scores.png")


if __name__ == "__main__":
    main()
