# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
Is a run that was killed and resumed the same as a run that was never killed? This kills `grow.py` by SIGKILL at random
moments, resumes it by `--resume_from_checkpoint latest`, and compares weights, averages, optimizer state and logged losses
bit for bit.

    OMP_NUM_THREADS=1 python -m benchmarks.kill_resume --kills 100

Runs are forks of one process that has imported everything, so that most of their time is training and saving.
"""

import argparse
import collections
import hashlib
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType


ARGUMENTS = {
    "shapes_images": 40,
    "num_scored_images": 4,
    "resolutions": [8, 16],
    "hidden_size": 16,
    "num_layers": 1,
    "num_attention_heads": 2,
    "block_out_channels": ["8"],
    "text_hidden_size": 32,
    "core_steps": 14,
    "detail_steps": [9],
    "joint_steps": [9],
    "train_batch_size": [4],
    "num_validation_images": 4,
    "num_inference_steps": 2,
    "logging_steps": 4,
    "validation_steps": 6,
    "checkpointing_steps": 3,
}
TIMES = ("images_per_second", "memory_gb", "minutes_left")


def load_script() -> ModuleType:
    """Import `grow.py` as a module; all forks share what it imports."""
    path = Path(__file__).resolve().parents[1] / "training_examples" / "grow.py"
    spec = importlib.util.spec_from_file_location("grow", path)
    assert spec is not None and spec.loader is not None
    sys.modules["grow"] = grow = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(grow)
    return grow


def start(grow: ModuleType, output_dir: Path) -> int:
    """Start or resume a run in a process of its own, and return the process's number."""
    flags = [f"--output_dir={output_dir}", "--resume_from_checkpoint=latest"]
    for name, value in ARGUMENTS.items():
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        log = os.open(f"{output_dir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        grow.main(flags)
        code = 0
    finally:
        os._exit(code)


def run_for(grow: ModuleType, output_dir: Path, seconds: float | None) -> bool:
    """Run and kill after so many `seconds`; return whether the run finished before that."""
    process, end = start(grow, output_dir), time.monotonic() + (seconds or 600)
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            if status:
                raise RuntimeError(f"A run failed: see {output_dir}.log.")
            return True
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    if seconds is None:
        raise RuntimeError(f"A run hangs: see {output_dir}.log.")
    return False


def activity(output_dir: Path) -> str:
    """Say what a run was doing when it was killed."""
    if any((output_dir / "checkpoints").glob(".*")):
        return "saving or removing a checkpoint"
    if any(output_dir.glob("*.tmp*")):
        return "saving a pipeline or images"
    path = output_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    try:
        return f"training {json.loads(lines[-1])['phase']}" if lines else "before the first line of metrics"
    except ValueError:
        return "writing metrics"


def fingerprint(output_dir: Path) -> dict[str, str]:
    """Return everything that must be the same: a digest per file, and the lines of metrics without times."""
    prints = {}
    for pattern in ("*/*/*.safetensors", "checkpoints/*/optimizer.bin", "checkpoints/*/scheduler.bin"):
        for path in sorted(output_dir.glob(pattern)):
            prints[str(path.relative_to(output_dir))] = hashlib.sha256(path.read_bytes()).hexdigest()
    for i, line in enumerate((output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()):
        values = {name: value for name, value in json.loads(line).items() if name not in TIMES}
        prints[f"line {i} of metrics"] = json.dumps(values)
    return prints


def kill_and_compare(folder: Path, kills: int, seed: int = 0) -> Iterator[tuple[list[str], set[str]]]:
    """Yield, per run that was killed at least once, what it was doing each time, and what differs at its end."""
    grow, moments = load_script(), random.Random(seed)
    run_for(grow, folder / "drawn", None)  # this run also draws the shapes, so that the others only train
    started = time.monotonic()
    run_for(grow, folder / "whole", None)
    seconds, expected = time.monotonic() - started, fingerprint(folder / "whole")
    print(f"A run takes {seconds:.1f} s; {len(expected)} files and lines must be the same.", flush=True)
    run = 0
    while kills > 0:
        run += 1
        output_dir, activities = folder / f"run-{run}", []
        while kills > 0 and not run_for(grow, output_dir, moments.uniform(0, seconds)):
            activities.append(activity(output_dir))
            kills -= 1
        run_for(grow, output_dir, None)
        if activities:
            found = fingerprint(output_dir)
            yield activities, {name for name in expected | found if expected.get(name) != found.get(name)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="Where to keep the runs; a temporary folder by default.")
    args = parser.parse_args()
    identical, at = 0, collections.Counter[str]()
    with tempfile.TemporaryDirectory() as temporary:
        for activities, differences in kill_and_compare(Path(args.folder or temporary), args.kills, args.seed):
            at.update(activities)
            identical += 0 if differences else len(activities)
            print(f"killed {len(activities)} times: {sorted(differences)[:5] or 'identical'}", flush=True)
    for name, count in at.most_common():
        print(f"{count:4d} x {name}")
    print(f"{identical}/{args.kills} identical")


if __name__ == "__main__":
    main()
