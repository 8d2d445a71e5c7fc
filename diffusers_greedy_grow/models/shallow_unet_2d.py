# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The core: a Shallow-UViT, trained alone at low resolution and kept when the model grows."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import apply_lora_scale

from ..flow import velocity_from_clean
from ..hub.mixins import HubMixin
from .adapters import AdapterMixin
from .attention import GreedyGrowTransformerBlock, get_image_rotary_emb
from .blocks import CROP_DIM, GreedyGrowOutput, check_sizes, complete_crop, embed_time, residual_block
from .norms import GroupNorm
from .text import TextCache


# The entries of the core's configuration that a grown model has, too
CORE_CONFIG_NAMES = (
    "in_channels",
    "out_channels",
    "patch_size",
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "mlp_ratio",
    "cross_attention_dim",
    "dropout",
    "crop_conditioning",
)


class ShallowUNet2DModel(HubMixin, AdapterMixin, ModelMixin, AttentionMixin, ConfigMixin):
    r"""
    Shallow-UViT (Vasconcelos et al., 2024, section 3): one entry convolution shrinks the image to the grid of the
    transformer at once, and a single residual block on either side replaces encoder and decoder. It learns alignment:
    what is in the image, and where.

    It predicts the clean image and returns the flow velocity `u = e - x0`, so that every flow-matching scheduler of
    diffusers works with it.

    Parameters:
        sample_size (`int`, defaults to 64):
            Height and width in pixels of the images it is trained on, a multiple of `patch_size`. Other sizes and
            shapes run if both sides are multiples of `patch_size`, too, but need images of them in training.
        in_channels (`int`, defaults to 3), out_channels (`int`, defaults to 3):
            Channels of the state and of the prediction; both must be the same.
        patch_size (`int`, defaults to 4):
            Pixels per side of one cell of the grid.
        hidden_size (`int`, defaults to 768):
            Channels on the grid.
        num_layers (`int`, defaults to 12):
            Number of transformer layers.
        num_attention_heads (`int`, defaults to 12):
            Heads per attention; `hidden_size / num_attention_heads` must be a multiple of 4 (two rotary axes).
        mlp_ratio (`float`, defaults to 4.0):
            Width of the MLPs, as a multiple of `hidden_size`.
        cross_attention_dim (`int`, *optional*, defaults to 768):
            Channels of the text embeddings. `None` for an unconditional model.
        dropout (`float`, defaults to 0.0):
            Share of values in [0, 1) that the transformer layers drop in training, after each attention and inside the MLP.
        crop_conditioning (`bool`, defaults to `False`):
            Whether the model is told which part of an image it sees, see `crop` of [`~ShallowUNet2DModel.forward`].

    Raises:
        `ValueError`: if a size is not a whole number or does not fit the others, or `dropout` is out of its range.
    """

    reads_padding = False  # see `Core`
    _supports_gradient_checkpointing = True
    _no_split_modules = ["GreedyGrowTransformerBlock", "ResnetBlock2D"]
    _repeated_blocks = ["GreedyGrowTransformerBlock"]
    _keep_in_fp32_modules = ["time_embedding", "time_modulation", "scale_shift_table"]
    _skip_layerwise_casting_patterns = ["norm", "conv_in", "conv_out", "time_embedding", "time_modulation"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        out_channels: int = 3,
        patch_size: int = 4,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        mlp_ratio: float = 4.0,
        cross_attention_dim: int | None = 768,
        dropout: float = 0.0,
        crop_conditioning: bool = False,
    ):
        super().__init__()
        check_sizes(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            patch_size=patch_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_attention_heads=num_attention_heads,
            mlp_ratio=mlp_ratio,
            cross_attention_dim=cross_attention_dim if cross_attention_dim is not None else 1,
        )
        if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError(f"`dropout={dropout!r}` must be a number, at least 0 and below 1.")
        if out_channels != in_channels:
            raise ValueError(
                f"`out_channels={out_channels}` must be `in_channels={in_channels}`: the model predicts the image in "
                "the state."
            )
        if sample_size % patch_size:
            raise ValueError(
                f"`sample_size={sample_size}` is not a multiple of `patch_size={patch_size}`; "
                f"{-(-sample_size // patch_size) * patch_size} would be."
            )
        if hidden_size % (4 * num_attention_heads):
            raise ValueError(
                f"`hidden_size={hidden_size}` must be a multiple of `4 * num_attention_heads` "
                f"({4 * num_attention_heads}): each head holds two rotary axes of even width."
            )

        # 1. Entry
        self.conv_in = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(
            256, hidden_size, cond_proj_dim=CROP_DIM if crop_conditioning else None
        )
        self.time_modulation = nn.Linear(hidden_size, 6 * hidden_size)
        self.resnet_in = residual_block(hidden_size, hidden_size, hidden_size)

        # 2. The core proper
        if cross_attention_dim is not None:
            self.norm_encoder = nn.RMSNorm(cross_attention_dim, eps=1e-6)
        self.transformer_blocks = nn.ModuleList(
            [
                GreedyGrowTransformerBlock(hidden_size, num_attention_heads, mlp_ratio, cross_attention_dim, dropout)
                for _ in range(num_layers)
            ]
        )

        # 3. Exit
        self.resnet_out = residual_block(hidden_size, hidden_size, hidden_size)
        self.conv_norm_out = GroupNorm(self.resnet_out.norm2.num_groups, hidden_size, eps=1e-6)
        self.conv_out = nn.Conv2d(hidden_size, out_channels * patch_size**2, kernel_size=3, padding=1)

        self.gradient_checkpointing = False

    @property
    def sample_sizes(self) -> tuple[int, ...]:
        """The resolutions of the model: its `sample_size` alone."""
        return (self.config.sample_size,)

    @property
    def image_sizes(self) -> tuple[int, ...]:
        """The resolutions at which the model predicts images, as in a grown model: its own."""
        return self.sample_sizes

    @property
    def side_multiple(self) -> int:
        """The number that must divide both sides of a state: `patch_size`."""
        return self.config.patch_size

    @property
    def growth_config(self) -> dict[str, Any]:
        """The configuration that a grown model stores of the core, and the core's resolution; see [`Core`](cores/foreign.py)."""
        return {name: self.config[name] for name in ("sample_size", *CORE_CONFIG_NAMES)}

    def limit_values(self, x0: torch.Tensor) -> torch.Tensor:
        """Return a predicted clean image as it is; see [`Core`](cores/foreign.py)."""
        return x0

    def zero_init_output(self) -> None:
        """
        Set the output layer to zero, so that a new model predicts a gray image for every state. With random weights in the
        output layer, the held-out loss ended 3 % higher in trials.
        """
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    def remove_shallow_parts(self) -> None:
        """Remove everything but the transformer, as the paper does after pretraining; see `init="random"`."""
        for name in ("conv_in", "resnet_in", "resnet_out", "conv_norm_out", "conv_out"):
            setattr(self, name, None)

    @apply_lora_scale("cross_attention_kwargs")
    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
        return_dict: bool = True,
        features: torch.Tensor | None = None,
        text_cache: TextCache | None = None,
        crop: torch.Tensor | None = None,
    ) -> GreedyGrowOutput | tuple[torch.Tensor]:
        r"""
        Args:
            sample (`torch.Tensor` of shape `(B, in_channels, H, W)`):
                The state `x = (1 - sigma) x0 + sigma e`. `patch_size` divides `H` and `W`.
            timestep (`torch.Tensor` of shape `(B,)` or `()`, or a number):
                `1000 * sigma`, in (0, 1000].
            encoder_hidden_states (`torch.Tensor` of shape `(B, L, cross_attention_dim)`, *optional*):
                Text embeddings. Required by a conditional model.
            encoder_attention_mask (`torch.Tensor` of shape `(B, L)`, bool, *optional*):
                True for the text tokens to attend to; all of them by default.
            cross_attention_kwargs (`dict`, *optional*):
                `scale` scales the LoRA layers; the rest goes to the attention processors.
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`GreedyGrowOutput`] or a tuple with the velocity alone.
            features (`torch.Tensor` of shape `(B, hidden_size, H / patch_size, W / patch_size)`, *optional*):
                The input of the transformer inside a model grown with `init="random"`, which has no entry of its own.
            text_cache ([`TextCache`], *optional*):
                The text's keys and values from earlier calls with the same text. Ignored while gradients are enabled:
                cached values belong to the graph of an earlier step, or to none.
            crop (`torch.Tensor` of shape `(B, 3)`, *optional*):
                With `crop_conditioning`, the part of the image that `sample` is: its top, its left, and the missing share of the
                sides, as shares of the whole image. By default zeros, the whole image.

        Returns:
            [`GreedyGrowOutput`] or `tuple`; the velocity has the shape and the dtype of `sample`.

        Raises:
            `ValueError`: if the text, its mask, the sides of `sample` or the `crop` do not fit the model.
        """
        if torch.is_grad_enabled():
            text_cache = None
        batch_size, _, height, width = sample.shape
        check_text(self.config.cross_attention_dim, batch_size, encoder_hidden_states, encoder_attention_mask)
        patch_size = self.config.patch_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"`sample` is {height} x {width}, but both sides must be multiples of {patch_size}.")
        grid_height, grid_width = height // patch_size, width // patch_size
        # The weights' dtype; `self.dtype` searches all of them for it.
        dtype = self.dtype if self.conv_in is None else self.conv_in.weight.dtype

        # 1. Timestep
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).expand(batch_size)
        crop = complete_crop(self.config.crop_conditioning, crop, timestep)
        temb = embed_time(self.time_embedding, self.time_proj(timestep), crop)
        modulation = self.time_modulation(F.silu(temb)).unflatten(-1, (6, -1))
        temb = temb.to(dtype)

        # 2. Entry: to the grid at once. With `init="random"` the first stage's encoder has done this already.
        if self.conv_in is not None:
            hidden_states = self.resnet_in(self.conv_in(sample.to(dtype)), temb)
        else:
            hidden_states = features

        # 3. Transformer, on tokens (B, N, hidden_size)
        hidden_states = hidden_states.flatten(2).transpose(1, 2).contiguous()
        if encoder_hidden_states is not None and not (text_cache and self.transformer_blocks[0] in text_cache.values):
            encoder_hidden_states = self.norm_encoder(encoder_hidden_states.to(dtype))
        if encoder_attention_mask is not None:
            encoder_attention_mask = encoder_attention_mask.bool()[:, None, None, :]
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        image_rotary_emb = get_image_rotary_emb(head_dim, grid_height, grid_width, sample.device, hidden_states.dtype)

        arguments = (
            modulation,
            encoder_hidden_states,
            encoder_attention_mask,
            image_rotary_emb,
            cross_attention_kwargs,
        )
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, *arguments)
            elif text_cache is not None:
                text_key_value = text_cache.values.get(block)
                hidden_states, text_cache.values[block] = block(
                    hidden_states, *arguments, text_key_value=text_key_value, return_text=True
                )
            else:
                hidden_states = block(hidden_states, *arguments)
        features = hidden_states.transpose(1, 2).unflatten(-1, (grid_height, grid_width)).contiguous()

        # 4. Exit: the clean image, and the velocity in the dtype of the state
        if self.conv_out is None:
            return GreedyGrowOutput(features=features) if return_dict else (features,)
        features = self.resnet_out(features, temb)
        pred_original_sample = self.conv_out(F.silu(self.conv_norm_out(features)))
        pred_original_sample = F.pixel_shuffle(pred_original_sample, patch_size).to(sample.dtype)
        velocity = velocity_from_clean(sample, pred_original_sample, timestep / 1000).to(sample.dtype)

        if not return_dict:
            return (velocity,)
        return GreedyGrowOutput(sample=velocity, pred_original_sample=pred_original_sample, features=features)


