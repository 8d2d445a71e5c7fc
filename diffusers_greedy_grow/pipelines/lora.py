# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""LoRA for the pipeline as in diffusers, and loading a core's adapters into models grown from it."""

import os
from collections.abc import Callable
from typing import Any

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils.torch_utils import unwrap_module

from ..hub.mixins import refuse_pickles, warn_of_pickles
from ..models.adapters import read_adapter


class GreedyGrowLoraLoaderMixin(LoraBaseMixin):
    """
    Loading and saving of LoRA layers of the pipeline's `unet`. An adapter trained on a core loads into every model grown from
    it. Several adapters, their weights, hotswapping, fusing and unloading work as in diffusers.
    """

    _lora_loadable_modules = ["unet"]

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        weight_name: str | None = None,
        return_lora_metadata: bool = False,
        **kwargs,
    ) -> Any:
        r"""
        Read the tensors of an adapter, and its configuration.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict[str, torch.Tensor]`):
                A file, a folder or a repository of the Hub, or the tensors themselves.
            weight_name (`str`, *optional*):
                The file's name; by default that of the only safetensors file, or `pytorch_lora_weights.safetensors`. Pickled
                files are not read.
            return_lora_metadata (`bool`, defaults to `False`):
                Whether to return the adapter's configuration as well, if the file has it, or an `adapter_config.json` of PEFT
                lies beside it.
            kwargs:
                `cache_dir`, `force_download`, `proxies`, `local_files_only`, `token`, `revision`, `subfolder`; and
                `use_safetensors`, which may not be false.

        Returns:
            `dict[str, torch.Tensor]`, or a tuple of these tensors and the configuration.

        Raises:
            `TypeError`: if there are other `kwargs`.
            `ValueError`: if `use_safetensors` is false, `weight_name` is not that of a safetensors file, or the configuration is
            not one of a LoRA.
            `OSError`: if there is no such file, or it is damaged.
        """
        refuse_pickles(kwargs.pop("use_safetensors", None))
        state_dict, metadata = read_adapter(pretrained_model_name_or_path_or_dict, kwargs, weight_name)
        if kwargs:
            raise TypeError(f"{sorted(kwargs)} are not arguments of loading LoRA weights.")
        return (state_dict, metadata) if return_lora_metadata else state_dict

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        low_cpu_mem_usage: bool = False,
        **kwargs,
    ) -> None:
        r"""
        Load an adapter of this model, or of the core that it was grown from, as `save_lora_weights`, `unet.save_lora_adapter`
        or PEFT's `save_pretrained` wrote it. PEFT keeps `lora_alpha` in an `adapter_config.json` beside its file; without that,
        it is taken to be the rank.

        Args:
            pretrained_model_name_or_path_or_dict, kwargs:
                See [`~GreedyGrowLoraLoaderMixin.lora_state_dict`].
            adapter_name (`str`, *optional*):
                The adapter's name in this pipeline; `"default_0"` and so on by default.
            hotswap (`bool`, defaults to `False`):
                Whether to replace the adapter of that name in place, so that compiled blocks stay compiled.
            low_cpu_mem_usage (`bool`, defaults to `False`):
                Whether to create the layers without initializing them with random numbers first.

        Raises:
            `ValueError`: if any tensor does not belong to a layer of the `unet` or has another shape, if some are missing, or if
            there are none. The pipeline stays as it was.
            `OSError`: if there is no such file, or it is damaged.
        """
        unet = unwrap_module(self.unet)  # from `torch.compile(pipeline.unet)`
        kwargs["return_lora_metadata"] = True
        state_dict, metadata = self.lora_state_dict(pretrained_model_name_or_path_or_dict, **kwargs)
        unet.load_lora_adapter(
            state_dict,
            prefix="unet",
            adapter_name=adapter_name,
            metadata=metadata,
            hotswap=hotswap,
            low_cpu_mem_usage=low_cpu_mem_usage,
            _pipeline=self,
        )

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        unet_lora_layers: dict[str, torch.nn.Module | torch.Tensor],
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        unet_lora_adapter_metadata: dict | None = None,
    ) -> None:
        r"""
        Save an adapter.

        Args:
            save_directory (`str` or `os.PathLike`):
                The folder to save to.
            unet_lora_layers (`dict[str, torch.nn.Module | torch.Tensor]`):
                The adapter's layers, from `peft.get_peft_model_state_dict(pipeline.unet)`.
            is_main_process (`bool`, defaults to `True`), save_function (`Callable`, *optional*), weight_name (`str`,
            *optional*), safe_serialization (`bool`, defaults to `True`):
                As everywhere in diffusers, except that safetensors are always written.
            unet_lora_adapter_metadata (`dict`, *optional*):
                The adapter's configuration; without it, `lora_alpha` is lost. Take it from
                `diffusers.training_utils._collate_lora_metadata({"unet": pipeline.unet})`.
        """
        warn_of_pickles(safe_serialization)
        cls._save_lora_weights(
            save_directory=save_directory,
            lora_layers={"unet": unet_lora_layers},
            lora_metadata={"unet": unet_lora_adapter_metadata},
            is_main_process=is_main_process,
            weight_name=weight_name,
            save_function=save_function,
            safe_serialization=True,
        )

    def fuse_lora(
        self,
        components: list[str] = ["unet"],
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
    ) -> None:
        """Add the adapters to the weights. Call `unload_lora_weights()` before saving the result."""
        super().fuse_lora(components, lora_scale, safe_fusing, adapter_names)

    def unfuse_lora(self, components: list[str] = ["unet"]) -> None:
        """Undo `fuse_lora`, up to rounding."""
        super().unfuse_lora(components)
