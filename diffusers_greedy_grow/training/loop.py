# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""What the loops of the training examples share."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers.optimization import get_scheduler

from .arguments import LoopArguments
from .checkpoints import sorted_checkpoints
from .guard import GradientGuard
from .sharding import gather


logger = get_logger(__name__)


def make_optimizer(
    args: LoopArguments, groups: list[dict], num_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW for parameter `groups`, each with its peak `lr`, and the schedule of their rates over `num_steps`."""
    betas = (0.9, args.adam_beta2)
    # With a rate of its own besides those of the groups: the polynomial schedule asks for it.
    lr = groups[0]["lr"]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=args.adam_weight_decay, fused=True)
    warmup_steps = min(args.lr_warmup_steps, num_steps // 10)
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=warmup_steps, num_training_steps=num_steps
    )
    return optimizer, lr_scheduler


def take_step(
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[torch.nn.Parameter],
    max_grad_norm: float,
    guard: GradientGuard,
    name: str,
    step: int,
    sigma: torch.Tensor,
    checkpoints_folder: Path,
) -> None:
    """
    Clips the gradients of `parameters` to `max_grad_norm`, unless that is 0, and takes the step after `step` of phase `name`, if
    `guard` accepts them.
    Says so if not; and if that happens too often, what to do, and the noise levels `sigma` of the batch.

    Raises:
        `FloatingPointError`: as the guard does.
    """
    norm = gather(accelerator.clip_grad_norm_(parameters, max_grad_norm or math.inf)).item()
    try:
        accepted = guard.accept(norm)
    except FloatingPointError as error:
        levels = ", ".join(f"{level:.3f}" for level in sigma.tolist())
        checkpoints = sorted_checkpoints(checkpoints_folder)
        remedy = f"The last good checkpoint is {checkpoints[-1]}" if checkpoints else "There is no checkpoint yet"
        raise FloatingPointError(
            f"{name} stops at step {step + 1}: {error} This batch had the noise levels {levels}. {remedy}; a lower "
            "`learning_rate` or `max_grad_norm`, or `mixed_precision` bf16 instead of fp16 may help."
        ) from error
    if accepted:
        optimizer.step()
        return
    logger.warning(f"{name}: step {step + 1} is left out, its gradient has the norm {norm:.3g}.")
    if accelerator.scaler is not None:
        accelerator.scaler.update()  # to a smaller scale, if this one was too large for float16


def save_interrupted(
    save: Callable[[int], Path], name: str, step: int, guard: GradientGuard, checkpoints_folder: Path
) -> str:
    """
    Saves a run that stops after `step` of phase `name`, and says what to go on from. Not while `guard` refuses steps, if
    there is an earlier checkpoint: what made them bad may be in the weights.
    """
    earlier = sorted_checkpoints(checkpoints_folder) if guard.skipped_in_a_row else []
    if earlier:
        saved = f"not saved, since its last {guard.skipped_in_a_row} steps were left out: the last checkpoint is {earlier[-1]}"
    else:
        saved = f"saved {save(step)}"
    return f"Interrupted after step {step} of {name}; {saved}. Go on with the same arguments and `--resume_from_checkpoint latest`."
