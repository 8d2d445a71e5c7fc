# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The main job as users run it: `accelerate launch` in a subprocess, on real files, with small models."""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator, PartialState
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig

from diffusers_greedy_grow import GreedyGrowPipeline, GrowableUNet2DConditionModel, ShallowUNet2DModel
from diffusers_greedy_grow.flow import detail_variance
from diffusers_greedy_grow.training.arguments import ModelArguments
from diffusers_greedy_grow.training.data.images import normalize, to_pixel_values
from diffusers_greedy_grow.training.parsing import parse_arguments
from training_examples import grow

from ..data_utils import make_image, write_image_folder, write_parquet, write_rows
from ..testing_utils import make_core


SCRIPT = Path(__file__).parents[2] / "training_examples" / "grow.py"
TINY = {
    "resolutions": [8, 16],
    "hidden_size": 16,
    "num_layers": 1,
    "num_attention_heads": 2,
    "block_out_channels": "8",
    "text_hidden_size": 32,
    "core_steps": 12,
    "detail_steps": 6,
    "joint_steps": 6,
    "train_batch_size": 4,
    "num_validation_images": 8,
    "num_inference_steps": 2,
    "logging_steps": 2,
    "validation_steps": 6,
    "checkpointing_steps": 4,
}


def to_flags(arguments: dict) -> list[str]:
    flags = []
    for name, value in arguments.items():
        flags.append(f"--{name}")
        if value is not True:
            flags += [str(item) for item in (value if isinstance(value, list) else [value])]
    return flags


LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch"]


def command(output_dir: Path, num_processes: int = 1, fsdp: bool = False, **arguments) -> list[str]:
    several = ["--num_processes", str(num_processes), "--main_process_port", "0"]
    if fsdp:
        config = ["--config_file", str(SCRIPT.parent / "accelerate" / "fsdp2.yaml"), "--mixed_precision", "no"]
        launch = [*config, *several, str(Path(__file__).parent / "launch_on_cpu.py")]
    else:
        launch = ["--multi_gpu", *several] if num_processes > 1 else ["--cpu"]
    return [*LAUNCHER, *launch, str(SCRIPT), "--output_dir", str(output_dir), *to_flags({**TINY, **arguments})]


