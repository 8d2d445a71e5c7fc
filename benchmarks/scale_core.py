# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
Does a deeper core align better? Cores with one, two and four times as many transformer layers, trained on the same images
and grown with the same encoder and decoder, 16 -> 128 px.

    python -m benchmarks.scale_core                 # resumes what was stopped
    python -m benchmarks.scale_core --quick
    python -m benchmarks.scale_core --report
"""

import argparse
from dataclasses import replace
from pathlib import Path

from benchmarks.arms import SETTINGS, TOTAL_FLOPS, chosen_size, find_arm
from benchmarks.queue_of_runs import (
    Job,
    Setting,
    add_queue_arguments,
    core_job,
    final_scores,
    growth_job,
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


# The core stays frozen while the stage trains, so that the images show the core's alignment. With the usual number of
# layers these are runs of grow_vs_scratch; the others see as many images.
ARM = find_arm("ours")
LAYERS = (3, 6, 12)
NOTE = """
16 -> 128 px, the core frozen while the stage trains. Losses, shares and distances are explained in
[grow_vs_scratch.md](grow_vs_scratch.md).
""".strip()


def arm_name(num_layers: int) -> str:
    return ARM.name if num_layers == SETTINGS[8].num_layers else f"{ARM.name}, {num_layers} layers"


def make_jobs(usual: Setting, num_layers: int, seed: int, data: Path, scale: float) -> list[Job]:
    setting = replace(usual, num_layers=num_layers)
    core_flops, growth_flops = (
        scale * TOTAL_FLOPS[8] * share * setting.plans()[phase].flops / usual.plans()[phase].flops
        for phase, share in (("core", ARM.core_share), ("detail", 1 - ARM.core_share))
    )
    core = core_job(setting, seed, core_flops, data)
    growth = growth_job(setting, arm_name(num_layers), seed, growth_flops, 1.0, data, core)
    return [core, growth]


def make_tables(records: dict[str, Record], usual: Setting) -> tuple[list[Row], list[Row]]:
    """Return a table of sizes and losses, and one of scores and distances."""
    losses: list[Row] = []
    images: list[Row] = []
    for num_layers in LAYERS:
        runs = runs_of_arm(records, arm_name(num_layers), 8)
        if not runs:
            continue
        plans = replace(usual, num_layers=num_layers).plans()
        ends = [run["curve"][-1] for run in runs]
        losses.append(
            {
                "core": f"{num_layers} layers",
                "core, M parameters": f"{plans['core'].parameters / 1e6:.2f}",
                "stage, M parameters": f"{(plans['joint'].parameters - plans['core'].parameters) / 1e6:.2f}",
                "seeds": len(runs),
                "low band": mean_and_deviation([line["val_loss_low"] for line in ends], 4),
                "high band": mean_and_deviation([line["val_loss_high"] for line in ends], 4),
            }
        )
        scores = [final_scores(run) for run in runs]
        names = {name: name.replace("swd_", "SWD ") for name in scores[0]}
        columns = {label: mean_and_deviation([one[name] for one in scores], 2) for name, label in names.items()}
        images.append({"core": f"{num_layers} layers", **columns})
    return losses, images


def make_reports(args: argparse.Namespace) -> dict[Path, str]:
    """Return the report by the file that it belongs to."""
    _, results = locate_folders(args)
    records = read_records(results / "runs.json")
    runs = [run for num_layers in LAYERS for run in runs_of_arm(records, arm_name(num_layers), 8)]
    losses, images = make_tables(records, chosen_size(args)[0][8])
    sections = [Section(losses, "Held-out loss", f"{describe_runs(runs)}."), Section(images, "Distances and scores")]
    title = "What does a deeper core bring? Full tables"
    return {results / "scale_core.md": render_report(report_command("scale_core", args), title, sections, NOTE)}


def draw_plot(records: dict[str, Record], path: Path) -> None:
    """Plot what the images show of alignment and rendering by the number of layers, one point per run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4))
    axes = figure.subplots(1, 2)
    panels = {
        "alignment": ("shape", "size"),
        "rendering": ("texture",),
    }  # colors and backgrounds are right in all images
    for axis, (title, names) in zip(axes, panels.items()):
        for name in names:
            points = [
                (num_layers, final_scores(run)[name])
                for num_layers in LAYERS
                for run in runs_of_arm(records, arm_name(num_layers), 8)
                if name in final_scores(run)  # only captions of shapes are scored
            ]
            if points:
                axis.plot(*zip(*points), "o", label=name, alpha=0.7)
        axis.set_xscale("log")
        axis.set_xticks(LAYERS, map(str, LAYERS))
        axis.minorticks_off()
        axis.set_xlabel("layers of the core")
        axis.set_ylabel("share of 96 captions drawn right")
        axis.set_title(title)
        if axis.lines:
            axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    add_queue_arguments(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    _, results = locate_folders(args)
    if not args.report:
        data = prepare_data(args, 128)
        settings, seeds, scale = chosen_size(args)
        run_queue(
            [job for seed in seeds for n in LAYERS for job in make_jobs(settings[8], n, seed, data, scale)], args
        )
    write_reports(make_reports(args))
    draw_plot(read_records(results / "runs.json"), results / "scale_core.png")


if __name__ == "__main__":
    main()
