# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The transformer of PRXPixel as a core."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import PRXTransformer2DModel
from diffusers.models.transformers.transformer_prx import FinalLayer

from ...flow import RectifiedFlow
from .foreign import ForeignCore


class FinalLayerWithFeatures(FinalLayer):
    """
    An output layer that returns its features after its output, as further channels of the image. Zeros fill the last of them,
    if the features' channels are not a multiple of a patch's pixels.
    """

    patch_pixels: int

    def forward(self, x: torch.Tensor, vec: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(vec).chunk(2, dim=1)
        x = (1 + scale[:, None, :]) * self.norm_final(x) + shift[:, None, :]
        return torch.cat([self.linear(x), F.pad(x, (0, -x.shape[-1] % self.patch_pixels))], dim=-1)


class PRXTransformer2DCore(ForeignCore, PRXTransformer2DModel):
    """A [`~diffusers.PRXTransformer2DModel`] that predicts clean images, as `PRXPixelPipeline` has one; see [`ForeignCore`]."""

    model_class = PRXTransformer2DModel
    process_class = RectifiedFlow
    component = "transformer"
    process_hint = (
        "`RectifiedFlow(noise_scale)` of `diffusers_greedy_grow.flow`, with the `noise_scale` of its pipeline"
    )

    _no_split_modules = _repeated_blocks = ["PRXBlock"]

    def __init__(self, process: dict[str, Any] | None, sample_size: int, /, **config: Any):
        super().__init__(process, sample_size, **config)
        self.final_layer.__class__ = FinalLayerWithFeatures  # it keeps its parameters
        self.final_layer.patch_pixels = self.config.patch_size**2

    def read_shape(self) -> dict[str, Any]:
        config = self.config
        self.check_channels()
        self.side_multiple = config.patch_size
        shape = {"in_channels": config.in_channels, "patch_size": config.patch_size, "hidden_size": config.hidden_size}
        return {**shape, "cross_attention_dim": config.context_in_dim}

    def predict(self, y, time, text, mask, kwargs):
        (output,) = PRXTransformer2DModel.forward(self, y, time, text, attention_mask=mask, return_dict=False)
        image, features = output.split([y.shape[1], output.shape[1] - y.shape[1]], dim=1)
        # Back from channels of the image to those of a patch
        features = F.pixel_unshuffle(features, self.config.patch_size)[:, : self.config.hidden_size]
        return image, features
