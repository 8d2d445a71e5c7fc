# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""LoRA adapters of the pipeline, with PEFT, and a core's adapters in a model grown from it."""

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from diffusers_greedy_grow import GreedyGrowPipeline, GrowableUNet2DConditionModel

from ..testing_utils import draw_one, make_core, make_grown, make_pipeline


LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]


def save_adapter(model, folder, seed: int = 0, rank: int = 2, alpha: int = 4):
    """Save an adapter with random weights and its configuration, as a training script does; the model has none afterwards."""
    model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=LAYERS))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    layers = get_peft_model_state_dict(model)
    GreedyGrowPipeline.save_lora_weights(folder, layers, **_collate_lora_metadata({"unet": model}))
    model.unload_lora()
    return folder


def test_load_weigh_fuse_unfuse_and_unload(made, tmp_path):
    plain, state = draw_one(made), {name: value.clone() for name, value in made.unet.state_dict().items()}
    first = save_adapter(made.unet, tmp_path / "first")
    second = save_adapter(made.unet, tmp_path / "second", seed=1, rank=3)
    made.load_lora_weights(first, adapter_name="first")
    with_first = draw_one(made)
    assert not torch.allclose(with_first, plain, atol=1e-3)
    made.load_lora_weights(second, adapter_name="second")
    assert made.get_list_adapters() == {"unet": ["first", "second"]}
    made.set_adapters(["first", "second"], [1.0, 0.5])
    both = draw_one(made)
    assert not torch.allclose(both, with_first, atol=1e-3)
    made.set_adapters(["first", "second"], [1.0, 0.0])
    torch.testing.assert_close(draw_one(made), with_first, atol=1e-4, rtol=1e-4)
    made.set_adapters(["first", "second"], [1.0, 0.5])
    half = draw_one(made, cross_attention_kwargs={"scale": 0.5})
    made.set_adapters(["first", "second"], [0.5, 0.25])
    torch.testing.assert_close(draw_one(made), half, atol=1e-4, rtol=1e-4)
    made.set_adapters(["first", "second"], [1.0, 0.5])
    made.fuse_lora(adapter_names=["first", "second"])
    torch.testing.assert_close(draw_one(made), both, atol=1e-3, rtol=1e-3)
    made.unfuse_lora()
    torch.testing.assert_close(draw_one(made), both, atol=1e-3, rtol=1e-3)
    made.disable_lora()
    torch.testing.assert_close(draw_one(made), plain, atol=1e-3, rtol=1e-3)
    made.enable_lora()
    made.delete_adapters("second")
    assert made.get_active_adapters() == ["first"]
    made.unload_lora_weights()
    again = made.unet.state_dict()
    assert again.keys() == state.keys()

    # Without fusing, the base weights stay the same bit for bit.
    made.unet.load_state_dict(state)
    made.load_lora_weights(first)
    made.unload_lora_weights()
    assert torch.equal(draw_one(made), plain)
    assert all(torch.equal(value, state[name]) for name, value in made.unet.state_dict().items())


def test_alpha_and_ranks_survive_saving(made, tmp_path):
    save_adapter(made.unet, tmp_path, rank=2, alpha=8)
    made.load_lora_weights(tmp_path, adapter_name="style")
    config = made.unet.peft_config["style"]
    assert (config.r, config.lora_alpha) == (2, 8)
    weights, metadata = made.lora_state_dict(tmp_path, return_lora_metadata=True)
    assert all(name.startswith("unet.") for name in weights) and metadata["unet.lora_alpha"] == 8


def test_wrong_adapter_name_raises_error(made, tmp_path):
    made.load_lora_weights(save_adapter(made.unet, tmp_path), adapter_name="style")
    with pytest.raises(ValueError, match="not in the list of present adapters"):
        made.set_adapters("other")
    with pytest.raises(ValueError, match="not in the list of present adapters"):
        made.set_adapters(["style", "other"])
    made.set_adapters("style")
    assert made.get_active_adapters() == ["style"]


@pytest.mark.parametrize("lora_scale", [1.0, 0.8])
def test_lora_scale_kwargs_match_fusion(made, tmp_path, lora_scale):
    """The scale of a call, of an adapter and of fusing mean the same."""
    made.load_lora_weights(save_adapter(made.unet, tmp_path), adapter_name="style")
    by_call = draw_one(made, cross_attention_kwargs={"scale": lora_scale})
    made.set_adapters("style", lora_scale)
    torch.testing.assert_close(draw_one(made), by_call, atol=1e-4, rtol=1e-4)
    made.set_adapters("style", 1.0)
    made.fuse_lora(lora_scale=lora_scale)
    torch.testing.assert_close(draw_one(made), by_call, atol=1e-3, rtol=1e-3)


