# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Captions in files of text: how they are decoded, and how the metadata of a folder names images and their captions."""

import contextlib
import csv
import functools
import io
import itertools
import json
import logging
import os
import unicodedata
from pathlib import Path

import pyarrow.parquet


# Unlike accelerate's, this logger works before there is an `Accelerator`.
logger = logging.getLogger(__name__)


class UnreadableData(ValueError):
    """The reason why a folder cannot be read, as the end of a sentence that begins with its name."""


def check_column(argument: str, column: str, columns: list[str], split: str) -> None:
    """
    Check the name of a column.

    Raises:
        `ValueError`: if it is not among `columns`.
    """
    if column not in columns:
        raise ValueError(f"`{argument}={column!r}` is not in the {split} split, whose columns are {columns}.")


# ----------------------------------------------------------------------------------------------------------------------
# Text
def decode_text(content: bytes, place: str) -> str | None:
    """
    Return the text of a file in UTF-8, in UTF-16 with its mark, or, if it is neither, in Windows' western code page, with a warning
    that names the `place`. Return None if it is not text.
    """
    encodings = ("utf-16",) if content.startswith((b"\xff\xfe", b"\xfe\xff")) else ("utf-8-sig", "cp1252")
    for encoding in encodings:
        with contextlib.suppress(UnicodeDecodeError):
            text = content.decode(encoding)
            if encoding == "cp1252":
                warn_of_code_page(place)
            return None if "\0" in text else text
    return None


@functools.cache
def warn_of_code_page(place: str) -> None:
    """Warn, once per place, that text may be read wrongly."""
    logger.warning(
        f"{place} has text that is not UTF-8. It is read as Windows-1252: if it is not, convert it to UTF-8."
    )


def replace_surrogates(caption: object) -> object:
    """Return a caption, or several, with a question mark for half of an emoji, which is no text and cannot be stored."""
    if isinstance(caption, list):
        return [replace_surrogates(one) for one in caption]
    return caption.encode(errors="replace").decode() if isinstance(caption, str) else caption


# ----------------------------------------------------------------------------------------------------------------------
# Metadata
def is_file_name(column: str) -> bool:
    """Return whether a column of metadata names files."""
    return column == "file_name" or column.endswith("_file_name")


def parse_metadata(path: Path) -> list[dict]:
    """
    Return the rows of a metadata file.

    Raises:
        [`UnreadableData`]: if it cannot be parsed.
    """
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    text = decode_text(path.read_bytes(), str(path))
    if text is None:
        raise UnreadableData(f"cannot be read: {path} is not text in UTF-8.")
    if path.suffix == ".csv":
        return parse_csv(path, text)
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not `splitlines`: a caption may hold other line breaks
        if line.strip():
            try:
                rows.append({**json.loads(line)})
            except (ValueError, TypeError) as error:
                raise UnreadableData(
                    f"cannot be read: line {number} of {path} is not a JSON object: {error}"
                ) from error
    return rows


def parse_csv(path: Path, text: str) -> list[dict]:
    """
    Return the rows of a table with commas, semicolons or tabs between its fields.

    Raises:
        [`UnreadableData`]: if a row has more fields than the header, or quotes are not closed.
    """
    text = io.StringIO(text, newline=None).read()  # with one kind of line breaks

    def split_header(separator: str) -> list[str]:
        header = csv.reader([text.split("\n", 1)[0]], delimiter=separator, skipinitialspace=True)
        return [name.strip() for name in next(header, [])]

    separator = next((one for one in ",;\t" if any(map(is_file_name, split_header(one)))), ",")
    reader = csv.DictReader(io.StringIO(text), delimiter=separator, skipinitialspace=True, strict=True)
    rows = []
    try:
        reader.fieldnames = split_header(separator)
        for row in itertools.islice(reader, 1, None):
            if None in row:
                raise csv.Error(f"it has more fields than the header: put a caption with {separator!r} in quotes")
            rows.append(row)
    except csv.Error as error:
        raise UnreadableData(f"cannot be read: line {reader.reader.line_num} of {path}: {error}") from error
    return rows


def read_metadata(path: Path, image_column: str, caption_column: str, split: str) -> list[tuple[str, object]]:
    """
    Return the path of each image that a metadata file names, and its caption.

    Raises:
        [`UnreadableData`]: if the file cannot be parsed or a row names no image.
        `ValueError`: if there is no such column.
    """
    rows = parse_metadata(path)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if not any(map(is_file_name, columns)) and rows:
        raise UnreadableData(f"cannot be read: {path} has no column `file_name`, only {columns}.")
    shown = [(name[: -len("_file_name")] or "image") if is_file_name(name) else name for name in columns]
    if rows:
        check_column("image_column", image_column, shown, split)
        check_column("caption_column", caption_column, shown, split)
    file_column = next((name for name, other in zip(columns, shown) if other == image_column), "file_name")
    if rows and not is_file_name(file_column):
        raise ValueError(
            f"`image_column={image_column!r}` holds values, not images; name a column of {path} that ends in file_name."
        )
    result = []
    for number, row in enumerate(rows, 1):
        name = row.get(file_column)
        if not isinstance(name, str) or not name:
            raise UnreadableData(f"cannot be read: row {number} of {path} names no image in `{file_column}`.")
        result.append((find_file(path.parent, name), row.get(caption_column)))
    return result


def find_file(folder: Path, name: str) -> str:
    """Return the path of a file that metadata names, which may have been written on Windows or macOS."""
    file = os.path.normpath(folder / name)
    if ("\\" in name or not name.isascii()) and not os.path.exists(file):
        others = name.replace("\\", "/"), unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)
        return next(
            (other for other in (os.path.normpath(folder / one) for one in others) if os.path.exists(other)), file
        )
    return file
