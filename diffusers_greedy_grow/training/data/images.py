# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Captioned images: from a Hub dataset or a folder to batches, in an order that depends on the seed alone."""

import copy
import functools
import io
import itertools
import warnings

import numpy as np
import torch
from datasets import Dataset, Image
from diffusers.training_utils import find_nearest_bucket
from PIL import Image as PILImage
from PIL import ImageOps
from torch.utils.data import get_worker_info

from ...flow import pool
from .rows import BrokenRow, BrokenRows, check_caption, name_row


def open_image(image: dict | None) -> PILImage.Image:
    """
    Decodes an image from its `bytes`, or from the file at `path`.

    Raises:
        [`BrokenRow`]: if it cannot be decoded, is a decompression bomb, or has values that are no bytes.
    """
    if image is None or (image["bytes"] is None and image["path"] is None):
        raise BrokenRow("no image")
    if image["bytes"] == b"":
        raise BrokenRow("an image of zero bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PILImage.DecompressionBombWarning)
            decoded = Image().decode_example(image)
    except Exception as error:  # what a broken file leads PIL to raise has no common class
        raise BrokenRow(f"{type(error).__name__}: {error}") from error
    if decoded.mode[0] in "IF":
        raise BrokenRow(f"an image of mode {decoded.mode}, whose values have no known range")
    return decoded


def to_pixel_values(image: PILImage.Image, height: int, width: int | None = None) -> torch.Tensor:
    """
    An image as a tensor `(3, height, width)`, uint8: upright, transparent parts white, the centre cropped to shape (square
    without `width`), scaled with antialiasing. Warns of the first that must be enlarged.
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


@functools.cache  # once: opening an image resets Python's own memory of what it has warned of
def warn_of_small_images(width: int, height: int) -> None:
    warnings.warn(
        f"There are images of less than {width} x {height} pixels. They are enlarged, and a model learns to draw their blur: "
        "leave them out, or train at lower `resolutions`.",
        stacklevel=3,  # of who reads the image
    )


def normalize(pixel_values: torch.Tensor, factor: int = 1) -> torch.Tensor:
    """
    Bytes `(..., 3, H, W)` to images `(..., 3, H / factor, W / factor)` in [-1, 1]; what are images already is only
    averaged down.
    """
    if pixel_values.dtype == torch.uint8:
        pixel_values = pixel_values.float() / 127.5 - 1
    return pool(pixel_values, factor)


def average_down(pixel_values: torch.Tensor, factor: int) -> torch.Tensor:
    """
    What a data loader hands on: for a phase below the final resolution images in [-1, 1], averaged down by [`normalize`], so
    that what a core is trained on is what a model grown from it pools; bytes, which are a quarter as large, if `factor` is 1.
    """
    return pixel_values if factor == 1 else normalize(pixel_values, factor)


class CaptionedImages(torch.utils.data.Dataset):
    """
    Rows of `image` and `text` as `pixel_values` `(3, H, W)`, uint8, and `caption`. Instead of a broken row stands the next.

    If all of them fit in `max_cache_bytes`, each image is decoded and scaled once and then kept in memory; not so in
    a data loader's workers, each of which would keep its own.

    Args:
        rows (`Dataset`):
            As [`load_captioned_data`] returns them.
        resolution (`int`):
            The side of the images.
        buckets (`list[tuple[int, int]]`, *optional*):
            Heights and widths, if images are not all to be square: each gets the nearest shape.
        broken (`BrokenRows`, *optional*):
            What counts broken rows.

    Raises:
        `ValueError`: if too many captions are broken, or all; later, if too many images are, or all of a shape.
    """

    def __init__(
        self,
        rows: Dataset,
        resolution: int,
        buckets: list[tuple[int, int]] | None = None,
        broken: BrokenRows | None = None,
        max_cache_bytes: int = 2 * 2**30,
    ):
        self.resolution, self.pool_factor = resolution, 1
        self.buckets = buckets or [(resolution, resolution)]
        self.broken = broken or BrokenRows()
        captions, good = list(rows["text"]), []
        # Counted apart from broken images, which are met one by one: captions are all read now.
        broken_captions = BrokenRows(self.broken.path, self.broken.max_share)
        broken_captions.read = len(captions)
        for i, caption in enumerate(captions):
            try:
                check_caption(caption)
                good.append(i)
            except BrokenRow as error:
                broken_captions.add(name_row(f"row {i} of {len(captions)}", rows[i]), error)
        if not good:
            raise ValueError("No row of the data has a caption.")
        self.rows = rows if len(good) == len(rows) else rows.select(good)
        self.captions = [captions[i] for i in good]
        self.unreadable: set[int] = set()
        self.max_cache_bytes = max_cache_bytes
        self.cache = self.make_cache()
        self.shapes = self.find_shapes() if len(self.buckets) > 1 else np.zeros(len(self.rows), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, resolution: int) -> "CaptionedImages":
        """The same images averaged down to `resolution`: float32 in [-1, 1], if it is not their own."""
        images = copy.copy(self)
        images.pool_factor = self.resolution // resolution
        return images

    def select(self, indices: np.ndarray) -> "CaptionedImages":
        """Some of the images, in that order."""
        images = copy.copy(self)
        images.rows = self.rows.select(indices)
        images.captions = [self.captions[i] for i in indices]
        images.shapes = self.shapes[indices]
        images.cache = images.make_cache()
        images.unreadable = set()
        return images

    def make_cache(self) -> dict[int, torch.Tensor] | None:
        """For decoded images, if all of them fit."""
        return {} if len(self) * 3 * self.resolution**2 <= self.max_cache_bytes else None

    def find_shapes(self) -> np.ndarray:
        """The index of each row's bucket, from the images' headers."""
        shapes = np.zeros(len(self.rows), dtype=np.int64)
        for i, image in enumerate(self.rows["image"]):
            try:
                opened = PILImage.open(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"]))
                width, height = opened.size
                exif = PILImage.Image.getexif(opened)  # a PNG's own would decode it
                if exif.get(PILImage.ExifTags.Base.Orientation, 1) > 4:  # lies on its side
                    width, height = height, width
            except Exception:  # it will be counted and named where it is read
                continue
            shapes[i] = find_nearest_bucket(height, width, self.buckets)
        return shapes

    def __getitem__(self, index: int) -> dict:
        alike = None
        for tried in itertools.count(1):
            if index not in self.unreadable:
                try:
                    pixel_values = self.read(index)
                    break
                except BrokenRow as error:
                    self.unreadable.add(index)
                    self.broken.add(name_row(f"row {index} of {len(self)}", self.rows[index]), error)
            alike = np.flatnonzero(self.shapes == self.shapes[index]) if alike is None else alike
            if tried == len(alike):
                height, width = self.buckets[self.shapes[index]]
                raise ValueError(
                    f"There is no readable image among the {tried} of the shape {height} x {width}: repair the data"
                    + (f", whose broken rows {self.broken.path} names." if self.broken.path is not None else ".")
                )
            index = int(alike[np.searchsorted(alike, index, side="right") % len(alike)])
        return {"pixel_values": average_down(pixel_values, self.pool_factor), "caption": self.captions[index]}

    def read(self, index: int) -> torch.Tensor:
        cache = self.cache if get_worker_info() is None else None
        if cache is not None and index in cache:
            return cache[index]
        self.broken.read += 1
        pixel_values = to_pixel_values(open_image(self.rows[index]["image"]), *self.buckets[self.shapes[index]])
        if cache is not None:
            cache[index] = pixel_values
        return pixel_values
