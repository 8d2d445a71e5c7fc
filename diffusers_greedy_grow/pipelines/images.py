# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The images and masks that are given to pipelines."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from .denoising import Sampling


def count_prompts(prompt: Any, prompt_embeds: torch.Tensor | None) -> int:
    """Return the number of prompts, before they are checked."""
    if isinstance(prompt_embeds, torch.Tensor):
        return len(prompt_embeds)
    return len(prompt) if isinstance(prompt, list) else 1


# The modes of PIL images, by the number of channels of the images that a model draws
MODES = {1: "L", 3: "RGB"}


def list_images(name: str, images: Any, batch_size: int, channels: int) -> list[Any]:
    """
    Return given images as a list, either of PIL images in the mode that the model draws or of tensors `(C, H, W)` in [0, 1], in
    float32.

    Args:
        name (`str`): The argument, for errors.
        images: One image or several: `PIL.Image.Image`s in RGB (in gray for one channel), arrays `(H, W, C)` or `(B, H, W, C)`
            in [0, 1], or tensors `(C, H, W)` or `(B, C, H, W)` in [0, 1].
        batch_size (`int`): The number of prompts.
        channels (`int`): The number of channels of the images that the model draws.

    Raises:
        `ValueError`: if they are no images, of several sizes or kinds, with another number of channels, outside [0, 1], or neither
            one nor one per prompt.
    """
    images = split_batch(images)
    if not images:
        raise ValueError(f"`{name}` is an empty list: pass an image.")
    for image in images:
        check_image(name, image, channels)
    if len({image_size(image) for image in images}) > 1:
        sizes = sorted({image_size(image) for image in images})
        raise ValueError(f"`{name}` has images of several sizes (height, width), {sizes}: pass images of one size.")
    if len(images) not in (1, batch_size):
        raise ValueError(f"`{name}` has {len(images)} images for {batch_size} prompts: pass one, or one per prompt.")
    images = [to_tensor(image).permute(2, 0, 1) if isinstance(image, np.ndarray) else image for image in images]
    return unify(name, images)


def check_image(name: str, image: Any, channels: int) -> None:
    """Raise a `ValueError` unless this is one image, see [`list_images`]."""
    if isinstance(image, Image.Image):
        if (mode := MODES.get(channels)) is None:
            raise ValueError(
                f"`{name}` is a PIL image, but the model draws {channels} channels: pass a tensor (C, H, W)."
            )
        if image.mode != mode:
            raise ValueError(
                f'`{name}` is in mode {image.mode!r}, but the model draws {mode}: pass `image.convert("{mode}")`, for an image with '
                "transparency after pasting it on a background."
            )
    elif not isinstance(image, (torch.Tensor, np.ndarray)) or image.ndim != 3:
        raise ValueError(
            f"`{name}` must be a PIL.Image.Image, an array (H, W, C) or a tensor (C, H, W), or a list of them, but has a "
            f"{describe(image)}."
        )
    else:
        given = image.shape[0] if isinstance(image, torch.Tensor) else image.shape[-1]
        if given != channels:
            raise ValueError(
                f"`{name}` has {given} channels in the shape {tuple(image.shape)}, but must have the {channels} of the model."
            )
        is_float = image.dtype.is_floating_point if isinstance(image, torch.Tensor) else image.dtype.kind == "f"
        if not is_float:  # 1 may mean white, or nearly black
            raise ValueError(
                f"`{name}` has the dtype {image.dtype}, but must have floats in [0, 1]: divide 8-bit values by 255."
            )
    check_values(name, image)


def list_masks(name: str, masks: Any, images: list[Any]) -> list[Any]:
    """
    Return given masks as a list, either of PIL images in gray or of tensors `(1, H, W)` in [0, 1], in float32.

    Args:
        name (`str`): The argument, for errors.
        masks: One mask or several: `PIL.Image.Image`s, arrays or tensors of shape `(H, W)` or with further sides of 1, in [0, 1],
            or batches of them with four dimensions.
        images (`list`): The images to mask, from [`list_images`].

    Raises:
        `ValueError`: if they are no masks, of several kinds, outside [0, 1], of another size than the images, or neither one nor
            one per image.
    """
    masks = split_batch(masks)
    if len(masks) not in (1, len(images)):
        raise ValueError(f"`{name}` has {len(masks)} masks for {len(images)} images: pass one, or one per image.")
    listed = [convert_mask(name, mask) for mask in masks]
    height, width = image_size(images[0])
    for mask in listed:
        if image_size(mask) != (height, width):
            size = image_size(mask)
            raise ValueError(
                f"`{name}` is {size[1]} x {size[0]} pixels and `image` {width} x {height}: resize the mask to the image."
            )
    return unify(name, listed)


