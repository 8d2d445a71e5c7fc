# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Growing pipelines of diffusers: small ones with random weights, loaded and from folders that they saved themselves."""

import copy
import json
import shutil

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    IFPipeline,
    LDMPipeline,
    PRXPixelPipeline,
)
from diffusers.utils import is_ftfy_available
from safetensors.torch import load_file, save_file
from transformers import (
    ByT5Tokenizer,
    Qwen3VLConfig,
    Qwen3VLModel,
    Qwen3VLTextConfig,
    Qwen3VLTextModel,
    Qwen3VLVisionConfig,
)
from transformers.utils import is_sentencepiece_available

from diffusers_greedy_grow import GreedyGrowPipeline, GrowableUNet2DConditionModel
from diffusers_greedy_grow.flow import high_band, pool, shift_sigma, upsample
from diffusers_greedy_grow.hub.cards import make_card
from diffusers_greedy_grow.models.cores.processes import build_process, describe_process
from diffusers_greedy_grow.pipelines.foreign import describe_foreign
from diffusers_greedy_grow.training.objective import find_training_shift
from diffusers_greedy_grow.training.text.captions import encode_captions
from diffusers_greedy_grow.training.text.small_encoder import build_small_text_encoder, train_small_tokenizer

from ..models.test_foreign_cores import make_foreign
from ..testing_utils import CAPTIONS, TEXT_DIM


PROMPTS = ["  A large RED circle &amp; a blue square ", "two green stars"]
NEGATIVE = "a yellow ring"


def make_prx_pixel(**kwargs) -> PRXPixelPipeline:
    torch.manual_seed(0)
    tokenizer = train_small_tokenizer(CAPTIONS)
    config = Qwen3VLTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_DIM,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
    )
    return PRXPixelPipeline(
        transformer=make_foreign("prx")[0],
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=Qwen3VLTextModel(config).eval(),
        tokenizer=tokenizer,
        **{"default_sample_size": 16, "prompt_max_tokens": 12, **kwargs},
    )


def make_if(**changes) -> IFPipeline:
    torch.manual_seed(0)
    tokenizer = ByT5Tokenizer()  # it tells upper from lower case
    unet, scheduler = make_foreign("if", **changes)
    encoder = build_small_text_encoder(tokenizer, hidden_size=TEXT_DIM, num_layers=1).eval()
    return IFPipeline(tokenizer, encoder, unet, scheduler, None, None, None, requires_safety_checker=False)


def grow(core, **kwargs) -> GreedyGrowPipeline:
    torch.manual_seed(1)
    grown = GreedyGrowPipeline.from_core(core, 32, (8,), **kwargs)
    grown.set_progress_bar_config(disable=True)
    return grown


def draw(pipeline: GreedyGrowPipeline, **kwargs) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return pipeline(latents=noise, num_inference_steps=2, output_type="pt", **kwargs).images


@torch.no_grad()
@pytest.mark.parametrize(
    "pipeline_class,scheduler", [(DDPMPipeline, DDPMScheduler()), (DDIMPipeline, DDIMScheduler())]
)
def test_unconditional_pipelines(pipeline_class, scheduler, tmp_path):
    core = pipeline_class(make_foreign("unet")[0], scheduler)
    core.save_pretrained(tmp_path / "core")
    grown, from_folder = grow(core, detail_variance=0.1), grow(tmp_path / "core")
    assert grown.unet.sample_sizes == (16, 32) and grown.scheduler.config.shift == 2
    assert grown.config.detail_variances == [0.1]
    expected = draw(grown)
    assert torch.equal(draw(from_folder), expected) and expected.std() > 0.01
    grown.save_pretrained(tmp_path / "grown")
    assert torch.equal(draw(GreedyGrowPipeline.from_pretrained(tmp_path / "grown")), expected)
    again = GreedyGrowPipeline.from_core(tmp_path / "grown", 64, (8,))
    assert again.unet.sample_sizes == (16, 32, 64) and again.scheduler.config.shift == 4


