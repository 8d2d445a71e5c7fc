# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
A queue of training runs. Each run is `accelerate launch training_examples/grow.py` in a process of its own, followed by an
evaluation of the pipelines that it leaves. Finished runs have a record in `runs.json` and do not run again; a run that was
stopped resumes from its last checkpoint.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Lock
from typing import Any

import torch

from benchmarks.evaluate import check_captions, load_held_out
from benchmarks.tables import (
    ROOT,
    Record,
    add_report_arguments,
    describe_commit,
    describe_machine,
    own_results,
    read_json,
    write_json,
)
from diffusers_greedy_grow import GrowableUNet2DConditionModel, ShallowUNet2DModel
from diffusers_greedy_grow.training.checkpoints import sorted_checkpoints
from diffusers_greedy_grow.training.data.sources import load_captioned_data
from diffusers_greedy_grow.training.plan import PhasePlan, plan_phase
from diffusers_greedy_grow.training.setup import has_native_bfloat16
from diffusers_greedy_grow.training.shapes.scenes import write_shapes


# By default glibc returns large tensors to the system at once; allocating them again costs a tenth of a step at 128 px.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}
TEXT_HIDDEN_SIZE, MAX_SEQUENCE_LENGTH = 128, 16
GROW, PLAIN, CASCADE = "training_examples/grow.py", "benchmarks/plain.py", "benchmarks/cascade.py"
FOREIGN = "benchmarks/foreign_core.py"


@dataclass
class Job:
    """
    One run.

    Attributes:
        name: Unique among all benchmarks.
        arguments: Arguments of the `script`.
        keys: Arm, seed and growth factor, which the reports look for in the records.
        data: The folder of images to train on.
        core: The name of the job whose core it grows.
        script: The script to run; any other than `grow.py` evaluates its images itself.
    """

    name: str
    arguments: dict[str, Any]
    keys: dict[str, Any]
    data: Path
    core: str | None = None
    script: str = GROW


