# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Models that are told which part of an image they see."""

import pytest
import torch

from diffusers_greedy_grow import GrowableUNet2DConditionModel, ShallowUNet2DModel

from ..testing_utils import draw_one, make_core, make_grown, make_inputs, make_pipeline


CROP = torch.tensor([[0.1, 0.2, 0.3], [0.0, 0.0, 0.0]])


def make_models(**kwargs) -> list[ShallowUNet2DModel | GrowableUNet2DConditionModel]:
    """A core, a model grown from it, one grown twice, and one grown by the paper's recipe."""
    core = make_core(**kwargs)
    grown = make_grown(core)
    return [core, grown, make_grown(grown, 64), make_grown(core, init="random")]


def answer(model: torch.nn.Module, **kwargs) -> torch.Tensor:
    size = model.config.sample_size
    return model(**make_inputs(height=size, width=size), **kwargs).sample


def test_other_models_have_no_such_parameters():
    for model in make_models():
        assert not any("cond_proj" in name for name in model.state_dict())
        assert not model.config.crop_conditioning
        with pytest.raises(
            ValueError, match="`crop` was given to a model with `crop_conditioning=False`: leave it out"
        ):
            answer(model, crop=CROP)


def test_zeros_are_the_whole_image_and_the_default():
    for model in make_models(crop_conditioning=True):
        assert model.config.crop_conditioning
        whole, part = answer(model), answer(model, crop=CROP)
        assert torch.equal(answer(model, crop=torch.zeros(2, 3)), whole)
        assert not torch.allclose(part[0], whole[0], atol=1e-3)
        torch.testing.assert_close(part[1], whole[1])
        for shape in ((3,), (1, 3), (2, 2)):
            with pytest.raises(ValueError, match=r"`crop` must be of shape \(2, 3\)"):
                answer(model, crop=torch.zeros(shape))


@pytest.mark.parametrize("crop", [CROP, None])
def test_the_core_and_each_stage_learn_from_it(crop):
    """All parameters take part without a crop, too: processes that share gradients wait for each of them."""
    for model in make_models(crop_conditioning=True):
        answer(model.train(), crop=crop).square().sum().backward()
        modules = [model] if isinstance(model, ShallowUNet2DModel) else [model.core, *model.stages]
        for module in modules:
            gradient = module.time_embedding.cond_proj.weight.grad
            assert gradient is not None and gradient.any() == (crop is not None)


def test_a_frozen_core_gets_the_crop_too():
    for model in make_models(crop_conditioning=True)[1:]:
        expected = answer(model, crop=CROP)
        model.freeze_core()
        torch.testing.assert_close(answer(model, crop=CROP), expected)


def test_saving_and_sampling(tmp_path):
    for model in make_models(crop_conditioning=True)[:2]:
        pipeline = make_pipeline(model)
        expected = draw_one(pipeline)
        pipeline.save_pretrained(tmp_path / str(model.config.sample_size))
        loaded = type(pipeline).from_pretrained(tmp_path / str(model.config.sample_size))
        assert torch.equal(draw_one(loaded), expected)
        assert torch.equal(answer(loaded.unet, crop=CROP), answer(model, crop=CROP))
    draw_one(pipeline, guidance_resolution="core")


def test_half_precision_keeps_the_embedding_in_float32(tmp_path):
    make_core(crop_conditioning=True).save_pretrained(tmp_path)
    core = ShallowUNet2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert core.time_embedding.cond_proj.weight.dtype == torch.float32
    assert answer(core, crop=CROP.bfloat16()).isfinite().all()
