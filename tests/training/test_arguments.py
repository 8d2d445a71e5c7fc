# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

import re

import pytest
import yaml
from accelerate.utils import LoggerType

from diffusers_greedy_grow.training import parsing
from diffusers_greedy_grow.training.parsing import parse_arguments


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
        ({"hub_steps": 5}, "--hub_steps needs --push_to_hub"),
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
    monkeypatch.setattr(parsing, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
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
