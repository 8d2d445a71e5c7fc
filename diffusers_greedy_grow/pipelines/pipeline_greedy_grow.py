# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Text to image, in pixel space, with a core or with a model grown from it."""

import inspect
import math
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.guiders import BaseGuidance
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging, replace_example_docstring
from diffusers.utils.torch_utils import is_compiled_module, randn_tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from ..flow import handover_sigma, high_band, shift_sigma, unshift_sigma, velocity_from_clean
from ..hub.mixins import HubMixin
from ..models import GrowableUNet2DConditionModel, ShallowUNet2DModel
from ..models.blocks import TextCache, check_sizes
from ..models.growable_unet_2d_condition import check_growable, find_core
from ..models.shallow_unet_2d import check_mask
from .lora import GreedyGrowLoraLoaderMixin


logger = logging.get_logger(__name__)  # pylint: disable=invalid-name

# What counts as an argument that is a number: numpy's, too
INTEGER = (int, np.integer)
NUMBER = (int, float, np.integer, np.floating)

# `core_first="auto"`: in a state that a stage is left out of, how large the image's share of the variance may be in the
# coarsest detail that the stage draws.
CORE_FIRST_BOUND = 0.01

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
            Any flow-matching scheduler. Its config's `shift` is the resolution divided by the base resolution.
        text_encoder ([`~transformers.PreTrainedModel`], *optional*):
            Any encoder that returns `last_hidden_state`. Without one, pass `prompt_embeds`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer of `text_encoder`.
        max_sequence_length (`int`, defaults to 128):
            How many text tokens of a prompt are read.
        detail_variances (`list[float]`, *optional*):
            For each growth stage, the innermost first, [`~flow.detail_variance`] of the training images by its growth
            factor. `core_first="auto"` needs it; `training_examples/grow.py` measures it.

    Raises:
        `ValueError`: if the scheduler is no flow-matching scheduler or its settings do not fit, if the text encoder's
        width is not the model's `cross_attention_dim`, or if a variance is not positive.
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
        max_sequence_length: int = 128,
        detail_variances: list[float] | None = None,
    ):
        super().__init__()
        check_sizes(max_sequence_length=max_sequence_length)
        if scheduler is not None:  # as diffusers makes it to encode prompts only
            shift_name(scheduler)
        if text_encoder is not None and unet is not None:
            text_width, model_width = text_encoder.config.hidden_size, unet.config.cross_attention_dim
            if text_width != model_width:
                raise ValueError(
                    f"`text_encoder` returns {text_width} channels, but `unet` has `cross_attention_dim={model_width}`: "
                    "pass the encoder that the model was trained with."
                )
        if detail_variances is not None and not (
            isinstance(detail_variances, (list, tuple)) and all(is_variance(value) for value in detail_variances)
        ):
            raise ValueError(
                f"`detail_variances={detail_variances!r}` must be a list of positive numbers: variances of images "
                "in [-1, 1]."
            )
        self.register_modules(unet=unet, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(max_sequence_length=max_sequence_length, detail_variances=detail_variances)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """See [`HubMixin.extract_init_dict`]; here, too, nothing is imported because a file says so."""
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
        core: "GreedyGrowPipeline | str | Path",
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
        Grows a whole pipeline: the model by [`GrowableUNet2DConditionModel.from_core`], the scheduler's shift by the
        growth factor; tokenizer and text encoder are carried over. With `init="preserve"` the result samples at once:
        soft images of the right things.

        Args:
            core ([`GreedyGrowPipeline`], `str` or `Path`):
                The pipeline to grow, or a local folder or Hub repository that holds it.
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
            `ValueError`: if `core` is no pipeline, if `sample_size`, `block_out_channels` or `init` do not fit it, if
            its scheduler does not, or if `detail_variance` is not positive or `core` lacks those of the stages inside.
            `TypeError`: if there are `kwargs` with a loaded pipeline as `core` or that loading does not know, or arguments of
                a push without one.
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
        stage = {"block_out_channels": block_out_channels, "layers_per_block": layers_per_block, "init": init}
        if isinstance(core, (str, Path)):
            if inherited := sorted({"unet", "detail_variances"} & kwargs.keys()):
                raise TypeError(f"{inherited} are those of `core`; the new stage's variance is `detail_variance`.")
            kwargs |= {"token": token, "revision": revision}
            config = find_core(core, subfolder="unet", **kwargs)[1]
        elif not isinstance(core, GreedyGrowPipeline):
            raise ValueError(
                f"`core` must be a GreedyGrowPipeline, a folder or a repository id, but is a {type(core).__name__}; "
                "a model alone grows by `GrowableUNet2DConditionModel.from_core`."
            )
        elif kwargs:
            raise TypeError(f"{sorted(kwargs)} only apply when `core` is a path or repository, not a loaded pipeline.")
        else:
            config = core.unet.config
            shift_name(core.scheduler)  # it may have been exchanged
            check_growable(core.unet)
        GrowableUNet2DConditionModel.build_on_meta(config, sample_size, **stage)
        if detail_variance is not None and not is_variance(detail_variance):
            raise ValueError(f"`detail_variance={detail_variance}` must be positive: a variance of images in [-1, 1].")
        pipeline = cls.from_pretrained(core, unet=None, **kwargs) if isinstance(core, (str, Path)) else core
        variances = None if detail_variance is None else [detail_variance]
        if detail_variance is not None and config.get("inner_sample_sizes"):
            if pipeline.config.detail_variances is None:
                raise ValueError(
                    f"`detail_variance={detail_variance}` needs those of the stages inside, which `core` lacks: leave it out, or "
                    "set `core.register_to_config(detail_variances=[...])`, one for each of its stages, first."
                )
            variances = [*pipeline.config.detail_variances, detail_variance]
        if push is not None:
            push.prepare()

        if isinstance(core, (str, Path)):
            # What is the pipeline's own is not for the model, and of dtypes for each component it takes its own.
            own = inspect.signature(cls.__init__).parameters
            arguments = {name: value for name, value in kwargs.items() if name not in own}
            dtypes = {
                name: kwargs[name].get("unet", kwargs[name].get("default", torch.float32))
                for name in ("dtype", "torch_dtype")
                if isinstance(kwargs.get(name), dict)
            }
            unet = GrowableUNet2DConditionModel.from_core(
                core, sample_size, subfolder="unet", **stage, **{**arguments, **dtypes}
            )
        else:
            unet = GrowableUNet2DConditionModel.from_core(core.unet, sample_size, **stage)
        name = shift_name(pipeline.scheduler)
        shift = pipeline.scheduler.config[name] * sample_size / config["sample_size"]
        # A scheduler made from the config of another kind has the entry of that one, too.
        shifts = {entry: shift for entry in ("shift", "flow_shift") if entry in pipeline.scheduler.config}
        scheduler = type(pipeline.scheduler).from_config({**pipeline.scheduler.config, **shifts}, **{name: shift})
        grown = cls(
            unet=unet,
            scheduler=scheduler,
            text_encoder=pipeline.text_encoder,
            tokenizer=pipeline.tokenizer,
            max_sequence_length=pipeline.config.max_sequence_length,
            detail_variances=variances,
        )
        if push is not None:
            push.publish_or_keep(grown)
        return grown

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
        """What guidance makes of the clean images predicted for the prompt and for the negative prompt."""
        if self._guider is not None:
            return self._guider.forward(pred, negative_pred).pred
        return negative_pred + self._guidance_scale * (pred - negative_pred)

    def prepare_texts(
        self,
        prompt_embeds: torch.Tensor | None,
        prompt_attention_mask: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        negative_prompt_attention_mask: torch.Tensor | None,
        at_core: bool,
    ) -> dict[bool, dict]:
        """
        What the model is told of the text in steps with guidance, under `True`, and in those without; with a place for what the
        text alone decides, which the first step of each kind fills. `at_core` guides at the core alone.
        """
        text = {"encoder_hidden_states": prompt_embeds, "encoder_attention_mask": prompt_attention_mask}
        texts = {guided: {**text, "text_cache": TextCache()} for guided in (True, False)}
        if not self.do_classifier_free_guidance:
            return texts
        if at_core:
            texts[True]["negative_encoder_hidden_states"] = negative_prompt_embeds
            texts[True]["negative_encoder_attention_mask"] = negative_prompt_attention_mask
            texts[True]["guide"] = self.guide
            return texts
        texts[True]["encoder_hidden_states"] = torch.cat([prompt_embeds, negative_prompt_embeds])
        if prompt_attention_mask is not None:
            texts[True]["encoder_attention_mask"] = torch.cat([prompt_attention_mask, negative_prompt_attention_mask])
        return texts

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
        Encodes prompts, or takes what is already encoded, and repeats it for each image.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                The prompts; needed if `prompt_embeds` is not given.
            device (`torch.device`, *optional*):
                Where to; the pipeline's execution device by default.
            do_classifier_free_guidance (`bool`, defaults to `True`):
                Whether to encode the negative prompts as well.
            negative_prompt (`str` or `list[str]`, *optional*):
                One for all prompts, or one each.
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
            tokens = tokenize(self.tokenizer, prompts, self.config.max_sequence_length)
            length = tokens["input_ids"].shape[1]
            may_be_cut = length == max_tokens(self.tokenizer, self.config.max_sequence_length)
            if may_be_cut and (cut := find_cut(self.tokenizer, prompts, self.config.max_sequence_length)):
                logger.warning(f"Only the first {length} tokens of these prompts are read: {cut}")
            attention_mask = tokens["attention_mask"].to(device)
            embeds = self.text_encoder(tokens["input_ids"].to(device), attention_mask=attention_mask).last_hidden_state
            prompt_embeds, negative_prompt_embeds = embeds[:batch_size], embeds[batch_size:]
            prompt_attention_mask = attention_mask[:batch_size].bool()
            negative_prompt_attention_mask = attention_mask[batch_size:].bool()

        encoded = [prompt_embeds, prompt_attention_mask, None, None]
        if do_classifier_free_guidance:
            encoded[2:] = negative_prompt_embeds, negative_prompt_attention_mask
        prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask = (
            None if tensor is None else tensor.to(device).repeat_interleave(num_images_per_prompt, dim=0)
            for tensor in encoded
        )
        return prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask

    def check_inputs(
        self,
        prompt,
        negative_prompt,
        height,
        width,
        num_inference_steps,
        timesteps,
        guidance_scale,
        num_images_per_prompt,
        generator,
        latents,
        prompt_embeds,
        negative_prompt_embeds,
        prompt_attention_mask,
        negative_prompt_attention_mask,
        output_type,
        callback_on_step_end_tensor_inputs,
        guidance_stop,
        guider,
        guidance_resolution,
        core_first,
    ) -> None:
        """Raises a `ValueError` that names the argument at fault; see `__call__`."""
        shift_name(self.scheduler)  # it may have been exchanged
        config = self.unet.config
        cell = config.patch_size * config.sample_size // self.unet.sample_sizes[0]
        if not all(isinstance(side, INTEGER) and side > 0 and side % cell == 0 for side in (height, width)):
            raise ValueError(
                f"`height={height}` and `width={width}` must be positive multiples of {cell}, as integers."
            )
        if timesteps is None and (not isinstance(num_inference_steps, INTEGER) or num_inference_steps < 1):
            raise ValueError(f"`num_inference_steps={num_inference_steps}` must be a positive integer.")
        if timesteps is not None:
            falling = all(later < earlier for earlier, later in zip(timesteps, timesteps[1:]))
            if not len(timesteps) or not falling or not 0 < timesteps[-1] <= timesteps[0] <= 1000:
                raise ValueError(f"`timesteps={list(timesteps)}` must fall, from 1000 at most to above 0.")
            if "sigmas" not in inspect.signature(self.scheduler.set_timesteps).parameters:
                raise ValueError(
                    f"`timesteps` cannot be set for a {type(self.scheduler).__name__}: pass `num_inference_steps`."
                )
        if not isinstance(guidance_scale, NUMBER) or not math.isfinite(guidance_scale):
            raise ValueError(f"`guidance_scale={guidance_scale}` must be a number; 1 means no guidance.")
        if not isinstance(num_images_per_prompt, INTEGER) or num_images_per_prompt < 1:
            raise ValueError(f"`num_images_per_prompt={num_images_per_prompt}` must be a positive integer.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f'`output_type={output_type!r}` is unknown: pass "pil", "np", "pt" or "latent".')
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be in {self._callback_tensor_inputs}, but holds "
                f"{sorted(unknown)}."
            )

        # How to sample
        if not isinstance(guidance_stop, NUMBER) or not 0 <= guidance_stop <= 1:
            raise ValueError(f"`guidance_stop={guidance_stop}` must be a share of the steps, from 0 to 1.")
        if guider is not None and (
            not isinstance(guider, BaseGuidance)
            or guider._input_predictions != ["pred_cond", "pred_uncond"]
            or type(guider).prepare_models is not BaseGuidance.prepare_models
        ):
            raise ValueError(
                f"`guider` is a {type(guider).__name__}; only guiders of diffusers fit that combine the prediction for the "
                "prompt with that for the negative prompt, such as ClassifierFreeGuidance or AdaptiveProjectedGuidance."
            )
        if guidance_resolution not in ("full", "core"):
            raise ValueError(f'`guidance_resolution={guidance_resolution!r}` is unknown: pass "full" or "core".')
        if guidance_resolution == "core" and config.get("init") == "random":
            raise ValueError(
                '`guidance_resolution="core"` needs a core that draws images of its own; in a model grown with '
                '`init="random"` it does not. Pass "full".'
            )
        self.get_handover_sigmas(core_first)

        # What to draw
        if config.cross_attention_dim is None:
            texts = (prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
            if any(text is not None for text in (*texts, prompt_attention_mask, negative_prompt_attention_mask)):
                raise ValueError("Prompts, their embeddings and their masks must be None: the model is unconditional.")
            batch_size = 1
        elif (prompt is None) == (prompt_embeds is None):
            raise ValueError("Pass either `prompt` or `prompt_embeds`, not both and not neither.")
        elif prompt is not None:
            if not isinstance(prompt, str) and not (
                isinstance(prompt, list) and prompt and all(isinstance(text, str) for text in prompt)
            ):
                raise ValueError(f"`prompt` must be a string or a list of strings but is {prompt!r}.")
            if self.text_encoder is None or self.tokenizer is None:
                raise ValueError(
                    "`prompt` needs a `text_encoder` and a `tokenizer`; without them pass `prompt_embeds`."
                )
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
                    f"`negative_prompt` must be a string or a list of {batch_size} strings, one for each prompt, but "
                    f"is {negative_prompt!r}."
                )
        else:
            if prompt_embeds.ndim != 3 or prompt_embeds.shape[-1] != config.cross_attention_dim:
                raise ValueError(
                    f"`prompt_embeds` must be of shape (batch, tokens, {config.cross_attention_dim}) but is of "
                    f"shape {tuple(prompt_embeds.shape)}."
                )
            if negative_prompt is not None:
                raise ValueError(
                    "`negative_prompt` goes with `prompt`: with `prompt_embeds`, pass `negative_prompt_embeds`."
                )
            batch_size = prompt_embeds.shape[0]
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
            masks = (prompt_attention_mask, negative_prompt_attention_mask)
            if self.do_classifier_free_guidance and (masks[0] is None) != (masks[1] is None):
                raise ValueError("Pass `prompt_attention_mask` and `negative_prompt_attention_mask` both or neither.")

        # What to start from
        batch_size *= num_images_per_prompt
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"`generator` is a list of {len(generator)}, but {batch_size} images are to be drawn.")
        shape = (batch_size, config.in_channels, height, width)
        if latents is not None and latents.shape != shape:
            raise ValueError(f"`latents` must be of shape {shape} but is of shape {tuple(latents.shape)}.")

    def get_handover_sigmas(self, core_first: float | str | None) -> list[float]:
        """
        The noise levels, of the model's own resolution, at which the growth stages join in, the innermost first; see
        `core_first` of `__call__`.

        Raises:
            `ValueError`: if `core_first` is neither `"auto"`, a number in (0, 1] nor None; if it is `"auto"` and the pipeline
            lacks `detail_variances`; or if the core draws no images of its own.
        """
        sizes = self.unet.sample_sizes
        if core_first is None:
            return [math.inf] * (len(sizes) - 1)  # a scheduler's first timestep may come out a little above 1000
        if self.unet.config.get("init") == "random":
            raise ValueError(
                f"`core_first={core_first!r}` needs a core that draws images of its own; in a model grown with "
                '`init="random"` it does not. Pass None.'
            )
        if core_first == "auto":
            variances = self.config.detail_variances
            if len(variances or ()) != len(sizes) - 1:
                raise ValueError(
                    '`core_first="auto"` needs the `detail_variances` of the images that the model was trained on, one '
                    f"for each growth stage, but the pipeline has {variances}. Pass a noise level, such as 0.8."
                )
            levels = [
                handover_sigma(variance, size // inner_size, CORE_FIRST_BOUND)
                for variance, inner_size, size in zip(variances or (), sizes, sizes[1:])
            ]
        elif isinstance(core_first, NUMBER) and core_first is not True and 0 < core_first <= 1:
            levels = [float(core_first)] * (len(sizes) - 1)
        else:
            raise ValueError(f'`core_first={core_first!r}` must be "auto", a noise level in (0, 1], or None.')
        sigmas = [shift_sigma(level, sizes[-1] / size) for level, size in zip(levels, sizes[1:])]  # type: ignore
        # A stage needs those inside it, so none of them joins in later than it does.
        return list(accumulate(reversed(sigmas), max))[::-1]

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
        Function invoked when calling the pipeline for generation.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                What to draw. Leave out for `prompt_embeds`, and for an unconditional model.
            negative_prompt (`str` or `list[str]`, *optional*):
                What to steer away from: one for all prompts, or one each. Without effect if `guidance_scale <= 1`.
            height (`int`, *optional*), width (`int`, *optional*):
                In pixels; the model's `sample_size` by default. Multiples of what one cell of the core's grid covers.
            num_inference_steps (`int`, defaults to 28):
                How many denoising steps.
            timesteps (`list[float]`, *optional*):
                The timesteps `1000 * sigma` at which the model is to be called, descending, instead of
                `num_inference_steps`. The scheduler's shift is *not* applied to them again.
            guidance_scale (`float`, defaults to 4.0):
                Classifier-free guidance (Ho & Salimans, 2022): how far to go from the negative prompt's prediction
                past the prompt's. Off if <= 1.
            num_images_per_prompt (`int`, defaults to 1):
                How many images of each prompt.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                For reproducible noise, also that of a scheduler that adds some; a list has one for each image, which
                then does not depend on the others.
            latents (`torch.Tensor` of shape `(B, C, height, width)`, *optional*):
                The noise to start from, standard normal.
            prompt_embeds (`torch.Tensor` of shape `(B, L, D)`, *optional*):
                Text embeddings instead of `prompt`.
            negative_prompt_embeds (`torch.Tensor` of shape `(B, L, D)`, *optional*):
                Text embeddings instead of `negative_prompt`.
            prompt_attention_mask (`torch.Tensor` of shape `(B, L)`, bool, *optional*):
                Which tokens of `prompt_embeds` count; all by default.
            negative_prompt_attention_mask (`torch.Tensor` of shape `(B, L)`, bool, *optional*):
                Which tokens of `negative_prompt_embeds` count; all by default.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`: `PIL.Image.Image`s; `"np"`: an array `(B, H, W, C)` in [0, 1]; `"pt"`: a tensor `(B, C, H, W)`
                in [0, 1]; `"latent"`: the same in [-1, 1], not clamped.
            return_dict (`bool`, defaults to `True`):
                Whether to return an [`~pipelines.ImagePipelineOutput`] or a tuple.
            callback_on_step_end (`Callable`, `PipelineCallback` or `MultiPipelineCallbacks`, *optional*):
                Called after each step as `callback(self, step, timestep, callback_kwargs)`; what it returns under the
                names in `_callback_tensor_inputs` replaces them.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                Which tensors `callback_kwargs` holds, from `_callback_tensor_inputs`; diffusers' own callbacks say it
                themselves.
            cross_attention_kwargs (`dict`, *optional*):
                `{"scale": 0.5}`, say, scales the LoRA layers.
            guidance_stop (`float`, defaults to 0.8):
                The share of the steps, in [0, 1], after which guidance ends and a step costs half. What is in the image
                is settled by then; at low noise guidance enlarges the predictions' errors, which show as blotches
                (Kynkäänniemi et al., 2024, on limited intervals). 1 guides to the end.
            guider ([`~diffusers.guiders.BaseGuidance`], *optional*):
                Instead of `guidance_scale` and `guidance_stop`, a guider of diffusers that combines two predictions of the clean image:
                `ClassifierFreeGuidance` with a rescale or an interval of steps, `AdaptiveProjectedGuidance`, ... Outside
                of its interval a step costs half.
            guidance_resolution (`str`, defaults to `"full"`):
                `"core"` guides the core's prediction only, which decides what is in the image; the growth stages run
                once, for the prompt, instead of twice.
            core_first (`float` or `str`, *optional*):
                Leaves growth stages out while the noise hides what they would draw, down to this noise level in (0, 1]
                of each stage's own resolution. `"auto"` takes it from `detail_variances`, such that in the states
                concerned the image's part of the coarsest detail has at most 1 % of the noise's variance. By default
                all stages run always.

        Examples:

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple`: with `return_dict=False`, a tuple with the images.

        Raises:
            `ValueError`: if an argument does not fit, before any work is done.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 0. Default height and width
        height = self.unet.config.sample_size if height is None else height
        width = self.unet.config.sample_size if width is None else width

        # 1. Check inputs
        self._guidance_scale, self._guider, self._interrupt = guidance_scale, guider, False
        self.check_inputs(
            prompt,
            negative_prompt,
            height,
            width,
            num_inference_steps,
            timesteps,
            guidance_scale,
            num_images_per_prompt,
            generator,
            latents,
            prompt_embeds,
            negative_prompt_embeds,
            prompt_attention_mask,
            negative_prompt_attention_mask,
            output_type,
            callback_on_step_end_tensor_inputs,
            guidance_stop,
            guider,
            guidance_resolution,
            core_first,
        )
        device = self._execution_device

        # 2. Prepare timesteps, before any model runs: whether the scheduler takes them as given shows only here
        schedule: dict = {"num_inference_steps": num_inference_steps}
        given = timesteps
        if given is not None:
            shift = self.scheduler.config[shift_name(self.scheduler)]
            schedule = {"sigmas": unshift_sigma(np.array(given) / 1000, shift)}
        timesteps, num_inference_steps = retrieve_timesteps(self.scheduler, device=device, **schedule)
        made = self.scheduler.timesteps.tolist()
        if given is not None and not np.allclose(made, given, rtol=0, atol=1):  # some schedulers round them
            raise ValueError(
                f"`timesteps={list(given)}` become {made} by `scheduler`: pass `num_inference_steps`, or set a "
                "scheduler with its shift in its config, without `shift_terminal` and other sigmas, such as Karras'."
            )
        self._num_timesteps = len(timesteps)

        # 3. Encode the prompt
        if self.unet.config.cross_attention_dim is not None:
            prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask = (
                self.encode_prompt(
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
            )
            batch_size = prompt_embeds.shape[0]
        else:
            batch_size = num_images_per_prompt

        # 4. Prepare the noise. It is the image that emerges, so it stays in float32 whatever the model runs in.
        shape = (batch_size, self.unet.config.in_channels, height, width)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        else:
            latents = latents.to(device=device, dtype=torch.float32)

        # 5. Denoising loop
        handover_sigmas = self.get_handover_sigmas(core_first)
        num_stages = [sum(t / 1000 <= level for level in handover_sigmas) for t in self.scheduler.timesteps.tolist()]
        self.scheduler.set_begin_index(0)  # else the first step looks for it, which waits for the GPU
        # A step of several evaluations (Heun's) has the same stages in all of them.
        num_stages = [num_stages[i - i % self.scheduler.order] for i in range(len(timesteps))]
        at_core = guidance_resolution == "core" and bool(handover_sigmas)
        texts = self.prepare_texts(
            prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask, at_core
        )
        compiled = any(is_compiled_module(one) or one._compiled_call_impl for one in self.unet.modules())
        step_kwargs = {}
        if "generator" in inspect.signature(self.scheduler.step).parameters:  # of schedulers that may add noise
            step_kwargs["generator"] = generator
        num_warmup_steps = max(len(timesteps) - num_inference_steps * self.scheduler.order, 0)
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                sigma = t.to(torch.float32) / 1000
                guided = self.do_classifier_free_guidance
                if guider is None:
                    guided = guided and i - i % self.scheduler.order < guidance_stop * len(timesteps)
                else:
                    guider.set_state(step=i, num_inference_steps=len(timesteps), timestep=t)
                    guider.prepare_inputs({})  # lets those with a memory begin it
                    guided = guided and guider.num_conditions == 2

                latent_model_input = torch.cat([latents, latents]) if guided and not at_core else latents
                kwargs = texts[guided] | ({"num_stages": num_stages[i]} if handover_sigmas else {})
                if compiled:  # with `mode="reduce-overhead"` all blocks of a step are one series of CUDA graphs
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
                    # The law's state has the detail of its image in it, which these stages are the first to say. A
                    # solver that remembers earlier steps would go back to its own state without it: it starts again.
                    sizes = self.unet.sample_sizes
                    detail = high_band(pred_original_sample, sizes[-1] // sizes[num_stages[i - 1]])
                    latents = latents + (1 - sigma) * detail
                    retrieve_timesteps(self.scheduler, device=device, **schedule)
                    self.scheduler.set_begin_index(i)
                velocity = velocity_from_clean(latents, pred_original_sample, sigma)

                latents = self.scheduler.step(velocity, t, latents, **step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors = {
                        "latents": latents,
                        "prompt_embeds": prompt_embeds,
                        "negative_prompt_embeds": negative_prompt_embeds,
                        "prompt_attention_mask": prompt_attention_mask,
                        "negative_prompt_attention_mask": negative_prompt_attention_mask,
                    }
                    callback_kwargs = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    tensors |= callback_on_step_end(self, i, t, callback_kwargs) or {}
                    latents = tensors["latents"]
                    prompt_embeds, negative_prompt_embeds = tensors["prompt_embeds"], tensors["negative_prompt_embeds"]
                    prompt_attention_mask = tensors["prompt_attention_mask"]
                    negative_prompt_attention_mask = tensors["negative_prompt_attention_mask"]
                    # It may have changed the text, or the adapters of what projects it.
                    texts = self.prepare_texts(
                        prompt_embeds,
                        prompt_attention_mask,
                        negative_prompt_embeds,
                        negative_prompt_attention_mask,
                        at_core,
                    )

                if i == len(timesteps) - 1 or ((i + 1) > num_warmup_steps and (i + 1) % self.scheduler.order == 0):
                    progress_bar.update()

        # 6. The state is the image
        image = self.image_processor.postprocess(latents, output_type=output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (image,)
        return ImagePipelineOutput(images=image)


def shift_name(scheduler) -> str:
    """
    The config entry that holds a flow-matching scheduler's resolution shift: `shift`, or `flow_shift` for the
    multistep solvers. Raises a `ValueError` for any other scheduler, and for settings that do not fit these models.
    """
    config, arguments = scheduler.config, inspect.signature(type(scheduler).__init__).parameters
    for entry, value in (("use_dynamic_shifting", False), ("invert_sigmas", False), ("num_train_timesteps", 1000)):
        if config.get(entry, value) != value:
            raise ValueError(
                f"`scheduler` has `{entry}={config[entry]}`, but the shift of these models is fixed, and their "
                f"timesteps are 1000 times the noise level: set `{entry}={value}`."
            )

    # A config keeps entries of another kind of scheduler that it was made from: what counts is what this one takes.
    if type(scheduler).__name__.startswith("FlowMatch") and "shift" in arguments:
        name, other = "shift", "flow_shift"
    elif (
        "flow_shift" in arguments
        and config.get("use_flow_sigmas")
        and config.get("prediction_type") == "flow_prediction"
    ):
        name, other = "flow_shift", "shift"
    else:
        raise ValueError(
            f"`scheduler` is a {type(scheduler).__name__} that does not do flow matching. Pass a "
            "FlowMatchEulerDiscreteScheduler, say, or a multistep solver with `use_flow_sigmas=True`, "
            '`prediction_type="flow_prediction"` and the shift as `flow_shift`.'
        )
    if config.get(other, config[name]) != config[name]:
        raise ValueError(
            f"`scheduler` has `{name}={config[name]}`, but was made from the config of another kind, with "
            f"`{other}={config[other]}`: pass `{name}={config[other]}` to `from_config`."
        )
    return name


def is_variance(value) -> bool:
    return isinstance(value, NUMBER) and bool(0 < value < math.inf)


def max_tokens(tokenizer: PreTrainedTokenizerBase, max_sequence_length: int) -> int:
    return min(max_sequence_length, tokenizer.model_max_length)  # an encoder, such as CLIP's, may have no more


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_sequence_length: int) -> BatchEncoding:
    """`input_ids` and `attention_mask`, both `(B, L)`, padded to the longest; too long ones are cut, see [`find_cut`]."""
    max_length = max_tokens(tokenizer, max_sequence_length)
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    if tokens["input_ids"].shape[1] == 0:  # of nothing but empty prompts, by a tokenizer that ends none with a token
        tokens = tokenizer(prompts, padding="max_length", max_length=1, return_tensors="pt")
    return tokens


def find_cut(tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_sequence_length: int) -> list[str]:
    """Those of which [`tokenize`] leaves something out."""
    max_length = max_tokens(tokenizer, max_sequence_length)
    return [text for text, ids in zip(prompts, tokenizer(prompts)["input_ids"]) if len(ids) > max_length]
