# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The optimizer, and the schedule of its learning rates."""

import torch
from diffusers.optimization import get_scheduler

from .arguments import LoopArguments


def make_optimizer(
    args: LoopArguments, groups: list[dict], num_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return AdamW over the parameter `groups`, each with its own peak `lr`, and the schedule of the rates over `num_steps`."""
    optimizer = torch.optim.AdamW(
        groups,
        lr=groups[0]["lr"],  # the polynomial schedule reads this default
        betas=(0.9, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        fused=True,
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=min(args.lr_warmup_steps, num_steps // 10),
        num_training_steps=num_steps,
    )
    return optimizer, lr_scheduler