@torch.no_grad()
@pytest.mark.skipif(not is_ftfy_available(), reason="PRXPixelPipeline itself cleans prompts by ftfy")
def test_prx_pixel(tmp_path):
    core = make_prx_pixel()
    core.save_pretrained(tmp_path / "core")
    grown = grow(tmp_path / "core")
    grown.save_pretrained(tmp_path / "grown")
    expected = core.encode_prompt(PROMPTS, negative_prompt=NEGATIVE, num_images_per_prompt=1)
    for pipeline in (grow(core), grown, GreedyGrowPipeline.from_pretrained(tmp_path / "grown")):
        actual = pipeline.encode_prompt(PROMPTS, negative_prompt=NEGATIVE)
        for tensor, expected_tensor in zip(actual, expected, strict=True):
            assert torch.equal(tensor, expected_tensor)
    # The states are those of the original at its own times: noise of scale 2, and shift 3.
    assert grown.unet.core.process.noise_scale == 2 and grown.scheduler.config.shift == 3 * 2 * 2
    card = make_card(grown, "owner/name").text
    assert "pip install diffusers-greedy-grow ftfy\n" in card and "\n- Its core was trained by others" in card
    assert find_training_shift(grown) == 2  # of the growth alone, or low noise would hardly be trained on
    captions = encode_captions(grown, grown.text_encoder, PROMPTS, torch.device("cpu"))
    assert torch.equal(captions["encoder_hidden_states"], expected[0])
    assert draw(grown, prompt="", guidance_scale=3.0).isfinite().all()


@torch.no_grad()
@pytest.mark.skipif(not is_ftfy_available(), reason="PRXPixelPipeline itself cleans prompts by ftfy")
def test_a_text_encoder_that_could_see_images():
    """The width of the embeddings is then in a part of its configuration."""
    core = make_prx_pixel()
    vision = Qwen3VLVisionConfig(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=TEXT_DIM)
    config = Qwen3VLConfig(text_config=core.text_encoder.config, vision_config=vision)
    assert not hasattr(config, "hidden_size")
    core.text_encoder = Qwen3VLModel(config).eval()
    grown = grow(core)
    assert torch.equal(grown.encode_prompt(PROMPTS)[0], core.encode_prompt(PROMPTS)[0])


@torch.no_grad()
def test_if_encodes_as_it_did(tmp_path):
    core = make_if()
    core.save_pretrained(tmp_path / "core")
    grown = grow(tmp_path / "core")
    grown.save_pretrained(tmp_path / "grown")
    expected, expected_negative = core.encode_prompt(PROMPTS, negative_prompt=[NEGATIVE] * 2)
    for pipeline in (grow(core), grown, GreedyGrowPipeline.from_pretrained(tmp_path / "grown")):
        embeds, mask, negative_embeds, _ = pipeline.encode_prompt(PROMPTS, negative_prompt=NEGATIVE)
        assert torch.equal(embeds, expected) and torch.equal(negative_embeds, expected_negative)
        assert embeds.shape[1] == 77 and mask[0].sum() < 77
    assert draw(grown, prompt=PROMPTS[0]).isfinite().all()
    # With its components, with a copy of its model, and without a model
    for changes in ({}, {"unet": copy.deepcopy(grown.unet)}, {"unet": None, "scheduler": None}):
        again = GreedyGrowPipeline(**{**grown.components, **changes})
        assert torch.equal(again.encode_prompt(PROMPTS, negative_prompt=NEGATIVE)[0], expected)


