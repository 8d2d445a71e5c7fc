# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
Take a step of a detail phase and one of a joint phase under FSDP2 in bfloat16, and check which tensors are sharded and in which
precision. `test_cluster.py` launches it.
"""

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch.distributed.tensor import DTensor

from diffusers_greedy_grow.training.arguments import TrainingArguments
from diffusers_greedy_grow.training.ema import averaged
from diffusers_greedy_grow.training.sharding import consolidate, gather, list_units, reshard, set_up_sharding, shard
from diffusers_greedy_grow.training.trained_model import TrainedModel
from tests.testing_utils import make_grown, make_inputs, make_pipeline


accelerator = Accelerator(mixed_precision="bf16")
args = TrainingArguments()
set_up_sharding(accelerator, args)
assert accelerator.is_fsdp2 and accelerator.num_processes == 1 and args.gradient_checkpointing

for detail in (True, False):
    torch.manual_seed(0)
    pipeline = make_pipeline(make_grown())
    unet = pipeline.unet
    if detail:
        unet.freeze_core()
    module = TrainedModel(unet)
    unet.enable_gradient_checkpointing()
    before = {name: value.clone() for name, value in unet.state_dict().items()}

    # No unit mixes frozen and trained parameters.
    for unit in list_units(module):
        assert len({parameter.requires_grad for parameter in unit}) == 1
    assert sum(map(len, list_units(module))) == len(list(module.parameters()))
    sizes = sorted(len(unit) for unit in list_units(module))

    optimizer = torch.optim.AdamW(unet.parameter_groups(1e-3), fused=True)
    shard(accelerator, module, pipeline)
    model, optimizer = accelerator.prepare(module, optimizer)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]

    # FSDP gathers the units of `list_units` together.
    groups = [m._get_fsdp_state()._fsdp_param_group for m in module.modules() if hasattr(m, "_get_fsdp_state")]
    assert sorted(len(group.fsdp_params) for group in groups if group is not None) == sizes

    inputs = make_inputs(height=32, width=32, seed=accelerator.process_index)
    sample, timestep = inputs.pop("sample"), inputs.pop("timestep")
    with accelerator.autocast():
        output = model(sample, timestep, **inputs)
    assert output.sample.dtype == torch.float32  # the noisy image keeps its precision, and so does the difference
    accelerator.backward(output.sample.square().mean())
    for name, parameter in module.named_parameters():
        assert isinstance(parameter, DTensor) and parameter.dtype == torch.float32
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or (
            isinstance(parameter.grad, DTensor) and parameter.grad.dtype == torch.float32
        )
    norm = accelerator.clip_grad_norm_(module.parameters(), 1e-3)
    assert gather(norm) > 1e-3
    clipped = torch.stack([gather(parameter.grad).norm() for parameter in parameters]).norm()
    torch.testing.assert_close(clipped, torch.tensor(1e-3), rtol=1e-3, atol=0)
    ema = EMAModel(parameters, decay=0.9)
    optimizer.step()

    # Averages can be put into the model and taken out again, also after a forward pass has gathered parameters.
    @torch.no_grad()
    def answer() -> torch.Tensor:
        with accelerator.autocast():
            output = module(sample, timestep, **inputs).sample  # noqa: B023
        reshard(module)  # noqa: B023
        return output

    after = answer()
    with averaged(ema, parameters):
        assert not torch.equal(answer(), after)
    assert torch.equal(answer(), after)

    consolidate(accelerator, module, pipeline)
    if accelerator.is_main_process:
        assert type(pipeline.unet).__name__ == "GrowableUNet2DConditionModel"
        changed = {name for name, value in pipeline.unet.state_dict().items() if not torch.equal(value, before[name])}
        trained = {name for name, parameter in module.unet.named_parameters() if parameter.requires_grad}
        assert changed and changed <= trained
    accelerator.free_memory()
accelerator.end_training()
print("as it should be")
