# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""The benchmarks' own arithmetic, and their queue of runs with real, small runs."""

import argparse
import fcntl
import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks import (
    arms,
    cascade,
    few_high_res,
    foreign_cores,
    grow_vs_scratch,
    loader,
    plain,
    queue_of_runs,
    sampling,
    scale_core,
    step_time,
    tables,
)
from benchmarks.queue_of_runs import Setting, core_job, growth_job, run_queue, runs_of_arm
from benchmarks.swd import sliced_wasserstein
from benchmarks.tables import markdown, mean_and_deviation, spread
from diffusers_greedy_grow.flow import enlarge
from diffusers_greedy_grow.training.shapes.scenes import write_shapes

from ..testing_utils import make_grown, make_pipeline


def test_records_name_the_commit_and_whether_the_code_was_changed(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    module = tmp_path / "benchmarks" / "tables.py"
    module.parent.mkdir()
    shutil.copy(tables.__file__, module)
    (tmp_path / "notes.md").write_text("before")
    spec = importlib.util.spec_from_file_location("copied_tables", module)
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)

    assert copied.describe_commit() is None
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "all"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert copied.describe_commit() == commit.strip()
    (tmp_path / "notes.md").write_text("after")
    assert copied.describe_commit() == commit.strip()
    module.write_text(module.read_text() + "# changed\n")
    assert copied.describe_commit() == f"{commit.strip()}-dirty"


def test_sliced_wasserstein_sees_a_difference_at_its_level():
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(16, 3, 16, 16, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)
    real = (real + 0.1 * torch.rand(16, 3, 64, 64, generator=generator)).clamp(0, 1)
    assert set(sliced_wasserstein(real, real)) == {64, 32, 16}
    same = sliced_wasserstein(real, real)
    brighter = sliced_wasserstein(real * 0.5, real)
    # What cancels in each 2 x 2 block shows at the finest level only.
    checks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(32, 32)
    checked = sliced_wasserstein(real + 0.2 * checks, real)
    assert brighter[16] > 3 * same[16]
    assert checked[64] > 3 * same[64] and checked[16] == pytest.approx(same[16], rel=1e-3)
    with pytest.raises(ValueError, match="must be of one shape"):
        sliced_wasserstein(real, real[:8])


