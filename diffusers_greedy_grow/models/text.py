# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The text of a forward pass, and what is computed from it once."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn


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
