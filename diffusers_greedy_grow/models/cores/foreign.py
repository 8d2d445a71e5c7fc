# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The interface between a grown model and its core, and its implementation for models of diffusers."""

from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from diffusers import ConfigMixin, ModelMixin

from ...flow import RectifiedFlow, VariancePreserving
from ..blocks import GreedyGrowOutput
from ..text import TextCache
from .processes import build_process


class Core(Protocol):
    """
    A model that predicts clean images and features from states of our process, so that stages can be grown around it:
    [`ShallowUNet2DModel`], and the models of diffusers as [`ForeignCore`].
    """

    @property
    def growth_config(self) -> dict[str, Any]:
        """
        The part of a grown model's configuration that builds the core again, and its resolution, `sample_size`. Stages are
        built from `in_channels` and `out_channels`, the channels of the images; `patch_size`, the pixels per side of one
        cell of the features' grid; `hidden_size`, the channels of the features; and `cross_attention_dim`, those of the text.
        """

    @property
    def side_multiple(self) -> int:
        """The number that must divide both sides of a state."""

    @property
    def reads_padding(self) -> bool:
        """Whether the text's padding also decides the prediction, whatever the mask says."""

    def __call__(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
        *,
        features: torch.Tensor | None = None,
        text_cache: TextCache | None = None,
        crop: torch.Tensor | None = None,
    ) -> Any:
        """Return `pred_original_sample` and `features`. The arguments are those of [`ShallowUNet2DModel.forward`]."""

    def limit_values(self, x0: torch.Tensor) -> torch.Tensor:
        """Limit the values of a clean image that the core has predicted, after guidance."""


class ForeignCore(ModelMixin, ConfigMixin, ABC):
    """
    The base of the classes that make a model of diffusers a [`Core`]. Each also inherits from the model's class, so that the
    parameters of a grown model have the names of the model's, after `core.`.

    Args:
        process (`dict`): The process that the model was trained on, from [`describe_process`].
        sample_size (`int`): The resolution that it was trained at.
        config: The arguments of the model's class.

    Raises:
        `ValueError`: if the model or its process is not supported, or does not fit `sample_size`.
    """

    model_class: type[ModelMixin]
    process_class: type[RectifiedFlow | VariancePreserving]
    side_multiple: int
    reads_padding: bool = False
    component: str  # what a pipeline of diffusers calls the model, and with it the tensors of adapters
    _repeated_blocks: list[str]  # the classes that `compile_repeated_blocks` compiles
    process_hint: str  # what `process` must be, for an error

    def __init__(self, process: dict[str, Any] | None, sample_size: int, /, **config: Any):
        super().__init__(**config)
        name = self.model_class.__name__
        self.process = build_process(process)
        if process is None or not isinstance(self.process, self.process_class):
            given = (process or {}).get("_class_name")
            raise ValueError(f"`process` is a {given}, but a {name} needs {self.process_hint}.")
        shape = self.read_shape()
        if sample_size % self.side_multiple:
            raise ValueError(
                f"`core_sample_size={sample_size}` must be a multiple of {self.side_multiple} for this {name}."
            )
        if unsaved := sorted({buffer for buffer, _ in self.named_buffers()} - self.state_dict().keys()):
            raise ValueError(
                f"`core` is a {name} with buffers that are not saved, such as `{unsaved[0]}`: it cannot be grown."
            )
        arguments = {key: value for key, value in self.config.items() if not key.startswith("_")}
        self.growth_config = {
            "sample_size": sample_size,
            **shape,
            "out_channels": shape["in_channels"],
            # Only our own core has these.
            "num_layers": None,
            "num_attention_heads": None,
            "mlp_ratio": None,
            "dropout": 0.0,
            "crop_conditioning": False,
            "core_config": {"_class_name": name, **arguments},
            "core_process": process,
        }

    @abstractmethod
    def read_shape(self) -> dict[str, Any]:
        """
        Return the `in_channels`, `patch_size`, `hidden_size` and `cross_attention_dim` of [`Core.growth_config`], and set
        `side_multiple`; raise a `ValueError` that names what is not supported in the model's configuration.
        """

    @abstractmethod
    def predict(
        self,
        y: torch.Tensor,
        time: torch.Tensor,
        text: torch.Tensor | None,
        mask: torch.Tensor | None,
        kwargs: dict | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the model's prediction for a state of its own process, and its last features `(B, hidden_size, h, w)`."""

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
        *,
        features: torch.Tensor | None = None,
        text_cache: TextCache | None = None,
        crop: torch.Tensor | None = None,
    ) -> GreedyGrowOutput:
        """
        Predict from a state of our process, see [`Core`]. `features` and `crop` are always None, since these models have an entry
        of their own and are not told of crops, and the text's projections are not kept in `text_cache`.
        """
        sigma, dtype = timestep / 1000, self.dtype
        y, time = self.process.enter(sample, sigma)
        text = None if encoder_hidden_states is None else encoder_hidden_states.to(dtype)
        prediction, features = self.predict(y.to(dtype), time, text, encoder_attention_mask, cross_attention_kwargs)
        # With a device map, the last layer may be on another device than the first.
        image = self.process.clean(y, prediction.to(y), sigma).to(sample.dtype)
        return GreedyGrowOutput(pred_original_sample=image, features=features)

    def limit_values(self, x0: torch.Tensor) -> torch.Tensor:
        """Limit the values of a clean image as the process' scheduler does, see [`Core`]."""
        return self.process.limit(x0)

    def check(self, fits: bool, name: str, remedy: str) -> None:
        """Raise a `ValueError` about the entry `name` of the model's configuration, unless it fits."""
        if not fits:
            value = self.config[name]
            raise ValueError(
                f"`core` is a {self.model_class.__name__} with `{name}={value!r}`, which cannot be grown: {remedy}."
            )

    def check_channels(self) -> None:
        """Raise a `ValueError` unless the model sees images in gray or color, and nothing else."""
        remedy = "images have 1 or 3 channels, others are those of a latent space or of a second image"
        self.check(self.config.in_channels in (1, 3), "in_channels", remedy)
