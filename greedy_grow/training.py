# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""`greedy-grow train`, `greedy-grow lora` and `greedy-grow plan`."""

import argparse
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

import psutil


def find_script(name: str) -> Path:
    """Return the path of a script of `training_examples/`, which is in this package in a wheel, and beside it in a clone."""
    folder = Path(__file__).parent
    return next(path for place in (folder, folder.parent) if (path := place / "training_examples" / name).exists())


def become(command: list[str]) -> None:
    """Run another program instead of this one, so that signals and exit codes are its own."""
    if os.name == "nt":  # there, a new process would not keep the terminal
        sys.exit(subprocess.run(command).returncode)
    sys.stdout.flush()
    os.execv(command[0], command)


def launch(arguments: list[str]) -> None:
    """
    Run accelerate's launcher, and end with the training's exit code. A signal is the training's: it saves a checkpoint, and the launcher
    waits for that.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser

    def pass_on(number: int, frame: FrameType | None) -> None:
        for child in psutil.Process().children():
            child.send_signal(number)

    signal.signal(signal.SIGINT, lambda number, frame: None)  # from a terminal, it reaches the training anyway
    signal.signal(signal.SIGTERM, pass_on)
    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode if error.returncode > 0 else 128 - error.returncode)


def train(args: argparse.Namespace) -> None:
    """Run the script that `args` name, `grow.py` or `train_lora.py`."""
    script = find_script(args.script)
    if {"-h", "--help"} & {*args.rest}:
        usage = f'usage: greedy-grow {args.command} [--launch "ARGUMENTS OF accelerate"] ARGUMENTS'
        print(f"{usage}\n\nIts arguments are those of {args.script}:\n")
        become([sys.executable, str(script), *args.rest])
    else:
        launch([*shlex.split(args.launch), str(script), *args.rest])


def plan(args: argparse.Namespace) -> None:
    become([sys.executable, str(find_script("grow.py")), "--plan", *args.rest])
