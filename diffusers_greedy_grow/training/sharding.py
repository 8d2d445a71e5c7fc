# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""FSDP2, under which every process keeps only a part of each parameter."""

import functools

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from diffusers import DiffusionPipeline
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from ..models.cores import CORE_CLASSES
from .arguments import TrainingArguments
from .trained_model import TrainedModel


# The classes whose parameters FSDP gathers at once. The inner model and each stage are among them, so that no unit mixes frozen
# parameters with parameters that train.
UNITS = (
    "ShallowUNet2DModel",
    *(core_class.__name__ for core_class in CORE_CLASSES.values()),
    "GrowthStage",
    "GreedyGrowTransformerBlock",
    "PRXBlock",
    "ResnetBlock2D",
)


def list_units(model: torch.nn.Module) -> list[list[torch.nn.Parameter]]:
    """Group the parameters of `model` by what FSDP gathers at once: the innermost module of the classes `UNITS`, or the model."""
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
    Under FSDP, use the model's own gradient checkpointing instead of accelerate's, and keep accumulated gradients sharded.

    Raises:
        `ValueError`: under FSDP's first version, under DeepSpeed, and if the whole model is to be compiled.
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
    dynamo = accelerator.state.dynamo_plugin
    if dynamo.backend != DynamoBackend.NO and not dynamo.use_regional_compilation:
        raise ValueError(
            "FSDP2 gathers the model block by block, so that it cannot be compiled as a whole: use `--compile blocks`, or "
            "`accelerate launch --dynamo_use_regional_compilation`."
        )
    args.gradient_checkpointing |= plugin.activation_checkpointing
    plugin.activation_checkpointing = False
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True


def refuse_sharding(accelerator: Accelerator) -> None:
    """Raise a `ValueError` under strategies that split a model over processes, for an adapter."""
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"An adapter cannot train with `{accelerator.distributed_type.value}`, and is small enough not to need it: use "
            "`accelerate launch --config_file training_examples/accelerate/ddp.yaml`."
        )


def shard(accelerator: Accelerator, model: TrainedModel, pipeline: DiffusionPipeline) -> None:
    """
    Under FSDP, tell accelerate how to shard `model`, which holds modules of `pipeline`. The pipeline gets modules without weights
    instead, to be filled by [`consolidate`]. Called before accelerate prepares the model.
    """
    if not accelerator.is_fsdp2:
        return
    plugin = accelerator.state.fsdp_plugin
    classes = {type(module) for module in model.modules() if type(module).__name__ in UNITS}
    plugin.transformer_cls_names_to_wrap = [unit.__name__ for unit in classes]
    plugin.auto_wrap_policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=classes)
    if accelerator.mixed_precision != "no":
        # Accelerate's own policy would also lower the precision of noisy images, noise levels and summed gradients. This one
        # lowers only the weights' precision while layers compute; autocast does the rest.
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
    Under FSDP, gather the weights of `model` into the modules that [`shard`] has left in `pipeline`, on the CPU of the main
    process. On the other processes these stay without weights. Called on all processes.
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
        pipeline.text_encoder.tie_weights()  # they were gathered one by one


def reshard(model: TrainedModel) -> None:
    """
    Drop the whole weights that FSDP keeps after a forward pass without a backward pass. Otherwise the next forward pass would
    use them even if something other than the optimizer has changed the parameters since.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole of a tensor that may be sharded. Called on all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def scatter_as(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return this process's part of `tensor`, sharded like `like` and on its device. All processes must hold `tensor`."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
