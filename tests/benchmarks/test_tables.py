# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The tables say of the records what their columns promise."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from benchmarks import cascade, evaluate, few_high_res, grow_vs_scratch, queue_of_runs, sampling, scale_core
from benchmarks.queue_of_runs import add_queue_arguments, run_queue
from benchmarks.swd import sliced_wasserstein
from benchmarks.tables import write_json
from diffusers_greedy_grow.flow import enlarge

from ..testing_utils import CAPTIONS, make_core, make_pipeline


SETTING = grow_vs_scratch.SETTINGS[8]
DATA = Path("shapes")


def make_records():
    """Of two seeds of two arms; operations are in units of half of a core's training."""
    curves = {
        "scratch": ([(5.0, 0.4), (10.0, 0.2)], [(5.0, 0.6), (10.0, 0.4)]),
        "ours, detail phase only": ([(3.0, 0.3), (6.0, 0.1)], [(3.0, 0.5), (6.0, 0.3)]),
    }
    records = {}
    for arm in grow_vs_scratch.ARMS:
        for seed, curve in enumerate(curves.get(arm.name, ())):
            for job in grow_vs_scratch.make_jobs(SETTING, arm, seed, DATA, DATA):
                is_core = job.keys["arm"] == "core"
                phase = "core" if is_core else "grown-128"
                lines = [(2.0, 7.0)] if is_core else curve
                records[job.name] = {
                    "name": job.name,
                    "keys": {**job.keys, "flops": 2.0} if is_core else job.keys,
                    "arguments": job.arguments,
                    "images": {phase: 10},
                    "seconds": {phase: 1.0},
                    "curve": [
                        {
                            "phase": phase,
                            "flops": flops,
                            "val_loss": loss,
                            "val_loss_low": loss / 4,
                            "val_loss_high": 3 * loss / 4,
                            "val_low_noise_loss": 9 * loss,
                        }
                        for flops, loss in lines
                    ],
                    "scores": {phase: {} if is_core else {"shape": 0.5 + 0.2 * seed, "swd_128": 100.0 + 20 * seed}},
                }
    return records


def test_the_tables_of_growing():
    records = make_records()
    seconds = {"core": [1.0], "preserve detail": [2.0], "preserve joint": [4.0]}
    first, second = grow_vs_scratch.make_tables(records, SETTING, seconds).values()
    rows = {row["arm"]: row for row in first}
    ours, scratch = rows["ours, detail phase only"], rows["scratch"]
    assert scratch["loss"] == "0.3000 ± 0.1414" and ours["loss"] == "0.2000 ± 0.1414"
    assert scratch["of the best scratch's loss"] == "1.00 ± 0.00" and scratch["reaches it at"] == "100%, 100%"
    # Each seed against its own: .1 / .2 and .3 / .4. Its core's two units count: (2 + 4.5) / 10.
    assert ours["of the best scratch's loss"] == "0.62 ± 0.18" and ours["reaches it at"] == "65%, 65%"
    assert ours["time"] == "0.75"  # 10 * 1 + 10 * 2 of 10 * 4
    assert (ours["images at 16 px"], ours["at 128 px"], scratch["images at 16 px"]) == (10, 10, 0)
    rows = {row["arm"]: row for row in second}
    assert rows["scratch"]["shape"] == "0.60 ± 0.14" and rows["scratch"]["SWD 128"] == "110 ± 14"
    assert rows["ours, detail phase only"]["loss at noise .02-.3"] == "1.800 ± 1.273"


def test_seeds_and_shares_reach_the_runs():
    for arm in grow_vs_scratch.ARMS:
        for seed in (0, 1, 2, 3):
            jobs = grow_vs_scratch.make_jobs(SETTING, arm, seed, DATA, DATA)
            assert bool(jobs) == (seed < arm.num_seeds)
            assert all(job.arguments["seed"] == job.keys["seed"] == seed for job in jobs)
    for share, count in ((1.0, None), (0.3, 300), (0.01, 10)):
        jobs = [job for job in few_high_res.make_jobs(SETTING, 0, share, DATA, 1000, 1.0) if job.keys["arm"] != "core"]
        assert [job.arguments.get("num_high_res_images") for job in jobs] == [count, count]


