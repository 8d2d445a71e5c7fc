# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

import math
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from diffusers_greedy_grow.training.arguments import LoraArguments, TrainingArguments
from diffusers_greedy_grow.training.loop import Clock, TrainingLoop
from diffusers_greedy_grow.training.optimizer import make_optimizer
from diffusers_greedy_grow.training.phases import Phase
from diffusers_greedy_grow.training.run import Run
from diffusers_greedy_grow.training.signals import Interrupt


def test_rates_by_a_polynomial_start_from_their_own():
    """That schedule asks the optimizer for one rate, of all groups."""
    args = TrainingArguments(lr_scheduler="polynomial", lr_warmup_steps=0)
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.5, 0.25)]
    optimizer, lr_scheduler = make_optimizer(args, groups, num_steps=10)
    assert lr_scheduler.get_last_lr() == [0.5, 0.25]
    for _ in range(5):
        optimizer.step()
        lr_scheduler.step()
    assert lr_scheduler.get_last_lr() == pytest.approx([0.25, 0.125], rel=1e-3)


def make_loop(tmp_path: Path, keep_best: bool = False, **kwargs) -> TrainingLoop:
    """A loop over one parameter."""
    args = LoraArguments(pretrained_model_name_or_path="", lr_warmup_steps=0, adam_weight_decay=0.0, **kwargs)
    phase = Phase(0, "core", "core", 0, 8, 20, 2, 1.0, 0.0, 1.0, "velocity")
    run = Run(Accelerator(cpu=True), tmp_path, (args,), [phase])
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    interrupt = SimpleNamespace(noted=lambda accelerator, ask: False)
    groups = [{"params": [module.weight], "lr": 1.0}]
    return TrainingLoop(run, phase, args, module, groups, interrupt, keep_best=keep_best)


@pytest.mark.parametrize("max_grad_norm,clipped", [(0.5, 0.5), (0, 4.0)])
def test_clipping(max_grad_norm, clipped, tmp_path):
    loop = make_loop(tmp_path, max_grad_norm=max_grad_norm)
    (parameter,) = loop.parameters
    parameter.grad = torch.full((1, 1), 4.0)
    loop.take_step(torch.ones(1))
    assert parameter.grad.item() == pytest.approx(clipped) and loop.guard.norms == [4.0]
    assert parameter.item() == pytest.approx(-1.0, rel=1e-3)  # AdamW's first step has the size of the rate


def test_rejected_gradients_skip_the_step_and_then_stop_the_run(tmp_path, caplog):
    loop = make_loop(tmp_path, max_skipped_steps=1)
    (parameter,) = loop.parameters
    parameter.grad = torch.full((1, 1), math.nan)
    loop.take_step(torch.tensor([0.25]))
    assert parameter.item() == 0 and "core: step 1 is skipped, its gradient has the norm nan" in caplog.text
    message = "core stops at step 1: .* for 2 steps in a row.* levels 0.250. There is no checkpoint yet"
    with pytest.raises(FloatingPointError, match=message):
        loop.take_step(torch.tensor([0.25]))


def test_a_gpu_learns_of_rejected_gradients_one_step_later(tmp_path, caplog):
    """But takes none of them, and no later than when a checkpoint is due or metrics are."""
    loop = make_loop(tmp_path, max_skipped_steps=1, checkpointing_steps=2)
    loop.notes_late = True
    (parameter,) = loop.parameters
    parameter.grad = torch.full((1, 1), math.nan)
    loop.take_step(torch.tensor([0.25]))
    assert parameter.item() == 0 and not loop.guard.skipped_steps
    loop.step = 2
    assert not loop.describe_step().saves and "core: step 1 is skipped" in caplog.text
    parameter.grad = torch.full((1, 1), math.nan)
    loop.take_step(torch.tensor([0.5]))
    assert parameter.item() == 0
    judged = loop.judged
    for notice in (loop.save, loop.means, loop.leave, lambda: loop.take_step(torch.tensor([0.75]))):
        loop.guard.skipped_in_a_row, loop.judged = 1, judged
        with pytest.raises(FloatingPointError, match="core stops at step 3: .* for 2 steps in a row.* levels 0.500"):
            notice()
    assert parameter.item() == 0


def test_a_phase_does_not_end_with_weights_that_are_not_finite(tmp_path):
    loop = make_loop(tmp_path)
    loop.check_weights()
    loop.parameters[0].data.fill_(math.inf)
    with pytest.raises(
        FloatingPointError, match="core ends with weights that are not finite. There is no checkpoint yet"
    ):
        loop.check_weights()

    def loss(model, batch, step, micro_step):
        value = model(torch.ones(1, 1)).square().sum() + math.nan
        return SimpleNamespace(loss=value, sigma=torch.ones(1), stack=lambda: torch.zeros(1, 3))

    loop.step = 18
    with pytest.raises(FloatingPointError, match="core ends with weights that are not finite"):
        assert [step.number for step in loop.steps([{}, {}], loss)] == [19]


