# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Attention through diffusers' dispatch, with the test names of diffusers' own suite."""

import inspect
import logging
import re

import pytest
import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend

from diffusers_greedy_grow.models.attention import (
    WITHOUT_MASKS,
    GreedyGrowAttnProcessor,
    get_image_rotary_emb,
    rotate,
    warn_of_masks,
)

from ..testing_utils import TEXT_DIM, make_core, make_inputs


def attentions(model) -> list[AttentionModuleMixin]:
    return [module for module in model.modules() if isinstance(module, AttentionModuleMixin)]


@torch.no_grad()
def test_fuse_unfuse_qkv_projections(either):
    model, inputs = either
    expected = model(**inputs).sample
    model.fuse_qkv_projections()
    crosses = [module.is_cross_attention for module in attentions(model)]
    assert crosses[:4] == [False, True] * 2 and all(crosses[4:])  # self and cross in each block, cross in a stage
    assert all(module.fused_projections for module in attentions(model))
    assert [hasattr(module, "to_qkv") for module in attentions(model)] == [not cross for cross in crosses]
    assert [hasattr(module, "to_kv") for module in attentions(model)] == crosses
    torch.testing.assert_close(model(**inputs).sample, expected, atol=1e-5, rtol=1e-4)
    model.unfuse_qkv_projections()
    for module in attentions(model):
        assert not module.fused_projections and not hasattr(module, "to_qkv") and not hasattr(module, "to_kv")
    torch.testing.assert_close(model(**inputs).sample, expected)


def test_get_set_processor(either):
    model, _ = either
    processor = GreedyGrowAttnProcessor()
    model.set_attn_processor(processor)
    assert all(module.processor is processor for module in attentions(model))


def test_attention_processor_dict(either):
    model, _ = either
    processors = model.attn_processors
    # Self and cross in each of two blocks, and one in each stage.
    assert len(processors) == len(attentions(model)) == 4 + len(getattr(model, "stages", ()))
    replaced = {name: GreedyGrowAttnProcessor() for name in processors}
    model.set_attn_processor(dict(replaced))
    assert model.attn_processors == replaced


def test_attention_processor_count_mismatch_raises_error(either):
    model, _ = either
    with pytest.raises(ValueError, match="number of processors 1 does not match"):
        model.set_attn_processor({next(iter(model.attn_processors)): GreedyGrowAttnProcessor()})


