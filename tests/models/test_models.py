# Copyright 2026 The diffusers-greedy-grow authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

import inspect
import subprocess
import sys

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from diffusers_greedy_grow import GrowableUNet2DConditionModel, ShallowUNet2DModel
from diffusers_greedy_grow.flow import SIGMA_MIN, expand
from diffusers_greedy_grow.models.blocks import TextCache

from ..testing_utils import TEXT_DIM, make_core, make_grown, make_inputs


def make_model(kind: str):
    """A model of each kind, with the resolution of its inputs."""
    if kind == "core":
        return make_core(), 16
    if kind == "unconditional":
        return make_grown(make_core(cross_attention_dim=None)), 32
    if kind == "grown twice":
        return make_grown(make_grown(), 64, block_out_channels=(12,)), 64
    return make_grown(init=kind), 32


KINDS = ["core", "preserve", "random", "grown twice", "unconditional"]


@pytest.fixture(params=KINDS)
def model_and_inputs(request):
    model, size = make_model(request.param)
    return model, make_inputs(height=size, width=size, text_dim=None if request.param == "unconditional" else TEXT_DIM)


@torch.no_grad()
def test_output(model_and_inputs):
    model, inputs = model_and_inputs
    output = model(**inputs)
    sample, sigma = inputs["sample"], inputs["timestep"] / 1000
    assert isinstance(output, UNet2DConditionOutput)
    assert output.sample.shape == sample.shape and output.sample.dtype == sample.dtype
    clean = sample - expand(sigma, sample).clamp(min=SIGMA_MIN) * output.sample
    torch.testing.assert_close(output.pred_original_sample, clean, atol=1e-5, rtol=1e-4)
    (velocity,) = model(**inputs, return_dict=False)
    assert torch.equal(velocity, output.sample)
    assert output.sample.std() > 0.01


@torch.no_grad()
def test_save_and_load_bit_for_bit(model_and_inputs, tmp_path):
    model, inputs = model_and_inputs
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert dict(loaded.state_dict()).keys() == dict(model.state_dict()).keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(loaded(**inputs).sample, model(**inputs).sample)
    assert not loaded.training


def test_config_is_the_constructor(model_and_inputs):
    model, _ = model_and_inputs
    names = set(inspect.signature(type(model).__init__).parameters) - {"self"}
    assert {name for name in model.config if not name.startswith("_")} == names
    again = type(model).from_config(model.config)
    assert [(n, p.shape) for n, p in again.named_parameters()] == [(n, p.shape) for n, p in model.named_parameters()]


def test_a_new_process_computes_the_same(grown, tmp_path):
    inputs = make_inputs(height=32, width=32)
    with torch.no_grad():
        expected = grown(**inputs).sample
    grown.save_pretrained(tmp_path / "model")
    torch.save(inputs, tmp_path / "inputs.pt")
    code = (
        "import sys, torch, diffusers, diffusers_greedy_grow\n"
        "model = diffusers.AutoModel.from_pretrained(sys.argv[1] + '/model')\n"
        "with torch.no_grad(): output = model(**torch.load(sys.argv[1] + '/inputs.pt')).sample\n"
        "torch.save(output, sys.argv[1] + '/output.pt')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert torch.equal(torch.load(tmp_path / "output.pt"), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind,height,width", [("core", 24, 8), ("preserve", 64, 48), ("random", 48, 32)])
def test_other_sizes(kind, height, width):
    model, _ = make_model(kind)
    assert model(**make_inputs(height=height, width=width)).sample.shape == (2, 3, height, width)
    with pytest.raises(ValueError, match="multiples of"):
        model(**make_inputs(height=height + 2, width=width))


@torch.no_grad()
def test_timesteps_in_any_form(core):
    inputs = make_inputs()
    inputs["timestep"] = torch.tensor([500.0, 500.0])
    expected = core(**inputs).sample
    for timestep in (500, 500.0, torch.tensor(500), torch.tensor([500.0])):
        torch.testing.assert_close(core(**{**inputs, "timestep": timestep}).sample, expected)
    assert not torch.allclose(
        core(**{**inputs, "timestep": 400}).pred_original_sample, core(**inputs).pred_original_sample
    )


@torch.no_grad()
def test_masked_tokens_do_not_count(grown):
    inputs = make_inputs(height=32, width=32)
    expected = grown(**inputs).sample
    changed = inputs["encoder_hidden_states"].clone()
    changed[0, 4:] = 100.0
    torch.testing.assert_close(grown(**{**inputs, "encoder_hidden_states": changed}).sample, expected)
    changed[0, 3] += 1.0
    assert not torch.allclose(grown(**{**inputs, "encoder_hidden_states": changed}).sample[0], expected[0])


