# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The phases of a run, and a run's totals over them."""

import json

import pytest
from accelerate import Accelerator

from diffusers_greedy_grow.hub.lineage import get_lineage
from diffusers_greedy_grow.training.parsing import parse_arguments
from diffusers_greedy_grow.training.phases import list_phases
from diffusers_greedy_grow.training.plan import plan_phases
from diffusers_greedy_grow.training.run import Run

from ..testing_utils import make_grown


def parse(*flags: str):
    return parse_arguments(list(flags), "")


def list_parsed(*flags: str) -> list:
    _, model_args, args = parse(*flags)
    return list_phases(model_args, args)


def test_each_phase_has_its_own_values():
    """The last value of an argument that has one per resolution holds for all further resolutions."""
    phases = list_parsed(
        *(
            "--resolutions",
            "8",
            "32",
            "64",
            "--core_steps",
            "5",
            "--detail_steps",
            "6",
            "7",
            "--joint_steps",
            "0",
            "9",
        ),
        *("--learning_rate", "0.01", "0.002", "--train_batch_size", "4", "3", "2", "--logit_mean", "0.5", "-0.5"),
        *("--logit_std", "0.9", "1.2", "--loss_weighting", "sigmoid", "cosmap"),
    )
    assert [(p.index, p.name, p.kind, p.stage, p.resolution, p.steps) for p in phases] == [
        (0, "core", "core", 0, 8, 5),
        (1, "grown-32", "detail", 1, 32, 6),
        (3, "grown-64-detail", "detail", 2, 64, 7),
        (4, "grown-64", "joint", 2, 64, 9),
    ]
    assert [p.learning_rate for p in phases] == [0.01, 0.002, 0.002, 0.002]
    assert [p.batch_size for p in phases] == [4, 3, 2, 2]
    assert [(p.logit_mean, p.logit_std, p.loss_weighting) for p in phases] == [
        (0.5, 0.9, "sigmoid"), *[(-0.5, 1.2, "cosmap")] * 3,
    ]  # fmt: skip


def test_a_given_core_has_no_phase_of_its_own():
    assert [phase.name for phase in list_parsed("--core", "somewhere", "--joint_steps", "9")] == [
        "grown-64-detail",
        "grown-64",
    ]


def test_a_detail_phase_stays_the_same_phase_when_a_joint_one_is_added():
    alone, _ = list_parsed("--joint_steps", "0")[1], None
    detail, joint = list_parsed()[1:]
    assert alone.is_same(detail.index, detail.name) and detail.is_same(alone.index, alone.name)
    assert not joint.is_same(alone.index, alone.name) and not detail.is_same(joint.index, joint.name)


def test_what_a_phase_freezes_and_records():
    grown = make_grown()
    detail, joint = list_parsed()[1:]
    detail.freeze(grown)
    assert not any(parameter.requires_grad for parameter in grown.core.parameters())
    joint.freeze(grown)
    assert all(parameter.requires_grad for parameter in grown.parameters())
    joint.record(grown, steps=3, images_per_step=8, seed=5)
    joint.record(grown, steps=4, images_per_step=8, seed=5)  # replaces what the same phase recorded before
    *_, before, last = get_lineage(grown)
    assert before.get("phase") is None
    assert last == {
        "phase": "grown-64", "resolution": 64, "trained": "everything", "steps": 4, "images": 32, "seed": 5,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path) -> Run:
    flags = "--resolutions 8 16 --hidden_size 16 --num_layers 1 --block_out_channels 8 --text_hidden_size 32".split()
    data_args, model_args, args = parse(*flags, "--gradient_accumulation_steps", "2", "--output_dir", str(tmp_path))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    phases = list_phases(model_args, args)
    plans, _ = plan_phases(phases, data_args, model_args, args, accelerator)
    return Run(accelerator, tmp_path, (data_args, model_args, args), phases, plans, fingerprint="abc")


def test_totals_over_all_phases(run):
    core, detail, joint = run.phases
    assert [plan.flops for plan in run.plans] == [
        phase.steps * run.images_per_step(phase) * plan.train_flops for phase, plan in zip(run.phases, run.plans)
    ]
    assert run.images_per_step(core) == 2 * 32 and run.images_per_step(joint) == 2 * 16
    assert run.total_steps(detail, 10) == core.steps + 10
    assert run.total_flops(joint, 7) == run.plans[0].flops + run.plans[1].flops + 7 * 32 * run.plans[2].train_flops
    left = run.plans[2].flops + (detail.steps - 100) * 32 * run.plans[1].train_flops
    assert run.minutes_left(detail, 100, 50.0) == pytest.approx(left / (50 * run.plans[1].train_flops) / 60)
    assert run.minutes_left(joint, joint.steps, 50.0) == 0


def test_a_run_without_plans_counts_images(run):
    run.plans = []
    images = sum(phase.steps * run.images_per_step(phase) for phase in run.phases)
    assert run.minutes_left(run.phases[0], 0, 10.0) == pytest.approx(images / 10 / 60)


def test_metrics(run):
    run.log(run.phases[1], 3, loss=0.5)
    (line,) = run.metrics_path.read_text().splitlines()
    flops = run.total_flops(run.phases[1], 3)
    assert json.loads(line) == {"phase": "grown-16-detail", "step": 3, "flops": flops, "loss": 0.5}


def test_what_decides_whether_a_resumed_run_is_the_same(run):
    config, decisive = run.config, run.decisive_config
    assert config["seed"] == 0 and "overwrite_output_dir" not in config and "output_dir" in config
    assert decisive["seed"] == 0 and "output_dir" not in decisive and decisive["captions"] == "abc"
    assert decisive["images per step"] == {"core": 64, "grown-16-detail": 32, "grown-16": 32}