def convert_mask(name: str, mask: Any) -> Any:
    """Return one mask as [`list_masks`] does."""
    if isinstance(mask, Image.Image):
        if mask.mode == "F" or mask.mode.startswith("I"):  # PIL would clip them to [0, 255]
            raise ValueError(
                f"`{name}` is in mode {mask.mode!r}, but must have 8 bits per pixel: scale it to mode 'L'."
            )
        return mask.convert("L")
    if isinstance(mask, (torch.Tensor, np.ndarray)) and mask.ndim >= 2:
        height_axis = mask.ndim - 2
        if isinstance(mask, np.ndarray) and mask.ndim == 3 and mask.shape[-1] == 1:
            height_axis = 0
        sides = mask.shape[height_axis : height_axis + 2]
        if mask.shape == (1,) * height_axis + tuple(sides) + (1,) * (mask.ndim - height_axis - 2):
            check_values(name, mask)
            return to_tensor(mask).reshape(1, *sides)
    raise ValueError(
        f"`{name}` must be a PIL.Image.Image, an array (H, W) or a tensor (H, W) or (1, H, W), or a list of them, but has a "
        f"{describe(mask)}."
    )


def split_batch(images: Any) -> list[Any]:
    """Return one image, a list of images or a batch of four dimensions as a list."""
    is_batch = isinstance(images, (torch.Tensor, np.ndarray)) and images.ndim == 4
    return list(images) if is_batch or isinstance(images, (list, tuple)) else [images]


def check_values(name: str, image: Any) -> None:
    """Raise a `ValueError` unless an image or a mask has pixels, and all its values are in [0, 1]."""
    if 0 in image_size(image):
        raise ValueError(f"`{name}` has no pixels: its height and width are {image_size(image)}.")
    if isinstance(image, Image.Image):
        return
    low, high = float(image.min()), float(image.max())
    if not 0 <= low <= high <= 1:
        raise ValueError(f"`{name}` has values from {low:.3g} to {high:.3g}, but must be in [0, 1].")


def unify(name: str, images: list[Any]) -> list[Any]:
    """Return the images. Raise a `ValueError` unless all are PIL images, or none."""
    if len({isinstance(image, Image.Image) for image in images}) > 1:
        raise ValueError(f"`{name}` mixes PIL images with arrays or tensors: pass images of one kind.")
    return images


def describe(image: Any) -> str:
    """Return the type of something that is not an image, and its shape."""
    return type(image).__name__ + (f" of the shape {tuple(image.shape)}" if hasattr(image, "shape") else "")


def to_tensor(image: torch.Tensor | np.ndarray) -> torch.Tensor:
    """Return an array or a tensor as a tensor in float32."""
    if isinstance(image, torch.Tensor):
        return image.to(torch.float32)
    # A new array: torch knows no negative strides, as flipped ones have, and not the floats of other byte orders or widths.
    return torch.from_numpy(np.array(image, dtype=np.float32, order="C"))


def image_size(image: Any) -> tuple[int, int]:
    """Return the height and width of an image or a mask."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    return tuple(image.shape[-2:]) if isinstance(image, torch.Tensor) else tuple(image.shape[:2])  # type: ignore


def resize_tensors(images: list[Any], height: int, width: int) -> list[Any]:
    """
    Return listed images or masks, tensors among them in another size. PIL images are left to diffusers' image processors, which
    filter them; of tensors they would only take the nearest pixels.
    """
    if isinstance(images[0], Image.Image) or image_size(images[0]) == (height, width):
        return images
    resized = F.interpolate(torch.stack(images), (height, width), mode="bicubic", antialias=True)
    return list(resized.clamp(0, 1))


def repeat_images(images: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return given images or masks `(N, C, H, W)`, one for all prompts or one per prompt, as one per image that is drawn."""
    return images.to(sampling.device, torch.float32).repeat_interleave(sampling.batch_size // len(images), dim=0)


def prepare_images(processor: VaeImageProcessor, images: list[Any], sampling: Sampling) -> torch.Tensor:
    """Return listed images as `(B, C, height, width)` in [-1, 1]: in the size that is drawn, one per image that is drawn."""
    size = sampling.height, sampling.width
    return repeat_images(processor.preprocess(resize_tensors(images, *size), *size), sampling)
