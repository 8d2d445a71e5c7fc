# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""LoRA files of other programs: PEFT's load with their configuration, all others are refused and change nothing."""

import json
import logging

import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import HfApi
from peft import LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from diffusers_greedy_grow import GreedyGrowPipeline, GrowableUNet2DConditionModel

from ..testing_utils import make_core, make_inputs


# `lora_alpha` is not the rank, and one layer has a rank and an alpha of its own.
CONFIG = {
    "r": 2,
    "lora_alpha": 8,
    "target_modules": ["attn1.to_q", "conv_out"],
    "rank_pattern": {"transformer_blocks.1.attn1.to_q": 3},
    "alpha_pattern": {"transformer_blocks.1.attn1.to_q": 5},
    "init_lora_weights": False,
}
LAYER = "transformer_blocks.0.attn1.to_q"


@pytest.fixture(params=["pipeline", "model"])
def load(request):
    """The two ways to load an adapter into a model."""
    if request.param == "model":
        return lambda model, source, **kwargs: model.load_lora_adapter(source, **kwargs)
    return lambda model, source, **kwargs: GreedyGrowPipeline(model, None).load_lora_weights(source, **kwargs)


@pytest.fixture
def warnings(caplog):
    diffusers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING, "diffusers_greedy_grow"):
        yield caplog
    diffusers_logging.disable_propagation()


@torch.no_grad()
def draw(model) -> torch.Tensor:
    size = model.config.sample_size
    return model(**make_inputs(height=size, width=size)).sample


def save_peft(folder, model=None, config=None, adapter_name: str = "default") -> torch.Tensor:
    """Train an adapter as PEFT does, save it by PEFT, and return the model's velocity with it."""
    torch.manual_seed(3)
    model = get_peft_model(model or make_core(), config or LoraConfig(**CONFIG), adapter_name)
    model.save_pretrained(folder)
    return draw(model.get_base_model())


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}], ids=str)
def test_a_folder_of_peft(load, tmp_path, options):
    expected = save_peft(tmp_path, config=LoraConfig(**CONFIG, **options))
    model = make_core()
    load(model, tmp_path)
    assert torch.equal(draw(model), expected)
    model.unload_lora()
    load(model, tmp_path / "adapter_model.safetensors")  # the configuration is read from beside it
    assert torch.equal(draw(model), expected)


def test_a_repository_of_peft(load, hub, tmp_path):
    expected = save_peft(tmp_path, adapter_name="style")  # PEFT makes a folder of the adapter's name
    HfApi().create_repo("owner/peft-adapter", exist_ok=True)
    HfApi().upload_folder(repo_id="owner/peft-adapter", folder_path=tmp_path)
    for where in ({}, {"subfolder": "style", "weight_name": "adapter_model.safetensors"}):
        model = make_core()
        load(model, "owner/peft-adapter", **where)
        assert torch.equal(draw(model), expected)


def test_a_subfolder_beside_another_adapter(load, tmp_path):
    save_peft(tmp_path, config=LoraConfig(r=1, target_modules=["to_k"], init_lora_weights=False))
    expected = save_peft(tmp_path, adapter_name="style")
    model = make_core()
    load(model, tmp_path, subfolder="style")
    assert torch.equal(draw(model), expected)