@torch.no_grad()
def test_a_step_of_prx_pixel_is_the_originals():
    """At the first timestep, the grown model's image pools to what the original transformer predicts from the same noise."""
    core = make_prx_pixel()
    grown = grow(core)
    noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    text, mask = torch.randn(1, 12, TEXT_DIM), torch.ones(1, 12, dtype=torch.bool)
    expected = core.transformer(2 * 2 * pool(noise, 2), torch.ones(1), text, mask).sample
    output = grown.unet(noise, 1000.0, text, mask).pred_original_sample
    torch.testing.assert_close(pool(output, 2), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("guidance_scale", [1.0, 7.0])
def test_guidance_of_if_is_the_originals(guidance_scale, monkeypatch):
    """
    At each of the original's states, the grown model's image, guided at its core, pools to the original's clean image: it
    guides the noise, leaves the variance as it is, and then thresholds. With this guidance, most values exceed the limits.
    """
    core = make_if()
    grown = grow(core)
    scheduler, seen = core.scheduler, []
    original_step = scheduler.step

    def step(prediction, timestep, state, **kwargs):
        output = original_step(prediction, timestep, state, **{**kwargs, "return_dict": True})
        seen.append((timestep, state, output.pred_original_sample))
        return (output.prev_sample,)

    monkeypatch.setattr(scheduler, "step", step)
    core.set_progress_bar_config(disable=True)
    text = {"prompt": PROMPTS[0], "negative_prompt": NEGATIVE}
    core(**text, num_inference_steps=3, guidance_scale=guidance_scale, output_type="pt")
    assert len(seen) == 3
    embeds, mask, negative_embeds, negative_mask = grown.encode_prompt(**text)
    grown._guidance_scale, grown._guider = guidance_scale, None
    guidance = {
        "negative_encoder_hidden_states": negative_embeds,
        "negative_encoder_attention_mask": negative_mask,
        "guide": grown.guide,
    }
    for timestep, state, expected in seen:
        # The state with detail, in our process: its noise level is that of a pooled state at this timestep.
        ratio = ((1 - scheduler.alphas_cumprod[timestep]) / scheduler.alphas_cumprod[timestep]).sqrt()
        sigma_in = ratio / (1 + ratio)
        sigma = shift_sigma(sigma_in, 2)
        x_in = state * ((1 - sigma_in) ** 2 + sigma_in**2).sqrt()
        x = upsample(x_in * ((1 - sigma) + sigma / 2), 2)
        x = x + high_band(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), 2)
        output = grown.unet(x, 1000 * sigma, embeds, mask, **(guidance if guidance_scale > 1 else {}))
        assert expected.std() > 0.05
        torch.testing.assert_close(pool(output.pred_original_sample, 2), expected, atol=2e-3, rtol=2e-3)


def test_what_is_no_pipeline_in_pixel_space(tmp_path):
    """Each error says what can be grown."""
    unet, scheduler = make_foreign("unet")
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    latent = LDMPipeline(vae, unet, DDIMScheduler())
    supported = (
        "is a LDMPipeline. Pipelines that can be grown are .*DDPMPipeline, DDIMPipeline, IFPipeline, PRXPixelPipeline"
    )
    with pytest.raises(ValueError, match=supported):
        grow(latent)
    with pytest.raises(
        ValueError, match="but is a LDMPipeline. A pipeline is grown by `GreedyGrowPipeline.from_core`"
    ):
        GrowableUNet2DConditionModel.from_core(latent, 32, (8,))
    with pytest.raises(ValueError, match="`num_class_embeds=3`.*classes are not supported"):
        grow(DDPMPipeline(make_foreign("unet", num_class_embeds=3)[0], scheduler))
    core = DDPMPipeline(unet, scheduler)
    core.scheduler = EulerDiscreteScheduler()
    with pytest.raises(
        TypeError, match="must be the DDPMScheduler or DDIMScheduler .* but is a EulerDiscreteScheduler"
    ):
        grow(core)
    core.scheduler = scheduler
    for size, message in ((24, "must be a larger multiple of the core's 16: 32"), (48, "32 would fit")):
        with pytest.raises(ValueError, match=f"`sample_size={size}`.*{message}"):
            GreedyGrowPipeline.from_core(core, size, (8,))
    # A model alone, in a folder
    core.save_pretrained(tmp_path)
    vae.save_pretrained(tmp_path / "vae")
    for folder, message in (
        (
            tmp_path,
            "holds a UNet2DModel, without the process .* or grow its pipeline by `GreedyGrowPipeline.from_core`",
        ),
        (tmp_path / "unet", "load it by `diffusers.UNet2DModel.from_pretrained`, and pass it with its `process`"),
        (tmp_path / "vae", "holds a AutoencoderKL; only ShallowUNet2DModel, .*, PRXTransformer2DModel can be grown"),
    ):
        with pytest.raises(ValueError, match=message):
            GrowableUNet2DConditionModel.from_core(folder, 32, (8,))


