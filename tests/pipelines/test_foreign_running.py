# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Pipelines grown from those of diffusers: sampling, offloading, and adapters made for the original core."""

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from diffusers_greedy_grow import GreedyGrowPipeline
from diffusers_greedy_grow.flow import pool

from ..models.test_foreign_cores import call, close, find_clean, make_foreign, make_states, make_texts
from ..models.test_foreign_cores import grow as grow_model
from ..testing_utils import randomize
from .test_foreign_pipelines import draw, grow, make_if, make_prx_pixel


CPU = torch.device("cpu")
EMBEDS = {
    "prompt_embeds": torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(5)),
    "negative_prompt_embeds": torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(6)),
}


@pytest.fixture(params=["if", "prx"])
def pipeline(request) -> GreedyGrowPipeline:
    pipeline = grow(make_if() if request.param == "if" else make_prx_pixel(), detail_variance=0.1)
    randomize(pipeline.unet.stages, seed=1)
    return pipeline


@torch.no_grad()
def test_core_first_and_guidance_at_the_core(pipeline):
    """Each alone and both together; with guidance at the core, the stages run once per step."""
    runs = {"core": 0, "stage": 0}

    def count(name: str):
        def hook(module, args, kwargs):
            state = kwargs.get("sample", args[0] if args else None)
            runs[name] += len(state)

        return hook

    pipeline.unet.core.register_forward_pre_hook(count("core"), with_kwargs=True)
    pipeline.unet.stages[0].register_forward_pre_hook(count("stage"), with_kwargs=True)
    images = {}
    for name, kwargs, expected in (
        ("full", {}, (4, 4)),
        ("core", {"guidance_resolution": "core"}, (4, 2)),
        ("first", {"core_first": 0.9}, (4, 2)),
        ("both", {"core_first": 0.9, "guidance_resolution": "core"}, (4, 1)),
        ("auto", {"core_first": "auto"}, None),
    ):
        runs |= {"core": 0, "stage": 0}
        images[name] = draw(pipeline, **EMBEDS, **kwargs, guidance_stop=1.0, guidance_scale=3.0)
        assert images[name].isfinite().all() and images[name].std() > 0.01
        assert expected in (None, (runs["core"], runs["stage"])), name
    assert not torch.equal(images["core"], images["full"])


@torch.no_grad()
def test_offloading(pipeline, tmp_path):
    expected = draw(pipeline, **EMBEDS)
    pipeline.save_pretrained(tmp_path)
    for device_map in ("cpu", "balanced"):
        loaded = DiffusionPipeline.from_pretrained(tmp_path, device_map=device_map)
        assert torch.equal(draw(loaded, **EMBEDS), expected)
    pipeline.enable_model_cpu_offload(device="cpu")
    assert torch.equal(draw(pipeline, **EMBEDS), expected)
    pipeline.remove_all_hooks()
    pipeline.enable_group_offload(CPU, offload_type="leaf_level", exclude_modules=["text_encoder"])
    assert torch.equal(draw(pipeline, **EMBEDS), expected)


def test_half_precision(pipeline, tmp_path):
    expected = draw(pipeline, **EMBEDS, guidance_scale=1.0)
    pipeline.save_pretrained(tmp_path)
    for dtype in (torch.float16, torch.bfloat16):
        loaded = DiffusionPipeline.from_pretrained(tmp_path, dtype=dtype)
        assert loaded.unet.core.dtype == loaded.text_encoder.dtype == dtype
        assert (draw(loaded, **EMBEDS, guidance_scale=1.0) - expected).abs().mean() < 0.05


# ----------------------------------------------------------------------------------------------------------------------
# Adapters

TARGETS = {
    "unet with text, velocity": ["to_q", "to_k", "conv_in", "conv_out", "time_emb_proj"],
    "if": ["to_q", "add_k_proj", "conv_in", "conv_out"],
    "prx": ["img_qkv_proj", "txt_kv_proj", "final_layer.linear"],
}


def make_adapter(family: str, folder, form: str) -> tuple[torch.nn.Module, dict]:
    """Make an adapter for a core by PEFT, and save it in a form. Return the model with it, and the file's tensors."""
    core, _ = make_foreign(family)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS[family], init_lora_weights=False)
    torch.manual_seed(7)
    model = get_peft_model(core, config)
    if form == "peft":
        model.save_pretrained(folder)
    elif form == "diffusers":
        layers = get_peft_model_state_dict(core, adapter_name="default")
        core.peft_config = model.peft_config
        StableDiffusionLoraLoaderMixin.save_lora_weights(
            folder,
            layers,
            unet_lora_adapter_metadata=_collate_lora_metadata({"unet": core})["unet_lora_adapter_metadata"],
        )
    else:  # the names of training scripts, with alpha taken to be the rank
        for module in core.modules():
            if hasattr(module, "scaling"):
                module.scaling["default"] = 1.0
        folder.mkdir(exist_ok=True)
        tensors = get_peft_model_state_dict(core, adapter_name="default")
        if form == "script":  # diffusers' for DeepFloyd IF: some names end in `lora.down`, others in `lora_A`
            StableDiffusionLoraLoaderMixin.save_lora_weights(folder, convert_state_dict_to_diffusers(tensors))
            return core, load_file(next(folder.glob("*.safetensors")))
        save_file(
            {f"transformer.{name}": value.clone() for name, value in tensors.items()}, folder / "lora.safetensors"
        )
    return core, load_file(next(folder.glob("*.safetensors")))


