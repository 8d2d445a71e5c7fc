# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""`benchmarks/gpu.sh` with tiny models on a CPU."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent, FunctionEventAvg

from benchmarks import step_profile, step_time
from benchmarks.tables import read_json
from diffusers_greedy_grow.training.shapes.scenes import write_shapes


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"


def run(*arguments: Path, **variables: str) -> tuple[int, list[str]]:
    """Run the script; return its exit code and the lines that it prints."""
    environment = {**os.environ, "SIZES": "tiny", "PYTHON": sys.executable, "TEXT_ENCODER": "small", **variables}
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout.splitlines()


@pytest.mark.slow
def test_a_rehearsal(tmp_path):
    """It leaves the results of each part, and runs none again."""
    data, results = write_shapes(tmp_path / "data", 8, 4, 16, texture_cells=8), tmp_path / "results"
    code, lines = run(results, data)
    assert code == 0 and lines[-1] == f"All parts are in {results}.", lines
    names = [line.split(":")[0] for line in lines[:-1]]
    assert names == ["steps-256", "sampling-256", "compiled-256", "profile", "graphs-256", "stickers"]
    (part,) = read_json(results / "steps-256" / "step_time.json")["measured"]
    assert [row["model"] for row in part["rows"]] == ["ours", "ours, core phase", "plain transformer"]
    (part,) = read_json(results / "profile" / "step_profile.json")["measured"]
    assert [(row["phase"], row["step"]) for row in part["rows"]] == [
        (phase, step) for phase in ("detail", "joint") for step in ("as it is", "compiled blocks")
    ]  # fmt: skip
    assert "the whole model compiled" in (results / "graphs-256" / "sampling.md").read_text()
    assert (results / "stickers" / "samples.png").exists() and "compiled?" in (results / "report.md").read_text()
    code, lines = run(results, data)
    assert code == 0 and lines[:-1] == [f"{name}: is there already" for name in names]


def test_a_part_that_fails_does_not_stop_the_next(tmp_path):
    """`false` stands for an interpreter that fails."""
    code, lines = run(tmp_path, PYTHON="false", PARTS="steps-256 nonsense core stickers")
    assert code == 1 and lines[0].startswith("steps-256: failed with exit code 1"), lines
    assert lines[1].startswith("nonsense: is no part") and lines[2].startswith("core: failed")
    assert lines[3:] == [
        "stickers: skipped, no DATA is given", "Missing: steps-256 nonsense core. Run this again for them.",
    ]  # fmt: skip
    code, lines = run(tmp_path, MINUTES="0")
    assert code == 1 and lines[0] == "steps-256: no time is left" and "Missing: steps-256 sampling-256" in lines[-1]
    code, lines = run(tmp_path, SIZES="large")
    assert code == 2 and "it must be full or tiny" in lines[0]
    assert run()[0] == 2


def test_the_stickers_do_not_begin_without_time(tmp_path):
    """The number of their steps is kept for later runs."""
    code, lines = run(tmp_path / "results", tmp_path, SIZES="full", PYTHON="false", PARTS="stickers", MINUTES="1")
    assert code == 1 and lines[0] == "stickers: no time is left", lines
    assert not list((tmp_path / "results").glob("stickers*"))
    _, lines = run(tmp_path / "results", tmp_path, SIZES="full", PYTHON="false", PARTS="stickers", MINUTES="10")
    assert lines[0].startswith("stickers: failed") and (tmp_path / "results" / "stickers.steps").exists()


def test_ctrl_c_ends_the_part_that_runs(tmp_path):
    python, number = tmp_path / "python", tmp_path / "number"
    python.write_text(f"#!/bin/sh\necho $$ > {number}\nexec sleep 60\n")
    python.chmod(0o755)
    process = subprocess.Popen(
        ["bash", str(SCRIPT), str(tmp_path / "results")], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "SIZES": "tiny", "PYTHON": str(python)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs ignore it
    )  # fmt: skip
    while not (number.exists() and number.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    try:
        output, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130 and output.startswith("Stopped"), output
    assert not list((tmp_path / "results").glob("*.done"))
    with pytest.raises(ProcessLookupError):
        os.kill(int(number.read_text()), 0)


def test_the_times_of_a_gpu():
    """Kernels count for the operation that starts them, and once for the GPU, although regions with names cover them."""

    def make(number: int, name: str, start: float, end: float, **kwargs) -> FunctionEvent:
        return FunctionEvent(number, name, 1, start, end, use_device="cuda", **kwargs)

    product, copy = make(1, "aten::mm", 0, 10), make(2, "aten::copy_", 10, 11)
    product.append_kernel("gemm", 0, 3000)
    kernel = make(3, "gemm", 20, 3020, device_type=DeviceType.CUDA)
    region = make(4, "Optimizer.step", 20, 3020, device_type=DeviceType.CUDA, is_user_annotation=True)
    events = [FunctionEventAvg().add(event) for event in (product, copy, kernel, region)]
    times, computing = step_profile.sum_times(events, torch.device("cuda"))
    assert times == {"aten::mm": 3.0} and computing == pytest.approx(3e-3)
    assert list(step_profile.sum_times(events, torch.device("cpu"))[0]) == ["aten::mm", "aten::copy_"]


@pytest.mark.parametrize(
    "name,tflops",
    [("NVIDIA H200", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA GeForce RTX 4090", 165), ("Tesla T4", None)],
)
def test_the_peak_of_a_data_sheet(name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = step_time.find_peak(torch.device("cuda"))
    assert peak == (None if tflops is None else 1e12 * tflops) and step_time.find_peak(torch.device("cpu")) is None
