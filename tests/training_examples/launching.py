# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
Start the scripts of `training_examples/` and read what a run leaves behind. `launch` starts a process with `accelerate launch`,
as users do. `run` runs the same file with the same arguments in a fork of a process that has imported everything, which saves
about ten seconds a run: see `fork_server.py`.
"""

import atexit
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

import diffusers_greedy_grow


FOLDER = Path(__file__).parent
GROW = Path(__file__).parents[2] / "training_examples" / "grow.py"
TRAIN_LORA = GROW.with_name("train_lora.py")
LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch"]
# A model, and steps, for which a whole run takes a few seconds.
TINY = {
    "resolutions": [8, 16],
    "hidden_size": 16,
    "num_layers": 1,
    "num_attention_heads": 2,
    "block_out_channels": "8",
    "text_hidden_size": 32,
    "core_steps": 12,
    "detail_steps": 6,
    "joint_steps": 6,
    "train_batch_size": 4,
    "num_validation_images": 8,
    "num_inference_steps": 2,
    "logging_steps": 2,
    "validation_steps": 6,
    "checkpointing_steps": 4,
}


# ----------------------------------------------------------------------------------------------------------------------
# Commands


def to_flags(arguments: dict) -> list[str]:
    """The command line of `arguments`; a value of `True` is a flag without a value."""
    flags = []
    for name, value in arguments.items():
        flags.append(f"--{name}")
        if value is not True:
            flags += [str(item) for item in (value if isinstance(value, list) else [value])]
    return flags


def grow_flags(output_dir: Path, **arguments) -> list[str]:
    """The command line of a small run of `grow.py`."""
    return ["--output_dir", str(output_dir), *to_flags({**TINY, **arguments})]


def launch_command(
    script: Path, flags: list[str], num_processes: int = 1, fsdp: bool = False, options: Sequence[str] = ()
) -> list[str]:
    """
    The command of `accelerate launch` for a script on the CPU: in one process, with DDP, or with FSDP2. `options` are further
    ones of `accelerate launch`.
    """
    several = ["--num_processes", str(num_processes), "--main_process_port", "0"]
    if fsdp:
        config = ["--config_file", str(GROW.parent / "accelerate" / "fsdp2.yaml"), "--mixed_precision", "no"]
        mode = [*config, *several, str(FOLDER / "launch_on_cpu.py")]
    else:
        mode = ["--multi_gpu", *several] if num_processes > 1 else ["--cpu"]
    return [*LAUNCHER, *options, *mode, str(script), *flags]


def command(output_dir: Path, num_processes: int = 1, fsdp: bool = False, **arguments) -> list[str]:
    """The command of `accelerate launch` for a small run of `grow.py`."""
    return launch_command(GROW, grow_flags(output_dir, **arguments), num_processes, fsdp)


def environment(fsdp: bool = False, hub: bool = False) -> dict[str, str]:
    """The environment of a script: on the CPU, and offline unless it may use the tests' Hub."""
    cpu = {"ACCELERATE_TORCH_DEVICE": "cpu"} if fsdp else {"ACCELERATE_USE_CPU": "true"}
    offline = {"HF_HUB_OFFLINE": "0" if hub else "1"}
    return {**os.environ, **cpu, **offline, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": list_warning_filters()}


@cache
def list_warning_filters() -> str:
    """
    `PYTHONWARNINGS` under which a deprecated call from a script or from the package is an error. Python compares whole names of
    modules there, so all are listed. Warnings inside other libraries are left to the forks, which know pytest's filters.
    """
    modules = pkgutil.walk_packages(diffusers_greedy_grow.__path__, "diffusers_greedy_grow.")
    names = ["__main__", "diffusers_greedy_grow", *(module.name for module in modules)]
    return ",".join(f"error::{kind}:{name}" for name in names for kind in ("DeprecationWarning", "FutureWarning"))


# ----------------------------------------------------------------------------------------------------------------------
# Runs in a process of their own


def launch_script(
    script: Path,
    flags: list[str],
    num_processes: int = 1,
    fsdp: bool = False,
    options: Sequence[str] = (),
    hub: bool = False,
    **variables: str,
) -> subprocess.CompletedProcess:
    """Run a script with `accelerate launch`, to its end. `variables` are added to its environment."""
    return subprocess.run(
        launch_command(script, flags, num_processes, fsdp, options),
        env={**environment(fsdp, hub), **variables}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def launch(output_dir: Path, num_processes: int = 1, fsdp: bool = False, **arguments) -> str:
    """Run `grow.py` with `accelerate launch`, to its end. Return what the run said."""
    done = launch_script(GROW, grow_flags(output_dir, **arguments), num_processes, fsdp)
    assert done.returncode == 0, done.stdout[-9000:]
    return done.stdout


# ----------------------------------------------------------------------------------------------------------------------
# Runs in forks


# What pytest does with warnings, for the forks: `conftest.py` sets it.
warning_filters: list[str] = []


class ForkServer:
    """A process that has imported the scripts' modules and runs the scripts in forks of itself."""

    def __init__(self, hub: bool):
        self.process = subprocess.Popen(
            [sys.executable, str(FOLDER / "fork_server.py"), str(GROW), str(TRAIN_LORA)],
            env=environment(hub=hub), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        atexit.register(self.close)

    def run(self, request: dict) -> int:
        """Run a script. Return its exit code, which is negative if a signal ended it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        reply = self.process.stdout.readline()
        assert reply, f"The fork server has ended with code {self.process.wait()}."
        return int(reply)

    def close(self) -> None:
        """End the process by the end of its input."""
        self.process.communicate()


@cache
def start_server(hub: bool) -> ForkServer:
    """The server of this test process. Runs that may use the Hub have their own: huggingface_hub is offline from its import on."""
    return ForkServer(hub)


def run_script(script: Path, flags: list[str], hub: bool = False, **variables: str) -> subprocess.CompletedProcess:
    """Run a script in a fork, to its end. `variables` are added to its environment."""
    with tempfile.NamedTemporaryFile(prefix="greedy-grow-run-", suffix=".log") as log:
        request = {
            "script": str(script),
            "argv": flags,
            "environment": {**environment(hub=hub), **variables},
            "log": log.name,
            "filters": warning_filters,
        }
        code = start_server(hub).run(request)
        return subprocess.CompletedProcess(
            [str(script), *flags], code, Path(log.name).read_text(encoding="utf-8", errors="replace")
        )


def run(output_dir: Path, **arguments) -> str:
    """Run `grow.py` in a fork, to its end. Return what the run said."""
    done = run_script(GROW, grow_flags(output_dir, **arguments))
    assert done.returncode == 0, done.stdout[-9000:]
    return done.stdout


def refuse(output_dir: Path, **arguments) -> str:
    """Run `grow.py` in a fork, which must fail. Return what the run said."""
    done = run_script(GROW, grow_flags(output_dir, **arguments))
    assert done.returncode > 0, done.stdout[-9000:]
    return done.stdout


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves behind


def read_metrics(output_dir: Path) -> list[dict]:
    """The lines of `metrics.jsonl`."""
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path, part: str = "unet") -> dict[str, torch.Tensor]:
    """The weights of one component of a saved pipeline."""
    (path,) = (folder / part).glob("*.safetensors")
    return load_file(path)


def assert_same_weights(a: Path, b: Path) -> None:
    """Two saved pipelines have the same weights, bit for bit."""
    for part in ("unet", "text_encoder"):
        a_weights, b_weights = weights(a, part), weights(b, part)
        assert a_weights.keys() == b_weights.keys()
        for name, value in a_weights.items():
            assert torch.equal(value, b_weights[name]), name


def list_files(folder: Path) -> dict[Path, int]:
    """Every file in `folder`, with the time of its last change."""
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}
