# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Finds where the host would wait for a GPU, also on a machine without one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


aten = torch.ops.aten
# Operations whose result the host must see, or whose shape depends on values.
READS = {
    aten._local_scalar_dense.default,  # item, bool, float and int of a tensor
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.unique_dim.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}
# Indexing by a mask does so, too, except to fill in one number.
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
# Methods that go around the dispatcher on a CPU.
METHODS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}
# Functions that make tensors of numbers of the host.
COPIES = {torch.tensor, torch.as_tensor}


class HostSync(AssertionError):
    """The host would wait for a GPU here."""


class DeviceTensors:
    """The tensors that a GPU would hold, by their storages: `cpu` stands for the GPU, too."""

    def __init__(self):
        self.storages: dict[int, StorageWeakRef] = {}
        self.may_be_read = False

    def add(self, *values: Any) -> None:
        """Add all tensors in nested `values`."""
        for tensor in tree_leaves(values):
            if isinstance(tensor, torch.Tensor):
                reference = StorageWeakRef(tensor.untyped_storage())
                self.storages[reference.cdata] = reference

    def has(self, tensor: Any) -> bool:
        if not isinstance(tensor, torch.Tensor):
            return False
        reference = self.storages.get(tensor.untyped_storage()._cdata)
        return reference is not None and not reference.expired()

    def any(self, *values: Any) -> bool:
        return any(map(self.has, tree_leaves(values)))

    @contextmanager
    def arrived(self) -> Iterator[None]:
        """Allow what a real device would have copied to the host by itself, and an event has announced."""
        self.may_be_read = True
        try:
            yield
        finally:
            self.may_be_read = False


class OperationChecker(TorchDispatchMode):
    """Follows tensors of the device through all operations, those of the backward pass too, and refuses those that the host reads."""

    def __init__(self, tensors: DeviceTensors):
        super().__init__()
        self.tensors = tensors

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        on_device = self.tensors.any(args, kwargs)
        is_masked = func in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
        if len(args) > 2 and is_masked and args[2].numel() == 1:
            is_masked = False  # one number is filled in without indices
        if on_device and (func in READS or is_masked) and not self.tensors.may_be_read:
            raise HostSync(f"The host waits for the device in {func}.")
        result = func(*args, **kwargs)
        if on_device:
            self.tensors.add(result)
        return result


class CallChecker(TorchFunctionMode):
    """
    Refuses calls that read a tensor of the device, or copy one to it and wait until it is there. A tensor that is made on a
    `torch.device` is on the device; only the name "cpu" means the host.
    """

    def __init__(self, tensors: DeviceTensors):
        super().__init__()
        self.tensors = tensors

    def __torch_function__(self, func: Callable, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in METHODS and self.tensors.has(args[0]):
            raise HostSync(f"The host waits for the device in {func.__name__}.")
        to_device = any(isinstance(value, torch.device) for value in (*args, *kwargs.values()))
        if not to_device:
            return func(*args, **kwargs)
        moves = func in COPIES or func is torch.Tensor.to
        source_is_there = self.tensors.any(args[:1])
        if moves and not source_is_there and not kwargs.get("non_blocking", False):
            raise HostSync(f"The host waits until {func.__name__} has copied a tensor to the device.")
        result = func(*args, **kwargs)
        self.tensors.add(result)
        return result


@contextmanager
def without_host_syncs(*roots: Any) -> Iterator[DeviceTensors]:
    """
    Raise where the host would wait for the device. On a machine with a GPU, torch itself raises. Elsewhere, the tensors in `roots`
    and everything that is computed from them count as tensors of the device; [`DeviceTensors.add`] adds others.
    """
    tensors = DeviceTensors()
    tensors.add(roots)
    if torch.cuda.is_available():
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield tensors
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return
    with CallChecker(tensors), OperationChecker(tensors):
        yield tensors
