# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
References to the weights of a core, in a folder or in a repository of the Hub at a commit, instead of a copy of them.

A reference is an entry of a saved configuration: `core`, the folder or repository; `revision`, the commit, or None for a folder;
`files`, the core's weights in there; `dtype` and `other_dtypes`, those that give the core's values, by the name of the tensor if they differ; and
`digest`, the SHA-256 of all of its tensors.
"""

import hashlib
import re
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file

from .lineage import find_source, get_lineage


# The entry of a configuration, and its own entries
REFERENCE = "_core_reference"
ENTRIES = {"core", "revision", "files", "dtype", "other_dtypes", "digest"}
# Where a model of diffusers lies in its repository or folder: alone, or in a pipeline
SUBFOLDERS = ("", "unet", "transformer")
# How to fetch a core, while a model that refers to it is loaded: arguments of `hf_hub_download`
FETCHING: ContextVar[dict[str, Any] | None] = ContextVar("FETCHING", default=None)
FETCH_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token")

Repair = Callable[[dict[str, torch.Tensor]], Any]


# ----------------------------------------------------------------------------------------------------------------------
# Saving


def find_folder(model: Any) -> str | None:
    """Return the local folder that a model was loaded from, or None for one from the Hub or that was not loaded."""
    name = str(model.config.get("_name_or_path", ""))
    return str(Path(name).resolve()) if name and Path(name).is_dir() and not find_source(model) else None


def find_core_source(model: Any) -> tuple[str, str | None]:
    """
    Return where the core of a grown model came from: the folder that it was loaded from in this process, and None; or its
    repository on the Hub, from the lineage, and its commit, if known.

    Raises:
        `ValueError`: if that is unknown.
    """
    if (folder := getattr(model, "core_folder", None)) is not None:
        return folder, None
    first: dict[str, Any] = next((entry for entry in get_lineage(model) if "grown_to" in entry), {})
    if "core" not in first:
        raise ValueError(
            '`core="reference"` needs a core from the Hub, or from a folder and grown in this process, but it is unknown where '
            'the core of this model came from: save it with `core="copy"`.'
        )
    return first["core"], first.get("core_revision")


def make_reference(
    core: torch.nn.Module, source: str, revision: str | None, is_folder: bool, repair: Repair
) -> dict[str, Any]:
    """
    Make a reference to the weights of a core.

    Args:
        core (`torch.nn.Module`): The core.
        source (`str`), revision (`str`, *optional*): Its folder, or its repository and commit; `main` by default.
        is_folder (`bool`): Whether `source` is a folder.
        repair (`Callable`): Changes old names of a file's tensors to those of the core, in place.

    Raises:
        `ValueError`: if no weights there are those of the core.
        `OSError`: if the folder or repository cannot be read.
    """
    state = core.state_dict()
    groups = group_weights(Path(source) if is_folder else list_cached_or_remote(source, revision))
    for files in groups:
        paths = [Path(source, file) if is_folder else fetch(source, revision, file) for file in files]
        tensors = read_tensors(paths, source, repair)
        found = {name: find_cast(value, tensors[name]) for name, value in state.items() if name in tensors}
        if found.keys() != state.keys() or None in found.values():
            continue
        state = {name: value.to(found[name]) for name, value in state.items()}
        if not is_folder:
            revision = re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]", str(paths[0]))[1]  # type: ignore[index]
        dtypes = {name: str(dtype).removeprefix("torch.") for name, dtype in found.items()}
        dtype = max({*dtypes.values()}, key=[*dtypes.values()].count)
        return {
            "core": source,
            "revision": revision,
            "files": files,
            "dtype": dtype,
            "other_dtypes": {name: other for name, other in dtypes.items() if other != dtype},
            "digest": digest(state),
        }
    tried = f"its weights there are {groups}" if groups else "there are no weights of a model of diffusers"
    raise ValueError(
        f'`core="reference"`: the core is not, or no longer, the one in {describe(source, revision)} ({tried}). It may have been '
        'trained further, or have fused adapters: save it with `core="copy"`.'
    )


def list_cached_or_remote(repo_id: str, revision: str | None) -> list[str]:
    """List the files of a repository that are in the cache, or, if it has no weights of a model, all files on the Hub."""
    try:
        cached = Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
        files = [path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()]
    except (OSError, ValueError):  # not in the cache at all
        files = []
    if not group_weights(files):  # the cache may hold the text encoder alone
        try:
            files = HfApi().list_repo_files(repo_id, revision=revision)
        except (OSError, HTTPError) as error:
            raise OSError(
                f'`core="reference"`: {describe(repo_id, revision)} cannot be read, to compare the core with it: {error}'
            ) from error
    return files


def group_weights(files: Path | list[str]) -> list[list[str]]:
    """Group the weights of a folder, or in a list of file names, by subfolder and variant: each group is a model."""
    if isinstance(files, Path):
        files = [
            path.relative_to(files).as_posix() for name in SUBFOLDERS for path in sorted((files / name).glob("*"))
        ]
    groups: dict[tuple[str, str], list[str]] = {}
    for file in sorted(files):
        parent, name = str(PurePosixPath(file).parent).removeprefix("."), PurePosixPath(file).name
        if parent in SUBFOLDERS and (
            found := re.fullmatch(r"(diffusion_pytorch_model.*?)(?:-\d{5}-of-(\d{5}))?(\.\w+)?\.safetensors", name)
        ):
            groups.setdefault((parent, f"{found[1]}{found[3]}{found[2]}"), []).append(file)
    return [groups[key] for key in sorted(groups)]


def find_cast(value: torch.Tensor, original: torch.Tensor) -> torch.dtype | None:
    """
    Return the dtype that the tensor `original` must be cast to before it has the values of another one: that one's own, or a half
    one that it was saved or loaded in before. Return None if it has other values.
    """
    if value.shape == original.shape:
        for dtype in (value.dtype, torch.bfloat16, torch.float16):
            if torch.equal(value.cpu(), original.to(dtype).to(value.dtype)):
                return dtype
    return None


def digest(state: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and values of tensors."""
    sha = hashlib.sha256()
    for name, value in sorted(state.items()):
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Loading


