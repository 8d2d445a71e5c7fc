# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The denoising loop, which all pipelines share."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.guiders import BaseGuidance
from diffusers.utils.torch_utils import randn_tensor

from ..flow import add_noise, high_band, unshift_sigma, velocity_from_clean
from ..models.text import TextCache
from .pipeline_output import GreedyGrowPipelineOutput
from .schedules import check_schedule, restart, shift_name, start_scheduler, step_arguments


# The tensors of the text, as `encode_prompt` returns them and step callbacks see them
TEXT_NAMES = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")


@dataclass
class Sampling:
    """
    How one call of a pipeline draws: its checked arguments, and what follows from them.

    Args:
        batch_size (`int`), height (`int`), width (`int`): Of the images.
        level (`int`): The index in the model's `sample_sizes` of the resolution that draws them.
        device (`torch.device`), generator: Where they are drawn, and the source of all noise.
        scheduler ([`SchedulerMixin`]): The pipeline's, or at an inner level one with that level's shift.
        timesteps (`torch.Tensor`): All timesteps of the schedule; an order of 2 has two per step.
        start (`dict`): The scheduler's state before the first step, see [`copy_state`].
        first (`int`): The index of the timestep to begin at.
        num_stages (`list[int]`): How many growth stages take part at each timestep.
        text (`dict`): The encoded prompts, by [`TEXT_NAMES`].
        at_core (`bool`): Whether guidance acts on the core's prediction alone.
        is_compiled (`bool`): Whether the model or a part of it is compiled.
        output_levels (`bool`): Whether to keep `inner_images`.
        guidance_stop (`float`), guider, cross_attention_kwargs, callback, callback_names: See the pipelines' `__call__`.
        inner_images (`tuple[torch.Tensor, ...]`): What the levels inside predicted in the latest step, see [`GreedyGrowOutput`].
    """

    batch_size: int
    height: int
    width: int
    level: int
    device: torch.device
    generator: torch.Generator | list[torch.Generator] | None
    scheduler: Any
    timesteps: torch.Tensor
    start: dict[str, Any]
    first: int
    num_stages: list[int]
    text: dict[str, torch.Tensor | None]
    at_core: bool
    is_compiled: bool
    output_levels: bool
    guidance_stop: float
    guider: BaseGuidance | None
    cross_attention_kwargs: dict | None
    callback: Callable[[Any, int, torch.Tensor, dict], dict] | None
    callback_names: list[str]
    inner_images: tuple[torch.Tensor, ...] = ()

    @property
    def first_sigma(self) -> torch.Tensor:
        """The noise level to begin at."""
        return self.timesteps[self.first].to(torch.float32) / 1000


# `predict(latents, sigma, guided, texts, sampling, num_stages)` returns clean images `(B, C, H, W)`
Predict = Callable[..., torch.Tensor]
# `keep(latents, index)` returns states `(B, C, H, W)` of the same noise level
Keep = Callable[[torch.Tensor, int], torch.Tensor]


