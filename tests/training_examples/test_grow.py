# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Whole runs of `grow.py` on real files, with small models: what they leave behind, and the ways to train."""

import json
import platform
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_greedy_grow import GreedyGrowPipeline, GrowableUNet2DConditionModel, ShallowUNet2DModel
from diffusers_greedy_grow.flow import detail_variance
from diffusers_greedy_grow.training.data.images import normalize, to_pixel_values

from ..data_utils import write_parquet
from .launching import GROW, assert_same_weights, grow_flags, launch_script, read_metrics, run, weights


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
    # The variance of the images' high-frequency band.
    (variance,) = pipeline.config.detail_variances
    assert 0 < variance < 1
    pipeline("image number 3", num_inference_steps=2, core_first="auto", guidance_resolution="core")


def test_growing_starts_from_the_averages_and_the_detail_phase_leaves_the_core_alone(finished):
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


def test_a_phase_saves_its_averages(finished):
    checkpoint = finished[0] / "checkpoints" / "grown-16-6"
    averages, last = load_file(checkpoint / "ema.safetensors"), load_file(checkpoint / "model.safetensors")
    saved = weights(finished[0] / "grown-16")
    assert all(torch.equal(averages[f"unet.{name}"], weight) for name, weight in saved.items())
    assert not all(torch.equal(last[f"unet.{name}"], weight) for name, weight in saved.items())


def test_each_phase_starts_a_new_average(finished):
    """Its weights start from the averages of the phase before. The decay starts again: a slow one would hold new weights back."""
    checkpoints = [json.loads(path.read_text()) for path in (finished[0] / "checkpoints").glob("*/progress.json")]
    assert any(progress["phase"] != "core" for progress in checkpoints)
    for progress in checkpoints:
        assert progress["ema_optimization_step"] == progress["step"]


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
    for phase in ("core", "grown-16-detail", "grown-16"):
        (line,) = [line for line in metrics if line["phase"] == phase and "nearest_ratio" in line]
        assert line["nearest_ratio"] == pytest.approx(line["nearest_distance"] / line["nearest_distance_held_out"])
    for name in ("samples.png", "loss.png", "nearest.png"):
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


@pytest.mark.slow
def test_the_resolved_config_makes_the_same_run(finished, tmp_path):
    """Start from the YAML file alone, with one flag that wins over it, by `accelerate launch`; `finished` was run in a fork."""
    output_dir, _ = finished
    arguments = ["--config", str(output_dir / "config.yaml"), "--output_dir", str(tmp_path / "again")]
    done = launch_script(GROW, arguments)
    assert done.returncode == 0, done.stdout[-9000:]
    for name in ("core", "grown-16-detail", "grown-16"):
        assert_same_weights(output_dir / name, tmp_path / "again" / name)


# ----------------------------------------------------------------------------------------------------------------------
# Other ways to train


@pytest.mark.slow
@pytest.mark.parametrize(
    "options,compiled",
    [(["--dynamo_use_regional_compilation"], "attention.py"), (["--dynamo_use_fullgraph"], "trained_model.py")],
    ids=["blocks", "model"],
)
def test_accelerate_compiles(options, compiled, finished, data, tmp_path):
    """The whole model is one graph in each phase, of the phase's own size."""
    done = launch_script(
        GROW, grow_flags(tmp_path / "output", train_data_dir=data),
        options=["--dynamo_backend", "eager", *options], TORCH_LOGS="dynamo",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-9000:]
    assert re.search(rf"start tracing forward .*{re.escape(compiled)}", done.stdout)
    for name in ("core", "grown-16-detail", "grown-16"):
        assert_same_weights(tmp_path / "output" / name, finished[0] / name)


@pytest.mark.slow
def test_compile(data, tmp_path):
    arguments = {"core_steps": 2, "detail_steps": 0, "joint_steps": 0, "train_data_dir": data, "compile": "model"}
    done = launch_script(GROW, grow_flags(tmp_path / "output", **arguments), TORCH_LOGS="dynamo,graph_code")
    assert done.returncode == 0, done.stdout[-9000:]
    assert re.search(r"start tracing forward .*trained_model.py", done.stdout) and "compile_fx" in done.stdout


def test_gradient_accumulation_follows_the_large_batch(data, tmp_path):
    steps = {"core_steps": 10, "detail_steps": 0, "joint_steps": 0, "logging_steps": 1, "train_data_dir": data}
    log = run(tmp_path / "output", train_batch_size=2, gradient_accumulation_steps=2, report_to="tensorboard", **steps)
    lines = [line for line in read_metrics(tmp_path / "output") if "loss" in line]
    assert [line["images"] for line in lines] == list(range(4, 44, 4))
    run(tmp_path / "large", train_batch_size=4, **steps)
    for a, b in zip(lines, [line for line in read_metrics(tmp_path / "large") if "loss" in line], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-3) and b["loss_low"] == pytest.approx(
            a["loss_low"], rel=2e-3
        )
    assert not (tmp_path / "output" / "grown-16").exists() and "core is done" in log
    assert list((tmp_path / "output" / "logs").rglob("events.out.tfevents*"))


