# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

import json

from matplotlib.figure import Figure
from PIL import Image

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
