# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
Less memory: offloading, layerwise casting and device maps, with the test names of diffusers' own suite, which runs them on
GPUs. Here both devices are the CPU. Weights that a group does not read back from the disk in time are garbage here, too.
"""

import pytest
import torch
from accelerate.utils import compute_module_sizes, send_to_device
from peft import LoraConfig

from diffusers_greedy_grow.models.text import TextCache, TextInputs

from ..testing_utils import make_grown
from .conftest import KINDS, make_model_and_inputs


CPU = torch.device("cpu")


@torch.no_grad()
@pytest.mark.parametrize("arguments", [
    {"offload_type": "block_level", "num_blocks_per_group": 1},
    {"offload_type": "block_level", "num_blocks_per_group": 2, "non_blocking": True},
    {"offload_type": "leaf_level"},
])  # fmt: skip
def test_group_offloading(model_and_inputs, arguments):
    model, inputs = model_and_inputs
    expected = model(**inputs).sample
    model.enable_group_offload(CPU, **arguments)
    assert any(hasattr(module, "_diffusers_hook") for module in model.modules())
    for _ in range(2):
        assert torch.equal(model(**inputs).sample, expected)


@torch.no_grad()
@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offloading_with_disk(model_and_inputs, offload_type, tmp_path):
    """Weights that are not read back before they are used change the result."""
    model, inputs = model_and_inputs
    expected = model(**inputs).sample
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    model.enable_group_offload(CPU, offload_type=offload_type, offload_to_disk_path=str(tmp_path), **blocks)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for _ in range(2):
        assert torch.equal(model(**inputs).sample, expected)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_weights_on_the_disk_are_not_saved(offload_type, tmp_path):
    """The memory of a group holds no weights between two calls: diffusers would save whatever is there."""
    model = make_grown()
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "adapter")
    model.enable_group_offload(CPU, offload_type=offload_type, offload_to_disk_path=str(tmp_path / "disk"), **blocks)
    message = "`GrowableUNet2DConditionModel` cannot be saved: its weights are on the disk, by group offloading with `offload_to"
    with pytest.raises(ValueError, match=message):
        model.save_lora_adapter(tmp_path / "adapter", adapter_name="adapter")
    model.delete_adapters("adapter")
    for save in (model.save_pretrained, lambda folder: model.push_to_hub("owner/offloaded")):
        with pytest.raises(ValueError, match=message):
            save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists() and not (tmp_path / "adapter").exists()


def test_hooks_move_a_stages_text_but_not_its_cache():
    """Device maps and offloading move the arguments of each module like this."""
    text = TextInputs(torch.randn(1, 3, 4), torch.ones(1, 3, dtype=torch.bool), {"bias": torch.ones(1)}, TextCache())
    (moved,) = send_to_device((text,), "meta", non_blocking=True)
    tensors = moved.encoder_hidden_states, moved.encoder_attention_mask, moved.cross_attention_kwargs["bias"]
    assert all(tensor.device.type == "meta" for tensor in tensors) and moved.cache is text.cache
    assert text.encoder_hidden_states.device == text.cross_attention_kwargs["bias"].device == CPU
    empty = send_to_device(TextInputs(), "meta")
    assert empty == TextInputs()


def test_every_block_is_a_group_of_its_own():
    """So are the core's blocks inside a grown model: otherwise the whole core would be on the device at once."""
    model, _ = make_model_and_inputs("grown twice")
    model.enable_group_offload(CPU, offload_type="block_level", num_blocks_per_group=1)
    for module in (*model.core.transformer_blocks, *model.stages):
        group = module._diffusers_hook.get_hook("group_offloading").group
        assert group.modules == [module]


@torch.no_grad()
@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offloading_with_layerwise_casting(either, offload_type):
    model, inputs = either
    expected = model(**inputs).sample
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    model.enable_group_offload(CPU, offload_type=offload_type, **blocks)
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    assert (model(**inputs).sample - expected).abs().mean() < 0.01 * expected.abs().mean()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_cpu_offload(kind, tmp_path):
    """A device map over one device, as `device_map="auto"` gives it if everything fits there."""
    model, inputs = make_model_and_inputs(kind)
    model.save_pretrained(tmp_path)
    for device_map in ("auto", {"": "cpu"}):
        loaded = type(model).from_pretrained(tmp_path, device_map=device_map)
        assert set(map(str, loaded.hf_device_map.values())) == {"cpu"}
        assert torch.equal(loaded(**inputs).sample, model(**inputs).sample)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_disk_offload_with_safetensors(kind, tmp_path):
    model, inputs = make_model_and_inputs(kind)
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(
        tmp_path / "model",
        device_map="auto",
        # With half of it, accelerate before 1.15 would put all parts of one kind on the disk, and refuse that.
        max_memory={"cpu": compute_module_sizes(model)[""] * 3 // 4},
        offload_folder=tmp_path / "offload",
    )
    assert "disk" in loaded.hf_device_map.values()
    assert any(parameter.device.type == "meta" for parameter in loaded.parameters())
    assert torch.equal(loaded(**inputs).sample, model(**inputs).sample)
    with pytest.raises(
        ValueError, match="cannot be saved: it has weights on the disk or the meta device, by a `device_map`"
    ):
        loaded.save_pretrained(tmp_path / "saved")


@torch.no_grad()
def test_layerwise_casting_memory(either):
    def footprint(storage_dtype, compute_dtype) -> int:
        model = type(either[0]).from_config(either[0].config).to(compute_dtype)
        model.enable_layerwise_casting(storage_dtype=storage_dtype, compute_dtype=compute_dtype)
        assert model(**either[1]).sample.isfinite().all()
        return model.get_memory_footprint()

    full = footprint(torch.float32, torch.float32)
    assert footprint(torch.float8_e4m3fn, torch.bfloat16) < footprint(torch.float8_e4m3fn, torch.float32) < full


@torch.no_grad()
@pytest.mark.parametrize("storage_dtype,bound", [(torch.bfloat16, 0.02), (torch.float8_e4m3fn, 0.1)])
def test_layerwise_casting_inference(model_and_inputs, storage_dtype, bound):
    model, inputs = model_and_inputs
    expected = model(**inputs).sample
    model.enable_layerwise_casting(storage_dtype=storage_dtype, compute_dtype=torch.float32)
    core = getattr(model, "core", model)
    assert core.transformer_blocks[0].attn1.to_q.weight.dtype == storage_dtype
    assert (model(**inputs).sample - expected).abs().mean() < bound * expected.abs().mean()


@pytest.mark.parametrize("storage_dtype", [torch.float16, torch.float8_e4m3fn])
def test_layerwise_casting_saving(either, storage_dtype, tmp_path):
    """diffusers would write the rounded weights of its own models, without a word."""
    model, _ = either
    model.enable_layerwise_casting(storage_dtype=storage_dtype, compute_dtype=torch.float32)
    dtype = str(storage_dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"its weights are rounded to {dtype}, by .* Load it again, save it"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@torch.no_grad()
def test_layerwise_casting_that_rounds_nothing(tmp_path):
    model, inputs = make_model_and_inputs("core")
    model.enable_layerwise_casting(storage_dtype=torch.float32, compute_dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path)(**inputs).sample, model(**inputs).sample)


@pytest.mark.parametrize("storage_dtype", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_layerwise_casting_training(either, storage_dtype):
    model, inputs = either
    model.train()
    model.enable_layerwise_casting(storage_dtype=storage_dtype, compute_dtype=torch.float32)
    with torch.autocast("cpu"):
        loss = model(**inputs).sample.square().mean()
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
