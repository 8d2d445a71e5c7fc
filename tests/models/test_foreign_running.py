# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Compiling, offloading, casting and quantizing models that are grown around cores of diffusers. Here all devices are the CPU."""

import re

import pytest
import torch
from accelerate.utils import compile_regions, compute_module_sizes
from diffusers import TorchAoConfig

from diffusers_greedy_grow import GrowableUNet2DConditionModel
from diffusers_greedy_grow.training.adapters import add_adapter
from diffusers_greedy_grow.training.arguments import LoraArguments

from ..testing_utils import randomize
from .test_foreign_cores import grow, make_foreign, make_states, make_texts


CPU = torch.device("cpu")


def make(family: str, **changes) -> tuple[GrowableUNet2DConditionModel, dict]:
    """A grown model in which everything has random weights, and inputs for it."""
    core, process = make_foreign(family, **changes)
    x, sigma, *_ = make_states(process)
    return randomize(grow(core, process), seed=1), {"sample": x, "timestep": 1000 * sigma, **make_texts(family)[0]}


@pytest.fixture(params=["unet", "if", "prx"])
def model_and_inputs(request):
    return make(request.param)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    """The mean error is below a share of the mean value."""
    assert actual.isfinite().all()
    assert (actual - expected).abs().mean() < bound * expected.abs().mean()


@torch.no_grad()
@pytest.mark.slow
def test_compile(model_and_inputs):
    model, inputs = model_and_inputs
    expected = model(**inputs).sample
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            torch.testing.assert_close(compiled(**inputs).sample, expected, atol=1e-3, rtol=1e-3)
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.slow
def test_compile_repeated_blocks(model_and_inputs):
    model, inputs = model_and_inputs
    expected = model(**inputs).sample
    torch.compiler.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    compiled = [module for module in model.core.modules() if module._compiled_call_impl]
    torch.testing.assert_close(model(**inputs).sample, expected, atol=1e-3, rtol=1e-3)
    assert len(compiled) >= 2  # all blocks, the largest part of a core
    torch.compiler.reset()


@torch.no_grad()
def test_accelerate_compiles_regions(model_and_inputs):
    """As `--compile blocks` does: what is not repeated is wrapped by itself."""
    model, inputs = model_and_inputs
    expected = model(**inputs).sample
    torch.compiler.reset()
    compiled = compile_regions(model, backend="eager", dynamic=False)
    assert torch.equal(compiled(**inputs).sample, expected)
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offloading(model_and_inputs, offload_type, tmp_path):
    model, inputs = model_and_inputs
    expected = model(**inputs).sample
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    model.enable_group_offload(CPU, offload_type=offload_type, offload_to_disk_path=str(tmp_path), **blocks)
    for _ in range(2):
        assert torch.equal(model(**inputs).sample, expected)
    if offload_type == "block_level":  # otherwise the whole core would be on the device at once
        blocks = model.core.blocks if hasattr(model.core, "blocks") else model.core.down_blocks
        for module in (*blocks, *model.stages):
            assert module._diffusers_hook.get_hook("group_offloading").group.modules == [module]


@torch.no_grad()
def test_device_maps(model_and_inputs, tmp_path):
    model, inputs = model_and_inputs
    expected = model(**inputs).sample
    model.save_pretrained(tmp_path / "model")
    whole = GrowableUNet2DConditionModel.from_pretrained(tmp_path / "model", device_map="auto")
    assert torch.equal(whole(**inputs).sample, expected)
    half = GrowableUNet2DConditionModel.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": compute_module_sizes(model)[""] // 2},
        offload_folder=tmp_path / "offload",
    )
    assert any(parameter.device.type == "meta" for parameter in half.parameters())
    assert torch.equal(half(**inputs).sample, expected)


@torch.no_grad()
@pytest.mark.parametrize("storage_dtype,bound", [(torch.bfloat16, 0.05), (torch.float8_e4m3fn, 0.3)])
def test_layerwise_casting(model_and_inputs, storage_dtype, bound):
    model, inputs = model_and_inputs
    expected = model(**inputs).sample
    model.enable_layerwise_casting(storage_dtype=storage_dtype, compute_dtype=torch.float32)
    assert any(parameter.dtype == storage_dtype for parameter in model.core.parameters())
    assert_close(model(**inputs).sample, expected, bound)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(model_and_inputs, dtype, tmp_path):
    model, inputs = model_and_inputs
    expected = model(**inputs).sample
    model.save_pretrained(tmp_path)
    loaded = GrowableUNet2DConditionModel.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.core.dtype == dtype
    assert_close(loaded(**inputs).sample, expected, 0.05)
    loaded.save_pretrained(tmp_path / "again")
    again = GrowableUNet2DConditionModel.from_pretrained(tmp_path / "again", dtype=dtype)
    assert torch.equal(again(**inputs).sample, loaded(**inputs).sample)
    assert_close(model.to(dtype)(**inputs).sample, expected, 0.05)  # the time embedding, too


def test_gradient_checkpointing(model_and_inputs):
    model, inputs = model_and_inputs
    model.train()

    def find_gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(**inputs).sample.square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    expected = find_gradients()
    model.enable_gradient_checkpointing()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.core.modules())
    gradients = find_gradients()
    assert len(gradients) == len(expected) > 10
    for gradient, value in zip(gradients, expected):
        torch.testing.assert_close(gradient, value, atol=1e-5, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_attention_backends(model_and_inputs, backend):
    model, inputs = model_and_inputs
    expected = model(**inputs).sample
    model.set_attention_backend(backend)
    torch.testing.assert_close(model(**inputs).sample, expected, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_eight_bits(tmp_path):
    """By torchao; bitsandbytes needs a GPU. Only linear layers that are wide enough are quantized."""
    torchao = pytest.importorskip("torchao.quantization")
    for family in ("unet with text, velocity", "prx"):
        model, inputs = make(family)
        expected = model(**inputs).sample
        model.save_pretrained(tmp_path / "model")
        config = TorchAoConfig(torchao.Int8WeightOnlyConfig(version=2))
        loaded = GrowableUNet2DConditionModel.from_pretrained(
            tmp_path / "model", quantization_config=config, dtype=torch.float32
        )
        quantized = {name for name, value in loaded.named_parameters() if type(value).__module__.startswith("torchao")}
        assert any(name.startswith("core.") for name in quantized), quantized
        assert_close(loaded(**inputs).sample, expected, 0.1)
        with pytest.raises(ValueError, match="it is quantized"):
            loaded.save_pretrained(tmp_path / "reference", core="reference")
        loaded.save_pretrained(tmp_path / "eight")
        again = GrowableUNet2DConditionModel.from_pretrained(tmp_path / "eight", dtype=torch.float32)
        assert torch.equal(again(**inputs).sample, loaded(**inputs).sample)


@pytest.mark.parametrize("family", ["unet with text, velocity", "if", "prx"])
def test_an_adapter_to_train_covers_the_attention_of_the_core(family):
    """Whatever its layers are called."""
    model, _ = make(family)
    attention = {
        f"core.{name}"
        for name, module in model.core.named_modules()
        if isinstance(module, torch.nn.Linear) and re.search(r"(attn\d|attention|attentions\.\d)\.\w+(\.0)?$", name)
    }
    add_adapter(model, LoraArguments(pretrained_model_name_or_path="model"))
    adapted = {name.split(".lora_A")[0] for name in model.state_dict() if ".lora_A." in name}
    assert len(attention) >= 5 and attention <= adapted
