# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""In a phase: the predictions of the frozen core are computed once, and the steps read them instead of running the core."""

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ...flow import add_noise
from ...models import GrowableUNet2DConditionModel, ShallowUNet2DModel
from ...pipelines import GreedyGrowPipeline
from ..data.captioned import CaptionedImages
from ..data.images import normalize
from ..objective import FlowObjective
from ..run_folder import lock_file
from ..signals import Interrupt, leave_signals_to_the_parent
from ..text.embeddings import add_weights, name_encoder
from .draws import Draws, find_read_draws, read_visits
from .store import CorePredictions, Layout


logger = get_logger(__name__)


class CachedObjective(FlowObjective):
    """
    The loss of a phase's batches of [`CorePredictions`], see [`FlowObjective`]: the same, but the noise, noise levels and dropped
    captions are those of the draws, and the core does not run.

    Args:
        arguments: Those of [`FlowObjective`].
        num_draws (`int`): The number of draws per image.
    """

    def __init__(self, *arguments: Any, num_draws: int):
        super().__init__(*arguments)
        phase = self.phase
        self.draws = Draws(
            self.seed,
            phase.index,
            num_draws,
            self.shift,
            phase.logit_mean,
            phase.logit_std,
            self.caption_dropout,
            self.accelerator.device.type,
        )

    def draw(self, batch, shape, step, place):
        indices, numbers = zip(*read_visits(batch))
        return self.draws([*indices], [*numbers], shape, self.accelerator.device)

    def condition(self, batch, dropped):
        device = self.accelerator.device
        core_output = tuple(
            batch[name].to(device, non_blocking=True).float() for name in ("core_image", "core_features")
        )
        return {**super().condition(batch, dropped), "core_output": core_output}


def cache_core_predictions(
    pipeline: GreedyGrowPipeline,
    images: CaptionedImages,
    objective: CachedObjective,
    images_per_step: int,
    folder: Path,
    fingerprint: str | None,
    num_workers: int,
    interrupt: Interrupt,
) -> CorePredictions:
    """
    Return the core's predictions that the steps of a phase read, after computing those that are not in `folder` yet: each process
    computes its share. A signal stops the run; the next one continues.

    Args:
        pipeline ([`GreedyGrowPipeline`]): The pipeline with the model, which is frozen and on the device that computes.
        images ([`CaptionedImages`]): The training images, at the resolution of the phase.
        objective ([`CachedObjective`]): The loss of the phase, which has the draws.
        images_per_step (`int`): The number of images per step, over all processes.
        folder (`Path`): Where the predictions are cached.
        fingerprint (`str`, *optional*): A digest of the captions.
        num_workers (`int`): The number of processes that read images.
        interrupt (`Interrupt`): Catches the signals that stop the run.

    Raises:
        `OSError`: if the disk has too little space, or the predictions there are damaged.
        `ValueError`: if another run is computing the same predictions there.
    """
    accelerator, phase, unet = objective.accelerator, objective.phase, pipeline.unet
    draws = objective.draws
    read = find_read_draws(images, draws, phase.steps, images_per_step)
    key = make_key(pipeline, images, draws, phase.resolution, fingerprint, accelerator.mixed_precision, read)
    predictions = CorePredictions(folder, key, images, draws, Layout.of(unet, images, read))
    with contextlib.ExitStack() as held:
        is_there = predictions.path.exists()
        if accelerator.is_main_process and not is_there:
            predictions.folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock_file(predictions.folder / ".lock", f"{predictions.folder}"))
            is_there = predictions.path.exists()  # another run may have finished it just now
            if not is_there:
                predictions.prepare()
        # As the main process sees it: a run that finishes the file meanwhile would lead the processes into different branches.
        (is_there,) = broadcast_object_list([is_there])
        if not is_there:
            compute_missing(predictions, unet, objective, num_workers, interrupt)
            if accelerator.is_main_process:
                predictions.unfinished_path.replace(predictions.path)
    accelerator.wait_for_everyone()
    predictions.check_size()
    logger.info(f"{phase.name}: the core's predictions are in {predictions.folder}.")
    return predictions


