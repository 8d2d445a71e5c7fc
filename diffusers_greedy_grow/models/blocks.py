# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The layers that the core and the growth stages are built from."""

import functools
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from diffusers.models.embeddings import TimestepEmbedding, get_1d_rotary_pos_embed
from diffusers.models.modeling_utils import get_parameter_dtype
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils import logging


logger = logging.get_logger(__name__)


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
# Norms


class LayerNorm(nn.LayerNorm):
    """
    Layer norm that returns the dtype of its input. Under autocast on a GPU, torch's own returns float32, and everything up
    to the next matrix product is then computed in float32, which takes longer than the product. Sums are accumulated in
    float32 in any case.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = cast(x.dtype, self.weight, self.bias)
        with without_autocast(x.device.type):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class GroupNorm(nn.GroupNorm):
    """Group norm that returns the dtype of its input, for the same reason as [`LayerNorm`]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu" and not x.requires_grad and torch.is_grad_enabled():
            # Of a frozen core: in channels_last, the backward pass of torch 2.13 on CPUs writes to the gradient that is not there.
            x = x.contiguous()
        weight, bias = cast(x.dtype, self.weight, self.bias)
        with without_autocast(x.device.type):
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


def cast(dtype: torch.dtype, *parameters: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Return the parameters in `dtype`; None stays None."""
    return tuple(None if parameter is None else parameter.to(dtype) for parameter in parameters)


def without_autocast(device_type: str) -> AbstractContextManager:
    """
    Return a context without autocast. Where autocast is off already it does nothing, since entering `torch.autocast` takes
    longer than a small norm. Compiled code always enters it: up to torch 2.11, asking for the state breaks the graph.
    """
    if device_type == "meta":
        return nullcontext()
    if not torch.compiler.is_compiling() and not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


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
# Text


class TextCache:
    """
    Projections of the text, which are the same in all denoising steps: its keys and values in each layer that attends to
    it, and each stage's projection of its mean. Create one per text and pass it in each call with that text: the first
    call fills it, later calls read it.
    """

    def __init__(self):
        # One entry per module that projects text. `None` says that there is no text.
        self.values: dict[nn.Module, tuple[torch.Tensor, ...] | None] = {}
        self.copied: set[nn.Module] = set()

    def copy_out(self) -> None:
        """Clone new values: the next step overwrites the CUDA graphs' memory, in which compiled blocks leave them."""
        for module in self.values.keys() - self.copied:
            values = self.values[module]
            self.values[module] = values and tuple(value.clone() for value in values)
            self.copied.add(module)


@dataclass
class TextInputs:
    """
    The text of one forward pass, on its way through the growth stages. Transformer blocks take the tensors themselves,
    so that every kind of gradient checkpointing sees them.

    Args:
        encoder_hidden_states (`torch.Tensor` of shape `(B, L, cross_attention_dim)`, *optional*):
            Text embeddings; None for an unconditional model.
        encoder_attention_mask (`torch.Tensor` of shape `(B, L)`, bool, *optional*):
            True for the text tokens to attend to; all of them by default.
        cross_attention_kwargs (`dict`, *optional*):
            Arguments of the attention processors.
        cache ([`TextCache`], *optional*):
            The text's projections from earlier calls; None in training.
    """

    encoder_hidden_states: torch.Tensor | None = None
    encoder_attention_mask: torch.Tensor | None = None
    cross_attention_kwargs: dict | None = None
    cache: TextCache | None = None

    @property
    def attention_mask(self) -> torch.Tensor | None:
        """The mask for attention from any number of image tokens, `(B, 1, 1, L)`, bool."""
        if self.encoder_attention_mask is None:
            return None
        return self.encoder_attention_mask.bool()[:, None, None, :]

    def cast(self, dtype: torch.dtype) -> "TextInputs":
        """Return the same text with its embeddings in `dtype`."""
        if self.encoder_hidden_states is None:
            return self
        embeds = self.encoder_hidden_states.to(dtype)
        return TextInputs(embeds, self.encoder_attention_mask, self.cross_attention_kwargs, self.cache)

    def sum_tokens(self) -> torch.Tensor | None:
        """Return the sum of the tokens that the mask keeps, `(B, cross_attention_dim)`, in float32: float16 overflows on some encoders."""
        embeds = self.encoder_hidden_states
        if embeds is None:
            return None
        if self.encoder_attention_mask is not None:
            embeds = embeds * self.encoder_attention_mask.to(embeds.dtype).unsqueeze(-1)
        return embeds.sum(dim=1, dtype=torch.float32)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "TextInputs":
        """
        Return the same text on `device`, with the same cache, so that what a stage adds to it stays. Device maps and
        offloading call this: their hooks move each argument of a module that has a method `to`.
        """

        def move(value: Any) -> Any:
            return value.to(device, non_blocking=non_blocking) if isinstance(value, torch.Tensor) else value

        kwargs = self.cross_attention_kwargs
        if kwargs is not None:
            kwargs = {name: move(value) for name, value in kwargs.items()}
        return TextInputs(move(self.encoder_hidden_states), move(self.encoder_attention_mask), kwargs, self.cache)


# ----------------------------------------------------------------------------------------------------------------------
# Attention


# The backends of diffusers that raise an error if they get a mask
WITHOUT_MASKS = frozenset(
    {
        "flash",
        "flash_hub",
        "flash_4_hub",
        "_flash_3",
        "_flash_3_hub",
        "aiter_fa2_hub",
        "_native_flash",
        "_native_xla",
        "sage",
        "sage_hub",
        "sage_blackwell_hub",
        "_sage_qk_int8_pv_fp8_cuda",
        "_sage_qk_int8_pv_fp8_cuda_sm90",
        "_sage_qk_int8_pv_fp16_cuda",
        "_sage_qk_int8_pv_fp16_triton",
    }
)


@functools.cache
def warn_of_masks(name: str) -> None:
    """Warn once per backend that attention to text does not use it."""
    logger.warning(
        f"The attention backend {name!r} takes no mask, which text with padding needs: attention to the text uses 'native', and "
        f"only attention between image tokens {name!r}."
    )


def find_backend(
    backend: AttentionBackendName | None, attention_mask: torch.Tensor | None
) -> AttentionBackendName | None:
    """
    Return the backend that computes attention with such a mask: torch's own instead of a `backend` that takes none. None means the
    backend that is active in diffusers, in the argument and in the result.
    """
    if attention_mask is None:
        return backend
    name = (backend or _AttentionBackendRegistry.get_active_backend()[0]).value
    if name not in WITHOUT_MASKS:
        return backend
    if not torch.compiler.is_compiling():
        warn_of_masks(name)
    return AttentionBackendName.NATIVE


class GreedyGrowAttnProcessor:
    """
    Attention through diffusers' dispatch, to image tokens or to text; see [`GreedyGrowAttention`]. Where a backend takes no mask,
    attention to text uses torch's own.
    """

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
            assert encoder_hidden_states is not None
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
            backend=find_backend(self._attention_backend, attention_mask),
            parallel_config=self._parallel_config,
        )
        hidden_states = attn.to_out[0](hidden_states.flatten(2, 3))
        return attn.to_out[1](hidden_states)


