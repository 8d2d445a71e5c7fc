# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The drawings of the app, without a page."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from diffusers_greedy_grow import (
    GreedyGrowImg2ImgPipeline,
    GreedyGrowInpaintPipeline,
    GreedyGrowPipeline,
    GreedyGrowUpscalePipeline,
)
from greedy_grow.app.studio import (
    IMAGE,
    INPAINT,
    SCHEDULERS,
    TEXT,
    UPSCALE,
    Settings,
    Studio,
    make_scheduler,
    read_mask,
)

from ..testing_utils import make_core, make_grown, make_pipeline


PROMPT = "a small blue square"
FAST = {"prompt": PROMPT, "num_inference_steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def pipeline():
    pipeline = make_pipeline(make_grown(), shift=2.0)
    pipeline.register_to_config(detail_variances=[0.03])
    return pipeline


@pytest.fixture
def studio(pipeline):
    studio = Studio(pipeline, "grown-32")
    yield studio
    studio.close()
    assert not studio.runs


def make_photo(size: tuple[int, int] = (48, 32)) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(values)


def draw(studio: Studio, **settings) -> Image.Image:
    return studio.start(Settings(**{**FAST, **settings})).result()[0]


def call(pipeline, pipeline_class, *arguments, **kwargs) -> Image.Image:
    made = pipeline_class.from_pipe(pipeline)
    made.set_progress_bar_config(disable=True)
    return made(*arguments, num_inference_steps=2, generator=torch.Generator().manual_seed(3), **kwargs).images[0]


@pytest.mark.parametrize("task", [TEXT, IMAGE, INPAINT, UPSCALE])
def test_a_model_that_draws_in_gray(task):
    studio = Studio(make_pipeline(make_grown(make_core(in_channels=1, out_channels=1)), shift=2.0), "gray")
    given = {} if task == TEXT else {"image": make_photo(), "mask": Image.new("L", (48, 32), 255)}
    assert draw(studio, task=task, **given).mode == "L"
    studio.close()


def test_images_are_the_pipelines(studio, pipeline):
    """For each task, with its arguments, after the given image was made to fit."""
    kwargs = {"negative_prompt": "a star", "guidance_scale": 3.0}
    expected = call(pipeline, GreedyGrowPipeline, PROMPT, core_first="auto", height=16, width=32, **kwargs)
    image = draw(studio, core_first="auto", height=16, width=32, **kwargs)
    assert image == expected and image.size == (32, 16)

    photo = make_photo()
    square = photo.crop((8, 0, 40, 32))
    assert draw(studio, task=IMAGE, image=photo, strength=0.5) == call(
        pipeline, GreedyGrowImg2ImgPipeline, PROMPT, square, strength=0.5
    )
    mask = Image.new("L", photo.size)
    mask.paste(255, (16, 8, 32, 24))
    filled = draw(studio, task=INPAINT, image=photo, mask=mask)
    assert filled == call(pipeline, GreedyGrowInpaintPipeline, PROMPT, square, mask.crop((8, 0, 40, 32)))
    same = (np.asarray(filled) == np.asarray(square)).all(axis=-1)
    assert same[:8].all() and not same[8:24, 8:24].all()

    small = photo.copy()
    small.thumbnail((16, 16))
    assert draw(studio, task=UPSCALE, image=photo, exact=True, guidance_scale=1.0) == call(
        pipeline, GreedyGrowUpscalePipeline, small, PROMPT, exact=True
    )
    tiles = draw(studio, task=UPSCALE, image=photo, in_tiles=True, guidance_scale=1.0)
    assert tiles == call(pipeline, GreedyGrowUpscalePipeline, photo, PROMPT, tile_overlap=4)
    assert tiles.size == (96, 64)


def test_a_run_is_watched(studio, pipeline):
    run = studio.start(Settings(**{**FAST, "num_inference_steps": 5}))
    images = [studio.to_image(prediction) for prediction in run.watch()]
    image, levels = run.result()
    assert images and images[-1].size == (32, 32)
    assert run.step == run.num_steps == 5 and run.seconds > 0 and not run.is_truncated
    assert [one.size for one in levels.values()] == [(16, 16), (32, 32)] and levels[32] == image


def test_a_stopped_run_stops_no_other_one(studio):
    """Not even when it waits for its turn."""
    first, second, third = (
        studio.start(Settings(**{**FAST, "num_inference_steps": steps, "seed": seed}))
        for seed, steps in enumerate((100, 100, 2))
    )
    next(first.watch())
    first.stop()
    second.stop()
    assert third.result()[0] == draw(studio, seed=2)
    assert 0 < first.step < 100 and second.step == 0 and second.future.result() is None


def test_an_adapter_is_that_of_one_run(studio, tmp_path):
    other = make_pipeline(make_core())
    other.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    GreedyGrowPipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(other.unet))
    plain, changed, weaker, again = (
        draw(studio, **settings)
        for settings in ({}, {"lora": str(tmp_path)}, {"lora": str(tmp_path), "lora_scale": 0.5}, {})
    )
    assert plain == again and len({image.tobytes() for image in (plain, changed, weaker)}) == 3
    with pytest.raises(ValueError, match="none"):
        draw(studio, lora=str(tmp_path / "none"))
    assert draw(studio) == plain


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name, studio, pipeline):
    """They have the model's shift, and what one run leaves in them is not in the next."""
    made = make_scheduler(pipeline.scheduler, name)
    assert type(made) is SCHEDULERS[name][0] and made.config[SCHEDULERS[name][1]] == 2.0
    run = studio.start(Settings(**{**FAST, "num_inference_steps": 5, "scheduler": name}))
    assert run.result()[0] == draw(studio, num_inference_steps=5, scheduler=name)
    assert run.num_steps == 5  # Heun's method calls the model twice in a step


