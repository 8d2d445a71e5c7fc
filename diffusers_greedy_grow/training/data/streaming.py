# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
Captioned images from a stream: data that is too large to be had in order, as files on the Hub or on a disk.

Batches come from *lanes*. The files are dealt to the lanes, again for each epoch; a lane reads its own ones epoch after epoch
through a shuffle buffer, and batch `g` of a phase is the next one of lane `g % lanes`. There are as many lanes as a run
has processes times workers, so each reads its own files and nothing else; with fewer files than lanes, some share one. As
a batch depends on its lane alone, a phase goes on from a checkpoint with the same batches on any number of processes and
workers that divides the number of lanes. Where batches are larger or smaller now, they hold other rows, but no row is repeated
or lost.

In each of its epochs a lane shows every row once, and the lanes of an epoch together every row of the data. Lanes with fewer
rows are done with it sooner, and one that is dealt none (only files that are held out, say) passes over to its next epoch. To
go on, a lane reads its epoch again from the start, but decodes only what it needs.
"""

import copy
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TypedDict

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from diffusers.training_utils import find_nearest_bucket
from torch.utils.data import DataLoader, get_worker_info

from ..signals import leave_signals_to_the_parent
from .images import average_down, open_image, to_pixel_values
from .rows import BrokenRow, BrokenRows, check_caption, name_row
from .sources import load_splits


# Rows that are taken from a stream at once.
READ_SIZE = 64


class LaneState(TypedDict):
    """
    Where a lane stands: `read` is the epoch and the number of its rows that have been read; `waiting` are those among the
    rows read, likewise named, that are not in a batch yet.
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
) -> tuple[IterableDataset, Dataset, tuple[int, int]]:
    """
    A stream of images with captions, and the rows that are held out: the first `num_held_out` good ones of a `validation` or
    `test` split if there is one, of the stream itself if not. `broken` counts the others among them.

    Returns:
        The stream and the held-out rows, with the columns `image` (undecoded) and `text`; and the file of the stream and
        the row in it before which nothing is trained on.

    Raises:
        `ValueError`: as [`load_splits`] does, if too many are broken, and if none of the stream is left to train on.
    """
    broken = broken or BrokenRows()
    splits = load_splits(dataset_name, train_data_dir, image_column, caption_column, streaming=True)
    name = next((name for name in ("validation", "test") if name in splits), "train")
    rows: list[dict] = []
    first = (0, 0)
    for (file, row_number), row in read_files(splits[name]):
        if len(rows) == num_held_out:
            break
        if name == "train":
            first = (file, row_number + 1)
        broken.read += 1
        try:
            check_caption(row["text"])
            open_image(row["image"])
            rows.append(row)
        except BrokenRow as error:
            broken.add(name_row(f"row {row_number} of file {file}", row), error)
    else:  # there was no further row
        if name == "train":
            raise ValueError(
                f"{len(rows)} rows of the stream are held out, and none is left to train on: hold out fewer by "
                "`num_validation_images`, or do without `streaming`."
            )
    columns = {column: [row[column] for row in rows] for column in ("image", "text")}
    return splits["train"], Dataset.from_dict(columns, features=splits[name].features), first


def read_files(stream: IterableDataset, files: Iterable[int] | None = None) -> Iterator[tuple[tuple[int, int], dict]]:
    """
    The rows of some of a stream's files or of all, each with the number of its file and its own number in it. Unlike a loop
    over the stream itself, one in a data loader's worker leaves nothing to the other workers.
    """
    for file in range(stream.num_shards) if files is None else files:
        batches = stream.shard(num_shards=stream.num_shards, index=file).iter(READ_SIZE)
        rows = (dict(zip(batch, values)) for batch in batches for values in zip(*batch.values()))
        yield from (((file, row_number), row) for row_number, row in enumerate(rows))


def deal(files: list[int], lane: int, lanes: int) -> tuple[list[int], int]:
    """
    Which of the files a lane reads, and how many lanes have those files: more than itself only if there are fewer files than
    lanes. Of a file's rows each of them has the same share whichever file it is.
    """
    if len(files) < lanes:
        return [files[lane % len(files)]], len(range(lane % len(files), lanes, len(files)))
    return files[lane::lanes], 1


