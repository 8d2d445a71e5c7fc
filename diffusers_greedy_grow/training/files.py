# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Files that are complete or absent: each is written under a temporary name and then renamed."""

import os
import shutil
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image


def write_text(path: Path, text: str) -> None:
    """Replace a small file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def save_image(image: Image.Image, path: Path, **kwargs: Any) -> None:
    """Replace an image. `kwargs` are arguments of PIL's `save`."""
    temporary = path.with_suffix(f".tmp{path.suffix}")
    image.save(temporary, **kwargs)
    temporary.replace(path)


def link_file(source: Path, target: Path) -> None:
    """Give a file that is only ever replaced as a whole a second name, or copy it where the file system has no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        temporary = target.with_name(target.name + ".tmp")
        shutil.copyfile(source, temporary)
        temporary.replace(target)


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Save a pipeline to `folder`, and replace what was there."""
    folder = folder.resolve()  # nothing can be renamed to a link
    temporary = folder.with_name(folder.name + ".tmp")
    remove_folder(temporary)
    pipeline.save_pretrained(temporary)
    remove_folder(folder)
    temporary.rename(folder)


def remove_folder(folder: Path) -> None:
    """Remove a folder if it exists. A link to a folder elsewhere (on a larger disk, say) stays, and that folder is emptied."""
    target = folder.resolve()
    if target.exists():
        shutil.rmtree(target)
    if folder.is_symlink():
        target.mkdir(parents=True)


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint such that a removal that is cut off leaves nothing that looks like a checkpoint."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)
