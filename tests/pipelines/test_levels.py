# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Images of each resolution that a grown model has."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from diffusers.guiders import AdaptiveProjectedGuidance
from PIL import Image

from diffusers_greedy_grow import (
    GreedyGrowImg2ImgPipeline,
    GreedyGrowInpaintPipeline,
    GreedyGrowPipeline,
    GrowableUNet2DConditionModel,
)
from diffusers_greedy_grow.flow import pool

from ..testing_utils import make_core, make_grown, make_pipeline


PROMPT = "a small blue square"
SIZES = (8, 16, 64)


@pytest.fixture(scope="module")
def pipeline() -> GreedyGrowPipeline:
    once = make_grown(make_core(8), 16, block_out_channels=(16,))
    return make_pipeline(make_grown(once, 64, block_out_channels=(16, 24)), shift=8.0)


def make_inner(pipeline: GreedyGrowPipeline, level: int) -> GreedyGrowPipeline:
    """The model of a level as a pipeline of its own."""
    unet = pipeline.unet.core
    if level:
        unet = GrowableUNet2DConditionModel.from_core(make_core(8), 16, block_out_channels=(16,))
        unet.core.load_state_dict(pipeline.unet.core.state_dict())
        unet.stages[0].load_state_dict(pipeline.unet.stages[0].state_dict())
    shift = pipeline.scheduler.config.shift * SIZES[level] / SIZES[-1]
    kind = type(pipeline.scheduler)
    scheduler = kind.from_config(pipeline.scheduler.config, shift=shift)
    inner = GreedyGrowPipeline(unet.eval(), scheduler, pipeline.text_encoder, pipeline.tokenizer, 24)
    inner.set_progress_bar_config(disable=True)
    return inner


def draw(pipeline: GreedyGrowPipeline, **kwargs) -> torch.Tensor:
    arguments = {"generator": torch.manual_seed(0), "num_inference_steps": 4, "output_type": "pt", **kwargs}
    return pipeline(PROMPT, **arguments).images


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 16), (12, 8), (24, 16)])
@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_an_inner_level_draws_as_its_model_alone(pipeline, height, width, scheduler):
    level = 0 if height * width < 128 else 1
    outer = GreedyGrowPipeline.from_pipe(pipeline, scheduler=scheduler(shift=8.0))
    outer.set_progress_bar_config(disable=True)
    drawn = draw(outer, height=height, width=width)
    assert drawn.shape == (1, 3, height, width)
    assert torch.equal(drawn, draw(make_inner(outer, level), height=height, width=width))
    assert outer.scheduler.config.shift == 8.0


@pytest.mark.parametrize(
    "kwargs",
    [
        {"core_first": 0.7},
        {"guidance_resolution": "core"},
        {"guider": AdaptiveProjectedGuidance(guidance_scale=3.0)},
        {"timesteps": [1000.0, 700.0, 200.0]},
    ],
)
def test_an_inner_level_with_other_arguments(pipeline, kwargs):
    drawn = draw(pipeline, height=16, width=16, **kwargs)
    assert torch.equal(drawn, draw(make_inner(pipeline, 1), **kwargs))


def test_the_sampled_stages_of_an_inner_level_by_the_variances_of_its_images(pipeline):
    variances = [0.01, 0.002]
    outer = GreedyGrowPipeline.from_pipe(pipeline, detail_variances=variances)
    outer.set_progress_bar_config(disable=True)
    inner = make_inner(pipeline, 1)
    inner.register_to_config(detail_variances=variances[:1])
    kwargs = {"core_first": "auto", "num_inference_steps": 8}
    assert torch.equal(draw(outer, height=16, width=16, **kwargs), draw(inner, **kwargs))


def test_a_scheduler_of_another_kind_at_an_inner_level(pipeline):
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=8.0)
    outer = GreedyGrowPipeline.from_pipe(pipeline, scheduler=scheduler)
    outer.set_progress_bar_config(disable=True)
    used = []

    def look(_, step, timestep, tensors):
        used.append(timestep.item())
        return tensors

    draw(outer, height=8, width=8, callback_on_step_end=look)
    scheduler.set_timesteps(4)
    alone = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.0)
    alone.set_timesteps(4)
    assert used == alone.timesteps.tolist() != scheduler.timesteps.tolist()


@pytest.mark.parametrize(
    ("height", "width", "level"),
    [
        (8, 8, 0),
        (10, 8, 0),
        (12, 12, 1),
        (16, 24, 1),
        (28, 28, 1),
        (32, 32, 2),
        (64, 64, 2),
        (32, 128, 2),
        (128, 128, 2),
    ],
)
def test_the_nearest_level_draws(pipeline, height, width, level):
    cells = [4, 8, 32]
    if height % cells[level] or width % cells[level]:
        with pytest.raises(ValueError, match=f"multiples of {cells[level]}"):
            pipeline.find_level(height, width)
    else:
        assert pipeline.find_level(height, width) == level


