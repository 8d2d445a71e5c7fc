# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""`greedy-grow sample` and `greedy-grow upscale`."""

import argparse
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from diffusers_greedy_grow import GreedyGrowPipeline, GreedyGrowUpscalePipeline
from diffusers_greedy_grow.pipelines.images import MODES
from diffusers_greedy_grow.training.data.images import convert_to_srgb, open_image
from diffusers_greedy_grow.training.data.rows import BrokenRow
from diffusers_greedy_grow.training.files import save_image

from .inspection import name_pipelines


def choose_device(name: str | None) -> str:
    """Return the device of a name, or the best one. Raise a `ValueError` if there is no such device."""
    if name is not None:
        try:
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError) as error:  # torch was built without it, or has no such kind
            reason = str(error).splitlines()[0]
            raise ValueError(f"`--device {name}` cannot be used here: {reason}. Leave it out, or pass cpu.") from None
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def load(
    pipeline_class: type[GreedyGrowPipeline],
    model: str,
    revision: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> GreedyGrowPipeline:
    """Load a pipeline, by default in the dtype that its weights are stored in."""
    name_pipelines(model)
    chosen = choose_device(device)
    loaded = pipeline_class.from_pretrained(
        model, revision=revision, dtype="auto" if dtype is None else getattr(torch, dtype)
    )
    return loaded.to(chosen)


def load_with_adapter(pipeline_class: type[GreedyGrowPipeline], args: argparse.Namespace) -> GreedyGrowPipeline:
    """Load the pipeline that the arguments name, with its adapter, on their device."""
    pipeline = load(pipeline_class, args.model, args.revision, args.dtype, args.device)
    if args.lora is not None:
        pipeline.load_lora_weights(args.lora)
    return pipeline


def name_files(args: argparse.Namespace, names: list[str]) -> list[Path]:
    """
    Return the files to write, one per name: `args.out` itself for a single image, or else in that folder.

    Raises:
        `ValueError`: if one exists, or cannot be written there, or if several images would be written to one file.
    """
    if not args.out:  # an empty variable of a shell
        raise ValueError("`--out` is empty: name a PNG file or a folder.")
    out = Path(args.out)
    is_file = out.suffix.lower() == ".png"
    if is_file and len(names) > 1:
        raise ValueError(f"`--out {args.out}` is one file for {len(names)} images: name a folder.")
    if not is_file and (out.is_file() or (out.suffix.lower() in Image.registered_extensions() and not out.is_dir())):
        raise ValueError(
            f"`--out {args.out}` names a file that is not a PNG: name a file that ends in .png, or a folder."
        )
    parent = next(folder for folder in ((out / "a").absolute().parents)[is_file:] if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"`--out {args.out}`: {parent} is not a folder that can be written to. Name another one.")
    paths = [out] if is_file else [out / f"{name}.png" for name in names]
    if not args.overwrite and (existing := [str(path) for path in paths if path.exists()]):
        raise ValueError(f"{existing[0]} exists: name another `--out`, or pass `--overwrite`.")
    return paths


def save(image: Image.Image, path: Path, settings: dict[str, Any]) -> None:
    """Write an image with the settings that drew it as text of the PNG."""
    info = PngInfo()
    for name, value in settings.items():
        if value is not None:
            info.add_itxt(name, str(value))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(image, path, pnginfo=info)


def first_seed(args: argparse.Namespace) -> int:
    if args.seed is not None and not 0 <= args.seed < 2**63:
        raise ValueError(f"`--seed {args.seed}` must be from 0 to below 2 ** 63.")
    return random.randrange(2**31) if args.seed is None else args.seed


def collect_settings(args: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    shared = ("model", "revision", "lora", "negative_prompt", "num_inference_steps", "guidance_scale")
    return {name: getattr(args, name) for name in (*shared, *names)}


def read_core_first(text: str | None) -> float | str | None:
    """Return the pipelines' argument `core_first` from what a user typed."""
    if text is None or text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f'`core_first` must be "auto" or a noise level, such as 0.8, but is {text!r}.') from None


def sample(args: argparse.Namespace) -> None:
    if args.num_images < 1:
        raise ValueError(f"`--num_images {args.num_images}` must be 1 or more.")
    prompts: list[str | None] = [prompt for prompt in args.prompts or [None] for _ in range(args.num_images)]
    seed = first_seed(args)
    paths = name_files(args, [f"{number:03d}-seed-{seed + number}" for number in range(len(prompts))])
    core_first = read_core_first(args.core_first)
    pipeline = load_with_adapter(GreedyGrowPipeline, args)
    names = ("height", "width", "core_first", "guidance_resolution")
    settings = collect_settings(args, names)
    # One at a time: each file is there as soon as it is drawn, and does not depend on the others.
    for number, (prompt, path) in enumerate(zip(prompts, paths)):
        output = pipeline(
            prompt,
            negative_prompt=args.negative_prompt,
            height=args.height,
            width=args.width,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            core_first=core_first,
            guidance_resolution=args.guidance_resolution,
            generator=torch.Generator().manual_seed(seed + number),
        )
        save(output.images[0], path, {"prompt": prompt, "seed": seed + number, **settings})
        print(path)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image in RGB, upright and on white if it is transparent."""
    image = ImageOps.exif_transpose(image)
    # Not from CMYK to RGBA at once, which PIL cannot convert
    image = (image if image.has_transparency_data else image.convert("RGB")).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def to_mode(image: Image.Image, pipeline: Any) -> Image.Image:
    """Return an image in RGB, see [`to_rgb`], or in gray for a model that draws in gray."""
    return to_rgb(image).convert(MODES[pipeline.unet.config.in_channels])


def open_images(paths: list[str]) -> Iterator[Image.Image]:
    """Yield images as training reads them: in RGB, upright, in sRGB, and on white if they are transparent."""
    for path in paths:
        try:
            opened = open_image({"bytes": None, "path": path})
        except BrokenRow as error:
            raise ValueError(f"{path} cannot be read as an image: {error}.") from error
        yield to_rgb(convert_to_srgb(opened, lambda reason: None))


def upscale(args: argparse.Namespace) -> None:
    stems = [Path(path).stem for path in args.images]
    if len({*stems}) < len(stems):
        raise ValueError(f"The images {args.images} need different names, since the results get the same ones.")
    paths = name_files(args, stems)
    images, seed = list(open_images(args.images)), first_seed(args)
    pipeline: Any = load_with_adapter(GreedyGrowUpscalePipeline, args)
    settings = collect_settings(args, ("prompt", "strength", "exact", "tile_overlap"))
    for number, (image, path) in enumerate(zip(images, paths)):
        output = pipeline(
            to_mode(image, pipeline),
            args.prompt,
            negative_prompt=args.negative_prompt,
            strength=args.strength,
            exact=args.exact,
            tile_overlap=args.tile_overlap,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=torch.Generator().manual_seed(seed + number),
        )
        save(output.images[0], path, {"image": args.images[number], "seed": seed + number, **settings})
        print(path)
