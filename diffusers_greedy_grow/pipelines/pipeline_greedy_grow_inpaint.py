# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Inpainting: a part of a given image is drawn again to fit a prompt, and the rest is kept."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.guiders import BaseGuidance
from diffusers.image_processor import InpaintProcessor, PipelineImageInput, VaeImageProcessor
from diffusers.utils import replace_example_docstring
from PIL import Image

from .denoising import DenoisingMixin, Keep, Sampling
from .images import count_prompts, list_images, list_masks, repeat_images, resize_tensors
from .pipeline_greedy_grow import GreedyGrowPipeline
from .pipeline_output import GreedyGrowPipelineOutput
from .schedules import INTEGER


# The configuration of the processor of images and masks: there is no VAE, and gray in a mask means a mixture.
PROCESSOR = {"vae_scale_factor": 1, "mask_do_binarize": False}

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> from diffusers import AutoPipelineForInpainting
        >>> from diffusers.utils import load_image
        >>> import diffusers_greedy_grow

        >>> pipe = AutoPipelineForInpainting.from_pretrained("output/grown-64")
        >>> image, mask = load_image("circle.png"), load_image("mask.png")
        >>> pipe("a small blue square on a white background", image, mask).images[0]
        ```
"""


class GreedyGrowInpaintPipeline(GreedyGrowPipeline):
    r"""
    Pipeline that draws a part of a given image again, in pixel space (as in RePaint, Lugmayr et al., 2022). At each noise level
    the state outside the mask is that of the given image, and pixels where the mask is 0 are kept exactly. Its components
    and settings are those of [`GreedyGrowPipeline`].
    """

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        strength: float = 1.0,
        padding_mask_crop: int | None = None,
        jump_length: int | None = None,
        jump_n_sample: int = 3,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float = 4.0,
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
        guidance_resolution: str = "full",
        core_first: float | str | None = None,
    ) -> GreedyGrowPipelineOutput | tuple:
        r"""
        Draw parts of images again. Arguments that are not described here are those of [`GreedyGrowPipeline.__call__`].

        Args:
            prompt (`str` or `list[str]`, *optional*):
                What the whole image shows. Leave out for `prompt_embeds`, and for an unconditional model.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list of these):
                The image to change: one for all prompts, or one per prompt. PIL images in RGB (or in gray, as the model
                draws), arrays `(H, W, C)` or tensors `(C, H, W)` in [0, 1]. They are resized to `height` and `width`; of the
                result of that, pixels are kept.
            mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list of these):
                White where the image is drawn again, black where it is kept, gray for a mixture: as many masks as images, or one,
                and of the same height and width. PIL images, arrays `(H, W)` or tensors `(H, W)` or `(1, H, W)` in [0, 1].
            strength (`float`, defaults to 1.0):
                The share of the steps that run, in (0, 1]. Below 1, what is drawn begins as the given image with noise.
            padding_mask_crop (`int`, *optional*):
                Draws only the part of the image around the mask, with a margin of so many pixels, at the whole resolution, and
                puts it back into the image. For one image in RGB and one mask of PIL, and `output_type="pil"`.
            jump_length (`int`, *optional*):
                Resamples as RePaint does: after so many steps, the state gets the noise again that they have removed, and they run
                again. What is drawn then fits better to what is kept. Not with `core_first`.
            jump_n_sample (`int`, defaults to 3):
                How often these steps run; each time costs as much as the first.
            latents (`torch.Tensor` of shape `(B, C, height, width)`, *optional*):
                The noise to begin with, standard normal. What is kept has it, too.
            guidance_stop (`float`, defaults to 0.8):
                The share of all `num_inference_steps` after which guidance ends, those that `strength` leaves out included.

        Examples:

        Returns:
            [`GreedyGrowPipelineOutput`] or `tuple`: with `return_dict=False`, a tuple with the images.

        Raises:
            `ValueError`: if an argument or a setting of the scheduler does not fit, before any model runs.
        """
        images, masks = list_inpainting(
            image,
            mask_image,
            count_prompts(prompt, prompt_embeds),
            self.unet.config.in_channels,
            padding_mask_crop,
            jump_length,
            jump_n_sample,
            core_first,
            output_type,
        )
        sampling = self.prepare(
            prompt=prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
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
            guidance_resolution=guidance_resolution,
            core_first=core_first,
        )
        processor = InpaintProcessor(**PROCESSOR)
        state, keep, visits, overlay = prepare_inpainting(
            self, processor, sampling, images, masks, latents, padding_mask_crop, jump_length, jump_n_sample
        )
        state = self.denoise(sampling, state, keep=keep, visits=visits)
        return self.finish(sampling, state, output_type, return_dict, processor, **overlay)


def list_inpainting(
    image: Any,
    mask_image: Any,
    batch_size: int,
    channels: int,
    padding_mask_crop: int | None,
    jump_length: int | None,
    jump_n_sample: int,
    core_first: float | str | None,
    output_type: str,
) -> tuple[list[Any], list[Any]]:
    """
    Return the images with `channels` and the masks, see [`list_images`] and [`list_masks`], of `batch_size` prompts. The other
    arguments are those of [`GreedyGrowInpaintPipeline.__call__`].

    Raises:
        `ValueError`: if they do not fit.
    """
    images = list_images("image", image, batch_size, channels)
    masks = list_masks("mask_image", mask_image, images)
    if padding_mask_crop is not None:
        check_crop(padding_mask_crop, images, masks, output_type)
    if jump_length is not None:
        check_jumps(jump_length, jump_n_sample, core_first)
    return images, masks


def prepare_inpainting(
    pipeline: DenoisingMixin,
    processor: InpaintProcessor,
    sampling: Sampling,
    images: list[Any],
    masks: list[Any],
    latents: torch.Tensor | None,
    padding_mask_crop: int | None,
    jump_length: int | None,
    jump_n_sample: int,
) -> tuple[torch.Tensor, Keep, list[int] | None, dict[str, Any]]:
    """
    Prepare inpainting with a pipeline. The images and masks are those of [`list_inpainting`], and the other arguments those of
    [`GreedyGrowInpaintPipeline.__call__`].

    Returns:
        The state to begin with, `(B, C, height, width)`; `keep` and `visits` for [`~DenoisingMixin.denoise`]; and the arguments
        of the processor's `postprocess`, which put a crop back into its image.
    """
    size = sampling.height, sampling.width
    given: tuple[Any, Any] = resize_tensors(images, *size), resize_tensors(masks, *size)
    if padding_mask_crop is not None:
        given = images[0], masks[0]
        check_region(padding_mask_crop, masks[0], *size)
    clean, mask, overlay = processor.preprocess(*given, *size, padding_mask_crop)
    clean, mask = repeat_images(clean, sampling), repeat_images(mask, sampling)  # type: ignore[arg-type]
    noise = pipeline.prepare_latents(sampling, latents)

    def keep(state: torch.Tensor, index: int) -> torch.Tensor:
        if padding_mask_crop is not None and index == len(sampling.timesteps) - 1:
            return state  # the overlay mixes the image with the given one, at the given one's resolution
        sigma = sampling.scheduler.sigmas[index + 1].to(state.device, non_blocking=True)
        kept = pipeline.add_noise_to_image(sampling, clean, noise, sigma, sampling.num_stages[index])
        return torch.lerp(kept, state, mask)

    visits = None
    if jump_length is not None:
        visits = list_visits(
            sampling.first, len(sampling.timesteps), jump_length * sampling.scheduler.order, jump_n_sample
        )
    return pipeline.prepare_latents(sampling, noise, clean), keep, visits, overlay


def check_crop(padding: Any, images: list[Any], masks: list[Any], output_type: str) -> None:
    """Raise a `ValueError` if `padding_mask_crop` does not fit the images."""
    if not isinstance(padding, INTEGER) or padding < 0:
        raise ValueError(f"`padding_mask_crop={padding!r}` must be a number of pixels, at least 0.")
    is_one = len(images) == len(masks) == 1 and all(isinstance(one, Image.Image) for one in (*images, *masks))
    if output_type != "pil" or not is_one or images[0].mode != "RGB":  # diffusers cuts out in RGB
        raise ValueError(
            f'`padding_mask_crop={padding}` is for one image in RGB and one mask of PIL and `output_type="pil"`: pass None, and crop them '
            "yourself."
        )
    if masks[0].getbbox() is None:
        raise ValueError("`mask_image` is black everywhere: there is nothing to draw around which to crop.")


def check_region(padding: int, mask: Image.Image, height: int, width: int) -> None:
    """Raise a `ValueError` if the part around a mask has less than a pixel on a side when it is scaled to a height and width."""
    left, top, right, bottom = VaeImageProcessor.get_crop_region(mask, width, height, pad=padding)
    sides = right - left, bottom - top
    if min(sides) * max(height, width) < max(sides):
        raise ValueError(
            f"`padding_mask_crop={padding}` cuts {sides[0]} x {sides[1]} pixels out of `image`, which are too narrow for {width} x "
            f"{height}: pass a smaller one, or None."
        )


def check_jumps(jump_length: Any, jump_n_sample: Any, core_first: Any) -> None:
    """Raise a `ValueError` if the arguments of the resampling do not fit."""
    for name, value in (("jump_length", jump_length), ("jump_n_sample", jump_n_sample)):
        if not isinstance(value, INTEGER) or value < 1:
            raise ValueError(f"`{name}={value!r}` must be a positive integer.")
    if core_first is not None:
        raise ValueError(
            f"`core_first={core_first!r}` does not go with `jump_length={jump_length}`: stages that have joined would leave again."
        )


def list_visits(first: int, count: int, length: int, repeats: int) -> list[int]:
    """Return the indices of timesteps from `first` to `count`, in blocks of `length`, each `repeats` times."""
    blocks = [range(start, min(start + length, count)) for start in range(first, count, length)]
    return [index for block in blocks for _ in range(repeats) for index in block]
