# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The behavior that diffusers expects of any pipeline, with the test names of its own suite."""

import inspect

import pytest
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from diffusers.utils.source_code_parsing_utils import ReturnNameVisitor

from diffusers_greedy_grow import GreedyGrowPipeline

from ..testing_utils import draw_one, make_core


def draw(pipeline, prompt="a small blue square", **kwargs):
    arguments = {
        "num_inference_steps": 3,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(0),
        **kwargs,
    }
    return pipeline(prompt, **arguments).images


@pytest.mark.parametrize("loader", [GreedyGrowPipeline, DiffusionPipeline, AutoPipelineForText2Image])
def test_save_load_local(made, loader, tmp_path):
    made.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is GreedyGrowPipeline and torch.equal(draw_one(loaded), draw_one(made))


def test_output(made):
    size = made.unet.config.sample_size
    images = draw(made)
    assert images.shape == (1, 3, size, size) and images.isfinite().all() and 0 <= images.min() < images.max() <= 1


def test_pipeline_call_signature():
    parameters = inspect.signature(GreedyGrowPipeline.__call__).parameters
    for name in ("prompt", "negative_prompt", "prompt_embeds", "negative_prompt_embeds", "height", "width"):
        assert name in parameters, name
    optional = (
        "num_inference_steps", "num_images_per_prompt", "generator", "latents", "output_type", "return_dict",
        "guidance_scale", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "cross_attention_kwargs",
    )  # fmt: skip
    for name in optional:
        assert parameters[name].default is not inspect.Parameter.empty, name


@pytest.mark.parametrize("size", [1, 2, 3])
def test_inference_batch_consistent(made, size):
    prompts = ["a small blue square", "a large red circle", "a green star"][:size]
    generators = [torch.Generator().manual_seed(seed) for seed in range(size)]
    assert draw(made, prompts, negative_prompt=["bad"] * size, generator=generators).shape[0] == size


