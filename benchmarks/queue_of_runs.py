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
Training runs as a queue: each run is `accelerate launch training_examples/grow.py` in a process of its own, followed by an
evaluation of the pipelines that it leaves. What is finished is in the results file and not run again; what was stopped
goes on from its last checkpoint.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock

import torch

from benchmarks.tables import RESULTS, write_json
from diffusers_greedy_grow import GrowableUNet2DConditionModel, ShallowUNet2DModel
from diffusers_greedy_grow.training import PhasePlan, plan_phase
from diffusers_greedy_grow.training.shapes import write_shapes


ROOT = Path(__file__).resolve().parents[1]
# glibc gives large tensors back to the system at once, and fetching them anew costs a tenth of a step at 128 px.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}
TEXT_HIDDEN_SIZE, MAX_SEQUENCE_LENGTH = 128, 16


GROW = "training_examples/grow.py"


@dataclass
class Job:
    """
    One run: a unique `name`, the `arguments` of the `script` (another than `grow.py` evaluates itself), and the name of the job whose pipeline it starts from.
    `keys` say in the results what it is: arm, seed, growth factor.
    """

    name: str
    arguments: dict
    keys: dict
    core: str | None = None
    script: str = GROW
    data: Path = field(default=Path())


def add_queue_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work_dir", default="benchmarks/runs", help="Where the runs keep their files.")
    parser.add_argument("--workers", type=int, default=2, help="Runs at a time, one thread each on a CPU.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train_data_dir", help="Pictures to train on, in place of captioned shapes.")
    parser.add_argument("--quick", action="store_true", help="A small version that takes minutes; no evidence.")
    parser.add_argument("--report", action="store_true", help="Only draw the table and plot of what has been run.")
    precision = "bf16" if torch.cuda.is_available() or torch.cpu._is_amx_tile_supported() else "no"
    parser.add_argument("--mixed_precision", default=precision)


# ----------------------------------------------------------------------------------------------------------------------
# What runs cost


@dataclass
class Setting:
    """The models of a comparison: one core, and the stage that is grown around it."""

    resolution: int
    block_out_channels: str
    batch_size: int
    core_resolution: int = 16
    hidden_size: int = 128
    num_layers: int = 6
    num_attention_heads: int = 2
    patch_size: int = 2

    @property
    def factor(self) -> int:
        return self.resolution // self.core_resolution

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(int(channels) for channels in self.block_out_channels.split(","))

    def core_arguments(self) -> dict:
        names = ("hidden_size", "num_layers", "num_attention_heads", "patch_size")
        return {
            **{name: getattr(self, name) for name in names},
            "text_hidden_size": TEXT_HIDDEN_SIZE,
            "max_sequence_length": MAX_SEQUENCE_LENGTH,
            "resolutions": [self.core_resolution, self.resolution],
            "block_out_channels": [self.block_out_channels],
        }

    def build_core(self) -> ShallowUNet2DModel:
        return ShallowUNet2DModel(
            sample_size=self.core_resolution,
            patch_size=self.patch_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_attention_heads=self.num_attention_heads,
            cross_attention_dim=TEXT_HIDDEN_SIZE,
        )

    def plans(self, init: str = "preserve") -> dict[str, PhasePlan]:
        """What a picture costs in each phase."""
        with torch.device("meta"):
            core = self.build_core()
            grown = GrowableUNet2DConditionModel.from_core(
                core, self.resolution, block_out_channels=self.channels, init=init
            )
            plans = {"core": plan_phase("core", core, self.core_resolution, 1, 1, 1, MAX_SEQUENCE_LENGTH)}
            for kind in ("detail", "joint"):
                (grown.freeze_core if kind == "detail" else grown.unfreeze_core)()
                plans[kind] = plan_phase(kind, grown, self.resolution, 1, 1, 1, MAX_SEQUENCE_LENGTH)
        return plans


# ----------------------------------------------------------------------------------------------------------------------
# Runs of grow.py

COMMON = {"num_validation_pictures": 128, "checkpointing_steps": 200, "checkpoints_total_limit": 1}
CORE_BATCH_SIZE = 32


