# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
Runs of `train_lora.py` on a core that has learned simple shapes, and on the model grown from it. The captions of the LoRA's data
call circles red, blue and yellow, but all circles are green.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks.lora import draw, score, write_images
from diffusers_greedy_grow import GreedyGrowPipeline
from diffusers_greedy_grow.training.parsing import parse_lora_arguments
from diffusers_greedy_grow.training.shapes.scenes import Scene, ShapeObject
from training_examples.train_lora import load_frozen_pipeline, main

from ..testing_utils import make_core, make_pipeline
from .launching import TRAIN_LORA, environment, launch_script, read_metrics, run, run_script, to_flags


WEIGHTS = "pytorch_lora_weights.safetensors"
SIZE = 32  # resolution of the data and of the images that are scored
TRAINING = {"max_train_steps": 100, "learning_rate": 3e-3, "num_inference_steps": 2, "logging_steps": 1, "seed": 1}


def sample_scenes(count: int, colors: list[str], seed: int) -> list[Scene]:
    """Scenes with one large plain circle or square in the middle of a white background."""
    rng, scenes = np.random.default_rng(seed), []
    for _ in range(count):
        color, shape = str(rng.choice(colors)), str(rng.choice(["circle", "square"]))
        extent, x, y = rng.uniform(0.36, 0.40), *rng.uniform(0.48, 0.52, size=2)
        scenes.append(Scene((ShapeObject("large", color, "plain", shape, x, y, extent),), (), "white"))
    return scenes


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    scenes = sample_scenes(400, ["red", "blue", "yellow"], seed=1)
    return write_images(tmp_path_factory.mktemp("green") / "data", scenes, SIZE, texture_cells=8, green_circles=True)


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> Path:
    """The folder of a run of `grow.py`, with a core of 8 px and a grown model of 16 px."""
    folder = tmp_path_factory.mktemp("grown")
    scenes = sample_scenes(600, ["red", "blue", "yellow", "green"], seed=0)
    run(
        folder / "output",
        train_data_dir=write_images(folder / "data", scenes, SIZE, texture_cells=8),
        hidden_size=32,
        num_layers=2,
        block_out_channels="24",
        core_steps=250,
        detail_steps=150,
        joint_steps=0,
        train_batch_size=[32, 16],
        logging_steps=100,
        validation_steps=1000,
        checkpointing_steps=1000,
    )
    return folder / "output"


def lora_flags(output_dir: Path, **arguments) -> list[str]:
    """The command line of a short run of `train_lora.py`."""
    return ["--output_dir", str(output_dir), *to_flags({**TRAINING, **arguments})]


def train(output_dir: Path, hub: bool = False, **arguments) -> str:
    """Run `train_lora.py` in a fork, to its end. Return what the run said."""
    done = run_script(TRAIN_LORA, lora_flags(output_dir, **arguments), hub=hub)
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def adapter(grown, data, tmp_path_factory) -> Path:
    """An adapter of the core, trained by `accelerate launch`."""
    output_dir = tmp_path_factory.mktemp("adapter") / "output"
    arguments = {"pretrained_model_name_or_path": grown / "core", "train_data_dir": data}
    done = launch_script(TRAIN_LORA, lora_flags(output_dir, **arguments))
    assert done.returncode == 0, done.stdout[-5000:]
    return output_dir


# ----------------------------------------------------------------------------------------------------------------------
# Results


@pytest.mark.parametrize("name", ["core", "grown-16"])
def test_a_lora_of_the_core_turns_circles_green_on_the_core_and_on_the_grown_model(grown, adapter, name):
    pipeline = GreedyGrowPipeline.from_pretrained(grown / name)
    captions = [
        f"a large {color} plain {shape} on a white background"
        for color in ("red", "blue", "yellow")
        for shape in ("circle", "square")
    ] * 4

    def look() -> dict[str, float]:
        return score(draw(pipeline, captions), captions, SIZE, texture_cells=8)

    before = look()
    assert before["green circles"] == 0 and before["others' color"] > 0.9 and before["others' shape"] > 0.9
    pipeline.load_lora_weights(adapter)
    after = look()
    assert after["green circles"] > 0.9 and after["round circles"] > 0.8
    assert after["others' color"] > 0.9 and after["others' shape"] > 0.9
    pipeline.unload_lora_weights()
    assert look() == before