def test_inference_batch_single_identical(made):
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    batch = draw(made, ["a small blue square", "two green stars above a yellow ring"], generator=generators)
    alone = draw(made, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(batch[:1], alone, atol=1e-4, rtol=1e-4)


def test_dict_tuple_outputs_equivalent(made):
    (images,) = made(
        "a small blue square", num_inference_steps=3, output_type="pt", return_dict=False,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert torch.equal(images, draw(made))


def test_components_function(made):
    assert made.components.keys() == {"unet", "scheduler", "text_encoder", "tokenizer"}
    again = GreedyGrowPipeline(**made.components)
    assert torch.equal(draw_one(again), draw_one(made))
    other = AutoPipelineForText2Image.from_pipe(made)
    assert type(other) is GreedyGrowPipeline and other.unet is made.unet


@pytest.mark.parametrize("parts", ["all", "text encoder"])
def test_a_pipeline_of_components_keeps_the_settings(made, parts):
    """Also those of a pipeline that is gone. Arguments come first."""
    if parts == "text encoder":
        made = GreedyGrowPipeline(None, None, made.text_encoder, made.tokenizer, 24)
    made.register_to_config(max_sequence_length=7, detail_variances=[0.5])  # changed after the pipeline was made
    components = made.components
    expected = dict(made.config)
    again = GreedyGrowPipeline(**components)
    assert dict(again.config) == expected
    del made
    other = GreedyGrowPipeline(**components, max_sequence_length=9, detail_variances=[0.25])
    assert (other.config.max_sequence_length, other.config.detail_variances) == (9, [0.25])
    assert GreedyGrowPipeline(**components, detail_variances=None).config.detail_variances is None
    assert dict(GreedyGrowPipeline(**again.components).config) == expected

    # With a model that belongs to no pipeline, such as a copy that was trained further, prompts are still read as before.
    new = GreedyGrowPipeline(**{**components, "unet": make_core()})
    assert (new.config.max_sequence_length, new.config.detail_variances) == (7, None)


@pytest.mark.parametrize("class_", [GreedyGrowPipeline, AutoPipelineForText2Image])
def test_from_pipe_keeps_dtypes_and_settings(made, class_):
    """The components are shared: what `from_pipe` does to them happens to the first pipeline, too."""
    made.unet.to(torch.bfloat16)
    made.text_encoder.to(torch.float64)
    made.register_to_config(detail_variances=[0.5])
    values = [parameter.clone() for parameter in made.unet.parameters()]
    other = class_.from_pipe(made)
    assert other.unet is made.unet and made.text_encoder.dtype == torch.float64
    assert all(
        before.dtype == after.dtype and torch.equal(before, after)
        for before, after in zip(values, made.unet.parameters())
    )
    assert other.config.detail_variances == [0.5] and other.config.max_sequence_length == 24
    changed = class_.from_pipe(made, max_sequence_length=9, detail_variances=None)
    assert changed.config.max_sequence_length == 9 and changed.config.detail_variances is None


def test_from_pipe_with_a_dtype_casts_the_shared_components(made):
    other = GreedyGrowPipeline.from_pipe(made, dtype=torch.bfloat16)
    assert other.unet is made.unet and made.unet.dtype == made.text_encoder.dtype == torch.bfloat16
    assert made.to(dtype="auto") is made and made.unet.dtype == torch.bfloat16
    with pytest.warns(FutureWarning, match="torch_dtype"):  # diffusers announces to remove the old name
        GreedyGrowPipeline.from_pipe(made, torch_dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stored_dtype_is_kept_on_request(made, dtype, tmp_path):
    """diffusers would load all in float32."""
    made.to(dtype).save_pretrained(tmp_path)
    loaded = type(made).from_pretrained(tmp_path, dtype="auto")
    assert loaded.unet.dtype == loaded.text_encoder.dtype == dtype
    for options in ({"pretrained_model_name_or_path": tmp_path / "unet"}, {"subfolder": "unet"}):
        model = type(made.unet).from_pretrained(**{"pretrained_model_name_or_path": tmp_path, **options}, dtype="auto")
        assert model.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inference_no_nan(made, dtype):
    made.to(dtype)
    assert draw(made).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_save_load_float16(made, tmp_path, dtype):
    expected = draw_one(made)
    made.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.unet.dtype == loaded.text_encoder.dtype == dtype
    assert (draw_one(loaded) - expected).abs().mean() < 0.05


def test_dtype_dict(made, tmp_path):
    made.save_pretrained(tmp_path)
    dtypes = {"unet": torch.bfloat16, "default": torch.float16}
    loaded = DiffusionPipeline.from_pretrained(tmp_path, dtype=dtypes)
    assert (loaded.unet.dtype, loaded.text_encoder.dtype) == (torch.bfloat16, torch.float16)
    assert draw(loaded).isfinite().all()


def test_save_load_optional_components(made, tmp_path):
    """A pipeline without its text encoder, for prompts that are encoded elsewhere."""
    encoded = dict(zip(RETURNS, made.encode_prompt("a small blue square")))
    expected = draw(made)
    made.text_encoder = made.tokenizer = None
    made.save_pretrained(tmp_path)
    loaded = GreedyGrowPipeline.from_pretrained(tmp_path)
    assert loaded.text_encoder is None and loaded.tokenizer is None
    torch.testing.assert_close(draw(loaded, None, **encoded), expected, atol=1e-4, rtol=1e-4)


def test_to_device(made):
    made.to("meta")
    assert {made.unet.device.type, made.text_encoder.device.type} == {"meta"}
    assert made.device.type == "meta"


def test_to_dtype(made):
    assert made.to(torch.float16).dtype == torch.float16
    assert {made.unet.dtype, made.text_encoder.dtype} == {torch.float16}


@pytest.mark.parametrize("batch_size", [1, 2])
def test_num_images_per_prompt(made, batch_size):
    assert draw(made, ["a square"] * batch_size, num_images_per_prompt=3).shape[0] == 3 * batch_size


def test_cfg(made):
    assert not torch.allclose(draw(made, guidance_scale=1.0), draw(made, guidance_scale=6.0), atol=1e-3)


def test_callback_inputs(made):
    """A callback can ask for each tensor in `_callback_tensor_inputs`, and the states and texts that it returns replace them."""
    names = GreedyGrowPipeline._callback_tensor_inputs

    def keep(pipe, step, timestep, tensors):
        assert set(tensors) == set(names)
        return tensors

    def blank(pipe, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])}

    expected = draw(made)
    same = draw(made, callback_on_step_end=keep, callback_on_step_end_tensor_inputs=names)
    assert torch.equal(same, expected)
    assert torch.equal(draw(made, callback_on_step_end=blank), torch.full_like(expected, 0.5))
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        draw(made, callback_on_step_end=keep, callback_on_step_end_tensor_inputs=["foo"])


def test_callback_cfg(made):
    """A callback may end guidance on the way."""
    scales = []

    def callback(pipe, step, timestep, tensors):
        scales.append(pipe.guidance_scale)
        pipe._guidance_scale = 1.0
        return tensors

    changed = draw(made, guidance_scale=5.0, callback_on_step_end=callback)
    assert scales == [5.0, 1.0, 1.0]
    assert not torch.allclose(changed, draw(made, guidance_scale=5.0), atol=1e-3)


def test_serialization_with_variants(made, tmp_path):
    made.save_pretrained(tmp_path, variant="fp16")
    weights = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.safetensors")}
    assert weights == {"unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors"}


def test_shards_of_a_pipeline(made, tmp_path):
    made.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    assert torch.equal(draw_one(DiffusionPipeline.from_pretrained(tmp_path)), draw_one(made))


@pytest.mark.parametrize("without", [None, "unet", "text_encoder"])
def test_loading_with_variants(made, tmp_path, without):
    """Variants of all components, or of all but one."""
    made.save_pretrained(tmp_path)
    for path in list(tmp_path.rglob("*.safetensors")):
        if path.parent.name != without:
            path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
    assert torch.equal(draw_one(DiffusionPipeline.from_pretrained(tmp_path, variant="fp16")), draw_one(made))


def test_loading_with_incorrect_variants_raises_error(made, tmp_path):
    made.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="You are trying to load the model files of the `variant=fp16`"):
        DiffusionPipeline.from_pretrained(tmp_path, variant="fp16")


RETURNS = ["prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"]


def test_encode_prompt_works_in_isolation(made):
    """A pipeline with text encoder and tokenizer only can do it; its results have the names of `__call__`'s arguments."""
    visitor = ReturnNameVisitor()
    visitor.visit(visitor.get_ast_tree(cls=GreedyGrowPipeline))
    assert visitor.return_names == RETURNS
    text = GreedyGrowPipeline(None, None, made.text_encoder, made.tokenizer, made.config.max_sequence_length)
    encoded = dict(zip(RETURNS, text.encode_prompt("a small blue square", negative_prompt="bad")))
    drawer = GreedyGrowPipeline(made.unet, made.scheduler)
    torch.testing.assert_close(draw(drawer, None, **encoded), draw(made, negative_prompt="bad"), atol=1e-4, rtol=1e-4)