def test_the_kept_average_is_that_of_the_lowest_held_out_loss(tmp_path):
    """Losses that are missing or not finite are never the lowest. Before there is any, the last average is the result."""
    (tmp_path / "checkpoints").mkdir()
    left_over = tmp_path / "checkpoints" / ".best.safetensors"
    left_over.write_bytes(b"of another phase")
    loop = make_loop(tmp_path, keep_best=True)
    assert not left_over.exists()

    def evaluate(value: float, **losses: float) -> None:
        loop.step += 1
        loop.ema.shadow_params[0].fill_(value)
        loop.note_losses(losses)

    evaluate(1.0)
    evaluate(2.0, val_loss=math.nan)
    assert loop.finish() == {} and loop.parameters[0].item() == 2
    for value, loss in ((3.0, 0.5), (4.0, 0.25), (5.0, 0.25), (6.0, math.nan), (7.0, 0.3)):
        evaluate(value, val_loss=loss)
    assert loop.finish() == {"best_step": 4, "best_val_loss": 0.25} and loop.parameters[0].item() == 4
    assert not list((tmp_path / "checkpoints").iterdir())

    loop = make_loop(tmp_path)
    evaluate(1.0, val_loss=0.1)
    evaluate(2.0, val_loss=0.2)
    assert loop.finish() == {} and loop.parameters[0].item() == 2


def test_interruptions(monkeypatch, capfd):
    """A process alone goes by what it has noted; several wait for each other, and seldom."""
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    interrupt, calls = Interrupt(), []
    alone = SimpleNamespace(num_processes=1)
    several = SimpleNamespace(
        num_processes=2, set_trigger=lambda: calls.append("set"), check_trigger=lambda: calls.append("check") or True
    )
    assert not interrupt.noted(alone, ask=True) and not interrupt.noted(several, ask=False) and calls == []
    assert interrupt.noted(several, ask=True) and calls == ["check"]  # another process has noted a signal

    interrupt.note(signal.SIGTERM, None)
    interrupt.note(signal.SIGTERM, None)  # to all processes by a scheduler, and passed on by the launcher
    assert "SIGTERM: the run saves its work after the next step" in capfd.readouterr().err
    assert interrupt.noted(alone, ask=False) and not interrupt.noted(several, ask=False)
    assert interrupt.noted(several, ask=True) and calls == ["check", "set", "check"]
    with pytest.raises(SystemExit):
        interrupt.note(signal.SIGINT, None)


def test_a_run_that_stops_while_steps_are_skipped_keeps_its_last_checkpoint(tmp_path, caplog):
    """Unless it has none."""
    caplog.set_level("INFO")
    loop = make_loop(tmp_path)
    loop.step = 7
    loop.guard.accept(math.nan)
    loop.leave()
    checkpoint = tmp_path / "checkpoints" / "core-7"
    assert f"Interrupted after step 7 of core; saved {checkpoint}. Resume with" in caplog.text and checkpoint.exists()
    loop.step = 8
    loop.leave()
    assert f"not saved, since its last 1 steps were skipped: the last checkpoint is {checkpoint}." in caplog.text
    loop.guard.accept(1.0)
    loop.leave()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["core-7", "core-8"]


def test_what_is_due_after_a_step(tmp_path):
    loop = make_loop(tmp_path, logging_steps=3, checkpointing_steps=4, validation_steps=5)
    due = {}
    for loop.step in range(1, 21):
        step = loop.describe_step()
        due[step.number] = [step.logs, step.saves, step.due(5), step.last]
    assert [n for n, (logs, *_) in due.items() if logs] == [3, 6, 9, 12, 15, 18, 20]
    assert [n for n, (_, saves, *_) in due.items() if saves] == [4, 8, 12, 16, 20]
    assert [n for n, (_, _, five, _) in due.items() if five] == [5, 10, 15, 20]
    assert [n for n, (*_, last) in due.items() if last] == [20] and not step.due(None)
    loop.step = 8
    loop.guard.accept(math.nan)  # what made the step bad may be in the weights
    assert not loop.describe_step().saves
    loop.step = 20
    assert loop.describe_step().saves


def test_the_clock_counts_training_only(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = Clock(step=0, steps=100, images_per_step=8)
    assert clock.warmed_up == 5 and clock.first_estimate == 25
    now[0] += 2
    assert clock.lap_rate(4) == 16.0 and clock.total_rate(4) == 16.0
    clock.restart(5)
    now[0] += 1
    paused = now[0]
    now[0] += 0.5
    clock.resume(paused)  # half a second was spent on something else
    assert clock.lap_rate(10) == clock.total_rate(10) == 40.0
    now[0] += 1
    paused, now[0] = now[0], now[0] + 0.25
    assert clock.lap_rate(20) == 64.0  # asked for during a pause, whose first part counts
    now[0] += 5
    clock.resume(paused)
    now[0] += 1
    assert clock.lap_rate(30) == 80.0
    assert Clock(step=98, steps=100, images_per_step=8).warmed_up == 99
