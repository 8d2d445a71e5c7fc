# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
How much of a training step is the model, and how much is waiting for data:

    python -m benchmarks.loader --resolution 256 --batch_size 32 --num_workers 0 8

Images are JPEGs of `--image_size` pixels in parquet or WebDataset tar files, read as `grow.py` reads them. A step is one
of the detail phase, the cheapest that there is at a resolution. `model's share` is the time of a step on a batch that is
there already, over that of a step with a loader, measured in turn; `waited` is the share of the latter that passes before
the loader has handed over its batch.
"""

import argparse
import io
import itertools
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from diffusers_greedy_grow.training.data.captioned import CaptionedImages
from diffusers_greedy_grow.training.data.images import normalize
from diffusers_greedy_grow.training.data.order import EpochOrder
from diffusers_greedy_grow.training.data.sources import load_captioned_data
from diffusers_greedy_grow.training.data.streaming import StreamedImages, StreamLoader, load_captioned_stream
from diffusers_greedy_grow.training.objective import draw_noise, flow_loss

from .step_time import NUM_TOKENS, TEXT_DIM, build_ours
from .tables import RESULTS, describe_machine, markdown, spread, write_json


def write_images(folder: Path, count: int, size: int, num_files: int) -> None:
    """The same smooth noise, as photographs have it, in parquet and in tar files."""
    rng = np.random.default_rng(0)
    files: list[list[bytes]] = [[] for _ in range(num_files)]
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (size // 8, size // 8, 3)).astype(np.uint8))
        buffer = io.BytesIO()
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(buffer, format="JPEG", quality=90)
        files[i % num_files].append(buffer.getvalue())
    features = Features({"image": ImageFeature(), "text": Value("string")})
    for name in ("parquet", "tar"):
        (folder / name).mkdir()
    for i, images in enumerate(files):
        captions = [f"image {j} of file {i}" for j in range(len(images))]
        rows = {"image": [{"bytes": content, "path": None} for content in images], "text": captions}
        Dataset.from_dict(rows, features=features).to_parquet(folder / "parquet" / f"{i}.parquet")
        with tarfile.open(folder / "tar" / f"{i}.tar", "w") as archive:
            for j, (image, caption) in enumerate(zip(images, captions)):
                for extension, content in (("jpg", image), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{j:06}.{extension}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def open_loader(source: str, folder: Path, args: argparse.Namespace, num_workers: int, num_batches: int):
    pin_memory = torch.cuda.is_available()
    if source == "parquet":
        rows, _ = load_captioned_data(None, str(folder / "parquet"), "image", "text")
        images = CaptionedImages(rows, args.resolution, max_cache_bytes=0)  # as if they did not fit
        order = EpochOrder(len(images), 0, num_batches * args.batch_size, seed=(0,))
        return torch.utils.data.DataLoader(
            images, args.batch_size, sampler=order, num_workers=num_workers, pin_memory=pin_memory
        )
    kind, columns = ("parquet", ("image", "text")) if source == "streamed parquet" else ("tar", ("jpg", "txt"))
    stream, _, first = load_captioned_stream(None, str(folder / kind), *columns, 0)
    images = StreamedImages(stream, first, args.resolution, shuffle_buffer_size=200)
    return StreamLoader(images, args.batch_size, 0, num_batches, 0, 1, num_workers, seed=(0,), pin_memory=pin_memory)


class Training:
    """Steps of the detail phase of a model as in the other tables."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        torch.manual_seed(0)
        self.device = device
        self.model = build_ours(args.resolution).to(device)
        self.model.freeze_core()
        if device.type == "cpu":
            self.model.set_attention_backend("_native_math")
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        self.text = torch.randn(args.batch_size, NUM_TOKENS, TEXT_DIM, device=device)

    def step(self, batch: dict) -> None:
        x0 = normalize(batch["pixel_values"].to(self.device, non_blocking=True))
        noise, sigma, _ = draw_noise((0,), 0, len(x0), x0.shape, 4.0, 0.3, 1.1, self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            losses = flow_loss(self.model, x0, noise, sigma, 4, "clean", encoder_hidden_states=self.text)
        losses.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def time(self, batches: Iterator[dict], steps: int) -> tuple[float, float]:
        """Seconds per step, and which share of them was spent on getting the batch."""
        self.synchronize()
        started, waited = time.perf_counter(), 0.0
        for _ in range(steps):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            self.step(batch)
        self.synchronize()
        seconds = time.perf_counter() - started
        return seconds / steps, waited / seconds

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--image_size", type=int, default=96, help="Of the files.")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--num_images", type=int, default=2048)
    parser.add_argument("--num_files", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30, help="Of each measurement.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default=str(RESULTS / "loader.json"))
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    training, rows = Training(args, device), []
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), args.num_images, args.image_size, args.num_files)
        for source in ("parquet", "streamed parquet", "streamed tar"):
            for num_workers in args.num_workers:
                ahead = 2 + 2 * num_workers  # what workers have read while they were not asked does not count
                batches = iter(
                    open_loader(source, Path(folder), args, num_workers, args.num_images // args.batch_size)
                )
                next(batches)  # workers start
                started = time.perf_counter()
                count = sum(len(batch["caption"]) for batch in batches)
                alone = count / (time.perf_counter() - started)
                without, with_loader, waited = [], [], []
                num_batches = 1 + args.repeats * (ahead + args.steps)
                batches = iter(open_loader(source, Path(folder), args, num_workers, num_batches))
                batch = next(batches)
                training.time(itertools.repeat(batch), 1)  # makes the optimizer's state
                for _ in range(args.repeats):  # in turn, since a machine has its moods
                    without.append(training.time(itertools.repeat(batch), args.steps)[0])
                    training.time(batches, ahead)
                    seconds, share = training.time(batches, args.steps)
                    with_loader.append(seconds)
                    waited.append(share)
                del batches
                rows.append(
                    {
                        "data": source,
                        "workers": num_workers,
                        "loader alone, images/s": f"{alone:.0f}",
                        "model alone, images/s": f"{args.batch_size / statistics.median(without):.0f}",
                        "together, images/s": f"{args.batch_size / statistics.median(with_loader):.0f}",
                        "model's share": spread([a / b for a, b in zip(without, with_loader)], 2),
                        "waited": f"{statistics.median(waited):.1%}",
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    print(markdown(rows))
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    write_json(Path(args.output), {"machine": describe_machine(), "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
