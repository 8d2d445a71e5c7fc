# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The pipelines that start from a given image: image to image, inpainting and upscaling."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.guiders import AdaptiveProjectedGuidance
from PIL import Image

from diffusers_greedy_grow import (
    GreedyGrowImg2ImgPipeline,
    GreedyGrowInpaintPipeline,
    GreedyGrowPipeline,
    GreedyGrowUpscalePipeline,
    GrowableUNet2DConditionModel,
)
from diffusers_greedy_grow.flow import add_noise, enlarge, high_band, pool
from diffusers_greedy_grow.pipelines.pipeline_greedy_grow_inpaint import list_visits
from diffusers_greedy_grow.pipelines.pipeline_greedy_grow_upscale import limit_exactly, list_tiles

from ..testing_utils import make_core, make_grown, make_inputs, make_pipeline, randomize


PROMPT = "a large red circle"
TASKS = (GreedyGrowImg2ImgPipeline, GreedyGrowInpaintPipeline, GreedyGrowUpscalePipeline)


def make_image(side: int = 32, seed: int = 0, width: int | None = None) -> Image.Image:
    """Draw an image of smooth colors."""
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width or side, side), Image.Resampling.BICUBIC)


def make_mask(side: int = 32, width: int | None = None) -> Image.Image:
    """Draw a mask that is black on the left, gray in the middle and white on the right."""
    values = np.zeros((side, width or side), dtype=np.uint8)
    values[:, values.shape[1] // 2 :] = 255
    values[:, values.shape[1] // 2 - 2 : values.shape[1] // 2] = 100
    return Image.fromarray(values)


def to_tensor(*images: Image.Image) -> torch.Tensor:
    """Return images `(B, C, H, W)` in [-1, 1]."""
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images])


ARGUMENTS = {
    GreedyGrowImg2ImgPipeline: (PROMPT, make_image()),
    GreedyGrowInpaintPipeline: (PROMPT, make_image(), make_mask()),
    GreedyGrowUpscalePipeline: (make_image(16), PROMPT),
}


@pytest.fixture(scope="module")
def grown() -> GreedyGrowPipeline:
    return make_pipeline(make_grown(), shift=2.0)


@pytest.fixture
def as_task(grown):
    def convert(pipeline_class):
        pipeline = pipeline_class.from_pipe(grown)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return convert


def run(pipeline, *args, seed: int = 0, **kwargs) -> torch.Tensor:
    kwargs = {
        "num_inference_steps": 4,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(seed),
        **kwargs,
    }
    return pipeline(*args, **kwargs).images


# ----------------------------------------------------------------------------------------------------------------------
# Image to image


def test_the_whole_strength_is_text_to_image(grown, as_task):
    image = run(as_task(GreedyGrowImg2ImgPipeline), PROMPT, make_image(), strength=1.0)
    torch.testing.assert_close(image, run(grown, PROMPT), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scheduler", [None, FlowMatchHeunDiscreteScheduler, DPMSolverMultistepScheduler])
def test_the_image_gets_noise_of_the_level_at_which_the_steps_begin(scheduler, as_task):
    pipeline = as_task(GreedyGrowImg2ImgPipeline)
    if scheduler is not None:
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 2.0}
        pipeline.scheduler = scheduler(**(flow if scheduler is DPMSolverMultistepScheduler else {"shift": 2.0}))
    seen: list[tuple[torch.Tensor, float]] = []
    hook = pipeline.unet.register_forward_pre_hook(lambda module, args: seen.append((args[0], float(args[1][0]))))
    noise = torch.randn(1, 3, 32, 32)
    image = run(pipeline, PROMPT, make_image(), strength=0.5, latents=noise, guidance_scale=1.0, num_inference_steps=8)
    hook.remove()
    order = pipeline.scheduler.order
    assert len(seen) == (4 if order == 1 else 7) and pipeline.num_timesteps == len(seen)
    state, timestep = seen[0]
    assert timestep == pytest.approx(float(pipeline.scheduler.timesteps[4 * order]), abs=1e-3) and 400 < timestep < 800
    expected = add_noise(to_tensor(make_image()), noise, torch.tensor(timestep / 1000))
    torch.testing.assert_close(state, expected, atol=1e-5, rtol=0)
    assert image.isfinite().all()