@pytest.mark.parametrize(("height", "width"), [(18, 16), (60, 64), (7, 8), (0, 8), (-8, 8), (8.0, 8), (None, 20)])
def test_a_size_that_no_level_fits(pipeline, height, width):
    sizes = r"64 x 64 \(multiples of 32\), 16 x 16 \(multiples of 8\), 8 x 8 \(multiples of 4\)"
    with pytest.raises(ValueError, match=rf"`height=.*`width=.*positive multiples of.*{sizes}"):
        pipeline(PROMPT, height=height, width=width)


def test_the_images_of_all_levels(pipeline):
    output = pipeline(
        [PROMPT] * 2, generator=torch.manual_seed(0), num_inference_steps=3, output_type="pt", output_levels=True
    )
    assert {size: tuple(images.shape) for size, images in output.level_images.items()} == {
        size: (2, 3, size, size) for size in SIZES
    }
    assert output.level_images[64] is output.images
    again = draw(pipeline, num_inference_steps=3, generator=torch.manual_seed(0))
    assert not hasattr(again, "level_images")
    images, levels = pipeline(
        PROMPT, height=16, width=24, num_inference_steps=2, output_levels=True, return_dict=False
    )
    assert [images[0].size, levels[8][0].size] == [(24, 16), (12, 8)] and levels[16] is images


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"guidance_stop": 1.0}, {"guidance_stop": 1.0, "guidance_resolution": "core"}, {"guidance_scale": 1}],
)
def test_the_images_of_levels_are_what_a_model_that_was_just_grown_adds_nothing_to(kwargs):
    unet = GrowableUNet2DConditionModel.from_core(make_core(8), 16, block_out_channels=(16,))
    pipe = make_pipeline(GrowableUNet2DConditionModel.from_core(unet, 32, block_out_channels=(16,)).eval())
    output = pipe(PROMPT, num_inference_steps=3, output_type="latent", output_levels=True, **kwargs)
    for size, factor in ((16, 2), (8, 4)):
        torch.testing.assert_close(output.level_images[size], pool(output.images, factor), rtol=1e-3, atol=1e-3)


def test_with_a_guider_the_levels_inside_show_the_prediction_for_the_prompt(pipeline):
    """Momentum, which this guider has, keeps a tensor of the outer size."""
    guider = AdaptiveProjectedGuidance(guidance_scale=4.0, adaptive_projected_guidance_momentum=-0.5)
    output = pipeline(PROMPT, num_inference_steps=2, guider=guider, output_type="pt", output_levels=True)
    assert output.level_images[8].shape == (1, 3, 8, 8)


def test_a_core_without_images_of_its_own_is_no_level():
    pipe = make_pipeline(make_grown(make_grown(make_core(8), 16, block_out_channels=(16,), init="random"), 32))
    output = pipe(PROMPT, height=8, width=8, num_inference_steps=1, output_type="pt", output_levels=True)
    assert list(output.level_images) == [16]
    output = pipe(PROMPT, num_inference_steps=1, output_type="pt", output_levels=True)
    assert list(output.level_images) == [16, 32]


def test_a_core_alone_has_one_level():
    pipe = make_pipeline(make_core(8))
    output = pipe(PROMPT, num_inference_steps=1, output_type="pt", output_levels=True)
    assert list(output.level_images) == [8]
    with pytest.raises(ValueError, match=r"multiples of 4, as integers\.$"):
        pipe(PROMPT, height=10)


def test_changing_and_completing_images_at_an_inner_level(pipeline):
    image = Image.new("RGB", (40, 40), (200, 30, 60))
    kwargs = {"num_inference_steps": 3, "height": 16, "width": 16, "generator": torch.manual_seed(0)}
    changed = GreedyGrowImg2ImgPipeline.from_pipe(pipeline)(PROMPT, image, **kwargs).images[0]
    assert changed.size == (16, 16)
    mask = Image.new("L", (40, 40), 0)
    kept = GreedyGrowInpaintPipeline.from_pipe(pipeline)(PROMPT, image, mask, **kwargs).images[0]
    assert kept.tobytes() == image.resize((16, 16)).tobytes()


def test_the_model_at_a_level_that_it_does_not_have(pipeline):
    sample, text = torch.randn(1, 3, 16, 16), torch.randn(1, 4, 32)
    for level in (-1, 3):
        with pytest.raises(ValueError, match=rf"`level={level}` must be from 0 to 2, for one of \(8, 16, 64\)"):
            pipeline.unet(sample, 500, text, level=level)
    with pytest.raises(ValueError, match="`num_stages=2` must be from 0 to 1"):
        pipeline.unet(sample, 500, text, level=1, num_stages=2)
    with pytest.raises(ValueError, match="`sample` is 16 x 12, but both sides must be multiples of 8"):
        pipeline.unet(sample[..., :12], 500, text, level=1)