class GreedyGrowAttention(nn.Module, AttentionModuleMixin):
    """
    Multi-head attention with normalized queries and keys (Dehghani et al., 2023). Without `cross_attention_dim` it is
    self-attention over image tokens `(B, N, query_dim)`, with it attention from image tokens to text tokens
    `(B, L, cross_attention_dim)`.
    """

    _default_processor_cls = GreedyGrowAttnProcessor
    _available_processors = [GreedyGrowAttnProcessor]

    def __init__(self, query_dim: int, heads: int, cross_attention_dim: int | None = None, dropout: float = 0.0):
        super().__init__()
        self.heads = heads
        self.head_dim = query_dim // heads
        self.use_bias = False
        self.is_cross_attention = cross_attention_dim is not None
        key_dim = cross_attention_dim if cross_attention_dim is not None else query_dim

        self.to_q = nn.Linear(query_dim, query_dim, bias=False)
        self.to_k = nn.Linear(key_dim, query_dim, bias=False)
        self.to_v = nn.Linear(key_dim, query_dim, bias=False)
        self.norm_q = LayerNorm(self.head_dim, eps=1e-6, bias=False)  # as good as RMS norms, and faster on a CPU
        self.norm_k = LayerNorm(self.head_dim, eps=1e-6, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(query_dim, query_dim), nn.Dropout(dropout)])
        self.set_processor(GreedyGrowAttnProcessor())

    def project_text(self, encoder_hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of text `(B, L, cross_attention_dim)`, each `(B, L, heads, head_dim)`."""
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
    2-D rotary positions of a `height x width` grid: one half of each head rotates with the row, the other with the
    column. `theta` is small because grids are small: at 10000, half of the frequencies would hardly rotate within 16 tokens.

    Returns:
        Cosines and signed sines for [`rotate`], each `(height * width, 1, head_dim)`, computed in float32 and returned in
        `dtype`.
    """
    rows = torch.arange(height, device=device, dtype=torch.float32).repeat_interleave(width)
    columns = torch.arange(width, device=device, dtype=torch.float32).repeat(height)
    turns = [get_1d_rotary_pos_embed(head_dim // 2, axis, theta=theta) for axis in (rows, columns)]
    turn = torch.cat(turns, dim=-1).unsqueeze(1)  # complex, (height * width, 1, head_dim / 2)
    cos, sin = torch.cat([turn.real, turn.real], dim=-1), torch.cat([-turn.imag, turn.imag], dim=-1)
    return cos.to(dtype), sin.to(dtype)


def rotate(x: torch.Tensor, image_rotary_emb: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """
    Rotate `x` `(B, N, heads, head_dim)` by its position; channel i pairs with i + head_dim / 2. It computes in the dtype
    of `x`: diffusers' `apply_rotary_emb` computes in float32, which takes twice as long.
    """
    cos, sin = (emb.to(x.dtype) for emb in image_rotary_emb)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class GreedyGrowTransformerBlock(nn.Module):
    """
    Self-attention, cross-attention to the text, and an MLP. The timestep modulates the first and the last, through a
    projection that all blocks share and a table that each block has of its own (adaLN-single, Chen et al., 2023).
    `dropout` acts where diffusers' blocks have it: after each attention and inside the MLP.
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        mlp_ratio: float,
        cross_attention_dim: int | None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn1 = GreedyGrowAttention(dim, num_attention_heads, dropout=dropout)
        self.attn2 = None
        if cross_attention_dim is not None:
            self.norm2 = LayerNorm(dim, eps=1e-6)
            self.attn2 = GreedyGrowAttention(dim, num_attention_heads, cross_attention_dim, dropout)
        self.norm3 = LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.ff = FeedForward(dim, mult=mlp_ratio, dropout=dropout, activation_fn="gelu")
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
        Return the hidden states; with `return_text` also the text's keys and values, which later calls with the same text
        take as `text_key_value`.
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
                assert encoder_hidden_states is not None
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
