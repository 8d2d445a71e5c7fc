# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Draw with one model for many users: runs that can be watched and stopped. Nothing here knows of a page."""

import copy
import math
import queue
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from PIL import Image, ImageChops, ImageOps

from diffusers_greedy_grow import (
    GreedyGrowImg2ImgPipeline,
    GreedyGrowInpaintPipeline,
    GreedyGrowPipeline,
    GreedyGrowUpscalePipeline,
)
from diffusers_greedy_grow.pipelines.prompts import find_truncated
from diffusers_greedy_grow.pipelines.schedules import shift_name

from ..drawing import read_core_first, save, to_mode


TEXT, IMAGE, INPAINT, UPSCALE = "text to image", "image to image", "inpainting", "upscaling"
TASKS: dict[str, type[GreedyGrowPipeline]] = {
    TEXT: GreedyGrowPipeline,
    IMAGE: GreedyGrowImg2ImgPipeline,
    INPAINT: GreedyGrowInpaintPipeline,
    UPSCALE: GreedyGrowUpscalePipeline,
}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
# The schedulers to choose from, the name of the shift, and the settings with which they do flow matching
SCHEDULERS: dict[str, tuple[type[SchedulerMixin], str, dict[str, Any]]] = {
    "Euler": (FlowMatchEulerDiscreteScheduler, "shift", {}),
    "Heun": (FlowMatchHeunDiscreteScheduler, "shift", {}),
    "UniPC": (UniPCMultistepScheduler, "flow_shift", FLOW),
    "DPM-Solver multistep": (DPMSolverMultistepScheduler, "flow_shift", FLOW),
}
# A larger image would be drawn in more tiles than a visitor should ask for.
TILES_PER_SIDE_MAX = 8


@dataclass
class Settings:
    """
    What a user asks for.

    Args:
        task (`str`): One of [`TASKS`].
        scheduler (`str`): One of [`SCHEDULERS`], or the name of the model's own.
        core_first (`str`): "off", "auto" or a noise level.
        lora (`str`), lora_scale (`float`): An adapter and its weight; none if empty.
        image, mask (`PIL.Image.Image`, *optional*): What to begin with, and in white where it is drawn again.
        in_tiles (`bool`): Whether to upscale a larger image in tiles, instead of making it smaller first.
        prompt, negative_prompt, seed, height, width, num_inference_steps, guidance_scale, strength, exact: As in the pipelines.
    """

    task: str = TEXT
    prompt: str = ""
    negative_prompt: str = ""
    seed: int = 0
    height: int | None = None
    width: int | None = None
    num_inference_steps: int = 28
    guidance_scale: float = 4.0
    scheduler: str = "Euler"
    core_first: str = "off"
    lora: str = ""
    lora_scale: float = 1.0
    strength: float = 1.0
    exact: bool = False
    in_tiles: bool = False
    image: Image.Image | None = None
    mask: Image.Image | None = None

    def list_used(self) -> dict[str, Any]:
        """Return the settings that had an effect, for the text of a PNG; its names are those of `greedy-grow sample`."""
        unused = {"image", "mask"}
        unused |= {TEXT: {"strength", "exact", "in_tiles"}, UPSCALE: {"height", "width", "core_first"}}.get(
            self.task, {"exact", "in_tiles"}
        )
        unused |= set() if self.lora else {"lora_scale"}
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in unused}


