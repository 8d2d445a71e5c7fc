# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The checks of `grow.py` before it trains."""

import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest
from accelerate import PartialState
from transformers import AutoTokenizer, BertConfig, BertModel

from diffusers_greedy_grow.training.arguments import ModelArguments, TrainingArguments
from diffusers_greedy_grow.training.growing import (
    adopt_core,
    build_core_pipeline,
    get_text_hidden_size,
    load_pipeline,
)
from diffusers_greedy_grow.training.parsing import parse_arguments

from ..testing_utils import make_core, make_pipeline
from .launching import GROW, TRAIN_LORA, assert_same_weights, grow_flags, list_files, run, run_script


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"train_data_dir": "nowhere"}, "`train_data_dir='nowhere'` does not exist"),
        (
            {"train_data_dir": str(GROW.parent), "high_res_data_dir": "nowhere"},
            "`high_res_data_dir='nowhere'` does not exist",
        ),
        ({"block_out_channels": "8,8,8,8,8"}, "`block_out_channels=.*between 1 and"),
        ({"core": "nowhere"}, "`core='nowhere'` is not a model"),
        ({"resume_from_checkpoint": "nowhere"}, "'nowhere'` is not a complete checkpoint: there is no such folder"),
        ({"aspect_ratio_buckets": "16,16;18,16"}, "`aspect_ratio_buckets='16,16;18,16'`: 18 is not a multiple of 4"),
    ],
)
def test_bad_arguments(arguments, message, here, tmp_path):
    with pytest.raises((ValueError, OSError), match=f"(?s){message}"):
        here(tmp_path / "output", **arguments)
    assert not (tmp_path / "output").exists()


def test_a_core_of_a_variant(tmp_path):
    make_pipeline().save_pretrained(tmp_path, variant="fp16")
    assert load_pipeline(tmp_path, variant="fp16").unet.num_parameters()
    with pytest.raises(OSError, match="no file named .* pass `variant`: fp16."):
        load_pipeline(tmp_path)


def test_an_earlier_run_is_not_overwritten(finished, data, here, tmp_path):
    """A run that cannot start does not replace an earlier one either."""
    output_dir, _ = finished
    files = list_files(output_dir)
    with pytest.raises(ValueError, match="holds an earlier run.*--resume_from_checkpoint latest"):
        here(output_dir, train_data_dir=data)
    with pytest.raises(ValueError, match="`attention_backend='flash'`: .* install `flash-attn"):
        here(output_dir, train_data_dir=data, overwrite_output_dir=True, attention_backend="flash")
    assert list_files(output_dir) == files
    (tmp_path / "samples").mkdir()
    with pytest.raises(ValueError, match="holds samples, which this run would replace"):
        here(tmp_path, train_data_dir=data, overwrite_output_dir=True)


def test_plan_only(data, tmp_path):
    log = run(tmp_path / "output", train_data_dir=data, plan=True)
    assert "GFLOP/image" in log and "grown-16-detail" in log
    assert not (tmp_path / "output").exists()


# ----------------------------------------------------------------------------------------------------------------------
# A given core


def test_a_run_does_not_replace_the_core_it_grows(finished, data, here, tmp_path):
    shutil.copytree(finished[0] / "core", tmp_path / "grown-16")
    with pytest.raises(
        ValueError, match="`core=.*grown-16'` would be replaced by this run: name another `output_dir`"
    ):
        here(tmp_path, core=tmp_path / "grown-16", train_data_dir=data)
    assert_same_weights(finished[0] / "core", tmp_path / "grown-16")


def test_a_core_without_text_is_refused(tmp_path):
    make_core(cross_attention_dim=None).save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="`core=.*` has no text encoder, but `grow.py` trains on captions"):
        adopt_core(ModelArguments(core=str(tmp_path)), TrainingArguments())


def test_a_core_that_was_trained_without_crops_is_not_grown_with_them(tmp_path):
    make_core().save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="`random_crop=0.5`: `core=.*` was not trained with random crops"):
        adopt_core(ModelArguments(core=str(tmp_path), random_crop=0.5), TrainingArguments())


