# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Publishing a run on the Hub while it trains, and the cards of what it makes."""

import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from accelerate.logging import get_logger
from huggingface_hub import EvalResult, HfApi
from huggingface_hub.utils import disable_progress_bars
from PIL import Image

from ..hub.cards import write_card
from ..hub.lineage import get_lineage
from ..hub.publish import new_upload_folder
from ..hub.upload import UploadError, check_license, prepare_repository, upload
from ..pipelines import GreedyGrowPipeline
from .arguments import DataArguments, LoopArguments
from .files import remove_folder, save_pipeline


logger = get_logger(__name__)


def prepare_publishing(args: LoopArguments) -> str:
    """
    Make sure that the run's repository exists and may be written to, and return its full name.

    Raises:
        `ValueError`: if the Hub does not know the license.
        `HfHubHTTPError`: if the token is missing or wrong, or may not write there.
    """
    disable_progress_bars()  # those of uploads would mix with those of training
    check_license(args.hub_license)
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    return prepare_repository(name, private=args.hub_private_repo or None)


class Publisher:
    """
    Uploads to the Hub in the background, one thing after the other. A failed upload is logged and does not stop the run.

    Args:
        args (`LoopArguments`): The repository, its license, and `output_dir`.
        on_branch (`bool`): Whether weights are also published during a phase, on the branch `training`.
    """

    def __init__(self, args: LoopArguments, on_branch: bool):
        self.license, self.uploads = args.hub_license, Path(args.output_dir) / "uploads"
        self.repo_id = prepare_publishing(args)
        if on_branch:
            prepare_repository(self.repo_id, revision="training")
        self.executor = ThreadPoolExecutor(max_workers=1)
        self.last: Future | None = None

    def push_phase(self, name: str, folder: Path) -> None:
        """Publish the pipeline of a finished phase as the next commit, under a tag of the phase's `name`."""
        self.last = self.executor.submit(self.upload, folder, commit_message=f"{name} is done", tag=name)

    def push_step(self, name: str, step: int, pipeline: GreedyGrowPipeline) -> None:
        """Publish the weights after `step` of phase `name` on the branch `training`, unless the previous upload is still running."""
        if self.last is not None and not self.last.done():
            logger.info(f"{name}: step {step} is not published, since the previous upload is still running.")
            return
        folder = self.uploads / f"{name}-{step}"
        try:
            remove_folder(self.uploads)  # of steps whose upload has failed: this one is newer
            save_pipeline(pipeline, folder)
            write_card(folder, pipeline, self.repo_id, license=self.license)
        except Exception as error:
            logger.error(f"{name}: step {step} is not published: {type(error).__name__}: {error}")
            return
        message = f"{name}, step {step}"
        self.last = self.executor.submit(self.upload, folder, "training", remove=True, commit_message=message)

    def push_missing(self, names: list[str], output_dir: Path) -> None:
        """Publish finished phases whose tags are missing, because the run was killed before they had arrived."""
        tags = {tag.name for tag in HfApi().list_repo_refs(self.repo_id).tags}
        for name in names:
            if name not in tags and (output_dir / name / "README.md").exists():
                self.push_phase(name, output_dir / name)

    def upload(self, folder: Path, revision: str | None = None, remove: bool = False, **kwargs) -> None:
        try:
            upload(folder, self.repo_id, revision=revision, **kwargs)
        except UploadError as error:
            logger.error(str(error))
            return
        if remove:
            shutil.rmtree(folder)

    def wait(self) -> None:
        """Wait for all uploads."""
        if self.last is not None and not self.last.done():
            logger.info(f"Waiting for the uploads to {self.repo_id}.")
        self.executor.shutdown()

    def leave(self) -> None:
        """Wait for the running upload only: [`push_missing`] does the others when the run is resumed."""
        if self.last is not None and not self.last.done():
            logger.info(f"Waiting for the running upload to {self.repo_id}.")
        self.executor.shutdown(cancel_futures=True)


def write_phase_card(
    folder: Path,
    pipeline: GreedyGrowPipeline,
    repo_id: str,
    gallery: list[tuple[str, Image.Image]],
    scores: dict[str, float],
    data_args: DataArguments,
    license: str | None,
    tag: str | None,
) -> None:
    """
    Write the card of a finished phase: what the pipeline is, its held-out loss and scores, its samples and the run's losses.

    Args:
        folder (`Path`): The phase's pipeline folder; its name is the phase's, and the run's metrics and images lie beside it.
        pipeline ([`GreedyGrowPipeline`]): The pipeline.
        repo_id (`str`): Where the pipeline is or will be published.
        gallery (`list[tuple[str, Image.Image]]`): The phase's samples with their captions.
        scores (`dict[str, float]`): The shapes scorer's shares, if any.
        data_args (`DataArguments`): What was trained on.
        license (`str`, *optional*), tag (`str`, *optional*): See [`~hub.cards.make_card`].
    """
    datasets = [name for name in (data_args.dataset_name, data_args.high_res_dataset_name) if name is not None]
    held_out = data_args.high_res_dataset_name if data_args.has_high_res_data else data_args.dataset_name
    run = folder.parent
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line for line in lines if line["phase"] == folder.name and "val_loss" in line]
    best_step = get_lineage(pipeline.unet)[-1].get("best_step")  # if not the last weights were kept
    losses = [line for line in losses if best_step in (None, line["step"])]
    names = {"loss": "held-out loss", "loss_low": "held-out loss, low band", "loss_high": "held-out loss, high band"}
    figures = {("loss", label): losses[-1][f"val_{name}"] for name, label in names.items() if losses}
    figures |= {("accuracy", name): value for name, value in scores.items()}
    write_card(
        folder,
        pipeline,
        repo_id,
        run / "samples.png",
        gallery,
        run / "loss.png",
        license=license,
        datasets=datasets or None,
        eval_results=[
            EvalResult(
                task_type="text-to-image",
                dataset_type=held_out or ("captioned-shapes" if data_args.on_shapes else "images"),
                dataset_name=held_out or ("Captioned shapes" if data_args.on_shapes else "Images, held out"),
                metric_type=kind,
                metric_name=name,
                metric_value=round(value, 4),
            )
            for (kind, name), value in figures.items()
        ],
        tag=tag,
    )


def publish_files(paths: list[Path], repo_id: str, commit_message: str) -> None:
    """Upload some files of a run. A failure is logged, with the folder in which everything waits."""
    folder = new_upload_folder(repo_id)
    for path in paths:
        shutil.copy(path, folder)
    try:
        upload(folder, repo_id, commit_message=commit_message)
    except UploadError as error:
        logger.error(str(error))
    else:
        shutil.rmtree(folder)
