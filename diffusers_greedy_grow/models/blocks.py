# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The layers that the core and the growth stages are built from."""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.modeling_utils import get_parameter_dtype
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from .attention import GreedyGrowAttention
from .norms import GroupNorm
from .text import TextInputs


@dataclass
class GreedyGrowOutput(UNet2DConditionOutput):
    """
    The output of both models. A core inside a model grown with `init="random"` returns `features` alone.

    Args:
        sample (`torch.Tensor` of shape `(B, C, H, W)`):
            The flow velocity `u = e - x0` at the given state.
        pred_original_sample (`torch.Tensor` of shape `(B, C, H, W)`):
            The clean image that the network predicts; `sample` is computed from it.
        features (`torch.Tensor` of shape `(B, D, h, w)`):
            The last features before the exit, which a growth stage around this model starts from.
        inner_images (`tuple[torch.Tensor, ...]`, *optional*):
            Of a grown model: the clean images `(B, C, h, w)` that the levels inside predict, the innermost first.
    """

    pred_original_sample: torch.Tensor | None = None
    features: torch.Tensor | None = None
    inner_images: tuple[torch.Tensor, ...] | None = None


# ----------------------------------------------------------------------------------------------------------------------
# Time, and which part of an image it is

# The top, the left, and the missing share of the sides.
CROP_DIM = 3


def embed_time(time_embedding: TimestepEmbedding, projected: torch.Tensor, crop: torch.Tensor | None) -> torch.Tensor:
    """Return the embedding of a timestep's projection and, if the model is told, of the crop, in the embedding's dtype."""
    dtype = get_parameter_dtype(time_embedding)
    return time_embedding(projected.to(dtype), None if crop is None else crop.to(dtype))


def complete_crop(crop_conditioning: bool, crop: torch.Tensor | None, timestep: torch.Tensor) -> torch.Tensor | None:
    """
    Return the crop of each image `(B, 3)`: zeros, the whole image, if none is given; None for a model that is not told. Zeros
    change nothing, since the projection has no bias, but all parameters take part.

    Raises:
        `ValueError`: if a crop is given to a model that is not told, or it is of another shape.
    """
    if not crop_conditioning:
        if crop is not None:
            raise ValueError("`crop` was given to a model with `crop_conditioning=False`: leave it out.")
        return None
    shape = (len(timestep), CROP_DIM)
    if crop is None:
        return timestep.new_zeros(shape)
    if crop.shape != shape:
        raise ValueError(f"`crop` must be of shape {shape} but is {tuple(crop.shape)}.")
    return crop


# ----------------------------------------------------------------------------------------------------------------------
# Growth stages


def residual_block(in_channels: int, out_channels: int, temb_channels: int) -> ResnetBlock2D:
    """
    Build diffusers' residual block for any number of channels, with scale-and-shift timestep conditioning and our norms.
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
    Residual cross-attention of features `(B, C, H, W)` to text tokens `(B, L, cross_attention_dim)`.
    """

    def __init__(self, channels: int, cross_attention_dim: int):
        super().__init__()
        self.norm = GroupNorm(math.gcd(32, channels), channels, eps=1e-6)
        self.norm_encoder = nn.RMSNorm(cross_attention_dim, eps=1e-6)
        heads = channels // math.gcd(channels, 64)  # 64 channels per head, or the largest smaller number that fits
        self.attn = GreedyGrowAttention(channels, heads, cross_attention_dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        text: TextInputs,
        text_key_value: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """
        Return the features, and the text's keys and values, which later calls with the same text take as
        `text_key_value`.
        """
        if text_key_value is None:
            text_key_value = self.attn.project_text(self.norm_encoder(text.encoder_hidden_states))
        attn_output = self.attn(
            self.norm(hidden_states).flatten(2).transpose(1, 2),
            attention_mask=text.attention_mask,
            text_key_value=text_key_value,
            **(text.cross_attention_kwargs or {}),
        )
        return hidden_states + attn_output.transpose(1, 2).reshape_as(hidden_states), text_key_value


class GrowthEncoder(nn.Module):
    """
    Encoder from a state `(B, C, H, W)` to features on the inner model's grid: a patch convolution, then per entry of
    `block_out_channels` residual blocks and a downsampling by 2.
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
        """Return the features `(B, block_out_channels[-1], h, w)` and the skip connections, outermost first."""
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
    Decoder from the inner model's last features to `out_channels` numbers per pixel: attention to the text on the inner model's
    grid, then the mirror image of [`GrowthEncoder`], with its skip connections. The last convolution starts at zero, so a
    new stage adds nothing.
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
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)
        self.gradient_checkpointing = False

    def forward(
        self,
        inner_features: torch.Tensor,
        hidden_states: torch.Tensor,
        skips: list[torch.Tensor],
        temb: torch.Tensor,
        text: TextInputs,
        text_key_value: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """
        Return the numbers `(B, out_channels, H, W)`, the last features `(B, block_out_channels[0], h, w)`, and the text's keys and
        values in [`TextAttention`]. These are an argument and a result, not read from `text.cache`: compiled code would be
        compiled again whenever the cache has grown.
        """
        hidden_states = torch.cat([self.norm_inner(inner_features), hidden_states], dim=1)
        hidden_states = self.conv_inner(hidden_states)
        if self.text_attn is not None:
            hidden_states, text_key_value = self.text_attn(hidden_states, text, text_key_value)

        for block, skip in zip(self.up_blocks, reversed(skips)):
            hidden_states = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
            hidden_states = torch.cat([hidden_states, skip], dim=1)
            for resnet in block["resnets"]:
                if torch.is_grad_enabled() and self.gradient_checkpointing:
                    hidden_states = self._gradient_checkpointing_func(resnet, hidden_states, temb)
                else:
                    hidden_states = resnet(hidden_states, temb)

        output = self.conv_out(F.silu(self.conv_norm_out(hidden_states)))
        return F.pixel_shuffle(output, self.patch_size), hidden_states, text_key_value


# ----------------------------------------------------------------------------------------------------------------------
# Limits of a configuration

# No model needs more. A configuration with more is damaged or hostile, and building from it would fill the memory.
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
    Raise a `ValueError` that names the first of `sizes` that is not a whole number (`mlp_ratio`: not a number) from 1 to
    [`LARGEST`]. With `depth=1` each must be a tuple of such numbers, with `depth=2` a tuple of tuples.
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
