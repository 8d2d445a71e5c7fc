# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The pipelines of a run: around a new core, around a trained core that is given, from a finished phase, and grown."""

import itertools
from collections.abc import Iterable, Sized
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import (
    AutoConfig,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .. import GreedyGrowPipeline, ShallowUNet2DModel
from ..flow import detail_variance
from ..models.core_loading import find_core, load_core
from ..models.cores import adopt_core as make_foreign_core
from ..pipelines.foreign import ForeignPipeline, describe_foreign
from .arguments import DEFAULT_JOINT_STEPS, ModelArguments, TrainingArguments
from .data.captioned import CaptionedImages
from .data.images import normalize
from .parsing import parse_channels
from .phases import Phase
from .text.small_encoder import build_small_text_encoder, train_small_tokenizer


logger = get_logger(__name__)

# A new core learns fewer images by heart.
FEW_IMAGES = 300

SMALL_TEXT_HIDDEN_SIZE = 128
# The small text encoder's tokenizer is trained on this many captions at most.
TOKENIZER_CAPTIONS = 100_000
# Detail of less variance than this, of values in [-1, 1], is less than what rounding to eight bits adds.
NO_DETAIL = 1e-6


# ----------------------------------------------------------------------------------------------------------------------
# New


def build_core(model_args: ModelArguments, cross_attention_dim: int) -> ShallowUNet2DModel:
    """Build a core with random weights, whose first predictions are zero."""
    unet = ShallowUNet2DModel(
        sample_size=model_args.resolutions[0],
        patch_size=model_args.patch_size,
        hidden_size=model_args.hidden_size,
        num_layers=model_args.num_layers,
        num_attention_heads=model_args.num_attention_heads,
        mlp_ratio=model_args.mlp_ratio,
        cross_attention_dim=cross_attention_dim,
        dropout=model_args.core_dropout,
        crop_conditioning=model_args.random_crop < 1,
    )
    unet.zero_init_output()
    return unet


def make_text_encoder(
    model_args: ModelArguments, captions: Iterable[str], checkpoint: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Return a pretrained text encoder or a small new one, and its tokenizer.

    Args:
        model_args (`ModelArguments`): What to build.
        captions (`Iterable[str]`): The captions that a new tokenizer is trained on; only the first ones are read.
        checkpoint (`Path`, *optional*): A checkpoint whose tokenizer a small text encoder continues with.

    Raises:
        `ValueError`: if the named text encoder cannot be loaded, its width is not `text_hidden_size`, or it cannot read
            `max_sequence_length` tokens.
    """
    if model_args.text_encoder == "small":
        if checkpoint is not None:
            tokenizer = AutoTokenizer.from_pretrained(checkpoint / "tokenizer")
        else:
            tokenizer = train_small_tokenizer(itertools.islice(captions, TOKENIZER_CAPTIONS))
        text_encoder = build_small_text_encoder(
            tokenizer, get_text_hidden_size(model_args), model_args.text_num_layers
        )
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(model_args.text_encoder)
            text_encoder = AutoModelForTextEncoding.from_pretrained(model_args.text_encoder, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"`text_encoder={model_args.text_encoder!r}` cannot be loaded: {error}") from error
        if model_args.text_hidden_size not in (None, text_encoder.config.hidden_size):
            raise ValueError(
                f"`text_hidden_size={model_args.text_hidden_size}` is not that of "
                f"`text_encoder={model_args.text_encoder!r}`, which is {text_encoder.config.hidden_size}: leave it out."
            )
        longest = getattr(text_encoder.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and model_args.max_sequence_length > longest:
            raise ValueError(
                f"`max_sequence_length={model_args.max_sequence_length}`: `text_encoder={model_args.text_encoder!r}` reads at "
                f"most {longest} tokens."
            )
    return text_encoder, tokenizer


def build_core_pipeline(
    model_args: ModelArguments, captions: Iterable[str], checkpoint: Path | None = None
) -> GreedyGrowPipeline:
    """Build a pipeline around a new core, with the text encoder of [`make_text_encoder`], whose arguments and errors it has."""
    text_encoder, tokenizer = make_text_encoder(model_args, captions, checkpoint)
    return GreedyGrowPipeline(
        unet=build_core(model_args, text_encoder.config.hidden_size),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        max_sequence_length=model_args.max_sequence_length,
    )


def get_text_hidden_size(model_args: ModelArguments) -> int:
    """
    Return the width of the text embeddings: as given, or from the configuration of a named text encoder.

    Raises:
        `OSError`: if that cannot be read.
    """
    if model_args.text_hidden_size is not None:
        return model_args.text_hidden_size
    if model_args.text_encoder == "small":
        return SMALL_TEXT_HIDDEN_SIZE
    try:
        return AutoConfig.from_pretrained(model_args.text_encoder).get_text_config().hidden_size
    except (OSError, ValueError) as error:
        raise OSError(
            f"`text_encoder={model_args.text_encoder!r}` cannot be read: {error} To plan without it, name its "
            "`text_hidden_size`."
        ) from error


# ----------------------------------------------------------------------------------------------------------------------
# Loaded and adopted


def load_pipeline(
    folder: str | Path, revision: str | None = None, variant: str | None = None, **config
) -> GreedyGrowPipeline:
    """Load a pipeline to continue training from, with changes to its model's `config`. All weights of its model must be there."""
    core = load_core(folder, subfolder="unet", revision=revision, variant=variant, **config)
    return GreedyGrowPipeline.from_pretrained(folder, unet=core, revision=revision, variant=variant)


def describe_core(model_args: ModelArguments) -> tuple[dict[str, Any], ForeignPipeline | None]:
    """
    Return the configuration of the model that `core` names, and its pipeline, without weights, if that is one of diffusers. For
    these, the configuration is the part of a grown model's that describes the core.

    Raises:
        `ValueError`: if the model cannot be grown.
        `OSError`: if there is no model.
    """
    assert model_args.core is not None
    foreign = describe_foreign(model_args.core, model_args.core_revision)
    if foreign is None:
        return find_core(model_args.core, subfolder="unet", revision=model_args.core_revision)[1], None
    with torch.device("meta"):
        return make_foreign_core(foreign.model, foreign.process, foreign.sample_size).growth_config, foreign


def adopt_core(model_args: ModelArguments, args: TrainingArguments) -> None:
    """
    Set the arguments that describe a core and its text encoder to those of the pipeline that `core` names, and the steps of joint
    phases, unless they are given, to 0 around a model of diffusers.

    Raises:
        `ValueError`: if other values were given, that pipeline has no text encoder, it was not trained with `random_crop`, or
            nothing is left to train.
    """
    core, revision = model_args.core, model_args.core_revision
    assert core is not None
    config, foreign = describe_core(model_args)
    if config["cross_attention_dim"] is None:
        raise ValueError(
            f"`core={core!r}` has no text encoder, but `grow.py` trains on captions: name a core that has one."
        )
    if model_args.random_crop < 1 and not config.get("crop_conditioning"):
        raise ValueError(
            f"`random_crop={model_args.random_crop}`: `core={core!r}` was not trained with random crops, so it cannot be told of them. "
            "Leave it out, or train a core with it."
        )
    try:
        text_config = AutoConfig.from_pretrained(core, subfolder="text_encoder", revision=revision).get_text_config()
    except (OSError, ValueError) as error:  # a pipeline can be saved without it
        raise ValueError(
            f"`core={core!r}` has no text encoder that can be read, but `grow.py` trains on captions: name a core that has one. "
            f"The reason was: {error}"
        ) from error
    names = ("patch_size", "hidden_size", "num_layers", "num_attention_heads", "mlp_ratio")
    own = {name: config[name] for name in names}
    own["text_hidden_size"] = config["cross_attention_dim"]
    if foreign is not None:
        own["max_sequence_length"] = foreign.max_sequence_length
    else:
        own["max_sequence_length"] = GreedyGrowPipeline.load_config(core, revision=revision)["max_sequence_length"]
    if is_foreign := config.get("core_config") is not None:
        own["core_dropout"] = 0.0  # its own, if it has any, is not changed
    if model_args.text_encoder == "small":
        own["text_num_layers"] = text_config.num_hidden_layers
    defaults = {field.name: field.default for field in fields(model_args)}
    for name, value in own.items():
        given = getattr(model_args, name)
        if given not in (defaults[name], value):
            if is_foreign and value in (None, 0.0):
                raise ValueError(
                    f"`{name}={given}` does not apply to `core={core!r}`, a model of diffusers: leave it out."
                )
            raise ValueError(f"`{name}={given}` is not that of `core={core!r}`, which is {value}: leave it out.")
        setattr(model_args, name, value)
    if model_args.text_encoder != "small":
        check_text_encoder(model_args, text_config)
    if args.joint_steps is None:
        args.joint_steps = [0 if is_foreign else DEFAULT_JOINT_STEPS] * (len(model_args.resolutions) - 1)
        if not sum(args.detail_steps + args.joint_steps):
            raise ValueError(
                f"There is nothing to train around `core={core!r}`: name its resolution and a larger one as `resolutions`, and "
                "`detail_steps` or `joint_steps`."
            )


def check_text_encoder(model_args: ModelArguments, own) -> None:
    """Raise a `ValueError` if `text_encoder` is not the core's, whose configuration is `own`."""
    given, core = f"`text_encoder={model_args.text_encoder!r}`", f"`core={model_args.core!r}`"
    try:
        config = AutoConfig.from_pretrained(model_args.text_encoder).get_text_config()
    except (OSError, ValueError):
        logger.warning(f"{given} cannot be read here, so it is not compared with that of {core}, which is used.")
        return
    for name in ("hidden_size", "vocab_size"):
        if getattr(config, name) != getattr(own, name):
            raise ValueError(
                f"{given} is not that of {core}: its {name} is {getattr(config, name)} and not {getattr(own, name)}. Leave it "
                "out, since a core keeps the text encoder that it was trained with."
            )


def get_core_resolution(model_args: ModelArguments) -> int:
    """Return the resolution of the innermost core: of the new one, or of the pipeline that `core` names."""
    if model_args.core is None:
        return model_args.resolutions[0]
    config, _ = describe_core(model_args)
    return (*config.get("inner_sample_sizes", ()), config["sample_size"])[0]


# ----------------------------------------------------------------------------------------------------------------------
# Grown


def stage_arguments(phase: Phase, model_args: ModelArguments) -> dict:
    """Return what `from_core` needs to know about the stage of `phase`."""
    return {
        "block_out_channels": parse_channels(model_args.block_out_channels[phase.stage - 1]),
        "layers_per_block": model_args.layers_per_block,
        "init": model_args.init,
    }


def grow_pipeline(
    core: GreedyGrowPipeline | str,
    phase: Phase,
    model_args: ModelArguments,
    images: CaptionedImages,
    seed: int,
    revision: str | None = None,
) -> GreedyGrowPipeline:
    """
    Grow a pipeline to the resolution of `phase`. A resumed run grows the same stage, since the weights depend on the seed alone.

    Args:
        core ([`GreedyGrowPipeline`] or `str`): The trained pipeline, or the folder or repository of one of diffusers.
        phase (`Phase`): The first phase of the new stage.
        model_args (`ModelArguments`): For the stage's channels and layers, and the resolution and variant of a pipeline of
            diffusers.
        images (`CaptionedImages`): The images whose high-frequency detail is measured, for `core_first="auto"`.
        seed (`int`): The run's seed.
        revision (`str`, *optional*): The branch, tag or commit of a repository.
    """
    set_seed(seed + phase.stage)
    inner_sizes = [model_args.resolutions[0]] if isinstance(core, str) else core.unet.sample_sizes
    variance = None
    # The pipeline holds one variance per stage, or none.
    if isinstance(core, str) or len(inner_sizes) == 1 or core.config.detail_variances is not None:
        variance = measure_detail(images, phase.resolution, phase.resolution // inner_sizes[-1])
    arguments = stage_arguments(phase, model_args)
    if isinstance(core, str):
        arguments["variant"] = model_args.variant
    return GreedyGrowPipeline.from_core(
        core, phase.resolution, detail_variance=variance, revision=revision, **arguments
    )


def measure_detail(images: CaptionedImages, resolution: int, factor: int, count: int = 512) -> float | None:
    """
    Return the mean [`detail_variance`] of the first `count` images at `resolution`, or None if they have no detail: a pipeline
    without a variance can do all but `core_first="auto"`.
    """
    images = images.at(resolution)
    variances = [
        detail_variance(normalize(images[i]["pixel_values"].unsqueeze(0)), factor)
        for i in range(min(count, len(images)))
    ]
    mean = sum(variances) / len(variances)
    return mean if mean > NO_DETAIL else None


def warn_of_few_images(images: Sized, held_out: Sized, keeps_best: bool) -> None:
    """Warn before anything trains if a new core has so few `images` that it learns them by heart, or too few are `held_out`."""
    if len(images) < FEW_IMAGES:
        logger.warning(
            f"A new core learns {len(images)} images by heart: expect samples that repeat them. Start from a model with `--core`, train a "
            "LoRA, or see what helps with few images in training_examples/README.md."
        )
    if keeps_best and len(held_out) < 10:
        logger.warning(f"`keep_best`: which weights are best is chance with {len(held_out)} held-out images.")


def warn_of_missing_detail(images: CaptionedImages, resolutions: list[int]) -> None:
    """Warn before anything trains if the first images look the same at two of the `resolutions` of a run."""
    count = min(16, len(images))
    for smaller, larger in zip(resolutions, resolutions[1:]):
        if measure_detail(images, larger, larger // smaller, count) is None:
            logger.warning(
                f"The first {count} images have no detail at {larger} px that they lack at {smaller} px: they are of one color, or were "
                "enlarged by repeating pixels. If all are like that, a stage has nothing to learn: train at a lower resolution."
            )
