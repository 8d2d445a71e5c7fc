# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The file of cached predictions: where each lies, how they are written, and how they are read in training."""

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...models import GrowableUNet2DConditionModel
from ..data.captioned import CaptionedImages
from ..files import write_text
from .draws import DrawnImages, Draws, read_visits


# What each prediction starts with: a digest of the pixels that it is for. 0 where it has not been written yet.
DIGEST_BYTES = 8
# float16 is precise to 0.0005 for a clean image, but may be too narrow for features.
IMAGE_DTYPE, FEATURES_DTYPE = torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Layout:
    """
    Where the predictions lie in their file: image after image, and for each image draw after draw, of those that are read.

    Args:
        sizes (`list[tuple[int, ...]]`): The height and width of the core's state, for each shape of training images.
        channels (`int`), patch_size (`int`), hidden_size (`int`): The channels of images, and the features of the core.
        read (`np.ndarray` of shape `(images, draws)`): Which draws of each image have a prediction.
        shapes (`np.ndarray` of shape `(images,)`): Which of the `sizes` each image has.
    """

    sizes: list[tuple[int, ...]]
    channels: int
    patch_size: int
    hidden_size: int
    read: np.ndarray
    shapes: np.ndarray

    @classmethod
    def of(cls, unet: GrowableUNet2DConditionModel, images: CaptionedImages, read: np.ndarray) -> "Layout":
        """Return the layout for `images` and the core of `unet`."""
        config, core_size = unet.config, unet.sample_sizes[0]
        sizes = [tuple(side * core_size // images.resolution for side in bucket) for bucket in images.buckets]
        return cls(sizes, config.out_channels, config.patch_size, config.hidden_size, read, images.shapes)

    def image_shape(self, kind: int) -> tuple[int, ...]:
        return self.channels, *self.sizes[kind]

    def features_shape(self, kind: int) -> tuple[int, ...]:
        height, width = self.sizes[kind]
        return self.hidden_size, height // self.patch_size, width // self.patch_size

    @cached_property
    def record_bytes(self) -> np.ndarray:
        """The bytes of a prediction, for each of the `sizes`: a multiple of 8."""
        numbers = [
            math.prod(self.image_shape(kind)) + math.prod(self.features_shape(kind)) for kind in range(len(self.sizes))
        ]
        return np.array([DIGEST_BYTES + -(-2 * count // 8) * 8 for count in numbers])

    @cached_property
    def ends(self) -> np.ndarray:
        """Where each prediction ends, `(images, draws)`."""
        return np.cumsum(self.read * self.record_bytes[self.shapes][:, None]).reshape(self.read.shape)

    @property
    def total_bytes(self) -> int:
        return int(self.ends[-1, -1])

    def start(self, index: int, number: int) -> int:
        """Return where the prediction for draw `number` of the image `index` begins."""
        return int(self.ends[index, number] - self.record_bytes[self.shapes[index]])


class CorePredictions(torch.utils.data.Dataset):
    """
    The cached predictions of a core, as a dataset: the rows of [`DrawnImages`] with `core_image` and `core_features`. A visit of
    an image gets one of its draws, another one in each epoch.

    Args:
        folder (`Path`): The folder for all predictions, of which each part has a folder that is named by its `key`.
        key (`dict`): Everything that decides the predictions, as JSON can hold it.
        images ([`CaptionedImages`]): The training images, at the resolution of the phase.
        draws ([`Draws`]): What is random.
        layout ([`Layout`]): Where each prediction lies.
    """

    varies = True  # so a loader tells it each visit's place in the phase

    def __init__(self, folder: Path, key: dict[str, Any], images: CaptionedImages, draws: Draws, layout: Layout):
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self.key, self.folder = key, folder / digest
        self.rows, self.draws, self.layout = DrawnImages(images, draws), draws, layout
        self.buckets, self.shapes = images.buckets, images.shapes

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def path(self) -> Path:
        return self.folder / "predictions.bin"

    @property
    def unfinished_path(self) -> Path:
        return self.folder / "predictions.bin.tmp"

    def __getitem__(self, visited: tuple[int, tuple[int, ...]]) -> dict:
        """
        Return the row for a visit.

        Raises:
            `ValueError`: if the image is another one than the prediction is for.
        """
        index, (*_, place) = visited
        number = place // len(self) % self.draws.count
        row = self.rows[index, number]
        # Mapped for each visit, not once: a worker process would otherwise get a copy of all predictions.
        kind, start = int(self.shapes[index]), self.layout.start(index, number)
        record = np.array(np.memmap(self.path, np.uint8, "r", start, (int(self.layout.record_bytes[kind]),)))
        if record[:DIGEST_BYTES].tobytes() != take_digest(row):
            raise ValueError(
                f"{self.folder} has predictions for another image number {index}: the images have changed, although their captions "
                "have not. Remove that folder, and the predictions are computed again."
            )
        image_shape, features_shape = self.layout.image_shape(kind), self.layout.features_shape(kind)
        end_of_image = DIGEST_BYTES + 2 * math.prod(image_shape)
        end = end_of_image + 2 * math.prod(features_shape)
        image, features = (
            torch.from_numpy(record[a:b]) for a, b in ((DIGEST_BYTES, end_of_image), (end_of_image, end))
        )
        row["core_image"] = image.view(IMAGE_DTYPE).reshape(image_shape)
        row["core_features"] = features.view(FEATURES_DTYPE).reshape(features_shape)
        return row

    def check_size(self) -> None:
        """Raise an `OSError` if the finished file has lost a part."""
        if (size := self.path.stat().st_size) != self.layout.total_bytes:
            raise OSError(
                f"{self.path} has {size} bytes instead of {self.layout.total_bytes}: it is damaged. Remove {self.folder}, and the "
                "predictions are computed again."
            )

    # ------------------------------------------------------------------------------------------------------------------
    # Writing

    def prepare(self) -> None:
        """
        Make the file, all of zeros, unless an earlier run has begun it.

        Raises:
            `OSError`: if the disk has too little space.
        """
        check_space(self.folder, self.layout.total_bytes, count_bytes(self.folder))
        with self.naming_the_folder():
            write_text(self.folder / "about.json", json.dumps(self.key, indent=1))
            with open(self.unfinished_path, "ab") as file:
                file.truncate(self.layout.total_bytes)

    def find_missing(self) -> list[tuple[int, int]]:
        """Return the pairs (image, draw) that are read and have no prediction yet."""

        def is_missing(index: int, number: int) -> bool:
            file.seek(self.layout.start(index, number))
            return not any(file.read(DIGEST_BYTES))

        # Not mapped to memory: in a file system such as tmpfs, that would fill the parts of the file that are not written yet.
        with open(self.unfinished_path, "rb", buffering=0) as file:
            return [
                (index, number)
                for index, number in np.argwhere(self.layout.read).tolist()
                if is_missing(index, number)
            ]

    def write(self, batch: dict, image: torch.Tensor, features: torch.Tensor) -> None:
        """
        Write the predictions for a batch of [`DrawnImages`].

        Args:
            batch (`dict`): The batch.
            image (`torch.Tensor` of shape `(B, C, h, w)`), features (`torch.Tensor` of shape `(B, hidden_size, h, w)`):
                The core's output.

        Raises:
            `FloatingPointError`: if a prediction is not finite.
            `OSError`: if the disk is full.
        """
        limit = torch.finfo(IMAGE_DTYPE).max
        if not (image.isfinite().all() and features.isfinite().all()):
            raise FloatingPointError(
                f"The core's predictions are not finite for the images {[index for index, _ in read_visits(batch)]}: try "
                "`mixed_precision` bf16 or no."
            )
        image, features = image.clamp(-limit, limit).to(IMAGE_DTYPE).cpu(), features.to(FEATURES_DTYPE).cpu()
        with self.naming_the_folder(), open(self.unfinished_path, "r+b") as file:
            for i, (index, number) in enumerate(read_visits(batch)):
                start = self.layout.start(index, number)
                file.seek(start + DIGEST_BYTES)
                for values in (image[i], features[i]):
                    file.write(values.contiguous().view(torch.uint8).numpy().tobytes())
                file.flush()
                # Last, so that a prediction whose writing is cut off counts as missing
                file.seek(start)
                file.write(take_digest({"pixel_values": batch["pixel_values"][i]}))

    @contextlib.contextmanager
    def naming_the_folder(self) -> Iterator[None]:
        """Let an `OSError`, such as that of a full disk, name the folder and the size of the whole."""
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}: the core's predictions, {self.layout.total_bytes / 1e9:.3f} GB in all, cannot be written to "
                f"{self.folder}. `core_predictions_dir` names another disk",
            ) from error


def take_digest(row: dict) -> bytes:
    """Return a digest of the pixels of a row, of `DIGEST_BYTES` that are not all 0."""
    pixels = row["pixel_values"].cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(pixels, digest_size=DIGEST_BYTES - 1).digest() + b"\1"


def count_bytes(folder: Path) -> int:
    """Return the bytes on disk of the predictions in a folder: unwritten parts of a file take no space, so its size does not tell."""
    return sum(getattr(path.stat(), "st_blocks", 0) * 512 for path in folder.glob("predictions.bin*"))  # 0 on Windows


def check_space(folder: Path, needed: int, used: int) -> None:
    """Raise an `OSError` if `needed` bytes do not fit on the disk of `folder`, where `used` bytes of them are already."""
    parent = folder
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if needed - used > free:
        raise OSError(
            f"The core's predictions need {needed / 1e9:.1f} GB in {folder}, of which {used / 1e9:.1f} GB are there already, but "
            f"only {free / 1e9:.1f} GB are free: name another disk by `core_predictions_dir`, or lower `cache_core_predictions`."
        )


def count_prediction_bytes(unet: GrowableUNet2DConditionModel) -> int:
    """Return the bytes that a prediction for a square image takes on disk."""
    size, config = unet.sample_sizes[0], unet.config
    read, shapes = np.ones((1, 1), dtype=bool), np.zeros(1, dtype=np.int64)
    return Layout([(size, size)], config.out_channels, config.patch_size, config.hidden_size, read, shapes).total_bytes
