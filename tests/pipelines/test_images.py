# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The images and masks that pipelines accept: right, or an error that names the argument."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_greedy_grow import GreedyGrowImg2ImgPipeline, GreedyGrowInpaintPipeline, GreedyGrowUpscalePipeline

from ..testing_utils import make_grown, make_pipeline
from .test_tasks import PROMPT, make_image, make_mask, run, to_tensor


@pytest.fixture(scope="module")
def grown():
    return make_pipeline(make_grown(), shift=2.0)


def give_back(grown, image, mask=None) -> torch.Tensor:
    """Return the image as an inpainting pipeline has read it: by default nothing of it is drawn again."""
    size = image.size[::-1] if isinstance(image, Image.Image) else None
    if mask is None:
        mask = np.zeros(size or (image.shape[-2:] if isinstance(image, torch.Tensor) else image.shape[-3:-1]))
    pipeline = GreedyGrowInpaintPipeline.from_pipe(grown)
    return run(pipeline, PROMPT, image, mask, num_inference_steps=1, guidance_scale=1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_of_any_width_are_read(dtype, grown):
    image = make_image()
    tensor = ((to_tensor(image) + 1) / 2).to(dtype)
    atol = 0.02 if dtype == torch.bfloat16 else 2e-3
    torch.testing.assert_close(give_back(grown, tensor), to_tensor(image), atol=atol, rtol=0)
    if dtype != torch.bfloat16:
        array = tensor[0].permute(1, 2, 0).numpy()
        torch.testing.assert_close(give_back(grown, array), to_tensor(image), atol=atol, rtol=0)
        flipped = give_back(grown, array[:, ::-1])
        torch.testing.assert_close(flipped, to_tensor(image).flip(-1), atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", [">f4", "longdouble"])
def test_floats_that_torch_does_not_know_are_read(dtype, grown):
    array = np.asarray(make_image()).astype(dtype) / 255
    torch.testing.assert_close(give_back(grown, array), to_tensor(make_image()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("as_array", [True, False])
@pytest.mark.parametrize("dtype", ["uint8", "int64", "bool"])
def test_integers_are_refused_also_if_they_are_small(dtype, as_array, grown):
    """A 1 may be white, or nearly black."""
    image = np.ones((32, 32, 3), dtype=dtype)
    given = image if as_array else torch.from_numpy(image).permute(2, 0, 1)
    with pytest.raises(ValueError, match=rf"`image` has the dtype (torch\.)?{dtype}.*divide 8-bit values by 255"):
        give_back(grown, given)


def test_tensors_are_filtered_when_they_shrink(grown):
    """A checkerboard becomes gray, not the color of each second pixel. Large images look as PIL shrinks them."""
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2
    small = give_back(grown, board.expand(3, 64, 64).float())
    assert small[..., 4:-4, 4:-4].abs().max() < 0.1
    image = make_image(16).resize((96, 96), Image.Resampling.NEAREST)
    expected = give_back(grown, image)
    for given in ((to_tensor(image)[0] + 1) / 2, np.array(image) / 255):
        assert (give_back(grown, given) - expected).abs().mean() < 0.03
    up = GreedyGrowUpscalePipeline.from_pipe(grown)
    results = [run(up, given, PROMPT, exact=True) for given in (make_image(12), np.array(make_image(12)) / 255)]
    assert (torch.nn.functional.avg_pool2d(results[0] - results[1], 2)).abs().mean() < 0.03


@pytest.mark.parametrize("image", [make_image(1), make_image(37, width=41), make_image(5, width=100)])
def test_images_of_any_size_are_resized(image, grown):
    for pipeline_class in (GreedyGrowImg2ImgPipeline, GreedyGrowInpaintPipeline):
        mask = (Image.new("L", image.size, 255),) if pipeline_class is GreedyGrowInpaintPipeline else ()
        pipeline = pipeline_class.from_pipe(grown)
        drawn = run(pipeline, PROMPT, image, *mask, num_inference_steps=2)
        assert drawn.shape == (1, 3, 32, 32) and drawn.isfinite().all()
    cropped = run(pipeline, PROMPT, image, *mask, num_inference_steps=2, padding_mask_crop=3, output_type="pil")[0]
    assert cropped.size == image.size


@pytest.mark.parametrize("kind", [bool, np.uint8, np.float16, torch.bool, torch.int64])
def test_masks_of_zeros_and_ones_are_read(kind, grown):
    image, mask = make_image(), np.array(make_mask()) > 127
    given = torch.from_numpy(mask).to(kind) if isinstance(kind, torch.dtype) else mask.astype(kind)
    expected = give_back(grown, image, Image.fromarray(mask))
    for one in (given, given[None] if isinstance(kind, torch.dtype) else given[..., None]):
        torch.testing.assert_close(give_back(grown, image, one), expected, atol=1e-6, rtol=0)


ONE = torch.zeros(3, 32, 32)


@pytest.mark.parametrize(
    "images,masks,message",
    [
        ([make_image(), ONE], make_mask(), "`image` mixes PIL images with arrays or tensors"),
        (ONE, [make_mask()] * 2, "`mask_image` has 2 masks for 1 images"),
        ([ONE, ONE], [make_mask(), torch.ones(32, 32)], "`mask_image` mixes PIL images"),
        (np.zeros((0, 0, 3)), make_mask(), "`image` has no pixels"),
        (Image.new("RGB", (0, 32)), make_mask(), "`image` has no pixels"),
        (ONE, torch.zeros(0, 0), "`mask_image` has no pixels"),
        (np.full((32, 32, 3), np.nan), make_mask(), "`image` has values from nan to nan"),
        (ONE, torch.full((32, 32), torch.nan), "`mask_image` has values from nan to nan"),
        (np.zeros((32, 32)), make_mask(), r"`image` must be .* has a ndarray of the shape \(32, 32\)"),
        ([ONE[None]], make_mask(), r"`image` must be .* has a Tensor of the shape \(1, 3, 32, 32\)"),
        (ONE, torch.zeros(2, 32, 32), r"`mask_image` must be .* has a Tensor of the shape \(2, 32, 32\)"),
        ("circle.png", make_mask(), "`image` must be a PIL.Image.Image, .* has a str"),
        (ONE, "mask.png", "`mask_image` must be a PIL.Image.Image, .* has a str"),
        (ONE, Image.new("F", (32, 32), 1.0), "`mask_image` is in mode 'F'"),
        (ONE, Image.new("I;16", (32, 32), 300), "`mask_image` is in mode 'I;16'"),
    ],
)
def test_what_is_refused(images, masks, message, grown):
    prompts = [PROMPT] * len(images) if isinstance(images, list) else PROMPT
    with pytest.raises(ValueError, match=message):
        run(GreedyGrowInpaintPipeline.from_pipe(grown), prompts, images, masks)


def test_images_and_masks_of_different_kinds_go_together(grown):
    images = [np.array(make_image(seed=1)) / 255, (to_tensor(make_image(seed=2))[0] + 1) / 2]
    masks = [np.zeros((32, 32)), torch.zeros(1, 32, 32)]
    kept = run(GreedyGrowInpaintPipeline.from_pipe(grown), [PROMPT] * 2, images, masks, num_inference_steps=1)
    torch.testing.assert_close(kept, to_tensor(make_image(seed=1), make_image(seed=2)), atol=1e-5, rtol=0)
    mask = np.array(make_mask()) / 255
    mixed = run(GreedyGrowInpaintPipeline.from_pipe(grown), PROMPT, make_image(), mask, num_inference_steps=1)
    torch.testing.assert_close(mixed[..., :14], to_tensor(make_image())[..., :14], atol=1e-5, rtol=0)
