# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
What protects a small data set? Cores that train on 1,000 of somebody's images, and are measured on 1,000 others.

    python -m benchmarks.small_data --train_data_dir data/stickers --text_encoder FOLDER_OR_REPO --max_sequence_length 24
    python -m benchmarks.small_data --report --results_dir benchmarks/results/stickers
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset

from benchmarks.arms import SETTINGS, chosen_size
from benchmarks.queue_of_runs import (
    COMMON,
    CORE_LEVELS,
    Job,
    Setting,
    add_queue_arguments,
    locate_folders,
    read_records,
    run_queue,
)
from benchmarks.tables import Row, Section, describe_runs, render_report, report_command, write_reports


RESOLUTION, BATCH_SIZE = 32, 32
ARMS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "--horizontal_flip": {"horizontal_flip": True},
    "--random_crop 0.8": {"random_crop": 0.8},
    "--core_dropout 0.1": {"core_dropout": 0.1},
    "--adam_weight_decay 0.1": {"adam_weight_decay": 0.1},
    "flips and crops": {"horizontal_flip": True, "random_crop": 0.8},
    "flips, crops and dropout": {"horizontal_flip": True, "random_crop": 0.8, "core_dropout": 0.1},
}
NOTE = f"""
Cores of {RESOLUTION} px on patches of 4 px, {BATCH_SIZE} images per step. *Loss*: mean squared error of the velocity on 1,000
images of the same kind that are not trained on. *Lowest*: its lowest value and the step of it, which is where `--keep_best` ends. *Low band*: the
loss of what pooling by 8 leaves, at the same step and at the last. *Nearest*: the distance of samples to the nearest training
image, divided by that of held-out images: far below 1 for copies.
""".strip()


def split_data(args: argparse.Namespace) -> Path:
    """Write the two halves, drawn by lot, and return their folder."""
    count = 100 if args.quick else 1000
    folder = Path(args.work_dir) / f"small-data-{count}"
    if not (folder / "validation.parquet").exists():
        rows: Any = load_dataset("parquet", data_files={"train": str(Path(args.train_data_dir) / "train.parquet")})[
            "train"
        ]
        if len(rows) < 2 * count:
            raise ValueError(
                f"`train_data_dir={args.train_data_dir!r}` has {len(rows)} training images, fewer than {2 * count}."
            )
        order = np.random.default_rng(0).permutation(len(rows))
        folder.mkdir(parents=True, exist_ok=True)
        for name, places in (("train", order[:count]), ("validation", order[count : 2 * count])):
            part: Dataset = rows.select(places)
            part.to_parquet(folder / f"{name}.tmp")
            (folder / f"{name}.tmp").rename(folder / f"{name}.parquet")
    return folder


def make_job(setting: Setting, arm: str, seed: int, steps: int, data: Path) -> Job:
    """Return the run of one arm and seed."""
    words = ["small-data", *arm.replace(",", "").replace("--", "").split(), steps, "seed", seed]
    return Job(
        name="-".join(map(str, words)),
        arguments={
            **COMMON,
            **setting.core_arguments(),
            **CORE_LEVELS,
            "patch_size": 4,
            "resolutions": [RESOLUTION],
            "num_validation_images": 256,
            "core_steps": steps,
            "train_batch_size": [BATCH_SIZE],
            "learning_rate": [3e-3],
            "validation_steps": max(steps // 12, 1),
            "seed": seed,
            **ARMS[arm],
        },
        keys={"arm": arm, "seed": seed, "benchmark": "small_data"},
        data=data,
    )


def make_reports(args: argparse.Namespace) -> dict[Path, str]:
    """Return the report by the file that it belongs to."""
    _, results = locate_folders(args)
    records = read_records(results / "runs.json")
    rows: list[Row] = []
    runs = []
    for arm in ARMS:
        for run in records.values():
            if run["keys"] != {"arm": arm, "seed": run["keys"]["seed"], "benchmark": "small_data"}:
                continue
            runs.append(run)
            best, last = min(run["curve"], key=lambda line: line["val_loss"]), run["curve"][-1]
            rows.append(
                {
                    "arm": arm,
                    "seed": run["keys"]["seed"],
                    "lowest loss (step)": f"{best['val_loss']:.4f} ({best['step']})",
                    "last": f"{last['val_loss']:.4f}",
                    "low band, lowest / last": f"{best['val_loss_low']:.4f} / {last['val_loss_low']:.4f}",
                    "nearest": f"{nearest:.2f}" if (nearest := run["nearest_ratio"].get("core")) is not None else "",
                }
            )
    sections = [Section(rows, "", f"{describe_runs(runs)}." if runs else "")]
    title = "What protects a small data set?"
    return {results / "small_data.md": render_report(report_command("small_data", args), title, sections, NOTE)}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    add_queue_arguments(parser)
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args(argv)
    if not args.train_data_dir and not args.report:
        parser.error("--train_data_dir: name a folder with train.parquet.")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if not args.report:
        settings, seeds, _ = chosen_size(args)
        data = split_data(args)
        steps = 12 if args.quick else args.steps
        jobs = [make_job(settings[max(SETTINGS)], arm, seed, steps, data) for seed in seeds for arm in ARMS]
        run_queue(jobs, args)
    write_reports(make_reports(args))


if __name__ == "__main__":
    main()
