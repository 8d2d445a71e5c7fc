# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
Training runs as a queue: each run is `accelerate launch training_examples/grow.py` in a process of its own, followed by an
evaluation of the pipelines that it leaves. What is finished is in the results file and not run again; what was stopped
goes on from its last checkpoint.
"""

import argparse
import fcntl
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Lock

import torch

from benchmarks.tables import RESULTS, describe_commit, describe_machine, write_json
from diffusers_greedy_grow import GrowableUNet2DConditionModel, ShallowUNet2DModel
from diffusers_greedy_grow.training.checkpoints import sorted_checkpoints
from diffusers_greedy_grow.training.data.sources import load_captioned_data
from diffusers_greedy_grow.training.plan import PhasePlan, plan_phase
from diffusers_greedy_grow.training.setup import has_native_bfloat16
from diffusers_greedy_grow.training.shapes.scenes import write_shapes


ROOT = Path(__file__).resolve().parents[1]
# glibc gives large tensors back to the system at once, and fetching them again costs a tenth of a step at 128 px.
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
    One run: a unique `name`, the `arguments` of the `script` (another than `grow.py` evaluates itself), the `data` it
    trains on, and the name of the job whose pipeline it starts from. `keys` say in the results what it is: arm, seed,
    growth factor.
    """

    name: str
    arguments: dict
    keys: dict
    data: Path
    core: str | None = None
    script: str = GROW


def add_queue_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work_dir", default="benchmarks/runs", help="Where the runs keep their files.")
    parser.add_argument("--workers", type=int, default=2, help="Runs at a time, one thread each on a CPU.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train_data_dir", help="Images to train on, instead of captioned shapes.")
    parser.add_argument("--quick", action="store_true", help="A small version that takes minutes; no evidence.")
    parser.add_argument(
        "--large",
        action="store_true",
        help="For a GPU: models twice as wide and more operations; apart from the others.",
    )
    parser.add_argument("--report", action="store_true", help="Only draw the table and plot of what has been run.")
    precision = "bf16" if torch.cuda.is_available() or has_native_bfloat16() else "no"
    parser.add_argument("--mixed_precision", default=precision, choices=["no", "bf16"])


def places(args: argparse.Namespace) -> tuple[Path, Path]:
    """The folders of runs and of results. Those of other data than shapes, of `--quick` or `--large`, mix with no others."""
    work_dir, results = Path(args.work_dir), RESULTS
    if args.large:
        work_dir, results = work_dir / "large", results / "large"
    if args.quick:
        return work_dir / "quick", work_dir / "quick"
    if args.train_data_dir:
        data = Path(args.train_data_dir).resolve()
        name = f"{data.stem}-{zlib.crc32(str(data).encode()):08x}"  # many a folder is called "train"
        return work_dir / name, results / name
    return work_dir, results


def find_data(args: argparse.Namespace, image_size: int) -> Path:
    """The folder that is trained on: captioned shapes, drawn once for all runs, or the user's own images."""
    if args.train_data_dir:
        return Path(args.train_data_dir)
    num_train = 2000 if args.quick else 20000
    folder = Path(args.work_dir) / f"shapes-{image_size}px-{num_train}"
    if not args.report and not (folder / "validation.parquet").exists():
        print(f"Drawing {num_train} captioned shapes into {folder}.", flush=True)
        write_shapes(folder, num_train=num_train, num_validation=256, image_size=image_size, texture_cells=16)
    return folder


def count_images(data: Path) -> int:
    """Of its training part."""
    return len(load_captioned_data(None, str(data), "image", "text")[0])


# ----------------------------------------------------------------------------------------------------------------------
# What runs cost


@dataclass(frozen=True)
class Setting:
    """The models of a comparison: one core, and the stage that is grown around it."""

    resolution: int
    block_out_channels: str
    cascade_channels: tuple[int, ...]  # of the cascade's super-resolution UNet, with as many parameters as the stage
    batch_size: int
    core_batch_size: int = 16
    core_resolution: int = 16
    hidden_size: int = 128
    num_layers: int = 6
    num_attention_heads: int = 2
    patch_size: int = 2

    def enlarge(self) -> "Setting":
        """Twice as wide, in batches of four times the size."""
        return replace(
            self,
            block_out_channels=",".join(str(2 * channels) for channels in self.channels),
            cascade_channels=tuple(2 * channels for channels in self.cascade_channels),
            batch_size=4 * self.batch_size,
            core_batch_size=4 * self.core_batch_size,
            hidden_size=2 * self.hidden_size,
            num_attention_heads=2 * self.num_attention_heads,
        )

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

    def grow(self, core: ShallowUNet2DModel, init: str) -> GrowableUNet2DConditionModel:
        return GrowableUNet2DConditionModel.from_core(
            core, self.resolution, block_out_channels=self.channels, init=init
        )

    def plans(self, init: str = "preserve") -> dict[str, PhasePlan]:
        """What an image costs in each phase."""
        return count_costs(self, init)


