# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Publishing a model or pipeline: save it to a temporary folder, write its card, and upload both as one commit."""

import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from huggingface_hub import constants

from .cards import write_card
from .upload import UploadError, prepare_repository, upload


logger = logging.get_logger(__name__)  # pylint: disable=invalid-name


@dataclass
class Push:
    """
    One push: the repository, and how to commit to it. Call [`~Push.prepare`] before the work, and [`~Push.publish`] or
    [`~Push.publish_or_keep`] after it. The fields are the arguments of [`HubMixin.push_to_hub`] with the same names.
    """

    repo_id: str
    commit_message: str | None = None
    private: bool | None = None
    token: str | None = field(default=None, repr=False)
    create_pr: bool = False
    revision: str | None = None

    def prepare(self) -> None:
        """Check that the push is possible, and complete `repo_id`. See [`prepare_repository`]."""
        self.repo_id = prepare_repository(self.repo_id, self.private, self.token, self.revision, self.create_pr)

    def publish(
        self,
        pushed,
        saving: dict[str, Any] = {},
        subfolder: str | None = None,
        samples: str | Path | None = None,
        card: dict[str, Any] = {},
        saved: Any = None,
    ) -> str:
        """
        Publish a model or pipeline.

        Args:
            pushed ([`GreedyGrowPipeline`], [`ShallowUNet2DModel`] or [`GrowableUNet2DConditionModel`]):
                The model or pipeline.
            saving (`dict`, defaults to `{}`):
                Arguments of its `save_pretrained`.
            subfolder (`str`, *optional*), samples (`str` or `Path`, *optional*), card (`dict`, defaults to `{}`):
                As for [`HubMixin.push_to_hub`].
            saved (*optional*):
                What to save, from [`HubMixin.refer`], if it is not all of `pushed`.

        Returns:
            `str`: The address of the commit, or of the pull request.

        Raises:
            [`UploadError`]: if saving or uploading fails.
        """
        folder = None
        try:
            folder = new_upload_folder(self.repo_id)
            (pushed if saved is None else saved).save_pretrained(folder, **saving)
            if subfolder is None:
                write_card(folder, pushed, self.repo_id, samples, **card)
        except Exception as error:  # any error: [`publish_or_keep`] must return the model
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            raise UploadError(
                f"Nothing was uploaded to {self.repo_id}, because saving failed: {type(error).__name__}: {error} If the disk of "
                f"{constants.HF_HOME} is full, set HF_HOME to a folder with enough space, or save to another folder by "
                "`save_pretrained` and upload that by `hf upload`."
            ) from error
        message = self.commit_message or f"Upload {type(pushed).__name__}"
        commit = upload(folder, self.repo_id, self.token, self.revision, self.create_pr, message, subfolder)
        shutil.rmtree(folder, ignore_errors=True)
        return str(commit.pr_url or commit.commit_url)

    def publish_or_keep(self, pushed) -> None:
        """Publish a model or pipeline, and log the address. A failed upload is logged, too, so that `pushed` is not lost."""
        try:
            url = self.publish(pushed)
        except UploadError as error:
            logger.error(error)
        else:
            logger.warning(f"Published: {url}")  # diffusers shows warnings only, and nothing else returns the address


def new_upload_folder(repo_id: str) -> Path:
    """Make an empty folder for the files of an upload. It stays if the upload fails."""
    place = Path(constants.HF_HOME) / "greedy-grow-uploads"
    place.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=re.sub(r"[^\w.-]", "-", repo_id.replace("/", "--")) + "-", dir=place))
