# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Uploads of a folder to the Hub: checks before the work, one commit per upload, and retries after transient errors."""

import fnmatch
import re
import shlex
import time
from pathlib import Path

from diffusers.utils import logging
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HTTPError


logger = logging.get_logger(__name__)  # pylint: disable=invalid-name

# Status codes after which the same request may succeed. 412: somebody else has committed in the meantime.
TRANSIENT = (408, 412, 429, 500, 502, 503, 504)
ATTEMPTS = 4


class UploadError(RuntimeError):
    """An upload has failed. The message names the folder that holds all files, and the command that uploads it."""


def prepare_repository(
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """
    Create the repository and its branch `revision` if they do not exist, and check that they may be written to. Call it
    before any work.

    Returns:
        `str`: The repository's full name.

    Raises:
        `ValueError`: if `repo_id` is not a valid name, if `token` contains whitespace, or if `create_pr` comes with a
            `revision`.
        `HfHubHTTPError`: if the token is missing or wrong, or may not write to the repository.
    """
    if isinstance(token, str) and re.search(r"\s", token):
        raise ValueError("`token` has blanks or line ends in it: remove them, for example by `.strip()`.")
    if create_pr and revision is not None:
        raise ValueError(
            f"`create_pr=True` and `revision={revision!r}`: a pull request goes to `main`; pass only one of them."
        )
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    # For a repository that exists, `create_repo` succeeds without write access. Anybody may open a pull request.
    try:
        api.auth_check(repo_id, write=not create_pr)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):  # a Hub without this check answers 404
            raise
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def check_license(license: str | None) -> None:
    """Raise a `ValueError` if the Hub does not know a license's identifier. Call it before any work."""
    if license is not None:
        ModelCard(f"---\nlicense: {license}\n---\n").validate()


def upload(
    folder: Path,
    repo_id: str,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload",
    path_in_repo: str | None = None,
    tag: str | None = None,
) -> CommitInfo:
    """
    Upload a folder as one commit, and retry after transient errors.

    The commit holds all files or does not exist, so a partial upload is never visible. It deletes the same weights in another
    number of shards. A retry does not send large files again that have arrived.

    Args:
        folder (`Path`):
            The folder to upload.
        repo_id (`str`), token (`str`, *optional*), revision (`str`, *optional*), create_pr (`bool`, defaults to `False`):
            As for [`prepare_repository`].
        commit_message (`str`, defaults to `"Upload"`):
            The title of the commit.
        path_in_repo (`str`, *optional*):
            The folder of the repository to upload to.
        tag (`str`, *optional*):
            A tag to create on the commit, or to move to it.

    Returns:
        [`~huggingface_hub.CommitInfo`]

    Raises:
        [`UploadError`]: if an error is not transient, or the last attempt fails.
    """
    api, commit = HfApi(token=token), None
    attempts = 1 if create_pr else ATTEMPTS  # after a lost response, a retry would open a second pull request
    for attempt in range(1, attempts + 1):
        try:
            if commit is None:
                operations = list_operations(api, folder, repo_id, revision, path_in_repo)
                commit = api.create_commit(
                    repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
                )
            if tag is not None:
                move_tag(api, repo_id, tag, commit.oid)
            break
        except Exception as error:  # any error: the caller must learn where the weights are
            reason = f"{type(error).__name__}: {error}"
            reason = reason.replace(api.token, "***") if isinstance(api.token, str) and api.token else reason
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            is_transient = status in TRANSIENT if status else isinstance(error, (OSError, HTTPError))
            if attempt == attempts or not is_transient:
                command = upload_command(folder, repo_id, revision, create_pr, path_in_repo, tag)
                raise UploadError(
                    f"The upload to {repo_id} failed: {reason} Nothing is lost: all files are in {folder}. "
                    f"Upload them with `{command}`."
                ) from error
            logger.warning(f"The upload to {repo_id} failed ({reason}); trying again.")
            time.sleep(2.0 ** (attempt - 1))
    assert commit is not None
    logger.info(f"Uploaded to {commit.pr_url or commit.commit_url}.")
    return commit


def list_operations(
    api: HfApi, folder: Path, repo_id: str, revision: str | None, path_in_repo: str | None
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """List the operations of one commit: add all files of `folder`, and delete the files that match [`other_shards`]."""
    prefix = f"{path_in_repo.strip('/')}/" if path_in_repo else ""
    files = {
        prefix + path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    patterns = [prefix + pattern for pattern in other_shards(folder)]
    stale = [
        name
        for name in api.list_repo_files(repo_id, revision=revision)
        if name not in files and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]
    return [
        *(CommitOperationDelete(path_in_repo=name) for name in stale),
        *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()),
    ]


def other_shards(folder: Path) -> list[str]:
    """
    List patterns of all files, sharded or not, that could hold the weights in `folder`. Weights of another component or
    variant do not match.
    """
    patterns = set()
    for path in folder.rglob("*.safetensors"):
        stem = re.sub(r"-\d{5}-of-\d{5}$", "", path.stem)
        base, _, variant = stem.partition(".")
        index = f"{base}.safetensors.index." + (f"{variant}.json" if variant else "json")
        names = (f"{stem}.safetensors", f"{stem}-?????-of-?????.safetensors", index)
        patterns |= {path.with_name(name).relative_to(folder).as_posix() for name in names}
    return sorted(patterns)


def move_tag(api: HfApi, repo_id: str, tag: str, commit: str) -> None:
    """Create a tag on a commit, or move it there if it exists."""
    try:
        api.create_tag(repo_id, tag=tag, revision=commit)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        api.delete_tag(repo_id, tag=tag)
        api.create_tag(repo_id, tag=tag, revision=commit)


def upload_command(
    folder: Path, repo_id: str, revision: str | None, create_pr: bool, path_in_repo: str | None, tag: str | None
) -> str:
    """Return the shell command that does the same as [`upload`]."""
    words = ["hf", "upload", repo_id, str(folder), path_in_repo or "."]
    words += [word for pattern in other_shards(folder) for word in ("--delete", pattern)]
    words += (["--revision", revision] if revision else []) + (["--create-pr"] if create_pr else [])
    command = shlex.join(words)
    if tag:
        command += f" && (hf repos tag delete -y {repo_id} {tag}; hf repos tag create {repo_id} {tag})"
    return command
