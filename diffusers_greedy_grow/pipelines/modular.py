# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Modular Diffusers: the pipelines for text to image, image to image and inpainting as blocks, around the same denoising loop."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from diffusers import AutoModel, DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.guiders import BaseGuidance
from diffusers.image_processor import InpaintProcessor, PipelineImageInput, VaeImageProcessor
from diffusers.modular_pipelines.modular_pipeline import (
    AutoPipelineBlocks,
    BlockState,
    ConditionalPipelineBlocks,
    ModularPipeline,
    ModularPipelineBlocks,
    PipelineState,
    SequentialPipelineBlocks,
)
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, ConfigSpec, InputParam, OutputParam
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..hub.mixins import refuse_pickles
from .denoising import TEXT_NAMES, Sampling
from .images import count_prompts, list_images, prepare_images
from .inputs import InputsMixin, check_guidance_scale
from .lora import GreedyGrowLoraLoaderMixin
from .pipeline_greedy_grow import GreedyGrowPipeline
from .pipeline_greedy_grow_inpaint import PROCESSOR, list_inpainting, prepare_inpainting


class GreedyGrowModularPipeline(InputsMixin, ModularPipeline, GreedyGrowLoraLoaderMixin):
    r"""
    A [`ModularPipeline`] of the folders and repositories that [`GreedyGrowPipeline`] saves. Its blocks, [`GreedyGrowBlocks`] by
    default, take the arguments of the classic pipelines, and draw the same images bit by bit.

    The optional component `guider` is one of diffusers' guiders, which replaces `guidance_scale` and `guidance_stop`:
    `pipe.update_components(guider=AdaptiveProjectedGuidance())`.

    Raises:
        `ValueError`: if the configuration has entries that a [`GreedyGrowPipeline`] does not know.

    Examples:
        ```py
        >>> import diffusers_greedy_grow
        >>> from diffusers import ModularPipeline

        >>> pipe = ModularPipeline.from_pretrained("output/grown-64")
        >>> pipe.load_components()
        >>> pipe(prompt="a large red striped circle on a white background", output="images")[0].save("circle.png")

        >>> blocks = pipe.blocks  # remove, replace or insert blocks
        >>> text_encoder = blocks.sub_blocks.pop("text_encoder").init_pipeline("output/grown-64")
        >>> text_encoder.load_components()
        >>> embeds = text_encoder(prompt="a small blue square").get_by_kwargs("denoiser_input_fields")
        ```
    """

    default_blocks_name = "GreedyGrowBlocks"
    _callback_tensor_inputs = GreedyGrowPipeline._callback_tensor_inputs
    progress_bar = DiffusionPipeline.progress_bar

    def __init__(self, *args: Any, config_dict: dict[str, Any] | None = None, **kwargs: Any):
        super().__init__(*args, config_dict=self.check_index(config_dict), **kwargs)

    @classmethod
    def _load_pipeline_config(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        modular_config_dict, config_dict = super()._load_pipeline_config(*args, **kwargs)
        return modular_config_dict, cls.check_index(config_dict)

    @staticmethod
    def check_index(config_dict: dict[str, Any] | None) -> dict[str, Any] | None:
        """
        Return what a `model_index.json` holds, without the components that the pipeline was saved without: diffusers would try
        to load them. Raise a `ValueError` for what a [`GreedyGrowPipeline`] would refuse.
        """
        if config_dict is None:
            return None
        GreedyGrowPipeline.extract_init_dict(config_dict)
        return {name: value for name, value in config_dict.items() if value != [None, None]}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, revision: str | None = None, **kwargs: Any
    ) -> "GreedyGrowModularPipeline":
        """
        Load the configuration of a pipeline; `load_components` loads the components. The arguments are those of
        [`ModularPipeline.from_pretrained`]. That one forgets the `revision`: there, pass it to `load_components`, too.
        """
        path = str(pretrained_model_name_or_path)
        pipeline = cls(pretrained_model_name_or_path=path, revision=revision, **kwargs)
        for spec in pipeline._component_specs.values():
            if spec.pretrained_model_name_or_path == path and spec.revision is None:
                spec.revision = revision
        return pipeline

    def load_components(
        self, names: list[str] | str | None = None, workflow: str | None = None, **kwargs: Any
    ) -> None:
        """Load components as diffusers does, but weights only from safetensors."""
        refuse_pickles(kwargs.get("use_safetensors"))
        # Tokenizers would keep the argument in their configuration.
        kwargs["use_safetensors"] = {"unet": True, "text_encoder": True}
        super().load_components(names, workflow, **kwargs)

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        super().set_progress_bar_config(**kwargs)
        self._progress_bar_config = kwargs

    def check_loaded(self, *names: str) -> None:
        """Raise a `ValueError` if any of these components are missing."""
        if missing := [name for name in names if getattr(self, name) is None]:
            raise ValueError(
                f"The components {missing} are missing: call `load_components()`, or pass them to `update_components`."
                + " Without a text encoder, pass `prompt_embeds` instead of `prompt`." * ("text_encoder" in missing)
            )