def test_less_strength_leaves_more_of_the_image(as_task):
    pipeline, clean = as_task(GreedyGrowImg2ImgPipeline), to_tensor(make_image())
    distances = [
        (run(pipeline, PROMPT, make_image(), strength=strength, num_inference_steps=10) - clean).square().mean()
        for strength in (0.1, 0.5, 1.0)
    ]
    assert distances[0] < distances[1] < distances[2]


def test_one_image_per_prompt_or_one_for_all(as_task):
    pipeline, images = as_task(GreedyGrowImg2ImgPipeline), [make_image(seed=seed) for seed in (1, 2)]
    noise = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    kwargs = {"latents": noise, "num_images_per_prompt": 2, "strength": 0.5}
    batch = run(pipeline, [PROMPT, "a blue star"], images, **kwargs)
    first = run(pipeline, PROMPT, images[0], **{**kwargs, "latents": noise[:2]})
    torch.testing.assert_close(batch[:2], first, atol=1e-4, rtol=1e-4)
    arrays = [np.array(image) / 255 for image in images]
    tensor = (to_tensor(*images) + 1) / 2
    for given in (np.stack(arrays), arrays, tensor, list(tensor)):
        torch.testing.assert_close(
            run(pipeline, [PROMPT, "a blue star"], given, **kwargs), batch, atol=1e-4, rtol=1e-4
        )
    assert run(pipeline, [PROMPT, "a blue star"], images[0], **kwargs).shape == (4, 3, 32, 32)


def test_stages_join_in_image_to_image(as_task):
    pipeline = as_task(GreedyGrowImg2ImgPipeline)
    image = run(pipeline, PROMPT, make_image(), strength=0.75, core_first=0.5, num_inference_steps=8)
    assert image.isfinite().all() and not torch.equal(
        image, run(pipeline, PROMPT, make_image(), strength=0.75, num_inference_steps=8)
    )


