# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

import copy
import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from diffusers_greedy_grow import GreedyGrowPipeline, GrowableUNet2DConditionModel
from diffusers_greedy_grow.flow import descend, enlarge, expand, pool, upsample
from diffusers_greedy_grow.models.core_loading import load_core
from diffusers_greedy_grow.models.text import TextCache, TextInputs
from diffusers_greedy_grow.training.objective import flow_loss
from diffusers_greedy_grow.training.text.captions import encode_captions, tokenize_captions
from diffusers_greedy_grow.training.trained_model import TrainedModel

from ..testing_utils import CAPTIONS, TEXT_DIM, make_core, make_grown, make_inputs, make_pipeline, randomize


def inner_answer(inner, inputs: dict, factor: int) -> torch.Tensor:
    """The clean image that an inner model predicts from the low-resolution state inside `inputs`."""
    state, sigma = descend(inputs["sample"], inputs["timestep"] / 1000, factor)
    return inner(**{**inputs, "sample": state, "timestep": 1000 * sigma}).pred_original_sample


def train(model, steps: int = 3, size: int = 32, lr: float = 1e-2):
    """Some steps of AdamW, with weight decay, over the parameters that the phase trains."""
    optimizer = torch.optim.AdamW(model.parameter_groups(lr), weight_decay=0.1)
    for step in range(steps):
        inputs = make_inputs(height=size, width=size, seed=step)
        noise, sigma = inputs.pop("sample"), inputs.pop("timestep") / 1000
        loss = flow_loss(model, noise.clamp(-1, 1).flip(0), noise, sigma, 2, **inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# ----------------------------------------------------------------------------------------------------------------------
# Parts of the model


@torch.no_grad()
def test_a_stage_hears_all_of_a_long_text_in_float16():
    """Its sum is too large for float16."""
    stage = make_grown().stages[0]
    text, mask = 600 * (1 + torch.rand(1, 128, TEXT_DIM)), torch.ones(1, 128, dtype=torch.bool)
    expected = stage.embed(torch.tensor([500.0]), TextInputs(text, mask).sum_tokens(), torch.float32)
    temb = stage.half().embed(torch.tensor([500.0]), TextInputs(text.half(), mask).sum_tokens(), torch.float16)
    assert temb.dtype == torch.float16
    torch.testing.assert_close(temb.float(), expected, atol=5e-3, rtol=5e-3)


@torch.no_grad()
def test_a_text_encoder_that_trains_says_what_it_says_in_the_pipeline():
    pipeline, inputs, device = make_pipeline(), make_inputs(batch_size=3), torch.device("cpu")
    state = inputs["sample"], inputs["timestep"]
    tokens = tokenize_captions(pipeline, CAPTIONS, device)
    embeddings = encode_captions(pipeline, pipeline.text_encoder, CAPTIONS, device)
    trained = TrainedModel(pipeline.unet, pipeline.text_encoder)(*state, **tokens).sample
    torch.testing.assert_close(trained, TrainedModel(pipeline.unet)(*state, **embeddings).sample)


@torch.no_grad()
def test_stages_can_be_left_out(core):
    inner = make_grown(core)
    grown = make_grown(inner, 64, block_out_channels=(8,))
    inputs = make_inputs(height=64, width=128)
    inner.core.load_state_dict(grown.core.state_dict())
    inner.stages[0].load_state_dict(grown.stages[0].state_dict())
    for num_stages, model, factor in ((0, grown.core, 4), (1, inner, 2)):
        output = grown(**inputs, num_stages=num_stages)
        expected = upsample(inner_answer(model, inputs, factor), factor)
        torch.testing.assert_close(output.pred_original_sample, expected, atol=1e-4, rtol=1e-4)
        sigma = expand(inputs["timestep"] / 1000, expected)
        torch.testing.assert_close(output.sample, (inputs["sample"] - expected) / sigma, atol=2e-3, rtol=1e-3)
    assert torch.equal(grown(**inputs, num_stages=2).sample, grown(**inputs).sample)
    for num_stages in (-1, 3):
        with pytest.raises(ValueError, match=f"`num_stages={num_stages}` must be from 0 to 2"):
            grown(**inputs, num_stages=num_stages)


@torch.no_grad()
@pytest.mark.parametrize("num_stages", [1, 0])
def test_guidance_at_the_core(num_stages):
    grown = make_grown()
    inputs = make_inputs(height=32, width=32)
    texts = make_inputs(seed=1)
    negative = {f"negative_{name}": texts[name] for name in ("encoder_hidden_states", "encoder_attention_mask")}
    seen = []

    def guide(pred, negative_pred):
        seen.append((pred, negative_pred))
        return pred + 2 * (pred - negative_pred)

    guided = grown(**inputs, num_stages=num_stages, **negative, guide=guide).pred_original_sample
    ((pred, negative_pred),) = seen
    assert pred.shape == (2, 3, 16, 16) and not torch.allclose(pred, negative_pred, atol=0.01)
    expected = guide(pred, negative_pred)
    if num_stages == 0:
        expected = upsample(expected, 2)
    else:  # the stage continues from the guided image, and from the core's features for the text
        text = TextInputs(inputs["encoder_hidden_states"], inputs["encoder_attention_mask"])
        sigma, features = inputs["timestep"] / 1000, grown(**inputs, num_stages=0).features
        expected, _ = grown.stages[0](
            inputs["sample"], sigma, text, text.sum_tokens(), torch.float32, expected, features
        )
    torch.testing.assert_close(guided, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_stage_sees_the_image_so_far():
    stage, inputs = make_grown().stages[0], make_inputs(height=32, width=32)
    text = TextInputs(inputs["encoder_hidden_states"], inputs["encoder_attention_mask"])
    details = []
    for image in (torch.zeros(2, 3, 16, 16), make_inputs(seed=1)["sample"]):
        state, features = (inputs["sample"], inputs["timestep"] / 1000), torch.zeros(2, 32, 4, 4)
        answer, _ = stage(*state, text, text.sum_tokens(), torch.float32, image, features)
        details.append(answer - enlarge(image, 2))
    assert (details[0] - details[1]).abs().mean() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("init", ["preserve", "random"])
@pytest.mark.parametrize("fused", [False, True])
def test_the_text_cache_saves_the_projections(fused, init):
    grown = make_grown(init=init)
    if fused:
        grown.fuse_qkv_projections()
    inputs = make_inputs(height=32, width=32)
    other_state = make_inputs(height=32, width=32, seed=1)["sample"]
    cache, calls = TextCache(), []
    attentions = [block.attn2 for block in grown.core.transformer_blocks] + [grown.stages[0].decoder.text_attn.attn]
    for layer in [attn.to_kv if fused else attn.to_k for attn in attentions] + [grown.stages[0].text_proj]:
        layer.register_forward_hook(lambda *args: calls.append(args))
    for i, sample in enumerate((inputs["sample"], other_state)):
        expected = grown(**{**inputs, "sample": sample}).sample
        calls.clear()
        torch.testing.assert_close(grown(**{**inputs, "sample": sample}, text_cache=cache).sample, expected)
        assert len(calls) == (len(attentions) + 1 if i == 0 else 0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_text_cache_is_not_used_in_training(core, checkpointing):
    inputs, cache = make_inputs(), TextCache()
    with torch.no_grad():
        core(**inputs, text_cache=cache)
    if checkpointing:
        core.enable_gradient_checkpointing()
    expected = core(**inputs).sample
    for text_cache in (cache, TextCache()):
        for _ in range(2):
            core.zero_grad()
            output = core(**inputs, text_cache=text_cache).sample
            output.square().mean().backward()
            assert torch.equal(output, expected)
            assert all(block.attn2.to_k.weight.grad is not None for block in core.transformer_blocks)


# ----------------------------------------------------------------------------------------------------------------------
# The function is preserved


@torch.no_grad()
@pytest.mark.parametrize("text_dim", [TEXT_DIM, None])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3)])
@pytest.mark.parametrize("factor,channels", [(2, (16,)), (2, (16, 24)), (4, (16, 24)), (8, (8, 16, 24))])
def test_growing_preserves_the_function(factor, channels, shape, text_dim):
    core = make_core(cross_attention_dim=text_dim)
    grown = GrowableUNet2DConditionModel.from_core(core, 16 * factor, block_out_channels=channels).eval()
    inputs = make_inputs(height=16 * factor * shape[0], width=16 * factor * shape[1], text_dim=text_dim)
    output, expected = grown(**inputs), inner_answer(core, inputs, factor)
    assert expected.std() > 0.05
    assert (pool(output.pred_original_sample, factor) - expected).abs().max() <= 1e-5
    assert (output.pred_original_sample - enlarge(expected, factor)).abs().max() <= 1e-5


