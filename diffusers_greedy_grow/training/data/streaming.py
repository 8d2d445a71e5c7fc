# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
Captioned images from a stream of files, on the Hub or on a disk, for data that is too large to be put in order first.

Batches come from *lanes*. The files are dealt to the lanes, in a new order each epoch. A lane reads its own files, epoch
after epoch, through a shuffle buffer, and batch `g` of a phase is the next batch of lane `g % lanes`. There are as many lanes
as a run has processes times workers, so each worker reads its own files and nothing else; if there are fewer files than
lanes, some lanes share a file. A batch depends on its lane alone. A phase therefore resumes from a checkpoint with the same
batches on any number of processes and workers that divides the number of lanes. If the batch size changes, batches hold other
rows, but no row is repeated or lost.

In each of its epochs a lane shows each of its rows once, and all lanes together show every row of the data. Lanes with fewer
rows finish an epoch sooner. A lane without any row in an epoch, for instance because its files are held out, passes over to
its next epoch. To resume, a lane reads its epoch again from the start, but decodes only the rows that it still needs.
"""

import contextlib
import copy
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TypedDict

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from diffusers.training_utils import find_nearest_bucket
from torch.utils.data import DataLoader, default_collate, get_worker_info

from ..signals import leave_signals_to_the_parent
from .images import MAX_IMAGE_PIXELS, average_down, open_image, to_pixel_values
from .rows import BrokenRow, BrokenRows, check_caption, is_good, list_captions, name_row
from .sharing import find_key
from .sources import EVERYTHING, Selection, load_splits
from .visits import Augmentation, draw_caption


# How many rows are taken from a stream at once.
READ_SIZE = 64


class LaneState(TypedDict):
    """
    The position of a lane: `read` is the epoch and the number of its rows that have been read; `waiting` holds the positions,
    in the same form, of the rows that have been read but are not in a batch yet.
    """

    read: tuple[int, int]
    waiting: list[tuple[int, int]]


def load_captioned_stream(
    dataset_name: str | None,
    train_data_dir: str | None,
    image_column: str,
    caption_column: str,
    num_held_out: int,
    broken: BrokenRows | None = None,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    selection: Selection = EVERYTHING,
) -> tuple[IterableDataset, Dataset, tuple[int, int]]:
    """
    Open a stream of images with captions, and read the rows to hold out: the first `num_held_out` good rows of a `validation`
    or `test` split if there is one, else of the stream itself. `broken` counts the broken rows among them.

    Returns:
        The stream and the held-out rows, with the columns `image` (undecoded) and `text`; and the first row to train on, as
        the number of its file and its number in that file.

    Raises:
        `ValueError`: if [`load_splits`] raises it, if too many rows are broken, or if no row is left to train on.
    """
    broken = broken or BrokenRows()
    splits = load_splits(
        dataset_name, train_data_dir, image_column, caption_column, streaming=True, selection=selection
    )
    name = next((name for name in ("validation", "test") if name in splits), "train")
    images: dict = {}  # the rows by their images
    first = (0, 0)
    for (file, row_number), row in read_files(splits[name]):
        if len(images) == num_held_out:
            break
        if name == "train":
            first = (file, row_number + 1)
        broken.read += 1
        try:
            captions = list_captions(row["text"])
            captions = list(filter(is_good, captions)) or [check_caption(captions[0])]
            open_image(row["image"], max_image_pixels=max_image_pixels)
            key = find_key(row["image"])
            if key in images:
                captions = [*list_captions(images[key]["text"]), *captions]
            images[key] = {"image": row["image"], "text": captions if len(captions) > 1 else captions[0]}
        except BrokenRow as error:
            broken.add(name_row(f"row {row_number} of file {file}", row), error)
    else:  # the split has no further row
        if name == "train":
            raise ValueError(
                f"{len(images)} rows of the stream are held out, and none is left to train on: hold out fewer by "
                "`num_validation_images`, or leave out `streaming`."
            )
    texts = [row["text"] for row in images.values()]
    features = Features({"image": Image(decode=False), "text": Value("string")})
    if any(isinstance(text, list) for text in texts):
        features["text"], texts = List(Value("string")), [list_captions(text) for text in texts]
    columns = {"image": [row["image"] for row in images.values()], "text": texts}
    return splits["train"], Dataset.from_dict(columns, features=features), first


def read_files(stream: IterableDataset, files: Iterable[int] | None = None) -> Iterator[tuple[tuple[int, int], dict]]:
    """
    Yield the rows of some of a stream's files, or of all, each with the number of its file and its number in that file. Unlike
    a loop over the stream itself, this reads the same rows in a data loader's worker as elsewhere: `datasets` would leave some
    to the other workers.
    """
    for file in range(stream.num_shards) if files is None else files:
        batches = stream.shard(num_shards=stream.num_shards, index=file).iter(READ_SIZE)
        rows = (dict(zip(batch, values)) for batch in batches for values in zip(*batch.values()))
        yield from (((file, row_number), row) for row_number, row in enumerate(rows))


def deal(files: list[int], lane: int, lanes: int) -> tuple[list[int], int]:
    """
    Return the files that a lane reads, and how many lanes share them: several only if there are fewer files than lanes. Each
    of the lanes that share a file reads an equal part of its rows; the lane's number decides which part.
    """
    if len(files) < lanes:
        return [files[lane % len(files)]], len(range(lane % len(files), lanes, len(files)))
    return files[lane::lanes], 1


class StreamedImages:
    """
    Streamed rows of `image` and `text` as batches of `pixel_values` `(B, 3, H, W)`, uint8, and `caption`. Broken rows are left
    out.

    Args:
        stream (`IterableDataset`), first (`tuple[int, int]`):
            The stream and its first row to train on, as [`load_captioned_stream`] returns them.
        resolution (`int`):
            The height and width of the images.
        buckets (`list[tuple[int, int]]`, *optional*):
            Heights and widths, if not all images are to be square: each image gets the nearest shape. The images of a batch
            have the same shape; the batches of several processes in a step may have different ones.
        broken (`BrokenRows`, *optional*):
            The counter of broken rows.
        shuffle_buffer_size (`int`, defaults to 1000):
            The number of rows, still undecoded, among which each lane draws the next one.
        max_image_pixels (`int`):
            The most pixels that an image file may have.
        augmentation ([`Augmentation`], *optional*):
            How visits of an image differ. By default, they do not.
    """

    def __init__(
        self,
        stream: IterableDataset,
        first: tuple[int, int],
        resolution: int,
        buckets: list[tuple[int, int]] | None = None,
        broken: BrokenRows | None = None,
        shuffle_buffer_size: int = 1000,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        augmentation: Augmentation | None = None,
    ):
        self.stream, self.first = stream, first
        self.held_out: frozenset = frozenset()  # the keys of the images of rows that are held out
        self.resolution, self.pool_factor = resolution, 1
        self.augmentation = augmentation or Augmentation()
        self.buckets = buckets or [(resolution, resolution)]
        self.broken = broken or BrokenRows()
        self.shuffle_buffer_size, self.max_image_pixels = shuffle_buffer_size, max_image_pixels

    @property
    def all_captions(self) -> Iterator[str]:
        """The same as `captions`, under the name that it has for images in order."""
        return self.captions

    @property
    def captions(self) -> Iterator[str]:
        """All captions of the stream, one after the other, without broken ones."""
        return self.read_captions(0, 1)

    def read_captions(self, share: int, shares: int) -> Iterator[str]:
        """Yield the captions for reader `share` of `shares`, each of which reads its own files, as lanes do."""
        files = list(range(self.stream.num_shards))
        for _, row in self.read_share(self.stream.select_columns(["text"]), files, share, shares):
            for caption in list_captions(row["text"]):
                with contextlib.suppress(BrokenRow):
                    yield check_caption(caption)

    def at(self, resolution: int) -> "StreamedImages":
        """Return the same images averaged down to `resolution`. Unless it is their own, they are float32 in [-1, 1]."""
        images = copy.copy(self)
        images.pool_factor = self.resolution // resolution
        return images

    def read_share(
        self, stream: IterableDataset, files: list[int], lane: int, lanes: int
    ) -> Iterator[tuple[tuple[int, int], dict]]:
        """Yield the rows that a lane is dealt and that are not held out, as [`read_files`] does."""
        own, sharing = deal(files, lane, lanes)
        for place, row in read_files(stream, (file for file in own if file >= self.first[0])):
            if place < self.first or place[1] % sharing != lane // len(files):
                continue
            if self.held_out and "image" in row and find_key(row["image"]) in self.held_out:
                continue
            yield place, row

    def shuffle_files(self, seed: tuple[int, ...], epoch: int) -> list[int]:
        """Return the numbers of all files in the order of an epoch."""
        return np.random.default_rng([*seed, epoch]).permutation(self.stream.num_shards).tolist()

    def read_rows(self, lane: int, lanes: int, seed: tuple[int, ...], epoch: int) -> Iterator[tuple[str, dict]]:
        """Yield the rows of a lane in an epoch, shuffled and undecoded, with their names."""
        rng = np.random.default_rng([*seed, epoch, lane])
        buffer: list[tuple[str, dict]] = []
        for (file, row_number), row in self.read_share(self.stream, self.shuffle_files(seed, epoch), lane, lanes):
            row["visit"] = (*seed, epoch, file, row_number)
            if isinstance(row["text"], list):
                good = [caption for caption in row["text"] if is_good(caption)] or [None]
                row["text"] = draw_caption(good, row["visit"])
            buffer.append((f"row {row_number} of file {file}", row))
            if len(buffer) == self.shuffle_buffer_size:
                i = int(rng.integers(len(buffer)))
                buffer[i], buffer[-1] = buffer[-1], buffer[i]
                yield buffer.pop()
        yield from (buffer[i] for i in rng.permutation(len(buffer)))

    def read_lane(
        self, lane: int, lanes: int, batch_size: int, seed: tuple[int, ...], state: LaneState | None
    ) -> Iterator[dict]:
        """
        Yield the batches of a lane without end, each with the `state` after it. With `state`, begin where it was taken.

        Raises:
            `ValueError`: if no file has a row for the lane, or if too many rows are broken.
        """
        done = tuple(state["read"]) if state is not None else (0, 0)
        kept = {tuple(position) for position in state["waiting"]} if state is not None else set()
        waiting: dict[tuple[int, int], list] = defaultdict(list)
        size_to_read = self.augmentation.size_to_read
        largest = size_to_read(max(map(max, self.buckets)))
        unread = set(range(self.first[0], self.stream.num_shards))  # files that may still have a row for this lane
        for epoch in itertools.count(min([done, *kept])[0]):
            position = (epoch, 0)
            for i, (place, row) in enumerate(self.read_rows(lane, lanes, seed, epoch)):
                position = (epoch, i + 1)
                if position <= done and position not in kept:
                    continue
                self.broken.read += 1
                try:
                    caption = check_caption(row["text"])
                    image = open_image(row["image"], largest, self.max_image_pixels)
                except BrokenRow as error:
                    self.broken.add(name_row(place, row), error)
                    continue
                bucket = self.buckets[find_nearest_bucket(image.height, image.width, self.buckets)]

                def report(reason: str, name: str = name_row(place, row)) -> None:
                    self.broken.add_ignored(name, reason)

                height, width = map(size_to_read, bucket)
                pixel_values = to_pixel_values(image, height, width, report)
                shown = {**self.augmentation.apply(pixel_values, row["visit"], *bucket), "caption": caption}
                waiting[bucket].append((position, shown))
                if len(waiting[bucket]) == batch_size:
                    batch = default_collate([shown for _, shown in waiting.pop(bucket)])
                    left = [row[0] for rows in waiting.values() for row in rows]
                    left += [row for row in kept if row > position]  # if batches were larger before
                    yield {
                        **batch,
                        "pixel_values": average_down(batch["pixel_values"], self.pool_factor),
                        "lane": lane,
                        "state": {"read": max(position, done), "waiting": left},
                    }
            if position == (epoch, 0):  # the next epoch deals the lane other files, but the same part of each
                unread -= {*deal(self.shuffle_files(seed, epoch), lane, lanes)[0]}
                if not unread:
                    raise ValueError(
                        f"No file has a row for reader {lane + 1} of {lanes}, as many as processes times workers: lower "
                        "`dataloader_num_workers`, or leave out `streaming`."
                    )


class LaneBatches(torch.utils.data.IterableDataset):
    """The batches of one process: `num_batches` of them, after `start` batches of all processes, dealt to a loader's workers."""

    def __init__(
        self,
        images: StreamedImages,
        batch_size: int,
        start: int,
        num_batches: int,
        process_index: int,
        num_processes: int,
        seed: tuple[int, ...],
        lanes: int,
        states: dict[int, LaneState],
    ):
        self.images, self.batch_size = images, batch_size
        self.start, self.num_batches = start, num_batches
        self.process_index, self.num_processes = process_index, num_processes
        self.seed, self.lanes, self.states = seed, lanes, states

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        readers: dict[int, Iterator[dict]] = {}
        # A data loader takes batches from its workers in turn, so worker i yields the batches i, i + num_workers, ...
        for i in range(first, self.num_batches, step):
            lane = (self.start + i * self.num_processes + self.process_index) % self.lanes
            if lane not in readers:
                readers[lane] = self.images.read_lane(
                    lane, self.lanes, self.batch_size, self.seed, self.states.get(lane)
                )
            yield next(readers[lane])


