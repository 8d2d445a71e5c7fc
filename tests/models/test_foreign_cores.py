# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Models of diffusers as cores: small ones with random weights, compared with how their own schedulers and pipelines use them."""

import copy
import json

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PRXTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)

from diffusers_greedy_grow import GrowableUNet2DConditionModel
from diffusers_greedy_grow.flow import RectifiedFlow, add_noise, pool, shift_sigma, upsample
from diffusers_greedy_grow.models.cores import CORE_CLASSES

from ..testing_utils import TEXT_DIM, make_core, randomize


UNET = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
UNCONDITIONAL = {
    **UNET,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
CONDITIONAL = {
    **UNET,
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": TEXT_DIM,
}
# The layers of DeepFloyd IF, which also predicts variances
IF = {
    **CONDITIONAL,
    "out_channels": 6,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "only_cross_attention": True,
    "cross_attention_norm": "group_norm",
    "cross_attention_dim": 64,
    "encoder_hid_dim": TEXT_DIM,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2,
    "resnet_time_scale_shift": "scale_shift",
    "act_fn": "gelu",
}
PRX = {
    "in_channels": 3,
    "patch_size": 4,
    "context_in_dim": TEXT_DIM,
    "hidden_size": 40,  # not a multiple of a patch's 16 pixels
    "num_heads": 2,
    "depth": 2,
    "axes_dim": [10, 10],
    "bottleneck_size": 16,
    "resolution_embeds": True,
}
THRESHOLDING = {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.5}
# The class, its configuration and the process
FAMILIES = {
    "unet": (UNet2DModel, UNCONDITIONAL, DDPMScheduler()),
    "unet, clean image": (UNet2DModel, UNCONDITIONAL, DDIMScheduler(prediction_type="sample", clip_sample_range=0.5)),
    "unet with text, velocity": (
        UNet2DConditionModel,
        CONDITIONAL,
        DDPMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear", clip_sample=False),
    ),
    "if": (
        UNet2DConditionModel,
        IF,
        DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range", **THRESHOLDING),
    ),
    "unet, variances": (
        UNet2DModel,
        {**UNCONDITIONAL, "out_channels": 6},
        DDPMScheduler(variance_type="learned", prediction_type="v_prediction"),
    ),
    "prx": (PRXTransformer2DModel, PRX, RectifiedFlow(noise_scale=2.0)),
}


def make_foreign(family: str, **changes):
    """A small model of a family with random weights, and its process."""
    model_class, config, process = FAMILIES[family]
    torch.manual_seed(0)
    return randomize(model_class(**{**config, **changes})), copy.deepcopy(process)


def grow(core, process, sample_size: int = 32, block_out_channels=(8,), **kwargs) -> GrowableUNet2DConditionModel:
    if isinstance(core, PRXTransformer2DModel):
        kwargs.setdefault("core_sample_size", 16)
    torch.manual_seed(1)
    return GrowableUNet2DConditionModel.from_core(
        core, sample_size, block_out_channels, process=process, **kwargs
    ).eval()


def make_texts(family: str) -> list[dict]:
    """Two texts, as arguments of a grown model."""
    if family.startswith("unet") and "text" not in family:
        return [{}, {}]
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[0, 4:] = False
    return [
        {"encoder_hidden_states": torch.randn(3, 6, TEXT_DIM, generator=generator), "encoder_attention_mask": mask}
        for _ in range(2)
    ]


def make_states(process, factor: int = 2):
    """Our states at the high resolution, their noise levels, and the same images and noise as states of the process, and their times."""
    generator = torch.Generator().manual_seed(3)
    x0 = torch.rand(3, 3, 16 * factor, 16 * factor, generator=generator) * 2 - 1
    noise = torch.randn(x0.shape, generator=generator)
    low, low_noise = pool(x0, factor), factor * pool(noise, factor)
    if isinstance(process, RectifiedFlow):
        time = torch.tensor([0.05, 0.5, 0.95])
        sigma = shift_sigma(time, factor * process.noise_scale)
        y = add_noise(low, process.noise_scale * low_noise, time)
    else:
        time = torch.tensor([20, 500, 900])
        ratio = ((1 - process.alphas_cumprod[time]) / process.alphas_cumprod[time]).sqrt()
        sigma = shift_sigma(ratio / (1 + ratio), factor)
        y = process.add_noise(low, low_noise, time)
    return add_noise(x0, noise, sigma), sigma, y, time


def call(core, y: torch.Tensor, time: torch.Tensor, text: dict) -> torch.Tensor:
    """The model's own prediction, called as its pipeline calls it."""
    if core.config.get("addition_embed_type") == "text":
        text = {"encoder_hidden_states": text["encoder_hidden_states"]}  # the pipeline of DeepFloyd IF passes no mask
    if isinstance(core, PRXTransformer2DModel):
        text = {
            "encoder_hidden_states": text["encoder_hidden_states"],
            "attention_mask": text["encoder_attention_mask"],
        }
    return core(y, time, **text).sample


def find_clean(process, prediction: torch.Tensor, y: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """The clean image, as the scheduler computes it from a prediction."""
    if isinstance(process, RectifiedFlow):
        return prediction
    if isinstance(process, DDIMScheduler):
        process.set_timesteps(1000)
    steps = [process.step(prediction[i : i + 1], time[i], y[i : i + 1]) for i in range(len(y))]
    return torch.cat([step.pred_original_sample for step in steps])


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.05
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)


@pytest.fixture(params=["unet", "unet with text, velocity", "if", "prx"])
def family(request):
    return request.param


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_grown_model_pools_to_the_cores_own_prediction(family):
    core, process = make_foreign(family)
    grown, (text, _) = grow(core, process), make_texts(family)
    x, sigma, y, time = make_states(process)
    expected = find_clean(process, call(core, y, time, text), y, time)
    close(pool(grown(x, 1000 * sigma, **text).pred_original_sample, 2), expected)
    # The core alone, as for the first steps of sampling
    close(grown(x, 1000 * sigma, **text, num_stages=0).pred_original_sample, upsample(expected, 2))


@torch.no_grad()
@pytest.mark.parametrize("family", ["unet with text, velocity", "if", "prx"])
def test_guidance_acts_on_the_core_as_in_its_own_pipeline(family):
    """Limits to the values come after guidance; with the guidance here, most values exceed them."""
    core, process = make_foreign(family)
    grown, (text, negative) = grow(core, process), make_texts(family)
    x, sigma, y, time = make_states(process)
    prediction, negative_prediction = call(core, y, time, text), call(core, y, time, negative)
    guided = negative_prediction + 5 * (prediction - negative_prediction)
    output = grown(
        *(x, 1000 * sigma),
        **text,
        **{f"negative_{name}": value for name, value in negative.items()},
        guide=lambda pred, negative_pred: negative_pred + 5 * (pred - negative_pred),
    )
    close(pool(output.pred_original_sample, 2), find_clean(process, guided, y, time))


@torch.no_grad()
def test_the_stage_gets_the_last_features(family):
    """They are what the model's own output layer makes its prediction of."""
    core, process = make_foreign(family)
    grown, (text, _) = grow(core, process), make_texts(family)
    x, sigma, y, time = make_states(process)
    layer = core.final_layer.linear if family == "prx" else core.conv_out
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    call(core, y, time, text)
    handle.remove()
    expected = seen[0].transpose(1, 2).unflatten(-1, (4, 4)) if family == "prx" else seen[0]
    close(grown.core(pool(x, 2) / ((1 - sigma) + sigma / 2)[:, None, None, None], 1000 * sigma / (2 - sigma),
                     *text.values()).features, expected)  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_from_save_pretrained(family, dtype, tmp_path):
    core, process = make_foreign(family)
    grown, (text, _) = randomize(grow(core, process)), make_texts(family)
    x, sigma, *_ = make_states(process)
    grown.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["core_config"]["_class_name"] == type(core).__name__
    loaded = GrowableUNet2DConditionModel.from_pretrained(tmp_path, dtype=dtype)
    assert type(loaded.core) is CORE_CLASSES[type(core).__name__] and loaded.core.dtype == dtype
    assert loaded.state_dict().keys() == grown.state_dict().keys()
    expected, output = grown(x, 1000 * sigma, **text).sample, loaded(x, 1000 * sigma, **text).sample
    if dtype == torch.float32:
        assert torch.equal(output, expected)
    assert output.dtype == torch.float32
    assert (output - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_parameters_keep_their_names_and_the_core_its_own(family):
    core, process = make_foreign(family)
    before = {name: value.clone() for name, value in core.state_dict().items()}
    grown = grow(core, process)
    assert {f"core.{name}" for name in before} == {name for name in grown.state_dict() if name.startswith("core.")}
    with torch.no_grad():
        for parameter in grown.parameters():
            parameter.add_(1)
    for name, value in core.state_dict().items():
        assert torch.equal(value, before[name]), name
        torch.testing.assert_close(grown.state_dict()[f"core.{name}"], value + 1)


def test_a_frozen_core_has_no_gradients(family):
    core, process = make_foreign(family)
    grown, (text, _) = randomize(grow(core, process)).train(), make_texts(family)
    x, sigma, *_ = make_states(process)
    grown.freeze_core()
    assert not grown.core.training and {group["name"] for group in grown.parameter_groups(1e-3)} == {"stage"}
    grown(x, 1000 * sigma, **text).sample.square().mean().backward()
    assert all(parameter.grad is None for parameter in grown.core.parameters())
    assert all(parameter.grad is not None for parameter in grown.stages.parameters())
    grown.unfreeze_core()
    grown.enable_gradient_checkpointing()
    grown(x, 1000 * sigma, **text).sample.square().mean().backward()
    assert all(parameter.grad is not None for parameter in grown.core.parameters() if parameter.requires_grad)


@torch.no_grad()
def test_growing_again(family, tmp_path):
    core, process = make_foreign(family)
    inner = randomize(grow(core, process))
    inner.save_pretrained(tmp_path)
    grown = GrowableUNet2DConditionModel.from_core(tmp_path, 64, (8,)).eval()
    assert grown.sample_sizes == (16, 32, 64) and grown.config.core_process == inner.config.core_process
    x, sigma, *_ = make_states(process, 4)
    (text, _) = make_texts(family)
    from_inside = inner(pool(x, 2) / (1 - sigma / 2)[:, None, None, None], 1000 * sigma / (2 - sigma), **text)
    close(pool(grown(x, 1000 * sigma, **text).pred_original_sample, 2), from_inside.pred_original_sample)


@torch.no_grad()
def test_sides(family):
    core, process = make_foreign(family)
    grown, (text, _) = grow(core, process), make_texts(family)
    multiple = 8 if family == "prx" else 4  # a patch, or what is halved once, and the stage's factor
    assert grown.side_multiple == multiple
    assert grown(torch.randn(3, 3, 24, 48), 500, **text).sample.shape == (3, 3, 24, 48)
    with pytest.raises(ValueError, match=f"24 x {48 + multiple // 2}, but both sides must be multiples of {multiple}"):
        grown(torch.randn(3, 3, 24, 48 + multiple // 2), 500, **text)


@pytest.mark.parametrize(
    "family,changes,message",
    [
        ("unet", {"in_channels": 4, "out_channels": 4}, "`in_channels=4`.*latent space"),
        ("unet", {"out_channels": 1}, "`out_channels=1`.*must be `in_channels=3`, or 6 with variances"),
        ("if", {"out_channels": 9}, "`out_channels=9`.*must be `in_channels=3`, or 6 with variances"),
        ("unet", {"num_class_embeds": 10}, "`num_class_embeds=10`.*classes"),
        ("unet", {"time_embedding_type": "fourier"}, "`time_embedding_type='fourier'`.*positional"),
        (
            "unet",
            {
                "block_out_channels": (32, 64),
                "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
                "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
            },
            "`up_block_types=.*no last features",
        ),
        ("unet", {"sample_size": None}, "does not say at which resolution.*`core_sample_size`"),
        ("unet", {"sample_size": (16, 24)}, r"`sample_size=\(16, 24\)`.*must be square"),
        (
            "if",
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 8,
            },
            "`addition_embed_type='text_time'`.*supported are None, 'text'",
        ),
        ("if", {"time_cond_proj_dim": 8}, "`time_cond_proj_dim=8`"),
        ("prx", {"in_channels": 16}, "`in_channels=16`.*latent space"),
    ],
)
def test_models_that_cannot_be_grown(family, changes, message):
    core, process = make_foreign(family, **changes)
    with pytest.raises(ValueError, match=message):
        grow(core, process)


def test_growing_says_what_does_not_fit():
    unet, scheduler = make_foreign("unet")
    prx, flow = make_foreign("prx")
    with pytest.raises(ValueError, match="UNet2DModel needs `process`"):
        grow(unet, None)
    with pytest.raises(ValueError, match="`process` is a RectifiedFlow, but a UNet2DModel needs the DDPMScheduler"):
        grow(unet, flow)
    with pytest.raises(
        ValueError, match="`process` is a DDPMScheduler, but a PRXTransformer2DModel needs `RectifiedFlow"
    ):
        grow(prx, scheduler)
    for other in (FlowMatchEulerDiscreteScheduler(), EulerDiscreteScheduler()):
        with pytest.raises(TypeError, match=f"`process` must be the DDPMScheduler.*is a {type(other).__name__}"):
            grow(unet, other)
    with pytest.raises(ValueError, match="does not say at which resolution"):
        grow(prx, flow, core_sample_size=None)
    with pytest.raises(ValueError, match="`core_sample_size=18` must be a multiple of 4"):
        grow(prx, flow, core_sample_size=18)
    with pytest.raises(ValueError, match="`core_sample_size=8` must be the `sample_size=16`"):
        grow(unet, scheduler, core_sample_size=8)
    with pytest.raises(ValueError, match="`init='random'`.*another model"):
        grow(unet, scheduler, init="random")
    with pytest.raises(TypeError, match="`process` and `core_sample_size` only apply"):
        grow(make_core(), scheduler)


@pytest.mark.parametrize(
    "settings,name",
    [
        ({"clip_sample_range": -1.0}, "clip_sample_range"),
        ({"clip_sample_range": "wide"}, "clip_sample_range"),
        ({**THRESHOLDING, "dynamic_thresholding_ratio": 3.0}, "dynamic_thresholding_ratio"),
        ({**THRESHOLDING, "dynamic_thresholding_ratio": None}, "dynamic_thresholding_ratio"),
        ({**THRESHOLDING, "sample_max_value": 0}, "sample_max_value"),
    ],
)
def test_limits_that_are_none(settings, name):
    """They are noticed when a model is grown or loaded, not when it draws."""
    core, _ = make_foreign("unet")
    with pytest.raises(ValueError, match=f"`{name}={settings[name]!r}` of the scheduler must be a number above 0"):
        grow(core, DDPMScheduler(**settings))
    grow(core, DDPMScheduler(**{**settings, "thresholding": False, "clip_sample": False}))  # they do not apply


def test_a_configuration_with_entries_of_another_version(tmp_path):
    """diffusers loads such a model, with a warning. What it does not know is not part of the grown model's configuration."""
    core, process = make_foreign("unet")
    core.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_the_future": 1}))
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert loaded.config.of_the_future == 1
    grown = grow(loaded, process)
    assert grown.config.core_config.keys() == grow(core, process).config.core_config.keys()
    grown.save_pretrained(tmp_path / "grown")
    GrowableUNet2DConditionModel.from_pretrained(tmp_path / "grown")


def test_configurations_name_only_known_classes():
    """Loading builds what `config.json` says, so it says nothing but a model of the list and its arguments."""
    config = dict(grow(*make_foreign("unet")).config)
    core_config, process = config["core_config"], config["core_process"]
    for changes, message in [
        (
            {"core_config": {**core_config, "_class_name": "AutoencoderKL"}},
            "`_class_name` of .'PRXTransformer2DModel'",
        ),
        ({"core_config": {**core_config, "_class_name": ["os", "system"]}}, "`_class_name` of"),
        ({"core_config": "UNet2DModel"}, "`_class_name` of"),
        (
            {"core_config": {**core_config, "norm_num_groups": 0}},
            "not the configuration of a UNet2DModel: ZeroDivision",
        ),
        ({"core_config": {**core_config, "in_channels": "3"}}, "not the configuration of a UNet2DModel: TypeError"),
        ({"core_config": {**core_config, "code": 1}}, r"\['code'\], which a UNet2DModel does not know"),
        ({"core_process": {**process, "_class_name": "EulerDiscreteScheduler"}}, "`core_process=.*must have"),
        ({"core_process": {**process, "code": 1}}, "`core_process=.*must have"),
        ({"core_process": {**process, "num_train_timesteps": 10**9}}, "`num_train_timesteps=1000000000`"),
        ({"core_process": None}, "`core_process=None` must have"),
        ({"patch_size": 2}, "`patch_size=2` must be 1 for this `core_config`"),
        ({"num_layers": 3}, "`num_layers=3` must be None"),
    ]:
        with pytest.raises(ValueError, match=message):
            GrowableUNet2DConditionModel.from_config({**config, **changes})
    assert GrowableUNet2DConditionModel.from_config(config).core.process.prediction_type == "epsilon"


def test_process_survives_in_the_configuration():
    """All that says what the model was trained on, of any scheduler that is supported."""
    core, _ = make_foreign("unet")
    betas = torch.linspace(0.001, 0.05, 50).numpy()
    for scheduler in (
        DDPMScheduler(trained_betas=betas, num_train_timesteps=50),
        DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", clip_sample_range=2.0),
    ):
        grown = grow(core, scheduler)
        config = json.loads(json.dumps(grown.config.core_process))
        again = GrowableUNet2DConditionModel.from_config({**grown.config, "core_process": config}).core.process
        expected = scheduler.alphas_cumprod[scheduler.alphas_cumprod > 0].double()
        ratios = torch.from_numpy(again.log_ratios).exp().square()
        torch.testing.assert_close(1 / (1 + ratios), expected)
        assert again.prediction_type == scheduler.config.prediction_type
        assert again.clip_range == scheduler.config.clip_sample_range