def check_text(
    cross_attention_dim: int | None,
    batch_size: int,
    encoder_hidden_states: torch.Tensor | None,
    encoder_attention_mask: torch.Tensor | None = None,
) -> None:
    """
    Raise a `ValueError` if a conditional model gets no text, or text of another width or for another number of images; if an
    unconditional model gets text; and if the mask does not fit the text or is to be added to attention scores.
    """
    if cross_attention_dim is None:
        if encoder_hidden_states is not None:
            raise ValueError(
                "`encoder_hidden_states` was given to an unconditional model (`cross_attention_dim=None`): leave it out."
            )
        return
    given = () if encoder_hidden_states is None else tuple(encoder_hidden_states.shape)
    if encoder_hidden_states is None or (given[0], given[-1]) != (batch_size, cross_attention_dim):
        raise ValueError(
            f"`encoder_hidden_states` must be of shape ({batch_size}, tokens, {cross_attention_dim}) but is {given or None}."
        )
    if encoder_attention_mask is None:
        return
    if encoder_attention_mask.shape != encoder_hidden_states.shape[:2]:
        raise ValueError(
            f"`encoder_attention_mask` must be of shape {given[:2]}, as `encoder_hidden_states` is, but is "
            f"{tuple(encoder_attention_mask.shape)}."
        )
    check_mask("encoder_attention_mask", encoder_attention_mask)


def check_mask(name: str, mask: torch.Tensor) -> None:
    """Raise a `ValueError` if a text mask has floating-point numbers, as masks that are added to attention scores do."""
    if mask.is_floating_point():
        raise ValueError(
            f"`{name}` is of {mask.dtype}, but must be bool, True for the tokens to attend to: pass `{name} > 0`, or "
            f"`{name} == 0` if it is to be added to attention scores."
        )
