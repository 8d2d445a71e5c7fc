# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
What does a step cost? Training and sampling steps, compared with diffusers' pixel-space models of the same number of
parameters: same machine, batch, resolution and text, measured in turn.

    python -m benchmarks.step_time                  # 64, 128 and 256 px
    python -m benchmarks.step_time --resolutions 256 --hidden_size 1024 --num_layers 12 --channels 128 256   # for a GPU
    python -m benchmarks.step_time --compiled       # with compiled blocks
    python -m benchmarks.step_time --core           # the core alone: its share of the machine's matrix-product peak
    python -m benchmarks.step_time --quick
    python -m benchmarks.step_time --report         # reports and plots from the records
"""

import argparse
import bisect
import functools
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.tables import (
    Row,
    add_report_arguments,
    draw_bars,
    keep_rows,
    markdown,
    measured_sections,
    read_rows,
    render_report,
    report_command,
    spread,
    write_reports,
)
from diffusers_greedy_grow import GrowableUNet2DConditionModel, ShallowUNet2DModel
from diffusers_greedy_grow.training.optimizer import Muon, split_for_muon


TEXT_DIM, NUM_TOKENS, GRID = 128, 32, 16


@dataclass
class Size:
    """The size of our model; its peers have the same number of parameters."""

    hidden_size: int = 192
    num_layers: int = 6
    channels: tuple[int, ...] = (48, 96)
    factor: int = 4


STEP_NOTE = (
    "*its step / ours*: time relative to our model's at the same resolution; median, smallest and largest. *share of peak*: of "
    "the rate of one large matrix product in bfloat16."
)
CORE_NOTE = "Peak: one large matrix product, timed in turn with the steps. Rates: median, smallest and largest."
REPORTS = {
    "step_time": ("What does a step cost? Full tables", STEP_NOTE),
    "step_time_compiled": ("What does a step cost, compiled? Full tables", STEP_NOTE),
    "step_time_core": ("How much of the machine's peak does the core reach? Full tables", CORE_NOTE),
    "step_time_core_compiled": ("How much of the peak does the core reach, compiled? Full tables", CORE_NOTE),
}
# The dense bfloat16 TFLOP/s of data sheets, by a part of the device's name; the first that fits counts.
PEAKS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H200 NVL": 835,
    "H100": 989,
    "H200": 989,
    "A100": 312,
    "L40S": 362,
    "4090": 165,
}
CORE_COLUMNS = ("dtype", "hidden size", "share of peak")
SIZE = Size()  # `set_up` sets it from the flags


# ----------------------------------------------------------------------------------------------------------------------
# The models


def build_ours(resolution: int, grid: int = GRID) -> GrowableUNet2DConditionModel:
    """Build a core of `grid x grid` tokens and grow it once."""
    core = ShallowUNet2DModel(
        sample_size=resolution // SIZE.factor,
        patch_size=resolution // SIZE.factor // grid,
        hidden_size=SIZE.hidden_size,
        num_layers=SIZE.num_layers,
        num_attention_heads=SIZE.hidden_size // 64,
        cross_attention_dim=TEXT_DIM,
    )
    return GrowableUNet2DConditionModel.from_core(core, resolution, block_out_channels=SIZE.channels)


def build_unet_2d_condition(resolution: int, width: int) -> UNet2DConditionModel:
    """Build a UNet that goes down to the same 16 x 16 grid and reads text there, as is usual in pixel space."""
    levels = (resolution // GRID).bit_length()
    channels = tuple(width // 2 * 2 if i == 0 else width * min(2**i, 4) for i in range(levels))  # even, for the norms
    return UNet2DConditionModel(
        sample_size=resolution,
        in_channels=3,
        out_channels=3,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * (levels - 1) + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
        cross_attention_dim=TEXT_DIM,
        attention_head_dim=max(4, SIZE.hidden_size // 64),  # diffusers takes this for the number of heads
        norm_num_groups=math.gcd(32, *channels),  # as in ours; few large groups are slow on a GPU
    )


def build_unet_2d(resolution: int, width: int) -> UNet2DModel:
    levels = (resolution // GRID).bit_length()
    channels = tuple(width // 2 * 2 if i == 0 else width * min(2**i, 4) for i in range(levels))  # even, for the norms
    return UNet2DModel(
        sample_size=resolution,
        in_channels=3,
        out_channels=3,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
        attention_head_dim=channels[0],
        norm_num_groups=math.gcd(32, *channels),
    )


def build_dit(resolution: int, width: int) -> DiTTransformer2DModel:
    """Build a DiT with as many tokens as our core; it reads a class instead of text."""
    return DiTTransformer2DModel(
        sample_size=resolution,
        patch_size=resolution // GRID,
        in_channels=3,
        out_channels=3,
        num_layers=SIZE.num_layers,
        num_attention_heads=max(4, SIZE.hidden_size // 64),
        attention_head_dim=width,
    )


def build_transformer(resolution: int, width: int) -> ShallowUNet2DModel:
    """Build a plain transformer on large patches of the image, as JiT is, with as many tokens as our core."""
    heads = max(1, SIZE.hidden_size // 64)
    return ShallowUNet2DModel(
        sample_size=resolution,
        patch_size=resolution // GRID,
        hidden_size=heads * ((width + 3) // 4 * 4),
        num_layers=SIZE.num_layers,
        num_attention_heads=heads,
        cross_attention_dim=TEXT_DIM,
    )


PEERS = {
    "UNet2DConditionModel": build_unet_2d_condition,
    "UNet2DModel": build_unet_2d,
    "DiTTransformer2DModel": build_dit,
    "plain transformer": build_transformer,
}
# Our model trains in three phases; the joint one is the first here.
OURS = ("ours", "ours, detail phase", "ours, core phase", "ours, 8 x 8 tokens")


def resolution_of(name: str, resolution: int) -> int:
    """Return the resolution at which a model trains."""
    return resolution // SIZE.factor if name == "ours, core phase" else resolution


def build(name: str, resolution: int) -> torch.nn.Module:
    """Build our model, or a peer of the width that brings its number of parameters closest to ours."""
    torch.manual_seed(0)
    if name.startswith("ours"):
        model = build_ours(resolution, grid=8 if "8 x 8" in name else GRID)
        if "core phase" in name:
            return model.core
        if "detail" in name:
            model.freeze_core()
        return model
    return PEERS[name](resolution, find_width(name, resolution))


@functools.cache
def find_width(name: str, resolution: int) -> int:
    """Return the width that gives a peer as many parameters as ours. A multiple of 8, which is fast on tensor cores, is
    preferred if it is within 5 %."""

    def count(width: int) -> int:
        return PEERS[name](resolution, width).num_parameters()

    with torch.device("meta"):
        goal = build_ours(resolution).num_parameters()
        widths = range(8, 600)
        index = bisect.bisect_left(widths, goal, key=count)
        differences = {width: abs(count(width) / goal - 1) for width in widths[max(index - 4, 0) : index + 4]}
    aligned = {width: difference for width, difference in differences.items() if width % 8 == 0 and difference < 0.05}
    return min(aligned or differences, key=(aligned or differences).__getitem__)


def call(model: torch.nn.Module, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    if isinstance(model, UNet2DModel):
        return model(sample, timestep, return_dict=False)[0]
    if isinstance(model, DiTTransformer2DModel):
        labels = torch.zeros(len(sample), dtype=torch.long, device=sample.device)
        return model(sample, timestep.long(), labels, return_dict=False)[0]
    return model(sample, timestep, text, return_dict=False)[0]


# ----------------------------------------------------------------------------------------------------------------------
# What is measured


def make_inputs(
    resolution: int,
    batch_size: int,
    device: torch.device | str,
    in_channels: int = 3,
    num_tokens: int = NUM_TOKENS,
    text_dim: int = TEXT_DIM,
) -> tuple[torch.Tensor, ...]:
    sample = torch.randn(batch_size, in_channels, resolution, resolution, device=device)
    timestep = torch.full((batch_size,), 500.0, device=device)
    return sample, timestep, torch.randn(batch_size, num_tokens, text_dim, device=device)


def count_flops(model: torch.nn.Module, resolution: int) -> int:
    """Count the operations of one image, forward and backward. The model moves to the meta device."""
    model = model.to("meta")
    with FlopCounterMode(display=False) as counter:
        call(model, *make_inputs(resolution, 1, "meta")).sum().backward()
    return counter.get_total_flops()


class Steps:
    """Training steps with an `optimizer` (adamw or muon) and sampling steps of one model, in autocast unless `dtype` is float32."""

    def __init__(
        self,
        model: torch.nn.Module,
        resolution: int,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        num_tokens: int = NUM_TOKENS,
        text_dim: int = TEXT_DIM,
        optimizer: str = "adamw",
    ):
        self.model = model.to(device)
        self.inputs = make_inputs(resolution, batch_size, device, model.config.in_channels, num_tokens, text_dim)
        self.autocast = functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups = [{"params": trained}]
        if optimizer == "muon":
            groups = split_for_muon(groups, model)
        kind = Muon if optimizer == "muon" else torch.optim.AdamW
        self.optimizer = kind(groups, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.01, fused=True)

    def train(self) -> None:
        self.model.train()
        with self.autocast():
            loss = (call(self.model, *self.inputs).float() - self.inputs[0][:, :3]).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def sample(self) -> None:
        self.model.eval()
        with self.autocast():
            call(self.model, *self.inputs)


def time_call(function: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations per second of one large matrix product, the median of several."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = [time_call(lambda: a @ b) for _ in range(20)]
    return 2 * size**3 / statistics.median(times[5:])


def measure_memory(name: str, resolution: int, batch_size: int) -> float:
    """
    Return the peak memory of a training step in MB, without what was held before the model was built. On a CPU the
    measurement is a process of its own, since freed memory is not returned reliably there.
    """
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.device("cuda"):
            steps = Steps(build(name, resolution), resolution_of(name, resolution), batch_size, torch.device("cuda"))
        for _ in range(2):
            steps.train()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    command = [
        sys.executable,
        "-m",
        "benchmarks.step_time",
        *sys.argv[1:],
        "--memory",
        name,
        str(resolution),
        str(batch_size),
    ]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_memory(name: str, resolution: int, batch_size: int) -> None:
    """Print what [`measure_memory`] returns, from its process."""
    before = peak = resident()
    done = Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident())

    thread = Thread(target=watch)
    thread.start()
    steps = Steps(build(name, resolution), resolution_of(name, resolution), batch_size, torch.device("cpu"))
    for _ in range(2):
        steps.train()
    done.set()
    thread.join()
    print((peak - before) / 2**20)


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    return resource.getpagesize() * int(open("/proc/self/statm", encoding="utf-8").read().split()[1])


def find_peak(device: torch.device) -> float | None:
    """Return the operations per second in bfloat16 that a GPU's data sheet names, or None for a device that is not in `PEAKS`."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((1e12 * peak for part, peak in PEAKS.items() if part in name), None)


