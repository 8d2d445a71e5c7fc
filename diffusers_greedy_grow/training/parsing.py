# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""TODO"""

import argparse
import math
import warnings
from pathlib import Path

import yaml
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.optimization import SchedulerType
from diffusers.training_utils import parse_buckets_string
from transformers import HfArgumentParser

from .arguments import DataArguments, ImageArguments, LoraArguments, ModelArguments, TrainingArguments
from .objective import WEIGHTINGS


def parse_dataclasses(classes: tuple, argv: list[str], description: str) -> tuple[HfArgumentParser, list]:
    """Reads flags over the YAML file that `--config` names over the defaults, and returns an instance of each class."""
    parser = HfArgumentParser(classes, description=description, allow_abbrev=False)
    parser.add_argument("--config", help="A YAML file with any of these arguments; flags win.")
    config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("--config")
    path = config.parse_known_args(argv)[0].config
    if path is not None:
        values = yaml.safe_load(Path(path).read_text()) or {}
        unknown = set(values) - {action.dest for action in parser._actions}
        if unknown:
            parser.error(f"{path} has unknown arguments: {sorted(unknown)}")
        flags = []
        for name, value in values.items():
            if isinstance(value, list) and value:
                flags += [f"--{name}", *map(str, value)]
            elif value is not None and value != []:
                flags.append(f"--{name}={value}")
        argv = [*flags, *argv]  # the last one of a name wins
    *instances, _ = parser.parse_args_into_dataclasses(argv)
    return parser, instances


def check_ranges(parser: HfArgumentParser, *rules: tuple) -> None:
    """Stops at an argument out of its range; each rule is its owner, its name, and the least and the largest value."""
    for owner, name, low, high in rules:
        value = getattr(owner, name)
        if not all(one is None or low <= one <= high for one in (value if isinstance(value, list) else [value])):
            span = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            parser.error(f"--{name} {value}: must be {span}.")


def check_common(parser: HfArgumentParser, images: ImageArguments, loop: "TrainingArguments | LoraArguments") -> None:
    """Stops at a value that no training can have."""
    check_ranges(
        parser,
        (loop, "train_batch_size", 1, math.inf),
        (loop, "learning_rate", 0, math.inf),
        (loop, "logit_std", 0, math.inf),
        (loop, "validation_steps", 1, math.inf),
        (loop, "logging_steps", 1, math.inf),
        (loop, "checkpointing_steps", 1, math.inf),
        (loop, "checkpoints_total_limit", 1, math.inf),
        (loop, "num_inference_steps", 1, math.inf),
        (loop, "gradient_accumulation_steps", 1, math.inf),
        (loop, "ema_decay", 0, 1),
        (loop, "adam_beta2", 0, 1),
        (images, "caption_dropout", 0, 1),
        (images, "dataloader_num_workers", 0, math.inf),
        (images, "max_broken_share", 0, 0.99),
        (loop, "max_grad_norm", 0, math.inf),
        (loop, "spike_factor", 1, math.inf),
        (loop, "max_skipped_steps", 0, math.inf),
        (loop, "lr_warmup_steps", 0, math.inf),
        (loop, "adam_weight_decay", 0, math.inf),
    )
    choices = {
        # All but the one that needs rules.
        "lr_scheduler": [kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT],
        "attention_backend": [backend.value for backend in AttentionBackendName],
        "report_to": LoggerType.list(),
    }
    for name, values in choices.items():
        if getattr(loop, name) not in (None, *values):
            parser.error(f"--{name} {getattr(loop, name)}: choose one of {', '.join(values)}.")
    if loop.report_to not in (None, "all", *(tracker.value for tracker in get_available_trackers())):
        parser.error(f"--report_to {loop.report_to}: install the package {loop.report_to}, or leave this out.")
    if loop.hub_private_repo and not loop.push_to_hub:
        parser.error("--hub_private_repo needs --push_to_hub.")


