# Copyright 2026 The diffusers-greedy-grow authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.


"""
Does a deeper core align better? Cores of one, two and four times the transformer's parameters, trained on the same
pictures and grown with the same encoder and decoder.

    python -m benchmarks.scale_core                 # stops and goes on where it was
    python -m benchmarks.scale_core --quick
    python -m benchmarks.scale_core --report
"""

import argparse
from dataclasses import replace
from pathlib import Path

from benchmarks.grow_vs_scratch import SETTINGS
from benchmarks.queue_of_runs import Job, add_queue_arguments, core_job, growth_job, run_queue, shapes_folder
from benchmarks.tables import RESULTS, describe_machine, markdown, mean_and_deviation, write_json


LAYERS = (4, 8, 16)
CORE_PICTURES, GROWTH_PICTURES = 36000, 12000


def arm_name(num_layers: int) -> str:
    return f"{num_layers} layers"


def make_jobs(num_layers: int, seed: int, data: Path, core_data: Path, scale: float) -> list[Job]:
    """The core is frozen while the stage trains, so that its alignment is what the pictures show."""
    setting = replace(SETTINGS[4], num_layers=num_layers)
    costs = setting.plans()
    core = core_job(setting, seed, scale * CORE_PICTURES * costs["core"].train_flops, core_data)
    flops = scale * GROWTH_PICTURES * costs["detail"].train_flops
    return [core, growth_job(setting, arm_name(num_layers), seed, flops, 1.0, data, core)]


def make_table(records: dict[str, dict]) -> list[dict]:
    rows = []
    for num_layers in LAYERS:
        runs = [run for run in records.values() if run["keys"]["arm"] == arm_name(num_layers)]
        if not runs:
            continue
        parts = replace(SETTINGS[4], num_layers=num_layers).plans()
        ends = [run["curve"][-1] for run in runs]
        scores = [run["scores"][list(run["seconds"])[-1]] for run in runs]
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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    panels = {"alignment": ("color", "shape", "size", "background"), "rendering": ("texture",)}
    for axis, (title, names) in zip(axes, panels.items()):
        for name in names:
            points = [
                (num_layers, run["scores"][list(run["seconds"])[-1]][name])
                for num_layers in LAYERS
                for run in records.values()
                if run["keys"]["arm"] == arm_name(num_layers)
            ]
            axis.plot(*zip(*points), "o", label=name, alpha=0.7)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("layers of the core")
        axis.set_title(title)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    add_queue_arguments(parser)
    args = parser.parse_args()
    num_pictures, scale = (2000, 0.01) if args.quick else (20000, 1.0)
    data, core_data = (shapes_folder(Path(args.work_dir), size, num_pictures) for size in (64, 128))
    seeds = args.seeds[:1] if args.quick else args.seeds
    jobs = [job for seed in seeds for n in LAYERS for job in make_jobs(n, seed, data, core_data, scale)]
    records = run_queue(jobs, args)
    rows = make_table(records)
    print(markdown(rows))
    if not args.quick:
        write_json(RESULTS / "scale_core.json", {"machine": describe_machine(), "rows": rows})
        draw_plot(records, RESULTS / "scale_core.png")


if __name__ == "__main__":
    main()
