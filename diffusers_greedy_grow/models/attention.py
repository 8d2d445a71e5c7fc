# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Attention to image tokens and to text, and the block of the core that it is in."""

import functools
import math

import torch
import torch.nn as nn
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.utils import logging

from .norms import LayerNorm


logger = logging.get_logger(__name__)


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
