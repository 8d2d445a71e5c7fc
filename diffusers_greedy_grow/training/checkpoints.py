# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Files of a run: each is complete or absent, because it is written aside and then renamed."""

import json
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils.constants import SCALER_NAME
from diffusers.training_utils import EMAModel
from diffusers.utils import logging
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from .files import remove
from .sharding import gather, scatter_as


logger = logging.get_logger(__name__)


def save_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    progress: dict,
    ema: EMAModel,
    named_parameters: list[tuple[str, torch.nn.Parameter]],
    losses: torch.Tensor,
    total_limit: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """
    Saves all that a phase needs to go on: what accelerate has prepared, the moving average by name, the `losses` that no
    line of metrics tells of yet, `progress`, which names the `phase`, its `phase_index` and the `step`, and the `tokenizer`
    of a text encoder that trains, by whose numbers that knows the words. Keeps the newest `total_limit` checkpoints in
    `folder`. Called on all processes.
    """
    checkpoint = folder / f"{progress['phase']}-{progress['step']}"
    temporary = folder / f".{checkpoint.name}.tmp"
    if accelerator.is_main_process:
        for left_over in folder.glob(".*"):  # of a process that was killed while it saved or removed
            if left_over.is_dir():  # and no file that a file manager leaves
                shutil.rmtree(left_over)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()  # until the files of all processes are there
    shadows = {}
    for (name, _), shadow in zip(named_parameters, ema.shadow_params, strict=True):
        whole = gather(shadow.to(accelerator.device))  # a process may have its averages on the CPU
        if accelerator.is_main_process:
            shadows[name] = whole.cpu().contiguous()
    if accelerator.is_main_process:
        save_file(shadows, temporary / "ema.safetensors")
        save_file({"losses": losses}, temporary / "losses.safetensors")
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary / "tokenizer")
        files = [path for path in temporary.rglob("*") if path.is_file()]
        sizes = {str(path.relative_to(temporary)): path.stat().st_size for path in files}
        progress = {**progress, "ema_optimization_step": ema.optimization_step, "sizes": sizes}
        (temporary / "progress.json").write_text(json.dumps(progress))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if checkpoint.exists():
            remove(checkpoint)
        temporary.rename(checkpoint)
        for old in sorted_checkpoints(folder)[:-total_limit]:
            remove(old)
    accelerator.wait_for_everyone()
    return checkpoint


def forget_newer(folder: Path, checkpoint: Path) -> None:
    """Removes what was saved after `checkpoint`, from which a run goes on: it will be saved again."""
    for other in sorted_checkpoints(folder):
        if place(other) > place(checkpoint):
            remove(other)


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint: a file that is missing or was cut off, by a full disk or a loss of power."""
    try:
        sizes = read_progress(checkpoint)["sizes"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return "progress.json is missing or cut off"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
    return None


def place(checkpoint: Path) -> tuple[int, int]:
    """Where in its run a checkpoint was saved. Not when: that changes where files are copied."""
    progress = read_progress(checkpoint)
    return progress["phase_index"], progress["step"]


def sorted_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first; those that are damaged are named in a warning."""
    complete = []
    for path in folder.glob("[!.]*"):
        damage = find_damage(path)
        if damage is None:
            complete.append(path)
        else:
            logger.warning(f"{path} is no complete checkpoint and is passed over: {damage}.")
    return sorted(complete, key=place)


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str) -> Path | None:
    """
    The checkpoint that `resume_from_checkpoint` means: for `"latest"` the newest complete one, if there is one, else a
    folder.

    Raises:
        `ValueError`: if the folder is no complete checkpoint, or if there are checkpoints for `"latest"` and none is complete.
    """
    if resume_from_checkpoint == "latest":
        folder = output_dir / "checkpoints"
        complete = sorted_checkpoints(folder)
        if not complete and (damaged := sorted(path.name for path in folder.glob("[!.]*"))):
            raise ValueError(
                f"`resume_from_checkpoint='latest'`: none of the checkpoints in {folder} is complete: {', '.join(damaged)}. Put "
                "their files back, or begin again with `--overwrite_output_dir` in its place."
            )
        return complete[-1] if complete else None
    checkpoint = Path(resume_from_checkpoint)
    damage = find_damage(checkpoint)
    if damage is not None:
        raise ValueError(f"`resume_from_checkpoint={resume_from_checkpoint!r}` is no complete checkpoint: {damage}.")
    return checkpoint


def read_progress(checkpoint: Path) -> dict:
    """What [`save_checkpoint`] noted: the `phase`, the `step` and the rest of `progress`, `ema_optimization_step`, `sizes`."""
    return json.loads((checkpoint / "progress.json").read_text())


def check_changes(checkpoint: Path, earlier: dict, now: dict, resume_with_changes: bool) -> None:
    """Raises a `ValueError` that names which arguments differ from those of the checkpoint, unless that is meant."""
    now = json.loads(json.dumps(now))  # with lists for tuples, as they were saved
    names = [name for name in earlier | now if earlier.get(name) != now.get(name)]
    if names and not resume_with_changes:
        changes = ", ".join(f"{name} ({earlier.get(name)} -> {now.get(name)})" for name in names)
        raise ValueError(
            f"{checkpoint} was saved with other arguments: {changes}. Go on with the same ones, or say by "
            "`--resume_with_changes` that these are meant."
        )


def load_checkpoint(
    accelerator: Accelerator,
    checkpoint: Path,
    named_parameters: list[tuple[str, torch.nn.Parameter]],
    ema_decay: float,
) -> tuple[EMAModel, torch.Tensor]:
    """
    Restores what [`save_checkpoint`] saved into what accelerate has prepared, and returns the moving average and the
    losses. Learning rates, betas and weight decay stay those of this run.

    Raises:
        `ValueError`: if the average is of other parameters than `named_parameters`, or float16 is to go on from a run in
            another precision, which has no scale of the loss.
    """
    if accelerator.scaler is not None and not (checkpoint / SCALER_NAME).exists():
        raise ValueError(
            f"`mixed_precision='fp16'`: {checkpoint} was saved in another precision, and has no scale of the loss to go on "
            "with. Go on in that one, or in bf16."
        )
    optimizers, schedulers = accelerator._optimizers, [one.scheduler for one in accelerator._schedulers]
    own = [
        {name: value for name, value in group.items() if name not in ("params", "lr")}
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]
    accelerator.load_state(str(checkpoint))
    for group, values in zip(
        [group for optimizer in optimizers for group in optimizer.param_groups], own, strict=True
    ):
        group.update(values)
    for scheduler in schedulers:
        groups = scheduler.optimizer.param_groups
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        for group, base_lr, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = base_lr * factor(scheduler.last_epoch)
    accelerator.step = 0  # of gradient accumulation, which may be another one now
    ema = EMAModel([], decay=ema_decay, foreach=not accelerator.is_fsdp2)
    with safe_open(checkpoint / "ema.safetensors", framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        if shapes != {name: tuple(parameter.shape) for name, parameter in named_parameters}:
            raise ValueError(f"{checkpoint} has a moving average of other parameters than this phase trains.")
        # By name: diffusers goes by position.
        ema.shadow_params = [scatter_as(file.get_tensor(name), parameter) for name, parameter in named_parameters]
    ema.optimization_step = read_progress(checkpoint)["ema_optimization_step"]
    return ema, load_file(checkpoint / "losses.safetensors")["losses"]
