# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The layers that the core and the growth stages are built from."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput


@dataclass
class GreedyGrowOutput(UNet2DConditionOutput):
    """
    What both models return.

    Args:
        sample (`torch.Tensor` of shape `(B, C, H, W)`):
            The flow velocity `u = e - x0` at the given state.
        pred_original_sample (`torch.Tensor` of shape `(B, C, H, W)`):
            The clean image that the network predicts; `sample` is computed from it. Given by our models but for a
            core inside one grown with `init="random"`, which has `features` alone.
        features (`torch.Tensor` of shape `(B, D, h, w)`):
            The last features before the exit, which a growth stage around this model starts from. Always given.
    """

    pred_original_sample: torch.Tensor | None = None
    features: torch.Tensor | None = None


# ----------------------------------------------------------------------------------------------------------------------
# Norms


class LayerNorm(nn.LayerNorm):
    """
    In the precision of its input. Autocast on a GPU would hand on float32, to all that is added and multiplied until the
    next matrix product, and that takes longer than the product. Sums are in float32 in any case.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = in_precision_of(x, self.weight, self.bias)
        with without_autocast(x.device.type):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class GroupNorm(nn.GroupNorm):
    """As [`LayerNorm`]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = in_precision_of(x, self.weight, self.bias)
        with without_autocast(x.device.type):
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


