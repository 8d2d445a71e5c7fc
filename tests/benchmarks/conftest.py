# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.arms import ARMS, SETTINGS, make_jobs
from benchmarks.queue_of_runs import Setting, add_queue_arguments


@pytest.fixture
def setting() -> Setting:
    """The models of the comparisons at 128 px."""
    return SETTINGS[8]


@pytest.fixture
def queue_arguments() -> Callable[..., argparse.Namespace]:
    """Parse arguments of a queue."""

    def parse(*flags: Any) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        add_queue_arguments(parser)
        return parser.parse_args([str(flag) for flag in flags])

    return parse


@pytest.fixture
def records(setting) -> dict[str, dict]:
    """Records of two seeds of two arms. Operations are in units of half of a core's training."""
    curves = {
        "scratch": ([(5.0, 0.4), (10.0, 0.2)], [(5.0, 0.6), (10.0, 0.4)]),
        "ours": ([(3.0, 0.3), (6.0, 0.1)], [(3.0, 0.5), (6.0, 0.3)]),
    }
    records, scores = {}, {"color": 0.8, "swd_64": 50.0, "swd_32": 30.0}
    for arm in ARMS:
        for seed, curve in enumerate(curves.get(arm.name, ())):
            for job in make_jobs(setting, arm, seed, Path("shapes"), Path("shapes")):
                is_core = job.keys["arm"] == "core"
                phase = "core" if is_core else "grown-128"
                lines = [(2.0, 7.0)] if is_core else curve
                records[job.name] = {
                    "name": job.name,
                    "keys": {**job.keys, "flops": 2.0} if is_core else job.keys,
                    "arguments": job.arguments,
                    "images": {phase: 10},
                    "seconds": {phase: 1.0},
                    "curve": [
                        {
                            "phase": phase,
                            "flops": flops,
                            "val_loss": loss,
                            "val_loss_low": loss / 4,
                            "val_loss_high": 3 * loss / 4,
                            "val_low_noise_loss": 9 * loss,
                        }
                        for flops, loss in lines
                    ],
                    "scores": {
                        phase: {} if is_core else dict(scores, shape=0.5 + 0.2 * seed, swd_128=100.0 + 20 * seed)
                    },
                }
    return records
