# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image, ImageFont

from diffusers_greedy_grow.training import labels
from diffusers_greedy_grow.training.curves import draw_losses
from diffusers_greedy_grow.training.samples import draw_grid


def test_sample_grid(tmp_path):
    rows = {
        "core": [Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "green")],
        "grown-64": [Image.new("RGB", (64, 64), "blue"), Image.new("RGB", (64, 64), "black")],
    }
    draw_grid(rows, ["a red square", "a caption of many words that takes several lines"], tmp_path / "s.png")
    grid = Image.open(tmp_path / "s.png")
    for x, y, color in ((0, 0, (255, 0, 0)), (1, 0, (0, 128, 0)), (0, 1, (0, 0, 255)), (1, 1, (0, 0, 0))):
        assert grid.getpixel((96 + 132 * x + 64, 132 * y + 64)) == color  # over its own caption
    assert grid.height > 2 * 128 + 14 and [path.name for path in tmp_path.iterdir()] == ["s.png"]


def draw_captions(captions: list[str], path) -> np.ndarray:
    """The part of a grid below its single row of images, in shades of gray."""
    draw_grid({"core": [Image.new("RGB", (16, 16), "white")] * len(captions)}, captions, path)
    return np.asarray(Image.open(path).convert("L"))[132:]


@pytest.mark.parametrize(
    "script,captions",
    [
        ("Latin", ["caf\u00e9", "caf\u00ef"]),
        ("Cyrillic", ["\u0434\u043e\u043c", "\u0436\u0443\u043a"]),
        ("Greek", ["\u03b1\u03b2\u03b3", "\u03c0\u03c1\u03c3"]),
        ("Arabic", ["\u0642\u0637\u0629", "\u0643\u0644\u0628"]),
        ("Hindi", ["\u0932\u093e\u0932", "\u0928\u0940\u0932"]),
        ("Japanese", ["\u8d64\u3044", "\u9752\u3044"]),
        ("emoji", ["\U0001f680", "\U0001f389"]),
        ("mixed", ["a \u0434 \u8d64 b", "a \u0436 \u9752 b"]),
    ],
)
@pytest.mark.parametrize("installed", [True, False], ids=["installed fonts", "no fonts"])
def test_captions_of_any_script_can_be_told_apart(script, captions, installed, tmp_path, monkeypatch):
    """Boxes for characters that a font lacks would all look the same. Without a font, ASCII says what they are."""
    labels.find_face.cache_clear()
    if not installed:
        monkeypatch.setattr(labels, "list_fonts", lambda: [])
        assert all(sign.isascii() for caption in captions for line in labels.wrap(caption, 999, 9) for sign in line)
    image = draw_captions(captions, tmp_path / "s.png")
    labels.find_face.cache_clear()
    one, other = image[:, 96:224], image[:, 228:356]
    assert (one < 128).any() and (other < 128).any() and not np.array_equal(one, other)


@pytest.mark.parametrize("caption", ["W" * 200, "WWWWWWWWWWW " * 50, "\u0436" * 300, "a\n\n\tb " * 100, "\u8d64" * 99])
def test_captions_stay_in_their_columns(caption, tmp_path):
    image = draw_captions(["x", caption, "y"], tmp_path / "s.png")
    assert image.shape[0] <= 4 * 14 + 8  # one long caption does not double the grid
    assert (image[:, 224:228] == 255).all() and (image[:, 356:360] == 255).all()
    lines = labels.wrap(caption, 128, 4)
    assert len(lines) == 4 and lines[-1].endswith("...") and all(labels.measure(line) <= 128 for line in lines)


def test_short_captions_are_whole():
    assert labels.wrap("a red square on a large  blue\nbackground", 128, 4) == [
        "a red square on a large",
        "blue background",
    ]
    assert labels.wrap("", 128, 4) == labels.wrap(" \n", 128, 4) == []
    assert "".join(labels.wrap("x" * 40, 128, 4)) == "x" * 40


def test_a_font_of_bitmaps_is_made_smaller():
    """Fonts of coloured emoji have one size, which is much larger."""
    path = labels.list_fonts()[0]
    small = labels.load_face(path)
    large = labels.Face(ImageFont.truetype(path, 110), small.characters, scale=0.1)
    images = []
    for face in (small, large):
        images.append(Image.new("RGB", (60, 20), "white"))
        face.draw(images[-1], 2, 15, "\u0434\u043e\u043c")
    assert abs(small.width("\u0434\u043e\u043c") - large.width("\u0434\u043e\u043c")) < 2
    a, b = (255 - np.asarray(image.convert("L")).astype(float) for image in images)
    assert 0.7 < a.sum() / b.sum() < 1.4 and abs(np.nonzero(a)[0].min() - np.nonzero(b)[0].min()) <= 1


def test_loss_curves(tmp_path, monkeypatch):
    """Each is what its label says, and dots have the color of the curve whose held-out loss they are."""
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **kw: figures.append(figure) or savefig(figure, *args, **kw)
    )
    trained = {"loss": 3.0, "loss_low": 1.0, "loss_high": 2.0, "loss_sigma_0.0_0.3": 4.0}
    held_out = {"val_loss_low": 1.5, "val_low_noise_loss_low": 8.0, "val_low_noise_loss_high": 9.0}
    records = [
        {"phase": phase, "step": 5, **values} for phase in ("core", "grown-64") for values in (trained, held_out)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    draw_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").size[0] > 1000
    above, _, below, _ = figures[0].axes
    assert above.get_title() == "core"
    lines = {line.get_label(): line for axis in (above, below) for line in axis.lines}
    (dots,) = [line for label, line in lines.items() if label.startswith("_")]
    assert dots.get_ydata() == [1.5] and dots.get_color() == lines["low band"].get_color()
    assert {label: line.get_ydata()[0] for label, line in lines.items() if line is not dots} == {
        "loss": 3,
        "low band": 1,
        "high band": 2,
        "noise 0.0 to 0.3": 4,
        "low band, noise 0.02 to 0.3, held out": 8,
        "high band, noise 0.02 to 0.3, held out": 9,
    }
