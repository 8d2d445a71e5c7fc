# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
The training loop of one phase. It takes the steps; what else happens at a step, and in which order, is written in the script
that iterates over it:

    for step in loop.steps(loader, objective):
        if step.logs:         run.log(phase, step.number, **loop.means())
        if step.interrupted:  loop.leave(); sys.exit(interrupt.exit_code)
        if step.saves:        loop.save()
"""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from accelerate.logging import get_logger
from accelerate.utils import DynamoBackend
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .arguments import LoopArguments
from .checkpoints import Progress, load_checkpoint, save_checkpoint, sorted_checkpoints
from .data.streaming import StreamLoader
from .ema import BestAverage, averaged
from .guard import GradientGuard, JudgedStep, NumberOnItsWay
from .objective import FlowObjective, LossMeter
from .optimizer import make_optimizer
from .phases import Phase
from .run import Run
from .sharding import gather
from .signals import Interrupt


logger = get_logger(__name__)


@dataclass(frozen=True)
class Step:
    """
    A training step that was just taken.

    Args:
        number (`int`): How many steps of the phase are done.
        last (`bool`): Whether it is the phase's last one.
        logs (`bool`): Whether metrics are due.
        saves (`bool`): Whether a checkpoint is due.
        interrupted (`bool`): Whether a signal asks the run to stop.
    """

    number: int
    last: bool
    logs: bool
    saves: bool
    interrupted: bool

    def due(self, every: int | None) -> bool:
        """Return whether something that happens once per `every` steps is due. With None, it never is."""
        return every is not None and self.number % every == 0


class Clock:
    """
    Measures training speed. The first steps do not count, since they start workers and compile; nor does time spent on
    validation, checkpoints and samples.
    """

    def __init__(self, step: int, steps: int, images_per_step: int):
        self.images_per_step = images_per_step
        self.warmed_up = step + min(5, (steps - step) // 2)
        self.first_estimate = min(self.warmed_up + 20, steps)
        self.restart(step)

    def restart(self, step: int) -> None:
        self.started = self.lap_started = time.perf_counter()
        self.first_step = self.lap_step = step

    def resume(self, paused: float) -> None:
        """Leave out the time since `paused`, as `time.perf_counter` told it. A lap may have started since."""
        now = time.perf_counter()
        self.started += now - paused
        self.lap_started += now - max(paused, self.lap_started)

    def total_rate(self, step: int) -> float:
        """Return the images per second since the first steps."""
        return (step - self.first_step) * self.images_per_step / (time.perf_counter() - self.started)

    def lap_rate(self, step: int) -> float:
        """Return the images per second since the last call."""
        now = time.perf_counter()
        rate = (step - self.lap_step) * self.images_per_step / (now - self.lap_started)
        self.lap_step, self.lap_started = step, now
        return rate


class TrainingLoop:
    """
    Trains one phase. Owns the optimizer, the learning-rate schedule, the moving average, the guard against bad batches, the
    loss meter and the clock; saves and resumes all of them.

    Args:
        run (`Run`): The run that the phase belongs to.
        phase (`Phase`): What is trained, and how.
        args (`LoopArguments`): The arguments of every training loop.
        module (`torch.nn.Module`): The module to train. Parameters that do not train are frozen.
        groups (`list[dict]`): The optimizer's parameter groups, each with its peak `lr`.
        interrupt (`Interrupt`): Catches the signals that stop the run.
        checkpoint (`Path`, *optional*): A checkpoint of this phase to resume from.
        tokenizer (*optional*): The tokenizer of a text encoder that trains along, to be saved with it.
        offload_ema (`bool`, defaults to `False`): Whether to keep the moving average in the CPU's memory.
        keep_best (`bool`, defaults to `False`):
            Whether to end with the averaged weights of the lowest held-out loss, see [`~TrainingLoop.note_losses`].
    """

    def __init__(
        self,
        run: Run,
        phase: Phase,
        args: LoopArguments,
        module: torch.nn.Module,
        groups: list[dict],
        interrupt: Interrupt,
        checkpoint: Path | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        offload_ema: bool = False,
        keep_best: bool = False,
    ):
        self.run, self.phase, self.args, self.interrupt = run, phase, args, interrupt
        self.tokenizer, self.offload_ema = tokenizer, offload_ema
        self.accelerator = accelerator = run.accelerator
        if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
            # Graphs of the last phase count against dynamo's limit, and other sizes than theirs would compile for any size.
            torch.compiler.reset()
        optimizer, lr_scheduler = make_optimizer(args, groups, phase.steps)
        self.model, self.optimizer, self.lr_scheduler = accelerator.prepare(module, optimizer, lr_scheduler)
        # Frozen parameters need no moving average.
        self.named_parameters = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.parameters = [parameter for _, parameter in self.named_parameters]
        self.guard = GradientGuard(args.spike_factor, args.max_skipped_steps)
        self.judged: JudgedStep | None = None  # the step that is not noted yet
        # Where torch's fused optimizers heed `found_inf`. The scaler of float16 has one of its own, and waits for it in any case.
        self.device_decides = accelerator.scaler is None and accelerator.device.type in ("cpu", "cuda")
        # A GPU is given the next step before the host asks about this one, so that it is never idle.
        self.notes_late = accelerator.device.type == "cuda"
        self.loader: Iterable[dict] = ()
        self.step, self.data_state = 0, None
        if checkpoint is None:
            # A new average in each phase, which starts from the averages of the one before. Continuing the old, slow average
            # would hold the new weights back: it cost 8 % of the held-out loss after `detail`.
            self.ema = EMAModel(self.parameters, decay=args.ema_decay, foreach=not accelerator.is_fsdp2)
            self.meter = LossMeter()
        else:
            progress = Progress.read(checkpoint)
            self.step, self.data_state = progress.step, progress.data_state
            self.ema, losses = load_checkpoint(accelerator, checkpoint, self.named_parameters, args.ema_decay)
            self.meter = LossMeter(losses)
            self.guard.load_state_dict(progress.guard)
        self.ema.to("cpu" if offload_ema else accelerator.device)
        self.best = BestAverage(accelerator, run.checkpoints, checkpoint) if keep_best else None

    # ------------------------------------------------------------------------------------------------------------------
    # Training

    def steps(self, loader: Iterable[dict], objective: FlowObjective) -> Iterator[Step]:
        """
        Train on the batches of `loader`, and yield after each step.

        Raises:
            `FloatingPointError`: if the guard rejects too many steps in a row, or the last step leaves weights that are not finite.
        """
        accelerator, phase = self.accelerator, self.phase
        self.loader = loader
        self.clock = Clock(self.step, phase.steps, self.run.images_per_step(phase))
        show = accelerator.is_main_process
        self.bar = tqdm(total=phase.steps, initial=self.step, desc=phase.name, disable=not show)
        for micro_step, batch in enumerate(loader):
            with accelerator.accumulate(self.model):
                losses = objective(self.model, batch, self.step, micro_step)
                accelerator.backward(losses.loss)
                if accelerator.sync_gradients:
                    self.take_step(losses.sigma)
                    self.lr_scheduler.step()
                self.optimizer.zero_grad()
            self.meter.update(losses.stack())
            if not accelerator.sync_gradients:
                continue
            self.step += 1
            self.update_average()
            self.bar.update()
            step = self.describe_step()
            if step.last:
                self.check_weights()
            if step.number == self.clock.first_estimate:
                rate = self.clock.total_rate(step.number)
                minutes = self.run.minutes_left(phase, step.number, rate)
                logger.info(f"{phase.name}: {rate:.1f} images/s; about {minutes:.0f} min of training left.")
            paused = time.perf_counter()
            yield step
            self.clock.resume(paused)
            if step.number == self.clock.warmed_up:
                self.clock.restart(step.number)
        self.bar.close()

    def take_step(self, sigma: torch.Tensor) -> None:
        """
        Clip the gradients and take an optimizer step, which changes nothing if the guard rejects them. The device decides that by
        itself; on a GPU, the host learns of it at the next step.

        Args:
            sigma (`torch.Tensor` of shape `(B,)`): The batch's noise levels, for the error.

        Raises:
            `FloatingPointError`: if the guard rejects too many steps in a row. The message says what to do.
        """
        accelerator = self.accelerator
        norm = accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm or math.inf)
        norm = gather(norm).float()
        self.note_step()  # the one before: what is a usual norm depends on it
        rejected = self.guard.judge(norm)
        self.judged = JudgedStep(self.step + 1, NumberOnItsWay(norm), sigma)
        if self.device_decides:
            self.optimizer.optimizer.found_inf = rejected
            self.optimizer.step()
            if not self.notes_late:
                self.note_step()
        elif self.note_step():
            self.optimizer.step()
        elif accelerator.scaler is not None:
            accelerator.scaler.update()  # to a smaller scale, if this one was too large for float16

    def note_step(self) -> bool:
        """
        Let the guard note the last step, if it has not yet. Return whether that step was taken.

        Raises:
            `FloatingPointError`: if the guard has rejected too many steps in a row. The message says what to do.
        """
        step, self.judged = self.judged, None
        if step is None:
            return not self.guard.skipped_in_a_row
        norm, name = step.norm.read(), self.phase.name
        try:
            accepted = self.guard.accept(norm)
        except FloatingPointError as error:
            levels = ", ".join(f"{level:.3f}" for level in step.sigma.tolist())
            raise FloatingPointError(
                f"{name} stops at step {step.number}: {error} This batch had the noise levels {levels}. {self.find_remedy()}"
            ) from error
        if not accepted:
            logger.warning(f"{name}: step {step.number} is skipped, its gradient has the norm {norm:.3g}.")
        return accepted

    def check_weights(self) -> None:
        """
        Check the weights that a phase ends with: its last steps may all have been skipped.

        Raises:
            `FloatingPointError`: if they are not finite.
        """
        largest = gather(torch.nn.utils.get_total_norm(self.parameters, math.inf)).item()
        if not math.isfinite(largest):
            raise FloatingPointError(f"{self.phase.name} ends with weights that are not finite. {self.find_remedy()}")

    def find_remedy(self) -> str:
        """Return what to do about numbers that are not finite."""
        checkpoints = sorted_checkpoints(self.run.checkpoints)
        start = f"The last good checkpoint is {checkpoints[-1]}" if checkpoints else "There is no checkpoint yet"
        return (
            f"{start}; a lower `learning_rate` or `max_grad_norm`, or `mixed_precision` bf16 instead of fp16 may help."
        )

    def update_average(self) -> None:
        """Take a step of the moving average, on the device that trains."""
        if self.offload_ema:
            self.ema.to(self.accelerator.device)
        self.ema.step(self.parameters)
        if self.offload_ema:
            self.ema.to("cpu")

    def describe_step(self) -> Step:
        """Return what is due after the step that was just taken."""
        args, number = self.args, self.step
        last = number == self.phase.steps
        # Several processes ask each other rarely, and where they wait for the GPU anyway.
        times = (10, args.logging_steps, args.validation_steps, args.checkpointing_steps)
        interrupted = self.interrupt.noted(self.accelerator, ask=last or any(number % steps == 0 for steps in times))
        # No checkpoint while steps are skipped: what made them bad may be in the weights.
        saves = (number % args.checkpointing_steps == 0 and self.note_step()) or last
        return Step(number, last, number % args.logging_steps == 0 or last or interrupted, saves, interrupted)

    def means(self) -> dict[str, float]:
        """Return the metrics since the last call: losses, gradient norms, learning rate, speed, memory and time left."""
        self.note_step()
        images_per_step = self.run.images_per_step(self.phase)
        rate = self.clock.lap_rate(self.step)
        means = {
            "images": self.step * images_per_step,
            "images_per_second": rate,
            "lr": self.optimizer.param_groups[0]["lr"],
            **self.meter.compute(self.accelerator),
            **self.guard.compute(),
            "memory_gb": memory_in_use(self.accelerator.device),
            "minutes_left": self.run.minutes_left(self.phase, self.step, rate),
        }
        self.bar.set_postfix(
            loss=f"{means.get('loss', math.nan):.4f}",
            images_per_s=f"{rate:.1f}",
            memory=f"{means['memory_gb']:.1f} GB",
            all_left=f"{means['minutes_left']:.0f} min",
        )
        return means

    def averaged(self) -> AbstractContextManager[None]:
        """Give the trained parameters the values of their moving average within a `with` block."""
        return averaged(self.ema, self.parameters)

    def note_losses(self, losses: dict[str, float]) -> None:
        """With `keep_best`, keep the averaged weights if their `losses["val_loss"]` is the lowest so far. Called on all processes."""
        if self.best is not None:
            self.best.offer(self.step, losses.get("val_loss", math.nan), self.ema, self.named_parameters)

    # ------------------------------------------------------------------------------------------------------------------
    # Stopping

    def save(self) -> Path:
        """Save a checkpoint. Called on all processes."""
        self.note_step()
        metrics = self.run.metrics_path
        progress = Progress(
            phase=self.phase.name,
            phase_index=self.phase.index,
            step=self.step,
            config=self.run.decisive_config,
            guard=self.guard.state_dict(),
            data_state=self.loader.state() if isinstance(self.loader, StreamLoader) else None,
            metrics_size=metrics.stat().st_size if metrics.exists() else 0,
        )
        return save_checkpoint(
            self.accelerator,
            self.run.checkpoints,
            progress,
            self.ema,
            self.named_parameters,
            self.meter.gather(self.accelerator),
            self.args.checkpoints_total_limit,
            self.tokenizer,
            self.best,
        )

    def leave(self) -> None:
        """
        Save an interrupted run, and say how to resume it. Does not save while steps are skipped, if there is an earlier
        checkpoint: what made them bad may be in the weights.
        """
        earlier = [] if self.note_step() else sorted_checkpoints(self.run.checkpoints)
        if earlier:
            saved = f"not saved, since its last {self.guard.skipped_in_a_row} steps were skipped: the last checkpoint is {earlier[-1]}"
        else:
            saved = f"saved {self.save()}"
        logger.info(
            f"Interrupted after step {self.step} of {self.phase.name}; {saved}. Resume with the same arguments and "
            "`--resume_from_checkpoint latest`."
        )
        self.accelerator.end_training()

    def finish(self) -> dict[str, float]:
        """
        Leave the averaged weights in the model: they are the phase's result. With `keep_best`, these are the ones with the lowest
        held-out loss. Return their `best_step` and `best_val_loss`, or nothing if they are those of the last step by default.
        """
        kept: dict[str, float] = {}
        if self.best is not None and self.best.step is not None:
            kept = {"best_step": self.best.step, "best_val_loss": self.best.loss}
            self.ema.shadow_params = self.best.take(self.named_parameters)
        self.ema.copy_to(self.parameters)
        return kept


def memory_in_use(device: torch.device) -> float:
    """Return the memory that this process uses, in GB: on a GPU the peak so far, on a CPU the present use."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30