def test_tables():
    assert spread([3.0, 1.0, 2.0]) == "2 (1 to 3)"
    assert mean_and_deviation([1.0, 3.0], 2) == "2.00 ± 1.41" and mean_and_deviation([1.0]) == "1.000"
    assert markdown([{"a": 1, "b": 2}, {"a": 3}]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 |  |"


def test_rows_are_kept_with_what_they_are_of(tmp_path):
    path = tmp_path / "results.json"
    first = [{"px": 64, "speed": 1}, {"px": 128, "speed": 2}]
    assert tables.keep_rows(path, first, "px", argparse.Namespace(batch_size=8)) == first
    again = [{"px": 128, "speed": 3}, {"px": 256, "speed": 4}]
    assert tables.keep_rows(path, again, "px", argparse.Namespace(batch_size=4)) == [first[0], *again]
    parts = json.loads(path.read_text())["measured"]
    assert [(part["settings"]["batch_size"], part["rows"]) for part in parts] == [(8, first[:1]), (4, again)]
    assert tables.keep_rows(path, first, "px", argparse.Namespace()) == [again[1], *first]
    assert all("torch" in part["machine"] and part["threads"] for part in json.loads(path.read_text())["measured"])


def test_bars_show_the_numbers_of_a_table(tmp_path, monkeypatch):
    shown, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **kwargs: shown.append(figure) or savefig(figure, *args, **kwargs)
    )
    rows = [
        {"px": 64, "model": "ours", "speed": spread([1.0, 2.0, 4.0])},
        {"px": 64, "model": "other", "speed": "12.5%"},
        {"px": 128, "model": "ours", "speed": "3.96x (3.41 to 4.17)"},
    ]
    tables.draw_bars(rows, "px", "model", "speed", tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1000
    panels = {axis.get_title(): axis for axis in shown[0].axes}
    assert {name: [bar.get_width() for bar in axis.patches] for name, axis in panels.items()} == {
        "px: 64": [2.0, 12.5],
        "px: 128": [3.96],
    }
    assert panels["px: 64"].lines[0].get_xdata().tolist() == [1.0, 4.0] and not len(
        panels["px: 64"].lines[1].get_xdata()
    )
    assert [label.get_text() for label in panels["px: 64"].get_yticklabels()] == ["ours", "other"]


def test_flops_to_reach():
    curve = [(flops, {"val_loss": loss}) for flops, loss in ((10.0, 0.4), (20.0, 0.2), (30.0, 0.3), (40.0, 0.1))]
    assert grow_vs_scratch.flops_to_reach(curve, 0.5) == 10.0
    assert grow_vs_scratch.flops_to_reach(curve, 0.3) == pytest.approx(15.0)
    assert grow_vs_scratch.flops_to_reach(curve, 0.15) == pytest.approx(37.5)
    assert grow_vs_scratch.flops_to_reach(curve, 0.05) is None
    assert grow_vs_scratch.flops_to_reach(curve[:1], 0.4) == 10.0 and grow_vs_scratch.flops_to_reach([], 0.4) is None


def test_arms_are_held_against_the_best_without_growth_of_the_most_seeds():
    def runs(*losses: float) -> dict[int, dict]:
        return {seed: {"curve": [{"val_loss": 9.0}, {"val_loss": loss}]} for seed, loss in enumerate(losses)}

    by_arm = {"scratch": runs(0.5, 0.4), "scratch, a": runs(0.3, 0.5), "scratch, b": runs(0.1), "ours": runs(0.1, 0.1)}
    assert grow_vs_scratch.find_baseline(by_arm) is by_arm["scratch, a"]
    by_arm |= {"transformer-16": runs(0.2, 0.2), "transformer-16, equal time": runs(0.1, 0.1)}
    by_arm |= {"scratch, equal time": runs(0.1, 0.1)}
    assert grow_vs_scratch.find_baseline(by_arm) is by_arm["transformer-16"]
    assert grow_vs_scratch.find_baseline({"ours": runs(0.1)}) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting, scale",
    [(arms.SETTINGS[8], 1.0), (arms.SETTINGS[8].enlarge(), arms.LARGE_SCALE)],
    ids=["usual", "large"],
)
def test_the_arms_of_a_comparison_cost_the_same(setting, scale):
    for arm in arms.ARMS:
        jobs = arms.make_jobs(setting, arm, 0, None, None, scale)
        if arm.equal_time:
            continue
        init, optimizer = "random" if arm.init == "random" else "preserve", arm.options.get("optimizer", "muon")
        costs, flops = setting.plans(init, optimizer), 0
        for job in jobs:
            arguments = job.arguments
            if arm.init != "cascade":
                assert arguments["optimizer"] == optimizer
            if arm.is_plain:
                options = (
                    arguments[name] for name in ("model", "resolution", "hidden_size", "batch_size", "optimizer")
                )
                flops += arguments["steps"] * plain.count_step(*options)
                continue
            if job.keys["arm"].startswith("cascade"):
                cost = cascade.count_flops(128, arguments["block_out_channels"], 128, 16)
                flops += arguments["steps"] * arguments["batch_size"] * cost
                continue
            if job.keys["arm"] == "core":
                flops += arguments["core_steps"] * costs["core"].flops
                assert costs["core"].images == arguments["train_batch_size"][0]
            else:
                assert costs["detail"].images == costs["joint"].images == arguments["train_batch_size"][1]
                flops += arguments["detail_steps"][0] * costs["detail"].flops
                flops += arguments["joint_steps"][0] * costs["joint"].flops
        assert flops == pytest.approx(scale * arms.TOTAL_FLOPS[8], rel=0.002), arm.name


@pytest.mark.slow
def test_the_queue_runs_what_is_missing_and_nothing_twice(tmp_path, queue_arguments):
    setting = Setting(
        resolution=32,
        block_out_channels="8",
        cascade_channels=(8,),
        batch_size=4,
        hidden_size=16,
        num_layers=1,
        num_attention_heads=2,
    )
    data = write_shapes(tmp_path / "shapes", num_train=40, num_validation=24, image_size=32)
    costs = setting.plans()
    core = core_job(setting, 0, 3 * 32 * costs["core"].train_flops, data)
    core.arguments["resolutions"] = [16, 32]
    growth = growth_job(setting, "ours", 0, 8 * costs["joint"].train_flops, 0.5, data, core)
    folders = ["--work_dir", tmp_path, "--results_dir", tmp_path / "results"]
    args = queue_arguments(*folders, "--mixed_precision", "no")

    records = run_queue([core, growth], args)
    assert set(records) == {core.name, growth.name}
    record = records[growth.name]
    assert record["keys"] == {"arm": "ours", "seed": 0, "factor": 2, "core": core.name}
    detail, joint = (growth.arguments[name][0] for name in ("detail_steps", "joint_steps"))
    assert record["images"] == {"grown-32-detail": 4 * detail, "grown-32": 4 * joint} and joint == 1
    assert record["curve"][-1]["flops"] == pytest.approx(8 * costs["joint"].train_flops, rel=0.5)
    for scores in record["scores"].values():
        assert set(scores) >= {"swd_32", "swd_16", "shape"} and "texture" not in scores

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("log.txt")}
    assert len(before) == 2
    again = run_queue([core, growth], args)
    assert len(record["core_weights"]) == 12 and record["core_weights"] == records[core.name]["core_weights"]
    assert json.dumps(again, sort_keys=True) == json.dumps(records, sort_keys=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("log.txt")} == before

    # Nor on another machine, where another precision is fast; the record says which it was.
    assert record["mixed_precision"] == "no"
    run_queue([core, growth], queue_arguments(*folders, "--mixed_precision", "bf16"))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("log.txt")} == before

    # The record of a resumed run names the commit that it began with.
    made_by = tmp_path / growth.name / "made_by.json"
    made_by.write_text(json.dumps({**json.loads(made_by.read_text()), "commit": "earlier"}))
    path = tmp_path / "results" / "runs.json"
    path.write_text(json.dumps([records[core.name]]))
    with open(tmp_path / ".queue", "w", encoding="utf-8") as at_work:
        fcntl.flock(at_work, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="Another queue runs jobs in"):
            run_queue([core, growth], args)
    again = run_queue([core, growth], args)[growth.name]
    assert again["commit"] == "earlier" and again["scores"] == record["scores"]

    # A record with other arguments is refused.
    growth.arguments["logit_mean"] = [1.0, 0.5]
    with pytest.raises(ValueError, match=rf"{growth.name} has been run with other values of \['logit_mean'\]"):
        run_queue([growth], args)