def test_the_arguments_of_a_core_are_taken_from_it(finished, tmp_path):
    PartialState(cpu=True)  # its loggers need it
    core, config = finished[0] / "core", finished[0] / "config.yaml"
    made_it = parse_arguments(["--config", str(config), "--core", str(core)], "")[1]
    expected = asdict(made_it)
    adopt_core(made_it, TrainingArguments())
    assert asdict(made_it) == {**expected, "text_hidden_size": 32}
    not_said = ModelArguments(core=str(core), max_sequence_length=64)
    adopt_core(not_said, TrainingArguments())
    assert (not_said.hidden_size, not_said.num_layers, not_said.text_hidden_size) == (16, 1, 32)

    shutil.copytree(core / "text_encoder", tmp_path / "encoder")
    adopt_core(ModelArguments(core=str(core), text_encoder=str(tmp_path / "encoder")), TrainingArguments())
    adopt_core(ModelArguments(core=str(core), text_encoder="cannot/be_read"), TrainingArguments())
    BertConfig(hidden_size=32, vocab_size=7).save_pretrained(tmp_path / "bert")
    for given, message in (
        ({"hidden_size": 24}, "`hidden_size=24` is not that of `core=.*core'`, which is 16: leave it out"),
        ({"max_sequence_length": 20}, "`max_sequence_length=20` is not that of .* which is 64"),
        ({"text_num_layers": 3}, "`text_num_layers=3` is not that of .* which is 1"),
        ({"text_encoder": str(tmp_path / "bert")}, r"`text_encoder=.*bert'` is not that of .*: its vocab_size is 7"),
    ):
        with pytest.raises(ValueError, match=message):
            adopt_core(ModelArguments(core=str(core), **given), TrainingArguments())


def test_a_text_encoder_that_cannot_read_as_many_tokens(finished, tmp_path):
    encoder = BertModel(
        BertConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=9)
    )
    encoder.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(finished[0] / "core" / "tokenizer").save_pretrained(tmp_path)
    model_args = ModelArguments(text_encoder=str(tmp_path), max_sequence_length=10)
    with pytest.raises(ValueError, match="`max_sequence_length=10`: `text_encoder=.*` reads at most 9 tokens"):
        build_core_pipeline(model_args, captions=[])
    model_args.max_sequence_length = 9
    assert build_core_pipeline(model_args, captions=[]).config.max_sequence_length == 9


@pytest.mark.parametrize("name", ["/nowhere", "not an id"])
def test_a_text_encoder_that_is_not_there(name, finished):
    with pytest.raises(ValueError, match=f"`text_encoder='{name}'` cannot be loaded: "):
        build_core_pipeline(ModelArguments(text_encoder=name), captions=[])
    with pytest.raises(OSError, match=f"`text_encoder='{name}'` cannot be read: .* name its `text_hidden_size`"):
        get_text_hidden_size(ModelArguments(text_encoder=name))
    adopt_core(
        ModelArguments(core=str(finished[0] / "core"), text_encoder=name), TrainingArguments()
    )  # it is not compared, nor used


def test_a_core_of_another_resolution(finished, data, here, tmp_path):
    with pytest.raises(
        ValueError, match=r"`resolutions=\[16, 32\]` must begin with the resolution of `core=.*which is 8"
    ):
        here(tmp_path / "output", core=finished[0] / "core", resolutions=[16, 32], train_data_dir=data)


# ----------------------------------------------------------------------------------------------------------------------
# Quiet and quick


WITHOUT_TORCH = """
import runpy
import sys

sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("script", [GROW, TRAIN_LORA], ids=["grow", "train_lora"])
def test_arguments_are_read_before_torch_is_imported(script, tmp_path):
    (tmp_path / "config.yaml").write_text("sed: 1", encoding="utf-8")
    for flags, code, text in (
        (["--help"], 0, "--debug"),
        (["--sed", "1"], 2, "error: unrecognized arguments: --sed 1. Did you mean --seed?\n"),
        (["--config", str(tmp_path / "config.yaml")], 2, "the file has unknown arguments: ['sed']\n"),
    ):
        needed = ["--pretrained_model_name_or_path", "x"] if script == TRAIN_LORA else []
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_TORCH, str(script), *needed, *flags], capture_output=True, encoding="utf-8"
        )
        assert done.returncode == code and text in done.stdout + done.stderr and "Traceback" not in done.stderr
        assert code == 0 or done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_mistake_ends_in_one_line(tmp_path):
    flags = grow_flags(tmp_path / "output", train_data_dir=tmp_path / "nowhere")
    done = run_script(GROW, flags)
    assert done.returncode == 2 and "Traceback" not in done.stdout
    assert done.stdout.splitlines()[-1] == f"error: `train_data_dir='{tmp_path}/nowhere'` does not exist."
    assert "Traceback" in run_script(GROW, [*flags, "--debug"]).stdout


def test_a_run_says_nothing_of_its_libraries(finished):
    for noise in ("[RANK", "experimental", "Removed shared tensor", "torchvision", "torchao"):
        assert noise not in finished[1]
