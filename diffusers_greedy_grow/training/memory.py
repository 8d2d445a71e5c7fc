# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The memory of a training step, followed operation by operation on tensors without values."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .objective import flow_loss


@dataclass(frozen=True)
class StepMemory:
    """
    What the forward and backward pass of a batch need beside the weights, at their peak.

    Args:
        total (`int`): Bytes, gradients included.
        activations (`int`): Bytes without gradients, at the peak of these: activations, and weights that autocast has cast.
    """

    total: int
    activations: int


class MemoryTracker(TorchDispatchMode):
    """
    Follows how many bytes are alive of the tensors that operations return.

    Attributes:
        peak (`int`): The most bytes so far.
        peak_without_gradients (`int`): The most bytes so far without those that [`~MemoryTracker.note_gradient`] was told of.
    """

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.alive = self.gradients = self.peak = self.peak_without_gradients = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in (result,) if isinstance(result, torch.Tensor) else tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage from now on until nothing refers to it."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.sizes:
            return
        self.sizes[key] = size
        self.alive += size
        self.peak = max(self.peak, self.alive)
        self.peak_without_gradients = max(self.peak_without_gradients, self.alive - self.gradients)
        weakref.finalize(storage, self.remove, key)

    def remove(self, key: int) -> None:
        self.alive -= self.sizes.pop(key)

    def note_gradient(self, parameter: torch.Tensor) -> None:
        """Take note that a parameter has its gradient. It stays until the end of the step."""
        assert parameter.grad is not None
        self.gradients += parameter.grad.untyped_storage().nbytes()


class Step(torch.nn.Module):
    """The forward and the backward pass of a batch, as a module: gradient checkpointing needs the parameters in both."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, batch_size: int, resolution: int, num_tokens: int, cached: bool) -> None:
        config = self.model.config
        x0, noise = (torch.empty(batch_size, config.in_channels, resolution, resolution) for _ in range(2))
        conditions: dict[str, Any] = {}
        if config.cross_attention_dim is not None:
            conditions["encoder_hidden_states"] = torch.empty(batch_size, num_tokens, config.cross_attention_dim)
            conditions["encoder_attention_mask"] = torch.ones(batch_size, num_tokens, dtype=torch.bool)
        if cached:
            size, cells = self.model.sample_sizes[0], self.model.sample_sizes[0] // config.patch_size
            shapes = (config.out_channels, size, size), (config.hidden_size, cells, cells)
            conditions["core_output"] = tuple(torch.empty(batch_size, *shape) for shape in shapes)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            loss = flow_loss(self.model, x0, noise, torch.empty(batch_size), 2, **conditions).loss
        loss.backward()


def follow_step(
    model: torch.nn.Module,
    resolution: int,
    num_tokens: int,
    batch_size: int,
    dtype: torch.dtype,
    gradient_checkpointing: bool = False,
    cached: bool = False,
) -> StepMemory:
    """
    Return the memory of one batch, without allocating anything. The tensors are a CPU's: what its attention and its layers store for
    the backward pass is as large as on a GPU. What kernels and the allocator need is not counted.

    Args:
        model ([`ShallowUNet2DModel`] or [`GrowableUNet2DConditionModel`]): On any device, frozen as in the phase.
        resolution (`int`), num_tokens (`int`), batch_size (`int`): Of the batch.
        dtype (`torch.dtype`): The dtype in which layers compute, by autocast.
        gradient_checkpointing (`bool`): Whether blocks are computed again in the backward pass.
        cached (`bool`): Whether the core's predictions are inputs.
    """
    tracker, step = MemoryTracker(), Step(model, dtype)
    no_values = FakeTensorMode(allow_non_fake_inputs=True)
    with no_values, torch.device("cpu"), checkpointing(model, gradient_checkpointing):
        tensors = {}
        for name, value in (*step.named_parameters(), *step.named_buffers()):
            tensors[name] = torch.empty(value.shape, dtype=value.dtype, device="cpu").requires_grad_(
                value.requires_grad
            )
            tracker.add(tensors[name])
            if value.requires_grad:
                tensors[name].register_post_accumulate_grad_hook(tracker.note_gradient)
        before = tracker.alive
        with tracker:
            functional_call(step, tensors, (batch_size, resolution, num_tokens, cached))
    return StepMemory(tracker.peak - before, tracker.peak_without_gradients - before)


@contextmanager
def checkpointing(model: torch.nn.Module, enabled: bool) -> Iterator[None]:
    """Turn gradient checkpointing of `model` on or off within the `with` block."""

    def switch(on: bool) -> None:
        model.enable_gradient_checkpointing() if on else model.disable_gradient_checkpointing()

    was = model.is_gradient_checkpointing
    switch(enabled)
    try:
        yield
    finally:
        switch(was)
