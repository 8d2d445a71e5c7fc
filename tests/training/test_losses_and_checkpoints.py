# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

import json
import math
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from matplotlib.figure import Figure
from PIL import Image

from diffusers_greedy_grow import GrowableUNet2DConditionModel, ShallowUNet2DModel
from diffusers_greedy_grow.flow import descend, high_band, pool
from diffusers_greedy_grow.training.arguments import TrainingArguments
from diffusers_greedy_grow.training.checkpoints import (
    find_checkpoint,
    forget_newer,
    load_checkpoint,
    read_progress,
    save_checkpoint,
)
from diffusers_greedy_grow.training.curves import draw_losses
from diffusers_greedy_grow.training.files import remove_folder, save_pipeline
from diffusers_greedy_grow.training.guard import GradientGuard
from diffusers_greedy_grow.training.loop import make_optimizer, save_interrupted, take_step
from diffusers_greedy_grow.training.objective import SIGMA_MIN_OF_LOSS, WEIGHTINGS, LossMeter, flow_loss
from diffusers_greedy_grow.training.plan import describe_parts, format_plan, plan_phase
from diffusers_greedy_grow.training.run_folder import check_replaced, keep_metrics
from diffusers_greedy_grow.training.samples import draw_samples
from diffusers_greedy_grow.training.signals import Interrupt

from ..testing_utils import make_grown, make_inputs, make_pipeline


# ----------------------------------------------------------------------------------------------------------------------
# Loss


def test_the_loss_is_that_of_the_velocity(grown):
    inputs = make_inputs(height=32, width=32)
    noise, sigma = inputs.pop("sample"), inputs.pop("timestep") / 1000
    x0 = torch.rand(noise.shape) * 2 - 1
    sigma[0] = 0.01
    losses = flow_loss(grown, x0, noise, sigma, 2, **inputs)
    state = (1 - sigma[:, None, None, None]) * x0 + sigma[:, None, None, None] * noise
    with torch.no_grad():
        output = grown(state, 1000 * sigma, **inputs)
    # Above the clamp it is the error of the velocity itself; below, the division by sigma stops growing.
    torch.testing.assert_close((losses.low + losses.high)[1], (output.sample - (noise - x0))[1].square().mean())
    error = (output.pred_original_sample - x0)[0]
    torch.testing.assert_close((losses.low + losses.high)[0], error.square().mean() / SIGMA_MIN_OF_LOSS**2)
    torch.testing.assert_close(losses.loss, (losses.low + losses.high).mean())
    assert losses.loss.requires_grad and not losses.low.requires_grad

    # By the clean image's error, what is reported stays that of the velocity.
    clean = flow_loss(grown, x0, noise, sigma, 2, "clean", **inputs)
    torch.testing.assert_close(clean.loss, (output.pred_original_sample - x0).square().mean())
    torch.testing.assert_close((clean.low, clean.high), (losses.low, losses.high))

    error = (output.pred_original_sample - x0) / sigma.clamp(min=SIGMA_MIN_OF_LOSS)[:, None, None, None]
    torch.testing.assert_close(losses.low, pool(error, 2).square().mean(dim=(1, 2, 3)))
    torch.testing.assert_close(losses.high, high_band(error, 2).square().mean(dim=(1, 2, 3)), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weightings(weighting, grown):
    inputs = make_inputs(height=32, width=32)
    noise, sigma = inputs.pop("sample"), torch.tensor([0.2, 0.7])
    inputs.pop("timestep")
    x0 = torch.rand(noise.shape) * 2 - 1
    losses = flow_loss(grown, x0, noise, sigma, 2, weighting, **inputs)
    weights = {
        "velocity": torch.ones(2),
        "clean": sigma**2,
        # The noise's error is the velocity's times (1 - sigma) ** 2; its log-SNR is 2 log((1 - sigma) / sigma).
        "sigmoid": (1 - sigma) ** 2 * torch.sigmoid(-2 * torch.log((1 - sigma) / sigma)),
        "sigma_sqrt": 1 / sigma**2,
        "cosmap": 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2)),
    }[weighting]
    torch.testing.assert_close(losses.loss, (weights * (losses.low + losses.high)).mean())

    more = flow_loss(grown, x0, noise, sigma, 2, weighting, low_res_weight=3.0, **inputs)
    torch.testing.assert_close(more.loss, (weights * (4 * losses.low + losses.high)).mean())

    # With the inner model alone, its own loss at its own resolution: the law.
    inner = flow_loss(grown, x0, noise, sigma, 2, weighting, num_stages=0, **inputs)
    state, inner_sigma = descend((1 - 0.7) * x0[1:] + 0.7 * noise[1:], sigma[1:], 2)
    text = {name: value[1:] for name, value in inputs.items()}
    with torch.no_grad():
        predicted = grown.core(state, 1000 * inner_sigma, **text).pred_original_sample
    expected = (predicted - pool(x0[1:], 2)).square().mean() / 0.7**2
    torch.testing.assert_close(inner.low[1], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(inner.loss, (weights * inner.low).mean())
    inner.loss.backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in grown.stages.parameters())
    assert grown.core.conv_in.weight.grad.any()


