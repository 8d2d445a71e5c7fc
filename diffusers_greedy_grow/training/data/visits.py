# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
What is drawn when training visits an image: one of its captions, whether it is mirrored, and which part of it is shown. It
depends on the key of the visit alone, which is the seed and the visit's place in the phase, and so neither on processes and
workers nor on earlier draws.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from .images import resize_part


# Ends of the keys, so that one draw does not tell another.
CAPTION, FLIP, CROP = 1, 2, 3


def draw_caption(captions: list, visit: tuple[int, ...]) -> str | None:
    """Return one of several captions."""
    return captions[int(np.random.default_rng([*visit, CAPTION]).random() * len(captions))]


@dataclass(frozen=True)
class Augmentation:
    """
    How visits of an image differ.

    Args:
        horizontal_flip (`bool`): Whether half of the visits see the mirror image.
        random_crop (`float`):
            In (0, 1]. Half of the visits see a part of the image, scaled to full size. The share of the sides that is left is
            drawn evenly from `random_crop` to 1. At 1, all see the whole image.
    """

    horizontal_flip: bool = False
    random_crop: float = 1.0

    @property
    def varies(self) -> bool:
        """Whether visits differ at all."""
        return self.horizontal_flip or self.random_crop < 1

    def size_to_read(self, side: int) -> int:
        """Return the pixels at which a side must be read so that the smallest part has `side` pixels."""
        return math.ceil(side / self.random_crop)

    def draw_crop(self, visit: tuple[int, ...]) -> tuple[float, float, float]:
        """
        Return the top, the left and the missing share of the sides of a part, all as shares of the image: `(0, 0, 0)` is the
        whole image, which half of the visits see, so that sampling asks for what training has shown.
        """
        whole, cut, top, left = np.random.default_rng([*visit, CROP]).random(4).tolist()
        cut *= 0 if whole < 0.5 else 1 - self.random_crop
        return cut * top, cut * left, cut

    def apply(self, pixel_values: torch.Tensor, visit: tuple[int, ...] | None, height: int, width: int) -> dict:
        """
        Return `pixel_values` `(3, height, width)`, uint8, and with `random_crop` the `crop` `(3,)` of [`draw_crop`] in the image as
        it is shown, mirrored or not. Without a `visit`, return the whole image.

        Args:
            pixel_values (`torch.Tensor`): The image, `size_to_read(height)` x `size_to_read(width)`, uint8.
            visit (`tuple[int, ...]`, *optional*): The key of the visit.
            height (`int`), width (`int`): The size to show.
        """
        if self.horizontal_flip and visit is not None and np.random.default_rng([*visit, FLIP]).random() < 0.5:
            pixel_values = pixel_values.flip(-1)
        if self.random_crop == 1:
            return {"pixel_values": pixel_values}
        crop = (0.0, 0.0, 0.0) if visit is None else self.draw_crop(visit)
        pixel_values = resize_part(pixel_values, crop, height, width)
        return {"pixel_values": pixel_values, "crop": torch.tensor(crop)}
