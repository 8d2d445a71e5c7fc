# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""A run that is killed at any moment and resumed is the run never killed, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_killed_and_resumed_runs_are_identical():
    """Four kills at random moments; forks need a process of their own, without the test runner's threads."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kill_resume", "--kills", "4"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "4/4 identical", done.stdout[-5000:]
