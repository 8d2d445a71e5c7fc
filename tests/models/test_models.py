# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The behavior that diffusers expects of any model, for both classes, with the test names of diffusers' own suite where it has them."""

import inspect
import json
import logging
import subprocess
import sys

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils import constants
from diffusers.utils import logging as diffusers_logging

from diffusers_greedy_grow import GrowableUNet2DConditionModel, ShallowUNet2DModel
from diffusers_greedy_grow.flow import expand

from ..testing_utils import make_core, make_inputs
from .conftest import make_model


@torch.no_grad()
def test_output(model_and_inputs):
    model, inputs = model_and_inputs
    output = model(**inputs)
    sample, sigma = inputs["sample"], inputs["timestep"] / 1000
    assert isinstance(output, UNet2DConditionOutput)
    assert output.sample.shape == sample.shape and output.sample.dtype == sample.dtype
    clean = sample - expand(sigma, sample) * output.sample
    torch.testing.assert_close(output.pred_original_sample, clean, atol=1e-5, rtol=1e-4)
    (velocity,) = model(**inputs, return_dict=False)
    assert torch.equal(velocity, output.sample)
    assert output.sample.std() > 0.01


@torch.no_grad()
def test_outputs_equivalence(model_and_inputs):
    model, inputs = model_and_inputs
    (velocity,) = model(**inputs, return_dict=False)
    assert torch.equal(velocity, model(**inputs).to_tuple()[0])


@torch.no_grad()
def test_determinism(model_and_inputs):
    model, inputs = model_and_inputs
    assert torch.equal(model(**inputs).sample, model(**inputs).sample)


@torch.no_grad()
def test_from_save_pretrained(model_and_inputs, tmp_path):
    model, inputs = model_and_inputs
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert dict(loaded.state_dict()).keys() == dict(model.state_dict()).keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(loaded(**inputs).sample, model(**inputs).sample)
    assert not loaded.training


@torch.no_grad()
def test_from_save_pretrained_variant(either, tmp_path):
    model, inputs = either
    model.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "diffusion_pytorch_model.fp16.safetensors").exists()
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
        type(model).from_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, variant="fp16")
    assert torch.equal(loaded(**inputs).sample, model(**inputs).sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_from_save_pretrained_dtype(either, tmp_path, dtype):
    model, _ = either
    model.to(dtype).save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path, dtype=dtype).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_from_pretrained_dtype_alias(either, tmp_path, dtype):
    model, _ = either
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path, dtype=dtype).dtype == dtype


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_from_save_pretrained_dtype_inference(either, tmp_path, dtype):
    model, inputs = either
    expected = model(**inputs).sample
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    inputs |= {name: inputs[name].to(dtype) for name in ("sample", "encoder_hidden_states")}
    output = loaded(**inputs).sample
    assert output.dtype == dtype
    assert (output - expected).abs().mean() < 0.03 * expected.abs().mean()


def test_getattr_is_correct(either, caplog):
    model, _ = either
    model.dummy_attribute = 5
    model.register_to_config(test_attribute=6)
    diffusers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING, "diffusers.models.modeling_utils"):
            assert model.dummy_attribute == 5 and callable(model.save_pretrained)
    finally:
        diffusers_logging.disable_propagation()
    assert not caplog.text
    with pytest.warns(FutureWarning):
        assert model.test_attribute == 6
    with pytest.raises(AttributeError, match=f"'{type(model).__name__}' object has no attribute 'does_not_exist'"):
        _ = model.does_not_exist


def is_kept(name: str, model) -> bool:
    return any(part in model._keep_in_fp32_modules for part in name.split("."))


def test_keep_in_fp32_modules(either, tmp_path):
    model, _ = either
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float16)
    kept = {name: is_kept(name, model) for name, _ in loaded.named_parameters()}
    assert any(kept.values()) and not all(kept.values())
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (torch.float32 if kept[name] else torch.float16), name


def test_keep_in_fp32_modules_as_str(either, tmp_path, monkeypatch):
    model, _ = either
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(type(model), "_keep_in_fp32_modules", "scale_shift_table")
    for name, parameter in type(model).from_pretrained(tmp_path, dtype=torch.float16).named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith("scale_shift_table") else torch.float16), name


def test_keep_in_fp32_modules_layerwise_casting(either):
    model, _ = either
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert all(dtype == torch.float32 for name, dtype in dtypes.items() if is_kept(name, model))
    assert torch.float16 in dtypes.values()


def test_to_keep_in_fp32_modules_warns(either, caplog):
    model, _ = either
    diffusers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING, "diffusers.models.modeling_utils"):
            model.to(torch.float16)
    finally:
        diffusers_logging.disable_propagation()
    assert "that should be kept in float32" in caplog.text


