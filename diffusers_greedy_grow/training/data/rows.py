# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""TODO"""

import contextlib
import json
from pathlib import Path


# A longer caption is a page of text that was scraped along, not a caption.
MAX_CAPTION_CHARACTERS = 5000


class BrokenRow(ValueError):
    """Why a row cannot be trained on."""


class BrokenRows:
    """
    Counts broken rows, writes a line for each to a file, and stops the run when there are too many.

    Every process and every worker of a data loader counts what it reads itself; lines are short, so those of several
    do not mix in the file.

    Args:
        path (`Path`, *optional*):
            The file, of one JSON object for each row: its name and the reason.
        max_share (`float`, defaults to 0.01):
            The largest share of the rows read that may be broken. The first 1000 are taken together, since one of the
            first ten would be a tenth already.
    """

    def __init__(self, path: Path | None = None, max_share: float = 0.01):
        self.path, self.max_share = path, max_share
        self.read = self.broken = 0

    def add(self, name: str, reason: Exception) -> None:
        """
        Raises:
            `ValueError`: if rows are broken beyond `max_share`.
        """
        self.broken += 1
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write(json.dumps({"row": name, "reason": str(reason)}) + "\n")
        if self.broken > self.max_share * max(self.read, 1000):
            raise ValueError(
                f"{self.broken} of {self.read} rows read are broken, which is beyond `max_broken_share={self.max_share}`. "
                f"The last one is {name}: {reason}. "
                + (f"{self.path} names all of them. " if self.path is not None else "")
                + "Repair the data, or raise `max_broken_share`."
            )

    def found(self) -> int:
        """How many different rows the file names."""
        if self.path is None or not self.path.exists():
            return 0
        rows = set()
        for line in self.path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # on a network drive, lines of several processes may mix after all
                rows.add(json.loads(line)["row"])
        return len(rows)


def name_row(place: str, row: dict) -> str:
    """Where a row stands, its file's name if it has one, and how its caption begins."""
    path = (row["image"] or {}).get("path")
    return f"{place}{f', {path}' if path else ''}, {(row['text'] or '')[:80]!r}"


def check_caption(caption: str | None) -> str:
    """
    Raises:
        [`BrokenRow`]: if there is none, it is empty or longer than `MAX_CAPTION_CHARACTERS`.
    """
    if caption is None:
        raise BrokenRow("no caption")
    if not caption.strip():
        raise BrokenRow("the caption is empty")
    if len(caption) > MAX_CAPTION_CHARACTERS:
        raise BrokenRow(f"the caption has {len(caption)} characters, of {MAX_CAPTION_CHARACTERS} at most")
    return caption