@torch.no_grad()
def test_growing_twice_preserves_both_inner_answers():
    core = make_core(16)
    middle = make_grown(core, 64, block_out_channels=(12, 16))
    twice = GrowableUNet2DConditionModel.from_core(middle, 128, block_out_channels=(8,)).eval()
    assert twice.sample_sizes == (16, 64, 128)
    inputs = make_inputs(height=128, width=128)
    expected = inner_answer(middle, inputs, 2)
    assert (pool(twice(**inputs).pred_original_sample, 2) - expected).abs().max() <= 1e-5

    # Grown, and grown again, without training in between: the core answers through both stages.
    untrained = GrowableUNet2DConditionModel.from_core(core, 64, block_out_channels=(12, 16))
    untrained = GrowableUNet2DConditionModel.from_core(untrained, 128, block_out_channels=(8,)).eval()
    expected = inner_answer(core, inputs, 8)
    assert (pool(untrained(**inputs).pred_original_sample, 8) - expected).abs().max() <= 1e-5
    assert untrained.core.config.sample_size == 16


def test_the_grown_model_is_a_copy(core):
    before = copy.deepcopy(core.state_dict())
    grown = GrowableUNet2DConditionModel.from_core(core, 32, block_out_channels=(16,))
    train(grown)
    for name, value in core.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grown_model_has_the_cores_dtype(core, dtype):
    grown = GrowableUNet2DConditionModel.from_core(core.to(dtype), 32, block_out_channels=(16,))
    assert grown.dtype == dtype
    assert all(parameter.dtype == dtype for parameter in grown.parameters())


