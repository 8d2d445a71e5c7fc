# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
Reads the arguments of `training_examples/`, from flags over a YAML file over defaults, and stops with a message of the parser
at values that cannot work, alone or together.

Libraries that import torch are imported where they are needed, so that `--help` and a misspelt flag are answered at once.
"""

import argparse
import dataclasses
import difflib
import math
import os
import re
import sys
import types
import typing
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers.hf_argparser import HfArgumentParser, string_to_bool

from .arguments import (
    COMPILATION,
    DEFAULT_JOINT_STEPS,
    OPTIMIZERS,
    PATHS,
    PRECISIONS,
    UNLIMITED,
    WEIGHTINGS,
    DataArguments,
    ImageArguments,
    LoraArguments,
    ModelArguments,
    TrainingArguments,
)


def parse_arguments(argv: list[str], description: str) -> tuple[DataArguments, ModelArguments, TrainingArguments]:
    """
    Return the arguments of `grow.py`, read by [`parse_dataclasses`] and checked as far as they can be without data or models.
    Lists with a value per resolution or stage are filled up to full length.
    """
    classes = (DataArguments, ModelArguments, TrainingArguments)
    parser, (data, model, training) = parse_dataclasses(classes, argv, description)
    check_resolutions(parser, model)
    fill_lists(parser, model, training)
    if training.joint_steps is None and model.core is None:  # else it depends on the core, which is read later
        training.joint_steps = [DEFAULT_JOINT_STEPS] * (len(model.resolutions) - 1)
    check_texts_and_numbers(parser, data, model, training)
    check_common(parser, data, training)
    if training.core_lr_scale is None:
        training.core_lr_scale = 0.3 if model.core is not None or training.core_steps else 1.0
    check_grow_ranges(parser, data, model, training)
    check_data(parser, data, model)
    check_model(parser, model)
    check_phases(parser, model, training)
    if find_spec("matplotlib") is None and not training.plan:
        parser.error('Loss curves need matplotlib: pip install "diffusers-greedy-grow[train]"')
    if training.keep_best and not data.num_validation_images:
        parser.error(
            "--keep_best needs held-out images, and --num_validation_images 0 leaves none: raise it, or leave out --keep_best."
        )
    return data, model, training


def parse_lora_arguments(argv: list[str], description: str) -> LoraArguments:
    """Return the arguments of `train_lora.py`, checked as far as they can be without data or models."""
    parser, (args,) = parse_dataclasses((LoraArguments,), argv, description)
    check_texts_and_numbers(parser, args)
    check_common(parser, args, args)
    check_seed(parser, args.seed)
    check_ranges(parser, *((args, name, 1, math.inf) for name in ("rank", "max_train_steps", "resolution")))
    if args.loss_weighting not in (None, *WEIGHTINGS):
        parser.error(f"--loss_weighting {args.loss_weighting}: choose one of {', '.join(WEIGHTINGS)}.")
    if args.lora_alpha == 0:
        parser.error("--lora_alpha 0.0: must not be 0, by which the adapter's output is multiplied.")
    args.lora_layers = args.lora_layers or None
    return args


class Parser(HfArgumentParser):
    """Stops with one line at an error, and not with all flags there are above it."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
        sys.exit(2)


