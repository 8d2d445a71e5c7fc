# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
Captioned shapes: a synthetic dataset that is small enough to learn in minutes, and that tests alignment and rendering apart.

An example of a caption: "a large red striped circle above a small blue plain square on a white background". Shapes, colors,
sizes, relations and backgrounds test alignment: they show at the core's resolution. Textures test rendering: their pattern
repeats once per pixel of the core and averages to the object's color there, so only the grown model can see and draw them.
"""

import io
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image


SIZES = ("small", "large")

# Mean colors. Textures brighten and darken them by up to 40 %, so the brightest channel leaves room for it.
COLORS = {
    "red": (178, 24, 30),
    "green": (24, 138, 52),
    "blue": (36, 64, 178),
    "yellow": (178, 152, 16),
    "purple": (122, 34, 160),
    "orange": (178, 88, 12),
}

TEXTURES = ("plain", "striped", "dotted", "checked")

SHAPES = ("circle", "square", "triangle", "star", "ring")

BACKGROUNDS = {"white": (250, 250, 250), "black": (12, 12, 12), "gray": (128, 128, 128), "pink": (248, 190, 205)}

RELATIONS = ("left of", "right of", "above", "below")

# Range of half an object's extent, as a share of the image's height: by the number of objects and the name of the size.
EXTENTS = {
    1: {"small": (0.24, 0.27), "large": (0.36, 0.40)},
    2: {"small": (0.115, 0.13), "large": (0.18, 0.195)},
    3: {"small": (0.115, 0.13), "large": (0.18, 0.195)},
}

_CONTRAST = 0.4


@dataclass(frozen=True)
class ShapeObject:
    """An object: its attributes, its center `(x, y)`, and half of its extent, as shares of the image's width and height."""

    size: str
    color: str
    texture: str
    shape: str
    x: float = 0.5
    y: float = 0.5
    extent: float = 0.2

    @property
    def phrase(self) -> str:
        return f"a {self.size} {self.color} {self.texture} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One to three objects on a background. `relations[0]` holds from the first to the second, `relations[1]` from both to the third."""

    objects: tuple[ShapeObject, ...]
    relations: tuple[str, ...]
    background: str

    @property
    def caption(self) -> str:
        phrases = [shape_object.phrase for shape_object in self.objects]
        text = phrases[0]
        if len(phrases) > 1:
            text += f" {self.relations[0]} {phrases[1]}"
        if len(phrases) > 2:
            text += f", both {self.relations[1]} {phrases[2]},"
        return f"{text} on a {self.background} background"


# ----------------------------------------------------------------------------------------------------------------------
# Scenes and captions
_OBJECT = rf"a ({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(TEXTURES)}) ({'|'.join(SHAPES)})"

_RELATION = rf"({'|'.join(RELATIONS)})"

_CAPTION = re.compile(
    rf"{_OBJECT}(?: {_RELATION} {_OBJECT}(?:, both {_RELATION} {_OBJECT},)?)? on a ({'|'.join(BACKGROUNDS)}) background"
)


def parse_caption(caption: str) -> Scene:
    """
    Return the scene that a caption describes, without positions: the inverse of [`Scene.caption`].

    Raises:
        `ValueError`: if the caption has another form.
    """
    match = _CAPTION.fullmatch(caption)
    if match is None:
        raise ValueError(
            f"`caption={caption!r}` does not describe captioned shapes, such as 'a large red striped circle on a white background'."
        )
    words = match.groups()
    objects = [words[0:4], words[5:9], words[10:14]]
    return Scene(
        objects=tuple(ShapeObject(*attributes) for attributes in objects if attributes[0] is not None),  # type: ignore
        relations=tuple(word for word in (words[4], words[9]) if word is not None),
        background=words[14],
    )