@pytest.mark.parametrize(
    "sample_size,entries,patch", [(64, 1, 8), (64, 2, 4), (64, 3, 2), (64, 4, 1), (32, 2, 2), (48, 2, 3)]
)
def test_the_entry_patch_follows_from_the_number_of_blocks(core, sample_size, entries, patch):
    grown = GrowableUNet2DConditionModel.from_core(core, sample_size, block_out_channels=(8,) * entries)
    assert grown.stages[0].encoder.conv_in.kernel_size == (patch, patch)
    assert len(grown.stages[0].encoder.down_blocks) == len(grown.stages[0].decoder.up_blocks) == entries


def test_layers_per_block(core):
    grown = GrowableUNet2DConditionModel.from_core(core, 32, block_out_channels=(16, 24), layers_per_block=2)
    assert [len(block["resnets"]) for block in grown.stages[0].encoder.down_blocks] == [2, 2]
    assert [len(block["resnets"]) for block in grown.stages[0].decoder.up_blocks] == [2, 2]


# ----------------------------------------------------------------------------------------------------------------------
# Phases


def test_the_detail_phase_leaves_the_inner_model_alone(core):
    grown = GrowableUNet2DConditionModel.from_core(core, 32, block_out_channels=(16, 24))
    grown.freeze_core()
    new = copy.deepcopy(grown.stages[0].state_dict())
    train(grown)
    for name, value in core.state_dict().items():
        assert torch.equal(grown.core.state_dict()[name], value), name
    changed = {name for name, value in grown.stages[0].state_dict().items() if not torch.equal(value, new[name])}
    assert changed == set(new)

    # Growing again: the stage that was outermost is now inside, and is left alone as well.
    again = GrowableUNet2DConditionModel.from_core(grown, 64, block_out_channels=(8,))
    again.freeze_core()
    train(again, size=64)
    for name, value in grown.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_the_inner_pass_of_the_detail_phase_has_no_graph(core):
    grown = make_grown(core)
    inside = []
    for module in grown.core.modules():
        module.register_forward_hook(lambda module, args, output: inside.append(output))
    inputs = make_inputs(height=32, width=32)

    grown.freeze_core()
    grown(**inputs).sample.square().mean().backward()
    tensors = [tensor for tensor in inside if isinstance(tensor, torch.Tensor)]
    assert len(tensors) > 20 and not any(tensor.requires_grad for tensor in tensors)
    trained = {name for name, parameter in grown.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in grown.named_parameters() if name.startswith("stages.0")}
    assert {"stages.0.text_proj.weight", "stages.0.decoder.text_attn.attn.to_k.weight"} <= trained

    inside.clear()
    grown.unfreeze_core()
    grown.zero_grad()
    grown(**inputs).sample.square().mean().backward()
    assert any(tensor.requires_grad for tensor in inside if isinstance(tensor, torch.Tensor))
    assert all(parameter.grad is not None for parameter in grown.parameters())


