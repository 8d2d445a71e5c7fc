# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""TODO"""

import shutil
from pathlib import Path

from diffusers import DiffusionPipeline


def remove_folder(folder: Path) -> None:
    """Removes a folder, if it exists. A link to one elsewhere, on a larger disk, say, stays, and that one is emptied."""
    target = folder.resolve()
    if target.exists():
        shutil.rmtree(target)
    if folder.is_symlink():
        target.mkdir(parents=True)


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Saves a pipeline to `folder`, which it replaces if it exists."""
    folder = folder.resolve()  # nothing can be renamed to a link
    temporary = folder.with_name(folder.name + ".tmp")
    remove_folder(temporary)
    pipeline.save_pretrained(temporary)
    remove_folder(folder)
    temporary.rename(folder)


def write_text(path: Path, text: str) -> None:
    """Replaces a small file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def remove(checkpoint: Path) -> None:
    """At once: what is left if this is cut off does not look like a checkpoint."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)