@pytest.mark.parametrize(
    "pattern", ["^transformer_blocks.1.attn1.to_q", r"^(transformer_blocks\.1)\.attn1\.to_q", "1.attn1.to_q"]
)
def test_a_core_of_peft_in_what_was_grown_from_it(load, tmp_path, recwarn, pattern):
    config = {**CONFIG, "rank_pattern": {pattern: 3}, "alpha_pattern": {pattern: 64}, "target_modules": ["to_q"]}
    save_peft(tmp_path, config=LoraConfig(**config))
    grown = GrowableUNet2DConditionModel.from_core(make_core(), 32, block_out_channels=(8,))
    plain = draw(grown)
    load(grown, tmp_path)
    core = make_core()
    load(core, tmp_path)
    inputs = make_inputs()
    assert torch.equal(grown.core(**inputs).sample, core(**inputs).sample)
    assert not torch.allclose(draw(grown), plain, atol=1e-3)
    assert not [warning for warning in recwarn if "inconsistency" in str(warning.message)]
    # Its own file, saved by diffusers, loads again.
    expected = draw(grown)
    grown.save_lora_adapter(tmp_path / "own", adapter_name="default_0")
    grown.unload_lora()
    load(grown, tmp_path / "own")
    assert torch.equal(draw(grown), expected)


@pytest.mark.parametrize("start", ["", "unet.", "base_model.model.", "unet.base_model.model.", "transformer."])
@pytest.mark.parametrize("adapter", ["", "my-style."])
def test_tensors_without_a_file(load, tmp_path, start, adapter, request):
    """Names from `state_dict()` have the adapter's name in them. Without a configuration, alpha is the rank."""
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], use_dora=True, init_lora_weights=False)
    expected = save_peft(tmp_path, config=config)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    names = {}
    for name in tensors:
        new = start + name.removeprefix("base_model.model.")
        if adapter:
            new = new.replace(".weight", f".{adapter}weight").replace("vector", f"vector.{adapter}weight")
        names[name] = new
    model = make_core()
    tensors = {names[name]: value for name, value in tensors.items()}
    if start == "transformer." and "pipeline" in request.node.name:  # another component, in pipelines of diffusers
        with pytest.raises(ValueError, match="not LoRA layers"):
            load(model, tensors)
        return
    load(model, tensors)
    assert torch.equal(draw(model), expected)


def test_peft_tensors_without_a_configuration(load, tmp_path, warnings):
    expected = save_peft(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    model = make_core()
    load(model, tensors)
    assert "`lora_alpha` is taken to be the rank" in warnings.text
    assert not torch.allclose(draw(model), expected, atol=1e-3)
    model.unload_lora()
    warnings.clear()
    model.load_lora_adapter(tensors, metadata=LoraConfig(**CONFIG).to_dict())  # as the warning says
    assert torch.equal(draw(model), expected) and not warnings.text


def test_a_loaded_adapter_can_train_and_be_saved(load, tmp_path):
    """PEFT saves configurations for inference, with a base model that it would look for on the Hub."""
    save_peft(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "nobody/nothing"}))
    model = make_core()
    load(model, tmp_path)
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" in name)
    assert len(get_peft_model_state_dict(model, adapter_name="default_0")) == 6
    assert model.peft_config["default_0"].base_model_name_or_path is None


def test_lokr_of_peft(load, tmp_path):
    expected = save_peft(tmp_path, config=LoKrConfig(r=2, alpha=8, target_modules=["to_q"], init_weights=False))
    model = make_core()
    load(model, tmp_path)
    assert torch.equal(draw(model), expected)