@torch.no_grad()
def test_the_stage_reads_the_text_itself(core):
    """Words for detail reach the stage that draws it, even if a frozen core ignores them."""
    grown = make_grown(core)
    inputs = make_inputs(height=32, width=32)
    before, expected = inner_answer(core, inputs, 2), grown(**inputs).pred_original_sample
    for name, parameter in grown.core.named_parameters():
        if "attn2.to_out" in name:
            parameter.zero_()  # the core now ignores the text
    deaf = grown(**inputs).pred_original_sample
    other = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].flip(0)}
    assert not torch.allclose(deaf, expected) and before.std() > 0
    assert not torch.allclose(grown(**other).pred_original_sample, deaf)
    grown.stages[0].text_proj.weight.zero_()
    one_way = grown(**inputs).pred_original_sample
    assert not torch.allclose(grown(**other).pred_original_sample, one_way)
    grown.stages[0].decoder.text_attn.attn.to_out[0].weight.zero_()
    torch.testing.assert_close(grown(**other).pred_original_sample, grown(**inputs).pred_original_sample)


@pytest.mark.slow
def test_the_detail_phase_needs_less_memory():
    code = """
import sys, torch
from diffusers_greedy_grow import GrowableUNet2DConditionModel, ShallowUNet2DModel
from tests.testing_utils import peak_memory
torch.manual_seed(0)
core = ShallowUNet2DModel(16, patch_size=1, hidden_size=64, num_layers=8, num_attention_heads=4,
                          cross_attention_dim=None)
model = GrowableUNet2DConditionModel.from_core(core, 32, block_out_channels=(8,))
model.freeze_core() if sys.argv[1] == "frozen" else model.unfreeze_core()
sample = torch.randn(32, 3, 32, 32)
before = peak_memory()
model(sample, 500).sample.square().mean().backward()
print(peak_memory() - before)
"""
    peak = {
        phase: int(subprocess.run([sys.executable, "-c", code, phase], check=True, capture_output=True).stdout)
        for phase in ("frozen", "unfrozen")
    }
    assert peak["frozen"] < 0.5 * peak["unfrozen"], peak


