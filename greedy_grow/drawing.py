# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""`greedy-grow sample` and `greedy-grow upscale`."""

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from diffusers_greedy_grow import GreedyGrowPipeline, GreedyGrowUpscalePipeline


def choose_device(name: str | None) -> str:
    if name is not None:
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
    loaded = pipeline_class.from_pretrained(
        model, revision=revision, dtype="auto" if dtype is None else getattr(torch, dtype)
    )
    return loaded.to(choose_device(device))


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
        `ValueError`: if one exists, or if several images would be written to one file.
    """
    out = Path(args.out)
    is_file = out.suffix.lower() == ".png"
    if is_file and len(names) > 1:
        raise ValueError(f"`--out {args.out}` is one file for {len(names)} images: name a folder.")
    if not is_file and out.is_file():
        raise ValueError(f"`--out {args.out}` is a file, but no PNG: name a file that ends in .png, or a folder.")
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
    temporary = path.with_suffix(".tmp.png")
    image.save(temporary, pnginfo=info)
    temporary.replace(path)


def first_seed(args: argparse.Namespace) -> int:
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
    image = ImageOps.exif_transpose(image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def upscale(args: argparse.Namespace) -> None:
    stems = [Path(path).stem for path in args.images]
    if len({*stems}) < len(stems):
        raise ValueError(f"The images {args.images} need different names, since the results get the same ones.")
    paths = name_files(args, stems)
    images = [to_rgb(Image.open(path)) for path in args.images]
    pipeline: Any = load_with_adapter(GreedyGrowUpscalePipeline, args)
    seed = first_seed(args)
    settings = collect_settings(args, ("prompt", "strength", "exact", "tile_overlap"))
    for number, (image, path) in enumerate(zip(images, paths)):
        output = pipeline(
            image,
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
