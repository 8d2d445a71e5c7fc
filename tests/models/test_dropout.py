# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Dropout in the core's transformer layers: in training only, and not while the core is frozen."""

import pytest
import torch

from diffusers_greedy_grow import GrowableUNet2DConditionModel, ShallowUNet2DModel

from ..testing_utils import make_core, make_inputs


def answer(model: torch.nn.Module, seed: int = 0) -> torch.Tensor:
    """The model's answer to always the same input, with dropout of `seed`."""
    torch.manual_seed(seed)
    size = model.config.sample_size
    return model(**make_inputs(height=size, width=size), return_dict=False)[0]


def test_without_dropout_training_answers_bit_for_bit_and_draws_nothing():
    core = make_core()
    expected = answer(core.eval())
    state = torch.get_rng_state()
    assert torch.equal(answer(core.train()), expected) and torch.equal(torch.get_rng_state(), state)
    assert core.config.dropout == 0


def test_dropout_acts_in_training_only_and_has_no_parameters():
    core = make_core(dropout=0.5)
    expected = answer(make_core().eval())
    assert torch.equal(answer(core.eval()), expected)
    core.train()
    assert torch.equal(answer(core), answer(core)) and not torch.equal(answer(core), answer(core, seed=1))
    for block in core.transformer_blocks:  # in each place alone
        for place in (block.attn1, block.attn2, block.ff):
            core.eval()
            place.train()
            assert not torch.allclose(answer(core), expected, atol=1e-4)


def test_recomputed_activations_drop_the_same():
    gradients = []
    for checkpointing in (False, True):
        core = make_core(dropout=0.5).train()
        if checkpointing:
            core.enable_gradient_checkpointing()
        answer(core).square().sum().backward()
        gradients.append([parameter.grad for parameter in core.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*gradients))


@pytest.mark.parametrize("init", ["preserve", "random"])
def test_a_frozen_core_drops_nothing(init):
    grown = GrowableUNet2DConditionModel.from_core(make_core(dropout=0.5), 32, (8, 16), init=init)
    torch.nn.init.normal_(grown.stages[0].decoder.conv_out.weight, std=0.02)
    expected = answer(grown.eval())
    assert grown.config.dropout == 0.5
    grown.train()
    assert not torch.equal(answer(grown), expected)
    grown.freeze_core()
    assert grown.training and grown.stages[0].training and not grown.core.training
    assert torch.equal(answer(grown), expected)
    grown.eval().train()  # as around an evaluation
    assert torch.equal(answer(grown), expected)
    grown.unfreeze_core()
    assert not torch.equal(answer(grown), expected)


def test_inner_stages_are_frozen_with_the_core():
    grown = GrowableUNet2DConditionModel.from_core(make_core(dropout=0.5), 32, (8, 16))
    larger = GrowableUNet2DConditionModel.from_core(grown, 64, (8, 16)).train()
    larger.freeze_core()
    assert [stage.training for stage in larger.stages] == [False, True]
    assert larger.config.dropout == 0.5


def test_another_dropout_for_a_saved_core(tmp_path):
    make_core().save_pretrained(tmp_path)
    core = ShallowUNet2DModel.from_pretrained(tmp_path, dropout=0.25)
    assert core.config.dropout == 0.25 and core.transformer_blocks[0].attn1.to_out[1].p == 0.25
    for dropout in (1, -0.1, "much"):
        with pytest.raises(ValueError, match=f"`dropout={dropout!r}` must be a number, at least 0 and below 1."):
            make_core(dropout=dropout)
