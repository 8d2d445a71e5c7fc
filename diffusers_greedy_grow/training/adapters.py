# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""LoRA adapters on a frozen model: which layers get one, and how they are saved."""

from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

from ..pipelines import GreedyGrowPipeline
from .arguments import LoraArguments


ADAPTER_FILE = "pytorch_lora_weights.safetensors"

# The layers of all attention, of which the core's is in all models that grow from it: in our models and most UNets of diffusers, and
# under names of their own in DeepFloyd IF and PRX
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj", "img_qkv_proj", "txt_kv_proj")


def add_adapter(unet: torch.nn.Module, args: LoraArguments) -> None:
    """
    Freeze the model and add an adapter in float32, which is all that trains.

    Args:
        unet ([`ShallowUNet2DModel`] or [`GrowableUNet2DConditionModel`]): The model.
        args (`LoraArguments`): For `rank`, `lora_alpha` and `lora_layers`.

    Raises:
        `ValueError`: if the model has no layer of a name in `lora_layers`.
    """
    names = [f".{name}" for name, _ in unet.named_modules()]
    if args.lora_layers is not None:
        layers = args.lora_layers
        missing = [layer for layer in layers if not any(name.endswith(f".{layer}") for name in names)]
        if missing:
            raise ValueError(f"`lora_layers={layers}`: no name of a layer of the model ends in {missing}.")
    else:
        layers = [layer for layer in ATTENTION if any(name.endswith(f".{layer}") for name in names)]
        if len(unet.sample_sizes) > 1:
            layers += ["conv1", "conv2", "text_proj"]
    unet.requires_grad_(False)
    alpha = args.rank if args.lora_alpha is None else args.lora_alpha
    config = LoraConfig(r=args.rank, lora_alpha=alpha, target_modules=layers)  # type: ignore[arg-type]  # floats work too
    unet.add_adapter(config)
    cast_training_params(unet, dtype=torch.float32)


def save_adapter(unet: torch.nn.Module, folder: Path) -> None:
    """Save the adapter under a temporary name, and rename it."""
    temporary = f"{ADAPTER_FILE}.tmp.safetensors"
    GreedyGrowPipeline.save_lora_weights(
        folder, get_peft_model_state_dict(unet), weight_name=temporary, **_collate_lora_metadata({"unet": unet})
    )
    (folder / temporary).replace(folder / ADAPTER_FILE)


def keep_the_base_out_of_checkpoints(accelerator: Accelerator, unet: torch.nn.Module) -> None:
    """Make accelerate save and load the adapter instead of the whole model."""

    def save(models: list, weights: list, folder: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            save_adapter(unet, Path(folder))

    def load(models: list, folder: str) -> None:
        models.clear()
        layers = GreedyGrowPipeline.lora_state_dict(folder, weight_name=ADAPTER_FILE)
        set_peft_model_state_dict(unet, {name.removeprefix("unet."): value for name, value in layers.items()})

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
