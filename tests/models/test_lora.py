# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Adapters on the models, with the test names of diffusers' own suite."""

import json
import logging

import pytest
import safetensors.torch
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer

from diffusers_greedy_grow import GrowableUNet2DConditionModel

from ..testing_utils import make_core, make_grown, make_inputs


TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
FILE = "pytorch_lora_weights.safetensors"


def make_config(**kwargs) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": TARGETS, "init_lora_weights": False, **kwargs})


def has_lora(model) -> bool:
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


@pytest.fixture
def warnings(caplog):
    """The warnings of diffusers."""
    diffusers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING, "diffusers"):
        yield caplog
    diffusers_logging.disable_propagation()


@torch.no_grad()
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_save_load_lora_adapter(either, tmp_path, use_dora, low_cpu_mem_usage):
    model, inputs = either
    plain = model(**inputs).sample
    model.add_adapter(make_config(use_dora=use_dora))
    adapted = model(**inputs).sample
    assert not torch.allclose(adapted, plain, atol=1e-3)
    model.save_lora_adapter(tmp_path)
    model.unload_lora()
    assert not has_lora(model) and torch.equal(model(**inputs).sample, plain)
    model.load_lora_adapter(tmp_path, prefix=None, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(model(**inputs).sample, adapted)
    saved = safetensors.torch.load_file(tmp_path / FILE)
    loaded = get_peft_model_state_dict(model, adapter_name="default_0")
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_lora_wrong_adapter_name_raises_error(either, tmp_path):
    model, _ = either
    model.add_adapter(make_config())
    with pytest.raises(ValueError, match="Adapter name foo not found in the model"):
        model.save_lora_adapter(tmp_path, adapter_name="foo")


def test_lora_adapter_metadata_is_loaded_correctly(either, tmp_path):
    model, _ = either
    model.add_adapter(make_config(lora_alpha=7))
    saved = model.peft_config["default"].to_dict()
    model.save_lora_adapter(tmp_path)
    model.unload_lora()
    model.load_lora_adapter(tmp_path, prefix=None)
    assert model.peft_config["default_0"].to_dict() == saved


def test_lora_adapter_wrong_metadata_raises_error(either, tmp_path):
    model, _ = either
    model.add_adapter(make_config())
    model.save_lora_adapter(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / FILE)
    metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps({"r": 4, "target_modules": TARGETS, "foo": 1})}
    safetensors.torch.save_file(weights, tmp_path / FILE, metadata=metadata)
    model.unload_lora()
    with pytest.raises(TypeError, match="`LoraConfig` class could not be instantiated"):
        model.load_lora_adapter(tmp_path, prefix=None)


@torch.no_grad()
def test_lora_fuse_nan(either):
    model, _ = either
    model.add_adapter(make_config(), adapter_name="broken")
    next(module for module in model.modules() if hasattr(module, "lora_A")).lora_A["broken"].weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="broken"):
        model.fuse_lora(safe_fusing=True)


@torch.no_grad()
def test_lora_B_bias(core):
    inputs = make_inputs()
    plain = core(**inputs).sample
    torch.manual_seed(0)
    core.add_adapter(make_config(lora_bias=True, target_modules=["to_out.0"]), adapter_name="biased")
    biased = core(**inputs).sample
    for module in core.modules():
        if hasattr(module, "lora_B"):
            module.lora_B["biased"].bias.zero_()
    assert not torch.allclose(core(**inputs).sample, biased) and not torch.allclose(biased, plain)


@torch.no_grad()
def test_correct_lora_configs_with_different_ranks(either):
    model, inputs = either
    name = next(name for name, _ in model.named_modules() if name.endswith("attn1.to_k"))
    outputs = [model(**inputs).sample]
    for patterns in ({}, {"rank_pattern": {name: 8}}, {"alpha_pattern": {name: 8}}):
        torch.manual_seed(0)
        model.add_adapter(make_config(**patterns), adapter_name="adapter")
        layer = model.get_submodule(name)
        assert layer.r["adapter"] == patterns.get("rank_pattern", {}).get(name, 4)
        assert layer.lora_alpha["adapter"] == patterns.get("alpha_pattern", {}).get(name, 4)
        outputs.append(model(**inputs).sample)
        model.delete_adapters("adapter")
    for i, output in enumerate(outputs):
        assert not any(torch.allclose(output, other, atol=1e-4) for other in outputs[:i])


