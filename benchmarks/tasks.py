# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
What do the pipelines that start from an image do on held-out captioned shapes? Upscaling against interpolation and a cascade's
super-resolution model, inpainting of half an image with and without resampling, and the levels inside the model; with an example
image of each task.

    python -m benchmarks.tasks --pipeline benchmarks/runs/x8-ours-673-0-seed-0/grown-128 --data benchmarks/runs/shapes-128px-20000
    python -m benchmarks.tasks ... --cascade benchmarks/runs/x8-cascade-seed-0/super-resolution
    python -m benchmarks.tasks ... --guiders            # guidance per frequency band; needs kornia
    python -m benchmarks.tasks --tiles                  # the memory of upscaling in tiles
    python -m benchmarks.tasks --report                 # the report from the records
"""

import argparse
import math
import multiprocessing
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from diffusers.guiders import FrequencyDecoupledGuidance
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from benchmarks.cascade import draw_cascade
from benchmarks.evaluate import GUIDANCE_SCALE, load_held_out, make_noise, score
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
    GrowableUNet2DConditionModel,
    ShallowUNet2DModel,
)
from diffusers_greedy_grow.flow import pool
from diffusers_greedy_grow.pipelines.pipeline_output import GreedyGrowPipelineOutput
from diffusers_greedy_grow.training.samples import draw_grid
from diffusers_greedy_grow.training.setup import has_native_bfloat16


NUM_INFERENCE_STEPS = 28
EXAMPLES, STRENGTH = 8, 0.5
# Of images that are upscaled by 4 in tiles of 128 px
SIDES = (128, 256, 512)
# Guidance scales of the stage's frequency bands and of the core's
BANDS = ((5.0, 2.0), (8.0, 3.0), (1.5, 4.0))
NOTE = """
Held-out images of 128 px. *Upscaling*: from the image pooled to the core's resolution, with its caption. *PSNR*: of the result, pooled
again, to that small image, in dB. *SWD n*: sliced Wasserstein distance to the real images at the pyramid level of n px, in
thousandths. *Inpainting*: the right half of each image is drawn again, with its caption. *Shapes*, *textures*: share of the captions
that the images show. *Levels*: `height=16` draws at the core's resolution alone, without the stage; `level_images` shows what
the core predicts in the last step of a run at 128 px. *Tiles*: peak memory of a process that upscales with untrained weights.
""".strip()


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images))


def resize(images: torch.Tensor, size: int, filter: Image.Resampling) -> torch.Tensor:
    """Return images `(B, 3, h, w)` in [0, 1], enlarged by PIL."""
    resized = [image.resize((size, size), filter) for image in to_pil(images)]
    return VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(resized))


def run_one(
    pipeline: GreedyGrowPipeline, batch: tuple[Any, ...], seed: int, bfloat16: bool, **kwargs: Any
) -> GreedyGrowPipelineOutput:
    """Run a pipeline on a batch of positional arguments; the images are `(B, 3, H, W)` in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    noise = make_noise(len(batch[0]), kwargs.get("height", pipeline.unet.config.sample_size), seed)
    with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=bfloat16):
        return pipeline(*batch, latents=noise, output_type="pt", num_inference_steps=NUM_INFERENCE_STEPS, **kwargs)


def run(pipeline: GreedyGrowPipeline, batches: list[tuple[Any, ...]], bfloat16: bool, **kwargs: Any) -> torch.Tensor:
    """Run a pipeline on batches of positional arguments, and return all images `(B, 3, R, R)` in [0, 1]."""
    outputs = [run_one(pipeline, batch, number, bfloat16, **kwargs) for number, batch in enumerate(batches)]
    return torch.cat([output.images.float().cpu() for output in outputs])


def split(*parts: Any, size: int = 8) -> list[tuple[Any, ...]]:
    """Return batches of parts of equal length."""
    return [tuple(part[i : i + size] for part in parts) for i in range(0, len(parts[0]), size)]


def format_distances(scores: dict[str, float]) -> Row:
    """Return the column of the distances at all levels, from what `score` returns."""
    levels = {name.removeprefix("swd_"): value for name, value in scores.items() if name.startswith("swd_")}
    return {"SWD " + " / ".join(levels): " / ".join(f"{value:.0f}" for value in levels.values())}