@pytest.mark.slow
def test_a_failed_core_stops_what_grows_from_it(tmp_path, queue_arguments):
    core, growth = arms.make_jobs(arms.SETTINGS[2], arms.find_arm("ours"), 0, tmp_path / "no", tmp_path / "no", 0.01)
    args = queue_arguments("--work_dir", tmp_path, "--results_dir", tmp_path / "results")
    with pytest.raises(RuntimeError, match=f"{core.name} failed: see .*log.txt"):
        run_queue([core, growth], args)
    assert not (tmp_path / growth.name).exists() and not (tmp_path / "results").exists()


def test_results_of_other_data_or_of_a_trial_do_not_mix(queue_arguments):
    own_data = ["--train_data_dir", "data/emoji.parquet"]
    other_data = ["--train_data_dir", "other_data/emoji.parquet"]
    given = [[], ["--quick"], ["--large"], own_data, [*own_data, "--large"], other_data]
    work_dirs, results = zip(*(queue_of_runs.locate_folders(queue_arguments(*flags)) for flags in given))
    assert len(set(work_dirs)) == len(set(results)) == 6 and results[0] == queue_arguments().results_dir


def test_two_records_of_one_seed_are_told_apart_by_the_user():
    records = {name: {"name": name, "keys": {"arm": "scratch", "factor": 8, "seed": 0}} for name in ("old", "new")}
    assert [run["name"] for run in runs_of_arm({"new": records["new"]}, "scratch", 8)] == ["new"]
    with pytest.raises(ValueError, match="old, new"):
        runs_of_arm(records, "scratch", 8)


def list_jobs(setting: Setting) -> list[queue_of_runs.Job]:
    """List the runs of all benchmarks, with repetitions."""
    data = Path("shapes-128px-20000")
    times = tables.read_json(tables.RESULTS / "grow_vs_scratch_time.json")
    jobs = []
    for seed in (0, 1, 2):
        for factor, one in arms.SETTINGS.items():
            own, seconds = Path(f"shapes-{one.resolution}px-20000"), times.get(str(factor), {}).get("seconds")
            jobs += [job for arm in arms.ARMS for job in arms.make_jobs(one, arm, seed, own, data, seconds=seconds)]
        for share in few_high_res.SHARES:
            jobs += few_high_res.make_jobs(setting, seed, share, data, 20000, 1.0)
        for num_layers in scale_core.LAYERS:
            jobs += scale_core.make_jobs(setting, num_layers, seed, data, 1.0)
        for core in foreign_cores.NAMES:
            own = Path(f"shapes-{arms.SETTINGS[foreign_cores.FACTOR].resolution}px-20000")
            jobs += foreign_cores.make_jobs(arms.SETTINGS[foreign_cores.FACTOR], core, seed, own, data)
    return jobs


@pytest.mark.slow
def test_a_name_means_the_same_run_in_all_benchmarks(setting):
    jobs, inputs = list_jobs(setting), {}
    for job in jobs:
        assert inputs.setdefault(job.name, queue_of_runs.run_inputs(job)) == queue_of_runs.run_inputs(job)
    assert len(inputs) < len(jobs)


