# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Text to image, in pixel space, with a core or with a model grown from it."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from diffusers.guiders import BaseGuidance
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging, replace_example_docstring
from diffusers.utils.torch_utils import unwrap_module
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..hub.mixins import HubMixin
from ..hub.publish import Push
from ..models import GrowableUNet2DConditionModel, ShallowUNet2DModel
from ..models.blocks import check_sizes
from ..models.core_loading import check_unmodified, find_core
from .foreign import ForeignPipeline, find_foreign
from .inputs import InputsMixin
from .lora import GreedyGrowLoraLoaderMixin
from .pipeline_output import GreedyGrowPipelineOutput
from .prompts import FORMATS
from .schedules import (
    grow_scheduler,
    is_positive,
    shift_name,
)


logger = logging.get_logger(__name__)  # pylint: disable=invalid-name

# The default of settings: as in the pipeline that the components come from
KEEP: Any = object()
# Those settings, by the model and by the tokenizer of the pipeline; and those among them that say how prompts are read
SETTINGS: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()
PROMPT_SETTINGS = ("max_sequence_length", "prompt_format")

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> from diffusers_greedy_grow import GreedyGrowPipeline

        >>> pipe = GreedyGrowPipeline.from_pretrained("output/grown-64")
        >>> image = pipe("a large red striped circle on a white background").images[0]
        >>> image.save("circle.png")
        ```
"""


class GreedyGrowPipeline(HubMixin, InputsMixin, DiffusionPipeline, GreedyGrowLoraLoaderMixin):
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
            (`GreedyGrowPipeline(**pipe.components)`, also with another model), or 128.
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
        "pred_original_sample",
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
        settings = find_settings(unet, tokenizer)
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
            # The configuration of the part for text, if the encoder also sees images
            text_width = text_encoder.config.get_text_config().hidden_size
            model_width = unet.config.cross_attention_dim
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
        """Keep the settings for the next pipeline that has this one's model, or its tokenizer."""
        settings = {name: self.config[name] for name in (*PROMPT_SETTINGS, "detail_variances")}
        for holder in (unwrap_module(self.unet), self.tokenizer):  # from `torch.compile(unet)`
            if holder is not None:
                SETTINGS[holder] = settings

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
            raise ValueError(
                f"`detail_variance={detail_variance!r}` must be positive, a variance of images in [-1, 1]: leave it out for images "
                "without detail."
            )
        stage = {"block_out_channels": block_out_channels, "layers_per_block": layers_per_block, "init": init}
        if "subfolder" in kwargs:
            raise TypeError(
                f"`subfolder={kwargs['subfolder']!r}` names a part of a pipeline, but `core` must be a whole one: leave it out. "
                "`GrowableUNet2DConditionModel.from_core` grows a model alone."
            )
        if isinstance(core, (str, Path)):
            kwargs |= {"token": token, "revision": revision}
        foreign, config = None, {}
        try:
            config = get_core_config(core, kwargs)
        except (OSError, ValueError):
            if (foreign := find_foreign(core, kwargs, cls.get_model_kwargs)) is None:
                raise
        if foreign is not None:
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
    def get_model_kwargs(cls, kwargs: dict[str, Any], model: str = "unet") -> dict[str, Any]:
        """
        Return those loading arguments of a pipeline that loading its `model` takes, too: all but the pipeline's own, and of
        dtypes per component the model's. `torch_dtype` is the old name of `dtype`. Raise a `ValueError` if a
        `PipelineQuantizationConfig` quantizes the model, which is to be grown; it may quantize a text encoder.
        """
        own = inspect.signature(cls.__init__).parameters
        arguments = {name: value for name, value in kwargs.items() if name not in own}
        for name in ("dtype", "torch_dtype"):
            if isinstance(dtypes := arguments.get(name), dict):
                arguments[name] = dtypes.get(model, dtypes.get("default", torch.float32))
        if isinstance(config := arguments.get("quantization_config"), PipelineQuantizationConfig):
            if model in (config.quant_mapping or config.components_to_quantize or [model]):
                raise ValueError(
                    f"`quantization_config` quantizes `{model}`, which cannot be grown then: leave it out of that, and quantize the "
                    "grown model when you load it."
                )
            del arguments["quantization_config"]
        return arguments

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
        output_levels: bool = False,
    ) -> GreedyGrowPipelineOutput | tuple:
        r"""
        Draw images from prompts.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                What to draw. Leave out for `prompt_embeds`, and for an unconditional model.
            negative_prompt (`str` or `list[str]`, *optional*):
                What to steer away from: one for all prompts, or one per prompt. It has no effect if
                `guidance_scale <= 1`.
            height (`int`, *optional*), width (`int`, *optional*):
                The size in pixels; the model's `sample_size` by default. A grown model draws at each resolution inside it, too:
                the nearest one does, by the number of pixels, without the stages around it, and its scheduler's shift is
                smaller by the same factor. Both sides must be multiples of the side of one cell of the core's grid there. A
                model draws well only the shapes and sizes that it was trained on. Trained on squares, it
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
                Whether to return a [`GreedyGrowPipelineOutput`] or a tuple.
            callback_on_step_end (`Callable`, `PipelineCallback` or `MultiPipelineCallbacks`, *optional*):
                Called after each step as `callback(self, step, timestep, callback_kwargs)`. The tensors that it returns
                under names in `_callback_tensor_inputs` replace the pipeline's.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                The tensors in `callback_kwargs`, from `_callback_tensor_inputs`. `pred_original_sample` is the clean image in
                [-1, 1] that the step predicted, not clamped: a preview. Another one that the callback returns has no effect.
                Callbacks of diffusers bring their own list.
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
            output_levels (`bool`, defaults to `False`):
                Whether to return also the images of the levels inside, as `level_images`: what each of them predicted in the
                last step.

        Examples:

        Returns:
            [`GreedyGrowPipelineOutput`] or `tuple`: with `return_dict=False`, a tuple with the images, and with `output_levels`
            those of all levels.

        Raises:
            `ValueError`: if an argument or a setting of the scheduler does not fit, before any model runs.
        """
        sampling = self.prepare(
            prompt=prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
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
            output_levels=output_levels,
        )
        latents = self.denoise(sampling, self.prepare_latents(sampling, latents))
        return self.finish(sampling, latents, output_type, return_dict)


def find_settings(unet: torch.nn.Module | None, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """
    Return the settings of the pipeline that a model comes from; or, with another model or none, of the one that a tokenizer comes
    from, of which only how it reads prompts holds for another model.
    """
    unet = unwrap_module(unet)  # from `torch.compile(unet)`
    if unet is not None and unet in SETTINGS:
        return SETTINGS[unet]
    settings = {} if tokenizer is None else SETTINGS.get(tokenizer, {})
    return settings if unet is None else {name: settings[name] for name in PROMPT_SETTINGS if name in settings}


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