def load_reference(reference: Any, names: Iterable[str], repair: Repair) -> dict[str, torch.Tensor]:
    """
    Load the weights of a core that a saved model refers to, from the cache if they are there.

    Args:
        reference (`dict`): The entry of the model's configuration.
        names (`Iterable[str]`): The names of the core's tensors.
        repair (`Callable`): As for [`make_reference`].

    Returns:
        `dict[str, torch.Tensor]`: The tensors, in the dtypes that they were saved in.

    Raises:
        `ValueError`: if the entry is malformed, or the core is not the one that was referred to.
        `OSError`: if the core's files are missing or damaged.
    """
    check_reference(reference)
    source, revision = reference["core"], reference["revision"]
    place = describe(source, revision)
    paths = []
    for file in reference["files"]:
        path = Path(source, file) if revision is None else fetch(source, revision, file)
        if not path.is_file():
            raise OSError(
                f"This model refers to its core in {place}, but there is no file `{file}` in it: put the folder of the core back."
            )
        paths.append(path)
    tensors = read_tensors(paths, source, repair)
    changed = f"This model refers to its core in {place}, which has changed since the model was saved"
    if missing := sorted(set(names) - tensors.keys()):
        raise ValueError(f"{changed}: it lacks {missing[:3]}. Put back the core that the model was grown from.")
    dtypes = reference["other_dtypes"]
    state = {name: tensors[name].to(getattr(torch, dtypes.get(name, reference["dtype"]))) for name in names}
    if digest(state) != reference["digest"]:
        raise ValueError(f"{changed}: other values. Put back the core that the model was grown from.")
    return state


def check_reference(reference: Any) -> None:
    """Raise a `ValueError` if the entry of a configuration is not a reference."""
    try:
        valid = reference.keys() == ENTRIES and all(
            isinstance(reference[name], str) for name in ("core", "dtype", "digest")
        )
        dtypes = [reference["dtype"], *reference["other_dtypes"].values()]
        valid = valid and all(isinstance(getattr(torch, dtype), torch.dtype) for dtype in dtypes)
        valid = valid and (reference["revision"] is None or bool(re.fullmatch("[0-9a-f]{40}", reference["revision"])))
        for file in reference["files"]:
            path = PurePosixPath(file)
            valid = valid and path.suffix == ".safetensors" and not path.is_absolute() and ".." not in path.parts
    except (AttributeError, KeyError, TypeError):
        valid = False
    if not valid:
        raise ValueError(
            f"The configuration's `{REFERENCE}` must have {sorted(ENTRIES)}, with a commit or None as `revision` and safetensors as "
            f"`files`, but is {reference!r}."
        )


def lies_in(reference: dict[str, Any], folder: Path, is_pipeline: bool) -> bool:
    """Return whether a model, or a pipeline, in a folder would replace the core that a reference names, or the core's pipeline."""
    if reference["revision"] is not None:
        return False
    folder, places = folder.resolve(), {Path(reference["core"], file).parent for file in reference["files"]}
    if not is_pipeline:
        return folder in places
    pipelines = {place.parent for place in places if (place.parent / "model_index.json").is_file()}
    return not places.isdisjoint((folder, folder / "unet")) or folder in pipelines


def fetch(repo_id: str, revision: str | None, file: str) -> Path:
    """Return the path of a file of a repository in the cache, where it is downloaded to if it is not there."""
    try:
        return Path(hf_hub_download(repo_id, file, revision=revision, **(FETCHING.get() or {})))
    except (OSError, ValueError, HTTPError) as error:
        raise OSError(
            f"The core of this model is in {describe(repo_id, revision)}, but its file `{file}` cannot be fetched: "
            f"{type(error).__name__}: {error} Pass a `token` that may read it, or go online, once, if it is not in the cache."
        ) from error


def read_tensors(paths: list[Path], source: str, repair: Repair) -> dict[str, torch.Tensor]:
    """Read the tensors of weight files, which stay on the disk until they are used."""
    tensors: dict[str, torch.Tensor] = {}
    try:
        for path in paths:
            tensors |= load_file(path)
    except SafetensorError as error:
        raise OSError(f"The core's file `{path}` is damaged ({error}): download or save it again.") from error
    repair(tensors)
    return tensors


def describe(source: str, revision: str | None) -> str:
    return f"`{source}`" + (f" at `{revision[:12]}`" if revision else "")
