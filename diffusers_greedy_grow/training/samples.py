# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Images of a run: samples with their captions, and loss curves."""

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


def _write(image: Image.Image, path: str | Path) -> None:
    temporary = Path(path).with_suffix(".tmp.png")
    image.save(temporary)
    temporary.replace(path)