@torch.no_grad()
@pytest.mark.parametrize(
    "family,form",
    [
        ("unet with text, velocity", "peft"),
        ("unet with text, velocity", "diffusers"),
        ("if", "diffusers"),
        ("if", "script"),
        ("prx", "peft"),
        ("prx", "transformer"),
    ],
)
def test_an_adapter_of_the_original_core(family, form, tmp_path):
    """In the grown model, it does to the core what it does to the original, also where its output layer is replaced."""
    adapted, tensors = make_adapter(family, tmp_path / "lora", form)
    start = {"peft": "base_model.model.", "diffusers": "unet.", "script": "unet.", "transformer": "transformer."}[form]
    assert all(name.startswith(start) for name in tensors)
    core, process = make_foreign(family)
    grown, (text, _) = grow_model(core, process), make_texts(family)
    x, sigma, y, time = make_states(process)

    def predict(model) -> torch.Tensor:
        return pool(model(x, 1000 * sigma, **text).pred_original_sample, 2)

    plain = predict(grown)
    expected = find_clean(process, call(adapted, y, time, text), y, time)
    pipeline = GreedyGrowPipeline(grown, None)
    pipeline.load_lora_weights(tmp_path / "lora", adapter_name="default")
    close(predict(grown), expected)
    assert (expected - plain).abs().mean() > 0.01
    tuned = {name.split(".lora_A")[0] for name in grown.state_dict() if ".lora_A" in name}
    assert len(tuned) == len(tensors) // 2 and all(name.startswith("core.") for name in tuned)
    pipeline.set_adapters("default", 0.0)
    close(predict(grown), plain)
    pipeline.set_adapters("default", 1.0)

    # Its own file loads again; so does the model without it, and with it fused.
    metadata = _collate_lora_metadata({"unet": grown})["unet_lora_adapter_metadata"]
    layers = get_peft_model_state_dict(grown, adapter_name="default")
    pipeline.save_lora_weights(tmp_path / "own", layers, unet_lora_adapter_metadata=metadata)
    pipeline.unload_lora_weights()
    close(predict(grown), plain)
    grown.save_pretrained(tmp_path / "plain")
    again = type(grown).from_pretrained(tmp_path / "plain")
    again_pipeline = GreedyGrowPipeline(again, None)
    again_pipeline.load_lora_weights(tmp_path / "own")
    close(predict(again), expected)
    again_pipeline.fuse_lora()
    close(predict(again), expected)
    again_pipeline.unload_lora_weights()
    again.save_pretrained(tmp_path / "fused")
    close(predict(type(grown).from_pretrained(tmp_path / "fused")), expected)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_other_adapters_on_an_output_layer(options, tmp_path):
    """The features are taken from below the adapter."""
    core, process = make_foreign("if")
    grown, (text, _) = grow_model(core, process), make_texts("if")
    x, sigma, y, time = make_states(process)
    config = LoraConfig(r=2, target_modules=["conv_out"], init_lora_weights=False, **options)
    torch.manual_seed(7)
    model = get_peft_model(core, config)
    model.save_pretrained(tmp_path)
    before = grown.core(pool(x, 2), 1000 * sigma, *text.values()).features
    grown.load_lora_adapter(tmp_path)
    assert torch.equal(grown.core(pool(x, 2), 1000 * sigma, *text.values()).features, before)
    expected = find_clean(process, call(core, y, time, text), y, time)
    close(pool(grown(x, 1000 * sigma, **text).pred_original_sample, 2), expected)


def test_an_adapter_of_another_core_is_refused(tmp_path):
    """Nothing of it is loaded."""
    make_adapter("prx", tmp_path / "prx", "transformer")
    make_adapter("unet with text, velocity", tmp_path / "unet", "diffusers")
    for family, folder in (("prx", "unet"), ("unet with text, velocity", "prx"), ("if", "unet")):
        grown = grow_model(*make_foreign(family))
        with pytest.raises(ValueError, match="Nothing is loaded"):
            GreedyGrowPipeline(grown, None).load_lora_weights(tmp_path / folder)
        assert not getattr(grown, "peft_config", None)
