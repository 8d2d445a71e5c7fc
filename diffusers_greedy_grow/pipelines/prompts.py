# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""From prompts to tokens, and their embeddings per image."""

from typing import Any

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase


def max_tokens(tokenizer: PreTrainedTokenizerBase, max_sequence_length: int) -> int:
    """Return how many tokens of a prompt are read: some encoders, such as CLIP's, take fewer than `max_sequence_length`."""
    return min(max_sequence_length, tokenizer.model_max_length)


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_sequence_length: int) -> BatchEncoding:
    """
    Return `input_ids` and `attention_mask`, both `(B, L)`, padded to the longest prompt. Long prompts are truncated; see
    [`find_truncated`].
    """
    max_length = max_tokens(tokenizer, max_sequence_length)
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    if tokens["input_ids"].shape[1] == 0:  # all prompts are empty, and the tokenizer adds no token at the end
        tokens = tokenizer(prompts, padding="max_length", max_length=1, return_tensors="pt")
    return tokens


def find_truncated(tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_sequence_length: int) -> list[str]:
    """Return the prompts that [`tokenize`] truncates."""
    max_length = max_tokens(tokenizer, max_sequence_length)
    return [text for text, ids in zip(prompts, tokenizer(prompts)["input_ids"]) if len(ids) > max_length]


def repeat_per_image(tensor: Any, num_images_per_prompt: int, device: torch.device | None) -> Any:
    """Return a tensor `(B, ...)` on `device` with each prompt's row repeated, `(B * num_images_per_prompt, ...)`; None stays None."""
    return None if tensor is None else tensor.to(device).repeat_interleave(num_images_per_prompt, dim=0)
