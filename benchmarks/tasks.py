# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
What do the pipelines that start from an image do on held-out captioned shapes? Upscaling against interpolation, and inpainting of
half an image with and without resampling; with an example image of each task.

    python -m benchmarks.tasks --pipeline benchmarks/runs/x8-ours-673-0-seed-0/grown-128 --data benchmarks/runs/shapes-128px-20000
    python -m benchmarks.tasks --report                 # the report from the records
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from benchmarks.evaluate import GUIDANCE_SCALE, load_held_out, make_noise, score
from benchmarks.swd import sliced_wasserstein
from benchmarks.tables import (
    Row,
    add_report_arguments,
    keep_rows,
    measured_sections,
    render_report,
    report_command,
    write_reports,
)
from diffusers_greedy_grow import (
    GreedyGrowImg2ImgPipeline,
    GreedyGrowInpaintPipeline,
    GreedyGrowPipeline,
    GreedyGrowUpscalePipeline,
)
from diffusers_greedy_grow.flow import pool
from diffusers_greedy_grow.training.samples import draw_grid
from diffusers_greedy_grow.training.setup import has_native_bfloat16


NUM_INFERENCE_STEPS = 28
EXAMPLES = 8
NOTE = """
Held-out images of 128 px. *Upscaling*: from the image pooled to the core's resolution, with its caption. *PSNR*: of the result, pooled
again, to that small image, in dB. *SWD n*: sliced Wasserstein distance to the real images at the pyramid level of n px, in
thousandths. *Inpainting*: the right half of each image is drawn again, with its caption. *Shapes*, *textures*: share of the captions
that the images show.
""".strip()


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images))


def resize(images: torch.Tensor, size: int, filter: Image.Resampling) -> torch.Tensor:
    """Return images `(B, 3, h, w)` in [0, 1], enlarged by PIL."""
    resized = [image.resize((size, size), filter) for image in to_pil(images)]
    return VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(resized))


