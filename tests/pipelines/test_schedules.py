# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Every scheduler of diffusers, with every combination of its flags, draws a good image or is refused by the flag's name."""

import inspect
import itertools
import re
import typing

import diffusers
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from diffusers.utils import is_scipy_available

from diffusers_greedy_grow import GreedyGrowPipeline
from diffusers_greedy_grow.flow import pool, upsample, velocity_from_clean
from diffusers_greedy_grow.models.blocks import GreedyGrowOutput
from diffusers_greedy_grow.pipelines.schedules import check_schedule, find_fault, shift_name

from ..testing_utils import make_core, make_grown


pytestmark = [
    # diffusers announces that it will drop two algorithms, which these models cannot use.
    pytest.mark.filterwarnings("ignore:`algorithm_types.*dpmsolver:FutureWarning"),
    # Some of its schedulers, none of which fits these models, pass tensors to numpy.
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    # A schedule of one step with a terminal shift, which is refused, divides by 0.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

# The image that the models of this file know
IMAGE = 2 * torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) - 1
GRAY_LEVEL = 1 / 127.5
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}

# Other values than the default of parameters that are neither bools nor literals
OTHER_VALUES = {
    "solver_order": [1, 3],
    "predictor_order": [1, 3],
    "corrector_order": [1, 3],
    "steps_offset": [1],
    "beta_end": [0.002],
    "beta_schedule": ["scaled_linear", "squaredcos_cap_v2"],
    "dynamic_thresholding_ratio": [0.9],
    "sample_max_value": [1.5],
    "lambda_min_clipped": [-5.1],
    "disable_corrector": [[0, 1]],
    "scale_factors": [[0.5, 1.0]],
    "shift_terminal": [0.02],
    "sigma_min": [0.1],
    "sigma_max": [1.0],
    "tau_func": [lambda timestep: 1],
}
# Parameters that only matter with others, are no flags, or must have one value
NO_FLAGS = {
    "beta_start",
    "trained_betas",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "solver_p",
}
NO_FLAGS |= {"num_train_timesteps", "shift", "flow_shift", *FLOW}

# The flags that may not be set: some cannot work with flow matching, others only with a scheduler's other sigmas.
BETA = {"use_beta_sigmas"}  # diffusers builds no scheduler with them without scipy
REFUSED = {
    "DPMSolverMultistepScheduler": BETA
    | {"use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas", "final_sigmas_type", "use_dynamic_shifting"},
    "DPMSolverSinglestepScheduler": BETA
    | {"use_karras_sigmas", "use_exponential_sigmas", "final_sigmas_type", "use_dynamic_shifting"},
    "FlowMatchEulerDiscreteScheduler": {"use_dynamic_shifting", "invert_sigmas"},
    "FlowMatchHeunDiscreteScheduler": set(),
    "FlowMatchLCMScheduler": {"use_dynamic_shifting", "invert_sigmas", "scale_factors"},
    "UniPCMultistepScheduler": BETA
    | {"use_exponential_sigmas", "final_sigmas_type", "use_dynamic_shifting", "solver_type", "predict_x0", "lower_order_final"},
}  # fmt: skip
# These leave noise in an image, or add it, whatever their flags are.
NEVER_FIT = {"DEISMultistepScheduler", "DPMSolverMultistepInverseScheduler", "SASolverScheduler"}


def find_schedulers() -> dict[str, type]:
    """All schedulers of diffusers that have to do with flow matching, by their names or by their parameters."""
    found = {}
    for name in dir(diffusers.schedulers):
        kind = getattr(diffusers.schedulers, name, None)
        if inspect.isclass(kind) and issubclass(kind, SchedulerMixin):
            parameters = inspect.signature(kind.__init__).parameters
            if "Flow" in name or {"shift", "flow_shift", "use_flow_sigmas"} & parameters.keys():
                found[name] = kind
    return found


SCHEDULERS = find_schedulers()


def find_literals(annotation) -> list:
    """The values of all literals in an annotation, such as `Literal["a", "b"] | None`."""
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    return [value for part in typing.get_args(annotation) for value in find_literals(part)]


def find_flags(scheduler: type) -> dict[str, list]:
    """The values of each flag, beginning with the default."""
    flags = {}
    for name, parameter in inspect.signature(scheduler.__init__).parameters.items():
        if name == "self" or name in NO_FLAGS:
            continue
        if name in OTHER_VALUES:
            others = OTHER_VALUES[name]
        elif literals := find_literals(parameter.annotation):
            others = literals
        elif name == "algorithm_type":
            others = ["noise_prediction"]
        elif name == "variance_type":
            others = ["learned"]
        elif name == "timestep_spacing":
            others = ["leading", "trailing"]
        else:
            assert isinstance(parameter.default, bool), f"`{name}` of {scheduler} is new: add it to OTHER_VALUES"
            others = [not parameter.default]
        flags[name] = [parameter.default, *(other for other in others if other != parameter.default)]
    return flags


