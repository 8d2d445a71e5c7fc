# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
Draw the picture of docs/troubleshooting.md: samples of models and settings that have one thing wrong each.

    python -m benchmarks.troubleshooting --core benchmarks/runs/core-h128-l6-2087-seed-0/core \
        --grown benchmarks/runs/x8-ours-673-0-seed-0/grown-128 --data benchmarks/runs/shapes-128px-20000
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from benchmarks.evaluate import load_held_out, make_noise
from benchmarks.tables import ROOT
from benchmarks.tasks import to_pil
from diffusers_greedy_grow import GreedyGrowPipeline
from diffusers_greedy_grow.training.parsing import parse_channels
from diffusers_greedy_grow.training.samples import draw_grid
from diffusers_greedy_grow.training.setup import has_native_bfloat16


COUNT, GUIDANCE_SCALE = 6, 3.0
CHANNELS = "64,96"


def train(args: argparse.Namespace, name: str, *flags: str) -> Path:
    """Train by grow.py into a folder of that name, and return it."""
    folder = Path(args.work_dir) / name
    command = [sys.executable, str(ROOT / "training_examples" / "grow.py"), "--output_dir", str(folder), *flags]
    precision = ["--mixed_precision", "bf16", "--attention_backend", "_native_math"] if has_native_bfloat16() else []
    shared = ["--train_data_dir", args.data, "--block_out_channels", CHANNELS, "--num_scored_images", "0"]
    if not (folder / "samples.png").exists():
        subprocess.run([*command, *shared, *precision], check=True)
    return folder


def draw(pipeline: GreedyGrowPipeline, captions: list[str], **kwargs: Any) -> list[Image.Image]:
    pipeline.set_progress_bar_config(disable=True)
    noise = make_noise(len(captions), pipeline.unet.config.sample_size)
    arguments = {"guidance_scale": GUIDANCE_SCALE, "output_type": "pt", **kwargs}
    return to_pil(pipeline(captions, latents=noise, **arguments).images)


def collect(args: argparse.Namespace, captions: list[str]) -> dict[str, list[Image.Image]]:
    """Return a row of images per name."""
    good = GreedyGrowPipeline.from_pretrained(args.grown)
    size, inner = good.unet.config.sample_size, good.unet.sample_sizes[0]
    rows = {"good": draw(good, captions)}
    rows["just grown"] = draw(GreedyGrowPipeline.from_core(args.core, size, parse_channels(CHANNELS)), captions)

    resolutions = ["--resolutions", str(inner), str(size)]
    stage = ["--detail_steps", str(args.steps), "--joint_steps", "0", "--train_batch_size", "16"]
    core = ["--core_steps", str(args.steps), "--patch_size", "2", "--hidden_size", "128", "--num_layers", "6"]
    heads = ["--num_attention_heads", "2"]
    folder = train(args, "short-core", *resolutions, *core, *heads, *stage)
    rows["core too short"] = draw(GreedyGrowPipeline.from_pretrained(folder / f"grown-{size}"), captions)
    levels = ["--core", args.core, "--logit_mean", "1.0"]
    folder = train(args, "core-levels", *resolutions, *levels, *stage)
    rows["stage at the core's noise levels"] = draw(
        GreedyGrowPipeline.from_pretrained(folder / f"grown-{size}"), captions
    )

    rows["too much guidance"] = draw(good, captions, guidance_scale=20.0, guidance_stop=1.0)
    rows["no guidance"] = draw(good, captions, guidance_scale=1.0)
    shift = good.scheduler.config.shift * inner / size
    wrong = GreedyGrowPipeline.from_pipe(good, scheduler=FlowMatchEulerDiscreteScheduler(shift=shift))
    rows["scheduler of another resolution"] = draw(wrong, captions)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    parser.add_argument("--core", required=True, help="The folder of a trained core.")
    parser.add_argument("--grown", required=True, help="The folder of a model that was grown from it and trained.")
    parser.add_argument("--data", required=True, help="The folder of their captioned shapes.")
    parser.add_argument("--steps", type=int, default=250, help="Of the runs that go wrong.")
    parser.add_argument("--work_dir", default="benchmarks/runs/troubleshooting")
    parser.add_argument("--out", default=str(ROOT / "assets" / "troubleshooting.png"))
    args = parser.parse_args(argv)
    size = GreedyGrowPipeline.from_pretrained(args.grown).unet.config.sample_size
    captions, _ = load_held_out(args.data, size, COUNT)
    draw_grid(collect(args, captions), captions, args.out)


if __name__ == "__main__":
    main()
