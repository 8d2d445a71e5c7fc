# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Captioned images that are all on disk and in order, as a dataset."""

import copy
import itertools

import numpy as np
import torch
from datasets import Dataset
from diffusers.training_utils import find_nearest_bucket
from PIL import Image as PILImage
from torch.utils.data import get_worker_info

from .images import MAX_IMAGE_PIXELS, average_down, open_header, open_image, to_pixel_values
from .rows import BrokenRow, BrokenRows, check_caption, list_captions, name_row
from .visits import Augmentation, draw_caption


class CaptionedImages(torch.utils.data.Dataset):
    """
    Rows of `image` and `text` as `pixel_values` `(3, H, W)`, uint8, and `caption`. If `text` is a list, one of its captions is
    drawn per visit; visits may see the mirror image and a part of the image, see [`Augmentation`]. Broken captions are left out, as is a row without any other; a row whose image is broken is replaced by the next one of its shape.

    If all images fit in `max_cache_bytes`, each is decoded and scaled once and then kept in memory. The workers of a data
    loader do without that cache, since each would hold its own.

    Args:
        rows (`Dataset`):
            Rows as [`load_captioned_data`] returns them.
        resolution (`int`):
            The height and width of the images.
        buckets (`list[tuple[int, int]]`, *optional*):
            Heights and widths, if not all images are to be square: each image gets the nearest shape.
        broken (`BrokenRows`, *optional*):
            The counter of broken rows.
        max_cache_bytes (`int`, defaults to 2 GiB):
            The most memory to use for decoded images.
        max_image_pixels (`int`):
            The most pixels that an image file may have.
        augmentation ([`Augmentation`], *optional*):
            How visits of an image differ. By default, they do not.

    Raises:
        `ValueError`: if all captions are broken, or too many; later, if too many images are broken, or all of a shape.
    """

    def __init__(
        self,
        rows: Dataset,
        resolution: int,
        buckets: list[tuple[int, int]] | None = None,
        broken: BrokenRows | None = None,
        max_cache_bytes: int = 2 * 2**30,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        augmentation: Augmentation | None = None,
    ):
        self.resolution, self.pool_factor = resolution, 1
        self.augmentation = augmentation or Augmentation()
        self.buckets = buckets or [(resolution, resolution)]
        self.broken = broken or BrokenRows()
        texts, good = [list_captions(text) for text in rows["text"]], []
        # Counted apart from broken images: all captions are read now, images one by one.
        broken_captions = BrokenRows(self.broken.path, self.broken.max_share)
        broken_captions.read = sum(map(len, texts))
        self.caption_lists: list[list[str]] = []  # the captions of each image
        for i, captions in enumerate(texts):
            kept = []
            for caption in dict.fromkeys(captions):
                try:
                    kept.append(check_caption(caption))
                except BrokenRow as error:
                    name = name_row(f"row {i} of {len(texts)}", {**rows[i], "text": caption})
                    broken_captions.add(name, error)
            if kept:
                good.append(i)
                self.caption_lists.append(kept)
        if not good:
            raise ValueError("No row of the data has a caption.")
        self.rows = rows if len(good) == len(rows) else rows.select(good)
        self.unreadable: set[int] = set()
        self.max_cache_bytes, self.max_image_pixels = max_cache_bytes, max_image_pixels
        self.cache = self.make_cache()
        self.shapes = self.find_shapes() if len(self.buckets) > 1 else np.zeros(len(self.rows), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def captions(self) -> list[str]:
        """The first caption of each image."""
        return [captions[0] for captions in self.caption_lists]

    @property
    def all_captions(self) -> list[str]:
        """The captions of all images, image after image."""
        return list(itertools.chain.from_iterable(self.caption_lists))

    @property
    def varies(self) -> bool:
        """Whether visits of an image differ: by its captions, of which there are several, or by the augmentation."""
        return self.augmentation.varies or any(len(captions) > 1 for captions in self.caption_lists)

    def at(self, resolution: int) -> "CaptionedImages":
        """Return the same images averaged down to `resolution`. Unless it is their own, they are float32 in [-1, 1]."""
        images = copy.copy(self)
        images.pool_factor = self.resolution // resolution
        return images

    def select(self, indices: np.ndarray) -> "CaptionedImages":
        """Return some of the images, in the order of `indices`."""
        images = copy.copy(self)
        images.rows = self.rows.select(indices)
        images.caption_lists = [self.caption_lists[i] for i in indices]
        images.shapes = self.shapes[indices]
        images.cache = images.make_cache()
        images.unreadable = set()
        return images

    def make_cache(self) -> dict[int, torch.Tensor] | None:
        """Return an empty cache for decoded images, or `None` if not all of them fit."""
        side = self.augmentation.size_to_read(self.resolution)
        return {} if len(self) * 3 * side**2 <= self.max_cache_bytes else None

    def find_shapes(self) -> np.ndarray:
        """Return the index of each row's bucket, from the headers of the images."""
        shapes = np.zeros(len(self.rows), dtype=np.int64)
        for i, image in enumerate(self.rows["image"]):
            try:
                opened = open_header(image, self.max_image_pixels)
                width, height = opened.size
                exif = PILImage.Image.getexif(opened)  # the method of a PNG image would decode all of it
                if exif.get(PILImage.ExifTags.Base.Orientation, 1) > 4:  # turned by 90 degrees
                    width, height = height, width
            except Exception:  # a broken image is counted and named when it is read
                continue
            shapes[i] = find_nearest_bucket(height, width, self.buckets)
        return shapes

    def __getitem__(self, key: int | tuple[int, tuple[int, ...]]) -> dict:
        """
        Return an image and one of its captions.

        Args:
            key (`int` or `tuple[int, tuple[int, ...]]`): The index, and the key of the visit, see [`VisitOrder`]. Without it, the
                image is as it is on disk, with its first caption.

        Returns:
            `pixel_values`, `caption` and, with random crops, `crop`, see [`Augmentation.apply`].
        """
        index, visit = key if isinstance(key, tuple) else (key, None)
        alike = None  # the rows of the same shape
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
        captions = self.caption_lists[index]
        caption = captions[0] if visit is None else draw_caption(captions, visit)
        row = self.augmentation.apply(pixel_values, visit, *self.buckets[self.shapes[index]])
        return {**row, "pixel_values": average_down(row["pixel_values"], self.pool_factor), "caption": caption}

    def read(self, index: int) -> torch.Tensor:
        """
        Return the pixels of a row, as many as the augmentation needs, from the cache if they are there.

        Raises:
            [`BrokenRow`]: if the image cannot be read.
        """
        cache = self.cache if get_worker_info() is None else None
        if cache is not None and index in cache:
            return cache[index]
        self.broken.read += 1
        row, (height, width) = self.rows[index], map(self.augmentation.size_to_read, self.buckets[self.shapes[index]])
        image = open_image(row["image"], max(height, width), self.max_image_pixels)

        def report(reason: str) -> None:
            self.broken.add_ignored(name_row(f"row {index} of {len(self)}", row), reason)

        pixel_values = to_pixel_values(image, height, width, report)
        if cache is not None:
            cache[index] = pixel_values
        return pixel_values
