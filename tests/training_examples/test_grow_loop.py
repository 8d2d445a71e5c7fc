# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""What the main job hands on to the parts that train, measure and draw, watched in one run in this process."""

import signal
from types import SimpleNamespace

import pytest
import torch
from diffusers.training_utils import EMAModel
from diffusers.utils.torch_utils import randn_tensor

from diffusers_greedy_grow import GreedyGrowPipeline
from diffusers_greedy_grow.flow import descend, unshift_sigma
from diffusers_greedy_grow.training.guard import GradientGuard
from diffusers_greedy_grow.training.seeds import sample_generators
from training_examples import grow

from .launching import TINY, read_metrics, to_flags, weights


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
    "logit_mean": [0.5, -0.5],
    "logit_std": [0.9, 1.2],
    "loss_weighting": ["sigmoid", "cosmap"],
    "low_res_loss_weight": 2.0,
    "caption_dropout": 0.25,
    "gradient_checkpointing": True,
    "mlp_ratio": 2.0,
    "layers_per_block": 2,
    "num_inference_steps": 3,
    "guidance_scale": 2.5,
}


@pytest.fixture(scope="module")
def seen(data, tmp_path_factory) -> SimpleNamespace:
    """Its `output_dir`, and what was called with what."""
    output_dir = tmp_path_factory.mktemp("loop") / "output"
    seen = SimpleNamespace(
        output_dir=output_dir, noise=[], losses=[], optimizers=[], averages=[], guards=[], images=[], captions=[]
    )
    originals = SimpleNamespace(
        draw_noise=grow.draw_noise,
        flow_loss=grow.flow_loss,
        AdamW=torch.optim.AdamW,
        make_plan=grow.make_plan,
        encode=grow.Run.encode,
        draw=GreedyGrowPipeline.__call__,
    )

    def draw_noise(*args):
        seen.noise.append((args, originals.draw_noise(*args)))
        return seen.noise[-1][1]

    def flow_loss(model, x0, noise, sigma, band_factor, *args, **kwargs):
        call = SimpleNamespace(
            size=x0.shape[-1],
            noise=noise,
            sigma=sigma,
            band_factor=band_factor,
            weighting=args,
            low_res_weight=kwargs.get("low_res_weight"),
            trains=model.training,
            checkpoints=model.unet.is_gradient_checkpointing,
            weights={name: value.clone() for name, value in model.unet.state_dict().items()},
        )
        seen.losses.append(call)
        return originals.flow_loss(model, x0, noise, sigma, band_factor, *args, **kwargs)

    def adamw(groups, **kwargs):
        seen.optimizers.append(({group["name"]: group["lr"] for group in groups}, kwargs))
        return originals.AdamW(groups, **kwargs)

    def average(*args, **kwargs):
        seen.averages.append(kwargs)
        return EMAModel(*args, **kwargs)

    def guard(*args):
        seen.guards.append(args)
        return GradientGuard(*args)

    def make_plan(*args):
        seen.plans, text = originals.make_plan(*args)
        return seen.plans, text

    def encode(self, phase, pipeline, captions):
        if torch.is_grad_enabled():
            seen.captions.append(captions)
        return originals.encode(self, phase, pipeline, captions)

    def draw(self, *args, **kwargs):
        seen.images.append((self.unet.config.sample_size, kwargs))
        return originals.draw(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(signal, "signal", lambda *args: None)  # Ctrl-C is for pytest
        patch.setattr(grow, "draw_noise", draw_noise)
        patch.setattr(grow, "flow_loss", flow_loss)
        patch.setattr(grow, "EMAModel", average)
        patch.setattr(grow, "GradientGuard", guard)
        patch.setattr(grow, "make_plan", make_plan)
        patch.setattr(grow.Run, "encode", encode)
        patch.setattr(torch.optim, "AdamW", adamw)
        patch.setattr(GreedyGrowPipeline, "__call__", draw)
        arguments = {**TINY, **ARGUMENTS, "train_data_dir": data}
        grow.main(["--output_dir", str(output_dir), *to_flags(arguments)])
    return seen


def test_noise_is_that_of_the_phase_and_its_resolution(seen):
    calls = [args for args, _ in seen.noise]
    assert [args[0] for args in calls] == [(3, phase, step) for phase in (0, 1, 2) for step in (0, 1)]
    # Shift, mean and deviation.
    assert [args[4:7] for args in calls] == [(1.0, 0.5, 0.9)] * 2 + [(4.0, -0.5, 1.2)] * 4
    assert {args[8] for args in calls} == {0.25}


def test_dropped_captions_are_empty(seen):
    dropped = [dropped for _, (_, _, dropped) in seen.noise]
    assert any(sum(dropped, [])) and not all(sum(dropped, []))
    assert [[caption == "" for caption in captions] for captions in seen.captions] == dropped


def test_the_loss_is_that_of_the_phase(seen):
    calls = [call for call in seen.losses if call.trains]
    assert [call.size for call in calls] == [8] * 2 + [32] * 4
    assert [call.band_factor for call in calls] == [2] * 2 + [4] * 4
    assert [call.weighting for call in calls] == [("sigmoid",)] * 2 + [("cosmap",)] * 4
    assert [call.low_res_weight for call in calls] == [0.0] * 4 + [2.0] * 2
    assert all(call.checkpoints for call in calls)


def test_rates_are_those_of_the_phase(seen):
    rates = [rates for rates, _ in seen.optimizers]
    assert rates == [{"core": 0.01, "text": 0.01}, {"stage": 0.002}, {"stage": 0.002, "core": 0.001}]
    for _, settings in seen.optimizers:
        assert settings["betas"] == (0.9, 0.9) and settings["weight_decay"] == 0.3
    assert [settings["decay"] for settings in seen.averages] == [0.7] * 3
    assert [args[0] for args in seen.guards] == [5.0] * 3


def test_the_model_is_the_one_described(seen):
    config = GreedyGrowPipeline.from_pretrained(seen.output_dir / "grown-32").unet.config
    assert config.mlp_ratio == 2.0 and tuple(config.layers_per_block) == (2,)


def test_held_out_losses_are_of_what_is_saved(seen):
    for size, name in ((8, "core"), (32, "grown-32")):
        calls = [call for call in seen.losses if call.size == size]
        held_out = [call for call in calls if not call.trains][-1].weights
        trained = [call for call in calls if call.trains][-1].weights
        saved = weights(seen.output_dir / name)
        assert all(torch.equal(held_out[key], value) for key, value in saved.items())
        assert any(not torch.equal(trained[key], value) for key, value in saved.items())


def test_held_out_losses_compare(seen):
    """Between phases, by equal noise levels in terms of the core's; between runs, by noise that is of no seed."""
    core, _, grown = [call for call in seen.losses if not call.trains][:3]
    torch.testing.assert_close(unshift_sigma(grown.sigma, 4.0), core.sigma)
    normal = torch.special.ndtri((torch.arange(3) + 0.5) / 3)
    torch.testing.assert_close(core.sigma, torch.sigmoid(0.5 + 0.9 * normal))
    generators = sample_generators((grow.VALIDATION, 8), 0, 3)
    assert torch.equal(core.noise, randn_tensor((3, 3, 8, 8), generator=generators))


def test_every_phase_draws_from_the_same_noise(seen):
    assert all(kwargs["num_inference_steps"] == 3 for _, kwargs in seen.images)
    assert all(kwargs["guidance_scale"] == 2.5 for _, kwargs in seen.images)
    noise = [kwargs["latents"] for size, kwargs in seen.images]
    assert [len(one[0, 0]) for one in noise] == [8, 32, 32]
    torch.testing.assert_close(noise[0], descend(noise[1], torch.ones(1), 4)[0])
    assert torch.equal(noise[1], noise[2])


def test_operations_are_counted(seen):
    before = 0
    for i, plan in enumerate(seen.plans):
        lines = [line for line in read_metrics(seen.output_dir) if line["phase"] == plan.name and "images" in line]
        assert lines and all(line["flops"] == before + line["images"] * plan.train_flops for line in lines)
        before += plan.flops
        left = sum(later.flops for later in seen.plans[i + 1 :])
        rate = lines[-1]["images_per_second"] * plan.train_flops
        assert lines[-1]["minutes_left"] == pytest.approx(left / rate / 60)
