# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The draws of training images: everything that is random when an image is visited, decided once for several visits."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch

from ...flow import sample_sigma
from ..data.captioned import CaptionedImages
from ..data.loading import order_visits
from ..seeds import sample_seeds


# Takes the place of the step in the keys of random numbers, which are longer than those of steps.
DRAWS = 1002


@dataclass(frozen=True)
class Draws:
    """
    Draws everything that is random in the visits of training images. A draw depends on the seed, the phase, the image and the
    draw's number alone, so that its noise need not be stored.

    Args:
        seed (`int`), phase (`int`): The run's seed, and the index of the phase.
        count (`int`): The number of draws per image.
        shift (`float`), logit_mean (`float`), logit_std (`float`): The distribution of noise levels, see [`sample_sigma`].
        caption_dropout (`float`): The share of captions to leave empty.
        device (`str`): The kind of device on which noise is drawn, since others draw other noise.
    """

    seed: int
    phase: int
    count: int
    shift: float
    logit_mean: float
    logit_std: float
    caption_dropout: float
    device: str

    def key(self, index: int, number: int) -> tuple[int, ...]:
        """Return the key of draw `number` of the image `index`, which also decides its caption, mirror image and crop."""
        return (self.seed, self.phase, DRAWS, index, number)

    def __call__(
        self, indices: list[int], numbers: list[int], shape: torch.Size, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
        """
        Return noise of `shape`, `(B, C, H, W)`, and noise levels `(B,)`, both on `device`; and per image whether to drop its
        caption. `indices` and `numbers` are those of the images and of their draws.
        """
        noise, generator = torch.empty(shape, device=device), torch.Generator(device)
        sigmas, dropped = [], []
        for image, index, number in zip(noise, indices, numbers, strict=True):
            noise_seed, level_seed = sample_seeds(self.key(index, number), 0, 2)
            image.normal_(generator=generator.manual_seed(noise_seed))
            levels = torch.Generator().manual_seed(level_seed)
            sigmas.append(sample_sigma(1, self.shift, self.logit_mean, self.logit_std, levels))
            dropped.append(torch.rand(1, generator=levels).item() < self.caption_dropout)
        return noise, torch.cat(sigmas).to(device, non_blocking=True), dropped


class DrawnImages(torch.utils.data.Dataset):
    """Training images as a draw shows them: the rows of [`CaptionedImages`] for pairs (image, draw), with the pair as `visit`."""

    def __init__(self, images: CaptionedImages, draws: Draws):
        self.images, self.draws = images, draws

    def __getitem__(self, pair: tuple[int, int]) -> dict:
        index, number = pair
        return {**self.images[index, self.draws.key(index, number)], "visit": f"{index} {number}"}


def read_visits(batch: dict) -> list[tuple[int, int]]:
    """Return the pairs (image, draw) of a batch. They are text in it: loaders move numbers to the GPU, and to read them there waits."""
    return [(int(index), int(number)) for index, number in (visit.split() for visit in batch["visit"])]


def find_read_draws(images: CaptionedImages, draws: Draws, num_steps: int, images_per_step: int) -> np.ndarray:
    """
    Return which draws of which images the steps of a phase read, `(images, draws)`, bool: at most as many draws as epochs. With
    fewer draws than epochs, these are all, but for some of an image whose shape is rare, which an epoch may leave to the next one.

    Args:
        images ([`CaptionedImages`]), draws ([`Draws`]): As for [`CorePredictions`], whose visits are in the order of `draws.seed`
            and `draws.phase`.
        num_steps (`int`), images_per_step (`int`): The steps of the phase, and the images of each, over all processes.
    """
    order = order_visits(images, images_per_step, 1, 0, num_steps, (draws.seed, draws.phase))
    visits = itertools.chain.from_iterable(order) if len(images.buckets) > 1 else iter(order)
    num_epochs = math.ceil(num_steps * images_per_step / len(images))
    read = np.zeros((len(images), min(draws.count, num_epochs)), dtype=bool)
    for epoch in itertools.count():
        indices = np.fromiter(itertools.islice(visits, len(images)), np.int64)
        read[indices, epoch % draws.count] = True
        if len(indices) < len(images) or read.all():
            break
    return read
