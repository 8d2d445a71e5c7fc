# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
Grows a text-to-image model in pixel space, from captioned images to a pipeline:

    accelerate launch training_examples/grow.py                                       # captioned shapes, 16 -> 64 px
    accelerate launch training_examples/grow.py --train_data_dir my_images --resolutions 32 128

A run goes through phases (Vasconcelos et al., 2024, section 4): `core` trains a Shallow-UViT at the first resolution;
then, for each further resolution, a stage is grown around it, trained alone (`detail`), and trained together with what
is inside it (`joint`). After each phase `output_dir` holds one more complete pipeline.
"""

import hashlib
import itertools
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import psutil
import torch
import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object, set_seed
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import EvalResult, HfApi
from huggingface_hub.utils import disable_progress_bars
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForTextEncoding, AutoTokenizer

from diffusers_greedy_grow import GreedyGrowPipeline, GrowableUNet2DConditionModel, ShallowUNet2DModel
from diffusers_greedy_grow.flow import descend, detail_variance, shift_sigma
from diffusers_greedy_grow.hub.cards import write_card
from diffusers_greedy_grow.hub.lineage import add_to_lineage
from diffusers_greedy_grow.hub.upload import UploadError, check_license, prepare_repository, upload
from diffusers_greedy_grow.models.growable_unet_2d_condition import find_core, load_core
from diffusers_greedy_grow.training.arguments import (
    FREE_TO_CHANGE,
    OF_ONE_LAUNCH,
    DataArguments,
    ModelArguments,
    TrainingArguments,
)
from diffusers_greedy_grow.training.checkpoints import check_changes, load_checkpoint, read_progress, save_checkpoint
from diffusers_greedy_grow.training.curves import draw_losses
from diffusers_greedy_grow.training.data.images import CaptionedImages, normalize
from diffusers_greedy_grow.training.data.order import BucketOrder, EpochOrder
from diffusers_greedy_grow.training.data.rows import BrokenRows
from diffusers_greedy_grow.training.data.sources import check_data_dir, load_captioned_data
from diffusers_greedy_grow.training.data.streaming import StreamedImages, StreamLoader, load_captioned_stream
from diffusers_greedy_grow.training.ema import averaged
from diffusers_greedy_grow.training.files import remove_folder, save_pipeline
from diffusers_greedy_grow.training.guard import GradientGuard
from diffusers_greedy_grow.training.loop import make_optimizer, save_interrupted, take_step
from diffusers_greedy_grow.training.objective import FlowLoss, LossMeter, draw_noise, flow_loss
from diffusers_greedy_grow.training.parsing import parse_arguments, parse_buckets, parse_channels
from diffusers_greedy_grow.training.plan import PhasePlan, describe_parts, format_memory, format_plan, plan_phase
from diffusers_greedy_grow.training.run_folder import check_replaced, claim_output_dir, find_start
from diffusers_greedy_grow.training.samples import draw_samples
from diffusers_greedy_grow.training.seeds import sample_generators
from diffusers_greedy_grow.training.setup import (
    check_cpu,
    compute_dtype,
    set_attention_backend,
    set_up,
    start_trackers,
)
from diffusers_greedy_grow.training.shapes.scenes import write_shapes
from diffusers_greedy_grow.training.shapes.scorer import CHANCE, score_images
from diffusers_greedy_grow.training.sharding import consolidate, reshard, set_up_sharding, shard
from diffusers_greedy_grow.training.signals import Interrupt, leave_signals_to_the_parent
from diffusers_greedy_grow.training.text.captions import encode_captions, tokenize_captions, warn_of_cut_captions
from diffusers_greedy_grow.training.text.embeddings import TextEmbeddings, name_encoder
from diffusers_greedy_grow.training.text.small_encoder import build_small_text_encoder, train_small_tokenizer
from diffusers_greedy_grow.training.trained_model import TrainedModel


logger = get_logger(__name__)

# What random numbers are for, beside the phases that train; the index of a phase is small.
VALIDATION, SAMPLES = 1000, 1001
# Noise levels at which grain shows.
LOW_NOISE = 0.02, 0.3
SMALL_TEXT_HIDDEN_SIZE = 128
# After how many captions for each process what has been embedded is kept, should the run be stopped.
EMBEDDED_AT_ONCE = 100_000
# How many captions the small text encoder's tokenizer is trained on, at most.
TOKENIZER_CAPTIONS = 100_000


# ----------------------------------------------------------------------------------------------------------------------
# Phases


@dataclass
class Phase:
    """One phase: `kind` is `"core"`, `"detail"` or `"joint"`; `stage` counts the growth stages from 1, the core is 0."""

    index: int
    name: str
    kind: str
    stage: int
    resolution: int
    steps: int
    batch_size: int


def list_phases(model_args: ModelArguments, args: TrainingArguments) -> list[Phase]:
    """The phases of a run. Each ends in a pipeline folder of its name; phases of no steps are left out."""
    sizes = model_args.resolutions
    phases = []
    if model_args.core is None and args.core_steps:
        phases.append(Phase(0, "core", "core", 0, sizes[0], args.core_steps, args.train_batch_size[0]))
    for i, resolution in enumerate(sizes[1:], start=1):
        detail, joint, batch_size = args.detail_steps[i - 1], args.joint_steps[i - 1], args.train_batch_size[i]
        name = f"grown-{resolution}"
        if detail:
            full_name = f"{name}-detail" if joint else name
            phases.append(Phase(2 * i - 1, full_name, "detail", i, resolution, detail, batch_size))
        if joint:
            phases.append(Phase(2 * i, name, "joint", i, resolution, joint, batch_size))
    return phases


def is_of(phase: Phase, progress: dict) -> bool:
    """Whether a checkpoint is of `phase`. A detail phase has another name if a joint one has been added behind it, or left out."""
    names = {name.removesuffix("-detail") for name in (phase.name, progress["phase"])}
    return phase.index == progress["phase_index"] and len(names) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Pipelines


def build_core_pipeline(
    model_args: ModelArguments, captions: Iterable[str], checkpoint: Path | None = None
) -> GreedyGrowPipeline:
    """A pipeline around a new core, with a pretrained text encoder or a small new one, whose tokenizer may be a checkpoint's."""
    if model_args.text_encoder == "small":
        if checkpoint is not None:
            tokenizer = AutoTokenizer.from_pretrained(checkpoint / "tokenizer")
        else:
            tokenizer = train_small_tokenizer(captions)
        text_encoder = build_small_text_encoder(
            tokenizer, get_text_hidden_size(model_args), model_args.text_num_layers
        )
    else:
        tokenizer = AutoTokenizer.from_pretrained(model_args.text_encoder)
        text_encoder = AutoModelForTextEncoding.from_pretrained(model_args.text_encoder, use_safetensors=True)
        if model_args.text_hidden_size not in (None, text_encoder.config.hidden_size):
            raise ValueError(
                f"`text_hidden_size={model_args.text_hidden_size}` is not that of "
                f"`text_encoder={model_args.text_encoder!r}`, which is {text_encoder.config.hidden_size}: leave it out."
            )
    return GreedyGrowPipeline(
        unet=build_core(model_args, text_encoder.config.hidden_size),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        max_sequence_length=model_args.max_sequence_length,
    )