def test_a_given_core_and_several_stages(finished, tmp_path):
    core = finished[0] / "core"
    write_parquet(tmp_path / "data.parquet", caption_column="caption")
    log = run(
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
        is_slow = not {"amx_bf16", "avx512_bf16"} & set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
        assert ("This CPU has no instructions for bfloat16" in log) == is_slow


def test_a_core_that_was_only_grown(finished, data, tmp_path):
    """A pipeline that `from_core` returns has no variance of detail, and grows nevertheless."""
    grown = GreedyGrowPipeline.from_core(finished[0] / "core", 16, block_out_channels=(8,))
    grown.save_pretrained(tmp_path / "core")
    run(tmp_path / "output", train_data_dir=data, core=tmp_path / "core", resolutions=[16, 32], joint_steps=0)
    assert GreedyGrowPipeline.from_pretrained(tmp_path / "output" / "grown-32").config.detail_variances is None


@pytest.mark.slow
def test_the_papers_recipe_with_a_pretrained_text_encoder(finished, data, tmp_path):
    encoder = finished[0] / "core"
    # A folder that holds tokenizer and encoder side by side, as repositories on the Hub do.
    pipeline = GreedyGrowPipeline.from_pretrained(encoder)
    pipeline.text_encoder.save_pretrained(tmp_path / "encoder")
    pipeline.tokenizer.save_pretrained(tmp_path / "encoder")
    run(tmp_path / "output", train_data_dir=data, init="random", text_encoder=tmp_path / "encoder")
    for name in ("core", "grown-16"):
        for key, value in weights(encoder, "text_encoder").items():
            assert torch.equal(weights(tmp_path / "output" / name, "text_encoder")[key], value)
    grown = weights(tmp_path / "output" / "grown-16-detail")
    core = weights(tmp_path / "output" / "core")
    kept = [name for name in core if f"core.{name}" in grown]
    assert len(kept) > 10 and all(torch.equal(grown[f"core.{name}"], core[name]) for name in kept)
    assert grown["stages.0.conv_to_inner.weight"].any()


@pytest.mark.slow
def test_training_from_scratch(data, tmp_path):
    """The baseline: everything trains at the high resolution from the start, the text encoder too."""
    arguments = {"train_data_dir": data, "core_steps": 0, "detail_steps": 0, "joint_steps": 2}
    run(tmp_path / "short", **arguments)
    run(tmp_path / "long", **{**arguments, "joint_steps": 12})
    assert {line["phase"] for line in read_metrics(tmp_path / "long")} == {"grown-16"}
    for component in ("unet", "text_encoder"):
        short, long = (weights(tmp_path / name / "grown-16", component) for name in ("short", "long"))
        assert all(not torch.equal(short[name], long[name]) for name in short if long[name].ndim > 1), component


@pytest.mark.slow
def test_few_high_resolution_images(data, tmp_path):
    """The core sees all images. Above its resolution there is only one, and the growth measures its detail there."""
    arguments = {"train_data_dir": data, "core_steps": 2, "detail_steps": 1, "joint_steps": 0}
    log = run(tmp_path / "output", num_high_res_images=1, **arguments)
    assert "Images to train on: 57 at the core's resolution, 1 above it; 3 held out" in log
    (variance,) = GreedyGrowPipeline.from_pretrained(tmp_path / "output" / "grown-16").config.detail_variances
    images = [to_pixel_values(Image.open(path), 16) for path in sorted(data.rglob("*.png"))]
    variances = [detail_variance(normalize(image[None], 1), 2) for image in images]
    assert min(abs(variance - other) for other in variances) < 1e-6

    # A joint phase that is added later starts from the phase that was the last.
    shutil.copytree(tmp_path / "output" / "grown-16", tmp_path / "detail")
    later = {"joint_steps": 2, "resume_from_checkpoint": "latest", "resume_with_changes": True}
    log = run(tmp_path / "output", num_high_res_images=1, **{**arguments, **later})
    assert "core is done" not in log and "grown-16 is done" in log
    assert_same_weights(tmp_path / "output" / "grown-16-detail", tmp_path / "detail")
    last = weights(tmp_path / "output" / "grown-16")["core.conv_in.weight"]
    assert not torch.equal(last, weights(tmp_path / "detail")["core.conv_in.weight"])


def test_shapes_by_default(tmp_path):
    small = {"shapes_images": 50, "num_scored_images": 24, "resolutions": [16, 64], "train_batch_size": 2}
    log = run(tmp_path / "output", core_steps=2, detail_steps=1, joint_steps=1, **small)
    assert "Drawing 50 captioned shapes" in log
    scores = [line for line in read_metrics(tmp_path / "output") if "score_color" in line]
    assert [line["phase"] for line in scores] == ["core", "grown-64-detail", "grown-64"]
    assert all(0 <= line[f"score_{name}"] <= 1 for line in scores for name in ("shape", "texture", "background"))
    assert re.search(r"chance \(1 object\) +0.17", log)


def test_options_of_the_recipe_and_samples_along_the_way(finished, data, tmp_path):
    log = run(
        tmp_path / "output", train_data_dir=data, core=finished[0] / "core", loss_weighting="cosmap",
        offload_ema=True, sample_steps=4, report_to="tensorboard",
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
    # The options change the weights.
    assert not torch.equal(*(weights(folder / "grown-16")["stages.0.decoder.conv_out.weight"]
                             for folder in (tmp_path / "output", finished[0])))  # fmt: skip


@pytest.mark.slow
def test_noise_levels_for_each_resolution(finished, data, tmp_path):
    """The noise levels of a grown model change neither the core's training nor the levels of the held-out loss."""
    # It replaces an earlier run: the phases of that run are removed, and nothing else.
    shutil.copytree(finished[0], tmp_path / "output")
    shutil.copytree(finished[0] / "grown-16", tmp_path / "output" / "grown-32")
    for name in ("grown-32-detail", "mine"):
        (tmp_path / "output" / name).mkdir()
    config = yaml.safe_load((finished[0] / "config.yaml").read_text())
    (tmp_path / "output" / "config.yaml").write_text(yaml.safe_dump({**config, "resolutions": [8, 32]}))
    run(
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
