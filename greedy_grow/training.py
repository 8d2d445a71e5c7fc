# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""`greedy-grow train` and `greedy-grow plan`."""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path


def find_script() -> Path:
    """Return the path of grow.py: in a wheel it is in this package, and in a clone beside it."""
    folder = Path(__file__).parent
    return next(
        path for place in (folder, folder.parent) if (path := place / "training_examples" / "grow.py").exists()
    )


def become(command: list[str]) -> None:
    """Run another program instead of this one, so that signals and exit codes are its own."""
    if os.name == "nt":  # there, a new process would not keep the terminal
        sys.exit(subprocess.run(command).returncode)
    sys.stdout.flush()
    os.execv(command[0], command)


def train(args: argparse.Namespace) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *shlex.split(args.launch)]
    if {"-h", "--help"} & {*args.rest}:
        launcher = [sys.executable]
        print(
            'usage: greedy-grow train [--launch "ARGUMENTS OF accelerate"] ARGUMENTS\n\nIts arguments are those of grow.py:\n'
        )
    become([*launcher, str(find_script()), *args.rest])


def plan(args: argparse.Namespace) -> None:
    become([sys.executable, str(find_script()), "--plan", *args.rest])