def test_missing_unexpected_and_no_keys_raise(either):
    """diffusers only warns, and loads the rest or nothing."""
    model, _ = either
    model.add_adapter(make_config())
    weights = get_peft_model_state_dict(model)
    model.unload_lora()
    names = list(weights)
    name = next(name for name in names if "lora_A" in name)
    for wrong, message in (
        ({key: value for key, value in weights.items() if key != name}, f"`{name}` is missing"),
        ({**weights, f"{name}.strange": torch.tensor(1.0)}, rf"not LoRA layers of a .*\['{name}.strange'\]"),
        ({"lora_foo": torch.tensor(2.0)}, r"not LoRA layers of a .*\['lora_foo'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model.load_lora_adapter(wrong, prefix=None)
        assert not has_lora(model)


@torch.no_grad()
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_lora_layerwise_casting_inference(either, compute_dtype):
    model, inputs = either
    model.to(compute_dtype).add_adapter(make_config())
    expected = model(**inputs).sample
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute_dtype)
    core = getattr(model, "core", model)
    layer = core.transformer_blocks[0].attn1.to_q
    assert layer.base_layer.weight.dtype == torch.float8_e4m3fn
    assert layer.lora_A["default"].weight.dtype == compute_dtype
    assert (model(**inputs).sample - expected).abs().mean() < 0.15 * expected.abs().mean()


@torch.no_grad()
def test_an_adapter_of_a_core_in_what_was_grown_from_it(tmp_path):
    """It loads without a pipeline, from a file with its configuration or from tensors."""
    core, inputs = make_core(), make_inputs()
    grown = GrowableUNet2DConditionModel.from_core(core, 32, block_out_channels=(8,))
    core.add_adapter(make_config(lora_alpha=7))
    core.save_lora_adapter(tmp_path)
    layers = safetensors.torch.load_file(tmp_path / FILE)
    grown.load_lora_adapter(tmp_path, prefix=None)
    assert torch.equal(grown.core(**inputs).sample, core(**inputs).sample)
    assert get_peft_model_state_dict(grown, adapter_name="default_0").keys() == {f"core.{name}" for name in layers}
    grown.save_lora_adapter(tmp_path / "grown", adapter_name="default_0")
    grown.load_lora_adapter({f"unet.{name}": value for name, value in layers.items()}, prefix="unet")
    # Layers with a grown model's names keep them.
    grown.load_lora_adapter(tmp_path / "grown", prefix=None)
    for name in ("default_1", "default_2"):
        loaded = get_peft_model_state_dict(grown, adapter_name=name)
        assert all(torch.equal(loaded[f"core.{layer}"], value) for layer, value in layers.items())
    assert [config.lora_alpha for config in grown.peft_config.values()] == [7, 4, 7]


def test_an_adapter_of_a_frozen_core_trains():
    grown, inputs = make_grown(), make_inputs(height=32, width=32)
    grown.freeze_core()
    grown.add_adapter(make_config())
    grown(**inputs).sample.square().mean().backward()
    gradients = {name: p.grad for name, p in grown.named_parameters() if "lora_" in name}
    assert any(name.startswith("core.") for name in gradients)
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())


# ----------------------------------------------------------------------------------------------------------------------
# Replacing an adapter in place


def save_adapter(folder, rank: int, targets: list[str], seed: int) -> torch.Tensor:
    """Save an adapter of the core, and return the core's velocity with it."""
    core = make_core()
    torch.manual_seed(seed)
    core.add_adapter(make_config(r=rank, lora_alpha=rank, target_modules=targets))
    core.save_lora_adapter(folder)
    with torch.no_grad():
        return core(**make_inputs()).sample


