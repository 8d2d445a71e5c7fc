# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

import random
import re
import sys
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest
import yaml
from accelerate.utils import LoggerType

from diffusers_greedy_grow.training.arguments import (
    OF_ONE_LAUNCH,
    PATHS,
    DataArguments,
    LoraArguments,
    ModelArguments,
    TrainingArguments,
)
from diffusers_greedy_grow.training.parsing import parse_arguments, parse_lora_arguments, read_config, split_type
from diffusers_greedy_grow.training.run_folder import claim_output_dir


def test_values_for_each_resolution_or_stage(tmp_path):
    _, model, training = parse_arguments(["--resolutions", "16", "32", "64", "--detail_steps", "7", "5"], "")
    assert training.train_batch_size == [32, 16, 16] and training.detail_steps == [7, 5]
    assert len(training.learning_rate) == 3 and len(model.block_out_channels) == len(training.joint_steps) == 2
    assert training.core_lr_scale == 0.3
    from_scratch = ["--core_steps", "0", "--detail_steps", "0"]
    assert parse_arguments(from_scratch, "")[2].core_lr_scale == 1.0
    assert parse_arguments([*from_scratch, "--core_lr_scale", "0.5"], "")[2].core_lr_scale == 0.5
    _, _, training = parse_arguments(["--resolutions", "16"], "")
    assert training.train_batch_size == [32] and training.detail_steps == []

    config = {"resolutions": [8, 16], "train_batch_size": 6, "learning_rate": "2e-3", "core_steps": 5, "seed": 3}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    _, model, training = parse_arguments(["--config", str(tmp_path / "config.yaml"), "--core_steps", "9"], "")
    assert training.train_batch_size == [6, 6] and training.learning_rate == [2e-3, 2e-3]
    assert model.resolutions == [8, 16] and training.seed == 3 and training.core_steps == 9


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--streaming --num_high_res_images 5", "--num_high_res_images needs data that is not streamed"),
        ("--high_res_data_dir x", "--high_res_data_dir need --dataset_name or --train_data_dir"),
        ("--high_res_data_dir x --train_data_dir y --num_high_res_images 5", "and no --num_high_res_images"),
        ("--train_data_dir x --high_res_dataset_name y --high_res_data_dir z", "--high_res_data_dir z: name only one"),
        ("--aspect_ratio_buckets 16x16", '--aspect_ratio_buckets 16x16: .* Write "64,64;48,80;80,48"'),
        ("--max_broken_share 1", "--max_broken_share 1.0: must be from 0 to 0.99"),
        ("--shuffle_buffer_size 0", "--shuffle_buffer_size 0: must be at least 1"),
        ("--text_embeddings_dir x", "--text_embeddings_dir needs a text encoder that does not train"),
    ],
)
def test_data_that_cannot_be_had(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(flags.split(), "")
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"resolutions": [8, 12]}, "12 is not a larger multiple of 8"),
        ({"detail_steps": [1, 2]}, "--detail_steps.*it takes at most 1"),
        ({"block_out_channels": "8;9"}, "write numbers with commas"),
        ({"resolutions": [0, 64]}, r"--resolutions \[0, 64\]"),
        ({"ema_decay": 1.5}, "--ema_decay 1.5: must be from 0 to 1"),
        ({"caption_dropout": 2}, "--caption_dropout 2.0: must be from 0 to 1"),
        ({"max_sequence_length": 0}, "--max_sequence_length 0: must be at least 1"),
        ({"core_revision": "core"}, "--core_revision core: needs --core"),
        ({"variant": "fp16"}, "--variant fp16: needs --core"),
        ({"hub_steps": 5}, "--hub_steps needs --push_to_hub"),
        ({"core_dropout": 1}, "--core_dropout 1.0: must be from 0 to 0.99"),
        (
            {"keep_best": True, "num_validation_images": 0},
            "--keep_best needs held-out images, and --num_validation_images 0 leaves none",
        ),
        ({"init": "zero"}, '--init zero: choose "preserve" or "random"'),
        ({"learning_rat": 1}, "learning_rat"),
        ({"logging_steps": 0}, "--logging_steps 0: must be at least 1"),
        ({"core_steps": 0}, "--core_steps 0: to train from scratch, name two --resolutions and --detail_steps 0"),
        ({"num_high_res_images": 0}, "--num_high_res_images 0: must be at least 1"),
        ({"core": "x", "detail_steps": 0, "joint_steps": 0}, "There is nothing to train"),
        ({"core_steps": 0, "detail_steps": 0, "joint_steps": 0}, "There is nothing to train"),
        (
            {"loss_weighting": ["velocity", "snr"]},
            r"--loss_weighting .* choose from velocity, clean, sigmoid, sigma_sqrt, cosmap",
        ),
        ({"joint_steps": -3}, r"--joint_steps \[-3\]: must be at least 0"),
        ({"train_batch_size": [4, 0]}, r"--train_batch_size \[4, 0\]: must be at least 1"),
        ({"learning_rate": [1e-3, -1e-3]}, r"--learning_rate \[0.001, -0.001\]: must be at least 0"),
        ({"num_inference_steps": 0}, "--num_inference_steps 0: must be at least 1"),
        ({"lr_scheduler": "cosin"}, "--lr_scheduler cosin: choose one of linear, cosine"),
        ({"lr_scheduler": "piecewise_constant"}, "--lr_scheduler piecewise_constant: choose one of linear, cosine"),
        ({"report_to": "wandbee"}, "--report_to wandbee: choose one of all, .*wandb"),
        ({"attention_backend": "flush"}, "--attention_backend flush: choose one of .*native"),
        ({"core_stpes": 3}, "unrecognized arguments: --core_stpes 3. Did you mean --core_steps"),
        ({"compile": "all"}, "--compile all: choose one of blocks, model"),
        ({"sample_steps": 0}, "--sample_steps 0: must be at least 1"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    flags = []
    for name, value in arguments.items():
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    with pytest.raises((SystemExit, ValueError)) as stopped:
        parse_arguments(flags, "")
    assert re.search(message, capsys.readouterr().err + str(stopped.value), re.DOTALL)


def test_a_tracker_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    for name in ("tensorboard", "all"):
        assert parse_arguments(["--report_to", name], "")[2].report_to == name
    with pytest.raises(SystemExit):
        parse_arguments(["--report_to", "wandb"], "")
    assert "--report_to wandb: install the package wandb, or leave this out" in capsys.readouterr().err


def test_unknown_names_in_a_config_file(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("core_stepps: 3\n")
    with pytest.raises(SystemExit):
        parse_arguments(["--config", str(tmp_path / "config.yaml")], "")
    assert "has unknown arguments: ['core_stepps']" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Configuration files


def read(folder: Path, text: str, *flags: str):
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    return parse_arguments(["--config", str(folder / "config.yaml"), *flags], "")


def test_yaml_values_have_the_types_of_their_fields(tmp_path):
    text = """
mixed_precision: no
validation_prompts: [yes, no, null, ~, 12:30:45, 1e3, 010, 2024-01-01, --a dash, "", on]
hub_model_id: 1_0
hub_license: null
attention_backend: ~
image_column: off
caption_column: 007
learning_rate: [1e-3, .5e-2]
max_grad_norm: .inf
seed: 0x10
streaming: on
push_to_hub: off
plan: yes
train_batch_size: 6
block_out_channels: 64
core_steps: 1_000
output_dir:
"""
    data, model, training = read(tmp_path, text)
    assert training.mixed_precision == "no"
    prompts = ["yes", "no", "null", "~", "12:30:45", "1e3", "010", "2024-01-01", "--a dash", "", "on"]
    assert data.validation_prompts == prompts
    assert training.hub_model_id == "1_0" and training.hub_license is None and training.attention_backend is None
    assert data.image_column == "off" and data.caption_column == "007"
    assert training.learning_rate == [1e-3, 5e-3] and training.max_grad_norm == float("inf")
    assert training.seed == 16 and data.streaming is True and training.push_to_hub is False and training.plan is True
    assert training.train_batch_size == [6, 6] and model.block_out_channels == ["64"]
    assert training.core_steps == 1000 and training.output_dir == "output"
    assert read(tmp_path, text, "--validation_prompts", "one", "two")[0].validation_prompts == ["one", "two"]
    assert read(tmp_path, text, "--mixed_precision", "bf16")[2].mixed_precision == "bf16"
    assert read(tmp_path, "\ufeffseed: 3")[2].seed == 3 and read(tmp_path, "")[2].seed == 0


@pytest.mark.parametrize(
    "text,message",
    [
        ("seed: 1\nseed: 2", "seed is there 2 times"),
        ("seed: 1.5", "seed: '1.5' is not a whole number"),
        ("seed: [1, 2]", "seed takes a single value"),
        ("streaming: 7", "streaming: '7' is not true or false"),
        ("learning_rate: [fast]", "learning_rate: 'fast' is not a number"),
        ("validation_prompts: [{a: b}]", "validation_prompts takes a single value"),
        ("- seed", "write one argument and its value per line"),
        ("seed: [", "this is not YAML"),
        ("config: other.yaml", "unknown arguments: ['config']"),
        ("seed: 1\n\tseed: 2", "found character '\\t' that cannot start any token"),
        ("seed: " + "[" * 3000, "this is not YAML"),
    ],
)
def test_bad_config_files(text, message, tmp_path, capsys):
    """They end a run in one line."""
    with pytest.raises(SystemExit) as stopped:
        read(tmp_path, text)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1


def test_a_config_file_that_is_not_there(capsys):
    for flags in (["--config", "nowhere.yaml"], ["--core_stepps", "3"], ["--config"]):
        with pytest.raises(SystemExit) as stopped:
            parse_arguments(flags, "")
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and flags["nowhere.yaml" in flags] in error and error.count("\n") == 1


@pytest.mark.parametrize("name", sorted(PATHS - {"pretrained_model_name_or_path"}))
def test_paths_are_expanded(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", str(tmp_path / "there"))
    high_res = ["--train_data_dir", "x"]
    needed = {
        "high_res_data_dir": high_res,
        "high_res_dataset_name": high_res,
        "core_predictions_dir": ["--cache_core_predictions", "2", "--joint_steps", "0"],
        "text_embeddings_dir": ["--text_encoder", "x"],
    }
    for given, path in (
        ("~/a", tmp_path / "a"),
        ("$WHERE/a", tmp_path / "there" / "a"),
        ("${WHERE}b", f"{tmp_path}/thereb"),
    ):
        found = parse_arguments([f"--{name}", given, *needed.get(name, [])], "")
        from_file = read(
            tmp_path, f"{name}: {given}" if given[0] != "~" else f'{name}: "{given}"', *needed.get(name, [])
        )
        for arguments in (found, from_file):
            assert str(path) in [getattr(part, name, None) for part in arguments]
    monkeypatch.delenv("WHERE")
    for path, message in (
        ("$WHERE/a", "the environment variable $WHERE is not set"),
        ("~nobody-here/a", "the user ~nobody-here is not known here. A folder of that name is ./~nobody-here/a"),
    ):
        with pytest.raises(SystemExit):
            parse_arguments([f"--{name}", path, *needed.get(name, [])], "")
        assert f"--{name} {path}: {message}" in capsys.readouterr().err


def test_flags_of_a_file_beside_the_script_are_not_read(tmp_path, monkeypatch):
    (tmp_path / "grow.args").write_text("--seed 5", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "grow.py")])
    assert parse_arguments([], "")[2].seed == 0


TEXTS = [
    "no",
    "yes",
    "null",
    "~",
    "",
    " ",
    "1",
    "1e3",
    "0x1F",
    "12:30",
    "--seed",
    "# a",
    "a: b",
    "[a]",
    "{a}",
    "'",
    '"',
    "-",
]
SIGNS = "aB9 \t\n\r'\"\\:#-?[]{},&*!|>%@`~$=<\x00\x07\x85\xa0\xad\u2028\u2029\ufeff\ufffe\uffff\udc80äя日😀\U0010ffff"


def draw_text(rng: random.Random) -> str:
    return rng.choice(TEXTS) if rng.random() < 0.3 else "".join(rng.choices(SIGNS, k=rng.randrange(120)))


def draw_value(rng: random.Random, kind):
    kind, *optional = split_type(kind)
    if optional and rng.random() < 0.2:
        return None
    if get_origin(kind) is list:
        return [draw_value(rng, *get_args(kind)) for _ in range(rng.randrange(4))]
    return {
        str: lambda: draw_text(rng),
        bool: lambda: rng.random() < 0.5,
        int: lambda: rng.randrange(-(10**12), 10**12),
        float: lambda: rng.choice([rng.uniform(-3, 3) * 10.0 ** rng.randrange(-300, 300), float("inf"), 0.0, 1e-5]),
    }[kind]()


@pytest.mark.parametrize("classes", [(DataArguments, ModelArguments, TrainingArguments), (LoraArguments,)])
def test_a_config_that_a_run_writes_reads_back_to_the_same_arguments(classes, tmp_path):
    kinds = {name: kind for cls in classes for name, kind in get_type_hints(cls).items() if name not in OF_ONE_LAUNCH}
    for seed in range(60):
        rng = random.Random(seed)
        config = {name: draw_value(rng, kind) for name, kind in kinds.items()}
        claim_output_dir(tmp_path, config, [], None, False)
        assert read_config(tmp_path / "config.yaml", classes) == config


# ----------------------------------------------------------------------------------------------------------------------
# What would fail later fails at the start


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--seed -1", "--seed -1: must be from 0 to 4294967294"),
        ("--seed 4294967295", "--seed 4294967295: must be from 0 to 4294967294"),  # seeds the stage by one more
        ("--seed 4294967294 --resolutions 8 16 32", "must be from 0 to 4294967293"),
        ("--seed 4294967296 --resolutions 8", "must be from 0 to 4294967295"),
        ("--adam_beta2 1", "--adam_beta2 1.0: must be below 1"),
        ("--optimizer sgd", "--optimizer sgd: choose one of muon, adamw"),
        ("--mixed_precision False", "--mixed_precision False: choose one of no, bf16, fp16"),
        ("--lr_scheduler polynomial --learning_rate 1e-3 0", "with --lr_scheduler polynomial it must be above 1e-7"),
        ("--learning_rate inf", r"--learning_rate \[inf, inf\]: must be finite"),
        ("--logit_mean 0 nan", r"--logit_mean \[0.0, nan\]: must be finite"),
        ("--logit_mean 1e300", r"--logit_mean \[1e.300, 1e.300\]: must be from -20 to 20"),
        ("--guidance_scale nan", "--guidance_scale nan: must be finite"),
        ("--core_lr_scale inf", "--core_lr_scale inf: must be finite"),
        ("--max_grad_norm nan", "--max_grad_norm nan: must be"),
        ("--shapes_images 0", "--shapes_images 0: must be at least 1"),
        ("--layers_per_block 0", "--layers_per_block 0: must be at least 1"),
        ("--hub_model_id a//b", "--hub_model_id a//b: "),
        ("--image_column text", "--image_column and --caption_column text: name two columns"),
        ("--dataset_name a --train_data_dir b", "--dataset_name a and --train_data_dir b: name only one"),
        ("--output_dir FILE/run", "--output_dir .*FILE/run: .*FILE is a file, not a folder"),
        ("--text_encoder x --text_embeddings_dir FILE", "--text_embeddings_dir .*FILE: .*FILE is a file"),
    ],
)
def test_what_would_fail_later_is_refused_at_the_start(flags, message, tmp_path, capsys):
    (tmp_path / "FILE").write_text("", encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(flags.replace("FILE", str(tmp_path / "FILE")).split(), "")
    assert stopped.value.code == 2 and re.search(message, capsys.readouterr().err.replace("\n", " "))


def test_the_largest_seeds_are_accepted():
    assert parse_arguments(["--seed", str(2**32 - 2)], "")[2].seed == 2**32 - 2
    assert parse_arguments(["--seed", str(2**32 - 1), "--resolutions", "8"], "")[2].seed == 2**32 - 1
    assert parse_arguments(["--max_grad_norm", "inf"], "")[2].max_grad_norm == float("inf")


@pytest.mark.parametrize("cls", [DataArguments, ModelArguments, TrainingArguments])
def test_no_text_may_be_empty(cls, capsys):
    for name, kind in get_type_hints(cls).items():
        if str in split_type(kind):
            with pytest.raises(SystemExit):
                parse_arguments([f"--{name}", " "], "")
            assert f"--{name} ' ': must not be empty" in capsys.readouterr().err


@pytest.mark.parametrize("cls", [DataArguments, TrainingArguments])
def test_no_text_may_be_bytes_of_another_encoding(cls, capsys):
    for name, kind in get_type_hints(cls).items():
        if str in split_type(kind) or list[str] in split_type(kind):
            with pytest.raises(SystemExit):
                parse_arguments([f"--{name}", "gr\udcfcn"], "")
            assert re.search(rf"--{name} \[?'gr\\udcfcn'[^:]*: must be text in UTF-8", capsys.readouterr().err)


def test_a_run_without_stages_grows_from_its_own_config(tmp_path):
    """Its lists with a value per stage are empty; with a stage, they have their defaults again."""
    training = read(tmp_path, "resolutions: [16]\ndetail_steps: []\n", "--resolutions", "16", "64")[2]
    assert training.detail_steps == [600]


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--seed 4294967296", "--seed 4294967296: must be from 0 to 4294967295"),
        ("--lora_alpha 0", "--lora_alpha 0.0: must not be 0"),
        ("--optimizer muon", "unrecognized arguments: --optimizer muon"),  # the matrices of an adapter are thin
        ("--learning_rate inf", "--learning_rate inf: must be finite"),
        ("--logit_std -1", "--logit_std -1.0: must be from 0 to 20"),
        ("--lr_scheduler polynomial --learning_rate 0", "it must be above 1e-7"),
    ],
)
def test_what_would_fail_later_in_train_lora(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse_lora_arguments(["--pretrained_model_name_or_path", "x", *flags.split()], "")
    assert message in capsys.readouterr().err