def compile_model(model: torch.nn.Module, backend: str) -> None:
    """Compile a model's repeated blocks, as diffusers does, or the whole model if it names none."""
    torch._dynamo.config.recompile_limit = 64  # all models of a comparison share it
    if model._repeated_blocks:
        model.compile_repeated_blocks(backend=backend, dynamic=False)
    else:
        model.compile(backend=backend, dynamic=False)


def time_steps(
    steps: dict[str, Steps], repeats: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, list[float]], list[float]]:
    """Return the seconds of each model's training steps and sampling steps, and the rates of large matrix products between them."""
    train: dict[str, list[float]] = {name: [] for name in steps}
    sample: dict[str, list[float]] = {name: [] for name in steps}
    peaks = []
    for repeat in range(repeats + 1):  # the first one warms up
        for name, own in steps.items():
            seconds = time_call(own.train), time_call(own.sample)
            if repeat:
                train[name].append(seconds[0])
                sample[name].append(seconds[1])
        if repeat:
            peaks.append(matmul_peak(device, torch.bfloat16))
    return train, sample, peaks


def compare_models(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Return one row per resolution and model."""
    rows: list[Row] = []
    data_sheet = find_peak(device)
    for resolution in args.resolutions:
        names = args.models or [*OURS, *PEERS]
        sizes = {name: resolution_of(name, resolution) for name in names}
        with torch.device("meta"):
            flops = {name: count_flops(build(name, resolution), sizes[name]) for name in names}
        memory = {}
        if not args.without_memory:
            memory = {name: measure_memory(name, resolution, args.batch_size) for name in names}
        with device:
            steps = {name: Steps(build(name, resolution), sizes[name], args.batch_size, device) for name in names}
        if args.compiled:
            for own in steps.values():
                compile_model(own.model, args.backend or "inductor")
        train, sample, peaks = time_steps(steps, args.repeats, device)
        print(
            f"{resolution} px, matrix products in bfloat16, TFLOP/s: {spread([p / 1e12 for p in peaks])}", flush=True
        )
        for name in names:
            rates = [flops[name] * args.batch_size / seconds for seconds in train[name]]
            row: Row = {
                "px": resolution,
                "model": name,
                "parameters": f"{steps[name].model.num_parameters() / 1e6:.2f} M",
                "GFLOP per image": f"{flops[name] / 1e9:.2f}",
                "training images/s": f"{args.batch_size / statistics.median(train[name]):.1f}",
                "its step / ours": spread([peer / ours for ours, peer in zip(train[names[0]], train[name])]),
                "sampling step, images/s": f"{args.batch_size / statistics.median(sample[name]):.1f}",
                "its sampling step / ours": spread(
                    [peer / ours for ours, peer in zip(sample[names[0]], sample[name])]
                ),
                "share of peak": f"{statistics.median(rate / peak for rate, peak in zip(rates, peaks)):.1%}",
            }
            if data_sheet is not None:
                row["MFU by data sheet"] = f"{statistics.median(rates) / data_sheet:.1%}"
            if memory:
                row["memory MB"] = f"{memory[name]:.0f}"
            rows.append(row)
            print(json.dumps(row), flush=True)
        del steps
    return rows


def build_core(hidden_size: int) -> ShallowUNet2DModel:
    return ShallowUNet2DModel(
        sample_size=64,
        patch_size=4,
        hidden_size=hidden_size,
        num_layers=4,
        num_attention_heads=hidden_size // 64,
        cross_attention_dim=TEXT_DIM,
    )


def measure_core(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Return one row per precision and width: the core's training step as a share of the peak of large matrix products."""
    rows: list[Row] = []
    # A GPU computes float32 products in other formats, so their peak is not a bound there.
    for dtype in (torch.bfloat16,) if device.type == "cuda" else (torch.float32, torch.bfloat16):
        for hidden_size in args.hidden_sizes:
            with torch.device("meta"):
                flops = count_flops(build_core(hidden_size), 64) * args.batch_size
            model = build_core(hidden_size).to(device)
            if args.compiled:
                torch.compiler.reset()  # or graphs of earlier sizes would count against dynamo's limit
                model.compile_repeated_blocks(backend=args.backend or "inductor")
            inputs = make_inputs(64, args.batch_size, device)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

            def step() -> None:
                with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):  # noqa: B023
                    loss = call(model, *inputs).float().square().mean()  # noqa: B023
                loss.backward()
                optimizer.step()  # noqa: B023
                optimizer.zero_grad()  # noqa: B023

            step()  # warms up
            times, peaks = zip(*[(time_call(step), matmul_peak(device, dtype)) for _ in range(args.repeats)])
            row: Row = {
                "dtype": str(dtype).removeprefix("torch."),
                "hidden size": hidden_size,
                "peak TFLOP/s": spread([peak / 1e12 for peak in peaks]),
                "step TFLOP/s": spread([flops / seconds / 1e12 for seconds in times]),
                "share of peak": f"{statistics.median(flops / own / peak for own, peak in zip(times, peaks)):.0%}",
            }
            data_sheet = find_peak(device)
            if data_sheet is not None:
                row["MFU by data sheet"] = f"{flops / statistics.median(times) / data_sheet:.0%}"
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def make_reports(args: argparse.Namespace) -> dict[Path, str]:
    """Return the reports of the records that there are, by the files that they belong to."""
    command, reports = report_command("step_time", args), {}
    for name, (title, note) in REPORTS.items():
        sections = measured_sections(args.results_dir / f"{name}.json", num_keys=2)
        if sections:
            reports[args.results_dir / f"{name}.md"] = render_report(command, title, sections, note)
    return reports


