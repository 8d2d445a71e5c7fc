# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""From the bytes of an image file to pixels: decode, crop, scale, and convert colors."""

import functools
import io
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from datasets.utils.file_utils import xopen
from PIL import Image as PILImage
from PIL import ImageCms, ImageOps

from ...flow import pool
from .rows import BrokenRow


# PIL warns above 89 megapixels and refuses images from twice as many. So do we, instead of at the warning.
MAX_IMAGE_PIXELS = 178_956_970

# JPEGs of more pixels are decoded at a fraction of their size. Below, the full decoding is worth its memory.
MAX_FULLY_DECODED_PIXELS = MAX_IMAGE_PIXELS // 2

# Profiles that change no color by more than this are sRGB's own, rounded. Their images stay as they are, bit for bit.
PROFILE_TOLERANCE = 3


@contextmanager
def without_pixel_limit() -> Iterator[None]:
    """Turn PIL's own limit off: it is a global of two levels, and ours is an argument."""
    limit, PILImage.MAX_IMAGE_PIXELS = PILImage.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        PILImage.MAX_IMAGE_PIXELS = limit


def open_header(image: dict, max_image_pixels: int = MAX_IMAGE_PIXELS) -> PILImage.Image:
    """
    Open an image from its `bytes`, or from the file at `path`, without decoding its pixels.

    Raises:
        [`BrokenRow`]: if it has more than `max_image_pixels`.
    """
    content, path = image["bytes"], image["path"]
    if content is None and not os.path.exists(path) and "://" in path:  # an image of a stream from the Hub
        with xopen(path, "rb") as file:
            content = file.read()
    with without_pixel_limit():
        opened = PILImage.open(path if content is None else io.BytesIO(content))
    if opened.width * opened.height > max_image_pixels:
        raise BrokenRow(
            f"{opened.width} x {opened.height} pixels, a decompression bomb unless it is a photo: raise "
            f"`max_image_pixels={max_image_pixels}` if it is"
        )
    return opened


def open_image(
    image: dict | None, size: int | None = None, max_image_pixels: int = MAX_IMAGE_PIXELS
) -> PILImage.Image:
    """
    Decode an image from its `bytes`, or from the file at `path`, and turn it upright.

    Args:
        image (`dict`, *optional*): The image, undecoded, as `datasets` stores it.
        size (`int`, *optional*): The pixels per side that are needed: a large JPEG is decoded at little more than that.
        max_image_pixels (`int`): The most pixels that an image may have.

    Raises:
        [`BrokenRow`]: if it cannot be decoded, has too many pixels, or has values of no known range.
    """
    if image is None or (image["bytes"] is None and image["path"] is None):
        raise BrokenRow("no image")
    if image["bytes"] == b"":
        raise BrokenRow("an image of zero bytes")
    try:
        opened = open_header(image, max_image_pixels)
        if size is not None and opened.width * opened.height > MAX_FULLY_DECODED_PIXELS:
            opened.draft(None, (2 * size, 2 * size))  # twice as many, so that the final scaling still averages
        with without_pixel_limit():
            opened.load()
            ImageOps.exif_transpose(opened, in_place=True)
    except BrokenRow:
        raise
    except Exception as error:  # the errors that PIL raises at broken files have no common class
        raise BrokenRow(f"{type(error).__name__}: {error}") from error
    if opened.mode.startswith("I;16"):
        return reduce_to_bytes(opened)
    if opened.mode[0] in "IF":
        raise BrokenRow(f"an image of mode {opened.mode}, whose values have no known range")
    return opened


def reduce_to_bytes(image: PILImage.Image) -> PILImage.Image:
    """Return a gray image of 16 bits per pixel as one of 8 bits."""
    reduced = PILImage.fromarray(np.round(np.asarray(image).astype(np.float32) / 257).astype(np.uint8))
    reduced.info = {name: value for name, value in image.info.items() if name == "icc_profile"}
    return reduced


@functools.lru_cache(maxsize=64)  # the images of a camera share a profile
def make_color_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """
    Return the transform of colors in `mode` from an ICC profile to sRGB, or `None` if the profile is sRGB's own.

    Raises:
        `OSError`, `PyCMSError`: if the profile is broken, or is one of other colors than `mode`.
    """
    output = "RGBA" if mode == "RGBA" else "RGB"
    transform = ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), mode, output
    )
    if mode == "CMYK":
        return transform
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    colors = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    if mode == "L":
        colors = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
    probe = PILImage.fromarray(colors)
    converted = apply_transform(probe.convert(mode), transform)
    difference = np.abs(np.asarray(converted.convert("RGB")).astype(int) - colors)
    return transform if difference.max() > PROFILE_TOLERANCE else None