class DenoisingMixin:
    """The part of a pipeline that turns noise into images. It needs `unet`, `scheduler` and `image_processor`."""

    unet: Any
    scheduler: Any
    image_processor: Any
    progress_bar: Any
    maybe_free_model_hooks: Any
    _guidance_scale: float
    _guider: BaseGuidance | None
    _num_timesteps: int
    _interrupt: bool

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return (self._guidance_scale > 1.0 or self._guider is not None) and (
            self.unet.config.cross_attention_dim is not None
        )

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def guide(self, pred: torch.Tensor, negative_pred: torch.Tensor) -> torch.Tensor:
        """Combine the clean images predicted for the prompt and for the negative prompt."""
        if self._guider is not None:
            return self.apply_guider(pred, negative_pred)
        return negative_pred + self._guidance_scale * (pred - negative_pred)

    @torch.compiler.disable(
        reason="a guider counts steps and remembers them, so that it cannot be compiled. At the core it runs within the model: "
        'compile the model\'s blocks, or without `fullgraph`, or use `guidance_scale` or `guidance_resolution="full"`'
    )
    def apply_guider(self, pred: torch.Tensor, negative_pred: torch.Tensor) -> torch.Tensor:
        """Combine them by the guider, never in compiled code."""
        assert self._guider is not None
        return self._guider.forward(pred, negative_pred).pred

    def prepare_texts(self, text: dict[str, torch.Tensor | None], at_core: bool) -> dict[bool, dict[str, Any]]:
        """
        Return the model's text arguments in steps with guidance, under `True`, and in those without, under `False`. Each has
        a cache of its own, which its first step fills. With `at_core`, guidance acts on the core's prediction alone.
        """
        embeds, mask, negative_embeds, negative_mask = (text[name] for name in TEXT_NAMES)
        # The model would cast them, too. But autocast to bfloat16 on a CPU cannot concatenate what an encoder in float16 returns.
        embeds, negative_embeds = (
            one if one is None else one.to(self.unet.dtype) for one in (embeds, negative_embeds)
        )
        arguments = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
        texts: dict[bool, dict[str, Any]] = {
            guided: {**arguments, "text_cache": TextCache()} for guided in (True, False)
        }
        if not self.do_classifier_free_guidance:
            return texts
        if at_core:
            texts[True]["negative_encoder_hidden_states"] = negative_embeds
            texts[True]["negative_encoder_attention_mask"] = negative_mask
            texts[True]["guide"] = self.guide
            return texts
        texts[True]["encoder_hidden_states"] = torch.cat([embeds, negative_embeds])  # type: ignore
        if mask is not None:
            texts[True]["encoder_attention_mask"] = torch.cat([mask, negative_mask])  # type: ignore
        return texts

    def get_text_state(self, text: dict[str, torch.Tensor | None]) -> tuple | None:
        """
        Return a value that changes when the text does, also in place, or None where a change cannot be seen: adapters may
        change the layers that project the text, and tensors made in inference mode do not count their changes.
        """
        tensors = [tensor for tensor in text.values() if tensor is not None]
        if self.unet._hf_peft_config_loaded or any(tensor.is_inference() for tensor in tensors):
            return None
        return (self.do_classifier_free_guidance, *((id(tensor), tensor._version) for tensor in tensors))

    def run_callback(
        self,
        callback: Callable[[Any, int, torch.Tensor, dict], dict],
        names: list[str],
        step: int,
        timestep: torch.Tensor,
        latents: torch.Tensor,
        pred_original_sample: torch.Tensor,
        text: dict[str, torch.Tensor | None],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor | None], bool]:
        """
        Call a step callback. It sees the clean images `(B, C, H, W)` that the step predicted, too. Return the latents and the text
        after it, and whether the text may have changed.
        """
        before = self.get_text_state(text)
        tensors = {"latents": latents, "pred_original_sample": pred_original_sample, **text}
        tensors |= callback(self, step, timestep, {name: tensors[name] for name in names}) or {}
        new_text = {name: tensors[name] for name in TEXT_NAMES}
        after = self.get_text_state(new_text)
        return tensors["latents"], new_text, after is None or after != before  # type: ignore

    def prepare_timesteps(
        self, scheduler: Any, num_inference_steps: int, timesteps: list[float] | None, device: torch.device
    ) -> tuple[torch.Tensor, int]:
        """
        Set a scheduler's timesteps.

        Returns:
            The timesteps, and the number of steps.

        Raises:
            `ValueError`: if the scheduler draws no good images with its settings, or changes the `timesteps` that were asked for.
        """
        schedule: dict[str, Any] = {"num_inference_steps": num_inference_steps}
        if timesteps is not None:
            shift = scheduler.config[shift_name(scheduler)]
            schedule = {"sigmas": unshift_sigma(np.array(timesteps) / 1000, shift)}
        check_schedule(scheduler, schedule)
        made, num_inference_steps = start_scheduler(scheduler, schedule, device)
        # Some schedulers round them.
        if timesteps is not None and not np.allclose(made.tolist(), timesteps, rtol=0, atol=1):
            raise ValueError(
                f"`scheduler` changes `timesteps={list(timesteps)}` to {made.tolist()}: pass `num_inference_steps`, or a scheduler "
                "that has its shift in its config, no `shift_terminal`, and no sigmas of its own, such as Karras'."
            )
        return made, num_inference_steps

    def draw_noise(self, sampling: Sampling) -> torch.Tensor:
        """Draw noise `(B, C, height, width)`. It becomes the image, so it is in float32 whatever the model runs in."""
        shape = (sampling.batch_size, self.unet.config.in_channels, sampling.height, sampling.width)
        return randn_tensor(shape, generator=sampling.generator, device=sampling.device, dtype=torch.float32)

    def prepare_latents(
        self, sampling: Sampling, latents: torch.Tensor | None = None, image: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Return the state to begin with, in float32: noise, or `latents` in its place; with a clean `image`, that image with noise
        of the first timestep's level, see [`add_noise_to_image`].

        Args:
            sampling ([`Sampling`]): How to draw.
            latents (`torch.Tensor` of shape `(B, C, height, width)`, *optional*): The noise.
            image (`torch.Tensor` of shape `(B, C, height, width)`, *optional*): The image in [-1, 1].
        """
        noise = self.draw_noise(sampling) if latents is None else latents.to(sampling.device, torch.float32)
        if image is None:
            return noise
        return self.add_noise_to_image(
            sampling, image, noise, sampling.first_sigma, sampling.num_stages[sampling.first]
        )

    def add_noise_to_image(
        self, sampling: Sampling, image: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, num_stages: int
    ) -> torch.Tensor:
        """
        Return the state of an image at a noise level, without the detail that left-out stages will add when they join, see
        [`join_stages`].

        Args:
            sampling ([`Sampling`]): How to draw.
            image (`torch.Tensor` of shape `(B, C, H, W)`): The image in [-1, 1].
            noise (`torch.Tensor` of shape `(B, C, H, W)`): The noise.
            sigma (`torch.Tensor`): The noise level.
            num_stages (`int`): How many growth stages take part.
        """
        if num_stages < sampling.level:
            sizes = self.unet.sample_sizes
            image = image - high_band(image, sizes[sampling.level] // sizes[num_stages])
        return add_noise(image, noise, sigma)

    def join_stages(
        self,
        sampling: Sampling,
        latents: torch.Tensor,
        pred_original_sample: torch.Tensor,
        sigma: torch.Tensor,
        num_stages_before: int,
        step: int,
    ) -> torch.Tensor:
        """
        Let further growth stages join at a step. They add detail that the state lacks, `(1 - sigma) H x0`; multistep
        solvers must forget their history here, or they would return to their own state without it.

        Args:
            sampling ([`Sampling`]): How to draw.
            latents (`torch.Tensor` of shape `(B, C, H, W)`): The state.
            pred_original_sample (`torch.Tensor` of shape `(B, C, H, W)`): The first clean image with these stages.
            sigma (`torch.Tensor`): The noise level of the state.
            num_stages_before (`int`): How many stages took part until now.
            step (`int`): The index of the step's timestep.

        Returns:
            The state with the detail.
        """
        sizes = self.unet.sample_sizes
        detail = high_band(pred_original_sample, sizes[sampling.level] // sizes[num_stages_before])
        restart(sampling.scheduler, sampling.start, step)
        return latents + (1 - sigma) * detail

    def predict(
        self,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        guided: bool,
        texts: dict[bool, dict[str, Any]],
        sampling: Sampling,
        num_stages: int,
        **inner: torch.Tensor,
    ) -> torch.Tensor:
        """
        Predict clean images.

        Args:
            latents (`torch.Tensor` of shape `(B, C, H, W)`): The states.
            sigma (`torch.Tensor`): Their noise level.
            guided (`bool`): Whether to guide the prediction.
            texts (`dict`): The model's text arguments, see [`prepare_texts`].
            sampling ([`Sampling`]): How to draw.
            num_stages (`int`): How many growth stages take part.
            inner: `inner_image`, see [`GrowableUNet2DConditionModel.forward`].

        Returns:
            The images `(B, C, H, W)`.
        """
        return self.combine(
            self.predict_each(latents, sigma, guided, texts, sampling, num_stages, **inner), guided, sampling
        )

    def combine(self, pred_original_sample: torch.Tensor, guided: bool, sampling: Sampling) -> torch.Tensor:
        """Return clean images `(B, C, H, W)` from those of [`predict_each`]."""
        twice = guided and not sampling.at_core
        return self.guide(*pred_original_sample.chunk(2)) if twice else pred_original_sample

    def predict_each(
        self,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        guided: bool,
        texts: dict[bool, dict[str, Any]],
        sampling: Sampling,
        num_stages: int,
        **inner: torch.Tensor,
    ) -> torch.Tensor:
        """
        Predict clean images before guidance at the full resolution. The arguments are those of [`predict`].

        Returns:
            The images `(B, C, H, W)`, or with such guidance `(2 B, C, H, W)`: those for the prompts, then those for the negative
            prompts.
        """
        twice = guided and not sampling.at_core
        kwargs = {**texts[guided], **{name: torch.cat([one, one]) if twice else one for name, one in inner.items()}}
        if len(self.unet.sample_sizes) > 1:
            kwargs |= {"num_stages": num_stages, "level": sampling.level}
        model_input = torch.cat([latents, latents]) if twice else latents
        if sampling.is_compiled:  # with `mode="reduce-overhead"`, all blocks of a step are one series of CUDA graphs
            torch.compiler.cudagraph_mark_step_begin()
        output = self.unet(
            model_input,
            1000 * sigma.expand(len(model_input)),
            cross_attention_kwargs=sampling.cross_attention_kwargs,
            **kwargs,
        )
        images = (output.pred_original_sample, *(output.inner_images or () if sampling.output_levels else ()))
        if sampling.is_compiled:  # the next step overwrites the graphs' memory; callbacks and callers may keep these
            kwargs["text_cache"].copy_out()
            images = tuple(image.clone() for image in images)
        sampling.inner_images = images[1:]
        return images[0]

    def is_guided(self, sampling: Sampling, index: int) -> bool:
        """Return whether guidance acts at a timestep, and prepare the guider for it, if there is one."""
        timesteps, guider = sampling.timesteps, sampling.guider
        if guider is None:
            order = sampling.scheduler.order
            return self.do_classifier_free_guidance and index - index % order < sampling.guidance_stop * len(timesteps)
        state = {"num_inference_steps": len(timesteps), "timestep": timesteps[index]}
        # Guiders with a memory start it at step 0, which `strength` may leave out.
        guider.set_state(step=0 if index == sampling.first else index, **state)
        guider.prepare_inputs({})
        guider.set_state(step=index, **state)
        return self.do_classifier_free_guidance and guider.num_conditions == 2

    def denoise(
        self,
        sampling: Sampling,
        latents: torch.Tensor,
        predict: Predict | None = None,
        keep: Keep | None = None,
        visits: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """
        Turn states of the first timestep's noise level into images.

        Args:
            sampling ([`Sampling`]): How to draw.
            latents (`torch.Tensor` of shape `(B, C, H, W)`): The states, in float32.
            predict (`Callable`, *optional*): Predicts the clean images, with the arguments of [`predict`], which is the default.
            keep (`Callable`, *optional*): `keep(latents, index)` changes the states after the step at the timestep of an index.
            visits (sequence of `int`, *optional*): The indices of the timesteps in the order in which they are visited, by default
                all from the first one on. Where one is not behind the one before it, the states get the noise that is missing.

        Returns:
            The images `(B, C, H, W)` in [-1, 1], not clamped.
        """
        predict = predict or self.predict
        scheduler, timesteps, num_stages = sampling.scheduler, sampling.timesteps, sampling.num_stages
        visits = range(sampling.first, len(timesteps)) if visits is None else visits
        text, texts = sampling.text, self.prepare_texts(sampling.text, sampling.at_core)
        step_kwargs = step_arguments(scheduler, sampling.generator)
        order, before = scheduler.order, sampling.first - 1
        self._num_timesteps = len(visits)
        with self.progress_bar(total=math.ceil(len(visits) / order)) as progress_bar:
            for visit, i in enumerate(visits):
                if self._interrupt:
                    continue
                t = timesteps[i]
                sigma = t.to(torch.float32) / 1000
                if i <= before:
                    latents = self.add_missing_noise(sampling, latents, before + 1, i)
                pred_original_sample = predict(
                    latents, sigma, self.is_guided(sampling, i), texts, sampling, num_stages[i]
                )
                if i > sampling.first and num_stages[i] > num_stages[i - 1]:
                    latents = self.join_stages(sampling, latents, pred_original_sample, sigma, num_stages[i - 1], i)
                velocity = velocity_from_clean(latents, pred_original_sample, sigma)
                latents = scheduler.step(velocity, t, latents, **step_kwargs, return_dict=False)[0]
                if keep is not None:
                    latents = keep(latents, i)

                if sampling.callback is not None:
                    names = sampling.callback_names
                    latents, text, changed = self.run_callback(
                        sampling.callback, names, visit, t, latents, pred_original_sample, text
                    )
                    if changed:
                        texts = self.prepare_texts(text, sampling.at_core)
                before = i
                if visit == len(visits) - 1 or (visit + 1) % order == 0:
                    progress_bar.update()
        return latents

    def add_missing_noise(self, sampling: Sampling, latents: torch.Tensor, index: int, earlier: int) -> torch.Tensor:
        """
        Return to an earlier timestep (Lugmayr et al., RePaint, 2022): scale the states and add noise, so that they have that
        timestep's noise level, and let the scheduler begin there again.

        Args:
            sampling ([`Sampling`]): How to draw.
            latents (`torch.Tensor` of shape `(B, C, H, W)`): The states.
            index (`int`), earlier (`int`): The index of the noise level that they have, and of that to return to.
        """
        low, high = (sampling.scheduler.sigmas[i].to(latents.device, non_blocking=True) for i in (index, earlier))
        scale = (1 - high).clamp(min=0) / (1 - low)
        missing = (high**2 - (scale * low) ** 2).clamp(min=0).sqrt()
        restart(sampling.scheduler, sampling.start, earlier)
        return scale * latents + missing * self.draw_noise(sampling)

    def finish(
        self,
        sampling: Sampling,
        latents: torch.Tensor,
        output_type: str,
        return_dict: bool,
        processor: Any = None,
        **overlay: Any,
    ) -> GreedyGrowPipelineOutput | tuple[Any, ...]:
        """
        Return images `(B, C, H, W)` in [-1, 1] as a pipeline's output. `overlay` are arguments of another `processor` than the
        pipeline's own.
        """
        images = (processor or self.image_processor).postprocess(latents, output_type=output_type, **overlay)
        level_images = None
        if sampling.output_levels:
            level_images = {
                size: self.image_processor.postprocess(inner, output_type=output_type)
                for size, inner in self.collect_inner_images(sampling).items()
            }
            level_images[self.unet.sample_sizes[sampling.level]] = images
        output = GreedyGrowPipelineOutput(images=images, level_images=level_images)
        self.maybe_free_model_hooks()
        return output if return_dict else output.to_tuple()

    def collect_inner_images(self, sampling: Sampling) -> dict[int, torch.Tensor]:
        """
        Return the clean images `(B, C, h, w)` that the levels inside predicted in the last step, by their resolution. If a
        guider acted on it, they are those for the prompt: some guiders remember sizes and steps.
        """
        inner_images = {}
        for size, image in zip(self.unet.image_sizes, sampling.inner_images):
            if len(image) > sampling.batch_size:
                pred, negative_pred = image.chunk(2)
                image = pred if self._guider is not None else self.guide(pred, negative_pred)
            inner_images[size] = image
        return inner_images