def sample_scene(rng: np.random.Generator, num_objects: int = 1, first_object: ShapeObject | None = None) -> Scene:
    """
    Draw a random scene of `num_objects` (1 to 3) objects, placed so that its relations are plain to see. The first object has
    the attributes of `first_object`, if given.
    """
    items = [
        ShapeObject(
            size=str(rng.choice(SIZES)),
            color=str(rng.choice(list(COLORS))),
            texture=str(rng.choice(TEXTURES)),
            shape=str(rng.choice(SHAPES)),
        )
        for _ in range(num_objects)
    ]
    if first_object is not None:
        items[0] = first_object
    extents = [rng.uniform(*EXTENTS[num_objects][item.size]) for item in items]
    relations: tuple[str, ...] = ()
    if num_objects == 1:
        centers = [np.array([0.5, 0.5])]
        jitter = [0.08, 0.08]
    elif num_objects == 2:
        relations = (str(rng.choice(RELATIONS)),)
        centers = [_place(relations[0], 0.5, 0.25), _place(relations[0], 0.5, 0.75)]
        jitter = [0.01, 0.15] if relations[0] in ("left of", "right of") else [0.15, 0.01]
    else:
        # The third object lies across the line of the first two: above or below a row, left or right of a column.
        first = str(rng.choice(RELATIONS))
        in_row = first in ("left of", "right of")
        second = str(rng.choice(["above", "below"] if in_row else ["left of", "right of"]))
        relations = (first, second)
        pair, third = _place(second, 0.5, 0.25), _place(second, 0.5, 0.75)
        axis = 1 if in_row else 0
        centers = [_place(first, 0.5, 0.25), _place(first, 0.5, 0.75), third]
        centers[0][axis] = centers[1][axis] = pair[axis]
        jitter = [0.01, 0.01]
    objects = []
    for item, extent, center in zip(items, extents, centers):
        x, y = center + rng.uniform(-1, 1, size=2) * jitter
        objects.append(replace(item, x=float(x), y=float(y), extent=float(extent)))
    return Scene(tuple(objects), relations, str(rng.choice(list(BACKGROUNDS))))


def _place(relation: str, middle: float, near: float) -> np.ndarray:
    """Return the center of the first (`near=0.25`) or the second (`near=0.75`) object of a relation."""
    if relation in ("right of", "below"):
        near = 1 - near
    return np.array([near, middle] if relation in ("left of", "right of") else [middle, near])


def _held_out(i: int) -> ShapeObject:
    """Return combination `i` of the 24 that [`HELD_OUT`] lists."""
    color, texture = i % 6, (i + i // 12) % 4  # 24 different pairs
    size, shape = i // 12, (color + 2 * texture) % 5
    return ShapeObject(SIZES[size], list(COLORS)[color], TEXTURES[texture], SHAPES[shape])


# Combinations of attributes that are never trained on, a tenth of all. Among them, all values of an attribute are as frequent
# as each other, and so are all pairs of values of two attributes, as nearly as 24 combinations allow. Neighbours in the list
# differ in several attributes.
HELD_OUT = tuple(_held_out(5 * i % 24) for i in range(24))

_HELD_OUT_PHRASES = {item.phrase for item in HELD_OUT}


def is_held_out(scene: Scene) -> bool:
    """Return whether a scene has an object with one of the combinations that are never trained on."""
    return any(item.phrase in _HELD_OUT_PHRASES for item in scene.objects)


# ----------------------------------------------------------------------------------------------------------------------
# Images
def signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the distance from the outline of a shape that fills [-1, 1] x [-1, 1] (x right, y down), negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.76) - 0.24
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.94
    if shape == "triangle":
        # Apex (0, -1), base from (-1, 0.9) to (1, 0.9).
        slope = np.hypot(1.9, 1.0)
        return np.maximum(y - 0.9, (1.9 * np.abs(x) - (y + 1)) / slope)
    # A star with five tips: fold the plane into one half of one tip, whose outline is a straight line.
    radius, angle = np.hypot(x, y), np.arctan2(x, -y)
    angle = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    tip, notch = np.array([0.0, 1.05]), 0.48 * np.array([np.sin(np.pi / 5), np.cos(np.pi / 5)])
    edge = notch - tip
    normal = np.array([-edge[1], edge[0]]) / np.hypot(*edge)
    return (radius * np.sin(angle) - tip[0]) * normal[0] + (radius * np.cos(angle) - tip[1]) * normal[1]


