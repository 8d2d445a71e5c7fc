# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
Does training wait for its data? The time of a training step with and without a loader.

    python -m benchmarks.loader --resolution 256 --batch_size 32 --num_workers 0 8
    python -m benchmarks.loader --report    # the report from the records

Images are JPEGs of `--image_size` pixels in parquet or WebDataset tar files, read as `grow.py` reads them. A step is one
of the detail phase, the cheapest at a resolution.
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
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from benchmarks.step_time import NUM_TOKENS, TEXT_DIM, build_ours
from benchmarks.tables import (
    Row,
    add_report_arguments,
    keep_rows,
    measured_sections,
    render_report,
    report_command,
    spread,
    write_reports,
)
from diffusers_greedy_grow.training.data.captioned import CaptionedImages
from diffusers_greedy_grow.training.data.images import normalize
from diffusers_greedy_grow.training.data.order import EpochOrder
from diffusers_greedy_grow.training.data.sources import load_captioned_data
from diffusers_greedy_grow.training.data.streaming import StreamedImages, StreamLoader, load_captioned_stream
from diffusers_greedy_grow.training.objective import draw_noise, flow_loss


NOTE = """
*model's share*: the time of a step on a batch that is there already, relative to a step with the loader, measured in turn;
median, smallest and largest. *waited*: the share of a step with the loader that passes before its batch arrives.
""".strip()


def write_images(folder: Path, count: int, size: int, num_files: int) -> None:
    """Write the same smooth images, which compress like photographs, to parquet and to tar files."""
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


def open_loader(
    source: str, folder: Path, args: argparse.Namespace, num_workers: int, num_batches: int
) -> torch.utils.data.DataLoader | StreamLoader:
    """Open a loader like those of `grow.py`."""
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
    streamed = StreamedImages(stream, first, args.resolution, shuffle_buffer_size=200)
    return StreamLoader(streamed, args.batch_size, 0, num_batches, 0, 1, num_workers, seed=(0,), pin_memory=pin_memory)


class Training:
    """Training steps of the detail phase, of the model that `step_time` measures."""

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

    def step(self, batch: dict[str, Any]) -> None:
        x0 = normalize(batch["pixel_values"].to(self.device, non_blocking=True))
        noise, sigma, _ = draw_noise((0,), 0, len(x0), x0.shape, 4.0, 0.3, 1.1, self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            losses = flow_loss(self.model, x0, noise, sigma, 4, "clean", encoder_hidden_states=self.text)
        losses.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def time(self, batches: Iterator[dict[str, Any]], steps: int) -> tuple[float, float]:
        """Return the seconds per step, and the share of them that passed while getting the batch."""
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


def measure(training: Training, source: str, folder: Path, args: argparse.Namespace, num_workers: int) -> Row:
    """Time the loader alone, the model alone, and both together."""
    ahead = 2 + 2 * num_workers  # batches that workers read before they are asked do not count
    batches = iter(open_loader(source, folder, args, num_workers, args.num_images // args.batch_size))
    next(batches)  # starts the workers
    started = time.perf_counter()
    count = sum(len(batch["caption"]) for batch in batches)
    alone = count / (time.perf_counter() - started)
    without, with_loader, waited = [], [], []
    num_batches = 1 + args.repeats * (ahead + args.steps)
    batches = iter(open_loader(source, folder, args, num_workers, num_batches))
    batch = next(batches)
    training.time(itertools.repeat(batch), 1)  # creates the optimizer's state
    for _ in range(args.repeats):  # in turn, since a machine's speed varies
        without.append(training.time(itertools.repeat(batch), args.steps)[0])
        training.time(batches, ahead)
        seconds, share = training.time(batches, args.steps)
        with_loader.append(seconds)
        waited.append(share)
    return {
        "data": source,
        "workers": num_workers,
        "loader alone, images/s": f"{alone:.0f}",
        "model alone, images/s": f"{args.batch_size / statistics.median(without):.0f}",
        "together, images/s": f"{args.batch_size / statistics.median(with_loader):.0f}",
        "model's share": spread([a / b for a, b in zip(without, with_loader)], 2),
        "waited": f"{statistics.median(waited):.1%}",
    }


def make_reports(args: argparse.Namespace) -> dict[Path, str]:
    """Return the report by the file that it belongs to."""
    sections = measured_sections(args.results_dir / "loader.json", num_keys=2)
    title = "Does training wait for its data? Full tables"
    return {args.results_dir / "loader.md": render_report(report_command("loader", args), title, sections, NOTE)}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    add_report_arguments(parser)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--image_size", type=int, default=96, help="The size of the files' images in pixels.")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--num_images", type=int, default=2048)
    parser.add_argument("--num_files", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30, help="The steps of each measurement.")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if not args.report:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
        training, rows = Training(args, device), []
        with tempfile.TemporaryDirectory() as folder:
            write_images(Path(folder), args.num_images, args.image_size, args.num_files)
            for source in ("parquet", "streamed parquet", "streamed tar"):
                for num_workers in args.num_workers:
                    rows.append(measure(training, source, Path(folder), args, num_workers))
                    print(json.dumps(rows[-1]), flush=True)
        keep_rows(args.results_dir / "loader.json", rows, "data", args)
    write_reports(make_reports(args))


if __name__ == "__main__":
    main()
