# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""TODO"""

import warnings

import torch

from ...pipelines import GreedyGrowPipeline
from ...pipelines.prompts import find_cut, tokenize


def tokenize_captions(
    pipeline: GreedyGrowPipeline, captions: list[str], device: torch.device
) -> dict[str, torch.Tensor]:
    """`input_ids` and `encoder_attention_mask` of `captions`, each `(B, L)`, as the pipeline makes them for prompts."""
    tokens = tokenize(pipeline.tokenizer, captions, pipeline.config.max_sequence_length).to(device, non_blocking=True)
    return {"input_ids": tokens["input_ids"], "encoder_attention_mask": tokens["attention_mask"].bool()}


def warn_of_cut_captions(pipeline: GreedyGrowPipeline, captions: list[str]) -> None:
    """Once, before training, where each step's captions are cut without a word."""
    length = pipeline.config.max_sequence_length
    if cut := find_cut(pipeline.tokenizer, captions, length):
        warnings.warn(
            f"{len(cut)} of {len(captions)} captions are longer than the `max_sequence_length={length}` tokens that are "
            f"read, such as {cut[0][:200]!r}.",
            stacklevel=2,
        )


def encode_captions(
    pipeline: GreedyGrowPipeline, text_encoder: torch.nn.Module, captions: list[str], device: torch.device
) -> dict[str, torch.Tensor]:
    """The model's text arguments for `captions`, as the pipeline makes them for prompts."""
    tokens = tokenize_captions(pipeline, captions, device)
    mask = tokens["encoder_attention_mask"]
    hidden_states = text_encoder(tokens["input_ids"], attention_mask=mask.long()).last_hidden_state
    return {"encoder_hidden_states": hidden_states, "encoder_attention_mask": mask}