def environment(fsdp: bool = False) -> dict[str, str]:
    cpu = {"ACCELERATE_TORCH_DEVICE": "cpu"} if fsdp else {"ACCELERATE_USE_CPU": "true"}
    return {**os.environ, **cpu, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def launch(output_dir: Path, num_processes: int = 1, fsdp: bool = False, **arguments) -> str:
    """Runs to the end and returns what the run said."""
    done = subprocess.run(
        command(output_dir, num_processes, fsdp, **arguments),
        env=environment(fsdp), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-9000:]
    return done.stdout


def refuse(output_dir: Path, **arguments) -> str:
    """What a run that must not start says."""
    done = subprocess.run(command(output_dir, **arguments), env=environment(), capture_output=True, text=True)
    assert done.returncode != 0
    return done.stderr


@pytest.fixture
def here(monkeypatch):
    """Runs in this process, which takes a tenth of the time; for what is told before training."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(signal, "signal", lambda *args: None)  # Ctrl-C is for pytest

    def run(output_dir: Path, **arguments) -> None:
        grow.main(["--output_dir", str(output_dir), *to_flags({**TINY, **arguments})])

    return run


def list_files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def read_metrics(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path, part: str = "unet") -> dict[str, torch.Tensor]:
    (path,) = (folder / part).glob("*.safetensors")
    return load_file(path)


def assert_same_weights(a: Path, b: Path):
    for part in ("unet", "text_encoder"):
        a_weights, b_weights = weights(a, part), weights(b, part)
        assert a_weights.keys() == b_weights.keys()
        for name, value in a_weights.items():
            assert torch.equal(value, b_weights[name]), name


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("data") / "images", count=60)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> tuple[Path, str]:
    """A run on a folder of images, to its end, and what it said."""
    output_dir = tmp_path_factory.mktemp("finished") / "output"
    return output_dir, launch(output_dir, train_data_dir=data)


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves behind


def test_every_phase_ends_in_a_pipeline(finished):
    output_dir, _ = finished
    for name, kind, size, shift in (
        ("core", ShallowUNet2DModel, 8, 1.0),
        ("grown-16-detail", GrowableUNet2DConditionModel, 16, 2.0),
        ("grown-16", GrowableUNet2DConditionModel, 16, 2.0),
    ):
        pipeline = GreedyGrowPipeline.from_pretrained(output_dir / name)
        assert type(pipeline.unet) is kind and pipeline.scheduler.config.shift == shift
        image = pipeline("image number 3", num_inference_steps=2).images[0]
        assert image.size == (size, size)
    # Of the images, whose high band it is.
    (variance,) = pipeline.config.detail_variances
    assert 0 < variance < 1
    pipeline("image number 3", num_inference_steps=2, core_first="auto", guidance_resolution="core")


def test_growing_starts_from_the_averages_and_the_detail_phase_leaves_them_alone(finished):
    output_dir, _ = finished
    core, detail, joint = (weights(output_dir / name) for name in ("core", "grown-16-detail", "grown-16"))
    for name, value in core.items():
        assert torch.equal(detail[f"core.{name}"], value), name
    assert any(not torch.equal(joint[f"core.{name}"], value) for name, value in core.items())
    assert detail["stages.0.decoder.conv_out.weight"].any()
    assert not any("conv_to_inner" in name for name in joint)
    # The text encoder learns along with the core and is frozen from growth on.
    texts = [weights(output_dir / name, "text_encoder") for name in ("core", "grown-16-detail", "grown-16")]
    for name, value in texts[0].items():
        assert torch.equal(texts[1][name], value) and torch.equal(texts[2][name], value)


def test_a_phase_leaves_its_averages(finished):
    checkpoint = finished[0] / "checkpoints" / "grown-16-6"
    averages, last = load_file(checkpoint / "ema.safetensors"), load_file(checkpoint / "model.safetensors")
    saved = weights(finished[0] / "grown-16")
    assert all(torch.equal(averages[f"unet.{name}"], weight) for name, weight in saved.items())
    assert not all(torch.equal(last[f"unet.{name}"], weight) for name, weight in saved.items())


def test_metrics_and_images(finished):
    output_dir, log = finished
    metrics = read_metrics(output_dir)
    for phase, steps in (("core", 12), ("grown-16-detail", 6), ("grown-16", 6)):
        lines = [line for line in metrics if line["phase"] == phase]
        trained = [line for line in lines if "loss" in line]
        assert [line["step"] for line in trained] == list(range(2, steps + 1, 2))
        assert trained[-1]["images"] == 4 * steps and trained[-1]["images_per_second"] > 0
        for line in trained:
            assert line["loss"] == pytest.approx(line["loss_low"] + line["loss_high"], rel=1e-5)
        assert any(name.startswith("loss_sigma_") for line in trained for name in line)
        held_out = [line for line in lines if "val_loss" in line]
        assert [line["step"] for line in held_out] == list(range(6, steps + 1, 6))
        for line in held_out:
            low_noise = line["val_low_noise_loss_low"] + line["val_low_noise_loss_high"]
            assert line["val_low_noise_loss"] == pytest.approx(low_noise, rel=1e-5) and low_noise > line["val_loss"]
        assert all(line["grad_norm"] > 0 and line["memory_gb"] > 0 and line["minutes_left"] >= 0 for line in trained)
    assert min(line["loss"] for line in metrics if "loss" in line) > 0
    flops = [line["flops"] for line in metrics]
    assert flops == sorted(flops) and flops[0] > 0
    for name in ("samples.png", "loss.png"):
        assert np.array(Image.open(output_dir / name)).std() > 1
    assert {path.name for path in (output_dir / "samples").iterdir()} == {
        "core.png", "grown-16-detail.png", "grown-16.png",
    }  # fmt: skip
    config = yaml.safe_load((output_dir / "config.yaml").read_text())
    assert config["hidden_size"] == 16 and config["resolutions"] == [8, 16] and config["detail_steps"] == [6]
    assert not {"overwrite_output_dir", "resume_from_checkpoint", "resume_with_changes", "plan"} & set(config)

    assert "GFLOP/image" in log and "times one at 8 px" in log
    assert "min of training left" in log and "3 held out" in log
    assert re.search(r"grown-16: +\d+%", log) and "images_per_s=" in log


def test_an_earlier_run_is_not_overwritten(finished, data, here, tmp_path):
    """Nor by one that cannot begin."""
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


def test_the_resolved_config_makes_the_same_run(finished, tmp_path):
    """From the YAML file alone, with one flag that wins over it; and the run is the same, bit for bit."""
    output_dir, _ = finished
    arguments = ["--config", str(output_dir / "config.yaml"), "--output_dir", str(tmp_path / "again")]
    subprocess.run([*LAUNCHER, "--cpu", str(SCRIPT), *arguments], env=environment(), check=True, capture_output=True)
    for name in ("core", "grown-16-detail", "grown-16"):
        assert_same_weights(output_dir / name, tmp_path / "again" / name)


def test_a_finished_run_goes_on_to_its_end_at_once(finished, data, tmp_path):
    shutil.copytree(finished[0], tmp_path / "output")
    log = launch(tmp_path / "output", train_data_dir=data, resume_from_checkpoint="latest")
    assert "grown-16-6" in log and "core is done" not in log
    assert_same_weights(finished[0] / "grown-16", tmp_path / "output" / "grown-16")
    assert read_metrics(tmp_path / "output") == read_metrics(finished[0])
    # With another batch the steps that are left would be other ones.
    error = refuse(tmp_path / "output", train_data_dir=data, resume_from_checkpoint="latest", train_batch_size=2)
    assert re.search(
        r"grown-16-6 was saved with other arguments: images per step \(.*'grown-16': 4.*'grown-16': 2", error
    )
    log = launch(tmp_path / "output", train_data_dir=data, resume_from_checkpoint="latest", learning_rate=1e-4,
                 joint_steps=12, resume_with_changes=True, validation_prompts="a cat")  # fmt: skip
    assert "grown-16-6" in log
    step, rate = [(line["step"], line["lr"]) for line in read_metrics(tmp_path / "output") if "lr" in line][-3]
    assert step == 8 and 0 < rate < 1e-4  # the new one
    # No images of other captions stand above the new one's.
    assert (
        Image.open(finished[0] / "samples.png").height
        > 3 * 132
        > 2 * 132
        > Image.open(tmp_path / "output" / "samples.png").height
    )


def test_other_captions_are_named_and_change_no_words(here, tmp_path):
    """The small tokenizer is trained on captions: with others, words would have other numbers than the encoder has learned."""
    folder = write_image_folder(tmp_path / "images", count=60)
    arguments = {"train_data_dir": folder, "detail_steps": 0, "joint_steps": 0}
    launch(tmp_path / "output", core_steps=4, **arguments)
    tokenizer = (tmp_path / "output" / "core" / "tokenizer" / "tokenizer.json").read_text()
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(line.replace("image", "painting") for line in lines[10:]))
    (tmp_path / "output" / "checkpoints" / ".DS_Store").write_text("")  # which does not stop it either
    arguments |= {"core_steps": 8, "resume_from_checkpoint": tmp_path / "output" / "checkpoints" / "core-4"}
    with pytest.raises(ValueError, match=r"core-4 was saved with other arguments: .*captions \(\w+ -> \w+\)"):
        here(tmp_path / "output", **arguments)
    launch(tmp_path / "output", resume_with_changes=True, **arguments)
    assert read_metrics(tmp_path / "output")[-1]["step"] == 8
    assert (tmp_path / "output" / "core" / "tokenizer" / "tokenizer.json").read_text() == tokenizer


def test_a_refused_run_keeps_its_checkpoints(finished, data, here, tmp_path):
    shutil.copytree(finished[0], tmp_path / "output")
    checkpoints = sorted((tmp_path / "output" / "checkpoints").iterdir())
    (tmp_path / "output" / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="lacks lines that were there when the checkpoint was saved: put it back"):
        here(tmp_path / "output", train_data_dir=data, resume_from_checkpoint=checkpoints[0])
    assert len(checkpoints) > 1 and sorted((tmp_path / "output" / "checkpoints").iterdir()) == checkpoints


def test_a_run_does_not_replace_the_core_it_grows(finished, data, here, tmp_path):
    shutil.copytree(finished[0] / "core", tmp_path / "grown-16")
    with pytest.raises(
        ValueError, match="`core=.*grown-16'` would be replaced by this run: name another `output_dir`"
    ):
        here(tmp_path, core=tmp_path / "grown-16", train_data_dir=data)
    assert_same_weights(finished[0] / "core", tmp_path / "grown-16")


def test_plan_only(data, tmp_path):
    log = launch(tmp_path / "output", train_data_dir=data, plan=True)
    assert "GFLOP/image" in log and "grown-16-detail" in log
    assert not (tmp_path / "output").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Other ways to run


def test_accelerate_compiles_the_blocks(finished, data, tmp_path):
    compiled = ["--dynamo_backend", "eager", "--dynamo_use_regional_compilation"]
    arguments = command(tmp_path / "output", train_data_dir=data)[len(LAUNCHER) :]
    done = subprocess.run(
        [*LAUNCHER, *compiled, *arguments],
        env={**environment(), "TORCH_LOGS": "dynamo"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-9000:]
    assert "start tracing forward" in done.stdout and "blocks.py" in done.stdout
    for name in ("core", "grown-16-detail", "grown-16"):
        assert_same_weights(tmp_path / "output" / name, finished[0] / name)


def test_gradient_accumulation_follows_the_large_batch(data, tmp_path):
    steps = {"core_steps": 10, "detail_steps": 0, "joint_steps": 0, "logging_steps": 1, "train_data_dir": data}
    log = launch(
        tmp_path / "output", train_batch_size=2, gradient_accumulation_steps=2, report_to="tensorboard", **steps
    )
    lines = [line for line in read_metrics(tmp_path / "output") if "loss" in line]
    assert [line["images"] for line in lines] == list(range(4, 44, 4))
    launch(tmp_path / "large", train_batch_size=4, **steps)
    for a, b in zip(lines, [line for line in read_metrics(tmp_path / "large") if "loss" in line], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-3) and b["loss_low"] == pytest.approx(
            a["loss_low"], rel=2e-3
        )
    assert not (tmp_path / "output" / "grown-16").exists() and "core is done" in log
    assert list((tmp_path / "output" / "logs").rglob("events.out.tfevents*"))


def test_a_given_core_and_several_stages(finished, tmp_path):
    core = finished[0] / "core"
    write_parquet(tmp_path / "data.parquet", caption_column="caption")
    log = launch(
        tmp_path / "output",
        core=core,
        train_data_dir=tmp_path / "data.parquet",
        image_column="photo",
        caption_column="caption",
        resolutions=[8, 16, 32],
        block_out_channels=["8", "8,8"],
        joint_steps=[0, 3],
        train_batch_size=[9, 4, 2],
        mixed_precision="bf16",
        attention_backend="_native_math",
        gradient_checkpointing=True,
        validation_prompts=["image number 1", "a cat"],
    )
    assert not (tmp_path / "output" / "core").exists()
    names = {path.name for path in (tmp_path / "output").iterdir() if (path / "model_index.json").exists()}
    assert names == {"grown-16", "grown-32-detail", "grown-32"}
    pipeline = GreedyGrowPipeline.from_pretrained(tmp_path / "output" / "grown-32")
    assert pipeline.unet.sample_sizes == (8, 16, 32) and pipeline.scheduler.config.shift == 4.0
    assert pipeline.unet.dtype == torch.float32
    for name, value in weights(core).items():
        assert torch.equal(weights(tmp_path / "output" / "grown-32-detail")[f"core.{name}"], value)
    images = {line["phase"]: line["images"] for line in read_metrics(tmp_path / "output") if "images" in line}
    assert images == {"grown-16": 24, "grown-32-detail": 12, "grown-32": 6}
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        is_slow = not {"amx_bf16", "avx512_bf16"} & set(Path("/proc/cpuinfo").read_text().split())
        assert ("This CPU has no instructions for bfloat16" in log) == is_slow


def test_the_papers_recipe_with_a_pretrained_text_encoder(finished, data, tmp_path):
    encoder = finished[0] / "core"
    # A folder with tokenizer and encoder side by side, as on the Hub.
    pipeline = GreedyGrowPipeline.from_pretrained(encoder)
    pipeline.text_encoder.save_pretrained(tmp_path / "encoder")
    pipeline.tokenizer.save_pretrained(tmp_path / "encoder")
    launch(tmp_path / "output", train_data_dir=data, init="random", text_encoder=tmp_path / "encoder")
    for name in ("core", "grown-16"):
        for key, value in weights(encoder, "text_encoder").items():
            assert torch.equal(weights(tmp_path / "output" / name, "text_encoder")[key], value)
    grown = weights(tmp_path / "output" / "grown-16-detail")
    core = weights(tmp_path / "output" / "core")
    kept = [name for name in core if f"core.{name}" in grown]
    assert len(kept) > 10 and all(torch.equal(grown[f"core.{name}"], core[name]) for name in kept)
    assert grown["stages.0.conv_to_inner.weight"].any()


def test_training_from_scratch(data, tmp_path):
    """The baseline that growing must beat: everything, the text encoder too, at the high resolution from the start."""
    arguments = {"train_data_dir": data, "core_steps": 0, "detail_steps": 0, "joint_steps": 2}
    launch(tmp_path / "short", **arguments)
    launch(tmp_path / "long", **{**arguments, "joint_steps": 12})
    assert {line["phase"] for line in read_metrics(tmp_path / "long")} == {"grown-16"}
    for component in ("unet", "text_encoder"):
        short, long = (weights(tmp_path / name / "grown-16", component) for name in ("short", "long"))
        assert all(not torch.equal(short[name], long[name]) for name in short if long[name].ndim > 1), component


def test_few_high_resolution_images(data, tmp_path):
    """The core sees all images; above its resolution, one is all there is, and all that the growth goes by."""
    arguments = {"train_data_dir": data, "core_steps": 2, "detail_steps": 1, "joint_steps": 0}
    log = launch(tmp_path / "output", num_high_res_images=1, **arguments)
    assert "57 images to train the core on, 1 to train on above its resolution; 3 held out" in log
    (variance,) = GreedyGrowPipeline.from_pretrained(tmp_path / "output" / "grown-16").config.detail_variances
    images = [to_pixel_values(Image.open(path), 16) for path in sorted(data.rglob("*.png"))]
    variances = [detail_variance(normalize(image[None], 1), 2) for image in images]
    assert min(abs(variance - other) for other in variances) < 1e-6

    # A joint phase that is added later goes on from what was the last phase.
    shutil.copytree(tmp_path / "output" / "grown-16", tmp_path / "detail")
    later = {"joint_steps": 2, "resume_from_checkpoint": "latest", "resume_with_changes": True}
    log = launch(tmp_path / "output", num_high_res_images=1, **{**arguments, **later})
    assert "core is done" not in log and "grown-16 is done" in log
    assert_same_weights(tmp_path / "output" / "grown-16-detail", tmp_path / "detail")
    last = weights(tmp_path / "output" / "grown-16")["core.conv_in.weight"]
    assert not torch.equal(last, weights(tmp_path / "detail")["core.conv_in.weight"])


def test_shapes_by_default(tmp_path):
    small = {"shapes_images": 50, "num_scored_images": 24, "resolutions": [16, 64], "train_batch_size": 2}
    log = launch(tmp_path / "output", core_steps=2, detail_steps=1, joint_steps=1, **small)
    assert "Drawing 50 captioned shapes" in log
    scores = [line for line in read_metrics(tmp_path / "output") if "score_color" in line]
    assert [line["phase"] for line in scores] == ["core", "grown-64-detail", "grown-64"]
    assert all(0 <= line[f"score_{name}"] <= 1 for line in scores for name in ("shape", "texture", "background"))
    assert re.search(r"chance \(1 object\) +0.17", log)


# ----------------------------------------------------------------------------------------------------------------------
# Interruptions


def interrupt(output_dir: Path, number: int, after: str, **arguments) -> str:
    """Runs until `after` shows up in the metrics, sends a signal, and returns what the run said to it."""
    log, metrics = output_dir.with_suffix(".log"), output_dir / "metrics.jsonl"
    deadline = time.monotonic() + 240
    with open(log, "w") as file:
        process = subprocess.Popen(
            command(output_dir, **arguments), env=environment(), stderr=file, stdout=file, start_new_session=True
        )
        while not metrics.exists() or after not in metrics.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.02)
        # As a terminal does: to the launcher, which dies of it at once, and to the training itself.
        os.killpg(process.pid, number)
        assert process.wait(timeout=60) != 0
        while "Go on with" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
    return log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(data, tmp_path, number):
    phase = "grown-16" if number == signal.SIGTERM else "core"
    steps = {"core_steps": 300 if phase == "core" else 12, "joint_steps": 300, "detail_steps": 2, "logging_steps": 1}
    arguments = {**steps, "train_data_dir": data, "checkpointing_steps": 1000, "validation_steps": 1000}
    after = f'"phase": "{phase}", "step": 20' if phase == "core" else f'"phase": "{phase}", "step": 20,'
    # The group's workers get the signal too, and are needed for the step at hand.
    log = interrupt(tmp_path / "output", number, after, dataloader_num_workers=2, **arguments)
    assert f"of {phase}; saved" in log and "--resume_from_checkpoint latest" in log
    (checkpoint,) = (tmp_path / "output" / "checkpoints").glob(f"{phase}-[0-9]*")
    step = int(checkpoint.name.split("-")[-1])
    assert 20 <= step < 300
    launch(tmp_path / "output", resume_from_checkpoint="latest", **arguments)
    launch(tmp_path / "whole", **arguments)
    assert_same_weights(tmp_path / "output" / "grown-16", tmp_path / "whole" / "grown-16")
    resumed, whole = read_metrics(tmp_path / "output"), read_metrics(tmp_path / "whole")
    assert [(line["phase"], line["step"]) for line in resumed] == [(line["phase"], line["step"]) for line in whole]
    for a, b in zip(resumed, whole):
        assert {k: v for k, v in a.items() if "loss" in k} == {k: v for k, v in b.items() if "loss" in k}


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path):
    error = refuse(
        tmp_path / "output", train_data_dir=data, learning_rate=1e20, lr_warmup_steps=0, checkpointing_steps=1,
        max_grad_norm=1e30, max_skipped_steps=2,
    )  # fmt: skip
    assert re.search(r"core stops at step \d+: The gradient's norm was not finite", error)
    assert re.search(r"for 3 steps in a row; the last one was nan. This batch had the noise levels 0\.\d+", error)
    assert "The last good checkpoint is" in error and "core-1" in error and "`learning_rate`" in error


def test_a_core_that_was_only_grown(finished, data, tmp_path):
    """What `from_core` returns does not know how much detail its images have, and grows all the same."""
    grown = GreedyGrowPipeline.from_core(finished[0] / "core", 16, block_out_channels=(8,))
    grown.save_pretrained(tmp_path / "core")
    launch(tmp_path / "output", train_data_dir=data, core=tmp_path / "core", resolutions=[16, 32], joint_steps=0)
    assert GreedyGrowPipeline.from_pretrained(tmp_path / "output" / "grown-32").config.detail_variances is None


def test_each_phase_averages_anew(finished):
    """It starts from the averages of the one before; to go on with their decay would hold new weights back."""
    checkpoints = [json.loads(path.read_text()) for path in (finished[0] / "checkpoints").glob("*/progress.json")]
    assert any(progress["phase"] != "core" for progress in checkpoints)
    for progress in checkpoints:
        assert progress["ema_optimization_step"] == progress["step"]


# ----------------------------------------------------------------------------------------------------------------------
# Data


def test_a_killed_run_on_a_stream_sees_the_samples_it_would_have_seen(tmp_path):
    """With several files, workers, shapes and broken rows; the kill falls between two checkpoints."""
    (tmp_path / "data").mkdir()
    for file in range(3):
        shapes = [(32, 32) if i % 3 else (40, 12) for i in range(20)]
        rows = [(make_image(20 * file + i).resize(shape), f"number {20 * file + i}") for i, shape in enumerate(shapes)]
        rows[7] = (b"broken", f"the broken one of {file}")
        write_rows(tmp_path / "data" / f"{file}.parquet", rows)
    arguments = {
        "train_data_dir": tmp_path / "data", "image_column": "photo", "streaming": True, "shuffle_buffer_size": 5,
        "dataloader_num_workers": 2, "aspect_ratio_buckets": "16,16;8,24", "core_steps": 120, "max_broken_share": 0.2, "detail_steps": 0,
        "joint_steps": 0, "logging_steps": 1, "checkpointing_steps": 7, "validation_steps": 1000,
    }  # fmt: skip
    log = open(tmp_path / "killed.log", "w")
    metrics = tmp_path / "killed" / "metrics.jsonl"
    process = subprocess.Popen(
        command(tmp_path / "killed", **arguments), env=environment(), stdout=log, stderr=log, start_new_session=True
    )
    while not metrics.exists() or '"step": 17,' not in metrics.read_text():
        assert process.poll() is None, (tmp_path / "killed.log").read_text()[-1200:]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(read_metrics(tmp_path / "killed")) < 120

    said = launch(tmp_path / "killed", resume_from_checkpoint="latest", **arguments)
    assert re.search(r"Going on from .*core-\d+", said) and "Images are streamed; 8 held out" in said
    launch(tmp_path / "whole", **arguments)
    resumed, whole = (
        [{key: line[key] for key in line if "loss" in key or key == "step"} for line in read_metrics(tmp_path / name)]
        for name in ("killed", "whole")
    )
    assert resumed == whole and len(whole) == 121
    assert_same_weights(tmp_path / "killed" / "core", tmp_path / "whole" / "core")
    names = {json.loads(line)["row"] for line in (tmp_path / "whole" / "broken_rows.jsonl").read_text().splitlines()}
    assert names == {f"row 7 of file {file}, 'the broken one of {file}'" for file in range(3)}
    assert "3 broken rows were left out so far" in said


@pytest.mark.parametrize("known", [False, True])
def test_other_images_above_the_cores_resolution(data, tmp_path, known):
    """Those of the core are read at its resolution; growth and the held-out loss go by the others, in several shapes."""
    shapes = ((32, 32), (40, 10), (10, 40))
    flat = [
        (
            make_image(i).resize(shapes[i % 3]).point(lambda value: 100 + value // 64),
            f"{'image number' if known else 'flat'} {i}",
        )
        for i in range(24)
    ]
    write_rows(tmp_path / "flat.parquet", flat, image_column="image")
    folder = write_image_folder(tmp_path / "small", count=30, size=8)
    arguments = {"train_data_dir": folder, "detail_steps": 6, "joint_steps": 0, "core_steps": 8}
    log = launch(
        tmp_path / "output", high_res_data_dir=tmp_path / "flat.parquet", aspect_ratio_buckets="16,16;8,32;32,8",
        dataloader_num_workers=1, **arguments,
    )  # fmt: skip
    assert "30 images to train the core on, 23 to train on above its resolution; 1 held out" in log
    assert ("Of 1 held-out images the caption is in the core's data, too" in log) == known
    (variance,) = GreedyGrowPipeline.from_pretrained(tmp_path / "output" / "grown-16").config.detail_variances
    assert 0 < variance < 1e-4
    lines = read_metrics(tmp_path / "output")
    low, high = (
        [line["loss_high"] for line in lines if line["phase"] == phase and "loss" in line]
        for phase in ("core", "grown-16")
    )
    assert min(low) > 10 * max(high)  # noise is all detail, flat images hardly have any
    assert {line["phase"] for line in lines if "val_loss" in line} == {"core", "grown-16"}


def test_kept_text_embeddings_change_nothing(finished, data, tmp_path):
    """Losses with and without, caption dropout and held-out captions included; a second run finds them there."""
    pipeline = GreedyGrowPipeline.from_pretrained(finished[0] / "core")
    pipeline.text_encoder.save_pretrained(tmp_path / "encoder")
    pipeline.tokenizer.save_pretrained(tmp_path / "encoder")
    arguments = {
        "train_data_dir": data, "text_encoder": tmp_path / "encoder", "core_steps": 10, "detail_steps": 2,
        "joint_steps": 0, "caption_dropout": 0.3, "logging_steps": 1,
    }  # fmt: skip
    launch(tmp_path / "without", **arguments)
    log = launch(tmp_path / "with", text_embeddings_dir=tmp_path / "embeddings", **arguments)
    assert "61 captions embedded" in log  # the empty one too
    a, b = read_metrics(tmp_path / "without"), read_metrics(tmp_path / "with")
    assert len(a) == len(b) >= 12
    for one, other in zip(a, b):
        for name in one:
            if "loss" in name:
                assert other[name] == pytest.approx(one[name], rel=1e-5), name


def test_broken_data_stops_a_run(tmp_path):
    rows = [(make_image(i), f"image {i}") for i in range(20)] + [(b"", "nothing"), (None, "none")] * 4
    write_rows(tmp_path / "data.parquet", rows)
    arguments = {"train_data_dir": tmp_path / "data.parquet", "image_column": "photo", "max_broken_share": 0.003}
    error = refuse(tmp_path / "output", **arguments)
    assert re.search(r"4 of \d+ rows read are broken, .* `max_broken_share=0.003`.*broken_rows.jsonl names all", error)
    assert len((tmp_path / "output" / "broken_rows.jsonl").read_text().splitlines()) >= 4


def test_options_of_the_recipe_and_samples_along_the_way(finished, data, tmp_path):
    log = launch(
        tmp_path / "output", train_data_dir=data, core=finished[0] / "core", loss_weighting="cosmap", low_res_share=0.25,
        low_res_loss_weight=0.5, offload_ema=True, sample_steps=4, report_to="tensorboard",
    )  # fmt: skip
    assert "grown-16 is done" in log
    samples = tmp_path / "output" / "samples"
    assert {path.name for path in samples.iterdir()} == {
        "grown-16-detail.png", "grown-16-detail-4.png", "grown-16.png", "grown-16-4.png",
    }  # fmt: skip
    assert np.array(Image.open(samples / "grown-16-4.png")).std() > 1
    (events,) = (tmp_path / "output" / "logs" / "grow").glob("events*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    tags = accumulator.Tags()
    assert {"grown-16-detail/samples", "grown-16/samples"} == set(tags["images"])
    assert {"grown-16/val_low_noise_loss_high", "grown-16/grad_norm", "grown-16/memory_gb"} <= set(tags["scalars"])
    # Other images than those of the same run without the options, but of the same data.
    assert not torch.equal(*(weights(folder / "grown-16")["stages.0.decoder.conv_out.weight"]
                             for folder in (tmp_path / "output", finished[0])))  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Bad arguments


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"train_data_dir": "nowhere"}, "`train_data_dir='nowhere'` does not exist"),
        (
            {"train_data_dir": str(SCRIPT.parent), "high_res_data_dir": "nowhere"},
            "`high_res_data_dir='nowhere'` does not exist",
        ),
        ({"block_out_channels": "8,8,8,8,8"}, "`block_out_channels=.*between 1 and"),
        ({"core": "nowhere"}, "`core='nowhere'` is no model"),
        ({"resume_from_checkpoint": "nowhere"}, "'nowhere'` is no complete checkpoint: progress.json is missing"),
        ({"aspect_ratio_buckets": "16,16;18,16"}, "`aspect_ratio_buckets='16,16;18,16'`: 18 is no multiple of 4"),
    ],
)
def test_bad_arguments(arguments, message, here, tmp_path):
    with pytest.raises((ValueError, OSError), match=f"(?s){message}"):
        here(tmp_path / "output", **arguments)
    assert not (tmp_path / "output").exists()


def test_noise_levels_for_each_resolution(finished, data, tmp_path):
    """Those of the grown model's training change nothing before it, nor what the held-out loss is taken over."""
    # Instead of an earlier run, whose phases go, and nothing else.
    shutil.copytree(finished[0], tmp_path / "output")
    shutil.copytree(finished[0] / "grown-16", tmp_path / "output" / "grown-32")
    for name in ("grown-32-detail", "mine"):
        (tmp_path / "output" / name).mkdir()
    config = yaml.safe_load((finished[0] / "config.yaml").read_text())
    (tmp_path / "output" / "config.yaml").write_text(yaml.safe_dump({**config, "resolutions": [8, 32]}))
    launch(
        tmp_path / "output",
        train_data_dir=data,
        logit_mean=[1.0, -9.0],
        logit_std=[1.0, 0.5],
        overwrite_output_dir=True,
    )
    folders = {path.name for path in (tmp_path / "output").iterdir() if path.is_dir()}
    assert folders == {"core", "grown-16-detail", "grown-16", "checkpoints", "samples", "grown-32-detail", "mine"}
    other, own = read_metrics(finished[0]), read_metrics(tmp_path / "output")

    def losses(metrics: list[dict], phase: str) -> list[float]:
        return [line["loss"] for line in metrics if line["phase"] == phase and "loss" in line]

    def held_out_levels(metrics: list[dict]) -> list[set[str]]:
        return [{name for name in line if "val_loss_sigma" in name} for line in metrics if "val_loss" in line]

    assert losses(own, "core") == losses(other, "core")
    assert losses(own, "grown-16-detail") != losses(other, "grown-16-detail")
    assert held_out_levels(own) == held_out_levels(other)


# ----------------------------------------------------------------------------------------------------------------------
# A given core


def test_a_core_without_text_is_refused(tmp_path):
    make_core(cross_attention_dim=None).save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="`core=.*` has no text, but `grow.py` trains on captions"):
        grow.adopt_core(ModelArguments(core=str(tmp_path)))


