# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Scores of whether an image of captioned shapes shows what its caption says, by plain image analysis."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import permutations

import numpy as np
from PIL import Image

from .scenes import (
    BACKGROUNDS,
    COLORS,
    EXTENTS,
    SHAPES,
    TEXTURES,
    ShapeObject,
    parse_caption,
    pattern,
    signed_distance,
)


# The scores of guessing, for captions with one object.
CHANCE = {
    "color": 1 / len(COLORS),
    "shape": 1 / len(SHAPES),
    "size": 1 / 2,
    "texture": 1 / len(TEXTURES),
    "background": 1 / len(BACKGROUNDS),
}

# RGB distance from the background at which an object begins.
_MASK_DISTANCE = 40.0

# Intersection over union with the best shape below which an outline is not one of the shapes.
_MIN_IOU = 0.7

# Contrast below which a texture is plain; textures as drawn have 0.35 to 0.4.
_MIN_CONTRAST = 0.12


def score_images(
    images: Sequence[Image.Image | np.ndarray], captions: Sequence[str], texture_cells: int = 16
) -> dict[str, float]:
    """Return the mean of each score of [`score_image`], over the images that have it."""
    scores = [score_image(image, caption, texture_cells) for image, caption in zip(images, captions)]
    names = dict.fromkeys(name for score in scores for name in score)
    return {name: float(np.mean([score[name] for score in scores if name in score])) for name in names}


def score_image(image: Image.Image | np.ndarray, caption: str, texture_cells: int = 16) -> dict[str, float]:
    """
    Score how much of a caption an image shows.

    Args:
        image (`PIL.Image.Image` or `np.ndarray` of shape `(R, R, 3)`, uint8):
            The image, with at least 4 pixels per texture cell.
        caption (`str`):
            The caption, as [`Scene.caption`] writes it.
        texture_cells (`int`):
            How often a texture repeats across the image, as for [`render`].

    Returns:
        `dict[str, float]`: scores in [0, 1]. `color`, `shape`, `size` and `texture` are the share of the caption's objects
        that have this attribute right, for the best assignment of the objects found; `count` and `background` are 0 or 1, and
        so is `relation`, which only captions with several objects have.
    """
    truth = parse_caption(caption)
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image).astype(float)
    background, found = read_image(pixels, len(truth.objects), texture_cells)

    padded = [*found, *[None] * (len(truth.objects) - len(found))]
    assignments = permutations(padded, len(truth.objects))
    best = max(assignments, key=lambda assignment: sum(_compare(assignment, truth.objects).values()))
    scores = _compare(best, truth.objects)
    scores["count"] = float(len(found) == len(truth.objects))
    scores["background"] = float(background == truth.background)
    if truth.relations:
        scores["relation"] = float(_relations_hold(best, truth.relations))
    return scores


def _compare(found: Sequence[ShapeObject | None], truth: Sequence[ShapeObject]) -> dict[str, float]:
    """Return the share of the objects that are right, per attribute."""
    return {
        name: float(np.mean([getattr(item, name, None) == getattr(true, name) for item, true in zip(found, truth)]))
        for name in ("color", "shape", "size", "texture")
    }


def _relations_hold(items: Sequence[ShapeObject | None], relations: Sequence[str]) -> bool:
    """Return whether all objects are there and stand in the relations of a [`Scene`]."""
    if any(item is None for item in items):
        return False
    pairs = [(relations[0], items[0], items[1])]
    if len(relations) > 1:
        pairs += [(relations[1], items[0], items[2]), (relations[1], items[1], items[2])]
    holds = {
        "left of": lambda a, b: a.x < b.x,
        "right of": lambda a, b: a.x > b.x,
        "above": lambda a, b: a.y < b.y,
        "below": lambda a, b: a.y > b.y,
    }
    return all(holds[relation](a, b) for relation, a, b in pairs)