def core_job(setting: Setting, seed: int, flops: float, data: Path) -> Job:
    """A core trained for about `flops` operations, which growths of any factor share."""
    cost = setting.plans()["core"].train_flops
    steps = round(flops / cost / CORE_BATCH_SIZE)
    return Job(
        name=f"core-h{setting.hidden_size}-l{setting.num_layers}-{steps}-seed-{seed}",
        arguments={
            **COMMON,
            **setting.core_arguments(),
            "resolutions": [setting.core_resolution, 128],
            "seed": seed,
            "core_steps": steps,
            "detail_steps": [0],
            "joint_steps": [0],
            "validation_steps": max(steps // 4, 1),
        },
        keys={"arm": "core", "seed": seed, "flops": steps * CORE_BATCH_SIZE * cost},
        data=data,
    )


def growth_job(
    setting: Setting,
    arm: str,
    seed: int,
    flops: float,
    frozen_share: float,
    data: Path,
    core: Job | None,
    init: str = "preserve",
    **more,
) -> Job:
    """
    `flops` operations above the core's resolution, `frozen_share` of them with the core frozen; without a `core`,
    everything is trained from scratch.
    """
    costs = setting.plans(init)
    frozen_steps = round(frozen_share * flops / costs["detail"].train_flops / setting.batch_size)
    joint_steps = round((1 - frozen_share) * flops / costs["joint"].train_flops / setting.batch_size)
    words = [f"x{setting.factor}", arm.replace(",", "").replace(" ", "-"), frozen_steps, joint_steps, "seed", seed]
    return Job(
        name="-".join(map(str, words)),
        arguments={
            **COMMON,
            **setting.core_arguments(),
            "seed": seed,
            "init": init,
            "detail_steps": [frozen_steps],
            "joint_steps": [joint_steps],
            "train_batch_size": [CORE_BATCH_SIZE, setting.batch_size],
            "validation_steps": max((frozen_steps + joint_steps) // 12, 1),
            **({"core_steps": 0, "core_lr_scale": 1.0} if core is None else {}),
            **more,
        },
        keys={"arm": arm, "seed": seed, "factor": setting.factor, "core": core.name if core else None},
        core=core.name if core else None,
        data=data,
    )


# ----------------------------------------------------------------------------------------------------------------------
# The queue


def shapes_folder(work_dir: Path, image_size: int, num_train: int = 20000) -> Path:
    """Captioned shapes, drawn once for all runs."""
    folder = work_dir / f"shapes-{image_size}px-{num_train}"
    if not (folder / "validation.parquet").exists():
        print(f"Drawing {num_train} captioned shapes into {folder}.", flush=True)
        write_shapes(folder, num_train=num_train, num_validation=256, image_size=image_size, texture_cells=16)
    return folder


def records_path(args: argparse.Namespace) -> Path:
    """What has been run; all benchmarks share it, and with it the runs that they have in common."""
    return Path(args.work_dir) / "quick.json" if args.quick else RESULTS / "runs.json"


def read_records(args: argparse.Namespace) -> dict[str, dict]:
    path = records_path(args)
    return {record["name"]: record for record in json.loads(path.read_text())} if path.exists() else {}


def run_queue(jobs: list[Job], args: argparse.Namespace) -> dict[str, dict]:
    """
    Runs what has not been run yet, unless only the report is wanted.

    Returns:
        Of those `jobs` that have been run, the records by name: `keys`, `pictures` by phase, `curve` (the lines of metrics with a held-out loss), `seconds` of training and
        `scores` of each pipeline that the run left.
    """
    work_dir = Path(args.work_dir)
    wanted = {job.name for job in jobs}
    records = read_records(args)
    if args.report:
        return {name: record for name, record in records.items() if name in wanted}
    folders = {job.name: work_dir / job.name for job in jobs}
    lock = Lock()

    # Cores first: the others wait for theirs. A core whose folder is lost is trained again if it is still needed.
    missing = [job for job in jobs if job.name not in records]
    needed = {job.core for job in missing if job.core and not (folders[job.core] / "result.json").exists()}
    queue = [job for job in jobs if job in missing or job.name in needed]
    queue.sort(key=lambda job: job.name not in needed)
    ready = {name: Event() for name in needed}

    def finish(job: Job) -> None:
        if job.core in ready:
            ready[job.core].wait()
        record = run_job(job, folders, args)
        if job.name in ready:
            ready[job.name].set()
        with lock:
            records.update({**read_records(args), job.name: record})
            write_json(records_path(args), sorted(records.values(), key=lambda record: record["name"]))
            left = len(wanted - set(records))
            print(f"{time.strftime('%H:%M')} {job.name} is done, {left} to go.", flush=True)

    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(finish, queue))
    return {name: record for name, record in records.items() if name in wanted}


def run_job(job: Job, folders: dict[str, Path], args: argparse.Namespace) -> dict:
    folder = folders[job.name]
    arguments = {
        **job.arguments,
        "train_data_dir": str(args.train_data_dir or job.data),
        "output_dir": str(folder),
        "mixed_precision": args.mixed_precision,
    }
    if job.core is not None:
        arguments["core"] = str(folders[job.core] / "core")
    if job.script == GROW:
        arguments["num_scored_pictures"] = 0
        if args.mixed_precision == "bf16" and not torch.cuda.is_available():
            arguments["attention_backend"] = "_native_math"
        if list((folder / "checkpoints").glob("*")):
            arguments["resume_from_checkpoint"] = "latest"
        else:
            arguments["overwrite_output_dir"] = True
    flags = []
    for name, value in arguments.items():
        if isinstance(value, (list, tuple)):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags += [f"--{name}", str(value)]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes=1",
        "--num_cpu_threads_per_process=1",
    ]
    evaluate = [sys.executable, "-m", "benchmarks.evaluate", str(folder), arguments["train_data_dir"]]
    evaluate.append(f"--mixed_precision={args.mixed_precision}")

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a") as log:
        train = [*launch, "--dynamo_backend=no", job.script, *flags]
        for command in [train, evaluate] if job.script == GROW else [train]:
            finished = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
            if finished.returncode:
                raise RuntimeError(f"{job.name} failed: see {folder / 'log.txt'}. Start again to go on.")
    return {"name": job.name, "keys": job.keys, **json.loads((folder / "result.json").read_text())}