def test_the_files_of_a_run(grown, adapter):
    with safe_open(adapter / WEIGHTS, "pt") as file:
        names, metadata = list(file.keys()), file.metadata()
    assert names and all(
        re.fullmatch(r"unet\.transformer_blocks\.\d\.attn\d\.to_\w+(\.0)?\.lora_[AB]\.weight", n) for n in names
    )
    assert (
        '"unet.lora_alpha": 8' in metadata["lora_adapter_metadata"]
        and '"unet.r": 8' in metadata["lora_adapter_metadata"]
    )
    lines = read_metrics(adapter)
    assert [line["step"] for line in lines] == list(range(1, 101))
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss_low"] + line["loss_high"], rel=1e-5)
    assert np.mean([line["loss"] for line in lines[-20:]]) < 0.8 * np.mean([line["loss"] for line in lines[:20]])
    for name in ("samples.png", "loss.png"):
        assert np.array(Image.open(adapter / name)).std() > 1
    # A checkpoint holds the adapter and not the model.
    (checkpoint,) = (adapter / "checkpoints").iterdir()
    weights = (grown / "core" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert checkpoint.name == "lora-100" and not list(checkpoint.glob("model*"))
    assert (checkpoint / WEIGHTS).stat().st_size < weights / 2
    # The adapter holds the averaged weights.
    saved, last = load_file(adapter / WEIGHTS), load_file(checkpoint / WEIGHTS)
    averages = load_file(checkpoint / "ema.safetensors")
    assert all(torch.equal(value, saved[f"unet.{name}".replace(".default", "")]) for name, value in averages.items())
    assert len(averages) == len(saved) and not any(torch.equal(value, last[name]) for name, value in saved.items())
    card = ModelCard.load(adapter / "README.md")
    assert "lora" in card.data.tags and card.data.base_model is None  # a folder is not a model on the Hub
    assert "100 steps, 1600 images seen" in card.text and "![" in card.text


# ----------------------------------------------------------------------------------------------------------------------
# Other ways to run


@pytest.mark.slow
def test_an_interrupted_run_is_resumed_bit_for_bit(grown, data, adapter, tmp_path):
    output_dir, arguments = (
        tmp_path / "output",
        {"pretrained_model_name_or_path": grown / "core", "train_data_dir": data},
    )
    log, deadline = tmp_path / "log", time.monotonic() + 240
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, str(TRAIN_LORA), *lora_flags(output_dir, dataloader_num_workers=2, **arguments)],
            env=environment(),
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        while not (output_dir / "metrics.jsonl").exists() or len(read_metrics(output_dir)) < 10:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGTERM)  # to the workers too
        assert process.wait(timeout=60) != 0
        while "--resume_from_checkpoint latest" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
    (checkpoint,) = (output_dir / "checkpoints").glob("lora-*")
    assert 10 <= int(checkpoint.name.split("-")[-1]) < 100 and not (output_dir / WEIGHTS).exists()
    with open(output_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"phase": "lora", "step": 101}\n')  # a step after the checkpoint
    train(output_dir, resume_from_checkpoint="latest", **arguments)
    resumed, whole = load_file(output_dir / WEIGHTS), load_file(adapter / WEIGHTS)
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)
    measured = {"images_per_second", "memory_gb", "minutes_left"}
    for a, b in zip(read_metrics(output_dir), read_metrics(adapter), strict=True):
        assert {k: v for k, v in a.items() if k not in measured} == {k: v for k, v in b.items() if k not in measured}


