# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
What is drawn when training visits an image: one of its captions, and whether it is mirrored. It depends on the key of the visit
alone, which is the seed and the visit's place in the phase, and so neither on processes and workers nor on earlier draws.
"""

import numpy as np


# Ends of the keys, so that one draw does not tell another.
CAPTION, FLIP = 1, 2


def draw(visit: tuple[int, ...], purpose: int) -> float:
    """Return a number in [0, 1) for one `purpose` of a visit."""
    return float(np.random.default_rng([*visit, purpose]).random())


def draw_caption(captions: list, visit: tuple[int, ...]) -> str | None:
    """Return one of several captions."""
    return captions[int(draw(visit, CAPTION) * len(captions))]


def draw_flip(visit: tuple[int, ...]) -> bool:
    """Return whether the image is mirrored: it is in half of all visits."""
    return draw(visit, FLIP) < 0.5