def test_what_describes_a_core_is_the_cores(finished, tmp_path):
    PartialState(cpu=True)  # which its loggers ask
    core, config = finished[0] / "core", finished[0] / "config.yaml"
    made_it = parse_arguments(["--config", str(config), "--core", str(core)], "")[1]
    expected = asdict(made_it)
    grow.adopt_core(made_it)
    assert asdict(made_it) == {**expected, "text_hidden_size": 32}
    not_said = ModelArguments(core=str(core), max_sequence_length=64)
    grow.adopt_core(not_said)
    assert (not_said.hidden_size, not_said.num_layers, not_said.text_hidden_size) == (16, 1, 32)

    shutil.copytree(core / "text_encoder", tmp_path / "encoder")
    grow.adopt_core(ModelArguments(core=str(core), text_encoder=str(tmp_path / "encoder")))
    grow.adopt_core(ModelArguments(core=str(core), text_encoder="cannot/be_read"))
    BertConfig(hidden_size=32, vocab_size=7).save_pretrained(tmp_path / "bert")
    for given, message in (
        ({"hidden_size": 24}, "`hidden_size=24` is not that of `core=.*core'`, which is 16: leave it out"),
        ({"max_sequence_length": 20}, "`max_sequence_length=20` is not that of .* which is 64"),
        ({"text_num_layers": 3}, "`text_num_layers=3` is not that of .* which is 1"),
        ({"text_encoder": str(tmp_path / "bert")}, r"`text_encoder=.*bert'` is not that of .*: its vocab_size is 7"),
    ):
        with pytest.raises(ValueError, match=message):
            grow.adopt_core(ModelArguments(core=str(core), **given))


