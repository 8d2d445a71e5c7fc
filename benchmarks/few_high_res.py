# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
How few high-resolution images are enough? All captions at the core's resolution, a share of them at the high one.

    python -m benchmarks.few_high_res               # stops and goes on where it was
    python -m benchmarks.few_high_res --quick
    python -m benchmarks.few_high_res --report
"""

import argparse
from dataclasses import replace
from pathlib import Path

from benchmarks import grow_vs_scratch
from benchmarks.queue_of_runs import (
    Job,
    Setting,
    add_queue_arguments,
    count_images,
    find_data,
    find_runs,
    last_scores,
    places,
    run_queue,
)
from benchmarks.tables import markdown, mean_and_deviation, write_json


SHARES = (1.0, 0.3, 0.1, 0.03, 0.01)
# With all images, these are the runs of grow_vs_scratch.
ARMS = {arm.name: arm for arm in grow_vs_scratch.ARMS if arm.name in ("scratch", "ours, detail phase only")}


def arm_name(arm: str, share: float) -> str:
    return arm if share == 1.0 else f"{arm}, {share:.0%} of the images"


def make_jobs(setting: Setting, seed: int, share: float, data: Path, num_images: int, scale: float) -> list[Job]:
    more = {} if share == 1.0 else {"num_high_res_images": round(share * num_images)}
    arms = [replace(arm, name=arm_name(name, share)) for name, arm in ARMS.items()]
    return [job for arm in arms for job in grow_vs_scratch.make_jobs(setting, arm, seed, data, data, scale, **more)]


def make_table(records: dict[str, dict]) -> list[dict]:
    rows = []
    for share in SHARES:
        for arm in ARMS:
            runs = find_runs(records, arm_name(arm, share), 8)
            if not runs:
                continue
            ends = [run["curve"][-1] for run in runs]
            row = {
                "high-resolution images": f"{share:.0%}",
                "arm": arm,
                "seeds": len(runs),
                "loss": mean_and_deviation([line["val_loss"] for line in ends], 4),
                "low band": mean_and_deviation([line["val_loss_low"] for line in ends], 4),
                "high band": mean_and_deviation([line["val_loss_high"] for line in ends], 4),
            }
            scores = [last_scores(run) for run in runs]
            for name in scores[0]:
                row[name.replace("swd_", "SWD ")] = mean_and_deviation([one[name] for one in scores], 2)
            rows.append(row)
    return rows


def draw_plot(records: dict[str, dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4))
    axes = figure.subplots(1, 3)
    names = {"val_loss": "loss", "val_loss_low": "low band", "val_loss_high": "high band"}
    for axis, (name, label) in zip(axes, names.items()):
        for arm, marker in zip(ARMS, "os"):
            points = [
                (100 * share, run["curve"][-1][name])
                for share in SHARES
                for run in find_runs(records, arm_name(arm, share), 8)
            ]
            if points:
                axis.plot(*zip(*points), marker, label=arm, alpha=0.7)
        axis.set_xscale("log")
        axis.set_xticks([100 * share for share in SHARES], [f"{share:.0%}" for share in SHARES])
        axis.set_xlabel("images seen at the high resolution")
        axis.set_ylabel("held-out error of the velocity")
        axis.set_title(f"16 -> 128 px: {label}")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    add_queue_arguments(parser)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, choices=SHARES)
    args = parser.parse_args()
    settings, seeds, scale = grow_vs_scratch.chosen_size(args)
    shares = [0.1] if args.quick else args.shares

    data = find_data(args, 128)
    num_images = 0 if args.report else count_images(data)
    jobs = [
        job
        for seed in seeds
        for share in shares
        for job in make_jobs(settings[8], seed, share, data, num_images, scale)
    ]
    records = run_queue(list({job.name: job for job in jobs}.values()), args)
    rows, (_, results) = make_table(records), places(args)
    print(markdown(rows))
    write_json(results / "few_high_res.json", {"rows": rows})
    draw_plot(records, results / "few_high_res.png")


if __name__ == "__main__":
    main()