def draw_plots(results: Path) -> None:
    for name in REPORTS:
        rows = read_rows(results / f"{name}.json")
        if rows:
            columns = ("px", "model", "training images/s") if "px" in rows[0] else CORE_COLUMNS
            draw_bars(rows, *columns, results / f"{name}.png")


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of [`Size`], which [`set_up`] reads."""
    parser.add_argument("--hidden_size", type=int, default=Size.hidden_size, help="The width of our core.")
    parser.add_argument("--num_layers", type=int, default=Size.num_layers, help="The layers of our core.")
    parser.add_argument("--channels", type=int, nargs="+", default=Size.channels, help="The channels of our stage.")
    parser.add_argument(
        "--factor", type=int, default=Size.factor, help="How many times smaller the core's images are."
    )


def set_up(args: argparse.Namespace) -> torch.device:
    """Let `build` use the size that the flags name, and torch compute attention as `grow.py` does. Return the device to measure on."""
    # Attention in plain torch, without a detour through float32
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    for name in ("hidden_size", "num_layers", "channels", "factor"):
        setattr(SIZE, name, getattr(args, name))
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    add_report_arguments(parser)
    parser.add_argument("--resolutions", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--hidden_sizes", type=int, nargs="+", default=[128, 512, 1024])
    add_size_arguments(parser)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--core", action="store_true", help="Measure the core alone.")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=[*OURS, *PEERS],
        help="The models to compare, all by default. Times are relative to the first.",
    )
    parser.add_argument("--compiled", action="store_true", help="Compile the models' blocks.")
    parser.add_argument("--backend", help="The backend of torch.compile, inductor by default; eager compiles nothing.")
    parser.add_argument(
        "--without_memory", action="store_true", help="Leave out the memory, which takes as long as the time."
    )
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    device = set_up(args)
    if args.memory:
        return print_memory(args.memory[0], int(args.memory[1]), int(args.memory[2]))
    if args.quick:
        args.resolutions, args.hidden_sizes, args.repeats = [64], [128], 2
    if not args.report:
        rows = measure_core(args, device) if args.core else compare_models(args, device)
        if args.quick:
            print(markdown(rows))
            return
        name = "step_time" + "_core" * args.core + "_compiled" * args.compiled
        keep_rows(args.results_dir / f"{name}.json", rows, "dtype" if args.core else "px", args)
    write_reports(make_reports(args))
    draw_plots(args.results_dir)


if __name__ == "__main__":
    main()