@pytest.mark.parametrize("pipeline_class", TASKS[:2])
def test_detail_of_the_image_does_not_add_to_that_of_stages_that_join(pipeline_class, as_task):
    """Until a stage joins, the state has no detail that the stage draws, only its noise."""
    pipeline, noise, states = as_task(pipeline_class), torch.randn(1, 3, 32, 32), []
    forward = pipeline.unet.forward

    def look(sample, timestep, **kwargs):
        states.append((sample, float(timestep[0]) / 1000, kwargs["num_stages"]))
        return forward(sample, timestep, **kwargs)

    pipeline.unet.forward = look
    try:
        masks = (Image.new("L", (32, 32), 200),) if pipeline_class is GreedyGrowInpaintPipeline else ()
        kwargs = {"latents": noise, "strength": 0.8, "core_first": 0.6, "guidance_scale": 1.0}
        run(pipeline, PROMPT, make_image(), *masks, num_inference_steps=10, **kwargs)
    finally:
        del pipeline.unet.forward
    joins = [num_stages for _, _, num_stages in states].index(1)
    assert 1 < joins < len(states)
    for state, sigma, _ in states[: joins + 1]:
        torch.testing.assert_close(high_band(state, 2), sigma * high_band(noise, 2), atol=1e-4, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Inpainting


@pytest.mark.parametrize("options", [{}, {"strength": 0.5}, {"jump_length": 2}, {"core_first": 0.6}, {"height": 32}])
def test_kept_pixels_are_the_same_bits(options, as_task):
    image, mask = make_image(), make_mask()
    drawn = run(as_task(GreedyGrowInpaintPipeline), PROMPT, image, mask, output_type="pil", **options)[0]
    kept = np.array(mask) == 0
    assert np.array_equal(np.array(drawn)[kept], np.array(image)[kept])
    assert (np.array(drawn)[~kept] != np.array(image)[~kept]).mean() > 0.5


def test_the_state_outside_the_mask_follows_the_image(as_task):
    pipeline, noise, clean = as_task(GreedyGrowInpaintPipeline), torch.randn(1, 3, 32, 32), to_tensor(make_image())
    states = []

    def look(pipe, step, timestep, tensors):
        states.append((tensors["latents"].clone(), pipe.scheduler.sigmas[step + 1]))
        return {}

    run(pipeline, PROMPT, make_image(), make_mask(), latents=noise, callback_on_step_end=look)
    assert len(states) == 4
    for state, sigma in states:
        expected = add_noise(clean, noise, sigma)
        torch.testing.assert_close(state[..., :14], expected[..., :14], atol=1e-6, rtol=0)
        assert not torch.allclose(state[..., 16:], expected[..., 16:], atol=1e-3)


def test_a_gray_mask_mixes(as_task):
    pipeline = as_task(GreedyGrowInpaintPipeline)
    image, gray = make_image(), torch.full((32, 32), 0.25)
    drawn = run(pipeline, PROMPT, image, gray)
    whole = run(pipeline, PROMPT, image, torch.ones(32, 32))
    clean = to_tensor(image)
    assert (drawn - clean).square().mean() < 0.5 * (whole - clean).square().mean()


def test_the_part_around_the_mask_is_drawn_at_the_whole_resolution(as_task):
    image, mask = make_image(96, width=128), Image.new("L", (128, 96))
    mask.paste(255, (40, 30, 56, 46))
    drawn = run(as_task(GreedyGrowInpaintPipeline), PROMPT, image, mask, output_type="pil", padding_mask_crop=4)[0]
    assert drawn.size == image.size
    changed = (np.array(drawn) != np.array(image)).any(-1)
    assert changed[30:46, 40:56].mean() > 0.5 and not changed[np.array(mask) == 0].any()


def test_a_crop_that_is_the_whole_image_changes_nothing(as_task):
    """The gray of a mask counts once. Pixels in which what is drawn leaves [0, 255] are clipped earlier, so they are left out."""
    pipeline, image = as_task(GreedyGrowInpaintPipeline), make_image()
    for mask in (Image.new("L", (32, 32), 128), make_mask()):
        whole, cropped = (
            np.array(run(pipeline, PROMPT, image, mask, output_type="pil", padding_mask_crop=crop)[0]).astype(float)
            for crop in (None, 32)
        )
        share = np.array(mask)[..., None] / 255
        drawn = (whole - (1 - share) * np.array(image)) / np.maximum(share, 0.01)
        in_range = (drawn > 5) & (drawn < 250) & (share > 0)
        assert in_range.mean() > 0.05 and np.abs(whole - cropped)[in_range].max() <= 3


def test_resampling_visits_blocks_of_steps_again():
    assert list_visits(1, 6, 2, 3) == [1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4, 5, 5, 5]
    assert list_visits(0, 3, 1, 1) == [0, 1, 2]


def test_a_jump_back_restores_the_noise_level(grown):
    """A state of the lower level has the statistics of the higher one after the jump."""
    seen = {}

    def note(module, args):
        seen.setdefault(round(float(args[1][0])), []).append(args[0].clone())

    pipeline = GreedyGrowInpaintPipeline.from_pipe(grown)
    hook = pipeline.unet.register_forward_pre_hook(note)
    flat = Image.new("RGB", (32, 32), (128, 128, 128))
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 1, 1))  # nearly all is kept, so that the state is known
    run(pipeline, PROMPT, flat, mask, guidance_scale=1.0, jump_length=2, num_inference_steps=6)
    hook.remove()
    assert all(len(states) == 3 for states in seen.values()) and len(seen) == 6
    for timestep, states in seen.items():
        for state in states:
            if timestep > 100:  # below, the one pixel that is drawn counts
                assert state.std() == pytest.approx(timestep / 1000, rel=0.06)
        assert timestep <= 100 or not torch.allclose(states[0], states[1], atol=0.05)


# ----------------------------------------------------------------------------------------------------------------------
# Upscaling


def test_a_new_stage_returns_the_image_enlarged():
    pipeline = GreedyGrowUpscalePipeline(**GreedyGrowPipeline.from_core(make_pipeline(), 32, (8,)).components)
    image = make_image(16)
    expected = enlarge(to_tensor(image), 2)
    torch.testing.assert_close(run(pipeline, image, PROMPT), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(run(pipeline, image, strength=0.5), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"strength": 0.5}, {"guidance_scale": 3.0}, {"num_images_per_prompt": 2}])
