# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
Where does a training step's time go, and what makes it faster? A step of the detail phase and one of the joint phase, as they are and
with each lever, in turn; then the ten operations that take longest, without and with it.

    python -m benchmarks.step_profile
    python -m benchmarks.step_profile --resolutions 256 --hidden_size 1024 --num_layers 12 --channels 128 256   # for a GPU
    python -m benchmarks.step_profile --levers "channels last"
    python -m benchmarks.step_profile --quick
    python -m benchmarks.step_profile --report
"""

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.step_time import Steps, add_size_arguments, build, compile_model, set_up, time_call
from benchmarks.tables import (
    Row,
    Section,
    add_report_arguments,
    keep_rows,
    markdown,
    measured_sections,
    read_rows,
    render_report,
    report_command,
    spread,
    write_reports,
)


PHASES = {"detail": "ours, detail phase", "joint": "ours"}
PLAIN = "as it is"
LEVERS = ("channels last", "compiled blocks", "compiled model")
LONGEST = 10
NOTE = """
Steps in bfloat16 by autocast, with Muon. *speed*: the plain step's time by that of this step, of the same turn; median, smallest and
largest. *casts*: how long it takes to cast all weights to bfloat16 once, as a share of the plain step: what weights kept in bfloat16
beside a copy in float32 could save. *busy*: the share of the step in which a GPU computes.
""".strip()
OPERATIONS_NOTE = "The operations that take longest by themselves, in one step, as torch's profiler sees it."


def apply_lever(steps: Steps, lever: str, backend: str) -> None:
    """Change a model, and the images that it is given, as a lever does."""
    if lever == "channels last":
        steps.model.to(memory_format=torch.channels_last)
        sample, *others = steps.inputs
        steps.inputs = (sample.contiguous(memory_format=torch.channels_last), *others)
    elif lever == "compiled blocks":
        compile_model(steps.model, backend)
    elif lever == "compiled model":
        steps.model.compile(backend=backend, dynamic=False, fullgraph=True)


def cast_weights(model: torch.nn.Module) -> None:
    """Cast all weights once, as autocast does in each step."""
    for parameter in model.parameters():
        parameter.to(torch.bfloat16)


def profile_step(steps: Steps, device: torch.device) -> tuple[dict[str, float], float]:
    """Profile a training step, and return what [`sum_times`] does."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        time_call(steps.train)
    return sum_times(profiler.key_averages(), device)


def sum_times(events: Iterable[Any], device: torch.device) -> tuple[dict[str, float], float]:
    """
    Return the milliseconds of each operation by itself, the longest first, and the seconds in which a GPU computes. Operations without
    any time are left out: on a GPU that the profiler may not watch, all are.
    """
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times: Counter[str] = Counter()
    computing = 0.0
    for event in events:
        if event.device_type == DeviceType.CPU:
            is_graph = "CompiledFxGraph" in event.key or "Torch-Compiled Region" in event.key
            times["compiled code" if is_graph else event.key] += getattr(event, name) / 1e3
        elif not event.is_user_annotation:  # a region with a name covers its kernels, which are counted themselves
            computing += event.self_device_time_total / 1e6
    return {operation: milliseconds for operation, milliseconds in times.most_common() if milliseconds}, computing


def measure(args: argparse.Namespace, device: torch.device) -> tuple[list[Row], list[Row]]:
    """Return a row per phase and lever, and a row per phase, lever and operation."""
    rows: list[Row] = []
    operations: list[Row] = []
    (resolution,) = args.resolutions
    for phase in args.phases:
        torch.compiler.reset()
        arms = {}
        for lever in (PLAIN, *args.levers):
            with device:
                model = build(PHASES[phase], resolution)
                arms[lever] = Steps(model, resolution, args.batch_size, device, optimizer="muon")
            apply_lever(arms[lever], lever, args.backend)
            arms[lever].train()  # warms up, and compiles
        seconds: dict[str, list[float]] = {lever: [] for lever in arms}
        casts = []
        for _ in range(args.repeats):
            for lever, steps in arms.items():
                seconds[lever].append(time_call(steps.train))
            casts.append(time_call(lambda: cast_weights(arms[PLAIN].model)))  # noqa: B023
        for lever, steps in arms.items():
            times, computing = profile_step(steps, device)
            total = sum(times.values())
            row: Row = {
                "phase": phase,
                "step": lever,
                "ms": f"{1e3 * statistics.median(seconds[lever]):.0f}",
                "speed": spread([plain / own for plain, own in zip(seconds[PLAIN], seconds[lever])]),
                "casts": f"{statistics.median(casts) / statistics.median(seconds[PLAIN]):.1%}"
                if lever == PLAIN
                else "",
            }
            if device.type == "cuda":
                # Profiling makes the step longer, but not its kernels.
                row["busy"] = f"{computing / statistics.median(seconds[lever]):.0%}"
            rows.append(row)
            print(json.dumps(row), flush=True)
            for name, milliseconds in list(times.items())[:LONGEST]:
                operations.append(
                    {
                        "phase": phase,
                        "step": lever,
                        "operation": f"`{name}`",
                        "ms": f"{milliseconds:.1f}",
                        "share": f"{milliseconds / total:.1%}",
                    }
                )
    return rows, operations


def make_reports(args: argparse.Namespace) -> dict[Path, str]:
    """Return the report of the records that there are, by the file that it belongs to."""
    sections = measured_sections(args.results_dir / "step_profile.json", num_keys=2)
    if not sections:
        return {}
    operations = read_rows(args.results_dir / "step_profile_operations.json")
    for phase, lever in dict.fromkeys((row["phase"], row["step"]) for row in operations):
        own = [row for row in operations if (row["phase"], row["step"]) == (phase, lever)]
        own = [{name: value for name, value in row.items() if name not in ("phase", "step")} for row in own]
        sections.append(Section(own, f"{phase}, {lever}", OPERATIONS_NOTE))
    title = "Where does a training step's time go? Full tables"
    text = render_report(report_command("step_profile", args), title, sections, NOTE)
    return {args.results_dir / "step_profile.md": text}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    add_report_arguments(parser)
    parser.add_argument("--resolutions", type=int, nargs=1, default=[128])
    add_size_arguments(parser)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--phases", nargs="+", choices=list(PHASES), default=list(PHASES))
    parser.add_argument("--levers", nargs="*", choices=LEVERS, default=list(LEVERS))
    parser.add_argument("--backend", default="inductor", help="The backend of torch.compile; eager compiles nothing.")
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    device = set_up(args)
    if args.quick:
        args.resolutions, args.repeats, args.backend = [64], 1, "eager"
    if not args.report:
        rows, operations = measure(args, device)
        if args.quick:
            print(markdown(rows))
            print(markdown(operations))
            return
        keep_rows(args.results_dir / "step_profile.json", rows, "phase", args)
        keep_rows(args.results_dir / "step_profile_operations.json", operations, "phase", args)
    write_reports(make_reports(args))


if __name__ == "__main__":
    main()