def test_a_core_without_all_of_its_weights(tmp_path):
    """diffusers would only warn, and make the missing weights random."""
    core = DDPMPipeline(*make_foreign("unet"))
    core.save_pretrained(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    state = load_file(weights)
    bias = state.pop("conv_in.bias")
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"does not hold the weights that its config.json describes: .*\['conv_in.bias'\]"
    ):
        grow(tmp_path)
    save_file({**state, "conv_in.bias": bias, "more": bias.clone()}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"does not hold the weights that its config.json describes: .*\['more'\]"):
        grow(tmp_path)
    save_file({**state, "conv_in.bias": bias[1:].clone()}, weights, {"format": "pt"})
    with pytest.raises(
        OSError, match="cannot be loaded: .*conv_in.bias expected shape.*do not belong to its config.json"
    ):
        grow(tmp_path)
    weights.write_bytes(content[:-1000])
    with pytest.raises(OSError, match="cannot be loaded: .*its weights are missing, damaged"):
        grow(tmp_path)
    weights.unlink()
    with pytest.raises(OSError, match="cannot be loaded: .*its weights are missing, damaged"):
        grow(tmp_path)
    torch.save(core.unet.state_dict(), weights.with_suffix(".bin"))
    with pytest.raises(OSError, match="cannot be loaded: .*no file named diffusion_pytorch_model.safetensors"):
        grow(tmp_path)
    weights.write_bytes(content)
    grow(tmp_path)


def test_a_dtype_for_the_model_alone(tmp_path):
    """Whatever the pipeline calls its model."""
    for core, name in ((make_if(), "unet"), (make_prx_pixel(), "transformer")):
        core.save_pretrained(tmp_path / name)
        grown = grow(tmp_path / name, dtype={name: torch.bfloat16, "default": torch.float32})
        assert grown.unet.dtype == torch.bfloat16 and grown.text_encoder.dtype == torch.float32


def test_prx_pixel_without_a_size():
    """The resolution is then that at which the original draws."""
    core = make_prx_pixel(default_sample_size=None)
    grown = GreedyGrowPipeline.from_core(core, 2048, (8,) * 3)
    assert grown.unet.sample_sizes == (1024, 2048)


def test_arguments_of_loading(tmp_path):
    """diffusers would ignore those that it does not know, with a resolution among them, and run a pipeline's code from elsewhere."""
    make_if().save_pretrained(tmp_path)
    grown = grow(tmp_path, text_encoder=None, safety_checker=None, dtype=torch.float16, local_files_only=True)
    assert grown.text_encoder is None and grown.unet.dtype == torch.float16
    for name, value in (("core_sample_size", 32), ("custom_pipeline", "user/code"), ("trust_remote_code", True)):
        with pytest.raises(TypeError, match=rf"\['{name}'\] are not arguments to load a IFPipeline to grow"):
            grow(tmp_path, **{name: value})


@pytest.mark.skipif(is_sentencepiece_available(), reason="sentencepiece is installed")
def test_a_tokenizer_that_needs_sentencepiece(tmp_path):
    """As DeepFloyd IF has it. transformers asks for tiktoken, which would not help."""
    make_if().save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "tokenizer")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(b"\x0a\x05")
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace("ByT5Tokenizer", "T5Tokenizer"))
    with pytest.raises(ImportError, match="`core=.*` is read by sentencepiece: `pip install sentencepiece protobuf`"):
        grow(tmp_path)


