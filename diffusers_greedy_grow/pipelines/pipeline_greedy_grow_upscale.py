# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Upscaling: the growth stages draw the detail of a given small image."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from diffusers.guiders import BaseGuidance
from diffusers.image_processor import PipelineImageInput
from diffusers.utils import replace_example_docstring

from ..flow import enlarge, pool, upsample
from .denoising import Sampling
from .images import count_prompts, image_size, list_images, repeat_images, resize_tensors
from .pipeline_greedy_grow import GreedyGrowPipeline
from .pipeline_output import GreedyGrowPipelineOutput
from .schedules import INTEGER


EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> from diffusers.utils import load_image
        >>> from diffusers_greedy_grow import GreedyGrowUpscalePipeline

        >>> pipe = GreedyGrowUpscalePipeline.from_pretrained("output/grown-64")
        >>> pipe(load_image("circle-16.png"), "a large red striped circle on a white background").images[0]
        ```
"""


class GreedyGrowUpscalePipeline(GreedyGrowPipeline):
    r"""
    Pipeline that draws the detail of a given small image, in pixel space. A growth stage adds detail to the image that the model
    inside it predicts: here the given image takes that one's place. Its components and settings are those of
    [`GreedyGrowPipeline`], around a grown model.
    """

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(  # type: ignore[override]
        self,
        image: PipelineImageInput | None = None,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        strength: float = 1.0,
        exact: bool = False,
        tile_overlap: int | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        cross_attention_kwargs: dict | None = None,
        guidance_stop: float = 0.8,
        guider: BaseGuidance | None = None,
    ) -> GreedyGrowPipelineOutput | tuple:
        r"""
        Draw the detail of images. Arguments that are not described here are those of [`GreedyGrowPipeline.__call__`].

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list of these):
                The image to enlarge: one for all prompts, or one per prompt. PIL images in RGB (or in gray, as the
                model draws), arrays `(H, W, C)` or tensors `(C, H, W)` in [0, 1]. It is resized so that its longer side is the
                smallest resolution inside the model that is not below it, and the stages around that one draw their detail.
            prompt (`str` or `list[str]`, *optional*):
                What the image shows; by default the empty prompt.
            strength (`float`, defaults to 1.0):
                The share of the steps that run, in (0, 1]. With 1 the detail begins as noise. Below 1 it begins as the enlarged
                image with noise, which leaves less to chance.
            exact (`bool`, defaults to `False`):
                Whether the result, pooled, is the resized image: the low band is set at each step, and values outside [0, 1] are
                spread over the pixels that are pooled with them. Each pooled pixel is within 1e-5 of its value in [0, 1], and
                within half of one of 256 gray levels in PIL images. Otherwise it is close to it.
            tile_overlap (`int`, *optional*):
                For an image that is larger than the outermost resolution inside the model, whose sides are then only rounded to
                whole cells of the core's grid: the model sees tiles of at most the resolution that it was trained at, which
                overlap by so many pixels of the given image and are blended at each step. So the memory that the model needs does
                not depend on the image's size. It has no effect on smaller images.
            guidance_scale (`float`, defaults to 1.0):
                The scale of classifier-free guidance, see [`GreedyGrowPipeline.__call__`].

        Examples:

        Returns:
            [`GreedyGrowPipelineOutput`] or `tuple`: with `return_dict=False`, a tuple with the images.

        Raises:
            `ValueError`: if an argument or a setting of the scheduler does not fit, before any model runs.
        """
        if prompt is None and prompt_embeds is None and self.unet.config.cross_attention_dim is not None:
            prompt = ""
        images = list_images("image", image, count_prompts(prompt, prompt_embeds), self.unet.config.in_channels)
        (height, width), scale = self.find_size(image_size(images[0]), tile_overlap)
        sampling = self.prepare(
            prompt=prompt,
            negative_prompt=negative_prompt,
            height=height * scale,
            width=width * scale,
            level=len(self.unet.sample_sizes) - 1,
            num_inference_steps=num_inference_steps,
            strength=strength,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            cross_attention_kwargs=cross_attention_kwargs,
            guidance_stop=guidance_stop,
            guider=guider,
        )
        small = self.image_processor.preprocess(resize_tensors(images, height, width), height, width)
        small = repeat_images(small, sampling)
        start = None if strength == 1 else enlarge(small, scale)
        state = self.prepare_latents(sampling, latents, start)
        predict = partial(self.predict_detail, small=small, exact=exact, tile_overlap=tile_overlap)
        state = self.denoise(sampling, state, predict)
        return self.finish(sampling, limit_exactly(state, small, scale) if exact else state, output_type, return_dict)

    def find_size(self, size: tuple[int, int], tile_overlap: int | None) -> tuple[tuple[int, int], int]:
        """
        Return the height and width to which an image of a `size` is resized, and how many times larger the result is.

        Raises:
            `ValueError`: if the model has no stages, or the image does not fit.
        """
        inner = list(self.unet.image_sizes[:-1])
        if not inner:
            raise ValueError("`unet` has no growth stage that adds detail to a smaller image: load a grown model.")
        largest = max(size)
        if tile_overlap is None and largest > inner[-1]:
            raise ValueError(
                f"`image` is {size[1]} x {size[0]} pixels, larger than the {inner[-1]} pixels inside the model: resize it to them, "
                f"or pass `tile_overlap={inner[-1] // 4}` to draw it in tiles."
            )
        level = next((one for one in inner if one >= largest), inner[-1])
        scale = self.unet.config.sample_size // level
        cell = self.unet.side_multiple // scale
        if tile_overlap is not None and (not isinstance(tile_overlap, INTEGER) or not 0 <= tile_overlap < level):
            raise ValueError(f"`tile_overlap={tile_overlap!r}` must be an integer from 0 to below {level}.")
        ratio = max(level / largest, 1.0)  # in tiles, a larger image keeps its size
        sides = [max(round(side * ratio / cell), 1) * cell for side in size]
        return (sides[0], sides[1]), scale

    def predict_detail(
        self,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        guided: bool,
        texts: dict[bool, dict[str, Any]],
        sampling: Sampling,
        num_stages: int,
        *,
        small: torch.Tensor,
        exact: bool,
        tile_overlap: int | None,
    ) -> torch.Tensor:
        """
        Predict clean images around small ones.

        Args:
            latents, sigma, guided, texts, sampling, num_stages: As in [`predict`].
            small (`torch.Tensor` of shape `(B, C, h, w)`): The small images in [-1, 1].
            exact (`bool`), tile_overlap (`int`, *optional*): As in `__call__`.

        Returns:
            The images `(B, C, H, W)`.
        """
        scale = latents.shape[-1] // small.shape[-1]
        arguments = sigma, guided, texts, sampling, num_stages
        level, size = self.unet.config.sample_size // scale, image_size(small)
        if max(size) <= level:
            clean = self.predict(latents, *arguments, inner_image=small)
        else:
            assert tile_overlap is not None
            # Blend before guidance: a guider may have a memory, or measure the whole image.
            each = torch.zeros_like(latents.repeat(2 if guided else 1, 1, 1, 1))
            total = torch.zeros_like(latents[:1, :1])
            for rows, columns, weight in list_tiles(size, level, tile_overlap, scale):
                outer = (
                    ...,
                    slice(rows.start * scale, rows.stop * scale),
                    slice(columns.start * scale, columns.stop * scale),
                )
                weight = weight.to(latents.device)
                each[outer] += weight * self.predict_each(
                    latents[outer], *arguments, inner_image=small[..., rows, columns]
                )
                total[outer] += weight
            clean = self.combine(each / total, guided, sampling)
        return clean + enlarge(small - pool(clean, scale), scale) if exact else clean


