# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""TODO"""

import os
from collections.abc import Iterable
from pathlib import Path

import yaml

from .checkpoints import find_checkpoint, forget_newer, read_progress
from .files import remove_folder, write_text


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


def find_start(output_dir: Path, resume_from_checkpoint: str | None, overwrite_output_dir: bool) -> Path | None:
    """
    The checkpoint that a run goes on from, if it is to.

    Raises:
        `ValueError`: if there is none, or if a run that is to begin again would mix with an earlier one.
    """
    if resume_from_checkpoint is not None:
        return find_checkpoint(output_dir, resume_from_checkpoint)
    if (output_dir / "config.yaml").exists() and not overwrite_output_dir:
        raise ValueError(
            f"`output_dir={str(output_dir)!r}` holds an earlier run. Go on with it by `--resume_from_checkpoint latest`, "
            "replace it by `--overwrite_output_dir`, or name another folder."
        )
    return None


def check_replaced(output_dir: Path, names: Iterable[str]) -> None:
    """Raises a `ValueError` if a run that begins would replace folders in `output_dir` that no run has made."""
    found = [name for name in names if (output_dir / name).exists()]
    if found and not (output_dir / "config.yaml").exists():
        raise ValueError(
            f"`output_dir={str(output_dir)!r}` holds {', '.join(found)}, which this run would replace, but no `config.yaml` of "
            "an earlier run: name another folder."
        )


def claim_output_dir(
    output_dir: Path, config: dict, replaced: Iterable[str], checkpoint: Path | None, resume_with_changes: bool
) -> None:
    """
    From here on `output_dir` holds this run, and `config.yaml` its arguments. Of an earlier run, a new one removes the
    folders named in `replaced` and the metrics; one that goes on removes what came after its `checkpoint`.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    metrics_path = output_dir / "metrics.jsonl"
    if checkpoint is None:
        for name in replaced:
            remove_folder(output_dir / name)
        metrics_path.unlink(missing_ok=True)
    else:
        keep_metrics(metrics_path, read_progress(checkpoint)["metrics_size"], resume_with_changes)
        forget_newer(output_dir / "checkpoints", checkpoint)
    write_text(output_dir / "config.yaml", yaml.safe_dump(config, sort_keys=False))
