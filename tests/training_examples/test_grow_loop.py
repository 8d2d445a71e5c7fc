# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""How `grow.py` puts the parts of training together: one run in this process, whose loops and objectives are kept."""

import signal
from types import SimpleNamespace

import pytest
import torch

from diffusers_greedy_grow import GreedyGrowPipeline
from diffusers_greedy_grow.training.loop import TrainingLoop
from diffusers_greedy_grow.training.objective import FlowObjective
from training_examples import grow

from .launching import grow_flags, read_metrics, weights


ARGUMENTS = {
    "resolutions": [8, 32],
    "core_steps": 2,
    "detail_steps": 2,
    "joint_steps": 2,
    "validation_steps": 2,
    "num_validation_images": 3,
    "seed": 3,
    "learning_rate": [0.01, 0.002],
    "core_lr_scale": 0.5,
    "lr_warmup_steps": 0,
    "adam_beta2": 0.9,
    "adam_weight_decay": 0.3,
    "ema_decay": 0.7,
    "spike_factor": 5.0,
    "loss_weighting": ["sigmoid", "cosmap"],
    "caption_dropout": 0.25,
    "gradient_checkpointing": True,
    "mlp_ratio": 2.0,
    "layers_per_block": 2,
}


@pytest.fixture(scope="module")
def seen(data, tmp_path_factory) -> SimpleNamespace:
    """The `output_dir` of a run, its `loops` and `objectives`, and the model's weights at each held-out loss."""
    seen = SimpleNamespace(output_dir=tmp_path_factory.mktemp("loop") / "output", loops=[], objectives=[], held_out=[])

    class Loop(TrainingLoop):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            seen.loops.append(self)
            self.at_start = self.optimizer.state_dict()["param_groups"]

    class Objective(FlowObjective):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            seen.objectives.append(self)

    def held_out_losses(objective, module, images, *levels):
        state = {name: value.clone() for name, value in module.unet.state_dict().items()}
        seen.held_out.append((objective, levels, module.unet.is_gradient_checkpointing, state))
        return original(objective, module, images, *levels)

    original = grow.held_out_losses
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(signal, "signal", lambda *args: None)  # Ctrl-C is for pytest
        patch.setattr(grow, "TrainingLoop", Loop)
        patch.setattr(grow, "FlowObjective", Objective)
        patch.setattr(grow, "held_out_losses", held_out_losses)
        grow.main(grow_flags(seen.output_dir, train_data_dir=data, **ARGUMENTS))
    return seen


def test_objectives_are_those_of_the_phases(seen):
    phases = [objective.phase for objective in seen.objectives]
    assert [phase.name for phase in phases] == ["core", "grown-32-detail", "grown-32"]
    assert [phase.loss_weighting for phase in phases] == ["sigmoid", "cosmap", "cosmap"]
    assert [objective.shift for objective in seen.objectives] == [1.0, 4.0, 4.0]
    assert [objective.band_factor for objective in seen.objectives] == [2, 4, 4]
    assert {(objective.seed, objective.caption_dropout) for objective in seen.objectives} == {(3, 0.25)}
    assert [objective.encode.encode == objective.encode.tokenize for objective in seen.objectives] == [
        True,
        False,
        False,
    ]


def test_optimizers_are_those_of_the_phases(seen):
    rates = [{group["name"]: group["initial_lr"] for group in loop.at_start} for loop in seen.loops]
    assert rates == [{"core": 0.01, "text": 0.01}, {"stage": 0.002}, {"stage": 0.002, "core": 0.001}]
    for loop in seen.loops:
        assert all(group["weight_decay"] == 0.3 for group in loop.at_start)
        assert all(group["betas"] == (0.9, 0.9) for group in loop.at_start if not group["muon"])
        assert loop.ema.decay == 0.7 and loop.guard.factor == 5.0 and loop.step == 2
    assert [loop.tokenizer is not None for loop in seen.loops] == [True, False, False]
    trained = [{name.split(".")[1] for name, _ in loop.named_parameters} for loop in seen.loops[1:]]
    assert trained[0] == {"stages"} and trained[1] == {"core", "stages"}


def test_the_model_is_the_one_described(seen):
    config = GreedyGrowPipeline.from_pretrained(seen.output_dir / "grown-32").unet.config
    assert config.mlp_ratio == 2.0 and tuple(config.layers_per_block) == (2,)


def test_held_out_losses_are_of_the_averages_that_are_saved(seen):
    """All phases share the first one's noise levels. Checkpointing is on while a phase trains."""
    assert [levels for _, levels, _, _ in seen.held_out] == [(3, 1.0, 1.0)] * 3
    for objective, _, checkpoints, state in seen.held_out:
        saved = weights(seen.output_dir / objective.phase.name)
        assert checkpoints and all(torch.equal(state[name], value) for name, value in saved.items())


def test_operations_are_counted(seen):
    run, before = seen.loops[0].run, 0
    for i, (phase, plan) in enumerate(zip(run.phases, run.plans)):
        lines = [line for line in read_metrics(seen.output_dir) if line["phase"] == phase.name and "images" in line]
        own = (line["images"] * plan.train_flops + line["step"] * plan.optimizer_flops for line in lines)
        assert lines and [line["flops"] - before for line in lines] == list(own)
        before += plan.flops
        left = sum(later.flops for later in run.plans[i + 1 :])
        rate = lines[-1]["images_per_second"] * plan.flops / plan.images
        assert lines[-1]["minutes_left"] == pytest.approx(left / rate / 60)
