# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The cost of each phase of training, counted on models without weights."""

import itertools
import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from ..models import GrowableUNet2DConditionModel, ShallowUNet2DModel
from .arguments import DataArguments, ModelArguments, TrainingArguments
from .core_predictions.store import count_prediction_bytes
from .growing import build_core, describe_core, get_text_hidden_size, stage_arguments
from .memory import StepMemory, follow_step
from .optimizer import count_orthogonalization, count_orthogonalization_bytes, find_matrices
from .parsing import parse_buckets
from .phases import Phase
from .setup import compute_dtype
from .sharding import list_units


@dataclass
class PhasePlan:
    """
    The cost of one phase.

    Args:
        name (`str`), resolution (`int`), steps (`int`): The phase.
        batch_size (`int`): Images per step, over all processes.
        process_batch_size (`int`): Images that one process holds at once.
        parameters (`int`), trained_parameters (`int`): The model's parameters, and those that train.
        train_flops (`int`): Operations per image, forward and backward.
        forward_flops (`int`): Operations per image, forward only.
        largest_unit (`int`): Bytes of the largest group of parameters that FSDP gathers at once.
        cast_weights (`int`): Bytes of the copies that autocast makes of the weights that train.
        moments (`int`): Numbers that the optimizer keeps: two per trained parameter, one where Muon trains it.
        optimizer_flops (`int`): Operations per step of Muon on one process. Those of AdamW are few, and not counted.
        optimizer_bytes (`int`): Bytes that Muon needs in its step, see [`count_orthogonalization_bytes`].
        keeps_gradients (`bool`): Whether gradients are there from the start of a batch, since several batches are a step.
        batch_memory (`dict[bool, StepMemory]`): What a batch of one process needs, without and with gradient checkpointing.
        num_draws (`int`): Draws per training image for which the core's predictions are cached, if they are.
        prediction_bytes (`int`): Bytes per such prediction on disk.
    """

    name: str
    resolution: int
    steps: int
    batch_size: int
    process_batch_size: int
    parameters: int
    trained_parameters: int
    train_flops: int
    forward_flops: int
    largest_unit: int
    cast_weights: int
    moments: int
    optimizer_flops: int
    optimizer_bytes: int
    keeps_gradients: bool
    batch_memory: dict[bool, StepMemory]
    num_draws: int = 0
    prediction_bytes: int = 0

    @property
    def images(self) -> int:
        return self.steps * self.batch_size

    def count_predictions(self, num_images: int) -> int:
        """Return how many predictions of the core are cached for `num_images` training images: those that the steps read."""
        return min(self.num_draws * num_images, self.images)

    @property
    def flops(self) -> int:
        """Operations of the whole phase, without what gradient checkpointing computes twice."""
        return self.images * self.train_flops + self.steps * self.optimizer_flops

    def memory(self, num_shards: int = 1, gradient_checkpointing: bool = False) -> int:
        """
        Return the bytes per process at their peak, with the model sharded over `num_shards` processes: float32 weights; the
        optimizer's moments and the moving average of what trains; the gradients and the activations; and for a sharded model two
        gathered units, of which one computes while the other arrives. Memory of kernels and of the allocator comes on top.
        """
        state, gradients = 4 * (self.parameters + self.trained_parameters + self.moments), 4 * self.trained_parameters
        batch = self.batch_memory[gradient_checkpointing]
        if num_shards > 1:
            activations = max(batch.activations - self.cast_weights, 0)  # FSDP casts the gathered units instead
            return (state + gradients) // num_shards + max(activations + 2 * self.largest_unit, self.optimizer_bytes)
        in_batch = batch.activations + gradients if self.keeps_gradients else batch.total
        # The moving average's step needs as much as the gradients, which are freed by then.
        return state + max(in_batch, gradients + self.optimizer_bytes)


