# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

import inspect
import logging
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForText2Image,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    SkipLayerGuidance,
)
from diffusers.pipelines.prx.pipeline_prx_pixel import PRXPixelPipeline
from diffusers.utils import is_torch_version
from PIL import Image
from tokenizers import processors
from transformers import ByT5Tokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from diffusers_greedy_grow import GreedyGrowPipeline, GrowableUNet2DConditionModel
from diffusers_greedy_grow.flow import (
    descend,
    expand,
    high_band,
    pool,
    shift_sigma,
    state_scale,
    unshift_sigma,
    upsample,
)
from diffusers_greedy_grow.models.attention import GreedyGrowAttnProcessor
from diffusers_greedy_grow.models.blocks import GreedyGrowOutput
from diffusers_greedy_grow.pipelines.denoising import TEXT_NAMES
from diffusers_greedy_grow.pipelines.schedules import count_stages, get_handover_sigmas

from ..testing_utils import TEXT_DIM, draw_one, make_core, make_grown, make_pipeline, randomize


PROMPTS = ["a large red circle", "a small blue square on a white background"]


MULTISTEP = [
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0),
    DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0),
]


def draw(pipeline: GreedyGrowPipeline, prompt=PROMPTS, seed: int = 0, **kwargs) -> torch.Tensor:
    """Images `(B, C, H, W)`, unclamped."""
    kwargs = {"num_inference_steps": 4, "output_type": "latent", **kwargs}
    if "latents" not in kwargs and "generator" not in kwargs:
        kwargs["generator"] = torch.Generator().manual_seed(seed)
    return pipeline(prompt, **kwargs).images


# ----------------------------------------------------------------------------------------------------------------------
# Images


@pytest.mark.parametrize("kind", ["core", "grown"])
def test_images(kind):
    pipeline = make_pipeline(make_core() if kind == "core" else make_grown(), shift=1.0 if kind == "core" else 2.0)
    size = 16 if kind == "core" else 32
    kwargs = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0)}
    images = pipeline(PROMPTS, **kwargs).images
    assert len(images) == 2 and all(isinstance(image, Image.Image) and image.size == (size, size) for image in images)
    assert np.std(np.array(images[0])) > 1 and np.any(np.array(images[0]) != np.array(images[1]))
    for output_type, shape in (("np", (2, size, size, 3)), ("pt", (2, 3, size, size)), ("latent", (2, 3, size, size))):
        (output,) = pipeline(PROMPTS, output_type=output_type, return_dict=False, **kwargs)
        assert output.shape == shape
        if output_type != "latent":
            assert output.min() >= 0 and output.max() <= 1


def test_other_sizes(pipeline):
    assert draw(pipeline, height=24, width=8).shape == (2, 3, 24, 8)
    assert pipeline("a circle", height=8, width=24, num_inference_steps=1).images[0].size == (24, 8)


def test_the_same_seed_gives_the_same_image(pipeline):
    assert torch.equal(draw(pipeline, seed=3), draw(pipeline, seed=3))
    assert not torch.equal(draw(pipeline, seed=3), draw(pipeline, seed=4))


def test_an_image_is_the_same_alone_and_in_a_batch(pipeline):
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7, 8)]
    batch = draw(pipeline, num_images_per_prompt=2, generator=generators)
    assert batch.shape[0] == 4
    for i, seed in enumerate((5, 6, 7, 8)):
        alone = draw(pipeline, PROMPTS[i // 2], generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(alone[0], batch[i], atol=1e-4, rtol=1e-4)


def test_guidance(pipeline):
    latents = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    kwargs = {"prompt": PROMPTS[0], "latents": latents, "timesteps": [600.0]}
    with_prompt = draw(pipeline, guidance_scale=1.0, **kwargs)
    with_negative = draw(pipeline, **{**kwargs, "prompt": "a blue ring"}, guidance_scale=1.0)
    guided = draw(pipeline, guidance_scale=3.0, negative_prompt="a blue ring", **kwargs)
    # One Euler step is linear in the velocity, and so is guidance.
    torch.testing.assert_close(guided, with_negative + 3 * (with_prompt - with_negative), atol=1e-4, rtol=1e-4)
    assert pipeline.guidance_scale == 3.0 and pipeline.num_timesteps == 1
    unguided = draw(pipeline, guidance_scale=1.0, negative_prompt="a blue ring", **kwargs)
    assert torch.equal(unguided, with_prompt)
    each = draw(pipeline, negative_prompt=["a", "a blue ring"], latents=latents.repeat(2, 1, 1, 1))
    assert not torch.allclose(each, draw(pipeline, negative_prompt="a", latents=latents.repeat(2, 1, 1, 1)))


def test_prompt_embeds_stand_for_prompts(pipeline):
    embeds, mask, negative_embeds, negative_mask = pipeline.encode_prompt(PROMPTS, negative_prompt="a green star")
    assert embeds.shape == negative_embeds.shape and mask.dtype == torch.bool and mask.shape == embeds.shape[:2]
    expected = draw(pipeline, negative_prompt="a green star", num_images_per_prompt=2)
    actual = draw(
        pipeline,
        None,
        num_images_per_prompt=2,
        prompt_embeds=embeds,
        prompt_attention_mask=mask,
        negative_prompt_embeds=negative_embeds,
        negative_prompt_attention_mask=negative_mask,
    )
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    bare = GreedyGrowPipeline(pipeline.unet, pipeline.scheduler)
    bare.set_progress_bar_config(disable=True)
    assert draw(bare, None, prompt_embeds=embeds, guidance_scale=1.0).shape[0] == 2


def test_padding_does_not_count(pipeline):
    kwargs = {"latents": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)), "guidance_scale": 1.0}
    alone = draw(pipeline, PROMPTS[0], **kwargs)
    padded = draw(pipeline, PROMPTS, latents=kwargs["latents"].repeat(2, 1, 1, 1), guidance_scale=1.0)
    torch.testing.assert_close(padded[:1], alone, atol=1e-4, rtol=1e-4)