def parse_dataclasses(classes: tuple, argv: list[str], description: str) -> tuple[HfArgumentParser, list]:
    """Read flags over the YAML file that `--config` names over the defaults, and return an instance of each class."""
    parser = Parser(classes, description=description, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file with any of these arguments. Flags override it.")
    parser.add_argument("--debug", action="store_true", help="Show where in the code an error happened.")
    config = Parser((), add_help=False, allow_abbrev=False)
    config.add_argument("--config")
    path = config.parse_known_args(argv)[0].config
    if path is not None:
        try:
            values = read_config(Path(expand_path(path)), classes)
        except (OSError, ValueError) as error:
            parser.error(f"--config {path}: {error}")
        parser.set_defaults(**values)
        for action in parser._actions:
            action.required = action.required and action.dest not in values
    *instances, _, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        nearest = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
        hint = f". Did you mean {nearest[0]}?" if nearest else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    for instance in instances:
        for name in PATHS & {field.name for field in dataclasses.fields(instance)}:
            if getattr(instance, name) is not None:
                try:
                    setattr(instance, name, expand_path(getattr(instance, name)))
                except ValueError as error:
                    parser.error(f"--{name} {getattr(instance, name)}: {error}")
    return parser, instances


# ----------------------------------------------------------------------------------------------------------------------
# Configuration files


class Null(str):
    """An entry that YAML reads as null, as it is written: None for a field that may be None, text in a list of texts."""


class TextLoader(yaml.SafeLoader):
    """Reads each scalar as its text: what `no` or `1e-3` is depends on the field. Refuses a key that is there twice."""

    yaml_implicit_resolvers = {
        first: [
            (tag, regexp) for tag, regexp in resolvers if tag in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_document(self, node: yaml.Node) -> Any:
        keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"{key} is there {keys.count(key)} times.")
        return super().construct_document(node)


TextLoader.add_constructor("tag:yaml.org,2002:null", lambda loader, node: Null(node.value))


def read_config(path: Path, classes: tuple) -> dict[str, Any]:
    """
    Return the values of a YAML file, each with the type of its field.

    Raises:
        `OSError`, `ValueError`: if the file cannot be read, or has unknown arguments or values of other types.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), TextLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"this is not YAML: {error}") from error
    if values is None or isinstance(values, Null):
        return {}
    if not isinstance(values, dict):
        raise ValueError("write one argument and its value per line, such as `seed: 1`.")
    types_ = {name: kind for cls in classes for name, kind in typing.get_type_hints(cls).items()}
    unknown = set(values) - set(types_)
    if unknown:
        raise ValueError(f"the file has unknown arguments: {sorted(map(str, unknown))}")
    typed = {}
    for name, value in values.items():
        kinds = split_type(types_[name])
        if not isinstance(value, Null):
            typed[name] = convert(name, value, kinds[0])
        elif types.NoneType in kinds:
            typed[name] = None  # and for a field that cannot be None, the default
    return typed


def split_type(kind: Any) -> tuple:
    """Return the members of a union such as `int | None`, or the type itself."""
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def convert(name: str, value: Any, kind: Any) -> Any:
    """Return the text `value` of a YAML file, or a list of texts, as the `kind` of its field."""
    if typing.get_origin(kind) is list:
        (inner,) = typing.get_args(kind)
        return [convert(name, one, inner) for one in (value if isinstance(value, list) else [value])]
    if isinstance(value, (list, dict)) or value is None:
        raise ValueError(f"{name} takes a single value, not {value}.")
    text = str(value)
    try:
        if kind is bool:
            return (
                {"on": True, "off": False}.get(text.lower()) if text.lower() in ("on", "off") else string_to_bool(text)
            )
        if kind is int:
            return int(text, 0) if re.match(r"[+-]?0[xob]", text) else int(text)
        if kind is float:
            return float(re.sub(r"^([+-]?)\.(inf|nan)$", r"\1\2", text, flags=re.IGNORECASE))
    except (ValueError, argparse.ArgumentTypeError) as error:
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise ValueError(f"{name}: {text!r} is not {wanted}.") from error
    return text


def expand_path(path: str) -> str:
    """
    Return a path with `~` and `$VAR` expanded.

    Raises:
        `ValueError`: if a variable is not set, or a user is not known.
    """
    expanded = os.path.expanduser(os.path.expandvars(path))
    if expanded.startswith("~") and not os.path.exists(expanded):
        raise ValueError(
            f"the user {expanded.split('/')[0]} is not known here. A folder of that name is ./{expanded}."
        )
    missing = re.search(r"\$(\w+|\{[^}]*\})", expanded)
    if missing is not None and not os.path.exists(expanded):
        raise ValueError(f"the environment variable {missing[0]} is not set.")
    return expanded


# ----------------------------------------------------------------------------------------------------------------------
# Text with a form of its own


def parse_channels(channels: str) -> tuple[int, ...]:
    """Return the channels of a stage's levels from text such as "64,128"."""
    return tuple(int(count) for count in str(channels).split(","))


def parse_buckets(buckets: str) -> list[tuple[int, int]]:
    """
    Return heights and widths from text such as "64,64;48,80;80,48".

    Raises:
        `ValueError`: if the text has another form.
    """
    with warnings.catch_warnings():
        from diffusers.training_utils import parse_buckets_string

        # diffusers warns of sides that are not a multiple of 8; the models' own condition is checked with the models.
        warnings.simplefilter("ignore")
        return parse_buckets_string(buckets)


# ----------------------------------------------------------------------------------------------------------------------
# Rules for both scripts
def check_ranges(parser: HfArgumentParser, *rules: tuple) -> None:
    """Stop at a value out of its range. Each rule is an instance, a field's name, and its least and its largest value."""
    for owner, name, low, high in rules:
        value = getattr(owner, name)
        if not all(one is None or low <= one <= high for one in (value if isinstance(value, list) else [value])):
            span = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            parser.error(f"--{name} {value}: must be {span}.")


def check_texts_and_numbers(parser: HfArgumentParser, *instances: Any) -> None:
    """Stop at a text that is empty or no Unicode, and at a number that is not finite where that means nothing."""
    for instance in instances:
        for field in dataclasses.fields(instance):
            value = getattr(instance, field.name)
            if isinstance(value, str) and not value.strip():
                parser.error(f"--{field.name} {value!r}: must not be empty.")
            values = value if isinstance(value, list) else [value]
            # As bytes of a command line that are not UTF-8 become: neither tokenizers nor files take them.
            if any(isinstance(one, str) and re.search("[\ud800-\udfff]", one) for one in values):
                parser.error(
                    f"--{field.name} {value!a}: must be text in UTF-8. In a locale without it, set PYTHONUTF8=1."
                )
            numbers = [one for one in values if isinstance(one, float)]
            if field.name not in UNLIMITED and not all(map(math.isfinite, numbers)):
                parser.error(f"--{field.name} {value}: must be finite.")


def check_seed(parser: HfArgumentParser, seed: int, num_stages: int = 0) -> None:
    """Stop at a seed that NumPy does not take. A stage that grows is seeded by the seed plus its number."""
    largest = 2**32 - 1 - num_stages
    if not 0 <= seed <= largest:
        parser.error(f"--seed {seed}: must be from 0 to {largest}.")


def check_folder(parser: HfArgumentParser, name: str, path: str) -> None:
    """Stop at a folder that can be neither used nor made."""
    found = Path(path).absolute()
    while not found.exists() and found != found.parent:
        found = found.parent
    if not found.is_dir():
        parser.error(f"--{name} {path}: {found} is a file, not a folder.")
    if not os.access(found, os.W_OK | os.X_OK):
        parser.error(f"--{name} {path}: you may not write to {found}.")


def check_common(parser: HfArgumentParser, images: ImageArguments, loop: TrainingArguments | LoraArguments) -> None:
    """Stop at a value that neither script can train with."""
    check_ranges(
        parser,
        (loop, "train_batch_size", 1, math.inf),
        (loop, "learning_rate", 0, math.inf),
        (loop, "logit_mean", -20, 20),  # further out, all noise levels round to 0 or 1
        (loop, "logit_std", 0, 20),
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
        (images, "max_image_pixels", 1, math.inf),
        (loop, "max_grad_norm", 0, math.inf),
        (loop, "spike_factor", 1, math.inf),
        (loop, "max_skipped_steps", 0, math.inf),
        (loop, "lr_warmup_steps", 0, math.inf),
        (loop, "adam_weight_decay", 0, math.inf),
    )
    if loop.adam_beta2 == 1:
        parser.error("--adam_beta2 1.0: must be below 1.")
    if loop.mixed_precision not in (None, *PRECISIONS):
        parser.error(f"--mixed_precision {loop.mixed_precision}: choose one of {', '.join(PRECISIONS)}.")
    if images.image_column == images.caption_column:
        parser.error(f"--image_column and --caption_column {images.caption_column}: name two columns.")
    if images.dataset_name is not None and images.train_data_dir is not None:
        parser.error(
            f"--dataset_name {images.dataset_name} and --train_data_dir {images.train_data_dir}: name only one."
        )
    rates = loop.learning_rate if isinstance(loop.learning_rate, list) else [loop.learning_rate]
    if loop.lr_scheduler == "polynomial" and min(rates) <= 1e-7:
        parser.error(f"--learning_rate {loop.learning_rate}: with --lr_scheduler polynomial it must be above 1e-7.")
    if not getattr(loop, "plan", False):
        check_folder(parser, "output_dir", loop.output_dir)
    check_library_choices(parser, loop)
    for name in ("dataset_config_name", "dataset_revision"):
        if getattr(images, name) is not None and images.dataset_name is None:
            parser.error(f"--{name} {getattr(images, name)}: needs --dataset_name.")
    if images.train_split is not None and images.train_split == images.validation_split:
        parser.error(f"--train_split and --validation_split are both {images.train_split}: name different splits.")
    if loop.hub_private_repo and not loop.push_to_hub:
        parser.error("--hub_private_repo needs --push_to_hub.")


def check_library_choices(parser: HfArgumentParser, loop: TrainingArguments | LoraArguments) -> None:
    """Stop at a value that diffusers or accelerate does not know."""
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType
    from diffusers.models.attention_dispatch import AttentionBackendName
    from diffusers.optimization import SchedulerType
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    choices = {
        # `piecewise_constant` needs a schedule of its own, which no argument can give.
        "lr_scheduler": [kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT],
        "attention_backend": [backend.value for backend in AttentionBackendName],
        "compile": list(COMPILATION),
        "report_to": LoggerType.list(),
    }
    for name, values in choices.items():
        if getattr(loop, name) not in (None, *values):
            parser.error(f"--{name} {getattr(loop, name)}: choose one of {', '.join(values)}.")
    if loop.report_to not in (None, "all", *(tracker.value for tracker in get_available_trackers())):
        parser.error(f"--report_to {loop.report_to}: install the package {loop.report_to}, or leave this out.")
    if loop.hub_model_id is not None:
        try:
            validate_repo_id(loop.hub_model_id)
        except HFValidationError as error:
            parser.error(f"--hub_model_id {loop.hub_model_id}: {error}")


# ----------------------------------------------------------------------------------------------------------------------
# Rules for grow.py
def check_resolutions(parser: HfArgumentParser, model: ModelArguments) -> None:
    """Stop unless each resolution is a larger multiple of the one before."""
    if not model.resolutions:
        parser.error("--resolutions: name that of the core, at least.")
    for smaller, larger in zip(model.resolutions, model.resolutions[1:]):
        if smaller < 1 or larger <= smaller or larger % smaller:
            parser.error(f"--resolutions {model.resolutions}: {larger} is not a larger multiple of {smaller}.")


def fill_lists(parser: HfArgumentParser, model: ModelArguments, training: TrainingArguments) -> None:
    """Repeat the last value of each list with a value per resolution or stage, and stop at a list that is too long."""
    num_resolutions = len(model.resolutions)
    num_stages = num_resolutions - 1
    for owner, name, count in (
        (model, "block_out_channels", num_stages),
        (training, "detail_steps", num_stages),
        (training, "joint_steps", num_stages),
        (training, "train_batch_size", num_resolutions),
        (training, "learning_rate", num_resolutions),
        (training, "logit_mean", num_resolutions),
        (training, "logit_std", num_resolutions),
        (training, "loss_weighting", num_resolutions),
    ):
        given, default = getattr(owner, name), getattr(type(owner)(), name)
        if given is not None and len(given) > count and given != default:
            parser.error(f"--{name} {given}: with --resolutions {model.resolutions} it takes at most {count}.")
        given = given or default  # a run without stages writes an empty list to its configuration
        setattr(owner, name, given and (given + given[-1:] * count)[:count])


def check_grow_ranges(
    parser: HfArgumentParser, data: DataArguments, model: ModelArguments, training: TrainingArguments
) -> None:
    """Stop at a value of `grow.py` that is out of its range."""
    check_seed(parser, training.seed, num_stages=len(model.resolutions) - 1)
    check_ranges(
        parser,
        (data, "shapes_objects", 1, 3),
        (data, "shapes_images", 1, math.inf),
        (data, "num_high_res_images", 1, math.inf),
        (data, "num_validation_images", 0, math.inf),
        (data, "num_scored_images", 0, math.inf),
        (data, "shuffle_buffer_size", 1, math.inf),
        (model, "resolutions", 1, math.inf),
        *((model, name, 1, math.inf) for name in ("patch_size", "hidden_size", "num_layers", "num_attention_heads")),
        (model, "layers_per_block", 1, math.inf),
        (model, "core_dropout", 0, 0.99),
        (model, "random_crop", 0.1, 1),
        (model, "max_sequence_length", 1, math.inf),
        (model, "text_num_layers", 1, math.inf),
        (model, "text_hidden_size", 1, math.inf),
        (training, "plan_processes", 1, math.inf),
        (training, "core_steps", 0, math.inf),
        (training, "detail_steps", 0, math.inf),
        (training, "joint_steps", 0, math.inf),
        (training, "core_lr_scale", 0, math.inf),
        (training, "cache_core_predictions", 0, math.inf),
        (training, "sample_steps", 1, math.inf),
        (training, "hub_steps", 1, math.inf),
    )


def check_data(parser: HfArgumentParser, data: DataArguments, model: ModelArguments) -> None:
    """Stop at data arguments that contradict each other."""
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
    if data.text_embeddings_dir is not None:
        check_folder(parser, "text_embeddings_dir", data.text_embeddings_dir)
    if data.aspect_ratio_buckets is not None:
        try:
            parse_buckets(data.aspect_ratio_buckets)
        except ValueError as error:
            parser.error(f'--aspect_ratio_buckets {data.aspect_ratio_buckets}: {error} Write "64,64;48,80;80,48".')


def check_model(parser: HfArgumentParser, model: ModelArguments) -> None:
    """Stop at a model that cannot be built."""
    try:
        [parse_channels(channels) for channels in model.block_out_channels]
    except ValueError:
        parser.error(f'--block_out_channels {model.block_out_channels}: write numbers with commas, such as "64,128".')
    for name in ("core_revision", "variant"):
        if getattr(model, name) is not None and model.core is None:
            parser.error(f"--{name} {getattr(model, name)}: needs --core.")
    if model.init not in ("preserve", "random"):
        parser.error(f'--init {model.init}: choose "preserve" or "random".')
    sizes = model.resolutions
    if model.init == "random" and len(sizes) > 2:
        parser.error(f"--init random grows one stage, not the {len(sizes) - 1} of --resolutions {sizes}.")


def check_phases(parser: HfArgumentParser, model: ModelArguments, training: TrainingArguments) -> None:
    """Stop at phases that cannot follow each other, and at a run without any."""
    if model.core is None and training.core_steps < 1 and (len(model.resolutions) != 2 or training.detail_steps[0]):
        parser.error(
            f"--core_steps {training.core_steps}: to train from scratch, name two --resolutions and --detail_steps 0."
        )
    trains_stages = training.joint_steps is None or sum(training.detail_steps + training.joint_steps) > 0
    if not trains_stages and (model.core is not None or not training.core_steps):
        parser.error("There is nothing to train: name the steps of a phase and, with --core, a larger resolution.")
    if training.core_predictions_dir is not None:
        if not training.cache_core_predictions:
            parser.error(f"--core_predictions_dir {training.core_predictions_dir}: needs --cache_core_predictions.")
        check_folder(parser, "core_predictions_dir", training.core_predictions_dir)
    if training.hub_steps is not None and not training.push_to_hub:
        parser.error("--hub_steps needs --push_to_hub.")
    if training.optimizer not in OPTIMIZERS:
        parser.error(f"--optimizer {training.optimizer}: choose one of {', '.join(OPTIMIZERS)}.")
    if not {*training.loss_weighting} <= {*WEIGHTINGS}:
        parser.error(f"--loss_weighting {training.loss_weighting}: choose from {', '.join(WEIGHTINGS)}.")
