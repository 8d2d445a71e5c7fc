# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Captioned images: from a Hub dataset or a folder to batches, in an order that depends on the seed alone."""

import contextlib
import copy
import functools
import io
import itertools
import json
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Image, IterableDataset, load_dataset
from diffusers.training_utils import find_nearest_bucket
from PIL import Image as PILImage
from PIL import ImageOps
from torch.utils.data import Sampler, get_worker_info

from ..flow import pool


# A longer caption is a page of text that was scraped along, not a caption.
MAX_CAPTION_CHARACTERS = 5000
FILE_TYPES = {".parquet": "parquet", ".tar": "webdataset"}


# ----------------------------------------------------------------------------------------------------------------------
# Sources


def check_data_dir(data_dir: str, argument: str = "train_data_dir") -> None:
    """Raises a `ValueError` that names the `argument` if `data_dir` is neither a folder nor a file that can be read."""
    path = Path(data_dir)
    if not path.exists():
        raise ValueError(f"`{argument}={data_dir!r}` does not exist.")
    if path.is_file() and path.suffix not in FILE_TYPES:
        raise ValueError(
            f"`{argument}={data_dir!r}` cannot be read: pass a file that ends in {' or '.join(FILE_TYPES)}, or a folder with such "
            "files or with images and a metadata.jsonl or metadata.csv."
        )


def load_splits(
    dataset_name: str | None, data_dir: str | None, image_column: str, caption_column: str, streaming: bool = False
) -> dict[str, Dataset] | dict[str, IterableDataset]:
    """
    The splits of a source, each with the columns `image` and `text`. Images are left undecoded, as `bytes` or `path`, since
    a broken one must not stop what reads it.

    Args:
        dataset_name (`str`, *optional*):
            A dataset on the Hub.
        data_dir (`str`, *optional*):
            Instead of it, a folder with images and a `metadata.jsonl` or `metadata.csv` (an imagefolder), a folder
            with parquet or WebDataset tar files, or one such file.
        image_column (`str`), caption_column (`str`):
            The columns to read; of a WebDataset they are file extensions, such as `jpg` and `txt`.
        streaming (`bool`, defaults to `False`):
            Whether to read rows as they are needed, instead of having all of them on disk and in order.

    Raises:
        `ValueError`: if there is not exactly one source that can be read, or a column is missing or of the wrong type.
    """
    if dataset_name is not None and data_dir is None:
        splits = load_dataset(dataset_name, streaming=streaming)
    elif data_dir is not None and dataset_name is None:
        check_data_dir(data_dir)
        if Path(data_dir).is_file():
            splits = load_dataset(FILE_TYPES[Path(data_dir).suffix], data_files=data_dir, streaming=streaming)
        elif any((Path(data_dir) / f"metadata.{kind}").exists() for kind in ("jsonl", "csv")):
            # One set, whatever its images are called: `crash_test_1.png` is no split of its own.
            splits = load_dataset("imagefolder", data_dir=data_dir, data_files={"train": "**"}, streaming=streaming)
        else:
            splits = load_dataset(data_dir, streaming=streaming)
    else:
        raise ValueError("Pass either `dataset_name` or `train_data_dir`.")

    for name, split in splits.items():
        for argument, column in (("image_column", image_column), ("caption_column", caption_column)):
            if column not in split.column_names:
                raise ValueError(
                    f"`{argument}={column!r}` is not in the {name} split, whose columns are {split.column_names}."
                )
        if not isinstance(split.features[image_column], Image):
            raise ValueError(
                f"`image_column={image_column!r}` holds {split.features[image_column]}, not images; cast it to "
                "`datasets.Image` or name another column."
            )
        if getattr(split.features[caption_column], "dtype", None) not in ("string", "large_string"):
            raise ValueError(
                f"`caption_column={caption_column!r}` holds {split.features[caption_column]}, not strings; name another "
                "column, or write one caption for each image."
            )
        # First of all, since renaming a stream's columns decodes them.
        split = split.cast_column(image_column, Image(decode=False)).select_columns([image_column, caption_column])
        names = {image_column: "image", caption_column: "text"}
        splits[name] = split.rename_columns({old: new for old, new in names.items() if old != new})
    if "train" not in splits:
        raise ValueError(f"The data has no train split, only {list(splits)}: name one of its files or folders train.")
    return splits