@functools.cache
def count_costs(setting: Setting, init: str) -> dict[str, PhasePlan]:
    with torch.device("meta"):
        core = setting.build_core()
        grown = setting.grow(core, init)
        plans = {"core": plan_phase("core", core, setting.core_resolution, 1, 1, 1, MAX_SEQUENCE_LENGTH)}
        for kind in ("detail", "joint"):
            (grown.freeze_core if kind == "detail" else grown.unfreeze_core)()
            plans[kind] = plan_phase(kind, grown, setting.resolution, 1, 1, 1, MAX_SEQUENCE_LENGTH)
    return plans


# ----------------------------------------------------------------------------------------------------------------------
# Runs of grow.py

COMMON = {"num_validation_images": 128, "checkpointing_steps": 200, "checkpoints_total_limit": 1}
NARROW = {"logit_mean": [1.0], "logit_std": [1.0], "loss_weighting": ["velocity"]}
WIDE = {"logit_mean": [1.0, -0.7], "logit_std": [1.0, 1.3], "loss_weighting": ["velocity", "clean"]}


def core_job(setting: Setting, seed: int, flops: float, data: Path) -> Job:
    """A core trained for about `flops` operations, which growths of any factor share."""
    cost = setting.plans()["core"].train_flops
    steps = round(flops / cost / setting.core_batch_size)
    return Job(
        name=f"core-h{setting.hidden_size}-l{setting.num_layers}-{steps}-seed-{seed}",
        arguments={
            **COMMON,
            **setting.core_arguments(),
            # With a stage that is not trained: the same for all settings, as the core is.
            "resolutions": [setting.core_resolution, 128],
            "block_out_channels": ["24,32,64,96"],
            "seed": seed,
            **NARROW,
            "core_steps": steps,
            "detail_steps": [0],
            "joint_steps": [0],
            "train_batch_size": [setting.core_batch_size],
            "validation_steps": max(steps // 4, 1),
        },
        keys={"arm": "core", "seed": seed, "flops": steps * setting.core_batch_size * cost},
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
    wide: bool = True,
    init: str = "preserve",
    **more,
) -> Job:
    """
    `flops` operations above the core's resolution, `frozen_share` of them with the core frozen; without a `core`,
    everything is trained from scratch. `wide` trains on lower noise levels too and by the clean image's error, else on the core's
    noise levels and by the velocity's error, as the core does.
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
            "resolutions": [setting.core_resolution, setting.resolution],
            "block_out_channels": [setting.block_out_channels],
            "seed": seed,
            "init": init,
            **(WIDE if wide else NARROW),
            "detail_steps": [frozen_steps],
            "joint_steps": [joint_steps],
            "train_batch_size": [setting.core_batch_size, setting.batch_size],
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


def read_records(path: Path) -> dict[str, dict]:
    return {record["name"]: record for record in json.loads(path.read_text())} if path.exists() else {}


def find_runs(records: dict[str, dict], arm: str, factor: int) -> list[dict]:
    """One for each seed. A `ValueError` tells of two, of which one is left over from other settings."""
    keys = {"arm": arm, "factor": factor}
    runs = [run for run in records.values() if keys.items() <= run["keys"].items()]
    if len({run["keys"]["seed"] for run in runs}) < len(runs):
        names = ", ".join(run["name"] for run in runs)
        raise ValueError(
            f"Several records of one seed: {names}. Remove those of settings that are no more from runs.json."
        )
    return runs


def last_scores(run: dict) -> dict[str, float]:
    """Of the last pipeline that a run left."""
    return run["scores"][list(run["seconds"])[-1]]


def run_queue(jobs: list[Job], args: argparse.Namespace) -> dict[str, dict]:
    """
    Runs those `jobs` that have not been run yet, or none with `--report`.

    Returns:
        All records by name, of other benchmarks too: `keys`, `arguments`, `machine`, `mixed_precision`, `commit`, `core_weights` (a
        digest: a core that was lost and trained again on another machine is another core), `images` by phase, `curve`
        (the lines of metrics with a held-out loss), `seconds` of training and `scores` of each pipeline that the run left.

    Raises:
        `ValueError`: if a job has been run with other arguments, which its record would pass off as these.
        `RuntimeError`: if a run fails, after the other ones, or if another queue is at work in the same folder.
    """
    work_dir, results = places(args)
    path = results / "runs.json"  # shared by all benchmarks, and with it the runs that they have in common
    if args.quick and not args.report:
        shutil.rmtree(work_dir, ignore_errors=True)
    records = read_records(path)
    if args.report:
        return records
    folders = {job.name: work_dir / job.name for job in jobs}
    definitions = {job.name: define(job) for job in jobs}
    for job in jobs:
        ran = records.get(job.name, {}).get("arguments", definitions[job.name])
        different = {name for name in ran | definitions[job.name] if ran.get(name) != definitions[job.name].get(name)}
        if different:
            raise ValueError(
                f"{job.name} has been run with other values of {sorted(different)}: to run it again, remove it from {path} "
                f"and remove {folders[job.name]}."
            )
    lock = Lock()

    # Cores first: the others wait for theirs. A core whose folder is lost is trained again if it is still needed.
    missing = [job for job in jobs if job.name not in records]
    needed = {job.core for job in missing if job.core and not (folders[job.core] / "result.json").exists()}
    queue = [job for job in jobs if job in missing or job.name in needed]
    queue.sort(key=lambda job: job.name not in needed)
    ready = {name: Event() for name in needed}

    def finish(job: Job) -> None:
        try:
            if job.core in ready:
                ready[job.core].wait()
                if not (folders[job.core] / "result.json").exists():
                    raise RuntimeError(f"{job.name} cannot be run: {job.core} failed.")
            record = run_job(job, definitions[job.name], folders, args.mixed_precision)
        finally:
            if job.name in ready:
                ready[job.name].set()
        with lock:
            # A core that is trained again, for want of its folder, leaves the record that older runs refer to.
            records.update({job.name: record, **read_records(path)})
            write_json(path, sorted(records.values(), key=lambda record: record["name"]))
            left = sum(job.name not in records for job in jobs)
            print(f"{time.strftime('%H:%M')} {job.name} is done, {left} to go.", flush=True)

    work_dir.mkdir(parents=True, exist_ok=True)
    with open(work_dir / ".queue", "w") as at_work, ThreadPoolExecutor(args.workers) as pool:
        try:
            fcntl.flock(at_work, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"Another queue runs jobs in {work_dir}, which may be the same: wait for it, or name another `--work_dir`."
            ) from None
        list(pool.map(finish, queue))
    return records


def define(job: Job) -> dict:
    """
    What a run's result depends on beside the code, the machine and the precision that is fast there, which its record names.
    """
    arguments = {**job.arguments, "data": job.data.name}
    return json.loads(json.dumps(arguments | ({"core": job.core} if job.core else {})))


def run_job(job: Job, definition: dict, folders: dict[str, Path], precision: str) -> dict:
    folder = folders[job.name]
    # A run that goes on is of the code, and the machine, that it began with.
    resumes, origin = bool(sorted_checkpoints(folder / "checkpoints")), folder / "made_by.json"
    if not (resumes and origin.exists()):
        write_json(origin, {"machine": describe_machine(), "mixed_precision": precision, "commit": describe_commit()})
    made_by = json.loads(origin.read_text())
    arguments = {
        **job.arguments,
        "train_data_dir": str(job.data),
        "output_dir": str(folder),
        "mixed_precision": precision,
    }
    if job.core is not None:
        arguments["core"] = str(folders[job.core] / "core")
    if job.script == GROW:
        arguments["num_scored_images"] = 0
        if torch.cuda.is_available():
            arguments["dataloader_num_workers"] = 1
        if precision == "bf16" and not torch.cuda.is_available():
            arguments["attention_backend"] = "_native_math"
        if resumes:
            arguments["resume_from_checkpoint"] = "latest"
        else:
            arguments["overwrite_output_dir"] = True
    flags = []
    for name, value in arguments.items():
        if isinstance(value, (list, tuple)):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags += [f"--{name}", str(value)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--dynamo_backend=no"]
    train = [*launcher, "--num_cpu_threads_per_process=1", job.script, *flags]
    evaluate = [sys.executable, "-m", "benchmarks.evaluate", str(folder), str(job.data)]

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a") as log:
        for command in [train, [*evaluate, f"--mixed_precision={precision}"]] if job.script == GROW else [train]:
            finished = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
            if finished.returncode:
                raise RuntimeError(f"{job.name} failed: see {folder / 'log.txt'}. Start again to go on.")
    core = folders[job.core or job.name] / "core"
    if core.exists():
        made_by["core_weights"] = digest_weights(core / "unet")
    result = json.loads((folder / "result.json").read_text())
    return {"name": job.name, "keys": job.keys, "arguments": definition, **made_by, **result}


def digest_weights(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
