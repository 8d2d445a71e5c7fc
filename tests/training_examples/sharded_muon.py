# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
Take steps of Muon under FSDP2 on two processes, and check that they are those of whole weights, also after a checkpoint was
loaded, and that a rejected step changes nothing. `test_cluster.py` launches it.
"""

import sys

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from diffusers_greedy_grow.training.arguments import TrainingArguments
from diffusers_greedy_grow.training.checkpoints import restore_state
from diffusers_greedy_grow.training.optimizer import find_matrices, make_optimizer, split_for_muon
from diffusers_greedy_grow.training.sharding import gather, set_up_sharding, shard
from diffusers_greedy_grow.training.trained_model import TrainedModel
from tests.testing_utils import make_core, make_inputs, make_pipeline


accelerator, args = Accelerator(), TrainingArguments(lr_warmup_steps=0)
set_up_sharding(accelerator, args)
assert accelerator.is_fsdp2 and accelerator.num_processes == 2

pipelines = [make_pipeline(make_core()) for _ in range(2)]
modules = [TrainedModel(pipeline.unet) for pipeline in pipelines]
whole, sharded = modules
made = []
for module in modules:
    groups = [{"name": "core", "params": list(module.parameters()), "lr": 0.01}]
    made.append(make_optimizer(args, split_for_muon(groups, module), num_steps=10))
own, _ = made[0]
shard(accelerator, sharded, pipelines[1])
model, optimizer, lr_scheduler = accelerator.prepare(sharded, *made[1])
assert len(find_matrices(whole)) == 24 and all(isinstance(parameter, DTensor) for parameter in sharded.parameters())


def take_step(seed: int, rejected: bool = False) -> list[torch.Tensor]:
    """Train on the same batch in both processes, and return the whole parameters. The gradients of a rejected step are NaN."""
    inputs = make_inputs(seed=seed)
    sample, timestep = inputs.pop("sample"), inputs.pop("timestep")
    accelerator.backward(model(sample, timestep, **inputs).sample.square().mean())
    if rejected:
        for parameter in sharded.parameters():
            parameter.grad.mul_(float("nan"))
    optimizer.optimizer.found_inf = torch.tensor(float(rejected))
    optimizer.step()
    optimizer.zero_grad()
    return [gather(parameter.detach()).clone() for parameter in sharded.parameters()]


for seed in (0, 1):
    inputs = make_inputs(seed=seed)
    sample, timestep = inputs.pop("sample"), inputs.pop("timestep")
    whole(sample, timestep, **inputs).sample.square().mean().backward()
    own.step()
    own.zero_grad()
    parameters = take_step(seed)
    for (name, parameter), other in zip(whole.named_parameters(), parameters):
        # The first steps of AdamW are as large where a gradient is only rounding. Muon's are a fifth of the rate.
        tolerance = 2e-4 if name in find_matrices(whole) else 2.5e-2
        torch.testing.assert_close(other, parameter.detach(), atol=tolerance, rtol=0, msg=name)

accelerator.save_state(sys.argv[1])
assert all(torch.equal(a, b) for a, b in zip(take_step(2, rejected=True), parameters))
expected = take_step(2)
take_step(3)
restore_state(accelerator, sys.argv[1])
assert [group["muon"] for group in optimizer.param_groups] == [True, False]
assert all(torch.equal(a, b) for a, b in zip(take_step(2), expected))
accelerator.end_training()
print("as it should be")