def test_deeper_cores_see_as_many_images():
    counts = {}
    for layers in scale_core.LAYERS:
        core, growth = scale_core.make_jobs(SETTING, layers, 0, DATA, 1.0)
        counts[layers] = (core.arguments["core_steps"], growth.arguments["detail_steps"][0])
    assert all(pair == pytest.approx(counts[6], rel=0.01) for pair in counts.values())


def test_a_lost_core_is_trained_again_and_keeps_its_record(tmp_path, monkeypatch):
    monkeypatch.setattr(queue_of_runs, "RESULTS", tmp_path / "results")
    ran = []

    def run_job(job, definition, folders, precision):
        if job.core:
            assert (folders[job.core] / "result.json").exists()
        ran.append(job.name)
        write_json(folders[job.name] / "result.json", {})
        return {"name": job.name, "keys": job.keys, "arguments": definition, "turn": len(ran)}

    monkeypatch.setattr(queue_of_runs, "run_job", run_job)
    parser = argparse.ArgumentParser()
    add_queue_arguments(parser)
    args = parser.parse_args(["--work_dir", str(tmp_path), "--workers", "1"])
    (arm,) = (arm for arm in grow_vs_scratch.ARMS if arm.name == "ours, detail phase only")
    core, growth = grow_vs_scratch.make_jobs(SETTING, arm, 0, DATA, DATA)
    run_queue([growth, core], args)  # one worker, the wrong way round
    assert ran == [core.name, growth.name]
    path = tmp_path / "results" / "runs.json"
    path.write_text(json.dumps([one for one in json.loads(path.read_text()) if one["name"] == core.name]))
    (tmp_path / core.name / "result.json").unlink()
    records = run_queue([growth, core], args)
    assert ran[2:] == [core.name, growth.name] and records[core.name]["turn"] == 1


@torch.no_grad()
def test_the_cascade_draws_from_the_cores_image_with_other_noise(monkeypatch):
    drawn, make_noise = [], evaluate.make_noise
    for module in (cascade, evaluate):
        monkeypatch.setattr(module, "make_noise", lambda *a, **k: drawn.append(make_noise(*a, **k)) or drawn[-1])
    pipeline = make_pipeline(make_core())
    unet = cascade.build_unet(32, (8, 16), 32)
    images = cascade.draw_cascade(unet, pipeline, CAPTIONS, False)
    low = 2 * evaluate.draw(pipeline, CAPTIONS, False) - 1
    torch.testing.assert_close(images, (enlarge(low, 2) / 2 + 0.5).clamp(0, 1), atol=1e-3, rtol=0)
    small, large = drawn[0], drawn[1]
    assert large.shape[-1] == 32 and not torch.equal(large.flatten()[:100], small.flatten()[:100])


def test_distances_are_in_units_of_the_true_images():
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(16, 3, 16, 16, generator=generator)
    distance = sliced_wasserstein((real - 0.5) * 3 + 0.5, real)[16]
    assert distance == pytest.approx(1000 * 2 * (2 / torch.pi) ** 0.5, rel=0.1)  # three times the deviation


def test_arms_add_up():
    arms, together = sampling.list_arms(), {}
    for name, settings in sampling.STEPS.items():
        together |= settings
        assert arms.get(f"... + {name}", together) == together
    assert list(arms.values())[-1] == together


def test_evaluate_counts_seconds_of_all_lines(tmp_path, monkeypatch):
    lines = [
        {"phase": "core", "step": 1, "images": 10, "images_per_second": 5.0},
        {"phase": "core", "step": 2, "images": 30, "images_per_second": 10.0},
        {"phase": "core", "step": 2, "val_loss": 1.0, "flops": 3},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    make_pipeline(make_core()).save_pretrained(tmp_path / "core")
    monkeypatch.setattr("sys.argv", ["evaluate", str(tmp_path), "nowhere"])
    evaluate.main()
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == {"images": {"core": 30}, "seconds": {"core": 4.0}, "curve": [lines[2]], "scores": {}}