@lru_cache
def pattern(texture: str, image_size: int, texture_cells: int) -> np.ndarray:
    """
    Return the brightness of a texture, `(image_size, image_size)` with values between -1.5 and 1, whose mean is zero in each of
    the `texture_cells x texture_cells` cells of the image.
    """
    fine = 4  # samples per pixel and axis
    position = (np.arange(image_size * fine) + 0.5) * texture_cells / (image_size * fine) % 1
    rows, columns = position[:, None], position[None, :]
    if texture == "striped":
        values = np.where(rows < 0.5, 1.0, -1.0) * np.ones_like(columns)
    elif texture == "checked":
        values = np.where((rows < 0.5) == (columns < 0.5), 1.0, -1.0)
    elif texture == "dotted":
        values = np.where((np.abs(rows - 0.5) < 0.25) & (np.abs(columns - 0.5) < 0.25), -1.5, 0.5)
    else:
        values = np.zeros((len(position), len(position)))
    return values.reshape(image_size, fine, image_size, fine).mean(axis=(1, 3))


def render(scene: Scene, image_size: int, texture_cells: int = 16) -> np.ndarray:
    """
    Draw a scene, anti-aliased, at any resolution.

    Args:
        scene ([`Scene`]): The scene to draw.
        image_size (`int`): The height and width in pixels.
        texture_cells (`int`): How often a texture repeats across the image: the core's resolution in pixels.

    Returns:
        `np.ndarray` of shape `(image_size, image_size, 3)`, uint8.
    """
    centers = (np.arange(image_size) + 0.5) / image_size
    image = np.empty((image_size, image_size, 3))
    image[:] = BACKGROUNDS[scene.background]
    for item in scene.objects:
        x, y = (centers[None, :] - item.x) / item.extent, (centers[:, None] - item.y) / item.extent
        distance = signed_distance(item.shape, x, y) * item.extent * image_size
        coverage = np.clip(0.5 - distance, 0, 1)[..., None]
        shade = 1 + _CONTRAST * pattern(item.texture, image_size, texture_cells)[..., None]
        image += coverage * (shade * np.array(COLORS[item.color]) - image)
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


# ----------------------------------------------------------------------------------------------------------------------
# The dataset
def write_shapes(
    folder: str | Path,
    num_train: int,
    num_validation: int,
    image_size: int,
    max_objects: int = 1,
    texture_cells: int = 16,
    seed: int = 0,
) -> Path:
    """
    Write `train.parquet` and `validation.parquet` with the columns `image` and `text`, for `datasets.load_dataset`.

    The combinations of attributes in `HELD_OUT` are in the validation rows only, in turn as their first objects.

    Args:
        folder (`str` or `Path`): The folder to write to, which is created if it does not exist.
        num_train (`int`), num_validation (`int`): The number of rows of each split.
        image_size (`int`): The height and width in pixels: at least 16, and at least `texture_cells`.
        max_objects (`int`): The largest number of objects in a scene, 1 to 3.
        texture_cells (`int`): How often a texture repeats across the image, as for [`render`].
        seed (`int`): The seed. Row i of a split depends on the seed and on i alone.

    Returns:
        `Path`: The folder.

    Raises:
        `ValueError`: if an argument is out of its range.
    """
    if image_size < max(16, texture_cells):
        raise ValueError(
            f"`image_size={image_size}` is too small: shapes need at least 16 pixels and one per texture cell "
            f"(`texture_cells={texture_cells}`)."
        )
    if max_objects not in EXTENTS:
        raise ValueError(f"`max_objects={max_objects}` must be 1, 2 or 3.")
    if num_train < 1 or num_validation < 1:
        raise ValueError(f"`num_train={num_train}` and `num_validation={num_validation}` must be positive.")
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    features = Features({"image": ImageFeature(), "text": Value("string")})
    for split, count in (("train", num_train), ("validation", num_validation)):
        rows: dict[str, list] = {"image": [], "text": []}
        for i in range(count):
            rng = np.random.default_rng([seed, split == "validation", i])
            num_objects = int(rng.integers(1, max_objects + 1))
            if split == "validation":
                scene = sample_scene(rng, num_objects, first_object=HELD_OUT[i % len(HELD_OUT)])
            else:
                scene = sample_scene(rng, num_objects)
                while is_held_out(scene):
                    scene = sample_scene(rng, num_objects)
            buffer = io.BytesIO()
            Image.fromarray(render(scene, image_size, texture_cells)).save(buffer, format="PNG", compress_level=1)
            rows["image"].append({"bytes": buffer.getvalue(), "path": None})
            rows["text"].append(scene.caption)
        temporary = folder / f"{split}.parquet.tmp"
        Dataset.from_dict(rows, features=features).to_parquet(temporary)
        temporary.replace(folder / f"{split}.parquet")
    return folder