BACKENDS = [AttentionBackendName.NATIVE, AttentionBackendName._NATIVE_MATH]


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_close_to_native(model_and_inputs, backend):
    model, inputs = model_and_inputs
    model.double()  # in float32, random weights would enlarge rounding differences between backends
    inputs["sample"] = inputs["sample"].double()
    expected = model(**inputs).sample
    model.set_attention_backend(backend.value)
    torch.testing.assert_close(model(**inputs).sample, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_set_attention_backend_matches_context_manager(either, backend):
    model, inputs = either
    with attention_backend(backend.value):
        expected = model(**inputs).sample
    model.set_attention_backend(backend.value)
    assert all(processor._attention_backend == backend for processor in model.attn_processors.values())
    assert torch.equal(model(**inputs).sample, expected)


@torch.no_grad()
def test_context_manager_switches_and_restores_backend(either, monkeypatch):
    """The backend that was chosen computes."""
    model, inputs = either
    used = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def note(*args, **kwargs):
        used.append(torch.backends.cuda.flash_sdp_enabled())
        return attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    model(**inputs)
    with attention_backend("_native_math"):
        model(**inputs)
    model(**inputs)
    calls = len(attentions(model))
    assert used == [True] * calls + [False] * calls + [True] * calls


def test_an_unknown_backend_is_refused(either):
    model, _ = either
    with pytest.raises(ValueError, match="flush"):
        model.set_attention_backend("flush")


def test_the_backends_without_masks_are_those_that_refuse_them():
    """By the code of the installed diffusers."""
    refusing = {
        name.value
        for name, function in _AttentionBackendRegistry._backends.items()
        if re.search(r"raise ValueError\(.*`attn_mask` is not", inspect.getsource(function))
    }
    assert "_native_flash" in refusing and refusing == WITHOUT_MASKS


@torch.no_grad()
def test_attention_to_text_falls_back_where_a_backend_takes_no_mask(model_and_inputs, caplog, monkeypatch):
    """It says so once. Attention between image tokens, and to text without a mask, uses the backend."""
    warn_of_masks.cache_clear()
    monkeypatch.setattr(logging.getLogger("diffusers_greedy_grow"), "propagate", True)
    model, inputs = model_and_inputs
    model.double()  # in float32, random weights would enlarge rounding differences between backends
    inputs["sample"] = inputs["sample"].double()
    expected = model(**inputs).sample
    used = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def note(*args, attn_mask=None, **kwargs):
        # Torch's own choice may be plain products; the flash backend may not.
        used.append((attn_mask is not None, torch.backends.cuda.math_sdp_enabled()))
        return attention(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    with attention_backend("_native_flash"):
        torch.testing.assert_close(model(**inputs).sample, expected, atol=1e-5, rtol=1e-4)
    with attention_backend("native"):
        model.set_attention_backend("_native_flash")  # which also becomes the active one
        torch.testing.assert_close(model(**inputs).sample, expected, atol=1e-5, rtol=1e-4)
        reads_text = "encoder_attention_mask" in inputs
        assert set(used) == {(False, False), *[(True, True)] * reads_text}
        assert caplog.text.count("The attention backend '_native_flash' takes no mask") == int(reads_text)
        used.clear()
        model(**{name: value for name, value in inputs.items() if name != "encoder_attention_mask"})
        assert set(used) == {(False, False)}


@pytest.mark.slow
@torch.no_grad()
def test_the_fallback_does_not_break_the_graph():
    model, inputs = make_core(), make_inputs()
    model.double()
    inputs["sample"] = inputs["sample"].double()
    expected = model(**inputs).sample
    with attention_backend("native"):
        model.set_attention_backend("_native_flash")
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**inputs).sample, expected, atol=1e-5, rtol=1e-4)
        torch.compiler.reset()


@torch.no_grad()
def test_processors_get_the_cross_attention_kwargs(either):
    model, inputs = either
    tags = []

    class Tagged(GreedyGrowAttnProcessor):
        def __call__(self, *args, tag, **kwargs):
            tags.append(tag)
            return super().__call__(*args, **kwargs)

    expected = model(**inputs).sample
    model.set_attn_processor(Tagged())
    assert torch.equal(model(**inputs, cross_attention_kwargs={"tag": 1}).sample, expected)
    assert tags == [1] * len(attentions(model))


def test_attention_goes_by_rows_and_columns():
    height, width, dim = 3, 5, 16
    emb = get_image_rotary_emb(dim, height, width, torch.device("cpu"), torch.float64)
    x = torch.randn(1, 1, 1, dim, dtype=torch.float64).expand(1, height * width, 1, dim)
    turned = rotate(x, emb)[0, :, 0]
    scores = (turned @ turned.T).reshape(height, width, height, width)
    torch.testing.assert_close(scores[0, 0, 1, 2], scores[1, 2, 2, 4])  # the same way down and to the right
    a, b, same = scores[0, 0, 1, 0], scores[0, 0, 0, 1], scores[0, 0, 0, 0]
    assert len({round(float(s), 6) for s in (a, b, same)}) == 3


@torch.no_grad()
def test_the_transformer_knows_where_its_tokens_are():
    block, order = make_core().transformer_blocks[0], torch.randperm(12)
    tokens, modulation, text = torch.randn(1, 12, 32), torch.randn(1, 6, 32), torch.randn(1, 3, TEXT_DIM)
    emb = get_image_rotary_emb(8, 3, 4, torch.device("cpu"), torch.float32)

    def call(x):
        return block(x, modulation, text, None, emb, None)

    assert not torch.allclose(call(tokens[:, order]), call(tokens)[:, order], atol=1e-3)