def list_tiles(
    size: tuple[int, int], side: int, overlap: int, scale: int
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """
    Yield the tiles of an image: their rows and columns, and the weights `(height * scale, width * scale)` to blend them with, which
    fall to the edges that other tiles overlap, but not to 0.

    Args:
        size (`tuple[int, int]`): The height and width of the image.
        side (`int`): The height and width of a tile, less where the image has less.
        overlap (`int`): By how many pixels neighbors overlap; the last ones may do so by more.
        scale (`int`): How many times larger the result is.
    """
    vertical, horizontal = (list(list_spans(length, side, overlap, scale)) for length in size)
    for rows, row_weights in vertical:
        for columns, column_weights in horizontal:
            yield rows, columns, row_weights[:, None] * column_weights


def list_spans(length: int, side: int, overlap: int, scale: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield the tiles along one side of an image, see [`list_tiles`], with the weights `(side * scale,)`."""
    side = min(side, length)
    last = length - side
    edge = (torch.arange(overlap * scale) + 0.5) / max(overlap * scale, 1)
    for start in sorted({*range(0, last, max(side - overlap, 1)), last}):
        weights = torch.ones(side * scale)
        if start > 0:
            weights[: len(edge)] *= edge
        if start < last:
            weights[len(weights) - len(edge) :] *= edge.flip(0)
        yield slice(start, start + side), weights


def limit_exactly(images: torch.Tensor, small: torch.Tensor, scale: int) -> torch.Tensor:
    """
    Return the nearest images in [-1, 1] that pool to small ones: to the pixels that are pooled together, the same number is added
    before they are clamped.

    Args:
        images (`torch.Tensor` of shape `(B, C, H, W)`): The images.
        small (`torch.Tensor` of shape `(B, C, H / scale, W / scale)`): The small images, in [-1, 1].
        scale (`int`): How many times larger the images are.
    """
    low, high = (torch.zeros_like(small) + bound for bound in (-1 - images.amax(), 1 - images.amin()))
    for _ in range(30):  # halve the interval that the numbers are in
        middle = (low + high) / 2
        is_above = pool((images + upsample(middle, scale)).clamp(-1, 1), scale) > small
        low, high = torch.where(is_above, low, middle), torch.where(is_above, middle, high)
    return (images + upsample((low + high) / 2, scale)).clamp(-1, 1)