def test_the_exact_result_pools_to_the_image(options, as_task):
    pipeline, image = as_task(GreedyGrowUpscalePipeline), make_image(16)
    result = run(pipeline, image, PROMPT, exact=True, **options)
    expected = to_tensor(image).expand(len(result), -1, -1, -1)
    torch.testing.assert_close(pool(result, 2), expected, atol=1e-4, rtol=0)
    assert not torch.allclose(pool(run(pipeline, image, PROMPT, **options), 2), expected, atol=1e-2)
    detail = result - enlarge(pool(result, 2), 2)
    assert detail.std() > 1e-2


@pytest.mark.parametrize("gray", [0, 250, None])
def test_the_exact_result_pools_to_the_image_in_8_bits(gray, as_task):
    """Also where it would leave the range of pixels."""
    image = make_image(16) if gray is None else Image.new("RGB", (16, 16), (gray,) * 3)
    pipeline = as_task(GreedyGrowUpscalePipeline)
    result = run(pipeline, image, exact=True, output_type="pil")[0]
    pooled = np.array(result).astype(float).reshape(16, 2, 16, 2, 3).mean((1, 3))
    assert np.abs(pooled - np.array(image)).max() <= 0.51
    values = run(pipeline, image, exact=True, output_type="pt")
    torch.testing.assert_close(pool(values, 2), (to_tensor(image) + 1) / 2, atol=1e-5, rtol=0)


def test_the_nearest_image_in_range_is_found():
    generator = torch.Generator().manual_seed(0)
    images = 1.5 * torch.randn(2, 3, 8, 12, generator=generator)
    small = 2 * torch.rand(2, 3, 2, 3, generator=generator) - 1
    nearest = limit_exactly(images, small, 4)
    assert nearest.min() >= -1 and nearest.max() <= 1
    torch.testing.assert_close(pool(nearest, 4), small, atol=1e-6, rtol=0)
    for _ in range(20):  # no other image with these properties is nearer
        other = limit_exactly(nearest + 0.1 * torch.randn(images.shape, generator=generator), small, 4)
        assert (other - images).square().sum() > (nearest - images).square().sum()
    torch.testing.assert_close(limit_exactly(nearest, small, 4), nearest, atol=1e-6, rtol=0)


def test_an_inner_image_takes_the_place_of_a_cached_prediction(grown):
    inputs = make_inputs(height=32, width=32)
    small = 2 * torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 1
    with torch.no_grad():
        core_output = grown.unet.predict_core(**inputs)
        cached = grown.unet(**inputs, core_output=core_output, inner_image=small).sample
        torch.testing.assert_close(cached, grown.unet(**inputs, inner_image=small).sample, atol=1e-5, rtol=1e-5)


def test_a_smaller_image_passes_through_more_stages():
    inner = make_grown()
    unet = randomize(GrowableUNet2DConditionModel.from_core(inner, 64, (8,)), seed=3)
    pipeline = GreedyGrowUpscalePipeline(**make_pipeline(unet, shift=4.0).components)
    for side, scale in ((16, 4), (32, 2), (20, 2), (12, 4)):
        result = run(pipeline, make_image(side), exact=True, num_inference_steps=2)
        level = 64 // scale
        assert result.shape == (1, 3, 64, 64)
        resized = to_tensor(make_image(side).resize((level, level), Image.Resampling.LANCZOS))
        torch.testing.assert_close(pool(result, scale), resized, atol=1e-4, rtol=0)
    assert run(pipeline, make_image(16, width=32), num_inference_steps=1).shape == (1, 3, 32, 64)


def test_tiles_cover_the_image_and_are_all_that_the_model_sees(as_task):
    pipeline, image = as_task(GreedyGrowUpscalePipeline), make_image(16)
    torch.testing.assert_close(
        run(pipeline, image, PROMPT, tile_overlap=4), run(pipeline, image, PROMPT), atol=1e-5, rtol=1e-5
    )
    sizes = set()
    hook = pipeline.unet.register_forward_pre_hook(lambda module, args: sizes.add(args[0].shape))
    result = run(pipeline, make_image(36, width=24), PROMPT, tile_overlap=4, exact=True, guidance_scale=1.0)
    hook.remove()
    assert result.shape == (1, 3, 72, 48) and sizes == {(1, 3, 32, 32)}
    torch.testing.assert_close(pool(result, 2), to_tensor(make_image(36, width=24)), atol=1e-4, rtol=0)
    total = torch.zeros(72, 48)
    for rows, columns, weight in list_tiles((36, 24), 16, 4, 2):
        assert rows.stop - rows.start == columns.stop - columns.start == 16
        total[rows.start * 2 : rows.stop * 2, columns.start * 2 : columns.stop * 2] += weight
    assert total.min() > 0.2


