# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Which parameters Muon trains, and its steps against written-out ones."""

import copy
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffusers_greedy_grow.training import optimizer as optimizers
from diffusers_greedy_grow.training.arguments import TrainingArguments
from diffusers_greedy_grow.training.optimizer import (
    Muon,
    count_orthogonalization,
    find_matrices,
    make_optimizer,
    orthogonalize,
    split_for_muon,
)
from diffusers_greedy_grow.training.plan import format_plan, plan_phase
from diffusers_greedy_grow.training.trained_model import TrainedModel

from ..testing_utils import make_core, make_grown, make_pipeline


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
BLOCK = (*(f"attn{i}.{name}" for i in (1, 2) for name in ATTENTION), "ff.net.0.proj", "ff.net.2")
CONVOLUTIONS = tuple(f"resnet_{end}.conv{i}" for end in ("in", "out") for i in (1, 2))
CORE = (*(f"transformer_blocks.{i}.{name}" for i in (0, 1) for name in BLOCK), *CONVOLUTIONS)
TEXT_BLOCK = (
    *(f"layer.0.SelfAttention.{name}" for name in "qkvo"),
    "layer.1.DenseReluDense.wi",
    "layer.1.DenseReluDense.wo",
)


# ----------------------------------------------------------------------------------------------------------------------
# Which parameters


def test_muon_trains_the_matrices_of_attention_mlps_and_convolutions():
    """AdamW keeps word tables, norms, biases, what embeds the noise level, what modulates other layers, what reads or writes pixels."""
    pipeline = make_pipeline(make_core())
    module = TrainedModel(pipeline.unet, pipeline.text_encoder)
    expected = {f"unet.{name}.weight" for name in CORE}
    expected |= {f"text_encoder.encoder.block.0.{name}.weight" for name in TEXT_BLOCK}
    assert set(find_matrices(module)) == expected
    others = [name for name, p in module.named_parameters() if p.ndim > 1 and name not in expected]
    assert sorted(others) == [
        "text_encoder.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "text_encoder.shared.weight",
        "unet.conv_in.weight",
        "unet.conv_out.weight",
        "unet.resnet_in.time_emb_proj.weight",
        "unet.resnet_out.time_emb_proj.weight",
        "unet.time_embedding.linear_1.weight",
        "unet.time_embedding.linear_2.weight",
        "unet.time_modulation.weight",
        "unet.transformer_blocks.0.scale_shift_table",
        "unet.transformer_blocks.1.scale_shift_table",
    ]


def test_muon_trains_the_wide_matrices_of_a_stage_and_what_is_inside():
    core = {f"core.{name}.weight" for name in CORE}
    grown = find_matrices(make_grown(block_out_channels=(16, 32)))
    attention = {f"stages.0.decoder.text_attn.attn.{name}.weight" for name in ATTENTION}
    assert set(grown) >= attention | core
    # Of 16 channels, the rows of a kernel are too few for Muon, whatever it reads.
    assert {name.split(".", 2)[2] for name in grown.keys() - attention - core} == {
        "encoder.down_blocks.1.resnets.0.conv1.weight",
        "encoder.down_blocks.1.resnets.0.conv2.weight",
        "encoder.down_blocks.1.downsampler.weight",
        "decoder.conv_inner.weight",
        "decoder.up_blocks.0.resnets.0.conv1.weight",
        "decoder.up_blocks.0.resnets.0.conv2.weight",
        "decoder.up_blocks.0.resnets.0.conv_shortcut.weight",
    }
    assert set(find_matrices(make_grown(block_out_channels=(16, 24)))) == core


def test_each_group_is_split_in_two():
    grown = make_grown(block_out_channels=(16, 32))
    groups = grown.parameter_groups(0.01, core_lr_scale=0.5)
    halves = split_for_muon(groups, grown)
    assert [(half["name"], half["muon"], half["lr"]) for half in halves] == [
        ("stage", True, 0.01), ("stage", False, 0.01), ("core", True, 0.005), ("core", False, 0.005),
    ]  # fmt: skip
    assert [len(half["params"]) for half in halves[::2]] == [11, 24]
    for group, muon, adamw in zip(groups, halves[::2], halves[1::2]):
        assert {*map(id, muon["params"])} | {*map(id, adamw["params"])} == {*map(id, group["params"])}
        assert len(muon["params"]) + len(adamw["params"]) == len(group["params"])
    # A phase without matrices is trained by AdamW alone.
    narrow = make_grown()
    narrow.freeze_core()
    optimizer, _ = make_optimizer(TrainingArguments(), split_for_muon(narrow.parameter_groups(0.01), narrow), 10)
    assert [group["muon"] for group in optimizer.param_groups] == [False]
    for parameter in narrow.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def test_empty_halves_are_left_out():
    grown = make_grown(block_out_channels=(16, 24))
    halves = split_for_muon(grown.parameter_groups(0.01, core_lr_scale=0.5), grown)
    assert [(half["name"], half["muon"]) for half in halves] == [("stage", False), ("core", True), ("core", False)]


