# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Broken rows: how they are found, counted and named, and how many a run accepts."""

import contextlib
import json
import warnings
from pathlib import Path


# A longer caption is a page of text that was scraped by mistake.
MAX_CAPTION_CHARACTERS = 5000


class BrokenRow(ValueError):
    """The reason why a row cannot be trained on."""


class BrokenRows:
    """
    Counts broken rows, writes a line per row to a file, and stops the run when there are too many.

    Every process, and every worker of a data loader, counts the rows that it reads itself. All of them write to the same
    file; lines are so short that they do not mix.

    Args:
        path (`Path`, *optional*):
            The file, with one JSON object per row: its name and the reason why it is left out, or what is ignored of it.
        max_share (`float`, defaults to 0.01):
            The largest share of the rows read that may be broken. It applies from 1000 rows on: with fewer, as many may be
            broken as among 1000, since a single one of the first ten would be a tenth.
    """

    def __init__(self, path: Path | None = None, max_share: float = 0.01):
        self.path, self.max_share = path, max_share
        self.read = self.broken = self.ignored = 0

    def forget(self) -> None:
        """Remove the file of an earlier run."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def add(self, name: str, reason: Exception) -> None:
        """
        Count and note a broken row.

        Raises:
            `ValueError`: if more rows are broken than `max_share` allows.
        """
        self.broken += 1
        self.write({"row": name, "reason": str(reason)})
        if self.broken > self.max_share * max(self.read, 1000):
            raise ValueError(
                f"{self.broken} of {self.read} rows read are broken, which is beyond `max_broken_share={self.max_share}`. "
                f"The last one is {name}: {reason}. "
                + (f"{self.path} names all of them. " if self.path is not None else "")
                + "Repair the data, or raise `max_broken_share`."
            )

    def add_ignored(self, name: str, reason: str) -> None:
        """Count and note a part of a row that is ignored, such as its image's color profile. The row is trained on."""
        if not self.ignored:
            warnings.warn(f"{name}: {reason}. It is ignored; further ones are counted only.", stacklevel=2)
        self.ignored += 1
        self.write({"row": name, "ignored": reason})

    def write(self, line: dict) -> None:
        """Append a line to the file."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def found(self, kind: str = "reason") -> int:
        """Return how many different rows the file names as broken, or, with `kind="ignored"`, as ignored in part."""
        if self.path is None or not self.path.exists():
            return 0
        rows = set()
        for line in self.path.read_text(encoding="utf-8").splitlines():
            # On a network drive, the lines of several processes may mix after all.
            with contextlib.suppress(ValueError):
                content = json.loads(line)
                if kind in content:
                    rows.add(content["row"])
        return len(rows)


def list_captions(text: str | list | None) -> list:
    """Return the captions of a row, of which there may be one or several, as a list."""
    return text or [None] if isinstance(text, list) else [text]


def name_row(place: str, row: dict) -> str:
    """Return a name for a row: its place, its file's name if it has one, and the beginning of its caption."""
    path = (row["image"] or {}).get("path")
    caption = next((text for text in list_captions(row["text"]) if text), "")
    return f"{place}{f', {path}' if path else ''}, {caption[:80]!r}"


def check_caption(caption: str | None) -> str:
    """
    Return the caption if it can be trained on.

    Raises:
        [`BrokenRow`]: if there is none, or if it is empty or longer than `MAX_CAPTION_CHARACTERS`.
    """
    if caption is None:
        raise BrokenRow("no caption")
    if not caption.strip():
        raise BrokenRow("the caption is empty")
    if len(caption) > MAX_CAPTION_CHARACTERS:
        raise BrokenRow(f"the caption has {len(caption)} characters, of {MAX_CAPTION_CHARACTERS} at most")
    return caption


def is_good(caption: str | None) -> bool:
    """Return whether a caption can be trained on."""
    try:
        check_caption(caption)
    except BrokenRow:
        return False
    return True