def load_pipeline(folder: str | Path, revision: str | None = None) -> GreedyGrowPipeline:
    core = load_core(folder, subfolder="unet", revision=revision)
    return GreedyGrowPipeline.from_pretrained(folder, unet=core, revision=revision)


def build_core(model_args: ModelArguments, cross_attention_dim: int) -> ShallowUNet2DModel:
    unet = ShallowUNet2DModel(
        sample_size=model_args.resolutions[0],
        patch_size=model_args.patch_size,
        hidden_size=model_args.hidden_size,
        num_layers=model_args.num_layers,
        num_attention_heads=model_args.num_attention_heads,
        mlp_ratio=model_args.mlp_ratio,
        cross_attention_dim=cross_attention_dim,
    )
    unet.zero_init_output()
    return unet


def grow_pipeline(
    pipeline: GreedyGrowPipeline, phase: Phase, model_args: ModelArguments, data: CaptionedImages
) -> GreedyGrowPipeline:
    factor = phase.resolution // pipeline.unet.config.sample_size
    variance = None
    if len(pipeline.unet.sample_sizes) == 1 or pipeline.config.detail_variances is not None:
        variance = measure_detail(data, phase.resolution, factor)  # one for each stage, or none
    stage = stage_arguments(phase, model_args)
    return GreedyGrowPipeline.from_core(pipeline, phase.resolution, detail_variance=variance, **stage)


def measure_detail(data: CaptionedImages, resolution: int, factor: int, count: int = 512) -> float:
    """[`detail_variance`] of the first images at `resolution`: what `core_first="auto"` goes by."""
    images = data.at(resolution)
    variances = [
        detail_variance(normalize(images[i]["pixel_values"].unsqueeze(0)), factor)
        for i in range(min(count, len(images)))
    ]
    return sum(variances) / len(variances)


def stage_arguments(phase: Phase, model_args: ModelArguments) -> dict:
    return {
        "block_out_channels": parse_channels(model_args.block_out_channels[phase.stage - 1]),
        "layers_per_block": model_args.layers_per_block,
        "init": model_args.init,
    }


def set_phase(unet: ShallowUNet2DModel | GrowableUNet2DConditionModel, kind: str) -> None:
    """Freezes what a phase does not train."""
    if kind == "detail":
        unet.freeze_core()
    elif kind == "joint":
        unet.unfreeze_core()


def adopt_core(model_args: ModelArguments) -> None:
    """
    With `core`, the arguments that describe a core and its text encoder become those of this one.

    Raises:
        `ValueError`: if others were given.
    """
    core, revision = model_args.core, model_args.core_revision
    config = find_core(core, subfolder="unet", revision=revision)[1]
    if config["cross_attention_dim"] is None:
        raise ValueError(
            f"`core={core!r}` has no text, but `grow.py` trains on captions: name one with a text encoder."
        )
    text_config = AutoConfig.from_pretrained(core, subfolder="text_encoder", revision=revision).get_text_config()
    names = ("patch_size", "hidden_size", "num_layers", "num_attention_heads", "mlp_ratio")
    own = {name: config[name] for name in names}
    own["text_hidden_size"] = config["cross_attention_dim"]
    own["max_sequence_length"] = GreedyGrowPipeline.load_config(core, revision=revision)["max_sequence_length"]
    if model_args.text_encoder == "small":
        own["text_num_layers"] = text_config.num_hidden_layers
    defaults = {field.name: field.default for field in fields(model_args)}
    for name, value in own.items():
        given = getattr(model_args, name)
        if given not in (defaults[name], value):
            raise ValueError(f"`{name}={given}` is not that of `core={core!r}`, which is {value}: leave it out.")
        setattr(model_args, name, value)
    if model_args.text_encoder != "small":
        check_text_encoder(model_args, text_config)


def check_text_encoder(model_args: ModelArguments, own) -> None:
    """Raises a `ValueError` if `text_encoder` is another than the core's, whose configuration is `own`."""
    given, core = f"`text_encoder={model_args.text_encoder!r}`", f"`core={model_args.core!r}`"
    try:
        config = AutoConfig.from_pretrained(model_args.text_encoder).get_text_config()
    except OSError:
        logger.warning(f"{given} cannot be read here: it is taken for that of {core}, which is used.")
        return
    for name in ("hidden_size", "vocab_size"):
        if getattr(config, name) != getattr(own, name):
            raise ValueError(
                f"{given} is not that of {core}: its {name} is {getattr(config, name)} and not {getattr(own, name)}. Leave it "
                "out, since a core keeps the text encoder that it was trained with."
            )


def make_plan(
    phases: list[Phase],
    data_args: DataArguments,
    model_args: ModelArguments,
    args: TrainingArguments,
    accelerator: Accelerator,
) -> tuple[list, str]:
    """What each phase will cost, for square images, and that as text. No weights are read or allocated."""
    num_processes = args.plan_processes if args.plan and args.plan_processes else accelerator.num_processes
    with torch.device("meta"):
        if model_args.core is not None:
            model_class, config, _, _ = find_core(model_args.core, subfolder="unet", revision=model_args.core_revision)
            unet = model_class.from_config(config)
            if unet.config.sample_size != model_args.resolutions[0]:
                raise ValueError(
                    f"`resolutions={model_args.resolutions}` must begin with the resolution of "
                    f"`core={model_args.core!r}`, which is {unet.config.sample_size}."
                )
        else:
            unet = build_core(model_args, get_text_hidden_size(model_args))
        plans = []

        def plan(phase: Phase, model: ShallowUNet2DModel | GrowableUNet2DConditionModel) -> PhasePlan:
            batches = num_processes * args.gradient_accumulation_steps
            return plan_phase(
                phase.name,
                model,
                model.config.sample_size,
                phase.steps,
                phase.batch_size * batches,
                batches,
                model_args.max_sequence_length,
                compute_dtype(accelerator),
            )

        for phase in phases:
            if phase.resolution != unet.config.sample_size:
                inner, stage = unet, stage_arguments(phase, model_args)
                unet = GrowableUNet2DConditionModel.from_core(inner, phase.resolution, **stage)
            set_phase(unet, phase.kind)
            plans.append(plan(phase, unet))
            if phase.kind == "joint" and args.low_res_share:
                share = count_low_res(phase.batch_size, args.low_res_share) / phase.batch_size
                set_phase(inner, "joint" if len(inner.sample_sizes) > 1 else "core")  # all of it trains
                flops = (1 - share) * plans[-1].train_flops + share * plan(phase, inner).train_flops
                plans[-1] = replace(plans[-1], train_flops=round(flops))
    if data_args.aspect_ratio_buckets is not None:
        check_buckets(data_args.aspect_ratio_buckets, model_args.resolutions, unet)
    num_shards = num_processes if accelerator.is_fsdp2 else 1
    text = format_plan(plans, describe_parts(unet), num_shards, args.gradient_checkpointing)
    if args.plan:
        text += "\n" + format_memory(plans, num_processes if num_processes > 1 else 8)
    return plans, text