def test_loss_meter():
    accelerator, meter = Accelerator(cpu=True), LossMeter()
    meter.update(torch.tensor([[1.0, 2.0, 0.1], [3.0, 4.0, 0.5]]))
    meter = LossMeter(meter.gather(accelerator))  # as from a checkpoint
    meter.update(torch.tensor([[5.0, 6.0, 0.55], [math.nan, 1.0, 0.2]]))
    means = meter.compute(accelerator)
    assert means == {
        "loss": 7.0, "loss_low": 3.0, "loss_high": 4.0, "loss_sigma_0.0_0.3": 3.0, "loss_sigma_0.3_0.6": 9.0,
    }  # fmt: skip
    assert meter.compute(accelerator) == {}


def test_gradient_guard():
    guard = GradientGuard(factor=10, limit=2)
    assert guard.accept(500) and all(guard.accept(1 + step / 100) for step in range(30))
    assert not guard.accept(12.5) and not guard.accept(math.nan)
    means = guard.compute()
    assert means["grad_norm_max"] == 500 and means["skipped_steps"] == 2 and 10 < means["grad_norm"] < 20

    resumed = GradientGuard(factor=10, limit=2)
    resumed.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    for one in (guard, resumed):
        with pytest.raises(FloatingPointError, match="for 3 steps in a row; the last one was 12"):
            one.accept(12)
        assert one.accept(9) and one.skipped_in_a_row == 0 and one.skipped_steps == 3


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


def test_the_gradient_guard_remembers_a_hundred_norms():
    guard = GradientGuard(factor=10, limit=2)
    assert all(guard.accept(norm) for norm in [1.0] * 60 + [5.0] * 40) and not guard.accept(11)
    assert all(guard.accept(5.0) for _ in range(15)) and guard.accept(11)


