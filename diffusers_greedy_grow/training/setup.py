# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The start of a training script: the `Accelerator`, log lines, trackers, and warnings about slow settings."""

import io
import logging
import os
import platform
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    DynamoBackend,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    TorchDynamoPlugin,
    set_seed,
)
from diffusers import ModelMixin
from tqdm.auto import tqdm

from .arguments import COMPILATION, LoopArguments


logger = get_logger(__name__)


def set_up(args: LoopArguments) -> Accelerator:
    """
    Return the `Accelerator` for a run's arguments and those of `accelerate launch`. Also print log lines above the progress
    bars, and seed all random generators.
    """
    output_dir, dynamo_plugin = Path(args.output_dir), None
    if args.compile is not None:
        # Sizes are few, and known: one per bucket, for training and for the last batch of held-out images.
        dynamo_plugin = TorchDynamoPlugin(dynamic=False, **COMPILATION[args.compile])
        if dynamo_plugin.backend == DynamoBackend.NO:  # `accelerate launch` has named none
            dynamo_plugin.backend = DynamoBackend.INDUCTOR
        torch._dynamo.config.recompile_limit = 64
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to,
        dynamo_plugin=dynamo_plugin,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
        step_scheduler_with_optimizer=False,  # it would step once per process
        # The other processes wait while the main process draws samples.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )
    if args.compile is not None and accelerator.distributed_type != DistributedType.NO:
        # DDP divides the graph, to send gradients while others are computed.
        accelerator.state.dynamo_plugin.fullgraph = False
    if isinstance(sys.stdout, io.TextIOWrapper):  # in an ASCII locale, a caption in a log line would end the run
        sys.stdout.reconfigure(errors="backslashreplace")
    for name in ("stdout", "stderr"):
        if not isinstance(stream := getattr(sys, name), LastingStream):
            setattr(sys, name, LastingStream(stream))
    logging.basicConfig(format="%(message)s", level=logging.INFO, handlers=[TqdmHandler(accelerator.num_processes)])
    for name in ("accelerate", "httpx", "httpx2", "datasets", "fsspec"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It warns in each checkpoint of weights that are tied on purpose.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    set_seed(args.seed)
    if accelerator.mixed_precision == "bf16":
        # Otherwise torch's own attention (`_native_math`, the fastest on a CPU) converts to float32 and back.
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    return accelerator


def compute_dtype(accelerator: Accelerator) -> torch.dtype:
    """Return the dtype in which layers compute under the accelerator's `mixed_precision`."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)


def start_trackers(accelerator: Accelerator, name: str, config: dict) -> None:
    """Start the trackers that `report_to` names, for the project `name`, and send them the run's `config`."""
    plain = {name: value if isinstance(value, (int, float)) else str(value) for name, value in config.items()}
    accelerator.init_trackers(name, config=plain)


def warn_of_slow_cpu(accelerator: Accelerator) -> None:
    """Warn of unused CPU cores, and of bfloat16 on a CPU that has no instructions for it."""
    if accelerator.device.type != "cpu":
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads() * accelerator.num_processes
    if threads < cores:
        logger.warning(
            f"Training on {threads} of {cores} CPU cores, since `accelerate launch` asks for one thread per process: "
            f"`accelerate launch --num_cpu_threads_per_process {cores // accelerator.num_processes}` uses all (behind `greedy-grow "
            f'train`: `--launch "--num_cpu_threads_per_process {cores // accelerator.num_processes}"`).'
        )
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    if accelerator.mixed_precision == "bf16" and is_x86 and not has_native_bfloat16():
        logger.warning(
            "This CPU has no instructions for bfloat16 (neither AVX-512 BF16 nor AMX), and is many times slower in it than "
            "in float32: leave out `--mixed_precision bf16`."
        )


def has_native_bfloat16() -> bool:
    """Return whether this x86 CPU has instructions that multiply bfloat16 faster than float32."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def set_attention_backend(model: ModelMixin, backend: str | None) -> None:
    """
    Make `model` compute attention with a backend of diffusers, unless it is None.

    Raises:
        `ValueError`: if the backend is not installed.
    """
    if backend is not None:
        library = logging.getLogger("diffusers.models.modeling_utils")
        level = library.level
        library.setLevel(logging.ERROR)  # it warns of its "experimental" backends each time
        try:
            model.set_attention_backend(backend)
        except (ImportError, OSError, RuntimeError) as error:
            raise ValueError(f"`attention_backend={backend!r}`: {error}") from error
        finally:
            library.setLevel(level)


class LastingStream:
    """
    Standard output or error, which drops what nobody reads any more: Ctrl-C also ends the `tee` that a run is piped to, and the run
    must save its checkpoint.

    Args:
        stream (`TextIO`): The stream.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self.leave()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except BrokenPipeError:
            self.leave()

    def leave(self) -> None:
        """Send everything from now on, and what is buffered, nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class TqdmHandler(logging.Handler):
    """Prints log lines above the progress bar, and with one process without the number that accelerate puts before them."""

    def __init__(self, num_processes: int = 1):
        super().__init__()
        self.num_processes = num_processes

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if self.num_processes == 1:
            text = text.removeprefix("[RANK 0] ")
        try:
            tqdm.write(text)
        except RuntimeError:  # an upload in another thread has just opened or closed a bar of its own
            print(text, flush=True)
