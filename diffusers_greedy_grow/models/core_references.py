# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Grown models that are saved without the weights of their core; see [`hub.references`](../hub/references.py)."""

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict

from ..hub.references import REFERENCE, find_core_source, load_reference, make_reference
from ..hub.weights import find_change, find_quantization


class CoreReferenceMixin(ModelMixin):
    """Makes a model with a `core` savable without it, and loadable again."""

    core: Any
    core_folder: str | None = None  # where the core was loaded from, if that is a folder; the lineage has repositories

    def refer_to_core(self, is_published: bool = False) -> "CoreReferenceMixin":
        """
        Return a view of the model without its core, and with a reference in its configuration. Its `save_pretrained` saves
        the stages; it shares their weights, and cannot run.

        Args:
            is_published (`bool`): Whether others are to load it, so that the core must be on the Hub.

        Raises:
            `ValueError`: if the core has changed since it was loaded, if it is unknown where it came from, or if its weights are
                quantized, in eight bits or on the disk.
            `OSError`: if the core's folder or repository cannot be read.
        """
        if (cause := find_quantization(self) or find_change(self.core)) is not None:
            raise ValueError(
                f'`core="reference"` compares the core with the files that it came from, and cannot: {cause}. Load the model without '
                "that, and save it. What you save can be loaded with that again."
            )
        source, revision = find_core_source(self)
        is_folder = self.core_folder is not None
        if is_folder and is_published:
            raise ValueError(
                f'`core="reference"`: the core came from the folder `{source}`, which others do not have. Push the core to the Hub '
                'and grow the model from there, or publish it with `core="copy"`.'
            )
        repair = self.core._fix_state_dict_keys_on_load
        reference = make_reference(self.core, source, revision, is_folder, repair)
        view = copy.copy(self)
        view._modules = {name: module for name, module in self._modules.items() if name != "core"}
        view.register_to_config(**{REFERENCE: reference})
        return view

    @classmethod
    def _load_pretrained_model(
        cls,
        model: Any,
        state_dict: dict[str, torch.Tensor] | None,
        resolved_model_file: list[Any],
        pretrained_model_name_or_path: Any,
        loaded_keys: list[str],
        **kwargs: Any,
    ) -> tuple:
        """Load as diffusers does, after adding the core's weights to those of the stages."""
        reference = model.config.get(REFERENCE)
        if reference is not None:
            names = list(model.core.state_dict())
            core = load_reference(reference, names, model.core._fix_state_dict_keys_on_load)
            core = {f"core.{name}": tensor for name, tensor in core.items()}
            if state_dict is None:  # in shards; diffusers also takes tensors where it expects files
                resolved_model_file = [*resolved_model_file, core]
            else:
                state_dict = {**state_dict, **core}
            loaded_keys = [*loaded_keys, *core]
            # In this model the core is present: saved again, it is a copy.
            model._internal_dict = FrozenDict({k: v for k, v in model.config.items() if k != REFERENCE})
            if reference["revision"] is None:
                model.core_folder = str(Path(reference["core"]))
        return super()._load_pretrained_model(
            model, state_dict, resolved_model_file, pretrained_model_name_or_path, loaded_keys, **kwargs
        )
