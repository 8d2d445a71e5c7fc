# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Pipelines of diffusers that can be grown: what of each a grown pipeline continues to use."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_sentencepiece_available

from ..flow import RectifiedFlow
from ..hub.mixins import HubMixin, refuse_pickles
from ..models.core_loading import load_complete
from ..models.cores import CORE_CLASSES


if TYPE_CHECKING:  # importing these takes a second, which only those should wait who grow one
    from diffusers import DDIMPipeline, DDPMPipeline, IFPipeline, PRXPixelPipeline


@dataclass
class ForeignPipeline:
    """
    The parts of a pipeline of diffusers.

    Args:
        model (`ModelMixin`): Its model, the core.
        process (scheduler or [`RectifiedFlow`]): The process that the model was trained on.
        sample_size (`int`, *optional*): The model's resolution, if the model does not say.
        shift (`float`): The shift of the noise levels that suits the model at its resolution, in our process.
        text_encoder, tokenizer (*optional*): Those of the pipeline.
        max_sequence_length (`int`): The number of text tokens.
        prompt_format (`str`, *optional*): See [`FORMATS`](prompts.py).
    """

    model: ModelMixin
    process: Any
    sample_size: int | None = None
    shift: float = 1.0
    text_encoder: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    max_sequence_length: int = 128
    prompt_format: str | None = None


def read_unconditional(pipeline: "DDPMPipeline | DDIMPipeline") -> ForeignPipeline:
    return ForeignPipeline(pipeline.unet, pipeline.scheduler)


def read_if(pipeline: "IFPipeline") -> ForeignPipeline:
    return ForeignPipeline(
        model=pipeline.unet,
        process=pipeline.scheduler,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        max_sequence_length=77,  # as `IFPipeline.encode_prompt` has it, not its configuration
        prompt_format="if",
    )


def read_prx_pixel(pipeline: "PRXPixelPipeline") -> ForeignPipeline:
    from diffusers.pipelines.prx.pipeline_prx_pixel import PRX_PIXEL_DEFAULT_RESOLUTION

    scheduler, noise_scale = pipeline.scheduler, pipeline.config.noise_scale
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or scheduler.config.use_dynamic_shifting:
        raise ValueError(
            f"`core` has a {type(scheduler).__name__} for a scheduler; a PRXPixelPipeline can be grown with a "
            "FlowMatchEulerDiscreteScheduler without `use_dynamic_shifting`."
        )
    return ForeignPipeline(
        model=pipeline.transformer,
        process=RectifiedFlow(noise_scale),
        sample_size=pipeline.config.default_sample_size or PRX_PIXEL_DEFAULT_RESOLUTION,  # as that pipeline does
        # Our noise levels have noise of variance 1: its own, shifted by the scale.
        shift=scheduler.config.shift * noise_scale,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        max_sequence_length=pipeline.config.prompt_max_tokens,
        prompt_format="prx_pixel",
    )


# The pipelines of diffusers that can be grown, and how to read each. No other is loaded.
READERS: dict[str, Callable[[Any], ForeignPipeline]] = {
    "DDPMPipeline": read_unconditional,
    "DDIMPipeline": read_unconditional,
    "IFPipeline": read_if,
    "PRXPixelPipeline": read_prx_pixel,
}
GROWABLE = (
    f"Pipelines that can be grown are GreedyGrowPipeline, {', '.join(READERS)}: in pixel space (without a VAE), without conditions "
    "other than text."
)
# Components that check or mark finished images, not needed to grow
LEFT_OUT = {"IFPipeline": {"safety_checker": None, "feature_extractor": None, "watermarker": None}}
# The arguments of `from_pretrained` that say how to fetch a file, and those that say how to load it. diffusers ignores others,
# and some that it knows would run code from elsewhere.
FETCHING = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")
LOADING = (
    "dtype",
    "torch_dtype",
    "variant",
    "use_safetensors",
    "disable_mmap",
    "low_cpu_mem_usage",
    "device_map",
    "max_memory",
    "offload_folder",
    "offload_state_dict",
    "quantization_config",
)


