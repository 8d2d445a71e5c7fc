# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Image to image: a given image with noise is denoised to fit a prompt."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.guiders import BaseGuidance
from diffusers.image_processor import PipelineImageInput
from diffusers.utils import replace_example_docstring

from .images import count_prompts, list_images, prepare_images
from .pipeline_greedy_grow import GreedyGrowPipeline
from .pipeline_output import GreedyGrowPipelineOutput


EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> from diffusers import AutoPipelineForImage2Image
        >>> from diffusers.utils import load_image
        >>> import diffusers_greedy_grow

        >>> pipe = AutoPipelineForImage2Image.from_pretrained("output/grown-64")
        >>> image = load_image("sketch.png")
        >>> pipe("a large red striped circle on a white background", image, strength=0.8).images[0]
        ```
"""


class GreedyGrowImg2ImgPipeline(GreedyGrowPipeline):
    r"""
    Pipeline that changes a given image to fit a prompt, in pixel space (as SDEdit, Meng et al., 2022). Its components and
    settings are those of [`GreedyGrowPipeline`].
    """

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        strength: float = 0.8,
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
        Change images to fit prompts. Arguments that are not described here are those of [`GreedyGrowPipeline.__call__`].

        Args:
            prompt (`str` or `list[str]`, *optional*):
                What to draw. Leave out for `prompt_embeds`, and for an unconditional model.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list of these):
                The image to begin with: one for all prompts, or one per prompt. PIL images in RGB (or in gray, as the
                model draws), arrays `(H, W, C)` or tensors `(C, H, W)` in [0, 1]. They are resized to `height` and `width`.
            strength (`float`, defaults to 0.8):
                The share of the steps that run, in (0, 1]: the image gets noise of the level at which they begin, which
                depends on the scheduler's shift. With 1 nothing of the image is left.
            latents (`torch.Tensor` of shape `(B, C, height, width)`, *optional*):
                The noise that the image gets, standard normal.
            guidance_stop (`float`, defaults to 0.8):
                The share of all `num_inference_steps` after which guidance ends, those that `strength` leaves out included.

        Examples:

        Returns:
            [`GreedyGrowPipelineOutput`] or `tuple`: with `return_dict=False`, a tuple with the images.

        Raises:
            `ValueError`: if an argument or a setting of the scheduler does not fit, before any model runs.
        """
        images = list_images("image", image, count_prompts(prompt, prompt_embeds), self.unet.config.in_channels)
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
        state = self.prepare_latents(sampling, latents, prepare_images(self.image_processor, images, sampling))
        return self.finish(sampling, self.denoise(sampling, state), output_type, return_dict)
