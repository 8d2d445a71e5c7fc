# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""TODO"""

import logging
import os
import platform
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DataLoaderConfiguration, InitProcessGroupKwargs, ProjectConfiguration, set_seed
from diffusers import ModelMixin
from tqdm.auto import tqdm

from .arguments import LoopArguments


logger = get_logger(__name__)


def set_up(args: LoopArguments) -> Accelerator:
    """
    The run's `Accelerator`, from its arguments and those of `accelerate launch`. Also sends log lines above the progress
    bars, and seeds.
    """
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
        step_scheduler_with_optimizer=False,  # it would step once for each process
        # The others wait while the main process draws samples.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )
    logging.basicConfig(format="%(message)s", level=logging.INFO, handlers=[TqdmHandler()])
    for name in ("accelerate", "httpx", "httpx2", "datasets", "fsspec"):
        logging.getLogger(name).setLevel(logging.WARNING)
    set_seed(args.seed)
    if accelerator.mixed_precision == "bf16":
        # Else torch's own attention (`_native_math`, the fastest on a CPU) converts to float32 and back.
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    return accelerator


def compute_dtype(accelerator: Accelerator) -> torch.dtype:
    """What layers compute in, by `mixed_precision`."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)


def start_trackers(accelerator: Accelerator, name: str, config: dict) -> None:
    """Those of `report_to`, told of the run's `config`."""
    plain = {name: value if isinstance(value, (int, float)) else str(value) for name, value in config.items()}
    accelerator.init_trackers(name, config=plain)


def check_cpu(accelerator: Accelerator) -> None:
    """Warns of what would make training on a CPU slow."""
    if accelerator.device.type != "cpu":
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads() * accelerator.num_processes
    if threads < cores:
        logger.warning(
            f"Training on {threads} of {cores} CPU cores, since `accelerate launch` asks for one thread per process: "
            f"`accelerate launch --num_cpu_threads_per_process {cores // accelerator.num_processes}` uses all."
        )
    if (
        accelerator.mixed_precision == "bf16"
        and platform.machine() in ("x86_64", "AMD64")
        and not multiplies_bfloat16()
    ):
        logger.warning(
            "This CPU has no instructions for bfloat16 (neither AVX-512 BF16 nor AMX), and is many times slower in it than "
            "in float32: leave out `--mixed_precision bf16`."
        )


def multiplies_bfloat16() -> bool:
    """Whether this x86 CPU does, faster than float32."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def set_attention_backend(model: ModelMixin, backend: str | None) -> None:
    """Has `model` compute attention by a backend of diffusers; raises a `ValueError` if that is not installed."""
    if backend is not None:
        try:
            model.set_attention_backend(backend)
        except (ImportError, OSError, RuntimeError) as error:
            raise ValueError(f"`attention_backend={backend!r}`: {error}") from error


class TqdmHandler(logging.Handler):
    """Prints log lines above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        try:
            tqdm.write(text)
        except RuntimeError:  # another thread, which uploads, has just opened or closed a bar of its own
            print(text, flush=True)
