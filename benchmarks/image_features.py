# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""Features of images by any vision model of `transformers`, and embeddings of images and captions by any CLIP model."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, PreTrainedModel


# What a model's image processor says about resizing.
RESIZING = ("do_resize", "size", "resample", "do_center_crop", "crop_size")


def load_model(name: str, revision: str | None, argument: str) -> tuple[PreTrainedModel, set[str]]:
    """
    Load a model, and return it with the names of the weights that its checkpoint lacks.

    Raises:
        `ValueError`: if the value `name` of an `argument` is not a model that `transformers` can load, as safetensors.
    """
    try:
        model, info = AutoModel.from_pretrained(
            name, revision=revision, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"`{argument}={name!r}` cannot be loaded as a model of transformers: {error}") from error
    return model.eval().requires_grad_(False), set(info["missing_keys"])


def load_processor(name: str, revision: str | None, argument: str) -> Any:
    """
    Load the image processor of a model.

    Raises:
        `ValueError`: if the value `name` of an `argument` has none.
    """
    try:
        # PIL on all machines: torchvision, where it is installed, would resize a little differently.
        return AutoImageProcessor.from_pretrained(name, revision=revision, backend="pil")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`{argument}={name!r}` has no image processor: name a vision model with its preprocessor_config.json. {error}"
        ) from error


class FeatureModel:
    """
    A vision model that turns images into features.

    The features are the first of these that the model has: a CLIP model's image embeddings; the pooled output, if it is trained;
    the class token; the mean of the patch tokens or pixels of its last hidden state.

    Args:
        name (`str`), revision (`str`, *optional*): The model, a folder or a repository on the Hub.
        device (`str`), dtype (`torch.dtype`): Where and in which precision it computes.
        argument (`str`): The argument that named the model, for errors.

    Raises:
        `ValueError`: if there is no such model, or it does not take images alone.
    """

    def __init__(
        self,
        name: str,
        revision: str | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        argument: str = "features",
    ):
        self.name, self.argument, self.device, self.dtype = name, argument, device, dtype
        self.model, missing = load_model(name, revision, argument)
        self.trained_pooler = self.check_weights(missing)
        self.output = "image embeddings" if self.is_clip else ""  # chosen at the first images
        self.processor = load_processor(name, revision, argument)
        self.revision = getattr(self.model.config, "_commit_hash", None) or revision
        self.model.to(device, dtype)

    @property
    def is_clip(self) -> bool:
        return hasattr(self.model, "get_image_features") and hasattr(self.model, "get_text_features")

    def check_weights(self, missing: set[str]) -> bool:
        """
        Return whether the checkpoint has all weights of the pooled output, given those that it lacks.

        Raises:
            `ValueError`: if the model has no vision part, or its checkpoint lacks other weights.
        """
        kind = type(self.model).__name__
        if not self.is_clip and self.model.main_input_name != "pixel_values":
            raise ValueError(
                f"`{self.argument}={self.name!r}` is a {kind}, which reads {self.model.main_input_name}, not images alone: name a "
                "vision model, such as DINOv2 or CLIP."
            )
        others = {name for name in missing if "pooler" not in name}  # checkpoints of other tasks often lack the pooler
        if others:
            raise ValueError(
                f"`{self.argument}={self.name!r}` lacks weights of {kind}, such as {min(others)}: its features would be random."
            )
        return not missing

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return the features `(B, D)`, float32 on the CPU, of images `(B, 3, H, W)`, uint8."""
        arrays = [image.permute(1, 2, 0).numpy() for image in images]
        inputs = self.processor(arrays, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        inputs = inputs.to(self.device, self.dtype)
        if self.is_clip:
            return self.model.get_image_features(pixel_values=inputs).pooler_output.float().cpu()
        self.output, features = self.choose(self.model(pixel_values=inputs))
        return features.float().cpu()

    def choose(self, output: Any) -> tuple[str, torch.Tensor]:
        """Return the name of the features to use of a model's output, and the features `(B, D)`."""
        if self.trained_pooler and getattr(output, "pooler_output", None) is not None:
            return "pooled output", output.pooler_output.flatten(1)  # convolutional networks keep a grid of one pixel
        hidden = output.last_hidden_state
        if hidden.ndim == 4:
            return "mean of the last hidden state", hidden.mean((2, 3))
        if any(name.endswith(("cls_token", "class_embedding")) for name, _ in self.model.named_parameters()):
            return "class token", hidden[:, 0]
        return "mean of the last hidden state", hidden.mean(1)

    def describe(self) -> dict[str, Any]:
        """Return what the features depend on, as JSON. Call the model first: the first images show which output it has."""
        processor = self.processor.to_dict()
        return {
            "model": self.name,
            "revision": self.revision,
            "class": type(self.model).__name__,
            "features": self.output,
            "dtype": str(self.dtype).removeprefix("torch."),
            "image_processor": type(self.processor).__name__,
            "resizing": {name: processor[name] for name in RESIZING if processor.get(name) is not None},
        }


class ClipModel(FeatureModel):
    """
    A CLIP model, or another one that embeds images and texts in one space, such as SigLIP. The arguments are those of
    [`FeatureModel`].

    Raises:
        `ValueError`: if the model does not embed texts, or has no tokenizer.
    """

    def __init__(self, name: str, revision: str | None = None, **kwargs: Any):
        super().__init__(name, revision, **{"argument": "clip", **kwargs})
        if not self.is_clip:
            raise ValueError(
                f"`{self.argument}={name!r}` is a {type(self.model).__name__}, which does not embed texts beside images: name a CLIP "
                "model."
            )
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        except (OSError, ValueError) as error:
            raise ValueError(f"`{self.argument}={name!r}` has no tokenizer that can be loaded: {error}") from error

    @torch.no_grad()
    def embed_texts(self, captions: Sequence[str]) -> torch.Tensor:
        """Return the embeddings `(B, D)`, float32 on the CPU, of captions. Warns if one is cut off."""
        longest = self.model.config.text_config.max_position_embeddings
        if any(len(ids) > longest for ids in self.tokenizer(list(captions))["input_ids"]):
            warnings.warn(f"`clip={self.name!r}` reads {longest} tokens: longer captions are cut off.", stacklevel=2)
        # SigLIP needs all captions to be of its full length, and CLIP does not mind.
        tokens = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
        )
        inputs = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask") if name in tokens}
        return self.model.get_text_features(**inputs).pooler_output.float().cpu()
