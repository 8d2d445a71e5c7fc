# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""From captions to the text arguments of the model that trains."""

import warnings
from typing import TYPE_CHECKING

import torch

from ...pipelines import GreedyGrowPipeline
from ...pipelines.prompts import find_truncated, tokenize


if TYPE_CHECKING:
    from .embeddings import TextEmbeddings


class CaptionEncoder:
    """
    Turns captions into the text arguments of a [`TrainedModel`], in the way that suits the text encoder: tokens if it trains,
    cached embeddings if there are any, else the output of the frozen encoder.

    Args:
        pipeline ([`GreedyGrowPipeline`]): The pipeline with the tokenizer and the text encoder.
        device (`torch.device`): The device of the results.
        trains (`bool`, defaults to `False`): Whether the text encoder trains as a part of the model.
        embeddings ([`TextEmbeddings`], *optional*): The cached embeddings of all captions, for an encoder that does not train.

    Raises:
        `ValueError`: if there are cached embeddings of an encoder that trains.
    """

    def __init__(
        self,
        pipeline: GreedyGrowPipeline,
        device: torch.device,
        trains: bool = False,
        embeddings: "TextEmbeddings | None" = None,
    ):
        if trains and embeddings is not None:
            raise ValueError("Cached `embeddings` cannot replace a text encoder that trains: pass one of the two.")
        self.pipeline, self.device, self.embeddings = pipeline, device, embeddings
        if embeddings is not None:
            self.encode = self.look_up
        elif trains:
            self.encode = self.tokenize
        else:
            self.encode = self.run_encoder

    def __call__(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """Return the text arguments for `captions`: their embeddings `(B, L, D)` or tokens `(B, L)`, and a mask `(B, L)`."""
        return self.encode(captions)

    def look_up(self, captions: list[str]) -> dict[str, torch.Tensor]:
        assert self.embeddings is not None
        return self.embeddings(captions, self.device)

    def tokenize(self, captions: list[str]) -> dict[str, torch.Tensor]:
        return tokenize_captions(self.pipeline, captions, self.device)

    def run_encoder(self, captions: list[str]) -> dict[str, torch.Tensor]:
        return encode_captions(self.pipeline, self.pipeline.text_encoder, captions, self.device)


def tokenize_captions(
    pipeline: GreedyGrowPipeline, captions: list[str], device: torch.device
) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `encoder_attention_mask` of `captions`, each `(B, L)`, as the pipeline makes them for prompts."""
    config = pipeline.config
    tokens = tokenize(pipeline.tokenizer, captions, config.max_sequence_length, config.prompt_format)
    tokens = tokens.to(device, non_blocking=True)
    return {"input_ids": tokens["input_ids"], "encoder_attention_mask": tokens["attention_mask"].bool()}


def encode_captions(
    pipeline: GreedyGrowPipeline, text_encoder: torch.nn.Module, captions: list[str], device: torch.device
) -> dict[str, torch.Tensor]:
    """Return `encoder_hidden_states` and `encoder_attention_mask` of `captions`, as the pipeline makes them for prompts."""
    tokens = tokenize_captions(pipeline, captions, device)
    mask = tokens["encoder_attention_mask"]
    return {
        "encoder_hidden_states": run_text_encoder(text_encoder, tokens["input_ids"], mask),
        "encoder_attention_mask": mask,
    }


def run_text_encoder(text_encoder: torch.nn.Module, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Return the last hidden states `(B, L, D)` of a text encoder for tokens `(B, L)` and a bool mask `(B, L)`. An encoder of T5's
    family gets the mask in the shape of attention scores: it would ask the GPU whether there is any padding, and wait.
    """
    attention_mask = mask.long()
    config = text_encoder.config
    if config.model_type in ("t5", "umt5") and config._attn_implementation == "sdpa":
        attention_mask = mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
    return text_encoder(input_ids, attention_mask=attention_mask).last_hidden_state


def warn_of_truncated_captions(pipeline: GreedyGrowPipeline, captions: list[str]) -> None:
    """Warn of captions with more tokens than are read. Called once, before training: the steps truncate without a warning."""
    length = pipeline.config.max_sequence_length
    if truncated := find_truncated(pipeline.tokenizer, captions, length, pipeline.config.prompt_format):
        warnings.warn(
            f"{len(truncated)} of {len(captions)} captions are longer than the `max_sequence_length={length}` tokens that are "
            f"read, such as {truncated[0][:200]!r}.",
            stacklevel=2,
        )
