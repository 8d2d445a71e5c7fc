# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

import torch

from diffusers_greedy_grow import GrowableUNet2DConditionModel, ShallowUNet2DModel
from diffusers_greedy_grow.training.plan import describe_parts, format_caching, format_plan, plan_phase


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
    cached = plan_phase("grown-64-detail", grown, 64, 10, 8, 1, 12, num_draws=3)
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