def make_foreign() -> dict[str, tuple[dict[str, torch.Tensor], str]]:
    """Tensors that do not fit, by kind, and the name that the message must have."""
    a, b = torch.zeros(2, 32), torch.zeros(32, 2)
    own = {f"unet.{LAYER}.lora_A.weight": a, f"unet.{LAYER}.lora_B.weight": b}
    kohya = f"lora_unet_{LAYER.replace('.', '_')}"
    sd_scripts = {f"{kohya}.lora_down.weight": a, f"{kohya}.lora_up.weight": b, f"{kohya}.alpha": torch.tensor(1.0)}
    processor = f"unet.{LAYER.replace('to_q', 'processor.to_q_lora')}"
    language = "base_model.model.model.layers.0.self_attn.q_proj"
    text = {"text_encoder.q_proj.lora_A.weight": a, "text_encoder.q_proj.lora_B.weight": b}
    return {
        "sd-scripts": (sd_scripts, f"{kohya}.lora_down.weight"),
        "attention processors": (
            {f"{processor}.down.weight": a, f"{processor}.up.weight": b},
            f"{processor}.down.weight",
        ),
        "half of old diffusers": ({f"unet.{LAYER}.lora.down.weight": a}, f"{LAYER}.lora_B.weight` is missing"),
        "old diffusers twice": (
            {f"unet.{LAYER}.{name}.weight": a for name in ("lora.down", "lora_A")},
            "more than one adapter",
        ),
        "another model": (
            {f"transformer.blocks.0.{part}.weight": a for part in ("lora_A", "lora_B")},
            "transformer.blocks.0",
        ),
        "another model of PEFT": ({f"{language}.lora_A.weight": a, f"{language}.lora_B.weight": b}, language),
        "a text encoder": (text, "text_encoder.q_proj.lora_A.weight"),
        "whole weights": ({f"unet.{LAYER}.weight": torch.zeros(32, 32)}, f"unet.{LAYER}.weight"),
        "a module without weights": ({"unet.transformer_blocks.lora_A.weight": a}, "unet.transformer_blocks.lora_A"),
        "partly sd-scripts": ({**own, **sd_scripts}, f"{kohya}.lora_down.weight"),
        "partly a text encoder": ({**own, **text}, "text_encoder.q_proj.lora_A.weight"),
        "partly trained weights": ({**own, "base_model.model.conv_in.weight": a}, "base_model.model.conv_in.weight"),
        "a bias in `lora_A`": ({**own, f"unet.{LAYER}.lora_A.bias": torch.zeros(2)}, f"{LAYER}.lora_A.bias"),
        "another width": (
            {**own, f"unet.{LAYER}.lora_A.weight": a[:, :16]},
            rf"{LAYER}.lora_A.weight` is of shape \(2, 16\)",
        ),
        "two ranks": (
            {**own, f"unet.{LAYER}.lora_B.weight": b[:, :1]},
            rf"{LAYER}.lora_B.weight` is of shape \(32, 1\)",
        ),
        "one dimension": ({**own, f"unet.{LAYER}.lora_B.weight": b[0]}, rf"{LAYER}.lora_B.weight` is of shape \(2,\)"),
        "no dimension": ({**own, f"unet.{LAYER}.lora_A.weight": a[0, 0]}, rf"{LAYER}.lora_A.weight` is of shape \(\)"),
        "half": ({f"unet.{LAYER}.lora_A.weight": a}, f"{LAYER}.lora_B.weight` is missing"),
        "twice": ({**own, f"{LAYER}.lora_A.weight": a}, "more than one adapter"),
        "two adapters": (
            {
                f"{LAYER}.lora_{part}.{name}.weight": value
                for part, value in (("A", a), ("B", b))
                for name in ("x", "y")
            },
            r"more than one adapter: \['x', 'y'\]",
        ),
        "nothing": ({}, "no tensors"),
    }


@pytest.mark.parametrize("kind", make_foreign())
def test_what_is_refused(load, tmp_path, kind):
    """The message names the first tensors at fault and what would load. Nothing is loaded."""
    model = make_core()
    names = list(model.state_dict())
    tensors, message = make_foreign()[kind]
    save_file({name: value.clone() for name, value in tensors.items()}, tmp_path / "foreign.safetensors")
    for source in (tensors, tmp_path):
        with pytest.raises(ValueError, match=message) as error:
            load(model, source)
    assert "Nothing is loaded" in str(error.value) or "Pass the tensors of one" in str(error.value)
    assert list(model.state_dict()) == names and not getattr(model, "peft_config", None)
    # The model still takes what fits.
    own = {f"unet.{LAYER}.lora_A.weight": torch.ones(2, 32), f"unet.{LAYER}.lora_B.weight": torch.ones(32, 2)}
    load(model, own)
    assert list(model.peft_config) == ["default_0"]


