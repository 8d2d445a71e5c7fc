# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Modular Diffusers loads our folders, and its blocks draw what the classic pipelines draw, bit by bit."""

import inspect
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    ModularPipeline,
)
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam
from PIL import Image

from diffusers_greedy_grow import (
    GreedyGrowBlocks,
    GreedyGrowImg2ImgPipeline,
    GreedyGrowInpaintPipeline,
    GreedyGrowModularPipeline,
    GreedyGrowPipeline,
    GreedyGrowUpscalePipeline,
    GrowableUNet2DConditionModel,
)
from diffusers_greedy_grow.pipelines.denoising import TEXT_NAMES

from ..testing_utils import make_core, make_grown, make_pipeline
from .test_lora import save_adapter


PROMPT = "a large red circle"
LOADERS = {
    "ModularPipeline": ModularPipeline.from_pretrained,
    "GreedyGrowModularPipeline": GreedyGrowModularPipeline.from_pretrained,
    "blocks": lambda folder: GreedyGrowBlocks().init_pipeline(folder),
}


def load(folder, loader: str = "ModularPipeline", **kwargs) -> GreedyGrowModularPipeline:
    pipeline = LOADERS[loader](str(folder), **kwargs)
    pipeline.load_components()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_both(unet, folder) -> SimpleNamespace:
    """A classic pipeline, and the modular one that loads the folder it saves."""
    classic = make_pipeline(unet, shift=2.0)
    classic.register_to_config(detail_variances=[0.03] * (len(unet.sample_sizes) - 1))
    classic.save_pretrained(folder)
    return SimpleNamespace(classic=classic, modular=load(folder), folder=folder)


@pytest.fixture(scope="module", params=[make_core, make_grown], ids=["core", "grown"])
def both(request, tmp_path_factory) -> SimpleNamespace:
    return make_both(request.param(), tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> SimpleNamespace:
    return make_both(make_grown(), tmp_path_factory.mktemp("saved"))


def draw(pipeline, **kwargs):
    """Images, or what else `output_type` names, in four steps from always the same noise."""
    kwargs = {
        "num_inference_steps": 4,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
        **kwargs,
    }
    if isinstance(pipeline, ModularPipeline):
        return pipeline(**kwargs, output="images")
    return pipeline(**kwargs).images


def draw_as(task, pipeline: GreedyGrowPipeline, **kwargs):
    classic = task.from_pipe(pipeline)
    classic.set_progress_bar_config(disable=True)
    return draw(classic, **kwargs)


def make_embeds() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    names = ("prompt_embeds", "negative_prompt_embeds")
    return {name: torch.randn(2, 6, 32, generator=generator) for name in names}


# ----------------------------------------------------------------------------------------------------------------------
# The same images


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": PROMPT},
        {"prompt": [PROMPT, "a star"], "negative_prompt": ["bad", "blue"], "num_images_per_prompt": 2},
        {"prompt": PROMPT, "guidance_scale": 1.0, "output_type": "np"},
        {"prompt": PROMPT, "guidance_stop": 0.3, "timesteps": [980.0, 600.0, 200.0]},
        {"prompt": PROMPT, "guidance_resolution": "core", "height": 32, "width": 64},
        {"prompt": PROMPT, "core_first": "auto", "num_inference_steps": 6},
        make_embeds(),
    ],
    ids=["prompt", "images", "unguided", "timesteps", "core guidance", "core first", "embeddings"],
)
def test_text_to_image(both, arguments):
    assert np.array_equal(draw(both.modular, **arguments), draw(both.classic, **arguments))


@pytest.mark.parametrize("scheduler", [FlowMatchHeunDiscreteScheduler, DPMSolverMultistepScheduler])
def test_another_scheduler(grown, scheduler):
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 2.0}
    made = scheduler(**(flow if scheduler is DPMSolverMultistepScheduler else {"shift": 2.0}))
    pipeline = load(grown.folder)
    pipeline.update_components(scheduler=made)
    expected = draw(GreedyGrowPipeline(**{**grown.classic.components, "scheduler": made}), prompt=PROMPT)
    assert torch.equal(draw(pipeline, prompt=PROMPT), expected)