@pytest.mark.parametrize("max_grad_norm,step", [(0.5, 0.5), (0, 4.0)])
def test_clipping(max_grad_norm, step, tmp_path):
    parameter = torch.nn.Parameter(torch.zeros(1))
    accelerator, optimizer = Accelerator(cpu=True), torch.optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.full((1,), 4.0)
    guard = GradientGuard(factor=10, limit=2)
    take_step(accelerator, optimizer, [parameter], max_grad_norm, guard, "core", 0, torch.ones(1), tmp_path)
    assert parameter.item() == pytest.approx(-step) and guard.norms == [4.0]


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
    assert "SIGTERM: a checkpoint is saved after the next training step" in capfd.readouterr().err
    assert interrupt.noted(alone, ask=False) and not interrupt.noted(several, ask=False)
    assert interrupt.noted(several, ask=True) and calls == ["check", "set", "check"]
    with pytest.raises(SystemExit):
        interrupt.note(signal.SIGINT, None)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_checkpoints(tmp_path, monkeypatch):
    accelerator = Accelerator(cpu=True)
    model = make_grown()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    named = list(model.named_parameters())
    ema = EMAModel([parameter for _, parameter in named], decay=0.9, foreach=True)

    def train(steps):
        for step in range(steps):
            model(**make_inputs(height=32, width=32, seed=step)).sample.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.step(model.parameters())

    train(2)

    def save(step, phase="grown-32", phase_index=1):
        progress = {"phase": phase, "phase_index": phase_index, "step": step, "config": {"seed": 3}}
        losses = torch.full((1, 3), step / 3)
        return save_checkpoint(accelerator, tmp_path / "checkpoints", progress, ema, named, losses, total_limit=2)

    path = save(2)
    expected = {"phase": "grown-32", "step": 2, "ema_optimization_step": 2, "config": {"seed": 3}}
    assert expected.items() <= read_progress(path).items()
    train(2)
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    expected_ema = [shadow.clone() for shadow in ema.shadow_params]
    train(1)
    ema, losses = load_checkpoint(accelerator, path, named, 0.9)
    assert torch.equal(losses, torch.full((1, 3), 2 / 3))
    train(2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected))
    assert all(torch.equal(a, b) for a, b in zip(ema.shadow_params, expected_ema))

    with pytest.raises(ValueError, match="a moving average of other parameters"):
        load_checkpoint(accelerator, path, named[1:], 0.9)
    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match="`mixed_precision='fp16'`.* no scale of the loss"),
    ):
        patch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu"))
        load_checkpoint(accelerator, path, named, 0.9)

    # What was cut off in the middle of being saved or removed is no checkpoint.
    (tmp_path / "checkpoints" / ".grown-32-6.tmp").mkdir()
    save(99, "core", 0)
    for step in (3, 4, 5, 5):
        save(step)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["grown-32-4", "grown-32-5"]
    assert find_checkpoint(tmp_path, "latest").name == "grown-32-5"
    assert find_checkpoint(tmp_path, str(path.with_name("grown-32-4"))).name == "grown-32-4"
    assert find_checkpoint(tmp_path / "elsewhere", "latest") is None

    # Files that are copied have other times.
    os.utime(path.with_name("grown-32-4") / "progress.json", (2e9, 2e9))
    assert find_checkpoint(tmp_path, "latest").name == "grown-32-5"
    # A run that goes on from an older one, however that is named, will save the newer ones again.
    monkeypatch.chdir(tmp_path)
    forget_newer(tmp_path / "checkpoints", Path("checkpoints/grown-32-5"))
    assert find_checkpoint(tmp_path, "latest").name == "grown-32-5"
    forget_newer(tmp_path / "checkpoints", Path("checkpoints/grown-32-4"))
    assert find_checkpoint(tmp_path, "latest").name == "grown-32-4"


def test_what_no_run_has_made_is_not_replaced(tmp_path):
    (tmp_path / "samples").mkdir()
    with pytest.raises(ValueError, match="holds samples, which this run would replace, but no `config.yaml`"):
        check_replaced(tmp_path, ["checkpoints", "samples"])
    check_replaced(tmp_path, ["checkpoints"])
    (tmp_path / "config.yaml").write_text("")
    check_replaced(tmp_path, ["checkpoints", "samples"])


def test_metrics_after_a_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    keep_metrics(path, 0, False)  # killed before the first line
    path.write_text("one\ntwo\nthr")
    keep_metrics(path, 4, False)
    assert path.read_text() == "one\n"
    with pytest.raises(ValueError, match="lacks lines that were there when the checkpoint was saved"):
        keep_metrics(path, 8, False)
    keep_metrics(path, 8, resume_with_changes=True)
    assert path.read_text() == "one\n"


@pytest.mark.parametrize("damage", ["cut off", "missing", "progress", "progress missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(damage, tmp_path, caplog):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(4, 4))
    named = list(model.named_parameters())
    ema = EMAModel([parameter for _, parameter in named], decay=0.9)
    for step in (1, 2):
        progress = {"phase": "core", "phase_index": 0, "step": step}
        save_checkpoint(accelerator, tmp_path / "checkpoints", progress, ema, named, torch.empty(0, 3), total_limit=2)
    newest = find_checkpoint(tmp_path, "latest")
    assert newest.name == "core-2"
    path = newest / ("progress.json" if "progress" in damage else "model.safetensors")
    if "missing" in damage:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-7])

    assert find_checkpoint(tmp_path, "latest").name == "core-1"
    message = {"cut off": r"model.safetensors has \d+ bytes of", "missing": "model.safetensors is missing"}.get(
        damage, "progress.json is missing or cut off"
    )
    assert re.search(f"core-2 is no complete checkpoint and is passed over: {message}", caplog.text)
    with pytest.raises(ValueError, match="is no complete checkpoint"):
        find_checkpoint(tmp_path, str(newest))
    # Without a good one the run does not begin again, which would remove what may be mended.
    (tmp_path / "checkpoints" / "core-1" / "ema.safetensors").unlink()
    with pytest.raises(ValueError, match="none of the checkpoints in .* is complete: core-1, core-2"):
        find_checkpoint(tmp_path, "latest")