def test_after_the_joint_phase_the_core_still_answers_by_itself(core):
    """It has trained on pooled states only, and at its own resolution it is a whole model still. It can be frozen again."""
    grown = GrowableUNet2DConditionModel.from_core(core, 32, block_out_channels=(16, 24))
    grown.unfreeze_core()
    train(grown)
    inputs = make_inputs(height=32, width=32)
    with torch.no_grad():
        alone, before = inner_answer(grown.core, inputs, 2), inner_answer(core, inputs, 2)
        inside = grown(**inputs, num_stages=0).pred_original_sample
        assert not torch.allclose(alone, before)
        torch.testing.assert_close(pool(inside, 2), alone, atol=1e-5, rtol=1e-5)
        # Only the decoder adds to the core's image.
        torch.nn.init.zeros_(grown.stages[0].decoder.conv_out.weight)
        torch.nn.init.zeros_(grown.stages[0].decoder.conv_out.bias)
        torch.testing.assert_close(grown(**inputs).pred_original_sample, enlarge(alone, 2), atol=1e-5, rtol=1e-5)
    grown.freeze_core()
    trained = copy.deepcopy(grown.core.state_dict())
    train(grown)
    assert all(torch.equal(grown.core.state_dict()[name], value) for name, value in trained.items())


def test_parameter_groups(grown):
    total = grown.num_parameters()
    stage, core = grown.parameter_groups(1e-3, core_lr_scale=0.1)
    assert (stage["name"], stage["lr"]) == ("stage", 1e-3) and (core["name"], core["lr"]) == ("core", 1e-4)
    assert sum(p.numel() for p in core["params"]) == grown.core.num_parameters()
    assert sum(p.numel() for group in (stage, core) for p in group["params"]) == total
    torch.optim.AdamW([stage, core])

    fresh = GrowableUNet2DConditionModel.from_core(grown.core, 32, block_out_channels=(16,))
    fresh.freeze_core()
    (stage,) = fresh.parameter_groups(1e-3)
    assert all(p.requires_grad for p in stage["params"]) and not any(p.requires_grad for p in fresh.core.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# The paper's recipe


def test_random_growth_keeps_the_transformer_only(core):
    grown = make_grown(core, init="random")
    names = set(grown.core.state_dict())
    dropped = {name.split(".")[0] for name in core.state_dict()} - {name.split(".")[0] for name in names}
    assert dropped == {"conv_in", "resnet_in", "resnet_out", "conv_norm_out", "conv_out"}
    fresh = GrowableUNet2DConditionModel.from_core(core, 32, block_out_channels=(16, 24), init="random")
    for name in names:
        assert torch.equal(fresh.core.state_dict()[name], core.state_dict()[name]), name
    # Its encoder alone feeds the core, and its decoder alone draws.
    inputs = make_inputs(height=32, width=32)
    fresh.eval()
    with torch.no_grad():
        assert not fresh(**inputs).pred_original_sample.any()
        before = grown(**inputs).pred_original_sample
        grown.stages[0].conv_to_inner.weight.zero_()
        assert not torch.allclose(grown(**inputs).pred_original_sample, before)


def test_random_growth_sends_gradients_across_the_frozen_core(core):
    grown = make_grown(core, init="random")
    grown.freeze_core()
    before = copy.deepcopy(grown.core.state_dict())
    grown(**make_inputs(height=32, width=32)).sample.square().mean().backward()
    assert grown.stages[0].conv_to_inner.weight.grad.abs().sum() > 0
    assert not any(parameter.grad is not None for parameter in grown.core.parameters())
    train(grown)
    for name, value in before.items():
        assert torch.equal(grown.core.state_dict()[name], value)


@torch.no_grad()
def test_random_growth_has_no_core_that_draws(core):
    grown = make_grown(core, init="random")
    inputs = make_inputs(height=32, width=32)
    text = inputs["encoder_hidden_states"]
    for arguments in ({"num_stages": 0}, {"negative_encoder_hidden_states": text, "guide": torch.add}):
        with pytest.raises(ValueError, match="draws no images of its own"):
            grown(**inputs, **arguments)


@torch.no_grad()
def test_masks_must_fit(grown):
    inputs = make_inputs(height=32, width=32)
    text, mask = inputs["encoder_hidden_states"], inputs["encoder_attention_mask"]
    with pytest.raises(ValueError, match=r"`encoder_attention_mask` must be of shape \(2, 6\).*is \(2, 5\)"):
        grown(**{**inputs, "encoder_attention_mask": mask[:, :5]})
    with pytest.raises(ValueError, match="`negative_encoder_attention_mask` need each other"):
        grown(**inputs, negative_encoder_hidden_states=text, guide=lambda pred, negative_pred: pred)


def test_guidance_at_the_core_needs_text_and_a_guide(grown):
    inputs = make_inputs(height=32, width=32)
    for arguments in ({"negative_encoder_hidden_states": inputs["encoder_hidden_states"]}, {"guide": torch.add}):
        with pytest.raises(ValueError, match="need each other: pass both or neither"):
            grown(**inputs, **arguments)


@torch.no_grad()
def test_a_model_grown_at_random_grows_again(core):
    grown = make_grown(core, init="random")
    again = GrowableUNet2DConditionModel.from_core(grown, 64, block_out_channels=(8,)).eval()
    inputs = make_inputs(height=64, width=64)
    expected = inner_answer(grown, inputs, 2)
    assert (pool(again(**inputs).pred_original_sample, 2) - expected).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="`init='random'` keeps a transformer.*pass `init=\"preserve\"`"):
        GrowableUNet2DConditionModel.from_core(grown, 64, block_out_channels=(8,), init="random")