def load_captioned_data(
    dataset_name: str | None, train_data_dir: str | None, image_column: str, caption_column: str, hold_out: bool = True
) -> tuple[Dataset, Dataset]:
    """
    Loads images with captions by [`load_splits`] and splits off what is not trained on: with `hold_out`, data with no
    `validation` or `test` of its own has 5 % held out, 256 at most, and always the same ones.

    Returns:
        The training and the validation rows, with the columns `image` (undecoded) and `text`.

    Raises:
        `ValueError`: as [`load_splits`] does, and if there are fewer than two rows to hold one out.
    """
    splits = load_splits(dataset_name, train_data_dir, image_column, caption_column)
    for name in ("validation", "test"):
        if name in splits:
            return splits["train"], splits[name]
    if not hold_out:
        return splits["train"], splits["train"].select([])
    if len(splits["train"]) < 2:
        raise ValueError("The data has fewer than two rows: there is nothing to train on and to hold out.")
    held_out = min(256, max(1, len(splits["train"]) // 20))
    split = splits["train"].train_test_split(test_size=held_out, seed=0)
    return split["train"], split["test"]


# ----------------------------------------------------------------------------------------------------------------------
# Rows, and those that are broken


class BrokenRow(ValueError):
    """Why a row cannot be trained on."""


class BrokenRows:
    """
    Counts broken rows, writes a line for each to a file, and stops the run when there are too many.

    Every process and every worker of a data loader counts what it reads itself; lines are short, so those of several
    do not mix in the file.

    Args:
        path (`Path`, *optional*):
            The file, of one JSON object for each row: its name and the reason.
        max_share (`float`, defaults to 0.01):
            The largest share of the rows read that may be broken. The first 1000 are taken together, since one of the
            first ten would be a tenth already.
    """

    def __init__(self, path: Path | None = None, max_share: float = 0.01):
        self.path, self.max_share = path, max_share
        self.read = self.broken = 0

    def add(self, name: str, reason: Exception) -> None:
        """
        Raises:
            `ValueError`: if rows are broken beyond `max_share`.
        """
        self.broken += 1
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write(json.dumps({"row": name, "reason": str(reason)}) + "\n")
        if self.broken > self.max_share * max(self.read, 1000):
            raise ValueError(
                f"{self.broken} of {self.read} rows read are broken, which is beyond `max_broken_share={self.max_share}`. "
                f"The last one is {name}: {reason}. "
                + (f"{self.path} names all of them. " if self.path is not None else "")
                + "Repair the data, or raise `max_broken_share`."
            )

    def found(self) -> int:
        """How many different rows the file names."""
        if self.path is None or not self.path.exists():
            return 0
        rows = set()
        for line in self.path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # on a network drive, lines of several processes may mix after all
                rows.add(json.loads(line)["row"])
        return len(rows)


def name_row(place: str, row: dict) -> str:
    """Where a row stands, its file's name if it has one, and how its caption begins."""
    path = (row["image"] or {}).get("path")
    return f"{place}{f', {path}' if path else ''}, {(row['text'] or '')[:80]!r}"


def check_caption(caption: str | None) -> str:
    """
    Raises:
        [`BrokenRow`]: if there is none, it is empty or longer than `MAX_CAPTION_CHARACTERS`.
    """
    if caption is None:
        raise BrokenRow("no caption")
    if not caption.strip():
        raise BrokenRow("the caption is empty")
    if len(caption) > MAX_CAPTION_CHARACTERS:
        raise BrokenRow(f"the caption has {len(caption)} characters, of {MAX_CAPTION_CHARACTERS} at most")
    return caption


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


# ----------------------------------------------------------------------------------------------------------------------
# Order


class EpochOrder(Sampler[int]):
    """
    `num_samples` indices into a dataset of `size` rows, starting after the first `start`: epoch after epoch, each in an
    order of its own that depends on `seed` and the epoch alone, so a resumed run sees what it would have seen.
    """

    def __init__(self, size: int, start: int, num_samples: int, seed: tuple[int, ...]):
        self.size, self.start, self.num_samples, self.seed = size, start, num_samples, seed

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        position, end = self.start, self.start + self.num_samples
        while position < end:
            epoch, first = divmod(position, self.size)
            order = np.random.default_rng([*self.seed, epoch]).permutation(self.size)
            yield from order[first : first + end - position].tolist()
            position += self.size - first


class BucketOrder(Sampler[list[int]]):
    """
    Batches of indices such that all images of a step have one shape: rows in the order of [`EpochOrder`] are collected by
    shape, and whenever those of one shape are enough for a step, they make one. What is left of an epoch goes into the
    next one's batches, so that every epoch shows every row.

    Args:
        shapes (`np.ndarray`): The shape of each row, as an index.
        batch_size (`int`): Rows of a batch.
        batches_per_step (`int`): Consecutive batches that have one shape.
        start (`int`), num_steps (`int`): How many steps are left out, and how many follow.
        seed (`tuple[int, ...]`): What the order depends on.
    """

    def __init__(
        self,
        shapes: np.ndarray,
        batch_size: int,
        batches_per_step: int,
        start: int,
        num_steps: int,
        seed: tuple[int, ...],
    ):
        self.shapes, self.batch_size, self.batches_per_step = shapes, batch_size, batches_per_step
        self.start, self.num_steps, self.seed = start, num_steps, seed
        self.drop_last = True  # for accelerate: every batch is full

    def __len__(self) -> int:
        return self.num_steps * self.batches_per_step

    def __iter__(self) -> Iterator[list[int]]:
        size, step_size = len(self.shapes), self.batch_size * self.batches_per_step
        steps = self.start + self.num_steps
        waiting: dict[int, list[int]] = defaultdict(list)
        step = 0
        for index in EpochOrder(size, 0, (steps + len(set(self.shapes))) * step_size, self.seed):
            if step == steps:
                return
            rows = waiting[self.shapes[index]]
            rows.append(index)
            if len(rows) == step_size:
                if step >= self.start:
                    yield from (rows[i : i + self.batch_size] for i in range(0, step_size, self.batch_size))
                rows.clear()
                step += 1


# ----------------------------------------------------------------------------------------------------------------------
# Noise


def sample_seeds(key: tuple[int, ...], first: int, count: int) -> list[int]:
    """
    A seed for each image of a batch, from `key`, such as (seed, step), and from the image's place in the global batch,
    `first` and following: noise depends neither on the number of processes nor on what was drawn before.
    """
    seeds = np.random.SeedSequence(key).generate_state(first + count, np.uint64)[first:]
    return [int(seed) for seed in seeds >> np.uint64(1)]


def sample_generators(key: tuple[int, ...], first: int, count: int) -> list[torch.Generator]:
    """Random generators with the [`sample_seeds`], as pipelines take them."""
    return [torch.Generator().manual_seed(seed) for seed in sample_seeds(key, first, count)]
