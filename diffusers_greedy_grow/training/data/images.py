# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""From the bytes of an image file to pixels: decode, crop, scale, and convert colors."""

import functools
import warnings

import numpy as np
import torch
from datasets import Image
from PIL import Image as PILImage
from PIL import ImageOps

from ...flow import pool
from .rows import BrokenRow


def open_image(image: dict | None) -> PILImage.Image:
    """
    Decode an image from its `bytes`, or from the file at `path`.

    Raises:
        [`BrokenRow`]: if it cannot be decoded, is a decompression bomb, or has values other than bytes.
    """
    if image is None or (image["bytes"] is None and image["path"] is None):
        raise BrokenRow("no image")
    if image["bytes"] == b"":
        raise BrokenRow("an image of zero bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PILImage.DecompressionBombWarning)
            decoded = Image().decode_example(image)
    except Exception as error:  # the errors that PIL raises at broken files have no common class
        raise BrokenRow(f"{type(error).__name__}: {error}") from error
    if decoded.mode[0] in "IF":
        raise BrokenRow(f"an image of mode {decoded.mode}, whose values have no known range")
    return decoded


def to_pixel_values(image: PILImage.Image, height: int, width: int | None = None) -> torch.Tensor:
    """
    Convert an image to a tensor `(3, height, width)`, uint8: upright, transparent parts white, the center cropped to the
    aspect ratio (square without `width`), scaled with antialiasing. Warns once if an image must be enlarged.
    """
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    size = (width or height, height)
    if image.width < size[0] or image.height < size[1]:
        warn_of_small_images(*size)
    if image.size != size:
        image = ImageOps.fit(image, size, method=PILImage.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


# The cache makes it warn once per size: Python's own record of past warnings is reset whenever an image is opened.
@functools.cache
def warn_of_small_images(width: int, height: int) -> None:
    """Warn that images are smaller than `width` x `height`."""
    warnings.warn(
        f"There are images of less than {width} x {height} pixels. They are enlarged, and a model learns to draw their blur: "
        "leave them out, or train at lower `resolutions`.",
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