# ----------------------------------------------------------------------------------------------------------------------
# Steps

COMPONENTS = {
    spec.name: spec
    for spec in (
        ComponentSpec("unet", AutoModel, "A `ShallowUNet2DModel` or a `GrowableUNet2DConditionModel`."),
        ComponentSpec("scheduler", FlowMatchEulerDiscreteScheduler, "Any flow-matching scheduler."),
        ComponentSpec("text_encoder", PreTrainedModel, "Any encoder that returns `last_hidden_state`."),
        ComponentSpec("tokenizer", PreTrainedTokenizerBase, "The tokenizer of `text_encoder`."),
        ComponentSpec("guider", BaseGuidance, "Replaces `guidance_scale` and `guidance_stop`, if there is one."),
        ComponentSpec(
            "image_processor",
            VaeImageProcessor,
            config=FrozenDict(vae_scale_factor=1),
            default_creation_method="from_config",
        ),
        ComponentSpec(
            "image_mask_processor",
            InpaintProcessor,
            config=FrozenDict(PROCESSOR),
            default_creation_method="from_config",
        ),
    )
}

# The types, defaults and descriptions of the steps' inputs and outputs
VALUES: dict[str, tuple[Any, Any, str]] = {
    "prompt": (str | list[str], None, "What to draw."),
    "negative_prompt": (str | list[str], None, "What to steer away from: one for all prompts, or one per prompt."),
    "prompt_embeds": (torch.Tensor, None, "The embeddings of the prompts."),
    "prompt_attention_mask": (torch.Tensor, None, "True for the tokens of `prompt_embeds` to attend to."),
    "negative_prompt_embeds": (torch.Tensor, None, "The embeddings of the negative prompts."),
    "negative_prompt_attention_mask": (
        torch.Tensor,
        None,
        "True for the tokens of the negative prompts to attend to.",
    ),
    "image": (PipelineImageInput, None, "The image to begin with: one for all prompts, or one per prompt."),
    "mask_image": (PipelineImageInput, None, "White where the image is drawn again, black where it is kept."),
    "strength": (float, None, "The share of the steps that run, in (0, 1]."),
    "padding_mask_crop": (int, None, "Draws only the part around the mask, with a margin of so many pixels."),
    "jump_length": (int, None, "Resamples as RePaint does: goes back after so many steps."),
    "jump_n_sample": (int, 3, "How often the steps of `jump_length` run."),
    "height": (int, None, "The height in pixels; the model's `sample_size` by default."),
    "width": (int, None, "The width in pixels; the model's `sample_size` by default."),
    "num_inference_steps": (int, 28, "The number of denoising steps."),
    "timesteps": (list[float], None, "The decreasing timesteps, instead of `num_inference_steps`."),
    "guidance_scale": (float, 4.0, "The scale of classifier-free guidance, which is off if <= 1."),
    "guidance_stop": (float, 0.8, "The share of the steps, in [0, 1], after which guidance ends."),
    "guidance_resolution": (str, "full", '"full" guides the prediction at full resolution, "core" the core\'s only.'),
    "core_first": (float | str, None, 'The noise level down to which growth stages are left out, or "auto".'),
    "num_images_per_prompt": (int, 1, "The number of images per prompt."),
    "generator": (torch.Generator | list[torch.Generator], None, "The source of all noise; a list has one per image."),
    "latents": (
        torch.Tensor,
        None,
        "The noise to start from, standard normal; after the denoising, images in [-1, 1].",
    ),
    "output_type": (str, "pil", '"pil", "np", "pt", or "latent": in [-1, 1], not clamped.'),
    "cross_attention_kwargs": (dict[str, Any], None, "Arguments of the attention processors."),
    "callback_on_step_end": (Callable, None, "Called after each step; see the classic pipelines."),
    "callback_on_step_end_tensor_inputs": (list[str], ["latents"], "The tensors in `callback_kwargs`."),
    "sampling": (Sampling, None, "The checked arguments, timesteps and embeddings."),
    "keep": (Callable, None, "`keep(latents, index)` changes the states after the step of an index."),
    "visits": (list[int], None, "The indices of the timesteps in the order of the steps."),
    "mask_overlay_kwargs": (dict[str, Any], None, "Puts a crop back into its image."),
    "images": (list[PIL.Image.Image], None, "The images."),
}


