# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The arguments of the pipelines: what is wrong with them, and what follows from them."""

import inspect
import math
from typing import Any

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.guiders import BaseGuidance
from diffusers.utils import logging
from diffusers.utils.torch_utils import is_compiled_module

from ..models.shallow_unet_2d import check_mask
from .denoising import TEXT_NAMES, DenoisingMixin, Sampling
from .prompts import find_truncated, max_tokens, repeat_per_image, tokenize
from .schedules import (
    FIRST_SIGMA_MIN,
    INTEGER,
    NUMBER,
    begin,
    copy_state,
    count_stages,
    get_handover_sigmas,
    grow_scheduler,
    shift_name,
)


logger = logging.get_logger(__name__)  # pylint: disable=invalid-name


def find_unknown_attention_arguments(unet: Any, names: set[str]) -> list[str]:
    """Return those of `names` that no attention processor of `unet` takes."""
    processors = unet.attn_processors.values()
    taken = [argument for processor in processors for argument in inspect.signature(processor).parameters.values()]
    if any(argument.kind is argument.VAR_KEYWORD for argument in taken):
        return []
    return sorted(names - {argument.name for argument in taken})


class InputsMixin(DenoisingMixin):
    """The part of a pipeline that checks and encodes its arguments."""

    config: Any
    text_encoder: Any
    tokenizer: Any
    _execution_device: torch.device
    _callback_tensor_inputs: list[str]

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        device: torch.device | None = None,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        r"""
        Encode prompts, or take encoded ones, and repeat them for each image.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                The prompts; needed if `prompt_embeds` is not given.
            device (`torch.device`, *optional*):
                The device of what is returned; the pipeline's execution device by default.
            do_classifier_free_guidance (`bool`, defaults to `True`):
                Whether to encode the negative prompts as well.
            negative_prompt (`str` or `list[str]`, *optional*):
                One for all prompts, or one per prompt.
            num_images_per_prompt (`int`, defaults to 1):
                How often to repeat each prompt.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor` of shape `(B, L, D)`, *optional*):
                Encoded prompts.
            prompt_attention_mask, negative_prompt_attention_mask (`torch.Tensor` of shape `(B, L)`, bool, *optional*):
                Their masks.

        Returns:
            `prompt_embeds` `(B, L, D)`, `prompt_attention_mask` `(B, L)`, bool, `negative_prompt_embeds` and
            `negative_prompt_attention_mask` of the same shapes, where `B` counts images; the last two `None` without
            guidance.
        """
        device = device or self._execution_device
        if prompt_embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
            batch_size = len(prompts)
            if do_classifier_free_guidance:
                negative_prompt = negative_prompt or ""
                negatives = [negative_prompt] * batch_size if isinstance(negative_prompt, str) else negative_prompt
                prompts = prompts + list(negatives)
            prompt_format = self.config.prompt_format
            tokens = tokenize(self.tokenizer, prompts, self.config.max_sequence_length, prompt_format)
            length = tokens["input_ids"].shape[1]
            may_be_truncated = prompt_format or length == max_tokens(self.tokenizer, self.config.max_sequence_length)
            if may_be_truncated and (
                truncated := find_truncated(self.tokenizer, prompts, self.config.max_sequence_length, prompt_format)
            ):
                logger.warning(f"Only the first {length} tokens of these prompts are read: {truncated}")
            attention_mask = tokens["attention_mask"].to(device)
            embeds = self.text_encoder(tokens["input_ids"].to(device), attention_mask=attention_mask).last_hidden_state
            prompt_embeds, negative_prompt_embeds = embeds[:batch_size], embeds[batch_size:]
            prompt_attention_mask = attention_mask[:batch_size].bool()
            negative_prompt_attention_mask = attention_mask[batch_size:].bool()

        encoded = [prompt_embeds, prompt_attention_mask, None, None]
        if do_classifier_free_guidance:
            encoded[2:] = negative_prompt_embeds, negative_prompt_attention_mask
        prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask = (
            repeat_per_image(tensor, num_images_per_prompt, device) for tensor in encoded
        )
        return prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask

    def find_level(self, height: int, width: int) -> int:
        """
        Return the index in the model's `sample_sizes` of the resolution that draws images of a height and width: the one whose
        square has the nearest number of pixels, the larger one of two that are as near.

        Raises:
            `ValueError`: if the sides are not positive, or not multiples of what one cell of the core's grid covers there.
        """
        sizes = self.unet.sample_sizes
        # What a cell of the core's grid covers, by the size of each level, the outermost first
        cells = {size: self.unet.side_multiple * size // sizes[-1] for size in reversed(self.unet.image_sizes)}
        nearest, fits = sizes[-1], False
        if all(isinstance(side, INTEGER) and side > 0 for side in (height, width)):
            # Rounded: the logarithms of 1/4 and 4 may differ in their last digit.
            nearest = min(cells, key=lambda size: round(abs(math.log(height * width / size**2)), 6))
            fits = height % cells[nearest] == width % cells[nearest] == 0
        if not fits:
            message = (
                f"`height={height}` and `width={width}` must be positive multiples of {cells[nearest]}, as integers"
            )
            if len(cells) > 1:
                levels = ", ".join(f"{size} x {size} (multiples of {cell})" for size, cell in cells.items())
                message += f", near {nearest} x {nearest}. The model draws images near {levels}"
            raise ValueError(f"{message}.")
        return sizes.index(nearest)

    def check_inputs(
        self,
        num_inference_steps,
        timesteps,
        latents,
        guidance_scale,
        guidance_stop,
        guider,
        guidance_resolution,
        output_type,
        callback_on_step_end,
        callback_on_step_end_tensor_inputs,
        cross_attention_kwargs,
    ) -> None:
        """Raise a `ValueError` that names the argument at fault among those that say how to sample; see `__call__`."""
        shift_name(self.scheduler)  # another one may have been set
        if timesteps is None and (not isinstance(num_inference_steps, INTEGER) or num_inference_steps < 1):
            raise ValueError(f"`num_inference_steps={num_inference_steps}` must be a positive integer.")
        if timesteps is not None:
            if isinstance(timesteps, (torch.Tensor, np.ndarray)):
                timesteps = timesteps.tolist()
            if not isinstance(timesteps, (list, tuple)) or not all(isinstance(one, NUMBER) for one in timesteps):
                raise ValueError(f"`timesteps={timesteps!r}` must be a list of numbers, from at most 1000 to above 0.")
            falling = all(later < earlier for earlier, later in zip(timesteps, timesteps[1:]))
            if not len(timesteps) or not falling or not 0 < timesteps[-1] <= timesteps[0] <= 1000:
                raise ValueError(f"`timesteps={list(timesteps)}` must be decreasing, from at most 1000 to above 0.")
            if "sigmas" not in inspect.signature(self.scheduler.set_timesteps).parameters:
                raise ValueError(
                    f"`timesteps` cannot be set for a {type(self.scheduler).__name__}: pass `num_inference_steps`."
                )
            if latents is None and timesteps[0] < 1000 * FIRST_SIGMA_MIN:
                raise ValueError(
                    f"`timesteps={list(timesteps)}` must begin at {1000 * FIRST_SIGMA_MIN:.0f} or above, since the image begins as "
                    "pure noise. To begin below, pass `latents` of that noise level."
                )
        check_guidance_scale(guidance_scale)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f'`output_type={output_type!r}` is unknown: pass "pil", "np", "pt" or "latent".')
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"`callback_on_step_end={callback_on_step_end!r}` must be a function or None.")
        if not isinstance(callback_on_step_end_tensor_inputs, (list, tuple)):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs={callback_on_step_end_tensor_inputs!r}` must be a list of names from "
                f"{self._callback_tensor_inputs}."
            )
        if cross_attention_kwargs is not None and not isinstance(cross_attention_kwargs, dict):
            raise ValueError(
                f'`cross_attention_kwargs={cross_attention_kwargs!r}` must be a dictionary, such as {{"scale": 0.5}}, or None.'
            )
        names = set(cross_attention_kwargs or ()) - {"scale"}
        if names and (unknown_names := find_unknown_attention_arguments(self.unet, names)):
            raise ValueError(
                f"`cross_attention_kwargs` holds {unknown_names}, which no attention processor of this model takes: pass "
                '"scale", the strength of its LoRA, or set a processor that takes them.'
            )
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be in {self._callback_tensor_inputs}, but holds "
                f"{sorted(unknown)}."
            )
        if not isinstance(guidance_stop, NUMBER) or not 0 <= guidance_stop <= 1:
            raise ValueError(f"`guidance_stop={guidance_stop}` must be a share of the steps, from 0 to 1.")
        if guider is not None and (
            not isinstance(guider, BaseGuidance)
            or guider._input_predictions != ["pred_cond", "pred_uncond"]
            or type(guider).prepare_models is not BaseGuidance.prepare_models
        ):
            raise ValueError(
                f"`guider` is a {type(guider).__name__}; only guiders of diffusers fit that combine the prediction for the "
                "prompt with the one for the negative prompt, such as ClassifierFreeGuidance or AdaptiveProjectedGuidance."
            )
        if guidance_resolution not in ("full", "core"):
            raise ValueError(f'`guidance_resolution={guidance_resolution!r}` is unknown: pass "full" or "core".')
        if guidance_resolution == "core" and self.unet.config.get("init") == "random":
            raise ValueError(
                '`guidance_resolution="core"` needs a core that draws images of its own; in a model grown with '
                '`init="random"` it does not. Pass "full".'
            )

    def check_prompts(
        self,
        prompt,
        negative_prompt,
        prompt_embeds,
        negative_prompt_embeds,
        prompt_attention_mask,
        negative_prompt_attention_mask,
    ) -> int:
        """
        Return the number of prompts, 1 for an unconditional model. Raise a `ValueError` that names the argument at fault
        among those that say what to draw; see `__call__`.
        """
        if self.unet.config.cross_attention_dim is None:
            texts = (prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
            if any(text is not None for text in (*texts, prompt_attention_mask, negative_prompt_attention_mask)):
                raise ValueError("Prompts, their embeddings and their masks must be None: the model is unconditional.")
            return 1
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("Pass either `prompt` or `prompt_embeds`, not both and not neither.")
        if prompt_embeds is not None:
            if negative_prompt is not None:
                raise ValueError(
                    "`negative_prompt` goes with `prompt`: with `prompt_embeds`, pass `negative_prompt_embeds`."
                )
            masks = prompt_attention_mask, negative_prompt_attention_mask
            self.check_prompt_embeds(prompt_embeds, negative_prompt_embeds, *masks)
            return prompt_embeds.shape[0]
        encoded = (negative_prompt_embeds, prompt_attention_mask, negative_prompt_attention_mask)
        if any(tensor is not None for tensor in encoded):
            raise ValueError(
                "`negative_prompt_embeds` and masks go with `prompt_embeds`: with `prompt`, pass `negative_prompt`."
            )
        return self.check_texts(prompt, negative_prompt)

    def check_texts(self, prompt, negative_prompt) -> int:
        """Return the number of prompts. Raise a `ValueError` if these are not texts, or there is no text encoder for them."""
        if not isinstance(prompt, str) and not (
            isinstance(prompt, list) and prompt and all(isinstance(text, str) for text in prompt)
        ):
            raise ValueError(f"`prompt` must be a string or a list of strings but is {prompt!r}.")
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("`prompt` needs a `text_encoder` and a `tokenizer`; without them pass `prompt_embeds`.")
        batch_size = 1 if isinstance(prompt, str) else len(prompt)
        negative_prompt = negative_prompt or ""
        negatives = [negative_prompt] * batch_size if isinstance(negative_prompt, str) else negative_prompt
        is_list = isinstance(negatives, list) and all(isinstance(text, str) for text in negatives)
        if not is_list or len(negatives) != batch_size:
            raise ValueError(
                f"`negative_prompt` must be a string or a list of {batch_size} strings, one for each prompt, but is "
                f"{negative_prompt!r}."
            )
        return batch_size

    def check_prompt_embeds(
        self, prompt_embeds, negative_prompt_embeds, prompt_attention_mask, negative_prompt_attention_mask
    ) -> None:
        """Raise a `ValueError` if prompts that are encoded already do not fit the model or each other."""
        width = self.unet.config.cross_attention_dim
        for name, tensor in (
            ("prompt_embeds", prompt_embeds),
            ("negative_prompt_embeds", negative_prompt_embeds),
            ("prompt_attention_mask", prompt_attention_mask),
            ("negative_prompt_attention_mask", negative_prompt_attention_mask),
        ):
            check_tensor(name, tensor)
        if prompt_embeds.ndim != 3 or prompt_embeds.shape[-1] != width:
            raise ValueError(
                f"`prompt_embeds` must be of shape (batch, tokens, {width}) but is of shape {tuple(prompt_embeds.shape)}."
            )
        if self.do_classifier_free_guidance and negative_prompt_embeds is None:
            raise ValueError("`prompt_embeds` with guidance needs `negative_prompt_embeds`.")
        for name, tensor, shape in (
            ("negative_prompt_embeds", negative_prompt_embeds, prompt_embeds.shape),
            ("prompt_attention_mask", prompt_attention_mask, prompt_embeds.shape[:2]),
            ("negative_prompt_attention_mask", negative_prompt_attention_mask, prompt_embeds.shape[:2]),
        ):
            if tensor is not None and tensor.shape != shape:
                raise ValueError(
                    f"`{name}` must be of shape {tuple(shape)} to go with `prompt_embeds` but is of shape "
                    f"{tuple(tensor.shape)}."
                )
            if tensor is not None and name.endswith("mask"):
                check_mask(name, tensor)
        if self.do_classifier_free_guidance and (prompt_attention_mask is None) != (
            negative_prompt_attention_mask is None
        ):
            raise ValueError("Pass `prompt_attention_mask` and `negative_prompt_attention_mask` both or neither.")

    def check_noise(self, batch_size, num_images_per_prompt, height, width, generator, latents) -> None:
        """Raise a `ValueError` that names the argument at fault among those that say what to start from."""
        if not isinstance(num_images_per_prompt, INTEGER) or num_images_per_prompt < 1:
            raise ValueError(f"`num_images_per_prompt={num_images_per_prompt}` must be a positive integer.")
        batch_size *= num_images_per_prompt
        generators = generator if isinstance(generator, list) else [generator]
        if generator is not None and not all(isinstance(one, torch.Generator) for one in generators):
            raise ValueError(
                f"`generator={generator!r}` must be a torch.Generator, a list of them or None: pass "
                "`torch.Generator().manual_seed(0)`."
            )
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"`generator` is a list of {len(generator)}, but {batch_size} images are to be drawn.")
        shape = (batch_size, self.unet.config.in_channels, height, width)
        check_tensor("latents", latents)
        if latents is not None and latents.shape != shape:
            raise ValueError(f"`latents` must be of shape {shape} but is of shape {tuple(latents.shape)}.")

    def prepare(
        self,
        *,
        height: int | None = None,
        width: int | None = None,
        level: int | None = None,
        num_inference_steps: int = 28,
        timesteps: list[float] | None = None,
        strength: float = 1.0,
        guidance_scale: float = 4.0,
        guidance_stop: float = 0.8,
        guider: BaseGuidance | None = None,
        guidance_resolution: str = "full",
        core_first: float | str | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        output_levels: bool = False,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        cross_attention_kwargs: dict | None = None,
        **prompts: Any,
    ) -> Sampling:
        """
        Check the arguments of a call, set the scheduler's timesteps and encode the prompts. The arguments are those of the
        pipelines' `__call__`; `level` is the result of [`find_level`] by default, and `prompts` are those of [`check_prompts`].

        Raises:
            `ValueError`: if an argument or a setting of the scheduler does not fit, before any model runs.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        height = self.unet.config.sample_size if height is None else height
        width = self.unet.config.sample_size if width is None else width
        self._guidance_scale, self._guider, self._interrupt = guidance_scale, guider, False
        self.check_inputs(
            num_inference_steps,
            timesteps,
            latents,
            guidance_scale,
            guidance_stop,
            guider,
            guidance_resolution,
            output_type,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            cross_attention_kwargs,
        )
        level = self.find_level(height, width) if level is None else level
        handover_sigmas = get_handover_sigmas(core_first, self.unet, self.config.detail_variances, level)
        batch_size = self.check_prompts(**prompts)
        self.check_noise(batch_size, num_images_per_prompt, height, width, generator, latents)
        device = self._execution_device

        # Before any model runs: only here does it show whether the scheduler fits.
        scheduler, sizes = self.scheduler, self.unet.sample_sizes
        if level < len(sizes) - 1:
            scheduler = grow_scheduler(scheduler, sizes[-1], sizes[level])
        scheduled, num_inference_steps = self.prepare_timesteps(scheduler, num_inference_steps, timesteps, device)
        first = self.find_first(scheduler, strength, num_inference_steps)
        num_stages = self.prepare_stages(scheduler, scheduled, handover_sigmas, core_first)
        return Sampling(
            batch_size=batch_size * num_images_per_prompt,
            height=height,
            width=width,
            level=level,
            device=device,
            generator=generator,
            scheduler=scheduler,
            timesteps=scheduled,
            start=copy_state(scheduler),
            first=first,
            num_stages=num_stages,
            text=self.prepare_text(num_images_per_prompt, device, **prompts),
            at_core=guidance_resolution == "core" and bool(handover_sigmas),
            is_compiled=any(is_compiled_module(one) or one._compiled_call_impl for one in self.unet.modules()),
            output_levels=output_levels,
            guidance_stop=guidance_stop,
            guider=guider,
            cross_attention_kwargs=cross_attention_kwargs,
            callback=callback_on_step_end,
            callback_names=callback_on_step_end_tensor_inputs,
        )

    def prepare_stages(
        self,
        scheduler: Any,
        timesteps: torch.Tensor,
        handover_sigmas: list[float],
        core_first: float | str | None,
    ) -> list[int]:
        """
        Return how many growth stages take part at each timestep.

        Raises:
            `ValueError`: if not all of them take part in the last step.
        """
        num_stages = count_stages(timesteps.tolist(), scheduler.order, handover_sigmas)
        if num_stages[-1] < len(handover_sigmas):
            raise ValueError(
                f"`core_first={core_first!r}` lets a stage join at the noise level {handover_sigmas[-1]:.3g}, but the last of "
                f"these steps is at {timesteps[-1] / 1000:.3g}: the image would lack that stage's detail. Take more steps, a higher "
                "level, or None."
            )
        return num_stages

    def prepare_text(
        self, num_images_per_prompt: int, device: torch.device, **prompts: Any
    ) -> dict[str, torch.Tensor | None]:
        """Return the encoded prompts by [`TEXT_NAMES`], or None under each name for an unconditional model."""
        if self.unet.config.cross_attention_dim is None:
            return dict.fromkeys(TEXT_NAMES)
        encoded = self.encode_prompt(
            device=device,
            do_classifier_free_guidance=self.do_classifier_free_guidance,
            num_images_per_prompt=num_images_per_prompt,
            **prompts,
        )
        return dict(zip(TEXT_NAMES, encoded))

    def find_first(self, scheduler: Any, strength: float, num_inference_steps: int) -> int:
        """
        Return the index of the timestep to begin at, and let a scheduler begin there.

        Raises:
            `ValueError`: if `strength` is not in (0, 1], or leaves no step.
        """
        if not isinstance(strength, NUMBER) or not 0 < strength <= 1:
            raise ValueError(f"`strength={strength}` must be above 0 and at most 1: the share of the steps that run.")
        steps = min(int(num_inference_steps * strength), num_inference_steps)
        if not steps:
            raise ValueError(
                f"`strength={strength}` leaves none of {num_inference_steps} steps: pass a larger one, or more "
                "`num_inference_steps`."
            )
        first = (num_inference_steps - steps) * scheduler.order
        begin(scheduler, first)
        return first


def check_tensor(name: str, tensor: Any) -> None:
    """Raise a `ValueError` unless an optional argument is a tensor or None."""
    if tensor is not None and not isinstance(tensor, torch.Tensor):
        raise ValueError(f"`{name}` must be a torch.Tensor but is a {type(tensor).__name__}: convert it.")


def check_guidance_scale(guidance_scale: Any) -> None:
    """Raise a `ValueError` unless this is a finite number."""
    if not isinstance(guidance_scale, NUMBER) or not math.isfinite(guidance_scale):
        raise ValueError(f"`guidance_scale={guidance_scale!r}` must be a number; 1 means no guidance.")