def find_foreign(
    core: Any, kwargs: dict[str, Any], get_model_kwargs: Callable[[dict[str, Any], str], dict[str, Any]]
) -> ForeignPipeline | None:
    """
    Read a pipeline of diffusers, loaded or from a folder or Hub repository.

    Args:
        core (`Any`): The pipeline, its folder or repository.
        kwargs (`dict`): Arguments of `from_pretrained` of the pipeline, for a folder or repository.
        get_model_kwargs (`Callable`): Returns those of the model, from `kwargs` and the model's name in the pipeline.

    Returns:
        [`ForeignPipeline`], or None if `core` is something else than a pipeline of diffusers: one of ours, or no pipeline.

    Raises:
        `TypeError`: if there are `kwargs` although `core` is a loaded pipeline, or unknown ones.
        `ValueError`: if it is a pipeline that cannot be grown, or its model would be quantized.
        `OSError`: if its weights are missing, damaged or pickled.
        `ImportError`: if a package is missing that reads its tokenizer.
    """
    name = type(core).__name__
    if name in READERS and type(core) is getattr(diffusers, name):
        if kwargs:
            raise TypeError(f"{sorted(kwargs)} only apply when `core` is a path or repository, not a loaded pipeline.")
        return READERS[name](core)
    if isinstance(core, DiffusionPipeline) and not isinstance(core, HubMixin):
        raise ValueError(f"`core` is a {name}. {GROWABLE}")
    found = find_index(core, kwargs) if isinstance(core, (str, Path)) else None
    if found is None:
        return None
    index, commit, component = found
    name = index["_class_name"]
    left_out = LEFT_OUT.get(name, {})
    own = inspect.signature(getattr(diffusers, name).__init__).parameters
    if unknown := sorted(kwargs.keys() - {*FETCHING, *LOADING, *own}):
        raise TypeError(f"{unknown} are not arguments to load a {name} to grow. Are they misspelled?")
    refuse_pickles(kwargs.get("use_safetensors"))
    pinned = {} if commit is None else {"revision": commit}
    model_class = getattr(diffusers, index[component][1])
    _, subfolder = find_config(model_class, core, component, {**list_fetching(kwargs), **pinned})
    arguments = {**get_model_kwargs(kwargs, component), **pinned, "subfolder": subfolder, "use_safetensors": True}
    model = load_complete(model_class, core, commit, **arguments)
    settings = {"requires_safety_checker": False} if left_out else {}
    arguments = {**kwargs, **pinned, **left_out, **settings, component: model, "use_safetensors": True}
    try:
        pipeline = getattr(diffusers, name).from_pretrained(core, **arguments)
    except ValueError as error:
        if "tiktoken" not in str(error) or is_sentencepiece_available():
            raise
        # Without sentencepiece, transformers takes its file for one of tiktoken.
        raise ImportError(
            f"The tokenizer of `core={str(core)!r}` is read by sentencepiece: `pip install sentencepiece protobuf`."
        ) from error
    return READERS[name](pipeline)


