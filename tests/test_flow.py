# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_greedy_grow import flow


FACTORS = [2, 3, 4, 8]


def random_case(factor: int, seed: int):
    """A random size that the factor divides, an image, noise and noise levels."""
    generator = torch.Generator().manual_seed(1000 * factor + seed)
    height, width = (factor * int(torch.randint(2, 9, (), generator=generator)) for _ in range(2))
    x0 = torch.rand(4, 3, height, width, generator=generator) * 2 - 1
    noise = torch.randn(x0.shape, generator=generator)
    sigma = torch.rand(4, generator=generator).clamp(0.001, 1)
    return x0, noise, sigma


def ascend(x_in: torch.Tensor, sigma_in: torch.Tensor, factor: int, noise: torch.Tensor):
    """Return a state around a low-resolution one, `n U x_in + sigma H e`, without the image's high band, and its noise level."""
    sigma = flow.shift_sigma(sigma_in, factor)
    low = flow.expand(flow.state_scale(sigma, factor), x_in) * flow.upsample(x_in, factor)
    return low + flow.expand(sigma, noise) * flow.high_band(noise, factor), sigma


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("factor", FACTORS)
class TestLaw:
    def test_pooling_undoes_upsampling(self, factor, seed):
        x, _, _ = random_case(factor, seed)
        torch.testing.assert_close(flow.pool(flow.upsample(x, factor), factor), x, atol=1e-6, rtol=0)

    def test_pooling_undoes_enlarging(self, factor, seed):
        x, _, _ = random_case(factor, seed)
        torch.testing.assert_close(flow.pool(flow.enlarge(x, factor), factor), x, atol=1e-6, rtol=0)

    def test_the_high_band_pools_to_nothing(self, factor, seed):
        x, _, _ = random_case(factor, seed)
        assert flow.pool(flow.high_band(x, factor), factor).abs().max() < 1e-6
        torch.testing.assert_close(flow.upsample(flow.pool(x, factor), factor) + flow.high_band(x, factor), x)

    def test_shift_and_inverse_cancel(self, factor, seed):
        _, _, sigma = random_case(factor, seed)
        sigma = sigma.double()
        torch.testing.assert_close(flow.unshift_sigma(flow.shift_sigma(sigma, factor), factor), sigma)
        torch.testing.assert_close(flow.shift_sigma(flow.unshift_sigma(sigma, factor), factor), sigma)

    def test_shift_moves_log_snr_by_two_log_factor(self, factor, seed):
        _, _, sigma = random_case(factor, seed)
        sigma = sigma.double().clamp(max=0.999)
        shifted = flow.shift_sigma(sigma, factor)
        log_snr, shifted_log_snr = (2 * torch.log((1 - s) / s) for s in (sigma, shifted))
        torch.testing.assert_close(shifted_log_snr, log_snr - 2 * math.log(factor))

    def test_a_pooled_state_is_a_low_resolution_state(self, factor, seed):
        x0, noise, sigma = random_case(factor, seed)
        state, sigma_in = flow.descend(flow.add_noise(x0, noise, sigma), sigma, factor)
        # The pooled noise, scaled back to unit variance, is the noise of the low-resolution state.
        expected = flow.add_noise(flow.pool(x0, factor), factor * flow.pool(noise, factor), sigma_in)
        torch.testing.assert_close(state, expected, atol=2e-6, rtol=1e-5)

    def test_descent_undoes_ascent(self, factor, seed):
        x0, noise, sigma_in = random_case(factor, seed)
        x_in = flow.pool(x0, factor)
        state, sigma = ascend(x_in, sigma_in, factor, noise)
        assert state.shape == noise.shape
        again, sigma_again = flow.descend(state, sigma, factor)
        torch.testing.assert_close(sigma_again, sigma_in)
        torch.testing.assert_close(again, x_in, atol=1e-5, rtol=1e-5)

    def test_ascent_of_a_descended_state_lacks_only_the_images_high_band(self, factor, seed):
        x0, noise, sigma = random_case(factor, seed)
        state = flow.add_noise(x0, noise, sigma)
        again, _ = ascend(*flow.descend(state, sigma, factor), factor, noise)
        missing = (1 - flow.expand(sigma, x0)) * flow.high_band(x0, factor)
        torch.testing.assert_close(state - again, missing, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("factor", FACTORS)
def test_pooled_noise_has_unit_variance(factor):
    generator = torch.Generator().manual_seed(factor)
    count = 1_000_000
    noise = torch.randn(1, 1, factor * 1000, factor * 1000, generator=generator)
    sigma = torch.ones(1)  # nothing but noise
    state, sigma_in = flow.descend(noise, sigma, factor)
    assert state.numel() == count and sigma_in == 1
    # The standard error of the variance of a million draws is 0.0014.
    assert abs(state.var().item() - 1) < 0.007
    assert abs(state.mean().item()) < 0.005


@pytest.mark.parametrize("factor", FACTORS)
def test_shift_is_the_schedulers(factor):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=float(factor))
    base = FlowMatchEulerDiscreteScheduler(shift=1.0)
    torch.testing.assert_close(flow.shift_sigma(base.sigmas, factor), scheduler.sigmas)