def test_a_scheduler_of_another_kind_is_the_first_choice():
    pipeline = make_pipeline(make_core())
    pipeline.scheduler = FlowMatchLCMScheduler(shift=3.0)
    studio = Studio(pipeline, "core")
    assert studio.schedulers == ["FlowMatchLCMScheduler", *SCHEDULERS]
    made = make_scheduler(pipeline.scheduler, studio.own_scheduler)
    assert type(made) is FlowMatchLCMScheduler and made is not pipeline.scheduler
    assert make_scheduler(pipeline.scheduler, "UniPC").config.flow_shift == 3.0
    studio.close()


def test_a_core_and_a_model_without_prompts():
    core = GreedyGrowPipeline(make_core(cross_attention_dim=None), FlowMatchEulerDiscreteScheduler(shift=1.0))
    studio = Studio(core, "core")
    assert draw(studio, prompt="").size == (16, 16) and studio.levels == (16,)
    assert "has no growth stage" in studio.find_upscaling_fault()
    studio.close()
    inside = make_pipeline(make_grown(init="random"))
    studio = Studio(inside, "grown")
    assert studio.levels == (32,) and studio.find_upscaling_fault() is not None
    studio.close()
    inside.text_encoder = None
    with pytest.raises(ValueError, match="`grown` has no text encoder"):
        Studio(inside, "grown")


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"prompt": " "}, "The prompt is empty"),
        ({"task": IMAGE}, "no image to begin with"),
        ({"task": INPAINT, "image": make_photo()}, "There is no mask"),
        ({"task": INPAINT, "image": make_photo(), "mask": Image.new("L", (48, 32))}, "There is no mask"),
        ({"height": 9}, "`height=9` and `width=32` must be positive multiples"),
        ({"height": 0, "task": IMAGE, "image": make_photo()}, "`height=0`"),
        ({"core_first": "much"}, "`core_first` must be"),
        ({"core_first": "0.0001"}, "lets a stage join"),
        ({"strength": 0.1, "task": IMAGE, "image": make_photo()}, "leaves none of 2 steps"),
        ({"task": UPSCALE, "image": make_photo((200, 20)), "in_tiles": True}, "at most 128 x 128"),
    ],
)
def test_what_does_not_fit_is_said(settings, message, studio):
    with pytest.raises(ValueError, match=message):
        draw(studio, **settings)


def test_a_long_prompt_is_noted(studio):
    run = studio.start(Settings(**{**FAST, "prompt": "a circle " * 100}))
    run.result()
    assert run.is_truncated


def test_files_have_the_settings_that_drew_them(studio, tmp_path):
    path = studio.write(make_photo(), tmp_path, Settings(**FAST, height=32, width=32))
    assert path.name == "seed-3.png"
    text = Image.open(path).text
    assert text == {
        "model": "grown-32",
        "task": TEXT,
        "prompt": PROMPT,
        "seed": "3",
        "height": "32",
        "width": "32",
        "num_inference_steps": "2",
        "guidance_scale": "4.0",
        "scheduler": "Euler",
        "core_first": "off",
    }
    path = studio.write(make_photo(), tmp_path, Settings(task=UPSCALE, lora="owner/lora"))
    text = Image.open(path).text
    assert {"strength", "exact", "in_tiles", "lora_scale"} <= text.keys() and "height" not in text


def test_masks_are_what_is_painted():
    layers = [Image.new("RGBA", (4, 4)) for _ in range(2)]
    layers[0].putpixel((0, 1), (255, 0, 0, 10))
    layers[1].putpixel((2, 3), (0, 0, 0, 255))
    assert read_mask([]) is None
    mask = read_mask(layers)
    assert mask.mode == "L" and sorted(np.argwhere(np.asarray(mask) == 255).tolist()) == [[1, 0], [3, 2]]
    assert np.asarray(mask).sum() == 510
