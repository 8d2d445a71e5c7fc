# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from diffusers.training_utils import EMAModel

from diffusers_greedy_grow import GrowableUNet2DConditionModel, ShallowUNet2DModel
from diffusers_greedy_grow.training import optimizer as optimizers
from diffusers_greedy_grow.training.memory import MemoryTracker
from diffusers_greedy_grow.training.objective import flow_loss
from diffusers_greedy_grow.training.optimizer import Muon, count_orthogonalization_bytes, split_for_muon
from diffusers_greedy_grow.training.plan import describe_parts, format_caching, format_plan, plan_phase


def test_plan_counts_without_weights():
    with torch.device("meta"):
        core = ShallowUNet2DModel(16, patch_size=4, hidden_size=64, num_layers=4, num_attention_heads=4)
        grown = GrowableUNet2DConditionModel.from_core(core, 64, block_out_channels=(16, 32))
    plan = plan_phase("core", core, 16, steps=10, batch_size=8, batches_per_step=1, num_tokens=12, checkpointing=())
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
    detail = plan_phase("grown-64-detail", grown, 64, 10, 8, 1, 12, checkpointing=(False,))
    cached = plan_phase("grown-64-detail", grown, 64, 10, 8, 1, 12, num_draws=3, checkpointing=(False,))
    assert (
        detail.train_flops - cached.train_flops == plan.forward_flops and cached.forward_flops == detail.forward_flops
    )
    # Two bytes per number: the core's image, and its features on a grid of 4 x 4
    assert detail.prediction_bytes == 0 and cached.prediction_bytes == 8 + 2 * (3 * 16**2 + 64 * 4**2)
    text = format_caching(cached, num_images=10)
    assert "for 10 images take 0.00 GB" in text and "30 times, instead of 80 times in all, which saves 50." in text
    text = format_caching(cached, num_images=64)
    assert "80 times, instead of 80 times in all, which saves none, as the phase has 1.2 epochs: pass fewer" in text
    grown.unfreeze_core()
    joint = plan_phase("grown-64", grown, 64, 10, 8, batches_per_step=2, num_tokens=12, checkpointing=(False,))
    assert detail.trained_parameters < joint.trained_parameters == grown.num_parameters()
    # The frozen core costs its forward pass only.
    assert joint.train_flops - detail.train_flops > 1.8 * plan.forward_flops
    assert joint.memory() < plan_phase("grown-64", grown, 64, 10, 8, 1, 12, checkpointing=(False,)).memory()
    assert describe_parts(grown) == {
        "core 16": core.num_parameters(),
        "stage 64": grown.num_parameters() - core.num_parameters(),
    }
    assert "memory" in format_plan([detail, joint], {}) and "memory" not in format_plan([plan], {})
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
            plans.append(plan_phase("grown-64", grown, 64, 10, 8, 1, 12, checkpointing=(False,)))
    assert calls.count(0) == calls.count(1) > 0
    shallow, deep = plans
    layer = sum(p.numel() for p in core.transformer_blocks[0].parameters())
    assert deep.parameters - shallow.parameters == 21 * layer
    # Six operations for each weight and token, of which there are 12 of the text and 16 of the image.
    assert 6 * 12 < (deep.train_flops - shallow.train_flops) / (21 * layer) < 6 * 16


def build_model(kind: str) -> torch.nn.Module:
    """A core of three layers, on a grid of 8 x 8, or a model grown from it, frozen as in a phase."""
    core = ShallowUNet2DModel(
        32, hidden_size=128, num_layers=3, num_attention_heads=2, cross_attention_dim=32, dropout=0.1
    )
    if kind == "core":
        return core
    grown = GrowableUNet2DConditionModel.from_core(core, 64, block_out_channels=(32,))
    grown.freeze_core() if kind == "detail" else grown.unfreeze_core()
    return grown


def measure_step(
    model: torch.nn.Module, resolution: int, batch_size: int, dtype: torch.dtype, optimizer: str, accumulated: int
) -> int:
    """Take two steps on the CPU, and return the bytes of all tensors at the peak of the second one."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if optimizer == "muon":
        own = Muon(split_for_muon([{"params": trained}], model), 1e-3, (0.9, 0.99), 0.01, fused=True)
    else:
        own = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    tracker = MemoryTracker()
    for parameter in model.parameters():
        tracker.add(parameter)
    with tracker:
        average = EMAModel(trained, foreach=True)
        for _ in range(2):
            tracker.peak = tracker.alive
            for _ in range(accumulated):
                x0, noise = (torch.randn(batch_size, 3, resolution, resolution) for _ in range(2))
                text, mask = torch.randn(batch_size, 20, 32), torch.ones(batch_size, 20, dtype=torch.bool)
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    conditions = {"encoder_hidden_states": text, "encoder_attention_mask": mask}
                    losses = flow_loss(model, x0, noise, torch.rand(batch_size), 2, **conditions)
                losses.loss.backward()
                del losses
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            own.step()
            own.zero_grad()
            average.step(trained)
    return tracker.peak


@pytest.mark.parametrize(
    "kind,batch_size,dtype,optimizer,checkpointing,accumulated",
    [
        ("core", 8, torch.float32, "adamw", False, 1),
        ("core", 1, torch.bfloat16, "adamw", True, 1),
        ("detail", 4, torch.bfloat16, "adamw", True, 1),
        ("joint", 4, torch.bfloat16, "muon", False, 2),
    ],
)
def test_the_plan_of_the_memory_is_what_a_step_takes(kind, batch_size, dtype, optimizer, checkpointing, accumulated):
    resolution = 32 if kind == "core" else 64
    with torch.device("meta"):
        model = build_model(kind)
    images = batch_size * accumulated
    plan = plan_phase(
        kind, model, resolution, 1, images, accumulated, 20, dtype, optimizer, checkpointing=(checkpointing,)
    )
    assert not model.is_gradient_checkpointing and all(parameter.is_meta for parameter in model.parameters())
    model = build_model(kind)
    if checkpointing:
        model.enable_gradient_checkpointing()
    measured = measure_step(model, resolution, batch_size, dtype, optimizer, accumulated)
    assert plan.memory(gradient_checkpointing=checkpointing) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("shapes", [[(64, 64)] * 3, [(32, 64, 3, 3)] * 2 + [(32, 64)], [(128, 32)]])
def test_the_memory_of_orthogonalization(shapes, monkeypatch):
    monkeypatch.setattr(optimizers, "newton_schulz_dtype", lambda device: torch.bfloat16)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    groups = [{"params": parameters, "muon": True}, {"params": [torch.nn.Parameter(torch.zeros(1))], "muon": False}]
    optimizer = Muon(groups, 1e-3, (0.9, 0.99), 0.01, fused=True)
    tracker = MemoryTracker()
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        for tensor in (parameter, parameter.grad, optimizer.state[parameter]["momentum_buffer"]):
            tracker.add(tensor)
    before = tracker.alive
    with tracker:
        optimizer.step()
    expected = count_orthogonalization_bytes([parameter.shape for parameter in parameters])
    assert tracker.peak - before == pytest.approx(expected, rel=0.05)