def test_tiles_keep_the_shape_of_the_image(as_task):
    pipeline = as_task(GreedyGrowUpscalePipeline)
    kwargs = {"num_inference_steps": 1, "guidance_scale": 1.0}
    flat = make_image(8, width=16)
    torch.testing.assert_close(run(pipeline, flat, tile_overlap=4, **kwargs), run(pipeline, flat, **kwargs))
    sizes = set()
    hook = pipeline.unet.register_forward_pre_hook(lambda module, args: sizes.add(tuple(args[0].shape[2:])))
    for size, tile in (((8, 40), (16, 32)), ((20, 12), (32, 24)), ((4, 17), (8, 32))):
        result = run(pipeline, make_image(size[0], width=size[1]), tile_overlap=9, **kwargs)
        assert result.shape[2:] == (2 * size[0], 2 * round(size[1] / 4) * 4) and sizes == {tile}
        sizes.clear()
    hook.remove()


@pytest.mark.parametrize("side,overlap", [(16, 0), (16, 1), (16, 9), (16, 15), (8, 7), (4, 1)])
def test_every_pixel_is_in_a_tile(side, overlap):
    for size in ((16, 40), (33, 17), (5, 36), (16, 16)):
        total = torch.zeros(2 * size[0], 2 * size[1])
        for rows, columns, weight in list_tiles(size, side, overlap, 2):
            assert weight.min() > 0 and weight.shape == (2 * min(side, size[0]), 2 * min(side, size[1]))
            total[rows.start * 2 : rows.stop * 2, columns.start * 2 : columns.stop * 2] += weight
        assert total.min() > 0.2, size


