# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
Growing around models of others: a UNet with the layers of DeepFloyd IF that predicts noise, and the transformer of PRXPixel,
both trained at 16 px by a plain loop, then grown to 64 px around the frozen core. Against our own core of equal size, grown
alike, and against cascades on the same two cores.

    python -m benchmarks.foreign_cores               # resumes what was stopped
    python -m benchmarks.foreign_cores --quick
    python -m benchmarks.foreign_cores --report
"""

import argparse
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.arms import REFERENCE, SETTINGS, TOTAL_FLOPS, chosen_size, find_arm
from benchmarks.evaluate import draw_images, load_held_out
from benchmarks.foreign_core import draw_original, load_original
from benchmarks.queue_of_runs import (
    CASCADE,
    COMMON,
    FOREIGN,
    STAGE_LEVELS,
    Job,
    Setting,
    add_queue_arguments,
    core_job,
    final_scores,
    locate_folders,
    prepare_data,
    read_records,
    run_queue,
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
from diffusers_greedy_grow import GreedyGrowPipeline
from diffusers_greedy_grow.training.samples import draw_grid


FACTOR = 4
NAMES = {"own": "our core", "if": "UNet that predicts noise (as DeepFloyd IF)", "prx": "PRX (as PRXPixel)"}
CORE_STEPS, CORE_BATCH_SIZE, STAGE_STEPS = 1500, 16, 800
NOTE = f"""
Captioned shapes, 16 to 64 px. The foreign cores have trained for {CORE_STEPS:,} steps of {CORE_BATCH_SIZE} images with AdamW, ours for
1,043 with Muon, and all have about 2.4 M parameters. *Grown*: {STAGE_STEPS:,} steps of 16 images around the frozen core. *Cascade*: as
many steps of a super-resolution UNet with as many parameters as the stage; guidance acts in the core only. *Core*: the core's own images, drawn by
its own pipeline of diffusers and enlarged for the scorer. Textures are finer than the core's pixels; guessing has .17. *Loss*: mean squared error
of the velocity on 128 held-out images. *Time*: that of the stage's training, as the runs recorded it.
""".strip()


def make_jobs(setting: Setting, family: str, seed: int, data: Path, core_data: Path, share: float = 1.0) -> list[Job]:
    """Return the runs of a core, of the model grown from it, and of the cascade on it."""
    steps = max(round(share * STAGE_STEPS), 1)
    if family == "own":  # that of grow_vs_scratch
        core = core_job(setting, seed, share * TOTAL_FLOPS[FACTOR] * find_arm(REFERENCE).core_share, core_data)
    else:
        core_steps = max(round(share * CORE_STEPS), 1)
        arguments: dict[str, Any] = {
            "family": family,
            "steps": core_steps,
            "batch_size": CORE_BATCH_SIZE,
            "seed": seed,
        }
        keys = {"benchmark": "foreign_cores", "core": family, "arm": "core", "seed": seed}
        core = Job(f"foreign-{family}-{core_steps}-seed-{seed}", arguments, keys, core_data, script=FOREIGN)
    keys = {"benchmark": "foreign_cores", "core": family, "seed": seed}
    own = setting.core_arguments() if family == "own" else {}
    grown = Job(
        name=f"foreign-{family}-grown-{steps}-seed-{seed}",
        arguments={
            **COMMON,
            **own,
            "resolutions": [setting.core_resolution, setting.resolution],
            "block_out_channels": [setting.block_out_channels],
            "seed": seed,
            **STAGE_LEVELS,
            "detail_steps": [steps],
            "joint_steps": [0],
            "train_batch_size": [setting.core_batch_size, setting.batch_size],
            "validation_steps": max(steps // 4, 1),
        },
        keys={**keys, "arm": "grown"},
        data=data,
        core=core.name,
    )
    cascade = Job(
        name=f"foreign-{family}-cascade-{steps}-seed-{seed}",
        arguments={
            "resolution": setting.resolution,
            "block_out_channels": setting.cascade_channels,
            "seed": seed,
            "steps": steps,
            "batch_size": setting.batch_size,
        },
        keys={**keys, "arm": "cascade"},
        data=data,
        core=core.name,
        script=CASCADE,
    )
    return [core, grown, cascade]


def find_runs(records: dict[str, Record], family: str, arm: str) -> list[Record]:
    """Return the runs of an arm, by seed."""
    keys = {"benchmark": "foreign_cores", "core": family, "arm": arm}
    runs = [run for run in records.values() if keys.items() <= run["keys"].items()]
    return sorted(runs, key=lambda run: run["keys"]["seed"])


def make_rows(records: dict[str, Record]) -> list[Row]:
    """Return the table: for each core its own images, those of the grown model, and those of the cascade."""
    rows: list[Row] = []
    for family, name in NAMES.items():
        for arm in ("core", "grown", "cascade"):
            runs = find_runs(records, family, arm)
            if not runs:
                continue
            scores = [final_scores(run) for run in runs]

            def mean(column: str, scores: list[dict[str, float]] = scores) -> str:
                return mean_and_deviation([one[column] for one in scores], 2) if column in scores[0] else ""

            losses = [run["curve"][-1]["val_loss"] for run in runs if run["curve"]]
            minutes = [sum(run["seconds"].values()) / 60 for run in runs]
            rows.append(
                {
                    "core": name,
                    "images of": arm,
                    "seeds": len(runs),
                    "shapes": mean("shape"),
                    "colors": mean("color"),
                    "textures": mean("texture"),
                    "loss": mean_and_deviation(losses, 4) if losses else "",
                    "SWD 64": mean_and_deviation([one["swd_64"] for one in scores], 0)
                    if "swd_64" in scores[0]
                    else "",
                    "minutes": mean_and_deviation(minutes, 1),
                }
            )
    return rows


def make_reports(args: argparse.Namespace) -> dict[Path, str]:
    """Return the report by the file that it belongs to."""
    _, results = locate_folders(args)
    records = read_records(results / "runs.json")
    runs = [run for family in NAMES for arm in ("core", "grown", "cascade") for run in find_runs(records, family, arm)]
    sections = [Section(make_rows(records), "", f"{describe_runs(runs)}." if runs else "", num_keys=2)]
    title = "Growing around models of others: full table"
    return {results / "foreign_cores.md": render_report(report_command("foreign_cores", args), title, sections, NOTE)}


def draw_examples(args: argparse.Namespace, setting: Setting, data: Path, count: int = 8) -> None:
    """Draw held-out captions with each core and the model grown from it, of the first seed, into a grid."""
    work_dir, results = locate_folders(args)
    records = read_records(results / "runs.json")
    captions, real = load_held_out(str(data), setting.resolution, count)
    rows: dict[str, list[Image.Image]] = {}
    for family in NAMES:
        for run in find_runs(records, family, "grown")[:1]:
            if family != "own":
                original = load_original(work_dir / run["arguments"]["core"] / "core")
                rows[f"{family}, core"] = draw_original(original, captions)
            grown = GreedyGrowPipeline.from_pretrained(work_dir / run["name"] / f"grown-{setting.resolution}")
            images = draw_images(grown, captions, bfloat16=False)
            rows[f"{family}, grown"] = grown.image_processor.numpy_to_pil(grown.image_processor.pt_to_numpy(images))
    draw_grid(rows, captions, results / "foreign_cores.png")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    add_queue_arguments(parser)
    parser.add_argument("--cores", nargs="+", default=[*NAMES], choices=NAMES)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if not args.report:
        settings, seeds, _ = chosen_size(args)
        setting, data = settings[FACTOR], prepare_data(args, SETTINGS[FACTOR].resolution)
        core_data, share = prepare_data(args, 128), 0.01 if args.quick else 1.0
        jobs = [
            job
            for seed in seeds
            for family in args.cores
            for job in make_jobs(setting, family, seed, data, core_data, share)
        ]
        run_queue(jobs, args)
        draw_examples(args, setting, data)
    write_reports(make_reports(args))


if __name__ == "__main__":
    main()