def get_text_hidden_size(model_args: ModelArguments) -> int:
    """The width of the text embeddings, of a named encoder by its configuration unless it is given."""
    if model_args.text_hidden_size is not None:
        return model_args.text_hidden_size
    if model_args.text_encoder == "small":
        return SMALL_TEXT_HIDDEN_SIZE
    try:
        return AutoConfig.from_pretrained(model_args.text_encoder).get_text_config().hidden_size
    except OSError as error:
        raise OSError(
            f"`text_encoder={model_args.text_encoder!r}` cannot be read: {error} To plan without it, name its "
            "`text_hidden_size`."
        ) from error


def check_buckets(
    buckets: str, resolutions: list[int], unet: ShallowUNet2DModel | GrowableUNet2DConditionModel
) -> None:
    """
    Raises:
        `ValueError`: if there are images that the models could not take in.
    """
    cell = unet.config.patch_size * resolutions[-1] // unet.sample_sizes[0]
    cell = math.lcm(cell, 2 * resolutions[-1] // resolutions[0])  # the core's losses are by bands of factor 2
    for side in itertools.chain(*parse_buckets(buckets)):
        if side % cell:
            raise ValueError(
                f"`aspect_ratio_buckets={buckets!r}`: {side} is no multiple of {cell}, as the sides must be with "
                f"`resolutions={resolutions}`."
            )


# ----------------------------------------------------------------------------------------------------------------------
# Training


@dataclass
class Run:
    """What all phases share."""

    accelerator: Accelerator
    data_args: DataArguments
    model_args: ModelArguments
    args: TrainingArguments
    train_data: CaptionedImages | StreamedImages
    high_res_data: CaptionedImages | StreamedImages  # what is seen above the core's resolution
    validation_data: CaptionedImages
    output_dir: Path
    plans: dict[str, PhasePlan]  # of each phase, in order
    captions: list[str]  # of the sample grid
    fingerprint: str | None = None  # of all captions, if they are not streamed
    publisher: "Publisher | None" = None  # on the main process, if the run is to be published
    embeddings: TextEmbeddings | None = None  # of all captions, if they are kept

    @property
    def checkpoints(self) -> Path:
        return self.output_dir / "checkpoints"

    @property
    def metrics_path(self) -> Path:
        return self.output_dir / "metrics.jsonl"

    @property
    def config(self) -> dict:
        """The arguments, as `config.yaml` has them."""
        everything = {**asdict(self.data_args), **asdict(self.model_args), **asdict(self.args)}
        return {name: value for name, value in everything.items() if name not in OF_ONE_LAUNCH}

    @property
    def decisive_config(self) -> dict:
        """What a resumed run must share with the one that was stopped, or it would end elsewhere."""
        images_per_step = {plan.name: plan.batch_size for plan in self.plans.values()}
        config = {name: value for name, value in self.config.items() if name not in FREE_TO_CHANGE}
        if self.args.low_res_share:
            config["train_batch_size"] = self.args.train_batch_size  # a share of it
        return {
            **config,
            "mixed_precision": self.accelerator.mixed_precision,
            "images per step": images_per_step,
            "captions": self.fingerprint,
            "FSDP": self.accelerator.is_fsdp2,
        }

    def total_steps(self, phase: Phase, step: int) -> int:
        """Over all phases."""
        names = list(self.plans)
        return sum(self.plans[name].steps for name in names[: names.index(phase.name)]) + step

    def trains_text(self, phase: Phase) -> bool:
        """Whether a phase trains the text encoder: a small new one learns in the first phase."""
        is_new = self.model_args.text_encoder == "small" and self.model_args.core is None
        return is_new and phase.name == next(iter(self.plans))

    def encode(self, phase: Phase, pipeline: GreedyGrowPipeline, captions: list[str]) -> dict[str, torch.Tensor]:
        """The text arguments of the [`TrainedModel`] for `captions`."""
        if self.embeddings is not None:
            return self.embeddings(captions, self.accelerator.device)
        if self.trains_text(phase):
            return tokenize_captions(pipeline, captions, self.accelerator.device)
        return encode_captions(pipeline, pipeline.text_encoder, captions, self.accelerator.device)

    def log(self, phase: Phase, step: int, **values: float) -> None:
        """Writes a line of metrics and tells the trackers. `flops` and the trackers' steps count over all phases."""
        names = list(self.plans)
        earlier = [self.plans[name] for name in names[: names.index(phase.name)]]
        plan = self.plans[phase.name]
        flops = sum(plan.flops for plan in earlier) + step * plan.batch_size * plan.train_flops
        if self.accelerator.is_main_process:
            with open(self.metrics_path, "a") as file:
                file.write(json.dumps({"phase": phase.name, "step": step, "flops": flops, **values}) + "\n")
        self.accelerator.log(
            {f"{phase.name}/{name}": value for name, value in values.items()},
            step=self.total_steps(phase, step),
        )


def train_phase(
    run: Run, phase: Phase, pipeline: GreedyGrowPipeline, checkpoint: Path | None, interrupt: Interrupt
) -> None:
    """Trains one phase, from `checkpoint` on if there is one, and leaves the averaged weights in `pipeline`."""
    accelerator, args, device = run.accelerator, run.args, run.accelerator.device
    unet, text_encoder = pipeline.unet, pipeline.text_encoder
    text_encoder.to(device if run.embeddings is None else "cpu")
    shift = pipeline.scheduler.config.shift
    band_factor = 2 if phase.kind == "core" else unet.sample_sizes[-1] // unet.sample_sizes[-2]
    num_inner_stages = len(unet.sample_sizes) - 2  # of all that the model has, also where they are the given core's

    # 1. What trains: the model, as far as the phase does not freeze it, and a new text encoder along with the core
    unet.train()
    set_phase(unet, phase.kind)
    lr = args.learning_rate[phase.stage]
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    set_attention_backend(unet, args.attention_backend)
    train_text = run.trains_text(phase)
    text_encoder.requires_grad_(train_text)
    module = TrainedModel(unet, text_encoder if train_text else None)
    if phase.kind == "core":
        groups = [{"name": "core", "params": list(unet.parameters()), "lr": lr}]
    else:
        groups = unet.parameter_groups(lr, args.core_lr_scale)
    if train_text:
        groups.append({"name": "text", "params": list(text_encoder.parameters()), "lr": lr})

    optimizer, lr_scheduler = make_optimizer(args, groups, phase.steps)
    shard(accelerator, module, pipeline)
    model, optimizer, lr_scheduler = accelerator.prepare(module, optimizer, lr_scheduler)
    # What is frozen is its own average.
    named_parameters = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    parameters = [parameter for _, parameter in named_parameters]

    guard = GradientGuard(args.spike_factor, args.max_skipped_steps)
    if checkpoint is not None:
        progress = read_progress(checkpoint)
        step, data_state = progress["step"], progress["data_state"]
        ema, losses = load_checkpoint(accelerator, checkpoint, named_parameters, args.ema_decay)
        meter = LossMeter(losses)
        guard.load_state_dict(progress["guard"])
    else:
        step, data_state, meter = 0, None, LossMeter()
        # Anew in each phase, which starts from the averages of the one before. To go on with their slow decay would hold
        # the new weights back: it cost 8 % of the held-out loss after `detail`.
        ema = EMAModel(parameters, decay=args.ema_decay, foreach=not accelerator.is_fsdp2)
    ema.to("cpu" if args.offload_ema else device)

    # 2. The data of the steps that are left, in an order that depends on the seed alone
    batch_size = phase.batch_size
    images_per_step = batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    loader = make_loader(run, phase, step, data_state)

    # 3. The loop
    def save(step: int) -> Path:
        losses = meter.gather(accelerator)
        state = {
            "phase": phase.name,
            "phase_index": phase.index,
            "step": step,
            "config": run.decisive_config,
            "guard": guard.state_dict(),
            "data_state": loader.state() if isinstance(loader, StreamLoader) else None,
            "metrics_size": run.metrics_path.stat().st_size if run.metrics_path.exists() else 0,
        }
        return save_checkpoint(
            accelerator,
            run.checkpoints,
            state,
            ema,
            named_parameters,
            losses,
            args.checkpoints_total_limit,
            pipeline.tokenizer if train_text else None,
        )

    # The first steps start the data's workers, and compile: they do not tell how fast the others are.
    warmed_up = step + min(5, (phase.steps - step) // 2)
    started = time.perf_counter()
    bar = tqdm(total=phase.steps, initial=step, desc=phase.name, disable=not accelerator.is_main_process)
    logged_step, logged_time = step, started
    for micro_step, batch in enumerate(loader):
        with accelerator.accumulate(model):
            x0 = normalize(batch["pixel_values"].to(device, non_blocking=True))
            place = (
                micro_step % args.gradient_accumulation_steps * accelerator.num_processes + accelerator.process_index
            )
            noise, sigma, dropped = draw_noise(
                (args.seed, phase.index, step),
                place * batch_size,
                images_per_step,
                x0.shape,
                shift,
                args.logit_mean[phase.stage],
                args.logit_std[phase.stage],
                device,
                run.data_args.caption_dropout,
            )
            captions = ["" if drop else caption for drop, caption in zip(dropped, batch["caption"])]
            with accelerator.autocast():
                conditions = run.encode(phase, pipeline, captions)
                losses = train_losses(run, phase, model, x0, noise, sigma, band_factor, num_inner_stages, conditions)
            accelerator.backward(losses.loss)
            if accelerator.sync_gradients:
                take_step(
                    accelerator,
                    optimizer,
                    model.parameters(),
                    args.max_grad_norm,
                    guard,
                    phase.name,
                    step,
                    losses.sigma,
                    run.checkpoints,
                )
                lr_scheduler.step()
            optimizer.zero_grad()
        meter.update(torch.stack([losses.low, losses.high, losses.sigma], dim=1))
        if not accelerator.sync_gradients:
            continue

        step += 1
        if args.offload_ema:
            ema.to(device)
        ema.step(parameters)
        if args.offload_ema:
            ema.to("cpu")
        bar.update()
        last = step == phase.steps
        # Seldom, or where it waits for the GPU anyway.
        times = (10, args.logging_steps, args.validation_steps, args.checkpointing_steps)
        interrupted = interrupt.noted(accelerator, ask=last or any(step % steps == 0 for steps in times))

        if step == min(warmed_up + 20, phase.steps):
            rate = (step - warmed_up) * images_per_step / (time.perf_counter() - started)
            minutes = minutes_left(run, phase, step, rate)
            logger.info(f"{phase.name}: {rate:.1f} images/s; about {minutes:.0f} min of training left.")
        if step % args.logging_steps == 0 or last or interrupted:
            now = time.perf_counter()
            rate = (step - logged_step) * images_per_step / (now - logged_time)
            logged_step, logged_time = step, now
            means = {"lr": optimizer.param_groups[0]["lr"], **meter.compute(accelerator), **guard.compute()}
            means |= {"memory_gb": memory_in_use(device), "minutes_left": minutes_left(run, phase, step, rate)}
            run.log(phase, step, images=step * images_per_step, images_per_second=rate, **means)
            bar.set_postfix(
                loss=f"{means.get('loss', math.nan):.4f}",
                images_per_s=f"{rate:.1f}",
                memory=f"{means['memory_gb']:.1f} GB",
                all_left=f"{means['minutes_left']:.0f} min",
            )
        if step == warmed_up:
            logged_step, logged_time = step, time.perf_counter()
            started = logged_time

        paused = time.perf_counter()
        if step % args.validation_steps == 0 or last:
            with averaged(ema, parameters):
                run.log(phase, step, **validate(run, phase, pipeline, module, band_factor))
        if interrupted:
            logger.info(save_interrupted(save, phase.name, step, guard, run.checkpoints))
            accelerator.end_training()
            if run.publisher is not None:
                run.publisher.leave()
            sys.exit(128 + (interrupt.signal or signal.SIGTERM))
        # Not while steps are left out: what made them bad may be in the weights.
        if (step % args.checkpointing_steps == 0 and not guard.skipped_in_a_row) or last:
            save(step)
        if args.sample_steps is not None and step % args.sample_steps == 0 and not last:
            with averaged(ema, parameters):
                consolidate(accelerator, module, pipeline)
                if accelerator.is_main_process:
                    sample_step(run, phase, step, pipeline)
            accelerator.wait_for_everyone()
        if args.hub_steps is not None and step % args.hub_steps == 0 and not last:
            with averaged(ema, parameters):
                consolidate(accelerator, module, pipeline)
                if run.publisher is not None:
                    run.publisher.push_step(run, phase, step, pipeline)
        logged_time += time.perf_counter() - paused
    bar.close()

    # 4. The averaged weights are what the phase has made
    ema.copy_to(parameters)
    unet.disable_gradient_checkpointing()
    consolidate(accelerator, module, pipeline)
    for component in (pipeline.unet, pipeline.text_encoder):
        component.requires_grad_(False).eval()
    record_phase(run, phase, pipeline.unet, phase.steps)
    accelerator.free_memory()


def train_losses(
    run: Run,
    phase: Phase,
    model: torch.nn.Module,
    x0: torch.Tensor,
    noise: torch.Tensor,
    sigma: torch.Tensor,
    band_factor: int,
    num_inner_stages: int,
    conditions: dict[str, torch.Tensor],
) -> FlowLoss:
    """The loss of a batch; in a joint phase the last `low_res_share` of it is for the inner model alone."""
    args, joint = run.args, phase.kind == "joint"
    whole = len(x0) - count_low_res(len(x0), args.low_res_share) * joint

    def loss_of(part: slice, **kwargs) -> FlowLoss:
        texts = {name: value[part] for name, value in conditions.items()}
        weighting = args.loss_weighting[phase.stage]
        return flow_loss(model, x0[part], noise[part], sigma[part], band_factor, weighting, **kwargs, **texts)

    losses = loss_of(slice(whole), low_res_weight=args.low_res_loss_weight * joint)
    if whole < len(x0):
        inner = loss_of(slice(whole, None), num_stages=num_inner_stages)
        losses.loss = (whole * losses.loss + (len(x0) - whole) * inner.loss) / len(x0)
    return losses


def count_low_res(batch_size: int, share: float) -> int:
    """How many images of a batch are for the inner model alone."""
    return round(share * batch_size)


def make_loader(
    run: Run, phase: Phase, step: int, data_state: dict | None
) -> torch.utils.data.DataLoader | StreamLoader:
    """This process's batches of the steps that follow `step`, in an order that depends on the seed alone."""
    accelerator, args = run.accelerator, run.args
    data = (run.train_data if phase.stage == 0 else run.high_res_data).at(phase.resolution)
    batch_size, seed, steps = phase.batch_size, (args.seed, phase.index), phase.steps - step
    batches_per_step = accelerator.num_processes * args.gradient_accumulation_steps
    options = {
        "num_workers": run.data_args.dataloader_num_workers,
        "pin_memory": accelerator.device.type == "cuda",
    }
    if isinstance(data, StreamedImages):
        return StreamLoader(
            data,
            batch_size,
            start=step * batches_per_step,
            num_batches=steps * args.gradient_accumulation_steps,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            seed=seed,
            state=data_state,
            **options,
        )
    options["worker_init_fn"] = leave_signals_to_the_parent
    if len(data.buckets) > 1:
        batches = BucketOrder(data.shapes, batch_size, batches_per_step, start=step, num_steps=steps, seed=seed)
        loader = torch.utils.data.DataLoader(data, batch_sampler=batches, **options)
    else:
        images = batch_size * batches_per_step
        order = EpochOrder(len(data), start=step * images, num_samples=steps * images, seed=seed)
        loader = torch.utils.data.DataLoader(data, batch_size=batch_size, sampler=order, **options)
    return accelerator.prepare(loader)


def record_phase(run: Run, phase: Phase, unet: ShallowUNet2DModel | GrowableUNet2DConditionModel, steps: int) -> None:
    """Notes in the model's lineage what this phase has done to it."""
    add_to_lineage(
        unet,
        phase=phase.name,
        resolution=phase.resolution,
        trained={"core": "everything", "detail": "the new stage", "joint": "everything"}[phase.kind],
        steps=steps,
        images=steps * run.plans[phase.name].batch_size,
        seed=run.args.seed,
    )


@torch.no_grad()
def validate(run: Run, phase: Phase, pipeline: GreedyGrowPipeline, module: TrainedModel, band_factor: int) -> dict:
    """
    The held-out loss, on the same images with the same noise in all runs; spread over the processes. The noise levels are
    evenly spaced quantiles of the first phase's distribution; and again with levels of [`LOW_NOISE`], which training sees
    seldom and where grain shows.
    """
    accelerator, args = run.accelerator, run.args
    count = min(run.data_args.num_validation_images, len(run.validation_data))
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    first, end = count * rank // num_processes, count * (rank + 1) // num_processes
    losses_of_images: list[list[float]] = []  # of each two rows
    images = run.validation_data.at(phase.resolution)
    module.eval()
    for batch in range(math.ceil(math.ceil(count / num_processes) / phase.batch_size)):
        start = first + batch * phase.batch_size
        stop = min(start + phase.batch_size, end)
        is_spare = start >= stop
        if is_spare:  # a sharded model wants all processes in each forward pass
            start, stop = 0, 1
        rows = [images[i] for i in range(start, stop)]
        x0 = normalize(torch.stack([row["pixel_values"] for row in rows]).to(accelerator.device))
        generators = sample_generators((VALIDATION, phase.resolution), start, len(x0))
        noise = randn_tensor(x0.shape, generator=generators, device=accelerator.device)
        # Each image's share of the way through the levels, whose quantiles are more even than draws.
        places = (start + 0.5 + torch.arange(len(x0), device=x0.device)) / count
        normal = args.logit_mean[0] + args.logit_std[0] * torch.special.ndtri(places)
        sigma = shift_sigma(torch.sigmoid(normal), pipeline.scheduler.config.shift)
        low_sigma = LOW_NOISE[0] + (LOW_NOISE[1] - LOW_NOISE[0]) * places
        with accelerator.autocast():
            conditions = run.encode(phase, pipeline, [row["caption"] for row in rows])
            losses = flow_loss(module, x0, noise, sigma, band_factor, **conditions)
            low_losses = flow_loss(module, x0, noise, low_sigma, band_factor, **conditions)
        if not is_spare:
            both = [torch.stack([one.low, one.high, one.sigma], dim=1) for one in (losses, low_losses)]
            losses_of_images += torch.cat(both, dim=1).tolist()
    module.train()
    reshard(module)
    if accelerator.num_processes > 1:  # the processes may have unequal shares
        losses_of_images = gather_object(losses_of_images)
    losses, low_losses = torch.tensor(losses_of_images).reshape(-1, 6).split(3, dim=1)
    means = {f"val_{name}": value for name, value in LossMeter(losses).compute(accelerator).items()}
    for name, value in LossMeter(low_losses).compute(accelerator).items():
        if "sigma" not in name:
            means[f"val_low_noise_{name}"] = value
    return means


def minutes_left(run: Run, phase: Phase, step: int, images_per_second: float) -> float:
    """Of training, from the speed so far and the plan's count of operations; validation and samples come on top."""
    rate = run.plans[phase.name].train_flops * images_per_second
    names = list(run.plans)
    left = sum(run.plans[name].flops for name in names[names.index(phase.name) + 1 :])
    left += (phase.steps - step) * run.plans[phase.name].flops / phase.steps
    return left / rate / 60


def memory_in_use(device: torch.device) -> float:
    """By this process, in GB: at most until now of the GPU's, or without one now of the CPU's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


# ----------------------------------------------------------------------------------------------------------------------
# Looking at the result


def sample_captions(run: Run, pipeline: GreedyGrowPipeline, captions: list[str]) -> list[Image.Image]:
    """
    One image for each caption. The noise is drawn at the final resolution and pooled down to the pipeline's, so that
    every phase starts from the same.
    """
    resolution, device = pipeline.unet.config.sample_size, run.accelerator.device
    final_resolution = run.model_args.resolutions[-1]
    generators = sample_generators((run.args.seed, SAMPLES), 0, len(captions))
    shape = (len(captions), pipeline.unet.config.in_channels, final_resolution, final_resolution)
    noise = randn_tensor(shape, generator=generators, device=device)
    if final_resolution > resolution:
        noise, _ = descend(noise, torch.ones(1, device=device), final_resolution // resolution)

    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(captions), 32):
        with run.accelerator.autocast():
            images += pipeline(
                captions[start : start + 32],
                latents=noise[start : start + 32],
                num_inference_steps=run.args.num_inference_steps,
                guidance_scale=run.args.guidance_scale,
            ).images
    return images


def sample_step(run: Run, phase: Phase, step: int, pipeline: GreedyGrowPipeline) -> None:
    """Draws a phase's weights so far, for the captions and from the noise of the sample grid; for the trackers too."""
    pipeline.to(run.accelerator.device).unet.eval()
    images = sample_captions(run, pipeline, run.captions)
    folder = run.output_dir / "samples"
    folder.mkdir(exist_ok=True)
    draw_samples({f"{phase.name} {step}": images}, run.captions, folder / f"{phase.name}-{step}.png")
    for tracker in run.accelerator.trackers:
        if hasattr(tracker, "log_images"):
            arrays = np.stack([np.asarray(image) for image in images])
            kwargs = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({f"{phase.name}/samples": arrays}, step=run.total_steps(phase, step), **kwargs)
    pipeline.unet.train()
    if run.embeddings is not None:  # training does not need it
        pipeline.text_encoder.to("cpu")
    if run.accelerator.is_fsdp2:  # a copy of what is sharded
        pipeline.unet.to("cpu")


def draw_grids(run: Run, phase: Phase, pipeline: GreedyGrowPipeline) -> None:
    """Adds a row to the grid of samples, and draws the loss curves again."""
    folder = run.output_dir / "samples"
    folder.mkdir(exist_ok=True)
    strip = make_image_grid(sample_captions(run, pipeline, run.captions), rows=1, cols=len(run.captions))
    captions, info = json.dumps(run.captions), PngInfo()
    info.add_text("captions", captions)
    strip.save(folder / f"{phase.name}.png", pnginfo=info)
    rows = {}
    for name in run.plans:  # rows of phases that an earlier session finished are there as files
        strip = Image.open(folder / f"{name}.png") if (folder / f"{name}.png").exists() else None
        if strip is not None and strip.info.get("captions") == captions:  # which may have changed
            size = strip.height
            rows[name] = [strip.crop((i * size, 0, (i + 1) * size, size)) for i in range(strip.width // size)]
    draw_samples(rows, run.captions, run.output_dir / "samples.png")
    draw_losses(run.metrics_path, run.output_dir / "loss.png")


def score_shapes(run: Run, phase: Phase, pipeline: GreedyGrowPipeline) -> dict[str, float]:
    """Captioned shapes: which share of the held-out captions' attributes the images show."""
    captions = run.validation_data.captions[: run.data_args.num_scored_images]
    size = run.model_args.resolutions[-1]
    images = [
        image.resize((size, size), Image.Resampling.BICUBIC) for image in sample_captions(run, pipeline, captions)
    ]
    return score_images(images, captions, texture_cells=pipeline.unet.sample_sizes[0])


def format_scores(scores: dict[str, dict[str, float]]) -> str:
    names = list(next(iter(scores.values())))
    lines = [f"{'held-out captions':<18}" + "".join(f"{name:>12}" for name in names)]
    for phase, row in {**scores, "chance (1 object)": CHANCE}.items():
        lines.append(f"{phase:<18}" + "".join(f"{row[name]:>12.2f}" if name in row else " " * 12 for name in names))
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Publishing


class Publisher:
    """Uploads to the Hub in the background, one thing after the other. An upload that fails is logged and stops nothing."""

    def __init__(self, args: TrainingArguments):
        name = args.hub_model_id or Path(args.output_dir).resolve().name
        disable_progress_bars()  # of uploads, between those of training
        check_license(args.hub_license)
        self.repo_id = prepare_repository(name, private=args.hub_private_repo or None)
        if args.hub_steps is not None:
            prepare_repository(self.repo_id, revision="training")
        self.executor = ThreadPoolExecutor(max_workers=1)
        self.last: Future | None = None

    def push_phase(self, phase: Phase, folder: Path) -> None:
        """The pipeline of a finished phase, as the next commit, under a tag of the phase's name."""
        self.last = self.executor.submit(self.upload, folder, commit_message=f"{phase.name} is done", tag=phase.name)

    def push_step(self, run: Run, phase: Phase, step: int, pipeline: GreedyGrowPipeline) -> None:
        """The weights so far, to the branch `training`; left out while the upload before is still under way."""
        if self.last is not None and not self.last.done():
            logger.info(f"{phase.name}: step {step} is not published, since the upload before is still under way.")
            return
        uploads = run.output_dir / "uploads"
        folder = uploads / f"{phase.name}-{step}"
        record_phase(run, phase, pipeline.unet, step)
        try:
            remove_folder(uploads)  # of steps whose upload has failed: this one is newer
            save_pipeline(pipeline, folder)
            write_card(folder, pipeline, self.repo_id, license=run.args.hub_license)
        except Exception as error:
            logger.error(f"{phase.name}: step {step} is not published: {type(error).__name__}: {error}")
            return
        message = f"{phase.name}, step {step}"
        self.last = self.executor.submit(self.upload, folder, "training", remove=True, commit_message=message)

    def push_missing(self, phases: list[Phase], output_dir: Path) -> None:
        """Finished phases of a run that goes on, as far as they lack their tags: it was killed before they had arrived."""
        tags = {tag.name for tag in HfApi().list_repo_refs(self.repo_id).tags}
        for phase in phases:
            if phase.name not in tags and (output_dir / phase.name / "README.md").exists():
                self.push_phase(phase, output_dir / phase.name)

    def upload(self, folder: Path, revision: str | None = None, remove: bool = False, **kwargs) -> None:
        try:
            upload(folder, self.repo_id, revision=revision, **kwargs)
        except UploadError as error:
            logger.error(str(error))
            return
        if remove:
            shutil.rmtree(folder)

    def wait(self) -> None:
        if self.last is not None and not self.last.done():
            logger.info(f"Waiting for the uploads to {self.repo_id}.")
        self.executor.shutdown()

    def leave(self) -> None:
        """Waits for the upload under way alone: [`push_missing`] sees to the others when the run goes on."""
        if self.last is not None and not self.last.done():
            logger.info(f"Waiting for the upload to {self.repo_id} that is under way.")
        self.executor.shutdown(cancel_futures=True)


def write_phase_card(
    run: Run, phase: Phase, pipeline: GreedyGrowPipeline, scores: dict[str, float], samples: Path
) -> None:
    """Adds the card to the folder of a finished phase: what it is, its held-out loss and scores, and its images."""
    args, data_args, folder = run.args, run.data_args, run.output_dir / phase.name
    datasets = [name for name in (data_args.dataset_name, data_args.high_res_dataset_name) if name is not None]
    held_out = data_args.high_res_dataset_name if data_args.has_high_res_data else data_args.dataset_name
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    losses = [line for line in lines if line["phase"] == phase.name and "val_loss" in line]
    names = {"loss": "held-out loss", "loss_low": "held-out loss, low band", "loss_high": "held-out loss, high band"}
    figures = {("loss", label): losses[-1][f"val_{name}"] for name, label in names.items() if losses}
    figures |= {("accuracy", name): value for name, value in scores.items()}
    write_card(
        folder,
        pipeline,
        run.publisher.repo_id if run.publisher is not None else args.hub_model_id or str(folder),
        samples,
        license=args.hub_license,
        datasets=datasets or None,
        eval_results=[
            EvalResult(
                task_type="text-to-image",
                dataset_type=held_out or ("captioned-shapes" if data_args.on_shapes else "images"),
                dataset_name=held_out or ("Captioned shapes" if data_args.on_shapes else "Images, held out"),
                metric_type=kind,
                metric_name=name,
                metric_value=round(value, 4),
            )
            for (kind, name), value in figures.items()
        ],
        tag=phase.name if args.push_to_hub else None,
    )


# ----------------------------------------------------------------------------------------------------------------------
# Data


def load_data(
    data_args: DataArguments,
    model_args: ModelArguments,
    args: TrainingArguments,
    train_data_dir: str | None,
    broken: BrokenRows,
) -> tuple[CaptionedImages | StreamedImages, CaptionedImages | StreamedImages, CaptionedImages]:
    """What the core is trained on, what is trained on above its resolution, and what is held out."""
    final_resolution = model_args.resolutions[-1]
    held_out_rows = max(8, data_args.num_validation_images, data_args.num_scored_images * data_args.on_shapes)
    columns = data_args.image_column, data_args.caption_column
    if data_args.high_res_data_dir is not None:
        check_data_dir(data_args.high_res_data_dir, "high_res_data_dir")

    def load(dataset_name: str | None, data_dir: str | None, resolution: int, num_held_out: int = held_out_rows):
        buckets = None
        if data_args.aspect_ratio_buckets is not None:
            factor = final_resolution // resolution
            buckets = [(h // factor, w // factor) for h, w in parse_buckets(data_args.aspect_ratio_buckets)]
        if data_args.streaming:
            stream, held_out, first = load_captioned_stream(dataset_name, data_dir, *columns, num_held_out, broken)
            buffer_size = data_args.shuffle_buffer_size
            return StreamedImages(stream, first, resolution, buckets, broken, buffer_size), held_out
        rows, held_out = load_captioned_data(dataset_name, data_dir, *columns, hold_out=num_held_out > 0)
        return CaptionedImages(rows, resolution, buckets, broken), held_out

    if data_args.has_high_res_data:
        train_data, _ = load(data_args.dataset_name, train_data_dir, model_args.resolutions[0], num_held_out=0)
        high_res_data, held_out = load(data_args.high_res_dataset_name, data_args.high_res_data_dir, final_resolution)
    else:
        train_data, held_out = load(data_args.dataset_name, train_data_dir, final_resolution)
        high_res_data = train_data
        if data_args.num_high_res_images is not None:
            chosen = np.random.default_rng(args.seed).permutation(len(train_data))
            high_res_data = train_data.select(chosen[: data_args.num_high_res_images])
    validation_data = CaptionedImages(held_out, final_resolution, broken=broken)
    if data_args.has_high_res_data and not data_args.streaming:
        if known := set(validation_data.captions) & set(train_data.captions):
            logger.warning(
                f"Of {len(known)} held-out images the caption is in the core's data, too: if the image is, held-out losses "
                "will be too good."
            )
    return train_data, high_res_data, validation_data


def take_fingerprint(*sets: CaptionedImages) -> str:
    """Of their captions in order: a run goes on with the same data only if it finds the same ones."""
    digest = hashlib.sha256()
    for images in sets:
        for caption in images.captions:
            digest.update(f"{caption}\0".encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def keep_embeddings(run: Run, pipeline: GreedyGrowPipeline) -> TextEmbeddings:
    """
    The embeddings of all captions, of which every process computes its share of those that are not there yet. A stream is read
    for them once: what marks that, when all are there, has the names of the data and what is known of it without reading it.
    """
    accelerator, data_args = run.accelerator, run.data_args
    name = name_encoder(pipeline, accelerator.mixed_precision)
    embeddings = TextEmbeddings(Path(data_args.text_embeddings_dir) / name)
    sets = [run.train_data, run.high_res_data] if data_args.has_high_res_data else [run.train_data]
    streams = sets if data_args.streaming else []
    folders = data_args.train_data_dir, data_args.high_res_data_dir
    source = {
        "datasets": [data_args.dataset_name, data_args.high_res_dataset_name],
        "folders": [folder and str(Path(folder).resolve()) for folder in folders],
        "columns": [data_args.image_column, data_args.caption_column],
        "shapes": data_args.on_shapes and [data_args.shapes_objects, data_args.shapes_images, run.args.seed],
        "files and first rows": [[data.stream.num_shards, data.first] for data in streams],
        "fingerprints": [run.fingerprint, take_fingerprint(run.validation_data)],
    }
    if all(gather_object([embeddings.marker(source).exists()])):  # or none skips it: another run may be writing it now
        logger.info(f"All captions have been embedded before: {embeddings.marker(source)} says so.")
        embeddings.reload()
        return embeddings
    text_encoder = pipeline.text_encoder.to(accelerator.device)

    def encode(captions: list[str]) -> dict[str, torch.Tensor]:
        with torch.no_grad(), accelerator.autocast():
            return encode_captions(pipeline, text_encoder, captions, accelerator.device)

    rank, num_processes = accelerator.process_index, accelerator.num_processes
    known = {"", *run.validation_data.captions}
    if not data_args.streaming:
        known.update(*(data.captions for data in sets))
    # Each process reads its own files of a stream: a caption that is in several may be embedded several times.
    own = (data.read_captions(rank, num_processes) for data in streams)
    captions = itertools.chain(sorted(known)[rank::num_processes], *own)
    added = 0
    for caption in captions:  # and those that follow it: parts should be few
        added += embeddings.add(itertools.chain([caption], itertools.islice(captions, EMBEDDED_AT_ONCE - 1)), encode)
        embeddings.reload()
    logger.info(f"{sum(gather_object([added]))} captions embedded; {embeddings.folder} keeps them.")
    if accelerator.is_main_process:  # which has heard from all the others that they are done
        embeddings.mark(source)
    accelerator.wait_for_everyone()
    embeddings.reload()
    return embeddings


# ----------------------------------------------------------------------------------------------------------------------
# The run


def write_shapes_once(
    data_args: DataArguments, model_args: ModelArguments, args: TrainingArguments, output_dir: Path
) -> str:
    """The embedded default: draws the captioned shapes that the arguments describe, unless they are there."""
    size, objects, images = model_args.resolutions[-1], data_args.shapes_objects, data_args.shapes_images
    cells, held_out = model_args.resolutions[0], max(256, data_args.num_scored_images)
    if model_args.core is not None:  # textures as it has learned them
        config = find_core(model_args.core, subfolder="unet", revision=model_args.core_revision)[1]
        cells = (*config.get("inner_sample_sizes", ()), config["sample_size"])[0]
    folder = output_dir / f"shapes-{size}px-{cells}-cells-{objects}-objects-{images}+{held_out}-seed-{args.seed}"
    if not (folder / "validation.parquet").exists():
        logger.info(f"Drawing {images} captioned shapes into {folder}.")
        write_shapes(
            folder,
            num_train=images,
            num_validation=held_out,
            image_size=size,
            max_objects=objects,
            texture_cells=cells,
            seed=args.seed,
        )
    return str(folder)


def find_phases(output_dir: Path) -> list[str]:
    """The names of the phases that an earlier run has finished in `output_dir`, by its `config.yaml`."""
    if not (output_dir / "config.yaml").exists():
        return []
    config = yaml.safe_load((output_dir / "config.yaml").read_text()) or {}
    names = [f"grown-{size}{end}" for size in config.get("resolutions", [])[1:] for end in ("-detail", "")]
    if config.get("core") is None:
        names.append("core")
    return [name for name in names if (output_dir / name / "model_index.json").exists()]


def main(argv: list[str] | None = None) -> None:
    data_args, model_args, args = parse_arguments(sys.argv[1:] if argv is None else argv, __doc__.splitlines()[1])
    output_dir = Path(args.output_dir)
    accelerator = set_up(args)
    set_up_sharding(accelerator, args)

    # 1. The plan
    if model_args.core is not None:
        adopt_core(model_args)
    phases = list_phases(model_args, args)
    plans, text = make_plan(phases, data_args, model_args, args, accelerator)
    logger.info(text)
    if args.plan:
        return
    check_cpu(accelerator)

    # 2. Where it goes, or goes on
    checkpoint = find_start(output_dir, args.resume_from_checkpoint, args.overwrite_output_dir)
    if args.resume_from_checkpoint is not None:
        finished = [plan.name for plan in plans if (output_dir / plan.name).exists()]
        if checkpoint is None and finished:
            raise ValueError(
                f"`resume_from_checkpoint='latest'`: there is no checkpoint in {output_dir / 'checkpoints'}, and to begin "
                f"again would replace {', '.join(finished)}. Grow them further with `--core`, or name another `output_dir`."
            )
        logger.info(f"Going on from {checkpoint}." if checkpoint else f"{output_dir} has no checkpoint yet.")
    replaced = ["checkpoints", "samples", "uploads", *(plan.name for plan in plans)]

    def holds_core(name: str) -> bool:
        core = Path(model_args.core or "").resolve()
        return model_args.core is not None and core.is_relative_to((output_dir / name).resolve())

    if checkpoint is None:
        if any(holds_core(name) for name in replaced):
            raise ValueError(f"`core={model_args.core!r}` would be replaced by this run: name another `output_dir`.")
        check_replaced(output_dir, replaced)
        if args.overwrite_output_dir:  # phases that only the earlier run had go with the others
            replaced += [name for name in find_phases(output_dir) if not holds_core(name)]
    publisher = Publisher(args) if args.push_to_hub and accelerator.is_main_process else None

    # 3. Data
    if data_args.on_shapes:
        with accelerator.main_process_first():
            train_data_dir = write_shapes_once(data_args, model_args, args, output_dir)
    else:
        train_data_dir = data_args.train_data_dir
    broken = BrokenRows(output_dir / "broken_rows.jsonl", data_args.max_broken_share)
    if checkpoint is None and accelerator.is_main_process:
        broken.path.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    train_data, high_res_data, validation_data = load_data(data_args, model_args, args, train_data_dir, broken)
    if data_args.streaming:
        logger.info(f"Images are streamed; {len(validation_data)} held out.")
    else:
        logger.info(
            f"{len(train_data)} images to train the core on, {len(high_res_data)} to train on above its resolution; "
            f"{len(validation_data)} held out."
        )
    captions = data_args.validation_prompts or validation_data.captions[:8]

    run = Run(
        accelerator=accelerator,
        data_args=data_args,
        model_args=model_args,
        args=args,
        train_data=train_data,
        high_res_data=high_res_data,
        validation_data=validation_data,
        output_dir=output_dir,
        plans={plan.name: plan for plan in plans},
        captions=captions,
        fingerprint=None if data_args.streaming else take_fingerprint(train_data, high_res_data, validation_data),
        publisher=publisher,
    )

    # 4. What to start from
    first = 0
    if checkpoint is not None:
        progress = read_progress(checkpoint)
        first = next((i for i, phase in enumerate(phases) if is_of(phase, progress)), -1)
        if first < 0:
            raise ValueError(f"{checkpoint} is of phase {progress['phase']}, which this run does not have.")
        check_changes(checkpoint, progress["config"], run.decisive_config, args.resume_with_changes)
        if progress["step"] > phases[first].steps:
            raise ValueError(
                f"{checkpoint} is after the {phases[first].steps} steps that {phases[first].name} has now."
            )
    start = output_dir / phases[first - 1].name if first > 0 else model_args.core
    if first > 0 and not start.exists():
        raise ValueError(
            f"{checkpoint} goes on from {start}, which is not there: train that phase with the others, in another "
            "`output_dir`, or leave out its steps."
        )
    if start is not None:
        pipeline = load_pipeline(start, model_args.core_revision if start == model_args.core else None)
    else:
        first_captions = itertools.islice(train_data.captions, TOKENIZER_CAPTIONS)
        pipeline = build_core_pipeline(model_args, first_captions, checkpoint)
    warn_of_cut_captions(pipeline, validation_data.captions[:1000])
    set_attention_backend(pipeline.unet, args.attention_backend)  # which fails if it is not installed

    # 5. From here on the folder holds this run
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        claim_output_dir(output_dir, run.config, replaced, checkpoint, args.resume_with_changes)
    start_trackers(accelerator, "grow", run.config)
    if data_args.text_embeddings_dir is not None:
        run.embeddings = keep_embeddings(run, pipeline)

    # 6. The phases. From here on Ctrl-C saves a checkpoint; before, there is nothing to save.
    interrupt, scores = Interrupt(), {}
    if publisher is not None and checkpoint is not None:
        publisher.push_missing(phases[:first], output_dir)
    for phase in phases[first:]:
        if phase.resolution != pipeline.unet.config.sample_size:
            set_seed(args.seed + phase.stage)  # a resumed run grows the same stage
            # A stream has no first images: there it is the held-out ones whose detail is measured.
            data = validation_data if data_args.streaming else high_res_data
            pipeline = grow_pipeline(pipeline, phase, model_args, data)
        train_phase(run, phase, pipeline, checkpoint, interrupt)
        checkpoint = None
        if accelerator.is_main_process:
            if found := broken.found():
                logger.warning(f"{found} broken rows were left out so far: {broken.path} names them.")
            save_pipeline(pipeline, output_dir / phase.name)
            pipeline.to(accelerator.device)
            draw_grids(run, phase, pipeline)
            logger.info(f"{phase.name} is done: {output_dir / phase.name}, images in {output_dir / 'samples.png'}.")
            if data_args.on_shapes and data_args.num_scored_images:
                scores[phase.name] = score_shapes(run, phase, pipeline)
                run.log(phase, phase.steps, **{f"score_{name}": value for name, value in scores[phase.name].items()})
            write_phase_card(run, phase, pipeline, scores.get(phase.name, {}), output_dir / "samples.png")
            if publisher is not None:
                publisher.push_phase(phase, output_dir / phase.name)
        accelerator.wait_for_everyone()
        if accelerator.is_fsdp2 and phase is not phases[-1]:  # the weights are whole on the main process only
            pipeline = load_pipeline(output_dir / phase.name)

    if scores:
        logger.info(format_scores(scores))
    if publisher is not None:
        publisher.wait()
    accelerator.end_training()


if __name__ == "__main__":
    main()