def test_an_adapter_of_a_grown_model_is_refused_by_its_core(load, tmp_path):
    grown = GrowableUNet2DConditionModel.from_core(make_core(), 32, block_out_channels=(8,))
    save_peft(tmp_path, grown)
    with pytest.raises(ValueError, match=r"not LoRA layers of a ShallowUNet2DModel: \['base_model.model.core."):
        load(make_core(), tmp_path)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"r": 4}, r"conv_out.lora_A.weight` is of shape \(2, 32, 3, 3\) and must be of shape \(4, 32, 3, 3\)"),
        ({"rank_pattern": {}}, r"is of shape \(3, 32\) and must be of shape \(2, 32\)"),
        ({"use_dora": True}, "lora_magnitude_vector` is missing"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "`init_lora_weights='pissa_niter_4'`, which also changes the weights",
        ),
        ({"peft_type": "IA3"}, r"adapter_config.json` is not the configuration of a LoRA adapter: .*IA3Config"),
        ({"peft_type": "strange"}, "adapter_config.json` is not the configuration of a LoRA adapter"),
        (None, "adapter_config.json` is not the configuration of a LoRA adapter"),
    ],
)
def test_a_configuration_that_does_not_fit(load, tmp_path, change, message):
    save_peft(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text("{" if change is None else json.dumps({**json.loads(path.read_text()), **change}))
    model = make_core()
    with pytest.raises(ValueError, match=message):
        load(model, tmp_path)
    assert not getattr(model, "peft_config", None)


def test_damaged_and_pickled_files(load, tmp_path):
    for content in (b"", b"not safetensors at all"):
        (tmp_path / "adapter_model.safetensors").write_bytes(content)
        with pytest.raises(OSError, match="does not hold a readable safetensors file"):
            load(make_core(), tmp_path)
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"`adapter_model.bin` must end in .safetensors"):
        load(make_core(), tmp_path, weight_name="adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "checkpoint.safetensors")
    with pytest.raises(OSError, match="has the name of an adapter: pass its `weight_name`"):
        load(make_core(), tmp_path)
    (tmp_path / "checkpoint.safetensors").unlink()
    with pytest.raises(OSError, match="has no file that ends in .safetensors: weights in other formats are not safe"):
        load(make_core(), tmp_path)
    with pytest.raises(ValueError, match=r"adapter_model.bin` must end in .safetensors: pickled weights are not safe"):
        load(make_core(), tmp_path / "adapter_model.bin")
    save_peft(tmp_path, adapter_name="style")
    with pytest.raises(OSError, match="has no file that ends in .safetensors: pass `subfolder='style'`"):
        load(make_core(), tmp_path)


@pytest.mark.parametrize("option", [{"bias": "all"}, {"modules_to_save": ["conv_out"]}], ids=str)
def test_whole_weights_beside_the_adapter_are_refused(load, tmp_path, option):
    save_peft(tmp_path, config=LoraConfig(**CONFIG, **option))
    model = make_core()
    with pytest.raises(
        ValueError, match=r"has whole weights beside LoRA layers: \['base_model.model.conv_.*`modules_to_save`"
    ):
        load(model, tmp_path)
    assert not getattr(model, "peft_config", None)


def test_a_second_adapter_of_peft_beside_a_first(tmp_path):
    """Layers that have an adapter already are still found and checked."""
    save_peft(tmp_path)
    pipeline = GreedyGrowPipeline(make_core(), None)
    pipeline.load_lora_weights(tmp_path, adapter_name="first")
    pipeline.load_lora_weights(tmp_path, adapter_name="second")
    assert pipeline.get_list_adapters() == {"unet": ["first", "second"]}
    with pytest.raises(ValueError, match="is of shape"):
        pipeline.load_lora_weights(
            {f"{LAYER}.lora_A.weight": torch.ones(2, 8), f"{LAYER}.lora_B.weight": torch.ones(8, 2)}
        )
