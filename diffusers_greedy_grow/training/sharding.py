# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""What training needs to know of FSDP2, by which every process keeps only a part of each parameter."""

import functools

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import DiffusionPipeline
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from .arguments import TrainingArguments
from .trained_model import TrainedModel


# Classes whose parameters are gathered at once. The inner model and each stage are among them, so that no unit mixes what
# a detail phase freezes with what it trains.
UNITS = ("ShallowUNet2DModel", "GrowthStage", "GreedyGrowTransformerBlock", "ResnetBlock2D")


def list_units(model: torch.nn.Module) -> list[list[torch.nn.Parameter]]:
    """The parameters of `model`, grouped by what is gathered at once: the innermost of [`UNITS`] around each, or the model."""
    units: list[list[torch.nn.Parameter]] = [[]]

    def visit(module: torch.nn.Module, unit: list[torch.nn.Parameter]) -> None:
        if type(module).__name__ in UNITS:
            units.append(unit := [])
        unit += module.parameters(recurse=False)
        for child in module.children():
            visit(child, unit)

    visit(model, units[0])
    return [unit for unit in units if unit]


def set_up_sharding(accelerator: Accelerator, args: TrainingArguments) -> None:
    """
    Under FSDP, the model's own gradient checkpointing takes the place of accelerate's, and accumulated gradients stay
    sharded.

    Raises:
        `ValueError`: under FSDP's first version, and under DeepSpeed.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "DeepSpeed takes the step, and converts what is frozen, by itself, which neither the moving average nor the guard "
            "against spikes can follow. FSDP2 saves as much memory as its ZeRO-3: use "
            "`--config_file training_examples/accelerate/fsdp2.yaml`."
        )
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError("`fsdp_version: 1` of accelerate's configuration is not supported: use `fsdp_version: 2`.")
    args.gradient_checkpointing |= plugin.activation_checkpointing
    plugin.activation_checkpointing = False
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True


def shard(accelerator: Accelerator, model: TrainedModel, pipeline: DiffusionPipeline) -> None:
    """
    Under FSDP, tells accelerate how to shard `model`, which holds modules of `pipeline`, when it prepares it; the pipeline
    gets modules without weights in their place, to be filled by [`consolidate`].
    """
    if not accelerator.is_fsdp2:
        return
    plugin = accelerator.state.fsdp_plugin
    classes = {type(module) for module in model.modules() if type(module).__name__ in UNITS}
    plugin.transformer_cls_names_to_wrap = [unit.__name__ for unit in classes]
    plugin.auto_wrap_policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=classes)
    if accelerator.mixed_precision != "no":
        # By accelerate's own policy the noisy images, the noise levels and the sum of all gradients would lose precision
        # as well; here only the weights do, while layers compute. Autocast does the rest.
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[accelerator.mixed_precision]
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    with torch.device("meta"):
        pipeline.unet = type(model.unet).from_config(model.unet.config)
        if model.text_encoder is not None:
            pipeline.text_encoder = type(model.text_encoder)(model.text_encoder.config)


def consolidate(accelerator: Accelerator, model: TrainedModel, pipeline: DiffusionPipeline) -> None:
    """
    Under FSDP, gathers the weights of `model` into the modules that [`shard`] has left in `pipeline`, on the CPU of the main
    process; on the others they stay without weights. Called on all processes.
    """
    if not accelerator.is_fsdp2:
        return
    state = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return
    for name, _ in model.named_children():
        prefix = f"{name}."
        values = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        getattr(pipeline, name).load_state_dict(values, assign=True)
    if model.text_encoder is not None:
        pipeline.text_encoder.tie_weights()  # gathered one by one


def reshard(model: TrainedModel) -> None:
    """
    Drops the whole weights that FSDP has gathered and kept after a forward pass without a backward pass. Without this, the
    next forward pass would use them even if parameters have been changed since, by anything but the optimizer.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be sharded. Called on all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def scatter_as(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of `tensor`, which all processes have, on the device of `like` and sharded as it is."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