def compute_missing(
    predictions: CorePredictions,
    unet: GrowableUNet2DConditionModel,
    objective: CachedObjective,
    num_workers: int,
    interrupt: Interrupt,
) -> None:
    """
    Compute this process's share of the predictions that are not there yet, and wait for the other processes. The arguments are
    those of [`cache_core_predictions`].
    """
    accelerator, phase = objective.accelerator, objective.phase
    missing = predictions.find_missing()[accelerator.process_index :: accelerator.num_processes]
    accelerator.wait_for_everyone()  # before any of them is written
    logger.info(f"{phase.name}: {len(missing)} predictions of the core are computed for {predictions.folder}.")
    bar = tqdm(total=len(missing), desc=f"{phase.name}, core", disable=not accelerator.is_main_process)
    for batch in load_pairs(predictions, missing, phase.batch_size, num_workers):
        predictions.write(batch, *predict(unet, objective, batch))
        bar.update(len(batch["visit"]))
        if interrupt.signal is not None:
            break
    bar.close()
    # Only now, all together: a process that ends while others wait for it would end them with an error.
    if any(gather_object([interrupt.signal is not None])):
        logger.info(
            f"The core's predictions so far are in {predictions.folder}. Continue with the same arguments and "
            "`--resume_from_checkpoint latest`."
        )
        sys.exit(interrupt.exit_code)


@torch.no_grad()
def predict(
    unet: GrowableUNet2DConditionModel, objective: CachedObjective, batch: dict
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the core's output for a batch of [`DrawnImages`]."""
    accelerator = objective.accelerator
    x0 = normalize(batch["pixel_values"].to(accelerator.device))
    noise, sigma, dropped = objective.draw(batch, x0.shape, 0, 0)
    with accelerator.autocast():
        conditions = FlowObjective.condition(objective, batch, dropped)
        return unet.predict_core(add_noise(x0, noise, sigma), 1000 * sigma, **conditions)


def load_pairs(
    predictions: CorePredictions, pairs: list[tuple[int, int]], batch_size: int, num_workers: int
) -> Iterator[dict]:
    """Return batches of [`DrawnImages`] for `pairs` (image, draw), each of one shape."""
    by_shape = [
        [pair for pair in pairs if predictions.shapes[pair[0]] == kind] for kind in range(len(predictions.buckets))
    ]
    batches = [alike[i : i + batch_size] for alike in by_shape for i in range(0, len(alike), batch_size)]
    return iter(
        DataLoader(
            predictions.rows,
            batch_sampler=batches,
            num_workers=num_workers,
            worker_init_fn=leave_signals_to_the_parent,
        )
    )


def make_key(
    pipeline: GreedyGrowPipeline,
    images: CaptionedImages,
    draws: Draws,
    resolution: int,
    fingerprint: str | None,
    precision: str,
    read: np.ndarray,
) -> dict[str, Any]:
    """Return everything that decides the core's predictions, as JSON can hold it."""
    return {
        "core": name_core(pipeline.unet),
        "text encoder": name_encoder(pipeline, precision),
        "captions": fingerprint,
        "images": len(images),
        "resolution": resolution,
        "shapes": [[*images.buckets], hashlib.sha256(images.shapes.tobytes()).hexdigest()[:16]],
        "resolution of images": images.resolution,
        "augmentation": asdict(images.augmentation),
        "draws": asdict(draws),
        "read": hashlib.sha256(np.packbits(read).tobytes()).hexdigest()[:16],
    }


def name_core(unet: GrowableUNet2DConditionModel | ShallowUNet2DModel) -> str:
    """Return a name that is the same only for the same core, of a grown model or alone."""
    core: Any = getattr(unet, "core", unet)
    digest = hashlib.sha256(
        json.dumps([type(core).__name__, core.growth_config], sort_keys=True, default=str).encode()
    )
    add_weights(digest, core)
    return digest.hexdigest()[:16]