def test_a_guider_does_not_carry_its_memory_from_tile_to_tile(as_task):
    pipeline, tile = as_task(GreedyGrowUpscalePipeline), torch.rand(3, 16, 16)
    noise = torch.randn(1, 3, 32, 32)
    result = run(
        pipeline,
        tile.repeat(1, 1, 2),
        PROMPT,
        latents=noise.repeat(1, 1, 1, 2),
        tile_overlap=0,
        guider=AdaptiveProjectedGuidance(4.0, adaptive_projected_guidance_momentum=-0.5),
    )
    torch.testing.assert_close(result[..., :32], result[..., 32:], atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# All of them


@torch.no_grad()
def test_pipelines_become_each_other_without_copies(grown, tmp_path):
    grown.register_to_config(detail_variances=[0.1])
    expected = run(grown, PROMPT)
    for pipeline_class in (*TASKS, GreedyGrowPipeline):
        other = pipeline_class.from_pipe(grown)
        assert type(other) is pipeline_class and other.unet is grown.unet and other.config.detail_variances == [0.1]
    for auto, pipeline_class in (
        (AutoPipelineForImage2Image, GreedyGrowImg2ImgPipeline),
        (AutoPipelineForInpainting, GreedyGrowInpaintPipeline),
        (AutoPipelineForText2Image, GreedyGrowPipeline),
    ):
        for other in (auto.from_pipe(grown), auto.from_pipe(GreedyGrowInpaintPipeline.from_pipe(grown))):
            assert type(other) is pipeline_class and other.unet is grown.unet
    assert grown.unet.dtype == torch.float32 and torch.equal(run(grown, PROMPT), expected)
    grown.save_pretrained(tmp_path / "grown")
    assert type(AutoPipelineForInpainting.from_pretrained(tmp_path / "grown")) is GreedyGrowInpaintPipeline
    AutoPipelineForImage2Image.from_pipe(grown).save_pretrained(tmp_path / "task")
    again = DiffusionPipeline.from_pretrained(tmp_path / "task")
    assert type(again) is GreedyGrowImg2ImgPipeline
    back = GreedyGrowPipeline.from_pretrained(tmp_path / "task")
    torch.testing.assert_close(run(back, PROMPT), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pipeline_class", TASKS)
def test_in_bfloat16_and_with_its_own_noise(pipeline_class, grown):
    pipeline = pipeline_class.from_pipe(grown)
    arguments = ARGUMENTS[pipeline_class]
    expected = run(pipeline, *arguments)
    assert torch.equal(run(pipeline, *arguments), expected) and not torch.equal(
        run(pipeline, *arguments, seed=1), expected
    )
    with torch.autocast("cpu", torch.bfloat16):
        image = run(pipeline, *arguments)
    assert image.dtype == torch.float32 and (image - expected).abs().mean() < 0.2


@pytest.mark.parametrize("pipeline_class", TASKS)
def test_a_guider_with_a_memory_starts_it_where_the_steps_begin(pipeline_class, as_task):
    pipeline, arguments = as_task(pipeline_class), ARGUMENTS[pipeline_class]
    kwargs = {"strength": 0.5, "num_inference_steps": 8}
    guider = AdaptiveProjectedGuidance(4.0, adaptive_projected_guidance_momentum=-0.5)
    first = run(pipeline, *arguments, guider=guider, **kwargs)
    forgetful = AdaptiveProjectedGuidance(4.0, adaptive_projected_guidance_momentum=None)
    assert not torch.allclose(first, run(pipeline, *arguments, guider=forgetful, **kwargs), atol=1e-3)
    run(pipeline, *arguments, guider=guider, seed=1)  # leaves a memory behind
    assert torch.equal(run(pipeline, *arguments, guider=guider, **kwargs), first)


SOLVER = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 2.0}


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=2.0, stochastic_sampling=True),
        FlowMatchHeunDiscreteScheduler(shift=2.0),
        FlowMatchLCMScheduler(shift=2.0),
        DPMSolverMultistepScheduler(**SOLVER, solver_order=3),
        DPMSolverMultistepScheduler(**SOLVER, algorithm_type="sde-dpmsolver++"),
        DPMSolverSinglestepScheduler(**SOLVER, lower_order_final=True),
        UniPCMultistepScheduler(**SOLVER),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_what_is_kept_with_other_schedulers(scheduler, as_task):
    inpaint, upscale = as_task(GreedyGrowInpaintPipeline), as_task(GreedyGrowUpscalePipeline)
    inpaint.scheduler = upscale.scheduler = scheduler
    kwargs = {"num_inference_steps": 6, "strength": 0.7, "guidance_scale": 1.0}
    image, mask = make_image(), make_mask()
    for jump_length in (None, 2):
        drawn = run(inpaint, PROMPT, image, mask, jump_length=jump_length, output_type="pil", **kwargs)[0]
        kept = np.array(mask) == 0
        assert np.array_equal(np.array(drawn)[kept], np.array(image)[kept])
    small = make_image(16)
    result = run(upscale, small, PROMPT, exact=True, **kwargs)
    torch.testing.assert_close(pool(result, 2), to_tensor(small), atol=2e-5, rtol=0)


RGBA, LARGE = Image.new("RGBA", (32, 32)), make_image(64)