def test_a_run_that_stops_while_steps_are_left_out_keeps_its_last_checkpoint(tmp_path):
    """Unless it has none."""
    guard, saved = GradientGuard(factor=10, limit=5), []

    def save(step: int) -> Path:
        saved.append(step)
        return tmp_path / f"core-{step}"

    assert "Interrupted after step 7 of core; saved" in save_interrupted(save, "core", 7, guard, tmp_path)
    guard.accept(math.nan)
    assert f"saved {tmp_path / 'core-8'}. Go on" in save_interrupted(save, "core", 8, guard, tmp_path)
    (tmp_path / "core-8").mkdir()
    progress = {"phase": "core", "phase_index": 0, "step": 8, "sizes": {}}
    (tmp_path / "core-8" / "progress.json").write_text(json.dumps(progress))
    text = save_interrupted(save, "core", 9, guard, tmp_path)
    assert "not saved, since its last 1 steps were left out" in text and f"is {tmp_path / 'core-8'}. Go on" in text
    assert saved == [7, 8]


def test_a_saved_pipeline_replaces_an_earlier_one(tmp_path):
    pipeline = make_pipeline()
    save_pipeline(pipeline, tmp_path / "core")
    (tmp_path / "core" / "left over").write_text("")
    save_pipeline(pipeline, tmp_path / "core")
    assert [path.name for path in tmp_path.iterdir()] == ["core"]
    assert not (tmp_path / "core" / "left over").exists() and (tmp_path / "core" / "model_index.json").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Plan


def test_plan_counts_without_weights():
    with torch.device("meta"):
        core = ShallowUNet2DModel(16, patch_size=4, hidden_size=64, num_layers=4, num_attention_heads=4)
        grown = GrowableUNet2DConditionModel.from_core(core, 64, block_out_channels=(16, 32))
    plan = plan_phase("core", core, 16, steps=10, batch_size=8, batches_per_step=1, num_tokens=12)
    assert plan.parameters == plan.trained_parameters == core.num_parameters()
    # Linear layers dominate: 2 operations per weight and token forward, twice that backward.
    block = core.transformer_blocks[0]
    linear = sum(m.weight.numel() for m in block.modules() if isinstance(m, torch.nn.Linear))
    text = sum(block.attn2.get_submodule(name).weight.numel() for name in ("to_k", "to_v"))
    forward = 2 * 4 * ((linear - text) * 16 + text * 12)
    assert 1.0 < plan.forward_flops / forward < 1.6
    assert 2.5 < plan.train_flops / plan.forward_flops < 3.0
    assert plan.images == 80 and plan.flops == 80 * plan.train_flops

    grown.freeze_core()
    detail = plan_phase("grown-64-detail", grown, 64, steps=10, batch_size=8, batches_per_step=1, num_tokens=12)
    grown.unfreeze_core()
    joint = plan_phase("grown-64", grown, 64, steps=10, batch_size=8, batches_per_step=2, num_tokens=12)
    assert detail.trained_parameters < joint.trained_parameters == grown.num_parameters()
    # The frozen core costs its forward pass only.
    assert joint.train_flops - detail.train_flops > 1.8 * plan.forward_flops
    assert joint.memory() < plan_phase("grown-64", grown, 64, 10, 8, 1, 12).memory()
    assert describe_parts(grown) == {
        "core 16": core.num_parameters(),
        "stage 64": grown.num_parameters() - core.num_parameters(),
    }
    text = format_plan([plan, detail, joint], describe_parts(grown))
    assert "core" in text and "grown-64-detail" in text and "80" in text
    ratio = joint.forward_flops / plan.forward_flops
    assert f"{ratio:.1f} times" in text and ("Warning" in text) == (ratio < 2)
    assert all(parameter.is_meta for parameter in grown.parameters())


