# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Everything that trains in a phase, as one module."""

import torch

from .text.captions import run_text_encoder


class TrainedModel(torch.nn.Module):
    """
    The model and, if it trains along, the text encoder, as one module: FSDP takes only one. Called like the model; with a text
    encoder, called with `input_ids` instead of `encoder_hidden_states`.

    Args:
        unet (`torch.nn.Module`): The model.
        text_encoder (`torch.nn.Module`, *optional*): A text encoder that trains.
    """

    def __init__(self, unet: torch.nn.Module, text_encoder: torch.nn.Module | None = None):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        **kwargs,
    ):
        if self.text_encoder is not None:
            assert input_ids is not None and encoder_attention_mask is not None
            encoder_hidden_states = run_text_encoder(self.text_encoder, input_ids, encoder_attention_mask)
        return self.unet(sample, timestep, encoder_hidden_states, encoder_attention_mask, **kwargs)