def test_pipelines_that_cannot_be_grown(tmp_path):
    with pytest.raises(ValueError, match="`out_channels=9`.*with variances"):
        grow(make_if(out_channels=9))
    core = DDPMPipeline(*make_foreign("unet"))
    with pytest.raises(TypeError, match=r"\['dtype'\] only apply when `core` is a path"):
        grow(core, dtype=torch.float16)
    with pytest.raises(ValueError, match="a DDIMScheduler for a scheduler"):
        prx = make_prx_pixel()
        prx.scheduler = DDIMScheduler()
        grow(prx)

    core.save_pretrained(tmp_path / "core")
    index = tmp_path / "core" / "model_index.json"
    config = json.loads(index.read_text())
    with pytest.raises(ValueError, match="`use_safetensors=False` asks for pickled weights"):
        grow(tmp_path / "core", use_safetensors=False)
    for changes, message in (
        (
            {"_class_name": "StableDiffusionPipeline"},
            "holds a StableDiffusionPipeline. Pipelines that can be grown are .*IFPipeline, .*without a VAE",
        ),
        ({"_class_name": "DiTPipeline"}, "holds a DiTPipeline. Pipelines that can be grown are .*IFPipeline"),
        ({"unet": ["diffusers", "AutoencoderKL"]}, "must have one model of UNet2DModel, UNet2DConditionModel"),
        ({"scheduler": ["os", "system"]}, "components of other packages.*{'scheduler': 'os'}"),
        ({"scheduler": None}, "must name a library and a class for each component, with a `scheduler` among them"),
        ({"scheduler": [None, None]}, "must name a library and a class for each component"),
        ({"scheduler": []}, "must name a library and a class for each component"),
        ({"unet": ["diffusers"]}, "must name a library and a class for each component"),
    ):
        index.write_text(json.dumps({**config, **changes}))
        for read in (grow, describe_foreign):
            with pytest.raises(ValueError, match=message):
                read(tmp_path / "core")
    for content, error, message in (
        ("[]", ValueError, "a `model_index.json` that is no dictionary"),
        ("{", OSError, "model_index.json' is not a valid JSON file"),
    ):
        index.write_text(content)
        for read in (grow, describe_foreign):
            with pytest.raises(error, match=message):
                read(tmp_path / "core")
    index.write_text(json.dumps(config))
    unet = tmp_path / "core" / "unet" / "config.json"
    settings = unet.read_text()
    unet.write_text(json.dumps({**json.loads(settings), "norm_num_groups": 0}))
    with pytest.raises(OSError, match="cannot be loaded: ZeroDivisionError"):
        grow(tmp_path / "core")
    with pytest.raises(ValueError, match="a `unet` whose configuration is not one of a UNet2DModel"):
        describe_foreign(tmp_path / "core")
    unet.write_text(settings)
    scheduler = tmp_path / "core" / "scheduler" / "scheduler_config.json"
    for changes in ({"trained_betas": ["a"]}, {"beta_schedule": "x"}):
        settings = json.loads(scheduler.read_text())
        scheduler.write_text(json.dumps({**settings, **changes}))
        with pytest.raises(ValueError, match="a `scheduler` whose configuration is not one of a DDPMScheduler"):
            describe_foreign(tmp_path / "core")
        scheduler.write_text(json.dumps(settings))
        with pytest.raises(ValueError, match="`core_process=.* is not the configuration of a DDPMScheduler"):
            build_process({**describe_process(core.scheduler), **changes})
    with pytest.raises(ValueError, match="`prompt_format='x'` must be None or one of"):
        GreedyGrowPipeline(**{**grow(make_if()).components, "prompt_format": "x"})