def measure_upscaling(
    pipeline: GreedyGrowUpscalePipeline,
    captions: list[str],
    real: torch.Tensor,
    bfloat16: bool,
    cascade: UNet2DConditionModel | None,
) -> tuple[list[Row], dict[str, torch.Tensor]]:
    """Return a row per way to enlarge the pooled images, and the images. `cascade` is a super-resolution model."""
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
    if cascade is not None:
        ways["cascade's UNet"] = lambda: draw_cascade(cascade, pipeline, small, captions, bfloat16)
    rows: list[Row] = []
    drawn = {"small": small}
    for name, enlarge in ways.items():
        drawn[name] = images = enlarge()
        error = (pool(images, scale) - small).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
        scores = score(images, captions, real)
        rows.append(
            {
                "enlarged by": name,
                "PSNR, dB": f"{(-10 * error.log10()).mean():.1f}",
                **format_distances(scores),
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


def measure_levels(
    pipeline: GreedyGrowPipeline, captions: list[str], real: torch.Tensor, bfloat16: bool
) -> tuple[list[Row], dict[str, torch.Tensor]]:
    """Return a row per way to draw at the core's resolution, and the images."""
    size, inner = pipeline.unet.config.sample_size, pipeline.unet.sample_sizes[0]

    def draw(side: int) -> tuple[dict[int, torch.Tensor], float]:
        options = {"height": side, "width": side, "guidance_scale": GUIDANCE_SCALE, "output_levels": True}
        started = time.perf_counter()
        outputs = [run_one(pipeline, batch, i, bfloat16, **options) for i, batch in enumerate(split(captions))]
        seconds = (time.perf_counter() - started) / len(captions)
        levels = [output.level_images or {} for output in outputs]
        return {level: torch.cat([one[level].float().cpu() for one in levels]) for level in levels[0]}, seconds

    (whole, whole_seconds), (alone, alone_seconds) = draw(size), draw(inner)
    drawn = {
        f"{size} px": whole[size],
        f"{size} px, pooled": pool(whole[size], size // inner),
        f"level_images[{inner}]": whole[inner],
        f"height={inner}, width={inner}": alone[inner],
    }
    seconds = [whole_seconds] * 3 + [alone_seconds]
    rows: list[Row] = []
    for (name, images), time_taken in zip(drawn.items(), seconds):
        scores = score(images, captions, pool(real, size // images.shape[-1]))
        rows.append(
            {
                "drawn": name,
                f"SWD {inner}": f"{scores[f'swd_{inner}']:.0f}",
                "colors": f"{scores['color']:.2f}",
                "shapes": f"{scores['shape']:.2f}",
                "seconds per image": f"{time_taken:.2f}",
            }
        )
    return rows, drawn


def measure_guiders(args: argparse.Namespace) -> None:
    """Record what guidance of separate strength per frequency band draws (`FrequencyDecoupledGuidance` of diffusers)."""
    pipeline, captions, real, bfloat16 = load(args)
    # The bands of a Laplacian pyramid, the highest first: three that the stage draws, and the core's.
    strengths = {"3 in all bands": [3.0] * 4}
    strengths |= {f"{high:g} in the stage's bands, {low:g} in the core's": [high] * 3 + [low] for high, low in BANDS}
    rows: list[Row] = []
    for name, scales in strengths.items():
        guider = FrequencyDecoupledGuidance(scales, stop=0.8)
        scores = score(run(pipeline, split(captions), bfloat16, guider=guider), captions, real)
        rows.append(
            {
                "guidance": name,
                **format_distances(scores),
                "shapes": f"{scores['shape']:.2f}",
                "textures": f"{scores['texture']:.2f}",
            }
        )
    keep_rows(args.results_dir / "tasks_guidance.json", rows, "guidance", args)


def peak_of_upscaling(side: int, tiled: bool) -> float:
    """Return the peak memory in GB of this process after it upscaled an image of `side` px by 4, in two steps."""
    torch.manual_seed(0)
    core = ShallowUNet2DModel(
        128, patch_size=8, hidden_size=64, num_layers=2, num_attention_heads=2, cross_attention_dim=None
    )
    unet = GrowableUNet2DConditionModel.from_core(core, 512, block_out_channels=(16, 24, 32)).eval()
    pipeline = GreedyGrowUpscalePipeline(unet, FlowMatchEulerDiscreteScheduler(shift=4.0))
    pipeline.set_progress_bar_config(disable=True)
    if not tiled:  # as if it had been trained at this size
        unet.register_to_config(sample_size=4 * side, inner_sample_sizes=(side,))
    pipeline(torch.rand(3, side, side), num_inference_steps=2, tile_overlap=32 if tiled else None, output_type="pt")
    # Not `ru_maxrss`, which begins with that of the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return int(kilobytes) * 1024 / 1e9


def measure_tiles(args: argparse.Namespace) -> None:
    """Record the peak memory of processes that upscale images of several sizes, in tiles and whole."""
    rows: list[Row] = []
    for side in SIDES:
        peaks = []
        for tiled in (True, False):
            with multiprocessing.get_context("spawn").Pool(1) as process:  # each measurement in a process of its own
                peaks.append(process.apply(peak_of_upscaling, (side, tiled)))
        rows.append(
            {
                "upscaled": f"{side} -> {4 * side} px",
                "in tiles, GB": f"{peaks[0]:.2f}",
                "as a whole, GB": f"{peaks[1]:.2f}",
            }
        )
    keep_rows(args.results_dir / "tasks_tiles.json", rows, "upscaled", args)


def draw_examples(captions: list[str], sets: dict[str, torch.Tensor], path: Path) -> None:
    """Write a grid of the first images of each set."""
    rows = {name: to_pil(images[:EXAMPLES]) for name, images in sets.items()}
    draw_grid(rows, captions[:EXAMPLES], path)


def load(args: argparse.Namespace) -> tuple[GreedyGrowPipeline, list[str], torch.Tensor, bool]:
    """Return the pipeline, held-out captions with their images, and whether to draw in bfloat16."""
    pipeline = GreedyGrowPipeline.from_pretrained(args.pipeline)
    bfloat16 = has_native_bfloat16()
    if bfloat16:
        pipeline.unet.set_attention_backend("_native_math")
    return pipeline, *load_held_out(args.data, pipeline.unet.config.sample_size, args.num_images), bfloat16


def measure(args: argparse.Namespace) -> None:
    pipeline, captions, real, bfloat16 = load(args)
    results = args.results_dir
    cascade = None
    if args.cascade is not None:
        cascade = UNet2DConditionModel.from_pretrained(args.cascade).eval()
        if bfloat16:
            cascade.set_attention_backend("_native_math")
    upscale = GreedyGrowUpscalePipeline.from_pipe(pipeline)
    rows, enlarged = measure_upscaling(upscale, captions, real, bfloat16, cascade)
    keep_rows(results / "tasks_upscaling.json", rows, "enlarged by", args)
    rows, inpainted = measure_inpainting(GreedyGrowInpaintPipeline.from_pipe(pipeline), captions, real, bfloat16)
    keep_rows(results / "tasks_inpainting.json", rows, "resampling", args)
    rows, levels = measure_levels(pipeline, captions, real, bfloat16)
    keep_rows(results / "tasks_levels.json", rows, "drawn", args)
    other = real[:EXAMPLES].roll(1, dims=0)  # each image becomes what the caption of the next one says
    changed = run(
        GreedyGrowImg2ImgPipeline.from_pipe(pipeline),
        split(captions[:EXAMPLES], other),
        bfloat16,
        strength=STRENGTH,
        guidance_scale=GUIDANCE_SCALE,
    )
    draw_examples(captions, {"image": real, **enlarged}, results / "tasks_upscaling.png")
    draw_examples(captions, {"image": real, **inpainted}, results / "tasks_inpainting.png")
    draw_examples(captions, levels, results / "tasks_levels.png")
    draw_examples(captions, {"image": other, "image to image": changed}, results / "tasks_img2img.png")
    gallery = {
        "text to image": next(iter(levels.values())),
        "its image": other,
        "image to image": changed,
        "its mask": inpainted["masked"],
        "inpainting": inpainted["jump_length=4, jump_n_sample=3"],
        "its small image": enlarged["small"],
        "upscaling": enlarged["grown model"],
    }
    draw_examples(captions, gallery, results / "tasks_gallery.png")


def make_reports(args: argparse.Namespace) -> dict[Path, str]:
    """Return the report by the file that it belongs to."""
    names = ("upscaling", "inpainting", "levels", "guidance", "tiles")
    sections = [part for name in names for part in measured_sections(args.results_dir / f"tasks_{name}.json")]
    title = "What do the pipelines that start from an image do? Full tables"
    return {args.results_dir / "tasks.md": render_report(report_command("tasks", args), title, sections, NOTE)}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    add_report_arguments(parser)
    parser.add_argument("--pipeline", type=Path, help="The folder of a grown pipeline; required unless `--report`.")
    parser.add_argument("--data", help="The folder of its captioned shapes; required unless `--report`.")
    parser.add_argument("--num_images", type=int, default=96)
    parser.add_argument("--cascade", type=Path, help="The folder of a cascade's UNet, to compare its upscaling.")
    parser.add_argument("--guiders", action="store_true", help="Only draw with guidance per frequency band.")
    parser.add_argument("--tiles", action="store_true", help="Only measure the memory of upscaling in tiles.")
    args = parser.parse_args(argv)
    if not (args.report or args.tiles) and not (args.pipeline and args.data):
        parser.error("`--pipeline` and `--data` are required unless `--report` or `--tiles` is given.")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.tiles:
        measure_tiles(args)
    elif args.guiders:
        measure_guiders(args)
    elif not args.report:
        measure(args)
    write_reports(make_reports(args))


if __name__ == "__main__":
    main()
