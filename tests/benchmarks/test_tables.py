# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The tables say of the records what their columns promise."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import cascade, evaluate, few_high_res, grow_vs_scratch, plain, queue_of_runs, sampling, scale_core
from benchmarks.arms import ARMS, find_arm, make_jobs
from benchmarks.queue_of_runs import run_queue
from benchmarks.swd import sliced_wasserstein
from benchmarks.tables import write_json
from diffusers_greedy_grow.flow import enlarge

from ..testing_utils import CAPTIONS, make_core, make_pipeline


DATA = Path("shapes")
# Per image, as `grow_vs_scratch.time_steps` measures them.
SECONDS = {name: [1.0] for name in ("core", "preserve detail", "preserve joint", *plain.MODELS)}


def test_the_tables_of_growing(records, setting):
    seconds = {"core": [1.0], "preserve detail": [2.0], "preserve joint": [4.0]}
    tables = grow_vs_scratch.make_tables(records, setting, seconds)
    first, details = ({row["arm"]: row for row in table} for table in tables)
    assert first["scratch"] == {
        "arm": "scratch",
        "loss": "0.3000 ± 0.1414",
        "low-noise loss": "2.700 ± 1.273",
        "alignment": "0.70 ± 0.07",  # shapes .5 and .7, colors .8
        "SWD 128; 64": "110 ± 14; 50 ± 0",
        "time, minutes": "0.7 ± 0.0",  # 10 * 4 seconds
    }
    assert first["ours"]["loss"] == "0.2000 ± 0.1414"
    assert details["scratch"]["loss / baseline's"] == "1.00 ± 0.00"
    assert details["scratch"]["compute to baseline's loss"] == "100%, 100%"
    # Each seed against its own: .1 / .2 and .3 / .4. Its core's two units count: (2 + 4.5) / 10.
    ours = details["ours"]
    assert ours["loss / baseline's"] == "0.62 ± 0.18"
    assert ours["compute to baseline's loss"] == "65%, 65%"
    assert ours["time / baseline's"] == "0.75"  # 10 * 1 + 10 * 2 of 10 * 4
    assert (ours["images at 16 px"], ours["images at 128 px"], details["scratch"]["images at 16 px"]) == (10, 10, 0)
    assert details["scratch"]["shapes"] == "0.60 ± 0.14" and "SWD 128" not in details["scratch"]
    assert ours["SWD 32"] == "30 ± 0" and ours["low band"] == "0.0500 ± 0.0354"


def test_alignment_of_stickers_is_retrieval_and_times_are_those_recorded(records, setting):
    for run in records.values():
        is_core = run["keys"]["arm"] == "core"
        run["seconds"] = {"core": 30.0} if is_core else {"grown-128": 90.0}
        scores = {"swd_128": 1.0, "style": 0.9, "retrieval": 0.3}
        if run["keys"]["arm"] == "ours" and run["keys"]["seed"] == 1:  # the others were scored before
            scores["kid"] = 4.0
        run["scores"] = {"core": {}} if is_core else {"grown-128": scores}
    first, details = (
        {row["arm"]: row for row in table} for table in grow_vs_scratch.make_tables(records, setting, None)
    )
    assert first["scratch"]["alignment"] == "0.30 ± 0.00" and first["scratch"]["SWD 128; 64"] == "1 ± 0; "
    assert first["scratch"]["time, minutes"] == "1.5 ± 0.0"
    assert first["ours"]["time, minutes"] == "2.0 ± 0.0"
    assert "time / baseline's" not in details["scratch"]
    assert (details["scratch"]["style"], details["scratch"]["KID"]) == ("0.90 ± 0.00", "")
    assert details["ours"]["KID"] == "4.00"


@pytest.mark.slow
def test_seeds_and_shares_reach_the_runs(setting):
    for arm in ARMS:
        for seed in (0, 1, 2, 3):
            jobs = make_jobs(setting, arm, seed, DATA, DATA, seconds=SECONDS)
            assert bool(jobs) == (seed < arm.num_seeds)
            assert all(job.arguments["seed"] == job.keys["seed"] == seed for job in jobs)
    for share, count in ((1.0, None), (0.3, 300), (0.01, 10)):
        jobs = [job for job in few_high_res.make_jobs(setting, 0, share, DATA, 1000, 1.0) if job.keys["arm"] != "core"]
        assert [job.arguments.get("num_high_res_images") for job in jobs] == [count, count]


def test_deeper_cores_see_as_many_images(setting):
    counts = {}
    for layers in scale_core.LAYERS:
        core, growth = scale_core.make_jobs(setting, layers, 0, DATA, 1.0)
        counts[layers] = (core.arguments["core_steps"], growth.arguments["detail_steps"][0])
    assert all(pair == pytest.approx(counts[6], rel=0.01) for pair in counts.values())


def test_a_lost_core_is_trained_again_and_keeps_its_record(tmp_path, monkeypatch, setting, queue_arguments):
    ran = []

    def run_job(job, inputs, folders, args):
        if job.core:
            assert (folders[job.core] / "result.json").exists()
        ran.append(job.name)
        write_json(folders[job.name] / "result.json", {})
        return {"name": job.name, "keys": job.keys, "arguments": inputs, "turn": len(ran)}

    monkeypatch.setattr(queue_of_runs, "run_job", run_job)
    args = queue_arguments("--work_dir", tmp_path, "--results_dir", tmp_path / "results", "--workers", 1)
    core, growth = make_jobs(setting, find_arm("ours"), 0, DATA, DATA)
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
    low = evaluate.draw_images(pipeline, CAPTIONS, False)
    images = cascade.draw_cascade(unet, pipeline, low, CAPTIONS, False)
    enlarged = enlarge(2 * low - 1, 2) / 2 + 0.5
    torch.testing.assert_close(images, enlarged.clamp(0, 1), atol=1e-3, rtol=0)
    small, large = drawn[0], drawn[1]
    assert large.shape[-1] == 32 and not torch.equal(large.flatten()[:100], small.flatten()[:100])


def test_distances_are_in_units_of_the_true_images():
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(16, 3, 16, 16, generator=generator)
    distance = sliced_wasserstein((real - 0.5) * 3 + 0.5, real)[16]
    assert distance == pytest.approx(1000 * 2 * (2 / torch.pi) ** 0.5, rel=0.1)  # three times the deviation


def test_arms_add_up():
    arms, together = sampling.list_arms(), {}
    for name, settings in sampling.WAYS.items():
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
    assert result == {
        "images": {"core": 30},
        "seconds": {"core": 4.0},
        "curve": [lines[2]],
        "scores": {},
        "nearest_ratio": {},
    }