def test_unconditional():
    pipeline = GreedyGrowPipeline(make_core(cross_attention_dim=None), FlowMatchEulerDiscreteScheduler())
    pipeline.set_progress_bar_config(disable=True)
    assert draw(pipeline, None, num_images_per_prompt=3).shape == (3, 3, 16, 16)
    for name in ("prompt", "negative_prompt", "negative_prompt_embeds", "prompt_attention_mask"):
        with pytest.raises(ValueError, match="unconditional"):
            pipeline(**{name: "a circle"})


def test_the_state_is_in_float32_whatever_the_model_is_in():
    pipeline = make_pipeline(make_grown()).to(torch.bfloat16)
    states, timesteps = [], []

    def keep(model, args):
        states.append(args[0])
        timesteps.append(args[1])

    pipeline.unet.register_forward_pre_hook(keep)
    draw(pipeline, PROMPTS[0], num_inference_steps=7)
    assert {value.dtype for value in (*states, *timesteps)} == {torch.float32}
    assert [value[0].item() for value in timesteps] == pytest.approx(pipeline.scheduler.timesteps.tolist())


def test_callback(pipeline):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), set(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else {}

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    images = draw(pipeline, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert [step for step, _, _ in seen] == [0, 1, 2, 3] and seen[0][1] > seen[-1][1]
    assert seen[0][2] == set(names)
    assert not images.any()


def test_a_callback_sees_the_clean_image_that_a_step_predicts(pipeline):
    predicted = []

    def look(pipe, step, timestep, tensors):
        predicted.append(tensors["pred_original_sample"].clone())
        return {"pred_original_sample": torch.zeros_like(predicted[-1])}  # without effect

    names = ["pred_original_sample"]
    image = draw(pipeline, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    assert len(predicted) == 4 and not torch.allclose(predicted[0], predicted[3], atol=1e-2)
    # The last step of Euler's method ends at the image that it predicts.
    torch.testing.assert_close(predicted[-1], image)
    assert torch.equal(image, draw(pipeline))


def test_callbacks_of_diffusers(pipeline):
    expected = draw(pipeline, PROMPTS[0], guidance_stop=0.5)
    callback = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    for one in (callback, MultiPipelineCallbacks([callback])):
        torch.testing.assert_close(draw(pipeline, PROMPTS[0], guidance_stop=1.0, callback_on_step_end=one), expected)


def test_a_callback_can_change_to_a_prompt_of_another_length(pipeline):
    """With the new text comes its mask: its padding does not count, and all of its tokens do."""
    embeds, mask, *_ = pipeline.encode_prompt(PROMPTS[1], do_classifier_free_guidance=False)
    padded = torch.cat([embeds, torch.full((1, 3, TEXT_DIM), 9.0)], dim=1), torch.cat([mask, ~mask[:, :3]], dim=1)
    images = [draw(pipeline, "a", guidance_scale=1.0)]
    for text in ((embeds, mask), padded):
        change = dict(zip(("prompt_embeds", "prompt_attention_mask"), text))
        images.append(draw(pipeline, "a", guidance_scale=1.0, callback_on_step_end=lambda *args, c=change: c))
    torch.testing.assert_close(images[2], images[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(images[1], images[0], atol=1e-2)


def test_a_callback_can_stop(pipeline):
    states = []

    def stop(pipe, step, timestep, tensors):
        states.append(tensors["latents"])
        pipe._interrupt = step == 1

    assert torch.equal(draw(pipeline, callback_on_step_end=stop), states[1])
    assert len(states) == 2 and pipeline.interrupt
    assert not torch.equal(draw(pipeline), states[1]) and not pipeline.interrupt


def test_long_prompts_are_cut_with_a_warning(pipeline, caplog):
    logging.getLogger("diffusers").propagate = True
    draw(pipeline, "a red circle " * 50)
    assert "Only the first 24 tokens" in caplog.text


# ----------------------------------------------------------------------------------------------------------------------
# Schedulers and text encoders


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=2.0),
        FlowMatchHeunDiscreteScheduler(shift=2.0),
        *MULTISTEP,
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_schedulers_arrive_at_the_exact_image(monkeypatch, scheduler):
    """For normally distributed pixels the best denoiser is known, and so is the image that each noise leads to."""
    mean, deviation = 0.4, 0.3

    def denoise(sample, timestep, **kwargs):
        sigma = expand(timestep / 1000, sample)
        slope = (1 - sigma) * deviation**2 / ((1 - sigma) ** 2 * deviation**2 + sigma**2)
        return GreedyGrowOutput(pred_original_sample=mean + slope * (sample - (1 - sigma) * mean))

    euler = make_pipeline(make_core(), shift=2.0)
    monkeypatch.setattr(euler.unet, "forward", denoise)
    other = GreedyGrowPipeline(euler.unet, scheduler, euler.text_encoder, euler.tokenizer)
    other.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    kwargs = {"prompt": PROMPTS[0], "latents": latents, "guidance_scale": 1.0}
    exact = mean + deviation * latents
    error = (draw(other, num_inference_steps=200, **kwargs) - exact).abs().mean()
    coarse = (draw(euler, num_inference_steps=5, **kwargs) - exact).abs().mean()
    assert error < 0.3 * coarse and 127.5 * error < 1  # gray level


@pytest.mark.parametrize("order", [1, 2])
def test_no_noise_is_left_in_an_image(order):
    """A core that always predicts gray leads to a gray image, also with the low last noise levels of a shifted scheduler."""
    core = make_core()
    core.zero_init_output()
    pipeline = make_pipeline(core)
    kind = FlowMatchEulerDiscreteScheduler if order == 1 else FlowMatchHeunDiscreteScheduler
    pipeline.scheduler = kind(shift=4.0)
    assert draw(pipeline, num_inference_steps=28).abs().max() < 1e-3


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchLCMScheduler(shift=1.0),
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        DPMSolverMultistepScheduler.from_config(MULTISTEP[1].config, algorithm_type="sde-dpmsolver++"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_stochastic_schedulers(pipeline, scheduler):
    """The generator also gives the noise that they add."""
    pipeline.scheduler = scheduler
    alone = draw(pipeline, PROMPTS[0], seed=3)
    assert alone.isfinite().all() and torch.equal(draw(pipeline, PROMPTS[0], seed=3), alone)
    batch = draw(pipeline, generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)])
    torch.testing.assert_close(batch[:1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_timesteps_are_taken_as_given(scheduler):
    parts = make_pipeline()
    pipeline = GreedyGrowPipeline(parts.unet, scheduler, parts.text_encoder, parts.tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    seen = []
    draw(
        pipeline,
        timesteps=[900.0, 500.0, 100.0],
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append(float(t)),
    )
    np.testing.assert_allclose(seen, [900, 500, 100], atol=1)


@pytest.mark.parametrize("setting", [{"shift_terminal": 0.02}, {"use_karras_sigmas": True}, "set_shift"])
def test_timesteps_that_the_scheduler_changes_are_refused(pipeline, setting):
    calls = []
    pipeline.text_encoder.register_forward_hook(lambda *args: calls.append(args))
    if setting == "set_shift":
        pipeline.scheduler.set_shift(5.0)
    else:
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**setting)
    with pytest.raises(ValueError, match=r"`scheduler` changes `timesteps=\[900.0, 500.0, 100.0\]` to \[.*\]: pass"):
        draw(pipeline, timesteps=[900.0, 500.0, 100.0])
    assert not calls
    assert draw(pipeline).isfinite().all()


def test_other_schedulers_are_refused():
    for scheduler in (DDIMScheduler(), UniPCMultistepScheduler(), DDIMScheduler.from_config(MULTISTEP[0].config)):
        with pytest.raises(
            ValueError, match=f"`scheduler` is a {type(scheduler).__name__}.*does not do flow matching"
        ):
            GreedyGrowPipeline(make_core(), scheduler)
    for setting in ({"use_dynamic_shifting": True}, {"invert_sigmas": True}, {"num_train_timesteps": 100}):
        with pytest.raises(ValueError, match=f"`scheduler` has `{[*setting][0]}=.*: set `{[*setting][0]}="):
            GreedyGrowPipeline(make_core(), FlowMatchEulerDiscreteScheduler(**setting))


def test_an_exchanged_scheduler_is_checked():
    pipeline = make_pipeline(make_grown(), shift=2.0)
    euler = pipeline.scheduler.config
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    differs = (
        "`scheduler` has `{}=1.0`, but was made from the config of another kind.*: pass `{}=2.0` to `from_config`"
    )
    for scheduler, message in (
        (DDIMScheduler.from_config(euler), "does not do flow matching"),
        (UniPCMultistepScheduler.from_config(euler, **flow), differs.format("flow_shift", "flow_shift")),
        (FlowMatchHeunDiscreteScheduler.from_config(MULTISTEP[0].config), differs.format("shift", "shift")),
    ):
        pipeline.scheduler = scheduler
        with pytest.raises(ValueError, match=message):
            draw(pipeline)
        with pytest.raises(ValueError, match=message):
            GreedyGrowPipeline.from_core(pipeline, 64, block_out_channels=(8,))
    pipeline.scheduler = UniPCMultistepScheduler.from_config(euler, **flow, flow_shift=2.0)
    assert draw(pipeline).isfinite().all()


@pytest.mark.parametrize("where", ["full", "core"])
def test_a_text_encoder_in_float16_under_autocast(grown, where):
    """As training draws its samples with `mixed_precision="bf16"`."""
    pipeline = make_pipeline(grown)
    pipeline.text_encoder.to(torch.float16)
    arguments = {"guidance_scale": 3.0, "guidance_resolution": where}
    expected = draw_one(pipeline, **arguments)
    with torch.autocast("cpu", torch.bfloat16):
        image = draw_one(pipeline, **arguments)
    # torch below 2.13 rounds attention in float16 more coarsely.
    assert (image.float() - expected).abs().mean() < (0.02 if is_torch_version(">=", "2.13") else 0.03)


def test_text_encoders(tmp_path, caplog):
    logging.getLogger("diffusers").propagate = True
    t5 = T5EncoderModel(T5Config(d_model=TEXT_DIM, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=384)).eval()
    pipeline = GreedyGrowPipeline(make_core(), FlowMatchEulerDiscreteScheduler(), t5, ByT5Tokenizer())
    pipeline.set_progress_bar_config(disable=True)
    expected = draw(pipeline)
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(draw(GreedyGrowPipeline.from_pretrained(tmp_path)), expected)

    tokenizer = make_pipeline().tokenizer
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT_DIM, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=32, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    pipeline = GreedyGrowPipeline(
        make_core(), FlowMatchEulerDiscreteScheduler(), CLIPTextModel(config).eval(), tokenizer, 32
    )
    pipeline.set_progress_bar_config(disable=True)
    assert draw(pipeline).isfinite().all()

    # An encoder with fewer positions than the pipeline would read
    tokenizer.model_max_length = 32
    pipeline.register_to_config(max_sequence_length=128)
    caplog.clear()
    assert draw(pipeline, "a red circle " * 50).isfinite().all()
    assert "Only the first 32 tokens" in caplog.text


def test_a_tokenizer_that_ends_nothing(pipeline):
    """It makes no tokens at all from an empty prompt."""
    pipeline.tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    assert pipeline.tokenizer("")["input_ids"] == []
    empty = draw(pipeline, "", guidance_scale=1.0)
    assert empty.isfinite().all()
    both = draw(pipeline, ["", PROMPTS[0]], generator=[torch.Generator().manual_seed(0)] * 2, guidance_scale=1.0)
    torch.testing.assert_close(both[:1], empty, atol=1e-4, rtol=1e-4)


def test_a_text_encoder_of_another_width_is_refused():
    parts = make_pipeline()
    with pytest.raises(
        ValueError, match="`text_encoder` returns 32 channels, but `unet` has `cross_attention_dim=16`"
    ):
        GreedyGrowPipeline(make_core(cross_attention_dim=16), parts.scheduler, parts.text_encoder, parts.tokenizer)


# ----------------------------------------------------------------------------------------------------------------------
# Growing


@pytest.mark.parametrize("source", ["pipeline", "folder"])
def test_a_grown_pipeline_samples_what_its_core_samples(source, tmp_path):
    core = make_pipeline(make_core(), shift=1.0)
    if source == "folder":
        core.save_pretrained(tmp_path)
    grown = GreedyGrowPipeline.from_core(core if source == "pipeline" else tmp_path, 64, block_out_channels=(8, 16))
    grown.set_progress_bar_config(disable=True)
    assert grown.scheduler.config.shift == 4.0 and core.scheduler.config.shift == 1.0
    assert grown.tokenizer.get_vocab() == core.tokenizer.get_vocab()
    assert grown.config.max_sequence_length == 24

    # By the law of the process the states agree step by step, above the clamped noise levels.
    noise = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    state, _ = descend(noise, torch.ones(2), 4)
    core_timesteps = [1000.0, 800.0, 600.0, 300.0, 100.0]
    timesteps = [4 * t / (1 + 3 * t / 1000) for t in core_timesteps]
    expected = draw(core, latents=state, timesteps=core_timesteps, guidance_scale=3.0)
    images = draw(grown, latents=noise, timesteps=timesteps, guidance_scale=3.0)
    assert expected.std() > 0.1
    assert (pool(images, 4) - expected).abs().max() < 1e-3 * expected.abs().max()


def test_growing_twice_multiplies_the_shift():
    grown = GreedyGrowPipeline.from_core(make_pipeline(make_core()), 32, block_out_channels=(8,))
    again = GreedyGrowPipeline.from_core(grown, 128, block_out_channels=(8,))
    assert again.scheduler.config.shift == 8.0 and again.unet.sample_sizes == (16, 32, 128)


def test_growing_sets_the_shift_of_multistep_solvers():
    parts = make_pipeline()
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)
    pipeline = GreedyGrowPipeline(parts.unet, scheduler, parts.text_encoder, parts.tokenizer)
    assert GreedyGrowPipeline.from_core(pipeline, 32, block_out_channels=(8,)).scheduler.config.flow_shift == 2.0

    # A scheduler made from another kind's config has that one's entry, too.
    pipeline.scheduler = UniPCMultistepScheduler.from_config({**scheduler.config, "shift": 3.0}, flow_shift=3.0)
    grown = GreedyGrowPipeline.from_core(pipeline, 32, block_out_channels=(8,))
    assert grown.scheduler.config.flow_shift == grown.scheduler.config.shift == 6.0
    assert draw(grown, num_inference_steps=2).isfinite().all()
    grown.scheduler = FlowMatchEulerDiscreteScheduler.from_config(grown.scheduler.config)
    assert GreedyGrowPipeline.from_core(grown, 64, block_out_channels=(8,)).scheduler.shift == 12.0


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_growing_with_a_dtype_for_each_component(pipeline, name, tmp_path):
    pipeline.save_pretrained(tmp_path)
    for dtypes, expected in (
        ({"unet": torch.bfloat16, "default": torch.float16}, (torch.bfloat16, torch.float16)),
        ({"default": torch.float16}, (torch.float16, torch.float16)),
        ({"text_encoder": torch.bfloat16}, (torch.float32, torch.bfloat16)),
    ):
        with pytest.warns(FutureWarning, match="`torch_dtype`") if name == "torch_dtype" else nullcontext():
            grown = GreedyGrowPipeline.from_core(tmp_path, 32, block_out_channels=(8,), **{name: dtypes})
        assert (grown.unet.dtype, grown.text_encoder.dtype) == expected


def test_growing_with_what_is_the_pipelines_own(tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    kwargs = {"text_encoder": None, "tokenizer": None, "max_sequence_length": 7, "dtype": torch.bfloat16}
    grown = GreedyGrowPipeline.from_core(tmp_path, 32, block_out_channels=(8,), **kwargs)
    assert grown.text_encoder is None and grown.config.max_sequence_length == 7
    assert grown.unet.dtype == torch.bfloat16


def test_growing_says_what_does_not_fit(pipeline, tmp_path):
    with pytest.raises(ValueError, match="`core` must be a GreedyGrowPipeline.*but is a ShallowUNet2DModel"):
        GreedyGrowPipeline.from_core(pipeline.unet, 32)
    with pytest.raises(ValueError, match="`sample_size=24`"):
        GreedyGrowPipeline.from_core(pipeline, 24)
    with pytest.raises(ValueError, match="`detail_variance=0.0` must be positive.*leave it out for images without"):
        GreedyGrowPipeline.from_core(pipeline, 32, detail_variance=0.0)
    with pytest.raises(TypeError, match="revision"):
        GreedyGrowPipeline.from_core(pipeline, 32, revision="main")
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(
        OSError, match="`low_cpu_mem_usage` cannot be False.* Unless that is about an argument of yours"
    ):
        GreedyGrowPipeline.from_core(tmp_path, 32, low_cpu_mem_usage=False)
    with pytest.raises(
        TypeError, match=r"\['layer_per_block'\] are not arguments of `ShallowUNet2DModel.from_pretrained`"
    ):
        GreedyGrowPipeline.from_core(tmp_path, 32, layer_per_block=3)
    with pytest.raises(
        TypeError, match=r"\['detail_variances'\] are those of `core`; the new .* is `detail_variance`"
    ):
        GreedyGrowPipeline.from_core(tmp_path, 32, detail_variances=[0.1])
    with pytest.raises(TypeError, match="`subfolder='unet'` names a part of a pipeline"):
        GreedyGrowPipeline.from_core(tmp_path, 32, subfolder="unet")
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match="weights are missing, damaged"):
        GreedyGrowPipeline.from_core(tmp_path, 32)


# ----------------------------------------------------------------------------------------------------------------------
# Folders


@pytest.mark.slow
def test_a_new_process_draws_the_same_image(tmp_path):
    pipeline = GreedyGrowPipeline.from_core(make_pipeline(), 32, block_out_channels=(8,))
    pipeline.unet = make_grown()
    expected = draw(pipeline, seed=11)
    pipeline.save_pretrained(tmp_path / "pipeline")
    code = (
        "import sys, torch, diffusers, diffusers_greedy_grow\n"
        "pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1] + '/pipeline')\n"
        "assert type(pipe) is diffusers_greedy_grow.GreedyGrowPipeline\n"
        f"images = pipe({PROMPTS!r}, num_inference_steps=4, output_type='latent',"
        " generator=torch.Generator().manual_seed(11)).images\n"
        "torch.save(images, sys.argv[1] + '/images.pt')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert torch.equal(torch.load(tmp_path / "images.pt"), expected)


@pytest.mark.parametrize("loader", [GreedyGrowPipeline, DiffusionPipeline, AutoPipelineForText2Image])
def test_every_loader_loads_it(pipeline, loader, tmp_path):
    pipeline.save_pretrained(tmp_path)
    index = GreedyGrowPipeline.load_config(tmp_path)
    assert index["unet"] == ["diffusers_greedy_grow", "ShallowUNet2DModel"]
    assert index["_class_name"] == "GreedyGrowPipeline" and index["max_sequence_length"] == 24
    loaded = loader.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is GreedyGrowPipeline
    assert torch.equal(draw(loaded), draw(pipeline))


# ----------------------------------------------------------------------------------------------------------------------
# Fewer and cheaper steps


def count_images(pipeline: GreedyGrowPipeline) -> dict[str, int]:
    """Count the images that pass through the core and through each stage from now on."""
    stages = {f"stage {i}": stage.encoder for i, stage in enumerate(pipeline.unet.stages)}
    counts = {"core": 0, **dict.fromkeys(stages, 0)}

    def count(name):
        def hook(module, args):
            counts[name] += len(args[0])

        return hook

    for name, module in {"core": pipeline.unet.core, **stages}.items():
        module.register_forward_pre_hook(count(name))
    return counts


@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=2.0),
        FlowMatchHeunDiscreteScheduler(shift=2.0),
        *MULTISTEP,
        FlowMatchLCMScheduler(shift=2.0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_core_first_leaves_stages_out_with_any_scheduler(scheduler, num_stages):
    unet = make_grown()
    if num_stages == 2:
        unet = GrowableUNet2DConditionModel.from_core(unet, 64, block_out_channels=(8,))
        randomize(unet.stages)
    parts = make_pipeline(unet)
    pipeline = GreedyGrowPipeline(parts.unet, scheduler, parts.text_encoder, parts.tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    counts = count_images(pipeline)
    images = draw(pipeline, PROMPTS[0], num_inference_steps=8, guidance_scale=1.0, core_first=0.6)
    assert images.isfinite().all()
    assert counts["core"] == len(scheduler.timesteps)
    # Both evaluations of a step of Heun's have the stage.
    first_evaluations = scheduler.timesteps.tolist()[:: scheduler.order]
    last_is_single = len(scheduler.timesteps) % scheduler.order
    for i in range(num_stages):
        level = shift_sigma(torch.tensor(0.6), 2.0 ** (num_stages - 1 - i))  # of the outermost stage's own states
        stage_steps = sum(t <= 1000 * level for t in first_evaluations)
        assert counts[f"stage {i}"] == scheduler.order * stage_steps - last_is_single
    assert 0 < counts[f"stage {num_stages - 1}"] < counts["core"]


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=2.0),
        *MULTISTEP,
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_the_state_at_the_handover_is_the_law(scheduler):
    """
    It is `n(sigma) U x_in + sigma H e`, with the core's state and the first noise. The stage gets this state, and after its
    first step the state has the high band of the process, `(1 - sigma) H x0 + sigma H e`.
    """
    parts = make_pipeline(make_grown())
    grown = GreedyGrowPipeline(parts.unet, scheduler, parts.text_encoder, parts.tokenizer)
    randomize(grown.unet.stages)
    grown.set_progress_bar_config(disable=True)
    states, predictions = [], []

    def keep(model, args, kwargs, output):
        states.append(args[0][:2])
        predictions.append(output.pred_original_sample)

    grown.unet.register_forward_hook(keep, with_kwargs=True)
    noise = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    draw(grown, latents=noise, num_inference_steps=8, core_first=0.65, guidance_scale=2.0)
    sigmas = (scheduler.timesteps / 1000).tolist()
    first = next(i for i, sigma in enumerate(sigmas) if sigma <= 0.65)
    assert 2 <= first <= 5
    tolerance = (
        1e-4 if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) else 5e-3
    )  # others round their timesteps
    for sigma, state in zip(sigmas[: first + 1], states):
        torch.testing.assert_close(high_band(state, 2), sigma * high_band(noise, 2), atol=tolerance, rtol=tolerance)
    image, sigma = grown.guide(*predictions[first].chunk(2)), sigmas[first + 1]
    detail = (1 - sigma) * high_band(image, 2) + sigma * high_band(noise, 2)
    torch.testing.assert_close(high_band(states[first + 1], 2), detail, atol=tolerance, rtol=tolerance)
    assert high_band(image, 2).std() > 0.1


def test_up_to_the_handover_it_is_the_core_that_draws():
    core = make_pipeline(make_core())
    grown = GreedyGrowPipeline.from_core(core, 32, block_out_channels=(8,))
    randomize(grown.unet.stages)
    grown.set_progress_bar_config(disable=True)
    states = {16: [], 32: []}

    def keep(pipe, step, t, tensors):
        states[pipe.unet.config.sample_size].append(tensors["latents"])
        return {}

    noise = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([1000.0, 900.0, 800.0, 700.0, 600.0])
    core_timesteps = 1000 * unshift_sigma(timesteps / 1000, 2.0)
    kwargs = {"guidance_scale": 2.0, "callback_on_step_end": keep}
    draw(core, latents=descend(noise, torch.ones(2), 2)[0], timesteps=core_timesteps.tolist(), **kwargs)
    draw(grown, latents=noise, timesteps=timesteps.tolist(), core_first=0.65, **kwargs)
    sigma = torch.tensor(0.6)
    expected = state_scale(sigma, 2) * upsample(states[16][3], 2) + sigma * high_band(noise, 2)
    torch.testing.assert_close(states[32][3], expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(states[32][4], expected, atol=0.1)


def test_core_first_auto_reads_the_variances_that_growing_stored(tmp_path):
    grown = GreedyGrowPipeline.from_core(make_pipeline(), 32, block_out_channels=(8,), detail_variance=0.02)
    again = GreedyGrowPipeline.from_core(grown, 64, block_out_channels=(8,), detail_variance=0.005)
    again.save_pretrained(tmp_path)
    again = GreedyGrowPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    inner, outer = get_handover_sigmas("auto", again.unet, again.config.detail_variances, level=2)
    # At its own level the inner stage's signal is 1 % of the noise in its detail.
    level = inner / (2 - inner)
    assert (1 - level) ** 2 * 0.02 == pytest.approx(0.01 * level**2 * 0.75)
    assert (1 - outer) ** 2 * 0.005 == pytest.approx(0.01 * outer**2 * 0.75)
    assert inner > outer

    counts = count_images(again)
    draw(again, PROMPTS[0], num_inference_steps=20, guidance_scale=1.0, core_first="auto")
    assert counts["core"] == 20
    assert counts["stage 0"] == sum(t <= 1000 * inner for t in again.scheduler.timesteps.tolist())
    assert 0 < counts["stage 1"] < counts["stage 0"] < 20
    with pytest.raises(
        ValueError, match='`core_first="auto"` needs the `detail_variances`.*but the pipeline has None'
    ):
        make_pipeline(make_grown())(PROMPTS[0], core_first="auto")

    # If the outer stage must join first, the inner one joins with it.
    again.register_to_config(detail_variances=[0.005, 0.5])
    inner, outer = get_handover_sigmas("auto", again.unet, again.config.detail_variances, level=2)
    assert inner == outer > 0.85


def test_a_core_alone_is_its_own_core(pipeline):
    expected = draw(pipeline)
    assert torch.equal(draw(pipeline, core_first="auto", guidance_resolution="core"), expected)


def test_guidance_at_the_core_runs_the_stages_once():
    core = make_pipeline(make_core())
    new = GreedyGrowPipeline.from_core(core, 32, block_out_channels=(8,))
    new.set_progress_bar_config(disable=True)
    full = draw(new, guidance_scale=3.0)
    counts = count_images(new)
    # A new stage adds nothing, so that it does not matter where guidance acts.
    torch.testing.assert_close(draw(new, guidance_scale=3.0, guidance_resolution="core"), full, atol=1e-4, rtol=1e-4)
    assert counts == {"core": 2 * 2 * 4, "stage 0": 2 * 4}

    trained = make_pipeline(make_grown())
    assert not torch.allclose(
        draw(trained, guidance_scale=3.0, guidance_resolution="core"), draw(trained, guidance_scale=3.0), atol=0.1
    )
    kwargs = {"guidance_resolution": "core", "core_first": 0.6, "num_inference_steps": 8}
    counts = count_images(trained)
    assert draw(trained, **kwargs).isfinite().all()
    assert counts["core"] == 2 * (2 * 7 + 1) and 0 < counts["stage 0"] < 2 * 8


def test_guidance_ends_before_the_last_steps():
    pipeline = make_pipeline(make_grown())
    kwargs = {"guidance_scale": 3.0, "num_inference_steps": 8}
    for stop, guided in ((1.0, 8), (0.8, 7), (0.5, 4), (0.0, 0)):
        counts = count_images(pipeline)
        images = draw(pipeline, guidance_stop=stop, **kwargs)
        assert counts["core"] == 2 * (2 * guided + (8 - guided))
        expected = draw(pipeline, guider=ClassifierFreeGuidance(guidance_scale=3.0, stop=guided / 8), **kwargs)
        torch.testing.assert_close(
            images, expected if guided else draw(pipeline, PROMPTS, guidance_scale=1.0, num_inference_steps=8)
        )
    assert torch.equal(draw(pipeline, **kwargs), draw(pipeline, guidance_stop=0.8, **kwargs))

    # Both evaluations of a step of Heun's are guided, or neither.
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler(shift=2.0)
    counts = count_images(pipeline)
    draw(pipeline, guidance_stop=0.4, num_inference_steps=4)  # 7 evaluations, guided in steps that begin before 2.8
    assert counts["core"] == 2 * (2 * 4 + 3)


@pytest.mark.parametrize("guidance_resolution", ["full", "core"])
def test_guiders_of_diffusers(guidance_resolution):
    pipeline = make_pipeline(make_grown())
    kwargs = {"num_inference_steps": 8, "guidance_resolution": guidance_resolution}
    plain = draw(pipeline, guidance_scale=3.0, guidance_stop=1.0, **kwargs)
    torch.testing.assert_close(draw(pipeline, guider=ClassifierFreeGuidance(guidance_scale=3.0), **kwargs), plain)

    others = [
        ClassifierFreeGuidance(guidance_scale=3.0, guidance_rescale=0.7),
        AdaptiveProjectedGuidance(guidance_scale=3.0, adaptive_projected_guidance_momentum=-0.5),
        ClassifierFreeZeroStarGuidance(guidance_scale=3.0),
    ]
    for guider in others:
        images = draw(pipeline, guider=guider, **kwargs)
        assert images.isfinite().all() and not torch.allclose(images, plain, atol=1e-2)

    # Outside of its interval, a step costs half.
    counts = count_images(pipeline)
    draw(pipeline, guider=ClassifierFreeGuidance(guidance_scale=3.0, start=0.25, stop=0.5), **kwargs)
    assert counts["core"] == 2 * (2 + 2 * 2 + 4)
    unguided = ClassifierFreeGuidance(guidance_scale=3.0, enabled=False)
    torch.testing.assert_close(draw(pipeline, guider=unguided, **kwargs), draw(pipeline, guidance_scale=1.0, **kwargs))


def count_projections(pipeline: GreedyGrowPipeline) -> tuple[list, int]:
    """Return a list that gets an entry whenever a layer projects text from now on, and the number of such layers."""
    calls = []
    stage = pipeline.unet.stages[0]
    layers = [block.attn2.to_k for block in pipeline.unet.core.transformer_blocks]
    layers += [stage.text_proj, stage.decoder.text_attn.attn.to_k]
    for layer in layers:
        layer.register_forward_hook(lambda *args: calls.append(args))
    return calls, len(layers)


def test_text_is_projected_once_per_call():
    """So it is if the stage joins after some steps, and if a callback sees the text and returns it unchanged."""
    pipeline = make_pipeline(make_grown())
    calls, num_layers = count_projections(pipeline)
    expected = draw(pipeline)
    assert len(calls) == num_layers
    calls.clear()
    draw(pipeline, core_first=0.7)
    assert len(calls) == num_layers
    for callback in (lambda *args: None, lambda pipe, step, t, tensors: tensors):
        calls.clear()
        names = ["latents", *TEXT_NAMES]
        images = draw(pipeline, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
        assert torch.equal(images, expected) and len(calls) == num_layers


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", ["prompt_embeds", "prompt_attention_mask"])
def test_a_text_that_a_callback_changes_is_projected_again(name, in_place, guidance_scale):
    pipeline = make_pipeline(make_grown())
    calls, num_layers = count_projections(pipeline)

    def change(pipe, step, t, tensors):
        if step != 1:
            return {}
        if in_place:
            tensors[name].copy_(tensors[name].flip(0))
            return {}
        return {name: tensors[name].flip(0)}

    kwargs = {"guidance_scale": guidance_scale, "guidance_stop": 1.0}
    expected = draw(pipeline, **kwargs)
    calls.clear()
    changed = draw(pipeline, callback_on_step_end=change, callback_on_step_end_tensor_inputs=[name], **kwargs)
    assert not torch.allclose(changed, expected, atol=1e-2)
    assert len(calls) == 2 * num_layers


def test_a_callback_in_inference_mode_may_change_the_text():
    """In that mode, tensors do not count their changes, so the text is projected again after each callback."""
    pipeline = make_pipeline(make_grown())

    def change(pipe, step, t, tensors):
        tensors["prompt_embeds"].copy_(tensors["prompt_embeds"].flip(0))
        return {}

    kwargs = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    expected = draw(pipeline, **kwargs)
    with torch.inference_mode():
        assert torch.equal(draw(pipeline, **kwargs), expected)


def test_the_number_of_stages_per_step():
    timesteps = [1000.0, 850.0, 700.0, 550.0, 400.0]
    assert count_stages(timesteps, 1, [0.85, 0.5]) == [0, 1, 1, 1, 2]
    assert count_stages(timesteps, 2, [0.85, 0.5]) == [0, 0, 1, 1, 2]  # two evaluations of a step have the same stages
    assert count_stages(timesteps, 1, []) == [0] * 5


@pytest.mark.parametrize("arguments", [{"core_first": 0.8}, {"guidance_resolution": "core"}])
def test_the_papers_growth_has_no_core_that_draws(arguments):
    pipeline = make_pipeline(make_grown(init="random"))
    with pytest.raises(ValueError, match="needs a core that draws images of its own"):
        pipeline(PROMPTS[0], **arguments)


# ----------------------------------------------------------------------------------------------------------------------
# Arguments


def test_the_arguments_are_those_of_the_pixel_pipeline_of_diffusers():
    theirs = list(inspect.signature(PRXPixelPipeline.__call__).parameters)
    theirs.remove("use_resolution_binning")
    ours = list(inspect.signature(GreedyGrowPipeline.__call__).parameters)
    own = ["cross_attention_kwargs", "guidance_stop", "guider", "guidance_resolution", "core_first", "output_levels"]
    assert ours == [*theirs, *own]
    encode = list(inspect.signature(GreedyGrowPipeline.encode_prompt).parameters.values())[1:]
    assert all(parameter.default is not inspect.Parameter.empty for parameter in encode)


EMBEDS = torch.zeros(2, 6, TEXT_DIM)


def test_numbers_of_numpy_are_numbers(pipeline):
    kwargs = {"num_inference_steps": 3, "guidance_scale": 3, "num_images_per_prompt": 2, "height": 8, "width": 24}
    of_numpy = {name: np.int64(value) for name, value in kwargs.items()} | {"guidance_scale": np.float32(3)}
    assert torch.equal(
        draw(pipeline, **of_numpy, guidance_stop=np.float32(1)), draw(pipeline, **kwargs, guidance_stop=1)
    )
    assert get_handover_sigmas(np.float32(0.5), make_grown(), None, level=1) == [0.5]


@pytest.mark.parametrize("variances", [[-1.0], [0.1, float("inf")], ["a"], 0.1])
def test_variances_must_be_positive(pipeline, variances):
    with pytest.raises(ValueError, match="`detail_variances=.* must be a list of positive numbers"):
        GreedyGrowPipeline(pipeline.unet, pipeline.scheduler, detail_variances=variances)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"prompt": None}, "either `prompt` or `prompt_embeds`"),
        ({"prompt_embeds": EMBEDS}, "either `prompt` or `prompt_embeds`"),
        ({"prompt": 3}, "`prompt` must be a string or a list of strings but is 3"),
        ({"prompt": []}, "`prompt` must be a string or a list of strings"),
        ({"negative_prompt": ["a"]}, "`negative_prompt` must be a string or a list of 2 strings"),
        ({"height": 18}, "`height=18` and `width=16` must be positive multiples of 4"),
        ({"width": -16}, "`width=-16`"),
        ({"guidance_scale": None}, "`guidance_scale=None` must be a number"),
        ({"guidance_scale": float("nan")}, "`guidance_scale=nan` must be a number"),
        ({"height": 0}, "`height=0`"),
        ({"height": 16.0}, "`height=16.0` and `width=16` must be positive multiples of 4, as integers"),
        ({"negative_prompt_embeds": torch.zeros(1, 2, 32)}, "with `prompt`, pass `negative_prompt`"),
        ({"num_inference_steps": 0}, "`num_inference_steps=0` must be a positive integer"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt=0` must be a positive integer"),
        ({"output_type": "jpeg"}, "`output_type='jpeg'` is unknown"),
        ({"generator": [torch.Generator()]}, "`generator` is a list of 1, but 2 images"),
        ({"latents": torch.zeros(1, 3, 16, 16)}, r"`latents` must be of shape \(2, 3, 16, 16\)"),
        ({"prompt": None, "prompt_embeds": EMBEDS}, "needs `negative_prompt_embeds`"),
        ({"prompt": None, "prompt_embeds": EMBEDS[0]}, r"`prompt_embeds` must be of shape \(batch, tokens, 32\)"),
        ({"prompt": None, "prompt_embeds": EMBEDS[..., :8]}, r"`prompt_embeds` must be .* of shape \(2, 6, 8\)"),
        (
            {"prompt": None, "prompt_embeds": EMBEDS, "negative_prompt_embeds": EMBEDS, "negative_prompt": "a"},
            "`negative_prompt` goes with `prompt`",
        ),
        (
            {"prompt": None, "prompt_embeds": EMBEDS, "negative_prompt_embeds": EMBEDS[:1]},
            r"`negative_prompt_embeds` must be of shape \(2, 6, 32\)",
        ),
        (
            {
                "prompt": None,
                "prompt_embeds": EMBEDS,
                "negative_prompt_embeds": EMBEDS,
                "prompt_attention_mask": torch.ones(2, 6, dtype=torch.bool),
            },
            "both or neither",
        ),
        (
            {
                "prompt": None,
                "prompt_embeds": EMBEDS,
                "negative_prompt_embeds": EMBEDS,
                "prompt_attention_mask": torch.zeros(2, 6),
                "negative_prompt_attention_mask": torch.zeros(2, 6),
            },
            "`prompt_attention_mask` is of torch.float32, but must be bool",
        ),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "`callback_on_step_end_tensor_inputs`.*noise"),
        ({"guidance_resolution": "half"}, "`guidance_resolution='half'` is unknown"),
        ({"guidance_stop": 1.5}, "`guidance_stop=1.5` must be a share of the steps"),
        ({"guider": 3.0}, "`guider` is a float; only guiders of diffusers"),
        ({"guider": AutoGuidance(auto_guidance_layers=[0], dropout=0.1)}, "`guider` is a AutoGuidance"),
        ({"guider": SkipLayerGuidance(skip_layer_guidance_layers=[0])}, "`guider` is a SkipLayerGuidance"),
        ({"timesteps": []}, r"`timesteps=\[\]` must be decreasing, from at most 1000"),
        ({"timesteps": [300.0, 900.0]}, r"`timesteps=\[300.0, 900.0\]` must be decreasing"),
        ({"timesteps": [1200, 500]}, r"`timesteps=\[1200, 500\]` must be decreasing"),
        ({"timesteps": [300, 200]}, r"`timesteps=\[300, 200\]` must begin at 900 or above, .* pass `latents`"),
        ({"core_first": 1.5}, r"`core_first=1.5` must be \"auto\", a noise level in \(0, 1\], or None"),
        ({"core_first": "full"}, "`core_first='full'` must be"),
        ({"core_first": True}, "`core_first=True` must be"),
        ({"generator": 5}, "`generator=5` must be a torch.Generator, a list of them or None"),
        ({"generator": [torch.Generator(), 5]}, "`generator=.* must be a torch.Generator"),
        ({"latents": np.zeros((2, 3, 16, 16))}, "`latents` must be a torch.Tensor but is a ndarray"),
        ({"prompt": None, "prompt_embeds": EMBEDS.numpy()}, "`prompt_embeds` must be a torch.Tensor but is a ndarray"),
        ({"negative_prompt": ["a", None]}, r"`negative_prompt` must be .*\['a', None\]"),
        ({"timesteps": 900.0}, "`timesteps=900.0` must be a list of numbers"),
        ({"timesteps": ["900"]}, r"`timesteps=\['900'\]` must be a list of numbers"),
        ({"callback_on_step_end": "print"}, "`callback_on_step_end='print'` must be a function"),
        ({"callback_on_step_end_tensor_inputs": None}, "`callback_on_step_end_tensor_inputs=None` must be a list"),
        ({"cross_attention_kwargs": 0.5}, "`cross_attention_kwargs=0.5` must be a dictionary"),
        (
            {"cross_attention_kwargs": {"scale": 1, "scael": 0.5}},
            r"`cross_attention_kwargs` holds \['scael'\], which no",
        ),
    ],
)
def test_bad_arguments_raise_before_any_work(pipeline, arguments, message):
    calls = []
    for module in (pipeline.unet, pipeline.text_encoder):
        module.register_forward_hook(lambda *args: calls.append(args))
    with pytest.raises(ValueError, match=message):
        pipeline(**{"prompt": PROMPTS, "num_inference_steps": 2, **arguments})
    assert not calls


def test_the_arguments_of_custom_attention_processors_are_known():
    class Tagged(GreedyGrowAttnProcessor):
        def __call__(self, *args, tag, **kwargs):
            tags.add(tag)
            return super().__call__(*args, **kwargs)

    tags, pipeline = set(), make_pipeline(make_core())
    pipeline.unet.set_attn_processor(Tagged())
    draw_one(pipeline, cross_attention_kwargs={"tag": 1})
    assert tags == {1}


@pytest.mark.parametrize("core_first", [0.2, "auto"])
def test_a_stage_that_would_never_join_raises_before_any_work(core_first):
    pipeline = make_pipeline(make_grown())
    pipeline.register_to_config(detail_variances=[0.004])
    calls = []
    pipeline.unet.register_forward_hook(lambda *args: calls.append(args))
    with pytest.raises(
        ValueError, match=f"`core_first={core_first!r}` lets a stage join at the noise level .* of these steps is at"
    ):
        pipeline(PROMPTS[0], num_inference_steps=1, core_first=core_first)
    assert not calls


@pytest.mark.parametrize("init", ["preserve", "random"])
def test_every_stage_takes_part_from_the_first_step(init):
    """With this shift, rounding to float32 puts the scheduler's first timestep above 1000."""
    pipeline = make_pipeline(make_grown(init=init), shift=1.58)
    pipeline.scheduler.set_timesteps(4)
    assert pipeline.scheduler.timesteps[0] > 1000
    stages = []
    pipeline.unet.register_forward_pre_hook(
        lambda module, args, kwargs: stages.append(kwargs.get("num_stages")), with_kwargs=True
    )
    draw(pipeline, prompt=PROMPTS[0], num_inference_steps=4)
    assert stages and set(stages) <= {None, 1}
