# Copyright 2026 The diffusers-greedy-grow authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""What a phase of training will cost, counted on a model without weights."""

from dataclasses import dataclass

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from ..models import ShallowUNet2DModel


@dataclass
class PhasePlan:
    """
    One phase: `name`, `resolution`, `steps`, `batch_size` (pictures per step over all processes), `parameters` and
    `trained_parameters` of the model, `train_flops` (forward and backward, per picture), `forward_flops` (per picture)
    and `memory` in bytes per process (weights, gradients, optimizer state, average, stored activations).
    """

    name: str
    resolution: int
    steps: int
    batch_size: int
    parameters: int
    trained_parameters: int
    train_flops: int
    forward_flops: int
    memory: int

    @property
    def pictures(self) -> int:
        return self.steps * self.batch_size

    @property
    def flops(self) -> int:
        """Of the whole phase."""
        return self.pictures * self.train_flops


def plan_phase(
    name: str,
    model: torch.nn.Module,
    resolution: int,
    steps: int,
    batch_size: int,
    num_processes: int,
    num_tokens: int,
) -> PhasePlan:
    """
    Counts one training step of `model`, a [`ShallowUNet2DModel`] or [`GrowableUNet2DConditionModel`] on the meta
    device, frozen as the phase has it. Neither weights nor activations are allocated.
    """
    config = model.config
    sample = torch.empty(1, config.in_channels, resolution, resolution, device="meta")
    timestep = torch.empty(1, device="meta")
    text = None
    if config.cross_attention_dim is not None:
        text = torch.empty(1, num_tokens, config.cross_attention_dim, device="meta")

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(sample, timestep, text)
    forward_flops = counter.get_total_flops()

    saved: dict[int, torch.Tensor] = {}  # by storage, since several operations may save the same tensor

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(save, lambda tensor: tensor):
        model(sample, timestep, text).pred_original_sample.sum().backward()
    model.zero_grad()
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    activations = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in weights)

    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # float32: the weights and their average; for what trains the gradient and AdamW's two moments.
    memory = 4 * (2 * parameters + 3 * trained) + activations * batch_size // num_processes
    return PhasePlan(
        name=name,
        resolution=resolution,
        steps=steps,
        batch_size=batch_size,
        parameters=parameters,
        trained_parameters=trained,
        train_flops=counter.get_total_flops(),
        forward_flops=forward_flops,
        memory=memory,
    )


def describe_parts(model: torch.nn.Module) -> dict[str, int]:
    """The number of parameters of each part: the core's, and each growth stage's."""
    if isinstance(model, ShallowUNet2DModel):
        return {f"core {model.config.sample_size}": model.num_parameters()}
    parts = {f"core {model.sample_sizes[0]}": model.core.num_parameters()}
    for resolution, stage in zip(model.sample_sizes[1:], model.stages):
        parts[f"stage {resolution}"] = sum(p.numel() for p in stage.parameters())
    return parts


def format_plan(phases: list[PhasePlan], parts: dict[str, int]) -> str:
    """The plan as text: a table, and a warning if growing will not pay."""
    lines = ["Parameters: " + ", ".join(f"{name} px {count / 1e6:.2f} M" for name, count in parts.items())]
    lines.append(
        f"{'phase':<18}{'px':>6}{'steps':>9}{'batch':>7}{'pictures':>11}{'trained':>10}"
        f"{'GFLOP/picture':>15}{'PFLOP':>9}{'memory':>10}"
    )
    for phase in phases:
        lines.append(
            f"{phase.name:<18}{phase.resolution:>6}{phase.steps:>9}{phase.batch_size:>7}{phase.pictures:>11}"
            f"{phase.trained_parameters / 1e6:>8.2f} M{phase.train_flops / 1e9:>15.2f}{phase.flops / 1e15:>9.3f}"
            f"{phase.memory / 2**30:>7.1f} GB"
        )
    first, last = phases[0], phases[-1]
    if last.resolution > first.resolution:
        ratio = last.forward_flops / first.forward_flops
        lines.append(f"A picture at {last.resolution} px costs {ratio:.1f} times one at {first.resolution} px.")
        if ratio < 2:
            lines.append(
                "Warning: below about 2, growing hardly pays: training at the high resolution from the start costs "
                "little more. A deeper core, or a larger step in resolution, makes the ratio larger."
            )
    return "\n".join(lines)
