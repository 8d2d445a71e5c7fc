# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
What growing and loading cost, for large models: time and peak memory of `from_core` and `from_pretrained`, against reading
the grown weights from their file into memory (`load`) and against copying them once there (`copy`). Every measurement is
a process of its own; arms alternate. Memory is what is added to what was there before: the weights of a core in memory,
say.

    python -m benchmarks.grow_cost                       # 0.1, 0.5 and 1 billion parameters
    python -m benchmarks.grow_cost --sizes 8B            # needs 3 x 16 GB on disk and 20 GB of memory, in bfloat16
    python -m benchmarks.grow_cost --quick
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

from benchmarks.tables import RESULTS, draw_bars, keep_rows, markdown, spread


# The core's hidden size, layers and heads; the stage's channels.
SIZES = {
    "100M": (768, 8, 12, (128, 256)),
    "500M": (1536, 11, 24, (128, 256)),
    "1B": (2048, 13, 32, (192, 384)),
    "8B": (4096, 28, 64, (256, 512)),
}
ARMS = ("load", "copy", "from_pretrained core", "from_core(folder)", "from_core(model)", "from_pretrained grown")

# Resident memory is sampled by a thread, since the peak that the kernel keeps would include importing. Weights that are
# mapped from their file, as `from_pretrained` does, count once they have been used, and all of them are.
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
    for parameter in core.parameters():  # in memory, so that reading it is no part of growing
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
    """Saves a core and a model grown from it, of random numbers that repeat, and returns the grown one's parameters."""
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
    numbers = 0.02 * torch.randn(2**22).to(dtype)  # drawing billions would take minutes
    for parameter in core.parameters():
        for part in parameter.data.view(-1).split(len(numbers)):
            part.copy_(numbers[: len(part)])
    core.save_pretrained(folder / "core")
    grown = GrowableUNet2DConditionModel.from_core(core, 256, block_out_channels=channels)
    del core
    grown.save_pretrained(folder / "grown")
    (folder / "channels").write_text(",".join(map(str, channels)))
    return grown.num_parameters()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--sizes", nargs="+", default=["100M", "500M", "1B"], choices=list(SIZES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default=None, help="float32, or bfloat16 for 8B.")
    parser.add_argument("--folder", help="Where to put the models; a temporary folder by default.")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    sizes, repeats = (["100M"], 2) if args.quick else (args.sizes, args.repeats)

    rows = []
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
    print(markdown(rows))
    if not args.quick:
        rows = keep_rows(RESULTS / "grow_cost.json", rows, "parameters", vars(args))
        draw_bars(rows, "parameters", "arm", "time / load", RESULTS / "grow_cost.png")


if __name__ == "__main__":
    main()