def plan_phase(
    name: str,
    model: torch.nn.Module,
    resolution: int,
    steps: int,
    batch_size: int,
    batches_per_step: int,
    num_tokens: int,
    dtype: torch.dtype = torch.float32,
    optimizer: str = "adamw",
    num_draws: int = 0,
    checkpointing: tuple[bool, ...] = (False, True),
) -> PhasePlan:
    """
    Count one training step, without allocating weights or activations.

    Args:
        name (`str`), resolution (`int`), steps (`int`): The phase.
        model ([`ShallowUNet2DModel`] or [`GrowableUNet2DConditionModel`]): On the meta device, frozen as in the phase.
        batch_size (`int`): Images per step, over all processes.
        batches_per_step (`int`): Into how many batches a step's images are split.
        num_tokens (`int`): Text tokens per image.
        dtype (`torch.dtype`, defaults to float32): The dtype in which layers compute.
        optimizer (`str`, defaults to `"adamw"`): `"adamw"` or `"muon"`.
        num_draws (`int`, defaults to 0): See [`PhasePlan`].
        checkpointing (`tuple[bool, ...]`): Whether to count the memory without gradient checkpointing, with it, both or neither.
    """
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    largest_unit = max(sum(p.numel() for p in unit) for unit in list_units(model)) * dtype.itemsize
    matrices = find_matrices(model).values() if optimizer == "muon" else ()
    shapes = [matrix.shape for matrix in matrices if matrix.requires_grad]

    forward_flops, train_flops = count_layers(model, lambda: count_flops(model, resolution, num_tokens))
    if num_draws:
        _, train_flops = count_flops(model, resolution, num_tokens, cached=True)
    process_batch_size = batch_size // batches_per_step
    shape = resolution, num_tokens, process_batch_size, dtype
    return PhasePlan(
        name=name,
        resolution=resolution,
        steps=steps,
        batch_size=batch_size,
        process_batch_size=process_batch_size,
        parameters=parameters,
        trained_parameters=trained,
        train_flops=train_flops,
        forward_flops=forward_flops,
        largest_unit=largest_unit,
        cast_weights=trained * dtype.itemsize if dtype != torch.float32 else 0,
        moments=2 * trained - sum(shape.numel() for shape in shapes),
        optimizer_flops=sum(map(count_orthogonalization, shapes)),
        optimizer_bytes=count_orthogonalization_bytes(shapes),
        keeps_gradients=batches_per_step > 1,
        batch_memory={on: count_memory(model, *shape, on, cached=num_draws > 0) for on in checkpointing},
        num_draws=num_draws,
        prediction_bytes=count_prediction_bytes(model) if num_draws else 0,
    )