@torch.no_grad()
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("parallel", [False, True])
def test_sharded_checkpoints(either, tmp_path, variant, parallel, monkeypatch):
    """Shards without and with a variant, loaded one by one and in parallel."""
    model, inputs = either
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    model.save_pretrained(tmp_path, max_shard_size=f"{size * 3 // 4 // 1024}KB", variant=variant)
    (index,) = tmp_path.glob("*.index*.json")
    shards = {*json.loads(index.read_text())["weight_map"].values()}
    assert shards == {path.name for path in tmp_path.glob("*.safetensors")} and len(shards) > 1
    monkeypatch.setattr(constants, "HF_ENABLE_PARALLEL_LOADING", parallel)
    loaded = type(model).from_pretrained(tmp_path, variant=variant)
    assert torch.equal(loaded(**inputs).sample, model(**inputs).sample)


def test_config_is_the_constructor(model_and_inputs):
    model, _ = model_and_inputs
    names = set(inspect.signature(type(model).__init__).parameters) - {"self"}
    assert {name for name in model.config if not name.startswith("_")} == names
    again = type(model).from_config(model.config)
    assert [(n, p.shape) for n, p in again.named_parameters()] == [(n, p.shape) for n, p in model.named_parameters()]


@pytest.mark.slow
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


def test_text_must_fit(core):
    inputs = make_inputs()
    with pytest.raises(ValueError, match=r"`encoder_hidden_states` must be of shape \(2, tokens, 32\) but is None"):
        core(inputs["sample"], 500)
    with pytest.raises(ValueError, match=r"must be of shape \(2, tokens, 32\) but is \(1, 6, 32\)"):
        core(inputs["sample"], 500, torch.randn(1, 6, 32))
    with pytest.raises(ValueError, match="`encoder_attention_mask` is of torch.float32, but must be bool"):
        core(inputs["sample"], 500, torch.randn(2, 6, 32), torch.zeros(2, 6))
    with pytest.raises(ValueError, match="`encoder_hidden_states`"):
        core(inputs["sample"], 500, torch.randn(2, 6, 16))
    with pytest.raises(ValueError, match="unconditional"):
        make_core(cross_attention_dim=None)(**inputs)


def test_constructor_says_what_does_not_fit():
    with pytest.raises(ValueError, match="`sample_size=30`.*32 would be"):
        ShallowUNet2DModel(sample_size=30, patch_size=4)
    with pytest.raises(ValueError, match="`out_channels=6` must be `in_channels=3`"):
        ShallowUNet2DModel(out_channels=6)
    with pytest.raises(ValueError, match="`out_channels=3` must be `in_channels=1`"):
        GrowableUNet2DConditionModel(in_channels=1)
    with pytest.raises(ValueError, match="`hidden_size=30`"):
        ShallowUNet2DModel(hidden_size=30, num_attention_heads=4)
    with pytest.raises(ValueError, match="one entry per growth stage"):
        GrowableUNet2DConditionModel(inner_sample_sizes=(16, 32))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["core", "preserve", "random"])
def test_bfloat16(kind, tmp_path):
    model, size = make_model(kind)
    inputs = make_inputs(height=size, width=size)
    inputs["timestep"] = torch.tensor([500.0, 900.0])
    expected = model(**inputs).sample
    model.save_pretrained(tmp_path)

    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
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


@torch.no_grad()
def test_the_function_of_given_weights_stays():
    """Published checkpoints must keep their function: weights by a formula, and the outputs of the first version."""
    core = make_core(16, cross_attention_dim=8)
    grown = GrowableUNet2DConditionModel.from_core(core, 32, block_out_channels=(16, 24)).eval()
    for i, parameter in enumerate(grown.parameters()):
        wave = torch.sin(1.3 * (i + 2) * torch.arange(parameter.numel(), dtype=torch.float64) + i)
        scale = 0.1 if parameter.ndim == 1 else 0.8 / max(1, parameter[0].numel()) ** 0.5
        parameter.copy_((float(parameter.ndim == 1) + 1.7 * scale * wave).reshape(parameter.shape))
    places = torch.arange(3 * 32 * 64, dtype=torch.float64)
    sample = torch.sin(0.37 * places * (1 + places / 999)).float().reshape(1, 3, 32, 64)
    text, mask = torch.cos(torch.arange(5 * 8.0)).reshape(1, 5, 8), torch.tensor([[True] * 4 + [False]])
    output = grown(sample, 640.0, text, mask)
    image = output.pred_original_sample
    values = torch.stack(
        [
            image[0, 0, 0, 0],
            image[0, 1, 13, 40],
            image[0, 2, 31, 63],
            image[0, 0, 20, 7],
            image.std(),
            output.features.std(),
        ]
    )
    expected = torch.tensor([1.427956, 1.560161, 2.397885, 2.282439, 0.843737, 1.944492])
    torch.testing.assert_close(values, expected, atol=1e-4, rtol=1e-4)
