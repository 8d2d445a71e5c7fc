# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Text to image, in pixel space, with a core or with a model grown from it."""

import inspect
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.guiders import BaseGuidance
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging, replace_example_docstring
from diffusers.utils.torch_utils import is_compiled_module, randn_tensor, unwrap_module
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..flow import high_band, unshift_sigma, velocity_from_clean
from ..hub.mixins import HubMixin
from ..hub.publish import Push
from ..models import GrowableUNet2DConditionModel, ShallowUNet2DModel
from ..models.blocks import TextCache, check_sizes
from ..models.growable_unet_2d_condition import check_unmodified, find_core
from ..models.shallow_unet_2d import check_mask
from .foreign import ForeignPipeline, find_foreign
from .lora import GreedyGrowLoraLoaderMixin
from .prompts import FORMATS, find_truncated, max_tokens, repeat_per_image, tokenize
from .schedules import (
    FIRST_SIGMA_MIN,
    INTEGER,
    NUMBER,
    check_schedule,
    count_stages,
    get_handover_sigmas,
    grow_scheduler,
    is_positive,
    shift_name,
    start_scheduler,
    step_arguments,
)


logger = logging.get_logger(__name__)  # pylint: disable=invalid-name

# The tensors of the text, as `encode_prompt` returns them and step callbacks see them
TEXT_NAMES = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")

