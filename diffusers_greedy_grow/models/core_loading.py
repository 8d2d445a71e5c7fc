# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Finding, checking and loading the model that is to be grown."""

from pathlib import Path
from typing import Any

import diffusers
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub.errors import HTTPError

from ..hub.weights import find_change, hint_at_variant
from .cores import CORE_CLASSES
from .shallow_unet_2d import ShallowUNet2DModel


# Our classes, which are registered in diffusers. The second one grows what is loaded here, so this module cannot import it.
GROWABLE_CLASSES = ("ShallowUNet2DModel", "GrowableUNet2DConditionModel")


def check_unmodified(core: ModelMixin) -> None:
    """Raise a `ValueError` if a core has adapters, is quantized, cast to eight bits, or offloaded to the disk."""
    if getattr(core, "peft_config", None):
        raise ValueError(
            f"`core` has the adapters {sorted(core.peft_config)}, which growing would not carry over: remove them by "
            "`core.unload_lora()`, and load them into the grown model."
        )
    if all(parameter.is_meta for parameter in core.parameters()):
        return  # a model without weights, made to plan a run
    if (cause := find_change(core)) is not None:
        raise ValueError(
            f"`core` cannot be grown: {cause}. Load the original without that, grow it, and do that when you load or run the result."
        )


def find_core(path: str | Path, subfolder: str | None = None, **kwargs) -> tuple[Any, dict, str | None, str | None]:
    """
    Look for a core or a grown model in a folder or Hub repository, alone or as the `unet` of a pipeline.

    Returns:
        Its class, its configuration, its subfolder, and its commit if it is on the Hub.

    Raises:
        `OSError`: if there is no model.
        `ValueError`: if it is another kind of model.
    """
    kwargs = {k: v for k, v in kwargs.items() if k not in ("torch_dtype", "dtype", "variant", "device_map")}
    try:
        config, commit = ShallowUNet2DModel.load_config(path, subfolder=subfolder, return_commit_hash=True, **kwargs)
    except OSError as error:
        try:
            if subfolder is not None:
                raise
            subfolder = "unet"
            config, commit = ShallowUNet2DModel.load_config(
                path, subfolder=subfolder, return_commit_hash=True, **kwargs
            )
        except OSError:
            raise OSError(
                f"`core={str(path)!r}` is not a model: no readable `config.json` in it, nor in its subfolder `{subfolder}`. "
                "Pass the folder or repository of a trained core, or of a pipeline around one; for a repository, a `revision` "
                f"that it has and a `token` that may read it. The reason was {type(error).__name__}: {error}"
            ) from error
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name in CORE_CLASSES:
        raise ValueError(
            f"`core={str(path)!r}` holds a {name}, without the process that it was trained on: load it by "
            f"`diffusers.{name}.from_pretrained`, and pass it with its `process`; or grow its pipeline by "
            "`GreedyGrowPipeline.from_core`, from the folder or repository with its `model_index.json`."
        )
    if name not in GROWABLE_CLASSES:
        raise ValueError(
            f"`core={str(path)!r}` holds a {name}; only {', '.join(GROWABLE_CLASSES)} and, of diffusers, {', '.join(CORE_CLASSES)} "
            "can be grown."
        )
    return getattr(diffusers, name), config, subfolder, commit


def load_core(path: str | Path, **kwargs) -> Any:
    """
    Load a core or a grown model, with all of its weights, from a folder or Hub repository, alone or as the `unet` of a
    pipeline. `kwargs` are passed to `from_pretrained`.

    Raises:
        `OSError`: if there is no model, a file is damaged, or weights have other shapes than the configuration says.
        `ValueError`: if it is another kind of model, or weights are missing or left over.
    """
    model_class, _, kwargs["subfolder"], commit = find_core(path, **kwargs)
    return load_complete(model_class, path, commit, **kwargs)


def load_complete(model_class: type[ModelMixin], path: str | Path, commit: str | None, **kwargs) -> Any:
    """
    Load a model of a known class, with all of its weights, by `from_pretrained`, which gets `kwargs`. The errors are those of
    [`load_core`].
    """
    try:
        model, info = model_class.from_pretrained(path, output_loading_info=True, **kwargs)
    except (ArithmeticError, OSError, RuntimeError, ValueError, HTTPError) as error:
        raise OSError(
            f"`core={str(path)!r}` cannot be loaded: {type(error).__name__}: {error} Unless that is about an argument "
            "of yours, its weights are missing, damaged or do not belong to its config.json: download or save it "
            f"again.{hint_at_variant(error)}"
        ) from error
    # diffusers only warns about weights that a checkpoint lacks, and makes them random; a core must be complete.
    problems = {name: names for name, names in info.items() if names}
    if problems:
        raise ValueError(f"`core={str(path)!r}` does not hold the weights that its config.json describes: {problems}.")
    model._commit_hash = commit
    return model