class GreedyGrowStep(ModularPipelineBlocks):
    """
    Base class of the steps. A subclass names what it uses, and its `run` sets the outputs in a [`BlockState`]. Its docstring is
    the description.

    Attributes:
        components (`tuple[str, ...]`): Components, by their names in [`COMPONENTS`].
        configs (`tuple[ConfigSpec, ...]`): Settings.
        required (`tuple[str, ...]`), optional (`tuple[str, ...]`): Inputs, by their names in [`VALUES`].
        results (`tuple[str, ...]`): Outputs, by their names in [`VALUES`].
    """

    model_name = "greedy-grow"
    components: tuple[str, ...] = ()
    configs: tuple[ConfigSpec, ...] = ()
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    results: tuple[str, ...] = ()

    description = property(inspect.getdoc)

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [COMPONENTS[name] for name in self.components]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return list(self.configs)

    @property
    def inputs(self) -> list[InputParam]:
        # New ones each time: diffusers changes those of conditional blocks.
        return [
            InputParam(name, kind, default, name in self.required, description)
            for name in (*self.required, *self.optional)
            for kind, default, description in [VALUES[name]]
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam(name, kind, description, "denoiser_input_fields" if name in TEXT_NAMES else None)
            for name in self.results
            for kind, _, description in [VALUES[name]]
        ]

    def run(self, components: GreedyGrowModularPipeline, block_state: BlockState) -> None:
        """Set the outputs in `block_state`."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(
        self, components: GreedyGrowModularPipeline, state: PipelineState
    ) -> tuple[GreedyGrowModularPipeline, PipelineState]:
        block_state = self.get_block_state(state)
        self.run(components, block_state)
        self.set_block_state(state, block_state)
        return components, state


class GreedyGrowTextEncoderStep(GreedyGrowStep):
    """Step that encodes the prompts and, with guidance, the negative prompts."""

    components = ("text_encoder", "tokenizer", "guider")
    configs = (
        ConfigSpec("max_sequence_length", 128, "How many text tokens of a prompt are read at most."),
        ConfigSpec("prompt_format", None, "How prompts are cleaned and padded, see `GreedyGrowPipeline`."),
    )
    required = ("prompt",)
    optional = ("negative_prompt", "guidance_scale")
    results = TEXT_NAMES

    def run(self, components: GreedyGrowModularPipeline, block_state: BlockState) -> None:
        components.check_loaded("text_encoder", "tokenizer")
        components.check_texts(block_state.prompt, block_state.negative_prompt)
        check_guidance_scale(block_state.guidance_scale)
        encoded = components.encode_prompt(
            block_state.prompt,
            do_classifier_free_guidance=block_state.guidance_scale > 1 or components.guider is not None,
            negative_prompt=block_state.negative_prompt,
        )
        for name, tensor in zip(TEXT_NAMES, encoded):
            block_state[name] = tensor


class GreedyGrowInputStep(GreedyGrowStep):
    """Step that checks the arguments, sets the scheduler's timesteps, and repeats the embeddings for each image."""

    components = ("unet", "scheduler", "guider")
    configs = (ConfigSpec("detail_variances", None, 'See `GreedyGrowPipeline`; `core_first="auto"` needs them.'),)
    optional = (
        *TEXT_NAMES,
        "height",
        "width",
        "num_inference_steps",
        "timesteps",
        "guidance_scale",
        "guidance_stop",
        "guidance_resolution",
        "core_first",
        "num_images_per_prompt",
        "generator",
        "latents",
        "output_type",
        "cross_attention_kwargs",
        "callback_on_step_end",
        "callback_on_step_end_tensor_inputs",
    )
    results = ("sampling",)

    def run(self, components: GreedyGrowModularPipeline, block_state: BlockState) -> None:
        components.check_loaded("unet", "scheduler")
        arguments = {name: block_state[name] for name in self.input_names}
        # The prompts are encoded already.
        arguments |= {"prompt": None, "negative_prompt": None, "guider": components.guider}
        block_state.sampling = components.prepare(**arguments)


