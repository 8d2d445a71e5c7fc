# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch
from accelerate import Accelerator

from diffusers_greedy_grow.flow import high_band, pool
from diffusers_greedy_grow.training.arguments import WEIGHTINGS
from diffusers_greedy_grow.training.objective import SIGMA_MIN_OF_LOSS, LossMeter, find_training_shift, flow_loss

from ..testing_utils import make_core, make_grown, make_inputs, make_pipeline


def test_the_loss_is_that_of_the_velocity(grown):
    inputs = make_inputs(height=32, width=32)
    noise, sigma = inputs.pop("sample"), inputs.pop("timestep") / 1000
    x0 = torch.rand(noise.shape) * 2 - 1
    sigma[0] = 0.01
    losses = flow_loss(grown, x0, noise, sigma, 2, **inputs)
    state = (1 - sigma[:, None, None, None]) * x0 + sigma[:, None, None, None] * noise
    with torch.no_grad():
        output = grown(state, 1000 * sigma, **inputs)
    # Above the clamp it is the error of the velocity itself; below, the division by sigma stops growing.
    torch.testing.assert_close((losses.low + losses.high)[1], (output.sample - (noise - x0))[1].square().mean())
    error = (output.pred_original_sample - x0)[0]
    torch.testing.assert_close((losses.low + losses.high)[0], error.square().mean() / SIGMA_MIN_OF_LOSS**2)
    torch.testing.assert_close(losses.loss, (losses.low + losses.high).mean())
    assert losses.loss.requires_grad and not losses.low.requires_grad

    # By the clean image's error, what is reported stays that of the velocity.
    clean = flow_loss(grown, x0, noise, sigma, 2, "clean", **inputs)
    torch.testing.assert_close(clean.loss, (output.pred_original_sample - x0).square().mean())
    torch.testing.assert_close((clean.low, clean.high), (losses.low, losses.high))

    error = (output.pred_original_sample - x0) / sigma.clamp(min=SIGMA_MIN_OF_LOSS)[:, None, None, None]
    torch.testing.assert_close(losses.low, pool(error, 2).square().mean(dim=(1, 2, 3)))
    torch.testing.assert_close(losses.high, high_band(error, 2).square().mean(dim=(1, 2, 3)), atol=1e-6, rtol=1e-4)


def test_training_has_the_shift_of_the_scheduler():
    """Around a core that others have trained it has not, see `test_prx_pixel`."""
    assert find_training_shift(make_pipeline(make_grown(), shift=3.0)) == 3.0
    assert find_training_shift(make_pipeline(make_core())) == 1.0


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weightings(weighting, grown):
    inputs = make_inputs(height=32, width=32)
    noise, sigma = inputs.pop("sample"), torch.tensor([0.2, 0.7])
    inputs.pop("timestep")
    x0 = torch.rand(noise.shape) * 2 - 1
    losses = flow_loss(grown, x0, noise, sigma, 2, weighting, **inputs)
    weights = {
        "velocity": torch.ones(2),
        "clean": sigma**2,
        # The noise's error is the velocity's times (1 - sigma) ** 2; its log-SNR is 2 log((1 - sigma) / sigma).
        "sigmoid": (1 - sigma) ** 2 * torch.sigmoid(-2 * torch.log((1 - sigma) / sigma)),
        "sigma_sqrt": 1 / sigma**2,
        "cosmap": 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2)),
    }[weighting]
    torch.testing.assert_close(losses.loss, (weights * (losses.low + losses.high)).mean())


def test_loss_meter():
    accelerator, meter = Accelerator(cpu=True), LossMeter()
    meter.update(torch.tensor([[1.0, 2.0, 0.1], [3.0, 4.0, 0.5]]))
    meter = LossMeter(meter.gather(accelerator))  # as from a checkpoint
    meter.update(torch.tensor([[5.0, 6.0, 0.55], [math.nan, 1.0, 0.2]]))
    means = meter.compute(accelerator)
    assert means == {
        "loss": 7.0, "loss_low": 3.0, "loss_high": 4.0, "loss_sigma_0.0_0.3": 3.0, "loss_sigma_0.3_0.6": 9.0,
    }  # fmt: skip
    assert meter.compute(accelerator) == {}
