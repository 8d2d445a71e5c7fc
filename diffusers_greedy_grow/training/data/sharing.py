# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Rows that share an image: how they are found, and how they become one image with several captions."""

import hashlib
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets

from .rows import is_good, list_captions


# Unlike accelerate's, this logger works before there is an `Accelerator`.
logger = logging.getLogger(__name__)


def take_digest(content: bytes | memoryview) -> bytes:
    """Return a digest of the bytes of an image file."""
    return hashlib.blake2b(content, digest_size=16).digest()


def find_key(image: dict | None) -> bytes | str | None:
    """Return what is the same for rows that share an image: a digest of its bytes, else its path."""
    if image is None:
        return None
    if image["bytes"] is not None:
        return take_digest(image["bytes"])
    return None if image["path"] is None else os.path.realpath(image["path"])


def read_images(rows: Dataset) -> Iterator[tuple[memoryview | None, str | None]]:
    """Yield the bytes, without copying them, and the path of each image."""
    for table in rows.select_columns(["image"]).with_format("arrow").iter(1000):
        column = table["image"].combine_chunks()
        for content, path in zip(column.field("bytes"), column.field("path")):
            yield (memoryview(content.as_buffer()) if content.is_valid else None), path.as_py()


def find_keys(rows: Dataset) -> list:
    """
    Return a key per row, the same for rows that share an image, as [`find_key`] does. A row without an image has a key of its
    own. To spare reading all data, only bytes of the same length and with the same end are compared.
    """
    clues: list[tuple] = []
    for i, (content, path) in enumerate(read_images(rows)):
        if content is not None:
            clues.append((len(content), bytes(content[-64:])))
        else:
            clues.append(("no image", i) if path is None else (os.path.realpath(path),))
    counts, keys = Counter(clues), list[object](clues)
    compared = np.array([i for i, clue in enumerate(clues) if counts[clue] > 1], dtype=np.int64)
    for i, (content, _) in zip(compared.tolist(), read_images(rows.select(compared))):
        if content is not None:
            keys[i] = take_digest(content)
    return keys


def merge_rows(rows: Dataset) -> Dataset:
    """
    Return one row per image, in the order of their first rows, with the captions of all rows that share it. Rows without a
    good caption stay as they are, for whoever names broken rows.
    """
    texts = [list_captions(text) for text in rows["text"]]
    groups: dict = defaultdict(list)
    for i, key in enumerate(find_keys(rows)):
        groups[key if any(map(is_good, texts[i])) else ("no caption", i)].append(i)
    if len(groups) == len(rows):
        return rows
    logger.info(f"{len(rows)} rows share {len(groups)} images: each image is one, with several captions.")
    captions: list[list | None] = [None] * len(texts)
    for indices in groups.values():
        captions[indices[0]] = [caption for i in indices for caption in texts[i]]
    features = Features({"text": List(Value("string"))})
    merged = Dataset.from_dict({"text": captions}, features=features)
    first = [indices[0] for indices in groups.values()]
    return concatenate_datasets([rows.remove_columns("text"), merged], axis=1).select(first)
