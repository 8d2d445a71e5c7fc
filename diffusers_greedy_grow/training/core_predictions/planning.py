# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Before a run: whether the core's predictions can be cached, and whether they fit on the disk."""

import json
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger

from ...pipelines import GreedyGrowPipeline
from ..arguments import DataArguments, ModelArguments, TrainingArguments
from ..data.captioned import CaptionedImages
from ..data.loading import TrainingData
from ..plan import PhasePlan, format_caching
from .computing import name_core
from .store import check_space, count_bytes


logger = get_logger(__name__)


def check_caching(
    args: TrainingArguments, data_args: DataArguments, model_args: ModelArguments, accelerator: Accelerator
) -> None:
    """Raise a `ValueError` if `cache_core_predictions` cannot hold in this run."""
    if not args.cache_core_predictions:
        return
    assert args.joint_steps is not None
    option = f"`cache_core_predictions={args.cache_core_predictions}`"
    if any(args.joint_steps):
        raise ValueError(
            f"{option} needs a core that stays as it is, but `joint_steps={args.joint_steps}` trains it: pass `joint_steps` 0, or "
            "train a joint phase in another run."
        )
    if model_args.init != "preserve":
        raise ValueError(f'{option} needs a core that predicts images: pass `init="preserve"`.')
    if data_args.streaming:
        raise ValueError(f"{option} needs images that are visited again, and those of `streaming` are not numbered.")
    if accelerator.is_fsdp2:
        raise ValueError(f"{option} runs the core alone, which FSDP2 has sharded: use one GPU or DDP.")


def find_predictions_folder(args: TrainingArguments) -> Path:
    """Return the folder for the core's predictions."""
    return Path(args.core_predictions_dir or Path(args.output_dir) / "core_predictions")


def announce_caching(
    plans: list[PhasePlan], args: TrainingArguments, data: TrainingData, pipeline: GreedyGrowPipeline
) -> None:
    """
    Log what caching the core's predictions takes and saves in the phases that are left, the first of which starts from `pipeline`.

    Raises:
        `OSError`: if the disk has too little space for them.
    """
    assert isinstance(data.high_res, CaptionedImages)
    folder, count = find_predictions_folder(args), len(data.high_res)
    core = name_core(pipeline.unet) if folder.exists() else ""
    needed = used = 0
    for plan in plans:
        if plan.num_draws:
            logger.info(format_caching(plan, count))
            size = plan.count_predictions(count) * plan.prediction_bytes
            cached = count_cached_bytes(
                folder, core, data.fingerprint, count, plan.resolution, args.seed, plan.num_draws
            )
            needed, used = needed + size, used + min(cached, size)
    check_space(folder, needed, used)


def count_cached_bytes(
    folder: Path, core: str, fingerprint: str | None, num_images: int, resolution: int, seed: int, num_draws: int
) -> int:
    """
    Return the bytes on disk of the predictions in a folder that a phase of a run would use, as far as that is known before the phase.

    Args:
        folder (`Path`): The folder for all predictions, those of other runs among them.
        core (`str`): The core, from [`name_core`].
        fingerprint (`str`, *optional*), num_images (`int`): A digest of the captions, and the number of training images.
        resolution (`int`): The resolution of the phase.
        seed (`int`), num_draws (`int`): The run's seed, and the number of draws per image.
    """
    known = {"core": core, "captions": fingerprint, "images": num_images, "resolution": resolution}
    known_draws, used = {"seed": seed, "count": num_draws}, 0
    for about in folder.glob("*/about.json"):
        key = json.loads(about.read_text(encoding="utf-8"))
        if known.items() <= key.items() and known_draws.items() <= key["draws"].items():
            used += count_bytes(about.parent)
    return used
