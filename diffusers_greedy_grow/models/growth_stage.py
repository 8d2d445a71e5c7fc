# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""A growth stage: the encoder and decoder around a core, or around a grown model."""

from collections.abc import Callable

import torch
import torch.nn as nn
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.normalization import RMSNorm

from ..flow import enlarge
from .blocks import CROP_DIM, GrowthDecoder, GrowthEncoder, embed_time
from .text import TextCache, TextInputs


class GrowthStage(nn.Module):
    """
    An encoder and a decoder around an inner model, added by one growth. With `init="preserve"`, the inner model predicts a
    clean image from the pooled state, as it does alone; the encoder sees this image beside the state, and the decoder adds
    detail to it, of its own and from the state. With `init="random"`, the inner model is a transformer between encoder and decoder.

    The stage reads the text itself. A core that never saw detail has learned to ignore the words for it, and cannot pass
    them on while it is frozen. All residual blocks get the mean of the text; the decoder also attends to each token, which
    separates what the mean blurs.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        patch_size: int,
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        inner_channels: int,
        cross_attention_dim: int | None,
        init: str,
        factor: int,
        crop_conditioning: bool = False,
    ):
        super().__init__()
        self.preserves, self.factor = init == "preserve", factor
        temb_channels = 4 * block_out_channels[0]
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(
            256, temb_channels, cond_proj_dim=CROP_DIM if crop_conditioning else None
        )
        if cross_attention_dim is not None:
            self.norm_text = RMSNorm(cross_attention_dim, eps=1e-6)
            self.text_proj = nn.Linear(cross_attention_dim, temb_channels)
        seen_channels = in_channels + (out_channels if self.preserves else 0)
        self.encoder = GrowthEncoder(seen_channels, patch_size, block_out_channels, layers_per_block, temb_channels)
        if not self.preserves:
            self.conv_to_inner = nn.Conv2d(block_out_channels[-1], inner_channels, kernel_size=1)
        self.decoder = GrowthDecoder(
            2 * out_channels if self.preserves else out_channels,
            patch_size,
            inner_channels,
            block_out_channels,
            layers_per_block,
            temb_channels,
            cross_attention_dim,
        )

    def embed(
        self,
        timestep: torch.Tensor,
        text_sum: torch.Tensor | None,
        dtype: torch.dtype,
        cache: TextCache | None = None,
        crop: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Return the conditioning of the residual blocks, `(B, temb_channels)`, from `timestep` `(B,)`, the sum of the text's
        tokens, see [`TextInputs.sum_tokens`], and the crop, see [`complete_crop`].
        """
        temb = embed_time(self.time_embedding, self.time_proj(timestep), crop).to(dtype)
        if text_sum is None:
            return temb
        if cache is not None and (cached := cache.values.get(self.text_proj)):
            return temb + cached[0]
        # The norm makes the sum as good as a mean. It is diffusers' norm, since torch's warns about float32 inputs beside
        # float16 weights.
        projected = self.text_proj(self.norm_text(text_sum).to(dtype))
        if cache is not None:
            cache.values[self.text_proj] = (projected,)
        return temb + projected

    def forward(
        self,
        sample: torch.Tensor,
        sigma: torch.Tensor,
        text: TextInputs,
        text_sum: torch.Tensor | None,
        dtype: torch.dtype,
        inner_image: torch.Tensor | None,
        inner_features: torch.Tensor | None,
        run_core: Callable[[torch.Tensor], tuple[torch.Tensor | None, torch.Tensor]] | None = None,
        crop: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            sample (`torch.Tensor` of shape `(B, C, H, W)`): The state at this stage's resolution.
            sigma (`torch.Tensor` of shape `(B,)`): Its noise level.
            text ([`TextInputs`]): The text, with its embeddings in `dtype`.
            text_sum (`torch.Tensor` of shape `(B, cross_attention_dim)`, *optional*): The sum of its tokens, in float32.
            dtype (`torch.dtype`): The dtype to compute in.
            inner_image (`torch.Tensor`, *optional*): The clean image that the inner model predicts, at its own resolution.
            inner_features (`torch.Tensor`, *optional*): The inner model's features.
            run_core (`Callable`, *optional*): Used with `init="random"` instead of the two: `run_core(features)` returns
                None and the core's features.
            crop (`torch.Tensor` of shape `(B, 3)`, *optional*): The crop, for a model that is told, see [`complete_crop`].

        Returns:
            The clean image `(B, C, H, W)` and the stage's features.
        """
        cache = text.cache
        temb = self.embed(1000 * sigma, text_sum, dtype, cache, crop)

        # 1. The encoder, around the inner model. With a device map, that may be on another device.
        if self.preserves:
            assert inner_image is not None and inner_features is not None
            # The core gets no encoder features. Adding them to its first features, with a weight that starts at zero,
            # undid what it had learned as soon as everything trained, and cost an eighth of the loss.
            image = enlarge(inner_image.to(sample.device), self.factor)
            hidden_states, skips = self.encoder(torch.cat([sample, image], dim=1).to(dtype), temb)
        else:
            assert run_core is not None
            hidden_states, skips = self.encoder(sample.to(dtype), temb)
            _, inner_features = run_core(self.conv_to_inner(hidden_states))

        # 2. The decoder, from the state and the image so far
        text_key_value = None if cache is None else cache.values.get(self.decoder)
        output, features, text_key_value = self.decoder(
            inner_features.to(sample.device), hidden_states, skips, temb, text, text_key_value
        )
        if cache is not None:
            cache.values[self.decoder] = text_key_value
        output = output.to(sample.dtype)
        if not self.preserves:
            return output, features
        # The gain is how much of each pixel of the state to believe: all of it at low noise, and nothing where the noise hides
        # it. So fine detail need not pass through the patches.
        detail, gain = output.chunk(2, dim=1)
        return image + detail + gain * (sample - (1 - sigma.reshape(-1, 1, 1, 1)) * image), features