def test_low_cpu_mem_usage_with_loading(made, tmp_path):
    save_adapter(made.unet, tmp_path)
    made.load_lora_weights(tmp_path)
    expected = draw_one(made)
    made.unload_lora_weights()
    made.load_lora_weights(tmp_path, low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in made.unet.parameters())
    assert torch.equal(draw_one(made), expected)


def test_inference_load_delete_load_adapters(made, tmp_path):
    plain = draw_one(made)
    save_adapter(made.unet, tmp_path)
    for _ in range(2):
        made.load_lora_weights(tmp_path, adapter_name="style")
        assert not torch.allclose(draw_one(made), plain, atol=1e-3)
        made.delete_adapters("style")
        torch.testing.assert_close(draw_one(made), plain)


def test_lora_unload_add_adapter(made, tmp_path):
    made.load_lora_weights(save_adapter(made.unet, tmp_path))
    made.unload_lora_weights()
    made.unet.add_adapter(LoraConfig(r=2, target_modules=LAYERS))
    assert made.get_active_adapters() == ["default"]


def test_scales_of_components(made, tmp_path):
    made.load_lora_weights(save_adapter(made.unet, tmp_path), adapter_name="style")
    half = draw_one(made, cross_attention_kwargs={"scale": 0.5})
    made.set_adapters(["style"], [{"unet": 0.5}])
    torch.testing.assert_close(draw_one(made), half, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offloading_inference_denoiser(made, tmp_path, offload_type):
    made.load_lora_weights(save_adapter(made.unet, tmp_path))
    expected = draw_one(made)
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    disk = str(tmp_path / "disk")
    made.unet.enable_group_offload(torch.device("cpu"), offload_type=offload_type, offload_to_disk_path=disk, **blocks)
    assert torch.equal(draw_one(made), expected)


def test_hotswap(made, tmp_path):
    first, second = (save_adapter(made.unet, tmp_path / str(seed), seed=seed) for seed in (0, 1))
    made.load_lora_weights(second, adapter_name="own")
    expected = draw_one(made)
    made.unload_lora_weights()
    made.load_lora_weights(first, adapter_name="style")
    assert not torch.allclose(draw_one(made), expected, atol=1e-3)
    made.load_lora_weights(second, adapter_name="style", hotswap=True)
    torch.testing.assert_close(draw_one(made), expected)


@pytest.mark.slow
def test_a_compiled_model(made, tmp_path):
    """An adapter loads into it as into the model itself, also by hotswapping, which compiled models need."""
    first, second = (save_adapter(made.unet, tmp_path / str(seed), seed=seed) for seed in (0, 1))
    model = made.unet
    compiled = torch.compile(model)  # compiles at the first call, which takes too long here and is not made
    made.load_lora_weights(second)
    expected = draw_one(made)
    made.unload_lora_weights()
    made.enable_lora_hotswap(target_rank=4)
    for folder, hotswap in ((first, False), (second, True)):
        made.unet = compiled
        made.load_lora_weights(folder, adapter_name="style", hotswap=hotswap)
        made.unet = model
        assert torch.allclose(draw_one(made), expected, atol=1e-3) == hotswap


@pytest.mark.parametrize("change", ["load", "disable", "unload"])
def test_a_callback_can_change_adapters(made, change, tmp_path):
    """The change acts from the next step on, in the text's keys and values, too."""
    save_adapter(made.unet, tmp_path)
    actions = {
        "load": lambda: made.load_lora_weights(tmp_path),
        "disable": made.disable_lora,
        "unload": made.unload_lora_weights,
    }
    images = []
    for new_text in (False, True):
        made.unload_lora_weights()
        if change != "load":
            made.load_lora_weights(tmp_path)
        unchanged = draw_one(made)

        def callback(pipe, step, timestep, tensors, new_text=new_text):
            if step == 0:
                actions[change]()
            return {"prompt_embeds": tensors["prompt_embeds"].clone()} if new_text else {}

        kwargs = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
        images.append(draw_one(made, **kwargs))
        assert not torch.allclose(images[-1], unchanged, atol=1e-3)
    assert torch.equal(*images)


@pytest.mark.parametrize("growths", [1, 2])
def test_an_adapter_of_a_core_in_what_was_grown_from_it(growths, tmp_path):
    """It has the same layers there as in the core."""
    core = make_pipeline(make_core())
    save_adapter(core.unet, tmp_path)
    grown = core
    for _ in range(growths):
        grown = GreedyGrowPipeline.from_core(grown, 2 * grown.unet.config.sample_size, block_out_channels=(8,))
    core.load_lora_weights(tmp_path)
    grown.load_lora_weights(tmp_path)
    layers = [{n for n, _ in pipe.unet.named_parameters() if "lora_" in n} for pipe in (core, grown)]
    assert layers[1] == {f"core.{name}" for name in layers[0]}
    state = core.unet.state_dict()
    inner = grown.unet.core.state_dict()
    assert all(torch.equal(value, inner[name]) for name, value in state.items())

    # An adapter of a grown model fits a model grown from that without new names.
    middle = make_pipeline(make_grown())
    save_adapter(middle.unet, tmp_path / "middle")
    larger = GreedyGrowPipeline.from_core(middle, 64, block_out_channels=(8,))
    larger.load_lora_weights(tmp_path / "middle")
    assert larger.get_list_adapters() == {"unet": ["default_0"]}


def test_what_does_not_fit(made, tmp_path):
    with pytest.raises(ValueError, match="not LoRA layers of a .*'unet.conv.weight'"):
        made.load_lora_weights({"unet.conv.weight": torch.zeros(1)})
    other = {f"unet.blocks.9.to_q.lora_{part}.weight": torch.zeros(2, 2) for part in "AB"}
    with pytest.raises(ValueError, match="not LoRA layers of a .*Pass an adapter that was trained on this model"):
        made.load_lora_weights(other)
    with pytest.raises(ValueError, match="`use_safetensors=False`"):
        made.load_lora_weights(other, use_safetensors=False)
    with pytest.raises(TypeError, match=r"\['weight_nam'\] are not arguments of loading"):
        made.load_lora_weights(other, weight_nam="x")
    torch.save({}, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(OSError):
        made.load_lora_weights(tmp_path)
    assert not getattr(made.unet, "peft_config", None)


def test_saving_with_an_adapter_is_refused_and_fused_weights_are_kept(made, tmp_path):
    save_adapter(made.unet, tmp_path / "adapter")
    made.load_lora_weights(tmp_path / "adapter", adapter_name="style")
    for saved in (made, made.unet):
        with pytest.raises(ValueError, match=r"The adapters \['style'\] are attached.*`unload_lora_weights\(\)`"):
            saved.save_pretrained(tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()
    made.fuse_lora()
    expected = draw_one(made)
    with pytest.raises(ValueError, match="are attached"):
        made.save_pretrained(tmp_path / "pipeline")
    made.unload_lora_weights()
    made.save_pretrained(tmp_path / "pipeline")
    torch.testing.assert_close(draw_one(DiffusionPipeline.from_pretrained(tmp_path / "pipeline")), expected)


def test_a_whole_file_over_shards_loads_again(tmp_path):
    make_grown().save_pretrained(tmp_path, max_shard_size="50KB")
    assert list(tmp_path.glob("*.index.json"))
    other = make_grown(make_core(num_layers=1))
    other.save_pretrained(tmp_path)
    again = GrowableUNet2DConditionModel.from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in other.state_dict().items())
    other.save_pretrained(tmp_path, max_shard_size="50KB")
    GrowableUNet2DConditionModel.from_pretrained(tmp_path)


def test_adapters_from_the_hub(hub, tmp_path):
    from huggingface_hub import HfApi

    pipeline = make_pipeline()
    save_adapter(pipeline.unet, tmp_path)
    HfApi().create_repo("owner/adapter", exist_ok=True)
    HfApi().upload_folder(repo_id="owner/adapter", folder_path=tmp_path)
    pipeline.load_lora_weights("owner/adapter", adapter_name="hub")
    from_hub = draw_one(pipeline)
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(tmp_path)
    assert torch.equal(draw_one(pipeline), from_hub)


def test_a_single_file(made, tmp_path):
    save_adapter(made.unet, tmp_path)
    made.load_lora_weights(tmp_path, use_safetensors=True)
    expected = draw_one(made)
    made.unload_lora_weights()
    save_file(made.lora_state_dict(tmp_path), tmp_path / "other.safetensors")
    made.load_lora_weights(tmp_path, weight_name="other.safetensors")
    assert not torch.equal(draw_one(made), expected)  # without the configuration, alpha is the rank