class StreamedImages:
    """
    Rows of `image` and `text` as batches of `pixel_values` `(B, 3, H, W)`, uint8, and `caption`. Broken rows are left out.

    Args:
        stream (`IterableDataset`), first (`tuple[int, int]`):
            As [`load_captioned_stream`] returns them.
        resolution (`int`):
            The side of the images.
        buckets (`list[tuple[int, int]]`, *optional*):
            Heights and widths, if images are not all to be square. The images of a batch share one; processes may have
            different ones in a step.
        broken (`BrokenRows`, *optional*):
            What counts broken rows.
        shuffle_buffer_size (`int`, defaults to 1000):
            Among how many rows, undecoded, each lane draws the next one.
    """

    def __init__(
        self,
        stream: IterableDataset,
        first: tuple[int, int],
        resolution: int,
        buckets: list[tuple[int, int]] | None = None,
        broken: BrokenRows | None = None,
        shuffle_buffer_size: int = 1000,
    ):
        self.stream, self.first = stream, first
        self.resolution, self.pool_factor = resolution, 1
        self.buckets = buckets or [(resolution, resolution)]
        self.broken = broken or BrokenRows()
        self.shuffle_buffer_size = shuffle_buffer_size

    @property
    def captions(self) -> Iterator[str]:
        """Of the whole stream, one after the other, but for broken ones."""
        return self.read_captions(0, 1)

    def read_captions(self, share: int, shares: int) -> Iterator[str]:
        """Those of one of several readers, each of which reads its own files, as lanes do."""
        files = list(range(self.stream.num_shards))
        for _, row in self.read_share(self.stream.select_columns(["text"]), files, share, shares):
            try:
                yield check_caption(row["text"])
            except BrokenRow:
                continue

    def at(self, resolution: int) -> "StreamedImages":
        """The same images averaged down to `resolution`: float32 in [-1, 1], if it is not their own."""
        images = copy.copy(self)
        images.pool_factor = self.resolution // resolution
        return images

    def read_share(
        self, stream: IterableDataset, files: list[int], lane: int, lanes: int
    ) -> Iterator[tuple[tuple[int, int], dict]]:
        """What [`read_files`] returns, of the rows that a lane is dealt and that are not held out."""
        own, sharing = deal(files, lane, lanes)
        for place, row in read_files(stream, (file for file in own if file >= self.first[0])):
            if place >= self.first and place[1] % sharing == lane // len(files):
                yield place, row

    def shuffle_files(self, seed: tuple[int, ...], epoch: int) -> list[int]:
        return np.random.default_rng([*seed, epoch]).permutation(self.stream.num_shards).tolist()

    def read_rows(self, lane: int, lanes: int, seed: tuple[int, ...], epoch: int) -> Iterator[tuple[str, dict]]:
        """The rows of a lane in an epoch, shuffled and undecoded, with their names."""
        rng = np.random.default_rng([*seed, epoch, lane])
        buffer: list[tuple[str, dict]] = []
        for (file, row_number), row in self.read_share(self.stream, self.shuffle_files(seed, epoch), lane, lanes):
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
        The batches of a lane without end, each with the `state` after it; from `state` on if it is given.

        Raises:
            `ValueError`: if the lane has no rows in any file, or too many broken ones.
        """
        done = tuple(state["read"]) if state is not None else (0, 0)
        kept = {tuple(position) for position in state["waiting"]} if state is not None else set()
        waiting: dict[tuple[int, int], list] = defaultdict(list)
        unread = set(range(self.first[0], self.stream.num_shards))  # files that may yet have a row for this lane
        for epoch in itertools.count(min([done, *kept])[0]):
            position = (epoch, 0)
            for i, (place, row) in enumerate(self.read_rows(lane, lanes, seed, epoch)):
                position = (epoch, i + 1)
                if position <= done and position not in kept:
                    continue
                self.broken.read += 1
                try:
                    caption = check_caption(row["text"])
                    image = open_image(row["image"])
                except BrokenRow as error:
                    self.broken.add(name_row(place, row), error)
                    continue
                bucket = self.buckets[find_nearest_bucket(image.height, image.width, self.buckets)]
                waiting[bucket].append((position, to_pixel_values(image, *bucket), caption))
                if len(waiting[bucket]) == batch_size:
                    _, pixel_values, captions = zip(*waiting.pop(bucket))
                    left = [row[0] for rows in waiting.values() for row in rows]
                    left += [row for row in kept if row > position]  # only if batches were larger before
                    yield {
                        "pixel_values": average_down(torch.stack(pixel_values), self.pool_factor),
                        "caption": list(captions),
                        "lane": lane,
                        "state": {"read": max(position, done), "waiting": left},
                    }
            if position == (epoch, 0):  # another epoch deals it other files, but never another share of a file
                unread -= {*deal(self.shuffle_files(seed, epoch), lane, lanes)[0]}
                if not unread:
                    raise ValueError(
                        f"No file has a row for reader {lane + 1} of {lanes}, as many as processes times workers: lower "
                        "`dataloader_num_workers`, or do without `streaming`."
                    )


class LaneBatches(torch.utils.data.IterableDataset):
    """The batches of one process, `num_batches` from number `start` of the phase on, dealt to a loader's workers."""

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
        # A loader takes batches from its workers in turn.
        for i in range(first, self.num_batches, step):
            lane = (self.start + i * self.num_processes + self.process_index) % self.lanes
            if lane not in readers:
                readers[lane] = self.images.read_lane(
                    lane, self.lanes, self.batch_size, self.seed, self.states.get(lane)
                )
            yield next(readers[lane])


class StreamLoader:
    """
    The batches of one process from a stream, and the state to go on from.

    Args:
        images (`StreamedImages`):
            The data, at the resolution of the phase.
        batch_size (`int`), num_batches (`int`):
            Of this process.
        start (`int`):
            How many batches all processes together have had in this phase.
        process_index (`int`), num_processes (`int`), num_workers (`int`):
            Who reads.
        seed (`tuple[int, ...]`):
            What the order depends on.
        state (`dict`, *optional*):
            What [`StreamLoader.state`] returned, to go on from there.
        pin_memory (`bool`, defaults to `False`):
            As in a data loader.

    Raises:
        `ValueError`: if the lanes in `state` cannot be dealt to the processes and workers, or are of other data.
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
                f"`dataloader_num_workers={num_workers}` cannot share: take a number of processes times workers that "
                f"divides {self.lanes}."
            )
        self.data = {"files": images.stream.num_shards, "first row": list(images.first)}
        if state is not None and state["data"] != self.data:
            raise ValueError(
                f"The checkpoint's data had {state['data']}, but now it has {self.data}. What it is and how much of it is held "
                "out by `num_validation_images` must be as it was."
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
        """What all processes need to go on after the batch that each had last. Called on all of them."""
        states = dict(self.earlier)
        for own in gather_object([self.states]):
            states.update(own)
        return {"lanes": self.lanes, "data": self.data, "states": states}
