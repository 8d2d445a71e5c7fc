# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""A run's `output_dir`: whether a run may use it, what it replaces there, and where it resumes."""

import contextlib
import errno
import json
import math
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger

from .arguments import LoopArguments
from .checkpoints import Progress, find_checkpoint, remove_newer
from .files import remove_folder, write_text
from .phases import Phase


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


logger = get_logger(__name__)

LOCK = ".lock"


# ----------------------------------------------------------------------------------------------------------------------
# One run at a time


@contextlib.contextmanager
def hold_output_dir(output_dir: Path, accelerator: Accelerator) -> Iterator[None]:
    """
    Keep other runs out of `output_dir` until this one ends, in whatever way: the system releases the lock of a process that
    dies. The main process holds it. A folder that is still empty at the end is removed.

    Raises:
        `ValueError`: if another run holds the folder; says which.
    """
    if not accelerator.is_main_process:
        yield
        return
    made = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
    output_dir.mkdir(parents=True, exist_ok=True)
    try:
        with lock_file(output_dir / LOCK, f"`output_dir={str(output_dir)!r}`"):
            yield
    finally:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


@contextlib.contextmanager
def lock_file(path: Path, name: str) -> Iterator[None]:
    """
    Hold the lock of the file `path`, which says who holds it, and remove the file afterwards. `lockf` and not `flock`: it works on
    more network drives, and processes that this one forks do not keep it.

    Raises:
        `ValueError`: if another process holds it. `name` names what is locked.
    """
    file = open_locked(path, name)
    try:
        yield
    finally:
        if file is not None:
            path.unlink(missing_ok=True)  # while it is locked: see `open_locked`
            file.close()


def open_locked(path: Path, name: str) -> IO[str] | None:
    """Open and lock the file `path` for [`lock_file`], and write who holds it. Return None where files cannot be locked."""
    if fcntl is None:
        return None
    while True:
        file = open(path, "a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = describe_holder(file.read())
            file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"{name} is in use by {holder}. Wait for that run or stop it, or name another folder."
                ) from None
            logger.warning(f"{name} cannot be locked ({error.strerror}): start no second run in it.")
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                break
        file.close()  # the holder removed the file after this process had opened it
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    file.truncate(0)
    file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": now}))
    file.flush()
    return file


def describe_holder(text: str) -> str:
    """Return who holds a lock, from the text of its file."""
    try:
        holder = json.loads(text)
        return f"process {holder['process']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):  # that process has locked the file, but not written to it yet
        return "another process"


# ----------------------------------------------------------------------------------------------------------------------
# Where a run starts


def find_start(
    output_dir: Path,
    args: LoopArguments,
    folders: Sequence[str],
    pipelines: Sequence[str] = (),
    core: str | None = None,
) -> tuple[Path | None, list[str]]:
    """
    Decide where a run starts, before it changes anything.

    Args:
        output_dir (`Path`): Where the run puts everything.
        args (`LoopArguments`): For `resume_from_checkpoint` and `overwrite_output_dir`.
        folders (`Sequence[str]`), pipelines (`Sequence[str]`):
            The names of folders in `output_dir` that the run makes, and of the pipelines among its results.
        core (`str`, *optional*): The pipeline that the run grows, which it must not replace.

    Returns:
        The checkpoint to resume from, or None; and the names of all folders that a new run replaces.

    Raises:
        `ValueError`: if the checkpoint is missing or damaged, or a new run would replace something that must stay.
    """
    checkpoint = None
    if args.resume_from_checkpoint is not None:
        checkpoint = find_checkpoint(output_dir, args.resume_from_checkpoint)
        finished = [name for name in pipelines if (output_dir / name).exists()]
        if checkpoint is None and finished:
            raise ValueError(
                f"`resume_from_checkpoint='latest'`: there is no checkpoint in {output_dir / 'checkpoints'}, and to start again "
                f"would replace {', '.join(finished)}. Grow them further with `--core`, or name another `output_dir`."
            )
        logger.info(f"Resuming from {checkpoint}." if checkpoint else f"{output_dir} has no checkpoint yet.")
    elif (output_dir / "config.yaml").exists() and not args.overwrite_output_dir:
        raise ValueError(
            f"`output_dir={str(output_dir)!r}` holds an earlier run. Resume it by `--resume_from_checkpoint latest`, "
            "replace it by `--overwrite_output_dir`, or name another folder."
        )
    replaced = [*folders, *pipelines]
    if checkpoint is not None:
        return checkpoint, replaced

    def holds_core(name: str) -> bool:
        return core is not None and Path(core).resolve().is_relative_to((output_dir / name).resolve())

    if any(map(holds_core, replaced)):
        raise ValueError(f"`core={core!r}` would be replaced by this run: name another `output_dir`.")
    check_replaced(output_dir, replaced)
    if args.overwrite_output_dir and pipelines:  # phases that only the earlier run had are replaced too
        replaced += [name for name in find_finished(output_dir) if not holds_core(name)]
    return None, replaced