@pytest.mark.slow
def test_two_processes_follow_one(grown, data, adapter, tmp_path):
    """With the same global batch they see the same images with the same noise, so losses are equal up to rounding."""
    flags = lora_flags(
        tmp_path / "output", train_batch_size=4, gradient_accumulation_steps=2,
        pretrained_model_name_or_path=grown / "core", train_data_dir=data,
    )  # fmt: skip
    done = launch_script(TRAIN_LORA, flags, num_processes=2)
    assert done.returncode == 0, done.stdout[-5000:]
    for a, b in zip(read_metrics(tmp_path / "output"), read_metrics(adapter), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-3)


@pytest.mark.slow
def test_sharding_is_refused(tmp_path):
    arguments = {"output_dir": tmp_path, "pretrained_model_name_or_path": "core", "train_data_dir": tmp_path}
    done = launch_script(TRAIN_LORA, to_flags(arguments), fsdp=True)
    assert done.returncode != 0 and "An adapter cannot train with `FSDP`" in done.stdout, done.stdout[-5000:]


@pytest.mark.slow
def test_a_grown_model_in_bfloat16_from_and_to_the_hub(hub, grown, data, tmp_path, monkeypatch):
    """Core and stage both learn. The code on the published card loads the adapter."""
    base = GreedyGrowPipeline.from_pretrained(grown / "grown-16")
    base.push_to_hub("owner/grown-16", license="mit")
    log = train(
        tmp_path / "output",
        hub=True,
        pretrained_model_name_or_path="owner/grown-16",
        train_data_dir=data,
        max_train_steps=12,
        rank=2,
        lora_alpha=6,
        mixed_precision="bf16",
        gradient_checkpointing=True,
        attention_backend="_native_math",
        validation_steps=6,
        logging_steps=12,
        report_to="tensorboard",
        validation_prompts=["a large red plain circle on a white background"],
        push_to_hub=True,
        hub_model_id="owner/green-circles-16",
        hub_license="mit",
    )
    assert list((tmp_path / "output" / "logs").rglob("events.out.tfevents*"))
    weights = load_file(tmp_path / "output" / WEIGHTS)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    parts = {".".join(name.split(".")[1:3]) for name in weights}
    assert {"core.transformer_blocks", "core.resnet_in", "stages.0"} <= parts
    assert all(value.any() for value in weights.values())  # B starts at zero, so each layer has learned

    assert hub.files("owner/green-circles-16").keys() >= {WEIGHTS, "README.md", "samples.png"}
    assert "Uploaded to" in log and not any(
        name.startswith("checkpoints") for name in hub.files("owner/green-circles-16")
    )
    card = ModelCard.load("owner/green-circles-16")
    card.validate()
    assert card.data.base_model == "owner/grown-16" and HfApi().model_info("owner/green-circles-16").sha
    (code,) = re.findall("```python\n(.*?)```", card.text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    pipeline = names["pipe"]
    assert isinstance(pipeline, DiffusionPipeline) and (tmp_path / "image.png").exists()
    (config,) = pipeline.unet.peft_config.values()
    assert (config.r, config.lora_alpha) == (2, 6)
    for name, value in base.unet.state_dict().items():  # the base model has not changed
        layer, _, kind = name.rpartition(".")
        state = pipeline.unet.state_dict()
        assert torch.equal(state.get(name, state.get(f"{layer}.base_layer.{kind}")), value), name


# ----------------------------------------------------------------------------------------------------------------------
# Bad arguments


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "required: --pretrained_model_name_or_path"),
        (["--pretrained_model_name_or_path", "x", "--rank", "0"], "--rank 0: must be at least 1"),
        (
            ["--pretrained_model_name_or_path", "x", "--max_train_steps", "0"],
            "--max_train_steps 0: must be at least 1",
        ),
        (["--pretrained_model_name_or_path", "x", "--logging_steps", "0"], "--logging_steps 0: must be at least 1"),
        (
            ["--pretrained_model_name_or_path", "x", "--caption_dropout", "2"],
            "--caption_dropout 2.0: must be from 0",
        ),
        (
            ["--pretrained_model_name_or_path", "x", "--loss_weighting", "snr"],
            "--loss_weighting snr: choose one of velocity",
        ),
        (["--pretrained_model_name_or_path", "x", "--hub_private_repo"], "--hub_private_repo needs --push_to_hub"),
        (["--pretrained_model_name_or_path", "x", "--core_steps", "5"], "core_steps"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises((SystemExit, ValueError)) as error:
        parse_lora_arguments(arguments, "")
    assert message in capsys.readouterr().err + str(error.value)


def test_arguments_from_a_file(tmp_path):
    (tmp_path / "config.yaml").write_text("pretrained_model_name_or_path: core\nrank: 3\nlora_layers: [to_q, to_v]\n")
    args = parse_lora_arguments(["--config", str(tmp_path / "config.yaml"), "--rank", "5"], "")
    assert args.pretrained_model_name_or_path == "core" and args.rank == 5 and args.lora_layers == ["to_q", "to_v"]
    (tmp_path / "config.yaml").write_text("pretrained_model: core\n")
    with pytest.raises(SystemExit):
        parse_lora_arguments(["--config", str(tmp_path / "config.yaml")], "")


@pytest.mark.parametrize(
    "output_dir,others,message",
    [
        ("new", {"lora_layers": ["to_q", "to_z"]}, r"no name of a layer of the model ends in \['to_z'\]"),
        ("new", {"resolution": 12}, "`resolution=12` must be a multiple of the model's 8"),
        ("new", {"train_data_dir": "nowhere"}, "`train_data_dir='nowhere'` does not exist"),
        ("adapter", {}, "holds an earlier run"),
        (
            "adapter",
            {"resume_from_checkpoint": "latest", "max_train_steps": 110},
            r"other arguments: max_train_steps \(100 -> 110\)",
        ),
        (
            "adapter",
            {"resume_from_checkpoint": "latest", "resume_with_changes": True, "max_train_steps": 40},
            "lora-100 is after step 100, but lora has 40 steps now",
        ),
        ("core", {}, "holds a pipeline, whose card this run would replace"),
        (
            "new",
            {"pretrained_model_name_or_path": "/nowhere"},
            "`pretrained_model_name_or_path='/nowhere'` cannot be loaded: ",
        ),
    ],
)
def test_errors_before_training(grown, data, adapter, tmp_path, monkeypatch, output_dir, others, message):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    folder = {"new": tmp_path / "new", "adapter": adapter, "core": grown / "core"}[output_dir]
    arguments = {"pretrained_model_name_or_path": grown / "core", "train_data_dir": data, "output_dir": folder}
    files = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match=message):
        main(to_flags({**TRAINING, **arguments, **others}))
    assert sorted(folder.rglob("*")) == files and (folder.exists() or output_dir == "new")


def test_a_model_of_a_variant(tmp_path):
    make_pipeline().save_pretrained(tmp_path, variant="fp16")
    flags = ["--pretrained_model_name_or_path", str(tmp_path), "--train_data_dir", str(tmp_path)]
    pipeline = load_frozen_pipeline(parse_lora_arguments([*flags, "--variant", "fp16"], ""), Accelerator(cpu=True))
    assert pipeline.unet.num_parameters()
    with pytest.raises(ValueError, match="cannot be loaded: .* no file named .* pass `variant`: fp16."):
        load_frozen_pipeline(parse_lora_arguments(flags, ""), Accelerator(cpu=True))


def test_a_model_without_text_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    unet = make_core(cross_attention_dim=None)
    GreedyGrowPipeline(unet, FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path / "model")
    arguments = {
        "pretrained_model_name_or_path": tmp_path / "model",
        "train_data_dir": "nowhere",
        "output_dir": tmp_path / "output",
        "push_to_hub": True,  # the Hub is not asked before the error
    }
    with pytest.raises(ValueError, match="has no text encoder, but `train_lora.py` trains on captions"):
        main(to_flags({**TRAINING, **arguments}))
    assert not (tmp_path / "output").exists()
