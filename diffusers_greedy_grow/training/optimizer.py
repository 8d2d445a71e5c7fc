# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The optimizer, AdamW or Muon, and the schedule of its learning rates."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

import torch
from diffusers.optimization import get_scheduler

from ..models.cores import ForeignCore
from .arguments import LoopArguments
from .setup import has_native_bfloat16
from .sharding import gather, scatter_as


# Muon's settings are those of Jordan et al. (2024), and of `torch.optim.Muon`.
MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
# Narrower matrices stay with AdamW.
SMALLEST_MATRIX = 32
# So do layers that embed the noise level and the mean of the text, and turn them into scales and shifts of other layers.
MODULATION = {"time_embedding", "time_modulation", "time_emb_proj", "text_proj"}
# And those that read or write pixels, as is usual with Muon. With patches, theirs are the largest matrices of a small model.
PIXELS = {"conv_in", "conv_out"}
# Matrices are orthogonalized in batches of up to this many numbers, which need 128 MB in bfloat16.
NUMBERS_PER_BATCH = 2**26


# ----------------------------------------------------------------------------------------------------------------------
# AdamW or Muon


def make_optimizer(
    args: LoopArguments, groups: list[dict], num_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """
    Return the optimizer of the parameter `groups`, each with its own peak `lr`, and the schedule of the rates over `num_steps`.
    The optimizer is AdamW, or for groups of [`split_for_muon`] a [`Muon`].
    """
    kind = Muon if any("muon" in group for group in groups) else torch.optim.AdamW
    optimizer = kind(
        groups,
        lr=groups[0]["lr"],  # the polynomial schedule reads this default
        betas=(0.9, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        fused=True,
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=min(args.lr_warmup_steps, num_steps // 10),
        num_training_steps=num_steps,
    )
    return optimizer, lr_scheduler


def find_matrices(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """
    Return by name the parameters that Muon trains: the weights of linear layers and of convolutions, such as those of attention,
    MLPs and residual blocks, but not of layers that modulate others or read or write pixels, and none with a side shorter than
    `SMALLEST_MATRIX`. A convolution's matrix has a row per output channel. A core of diffusers stays with AdamW: its layers have
    other names.
    """
    foreign = {layer for core in module.modules() if isinstance(core, ForeignCore) for layer in core.modules()}
    return {
        f"{name}.weight": layer.weight
        for name, layer in module.named_modules()
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))
        and layer not in foreign
        and min(matrix_shape(layer.weight.shape)) >= SMALLEST_MATRIX
        and not (MODULATION | PIXELS).intersection(name.split("."))
    }


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Return the rows and columns of a weight, from its shape."""
    return shape[0], math.prod(shape[1:])


def split_for_muon(groups: list[dict], module: torch.nn.Module) -> list[dict]:
    """
    Split each of the parameter `groups` in two: with `"muon": True` the matrices of `module` that Muon trains, see
    [`find_matrices`], and with `"muon": False` the rest. Empty halves are left out: FSDP2 could not load their state.
    """
    matrices = {id(parameter) for parameter in find_matrices(module).values()}
    halves = [
        {**group, "params": [p for p in group["params"] if (id(p) in matrices) == muon], "muon": muon}
        for group in groups
        for muon in (True, False)
    ]
    return [half for half in halves if half["params"]]


# ----------------------------------------------------------------------------------------------------------------------
# Muon


class Muon(torch.optim.Optimizer):
    """
    Muon for the groups of matrices, and AdamW for the others, as one optimizer.

    Muon's update is the momentum with all singular values close to 1, times `0.2 * sqrt(max(rows, columns))`: its entries are
    then as large as those of AdamW's update, so that the same learning rates and weight decay suit both (Liu et al., 2025).
    That is what `torch.optim.Muon` does with `adjust_lr_fn="match_rms_adamw"`. This one takes matrices of a shape together,
    which takes half of the time for small ones on a CPU, and gathers matrices that FSDP has sharded.

    As with torch's fused optimizers, an attribute `found_inf`, `torch.Tensor` of shape `()`, turns a step into one that changes
    nothing if it is 1, whatever the gradients are. The host need not know its value.

    Args:
        groups (`list[dict]`): Parameter groups with `params`, `lr` and `muon`; see [`split_for_muon`].
        lr (`float`), weight_decay (`float`): The defaults of all groups.
        betas (`tuple[float, float]`), fused (`bool`): Arguments of AdamW.
    """

    found_inf: torch.Tensor | None = None

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], weight_decay: float, fused: bool):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        others = [group for group in self.param_groups if not group["muon"]]
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step, and return the loss of `closure`, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Loading a state replaces both, and AdamW must use the new ones.
        self.adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self.adamw.state = self.state
        self.adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        self.adamw.step()
        for group in self.param_groups:
            if group["muon"]:
                self.update_matrices(group)
        return loss

    def update_matrices(self, group: dict) -> None:
        """Take Muon's step for one group."""
        gradients = {p: p.grad for p in group["params"] if p.grad is not None}
        if not gradients:
            return
        parameters = list(gradients)
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        momenta = {parameter: self.state[parameter]["momentum_buffer"] for parameter in parameters}
        kept = 1 - group["lr"] * group["weight_decay"]
        if self.found_inf is not None:
            # A step that is rejected neither changes the momentum, nor decays the weights, nor adds to them.
            rejected = self.found_inf.bool()
            for parameter, gradient in gradients.items():
                gradient.copy_(torch.where(rejected, momenta[parameter], gradient))
            kept = torch.where(rejected, 1.0, kept)
        torch._foreach_lerp_(list(momenta.values()), list(gradients.values()), 1 - MOMENTUM)
        torch._foreach_mul_(parameters, kept)
        dtype = newton_schulz_dtype(parameters[0].device)
        for batch in batches_of_a_shape(parameters):
            updates = [gradients[p].lerp(momenta[p], MOMENTUM).to(dtype) for p in batch]  # Nesterov's momentum
            # Every process orthogonalizes all matrices, as with DDP: then nothing needs to be sent back.
            whole = orthogonalize(torch.stack([gather(update).flatten(1) for update in updates]))
            if self.found_inf is not None:
                whole.mul_(1 - self.found_inf)
            scale = 0.2 * math.sqrt(max(whole.shape[1:]))
            for parameter, update in zip(batch, whole.reshape(-1, *batch[0].shape)):
                parameter.add_(scatter_as(update, like=parameter), alpha=-group["lr"] * scale)


def batches_of_a_shape(matrices: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Divide matrices into batches of one shape and at most `NUMBERS_PER_BATCH` numbers."""
    by_shape = defaultdict(list)
    for matrix in matrices:
        by_shape[matrix.shape].append(matrix)
    for shape, alike in by_shape.items():
        size = max(1, NUMBERS_PER_BATCH // shape.numel())
        yield from (alike[i : i + size] for i in range(0, len(alike), size))


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """
    Return matrices with the same singular vectors and singular values of about 0.7 to 1.2, by Newton-Schulz steps.

    Args:
        matrices (`torch.Tensor` of shape `(B, rows, columns)`): Matrices, in the dtype to compute in. Zeros remain zeros.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def count_orthogonalization(shape: torch.Size) -> int:
    """Return the number of operations of [`orthogonalize`] for a weight of this shape."""
    short, long = sorted(matrix_shape(shape))
    return NEWTON_SCHULZ_STEPS * (4 * short**2 * long + 2 * short**3)


def count_orthogonalization_bytes(shapes: list[torch.Size]) -> int:
    """Return the most bytes that [`Muon`] needs to orthogonalize a batch of weights of these shapes, in bfloat16, as on a GPU."""
    most = 0
    for shape, count in Counter(shapes).items():
        batch = min(count, max(1, NUMBERS_PER_BATCH // shape.numel())) * shape.numel()
        short, long = sorted(matrix_shape(shape))
        # The updates one by one, together, before and after a step; and two products of `short x short`.
        most = max(most, round(torch.bfloat16.itemsize * batch * (4 + 2 * short / long)))
    return most


def newton_schulz_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16, which is precise enough for Newton-Schulz steps, or float32 where bfloat16 would take longer."""
    if device.type == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_fast = device.type == "cpu" and has_native_bfloat16()
    return torch.bfloat16 if is_fast else torch.float32