def count_layers(model: torch.nn.Module, count: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
    """Return what `count` returns for `model`, in less time: the layers of our core are alike, and only two of them are run."""
    core = model if isinstance(model, ShallowUNet2DModel) else model.core
    if not isinstance(core, ShallowUNet2DModel):
        return count()
    layers, counts = core.transformer_blocks, []
    for num_layers in range(1, min(len(layers), 2) + 1):
        core.transformer_blocks = layers[:num_layers]
        counts.append(count())
    core.transformer_blocks = layers
    # Each further layer adds what the second one adds.
    return tuple(one + (len(layers) - 1) * (two - one) for one, two in zip(counts[0], counts[-1]))


def count_flops(model: torch.nn.Module, resolution: int, num_tokens: int, cached: bool = False) -> tuple[int, int]:
    """
    Return the `forward_flops` and `train_flops` of a [`PhasePlan`], without running the core if its predictions are `cached`.
    """
    config = model.config
    sample = torch.empty(1, config.in_channels, resolution, resolution, device="meta")
    timestep = torch.empty(1, device="meta")
    text = None
    if config.cross_attention_dim is not None:
        text = torch.empty(1, num_tokens, config.cross_attention_dim, device="meta")
    core_output = {}
    if cached:
        size, cells = model.sample_sizes[0], model.sample_sizes[0] // config.patch_size
        shapes = (config.out_channels, size, size), (config.hidden_size, cells, cells)
        core_output = {"core_output": tuple(torch.empty(1, *shape, device="meta") for shape in shapes)}
    with FlopCounterMode(display=False) as counter:
        loss = model(sample, timestep, text, **core_output).pred_original_sample.sum()
        forward_flops = counter.get_total_flops()
        loss.backward()
    model.zero_grad()
    return forward_flops, counter.get_total_flops()


def count_memory(
    model: torch.nn.Module,
    resolution: int,
    num_tokens: int,
    batch_size: int,
    dtype: torch.dtype,
    gradient_checkpointing: bool,
    cached: bool,
) -> StepMemory:
    """Return what [`follow_step`] does, in less time, see [`count_layers`]."""

    def count() -> tuple[int, ...]:
        return astuple(follow_step(model, resolution, num_tokens, batch_size, dtype, gradient_checkpointing, cached))

    return StepMemory(*count_layers(model, count))


def describe_parts(model: torch.nn.Module) -> dict[str, int]:
    """Return the number of parameters of the core and of each growth stage."""
    if isinstance(model, ShallowUNet2DModel):
        return {f"core {model.config.sample_size}": model.num_parameters()}
    parts = {f"core {model.sample_sizes[0]}": model.core.num_parameters()}
    for resolution, stage in zip(model.sample_sizes[1:], model.stages):
        parts[f"stage {resolution}"] = sum(p.numel() for p in stage.parameters())
    return parts


# ----------------------------------------------------------------------------------------------------------------------
# All phases of a run


def plan_phases(
    phases: list[Phase],
    data_args: DataArguments,
    model_args: ModelArguments,
    args: TrainingArguments,
    accelerator: Accelerator,
) -> tuple[list[PhasePlan], str]:
    """
    Return what each phase will cost, for square images, and a table of it. Reads and allocates no weights.

    Raises:
        `ValueError`: if the resolutions do not begin with the core's, or do not fit the aspect-ratio buckets.
    """
    num_processes = args.plan_processes if args.plan and args.plan_processes else accelerator.num_processes
    batches_per_step = num_processes * args.gradient_accumulation_steps
    # Following the memory takes a second per phase. On a CPU, few ask for it before a run.
    checkpointing: tuple[bool, ...] = (False, True) if args.plan else ()
    if not args.plan and accelerator.device.type != "cpu":
        checkpointing = (args.gradient_checkpointing,)
    plans = []
    with torch.device("meta"):
        unet, growth = build_unet_without_weights(model_args)
        for phase in phases:
            if growth or phase.resolution != unet.config.sample_size:
                stage = stage_arguments(phase, model_args)
                unet = GrowableUNet2DConditionModel.from_core(unet, phase.resolution, **stage, **growth)
                growth = {}
            phase.freeze(unet)
            plans.append(
                plan_phase(
                    phase.name,
                    unet,
                    unet.config.sample_size,
                    phase.steps,
                    phase.batch_size * batches_per_step,
                    batches_per_step,
                    model_args.max_sequence_length,
                    compute_dtype(accelerator),
                    args.optimizer,
                    args.cache_core_predictions if phase.kind == "detail" else 0,
                    checkpointing,
                )
            )
    if data_args.aspect_ratio_buckets is not None:
        check_buckets(data_args.aspect_ratio_buckets, model_args.resolutions, unet)
    num_shards = num_processes if accelerator.is_fsdp2 else 1
    text = format_plan(plans, describe_parts(unet), num_shards, args.gradient_checkpointing)
    if args.plan:
        text += "\n" + format_memory(plans, num_processes if num_processes > 1 else 8)
    for plan in plans if args.plan else ():
        if plan.num_draws:
            text += "\n" + format_caching(plan)
    if unet.config.get("core_config") is not None and not any(phase.kind == "joint" for phase in phases):
        text += "\nThe core stays as it is; `joint_steps` trains it too, which needs its gradients' memory."
    return plans, text


def build_unet_without_weights(model_args: ModelArguments) -> tuple[torch.nn.Module, dict[str, Any]]:
    """
    Build the model that a run starts from, on the meta device. Also return what growing a model of diffusers needs to know about
    it, as arguments of [`~GrowableUNet2DConditionModel.from_core`].

    Raises:
        `ValueError`: if the resolutions do not begin with the core's.
    """
    if model_args.core is None:
        return build_core(model_args, get_text_hidden_size(model_args)), {}
    config, foreign = describe_core(model_args)
    if config["sample_size"] != model_args.resolutions[0]:
        raise ValueError(
            f"`resolutions={model_args.resolutions}` must begin with the resolution of `core={model_args.core!r}`, which is "
            f"{config['sample_size']}."
        )
    if foreign is not None:
        return foreign.model, {"process": foreign.process, "core_sample_size": config["sample_size"]}
    is_grown = "inner_sample_sizes" in config
    return (GrowableUNet2DConditionModel if is_grown else ShallowUNet2DModel).from_config(config), {}


def check_buckets(
    buckets: str, resolutions: list[int], unet: ShallowUNet2DModel | GrowableUNet2DConditionModel
) -> None:
    """Raise a `ValueError` if the aspect-ratio buckets hold a side that the models cannot take."""
    core = unet if isinstance(unet, ShallowUNet2DModel) else unet.core
    cell = core.side_multiple * resolutions[-1] // unet.sample_sizes[0]
    cell = math.lcm(cell, 2 * resolutions[-1] // resolutions[0])  # the core's losses are by bands of factor 2
    for side in itertools.chain(*parse_buckets(buckets)):
        if side % cell:
            raise ValueError(
                f"`aspect_ratio_buckets={buckets!r}`: {side} is not a multiple of {cell}, as the sides must be with "
                f"`resolutions={resolutions}`."
            )


# ----------------------------------------------------------------------------------------------------------------------
# As text


def format_plan(
    phases: list[PhasePlan], parts: dict[str, int], num_shards: int = 1, gradient_checkpointing: bool = False
) -> str:
    """Return the plan as a table, with the memory if it was counted, and with a warning if growing will not pay."""
    lines = ["Parameters: " + ", ".join(f"{name} px {count / 1e6:.2f} M" for name, count in parts.items())]
    lines.append(
        f"{'phase':<18}{'px':>6}{'steps':>9}{'batch':>7}{'images':>11}{'trained':>10}"
        f"{'GFLOP/image':>15}{'PFLOP':>13}" + ("memory".rjust(10) if phases[0].batch_memory else "")
    )
    for phase in phases:
        lines.append(
            f"{phase.name:<18}{phase.resolution:>6}{phase.steps:>9}{phase.batch_size:>7}{phase.images:>11}"
            f"{phase.trained_parameters / 1e6:>8.2f} M{phase.train_flops / 1e9:>15.2f}{phase.flops / 1e15:>13.3f}"
        )
        if phase.batch_memory:
            lines[-1] += f"{phase.memory(num_shards, gradient_checkpointing) / 2**30:>7.1f} GB"
    if own := sum(phase.steps * phase.optimizer_flops for phase in phases):
        lines.append(f"Muon's own operations are {own / sum(phase.flops for phase in phases):.0%} of all.")
    first, last = phases[0], phases[-1]
    if last.resolution > first.resolution:
        ratio = last.forward_flops / first.forward_flops
        lines.append(f"An image at {last.resolution} px costs {ratio:.1f} times one at {first.resolution} px.")
        if ratio < 2:
            lines.append(
                "Warning: below about 2 times, growing gains little: training at the high resolution from the start costs "
                "little more. A deeper core, or a larger step in resolution, makes the ratio larger."
            )
    return "\n".join(lines)


def format_memory(phases: list[PhasePlan], num_processes: int) -> str:
    """Return a table of the memory that each process needs for the model and its training, by strategy."""
    strategies = [("one GPU or DDP", 1), (f"FSDP2 on {num_processes} GPUs", num_processes)]
    lines = [
        "GB per GPU without the text encoder; (c): with gradient checkpointing",
        f"{'phase':<18}{'images':>9}" + "".join(f"{name:>22}{'(c)':>9}" for name, _ in strategies),
    ]
    for phase in phases:
        columns = [
            f"{phase.memory(shards) / 2**30:>22.1f}{phase.memory(shards, True) / 2**30:>9.1f}"
            for _, shards in strategies
        ]
        lines.append(f"{phase.name:<18}{phase.process_batch_size:>9}" + "".join(columns))
    return "\n".join(lines)


def format_caching(plan: PhasePlan, num_images: int | None = None) -> str:
    """Return a line on what caching the core's predictions takes and saves in a phase, with `num_images` if that is known."""
    if num_images is None:
        return (
            f"{plan.name}: the core's predictions take {plan.num_draws * plan.prediction_bytes / 1e6:.2f} GB on disk per 1000 training "
            f"images. The core runs {plan.num_draws} times per image, but not for draws that no step reads, instead of {plan.images} "
            "times in all."
        )
    calls, epochs = plan.count_predictions(num_images), plan.images / num_images
    saved = f"which saves {plan.images - calls}."
    if calls == plan.images:
        saved = f"which saves none, as the phase has {epochs:.1f} epochs: pass fewer draws, or leave out `cache_core_predictions`."
    return (
        f"{plan.name}: the core's predictions for {num_images} images take {calls * plan.prediction_bytes / 1e9:.2f} GB on disk. "
        f"The core runs {calls} times, instead of {plan.images} times in all, {saved}"
    )