class Run:
    """
    A drawing that waits for its turn, is being made, or has ended.

    Args:
        settings ([`Settings`]): What is drawn.
        step (`int`), num_steps (`int`): How many steps are done, and how many there are; 0 before the first.
        seconds (`float`): How long it took.
        is_truncated (`bool`): Whether the model does not read a prompt to its end.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.step = self.num_steps = 0
        self.seconds = 0.0
        self.is_stopped = self.is_truncated = False
        self.future: Future
        self.predictions: queue.SimpleQueue = queue.SimpleQueue()

    def stop(self) -> None:
        """Let the run end after the step that it is in, unless it has ended."""
        self.is_stopped = self.is_stopped or not self.future.done()

    def on_step_end(self, pipeline: GreedyGrowPipeline, step: int, timestep: Any, tensors: dict) -> dict:
        """Keep the clean image that a step predicts; `callback_on_step_end` of the pipelines."""
        order = pipeline.scheduler.order
        self.step, self.num_steps = math.ceil((step + 1) / order), math.ceil(pipeline.num_timesteps / order)
        self.predictions.put(tensors["pred_original_sample"])
        pipeline._interrupt = self.is_stopped
        return {}

    def watch(self) -> Iterator[torch.Tensor]:
        """Yield the clean images `(1, C, H, W)` in [-1, 1] that the steps predict, only the latest if the reader is slow."""
        while (prediction := self.predictions.get()) is not None:
            while not self.predictions.empty():
                if (later := self.predictions.get()) is None:
                    return
                prediction = later
            yield prediction

    def result(self) -> tuple[Image.Image, dict[int, Image.Image]]:
        """
        Wait for the end. Return the image and those of the levels inside by their resolution, or raise the error that ended
        the run.
        """
        output = self.future.result()
        levels = {size: images[0] for size, images in (output.level_images or {}).items()}
        return output.images[0], levels


class Studio:
    """
    A model and its users. Runs are made one after the other, in one thread, each by a pipeline and a scheduler of its own around
    the shared weights: so none stops another one or changes its adapter.

    Args:
        pipeline ([`GreedyGrowPipeline`]): The model.
        name (`str`), revision (`str`, *optional*): Its folder or repository.

    Raises:
        `ValueError`: if the model needs prompts but has no encoder for them.
    """

    def __init__(self, pipeline: GreedyGrowPipeline, name: str, revision: str | None = None):
        if pipeline.unet.config.cross_attention_dim is not None and pipeline.text_encoder is None:
            raise ValueError(
                f"`{name}` has no text encoder, so it cannot read prompts: save it with the one it was trained with."
            )
        self.pipeline, self.name, self.revision = pipeline, name, revision
        self.has_text = pipeline.unet.config.cross_attention_dim is not None
        self.levels = pipeline.unet.image_sizes
        own = next((name for name, (kind, *_) in SCHEDULERS.items() if type(pipeline.scheduler) is kind), None)
        self.own_scheduler = own or type(pipeline.scheduler).__name__
        self.schedulers = list(dict.fromkeys([self.own_scheduler, *SCHEDULERS]))
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="drawing")
        self.runs: set[Run] = set()

    def start(self, settings: Settings) -> Run:
        """Check settings and let a run begin when its turn comes. Raise a `ValueError` if something is missing."""
        if self.has_text and settings.task != UPSCALE and not settings.prompt.strip():
            raise ValueError("The prompt is empty: type what to draw.")
        if settings.task != TEXT and settings.image is None:
            raise ValueError("There is no image to begin with: drop or upload one.")
        if settings.task == INPAINT and (settings.mask is None or not settings.mask.getbbox()):
            raise ValueError("There is no mask: paint over the part of the image that is to be drawn again.")
        run = Run(settings)
        self.runs.add(run)
        run.future = self.executor.submit(self.draw, run)
        run.future.add_done_callback(lambda future: self.runs.discard(run))
        return run

    def close(self) -> None:
        """Stop all runs."""
        for run in list(self.runs):
            run.stop()
        self.executor.shutdown(cancel_futures=True)

    def draw(self, run: Run) -> Any:
        """Draw what a run asks for, in the thread of all runs. Return the pipeline's output, or None if it was stopped before."""
        began = time.monotonic()
        try:
            if run.is_stopped:
                return None
            settings = run.settings
            self.load_lora(settings.lora)
            scheduler = make_scheduler(self.pipeline.scheduler, settings.scheduler)
            pipeline: Any = TASKS[settings.task].from_pipe(self.pipeline, scheduler=scheduler)
            pipeline.set_progress_bar_config(disable=True)
            run.is_truncated = self.has_text and bool(self.find_truncated(settings))
            return pipeline(
                **self.make_arguments(settings, pipeline),
                callback_on_step_end=run.on_step_end,
                callback_on_step_end_tensor_inputs=["pred_original_sample"],
            )
        finally:
            run.seconds = time.monotonic() - began
            run.predictions.put(None)

    def load_lora(self, lora: str) -> None:
        """Load an adapter instead of the one before, or none. It is read again each time: it may have been trained further."""
        self.pipeline.unload_lora_weights()
        if lora:
            self.pipeline.load_lora_weights(lora)

    def find_truncated(self, settings: Settings) -> list[str]:
        """Return those of the prompts that are longer than what the model reads."""
        config, prompts = self.pipeline.config, [settings.prompt, settings.negative_prompt]
        return find_truncated(self.pipeline.tokenizer, prompts, config.max_sequence_length, config.prompt_format)

    def make_arguments(self, settings: Settings, pipeline: Any) -> dict[str, Any]:
        """Return the arguments of a pipeline."""
        arguments: dict[str, Any] = {
            "prompt": settings.prompt if self.has_text else None,
            "negative_prompt": (settings.negative_prompt or None) if self.has_text else None,
            "num_inference_steps": settings.num_inference_steps,
            "guidance_scale": settings.guidance_scale,
            "generator": torch.Generator().manual_seed(settings.seed),
        }
        if settings.lora:
            arguments["cross_attention_kwargs"] = {"scale": settings.lora_scale}
        if settings.task == UPSCALE:
            return {**arguments, **self.make_upscaling_arguments(settings)}
        size = self.pipeline.unet.config.sample_size
        height, width = (size if side is None else side for side in (settings.height, settings.width))
        pipeline.find_level(height, width)  # it says what does not fit, before images are made to fit
        core_first = None if settings.core_first == "off" else read_core_first(settings.core_first)
        arguments |= {"height": height, "width": width, "core_first": core_first}
        if settings.task == TEXT:
            return {**arguments, "output_levels": True}
        assert settings.image is not None  # `start` has checked it
        image = ImageOps.fit(to_mode(settings.image, pipeline), (width, height))
        arguments |= {"strength": settings.strength, "image": image}
        if settings.task == INPAINT:
            assert settings.mask is not None
            arguments["mask_image"] = ImageOps.fit(settings.mask, (width, height))
        return arguments

    def make_upscaling_arguments(self, settings: Settings) -> dict[str, Any]:
        """Return those arguments that only upscaling has."""
        assert settings.image is not None
        image, inner = to_mode(settings.image, self.pipeline), self.pipeline.unet.sample_sizes[-2]
        if not settings.in_tiles:
            image.thumbnail((inner, inner))
        elif max(image.size) > TILES_PER_SIDE_MAX * inner:
            side = TILES_PER_SIDE_MAX * inner
            raise ValueError(
                f"The image is {image.width} x {image.height} pixels, but tiles are drawn for at most {side} x {side}."
            )
        overlap = inner // 4 if settings.in_tiles else None
        return {"image": image, "strength": settings.strength, "exact": settings.exact, "tile_overlap": overlap}

    def find_upscaling_fault(self) -> str | None:
        """Say why the model cannot upscale, or return None."""
        pipeline: Any = GreedyGrowUpscalePipeline.from_pipe(self.pipeline)
        try:
            pipeline.find_size((1, 1), None)
        except ValueError as error:
            return str(error)
        return None

    def to_image(self, prediction: torch.Tensor) -> Image.Image:
        """Return a clean image `(1, C, H, W)` in [-1, 1], which may be outside, as a picture."""
        return self.pipeline.image_processor.postprocess(prediction.float(), output_type="pil")[0]

    def write(self, image: Image.Image, folder: str, settings: Settings) -> Path:
        """Write a PNG into a folder, with the settings that drew it as its text. Return its path."""
        used = {"model": self.name, "revision": self.revision, **settings.list_used()}
        path = Path(folder) / f"seed-{settings.seed}.png"
        save(image, path, {name: value for name, value in used.items() if value != ""})
        return path


def make_scheduler(own: SchedulerMixin, name: str) -> SchedulerMixin:
    """Return a new scheduler: a copy of the model's `own`, or one of [`SCHEDULERS`] with the same shift."""
    kind, entry, settings = SCHEDULERS.get(name, (type(own), "", {}))
    if type(own) is kind:
        return copy.deepcopy(own)
    return kind(**{entry: own.config[shift_name(own)]}, **settings)


def read_mask(layers: list[Image.Image]) -> Image.Image | None:
    """Return what is painted on any of the layers as a mask: white where one is not transparent."""
    mask = None
    for layer in layers:
        alpha = layer.getchannel("A").point(lambda value: 255 * (value > 0))
        mask = alpha if mask is None else ImageChops.lighter(mask, alpha)
    return mask
