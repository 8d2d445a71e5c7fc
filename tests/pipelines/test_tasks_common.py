# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The behavior that diffusers expects of any pipeline, for those that start from an image, with the test names of its own suite."""

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
)
from peft import LoraConfig

from diffusers_greedy_grow import GreedyGrowPipeline, GreedyGrowUpscalePipeline, GrowableUNet2DConditionModel
from diffusers_greedy_grow.hub.cards import make_card

from ..models.test_foreign_cores import make_foreign
from ..testing_utils import make_core, make_grown, make_pipeline
from .test_tasks import ARGUMENTS, PROMPT, TASKS, make_image, make_mask


@pytest.fixture(params=TASKS, ids=lambda kind: kind.__name__)
def made(request) -> GreedyGrowPipeline:
    return request.param.from_pipe(make_pipeline(make_grown(), shift=2.0))


def draw(pipeline, prompt=PROMPT, images=None, **kwargs):
    """Draw in three steps, from the usual image and mask, or from images of its own for each prompt."""
    pipeline.set_progress_bar_config(disable=True)
    names = {"image": make_image(16 if isinstance(pipeline, GreedyGrowUpscalePipeline) else 32)}
    if "InpaintPipeline" in type(pipeline).__name__:
        names["mask_image"] = make_mask()
    if images is not None:
        names["image"] = [image.resize(names["image"].size) for image in images]
    arguments = {
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(0),
    }
    return pipeline(prompt=prompt, **names, **{**arguments, **kwargs})[0]


def test_inference_batch_consistent_and_single_identical(made):
    """An image of a batch depends on its own prompt, image and generator only."""
    images = [make_image(seed=seed) for seed in (1, 2)]
    prompts = [PROMPT, "two green stars above a yellow ring"]
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    batch = draw(made, prompts, images, generator=generators, negative_prompt=["bad"] * 2)
    assert batch.shape == (2, 3, 32, 32) and batch.isfinite().all() and 0 <= batch.min() < batch.max() <= 1
    alone = draw(made, prompts[1:], images[1:], generator=torch.Generator().manual_seed(5), negative_prompt="bad")
    torch.testing.assert_close(batch[1:], alone, atol=1e-4, rtol=1e-4)
    twice = draw(made, prompts, images, num_images_per_prompt=2, num_inference_steps=2)
    assert twice.shape == (4, 3, 32, 32)


def test_dict_tuple_outputs_equivalent(made):
    expected = draw(made)
    (images,) = made(
        *ARGUMENTS[type(made)], num_inference_steps=3, guidance_scale=4.0, output_type="pt", return_dict=False,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert torch.equal(images, expected)
    array = draw(made, output_type="np")
    torch.testing.assert_close(torch.from_numpy(array).permute(0, 3, 1, 2), expected)


def test_callback_inputs_and_cfg(made):
    names = made._callback_tensor_inputs
    steps = []

    def callback(pipe, step, timestep, tensors):
        assert set(tensors) == set(names)
        steps.append((step, pipe.guidance_scale, pipe.num_timesteps))
        pipe._guidance_scale = 1.0
        return tensors

    changed = draw(made, strength=1.0, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert steps == [(0, 4.0, 3), (1, 1.0, 3), (2, 1.0, 3)]
    assert not torch.allclose(changed, draw(made, strength=1.0), atol=1e-3)


def test_callback_interrupts(made):
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 1
        return tensors

    draw(made, strength=1.0, num_inference_steps=5, callback_on_step_end=callback)
    assert steps == [0, 1] and made.interrupt
    draw(made)
    assert not made.interrupt


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inference(made, dtype, tmp_path):
    expected = draw(made, guidance_scale=1.0)
    made.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, dtype=dtype)
    assert type(loaded) is type(made) and loaded.unet.dtype == loaded.text_encoder.dtype == dtype
    assert (draw(loaded, guidance_scale=1.0) - expected).abs().mean() < 0.05


def test_save_load_local(made, tmp_path):
    """Any of the pipelines can be loaded as any other."""
    expected = draw(made)
    made.save_pretrained(tmp_path)
    for loader in (DiffusionPipeline, type(made)):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is type(made) and torch.equal(draw(loaded), expected)
    for other in (*TASKS, GreedyGrowPipeline):
        assert type(other.from_pretrained(tmp_path)) is other
    if not isinstance(made, GreedyGrowUpscalePipeline):  # diffusers has no auto pipeline for upscaling
        loaders = AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image
        for loader, other in zip(loaders, (*TASKS[:2], GreedyGrowPipeline)):
            assert type(loader.from_pretrained(tmp_path)) is other


def test_push_to_hub(made, hub):
    """The card's example is of text to image, so it loads that pipeline."""
    repo_id = f"owner/{type(made).__name__}"
    made.push_to_hub(repo_id)
    assert torch.equal(draw(DiffusionPipeline.from_pretrained(repo_id)), draw(made))
    code = make_card(made, repo_id).text.split("```python\n")[1].split("```")[0]
    scope: dict = {}
    exec(code.partition("\npipe(")[0], scope)
    assert type(scope["pipe"]) is GreedyGrowPipeline


def test_offloading_inference(made):
    expected = draw(made)
    made.enable_model_cpu_offload(device="cpu")
    assert torch.equal(draw(made), expected)
    made.remove_all_hooks()
    made.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(draw(made), expected)


def test_lora(made):
    expected = draw(made)
    made.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    assert not torch.allclose(draw(made), expected, atol=1e-3)
    torch.testing.assert_close(draw(made, cross_attention_kwargs={"scale": 0.0}), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["three levels", "unconditional", "foreign"])
@pytest.mark.parametrize("pipeline_class", TASKS)
def test_other_models(kind, pipeline_class):
    if kind == "three levels":
        unet = GrowableUNet2DConditionModel.from_core(make_grown(make_core(8, 2), 16), 32, block_out_channels=(8,))
    elif kind == "unconditional":
        unet = make_grown(make_core(cross_attention_dim=None))
    else:
        core, process = make_foreign("unet with text, velocity")
        unet = GrowableUNet2DConditionModel.from_core(core, 32, block_out_channels=(8,), process=process)
    components = make_pipeline().components
    if kind == "unconditional":
        components |= {"text_encoder": None, "tokenizer": None}
    pipeline = pipeline_class(**{**components, "unet": unet})
    drawn = draw(pipeline, None if kind == "unconditional" else PROMPT, num_inference_steps=2)
    assert drawn.isfinite().all() and drawn.shape == (1, 3, 32, 32)
