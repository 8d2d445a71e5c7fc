# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
How few high-resolution images are enough? All captions at the core's resolution, a share of them at the high one.

    python -m benchmarks.few_high_res               # resumes what was stopped
    python -m benchmarks.few_high_res --quick
    python -m benchmarks.few_high_res --report
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.arms import SETTINGS, add_resolutions, chosen_size, find_arm
from benchmarks.arms import make_jobs as make_arm_jobs
from benchmarks.grow_vs_scratch import BANDS, LOSSES, detail_scores, summarize
from benchmarks.queue_of_runs import (
    Job,
    Setting,
    add_queue_arguments,
    count_images,
    locate_folders,
    prepare_data,
    read_records,
    run_queue,
    runs_of_arm,
)
from benchmarks.tables import (
    Record,
    Row,
    Section,
    describe_runs,
    mean_and_deviation,
    render_report,
    report_command,
    write_reports,
)


SHARES = (1.0, 0.3, 0.1, 0.03, 0.01)
# With all images, these are runs of grow_vs_scratch.
ARMS = ("scratch", "ours")
NOTE = "The columns are explained in [grow_vs_scratch.md](grow_vs_scratch.md)."


def arm_name(arm: str, share: float) -> str:
    return arm if share == 1.0 else f"{arm}, {share:.0%} of the images"


def make_jobs(
    setting: Setting,
    seed: int,
    share: float,
    data: Path,
    num_images: int,
    scale: float,
    core_data: Path | None = None,
    names: Sequence[str] = ARMS,
) -> list[Job]:
    """
    Return the runs of the arms of these `names` with a share of the `num_images`, and their cores, whose images are of
    `core_data`, by default `data`.
    """
    more: dict[str, Any] = {} if share == 1.0 else {"num_high_res_images": round(share * num_images)}
    arms = [replace(find_arm(name), name=arm_name(name, share)) for name in names]
    return [job for arm in arms for job in make_arm_jobs(setting, arm, seed, data, core_data or data, scale, **more)]


def find_runs(records: dict[str, Record], factor: int) -> dict[str, list[Record]]:
    """Return the runs at a growth factor, by arm and share."""
    names = [arm_name(arm, share) for share in SHARES for arm in ARMS]
    return {name: runs for name in names if (runs := runs_of_arm(records, name, factor))}


def make_tables(records: dict[str, Record], factor: int) -> tuple[list[Row], list[Row]]:
    """Return the first table of a growth factor, and one with everything else."""
    first: list[Row] = []
    details: list[Row] = []
    for name, runs in find_runs(records, factor).items():
        first.append(summarize(name, runs, records))
        ends = [run["curve"][-1] for run in runs]
        bands = {label: mean_and_deviation([line[band] for line in ends], 4) for label, band in BANDS.items()}
        details.append({"arm": name, "seeds": len(runs), **bands, **detail_scores(runs)})
    return first, details


def make_reports(args: argparse.Namespace) -> dict[Path, str]:
    """Return the report by the file that it belongs to."""
    _, results = locate_folders(args)
    records, sections = read_records(results / "runs.json"), []
    for factor, setting in SETTINGS.items():
        runs = [run for runs in find_runs(records, factor).values() for run in runs]
        # With all images, they are of grow_vs_scratch.
        if any("num_high_res_images" in run["arguments"] for run in runs):
            growth, (first, details) = f"16 -> {setting.resolution} px", make_tables(records, factor)
            sections += [Section(first, growth, f"{describe_runs(runs)}."), Section(details, f"{growth}: details")]
    title = "How few high-resolution images are enough? Full tables"
    return {results / "few_high_res.md": render_report(report_command("few_high_res", args), title, sections, NOTE)}


def draw_plot(records: dict[str, Record], path: Path) -> None:
    """Plot the final losses by the share of images, one point per run."""
    from matplotlib.figure import Figure

    shown = [factor for factor in SETTINGS if find_runs(records, factor)]
    figure = Figure(figsize=(14, 4 * len(shown)))
    axes = figure.subplots(len(shown), 3, squeeze=False)
    for row, factor in zip(axes, shown):
        for axis, (label, name) in zip(row, LOSSES.items()):
            for arm, marker in zip(ARMS, "os"):
                points = [
                    (100 * share, run["curve"][-1][name])
                    for share in SHARES
                    for run in runs_of_arm(records, arm_name(arm, share), factor)
                ]
                if points:
                    axis.plot(*zip(*points), marker, label=arm, alpha=0.7)
            axis.set_xscale("log")
            axis.set_xticks([100 * share for share in SHARES], [f"{share:.0%}" for share in SHARES])
            axis.set_xlabel("share of the images seen at the high resolution")
            axis.set_ylabel("held-out error of the velocity")
            axis.set_title(f"16 -> {SETTINGS[factor].resolution} px: {label}")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    add_queue_arguments(parser)
    add_resolutions(parser, [128])
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, choices=SHARES)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS, help="Which of the arms to run.")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    settings, seeds, scale = chosen_size(args)
    _, results = locate_folders(args)
    if not args.report:
        shares, core_data, jobs = [0.1] if args.quick else args.shares, prepare_data(args, 128), []
        for resolution in args.resolutions:
            data, setting = prepare_data(args, resolution), settings[resolution // 16]
            more = count_images(data), scale, core_data, args.arms
            jobs += [job for seed in seeds for share in shares for job in make_jobs(setting, seed, share, data, *more)]
        run_queue(list({job.name: job for job in jobs}.values()), args)
    write_reports(make_reports(args))
    draw_plot(read_records(results / "runs.json"), results / "few_high_res.png")


if __name__ == "__main__":
    main()
