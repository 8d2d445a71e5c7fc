# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Text of any script in an image: measured and wrapped by the font, with the system's fonts for what Pillow's own font lacks."""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont


SIZE = 11
LINE_HEIGHT = 14
# The only size of fonts with colored bitmaps, such as Noto Color Emoji.
BITMAP_SIZE = 109


@dataclass(frozen=True, eq=False)
class Face:
    """A font and the characters that it has. `scale` is below 1 for a font of bitmaps, whose glyphs are made smaller."""

    font: ImageFont.FreeTypeFont
    characters: frozenset[int]
    scale: float = 1.0

    def has(self, text: str) -> bool:
        """Return whether the font has all characters that can be seen."""
        return all(ord(sign) in self.characters for sign in text if not is_invisible(sign))

    def visible(self, text: str) -> str:
        """Return `text` without the invisible characters that the font lacks, for which it would draw a box."""
        return "".join(sign for sign in text if ord(sign) in self.characters or not is_invisible(sign))

    def width(self, text: str) -> float:
        """Return the width of `text` in pixels."""
        return self.font.getlength(self.visible(text)) * self.scale

    def draw(self, image: Image.Image, x: float, baseline: float, text: str) -> None:
        """Draw `text` from `x` on, with its baseline at that height."""
        text = self.visible(text)
        if self.scale == 1:
            ImageDraw.Draw(image).text((x, baseline), text, "black", self.font, anchor="ls")
            return
        left, top, right, bottom = self.font.getbbox(text, anchor="ls")
        if right <= left or bottom <= top:
            return
        glyphs = Image.new("RGBA", (round(right - left), round(bottom - top)))
        ImageDraw.Draw(glyphs).text((-left, -top), text, "black", self.font, anchor="ls", embedded_color=True)
        size = max(1, round(glyphs.width * self.scale)), max(1, round(glyphs.height * self.scale))
        glyphs = glyphs.resize(size, Image.Resampling.LANCZOS)
        image.paste(glyphs, (round(x + left * self.scale), round(baseline + top * self.scale)), glyphs)


def is_invisible(sign: str) -> bool:
    """Return whether a character is a space, or only says how others are drawn."""
    return unicodedata.category(sign) in ("Zs", "Cf") or "\ufe00" <= sign <= "\ufe0f"


# ----------------------------------------------------------------------------------------------------------------------
# Fonts


@cache
def default_face() -> Face:
    """Return Pillow's own font, which has little more than ASCII."""
    font = ImageFont.load_default(size=SIZE)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return Face(font, frozenset(range(0x20, 0x7F)))


@cache
def load_face(path: str) -> Face | None:
    """Return the font of a file, or None if it cannot be used."""
    from matplotlib.ft2font import FT2Font

    try:
        characters = frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return None
    for size in (SIZE, BITMAP_SIZE):
        try:
            return Face(ImageFont.truetype(path, size), characters, SIZE / size)
        except OSError:  # a font of bitmaps of another size
            continue
    return None


@cache
def list_fonts() -> list[str]:
    """List the font files there are, upright and regular ones first; matplotlib brings DejaVu Sans."""
    import matplotlib
    from matplotlib.font_manager import findSystemFonts

    def rank(path: str) -> tuple:
        name = Path(path).stem.lower()
        special = (
            "bold",
            "italic",
            "oblique",
            "light",
            "thin",
            "black",
            "mono",
            "condensed",
            "serif",
            "symbol",
            "math",
        )
        return sum(word in name for word in special), name

    own = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    # The "last resort" has a box for each character.
    return [str(own), *sorted((path for path in findSystemFonts() if "lastresort" not in path.lower()), key=rank)]


@cache
def find_face(text: str) -> Face | None:
    """Return the first font that has all of `text`."""
    face = default_face()
    if face.has(text):
        return face
    for path in list_fonts():
        candidate = load_face(path)
        if candidate is not None and candidate.has(text):
            return candidate
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Lines


def spell_out(sign: str) -> str:
    """Return ASCII for a character that no font has: the name of a symbol, and others as Python escapes them."""
    name = unicodedata.name(sign, "")
    return f"[{name.lower()}]" if name and unicodedata.category(sign) == "So" else ascii(sign)[1:-1]


def clean(text: str) -> str:
    """Return `text` without line breaks and control characters, and with what no font has spelled out."""
    text = " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text).split())
    return "".join(sign if is_invisible(sign) or find_face(sign) is not None else spell_out(sign) for sign in text)


def split_by_face(text: str) -> Iterator[tuple[Face, str]]:
    """Split clean text into parts that one font draws: all of it if one font has it, else word by word, else by characters."""
    face = find_face(text)
    if face is not None:
        yield face, text
        return
    runs: list[tuple[Face, str]] = []
    words = text.split(" ")
    for i, word in enumerate(words):
        word += " " * (i < len(words) - 1)
        for part in [word] if find_face(word) is not None else split_clusters(word):
            part_face = find_face(part) or find_face(part[0]) or default_face()
            if runs and runs[-1][0].has(part):  # so that neighbours join
                runs[-1] = runs[-1][0], runs[-1][1] + part
            else:
                runs.append((part_face, part))
    yield from runs


def split_clusters(text: str) -> list[str]:
    """Split text into characters with the marks that belong to them."""
    clusters: list[str] = []
    for sign in text:
        joins = clusters and (unicodedata.combining(sign) or unicodedata.category(sign) in ("Mn", "Mc", "Me", "Cf"))
        if joins or (clusters and ("\ufe00" <= sign <= "\ufe0f" or clusters[-1][-1] == "\u200d")):
            clusters[-1] += sign
        else:
            clusters.append(sign)
    return clusters


def measure(text: str) -> float:
    """Return the width of a line of clean text in pixels."""
    return sum(face.width(part) for face, part in split_by_face(text))


def wrap(text: str, width: float, max_lines: int) -> list[str]:
    """
    Break text into at most `max_lines` lines that are no wider than `width` pixels: between words, or within one that is wider
    than a line. Text that is left out is replaced by an ellipsis.
    """
    lines, line = [], ""
    words = clean(text).split(" ")
    pieces = [
        piece for word in words for piece in (" ", *([word] if measure(word) <= width else split_clusters(word)))
    ]
    for piece in pieces[1:]:
        if line and measure(line + piece) > width:
            lines.append(line.rstrip())
            line = ""
            if len(lines) > max_lines:
                break
        if line or piece != " ":
            line += piece
    lines.append(line.rstrip())
    lines = [line for line in lines if line]
    if len(lines) > max_lines:
        clusters = split_clusters(lines[max_lines - 1])
        while clusters and measure("".join(clusters).rstrip() + "...") > width:
            clusters.pop()
        lines = [*lines[: max_lines - 1], "".join(clusters).rstrip() + "..."]
    return lines


def draw_lines(image: Image.Image, x: float, top: float, lines: list[str]) -> None:
    """Draw lines of clean text below each other."""
    for i, line in enumerate(lines):
        left = x
        for face, part in split_by_face(line):
            face.draw(image, left, top + i * LINE_HEIGHT + SIZE, part)
            left += face.width(part)
