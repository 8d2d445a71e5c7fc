# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The base class of models and pipelines for safe loading, saving and publishing."""

import contextlib
import copy
import inspect
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn as nn
from diffusers import ModelMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import unwrap_module
from PIL import Image
from safetensors import SafetensorError, safe_open

from .publish import Push
from .references import FETCH_ARGUMENTS, FETCHING, REFERENCE, lies_in
from .weights import refuse_cast, refuse_offloaded


logger = logging.get_logger(__name__)  # pylint: disable=invalid-name

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # by their names in safetensors
PUSH_ARGUMENTS = {"repo_id", "commit_message", "private", "token", "create_pr", "revision"}


class HubMixin:
    """
    Replaces diffusers' loading, saving and publishing in models and pipelines.

    - `from_pretrained` reads no pickles, and refuses unknown entries of a configuration and unknown arguments.
    - `save_pretrained` writes only folders that load again.
    - `push_to_hub` writes a model card, can commit to a branch, and keeps all files if the upload fails.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any):
        """
        Load as diffusers does, but only from safetensors. `dtype="auto"` keeps the dtype that weights are stored in: of all
        components of a pipeline, and of a model in a local folder.

        Raises:
            `ValueError`: if `use_safetensors` is false, or the configuration has entries that the class does not know.
            `OSError`: if there are no safetensors.
        """
        refuse_pickles(kwargs.get("use_safetensors"))
        folder = Path(pretrained_model_name_or_path)
        # Without this, diffusers falls back to pickled weights.
        if not folder.is_dir() or any(folder.rglob("*.bin")):
            kwargs["use_safetensors"] = True
        if kwargs.get("dtype") == "auto" and not issubclass(cls, ModelMixin):
            kwargs["dtype"] = {"default": "auto"}  # diffusers would replace "auto" itself by float32
        for name in ("dtype", "torch_dtype"):
            if kwargs.get(name) == "auto" and (stored := find_dtype(folder / (kwargs.get("subfolder") or ""))):
                kwargs[name] = stored
        # A model that refers to its core fetches it as it is fetched itself, also if it is part of a pipeline.
        fetching = {name: kwargs[name] for name in FETCH_ARGUMENTS if kwargs.get(name) is not None}
        if found := re.match(r"(.+)[/\\]models--[^/\\]+[/\\]snapshots[/\\]", str(folder)):
            fetching.setdefault("cache_dir", found[1])  # the cache that diffusers has loaded the pipeline into
        outer = FETCHING.set({**(FETCHING.get() or {}), **fetching})
        try:
            # As text: diffusers takes a path of a folder that does not exist for a repository's name.
            return super().from_pretrained(str(pretrained_model_name_or_path), **kwargs)  # type: ignore[misc]
        finally:
            FETCHING.reset(outer)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """
        Check a configuration. diffusers calls this method before it builds anything.

        Raises:
            `TypeError`: if a model's `from_pretrained` got arguments that it does not know, which diffusers ignores.
            `ValueError`: if the configuration is that of another model, has entries that the class does not know, or a malformed
                lineage.
        """
        saved = config_dict.get("_class_name")
        # diffusers would keep what both classes know, and give the rest random weights. A subclass of the user's may differ.
        is_other = hasattr(diffusers, str(saved)) and saved not in [base.__name__ for base in cls.__mro__]
        if issubclass(cls, ModelMixin) and is_other:
            raise ValueError(f"The configuration is that of a {saved}, not of a {cls.__name__}: load it by `{saved}`.")
        init_dict, unused, hidden = super().extract_init_dict(config_dict, **kwargs)  # type: ignore[misc]
        if issubclass(cls, ModelMixin) and (unknown := sorted(unused.keys() & kwargs.keys())):
            raise TypeError(f"{unknown} are not arguments of `{cls.__name__}.from_pretrained`. Are they misspelled?")
        if unknown := sorted(name for name in unused if name in config_dict and name not in kwargs):
            raise ValueError(
                f"The configuration has {unknown}, which a {cls.__name__} does not know. It was made by a newer version of "
                "diffusers-greedy-grow, which `pip install -U diffusers-greedy-grow` gets, or for another class."
            )
        lineage = config_dict.get("_lineage", [])
        if not isinstance(lineage, (list, tuple)) or not all(isinstance(entry, dict) for entry in lineage):
            raise ValueError(f"The configuration's `_lineage` must be a list of dictionaries, but is {lineage!r}.")
        return init_dict, unused, hidden

    def save_pretrained(
        self,
        save_directory: str | Path,
        *args: Any,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        core: str = "copy",
        **kwargs: Any,
    ) -> None:
        """
        Save as diffusers does, with four differences: weights are always safetensors, attached or fused adapters are refused,
        weights that are not in memory or rounded by layerwise casting are refused, and the index of older shards is removed.

        Args:
            core (`str`, defaults to `"copy"`):
                `"copy"` saves a grown model as a whole. `"reference"` saves its growth stages, and where its core is: the folder, or
                the repository and the commit, that it was loaded from. Loading fetches the core from there, and checks that it is
                the same.

        Raises:
            `ValueError`: if adapters are attached or fused. Their weights would have names that do not load. If weights are
                offloaded to the disk, or rounded to a narrower dtype by `enable_layerwise_casting`. With `core="reference"`, if
                there is no core, if it has changed since it was loaded, if it is quantized, or if it is unknown where it came
                from.
            `OSError`: with `core="reference"`, if the core's folder or repository cannot be read.
        """
        # The signature must name `variant` and the others: a pipeline passes to the `save_pretrained` of a component only the
        # arguments in its signature.
        given = inspect.signature(super().save_pretrained).bind_partial(save_directory, *args)  # type: ignore[misc]
        safe_serialization = given.arguments.pop("safe_serialization", safe_serialization)
        push = {name: kwargs.pop(name) for name in PUSH_ARGUMENTS & kwargs.keys()}
        warn_of_pickles(safe_serialization)
        model: Any = getattr(self, "unet", self)
        if getattr(model, "peft_config", None):
            raise ValueError(
                f"The adapters {sorted(model.peft_config)} are attached, and the saved weights would not load again. Save the "
                "adapters by `save_lora_weights`, then remove them by `unload_lora_weights()` (for a pipeline), or by "
                "`save_lora_adapter` and `unload_lora()` (for a model). Fused adapters stay part of the weights."
            )
        self.check_weights()
        saved = self if core == "copy" else self.refer(core, push_to_hub, Path(save_directory))
        arguments = {"safe_serialization": True, "variant": variant, "max_shard_size": max_shard_size, **kwargs}
        arguments = {name: value for name, value in arguments.items() if value is not None} | given.arguments
        super(HubMixin, saved).save_pretrained(**arguments)  # type: ignore[misc]
        for index in Path(save_directory).glob("*.safetensors.index*.json"):
            name = index.name.removesuffix(".json").replace(".safetensors.index", "") + ".safetensors"
            weights = index.with_name(name)
            if weights.exists() and weights.stat().st_mtime_ns > index.stat().st_mtime_ns:
                index.unlink()  # loading would prefer it to the newer single file
        if push_to_hub:
            repo_id = push.pop("repo_id", None) or Path(save_directory).resolve().name
            self.push_to_hub(repo_id, variant=variant, max_shard_size=max_shard_size, core=core, **push)

    def check_weights(self) -> None:
        """Raise a `ValueError` if weights to save are not in memory, or not as precise as they were."""
        parts = getattr(self, "components", {type(self).__name__: self})  # a pipeline's, or the model
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                refuse_offloaded(name, part)
                refuse_cast(name, part)

    def refer(self, core: str, is_published: bool, folder: Path | None = None) -> Any:
        """Return a view of the model, or of the pipeline, in which the core is a reference, to save it to a folder."""
        model = unwrap_module(getattr(self, "unet", self))  # from `torch.compile(unet)`
        if core != "reference" or not hasattr(model, "refer_to_core"):
            other = 'or "reference"' if hasattr(model, "refer_to_core") else f"for a {type(model).__name__}"
            raise ValueError(f'`core={core!r}` must be "copy" {other}.')
        view = model.refer_to_core(is_published)
        is_pipeline = model is not unwrap_module(self)
        if folder is not None and lies_in(view.config[REFERENCE], folder, is_pipeline):
            raise ValueError(
                f"`save_directory={str(folder)!r}` holds the core, or its pipeline, which would be replaced: save to another folder."
            )
        if not is_pipeline:
            return view
        pipeline: Any = copy.copy(self)
        pipeline.unet = view
        return pipeline

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        samples: str | Path | None = None,
        max_shard_size: int | str | None = None,
        core: str = "copy",
        **card: Any,
    ) -> str:
        r"""
        Save, write the model card, and upload all files as one commit.

        Args:
            repo_id (`str`):
                The repository, such as `"user/model-256"`. It is created if it does not exist.
            commit_message (`str`, *optional*):
                The title of the commit, `"Upload"` and the class name by default.
            private (`bool`, *optional*):
                Whether a repository that is created is private.
            token (`str`, *optional*):
                The token to use instead of the one that `hf auth login` has stored.
            create_pr (`bool`, defaults to `False`):
                Whether to open a pull request instead of committing.
            safe_serialization (`bool`, defaults to `True`):
                Has no effect: weights are always safetensors.
            variant (`str`, *optional*):
                A part of the weight files' names, such as `"fp16"`.
            subfolder (`str`, *optional*):
                The folder of the repository to upload to. With it, the repository's card is left alone.
            revision (`str`, *optional*):
                The branch to commit to. It is created if it does not exist.
            samples (`str` or `Path`, *optional*):
                An image to upload and to show in the card.
            max_shard_size (`int` or `str`, *optional*):
                As for `save_pretrained`.
            core (`str`, defaults to `"copy"`):
                As for `save_pretrained`. With `"reference"`, the core must be on the Hub.
            card:
                `license`, `datasets` and `eval_results` as for [`make_card`]; `gallery`, a list of prompts and their images,
                `[("a red heart", image), ...]`, which the Hub shows first; `curves`, the file of a plot of the losses.

        Returns:
            `str`: The address of the commit, or of the pull request.

        Raises:
            `TypeError`, `ValueError`: if an argument does not fit, before anything else.
            `HfHubHTTPError`: if the token is missing or wrong, or may not write to the repository, before anything is saved.
            [`UploadError`]: if saving or the upload fails. After a failed upload the message names the folder that holds all
                files.
        """
        warn_of_pickles(safe_serialization)
        if unknown := sorted(card.keys() - {"license", "datasets", "eval_results", "gallery", "curves"}):
            raise TypeError(f"{unknown} are not arguments of `push_to_hub`.")
        for name, path in (("samples", samples), ("curves", card.get("curves"))):
            if path is not None and not Path(path).is_file():
                raise ValueError(f"`{name}={str(path)!r}` is not a file.")
        for entry in card.get("gallery", ()):
            is_pair = isinstance(entry, tuple) and len(entry) == 2
            if not (is_pair and isinstance(entry[0], str) and isinstance(entry[1], Image.Image)):
                raise ValueError(f'`gallery` must hold pairs such as `("a red heart", image)`, but has {entry!r}.')
        self.check_weights()
        saved = self if core == "copy" else self.refer(core, is_published=True)
        push = Push(repo_id, commit_message, private, token, create_pr, revision)
        push.prepare()
        saving = {"variant": variant, "max_shard_size": max_shard_size}
        return push.publish(self, saving, subfolder, samples, {**card, "core": core}, saved)

    @staticmethod
    def plan_push(push_to_hub: bool, core_is_loaded: bool, **arguments: Any) -> Push | None:
        """
        Check the arguments of `from_core` that are about publishing, before anything else.

        Args:
            push_to_hub (`bool`):
                Whether to publish.
            core_is_loaded (`bool`):
                Whether `core` is an object. If it is a path or repository, `token` and `revision` are also used to load it.
            arguments:
                `repo_id`, `commit_message`, `private`, `token`, `create_pr` and `revision` of `from_core`.

        Returns:
            [`Push`], to prepare before growing and to publish afterwards; `None` without `push_to_hub`.

        Raises:
            `TypeError`: if an argument has no effect.
            `ValueError`: if there is no `repo_id`.
        """
        if not push_to_hub:
            loads_core = set() if core_is_loaded else {"token", "revision"}
            unused = sorted(name for name, value in arguments.items() if value and name not in loads_core)
            if unused:
                where = "" if set(unused) - {"token", "revision"} else "`core` is a path or repository, or with "
                raise TypeError(f"{unused} only apply when {where}`push_to_hub=True`.")
            return None
        if arguments["repo_id"] is None:
            raise ValueError('`push_to_hub=True` needs a `repo_id`, such as "user/model-256".')
        if not core_is_loaded:
            arguments["revision"] = None
        return Push(**arguments)


def find_dtype(folder: Path) -> torch.dtype | None:
    """Return the dtype of most of the numbers in a folder's safetensors, or None if there are no floats."""
    counts: Counter[str] = Counter()
    for path in folder.glob("*.safetensors"):
        # Loading says what is wrong with a damaged file.
        with contextlib.suppress(SafetensorError), safe_open(path, framework="pt") as file:
            for name in file.keys():
                weights = file.get_slice(name)
                counts[weights.get_dtype()] += math.prod(weights.get_shape())
    found = [DTYPES[name] for name, _ in counts.most_common() if name in DTYPES]
    return found[0] if found else None


def refuse_pickles(use_safetensors: bool | None) -> None:
    """Raise a `ValueError` if pickled weights are asked for."""
    if use_safetensors is False:
        raise ValueError(
            "`use_safetensors=False` asks for pickled weights, which are not safe to load: leave it at its default."
        )


def warn_of_pickles(safe_serialization: bool) -> None:
    """Warn that safetensors are written, if pickled weights are asked for."""
    if not safe_serialization:
        logger.warning(
            "`safe_serialization=False` asks for pickled weights, which are not safe to load: safetensors are written instead."
        )