@pytest.mark.parametrize(
    "pipeline_class,arguments,options,message",
    [
        (TASKS[0], (PROMPT, None), {}, "`image` must be a PIL.Image.Image, .* has a NoneType"),
        (TASKS[0], (PROMPT, RGBA), {}, "`image` is in mode 'RGBA'.*convert"),
        (TASKS[0], (PROMPT, []), {}, "`image` is an empty list"),
        (TASKS[0], (PROMPT, torch.zeros(1, 32, 32)), {}, "`image` has 1 channels"),
        (
            TASKS[0],
            (PROMPT, torch.full((3, 32, 32), 2.0)),
            {},
            r"`image` has values from 2 to 2, but must be in \[0, 1\]",
        ),
        (TASKS[0], (PROMPT, [make_image()] * 3), {}, "`image` has 3 images for 1 prompts"),
        (TASKS[0], ([PROMPT] * 2, [make_image(), LARGE]), {}, "`image` has images of several sizes"),
        (TASKS[0], (PROMPT, make_image()), {"strength": 0.0}, "`strength=0.0` must be above 0 and at most 1"),
        (TASKS[0], (PROMPT, make_image()), {"strength": 1.5}, "`strength=1.5` must be"),
        (TASKS[0], (PROMPT, make_image()), {"strength": 0.2}, "`strength=0.2` leaves none of 4 steps"),
        (TASKS[1], (PROMPT, make_image(), None), {}, "`mask_image` must be .* has a NoneType"),
        (TASKS[1], (PROMPT, make_image(), make_mask(16)), {}, "`mask_image` is 16 x 16 pixels and `image` 32 x 32"),
        (TASKS[1], (PROMPT, make_image(), torch.full((32, 32), 2.0)), {}, "`mask_image` has values from 2 to 2"),
        (TASKS[1], (PROMPT, make_image(), [make_mask()] * 2), {}, "`mask_image` has 2 masks for 1 images"),
        (TASKS[1], (PROMPT, make_image(), make_mask()), {"jump_length": 0}, "`jump_length=0` must be a positive"),
        (
            TASKS[1],
            (PROMPT, make_image(), make_mask()),
            {"jump_length": 1, "core_first": 0.5},
            "`core_first=0.5` does not",
        ),
        (
            TASKS[1],
            (PROMPT, make_image(), make_mask()),
            {"padding_mask_crop": 4},
            "`padding_mask_crop=4` is for one image",
        ),
        (TASKS[2], (LARGE, PROMPT), {}, "`image` is 64 x 64 pixels, larger than the 16 .*`tile_overlap=4`"),
        (TASKS[2], (LARGE, PROMPT), {"tile_overlap": 16}, "`tile_overlap=16` must be an integer from 0 to below 16"),
    ],
)
def test_bad_arguments_raise_before_any_model_runs(pipeline_class, arguments, options, message, as_task):
    pipeline = as_task(pipeline_class)

    def fail(*args):
        raise AssertionError("a model ran")

    hooks = [model.register_forward_pre_hook(fail) for model in (pipeline.unet, pipeline.text_encoder)]
    try:
        with pytest.raises(ValueError, match=message):
            run(pipeline, *arguments, **options)
    finally:
        for hook in hooks:
            hook.remove()


def test_gray_images():
    """A model that draws in gray takes images in gray, in each form, and says so of others."""
    pipeline = make_pipeline(make_grown(make_core(in_channels=1, out_channels=1)), shift=2.0)
    inpaint, upscale = (task(**pipeline.components) for task in TASKS[1:])
    image, mask, small = make_image().convert("L"), make_mask(), make_image(16).convert("L")
    array = np.array(image, dtype=np.float32)[..., None] / 255
    for given in (image, array, torch.from_numpy(array).permute(2, 0, 1)):
        drawn = run(inpaint, PROMPT, given, mask, output_type="pil")[0]
        assert drawn.mode == "L" and np.array_equal(np.array(drawn)[:, :8], np.array(image)[:, :8])
    assert run(TASKS[0](**pipeline.components), PROMPT, image).shape == (1, 1, 32, 32)
    assert run(upscale, small, PROMPT).shape == (1, 1, 32, 32)
    with pytest.raises(ValueError, match="`image` is in mode 'RGB', but the model draws L"):
        run(upscale, make_image(16), PROMPT)
    with pytest.raises(ValueError, match="`image` has 3 channels in the shape .*, but must have the 1 of"):
        run(upscale, torch.zeros(3, 16, 16), PROMPT)
    with pytest.raises(ValueError, match="`padding_mask_crop=4` is for one image in RGB"):
        run(inpaint, PROMPT, image, mask, padding_mask_crop=4, output_type="pil")


def test_a_core_cannot_upscale():
    pipeline = GreedyGrowUpscalePipeline(**make_pipeline(make_core()).components)
    with pytest.raises(ValueError, match="`unet` has no growth stage"):
        run(pipeline, make_image(8), PROMPT)


@pytest.mark.parametrize("size", [(200, 5), (5, 200)])
def test_a_crop_that_is_too_narrow_to_be_drawn(size, as_task):
    mask = Image.new("L", size, 0)
    mask.putpixel((size[0] // 2, size[1] // 2), 255)
    pipeline, options = as_task(GreedyGrowInpaintPipeline), {"num_inference_steps": 1}
    with pytest.raises(
        ValueError, match=rf"`padding_mask_crop=100` cuts {size[0]} x {size[1]} pixels .* too narrow for 32 x 32"
    ):
        pipeline("a square", Image.new("RGB", size), mask, padding_mask_crop=100, **options)
    drawn = pipeline("a square", Image.new("RGB", size), mask, padding_mask_crop=2, **options).images[0]
    assert drawn.size == size
