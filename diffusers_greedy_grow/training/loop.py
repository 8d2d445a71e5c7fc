# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""What the loops of the training examples share."""

import logging
import math
import multiprocessing
import os
import platform
import signal
import statistics
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DataLoaderConfiguration, InitProcessGroupKwargs, ProjectConfiguration, set_seed
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from .arguments import LoopArguments
from .checkpoints import sorted_checkpoints
from .sharding import gather


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


class Interrupt:
    """Notes Ctrl-C and SIGTERM, so that the step at hand is finished and a checkpoint is saved."""

    def __init__(self):
        self.signal: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number: int, frame) -> None:
        if self.signal is None:
            self.signal = number
            text = "a checkpoint is saved after the next training step, then the run stops. Ctrl-C again stops it at once."
            # Not by print, which may be what the signal has interrupted.
            os.write(2, f"\n{signal.Signals(number).name}: {text}\n".encode())
        elif number == signal.SIGINT:  # a second SIGTERM is that of a scheduler, passed on by the launcher
            sys.exit(128 + number)

    def noted(self, accelerator: Accelerator, ask: bool) -> bool:
        """
        Whether to stop: if any process has noted a signal. Several are only heard if they `ask`, all of them at the same
        steps, since that waits for the GPU.
        """
        if accelerator.num_processes == 1:
            return self.signal is not None
        if ask and self.signal is not None:
            accelerator.set_trigger()
        return ask and accelerator.check_trigger()


def leave_signals_to_the_parent(worker_id: int) -> None:
    """
    For each worker of a data loader. Ctrl-C, and SIGTERM to a job, reach all processes of it, but the one that trains still
    needs its workers to finish a step. They end when it does, by a SIGTERM of its own.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS does not tell whose signal it is
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_for_the_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
            pass
        os._exit(0)

    threading.Thread(target=wait_for_the_parent, daemon=True).start()


def set_attention_backend(model: ModelMixin, backend: str | None) -> None:
    """Has `model` compute attention by a backend of diffusers; raises a `ValueError` if that is not installed."""
    if backend is not None:
        try:
            model.set_attention_backend(backend)
        except (ImportError, OSError, RuntimeError) as error:
            raise ValueError(f"`attention_backend={backend!r}`: {error}") from error


class GradientGuard:
    """
    Refuses gradients that are not finite, and those whose norm is more than `factor` times the median of the last 100
    accepted ones, so that a bad batch costs its step and not the run.

    Args:
        factor (`float`): Far above what norms vary by, such as 20.
        limit (`int`): How many steps in a row may be refused.
    """

    def __init__(self, factor: float, limit: int):
        self.factor, self.limit = factor, limit
        self.norms: list[float] = []
        self.unlogged: list[float] = []
        self.skipped_steps, self.skipped_in_a_row = 0, 0

    def accept(self, norm: float) -> bool:
        """
        Whether to take the step.

        Raises:
            `FloatingPointError`: if this is one refusal in a row more than the limit.
        """
        usual = statistics.median(self.norms) if len(self.norms) >= 20 else math.inf
        self.unlogged.append(norm)
        if math.isfinite(norm) and norm <= self.factor * usual:
            self.norms = [*self.norms[-99:], norm]
            self.skipped_in_a_row = 0
            return True
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.limit:
            raise FloatingPointError(
                f"The gradient's norm was not finite, or over {self.factor:g} times its median ({usual:.3g}), for "
                f"{self.skipped_in_a_row} steps in a row; the last one was {norm:.3g}."
            )
        return False

    def compute(self) -> dict[str, float]:
        """Of the finite ones since the last call the mean `grad_norm` and the largest; `skipped_steps` of the phase."""
        norms = [norm for norm in self.unlogged if math.isfinite(norm)]
        self.unlogged = []
        means = {"grad_norm": statistics.fmean(norms), "grad_norm_max": max(norms)} if norms else {}
        return {**means, "skipped_steps": self.skipped_steps}

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("norms", "unlogged", "skipped_steps", "skipped_in_a_row")}

    def load_state_dict(self, state: dict) -> None:
        self.__dict__.update(state)


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


@contextmanager
def averaged(ema: EMAModel, parameters: list[torch.nn.Parameter]):
    """Within it, parameters have the values of their moving average."""
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


class TqdmHandler(logging.Handler):
    """Prints log lines above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        try:
            tqdm.write(text)
        except RuntimeError:  # another thread, which uploads, has just opened or closed a bar of its own
            print(text, flush=True)
