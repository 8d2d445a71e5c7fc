# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Checkpoints: everything that a phase needs to resume as the same run, bit for bit."""

import json
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils.constants import SCALER_NAME
from diffusers.training_utils import EMAModel
from diffusers.utils import logging
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from .ema import BestAverage, load_averages, save_averages
from .files import remove_checkpoint


logger = logging.get_logger(__name__)

# Raised whenever an earlier version's checkpoints can no longer be resumed.
FORMAT = 1


class CheckpointFormatError(ValueError):
    """A checkpoint was saved by a version whose checkpoints this one cannot resume."""


@dataclass
class Progress:
    """
    The progress of a run at a checkpoint; `progress.json` in the checkpoint's folder.

    Args:
        phase (`str`), phase_index (`int`): The phase that was training.
        step (`int`): How many steps of it were done.
        config (`dict`): The settings that must match for a resumed run to be the same run.
        guard (`dict`): The state of the [`GradientGuard`].
        data_state (`dict`, *optional*): The state of a stream of images.
        metrics_size (`int`): The size of `metrics.jsonl` in bytes.
        ema_optimization_step (`int`): How many steps the moving average has taken.
        sizes (`dict[str, int]`): The checkpoint's files and their sizes in bytes, by which a damaged one is recognized.
        format (`int`): The version of this format.
    """

    phase: str
    phase_index: int
    step: int
    config: dict
    guard: dict
    data_state: dict | None
    metrics_size: int
    ema_optimization_step: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    format: int = FORMAT

    @classmethod
    def read(cls, checkpoint: Path) -> "Progress":
        """
        Read the progress from a checkpoint.

        Raises:
            `CheckpointFormatError`: if another version's format was used.
            `OSError`, `ValueError`, `KeyError`: if the file is missing or cut off.
        """
        values = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))
        if values.get("format") != FORMAT:
            raise CheckpointFormatError(
                f"{checkpoint} was saved by another version of diffusers-greedy-grow, in checkpoint format {values.get('format', 0)}; "
                f"this version resumes format {FORMAT} only. Finish that run with the version that began it, or start again with "
                "`--overwrite_output_dir`. Pipeline folders of finished phases can be grown further with `--core`."
            )
        return cls(**{f.name: values[f.name] for f in fields(cls)})


# ----------------------------------------------------------------------------------------------------------------------
# Saving and loading


