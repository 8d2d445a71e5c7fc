# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Loading in eight bits by diffusers' `quantization_config`, with torchao; bitsandbytes needs a GPU."""

import pytest
import torch
import transformers
from diffusers import AutoModel, DiffusionPipeline, PipelineQuantizationConfig, TorchAoConfig
from peft import LoraConfig

from diffusers_greedy_grow import GreedyGrowPipeline, GrowableUNet2DConditionModel

from ..testing_utils import draw_one, make_core, make_grown, make_pipeline


torchao = pytest.importorskip("torchao.quantization")


@pytest.fixture
def folder(tmp_path):
    pipeline = make_pipeline(make_grown(make_core(hidden_size=64)))
    pipeline.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def eight_bits() -> TorchAoConfig:
    return TorchAoConfig(torchao.Int8WeightOnlyConfig(version=2))


def load(folder, dtype=torch.float32):
    return AutoModel.from_pretrained(str(folder), subfolder="unet", quantization_config=eight_bits(), dtype=dtype)


def quantized(model) -> set[str]:
    return {name for name, p in model.named_parameters() if type(p).__module__.startswith("torchao")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchao_quantization_inference(folder, dtype):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    expected = draw_one(pipeline)
    pipeline.unet = load(folder, dtype)
    assert {f"core.transformer_blocks.0.attn1.to_{x}.weight" for x in "qkv"} <= quantized(pipeline.unet)
    assert not [
        name for name in quantized(pipeline.unet) if any(kept in name for kept in pipeline.unet._keep_in_fp32_modules)
    ]
    error = (draw_one(pipeline) - expected).abs().mean()
    assert 0 < error < 0.03


def test_torchao_quantization_serialization(folder, tmp_path):
    model = load(folder)
    model.save_pretrained(tmp_path / "eight")
    weights = "diffusion_pytorch_model.safetensors"
    sizes = [(place / weights).stat().st_size for place in (tmp_path / "eight", folder / "unet")]
    assert sizes[0] < 0.8 * sizes[1]
    again = GrowableUNet2DConditionModel.from_pretrained(tmp_path / "eight", dtype=torch.float32)
    assert quantized(again) == quantized(model)
    pipeline = GreedyGrowPipeline.from_pretrained(folder, unet=model)
    expected = draw_one(pipeline)
    pipeline.unet = again
    assert torch.equal(draw_one(pipeline), expected)


def test_quantization_of_a_pipeline(folder):
    config = PipelineQuantizationConfig(quant_mapping={"unet": eight_bits()})
    pipeline = DiffusionPipeline.from_pretrained(folder, quantization_config=config)
    assert quantized(pipeline.unet) and draw_one(pipeline).isfinite().all()


def test_torchao_quantization_lora_inference(folder):
    model = load(folder)
    pipeline = GreedyGrowPipeline.from_pretrained(folder, unet=model)
    expected = draw_one(pipeline)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights=False))
    assert not torch.allclose(draw_one(pipeline), expected)
    pipeline.unload_lora_weights()
    assert torch.equal(draw_one(pipeline), expected)


def test_a_quantized_core_is_not_grown(folder):
    for core, arguments in ((load(folder), {}), (folder, {"quantization_config": eight_bits()})):
        with pytest.raises(ValueError, match="`core` cannot be grown: it is quantized, by a `quantization_config`"):
            GrowableUNet2DConditionModel.from_core(core, 64, block_out_channels=(8,), **arguments)
    by_hand = AutoModel.from_pretrained(str(folder), subfolder="unet")
    torchao.quantize_(by_hand, torchao.Int8WeightOnlyConfig(version=2))
    with pytest.raises(ValueError, match="`core` cannot be grown: it has weights of the type Int8Tensor"):
        GrowableUNet2DConditionModel.from_core(by_hand, 64, block_out_channels=(8,))
    config = PipelineQuantizationConfig(quant_mapping={"unet": eight_bits()})
    with pytest.raises(
        ValueError, match="`quantization_config` quantizes `unet`, which cannot be grown then: leave it out"
    ):
        GreedyGrowPipeline.from_core(folder, 64, block_out_channels=(8,), quantization_config=config)


def test_a_pipeline_is_grown_around_a_quantized_text_encoder(folder):
    """Which may be larger than the core."""
    encoder_bits = transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig(version=2))
    config = PipelineQuantizationConfig(quant_mapping={"text_encoder": encoder_bits})
    grown = GreedyGrowPipeline.from_core(folder, 64, block_out_channels=(8,), quantization_config=config)
    assert quantized(grown.text_encoder) and not quantized(grown.unet)
    assert draw_one(grown, height=64, width=64).isfinite().all()
