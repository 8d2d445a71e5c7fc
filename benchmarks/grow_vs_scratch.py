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
Does growing pay? Growing against training from scratch and against a cascade, at equal numbers of operations.

    python -m benchmarks.grow_vs_scratch                # all factors and seeds; stops and goes on where it was
    python -m benchmarks.grow_vs_scratch --factors 8    # 16 -> 128 px only
    python -m benchmarks.grow_vs_scratch --quick        # minutes, to see that it works
    python -m benchmarks.grow_vs_scratch --report       # the table and plot again, from results/
"""

import argparse
from pathlib import Path

from benchmarks.queue_of_runs import RESULTS, Job, Setting, add_queue_arguments, run_queue, shapes_folder


# All at 16 px inside; each stage ends at single pixels.
SETTINGS = {
    2: Setting(resolution=32, block_out_channels="32,64", batch_size=16),
    4: Setting(resolution=64, block_out_channels="24,48,96", batch_size=16),
    8: Setting(resolution=128, block_out_channels="24,32,64,96", batch_size=8),
}
TOTAL_FLOPS, CORE_FLOPS = 72e12, 30e12
DETAIL_SHARES = {"ours, no detail phase": 0.0, "ours, short detail phase": 0.25, "ours, long detail phase": 0.75}
PAPER_FROZEN_SHARE = 0.25


def make_jobs(setting: Setting, seed: int, data: Path, scale: float, only: list[str] | None) -> list[Job]:
    """The runs of one growth factor and seed; their cores are shared with the other factors."""
    common = {
        **setting.core_arguments(),
        "seed": seed,
        "num_validation_pictures": 128,
        "checkpointing_steps": 200,
        "checkpoints_total_limit": 1,
    }
    name, factor = f"seed-{seed}", setting.factor
    plans = {init: setting.plans(init) for init in ("preserve", "random")}

    core_steps = round(scale * CORE_FLOPS / plans["preserve"]["core"].train_flops / 32)
    core = Job(
        name=f"core-h{setting.hidden_size}-l{setting.num_layers}-{core_steps}-{name}",
        arguments={
            **common,
            "resolutions": [16, 128],
            "core_steps": core_steps,
            "detail_steps": [0],
            "joint_steps": [0],
            "validation_steps": max(core_steps // 4, 1),
        },
        keys={"arm": "core", "seed": seed, "flops": core_steps * 32 * plans["preserve"]["core"].train_flops},
        data=data.parent / data.name.replace(f"{setting.resolution}px", "128px"),
    )

    def job(arm: str, init: str, flops: float, detail_share: float, **more) -> Job:
        costs = plans[init]
        detail_steps = round(detail_share * flops / costs["detail"].train_flops / setting.batch_size)
        joint_steps = round((1 - detail_share) * flops / costs["joint"].train_flops / setting.batch_size)
        words = arm.replace(",", "").replace(" ", "-")
        return Job(
            name=f"x{factor}-{words}-{detail_steps}-{joint_steps}-{name}",
            arguments={
                **common,
                "init": init,
                "detail_steps": [detail_steps],
                "joint_steps": [joint_steps],
                "train_batch_size": [32, setting.batch_size],
                "validation_steps": max((detail_steps + joint_steps) // 12, 1),
                **more,
            },
            keys={"arm": arm, "seed": seed, "factor": factor},
            core=None if "core_steps" in more else core.name,
            data=data,
        )

    flops = scale * (TOTAL_FLOPS - CORE_FLOPS)
    jobs = [core, job("scratch", "preserve", scale * TOTAL_FLOPS, 0.0, core_steps=0, core_lr_scale=1.0)]
    jobs.append(job("paper's growth", "random", flops, PAPER_FROZEN_SHARE))
    jobs += [job(arm, "preserve", flops, share) for arm, share in DETAIL_SHARES.items()]
    return [run for run in jobs if only is None or run.keys["arm"] in [*only, "core"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    add_queue_arguments(parser)
    parser.add_argument("--factors", type=int, nargs="+", default=[8, 4, 2], choices=list(SETTINGS))
    parser.add_argument("--arms", nargs="+", help="Only these.")
    args = parser.parse_args()
    if args.quick:
        args.seeds = args.seeds[:1]

    work_dir = Path(args.work_dir)
    if not args.train_data_dir:
        for resolution in {128, *(SETTINGS[factor].resolution for factor in args.factors)}:
            shapes_folder(work_dir, resolution, 2000 if args.quick else 20000)
    jobs: dict[str, Job] = {}
    for factor in args.factors:
        for seed in args.seeds:
            data = work_dir / f"shapes-{SETTINGS[factor].resolution}px-{2000 if args.quick else 20000}"
            for job in make_jobs(SETTINGS[factor], seed, data, 0.01 if args.quick else 1.0, args.arms):
                jobs.setdefault(job.name, job)
    results = work_dir / "quick.json" if args.quick else RESULTS / "grow_vs_scratch.json"
    run_queue(list(jobs.values()), args, results)


if __name__ == "__main__":
    main()