def check_replaced(output_dir: Path, names: Iterable[str]) -> None:
    """Raise a `ValueError` if a new run would replace folders in `output_dir` that no run has made."""
    found = [name for name in names if (output_dir / name).exists()]
    if found and not (output_dir / "config.yaml").exists():
        raise ValueError(
            f"`output_dir={str(output_dir)!r}` holds {', '.join(found)}, which this run would replace, but no `config.yaml` of "
            "an earlier run: name another folder."
        )


def find_finished(output_dir: Path) -> list[str]:
    """Return the names of the phases that an earlier run has finished in `output_dir`, according to its `config.yaml`."""
    if not (output_dir / "config.yaml").exists():
        return []
    config = yaml.safe_load((output_dir / "config.yaml").read_text(encoding="utf-8")) or {}
    names = [f"grown-{size}{end}" for size in config.get("resolutions", [])[1:] for end in ("-detail", "")]
    if config.get("core") is None:
        names.append("core")
    return [name for name in names if (output_dir / name / "model_index.json").exists()]


def find_resumed_phase(checkpoint: Path, phases: list[Phase], config: dict, resume_with_changes: bool) -> int:
    """
    Return the index in `phases` of the phase that `checkpoint` belongs to.

    Args:
        checkpoint (`Path`): The checkpoint to resume from.
        phases (`list[Phase]`): The phases of this run.
        config (`dict`): The settings that must match for a resumed run to be the same run.
        resume_with_changes (`bool`): Whether different settings are accepted.

    Raises:
        `ValueError`: if this run has no such phase, or fewer steps of it, or if settings differ. Another optimizer is refused in
            any case: it could not use the state that the checkpoint holds.
    """
    progress = Progress.read(checkpoint)
    index = next((i for i, phase in enumerate(phases) if phase.is_same(progress.phase_index, progress.phase)), -1)
    if index < 0:
        raise ValueError(f"{checkpoint} is of phase {progress.phase}, which this run does not have.")
    earlier, now = (values.get("optimizer", "adamw") for values in (progress.config, config))
    if earlier != now:
        raise ValueError(
            f"`optimizer={now!r}`: {checkpoint} holds the state of {earlier}, which {now} cannot use. Resume with `--optimizer "
            f"{earlier}`, or grow the last finished phase further with `--core` and another `output_dir`."
        )
    check_changes(checkpoint, progress.config, config, resume_with_changes)
    if progress.step > phases[index].steps:
        raise ValueError(
            f"{checkpoint} is after step {progress.step}, but {phases[index].name} has {phases[index].steps} steps now."
        )
    return index


def check_changes(checkpoint: Path, earlier: dict, now: dict, resume_with_changes: bool) -> None:
    """Raise a `ValueError` that names the settings that differ from the checkpoint's, unless changes are accepted."""
    now = json.loads(json.dumps(now))  # with lists for tuples, as they were saved
    names = [name for name in earlier | now if earlier.get(name) != now.get(name)]
    if names and not resume_with_changes:
        changes = ", ".join(f"{name} ({earlier.get(name)} -> {now.get(name)})" for name in names)
        raise ValueError(
            f"{checkpoint} was saved with other arguments: {changes}. Resume with the same ones, or "
            "pass `--resume_with_changes` if the changes are intended."
        )


def claim_output_dir(
    output_dir: Path, config: dict, replaced: Iterable[str], checkpoint: Path | None, resume_with_changes: bool
) -> None:
    """
    Make `output_dir` this run's, with its arguments in `config.yaml`. A new run removes the folders in `replaced` and the metrics;
    a resumed run removes what came after its `checkpoint`.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    metrics_path = output_dir / "metrics.jsonl"
    if checkpoint is None:
        for name in replaced:
            remove_folder(output_dir / name)
        metrics_path.unlink(missing_ok=True)
    else:
        truncate_metrics(metrics_path, Progress.read(checkpoint).metrics_size, resume_with_changes)
        remove_newer(output_dir / "checkpoints", checkpoint)
    write_text(output_dir / "config.yaml", dump_config(config))


class ConfigDumper(yaml.SafeDumper):
    """Quotes and escapes text with control characters: PyYAML reads a line break of Unicode as a space otherwise."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


ConfigDumper.add_representer(str, ConfigDumper.represent_str)


def dump_config(config: dict) -> str:
    """Return the text of `config.yaml`, which reads back to the same arguments."""
    return yaml.dump(config, Dumper=ConfigDumper, sort_keys=False, allow_unicode=True, width=math.inf)


def truncate_metrics(path: Path, size: int, resume_with_changes: bool) -> None:
    """
    Remove the lines that were written after a checkpoint was saved: they will be written again.

    Raises:
        `ValueError`: if lines from before the checkpoint are missing and changes are not accepted.
    """
    found = path.stat().st_size if path.exists() else 0
    if found < size and not resume_with_changes:
        raise ValueError(
            f"{path} lacks lines that were there when the checkpoint was saved: put it back, or "
            "pass `--resume_with_changes` if the curves and the card may lack them."
        )
    if found > size:
        os.truncate(path, size)
