# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The UNets of diffusers as cores: of DDPM, DeepFloyd IF and the like, in pixel space."""

from typing import Any

import torch
import torch.nn as nn
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.modeling_utils import get_parameter_dtype
from peft.tuners.tuners_utils import BaseTunerLayer

from ...flow import VariancePreserving
from .foreign import ForeignCore


class ConvWithFeatures(nn.Conv2d):
    """
    An output layer that keeps its input, the features, until [`UNetCore.split`] takes it. It returns its output alone, so that an
    adapter of PEFT can be added to it.
    """

    features: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.features = x
        return super().forward(x)


class LastNorm(nn.GroupNorm):
    """
    A last norm that a condition takes for true. diffusers asks `if self.conv_norm_out`, and where `torch.compile` has wrapped a
    module, as accelerate does with each that is not repeated, its truth is the module's length.
    """

    def __len__(self) -> int:
        return 1


class TimeEmbedding(TimestepEmbedding):
    """A time embedding in float32, as a grown model keeps it, among layers in another dtype."""

    def forward(self, sample: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(sample.to(get_parameter_dtype(self)), condition).to(sample.dtype)


class UNetCore(ForeignCore):
    """The parts of a core that both UNets share."""

    process_class = VariancePreserving
    component = "unet"
    process_hint = "the DDPMScheduler or DDIMScheduler that it was trained with"
    conv_out: nn.Module
    conv_norm_out: nn.Module | None
    time_embedding: nn.Module
    _no_split_modules = [  # whole blocks upwards, since they join what others have computed
        "ResnetBlock2D",
        "BasicTransformerBlock",
        "UpBlock2D",
        "AttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "ResnetUpsampleBlock2D",
        "SimpleCrossAttnUpBlock2D",
    ]

    def __init__(self, process: dict[str, Any] | None, sample_size: int, /, **config: Any):
        super().__init__(process, sample_size, **config)
        # The layers keep their parameters.
        self.conv_out.__class__ = ConvWithFeatures
        self.time_embedding.__class__ = TimeEmbedding
        if self.conv_norm_out is not None:
            self.conv_norm_out.__class__ = LastNorm
        blocks = (*self.down_blocks, self.mid_block, *self.up_blocks)
        self._repeated_blocks = sorted({type(block).__name__ for block in blocks if block is not None})

    def read_shape(self) -> dict[str, Any]:
        config = self.config
        self.check_channels()
        channels = config.in_channels
        remedy = f"it must be `in_channels={channels}`, or {2 * channels} with variances"
        self.check(config.out_channels in (channels, 2 * channels), "out_channels", remedy)
        self.check(config.time_embedding_type == "positional", "time_embedding_type", 'it must be "positional"')
        for name in ("class_embed_type", "num_class_embeds"):
            self.check(config[name] is None, name, "models that are conditioned on classes are not supported")
        self.side_multiple = 2 ** (len(config.block_out_channels) - 1)
        return {"in_channels": config.in_channels, "patch_size": 1, "hidden_size": config.block_out_channels[0]}

    def split(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return the prediction in a UNet's `output`, without the variances that some predict after it (`learned_range`), which only
        matter where a sampler adds noise; and the features that the output was made of.
        """
        layer = self.conv_out.get_base_layer() if isinstance(self.conv_out, BaseTunerLayer) else self.conv_out
        features, layer.features = layer.features, None
        return output[:, : self.config.in_channels], features


class UNet2DCore(UNetCore, UNet2DModel):
    """A [`~diffusers.UNet2DModel`], which is unconditional, as a core; see [`ForeignCore`]."""

    model_class = UNet2DModel

    def read_shape(self) -> dict[str, Any]:
        skips = [kind for kind in self.config.up_block_types if "Skip" in kind]
        self.check(not skips, "up_block_types", "blocks that draw parts of the image themselves have no last features")
        return {**super().read_shape(), "cross_attention_dim": None}

    def predict(self, y, time, text, mask, kwargs):
        (output,) = UNet2DModel.forward(self, y, time, return_dict=False)
        return self.split(output)


class UNet2DConditionCore(UNetCore, UNet2DConditionModel):
    """
    A [`~diffusers.UNet2DConditionModel`] as a core; see [`ForeignCore`]. One with the layers of DeepFloyd IF attends to all tokens,
    whatever the mask says: it was trained so, and these layers do not run with a mask.
    """

    model_class = UNet2DConditionModel

    def read_shape(self) -> dict[str, Any]:
        config = self.config
        for name, supported in (
            ("addition_embed_type", (None, "text")),
            ("encoder_hid_dim_type", (None, "text_proj")),
            ("time_cond_proj_dim", (None,)),
        ):
            remedy = f"supported are {', '.join(map(repr, supported))}, models that see text and noise level only"
            self.check(config[name] in supported, name, remedy)
        self.attends_to_padding = any("Simple" in kind for kind in config.down_block_types)
        self.reads_padding = self.attends_to_padding or config.addition_embed_type == "text"
        width = config.encoder_hid_dim or config.cross_attention_dim
        self.check(isinstance(width, int), "cross_attention_dim", "all blocks must see the same text")
        return {**super().read_shape(), "cross_attention_dim": width}

    def predict(self, y, time, text, mask, kwargs):
        if self.attends_to_padding:
            mask = None
        (output,) = UNet2DConditionModel.forward(
            self, y, time, text, encoder_attention_mask=mask, cross_attention_kwargs=kwargs, return_dict=False
        )
        return self.split(output)
