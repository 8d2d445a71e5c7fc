# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
How few high-resolution images are enough? All captions at the core's resolution, a share of them at the high one.

    python -m benchmarks.few_high_res               # resumes what was stopped
    python -m benchmarks.few_high_res --quick
    python -m benchmarks.few_high_res --report
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.arms import chosen_size, find_arm
from benchmarks.arms import make_jobs as make_arm_jobs
from benchmarks.queue_of_runs import (
    Job,
    Setting,
    add_queue_arguments,
    count_images,
    final_scores,
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
ARMS = ("scratch", "ours, detail phase only")
NOTE = """
16 -> 128 px. Losses, shares and distances are explained in [grow_vs_scratch.md](grow_vs_scratch.md).
""".strip()


def arm_name(arm: str, share: float) -> str:
    return arm if share == 1.0 else f"{arm}, {share:.0%} of the images"


def make_jobs(setting: Setting, seed: int, share: float, data: Path, num_images: int, scale: float) -> list[Job]:
    more: dict[str, Any] = {} if share == 1.0 else {"num_high_res_images": round(share * num_images)}
    arms = [replace(find_arm(name), name=arm_name(name, share)) for name in ARMS]
    return [job for arm in arms for job in make_arm_jobs(setting, arm, seed, data, data, scale, **more)]


def make_tables(records: dict[str, Record]) -> tuple[list[Row], list[Row]]:
    """Return a table of losses, and one of scores and distances."""
    losses: list[Row] = []
    images: list[Row] = []
    for share in SHARES:
        for arm in ARMS:
            runs = runs_of_arm(records, arm_name(arm, share), 8)
            if not runs:
                continue
            ends = [run["curve"][-1] for run in runs]
            head = {"high-resolution images": f"{share:.0%}", "arm": arm}
            losses.append(
                {
                    **head,
                    "seeds": len(runs),
                    "loss": mean_and_deviation([line["val_loss"] for line in ends], 4),
                    "low band": mean_and_deviation([line["val_loss_low"] for line in ends], 4),
                    "high band": mean_and_deviation([line["val_loss_high"] for line in ends], 4),
                }
            )
            scores = [final_scores(run) for run in runs]
            names = {name: name.replace("swd_", "SWD ") for name in scores[0]}
            columns = {label: mean_and_deviation([one[name] for one in scores], 2) for name, label in names.items()}
            images.append({**head, **columns})
    return losses, images


def make_reports(args: argparse.Namespace) -> dict[Path, str]:
    """Return the report by the file that it belongs to."""
    _, results = locate_folders(args)
    records = read_records(results / "runs.json")
    runs = [run for share in SHARES for arm in ARMS for run in runs_of_arm(records, arm_name(arm, share), 8)]
    losses, images = make_tables(records)
    sections = [
        Section(losses, "Held-out loss", f"{describe_runs(runs)}."),
        Section(images, "Distances and scores", num_keys=2),
    ]
    title = "How few high-resolution images are enough? Full tables"
    return {results / "few_high_res.md": render_report(report_command("few_high_res", args), title, sections, NOTE)}


def draw_plot(records: dict[str, Record], path: Path) -> None:
    """Plot the final losses by the share of images, one point per run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4))
    axes = figure.subplots(1, 3)
    names = {"val_loss": "loss", "val_loss_low": "low band", "val_loss_high": "high band"}
    for axis, (name, label) in zip(axes, names.items()):
        for arm, marker in zip(ARMS, "os"):
            points = [
                (100 * share, run["curve"][-1][name])
                for share in SHARES
                for run in runs_of_arm(records, arm_name(arm, share), 8)
            ]
            if points:
                axis.plot(*zip(*points), marker, label=arm, alpha=0.7)
        axis.set_xscale("log")
        axis.set_xticks([100 * share for share in SHARES], [f"{share:.0%}" for share in SHARES])
        axis.set_xlabel("share of the images seen at the high resolution")
        axis.set_ylabel("held-out error of the velocity")
        axis.set_title(f"16 -> 128 px: {label}")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    add_queue_arguments(parser)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, choices=SHARES)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    settings, seeds, scale = chosen_size(args)
    _, results = locate_folders(args)
    if not args.report:
        data = prepare_data(args, 128)
        num_images = count_images(data)
        jobs = [
            job
            for seed in seeds
            for share in ([0.1] if args.quick else args.shares)
            for job in make_jobs(settings[8], seed, share, data, num_images, scale)
        ]
        run_queue(list({job.name: job for job in jobs}.values()), args)
    write_reports(make_reports(args))
    draw_plot(read_records(results / "runs.json"), results / "few_high_res.png")


if __name__ == "__main__":
    main()