# ----------------------------------------------------------------------------------------------------------------------
# What to grow from


def test_a_core_with_an_adapter(core):
    core.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="style")
    with pytest.raises(ValueError, match=r"`core` has the adapters \['style'\].*`core.unload_lora\(\)`"):
        GrowableUNet2DConditionModel.from_core(core, 32, block_out_channels=(8,))
    core.unload_lora()
    GrowableUNet2DConditionModel.from_core(core, 32, block_out_channels=(8,))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["model", "grown model", "pipeline", "pipeline's unet"])
def test_growing_from_a_folder(core, grown, kind, tmp_path):
    expected_core, factor = (grown, 2) if kind == "grown model" else (core, 2)
    if kind.startswith("pipeline"):
        make_pipeline(core).save_pretrained(tmp_path)
    else:
        expected_core.save_pretrained(tmp_path)
    kwargs = {"subfolder": "unet"} if kind == "pipeline's unet" else {}
    size = expected_core.config.sample_size * factor
    model = GrowableUNet2DConditionModel.from_core(tmp_path, size, block_out_channels=(8,), **kwargs).eval()
    inputs = make_inputs(height=size, width=size)
    expected = inner_answer(expected_core, inputs, factor)
    assert (pool(model(**inputs).pred_original_sample, factor) - expected).abs().max() <= 1e-5


def test_growing_from_a_folder_in_another_dtype(core, tmp_path):
    core.save_pretrained(tmp_path)
    grown = GrowableUNet2DConditionModel.from_core(str(tmp_path), 32, block_out_channels=(8,), dtype=torch.bfloat16)
    assert grown.core.transformer_blocks[0].ff.net[2].weight.dtype == torch.bfloat16


def break_nothing_there(folder):
    for path in folder.iterdir():
        path.unlink()


def break_no_weights(folder):
    (folder / "diffusion_pytorch_model.safetensors").unlink()


def break_truncated_weights(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def break_truncated_header(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:5])


def break_missing_weight(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["transformer_blocks.1.attn2.to_k.weight"]
    save_file(weights, path, metadata={"format": "pt"})


def break_left_over_weight(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_layers": 1}))


def break_other_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))


def break_other_class(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "UNet2DConditionModel"}))


BREAKS = {name: value for name, value in globals().items() if name.startswith("break_")}


@pytest.mark.parametrize("name", BREAKS)
def test_a_damaged_core_is_refused(core, name, tmp_path):
    core.save_pretrained(tmp_path)
    load_core(tmp_path)
    BREAKS[name](tmp_path)
    with pytest.raises((OSError, ValueError), match=f"`core='{tmp_path}'`"):
        GrowableUNet2DConditionModel.from_core(tmp_path, 32, block_out_channels=(16,))