class GreedyGrowImageInputStep(GreedyGrowInputStep):
    """Step that checks the arguments and sets the scheduler's timesteps, for pipelines that start from an image."""

    def __init__(self, strength: float = 0.8):
        self.strength = strength
        super().__init__()

    @property
    def inputs(self) -> list[InputParam]:
        kind, _, description = VALUES["strength"]
        return [*super().inputs, InputParam("strength", kind, self.strength, description=description)]


class GreedyGrowPrepareLatentsStep(GreedyGrowStep):
    """Step that draws the noise to start from, unless it is given."""

    components = ("unet",)
    required = ("sampling",)
    optional = ("latents",)
    results = ("latents",)

    def run(self, components: GreedyGrowModularPipeline, block_state: BlockState) -> None:
        block_state.latents = components.prepare_latents(block_state.sampling, block_state.latents)


class GreedyGrowImg2ImgPrepareLatentsStep(GreedyGrowStep):
    """Step that adds noise of the first step's level to the given images."""

    components = ("unet", "image_processor")
    required = ("sampling", "image")
    optional = ("latents", "prompt_embeds")
    results = ("latents",)

    def run(self, components: GreedyGrowModularPipeline, block_state: BlockState) -> None:
        batch_size, channels = count_prompts(None, block_state.prompt_embeds), components.unet.config.in_channels
        images = list_images("image", block_state.image, batch_size, channels)
        clean = prepare_images(components.image_processor, images, block_state.sampling)
        block_state.latents = components.prepare_latents(block_state.sampling, block_state.latents, clean)


class GreedyGrowInpaintPrepareLatentsStep(GreedyGrowStep):
    """Step that adds noise of the first step's level to the given images, and prepares what keeps them outside the masks."""

    components = ("unet", "scheduler", "image_mask_processor")
    required = ("sampling", "image", "mask_image")
    optional = (
        "latents",
        "prompt_embeds",
        "padding_mask_crop",
        "jump_length",
        "jump_n_sample",
        "core_first",
        "output_type",
    )
    results = ("latents", "keep", "visits", "mask_overlay_kwargs")

    def run(self, components: GreedyGrowModularPipeline, block_state: BlockState) -> None:
        crop_and_jumps = (block_state.padding_mask_crop, block_state.jump_length, block_state.jump_n_sample)
        images, masks = list_inpainting(
            block_state.image,
            block_state.mask_image,
            count_prompts(None, block_state.prompt_embeds),
            components.unet.config.in_channels,
            *crop_and_jumps,
            block_state.core_first,
            block_state.output_type,
        )
        processor, sampling = components.image_mask_processor, block_state.sampling
        block_state.latents, block_state.keep, block_state.visits, block_state.mask_overlay_kwargs = (
            prepare_inpainting(components, processor, sampling, images, masks, block_state.latents, *crop_and_jumps)
        )


class GreedyGrowDenoiseStep(GreedyGrowStep):
    """Step that runs the denoising loop of all pipelines. `callback_on_step_end` reaches into it."""

    components = ("unet", "scheduler", "guider")
    required: tuple[str, ...] = ("sampling", "latents")
    results = ("latents",)

    def run(self, components: GreedyGrowModularPipeline, block_state: BlockState) -> None:
        block_state.latents = components.denoise(**{name: block_state[name] for name in self.input_names})


