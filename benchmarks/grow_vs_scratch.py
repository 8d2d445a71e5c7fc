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
from dataclasses import dataclass
from pathlib import Path

from benchmarks.queue_of_runs import RESULTS, Job, Setting, add_queue_arguments, run_queue, shapes_folder


# All at 16 px inside; each stage ends at single pixels.
SETTINGS = {
    2: Setting(resolution=32, block_out_channels="32,64", batch_size=16),
    4: Setting(resolution=64, block_out_channels="24,48,96", batch_size=16),
    8: Setting(resolution=128, block_out_channels="24,32,64,96", batch_size=8),
}
TOTAL_FLOPS = 72e12


@dataclass
class Arm:
    """How an arm spends its operations: a share on the core alone, and of the rest a share on the frozen core."""

    name: str
    init: str
    core_share: float
    frozen_share: float


ARMS = (
    Arm("scratch", "preserve", 0.0, 0.0),
    Arm("paper's growth", "random", 5 / 12, 0.25),
    Arm("ours, no detail phase", "preserve", 5 / 12, 0.0),
    Arm("ours, short detail phase", "preserve", 5 / 12, 0.25),
    Arm("ours, long detail phase", "preserve", 5 / 12, 0.75),
    Arm("ours, small core share, long detail phase", "preserve", 5 / 24, 0.75),
)


def make_jobs(setting: Setting, arm: Arm, seed: int, data: Path, core_data: Path, scale: float) -> list[Job]:
    """The run of one arm, growth factor and seed, and before it the core that it grows, which others share."""
    common = {
        **setting.core_arguments(),
        "seed": seed,
        "num_validation_pictures": 128,
        "checkpointing_steps": 200,
        "checkpoints_total_limit": 1,
    }
    costs = setting.plans(arm.init)
    core_steps = round(scale * TOTAL_FLOPS * arm.core_share / costs["core"].train_flops / 32)
    flops = scale * TOTAL_FLOPS * (1 - arm.core_share)
    frozen_steps = round(arm.frozen_share * flops / costs["detail"].train_flops / setting.batch_size)
    joint_steps = round((1 - arm.frozen_share) * flops / costs["joint"].train_flops / setting.batch_size)

    jobs = []
    if core_steps:
        core = Job(
            name=f"core-h{setting.hidden_size}-l{setting.num_layers}-{core_steps}-seed-{seed}",
            arguments={
                **common,
                "resolutions": [16, 128],
                "core_steps": core_steps,
                "detail_steps": [0],
                "joint_steps": [0],
                "validation_steps": max(core_steps // 4, 1),
            },
            keys={"arm": "core", "seed": seed, "flops": core_steps * 32 * costs["core"].train_flops},
            data=core_data,
        )
        jobs.append(core)
    words = arm.name.replace(",", "").replace(" ", "-")
    jobs.append(
        Job(
            name=f"x{setting.factor}-{words}-{frozen_steps}-{joint_steps}-seed-{seed}",
            arguments={
                **common,
                "init": arm.init,
                "detail_steps": [frozen_steps],
                "joint_steps": [joint_steps],
                "train_batch_size": [32, setting.batch_size],
                "validation_steps": max((frozen_steps + joint_steps) // 12, 1),
                **({} if core_steps else {"core_steps": 0, "core_lr_scale": 1.0}),
            },
            keys={"arm": arm.name, "seed": seed, "factor": setting.factor},
            core=core.name if core_steps else None,
            data=data,
        )
    )
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    add_queue_arguments(parser)
    parser.add_argument("--factors", type=int, nargs="+", default=[8, 4, 2], choices=list(SETTINGS))
    parser.add_argument("--arms", nargs="+", default=[arm.name for arm in ARMS], help="Only these.")
    args = parser.parse_args()
    if args.quick:
        args.seeds = args.seeds[:1]

    work_dir, num_pictures = Path(args.work_dir), 2000 if args.quick else 20000
    jobs: dict[str, Job] = {}
    for factor in args.factors:
        data, core_data = (shapes_folder(work_dir, size, num_pictures) for size in (SETTINGS[factor].resolution, 128))
        for seed in args.seeds:
            for arm in ARMS:
                if arm.name in args.arms:
                    new = make_jobs(SETTINGS[factor], arm, seed, data, core_data, 0.01 if args.quick else 1.0)
                    jobs |= {job.name: job for job in new}
    results = work_dir / "quick.json" if args.quick else RESULTS / "grow_vs_scratch.json"
    run_queue(list(jobs.values()), args, results)


if __name__ == "__main__":
    main()