# ----------------------------------------------------------------------------------------------------------------------
# From pixels to objects
def read_image(pixels: np.ndarray, num_objects: int, texture_cells: int) -> tuple[str, list[ShapeObject]]:
    """
    Return the background and the objects, the largest first, of an image `(R, R, 3)`. `num_objects` decides which extents
    count as small and large. An attribute that does not fit any known value is `"none"`.
    """
    size = len(pixels)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background_color = np.median(border, axis=0)
    # Dark stripes and dots may look like the background: close gaps up to half a texture cell.
    gap = max(1, size // texture_cells // 4)
    mask = close_gaps(np.linalg.norm(pixels - background_color, axis=-1) > _MASK_DISTANCE, gap)

    labels = label_components(mask)
    areas = np.bincount(labels.ravel())[1:]
    smallest = max(0.15 * areas.max(initial=0), (0.06 * size) ** 2)
    found = []
    for label in np.argsort(-areas)[:6] + 1:
        if areas[label - 1] >= smallest:
            mask = labels == label
            # The outline is where an object covers half of a pixel; its color is that of the inside.
            contrast = pixels[erode(mask, 1)].mean(axis=0) - background_color
            coverage = (pixels - background_color) @ contrast / (contrast @ contrast)
            mask = mask & close_gaps(coverage > 0.5, gap)
            found.append(read_object(pixels, mask, num_objects, texture_cells))
    return nearest(background_color, BACKGROUNDS), found


def read_object(pixels: np.ndarray, mask: np.ndarray, num_objects: int, texture_cells: int) -> ShapeObject:
    """Return the object that covers `mask`."""
    size = len(pixels)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    extent = max(bottom - top, right - left) / 2 / size
    interior = erode(mask, 1)
    threshold = (EXTENTS[num_objects]["small"][1] + EXTENTS[num_objects]["large"][0]) / 2
    return ShapeObject(
        size="large" if extent > threshold else "small",
        color=nearest(pixels[interior].mean(axis=0), COLORS),
        texture=read_texture(pixels.mean(axis=-1), interior, texture_cells),
        shape=read_shape(mask[top:bottom, left:right]),
        x=(left + right) / 2 / size,
        y=(top + bottom) / 2 / size,
        extent=extent,
    )


def read_shape(mask: np.ndarray) -> str:
    """Return the shape whose outline, fitted to the mask's bounding box, overlaps most with the mask."""
    height, width = mask.shape
    if not 0.65 < height / width < 1.55:
        return "none"
    rows, columns = (np.arange(48) * height) // 48, (np.arange(48) * width) // 48
    fitted = mask[rows][:, columns]
    overlaps = {
        shape: (fitted & template).sum() / (fitted | template).sum() for shape, template in templates().items()
    }
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return best if overlaps[best] >= _MIN_IOU else "none"


@lru_cache
def templates() -> dict[str, np.ndarray]:
    """Return each shape as a mask that fills `(48, 48)`."""
    fine = (np.arange(480) + 0.5) / 240 - 1
    result = {}
    for shape in SHAPES:
        mask = signed_distance(shape, fine[None, :] * 1.1, fine[:, None] * 1.1) < 0
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        mask = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        result[shape] = mask[(np.arange(48) * len(mask)) // 48][:, (np.arange(48) * mask.shape[1]) // 48]
    return result


def read_texture(luminance: np.ndarray, mask: np.ndarray, texture_cells: int) -> str:
    """
    Return the texture whose pattern, shifted as needed, correlates best with the luminance minus its mean in each texture cell.
    It is plain if this difference is small.
    """
    size = len(luminance)
    cell = size // texture_cells
    if cell < 2:
        return "plain"
    cells = (np.arange(size) // cell).clip(max=texture_cells - 1)
    index = (cells[:, None] * texture_cells + cells[None, :])[mask]
    values = luminance[mask]
    counts = np.bincount(index, minlength=texture_cells**2)
    means = (np.bincount(index, values, minlength=texture_cells**2) / counts.clip(min=1))[index]
    usable = counts[index] >= cell * cell / 2  # the mean of a smaller piece of a cell says little
    if usable.sum() < cell * cell:  # a thin ring has no such pieces: use the mean of the whole
        usable, means = np.full(len(values), True), values.mean()
    high = values - means
    if high[usable].std() < _MIN_CONTRAST * values.mean():
        return "plain"

    correlations = {}
    for texture in TEXTURES[1:]:
        true = pattern(texture, size, texture_cells)
        shifts = [np.roll(true, (dy, dx), (0, 1))[mask][usable] for dy in range(cell) for dx in range(cell)]
        correlations[texture] = max(_correlation(high[usable], shifted) for shifted in shifts)
    return max(correlations, key=lambda texture: correlations[texture])


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return the correlation coefficient of two arrays."""
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / np.sqrt((a @ a) * (b @ b) + 1e-9))


def nearest(color: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    """Return the name of the nearest color."""
    return min(palette, key=lambda name: np.linalg.norm(color - np.array(palette[name])))


# ----------------------------------------------------------------------------------------------------------------------
# Masks
def dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """Grow a mask by `radius` pixels on all sides, corners included."""
    for axis in (0, 1):
        padded = np.pad(mask, [(radius, radius) if i == axis else (0, 0) for i in (0, 1)])
        length = mask.shape[axis]
        mask = np.logical_or.reduce([padded.take(range(i, i + length), axis) for i in range(2 * radius + 1)])
    return mask


def erode(mask: np.ndarray, radius: int) -> np.ndarray:
    """Take `radius` pixels off a mask on all sides, unless nothing would be left."""
    eroded = mask & ~dilate(~mask, radius)
    return eroded if eroded.any() else mask


def close_gaps(mask: np.ndarray, radius: int) -> np.ndarray:
    """Fill gaps up to `2 * radius` pixels wide."""
    padded = np.pad(mask, 2 * radius)
    closed = ~dilate(~dilate(padded, radius), radius)
    return closed[2 * radius : -2 * radius, 2 * radius : -2 * radius]


def label_components(mask: np.ndarray) -> np.ndarray:
    """Number the connected parts of a mask from 1, with 0 outside. Pixels are connected if they share a side."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # each pixel takes the largest number around it, until nothing changes
        padded = np.pad(labels, 1)
        around = np.maximum.reduce([labels, padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])
        updated = np.where(mask, around, 0)
        if (updated == labels).all():
            break
        labels = updated
    return np.unique(labels, return_inverse=True)[1].reshape(mask.shape) + (0 if (labels == 0).any() else 1)