class GreedyGrowInpaintDenoiseStep(GreedyGrowDenoiseStep):
    """Step that runs the denoising loop, and puts the given images back after each step."""

    required = ("sampling", "latents", "keep")
    optional = ("visits",)


class GreedyGrowDecodeStep(GreedyGrowStep):
    """Step that converts images in [-1, 1] to those of `output_type`. There is no VAE."""

    components = ("image_processor", "image_mask_processor")
    required = ("latents",)
    optional = ("output_type", "mask_overlay_kwargs")
    results = ("images",)

    def run(self, components: GreedyGrowModularPipeline, block_state: BlockState) -> None:
        overlay = block_state.mask_overlay_kwargs
        processor = components.image_processor if overlay is None else components.image_mask_processor
        block_state.images = processor.postprocess(
            block_state.latents, output_type=block_state.output_type, **(overlay or {})
        )


# ----------------------------------------------------------------------------------------------------------------------
# Sequences of steps


class GreedyGrowAutoTextEncoderStep(ConditionalPipelineBlocks):
    """Text encoder step that is skipped without prompts: for an unconditional model, or with `prompt_embeds`."""

    block_classes = [GreedyGrowTextEncoderStep]
    block_names = ["text_encoder"]
    block_trigger_inputs = ["prompt", "negative_prompt"]
    description = property(inspect.getdoc)

    def select_block(self, **texts: Any) -> str | None:
        return "text_encoder" if any(text is not None for text in texts.values()) else None


class GreedyGrowCoreDenoiseStep(SequentialPipelineBlocks):
    """Steps from embeddings and noise to images in [-1, 1]."""

    block_classes = [GreedyGrowInputStep, GreedyGrowPrepareLatentsStep, GreedyGrowDenoiseStep]
    block_names = ["input", "prepare_latents", "denoise"]
    description = property(inspect.getdoc)


class GreedyGrowImg2ImgCoreDenoiseStep(SequentialPipelineBlocks):
    """Steps from embeddings and given images to images in [-1, 1]."""

    block_classes = [GreedyGrowImageInputStep, GreedyGrowImg2ImgPrepareLatentsStep, GreedyGrowDenoiseStep]
    block_names = ["input", "prepare_latents", "denoise"]
    description = property(inspect.getdoc)


class GreedyGrowInpaintCoreDenoiseStep(SequentialPipelineBlocks):
    """Steps from embeddings, given images and masks to images in [-1, 1]."""

    block_classes = [
        GreedyGrowImageInputStep(strength=1.0),
        GreedyGrowInpaintPrepareLatentsStep,
        GreedyGrowInpaintDenoiseStep,
    ]
    block_names = ["input", "prepare_latents", "denoise"]
    description = property(inspect.getdoc)


class GreedyGrowAutoCoreDenoiseStep(AutoPipelineBlocks):
    """Steps for inpainting with `mask_image`, for image to image with `image` alone, and for text to image without both."""

    block_classes = [GreedyGrowInpaintCoreDenoiseStep, GreedyGrowImg2ImgCoreDenoiseStep, GreedyGrowCoreDenoiseStep]
    block_names = ["inpaint", "img2img", "text2image"]
    block_trigger_inputs = ["mask_image", "image", None]
    description = property(inspect.getdoc)


class GreedyGrowBlocks(SequentialPipelineBlocks):
    """
    Text to image, with `image` image to image, and with `mask_image` inpainting, in pixel space.

    `doc` lists the components, inputs and outputs. `get_workflow("text2image")` returns the blocks of one of these tasks.
    """

    model_name = "greedy-grow"
    block_classes = [GreedyGrowAutoTextEncoderStep, GreedyGrowAutoCoreDenoiseStep, GreedyGrowDecodeStep]
    block_names = ["text_encoder", "denoise", "decode"]
    description = property(inspect.getdoc)
    _workflow_map = {
        "text2image": {"prompt": True},
        "image2image": {"prompt": True, "image": True},
        "inpainting": {"prompt": True, "image": True, "mask_image": True},
    }

    @property
    def outputs(self) -> list[OutputParam]:
        return [OutputParam.template("images")]