def test_rates_of_both_follow_one_schedule():
    args = TrainingArguments(lr_scheduler="polynomial", lr_warmup_steps=0)
    grown = make_grown(block_out_channels=(16, 32))
    halves = split_for_muon(grown.parameter_groups(0.5, core_lr_scale=0.5), grown)
    optimizer, lr_scheduler = make_optimizer(args, halves, num_steps=10)
    assert isinstance(optimizer, Muon) and lr_scheduler.get_last_lr() == [0.5, 0.5, 0.25, 0.25]
    for _ in range(5):
        optimizer.step()
        lr_scheduler.step()
    assert lr_scheduler.get_last_lr() == pytest.approx([0.25, 0.25, 0.125, 0.125], rel=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# The step


def polynomial(matrix: torch.Tensor) -> torch.Tensor:
    """What Newton-Schulz steps do to singular values, written out by a decomposition in float64."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ s.diag() @ vh


def make_matrices(seed: int) -> list[torch.Tensor]:
    """A wide, a square and two tall matrices, and a vector."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((32, 64), (32, 32), (64, 32), (64, 32), (64,))]


def make_muon(parameters: list[torch.nn.Parameter], lr: float = 0.1) -> Muon:
    groups = [
        {"params": parameters[:-1], "lr": lr, "muon": True},
        {"params": parameters[-1:], "lr": lr, "muon": False},
    ]
    return Muon(groups, lr=lr, betas=(0.9, 0.99), weight_decay=0.1, fused=True)


@pytest.mark.parametrize("shape", [(3, 32, 64), (3, 64, 32), (1, 48, 48)])
def test_orthogonalization_and_its_operations(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        done = orthogonalize(matrices)
    for matrix, expected in zip(done, map(polynomial, matrices)):
        torch.testing.assert_close(matrix, expected.float(), atol=1e-4, rtol=1e-4)
    assert counter.get_total_flops() == shape[0] * count_orthogonalization(torch.Size(shape[1:]))
    values = torch.linalg.svdvals(orthogonalize(torch.linalg.qr(torch.randn(2, 64, 32)).Q))
    assert values.min() > 0.6 and values.max() < 1.3
    assert not orthogonalize(torch.zeros(shape)).any()


@pytest.mark.parametrize("numbers_per_batch", [2**26, 1])
def test_steps_are_those_that_are_written_out(numbers_per_batch, monkeypatch):
    """Momentum .95 after Nesterov, AdamW's size and weight decay; and for the vector, torch's AdamW, bit for bit."""
    monkeypatch.setattr(optimizers, "NUMBERS_PER_BATCH", numbers_per_batch)
    parameters = [torch.nn.Parameter(value) for value in make_matrices(0)]
    vector = torch.nn.Parameter(parameters[-1].detach().clone())
    optimizer = make_muon(parameters)
    adamw = torch.optim.AdamW([vector], lr=0.1, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    weights = [parameter.detach().double() for parameter in parameters[:-1]]
    momenta = [torch.zeros_like(weight) for weight in weights]
    for seed in (1, 2, 3):
        gradients = make_matrices(seed)
        for parameter, gradient in zip([*parameters, vector], [*gradients, gradients[-1].clone()]):
            parameter.grad = gradient
        optimizer.step()
        adamw.step()
        for i, gradient in enumerate(gradients[:-1]):
            momenta[i] = 0.95 * momenta[i] + 0.05 * gradient.double()
            update = polynomial(0.05 * gradient.double() + 0.95 * momenta[i])
            weights[i] = (1 - 0.1 * 0.1) * weights[i] - 0.1 * 0.2 * math.sqrt(max(gradient.shape)) * update
    for parameter, weight in zip(parameters, weights):
        # An entry of an update is about .2 times the rate; bfloat16 is precise to some per cent of that.
        torch.testing.assert_close(parameter.double(), weight, atol=0.004, rtol=0)
    assert torch.equal(parameters[-1], vector)
    assert set(optimizer.state[parameters[0]]) == {"momentum_buffer"}


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
def test_steps_are_those_of_torchs_own_muon(monkeypatch):
    monkeypatch.setattr(optimizers, "newton_schulz_dtype", lambda device: torch.bfloat16)
    parameters = [torch.nn.Parameter(value) for value in make_matrices(0)]
    own = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters[:-1]]
    optimizer = make_muon(parameters)
    theirs = torch.optim.Muon(own, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for seed in (1, 2):
        for parameter, other, gradient in zip(parameters, own, make_matrices(seed)):
            parameter.grad, other.grad = gradient, gradient.clone()
        optimizer.step()
        theirs.step()
    for parameter, other in zip(parameters, own):
        torch.testing.assert_close(parameter, other, atol=0.002, rtol=0)


def test_a_kernel_takes_the_steps_of_its_matrix():
    matrix = torch.nn.Parameter(make_matrices(0)[0])
    kernel = torch.nn.Parameter(matrix.detach().reshape(32, 16, 2, 2).clone(memory_format=torch.channels_last))
    for seed in (1, 2):
        gradient = make_matrices(seed)[0]
        matrix.grad, kernel.grad = gradient, gradient.reshape(kernel.shape)
        for parameter in (matrix, kernel):
            optimizer = make_muon([parameter, torch.nn.Parameter(torch.zeros(1))])
            optimizer.step()
    assert torch.equal(kernel.detach().reshape(matrix.shape), matrix)


def test_a_loaded_state_takes_the_same_steps_at_the_rate_that_was_loaded():
    first = [torch.nn.Parameter(value) for value in make_matrices(0)]
    optimizer, second, other = make_muon(first), None, None
    for seed in (1, 2, 3):
        if seed == 2:
            second = [torch.nn.Parameter(parameter.detach().clone()) for parameter in first]
            other = make_muon(second, lr=0.7)
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for parameters, one in ((first, optimizer), (second, other)):
            if one is not None:
                for parameter, gradient in zip(parameters, make_matrices(seed)):
                    parameter.grad = gradient
                one.step()
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_a_gradient_that_overflows_float16_skips_both():
    parameters = [torch.nn.Parameter(value) for value in make_matrices(0)]
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer, scaler = make_muon(parameters), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    for value in (math.inf, 4.0):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 4.0)
        parameters[0].grad[0, 0] = value
        scaler.step(optimizer)
        scaler.update()
        if value == math.inf:
            assert all(torch.equal(a, b) for a, b in zip(parameters, before)) and not optimizer.state
    assert not any(torch.equal(a, b) for a, b in zip(parameters, before))
    assert optimizer.state[parameters[-1]]["exp_avg"][0] == pytest.approx(0.1 * 4.0 / scaler.get_scale())


# ----------------------------------------------------------------------------------------------------------------------
# The plan


def test_the_plan_counts_one_moment_and_the_operations_of_muon():
    with torch.device("meta"):
        core, grown = make_core(), make_grown()
    adamw, muon = (
        plan_phase("core", core, 16, 10, 8, 2, 12, optimizer=name, checkpointing=(False,))
        for name in ("adamw", "muon")
    )
    matrices = find_matrices(core).values()
    assert adamw.memory() - muon.memory() == 4 * sum(matrix.numel() for matrix in matrices) > 0
    flops = 10 * sum(count_orthogonalization(matrix.shape) for matrix in matrices)
    assert muon.flops - adamw.flops == flops and muon.train_flops == adamw.train_flops
    assert adamw.flops == adamw.images * adamw.train_flops
    share = f"Muon's own operations are {flops / muon.flops:.0%} of all."
    assert share in format_plan([muon], {}) and "Muon" not in format_plan([adamw], {})
    # What is frozen has no moments, and is not orthogonalized.
    grown.freeze_core()
    assert plan_phase("grown", grown, 32, 10, 8, 2, 12, optimizer="muon", checkpointing=()).optimizer_flops == 0
