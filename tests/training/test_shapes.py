# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

from diffusers_greedy_grow.training.shapes.scenes import (
    COLORS,
    TEXTURES,
    Scene,
    ShapeObject,
    is_held_out,
    parse_caption,
    pattern,
    render,
    sample_scene,
    write_shapes,
)
from diffusers_greedy_grow.training.shapes.scorer import CHANCE, score_image, score_images


def draw_scenes(num_objects: int, count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng([num_objects, seed])
    return [sample_scene(rng, num_objects) for _ in range(count)]


def shrink_and_enlarge(image: np.ndarray, size: int, method: Image.Resampling) -> Image.Image:
    return Image.fromarray(image).resize((size, size), Image.Resampling.BOX).resize(image.shape[:2], method)


# ----------------------------------------------------------------------------------------------------------------------
# The generator


@pytest.mark.parametrize("num_objects", [1, 2, 3])
def test_captions_describe_scenes(num_objects):
    for scene in draw_scenes(num_objects, 200):
        parsed = parse_caption(scene.caption)
        assert parsed.caption == scene.caption
        assert parsed.background == scene.background and parsed.relations == scene.relations
        assert [item.phrase for item in parsed.objects] == [item.phrase for item in scene.objects]


def test_relations_hold_and_nothing_overlaps():
    for scene in draw_scenes(3, 200):
        first, second, third = scene.objects
        pairs = [(scene.relations[0], first, second)] + [(scene.relations[1], item, third) for item in (first, second)]
        for relation, a, b in pairs:
            axis, sign = {"left of": ("x", 1), "right of": ("x", -1), "above": ("y", 1), "below": ("y", -1)}[relation]
            assert sign * (getattr(b, axis) - getattr(a, axis)) > 0.3
        for item in scene.objects:
            assert item.extent < min(item.x, item.y, 1 - item.x, 1 - item.y)
        for a, b in ((first, second), (first, third), (second, third)):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > a.extent + b.extent


def test_unknown_captions_are_refused():
    with pytest.raises(ValueError, match="`caption='a big cat'` does not describe captioned shapes"):
        parse_caption("a big cat")


@pytest.mark.parametrize("texture", TEXTURES)
@pytest.mark.parametrize("size,cells", [(64, 16), (128, 16), (96, 16), (256, 32)])
def test_textures_vanish_at_the_cores_resolution(texture, size, cells):
    values = pattern(texture, size, cells)
    means = values.reshape(cells, size // cells, cells, size // cells).mean(axis=(1, 3))
    assert np.abs(means).max() < 1e-9
    assert (np.abs(values).max() > 0.9) == (texture != "plain")


def test_images_at_any_resolution_show_the_same():
    scene = draw_scenes(2, 1)[0]
    large, small = render(scene, 256), render(scene, 64)
    averaged = large.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    assert np.abs(averaged - small).mean() < 2.0
    assert large.shape == (256, 256, 3) and large.dtype == np.uint8


def test_written_data_is_an_ordinary_data_set(tmp_path):
    folder = write_shapes(tmp_path / "shapes", num_train=40, num_validation=10, image_size=32, max_objects=2, seed=1)
    data = load_dataset(str(folder))
    assert {name: len(split) for name, split in data.items()} == {"train": 40, "validation": 10}
    row = data["train"][0]
    assert row["image"].size == (32, 32) and parse_caption(row["text"])
    assert {len(parse_caption(text).objects) for text in data["train"]["text"]} == {1, 2}
    # Combinations that are held out are never trained on.
    assert all(is_held_out(parse_caption(text)) for text in data["validation"]["text"])
    assert not any(is_held_out(parse_caption(text)) for text in data["train"]["text"])
    # The same seed draws the same rows, whatever their number.
    again = load_dataset(str(write_shapes(tmp_path / "again", 5, 2, 32, max_objects=2, seed=1)))
    assert again["train"]["text"] == data["train"]["text"][:5]
    assert all(np.array_equal(again["train"][i]["image"], data["train"][i]["image"]) for i in range(5))
    other = load_dataset(str(write_shapes(tmp_path / "other", 5, 2, 32, max_objects=2, seed=2)))
    assert other["train"]["text"] != again["train"]["text"]


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"image_size": 8}, "`image_size=8` is too small"),
        ({"max_objects": 4}, "`max_objects=4` must be 1, 2 or 3"),
        ({"num_train": 0}, "`num_train=0`"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_shapes(tmp_path / "shapes", **{"num_train": 1, "num_validation": 1, "image_size": 32, **arguments})
    assert not (tmp_path / "shapes").exists()


# ----------------------------------------------------------------------------------------------------------------------
# The scorer


@pytest.mark.parametrize("num_objects", [1, 2, 3])
@pytest.mark.parametrize(
    "size,cells", [(64, 16), *(pytest.param(128, cells, marks=pytest.mark.slow) for cells in (16, 32))]
)
def test_true_images_score(num_objects, size, cells):
    scenes = draw_scenes(num_objects, 150)
    scores = score_images([render(scene, size, cells) for scene in scenes], [s.caption for s in scenes], cells)
    assert set(scores) == {"color", "shape", "size", "texture", "count", "background"} | (
        {"relation"} if num_objects > 1 else set()
    )
    assert all(score >= 0.97 for score in scores.values()), scores


def test_shuffled_captions_score_as_chance():
    scenes = draw_scenes(1, 600)
    images, captions = [render(scene, 64) for scene in scenes], [scene.caption for scene in scenes]
    scores = score_images(images, captions[1:] + captions[:1])
    for name, chance in CHANCE.items():
        standard_error = (chance * (1 - chance) / len(scenes)) ** 0.5
        assert abs(scores[name] - chance) < 4 * standard_error, (name, scores)


@pytest.mark.parametrize("num_objects", [2, 3])
def test_shuffled_captions_of_several_objects_score_far_below_the_true_ones(num_objects):
    """Chance is higher than for one object, since the best assignment of objects to the caption counts."""
    scenes = draw_scenes(num_objects, 200)
    images, captions = [render(scene, 64) for scene in scenes], [scene.caption for scene in scenes]
    scores = score_images(images, captions[1:] + captions[:1])
    assert scores["color"] < 0.36 and scores["shape"] < 0.45 and scores["texture"] < 0.5
    assert scores["relation"] < 0.62 and scores["background"] < 0.37


@pytest.mark.parametrize("method", [Image.Resampling.NEAREST, Image.Resampling.BICUBIC])
@pytest.mark.parametrize("num_objects", [1, 2])
def test_only_texture_is_lost_at_the_cores_resolution(num_objects, method):
    scenes = draw_scenes(num_objects, 300)
    captions = [scene.caption for scene in scenes]
    scores = score_images([shrink_and_enlarge(render(scene, 64), 16, method) for scene in scenes], captions)
    assert abs(scores["texture"] - CHANCE["texture"]) < 0.08, scores
    assert min(scores[name] for name in ("color", "size", "count", "background")) > 0.9, scores
    # Two objects on 16 x 16 pixels leave 4 pixels for a small star: even a human recognizes only half of the shapes.
    assert scores["shape"] > (0.85 if num_objects == 1 else 2.2 * CHANCE["shape"]), scores


def test_scores_name_what_is_wrong():
    scene = Scene((ShapeObject("large", "red", "striped", "circle", extent=0.36),), (), "white")
    image = render(scene, 64)
    right = score_image(image, scene.caption)
    assert set(right.values()) == {1.0}
    for name, caption in {
        "color": "a large blue striped circle on a white background",
        "shape": "a large red striped star on a white background",
        "size": "a small red striped circle on a white background",
        "texture": "a large red dotted circle on a white background",
        "background": "a large red striped circle on a pink background",
    }.items():
        assert score_image(Image.fromarray(image), caption) == {**right, name: 0.0}
    two = score_image(image, "a large red striped circle left of a large blue plain square on a white background")
    assert two["count"] == 0 and two["relation"] == 0 and two["color"] == 0.5


@pytest.mark.parametrize("color", COLORS)
def test_images_of_nothing_score_nothing(color):
    caption = f"a small {color} plain ring on a gray background"
    for image in (np.full((64, 64, 3), 128, np.uint8), np.zeros((64, 64, 3), np.uint8)):
        scores = score_image(image, caption)
        assert scores["color"] == scores["shape"] == scores["texture"] == scores["count"] == 0
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert score_image(noise, caption)["shape"] == 0
