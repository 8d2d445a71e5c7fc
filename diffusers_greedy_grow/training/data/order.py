# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The order in which rows are shown. It depends on the seed alone, so that a resumed run sees what it would have seen."""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class EpochOrder(Sampler[int]):
    """
    Indices of rows, epoch after epoch, each epoch in its own random order.

    Args:
        size (`int`): The number of rows.
        start (`int`), num_samples (`int`): How many indices to leave out at the start, and how many to give.
        seed (`tuple[int, ...]`): The seed. The order of an epoch depends on it and on the epoch's number.
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
    Batches of indices such that all images of a step have the same shape. Rows are collected by shape in the order of
    [`EpochOrder`]; as soon as a shape has enough rows for a step, they make one. Rows that are left at the end of an epoch
    go into the batches of the next one, so that every epoch shows every row.

    Args:
        shapes (`np.ndarray`): The shape of each row, as an index.
        batch_size (`int`): The number of rows per batch.
        batches_per_step (`int`): The number of consecutive batches that have the same shape.
        start (`int`), num_steps (`int`): How many steps to leave out at the start, and how many to give.
        seed (`tuple[int, ...]`): The seed, as for [`EpochOrder`].
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
        self.drop_last = True  # tells accelerate that every batch is full

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


class VisitOrder(Sampler):
    """
    The indices, or batches of indices, of another order, each index with the key of its visit, by which a caption and a mirror
    image are drawn: the seed and the index's place in the phase. It does not depend on how steps are split into batches.

    Args:
        order (`EpochOrder` or `BucketOrder`): The other order.
        start (`int`): How many indices it leaves out at the start.
        seed (`tuple[int, ...]`): The seed.
    """

    def __init__(self, order: Sampler, start: int, seed: tuple[int, ...]):
        self.order, self.start, self.seed = order, start, seed
        if isinstance(order, BucketOrder):  # as accelerate asks of batches
            self.drop_last, self.batch_size = order.drop_last, order.batch_size

    def __len__(self) -> int:
        return len(self.order)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator:
        place = self.start
        for item in self.order:
            indices = item if isinstance(item, list) else [item]
            visits = [(index, (*self.seed, place + i)) for i, index in enumerate(indices)]
            place += len(indices)
            yield visits if isinstance(item, list) else visits[0]