def apply_transform(image: PILImage.Image, transform: ImageCms.ImageCmsTransform) -> PILImage.Image:
    """Return a new image with transformed colors."""
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # it is for transforms in place only
    return converted


def convert_to_srgb(image: PILImage.Image, report: Callable[[str], None]) -> PILImage.Image:
    """
    Convert the colors of an image by its ICC profile, if it has one. A profile that is broken or does not fit the image is
    ignored and reported.
    """
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    mode = "RGBA" if image.has_transparency_data else image.mode if image.mode in ("L", "CMYK") else "RGB"
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        gray = opened.profile.xcolor_space.strip() == "GRAY"
        if mode == "L" and not gray:  # programs that turn photos gray often keep the profile of their colors
            mode = "RGB"
        if mode in ("RGB", "RGBA") and gray and set(image.getbands()) <= set("LAP1"):
            mode = "L"
        transform = make_color_transform(profile, mode)
        if transform is None:
            return image
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        converted = apply_transform(image if image.mode == mode else image.convert(mode), transform)
        if alpha is not None:
            converted.putalpha(alpha)
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError) as error:
        report(f"a color profile that cannot be used: {error}")
        return image
    converted.info.pop("icc_profile", None)
    return converted


def to_pixel_values(
    image: PILImage.Image,
    height: int,
    width: int | None = None,
    report: Callable[[str], None] = lambda reason: None,
) -> torch.Tensor:
    """
    Convert an image to a tensor `(3, height, width)`, uint8: upright, in sRGB, transparent parts white, the center cropped to
    the aspect ratio (square without `width`), scaled with antialiasing. Warns once if an image must be enlarged. `report` is
    told of a color profile that cannot be used.
    """
    image = ImageOps.exif_transpose(image)
    size = (width or height, height)
    if image.width < size[0] or image.height < size[1]:
        warn_of_small_images(*size)
    if image.info.get("icc_profile"):
        image = convert_to_srgb(image, report)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if image.size != size:
        image = ImageOps.fit(image, size, method=PILImage.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def resize_part(pixel_values: torch.Tensor, crop: tuple[float, float, float], height: int, width: int) -> torch.Tensor:
    """
    Return a part of an image as `(3, height, width)`, uint8, scaled with antialiasing.

    Args:
        pixel_values (`torch.Tensor` of shape `(3, H, W)`): The image, uint8.
        crop (`tuple[float, float, float]`): The top, the left, and the missing share of both sides, as shares of the image.
        height (`int`), width (`int`): The size of the result.
    """
    image = PILImage.fromarray(pixel_values.permute(1, 2, 0).numpy())
    top, left, cut = crop
    right, bottom = min(1, left + 1 - cut), min(1, top + 1 - cut)  # not beyond the image by rounding
    box = left * image.width, top * image.height, right * image.width, bottom * image.height
    resized = image.resize((width, height), PILImage.Resampling.LANCZOS, box)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


# The cache makes it warn once per size: Python's own record of past warnings is reset whenever an image is opened.
@functools.cache
def warn_of_small_images(width: int, height: int) -> None:
    """Warn that images are smaller than `width` x `height`."""
    warnings.warn(
        f"There are images of less than {width} x {height} pixels. They are enlarged, and a model learns to draw their blur: "
        "leave them out, or train at a lower resolution.",
        stacklevel=3,  # the line that calls `to_pixel_values`
    )


def normalize(pixel_values: torch.Tensor, factor: int = 1) -> torch.Tensor:
    """
    Convert bytes `(..., 3, H, W)` to images `(..., 3, H / factor, W / factor)` in [-1, 1]. Images that are in [-1, 1]
    already, as floats, are averaged down only.
    """
    if pixel_values.dtype == torch.uint8:
        pixel_values = pixel_values.float() / 127.5 - 1
    return pool(pixel_values, factor)


def average_down(pixel_values: torch.Tensor, factor: int) -> torch.Tensor:
    """
    Reduce bytes as [`normalize`] does if `factor` is above 1, so that a core trains on the same images that a model grown
    from it pools. Bytes of the final resolution stay bytes: they are a quarter as large on their way to the GPU.
    """
    return pixel_values if factor == 1 else normalize(pixel_values, factor)