def test_an_unconditional_model(tmp_path, caplog):
    unet = make_core(cross_attention_dim=None)
    classic = GreedyGrowPipeline(unet, FlowMatchEulerDiscreteScheduler())
    classic.set_progress_bar_config(disable=True)
    classic.save_pretrained(tmp_path)
    with caplog.at_level("WARNING", "diffusers"):
        modular = load(tmp_path)
    assert modular.text_encoder is None and "Failed" not in caplog.text
    assert torch.equal(draw(modular, num_images_per_prompt=2), draw(classic, num_images_per_prompt=2))
    with pytest.raises(ValueError, match="Prompts, .* must be None: the model is unconditional"):
        draw(modular, prompt_embeds=make_embeds()["prompt_embeds"])


def make_image(side: int = 32, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((side, side), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("arguments", [{}, {"strength": 0.5, "num_images_per_prompt": 2, "height": 64}])
def test_image_to_image(both, arguments):
    arguments = {"prompt": [PROMPT, "a star"], "image": [make_image(), make_image(seed=1)], **arguments}
    assert torch.equal(draw(both.modular, **arguments), draw_as(GreedyGrowImg2ImgPipeline, both.classic, **arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"strength": 0.5, "core_first": 0.8},
        {"jump_length": 2, "jump_n_sample": 2},
        {"padding_mask_crop": 4, "output_type": "pil"},
    ],
)
def test_inpainting(grown, arguments):
    mask = Image.new("L", (48, 48))
    mask.paste(255, (8, 8, 24, 30))
    arguments = {"prompt": PROMPT, "image": make_image(48), "mask_image": mask, **arguments}
    ours, expected = (
        draw(grown.modular, **arguments), draw_as(GreedyGrowInpaintPipeline, grown.classic, **arguments)
    )  # fmt: skip
    assert np.array_equal(np.asarray(ours[0]), np.asarray(expected[0]))


def test_the_defaults_are_those_of_the_classic_pipelines():
    classes = {
        "text2image": GreedyGrowPipeline,
        "image2image": GreedyGrowImg2ImgPipeline,
        "inpainting": GreedyGrowInpaintPipeline,
    }
    # What modular pipelines have otherwise, and what the text encoder step passes on.
    elsewhere = {"self", "return_dict", "guider", "output_levels", *TEXT_NAMES}
    for workflow, pipeline_class in classes.items():
        ours = {one.name: one.default for one in GreedyGrowBlocks().get_workflow(workflow).inputs}
        parameters = inspect.signature(pipeline_class.__call__).parameters
        expected = {name: one.default for name, one in parameters.items() if name not in elsewhere}
        assert {name: ours[name] for name in expected} == expected, workflow


# ----------------------------------------------------------------------------------------------------------------------
# Loading


@pytest.mark.parametrize(
    "loader,where", [*((loader, None) for loader in LOADERS), ("ModularPipeline", "owner/modular")]
)
def test_all_ways_to_load(grown, loader, where, hub):
    if where is not None:
        grown.classic.push_to_hub(where)
    pipeline = load(where or grown.folder, loader)
    assert type(pipeline) is GreedyGrowModularPipeline and type(pipeline.unet) is GrowableUNet2DConditionModel
    assert pipeline.config.max_sequence_length == 24 and pipeline.config.detail_variances == [0.03]
    assert torch.equal(draw(pipeline, prompt=PROMPT), draw(grown.classic, prompt=PROMPT))


def test_a_revision_is_that_of_the_components(grown, hub):
    repo_id = "owner/modular-revision"
    core = make_pipeline(make_core())
    core.push_to_hub(repo_id, revision="core")
    grown.classic.push_to_hub(repo_id)
    pipeline = load(repo_id, "GreedyGrowModularPipeline", revision="core")
    assert torch.equal(draw(pipeline, prompt=PROMPT), draw(core, prompt=PROMPT))


@pytest.mark.parametrize("task", [GreedyGrowImg2ImgPipeline, GreedyGrowUpscalePipeline])
def test_folders_of_other_tasks(grown, task, tmp_path):
    task.from_pipe(grown.classic).save_pretrained(tmp_path)
    loaded = load(tmp_path, "GreedyGrowModularPipeline")
    assert torch.equal(draw(loaded, prompt=PROMPT), draw(grown.classic, prompt=PROMPT))


def test_saving_and_loading_again(grown, tmp_path):
    pipeline = load(grown.folder)
    pipeline.update_components(guider=ClassifierFreeGuidance(guidance_scale=3.0))
    pipeline.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    index = json.loads((tmp_path / "modular_model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "GreedyGrowModularPipeline" and index["_blocks_class_name"] == "GreedyGrowBlocks"
    assert index["unet"][:2] == ["diffusers_greedy_grow", "GrowableUNet2DConditionModel"]
    again = load(tmp_path)
    assert type(again) is GreedyGrowModularPipeline and again.guider.guidance_scale == 3.0
    assert again.config.detail_variances == [0.03]
    assert torch.equal(draw(again, prompt=PROMPT), draw(pipeline, prompt=PROMPT))


@pytest.mark.parametrize(
    "values,message",
    [
        ({"new": 1}, r"The configuration has \['new'\], which a GreedyGrowPipeline does not know"),
        ({"unet": ["antigravity", "Model"]}, "`unet` in model_index.json is a Model of antigravity, which has not been imported"),
    ],
)  # fmt: skip
def test_what_the_classic_pipeline_refuses(values, message, tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
    (tmp_path / "model_index.json").write_text(json.dumps({**index, **values}), encoding="utf-8")
    for loader in LOADERS.values():
        with pytest.raises(ValueError, match=message):
            loader(str(tmp_path))


def test_pickles_are_not_read(grown, tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    text_encoder = tmp_path / "text_encoder"
    torch.save(grown.classic.text_encoder.state_dict(), text_encoder / "pytorch_model.bin")
    (text_encoder / "model.safetensors").unlink()
    pipeline = load(tmp_path)
    assert pipeline.text_encoder is None and pipeline.unet is not None
    with pytest.raises(ValueError, match="`use_safetensors=False` asks for pickled weights"):
        pipeline.load_components(use_safetensors=False)


# ----------------------------------------------------------------------------------------------------------------------
# Blocks


class MirrorStep(ModularPipelineBlocks):
    """A step as users write them."""

    model_name = "greedy-grow"

    @property
    def inputs(self):
        return [InputParam("latents", required=True)]

    @property
    def intermediate_outputs(self):
        return [OutputParam("latents")]

    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        block_state.latents = block_state.latents.flip(-1)
        self.set_block_state(state, block_state)
        return components, state


def test_a_step_between_denoise_and_decode(grown):
    blocks = GreedyGrowBlocks()
    blocks.sub_blocks.insert("mirror", MirrorStep(), 2)
    pipeline = blocks.init_pipeline(str(grown.folder))
    pipeline.load_components()
    pipeline.set_progress_bar_config(disable=True)
    image = draw(grown.classic, prompt=PROMPT)
    assert torch.equal(draw(pipeline, prompt=PROMPT), image.flip(-1))


def test_text_encoder_blocks_alone(both):
    blocks = both.modular.blocks
    text_encoder = blocks.sub_blocks.pop("text_encoder").init_pipeline(str(both.folder))
    text_encoder.load_components()
    rest = blocks.init_pipeline(str(both.folder))
    rest.load_components()
    rest.set_progress_bar_config(disable=True)
    assert text_encoder.components.keys() == {"text_encoder", "tokenizer", "guider"}
    assert not {"text_encoder", "tokenizer"} & rest.components.keys()

    embeds = text_encoder(prompt=PROMPT, negative_prompt="bad").get_by_kwargs("denoiser_input_fields")
    expected = draw(both.classic, prompt=PROMPT, negative_prompt="bad", num_images_per_prompt=2)
    assert torch.equal(draw(rest, **embeds, num_images_per_prompt=2), expected)
    unguided = text_encoder(prompt=PROMPT, guidance_scale=1.0)
    assert unguided.get("negative_prompt_embeds") is None
    with pytest.raises(ValueError, match="`negative_prompt` must be a string or a list of 2 strings"):
        text_encoder(prompt=[PROMPT, PROMPT], negative_prompt=["bad"])


def test_a_workflow_alone(both):
    pipeline = load(both.folder, workflow="image2image")
    names = ["text_encoder", "denoise.input", "denoise.prepare_latents", "denoise.denoise", "decode"]
    assert list(pipeline.blocks.sub_blocks) == names
    arguments = {"prompt": PROMPT, "image": make_image()}
    assert torch.equal(draw(pipeline, **arguments), draw(both.modular, **arguments))


def test_a_guider_is_a_component(grown):
    pipeline = load(grown.folder)
    pipeline.update_components(guider=AdaptiveProjectedGuidance(guidance_scale=5.0, stop=0.7))
    expected = draw(
        grown.classic,
        prompt=PROMPT,
        guider=AdaptiveProjectedGuidance(guidance_scale=5.0, stop=0.7),
        guidance_scale=1.0,
    )
    assert torch.equal(draw(pipeline, prompt=PROMPT, guidance_scale=1.0), expected)
    assert not torch.equal(draw(grown.modular, prompt=PROMPT), expected)


def test_callbacks_reach_into_the_loop(grown):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((type(pipeline), step, tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else {}

    image = draw(grown.modular, prompt=PROMPT, callback_on_step_end=callback)
    assert seen == [(GreedyGrowModularPipeline, step, (1, 3, 32, 32)) for step in range(4)] and not image.any()


def test_adapters(tmp_path, grown):
    save_adapter(make_grown(), tmp_path / "adapter")
    pipeline = load(grown.folder)
    plain = draw(pipeline, prompt=PROMPT)
    pipeline.load_lora_weights(tmp_path / "adapter", adapter_name="one")
    assert pipeline.get_list_adapters() == {"unet": ["one"]}
    assert not torch.allclose(draw(pipeline, prompt=PROMPT), plain, atol=1e-3)
    pipeline.unload_lora_weights()
    assert torch.equal(draw(pipeline, prompt=PROMPT), plain)


def test_progress_bars(grown, capfd):
    pipeline = load(grown.folder)
    capfd.readouterr()
    draw(pipeline, prompt=PROMPT)
    assert "4/4" not in capfd.readouterr().err
    pipeline.set_progress_bar_config(disable=False)
    draw(pipeline, prompt=PROMPT)
    assert "4/4" in capfd.readouterr().err


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"prompt": PROMPT, "height": 33}, "`height=33` and `width=32` must be positive multiples"),
        ({}, "Pass either `prompt` or `prompt_embeds`"),
        ({"negative_prompt": "bad"}, "Required input 'prompt' is missing"),
        ({"prompt": PROMPT, "guidance_scale": "4"}, "`guidance_scale='4'` must be a number"),
        ({"prompt": 3}, "`prompt` must be a string or a list of strings but is 3"),
        ({"prompt": PROMPT, "mask_image": Image.new("L", (32, 32))}, "Required input 'image' is missing"),
        ({"prompt": PROMPT, "image": make_image().convert("L")}, "`image` is in mode 'L'"),
    ],
)
def test_bad_arguments(grown, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(grown.modular, **arguments)


def test_components_that_are_not_loaded(grown):
    pipeline = ModularPipeline.from_pretrained(str(grown.folder))
    with pytest.raises(ValueError, match=r"\['text_encoder', 'tokenizer'\] are missing: call `load_components\(\)`"):
        draw(pipeline, prompt=PROMPT)
    with pytest.raises(ValueError, match=r"\['unet', 'scheduler'\] are missing: call `load_components\(\)`"):
        draw(pipeline, **make_embeds())
    pipeline.load_components(names=["unet", "scheduler"])
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    assert draw(pipeline, **make_embeds(), generator=generators).shape == (2, 3, 32, 32)