class StreamLoader:
    """
    The batches of one process from a stream, and the state to resume from.

    Args:
        images (`StreamedImages`):
            The data, at the resolution of the phase.
        batch_size (`int`), num_batches (`int`):
            The number of images per batch, and of batches for this process.
        start (`int`):
            The number of batches that all processes together have had in this phase.
        process_index (`int`), num_processes (`int`), num_workers (`int`):
            The place of this process among all, and the number of workers in each.
        seed (`tuple[int, ...]`):
            The seed of the order.
        state (`dict`, *optional*):
            The state to resume from, as [`StreamLoader.state`] returned it.
        pin_memory (`bool`, defaults to `False`):
            Whether to put batches into pinned memory, as a data loader does.

    Raises:
        `ValueError`: if the lanes in `state` cannot be dealt to the processes and workers, or belong to other data.
    """

    def __init__(
        self,
        images: StreamedImages,
        batch_size: int,
        start: int,
        num_batches: int,
        process_index: int,
        num_processes: int,
        num_workers: int,
        seed: tuple[int, ...],
        state: dict | None = None,
        pin_memory: bool = False,
    ):
        readers = num_processes * max(1, num_workers)
        self.lanes: int = state["lanes"] if state is not None else readers
        if self.lanes % readers:
            raise ValueError(
                f"The checkpoint's data was read by {self.lanes} readers, which {num_processes} processes with "
                f"`dataloader_num_workers={num_workers}` cannot share: the number of processes times workers must divide "
                f"{self.lanes}."
            )
        self.data = {"files": images.stream.num_shards, "first row": list(images.first)}
        if state is not None and state["data"] != self.data:
            raise ValueError(
                f"The checkpoint's data had {state['data']}, but now it has {self.data}. To resume, use the same data and the "
                "same `num_validation_images`."
            )
        self.earlier = {int(lane): s for lane, s in state["states"].items()} if state is not None else {}
        self.states: dict[int, LaneState] = {}
        batches = LaneBatches(
            images, batch_size, start, num_batches, process_index, num_processes, seed, self.lanes, self.earlier
        )
        self.loader = DataLoader(
            batches,
            batch_size=None,
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=leave_signals_to_the_parent,
        )

    def __iter__(self) -> Iterator[dict]:
        for batch in self.loader:
            self.states[batch.pop("lane")] = batch.pop("state")
            yield batch

    def state(self) -> dict:
        """Return what all processes need to resume after the last batch of each. Must be called on all processes."""
        states = dict(self.earlier)
        for own in gather_object([self.states]):
            states.update(own)
        return {"lanes": self.lanes, "data": self.data, "states": states}
