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

"""The moving average of the weights, and its way through growth."""

import torch
from diffusers.training_utils import EMAModel


def named_shadows(ema: EMAModel, named_parameters: list[tuple[str, torch.nn.Parameter]]) -> dict[str, torch.Tensor]:
    """The averaged parameters of an [`~diffusers.training_utils.EMAModel`] by name; it knows them by position only."""
    if len(named_parameters) != len(ema.shadow_params):
        raise ValueError(
            f"`ema` averages {len(ema.shadow_params)} parameters, but `named_parameters` has {len(named_parameters)}: "
            "they have to be those of the model that it was made for."
        )
    return {name: shadow for (name, _), shadow in zip(named_parameters, ema.shadow_params)}


def carry_ema(
    shadows: dict[str, torch.Tensor],
    optimization_step: int,
    named_parameters: list[tuple[str, torch.nn.Parameter]],
    decay: float,
) -> EMAModel:
    """
    The moving average for a model whose parameters are partly averaged already, such as a grown one.

    `EMAModel` matches by position, so that a grown model with the core's average silently updates the wrong tensors,
    and a fresh one forgets on its first step, whose decay is zero. Here every parameter finds its average by name, and
    the count of steps goes on.

    Args:
        shadows (`dict[str, torch.Tensor]`):
            The averages so far, under the names in the new model: the core's as `"core." + name`.
        optimization_step (`int`):
            How many steps they have been averaged for.
        named_parameters (`list[tuple[str, torch.nn.Parameter]]`):
            Those of the new model. What is not in `shadows` starts at its current value.
        decay (`float`):
            The decay of the average.

    Raises:
        `ValueError`: if a name in `shadows` is not in the new model, or has another shape there.
    """
    parameters = dict(named_parameters)
    for name, shadow in shadows.items():
        if name not in parameters or parameters[name].shape != shadow.shape:
            raise ValueError(f"`shadows` has an average of {name!r} {tuple(shadow.shape)}, which the new model lacks.")
    ema = EMAModel(parameters.values(), decay=decay)
    ema.shadow_params = [
        shadows[name].clone() if name in shadows else shadow for name, shadow in zip(parameters, ema.shadow_params)
    ]
    ema.optimization_step = optimization_step
    return ema