def describe_foreign(core: str | Path, revision: str | None = None) -> ForeignPipeline | None:
    """
    Read the configuration files of a pipeline of diffusers, without its weights: its model is on the meta device, and it has
    neither text encoder nor tokenizer.

    Args:
        core (`str` or `Path`): The folder or Hub repository.
        revision (`str`, *optional*): Its branch, tag or commit.

    Returns:
        [`ForeignPipeline`], or None if `core` is something else than a pipeline of diffusers: one of ours, or no pipeline.

    Raises:
        `ValueError`: if it is a pipeline that cannot be grown.
        `OSError`: if a configuration is missing.
    """
    found = find_index(core, {"revision": revision})
    if found is None:
        return None
    index, commit, model = found
    name, parts = index["_class_name"], {}
    for component in (model, "scheduler"):
        component_class: Any = getattr(diffusers, str(index[component][1]), None)
        if not hasattr(component_class, "load_config"):
            raise ValueError(f"`core={str(core)!r}` has `{component}={index[component]}`, not a class of diffusers.")
        config, _ = find_config(component_class, core, component, {"revision": commit or revision})
        # A scheduler is read for its values, which the meta device has not.
        with torch.device("cpu" if component == "scheduler" else "meta"):
            try:
                parts[component] = component_class.from_config(config)
            except (ArithmeticError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"`core={str(core)!r}` has a `{component}` whose configuration is not one of a {component_class.__name__}: {error}"
                ) from error
    arguments = inspect.signature(getattr(diffusers, name).__init__).parameters
    config = {key: argument.default for key, argument in arguments.items()} | index
    described = SimpleNamespace(**parts, text_encoder=None, tokenizer=None, config=SimpleNamespace(**config))
    return READERS[name](described)


def list_fetching(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return those of the arguments of `from_pretrained` that say how to fetch a file."""
    return {name: kwargs[name] for name in FETCHING if name in kwargs}


def find_config(
    component_class: Any, core: str | Path, component: str, fetching: dict[str, Any]
) -> tuple[dict[str, Any], str | None]:
    """
    Return the configuration of a component of a pipeline, and its subfolder: None in old repositories of DDPM, where all components are
    beside `model_index.json`. Raise an `OSError` if it is missing or damaged.
    """
    try:
        return component_class.load_config(core, subfolder=component, **fetching), component
    except OSError:
        if Path(core, component).is_dir():
            raise
        try:
            return component_class.load_config(core, **fetching), None
        except OSError:
            pass  # of the two errors, the first one names the component
        raise


def find_index(core: str | Path, kwargs: dict[str, Any]) -> tuple[dict[str, Any], str | None, str] | None:
    """
    Return the content of `model_index.json` of a pipeline of diffusers that can be grown, its commit on the Hub, and the name of
    its model; or None if `core` is one of ours or no pipeline. Raise a `ValueError` if it is a pipeline that cannot be grown, and an
    `OSError` if that file is damaged. `kwargs` are those of [`find_foreign`].
    """
    try:
        index, commit = DiffusionPipeline.load_config(core, return_commit_hash=True, **list_fetching(kwargs))
    except OSError:
        if Path(core, "model_index.json").is_file():  # damaged
            raise
        return None
    if not isinstance(index, dict):
        raise ValueError(
            f"`core={str(core)!r}` has a `model_index.json` that is no dictionary: download or save it again."
        )
    name = str(index.get("_class_name"))
    if name not in READERS:
        if name.startswith("GreedyGrow"):
            return None
        raise ValueError(f"`core={str(core)!r}` holds a {name}. {GROWABLE}")
    components = {
        component: value
        for component, value in index.items()
        if isinstance(value, (list, tuple)) and component not in LEFT_OUT.get(name, {}) and [*value] != [None, None]
    }
    malformed = {key: value for key, value in components.items() if [type(part) for part in value] != [str, str]}
    if malformed or "scheduler" not in components:
        raise ValueError(
            f"`core={str(core)!r}` has a `model_index.json` that must name a library and a class for each component, with a "
            f"`scheduler` among them, but is {index}: download or save it again."
        )
    others = {key: value[0] for key, value in components.items() if value[0] not in ("diffusers", "transformers")}
    if others:
        raise ValueError(
            f"`core={str(core)!r}` has components of other packages than diffusers and transformers: {others}."
        )
    models = [component for component, value in components.items() if value[1] in CORE_CLASSES]
    if len(models) != 1:
        raise ValueError(
            f"`core={str(core)!r}` must have one model of {', '.join(CORE_CLASSES)}, but has {sorted(components.items())}."
        )
    return index, commit, models[0]