def test_the_committed_records_are_found_by_name_and_arguments(setting):
    """The queue would not run any of them again, and would refuse none."""
    inputs = {job.name: queue_of_runs.run_inputs(job) for job in list_jobs(setting)}
    records = queue_of_runs.read_records(tables.RESULTS / "runs.json")
    assert records
    for name, record in records.items():
        assert record["arguments"] == inputs[name], name


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("factor", arms.SETTINGS)
def test_the_cascade_is_as_large_as_the_grown_model(factor, large):
    setting = arms.SETTINGS[factor]
    setting = setting.enlarge() if large else setting
    costs = setting.plans()
    with torch.device("meta"):
        unet = cascade.build_unet(setting.resolution, setting.cascade_channels, 128)
    assert costs["core"].parameters + unet.num_parameters() == pytest.approx(costs["joint"].parameters, rel=0.05)


@torch.no_grad()
def test_the_cascade_begins_with_the_enlarged_image():
    unet, text = cascade.build_unet(16, (8, 16), 32), torch.randn(2, 4, 32)
    low, x, sigma = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 16, 16), torch.tensor([0.3, 0.9])
    drawn = cascade.predict(unet, x, sigma, low, 4, encoder_hidden_states=text)
    torch.testing.assert_close(drawn, enlarge(low, 4))


def test_a_run_takes_as_long_as_its_images(queue_arguments):
    """Every phase of every arm is timed, except those that the table leaves out."""
    setting = Setting(32, (8,), "8", 2, hidden_size=16, num_layers=1)
    seconds = grow_vs_scratch.time_steps(setting, queue_arguments("--mixed_precision", "no"), repeats=2)
    assert set(map(len, seconds.values())) == {2} and min(map(min, seconds.values())) > 0

    seconds = {"core": [1.0], "preserve detail": [10.0], "preserve joint": [100.0], "random detail": [1e3]}
    seconds |= {"random joint": [1e4], "cascade": [1e5]}
    data, expected = (
        Path("shapes"),
        {
            "scratch": {"joint": 1e2},
            "paper's growth": {"core": 1.0, "detail": 1e3, "joint": 1e4},
            "ours, no detail phase": {"core": 1.0, "joint": 1e2},
            "ours, long detail phase": {"core": 1.0, "detail": 10.0, "joint": 1e2},
            "ours": {"core": 1.0, "detail": 10.0},
            "cascade": {"core": 1.0, "cascade": 1e5},
            "ours, AdamW": None,
        },
    )
    for name, costs in expected.items():
        arm = arms.find_arm(name)
        records = {}
        for job in arms.make_jobs(arms.SETTINGS[8], arm, 0, data, data):
            detail, joint = (job.arguments.get(f"{kind}_steps", [0])[0] for kind in ("detail", "joint"))
            images = {"grown-128": 3 * joint} if joint else {}
            if detail:
                images["grown-128-detail" if joint else "grown-128"] = 2 * detail
            images = {"core": {"core": 5}, "cascade": {"cascade": 7}}.get(job.keys["arm"], images)
            records[job.name] = {"keys": job.keys, "arguments": job.arguments, "images": images}
        taken = grow_vs_scratch.training_seconds(records[job.name], records, seconds)
        if costs is None:
            assert taken is None
            continue
        counts = {"core": 5, "detail": 2 * detail, "joint": 3 * joint, "cascade": 7}
        assert taken == pytest.approx(sum(counts[kind] * cost for kind, cost in costs.items())), name


def test_the_plain_loop_is_what_the_pipeline_does():
    """The baseline of the sampling table draws the same images as the pipeline."""
    pipeline = make_pipeline(make_grown(), shift=2.0)
    latents = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = ["a large red circle", "a small blue square"]
    expected = sampling.sample(pipeline, prompts, latents, own_loop=False)
    torch.testing.assert_close(sampling.plain_loop(pipeline, prompts, latents), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("resolution", [64, 128, 256])
def test_peers_have_as_many_parameters(resolution):
    with torch.device("meta"):
        goal = step_time.build("ours", resolution).num_parameters()
        for name in step_time.PEERS:
            assert abs(step_time.build(name, resolution).num_parameters() / goal - 1) < 0.05, name


def test_the_loaders_that_are_timed_show_the_same_images(tmp_path):
    loader.write_images(tmp_path, count=12, size=32, num_files=2)
    args = argparse.Namespace(resolution=16, batch_size=2)
    parquet, tar = (
        {tuple(image.flatten().tolist()) for batch in batches for image in batch["pixel_values"]}
        for batches in (
            loader.open_loader(name, tmp_path, args, 0, 6) for name in ("streamed parquet", "streamed tar")
        )
    )
    assert parquet == tar and len(parquet) == 12
    assert [len(batch["caption"]) for batch in loader.open_loader("parquet", tmp_path, args, 0, 3)] == [2, 2, 2]