def build(name: str, shift: float = 2.0, **settings) -> SchedulerMixin | None:
    """Build a scheduler for flow matching, or return None if diffusers refuses the settings."""
    scheduler = SCHEDULERS[name]
    parameters = inspect.signature(scheduler.__init__).parameters
    settings |= {entry: value for entry, value in FLOW.items() if entry in parameters}
    settings |= {entry: shift for entry in ("shift", "flow_shift") if entry in parameters}
    try:
        return scheduler(**settings)
    except (ImportError, NotImplementedError, ValueError):  # no scipy, or flags that exclude each other
        return None


def draws_well(scheduler: SchedulerMixin, num_inference_steps: int) -> bool:
    """Whether a model that is exact at all noise levels, and is not called at others, draws its image."""
    generator = torch.Generator().manual_seed(2)
    kwargs = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    state = torch.randn(IMAGE.shape, generator=generator)
    try:
        timesteps, _ = retrieve_timesteps(scheduler, num_inference_steps)
        scheduler.set_begin_index(0)
        if not all(0 <= timestep < 1000.1 for timestep in timesteps):
            return False
        for timestep in timesteps:
            velocity = velocity_from_clean(state, IMAGE, timestep.to(torch.float32) / 1000)
            state = scheduler.step(velocity, timestep, state, **kwargs, return_dict=False)[0]
        return bool((state - IMAGE).square().mean().sqrt() < GRAY_LEVEL)
    except (AttributeError, IndexError, RuntimeError, ValueError):
        return False


def know_image(unet: torch.nn.Module) -> list:
    """Let a model predict [`IMAGE`], its core alone only the low resolution. Return a list that gets an entry per call."""
    calls = []

    def forward(sample, timestep, num_stages=None, **kwargs):
        calls.append(num_stages)
        image = upsample(pool(IMAGE, 2), 2) if num_stages == 0 else IMAGE
        return GreedyGrowOutput(pred_original_sample=image.expand(sample.shape))

    unet.forward = forward
    return calls


@pytest.fixture(scope="module")
def pipeline() -> GreedyGrowPipeline:
    pipeline = GreedyGrowPipeline(make_core(cross_attention_dim=None), FlowMatchEulerDiscreteScheduler())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.calls = know_image(pipeline.unet)
    return pipeline


def draw(pipeline: GreedyGrowPipeline, scheduler: SchedulerMixin, num_inference_steps: int = 4, **kwargs) -> None:
    """Draw the image that the model knows, or raise the pipeline's error."""
    pipeline.scheduler = scheduler
    generator = torch.Generator().manual_seed(0)
    arguments = {"num_inference_steps": num_inference_steps, "output_type": "latent", "generator": generator, **kwargs}
    assert (pipeline(**arguments).images - IMAGE).square().mean().sqrt() < GRAY_LEVEL


# ----------------------------------------------------------------------------------------------------------------------
# All schedulers and flags


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_a_scheduler_draws_well_or_is_refused(pipeline, name):
    scheduler = build(name)
    if name in REFUSED:
        for steps in (1, 2, 4, 12, 30):
            draw(pipeline, scheduler, steps)
        return
    message = "with `flow_shift=2.0`, but it" if name in NEVER_FIT else "that does not do flow matching"
    pipeline.calls.clear()
    with pytest.raises(ValueError, match=f"`scheduler` is a {name} {message}"):
        draw(pipeline, scheduler)
    assert not pipeline.calls


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_flag_draws_well_or_the_error_names_it(pipeline, name):
    refused = set()
    for flag, (default, *others) in find_flags(SCHEDULERS[name]).items():
        for value in others:
            scheduler = build(name, **{flag: value})
            if scheduler is None:
                continue
            pipeline.calls.clear()
            try:
                draw(pipeline, scheduler)
            except ValueError as error:
                assert f"`scheduler` has `{flag}={value!r}`, but " in str(error), error
                assert str(error).endswith(f": set `{flag}={default!r}`.") and not pipeline.calls
                refused.add(flag)
            else:
                assert len(pipeline.calls) == len(scheduler.timesteps)
    assert refused == (REFUSED[name] if is_scipy_available() else REFUSED[name] - BETA)