def test_text_has_to_fit(core):
    inputs = make_inputs()
    with pytest.raises(ValueError, match=r"`encoder_hidden_states` has to be of shape \(batch, tokens, 32\)"):
        core(inputs["sample"], 500)
    with pytest.raises(ValueError, match="`encoder_hidden_states`"):
        core(inputs["sample"], 500, torch.randn(2, 6, 16))
    with pytest.raises(ValueError, match="unconditional"):
        make_core(cross_attention_dim=None)(**inputs)


def test_constructor_says_what_does_not_fit():
    with pytest.raises(ValueError, match="`sample_size=30`.*32 would be"):
        ShallowUNet2DModel(sample_size=30, patch_size=4)
    with pytest.raises(ValueError, match="`hidden_size=30`"):
        ShallowUNet2DModel(hidden_size=30, num_attention_heads=4)
    with pytest.raises(ValueError, match="one entry per growth stage"):
        GrowableUNet2DConditionModel(inner_sample_sizes=(16, 32))


@pytest.mark.parametrize("kind", ["core", "preserve", "random", "grown twice"])
def test_gradient_checkpointing_changes_no_gradient(kind):
    model, size = make_model(kind)
    inputs = make_inputs(height=size, width=size)

    def gradients():
        model.zero_grad()
        model(**inputs).sample.square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain = gradients()
    calls = []
    model.enable_gradient_checkpointing()
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            function = module._gradient_checkpointing_func
            module._gradient_checkpointing_func = lambda *args, f=function: (calls.append(args[0]), f(*args))[1]
    checkpointed = gradients()
    assert len(calls) >= 2
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["core", "preserve", "random"])
def test_bfloat16(kind, tmp_path):
    model, size = make_model(kind)
    inputs = make_inputs(height=size, width=size)
    inputs["timestep"] = torch.tensor([500.0, 900.0])
    expected = model(**inputs).sample
    model.save_pretrained(tmp_path)

    loaded = type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    kept = {name for name, parameter in loaded.named_parameters() if parameter.dtype == torch.float32}
    assert any("time_embedding" in name for name in kept) and any("scale_shift_table" in name for name in kept)
    assert all(any(part in name for part in model._keep_in_fp32_modules) for name in kept)
    assert loaded.dtype == torch.bfloat16

    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(**inputs).sample
    cast = type(model).from_pretrained(tmp_path).to(torch.bfloat16)
    for output in (loaded(**inputs).sample, cast(**inputs).sample, autocast):
        assert output.dtype == torch.float32
        assert (output - expected).abs().mean() < 0.02 * expected.abs().mean()


@pytest.mark.parametrize("kind", ["core", "preserve"])
def test_compile_without_graph_breaks(kind):
    model, size = make_model(kind)
    inputs = make_inputs(height=size, width=size)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).sample, model(**inputs).sample, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_compile_repeated_blocks(core):
    inputs = make_inputs()
    expected = core(**inputs).sample
    torch._dynamo.reset()
    core.compile_repeated_blocks(fullgraph=True)
    torch.testing.assert_close(core(**inputs).sample, expected, atol=1e-4, rtol=1e-3)

    # As a pipeline calls it: two graphs, one that projects the text and one that is given it, whichever the block.
    text_cache = TextCache()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=False):
        core(**inputs, text_cache=text_cache)
        core(**inputs, text_cache=text_cache)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            torch.testing.assert_close(core(**inputs, text_cache=text_cache).sample, expected, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_attention_is_diffusers(grown):
    inputs = make_inputs(height=32, width=32)
    expected = grown(**inputs).sample
    assert len(grown.attn_processors) == 4  # self and cross in each of two blocks
    for name, module in grown.named_modules():
        if name.endswith(("attn1", "attn2")):
            assert {"to_q", "to_k", "to_v", "to_out"} <= set(dict(module.named_children()))
    grown.set_attention_backend("native")
    torch.testing.assert_close(grown(**inputs).sample, expected)
    grown.fuse_qkv_projections()
    assert hasattr(grown.core.transformer_blocks[0].attn1, "to_qkv")
    assert hasattr(grown.core.transformer_blocks[0].attn2, "to_kv")
    torch.testing.assert_close(grown(**inputs).sample, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_layerwise_casting(grown):
    inputs = make_inputs(height=32, width=32)
    expected = grown(**inputs).sample
    grown.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert grown.core.transformer_blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert (grown(**inputs).sample - expected).abs().mean() < 0.02 * expected.abs().mean()