def test_planning_takes_no_longer_for_a_deeper_core():
    """All of its layers are counted, and two of them are run."""
    plans, calls = [], []
    with torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: calls.append(len(plans))):
        for num_layers in (3, 24):
            with torch.device("meta"):
                core = ShallowUNet2DModel(16, hidden_size=64, num_layers=num_layers, num_attention_heads=4)
                grown = GrowableUNet2DConditionModel.from_core(core, 64, block_out_channels=(16, 32))
            plans.append(plan_phase("grown-64", grown, 64, 10, 8, 1, 12))
    assert calls.count(0) == calls.count(1) > 0
    shallow, deep = plans
    layer = sum(p.numel() for p in core.transformer_blocks[0].parameters())
    assert deep.parameters - shallow.parameters == 21 * layer
    # Six operations for each weight and token, of which there are 12 of the text and 16 of the image.
    assert 6 * 12 < (deep.train_flops - shallow.train_flops) / (21 * layer) < 6 * 16


# ----------------------------------------------------------------------------------------------------------------------
# Images of a run


def test_sample_grid(tmp_path):
    rows = {
        "core": [Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "green")],
        "grown-64": [Image.new("RGB", (64, 64), "blue"), Image.new("RGB", (64, 64), "black")],
    }
    draw_samples(rows, ["a red square", "a caption of many words that takes several lines"], tmp_path / "s.png")
    grid = Image.open(tmp_path / "s.png")
    for x, y, color in ((0, 0, (255, 0, 0)), (1, 0, (0, 128, 0)), (0, 1, (0, 0, 255)), (1, 1, (0, 0, 0))):
        assert grid.getpixel((96 + 132 * x + 64, 132 * y + 64)) == color  # over its own caption
    assert grid.height > 2 * 128 + 14 and [path.name for path in tmp_path.iterdir()] == ["s.png"]


def test_loss_curves(tmp_path, monkeypatch):
    """Each is what its label says, and dots have the colour of the curve whose held-out loss they are."""
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **kw: figures.append(figure) or savefig(figure, *args, **kw)
    )
    trained = {"loss": 3.0, "loss_low": 1.0, "loss_high": 2.0, "loss_sigma_0.0_0.3": 4.0}
    held_out = {"val_loss_low": 1.5, "val_low_noise_loss_low": 8.0, "val_low_noise_loss_high": 9.0}
    records = [
        {"phase": phase, "step": 5, **values} for phase in ("core", "grown-64") for values in (trained, held_out)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    draw_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").size[0] > 1000
    above, _, below, _ = figures[0].axes
    assert above.get_title() == "core"
    lines = {line.get_label(): line for axis in (above, below) for line in axis.lines}
    (dots,) = [line for label, line in lines.items() if label.startswith("_")]
    assert dots.get_ydata() == [1.5] and dots.get_color() == lines["low band"].get_color()
    assert {label: line.get_ydata()[0] for label, line in lines.items() if line is not dots} == {
        "loss": 3,
        "low band": 1,
        "high band": 2,
        "noise 0.0 to 0.3": 4,
        "low band, noise 0.02 to 0.3, held out": 8,
        "high band, noise 0.02 to 0.3, held out": 9,
    }


def test_a_folder_may_be_a_link_to_a_larger_disk(tmp_path):
    """What is there is replaced, the link stays."""
    (tmp_path / "disk" / "core").mkdir(parents=True)
    (tmp_path / "disk" / "core" / "old").touch()
    (tmp_path / "core").symlink_to(tmp_path / "disk" / "core")
    save_pipeline(make_pipeline(), tmp_path / "core")
    assert (tmp_path / "core").is_symlink() and not (tmp_path / "core" / "old").exists()
    assert (tmp_path / "core" / "model_index.json").exists()
    remove_folder(tmp_path / "core")
    assert (tmp_path / "core").is_symlink() and not list((tmp_path / "disk" / "core").iterdir())
    remove_folder(tmp_path / "disk")
    assert not (tmp_path / "disk").exists()
