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
How few high-resolution pictures are enough? All captions at the core's resolution, a share of them at the high one.

    python -m benchmarks.few_high_res               # stops and goes on where it was
    python -m benchmarks.few_high_res --quick
    python -m benchmarks.few_high_res --report
"""

import argparse
from pathlib import Path

from benchmarks.grow_vs_scratch import SETTINGS, TOTAL_FLOPS
from benchmarks.queue_of_runs import Job, add_queue_arguments, core_job, growth_job, run_queue, shapes_folder
from benchmarks.tables import RESULTS, describe_machine, markdown, mean_and_deviation, write_json


SHARES = (1.0, 0.3, 0.1, 0.03, 0.01)
CORE_SHARE = 5 / 12
# Arm: share of the growth's operations on the frozen core; `None` for training from scratch.
ARMS = {"scratch": None, "ours, detail phase only": 1.0, "ours, long detail phase": 0.75}


def arm_name(arm: str, share: float) -> str:
    return arm if share == 1.0 else f"{arm}, {share:.0%} of the pictures"


def make_jobs(seed: int, share: float, data: Path, num_pictures: int, scale: float) -> list[Job]:
    setting, flops = SETTINGS[8], scale * TOTAL_FLOPS
    core = core_job(setting, seed, flops * CORE_SHARE, data)
    more = {} if share == 1.0 else {"num_high_res_pictures": round(share * num_pictures)}
    jobs = [core]
    for arm, frozen_share in ARMS.items():
        if frozen_share is None:
            jobs.append(growth_job(setting, arm_name(arm, share), seed, flops, 0.0, data, None, **more))
        else:
            growth_flops = flops * (1 - CORE_SHARE)
            jobs.append(
                growth_job(setting, arm_name(arm, share), seed, growth_flops, frozen_share, data, core, **more)
            )
    return jobs


def make_table(records: dict[str, dict]) -> list[dict]:
    rows = []
    for share in SHARES:
        for arm in ARMS:
            runs = [run for run in records.values() if run["keys"]["arm"] == arm_name(arm, share)]
            if not runs:
                continue
            ends = [run["curve"][-1] for run in runs]
            row = {
                "high-resolution pictures": f"{share:.0%}",
                "arm": arm,
                "seeds": len(runs),
                "loss": mean_and_deviation([line["val_loss"] for line in ends], 4),
                "low band": mean_and_deviation([line["val_loss_low"] for line in ends], 4),
                "high band": mean_and_deviation([line["val_loss_high"] for line in ends], 4),
            }
            scores = [run["scores"][list(run["seconds"])[-1]] for run in runs]
            for name in scores[0]:
                row[name.replace("swd_", "SWD ")] = mean_and_deviation([one[name] for one in scores], 2)
            rows.append(row)
    return rows


def draw_plot(records: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4))
    names = {"val_loss": "loss", "val_loss_low": "low band", "val_loss_high": "high band"}
    for axis, (name, label) in zip(axes, names.items()):
        for arm, marker in zip(ARMS, "os^"):
            points = [
                (100 * share, run["curve"][-1][name])
                for share in SHARES
                for run in records.values()
                if run["keys"]["arm"] == arm_name(arm, share)
            ]
            if points:
                axis.plot(*zip(*points), marker, label=arm, alpha=0.7)
        axis.set_xscale("log")
        axis.set_xlabel("% of the pictures at the high resolution")
        axis.set_title(f"16 -> 128 px: {label}")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    add_queue_arguments(parser)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, choices=SHARES)
    args = parser.parse_args()
    num_pictures, scale = (2000, 0.01) if args.quick else (20000, 1.0)
    seeds, shares = (args.seeds[:1], [0.1]) if args.quick else (args.seeds, args.shares)

    data = shapes_folder(Path(args.work_dir), 128, num_pictures)
    jobs = [job for seed in seeds for share in shares for job in make_jobs(seed, share, data, num_pictures, scale)]
    records = run_queue(list({job.name: job for job in jobs}.values()), args)
    rows = make_table(records)
    print(markdown(rows))
    if not args.quick:
        write_json(RESULTS / "few_high_res.json", {"machine": describe_machine(), "rows": rows})
        draw_plot(records, RESULTS / "few_high_res.png")


if __name__ == "__main__":
    main()