def parse_arguments(argv: list[str], description: str) -> tuple[DataArguments, ModelArguments, TrainingArguments]:
    """The arguments of `grow.py`, by [`parse_dataclasses`], with everything checked that can be checked now."""
    classes = (DataArguments, ModelArguments, TrainingArguments)
    parser, (data, model, training) = parse_dataclasses(classes, argv, description)

    sizes = model.resolutions
    for smaller, larger in zip(sizes, sizes[1:]):
        if smaller < 1 or larger <= smaller or larger % smaller:
            parser.error(f"--resolutions {sizes}: {larger} is no larger multiple of {smaller}.")
    for owner, name, count in (
        (model, "block_out_channels", len(sizes) - 1),
        (training, "detail_steps", len(sizes) - 1),
        (training, "joint_steps", len(sizes) - 1),
        (training, "train_batch_size", len(sizes)),
        (training, "learning_rate", len(sizes)),
        (training, "logit_mean", len(sizes)),
        (training, "logit_std", len(sizes)),
        (training, "loss_weighting", len(sizes)),
    ):
        given, default = getattr(owner, name), type(owner).__dataclass_fields__[name].default_factory()
        if len(given) > count and given != default:
            parser.error(f"--{name} {given}: with --resolutions {sizes} it takes at most {count}.")
        setattr(owner, name, (given + given[-1:] * count)[:count])
    try:
        [parse_channels(channels) for channels in model.block_out_channels]
    except ValueError:
        parser.error(f'--block_out_channels {model.block_out_channels}: write numbers with commas, such as "64,128".')
    check_common(parser, data, training)
    if training.core_lr_scale is None:
        training.core_lr_scale = 0.3 if model.core is not None or training.core_steps else 1.0
    check_ranges(
        parser,
        (data, "shapes_objects", 1, 3),
        (data, "num_high_res_images", 1, math.inf),
        (data, "num_validation_images", 0, math.inf),
        (data, "num_scored_images", 0, math.inf),
        (data, "shuffle_buffer_size", 1, math.inf),
        (model, "resolutions", 1, math.inf),
        (model, "max_sequence_length", 1, math.inf),
        (model, "text_num_layers", 1, math.inf),
        (model, "text_hidden_size", 1, math.inf),
        (training, "plan_processes", 1, math.inf),
        (training, "core_steps", 0, math.inf),
        (training, "detail_steps", 0, math.inf),
        (training, "joint_steps", 0, math.inf),
        (training, "core_lr_scale", 0, math.inf),
        (training, "sample_steps", 1, math.inf),
        (training, "hub_steps", 1, math.inf),
        (training, "low_res_loss_weight", 0, math.inf),
        (training, "low_res_share", 0, 0.9),
    )
    if model.core_revision is not None and model.core is None:
        parser.error(f"--core_revision {model.core_revision}: needs --core.")
    if model.core is None and training.core_steps < 1 and (len(sizes) != 2 or training.detail_steps[0]):
        parser.error(
            f"--core_steps {training.core_steps}: to train from scratch, name two --resolutions and --detail_steps 0."
        )
    for batch_size, steps in zip(training.train_batch_size[1:], training.joint_steps):
        if training.low_res_share and steps and not 0 < round(training.low_res_share * batch_size) < batch_size:
            parser.error(
                f"--low_res_share {training.low_res_share}: of --train_batch_size {batch_size} that is none or all; take a larger "
                "batch or another share."
            )
    if data.has_high_res_data and (data.on_shapes or data.num_high_res_images is not None):
        parser.error(
            "--high_res_dataset_name and --high_res_data_dir need --dataset_name or --train_data_dir for the core, and no "
            "--num_high_res_images."
        )
    if data.high_res_dataset_name is not None and data.high_res_data_dir is not None:
        parser.error(
            f"--high_res_dataset_name {data.high_res_dataset_name} and --high_res_data_dir {data.high_res_data_dir}: name only one."
        )
    if data.streaming and data.num_high_res_images is not None:
        parser.error("--num_high_res_images needs data that is not streamed: leave out --streaming.")
    if data.text_embeddings_dir is not None and model.text_encoder == "small" and model.core is None:
        parser.error(
            "--text_embeddings_dir needs a text encoder that does not train: name a pretrained --text_encoder, or a --core."
        )
    if data.aspect_ratio_buckets is not None:
        try:
            parse_buckets(data.aspect_ratio_buckets)
        except ValueError as error:
            parser.error(f'--aspect_ratio_buckets {data.aspect_ratio_buckets}: {error} Write "64,64;48,80;80,48".')
    if not sum(training.detail_steps + training.joint_steps) and (model.core is not None or not training.core_steps):
        parser.error("There is nothing to train: name the steps of a phase and, with --core, a larger resolution.")
    if training.hub_steps is not None and not training.push_to_hub:
        parser.error("--hub_steps needs --push_to_hub.")
    if not {*training.loss_weighting} <= {*WEIGHTINGS}:
        parser.error(f"--loss_weighting {training.loss_weighting}: choose of {', '.join(WEIGHTINGS)}.")
    if model.init == "random" and training.low_res_share:
        parser.error(
            f"--low_res_share {training.low_res_share}: with --init random, the core draws no images of its own."
        )
    if model.init not in ("preserve", "random"):
        parser.error(f'--init {model.init}: choose "preserve" or "random".')
    if model.init == "random" and len(sizes) > 2:
        parser.error(f"--init random grows one stage, not the {len(sizes) - 1} of --resolutions {sizes}.")
    return data, model, training


def parse_lora_arguments(argv: list[str], description: str) -> LoraArguments:
    """The arguments of `train_lora.py`, checked as far as they can be without the model."""
    parser, (args,) = parse_dataclasses((LoraArguments,), argv, description)
    check_common(parser, args, args)
    check_ranges(parser, *((args, name, 1, math.inf) for name in ("rank", "max_train_steps", "resolution")))
    if args.loss_weighting not in (None, *WEIGHTINGS):
        parser.error(f"--loss_weighting {args.loss_weighting}: choose one of {', '.join(WEIGHTINGS)}.")
    return args


def parse_channels(channels: str) -> tuple[int, ...]:
    return tuple(int(count) for count in str(channels).split(","))


def parse_buckets(buckets: str) -> list[tuple[int, int]]:
    """
    Heights and widths from text.

    Raises:
        `ValueError`: if it does not say any.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sides that 8 does not divide; the model's own condition is checked
        return parse_buckets_string(buckets)
