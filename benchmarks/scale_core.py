# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
Does a deeper core align better? Cores of one, two and four times the transformer's parameters, trained on the same
images and grown with the same encoder and decoder, 16 -> 128 px.

    python -m benchmarks.scale_core                 # stops and goes on where it was
    python -m benchmarks.scale_core --quick
    python -m benchmarks.scale_core --report
"""

import argparse
from dataclasses import replace
from pathlib import Path

from benchmarks.grow_vs_scratch import ARMS, SETTINGS, TOTAL_FLOPS, chosen_size
from benchmarks.queue_of_runs import (
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
from benchmarks.tables import markdown, mean_and_deviation, write_json


# The core is frozen while the stage trains, so that its alignment is what the images show. With the usual number of
# layers, these are the runs of grow_vs_scratch, and as many images with the others.
(ARM,) = (arm for arm in ARMS if arm.name == "ours, detail phase only")
LAYERS = (3, 6, 12)


def arm_name(num_layers: int) -> str:
    return ARM.name if num_layers == SETTINGS[8].num_layers else f"{ARM.name}, {num_layers} layers"


def make_jobs(usual: Setting, num_layers: int, seed: int, data: Path, scale: float) -> list[Job]:
    setting = replace(usual, num_layers=num_layers)
    core_flops, growth_flops = (
        scale * TOTAL_FLOPS[8] * share * setting.plans()[phase].train_flops / usual.plans()[phase].train_flops
        for phase, share in (("core", ARM.core_share), ("detail", 1 - ARM.core_share))
    )
    core = core_job(setting, seed, core_flops, data)
    growth = growth_job(setting, arm_name(num_layers), seed, growth_flops, 1.0, data, core, ARM.wide)
    return [core, growth]


def make_table(records: dict[str, dict], usual: Setting) -> list[dict]:
    rows = []
    for num_layers in LAYERS:
        runs = find_runs(records, arm_name(num_layers), 8)
        if not runs:
            continue
        parts = replace(usual, num_layers=num_layers).plans()
        ends = [run["curve"][-1] for run in runs]
        scores = [last_scores(run) for run in runs]
        rows.append(
            {
                "core": f"{num_layers} layers, {parts['core'].parameters / 1e6:.2f} M",
                "stage": f"{(parts['joint'].parameters - parts['core'].parameters) / 1e6:.2f} M",
                "seeds": len(runs),
                "low band": mean_and_deviation([line["val_loss_low"] for line in ends], 4),
                "high band": mean_and_deviation([line["val_loss_high"] for line in ends], 4),
                **{
                    name.replace("swd_", "SWD "): mean_and_deviation([one[name] for one in scores], 2)
                    for name in scores[0]
                },
            }
        )
    return rows


def draw_plot(records: dict[str, dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4))
    axes = figure.subplots(1, 2)
    panels = {"alignment": ("shape", "size"), "rendering": ("texture",)}  # colors and backgrounds are all right
    for axis, (title, names) in zip(axes, panels.items()):
        for name in names:
            points = [
                (num_layers, last_scores(run)[name])
                for num_layers in LAYERS
                for run in find_runs(records, arm_name(num_layers), 8)
                if name in last_scores(run)  # captions of anything but shapes have no such scores
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    add_queue_arguments(parser)
    args = parser.parse_args()
    data, (_, results) = find_data(args, 128), places(args)
    settings, seeds, scale = chosen_size(args)
    jobs = [job for seed in seeds for n in LAYERS for job in make_jobs(settings[8], n, seed, data, scale)]
    records = run_queue(jobs, args)
    rows = make_table(records, settings[8])
    print(markdown(rows))
    write_json(results / "scale_core.json", {"rows": rows})
    draw_plot(records, results / "scale_core.png")


if __name__ == "__main__":
    main()