def in_precision_of(x: torch.Tensor, *parameters: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    return tuple(None if parameter is None else parameter.to(x.dtype) for parameter in parameters)


def without_autocast(device_type: str) -> AbstractContextManager:
    """
    Turns autocast off; does nothing where there is none, as on the meta device, since turning it off takes longer than a small
    norm does. Compiled code does not ask whether there is: up to torch 2.11 that breaks graphs.
    """
    if device_type == "meta":
        return nullcontext()
    if not torch.compiler.is_compiling() and not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


# ----------------------------------------------------------------------------------------------------------------------
# Attention


class TextCache:
    """
    What only the text decides: its keys and values in each layer that attends to it, and what a stage takes from its sum. Pass
    the same one, new at first, in each call with the same text: what a call finds in it, it does not compute.
    """

    def __init__(self):
        self.values: dict[nn.Module, tuple[torch.Tensor, ...] | None] = {}  # by whose they are; `None` without text
        self.copied: set[nn.Module] = set()

    def copy_out(self) -> None:
        """Into memory of its own: what compiled blocks leave in that of their CUDA graphs, the next step overwrites."""
        for module in self.values.keys() - self.copied:
            values = self.values[module]
            self.values[module] = values and tuple(value.clone() for value in values)
            self.copied.add(module)


class GreedyGrowAttnProcessor:
    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "GreedyGrowAttention",
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        text_key_value: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if text_key_value is not None:
            query, (key, value) = attn.to_q(hidden_states), text_key_value
        elif attn.is_cross_attention:
            query, (key, value) = attn.to_q(hidden_states), attn.project_text(encoder_hidden_states)
        else:
            if attn.fused_projections:
                query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
            else:
                query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
            key = attn.norm_k(key.unflatten(-1, (-1, attn.head_dim)))
            value = value.unflatten(-1, (-1, attn.head_dim))

        query = attn.norm_q(query.unflatten(-1, (-1, attn.head_dim)))
        if image_rotary_emb is not None:
            query, key = rotate(query, image_rotary_emb), rotate(key, image_rotary_emb)

        hidden_states = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        hidden_states = hidden_states.flatten(2, 3)
        return attn.to_out[0](hidden_states)


class GreedyGrowAttention(nn.Module, AttentionModuleMixin):
    """
    Multi-head attention with normalised queries and keys (Dehghani et al., 2023): self-attention over image tokens
    `(B, N, query_dim)`, or, with `cross_attention_dim`, from image tokens to text tokens
    `(B, L, cross_attention_dim)`.
    """

    _default_processor_cls = GreedyGrowAttnProcessor
    _available_processors = [GreedyGrowAttnProcessor]

    def __init__(self, query_dim: int, heads: int, cross_attention_dim: int | None = None):
        super().__init__()
        self.heads = heads
        self.head_dim = query_dim // heads
        self.use_bias = False
        self.is_cross_attention = cross_attention_dim is not None
        key_dim = cross_attention_dim if cross_attention_dim is not None else query_dim

        self.to_q = nn.Linear(query_dim, query_dim, bias=False)
        self.to_k = nn.Linear(key_dim, query_dim, bias=False)
        self.to_v = nn.Linear(key_dim, query_dim, bias=False)
        self.norm_q = LayerNorm(self.head_dim, eps=1e-6, bias=False)  # as RMS norms would, and faster on a CPU
        self.norm_k = LayerNorm(self.head_dim, eps=1e-6, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(query_dim, query_dim)])
        self.set_processor(GreedyGrowAttnProcessor())

    def project_text(self, encoder_hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of text `(B, L, cross_attention_dim)`, each `(B, L, heads, head_dim)`."""
        if self.fused_projections:
            key, value = self.to_kv(encoder_hidden_states).chunk(2, dim=-1)
        else:
            key, value = self.to_k(encoder_hidden_states), self.to_v(encoder_hidden_states)
        return self.norm_k(key.unflatten(-1, (-1, self.head_dim))), value.unflatten(-1, (-1, self.head_dim))

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        text_key_value: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs,
    ) -> torch.Tensor:
        return self.processor(
            self, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, text_key_value, **kwargs
        )


def get_image_rotary_emb(
    head_dim: int, height: int, width: int, device: torch.device, dtype: torch.dtype, theta: float = 100.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    2-D rotary positions of a `height x width` grid: one half of each head turns with the row, the other with the
    column. `theta` is small because grids are: at 10000 half of the frequencies would not turn within 16 tokens.

    Returns:
        Cosines and signed sines for [`rotate`], each `(height * width, 1, head_dim)`, computed in float32 and given in `dtype`.
    """
    rows = torch.arange(height, device=device, dtype=torch.float32).repeat_interleave(width)
    columns = torch.arange(width, device=device, dtype=torch.float32).repeat(height)
    turns = [get_1d_rotary_pos_embed(head_dim // 2, axis, theta=theta) for axis in (rows, columns)]
    turn = torch.cat(turns, dim=-1).unsqueeze(1)  # complex, (height * width, 1, head_dim / 2)
    cos, sin = torch.cat([turn.real, turn.real], dim=-1), torch.cat([-turn.imag, turn.imag], dim=-1)
    return cos.to(dtype), sin.to(dtype)


def rotate(x: torch.Tensor, image_rotary_emb: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """
    Turns `x` `(B, N, heads, head_dim)` by its position; channel i pairs with i + head_dim / 2. In the dtype of `x`: what
    diffusers' `apply_rotary_emb` computes in float32 takes twice as long.
    """
    cos, sin = (emb.to(x.dtype) for emb in image_rotary_emb)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class GreedyGrowTransformerBlock(nn.Module):
    """
    Self-attention, cross-attention to the text, MLP; the first and the last modulated by the timestep through a
    projection that all blocks share, plus a table of the block's own (adaLN-single, Chen et al., 2023).
    """

    def __init__(self, dim: int, num_attention_heads: int, mlp_ratio: float, cross_attention_dim: int | None):
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn1 = GreedyGrowAttention(dim, num_attention_heads)
        self.attn2 = None
        if cross_attention_dim is not None:
            self.norm2 = LayerNorm(dim, eps=1e-6)
            self.attn2 = GreedyGrowAttention(dim, num_attention_heads, cross_attention_dim)
        self.norm3 = LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.ff = FeedForward(dim, mult=mlp_ratio, activation_fn="gelu")
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / math.sqrt(dim))

    def forward(
        self,
        hidden_states: torch.Tensor,
        modulation: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        encoder_attention_mask: torch.Tensor | None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
        cross_attention_kwargs: dict | None,
        text_key_value: tuple[torch.Tensor, torch.Tensor] | None = None,
        return_text: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """
        Returns the hidden states; with `return_text` also the text's keys and values, to be given as `text_key_value` in
        further calls with the same text.
        """
        # `modulation` (B, 6, dim) and the table may be kept in float32 around low-precision layers.
        modulation = (self.scale_shift_table + modulation).to(hidden_states.dtype)
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation.chunk(6, dim=1)
        attention_kwargs = cross_attention_kwargs or {}

        norm_hidden_states = torch.addcmul(shift_attn, self.norm1(hidden_states), 1 + scale_attn)
        attn_output = self.attn1(norm_hidden_states, image_rotary_emb=image_rotary_emb, **attention_kwargs)
        hidden_states = torch.addcmul(hidden_states, gate_attn, attn_output)

        if self.attn2 is not None:
            if return_text and text_key_value is None:
                text_key_value = self.attn2.project_text(encoder_hidden_states)
            attn_output = self.attn2(
                self.norm2(hidden_states),
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                text_key_value=text_key_value,
                **attention_kwargs,
            )
            hidden_states = hidden_states + attn_output

        norm_hidden_states = torch.addcmul(shift_ff, self.norm3(hidden_states), 1 + scale_ff)
        hidden_states = torch.addcmul(hidden_states, gate_ff, self.ff(norm_hidden_states))
        return (hidden_states, text_key_value) if return_text else hidden_states


# ----------------------------------------------------------------------------------------------------------------------
# Growth stages


def residual_block(in_channels: int, out_channels: int, temb_channels: int) -> ResnetBlock2D:
    """
    diffusers' residual block, with scale-and-shift timestep conditioning, for any number of channels and with our norms.
    """
    groups, groups_out = math.gcd(32, in_channels), math.gcd(32, out_channels)
    block = ResnetBlock2D(
        in_channels=in_channels,
        out_channels=out_channels,
        temb_channels=temb_channels,
        groups=groups,
        groups_out=groups_out,
        time_embedding_norm="scale_shift",
    )
    block.norm1 = GroupNorm(groups, in_channels, eps=block.norm1.eps)
    block.norm2 = GroupNorm(groups_out, out_channels, eps=block.norm2.eps)
    return block


class TextAttention(nn.Module):
    """
    Cross-attention of features `(B, C, H, W)` to the text's tokens `(B, L, cross_attention_dim)`, which is added to them.
    """

    def __init__(self, channels: int, cross_attention_dim: int):
        super().__init__()
        self.norm = GroupNorm(math.gcd(32, channels), channels, eps=1e-6)
        self.norm_encoder = nn.RMSNorm(cross_attention_dim, eps=1e-6)
        heads = channels // math.gcd(channels, 64)  # of 64 channels, or what comes next and divides them all
        self.attn = GreedyGrowAttention(channels, heads, cross_attention_dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None,
        cross_attention_kwargs: dict | None,
        text_key_value: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """
        Returns the features, and the text's keys and values, to be given as `text_key_value` in further calls with the
        same text.
        """
        if encoder_attention_mask is not None:
            encoder_attention_mask = encoder_attention_mask.bool()[:, None, None, :]
        if text_key_value is None:
            text_key_value = self.attn.project_text(self.norm_encoder(encoder_hidden_states))
        attn_output = self.attn(
            self.norm(hidden_states).flatten(2).transpose(1, 2),
            attention_mask=encoder_attention_mask,
            text_key_value=text_key_value,
            **(cross_attention_kwargs or {}),
        )
        return hidden_states + attn_output.transpose(1, 2).reshape_as(hidden_states), text_key_value


class GrowthEncoder(nn.Module):
    """
    From a state `(B, C, H, W)` down to features on the inner model's grid: a patch convolution, then for each entry of
    `block_out_channels` residual blocks and a halving.
    """

    def __init__(
        self,
        in_channels: int,
        patch_size: int,
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        temb_channels: int,
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], kernel_size=patch_size, stride=patch_size)
        self.down_blocks = nn.ModuleList()
        channels = block_out_channels[0]
        for out_channels in block_out_channels:
            resnets = [residual_block(channels, out_channels, temb_channels)]
            resnets += [residual_block(out_channels, out_channels, temb_channels) for _ in range(layers_per_block - 1)]
            downsampler = nn.Conv2d(out_channels, out_channels, kernel_size=3, stride=2, padding=1)
            self.down_blocks.append(nn.ModuleDict({"resnets": nn.ModuleList(resnets), "downsampler": downsampler}))
            channels = out_channels
        self.gradient_checkpointing = False

    def forward(self, sample: torch.Tensor, temb: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Returns the features `(B, block_out_channels[-1], h, w)` and, outermost first, the skip connections."""
        hidden_states = self.conv_in(sample)
        skips = []
        for block in self.down_blocks:
            for resnet in block["resnets"]:
                if torch.is_grad_enabled() and self.gradient_checkpointing:
                    hidden_states = self._gradient_checkpointing_func(resnet, hidden_states, temb)
                else:
                    hidden_states = resnet(hidden_states, temb)
            skips.append(hidden_states)
            hidden_states = block["downsampler"](hidden_states)
        return hidden_states, skips


class GrowthDecoder(nn.Module):
    """
    From the inner model's last features up to the detail `(B, C, H, W)`: a look at the text on the inner model's grid, then
    the mirror image of [`GrowthEncoder`], with its skip connections. The last convolution starts at zero, so a new stage adds
    nothing.
    """

    def __init__(
        self,
        out_channels: int,
        patch_size: int,
        inner_channels: int,
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        temb_channels: int,
        cross_attention_dim: int | None,
    ):
        super().__init__()
        self.patch_size = patch_size
        channels = block_out_channels[-1]
        self.norm_inner = GroupNorm(math.gcd(32, inner_channels), inner_channels, eps=1e-6)
        self.conv_inner = nn.Conv2d(inner_channels + channels, channels, kernel_size=1)
        self.text_attn = None
        if cross_attention_dim is not None:
            self.text_attn = TextAttention(channels, cross_attention_dim)
        self.up_blocks = nn.ModuleList()
        for block_channels in reversed(block_out_channels):
            resnets = [residual_block(channels + block_channels, block_channels, temb_channels)]
            resnets += [
                residual_block(block_channels, block_channels, temb_channels) for _ in range(layers_per_block - 1)
            ]
            self.up_blocks.append(nn.ModuleDict({"resnets": nn.ModuleList(resnets)}))
            channels = block_channels
        self.conv_norm_out = GroupNorm(math.gcd(32, channels), channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, out_channels * patch_size**2, kernel_size=3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)
        self.gradient_checkpointing = False

    def forward(
        self,
        inner_features: torch.Tensor,
        hidden_states: torch.Tensor,
        skips: list[torch.Tensor],
        temb: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        encoder_attention_mask: torch.Tensor | None,
        cross_attention_kwargs: dict | None,
        text_key_value: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """
        Returns the detail `(B, C, H, W)`, the last features `(B, block_out_channels[0], h, w)`, and what [`TextAttention`]
        returns of the text.
        """
        hidden_states = torch.cat([self.norm_inner(inner_features), hidden_states], dim=1)
        hidden_states = self.conv_inner(hidden_states)
        if self.text_attn is not None:
            text = (encoder_hidden_states, encoder_attention_mask, cross_attention_kwargs)
            hidden_states, text_key_value = self.text_attn(hidden_states, *text, text_key_value)

        for block, skip in zip(self.up_blocks, reversed(skips)):
            hidden_states = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
            hidden_states = torch.cat([hidden_states, skip], dim=1)
            for resnet in block["resnets"]:
                if torch.is_grad_enabled() and self.gradient_checkpointing:
                    hidden_states = self._gradient_checkpointing_func(resnet, hidden_states, temb)
                else:
                    hidden_states = resnet(hidden_states, temb)

        detail = self.conv_out(F.silu(self.conv_norm_out(hidden_states)))
        return F.pixel_shuffle(detail, self.patch_size), hidden_states, text_key_value


# ----------------------------------------------------------------------------------------------------------------------
# What a configuration may say

# More than any model will have; a configuration with more is damaged or hostile, and building from it would fill memory.
LARGEST = {
    "num_layers": 1024,
    "layers_per_block": 64,
    "num_attention_heads": 1024,
    "patch_size": 1024,
    "mlp_ratio": 64,
}
LARGEST_SIZE = 2**16
PREFIXES = ("a ", "a tuple of ", "a tuple of tuples of ")


def check_sizes(depth: int = 0, **sizes) -> None:
    """
    Raises a `ValueError` that names the first of `sizes` that is no whole number (`mlp_ratio`: no number) from 1 to
    [`LARGEST`], or, with `depth`, no tuple of such numbers, of tuples of them, and so on.
    """
    for name, value in sizes.items():
        largest = LARGEST.get(name, LARGEST_SIZE)
        kinds, kind = ((int, float), "number") if name == "mlp_ratio" else ((int,), "whole number")
        level = [value]
        for _ in range(depth):
            level = [item for part in level for item in (isinstance(part, (list, tuple)) and part or [None])]
        if not all(isinstance(x, kinds) and not isinstance(x, bool) and 0 < x <= largest for x in level):
            raise ValueError(
                f"`{name}={value!r}` must be {PREFIXES[depth]}{kind}{'s' * (depth > 0)} from 1 to {largest}."
            )