def add_queue_arguments(parser: argparse.ArgumentParser) -> None:
    add_report_arguments(parser)
    parser.add_argument("--work_dir", default="benchmarks/runs", help="The folder in which the runs keep their files.")
    parser.add_argument(
        "--workers", type=int, default=2, help="The number of runs at a time; on a CPU each has one thread."
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train_data_dir", help="Captioned images to train on, instead of captioned shapes.")
    parser.add_argument(
        "--text_encoder",
        default="small",
        help="Folder or Hub id of a text encoder, which stays frozen. By default, a small one trains with the core.",
    )
    parser.add_argument(
        "--max_sequence_length", type=int, default=MAX_SEQUENCE_LENGTH, help="Number of text tokens that are read."
    )
    parser.add_argument(
        "--scorer",
        help="Folder of a trained benchmarks/stickers_scorer, which scores the images instead of the scorer of shapes.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="A small version that takes minutes; its results mean nothing."
    )
    parser.add_argument(
        "--large",
        action="store_true",
        help="For a GPU: models twice as wide and more operations, with records of their own.",
    )
    precision = "bf16" if torch.cuda.is_available() or has_native_bfloat16() else "no"
    parser.add_argument("--mixed_precision", default=precision, choices=["no", "bf16"])


def locate_folders(args: argparse.Namespace) -> tuple[Path, Path]:
    """Return the folders of runs and of results. Data of one's own, `--quick` and `--large` have folders of their own."""
    results = own_results(args)
    work_dir = Path(args.work_dir) / results.relative_to(args.results_dir)
    if args.large:
        work_dir, results = work_dir / "large", results / "large"
    return (work_dir / "quick", work_dir / "quick") if args.quick else (work_dir, results)


def prepare_data(args: argparse.Namespace, image_size: int) -> Path:
    """Return the folder to train on: the user's own images, or captioned shapes, which are drawn once for all runs."""
    if args.train_data_dir:
        return Path(args.train_data_dir)
    num_train = 2000 if args.quick else 20000
    folder = Path(args.work_dir) / f"shapes-{image_size}px-{num_train}"
    if not (folder / "validation.parquet").exists():
        print(f"Drawing {num_train} captioned shapes into {folder}.", flush=True)
        write_shapes(folder, num_train=num_train, num_validation=256, image_size=image_size, texture_cells=16)
    return folder


def count_images(data: Path) -> int:
    """Return the number of training images."""
    return len(load_captioned_data(None, str(data), "image", "text")[0])


# ----------------------------------------------------------------------------------------------------------------------
# What runs cost


@dataclass(frozen=True)
class Setting:
    """The models of a comparison: one core, and the stage that is grown around it."""

    resolution: int
    cascade_channels: tuple[int, ...]  # the super-resolution UNet then has as many parameters as the stage
    block_out_channels: str = "64,96"
    batch_size: int = 16
    core_batch_size: int = 16
    core_resolution: int = 16
    hidden_size: int = 128
    num_layers: int = 6
    num_attention_heads: int = 2
    patch_size: int = 2
    text_encoder: str = "small"
    text_hidden_size: int = TEXT_HIDDEN_SIZE
    max_sequence_length: int = MAX_SEQUENCE_LENGTH

    def enlarge(self) -> "Setting":
        """Return models twice as wide, which train in batches four times as large."""
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

    def core_arguments(self) -> dict[str, Any]:
        names = ("hidden_size", "num_layers", "num_attention_heads", "patch_size")
        return {**{name: getattr(self, name) for name in names}, **self.text_arguments()}

    def text_arguments(self) -> dict[str, Any]:
        arguments = {"text_hidden_size": self.text_hidden_size, "max_sequence_length": self.max_sequence_length}
        return arguments if self.text_encoder == "small" else {**arguments, "text_encoder": self.text_encoder}

    def build_core(self) -> ShallowUNet2DModel:
        return ShallowUNet2DModel(
            sample_size=self.core_resolution,
            patch_size=self.patch_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_attention_heads=self.num_attention_heads,
            cross_attention_dim=self.text_hidden_size,
        )

    def grow(self, core: ShallowUNet2DModel, init: str) -> GrowableUNet2DConditionModel:
        return GrowableUNet2DConditionModel.from_core(
            core, self.resolution, block_out_channels=self.channels, init=init
        )

    def plans(self, init: str = "preserve", optimizer: str = "muon") -> dict[str, PhasePlan]:
        """Return the plan of one step in each phase."""
        return plan_steps(self, init, optimizer)


@functools.cache
def plan_steps(setting: Setting, init: str, optimizer: str) -> dict[str, PhasePlan]:
    shared: dict[str, Any] = {
        "steps": 1,
        "batches_per_step": 1,
        "num_tokens": setting.max_sequence_length,
        "optimizer": optimizer,
        "checkpointing": (),  # no memory is asked for
    }
    with torch.device("meta"):
        core = setting.build_core()
        grown = setting.grow(core, init)
        plans = {
            "core": plan_phase("core", core, setting.core_resolution, batch_size=setting.core_batch_size, **shared)
        }
        for kind in ("detail", "joint"):
            (grown.freeze_core if kind == "detail" else grown.unfreeze_core)()
            plans[kind] = plan_phase(kind, grown, setting.resolution, batch_size=setting.batch_size, **shared)
    return plans


# ----------------------------------------------------------------------------------------------------------------------
# Runs of grow.py

COMMON = {"num_validation_images": 128, "checkpointing_steps": 200, "checkpoints_total_limit": 1}
# Noise levels and loss weighting of the core, and of the core and the stage.
CORE_LEVELS: dict[str, list[Any]] = {"logit_mean": [1.0], "logit_std": [1.0], "loss_weighting": ["velocity"]}
STAGE_LEVELS: dict[str, list[Any]] = {
    "logit_mean": [1.0, -0.7],
    "logit_std": [1.0, 1.3],
    "loss_weighting": ["velocity", "clean"],
}


def core_job(setting: Setting, seed: int, flops: float, data: Path, optimizer: str = "muon") -> Job:
    """Return the run of a core of about `flops` operations, which growths of any factor share."""
    cost = setting.plans(optimizer=optimizer)["core"].flops
    steps = round(flops / cost)
    kind = [] if optimizer == "muon" else [optimizer]
    return Job(
        name="-".join([f"core-h{setting.hidden_size}-l{setting.num_layers}", *kind, f"{steps}-seed-{seed}"]),
        arguments={
            **COMMON,
            **setting.core_arguments(),
            # An untrained stage, the same for all settings, so that they share the core.
            "resolutions": [setting.core_resolution, 128],
            "block_out_channels": ["64,96"],
            "seed": seed,
            **CORE_LEVELS,
            "core_steps": steps,
            "detail_steps": [0],
            "joint_steps": [0],
            "train_batch_size": [setting.core_batch_size],
            "validation_steps": max(steps // 4, 1),
            "optimizer": optimizer,
        },
        keys={"arm": "core", "seed": seed, "flops": steps * cost},
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
    **more: Any,
) -> Job:
    """
    Return a run of `flops` operations at the high resolution, with the core frozen for `frozen_share` of them.

    Without a `core` everything is trained from scratch. The noise levels go lower than the core's, and the loss is the clean
    image's error. `more` are further arguments of `grow.py`.
    """
    more = {"optimizer": "muon", **more}
    costs = setting.plans(init, more["optimizer"])
    frozen_steps = round(frozen_share * flops / costs["detail"].flops)
    joint_steps = round((1 - frozen_share) * flops / costs["joint"].flops)
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
            **STAGE_LEVELS,
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


def read_records(path: Path) -> dict[str, Record]:
    """Return the records in `runs.json` by name."""
    return {record["name"]: record for record in read_json(path) or []}


def runs_of_arm(records: dict[str, Record], arm: str, factor: int) -> list[Record]:
    """
    Return the runs of an arm at a growth factor, one per seed, in the order of seeds.

    Raises:
        `ValueError`: if a seed has two runs, of which one must be left over from other settings.
    """
    keys = {"arm": arm, "factor": factor}
    runs = [run for run in records.values() if keys.items() <= run["keys"].items()]
    if len({run["keys"]["seed"] for run in runs}) < len(runs):
        names = ", ".join(run["name"] for run in runs)
        raise ValueError(
            f"Several records of one seed: {names}. Remove those of settings that no longer exist from runs.json."
        )
    return sorted(runs, key=lambda run: run["keys"]["seed"])


def final_scores(run: Record) -> dict[str, float]:
    """Return the scores of the last pipeline that a run left."""
    return run["scores"][list(run["seconds"])[-1]]


def run_queue(jobs: list[Job], args: argparse.Namespace) -> dict[str, Record]:
    """
    Run those `jobs` that have no record yet.

    Returns:
        All records by name, including those of other benchmarks. A record has `keys`, `arguments`, `machine`,
        `mixed_precision`, `commit`, `core_weights` (a digest: a core that was lost and trained again on another machine is
        another core), `images` per phase, `curve` (the lines of metrics with a held-out loss), `seconds` of training and
        `scores` of each pipeline that the run left.

    Raises:
        `ValueError`: if the record of a job has other arguments, or the scorer does not know the captions.
        `RuntimeError`: if a run fails, after the others have run, or if another queue is using the same folder.
    """
    work_dir, results = locate_folders(args)
    path = results / "runs.json"  # shared by all benchmarks, since they have runs in common
    if args.quick:
        shutil.rmtree(work_dir, ignore_errors=True)
    records = read_records(path)
    folders = {job.name: work_dir / job.name for job in jobs}
    inputs = {job.name: run_inputs(job) for job in jobs}
    for job in jobs:
        ran = records.get(job.name, {}).get("arguments", inputs[job.name])
        different = {name for name in ran | inputs[job.name] if ran.get(name) != inputs[job.name].get(name)}
        if different:
            raise ValueError(
                f"{job.name} has been run with other values of {sorted(different)}: to run it again, remove it from {path} "
                f"and remove {folders[job.name]}."
            )
    if args.scorer:
        for data in {job.data for job in jobs}:
            check_captions(args.scorer, load_held_out(str(data), 64)[0])
    lock = Lock()

    # Cores run first, and the other jobs wait for theirs. A lost core is trained again if a missing run needs it.
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
            record = run_job(job, inputs[job.name], folders, args)
        finally:
            if job.name in ready:
                ready[job.name].set()
        with lock:
            # A lost core that was trained again does not replace the record that older runs refer to.
            records.update({job.name: record, **read_records(path)})
            write_json(path, sorted(records.values(), key=lambda record: record["name"]))
            left = sum(job.name not in records for job in jobs)
            print(f"{time.strftime('%H:%M')} {job.name} is done, {left} to go.", flush=True)

    work_dir.mkdir(parents=True, exist_ok=True)
    with open(work_dir / ".queue", "w", encoding="utf-8") as at_work, ThreadPoolExecutor(args.workers) as pool:
        try:
            fcntl.flock(at_work, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"Another queue runs jobs in {work_dir}, maybe the same ones: wait for it, or give another `--work_dir`."
            ) from None
        list(pool.map(finish, queue))
    return records


def run_inputs(job: Job) -> dict[str, Any]:
    """Return everything that a run depends on, except code, machine and precision, which are in its record as well."""
    arguments = {**job.arguments, "data": job.data.name}
    if "text_encoder" in arguments and Path(arguments["text_encoder"]).is_dir():
        arguments["text_encoder"] = Path(arguments["text_encoder"]).resolve().name  # records hold no paths
    return json.loads(json.dumps(arguments | ({"core": job.core} if job.core else {})))


def run_job(job: Job, inputs: dict[str, Any], folders: dict[str, Path], args: argparse.Namespace) -> Record:
    """Train, evaluate, and return the record of the run."""
    folder, precision = folders[job.name], args.mixed_precision
    scorer = ["--scorer", args.scorer] if args.scorer else []
    # The record of a resumed run names the code and the machine that it began with.
    resumes, origin = bool(sorted_checkpoints(folder / "checkpoints")), folder / "made_by.json"
    if not (resumes and origin.exists()):
        write_json(origin, {"machine": describe_machine(), "mixed_precision": precision, "commit": describe_commit()})
    made_by = json.loads(origin.read_text(encoding="utf-8"))
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
    if job.script in (GROW, PLAIN):
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
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        for command in (
            [train, [*evaluate, f"--mixed_precision={precision}", *scorer]]
            if job.script == GROW
            else [[*train, *scorer]]
        ):
            finished = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
            if finished.returncode:
                raise RuntimeError(f"{job.name} failed: see {folder / 'log.txt'}. Start again to resume.")
    core = folders[job.core or job.name] / "core"
    for model in ("unet", "transformer"):
        if (core / model).exists():
            made_by["core_weights"] = digest_weights(core / model)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return {"name": job.name, "keys": job.keys, "arguments": inputs, **made_by, **result}


def digest_weights(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