@torch.no_grad()
@pytest.mark.parametrize("targets", [["to_q", "to_k"], ["conv_out"], ["to_q", "conv_in"], ["to_q", "linear_1"]])
@pytest.mark.parametrize("ranks", [(5, 5), (3, 6), (6, 3)])
def test_hotswapping_model(tmp_path, ranks, targets):
    expected = [save_adapter(tmp_path / str(i), rank, targets, i) for i, rank in enumerate(ranks)]
    core, inputs = make_core(), make_inputs()
    core.enable_lora_hotswap(target_rank=max(ranks))
    core.load_lora_adapter(tmp_path / "0", prefix=None, adapter_name="adapter")
    torch.testing.assert_close(core(**inputs).sample, expected[0], atol=1e-5, rtol=1e-4)
    core.load_lora_adapter(tmp_path / "1", prefix=None, adapter_name="adapter", hotswap=True)
    torch.testing.assert_close(core(**inputs).sample, expected[1], atol=1e-5, rtol=1e-4)
    assert list(core.peft_config) == ["adapter"]


@torch.no_grad()
@pytest.mark.slow
def test_hotswapping_compiled_model_both_linear_and_conv2d(tmp_path):
    targets = ["to_q", "conv_in"]
    expected = [save_adapter(tmp_path / str(i), rank, targets, i) for i, rank in enumerate((3, 6))]
    core, inputs = make_core(), make_inputs()
    core.enable_lora_hotswap(target_rank=6)
    core.load_lora_adapter(tmp_path / "0", prefix=None, adapter_name="adapter")
    torch.compiler.reset()
    compiled = torch.compile(core, backend="aot_eager")  # C++ would take long to compile
    torch.testing.assert_close(compiled(**inputs).sample, expected[0], atol=1e-4, rtol=1e-3)
    core.load_lora_adapter(tmp_path / "1", prefix=None, adapter_name="adapter", hotswap=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(compiled(**inputs).sample, expected[1], atol=1e-4, rtol=1e-3)


def test_enable_lora_hotswap_called_after_adapter_added(core, warnings):
    core.add_adapter(make_config())
    with pytest.raises(RuntimeError, match="Call `enable_lora_hotswap` before loading the first adapter"):
        core.enable_lora_hotswap(target_rank=8)
    core.enable_lora_hotswap(target_rank=8, check_compiled="warn")
    assert "enable_lora_hotswap" in warnings.text
    warnings.clear()
    core.enable_lora_hotswap(target_rank=8, check_compiled="ignore")
    assert not warnings.text
    with pytest.raises(ValueError, match="check_compiles should be one of 'error', 'warn', or 'ignore', got 'wrong'"):
        core.enable_lora_hotswap(target_rank=8, check_compiled="wrong")


@torch.no_grad()
@pytest.mark.parametrize(
    "changes,message",
    [
        (
            {"target_modules": ["to_q", "to_k"]},
            r"the loaded one lacks \['transformer_blocks.0.attn1.to_k.lora_A.weight'",
        ),
        ({"use_dora": True}, "one of them is of DoRA"),
        ({"lora_bias": True}, r"the loaded one lacks \['transformer_blocks.0.attn1.to_q.lora_B.bias'"),
        ({"use_rslora": True}, "for use_rslora, False != True"),
        ({"alpha_pattern": {"to_q": 8}}, "for alpha_pattern"),
    ],
)
def test_an_adapter_that_cannot_be_hotswapped_leaves_the_loaded_one(tmp_path, changes, message):
    expected = save_adapter(tmp_path / "0", 4, ["to_q"], 0)
    other = make_core()
    other.add_adapter(make_config(**{"r": 4, "target_modules": ["to_q"], **changes}))
    other.save_lora_adapter(tmp_path / "1")
    core, inputs = make_core(), make_inputs()
    core.load_lora_adapter(tmp_path / "0", prefix=None, adapter_name="adapter")
    with pytest.raises(ValueError, match=f"`hotswap=True` cannot replace the adapter `adapter`: .*{message}"):
        core.load_lora_adapter(tmp_path / "1", prefix=None, adapter_name="adapter", hotswap=True)
    assert list(core.peft_config) == ["adapter"]
    torch.testing.assert_close(core(**inputs).sample, expected)
    core.fuse_lora()
    with pytest.raises(ValueError, match="the loaded one is fused into the weights: call `unfuse_lora` first"):
        core.load_lora_adapter(tmp_path / "0", prefix=None, adapter_name="adapter", hotswap=True)
    torch.testing.assert_close(core(**inputs).sample, expected, atol=1e-5, rtol=1e-4)
