# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
What growing and loading cost, for large models: time and peak memory of `from_core` and `from_pretrained`, compared with
reading the grown weights from their file into memory (`load`) and with copying them in memory (`copy`). Every measurement
is a process of its own, and the arms alternate. Memory is what a measurement adds to what the process held before, such as
the weights of a core in memory.

    python -m benchmarks.grow_cost                       # 0.1, 0.5 and 1 billion parameters
    python -m benchmarks.grow_cost --sizes 8B            # needs 3 x 16 GB on disk and 20 GB of memory, in bfloat16
    python -m benchmarks.grow_cost --quick
    python -m benchmarks.grow_cost --report              # report and plot from the records
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

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


# The core's hidden size, layers and heads; the stage's channels.
SIZES = {
    "100M": (768, 8, 12, (128, 256)),
    "500M": (1536, 11, 24, (128, 256)),
    "1B": (2048, 13, 32, (192, 384)),
    "8B": (4096, 28, 64, (256, 512)),
}
ARMS = ("load", "copy", "from_pretrained core", "from_core(folder)", "from_core(model)", "from_pretrained grown")

NOTE = """
Seconds: median, smallest and largest. *time / load* and *time / copy*: relative to reading the weights from their file into
memory, and to copying them there. *memory / weights*: peak memory that is added, relative to the size of the weights.
""".strip()

# A thread samples the resident memory, since the kernel's own peak includes the imports. `from_pretrained` maps weights
# from their file; they count once they have been used, and the script uses all of them.
MEASURE = """
import sys, threading, time, resource, gc
arm, folder, dtype = sys.argv[1:]
import torch
from diffusers_greedy_grow import GrowableUNet2DConditionModel, ShallowUNet2DModel
from safetensors.torch import load_file
from pathlib import Path
dtype = getattr(torch, dtype)

def resident():
    return resource.getpagesize() * int(open("/proc/self/statm").read().split()[1])

core = None
if arm == "from_core(model)":
    core = ShallowUNet2DModel.from_pretrained(folder + "/core", dtype=dtype)
    for parameter in core.parameters():  # in memory, so that the measured time does not include reading it
        parameter.data = parameter.data.clone()
def load():
    paths = sorted(Path(folder, "grown").glob("*.safetensors"))
    return [tensor.clone() for path in paths for tensor in load_file(path).values()]

if arm == "copy":
    weights = load()
gc.collect()
before, peak, done = resident(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
channels = tuple(int(c) for c in open(folder + "/channels").read().split(","))
started = time.perf_counter()
if arm == "copy":
    parameters = [tensor.clone() for tensor in weights]
elif arm == "load":
    parameters = load()
else:
    if arm == "from_pretrained core":
        result = ShallowUNet2DModel.from_pretrained(folder + "/core", dtype=dtype)
    elif arm == "from_pretrained grown":
        result = GrowableUNet2DConditionModel.from_pretrained(folder + "/grown", dtype=dtype)
    elif arm == "from_core(folder)":
        result = GrowableUNet2DConditionModel.from_core(folder + "/core", 256, block_out_channels=channels, dtype=dtype)
    else:
        result = GrowableUNet2DConditionModel.from_core(core, 256, block_out_channels=channels)
    parameters = list(result.parameters())
# Use every page, so that every arm ends with all weights in memory.
total = sum(p.detach().view(-1)[:: 4096 // p.element_size()].float().sum().item() for p in parameters)
seconds = time.perf_counter() - started
done = True
thread.join()
print(seconds, max(peak, resident()) - before, sum(p.numel() * p.element_size() for p in parameters))
"""


def prepare(folder: Path, size: str, dtype: torch.dtype) -> int:
    """Save a core and a model grown from it, with repeated random numbers; return the grown model's number of parameters."""
    from diffusers_greedy_grow import GrowableUNet2DConditionModel, ShallowUNet2DModel

    hidden_size, num_layers, heads, channels = SIZES[size]
    with torch.device("meta"):
        core = ShallowUNet2DModel(
            sample_size=64,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_attention_heads=heads,
            cross_attention_dim=1024,
        )
    core.to(dtype).to_empty(device="cpu")
    numbers = 0.02 * torch.randn(2**22).to(dtype)  # to draw billions would take minutes
    for parameter in core.parameters():
        for part in parameter.data.view(-1).split(len(numbers)):
            part.copy_(numbers[: len(part)])
    core.save_pretrained(folder / "core")
    grown = GrowableUNet2DConditionModel.from_core(core, 256, block_out_channels=channels)
    del core
    grown.save_pretrained(folder / "grown")
    (folder / "channels").write_text(",".join(map(str, channels)), encoding="utf-8")
    return grown.num_parameters()


def measure(sizes: list[str], repeats: int, args: argparse.Namespace) -> list[Row]:
    """Return one row per size and arm."""
    rows: list[Row] = []
    for size in sizes:
        dtype = args.dtype or ("bfloat16" if size == "8B" else "float32")
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        try:
            parameters = prepare(folder, size, getattr(torch, dtype))
            measured: dict[str, list] = {arm: [] for arm in ARMS}
            for _ in range(repeats):
                for arm in ARMS:
                    command = [sys.executable, "-c", MEASURE, arm, str(folder), dtype]
                    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                    measured[arm].append([float(number) for number in output.split()[-3:]])
        finally:
            shutil.rmtree(folder)
        loaded, copied = ([seconds for seconds, _, _ in measured[arm]] for arm in ("load", "copy"))
        for arm in ARMS:
            seconds = [run[0] for run in measured[arm]]
            memory = statistics.median(run[1] for run in measured[arm])
            rows.append(
                {
                    "parameters": f"{parameters / 1e6:.0f} M {dtype}",
                    "arm": arm,
                    "seconds": spread(seconds),
                    "time / load": round(statistics.median(a / b for a, b in zip(seconds, loaded)), 2),
                    "time / copy": round(statistics.median(a / b for a, b in zip(seconds, copied)), 2),
                    "memory / weights": round(memory / measured[arm][0][2], 2),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def make_reports(args: argparse.Namespace) -> dict[Path, str]:
    """Return the report by the file that it belongs to."""
    sections = measured_sections(args.results_dir / "grow_cost.json", num_keys=2)
    title = "What do growing and loading cost? Full tables"
    return {args.results_dir / "grow_cost.md": render_report(report_command("grow_cost", args), title, sections, NOTE)}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    add_report_arguments(parser)
    parser.add_argument("--sizes", nargs="+", default=["100M", "500M", "1B"], choices=list(SIZES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default=None, help="float32 by default, and bfloat16 for 8B.")
    parser.add_argument("--folder", help="Where to put the models; a temporary folder by default.")
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.quick:
        print(markdown(measure(["100M"], 2, args)))
        return
    path = args.results_dir / "grow_cost.json"
    if not args.report:
        keep_rows(path, measure(args.sizes, args.repeats, args), "parameters", args)
    write_reports(make_reports(args))
    draw_bars(read_rows(path), "parameters", "arm", "time / load", args.results_dir / "grow_cost.png")


if __name__ == "__main__":
    main()