def save_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    progress: Progress,
    ema: EMAModel,
    named_parameters: list[tuple[str, torch.nn.Parameter]],
    losses: torch.Tensor,
    total_limit: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    best: BestAverage | None = None,
) -> Path:
    """
    Save a checkpoint and keep the newest `total_limit` in `folder`. Called on all processes.

    It holds what accelerate has prepared; the moving average by parameter name; the `losses` that are not in the metrics yet;
    `progress`; the `tokenizer` of a text encoder that trains, since the rows of the encoder's embeddings are its token numbers; and
    the `best` average so far, if one is kept.
    """
    checkpoint = folder / f"{progress.phase}-{progress.step}"
    temporary = folder / f".{checkpoint.name}.tmp"
    if accelerator.is_main_process:
        for left_over in folder.glob(".*"):  # from a process that was killed while it saved or removed
            if left_over.is_dir():  # not a file that a file manager leaves
                shutil.rmtree(left_over)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()  # until the files of all processes are there
    save_averages(accelerator, temporary / "ema.safetensors", ema, named_parameters)
    if accelerator.is_main_process:
        save_file({"losses": losses}, temporary / "losses.safetensors")
        if best is not None:
            best.copy_into(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary / "tokenizer")
        files = [path for path in temporary.rglob("*") if path.is_file()]
        progress.sizes = {str(path.relative_to(temporary)): path.stat().st_size for path in files}
        progress.ema_optimization_step = ema.optimization_step
        (temporary / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if checkpoint.exists():
            remove_checkpoint(checkpoint)
        temporary.rename(checkpoint)
        for old in sorted_checkpoints(folder)[:-total_limit]:
            remove_checkpoint(old)
    accelerator.wait_for_everyone()
    return checkpoint


def load_checkpoint(
    accelerator: Accelerator,
    checkpoint: Path,
    named_parameters: list[tuple[str, torch.nn.Parameter]],
    ema_decay: float,
) -> tuple[EMAModel, torch.Tensor]:
    """
    Restore what [`save_checkpoint`] saved into what accelerate has prepared, and return the moving average and the losses.
    Learning rates, betas and weight decay stay those of this run.

    Raises:
        `ValueError`: if the moving average is of other parameters than `named_parameters`, or a run in float16 is to resume from
            one in another precision, which has no loss scale.
    """
    if accelerator.scaler is not None and not (checkpoint / SCALER_NAME).exists():
        raise ValueError(
            f"`mixed_precision='fp16'`: {checkpoint} was saved in another precision and has no loss scale. Resume in that "
            "precision, or in bf16."
        )
    restore_state(accelerator, checkpoint)
    ema = EMAModel([], decay=ema_decay, foreach=not accelerator.is_fsdp2)
    ema.shadow_params = load_averages(checkpoint / "ema.safetensors", named_parameters)
    ema.optimization_step = Progress.read(checkpoint).ema_optimization_step
    return ema, load_file(checkpoint / "losses.safetensors")["losses"]


def restore_state(accelerator: Accelerator, checkpoint: Path) -> None:
    """Load accelerate's state, but keep this run's learning rates, betas and weight decay."""
    optimizers, schedulers = accelerator._optimizers, [one.scheduler for one in accelerator._schedulers]
    own = [
        {name: value for name, value in group.items() if name not in ("params", "lr")}
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]
    accelerator.load_state(str(checkpoint))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group, values in zip(groups, own, strict=True):
        group.update(values)
    for scheduler in schedulers:
        groups = scheduler.optimizer.param_groups
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        for group, base_lr, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = base_lr * factor(scheduler.last_epoch)
    accelerator.step = 0  # the number of accumulated batches may be another one now


# ----------------------------------------------------------------------------------------------------------------------
# Finding checkpoints


def find_damage(checkpoint: Path) -> str | None:
    """
    Return what is wrong with a checkpoint: a file that is missing or was cut off, by a full disk or a loss of power.

    Raises:
        `CheckpointFormatError`: if another version saved it.
    """
    if not checkpoint.exists():
        return "there is no such folder"
    try:
        sizes = Progress.read(checkpoint).sizes
    except CheckpointFormatError:
        raise
    except (OSError, ValueError, KeyError):
        return "progress.json is missing or cut off"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
    return None


def order_of(checkpoint: Path) -> tuple[int, int]:
    """Return where in its run a checkpoint was saved. File times are no guide: they change when files are copied."""
    progress = Progress.read(checkpoint)
    return progress.phase_index, progress.step


def sorted_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, oldest first, and warn of damaged ones."""
    complete = []
    for path in folder.glob("[!.]*"):
        damage = find_damage(path)
        if damage is None:
            complete.append(path)
        else:
            logger.warning(f"{path} is not a complete checkpoint and is ignored: {damage}.")
    return sorted(complete, key=order_of)


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str) -> Path | None:
    """
    Return the checkpoint that `resume_from_checkpoint` names: with `"latest"` the newest complete one, or None if there are no
    checkpoints; with a name such as `"core-400"` that one of the run; otherwise that folder.

    Raises:
        `ValueError`: if the folder is not a complete checkpoint, or if there are checkpoints for `"latest"` but none is complete.
    """
    if resume_from_checkpoint == "latest":
        folder = output_dir / "checkpoints"
        complete = sorted_checkpoints(folder)
        if not complete and (damaged := sorted(path.name for path in folder.glob("[!.]*"))):
            raise ValueError(
                f"`resume_from_checkpoint='latest'`: none of the checkpoints in {folder} is complete: {', '.join(damaged)}. Put "
                "their files back, or start again with `--overwrite_output_dir` instead."
            )
        return complete[-1] if complete else None
    checkpoint = Path(resume_from_checkpoint)
    own = output_dir / "checkpoints" / checkpoint
    if len(checkpoint.parts) == 1 and own.exists():
        checkpoint = own
    damage = find_damage(checkpoint)
    if damage is not None:
        names = sorted(path.name for path in own.parent.glob("[!.]*")) if len(checkpoint.parts) == 1 else []
        others = f" {output_dir} has {', '.join(names)}." if names else ""
        raise ValueError(
            f"`resume_from_checkpoint={resume_from_checkpoint!r}` is not a complete checkpoint: {damage}.{others}"
        )
    return checkpoint


def remove_newer(folder: Path, checkpoint: Path) -> None:
    """Remove the checkpoints that were saved after `checkpoint`, from which a run resumes: it will save them again."""
    for other in sorted_checkpoints(folder):
        if order_of(other) > order_of(checkpoint):
            remove_checkpoint(other)
