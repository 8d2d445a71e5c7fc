# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Small data on disk, sound and broken."""

import io
import json
import tarfile
import zlib
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image


def make_image(i: int, size: int = 32) -> Image.Image:
    """An image of noise, the same for the same `i`."""
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (size, size, 3)).astype(np.uint8))


def to_bytes(image: Image.Image, format: str = "PNG") -> bytes:
    """The file of an image."""
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return buffer.getvalue()


def write_image_folder(folder: Path, count: int = 40, size: int = 32) -> Path:
    """Writes an imagefolder of [`make_image`], each with the caption "image number i"."""
    folder.mkdir()
    lines = []
    for i in range(count):
        make_image(i, size).save(folder / f"{i:03}.png")
        lines.append(json.dumps({"file_name": f"{i:03}.png", "text": f"image number {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def write_rows(path: Path, rows: list[tuple], caption_column: str = "text", image_column: str = "photo") -> None:
    """Writes a parquet file of images, or of the bytes of image files, with their captions."""
    images = [
        image
        if image is None
        else {"bytes": to_bytes(image) if isinstance(image, Image.Image) else image, "path": None}
        for image, _ in rows
    ]
    features = Features({image_column: ImageFeature(), caption_column: Value("string")})
    table = {image_column: images, caption_column: [caption for _, caption in rows]}
    Dataset.from_dict(table, features=features).to_parquet(path)


def write_parquet(path: Path, count: int = 40, caption_column: str = "text", first: int = 0) -> None:
    """Writes a parquet file of [`make_image`], each with the caption "image number i"."""
    write_rows(path, [(make_image(i), f"image number {i}") for i in range(first, first + count)], caption_column)


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a file to a tar file."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_tar(path: Path, extensions: list[str]) -> None:
    """Writes a WebDataset tar file of [`make_image`], each with the caption "image number i" and one of `extensions`."""
    formats = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
    with tarfile.open(path, "w") as archive:
        for i, kind in enumerate(extensions):
            image, caption = to_bytes(make_image(i), formats[kind]), f"image number {i}".encode()
            add_member(archive, f"{i:03}.{kind}", image)
            add_member(archive, f"{i:03}.txt", caption)


def make_rows(images: list[bytes]) -> Dataset:
    """Rows in memory, undecoded, of the bytes of image files."""
    features = Features({"image": ImageFeature(decode=False), "text": Value("string")})
    rows = [{"bytes": image, "path": None} for image in images]
    return Dataset.from_dict({"image": rows, "text": ["an image"] * len(rows)}, features=features)


def make_bomb() -> bytes:
    """A small file of an image of 200 million pixels: only its header says so."""
    content = bytearray(to_bytes(Image.new("L", (1, 1))))
    content[16:24] = (20_000).to_bytes(4, "big") + (10_000).to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


# For each kind of broken row: an image, its caption, and a part of the reason that is given.
BROKEN = {
    "truncated": (to_bytes(make_image(0))[:1000], "the truncated one", "truncated"),
    "truncated jpeg": (to_bytes(make_image(0), "JPEG")[:700], "a jpeg", "truncated"),
    "zero bytes": (b"", "nothing", "zero bytes"),
    "no image": (b"not an image", "some text", "cannot identify image file"),
    "wrong mode": (
        to_bytes(Image.fromarray(np.full((9, 9), 70000, np.int32)), "TIFF"),
        "thick",
        "an image of mode I",
    ),
    "decompression bomb": (make_bomb(), "a bomb", "decompression bomb"),
    "missing image": (None, "no image", "no image"),
    "empty caption": (make_image(1), " \n", "the caption is empty"),
    "long caption": (make_image(2), "long " * 2000, "the caption has 10000 characters"),
    "missing caption": (make_image(3), None, "no caption"),
}
