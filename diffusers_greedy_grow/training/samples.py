# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Sample images: drawn from the same noise in all phases, and laid out as a grid with their captions."""

import json
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.utils import make_image_grid
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..flow import descend
from ..pipelines import GreedyGrowPipeline
from .arguments import LoopArguments
from .files import save_image
from .labels import LINE_HEIGHT, draw_lines, wrap
from .phases import Phase
from .run import Run
from .seeds import sample_generators


# Takes the place of the phase's index in the keys of random numbers. Phases have small indices, so no keys are equal.
SAMPLES = 1001
# The most lines of a caption in a grid, which is cut with an ellipsis.
CAPTION_LINES = 4


def draw_in_batches(
    pipeline: GreedyGrowPipeline, prompts: list[str], accelerator: Accelerator, args: LoopArguments, **per_image
) -> list[Image.Image]:
    """
    Draw one image per prompt, 32 at a time.

    Args:
        pipeline ([`GreedyGrowPipeline`]): The pipeline.
        prompts (`list[str]`): The prompts.
        accelerator (`Accelerator`): For its autocast.
        args (`LoopArguments`): For `num_inference_steps` and `guidance_scale`.
        per_image: Arguments of the pipeline that hold one entry per image: `latents` or `generator`.
    """
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(prompts), 32):
        part = slice(start, start + 32)
        with accelerator.autocast():
            images += pipeline(
                prompts[part],
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                **{name: values[part] for name, values in per_image.items()},
            ).images
    return images


class Samples:
    """
    The samples of a run, all from the same noise: it is drawn at the final resolution and pooled down to each phase's.

    Args:
        run (`Run`): The run.
        args (`LoopArguments`): For the seed, the number of steps and the guidance scale.
        captions (`list[str]`): The captions of the sample grid.
        resolution (`int`): The final resolution.
    """

    def __init__(self, run: Run, args: LoopArguments, captions: list[str], resolution: int):
        self.run, self.args, self.captions, self.resolution = run, args, captions, resolution
        self.folder = run.output_dir / "samples"

    def draw(self, pipeline: GreedyGrowPipeline, captions: list[str]) -> list[Image.Image]:
        """Draw one image per caption."""
        size, device = pipeline.unet.config.sample_size, self.run.accelerator.device
        generators = sample_generators((self.args.seed, SAMPLES), 0, len(captions))
        shape = (len(captions), pipeline.unet.config.in_channels, self.resolution, self.resolution)
        noise = randn_tensor(shape, generator=generators, device=device)
        if self.resolution > size:
            noise, _ = descend(noise, torch.ones(1, device=device), self.resolution // size)
        return draw_in_batches(pipeline, captions, self.run.accelerator, self.args, latents=noise)

    def draw_step(self, phase: Phase, step: int, pipeline: GreedyGrowPipeline) -> None:
        """Draw the sample grid's captions with the weights after `step` of `phase`, for a file and for the trackers."""
        components = {name: getattr(pipeline, name) for name in ("unet", "text_encoder")}
        devices = {name: component.device for name, component in components.items()}
        pipeline.to(self.run.accelerator.device).unet.eval()
        images = self.draw(pipeline, self.captions)
        self.folder.mkdir(exist_ok=True)
        name = f"{phase.name}-{step}"
        draw_grid({f"{phase.name} {step}": images}, self.captions, self.folder / f"{name}.png")
        for tracker in self.run.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                arrays = np.stack([np.asarray(image) for image in images])
                kwargs = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                step_of_run = self.run.total_steps(phase, step)
                tracker.log_images({f"{phase.name}/samples": arrays}, step=step_of_run, **kwargs)
        pipeline.unet.train()
        # Training needs neither the text encoder of cached embeddings nor a whole copy of sharded weights on the GPU.
        for name, component in components.items():
            component.to(devices[name])

    def add_row(self, phase: Phase, pipeline: GreedyGrowPipeline) -> list[Image.Image]:
        """Add the row of a finished phase to the sample grid, `samples.png`, and return its images."""
        self.folder.mkdir(exist_ok=True)
        images = self.draw(pipeline, self.captions)
        strip = make_image_grid(images, rows=1, cols=len(self.captions))
        captions, info = json.dumps(self.captions), PngInfo()
        info.add_text("captions", captions)
        strip.save(self.folder / f"{phase.name}.png", pnginfo=info)
        rows = {}
        for name in (phase.name for phase in self.run.phases):
            path = self.folder / f"{name}.png"  # rows of phases that an earlier session finished are there as files
            if path.exists() and (row := Image.open(path)).info.get("captions") == captions:  # which may have changed
                size = row.height
                rows[name] = [row.crop((i * size, 0, (i + 1) * size, size)) for i in range(row.width // size)]
        draw_grid(rows, self.captions, self.run.output_dir / "samples.png")
        return images


def draw_grid(rows: dict[str, list[Image.Image]], captions: list[str], path: str | Path) -> None:
    """Write a grid to the PNG `path`. The other arguments are those of [`make_grid`]."""
    save_image(make_grid(rows, captions), Path(path))


def make_grid(rows: dict[str, list[Image.Image]], captions: list[str]) -> Image.Image:
    """
    Return a grid: one row of images per entry of `rows`, with its name on the left, and the captions below. All images have
    the size of the largest, at least 128 pixels per side, and are enlarged without smoothing.

    Args:
        rows (`dict[str, list[Image.Image]]`): For each row's name, one square image per caption.
        captions (`list[str]`): Printed under the columns.
    """
    image_size = max(128, *(image.width for images in rows.values() for image in images))
    texts = [wrap(caption, image_size - 2, CAPTION_LINES) for caption in captions]
    lines = max(1, *map(len, texts))
    margin, gap = 96, 4
    width = margin + len(captions) * (image_size + gap)
    height = len(rows) * (image_size + gap) + lines * LINE_HEIGHT + 2 * gap
    grid = Image.new("RGB", (width, height), "white")
    for row, (name, images) in enumerate(rows.items()):
        top = row * (image_size + gap)
        draw_lines(grid, 4, top + image_size // 2 - 7, wrap(name, margin - 8, CAPTION_LINES))
        for column, image in enumerate(images):
            image = image.convert("RGB").resize((image_size, image_size), Image.Resampling.NEAREST)
            grid.paste(image, (margin + column * (image_size + gap), top))
    for column, text in enumerate(texts):
        draw_lines(grid, margin + column * (image_size + gap) + 1, height - lines * LINE_HEIGHT - gap, text)
    return grid


def stack_grids(grids: list[Image.Image]) -> Image.Image:
    """Return grids below one another, on white."""
    whole = Image.new("RGB", (max(grid.width for grid in grids), sum(grid.height for grid in grids)), "white")
    top = 0
    for grid in grids:
        whole.paste(grid, (0, top))
        top += grid.height
    return whole
