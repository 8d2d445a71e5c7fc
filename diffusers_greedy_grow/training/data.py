# Copyright 2026 The diffusers-greedy-grow authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Captioned pictures: from a Hub dataset or a folder to batches, in an order that depends on the seed alone."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Image, load_dataset
from PIL import Image as PILImage
from PIL import ImageOps
from torch.utils.data import Sampler, get_worker_info

from ..flow import pool


def load_captioned_data(
    dataset_name: str | None, train_data_dir: str | None, image_column: str, caption_column: str
) -> tuple[Dataset, Dataset]:
    """
    Loads pictures with captions and splits off what is not trained on: data with no `validation` or `test` of its own has
    5 % held out, 256 at most, and always the same ones.

    Args:
        dataset_name (`str`, *optional*):
            A dataset on the Hub.
        train_data_dir (`str`, *optional*):
            Instead of it, a folder with pictures and a `metadata.jsonl` or `metadata.csv` (an imagefolder), a folder
            with parquet files, or one parquet file.
        image_column (`str`), caption_column (`str`):
            The columns to read.

    Returns:
        The training and the validation rows, with the columns `image` and `text`.

    Raises:
        `ValueError`: if there is not exactly one source, or a column is missing or of the wrong type.
    """
    if dataset_name is not None and train_data_dir is None:
        splits = load_dataset(dataset_name)
    elif train_data_dir is not None and dataset_name is None:
        if not Path(train_data_dir).exists():
            raise ValueError(f"`train_data_dir={train_data_dir!r}` does not exist.")
        if Path(train_data_dir).is_file():
            splits = load_dataset("parquet", data_files=train_data_dir)
        else:
            splits = load_dataset(train_data_dir)
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
                "column, or write one caption for each picture."
            )
        split = split.select_columns([image_column, caption_column])
        splits[name] = split.rename_columns({image_column: "image", caption_column: "text"})

    if "train" not in splits:
        raise ValueError(f"The data has no train split, only {list(splits)}: name one of its files or folders train.")
    for name in ("validation", "test"):
        if name in splits:
            return splits["train"], splits[name]
    if len(splits["train"]) < 2:
        raise ValueError("The data has fewer than two rows: there is nothing to train on and to hold out.")
    held_out = min(256, max(1, len(splits["train"]) // 20))
    split = splits["train"].train_test_split(test_size=held_out, seed=0)
    return split["train"], split["test"]


def to_pixel_values(image: PILImage.Image, resolution: int) -> torch.Tensor:
    """
    A picture as a tensor `(3, resolution, resolution)`, uint8: upright, transparent parts white, the centre cropped
    square, scaled with antialiasing.
    """
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if image.size != (resolution, resolution):
        image = ImageOps.fit(image, (resolution, resolution), method=PILImage.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class CaptionedPictures(torch.utils.data.Dataset):
    """
    Rows of `image` and `text` as `pixel_values` `(3, resolution, resolution)`, uint8, and `caption`.

    If all of them fit in `max_cache_bytes`, each picture is decoded and scaled once and then kept in memory; not so in
    a data loader's workers, each of which would keep its own.
    """

    def __init__(self, rows: Dataset, resolution: int, max_cache_bytes: int = 2 * 2**30):
        self.rows = rows
        self.resolution = resolution
        self.captions = list(rows["text"])
        if None in self.captions:
            raise ValueError(f"Row {self.captions.index(None)} has no caption: write one, or drop the row.")
        self.cache: dict[int, torch.Tensor] | None = {} if len(rows) * 3 * resolution**2 <= max_cache_bytes else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        cache = self.cache if get_worker_info() is None else None
        if cache is not None and index in cache:
            pixel_values = cache[index]
        else:
            pixel_values = to_pixel_values(self.rows[index]["image"], self.resolution)
            if cache is not None:
                cache[index] = pixel_values
        return {"pixel_values": pixel_values, "caption": self.captions[index]}


def normalize(pixel_values: torch.Tensor, factor: int) -> torch.Tensor:
    """
    Bytes `(B, 3, R, R)` to pictures `(B, 3, R / factor, R / factor)` in [-1, 1]. All phases read their pictures at the
    final resolution and average them down, so that what a core is trained on is what a model grown from it pools.
    """
    return pool(pixel_values.float() / 127.5 - 1, factor)


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


def sample_seeds(key: tuple[int, ...], first: int, count: int) -> list[int]:
    """
    A seed for each picture of a batch, from `key`, such as (seed, step), and from the picture's place in the global batch,
    `first` and following: noise depends neither on the number of processes nor on what was drawn before.
    """
    seeds = np.random.SeedSequence(key).generate_state(first + count, np.uint64)[first:]
    return [int(seed) for seed in seeds >> np.uint64(1)]


def sample_generators(key: tuple[int, ...], first: int, count: int) -> list[torch.Generator]:
    """Random generators with the [`sample_seeds`], as pipelines take them."""
    return [torch.Generator().manual_seed(seed) for seed in sample_seeds(key, first, count)]
