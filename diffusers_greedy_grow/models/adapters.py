# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""LoRA adapters of the models: reading their files, giving their tensors this model's names, and refusing what does not fit."""

import re
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.nn as nn
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import _best_guess_weight_name, _fetch_state_dict
from diffusers.utils import logging
from diffusers.utils.hub_utils import _get_model_file
from peft import LoKrConfig, LoraConfig, PeftConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.hotswap import check_hotswap_configs_compatible
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError

from ..hub.mixins import refuse_pickles, warn_of_pickles
from ..hub.weights import refuse_offloaded


logger = logging.get_logger(__name__)  # pylint: disable=invalid-name

FETCH_ARGUMENTS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
PEFT_PREFIX = "base_model.model."
# The ways to start a LoRA that take something out of the model's weights, and would take it out again on loading.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq")
# Where a file has `lora_A.weight`, the `state_dict()` of a module has `lora_A.default.weight`, with the adapter's name.
TENSOR_NAME = re.compile(
    r"(?P<layer>.+)\.(?P<part>lora_[AB]|lora_magnitude_vector|lokr_\w+)(?:\.(?P<adapter>[^.]+))??(?P<kind>\.weight|\.bias)?"
)


class AdapterMixin(PeftAdapterMixin):
    """Replaces diffusers' loading and saving of adapters: only safetensors, and only adapters that fit the model as a whole."""

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        prefix: str | None = "transformer",
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        r"""
        Load an adapter of this model, or of the core that it was grown from.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict[str, torch.Tensor]`):
                A file, a folder or a repository of the Hub, written by `save_lora_adapter`, `save_lora_weights` or PEFT's
                `save_pretrained`; or the tensors themselves. PEFT keeps `lora_alpha` in an `adapter_config.json` beside its
                file; without that, and without `metadata`, it is taken to be the rank.
            prefix (`str`, *optional*, defaults to `"transformer"`):
                What the tensors' names may begin with, besides `unet.` (for the core of a PRXPixel pipeline, `transformer.`),
                PEFT's `base_model.model.`, and the layer's own name.
            hotswap (`bool`, defaults to `False`):
                Whether to replace the adapter named `adapter_name` in place.
            kwargs:
                As in diffusers: `adapter_name`, `weight_name`, `metadata`, `low_cpu_mem_usage`, and where to find the file.

        Raises:
            `ValueError`: if there are no tensors, if one does not belong to this model or has another shape, if one is missing,
                if pickled weights are asked for, or if the adapter cannot replace the loaded one in place. The model stays as it
                was.
            `OSError`: if there is no such file, or it is damaged.
        """
        refuse_pickles(kwargs.pop("use_safetensors", None))
        given = kwargs.pop("metadata", None)
        state_dict, metadata = read_adapter(
            pretrained_model_name_or_path_or_dict, kwargs, kwargs.pop("weight_name", None)
        )
        prefixes = get_prefixes(self, prefix)
        metadata = remove_prefix(metadata or given, prefixes)
        if metadata is None and any(PEFT_PREFIX in name for name in state_dict):
            logger.warning(
                f"There is no {CONFIG_NAME} with these tensors of PEFT, so `lora_alpha` is taken to be the rank. If it was not, "
                "pass the folder that PEFT's `save_pretrained` wrote, or `metadata=config.to_dict()` to `load_lora_adapter`."
            )
        tensors, metadata = fit_adapter(self, state_dict, metadata, prefixes)
        adapter_name = kwargs.get("adapter_name")
        if hotswap and adapter_name is not None and adapter_name in getattr(self, "peft_config", {}):
            check_hotswap(self, tensors, metadata, adapter_name)
        start = f"{prefix}." if prefix else ""  # diffusers expects it, also in the names of `network_alphas`
        super().load_lora_adapter(
            {start + name: tensor for name, tensor in tensors.items()},
            prefix=prefix,
            hotswap=hotswap,
            metadata=metadata and {start + name: value for name, value in metadata.items()},
            **kwargs,
        )

    def save_lora_adapter(
        self, save_directory: str | Path, *args: Any, safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        """
        Save an adapter as diffusers does, but only as safetensors.

        Raises:
            `ValueError`: if the model's weights are offloaded to the disk.
        """
        warn_of_pickles(safe_serialization)
        refuse_offloaded(type(self).__name__, self)  # type: ignore[arg-type]
        super().save_lora_adapter(save_directory, *args, safe_serialization=True, **kwargs)


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def read_adapter(source: Any, kwargs: dict[str, Any], weight_name: str | None = None) -> tuple[dict, dict | None]:
    """
    Read the tensors of an adapter, under the names that they have in the file, and its configuration.

    Args:
        source (`str`, `os.PathLike` or `dict`):
            A file, a folder, a repository, or the tensors themselves.
        kwargs (`dict`):
            May contain [`FETCH_ARGUMENTS`], which are removed from it.
        weight_name (`str`, *optional*):
            The name of the file in the folder or repository.

    Returns:
        The tensors, and the configuration from the file's header or from PEFT's `adapter_config.json`, else `None`.

    Raises:
        `ValueError`: if the file is not one of safetensors, or the configuration is not one of a LoRA.
        `OSError`: if there is no such file, or it is damaged.
    """
    fetching = {name: kwargs.pop(name, None) for name in FETCH_ARGUMENTS}
    if isinstance(source, dict):
        return source, None
    if fetching["subfolder"] and Path(source).is_dir():  # diffusers would prefer a file of the same name above
        source, fetching["subfolder"] = Path(source, fetching["subfolder"]), None
    name = weight_name or (str(source) if Path(source).is_file() else None)
    if name is not None and not name.endswith(".safetensors"):
        raise ValueError(f"`{name}` must end in .safetensors: pickled weights are not safe to load.")
    if name is None and Path(source).is_dir() and not list(Path(source).glob("*.safetensors")):
        inside = sorted(path.parent.name for path in Path(source).glob("*/*.safetensors"))
        remedy = f"pass `subfolder={inside[0]!r}`" if inside else "weights in other formats are not safe to load"
        raise OSError(f"The folder `{source}` has no file that ends in .safetensors: {remedy}.")
    if weight_name is None:
        try:
            weight_name = _best_guess_weight_name(source, ".safetensors", fetching["local_files_only"])
        except IndexError as error:  # it leaves out names with "checkpoint", "optimizer" or "scheduler"
            raise OSError(f"No file of `{source}` has the name of an adapter: pass its `weight_name`.") from error
    try:
        state_dict, metadata = _fetch_state_dict(
            pretrained_model_name_or_path_or_dict=source,
            weight_name=weight_name,
            use_safetensors=True,
            allow_pickle=False,
            user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
            **fetching,
        )
    except SafetensorError as error:
        raise OSError(
            f"`{source}` does not hold a readable safetensors file ({error}): save or download it again."
        ) from error
    is_peft = PurePosixPath(weight_name or source).name == SAFETENSORS_WEIGHTS_NAME
    if metadata is None and (is_peft or any(PEFT_PREFIX in name for name in state_dict)):
        metadata = read_peft_config(source, weight_name, fetching)
    return state_dict, metadata


def read_peft_config(source: Any, weight_name: str | None, fetching: dict[str, Any]) -> dict[str, Any] | None:
    """Read the `adapter_config.json` beside a file of PEFT, as a `LoraConfig`'s arguments; return `None` if there is none."""
    name = CONFIG_NAME if weight_name is None else str(PurePosixPath(weight_name).with_name(CONFIG_NAME))
    try:
        path = Path(
            _get_model_file(Path(source).parent if Path(source).is_file() else source, weights_name=name, **fetching)
        )
    except OSError:
        return None
    try:
        config = PeftConfig.from_pretrained(str(path.parent))
        if not isinstance(config, (LoraConfig, LoKrConfig)):
            raise ValueError(f"it describes a {type(config).__name__}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"`{path}` is not the configuration of a LoRA adapter: {error}.") from error
    # As diffusers' own: an adapter that can train, without a repository that PEFT would look for when saving.
    config.inference_mode = False
    config.base_model_name_or_path = config.revision = config.auto_mapping = None
    return config.to_dict()


def get_prefixes(model: Any, prefix: str | None) -> tuple[str, ...]:
    """Return what an adapter's names may begin with: the name of the model, or of its core, in a pipeline."""
    core = getattr(model, "core", None)
    return tuple(f"{name}." for name in dict.fromkeys((prefix, "unet", getattr(core, "component", None))) if name)


def remove_prefix(metadata: dict[str, Any] | None, prefixes: tuple[str, ...]) -> dict[str, Any] | None:
    """Return the configuration of this model's adapter from that of a file, in which names may begin with the component's."""
    metadata = metadata or {}
    for start in prefixes:
        own = {name.removeprefix(start): value for name, value in metadata.items() if name.startswith(start)}
        if own:
            return own
    return {name: value for name, value in metadata.items() if "." not in name} or None


# ----------------------------------------------------------------------------------------------------------------------
# Fitting


def fit_adapter(
    model: nn.Module, state_dict: dict[str, torch.Tensor], metadata: dict[str, Any] | None, prefixes: tuple[str, ...]
) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """
    Give an adapter's tensors the names that they have in `model`, such as `transformer_blocks.0.attn1.to_q.lora_A.weight`. In a
    grown model, those of a core become `core.transformer_blocks.0...`, in the configuration, too.

    Returns:
        The tensors, and the configuration.

    Raises:
        `ValueError`: if any tensor does not belong to a layer of `model`, has another shape, or is missing.
    """
    layers = find_layers(model)
    core_parts = tuple(f"{part}." for part, _ in model.core.named_children()) if hasattr(model, "core") else ()
    places: dict[tuple[str, str], list[str]] = {}  # the layer, and the tensor's name there: its names in the file
    unknown, adapters, is_of_core = [], set(), False
    for name in state_dict:
        own = name
        for start in (*prefixes, PEFT_PREFIX):
            own = own.removeprefix(start)
        # As diffusers' training scripts for DeepFloyd IF write them
        own = own.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.")
        match = TENSOR_NAME.fullmatch(f"core.{own}" if own.startswith(core_parts) else own)
        if match is None or match["layer"] not in layers:
            unknown.append(name)
            continue
        part = match["part"] + ((match["kind"] or "") if match["part"] in ("lora_A", "lora_B") else "")
        places.setdefault((match["layer"], part), []).append(name)
        adapters.add(match["adapter"])
        is_of_core = is_of_core or own.startswith(core_parts)

    whole = [name for name in unknown if name.removeprefix(PEFT_PREFIX) in model.state_dict()]
    if whole:
        raise ValueError(
            f"The adapter has whole weights beside LoRA layers: {whole[:3]}. Nothing is loaded. Train it without PEFT's "
            "`modules_to_save` and `bias`."
        )
    if unknown or not places:
        example = next(layer for layer in layers if layer.endswith("to_q"))
        raise ValueError(
            (
                f"These are not LoRA layers of a {type(model).__name__}: {unknown[:3]}. "
                if unknown
                else "The adapter has no tensors. "
            )
            + "Nothing is loaded. Pass an adapter that was trained on this model, or on the core it was grown from, as "
            "`save_lora_weights`, `save_lora_adapter` or PEFT's `save_pretrained` write it: with names such as "
            f"'unet.{example}.lora_A.weight'."
        )
    several = [names for names in places.values() if len(names) > 1]
    if several or len(adapters) > 1:
        raise ValueError(
            f"There is more than one adapter: {sorted(map(str, adapters)) if len(adapters) > 1 else several[0]}. Pass the "
            "tensors of one."
        )
    if metadata is not None and is_of_core:
        metadata = move_into_core(metadata, sorted({layer for layer, _ in places}))
    initial = (metadata or {}).get("init_lora_weights")
    if isinstance(initial, str) and initial.startswith(CHANGES_THE_BASE):
        raise ValueError(
            f"The adapter has `init_lora_weights={initial!r}`, which also changes the weights of the model. Nothing is loaded. Save it "
            "by PEFT's `save_pretrained` with `path_initial_model_for_weight_conversion`, which makes a plain LoRA of it."
        )
    tensors = {place: state_dict[name] for place, (name,) in places.items()}
    check_tensors(layers, tensors, metadata)
    return {f"{layer}.{part}": tensor for (layer, part), tensor in tensors.items()}, metadata


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of a model that can have an adapter, without the adapters that they have."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            layers[name] = module
    return layers


def move_into_core(metadata: dict[str, Any], target_modules: list[str]) -> dict[str, Any]:
    """Return the configuration of a core's adapter for a grown model, where other layers' names may end as the core's do."""
    selection = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    moved = {**metadata, **selection, "target_modules": target_modules}
    for patterns in ("rank_pattern", "alpha_pattern"):
        given = metadata.get(patterns) or {}
        keys = {layer: get_pattern_key([*given], layer.removeprefix("core.")) for layer in target_modules}
        moved[patterns] = {f"^{re.escape(layer)}": given[key] for layer, key in keys.items() if key in given}
    return moved


def check_tensors(
    layers: dict[str, nn.Module], tensors: dict[tuple[str, str], torch.Tensor], metadata: dict[str, Any] | None
) -> None:
    """Raise a `ValueError` if the tensors are not those that the configuration, or without one the layers, ask for."""
    parts = {part for _, part in tensors}
    if any(part.startswith("lokr_") for part in parts):
        return  # how LoKr factorizes a layer is up to PEFT
    expected = {"lora_A.weight", "lora_B.weight"}
    for part, option in (("lora_magnitude_vector", "use_dora"), ("lora_B.bias", "lora_bias")):
        if part in parts if metadata is None else metadata.get(option):
            expected.add(part)
    problems = [f"`{layer}.{part}` is not expected" for layer, part in tensors if part not in expected]
    for name in dict.fromkeys(layer for layer, _ in tensors):
        missing = [part for part in sorted(expected) if (name, part) not in tensors]
        problems += [f"`{name}.{part}` is missing" for part in missing]
        if missing:
            continue
        rank = next(iter(tensors[name, "lora_A.weight"].shape), 0)
        if metadata is not None:
            ranks = metadata.get("rank_pattern") or {}
            rank = ranks.get(get_pattern_key([*ranks], name), metadata.get("r", LoraConfig.r))
        shapes = get_shapes(layers[name], rank)
        for part in sorted(expected):
            if (shape := tuple(tensors[name, part].shape)) != shapes[part]:
                problems.append(f"`{name}.{part}` is of shape {shape} and must be of shape {shapes[part]}")
    if problems:
        raise ValueError(
            f"The adapter does not fit: {'; '.join(problems[:3])}. Nothing is loaded. Pass a whole adapter, with the configuration "
            "that it was saved with, of a model of this size."
        )


def check_hotswap(
    model: nn.Module, tensors: dict[str, torch.Tensor], metadata: dict[str, Any] | None, adapter_name: str
) -> None:
    """
    Raise a `ValueError` if an adapter cannot replace the loaded one of this name in place. diffusers would find out later, and
    remove both.
    """
    loaded = get_peft_model_state_dict(model, adapter_name=adapter_name)
    tuned = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    problem = None
    if any("lora_magnitude_vector" in name for name in (*loaded, *tensors)):
        problem = "one of them is of DoRA"
    elif others := sorted(tensors.keys() - loaded.keys()):
        problem = f"the loaded one lacks {others[:3]}"
    elif any(adapter_name in module.merged_adapters for module in tuned):
        problem = "the loaded one is fused into the weights: call `unfuse_lora` first"
    else:
        try:
            check_hotswap_configs_compatible(model.peft_config[adapter_name], LoraConfig(**(metadata or {})))
        except ValueError as error:
            problem = str(error).rstrip(".")
    if problem is not None:
        raise ValueError(
            f"`hotswap=True` cannot replace the adapter `{adapter_name}`: {problem}. The loaded one stays. Load the other one "
            "under a name of its own, without `hotswap`."
        )


def get_shapes(layer: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that a LoRA adapter of this rank can have for a layer."""
    if isinstance(layer, nn.Conv2d):
        width = layer.out_channels
        return {
            "lora_A.weight": (rank, layer.in_channels, *layer.kernel_size),
            "lora_B.weight": (width, rank, 1, 1),
            "lora_B.bias": (width,),
            "lora_magnitude_vector": (1, width, 1, 1),
        }
    width = layer.out_features
    return {
        "lora_A.weight": (rank, layer.in_features),
        "lora_B.weight": (width, rank),
        "lora_B.bias": (width,),
        "lora_magnitude_vector": (width,),
    }
