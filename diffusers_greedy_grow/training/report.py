# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Images of a run: samples with their captions, and loss curves."""

import json
import os
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont


def draw_samples(rows: dict[str, list[Image.Image]], captions: list[str], path: str | Path) -> None:
    """
    Writes a grid: one row of images for each entry of `rows`, whose name stands on the left, and the captions below. All
    are shown at the size of the largest, and at 128 pixels per side at least, enlarged without smoothing.

    Args:
        rows (`dict[str, list[Image.Image]]`): For each row's name, one square image per caption.
        captions (`list[str]`): Printed under the columns.
        path (`str` or `Path`): The PNG to write.
    """
    image_size = max(128, *(image.width for images in rows.values() for image in images))
    font = ImageFont.load_default(size=11)
    texts = ["\n".join(textwrap.wrap(caption, image_size // 6)) for caption in captions]
    lines = max(text.count("\n") + 1 for text in texts)
    margin, gap = 96, 4
    width = margin + len(captions) * (image_size + gap)
    height = len(rows) * (image_size + gap) + lines * 14 + 2 * gap
    grid = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(grid)
    for row, (name, images) in enumerate(rows.items()):
        top = row * (image_size + gap)
        draw.multiline_text((4, top + image_size // 2 - 7), "\n".join(textwrap.wrap(name, 15)), "black", font)
        for column, image in enumerate(images):
            image = image.convert("RGB").resize((image_size, image_size), Image.Resampling.NEAREST)
            grid.paste(image, (margin + column * (image_size + gap), top))
    for column, text in enumerate(texts):
        draw.multiline_text((margin + column * (image_size + gap), height - lines * 14 - gap), text, "black", font)
    _write(grid, path)


def keep_metrics(path: Path, size: int, resume_with_changes: bool) -> None:
    """
    Drops what was written after a checkpoint was saved: it will be written again. Raises a `ValueError` if lines are missing
    from before, unless that is meant.
    """
    found = path.stat().st_size if path.exists() else 0
    if found < size and not resume_with_changes:
        raise ValueError(
            f"{path} lacks lines that were there when the checkpoint was saved: put it back, or say by "
            "`--resume_with_changes` that curves and card may do without them."
        )
    if found > size:
        os.truncate(path, size)


def draw_losses(metrics_path: str | Path, path: str | Path) -> None:
    """
    Writes the loss curves in `metrics.jsonl`: for each phase by band and, below, by noise level, with held-out losses as dots.
    All are errors of the velocity, but the held-out ones are over the noise levels of the first phase, so that phases compare.
    """
    from matplotlib.figure import Figure

    phases: dict[str, list[dict]] = {}
    for line in Path(metrics_path).read_text().splitlines():
        record = json.loads(line)
        phases.setdefault(record["phase"], []).append(record)
    if not phases:
        return

    figure = Figure(figsize=(5 * len(phases), 7))
    axes = figure.subplots(2, len(phases), squeeze=False)
    for above, below, (phase, records) in zip(*axes, phases.items()):
        for key, label in (("loss", "loss"), ("loss_low", "low band"), ("loss_high", "high band")):
            _draw_curve(above, records, key, label, f"val_{key}")
        levels = dict.fromkeys(key for record in records for key in record if key.startswith("loss_sigma"))
        for key in sorted(levels):
            _draw_curve(
                below, records, key, "noise " + key.removeprefix("loss_sigma_").replace("_", " to "), f"val_{key}"
            )
        for band in ("low", "high"):
            _draw_curve(
                below, records, None, f"{band} band, noise 0.02 to 0.3, held out", f"val_low_noise_loss_{band}"
            )
        above.set(title=phase, yscale="log")
        below.set(xlabel="step", yscale="log")
        for axis in (above, below):
            axis.grid(alpha=0.3, which="both")
            axis.legend(fontsize=7, title_fontsize=7, title="dots: held out, EMA, first phase's levels")
    figure.tight_layout()
    temporary = Path(path).with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)


def _draw_curve(axis, records: list[dict], key: str | None, label: str, val_key: str) -> None:
    """A curve of `key`, and of `val_key` dots in its color; of that alone a dotted line."""
    points = [(record["step"], record[key]) for record in records if key in record]
    held_out = [(record["step"], record[val_key]) for record in records if val_key in record]
    color = axis.plot(*zip(*points), label=label, linewidth=1)[0].get_color() if points else None
    if held_out:
        style = {"color": color} if points else {"label": label, "linestyle": ":"}
        axis.plot(*zip(*held_out), "o", markersize=4, **style)


def _write(image: Image.Image, path: str | Path) -> None:
    temporary = Path(path).with_suffix(".tmp.png")
    image.save(temporary)
    temporary.replace(path)