def run(pipeline: GreedyGrowPipeline, batches: list[tuple[Any, ...]], bfloat16: bool, **kwargs: Any) -> torch.Tensor:
    """Run a pipeline on batches of positional arguments, and return all images `(B, 3, R, R)` in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for number, batch in enumerate(batches):
        noise = make_noise(len(batch[0]), pipeline.unet.config.sample_size, seed=number)
        with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=bfloat16):
            output = pipeline(
                *batch, latents=noise, output_type="pt", num_inference_steps=NUM_INFERENCE_STEPS, **kwargs
            )
        images.append(output.images.float().cpu())
    return torch.cat(images)


def split(*parts: Any, size: int = 8) -> list[tuple[Any, ...]]:
    """Return batches of parts of equal length."""
    return [tuple(part[i : i + size] for part in parts) for i in range(0, len(parts[0]), size)]


def measure_upscaling(
    pipeline: GreedyGrowUpscalePipeline, captions: list[str], real: torch.Tensor, bfloat16: bool
) -> tuple[list[Row], dict[str, torch.Tensor]]:
    """Return a row per way to enlarge the pooled images, and the images."""
    size, scale = real.shape[-1], real.shape[-1] // pipeline.unet.sample_sizes[0]
    small = pool(real, scale)
    batches = split(small, captions)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "bicubic": lambda: resize(small, size, Image.Resampling.BICUBIC),
        "Lanczos": lambda: resize(small, size, Image.Resampling.LANCZOS),
        "grown model": lambda: run(pipeline, batches, bfloat16),
        "grown model, exact": lambda: run(pipeline, batches, bfloat16, exact=True),
        "grown model, without captions": lambda: run(pipeline, split(small, [""] * len(small)), bfloat16),
    }
    rows: list[Row] = []
    drawn = {"small": small}
    for name, enlarge in ways.items():
        drawn[name] = images = enlarge()
        error = (pool(images, scale) - small).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
        levels, scores = sliced_wasserstein(images, real), score(images, captions, real)
        rows.append(
            {
                "enlarged by": name,
                "PSNR, dB": f"{(-10 * error.log10()).mean():.1f}",
                "SWD " + " / ".join(map(str, levels)): " / ".join(f"{value:.0f}" for value in levels.values()),
                "shapes": f"{scores['shape']:.2f}",
                "textures": f"{scores['texture']:.2f}",
            }
        )
    return rows, drawn


def measure_inpainting(
    pipeline: GreedyGrowInpaintPipeline, captions: list[str], real: torch.Tensor, bfloat16: bool
) -> tuple[list[Row], dict[str, torch.Tensor]]:
    """Return a row per way to draw the right half of the images again, and the images."""
    mask = torch.zeros(1, 1, *real.shape[-2:])
    mask[..., mask.shape[-1] // 2 :] = 1
    masks = mask.expand(len(real), -1, -1, -1)
    batches = split(captions, real, masks)
    ways = {"without": {}, "jump_length=4, jump_n_sample=3": {"jump_length": 4, "jump_n_sample": 3}}
    rows: list[Row] = []
    drawn = {"masked": real * (1 - mask) + 0.5 * mask}
    for name, options in ways.items():
        drawn[name] = images = run(pipeline, batches, bfloat16, guidance_scale=GUIDANCE_SCALE, **options)
        scores = score(images, captions, real)
        kept = (images - real)[..., : real.shape[-1] // 2].abs().max().item()
        rows.append(
            {
                "resampling": name,
                "shapes": f"{scores['shape']:.2f}",
                "textures": f"{scores['texture']:.2f}",
                "sizes": f"{scores['size']:.2f}",
                "largest change of kept pixels, gray levels": f"{math.floor(255 * kept + 0.5)}",
            }
        )
    return rows, drawn


def draw_examples(
    pipeline: GreedyGrowPipeline, captions: list[str], sets: dict[str, torch.Tensor], path: Path
) -> None:
    """Write a grid of the first images of each set."""
    rows = {name: to_pil(images[:EXAMPLES]) for name, images in sets.items()}
    draw_grid(rows, captions[:EXAMPLES], path)


def measure(args: argparse.Namespace) -> None:
    pipeline = GreedyGrowPipeline.from_pretrained(args.pipeline)
    bfloat16 = has_native_bfloat16()
    if bfloat16:
        pipeline.unet.set_attention_backend("_native_math")
    captions, real = load_held_out(args.data, pipeline.unet.config.sample_size, args.num_images)
    results = args.results_dir
    rows, enlarged = measure_upscaling(GreedyGrowUpscalePipeline.from_pipe(pipeline), captions, real, bfloat16)
    keep_rows(results / "tasks_upscaling.json", rows, "enlarged by", args)
    rows, inpainted = measure_inpainting(GreedyGrowInpaintPipeline.from_pipe(pipeline), captions, real, bfloat16)
    keep_rows(results / "tasks_inpainting.json", rows, "resampling", args)
    # The other half of the prompts: each image becomes what the next caption says.
    turned = captions[1:EXAMPLES] + captions[:1]
    changed = run(
        GreedyGrowImg2ImgPipeline.from_pipe(pipeline),
        split(turned, real[:EXAMPLES]),
        bfloat16,
        strength=0.9,
        guidance_scale=GUIDANCE_SCALE,
    )
    draw_examples(pipeline, captions, {"image": real, **enlarged}, results / "tasks_upscaling.png")
    draw_examples(pipeline, captions, {"image": real, **inpainted}, results / "tasks_inpainting.png")
    draw_examples(pipeline, turned, {"image": real, "image to image": changed}, results / "tasks_img2img.png")


def make_reports(args: argparse.Namespace) -> dict[Path, str]:
    """Return the report by the file that it belongs to."""
    sections = [
        *measured_sections(args.results_dir / "tasks_upscaling.json"),
        *measured_sections(args.results_dir / "tasks_inpainting.json"),
    ]
    title = "What do the pipelines that start from an image do? Full tables"
    return {args.results_dir / "tasks.md": render_report(report_command("tasks", args), title, sections, NOTE)}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    add_report_arguments(parser)
    parser.add_argument("--pipeline", type=Path, help="The folder of a grown pipeline; required unless `--report`.")
    parser.add_argument("--data", help="The folder of its captioned shapes; required unless `--report`.")
    parser.add_argument("--num_images", type=int, default=96)
    args = parser.parse_args(argv)
    if not args.report and not (args.pipeline and args.data):
        parser.error("`--pipeline` and `--data` are required unless `--report` is given.")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if not args.report:
        measure(args)
    write_reports(make_reports(args))


if __name__ == "__main__":
    main()
