# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""From prompts to tokens, and their embeddings per image."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils import is_ftfy_available
from transformers import BatchEncoding, PreTrainedTokenizerBase


def clean_for_if(text: str) -> str:
    """Clean a prompt as `IFPipeline` does without `clean_caption`."""
    return text.lower().strip()


def clean_for_prx_pixel(text: str) -> str:
    """Clean a prompt as `PRXPixelPipeline` does; raise an `ImportError` if the package for that is missing."""
    if not is_ftfy_available():
        raise ImportError("The prompts of a model grown from PRXPixel are cleaned by ftfy: `pip install ftfy`.")
    from diffusers.pipelines.prx import pipeline_prx_pixel  # takes a while, and few models need it

    return pipeline_prx_pixel._basic_clean(text)


# How pipelines whose models were grown make tokens of prompts: they clean the text and pad to the full length.
FORMATS: dict[str, Callable[[str], str]] = {"if": clean_for_if, "prx_pixel": clean_for_prx_pixel}


def clean(prompts: list[str], prompt_format: str | None) -> list[str]:
    """Return the prompts, cleaned if there is a format, a key of [`FORMATS`]."""
    return prompts if prompt_format is None else [FORMATS[prompt_format](prompt) for prompt in prompts]


def max_tokens(tokenizer: PreTrainedTokenizerBase, max_sequence_length: int) -> int:
    """Return how many tokens of a prompt are read: some encoders, such as CLIP's, take fewer than `max_sequence_length`."""
    return min(max_sequence_length, tokenizer.model_max_length)


def tokenize(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_sequence_length: int, prompt_format: str | None = None
) -> BatchEncoding:
    """
    Return `input_ids` and `attention_mask`, both `(B, L)`, padded to the longest prompt, or with a `prompt_format` to
    `max_sequence_length`. Long prompts are truncated; see [`find_truncated`].
    """
    if prompt_format is not None:
        prompts = clean(prompts, prompt_format)
        length = {"padding": "max_length", "max_length": max_sequence_length}
        return tokenizer(prompts, **length, truncation=True, return_attention_mask=True, return_tensors="pt")
    max_length = max_tokens(tokenizer, max_sequence_length)
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    if tokens["input_ids"].shape[1] == 0:  # all prompts are empty, and the tokenizer adds no token at the end
        tokens = tokenizer(prompts, padding="max_length", max_length=1, return_tensors="pt")
    return tokens


def find_truncated(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_sequence_length: int, prompt_format: str | None = None
) -> list[str]:
    """Return the prompts that [`tokenize`] truncates."""
    max_length = max_tokens(tokenizer, max_sequence_length) if prompt_format is None else max_sequence_length
    tokens = tokenizer(clean(prompts, prompt_format))["input_ids"]
    return [text for text, ids in zip(prompts, tokens) if len(ids) > max_length]


def repeat_per_image(tensor: Any, num_images_per_prompt: int, device: torch.device | None) -> Any:
    """Return a tensor `(B, ...)` on `device` with each prompt's row repeated, `(B * num_images_per_prompt, ...)`; None stays None."""
    return None if tensor is None else tensor.to(device).repeat_interleave(num_images_per_prompt, dim=0)