# The flags that decide on the noise levels and on a solver's formulas: all their combinations are tried.
PRODUCTS = {
    "DEISMultistepScheduler": ["solver_order", "lower_order_final", "use_karras_sigmas"],
    "DPMSolverMultistepInverseScheduler": ["solver_order", "algorithm_type", "use_karras_sigmas"],
    "DPMSolverMultistepScheduler": [
        "solver_order", "algorithm_type", "solver_type", "lower_order_final", "euler_at_final", "use_karras_sigmas",
        "final_sigmas_type",
    ],
    "DPMSolverSinglestepScheduler": [
        "solver_order", "algorithm_type", "solver_type", "lower_order_final", "use_karras_sigmas", "final_sigmas_type",
    ],
    "FlowMatchEulerDiscreteScheduler": [
        "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "stochastic_sampling", "time_shift_type",
    ],
    "FlowMatchLCMScheduler": ["shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "scale_factors"],
    "SASolverScheduler": ["predictor_order", "corrector_order", "algorithm_type", "lower_order_final", "use_karras_sigmas"],
    "UniPCMultistepScheduler": [
        "solver_order", "predict_x0", "solver_type", "lower_order_final", "disable_corrector", "use_karras_sigmas",
        "final_sigmas_type", "shift_terminal",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PRODUCTS))
def test_a_combination_of_flags_has_a_fault_just_if_it_draws_badly(name):
    flags = find_flags(SCHEDULERS[name])
    verdicts = {}
    # The numbers of steps take turns. There are five, and no flag has as many values, so that each meets all values.
    steps = itertools.cycle((1, 2, 4, 3, 16))
    for values, num_inference_steps in zip(itertools.product(*(flags[flag] for flag in PRODUCTS[name])), steps):
        settings = dict(zip(PRODUCTS[name], values))
        scheduler = build(name, **settings)
        if scheduler is not None:
            fault = find_fault(scheduler, {"num_inference_steps": num_inference_steps})
            good = draws_well(scheduler, num_inference_steps)
            assert (fault is None) == good, (fault, settings, num_inference_steps)
            verdicts[good] = True
    assert verdicts == ({False: True} if name in NEVER_FIT else {False: True, True: True})


@pytest.mark.parametrize("shift,steps", [(1, 4), (1, 6), (2, 8), (8, 10), (8, 20), (2, 50)])
def test_an_unstable_solver_is_refused_and_its_stable_relatives_are_not(shift, steps):
    """Its pixels become 3 to 8 times too large, with some schedules only those that vary much."""
    settings = {"solver_order": 3, "algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}
    schedule = {"num_inference_steps": steps}
    assert "unstable" in find_fault(build("DPMSolverSinglestepScheduler", shift, **settings), schedule)
    assert find_fault(build("DPMSolverMultistepScheduler", shift, **settings), schedule) is None
    for change in ({"solver_order": 2}, {"algorithm_type": "dpmsolver++"}, {"solver_type": "midpoint"}):
        assert find_fault(build("DPMSolverSinglestepScheduler", shift, **{**settings, **change}), schedule) is None


@pytest.mark.parametrize(
    "scheduler,message",
    [
        (
            DPMSolverMultistepScheduler(**FLOW, use_lu_lambdas=True, final_sigmas_type="sigma_min"),
            r"`use_lu_lambdas=True` and `final_sigmas_type='sigma_min'`, but then its noise levels \[157.407, .*\] do not fall",
        ),
        (
            UniPCMultistepScheduler(**FLOW, solver_order=3, solver_type="bh1", lower_order_final=False),
            "`solver_type='bh1'` and `lower_order_final=False`, but then it raises .*: set `solver_type='bh2'` and ",
        ),
        (
            UniPCMultistepScheduler(**FLOW, use_karras_sigmas=True, sigma_max=1.0),
            r"`sigma_max=1.0`, but then its noise levels \[0.5, ",
        ),
        (
            DPMSolverSinglestepScheduler(**FLOW, solver_order=3, solver_type="heun", algorithm_type="sde-dpmsolver++"),
            "`solver_type='heun'`, but then it is unstable",
        ),
        (
            DPMSolverMultistepScheduler(**FLOW, thresholding=True, sample_max_value=0.5),
            "`sample_max_value=0.5`, but then it leaves noise of the standard deviation",
        ),
        (
            DPMSolverMultistepScheduler(**FLOW, timestep_spacing="even"),
            r"`timestep_spacing='even'`, but then it raises ValueError \(even is not supported",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, SchedulerMixin) else "",
)
def test_the_flags_that_are_named_are_at_fault(pipeline, scheduler, message):
    with pytest.raises(ValueError, match=f"`scheduler` has {message}") as error:
        draw(pipeline, scheduler)
    named = re.findall(r"`(\w+)=", str(error.value))
    flags = named[: len(named) // 2]
    assert named == flags * 2  # those that are at fault, and the same with the values to set
    defaults = {flag: inspect.signature(type(scheduler).__init__).parameters[flag].default for flag in flags}
    draw(pipeline, type(scheduler).from_config(scheduler.config, **defaults))
    for flag in defaults:
        others = {other: default for other, default in defaults.items() if other != flag}
        with pytest.raises(ValueError, match=f"`{flag}="):
            draw(pipeline, type(scheduler).from_config(scheduler.config, **others))


class FlowMatchChangedScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler's steps, which are exact for a model that knows the image, at other noise levels or timesteps."""

    levels = [1.0, 0.75, 0.5, 0.25, 0.0]
    timesteps_over_levels = 1000.0

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.sigmas = torch.tensor(self.levels)
        self.timesteps = self.timesteps_over_levels * self.sigmas[:-1]


@pytest.mark.parametrize(
    "change",
    [
        {"levels": [1.0, 0.5, 0.75, 0.25, 0.0]},
        {"levels": [1.0, 0.75, 0.5, 0.25, 0.001]},
        {"levels": [1.0, 0.75, 0.5, 0.0, 0.0]},
        {"levels": [1.1, 0.75, 0.5, 0.25, 0.0]},
        {"levels": [0.8, 0.75, 0.5, 0.25, 0.0]},
        {"timesteps_over_levels": 990.0},
    ],
)
def test_levels_must_fall_from_1_to_0(pipeline, change, monkeypatch):
    draw(pipeline, FlowMatchChangedScheduler())
    if "levels" in change:
        message = f"its noise levels {change['levels']} do not fall from 1 to 0"
    else:
        message = "its timesteps [990.0, 742.5, 495.0, 247.5] are not 1000 times its noise levels [1.0, 0.75, 0.5, 0.25, 0.0]"
    for name, value in change.items():
        monkeypatch.setattr(FlowMatchChangedScheduler, name, value)
    pipeline.calls.clear()
    with pytest.raises(ValueError, match=re.escape(f"a FlowMatchChangedScheduler with `shift=1.0`, but {message}")):
        draw(pipeline, FlowMatchChangedScheduler())
    assert not pipeline.calls


@pytest.mark.parametrize("name", sorted(REFUSED))
@pytest.mark.parametrize("shift", [0, -1.0, float("nan"), float("inf"), "2"])
def test_shifts_must_be_positive(pipeline, name, shift):
    scheduler = build(name)
    scheduler.register_to_config(**{shift_name(scheduler): shift})
    with pytest.raises(ValueError, match=rf"`(flow_)?shift={shift!r}`, but must have a positive number"):
        draw(pipeline, scheduler)


@pytest.mark.parametrize("name", sorted(REFUSED))
@pytest.mark.parametrize("shift", [1.58, 64.0])
def test_shifts_draw_well(pipeline, name, shift):
    for steps in (1, 5):
        draw(pipeline, build(name, shift=shift), steps)


# ----------------------------------------------------------------------------------------------------------------------
# Where a schedule begins


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(), UniPCMultistepScheduler(**FLOW)])
@pytest.mark.parametrize("timesteps", [[100.0], [600.0, 300.0, 0.5]])
def test_timesteps_may_begin_at_any_level(pipeline, scheduler, timesteps):
    sigma = timesteps[0] / 1000
    latents = (1 - sigma) * IMAGE + sigma * torch.randn(IMAGE.shape, generator=torch.Generator().manual_seed(0))
    draw(pipeline, scheduler, timesteps=timesteps, latents=latents)


@pytest.mark.parametrize("name", [*sorted(REFUSED), "solver_p"])
def test_a_scheduler_draws_well_with_stages_that_join(name):
    unet = make_grown(make_core(sample_size=8, cross_attention_dim=None), sample_size=16)
    pipeline = GreedyGrowPipeline(unet, FlowMatchEulerDiscreteScheduler())
    pipeline.set_progress_bar_config(disable=True)
    calls = know_image(unet)
    if name == "solver_p":  # its timesteps are one below UniPC's own
        scheduler = UniPCMultistepScheduler(**FLOW, solver_p=DPMSolverMultistepScheduler(**FLOW))
    else:
        scheduler = build(name)
    draw(pipeline, scheduler, num_inference_steps=8, core_first=0.6)
    assert {*calls} == {0, 1}


def test_a_check_draws_no_random_numbers_of_ours():
    before = torch.get_rng_state()
    for scheduler in (FlowMatchLCMScheduler(), DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++")):
        check_schedule(scheduler, {"num_inference_steps": 3})
    assert torch.equal(torch.get_rng_state(), before)


def test_subclasses_of_diffusers_schedulers():
    class MyEuler(FlowMatchEulerDiscreteScheduler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    assert shift_name(MyEuler(shift=2.0)) == "shift"
