# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Plain models: their sizes and budgets, and a small run of each through the queue."""

import json
import signal
from pathlib import Path

import pytest
import torch

from benchmarks import arms, grow_vs_scratch, plain
from benchmarks.evaluate import draw_images
from benchmarks.queue_of_runs import Setting, run_queue
from diffusers_greedy_grow.training.checkpoints import sorted_checkpoints
from diffusers_greedy_grow.training.shapes.scenes import write_shapes


DATA = Path("shapes")
PLAIN_ARMS = [arm for arm in arms.ARMS if arm.is_plain]
SECONDS = {"core": [1.0], "preserve detail": [2.0], "preserve joint": [2.5]}
SECONDS |= {"transformer-16": [3.0], "transformer-8": [4.0], "unet": [5.0]}


@pytest.mark.parametrize("large", [False, True])
def test_sizes_of_plain_models(setting, large):
    setting = setting.enlarge() if large else setting
    with torch.device("meta"):
        models = {name: plain.build_model(name, setting.resolution, setting.hidden_size) for name in plain.MODELS}
        grown = setting.grow(setting.build_core(), "preserve")
    assert models["unet"].num_parameters() == pytest.approx(grown.num_parameters(), rel=0.1)
    for name, patch_size in (("transformer-16", 16), ("transformer-8", 8)):
        config = models[name].config
        assert (config.patch_size, config.num_layers, config.sample_size) == (patch_size, 8, 128)
        assert (config.hidden_size, config.num_attention_heads) == ((256, 4) if large else (128, 2))


def test_rates_of_plain_arms():
    names = [arm.name for arm in PLAIN_ARMS]
    assert len(names) == len(set(names)) == 12 and {"transformer-16", "transformer-8", "unet"} <= set(names)
    for arm in PLAIN_ARMS:
        rate = arm.options["learning_rate"] / plain.MODELS[arm.init]
        assert rate == (0.5 if "half" in arm.name else 2.0 if "twice" in arm.name else 1.0)
        assert arm.num_seeds == (1 if rate != 1.0 else 3) and arm.equal_time == arm.name.endswith("equal time")


@pytest.mark.slow
def test_arms_of_equal_time_take_the_time_of_ours(setting):
    """Steps are counted by seconds per image that were measured; without them these arms do not run."""
    core, ours = arms.make_jobs(setting, arms.find_arm(arms.REFERENCE), 0, DATA, DATA)
    taken = 16 * core.arguments["core_steps"] * 1.0 + 16 * ours.arguments["detail_steps"][0] * 2.0
    for arm in PLAIN_ARMS:
        if arm.equal_time:
            assert arms.make_jobs(setting, arm, 0, DATA, DATA) == []
            (job,) = arms.make_jobs(setting, arm, 0, DATA, DATA, seconds=SECONDS)
            assert 16 * job.arguments["steps"] * SECONDS[arm.init][0] == pytest.approx(taken, rel=0.01)
            run = {"keys": job.keys, "arguments": job.arguments, "images": {"plain": 16 * job.arguments["steps"]}}
            assert grow_vs_scratch.training_seconds(run, {}, SECONDS) == pytest.approx(taken, rel=0.01)
    from_scratch = arms.find_arm("scratch, equal time")
    assert arms.make_jobs(setting, from_scratch, 0, DATA, DATA) == []
    (job,) = arms.make_jobs(setting, from_scratch, 0, DATA, DATA, seconds=SECONDS)
    assert job.arguments["detail_steps"] == [0]
    assert 16 * job.arguments["joint_steps"][0] * SECONDS["preserve joint"][0] == pytest.approx(taken, rel=0.01)
    # At smaller factors, patches of 16 px would leave hardly any tokens.
    assert arms.make_jobs(arms.SETTINGS[4], PLAIN_ARMS[0], 0, DATA, DATA) == []


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", num_train=40, num_validation=8, image_size=32)


@pytest.fixture
def small(monkeypatch) -> Setting:
    """A setting that takes seconds, as the largest one."""
    setting = Setting(resolution=32, block_out_channels="8", cascade_channels=(8,), batch_size=4, hidden_size=64)
    monkeypatch.setattr(arms, "SETTINGS", {2: setting})
    monkeypatch.setattr(plain, "NUM_LAYERS", 1)
    return setting


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformer-16", "unet"])
def test_a_small_run_of_a_plain_model(name, small, data, tmp_path, monkeypatch):
    """It leaves what a run of `grow.py` leaves, resumes bit for bit, and its images can be drawn again."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(signal, "signal", lambda *args: None)  # Ctrl-C is for pytest
    arm = arms.find_arm(name)
    cost = plain.count_step(arm.init, 32, 64, 4, "muon")
    monkeypatch.setattr(arms, "TOTAL_FLOPS", {2: 6 * cost})
    (job,) = arms.make_jobs(small, arm, 0, data, data)
    assert job.arguments["steps"] == 6
    arguments = {**job.arguments, "checkpointing_steps": 3, "checkpoints_total_limit": 9, "train_data_dir": data}
    flags = [f"--{key}={value}" for key, value in arguments.items()]
    results = []
    for more in ([], ["--resume_from_checkpoint=plain-3"]):
        plain.main([*flags, f"--output_dir={tmp_path}", *more])
        assert [path.name for path in sorted_checkpoints(tmp_path / "checkpoints")] == ["plain-3", "plain-6"]
        results.append(json.loads((tmp_path / "result.json").read_text()))
    result, resumed = results
    assert result["images"] == {"plain": 24} and list(result["seconds"]) == list(result["scores"]) == ["plain"]
    assert [line["flops"] for line in result["curve"]] == [step * cost for step in (1, 2, 3, 4, 5, 6)]
    assert {"val_loss", "val_low_noise_loss"} <= set(result["curve"][-1])
    assert resumed["curve"] == result["curve"] and resumed["scores"] == result["scores"]
    assert {"shape", "swd_32"} <= set(result["scores"]["plain"])
    # The loss is that of a model grown by the factor: at its shift, in the bands that pooling by it separates.
    assert arguments["factor"] == 2
    pipeline = plain.load_trained(tmp_path, arguments)
    assert pipeline.scheduler.config.shift == 2.0
    drawn = draw_images(pipeline, ["a large red circle"], bfloat16=False)
    assert drawn.shape == (1, 3, 32, 32) and drawn.isfinite().all()


@pytest.mark.slow
def test_the_queue_runs_a_plain_model(small, data, tmp_path, queue_arguments, monkeypatch):
    monkeypatch.setattr(arms, "TOTAL_FLOPS", {2: 3 * plain.count_step("transformer-8", 32, 64, 4, "muon")})
    jobs = arms.make_jobs(small, arms.find_arm("transformer-8"), 0, data, data)
    folders = ["--work_dir", tmp_path, "--results_dir", tmp_path / "results"]
    records = run_queue(jobs, queue_arguments(*folders, "--mixed_precision", "no"))
    (record,) = records.values()
    assert record["keys"] == {"arm": "transformer-8", "seed": 0, "factor": 2, "core": None}
    curve = grow_vs_scratch.total_curve(record, records)
    assert [line["step"] for _, line in curve] == [1, 2, 3] and curve[-1][0] == record["curve"][-1]["flops"]