# The default of settings: as in the pipeline that the components come from
KEEP: Any = object()
# Those settings, by the model of the pipeline, or by its tokenizer if it has no model
SETTINGS: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> from diffusers_greedy_grow import GreedyGrowPipeline

        >>> pipe = GreedyGrowPipeline.from_pretrained("output/grown-64")
        >>> image = pipe("a large red striped circle on a white background").images[0]
        >>> image.save("circle.png")
        ```
"""


class GreedyGrowPipeline(HubMixin, DiffusionPipeline, GreedyGrowLoraLoaderMixin):
    r"""
    Pipeline for text-to-image generation in pixel space with a greedily grown model (Vasconcelos et al., 2024), or
    with the core alone. There is no VAE: the denoised state is the image.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods the
    library implements for all the pipelines (such as downloading or saving, running on a particular device, etc.)

    Args:
        unet ([`ShallowUNet2DModel`] or [`GrowableUNet2DConditionModel`]):
            Predicts the flow velocity of the image.
        scheduler ([`FlowMatchEulerDiscreteScheduler`]):
            Any flow-matching scheduler that draws good images, which `__call__` checks. Its config's `shift` is the
            resolution divided by the base resolution.
        text_encoder ([`~transformers.PreTrainedModel`], *optional*):
            Any encoder that returns `last_hidden_state`. Without one, pass `prompt_embeds`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer of `text_encoder`.
        max_sequence_length (`int`, *optional*):
            How many text tokens of a prompt are read at most. By default as in the pipeline that these components come from
            (`GreedyGrowPipeline(**pipe.components)`), or 128.
        detail_variances (`list[float]`, *optional*):
            [`~flow.detail_variance`] of the training images at each stage's growth factor, the innermost stage first. By default
            as in the pipeline that these components come from, if any. `core_first="auto"` needs it;
            `training_examples/grow.py` measures it.
        prompt_format (`str`, *optional*):
            How prompts are cleaned and padded, for a model that was grown from a pipeline of diffusers: `"if"` or
            `"prx_pixel"`. By default as in the pipeline that these components come from, or not at all.

    Raises:
        `ValueError`: if the scheduler does not do flow matching or its settings do not fit, if the text encoder's width is
        not the model's `cross_attention_dim`, if a variance is not positive, or if the prompt format is unknown.
    """

    model_cpu_offload_seq = "text_encoder->unet"
    _optional_components = ["text_encoder", "tokenizer"]
    _callback_tensor_inputs = [
        "latents",
        "prompt_embeds",
        "negative_prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_attention_mask",
    ]

    def __init__(
        self,
        unet: ShallowUNet2DModel | GrowableUNet2DConditionModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_sequence_length: int = KEEP,
        detail_variances: list[float] | None = KEEP,
        prompt_format: str | None = KEEP,
    ):
        super().__init__()
        holder = get_holder(unet, tokenizer)
        settings = {} if holder is None else SETTINGS.get(holder, {})
        if max_sequence_length is KEEP:
            max_sequence_length = settings.get("max_sequence_length", 128)
        if detail_variances is KEEP:
            detail_variances = settings.get("detail_variances")
        if prompt_format is KEEP:
            prompt_format = settings.get("prompt_format")
        if prompt_format not in (None, *FORMATS):
            raise ValueError(f"`prompt_format={prompt_format!r}` must be None or one of {sorted(FORMATS)}.")
        check_sizes(max_sequence_length=max_sequence_length)
        if scheduler is not None:  # None in a pipeline that only encodes prompts
            shift_name(scheduler)
        if text_encoder is not None and unet is not None:
            text_width, model_width = text_encoder.config.hidden_size, unet.config.cross_attention_dim
            if text_width != model_width:
                raise ValueError(
                    f"`text_encoder` returns {text_width} channels, but `unet` has `cross_attention_dim={model_width}`: "
                    "pass the encoder that the model was trained with."
                )
        if detail_variances is not None and not (
            isinstance(detail_variances, (list, tuple)) and all(is_positive(value) for value in detail_variances)
        ):
            raise ValueError(
                f"`detail_variances={detail_variances!r}` must be a list of positive numbers: variances of images "
                "in [-1, 1]."
            )
        self.register_modules(unet=unet, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(
            max_sequence_length=max_sequence_length, detail_variances=detail_variances, prompt_format=prompt_format
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self.keep_settings()

    @property
    def components(self) -> dict[str, Any]:
        """The components. A pipeline that is built of them, `GreedyGrowPipeline(**pipe.components)`, has the same settings."""
        self.keep_settings()
        return super().components

    def keep_settings(self) -> None:
        """Keep the settings for the next pipeline that has this one's model, or its tokenizer if there is no model."""
        if (holder := get_holder(self.unet, self.tokenizer)) is not None:
            names = ("max_sequence_length", "detail_variances", "prompt_format")
            SETTINGS[holder] = {name: self.config[name] for name in names}

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "GreedyGrowPipeline":
        r"""
        Create a pipeline with the components and settings of another one.

        Args:
            pipeline ([`DiffusionPipeline`]):
                The pipeline to share components with.
            kwargs:
                As in diffusers: components and settings to replace. Components keep their dtypes. With a `dtype`, all are cast
                to it, those that `pipeline` shares, too.

        Returns:
            [`GreedyGrowPipeline`]
        """
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:  # diffusers would cast to float32
            kwargs["dtype"] = "auto" if kwargs.get("custom_pipeline") is None else pipeline.dtype
        return super().from_pipe(pipeline, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> "GreedyGrowPipeline":
        """Move or cast as diffusers does. `dtype="auto"` leaves the dtypes of the components as they are."""
        if kwargs.get("dtype") == "auto":
            del kwargs["dtype"]
        return super().to(*args, **kwargs)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """Read the pipeline's configuration, and refuse one that names a library which has not been imported."""
        init_dict, unused, hidden = super().extract_init_dict(config_dict, **kwargs)
        components = cls._get_signature_keys(cls)[0]
        for name in components & init_dict.keys():
            if not isinstance(init_dict[name], (list, tuple)) or len(init_dict[name]) != 2:
                raise ValueError(f"`{name}` in model_index.json must be a library and a class: {init_dict[name]!r}.")
            library, class_name = init_dict[name]
            if library is not None and library not in sys.modules:
                raise ValueError(
                    f"`{name}` in model_index.json is a {class_name} of {library}, which has not been imported: "
                    "if you trust it, import it first."
                )
        return init_dict, unused, hidden

    @classmethod
    def from_core(
        cls,
        core: "GreedyGrowPipeline | DiffusionPipeline | str | Path",
        sample_size: int,
        block_out_channels: tuple[int, ...] = (128, 256),
        layers_per_block: int = 1,
        init: str = "preserve",
        detail_variance: float | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        **kwargs,
    ) -> "GreedyGrowPipeline":
        r"""
        Grow a whole pipeline: the model by [`GrowableUNet2DConditionModel.from_core`], and the scheduler's shift by the
        growth factor. Tokenizer and text encoder stay as they are. With `init="preserve"` the result can sample before it
        is trained: soft images of what the core draws.

        Args:
            core ([`GreedyGrowPipeline`], `str` or `Path`):
                The pipeline to grow, or a local folder or Hub repository that holds it. It can also be a `DDPMPipeline`,
                `DDIMPipeline`, `IFPipeline` or `PRXPixelPipeline` of diffusers in pixel space. The grown pipeline encodes prompts
                as that one does, and samples by flow matching.
            sample_size, block_out_channels, layers_per_block, init:
                See [`GrowableUNet2DConditionModel.from_core`].
            detail_variance (`float`, *optional*):
                The new stage's entry of `detail_variances`.
            push_to_hub, repo_id, private, token, revision, create_pr, commit_message:
                See [`GrowableUNet2DConditionModel.from_core`].
            kwargs:
                Passed to [`~DiffusionPipeline.from_pretrained`] if `core` is a path or repository.

        Returns:
            [`GreedyGrowPipeline`]

        Raises:
            `ValueError`: if `core` is not a pipeline, if `sample_size`, `block_out_channels`, `init` or its scheduler do not
                fit, or if `detail_variance` is not positive or `core` lacks those of the stages inside.
            `TypeError`: if there are `kwargs` although `core` is a loaded pipeline, or that loading does not know, or
                arguments of a push without one.
            `HfHubHTTPError`: if `repo_id` may not be written to, before anything is grown.
            `OSError`: if there is no complete, undamaged core at `core`.
        """
        push = cls.plan_push(
            push_to_hub,
            core_is_loaded=not isinstance(core, (str, Path)),
            repo_id=repo_id,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )
        if detail_variance is not None and not is_positive(detail_variance):
            raise ValueError(f"`detail_variance={detail_variance}` must be positive: a variance of images in [-1, 1].")
        stage = {"block_out_channels": block_out_channels, "layers_per_block": layers_per_block, "init": init}
        if isinstance(core, (str, Path)):
            kwargs |= {"token": token, "revision": revision}
        try:
            config = get_core_config(core, kwargs)
        except (OSError, ValueError):
            if (foreign := find_foreign(core, kwargs, cls.get_model_kwargs(kwargs))) is None:
                raise
            return cls.grow_foreign(foreign, sample_size, stage, detail_variance, push)
        GrowableUNet2DConditionModel.build_on_meta(config, sample_size, **stage)
        pipeline = cls.from_pretrained(core, unet=None, **kwargs) if isinstance(core, (str, Path)) else core
        variances = None if detail_variance is None else [detail_variance]
        if detail_variance is not None and config.get("inner_sample_sizes"):
            if pipeline.config.detail_variances is None:
                raise ValueError(
                    f"`detail_variance={detail_variance}` needs those of the stages inside, which `core` lacks: leave it out, or "
                    "set `core.register_to_config(detail_variances=[...])`, one per stage, first."
                )
            variances = [*pipeline.config.detail_variances, detail_variance]
        if push is not None:
            push.prepare()

        if isinstance(core, (str, Path)):
            stage |= {"subfolder": "unet", **cls.get_model_kwargs(kwargs)}
            unet = GrowableUNet2DConditionModel.from_core(core, sample_size, **stage)
        else:
            unet = GrowableUNet2DConditionModel.from_core(core.unet, sample_size, **stage)
        grown = cls(
            unet=unet,
            scheduler=grow_scheduler(pipeline.scheduler, config["sample_size"], sample_size),
            text_encoder=pipeline.text_encoder,
            tokenizer=pipeline.tokenizer,
            max_sequence_length=pipeline.config.max_sequence_length,
            detail_variances=variances,
            prompt_format=pipeline.config.prompt_format,
        )
        if push is not None:
            push.publish_or_keep(grown)
        return grown

    @classmethod
    def grow_foreign(
        cls,
        core: ForeignPipeline,
        sample_size: int,
        stage: dict[str, Any],
        detail_variance: float | None,
        push: Push | None,
    ) -> "GreedyGrowPipeline":
        """Grow a pipeline of diffusers. The arguments are those of [`~GreedyGrowPipeline.from_core`], checked and read."""
        unet = GrowableUNet2DConditionModel.from_core(
            core.model, sample_size, process=core.process, core_sample_size=core.sample_size, **stage
        )
        if push is not None:
            push.prepare()
        grown = cls(
            unet=unet,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=core.shift * sample_size / unet.sample_sizes[0]),
            text_encoder=core.text_encoder,
            tokenizer=core.tokenizer,
            max_sequence_length=core.max_sequence_length,
            detail_variances=None if detail_variance is None else [detail_variance],
            prompt_format=core.prompt_format,
        )
        if push is not None:
            push.publish_or_keep(grown)
        return grown

    @classmethod
    def get_model_kwargs(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        """
        Return those loading arguments of a pipeline that loading its model takes, too: all but the pipeline's own, and of
        dtypes per component the model's. `torch_dtype` is the old name of `dtype`.
        """
        own = inspect.signature(cls.__init__).parameters
        arguments = {name: value for name, value in kwargs.items() if name not in own}
        for name in ("dtype", "torch_dtype"):
            if isinstance(dtypes := arguments.get(name), dict):
                arguments[name] = dtypes.get("unet", dtypes.get("default", torch.float32))
        return arguments

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
            return self._guider.forward(pred, negative_pred).pred
        return negative_pred + self._guidance_scale * (pred - negative_pred)

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
        text: dict[str, torch.Tensor | None],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor | None], bool]:
        """Call a step callback. Return the latents and the text after it, and whether the text may have changed."""
        before = self.get_text_state(text)
        tensors = {"latents": latents, **text}
        tensors |= callback(self, step, timestep, {name: tensors[name] for name in names}) or {}
        new_text = {name: tensors[name] for name in TEXT_NAMES}
        after = self.get_text_state(new_text)
        return tensors["latents"], new_text, after is None or after != before  # type: ignore

    def prepare_timesteps(
        self, num_inference_steps: int, timesteps: list[float] | None, device: torch.device
    ) -> tuple[torch.Tensor, int, dict[str, Any]]:
        """
        Set the scheduler's timesteps.

        Returns:
            The timesteps, the number of steps, and the arguments that set the same timesteps again.

        Raises:
            `ValueError`: if the scheduler draws no good images with its settings, or changes the `timesteps` that were asked for.
        """
        schedule: dict[str, Any] = {"num_inference_steps": num_inference_steps}
        if timesteps is not None:
            shift = self.scheduler.config[shift_name(self.scheduler)]
            schedule = {"sigmas": unshift_sigma(np.array(timesteps) / 1000, shift)}
        check_schedule(self.scheduler, schedule)
        made, num_inference_steps = start_scheduler(self.scheduler, schedule, device)
        # Some schedulers round them.
        if timesteps is not None and not np.allclose(made.tolist(), timesteps, rtol=0, atol=1):
            raise ValueError(
                f"`scheduler` changes `timesteps={list(timesteps)}` to {made.tolist()}: pass `num_inference_steps`, or a scheduler "
                "that has its shift in its config, no `shift_terminal`, and no sigmas of its own, such as Karras'."
            )
        return made, num_inference_steps, schedule

    def prepare_latents(
        self,
        batch_size: int,
        height: int,
        width: int,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Draw the noise to start from, `(B, C, height, width)`, or take `latents` for it. It becomes the image, so it is in
        float32 whatever the model runs in.
        """
        if latents is not None:
            return latents.to(device=device, dtype=torch.float32)
        shape = (batch_size, self.unet.config.in_channels, height, width)
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    def join_stages(
        self,
        latents: torch.Tensor,
        pred_original_sample: torch.Tensor,
        sigma: torch.Tensor,
        num_stages_before: int,
        step: int,
        schedule: dict[str, Any],
    ) -> torch.Tensor:
        """
        Let further growth stages join at a step. They add detail that the state lacks, `(1 - sigma) H x0`; multistep
        solvers must forget their history here, or they would return to their own state without it.

        Args:
            latents (`torch.Tensor` of shape `(B, C, H, W)`): The state.
            pred_original_sample (`torch.Tensor` of shape `(B, C, H, W)`): The first clean image with these stages.
            sigma (`torch.Tensor`): The noise level of the state.
            num_stages_before (`int`): How many stages took part until now.
            step (`int`): The index of the step's timestep.
            schedule (`dict`): The arguments that set the scheduler's timesteps.

        Returns:
            The state with the detail.
        """
        sizes = self.unet.sample_sizes
        detail = high_band(pred_original_sample, sizes[-1] // sizes[num_stages_before])
        start_scheduler(self.scheduler, schedule, latents.device, step)
        return latents + (1 - sigma) * detail

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

    def check_inputs(
        self,
        height,
        width,
        num_inference_steps,
        timesteps,
        latents,
        guidance_scale,
        guidance_stop,
        guider,
        guidance_resolution,
        output_type,
        callback_on_step_end_tensor_inputs,
    ) -> None:
        """Raise a `ValueError` that names the argument at fault among those that say how to sample; see `__call__`."""
        shift_name(self.scheduler)  # another one may have been set
        config, cell = self.unet.config, self.unet.side_multiple
        if not all(isinstance(side, INTEGER) and side > 0 and side % cell == 0 for side in (height, width)):
            raise ValueError(
                f"`height={height}` and `width={width}` must be positive multiples of {cell}, as integers."
            )
        if timesteps is None and (not isinstance(num_inference_steps, INTEGER) or num_inference_steps < 1):
            raise ValueError(f"`num_inference_steps={num_inference_steps}` must be a positive integer.")
        if timesteps is not None:
            falling = all(later < earlier for earlier, later in zip(timesteps, timesteps[1:]))
            if not len(timesteps) or not falling or not 0 < timesteps[-1] <= timesteps[0] <= 1000:
                raise ValueError(f"`timesteps={list(timesteps)}` must be decreasing, from at most 1000 to above 0.")
            if "sigmas" not in inspect.signature(self.scheduler.set_timesteps).parameters:
                raise ValueError(
                    f"`timesteps` cannot be set for a {type(self.scheduler).__name__}: pass `num_inference_steps`."
                )
            if latents is None and timesteps[0] < 1000 * FIRST_SIGMA_MIN:
                raise ValueError(
                    f"`timesteps={list(timesteps)}` must begin at {1000 * FIRST_SIGMA_MIN:.0f} or above, since the image begins as pure "
                    "noise. To begin below, pass `latents` of that noise level."
                )
        if not isinstance(guidance_scale, NUMBER) or not math.isfinite(guidance_scale):
            raise ValueError(f"`guidance_scale={guidance_scale}` must be a number; 1 means no guidance.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f'`output_type={output_type!r}` is unknown: pass "pil", "np", "pt" or "latent".')
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
        if guidance_resolution == "core" and config.get("init") == "random":
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

        if not isinstance(prompt, str) and not (
            isinstance(prompt, list) and prompt and all(isinstance(text, str) for text in prompt)
        ):
            raise ValueError(f"`prompt` must be a string or a list of strings but is {prompt!r}.")
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("`prompt` needs a `text_encoder` and a `tokenizer`; without them pass `prompt_embeds`.")
        encoded = (negative_prompt_embeds, prompt_attention_mask, negative_prompt_attention_mask)
        if any(tensor is not None for tensor in encoded):
            raise ValueError(
                "`negative_prompt_embeds` and masks go with `prompt_embeds`: with `prompt`, pass `negative_prompt`."
            )
        batch_size = 1 if isinstance(prompt, str) else len(prompt)
        negative_prompt = negative_prompt or ""
        negatives = [negative_prompt] * batch_size if isinstance(negative_prompt, str) else negative_prompt
        if not isinstance(negatives, list) or len(negatives) != batch_size:
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
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"`generator` is a list of {len(generator)}, but {batch_size} images are to be drawn.")
        shape = (batch_size, self.unet.config.in_channels, height, width)
        if latents is not None and latents.shape != shape:
            raise ValueError(f"`latents` must be of shape {shape} but is of shape {tuple(latents.shape)}.")

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        timesteps: list[float] | None = None,
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
    ) -> ImagePipelineOutput | tuple:
        r"""
        Draw images from prompts.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                What to draw. Leave out for `prompt_embeds`, and for an unconditional model.
            negative_prompt (`str` or `list[str]`, *optional*):
                What to steer away from: one for all prompts, or one per prompt. It has no effect if
                `guidance_scale <= 1`.
            height (`int`, *optional*), width (`int`, *optional*):
                The size in pixels; the model's `sample_size` by default. Both must be multiples of the side of one cell of
                the core's grid. A model draws well only the shapes and sizes that it was trained on. Trained on squares, it
                stretches objects with the image: circles become ellipses. Train on images of other shapes to draw them, with
                `--aspect_ratio_buckets` of `training_examples/grow.py`.
            num_inference_steps (`int`, defaults to 28):
                The number of denoising steps.
            timesteps (`list[float]`, *optional*):
                The decreasing timesteps `1000 * sigma` at which the model is called, instead of `num_inference_steps`. The
                scheduler's shift is *not* applied to them again. They begin at 900 or above, unless `latents` are a noisy image
                of the first one's noise level.
            guidance_scale (`float`, defaults to 4.0):
                The scale of classifier-free guidance (Ho & Salimans, 2022), which moves the prediction away from the one
                for the negative prompt. Guidance is off if <= 1.
            num_images_per_prompt (`int`, defaults to 1):
                The number of images per prompt.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                The source of all noise, also of a scheduler's that adds some. A list has one generator per image, so that
                an image does not depend on the others.
            latents (`torch.Tensor` of shape `(B, C, height, width)`, *optional*):
                The noise to start from, standard normal.
            prompt_embeds (`torch.Tensor` of shape `(B, L, D)`, *optional*):
                Text embeddings instead of `prompt`.
            negative_prompt_embeds (`torch.Tensor` of shape `(B, L, D)`, *optional*):
                Text embeddings instead of `negative_prompt`.
            prompt_attention_mask (`torch.Tensor` of shape `(B, L)`, bool, *optional*):
                True for the tokens of `prompt_embeds` to attend to; all of them by default.
            negative_prompt_attention_mask (`torch.Tensor` of shape `(B, L)`, bool, *optional*):
                True for the tokens of `negative_prompt_embeds` to attend to; all of them by default.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`: `PIL.Image.Image`s; `"np"`: an array `(B, H, W, C)` in [0, 1]; `"pt"`: a tensor `(B, C, H, W)`
                in [0, 1]; `"latent"`: the same in [-1, 1], not clamped.
            return_dict (`bool`, defaults to `True`):
                Whether to return an [`~pipelines.ImagePipelineOutput`] or a tuple.
            callback_on_step_end (`Callable`, `PipelineCallback` or `MultiPipelineCallbacks`, *optional*):
                Called after each step as `callback(self, step, timestep, callback_kwargs)`. The tensors that it returns
                under names in `_callback_tensor_inputs` replace the pipeline's.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                The tensors in `callback_kwargs`, from `_callback_tensor_inputs`. Callbacks of diffusers bring their own
                list.
            cross_attention_kwargs (`dict`, *optional*):
                Arguments of the attention processors; `{"scale": 0.5}`, for example, scales the LoRA layers.
            guidance_stop (`float`, defaults to 0.8):
                The share of the steps, in [0, 1], after which guidance ends and a step costs half. By then it is settled
                what is in the image; at low noise, guidance enlarges the predictions' errors, which show as blotches
                (Kynkäänniemi et al., 2024, on limited intervals). With 1, all steps are guided.
            guider ([`~diffusers.guiders.BaseGuidance`], *optional*):
                A guider of diffusers that combines two predictions of the clean image, instead of `guidance_scale` and
                `guidance_stop`: `ClassifierFreeGuidance` with a rescale or an interval of steps,
                `AdaptiveProjectedGuidance`, ... Outside of its interval a step costs half.
            guidance_resolution (`str`, defaults to `"full"`):
                `"full"` guides the prediction at full resolution. `"core"` guides the core's only, which decides what is in
                the image; the growth stages then run once, for the prompt, instead of twice.
            core_first (`float` or `str`, *optional*):
                Leaves growth stages out while the noise hides what they would draw, down to this noise level in (0, 1]
                at each stage's own resolution. `"auto"` derives it from `detail_variances`: in all states above it, the
                image's part of the coarsest detail has at most 1 % of the noise's variance. All stages must take part in the
                last step. By default they take part in all steps.

        Examples:

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple`: with `return_dict=False`, a tuple with the images.

        Raises:
            `ValueError`: if an argument or a setting of the scheduler does not fit, before any model runs.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 0. Default height and width
        height = self.unet.config.sample_size if height is None else height
        width = self.unet.config.sample_size if width is None else width

        # 1. Check inputs
        self._guidance_scale, self._guider, self._interrupt = guidance_scale, guider, False
        self.check_inputs(
            height,
            width,
            num_inference_steps,
            timesteps,
            latents,
            guidance_scale,
            guidance_stop,
            guider,
            guidance_resolution,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        handover_sigmas = get_handover_sigmas(core_first, self.unet, self.config.detail_variances)
        batch_size = self.check_prompts(
            prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            prompt_attention_mask,
            negative_prompt_attention_mask,
        )
        self.check_noise(batch_size, num_images_per_prompt, height, width, generator, latents)
        batch_size *= num_images_per_prompt
        device = self._execution_device

        # 2. Prepare timesteps, before any model runs: only here does it show whether the scheduler fits
        scheduled, num_inference_steps, schedule = self.prepare_timesteps(num_inference_steps, timesteps, device)
        order = self.scheduler.order
        num_stages = count_stages(scheduled.tolist(), order, handover_sigmas)
        if num_stages[-1] < len(handover_sigmas):
            raise ValueError(
                f"`core_first={core_first!r}` lets a stage join at the noise level {handover_sigmas[-1]:.3g}, but the last of these "
                f"steps is at {scheduled[-1] / 1000:.3g}: the image would lack that stage's detail. Take more steps, a higher "
                "level, or None."
            )
        self._num_timesteps = len(scheduled)

        # 3. Encode the prompt
        text: dict[str, torch.Tensor | None] = dict.fromkeys(TEXT_NAMES)
        if self.unet.config.cross_attention_dim is not None:
            encoded = self.encode_prompt(
                prompt,
                device,
                self.do_classifier_free_guidance,
                negative_prompt,
                num_images_per_prompt,
                prompt_embeds,
                negative_prompt_embeds,
                prompt_attention_mask,
                negative_prompt_attention_mask,
            )
            text = dict(zip(TEXT_NAMES, encoded))
        at_core = guidance_resolution == "core" and bool(handover_sigmas)
        texts = self.prepare_texts(text, at_core)

        # 4. Prepare the noise
        latents = self.prepare_latents(batch_size, height, width, device, generator, latents)

        # 5. Denoising loop
        compiled = any(is_compiled_module(one) or one._compiled_call_impl for one in self.unet.modules())
        step_kwargs = step_arguments(self.scheduler, generator)
        num_warmup_steps = max(len(scheduled) - num_inference_steps * order, 0)
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(scheduled):
                if self.interrupt:
                    continue
                sigma = t.to(torch.float32) / 1000
                guided = self.do_classifier_free_guidance
                if guider is None:
                    guided = guided and i - i % order < guidance_stop * len(scheduled)
                else:
                    guider.set_state(step=i, num_inference_steps=len(scheduled), timestep=t)
                    guider.prepare_inputs({})  # guiders with a memory start it here
                    guided = guided and guider.num_conditions == 2

                latent_model_input = torch.cat([latents, latents]) if guided and not at_core else latents
                kwargs = texts[guided] | ({"num_stages": num_stages[i]} if handover_sigmas else {})
                if compiled:  # with `mode="reduce-overhead"`, all blocks of a step are one series of CUDA graphs
                    torch.compiler.cudagraph_mark_step_begin()
                pred_original_sample = self.unet(
                    latent_model_input,
                    1000 * sigma.expand(latent_model_input.shape[0]),
                    cross_attention_kwargs=cross_attention_kwargs,
                    **kwargs,
                ).pred_original_sample
                if compiled:
                    kwargs["text_cache"].copy_out()
                if guided and not at_core:
                    pred_original_sample = self.guide(*pred_original_sample.chunk(2))
                if i and num_stages[i] > num_stages[i - 1]:
                    latents = self.join_stages(latents, pred_original_sample, sigma, num_stages[i - 1], i, schedule)
                velocity = velocity_from_clean(latents, pred_original_sample, sigma)

                latents = self.scheduler.step(velocity, t, latents, **step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    names = callback_on_step_end_tensor_inputs
                    latents, text, changed = self.run_callback(callback_on_step_end, names, i, t, latents, text)
                    if changed:
                        texts = self.prepare_texts(text, at_core)

                if i == len(scheduled) - 1 or ((i + 1) > num_warmup_steps and (i + 1) % order == 0):
                    progress_bar.update()

        # 6. The state is the image
        image = self.image_processor.postprocess(latents, output_type=output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (image,)
        return ImagePipelineOutput(images=image)


def get_holder(unet: torch.nn.Module | None, tokenizer: PreTrainedTokenizerBase | None) -> Any:
    """Return the component under which a pipeline's settings are kept, or None if it has neither of the two."""
    return tokenizer if unet is None else unwrap_module(unet)  # from `torch.compile(unet)`


def get_core_config(core: GreedyGrowPipeline | str | Path, kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    Return the configuration of the model in `core`, the argument of [`~GreedyGrowPipeline.from_core`]. Raise an error if it
    cannot be grown, or if `kwargs` do not go with it.
    """
    if isinstance(core, (str, Path)):
        if inherited := sorted({"unet", "detail_variances"} & kwargs.keys()):
            raise TypeError(f"{inherited} are those of `core`; the new stage's variance is `detail_variance`.")
        return find_core(core, subfolder="unet", **kwargs)[1]
    if not isinstance(core, GreedyGrowPipeline):
        raise ValueError(
            f"`core` must be a GreedyGrowPipeline, a folder or a repository id, but is a {type(core).__name__}; "
            "a model alone grows by `GrowableUNet2DConditionModel.from_core`."
        )
    if kwargs:
        raise TypeError(f"{sorted(kwargs)} only apply when `core` is a path or repository, not a loaded pipeline.")
    shift_name(core.scheduler)  # another one may have been set
    check_unmodified(core.unet)
    return core.unet.config
