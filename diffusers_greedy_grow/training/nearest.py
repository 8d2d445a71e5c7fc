# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
Whether samples are copies: each beside the training images that are nearest to it.

The distance of two images is the root mean square of their difference, in [-1, 1], after both are cropped to a square and pooled
to 16 x 16 pixels, or to the lower resolution of the images. An image and its mirror image are the same. The distance says
nothing in itself, since images of one kind are close to each other. So it is compared with that of held-out images, which are
new for certain. Samples without detail, as an untrained model draws them, are closer to all images than images are to each
other.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from PIL import Image

from .data.captioned import CaptionedImages
from .data.images import normalize
from .data.loading import TrainingData
from .phases import Phase
from .samples import draw_grid


logger = get_logger(__name__)

# The side to which images are pooled.
SIDE = 16
# How many training images are compared, drawn by the seed, and how many held-out ones.
MAX_IMAGES, MAX_HELD_OUT = 5000, 256


class NearestImages:
    """
    Finds the training images that are nearest to the samples of each phase. Without effect on streams, which have no images to
    go back to.

    Args:
        path (`Path`): The PNG to write, `nearest.png`.
        data (`TrainingData`): The data of the run.
        seed (`int`): The run's seed, which chooses the training images that are compared.
    """

    def __init__(self, path: Path, data: TrainingData, seed: int):
        self.path, self.data, self.seed = path, data, seed
        self.pooled: dict[tuple[int, int], torch.Tensor] = {}  # of each set of images, at each side

    def draw(self, phase: Phase, samples: list[Image.Image]) -> dict[str, float]:
        """
        Write a row per sample: the sample, and the three nearest training images, with their distances on the left.

        Returns:
            The median distance of the samples to the nearest training image, `nearest_distance`; that of the held-out images,
            `nearest_distance_held_out`; and `nearest_ratio`, the first over the second: near 1 for new images, far below 1 for
            copies. Nothing for a stream.
        """
        images = self.data.at(phase.stage, phase.resolution)
        if not isinstance(images, CaptionedImages):
            return {}
        side = min(SIDE, phase.resolution, *map(min, images.buckets))
        indices = self.choose(len(images))
        trained = self.pool_set(images, indices, side)
        held_out = self.pool_set(self.data.validation, np.arange(min(MAX_HELD_OUT, len(self.data.validation))), side)
        pixels = torch.stack([torch.from_numpy(np.array(sample)).permute(2, 0, 1) for sample in samples])
        distances = measure_distances(pool_images(pixels, side), trained)
        nearest, places = distances.topk(min(3, len(indices)), largest=False)
        rows = {}
        for i, sample in enumerate(samples):
            found = [to_image(images[int(indices[place])]["pixel_values"]) for place in places[i].tolist()]
            rows[f"{i + 1}: " + " ".join(f"{distance:.3f}" for distance in nearest[i].tolist())] = [sample, *found]
        draw_grid(rows, ["sample", "nearest training image", "second", "third"][: 1 + nearest.shape[1]], self.path)
        own = nearest[:, 0].median().item()
        expected = measure_distances(held_out, trained).amin(dim=1).median().item()
        values = {"nearest_distance": own, "nearest_distance_held_out": expected}
        if expected == 0:
            logger.warning("Most held-out images are training images, too: their losses say nothing about new images.")
            return values
        return {**values, "nearest_ratio": own / expected}

    def choose(self, count: int) -> np.ndarray:
        """Return the indices of the training images that are compared, out of `count`."""
        return np.sort(np.random.default_rng(self.seed).permutation(count)[:MAX_IMAGES])

    def pool_set(self, images: CaptionedImages, indices: np.ndarray, side: int) -> torch.Tensor:
        """Return some images pooled to `side`, `(B, 3, side, side)`. They are decoded once per run, not once per phase."""
        key = id(images.caption_lists), side  # of the same list in all copies of a set
        if key not in self.pooled:
            images = images.at(images.resolution)
            pooled = [pool_images(images[int(i)]["pixel_values"].unsqueeze(0), side) for i in indices]
            self.pooled[key] = torch.cat(pooled)
        return self.pooled[key]


def pool_images(pixel_values: torch.Tensor, side: int) -> torch.Tensor:
    """Return the central squares of images `(B, 3, H, W)`, as bytes or in [-1, 1], averaged to `(B, 3, side, side)`."""
    height, width = pixel_values.shape[-2:]
    square = min(height, width)
    top, left = (height - square) // 2, (width - square) // 2
    pixel_values = pixel_values[..., top : top + square, left : left + square]
    return F.adaptive_avg_pool2d(normalize(pixel_values), side)


def measure_distances(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return the distances `(N, M)` of pooled images `(N, 3, S, S)` to others `(M, 3, S, S)`, or to their mirror images."""
    exact = "donot_use_mm_for_euclid_dist"  # a product of matrices would round the distance of a copy to .001 or so
    to_others, to_mirrored = (
        torch.cdist(own.flatten(1), others.flatten(1), compute_mode=exact) for own in (images, images.flip(-1))
    )
    return torch.minimum(to_others, to_mirrored) / images[0].numel() ** 0.5


def to_image(pixel_values: torch.Tensor) -> Image.Image:
    """Return the central square of an image `(3, H, W)`, as bytes or in [-1, 1], as a PIL image."""
    side = min(pixel_values.shape[-2:])
    values = pool_images(pixel_values.unsqueeze(0), side)[0]
    return Image.fromarray(((values + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())