@pytest.mark.parametrize("factor", FACTORS)
def test_above_the_handover_the_coarsest_detail_is_noise_up_to_the_bound(factor):
    """It holds at one step above the low resolution, where the pooled state has its own noise level, not for finer detail."""
    step = {2: 2, 3: 3, 4: 2, 8: 2}[factor]
    generator = torch.Generator().manual_seed(factor)
    x0 = flow.upsample(torch.rand(64, 3, 8 * step, 8 * step, generator=generator) * 0.6 - 0.3, factor // step)
    x0 += 0.1 * flow.high_band(torch.randn(x0.shape, generator=generator), factor // step)
    noise = torch.randn(x0.shape, generator=generator)
    variance = flow.detail_variance(x0, factor)
    for bound in (0.001, 0.01, 0.1):
        sigma = flow.handover_sigma(variance, factor, bound)
        signal, noise_part = (flow.pool(part, factor // step) for part in ((1 - sigma) * x0, sigma * noise))
        ratio = flow.high_band(signal, step).square().mean() / flow.high_band(noise_part, step).square().mean()
        assert 0 < sigma < 1 and ratio.item() == pytest.approx(bound, rel=0.05)


def test_velocity_and_clean_image_convert():
    x0, noise, sigma = random_case(4, 0)
    state = flow.add_noise(x0, noise, sigma)
    velocity = flow.velocity_from_clean(state, x0, sigma)
    torch.testing.assert_close(velocity, noise - x0, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(state - flow.expand(sigma, state) * velocity, x0, atol=1e-5, rtol=1e-4)


def test_velocity_is_bounded_where_there_is_no_noise():
    x0, noise, _ = random_case(2, 0)
    sigma = torch.full((4,), 1e-4)
    velocity = flow.velocity_from_clean(flow.add_noise(x0, noise, sigma), x0 + 0.1, sigma)
    assert velocity.abs().max() < 0.11 / flow.SIGMA_MIN


def test_sampled_levels_are_logit_normal_at_the_base_and_shifted():
    def draw(shift):
        return flow.sample_sigma(100_000, shift, 0.5, 1.0, torch.Generator().manual_seed(0))

    base = draw(1.0)
    assert base.shape == (100_000,) and 0 < base.min() and base.max() < 1
    assert torch.equal(base, draw(1.0))
    logits = torch.logit(base.double())
    assert abs(logits.mean() - 0.5) < 0.02 and abs(logits.std() - 1) < 0.02
    torch.testing.assert_close(draw(4.0), flow.shift_sigma(base, 4.0))


def test_upsampling_repeats_pixels_whatever_the_factor():
    x = torch.arange(2.0 * 7).reshape(1, 1, 2, 7)
    for factor in range(2, 129):
        expected = x.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
        assert torch.equal(flow.upsample(x, factor), expected), factor


def test_enlarging_is_smooth():
    """A slope stays a slope: its steps are `factor` times smaller, while repeated pixels keep steps of the old size."""
    for factor in FACTORS:
        slope = torch.arange(8.0).expand(1, 1, 4, 8)
        steps = flow.enlarge(slope, factor).diff(dim=-1)[..., 2 * factor : -2 * factor]
        torch.testing.assert_close(steps, torch.full_like(steps, 1 / factor))
        assert flow.upsample(slope, factor).diff(dim=-1).max() == 1


def test_pooling_says_what_does_not_fit():
    with pytest.raises(ValueError, match="10 x 12.*factor=4"):
        flow.pool(torch.zeros(1, 3, 10, 12), 4)


# ----------------------------------------------------------------------------------------------------------------------
# The processes of cores that others have trained

SCHEDULERS = {
    "linear": {},
    "cosine, thresholding": {
        "beta_schedule": "squaredcos_cap_v2",
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.95,
        "sample_max_value": 1.5,
    },
    "scaled linear, wide clip": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample_range": 1.2,
    },
    "no limits, 400 steps": {"num_train_timesteps": 400, "beta_end": 0.05, "clip_sample": False},
}


@pytest.fixture(params=SCHEDULERS)
def scheduler(request):
    return DDPMScheduler(**SCHEDULERS[request.param])


def own_state(scheduler, factor: int, seed: int):
    """A pooled state of ours at random timesteps, with the image and the noise at the low resolution that are in it."""
    x0, noise, _ = random_case(factor, seed)
    x0, noise = x0.double(), noise.double()
    generator = torch.Generator().manual_seed(seed)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (4,), generator=generator)
    alphas_cumprod = scheduler.alphas_cumprod[timesteps].double()
    ratio = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    sigma = flow.shift_sigma(ratio / (1 + ratio), factor)
    state = flow.descend(flow.add_noise(x0, noise, sigma), sigma, factor)
    return *state, timesteps, flow.pool(x0, factor), factor * flow.pool(noise, factor)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("noise_scale", [0.5, 1.0, 2.0, 3.7])
def test_a_pooled_state_is_a_state_with_scaled_noise(noise_scale, factor, seed):
    x0, noise, sigma = random_case(factor, seed)
    process = flow.RectifiedFlow(noise_scale)
    y, time = process.enter(*flow.descend(flow.add_noise(x0, noise, sigma), sigma, factor))
    total = factor * noise_scale  # the law with `factor * noise_scale`, but pooled by `factor`
    torch.testing.assert_close(time, flow.unshift_sigma(sigma, total))
    expected = flow.add_noise(flow.pool(x0, factor), noise_scale * factor * flow.pool(noise, factor), time)
    torch.testing.assert_close(y, expected, atol=3e-6, rtol=1e-5)
    assert process.limit(process.clean(y, x0, sigma)) is x0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("factor", FACTORS)
def test_a_pooled_state_is_a_state_of_the_scheduler(scheduler, factor, seed):
    x_in, sigma_in, timesteps, x0, noise = own_state(scheduler, factor, seed)
    y, time = flow.VariancePreserving.from_scheduler(scheduler).enter(x_in, sigma_in)
    torch.testing.assert_close(time, timesteps.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(y.float(), scheduler.add_noise(x0.float(), noise.float(), timesteps))


def test_any_state_has_the_scale_of_the_process(scheduler):
    """Between timesteps, too: the noise has unit variance, and the time lies between those of the neighbors."""
    process = flow.VariancePreserving.from_scheduler(scheduler)
    x0, noise, sigma = random_case(2, 0)
    y, time = process.enter(flow.add_noise(x0, noise, sigma), sigma)
    ratio = sigma / (1 - sigma)
    alpha = 1 / (1 + ratio**2).sqrt()
    torch.testing.assert_close(y, flow.expand(alpha, x0) * (x0 + flow.expand(ratio, x0) * noise))
    inside = (time > 0) & (time < len(scheduler.alphas_cumprod) - 1)
    assert inside.sum() >= 3
    below, above = (scheduler.alphas_cumprod[step[inside].long()] for step in (time.floor(), time.ceil()))
    assert ((above < alpha[inside] ** 2) & (alpha[inside] ** 2 < below)).all()


def test_times_stay_in_the_schedulers_table(scheduler):
    process = flow.VariancePreserving.from_scheduler(scheduler)
    sigma = torch.tensor([1e-6, 1.0])
    y, time = process.enter(torch.ones(2, 3, 1, 1), sigma)
    assert time.tolist() == [0, scheduler.config.num_train_timesteps - 1]
    assert process.clean(y, torch.zeros_like(y), sigma).isfinite().all()
    levels = torch.linspace(0.001, 0.999, 999)
    assert (process.enter(torch.ones(999, 3, 1, 1), levels)[1].diff() >= 0).all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_predictions_become_the_schedulers_clean_images(scheduler, prediction_type):
    scheduler.register_to_config(prediction_type=prediction_type)
    process = flow.VariancePreserving.from_scheduler(scheduler)
    x_in, sigma_in, timesteps, x0, noise = own_state(scheduler, 2, 1)
    y, _ = process.enter(x_in, sigma_in)
    truth = {"epsilon": noise, "v_prediction": scheduler.get_velocity(x0, noise, timesteps), "sample": x0}
    # float32 has errors of 1e-7 in the scheduler's table, and a hundred times as much noise as image at its end.
    torch.testing.assert_close(process.clean(y, truth[prediction_type], sigma_in), x0, atol=1e-4, rtol=1e-4)
    prediction = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype)
    images = process.limit(process.clean(y, prediction, sigma_in))
    for i, timestep in enumerate(timesteps):
        step = scheduler.step(prediction[i : i + 1], timestep, y[i : i + 1])
        torch.testing.assert_close(images[i : i + 1], step.pred_original_sample, atol=1e-4, rtol=1e-4)


def test_a_scheduler_that_ends_without_an_image():
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert scheduler.alphas_cumprod[-1] == 0
    process = flow.VariancePreserving.from_scheduler(scheduler)
    y, time = process.enter(torch.ones(1, 3, 2, 2), torch.ones(1))
    assert time == 998 and process.clean(y, y, torch.ones(1)).isfinite().all()


def test_processes_say_what_does_not_fit():
    with pytest.raises(ValueError, match="`noise_scale=0` must be a number above 0"):
        flow.RectifiedFlow(0)
    with pytest.raises(ValueError, match="`prediction_type='flow'` of the scheduler must be"):
        flow.VariancePreserving.from_scheduler(DDPMScheduler(prediction_type="flow"))
    with pytest.raises(ValueError, match="`alphas_cumprod` must decrease"):
        flow.VariancePreserving.from_scheduler(DDPMScheduler(trained_betas=[0.1, 0.0, 0.1]))
