# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""torch.compile and torch.export, with the test names of diffusers' own suite."""

from functools import partial

import pytest
import torch

from diffusers_greedy_grow.models.text import TextCache

from ..testing_utils import make_core, make_grown, make_inputs
from .conftest import make_model_and_inputs


# What is asked is whether the model is captured in one graph, and which shapes and arguments share it. The C++ that the default
# backend makes of a graph takes minutes to compile here.
BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["core", "preserve"])
def test_torch_compile_recompilation_and_graph_break(kind):
    model, inputs = make_model_and_inputs(kind)
    expected = model(**inputs).sample
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            torch.testing.assert_close(compiled(**inputs).sample, expected, atol=1e-4, rtol=1e-3)


def negative(inputs: dict) -> dict:
    """Text to steer away from, and guidance at the core."""
    texts = {f"negative_{name}": value for name, value in inputs.items() if name.startswith("encoder_")}
    return {**texts, "guide": lambda pred, negative_pred: negative_pred + 3 * (pred - negative_pred)}


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["sampling", "guided", "cached", "detail", "joint", "checkpointing"])
def test_the_whole_model_is_one_graph_without_breaks(phase):
    """Each break costs a GPU a return to Python, and forbids `fullgraph=True`, CUDA graphs and export."""
    model, inputs = make_grown(block_out_channels=(8,)), make_inputs(height=32, width=32)
    is_training = phase in ("detail", "joint", "checkpointing")
    if is_training:
        model.train()
        model.freeze_core() if phase == "detail" else model.unfreeze_core()
    if phase == "checkpointing":
        model.enable_gradient_checkpointing()
    if phase == "guided":
        inputs |= negative(inputs)
    if phase == "cached":
        inputs["text_cache"] = TextCache()
        with torch.no_grad():
            model(**inputs)
    with torch.set_grad_enabled(is_training):
        explained = torch._dynamo.explain(lambda: model(**inputs).pred_original_sample)()
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons


@torch.no_grad()
@pytest.mark.slow
def test_torch_compile_repeated_blocks(core):
    inputs = make_inputs()
    expected = core(**inputs).sample
    core.compile_repeated_blocks(fullgraph=True, backend=BACKEND)
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(2):
            torch.testing.assert_close(core(**inputs).sample, expected, atol=1e-4, rtol=1e-3)

    # As a pipeline calls it: two graphs for all blocks, one that projects the text and one that takes its projections.
    text_cache = TextCache()
    with torch._dynamo.config.patch(error_on_recompile=False):
        core(**inputs, text_cache=text_cache)
        core(**inputs, text_cache=text_cache)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            torch.testing.assert_close(core(**inputs, text_cache=text_cache).sample, expected, atol=1e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.slow
def test_torch_compile_repeated_blocks_of_a_grown_model():
    """One graph per kind of block. A stage's encoder and decoder are one block each: their parts differ in channels."""
    model, inputs = make_model_and_inputs("preserve")
    expected = model(**inputs).sample
    model.compile_repeated_blocks(fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(2):
            torch.testing.assert_close(model(**inputs).sample, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", ["core", "preserve"])
def test_compile_with_group_offloading(kind):
    model, inputs = make_model_and_inputs(kind)
    expected = model(**inputs).sample
    model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    model.compile(backend=BACKEND)
    for _ in range(2):
        torch.testing.assert_close(model(**inputs).sample, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("make,size", [(make_core, 16), (partial(make_grown, block_out_channels=(8,)), 32)])
@torch.fx.experimental._config.patch(use_duck_shape=False)
def test_compile_on_different_shapes(make, size):
    model = make()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=BACKEND)
    for height, width in ((size, size), (size, 2 * size), (2 * size, 2 * size)):
        inputs = make_inputs(height=height, width=width)
        with torch._dynamo.config.patch(error_on_recompile=True):
            output = compiled(**inputs).sample
        torch.testing.assert_close(output, model(**inputs).sample, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@torch.no_grad()
def test_compile_works_with_aot(tmp_path):
    model, inputs = make_grown(block_out_channels=(8,)), make_inputs(height=32, width=32)
    expected = model(**inputs).sample
    exported = torch.export.export(model, args=(), kwargs=inputs)
    path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(path, run_single_threaded=True)
    torch.testing.assert_close(loaded(**inputs).sample, expected, atol=1e-4, rtol=1e-3)