def test_the_share_for_the_inner_model(finished, data, here, tmp_path, monkeypatch):
    """It goes to all stages inside the new one, also to those of a core that has grown before."""
    stages, flow_loss = set(), grow.flow_loss

    def spy(model, *args, num_stages=None, **kwargs):
        stages.add((len(model.unet.stages), num_stages, model.training))
        return flow_loss(model, *args, num_stages=num_stages, **kwargs)

    monkeypatch.setattr(grow, "flow_loss", spy)
    here(
        tmp_path / "output", core=finished[0] / "grown-16", train_data_dir=data, resolutions=[16, 32], low_res_share=0.5,
        detail_steps=0, joint_steps=1,
    )  # fmt: skip
    assert stages == {(2, None, True), (2, 1, True), (2, None, False)}


def test_the_plan_counts_the_share_for_the_inner_model():
    planned, counted = {}, {}
    for share in (0.0, 0.5):
        flags = ["--resolutions", "16", "32", "--num_layers", "1", "--core_steps", "0", "--detail_steps", "0"]
        data_args, model_args, args = parse_arguments([*flags, "--low_res_share", str(share)], "")
        phases = grow.list_phases(model_args, args)
        plans, _ = grow.make_plan(phases, data_args, model_args, args, Accelerator(cpu=True))
        planned[share] = plans[-1].train_flops
        core = grow.build_core(model_args, cross_attention_dim=128)
        unet = GrowableUNet2DConditionModel.from_core(core, 32, block_out_channels=(48, 96))
        unet.unfreeze_core()
        unet.set_attention_backend("_native_math")  # on a CPU no other is counted
        x0 = torch.randn(16, 3, 32, 32)
        conditions = {"encoder_hidden_states": torch.randn(16, model_args.max_sequence_length, 128)}
        with FlopCounterMode(display=False) as counter:
            losses = grow.train_losses(
                SimpleNamespace(args=args), phases[-1], unet, x0, x0, torch.rand(16), 2, 0, conditions
            )
            losses.loss.backward()
        counted[share] = counter.get_total_flops() / 16
    assert planned == pytest.approx(counted, rel=1e-3)


def test_a_core_of_another_resolution(finished, data, here, tmp_path):
    with pytest.raises(
        ValueError, match=r"`resolutions=\[16, 32\]` must begin with the resolution of `core=.*which is 8"
    ):
        here(tmp_path / "output", core=finished[0] / "core", resolutions=[16, 32], train_data_dir=data)