def test_a_compiled_core_is_grown(core):
    pipeline = make_pipeline(core)
    pipeline.unet = torch.compile(core)
    for grown in (
        GrowableUNet2DConditionModel.from_core(pipeline.unet, 32, block_out_channels=(8,)),
        GreedyGrowPipeline.from_core(pipeline, 32, block_out_channels=(8,)).unet,
    ):
        assert all(torch.equal(value, grown.core.state_dict()[name]) for name, value in core.state_dict().items())


def test_a_core_in_fewer_bits_or_on_the_disk_is_not_grown(core, tmp_path):
    core.save_pretrained(tmp_path)
    in_eight_bits, in_half, offloaded = load_core(tmp_path), load_core(tmp_path), load_core(tmp_path)
    in_eight_bits.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    # What would be grown from it could not run: its layers in half precision would not be cast any more.
    in_half.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    offloaded.enable_group_offload(
        torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path / "disk")
    )
    for changed, cause in (
        (in_eight_bits, "its weights are rounded to float8_e4m3fn, by `enable_layerwise_casting`"),
        (in_half, "its weights are rounded to bfloat16, by `enable_layerwise_casting`"),
        (load_core(tmp_path).to(torch.float8_e4m3fn), "it has weights in eight bits"),
        (offloaded, "its weights are on the disk, by group offloading with `offload_to_disk_path`"),
    ):
        with pytest.raises(
            ValueError, match=f"`core` cannot be grown: {cause}. Load the original without that, grow it"
        ):
            GrowableUNet2DConditionModel.from_core(changed, 32, block_out_channels=(16,))


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"sample_size": 40}, r"`sample_size=40` must be a larger multiple of the core's 16: 32, for example"),
        ({"sample_size": 16}, r"`sample_size=16` must be a larger multiple of the core's 16: 32, for example"),
        ({"sample_size": 8}, r"`sample_size=8`.*32, for example"),
        ({"block_out_channels": ()}, r"`block_out_channels=\(\)` must be a tuple of whole numbers"),
        ({"block_out_channels": (8,) * 4}, r"`block_out_channels=\(8, 8, 8, 8\)`.*between 1 and 3"),
        ({"block_out_channels": (8, 0)}, r"`block_out_channels=\(8, 0\)`.*from 1 to 65536"),
        ({"layers_per_block": 0}, r"`layers_per_block=0` must be a whole number from 1 to 64"),
        ({"init": "zero"}, r"`init='zero'` is unknown: pass \"preserve\" or \"random\""),
        ({"core": 3}, r"`core` must be a ShallowUNet2DModel, .* but is a int"),
        ({"core": "no/such folder"}, r"`core='no/such folder'` is not a model"),
    ],
)
def test_bad_arguments(core, arguments, message):
    arguments = {"core": core, "sample_size": 32, "block_out_channels": (16,), **arguments}
    with pytest.raises((ValueError, OSError), match=message):
        GrowableUNet2DConditionModel.from_core(**arguments)


def test_loading_arguments_need_something_to_load(core):
    for arguments, message in (
        (
            {"revision": "main"},
            r"\['revision'\] only apply when `core` is a path or repository, or with `push_to_hub=True`",
        ),
        ({"subfolder": "unet"}, r"\['subfolder'\] only apply when `core` is a path or repository"),
        ({"repo_id": "a/b", "private": True}, r"\['private', 'repo_id'\] only apply when `push_to_hub=True`"),
    ):
        with pytest.raises(TypeError, match=message):
            GrowableUNet2DConditionModel.from_core(core, 32, block_out_channels=(16,), **arguments)


@torch.no_grad()
def test_randomized_models_have_no_silent_layer():
    """The tests above need it: the stage of `make_grown` takes part in the prediction."""
    grown = randomize(make_grown())
    inputs = make_inputs(height=32, width=32)
    before = grown(**inputs).pred_original_sample
    sigma = expand(inputs["timestep"] / 1000, before)
    assert sigma.shape == (2, 1, 1, 1)
    grown.stages[0].decoder.conv_out.weight.zero_()
    assert not torch.allclose(grown(**inputs).pred_original_sample, before)
