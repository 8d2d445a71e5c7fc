# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The data of a run, from its arguments to the batches of each phase."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from accelerate import Accelerator
from accelerate.logging import get_logger
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler

from ..arguments import DataArguments
from ..parsing import parse_buckets
from ..signals import leave_signals_to_the_parent
from .captioned import CaptionedImages
from .order import BucketOrder, EpochOrder, VisitOrder
from .rows import BrokenRows
from .sharing import find_key
from .sources import Selection, check_data_dir, load_captioned_data
from .streaming import StreamedImages, StreamLoader, load_captioned_stream
from .visits import Augmentation


if TYPE_CHECKING:
    from ..core_predictions.store import CorePredictions


logger = get_logger(__name__)


@dataclass
class TrainingData:
    """
    The data of a run.

    Args:
        core (`CaptionedImages` or `StreamedImages`): The images that the core trains on.
        high_res (`CaptionedImages` or `StreamedImages`): The images to train on above the core's resolution.
        validation (`CaptionedImages`): The held-out images.
    """

    core: CaptionedImages | StreamedImages
    high_res: CaptionedImages | StreamedImages
    validation: CaptionedImages

    @property
    def streams(self) -> bool:
        """Whether the images to train on are streamed."""
        return isinstance(self.core, StreamedImages)

    @property
    def measured(self) -> CaptionedImages:
        """The images whose detail is measured when a stage is grown; for a stream, these are the held-out images."""
        return self.high_res if isinstance(self.high_res, CaptionedImages) else self.validation

    @cached_property
    def fingerprint(self) -> str | None:
        """A digest of all captions, or `None` if they are streamed."""
        return None if self.streams else take_fingerprint(self.core, self.high_res, self.validation)

    def at(self, stage: int, resolution: int) -> CaptionedImages | StreamedImages:
        """Return the images that growth stage `stage` trains on (the core is 0), averaged down to `resolution`."""
        return (self.core if stage == 0 else self.high_res).at(resolution)

    def describe(self) -> str:
        """Return a line on how many images there are."""
        if isinstance(self.core, StreamedImages) or isinstance(self.high_res, StreamedImages):
            return f"Images are streamed; {len(self.validation)} held out."
        return (
            f"Images to train on: {len(self.core)} at the core's resolution, {len(self.high_res)} above it; {len(self.validation)} "
            "held out."
        )


def load_training_data(
    data_args: DataArguments,
    resolutions: list[int],
    train_data_dir: str | None,
    broken: BrokenRows,
    seed: int,
    random_crop: float = 1.0,
) -> TrainingData:
    """
    Load the data that the arguments name.

    Args:
        data_args ([`DataArguments`]): The sources and how to read them.
        resolutions (`list[int]`): The resolutions of the run.
        train_data_dir (`str`, *optional*): The folder with the core's data: `data_args.train_data_dir`, or captioned shapes.
        broken ([`BrokenRows`]): The counter of broken rows.
        seed (`int`): The seed by which `num_high_res_images` are chosen.
        random_crop (`float`, defaults to 1.0): See [`Augmentation`].

    Raises:
        `ValueError`: if there is no such data, or if it cannot be used.
    """
    final_resolution = resolutions[-1]
    augmentation = Augmentation(data_args.horizontal_flip, random_crop)
    num_held_out = max(8, data_args.num_validation_images, data_args.num_scored_images * data_args.on_shapes)
    if data_args.high_res_data_dir is not None:
        check_data_dir(data_args.high_res_data_dir, "high_res_data_dir")

    def load(dataset_name: str | None, data_dir: str | None, resolution: int, num_held_out: int):
        factor = final_resolution // resolution
        return load_images(data_args, dataset_name, data_dir, resolution, factor, num_held_out, broken, augmentation)

    if data_args.has_high_res_data:
        core, _ = load(data_args.dataset_name, train_data_dir, resolutions[0], 0)
        high_res, held_out = load(
            data_args.high_res_dataset_name, data_args.high_res_data_dir, final_resolution, num_held_out
        )
    else:
        core, held_out = load(data_args.dataset_name, train_data_dir, final_resolution, num_held_out)
        high_res = core
        if data_args.num_high_res_images is not None:
            chosen = np.random.default_rng(seed).permutation(len(core))
            high_res = core.select(chosen[: data_args.num_high_res_images])
    validation = CaptionedImages(
        held_out, final_resolution, broken=broken, max_image_pixels=data_args.max_image_pixels
    )
    data = TrainingData(core, high_res, validation)
    if data_args.has_high_res_data and not data_args.streaming:
        known = set(data.validation.all_captions).intersection(core.all_captions)
        if known:
            logger.warning(
                f"The captions of {len(known)} held-out images are in the core's data, too: if the images are as well, held-out "
                "losses will be too good."
            )
    return data


def load_images(
    data_args: DataArguments,
    dataset_name: str | None,
    data_dir: str | None,
    resolution: int,
    factor: int,
    num_held_out: int,
    broken: BrokenRows,
    augmentation: Augmentation,
) -> tuple[CaptionedImages | StreamedImages, Dataset]:
    """
    Load the images of one source, streamed or not.

    Args:
        data_args ([`DataArguments`]): How to read the source.
        dataset_name (`str`, *optional*), data_dir (`str`, *optional*): The source, of which one is named.
        resolution (`int`): The height and width of square images.
        factor (`int`): How many times smaller the images are than `aspect_ratio_buckets` says.
        num_held_out (`int`): How many rows of a stream to hold out; with 0, none of any source.
        broken ([`BrokenRows`]): The counter of broken rows.
        augmentation ([`Augmentation`]): How visits of an image differ.

    Returns:
        The images to train on, and the rows that are held out.
    """
    buckets = None
    if data_args.aspect_ratio_buckets is not None:
        buckets = [
            (height // factor, width // factor) for height, width in parse_buckets(data_args.aspect_ratio_buckets)
        ]
    columns = data_args.image_column, data_args.caption_column
    selection = Selection.from_arguments(data_args)
    if dataset_name is None or dataset_name != data_args.dataset_name:  # they name a part of that dataset only
        selection = replace(selection, config_name=None, revision=None)
    if num_held_out == 0:
        selection = replace(selection, validation_split=None)
    if data_args.streaming:
        stream, held_out, first = load_captioned_stream(
            dataset_name, data_dir, *columns, num_held_out, broken, data_args.max_image_pixels, selection
        )
        streamed = StreamedImages(
            stream,
            first,
            resolution,
            buckets,
            broken,
            data_args.shuffle_buffer_size,
            data_args.max_image_pixels,
            augmentation,
        )
        if first > (0, 0):  # later rows may share the images of the rows that are held out
            streamed.held_out = frozenset(find_key(image) for image in held_out["image"])
        return streamed, held_out
    rows, held_out = load_captioned_data(
        dataset_name, data_dir, *columns, hold_out=num_held_out > 0, selection=selection
    )
    images = CaptionedImages(
        rows,
        resolution,
        buckets,
        broken,
        max_image_pixels=data_args.max_image_pixels,
        augmentation=augmentation,
    )
    return images, held_out


def take_fingerprint(*sets: CaptionedImages | StreamedImages) -> str:
    """Return a digest of the captions of several sets, in order: it tells whether a run resumes with the same data."""
    digest = hashlib.sha256()
    for images in sets:
        for caption in images.captions if isinstance(images, StreamedImages) else images.all_captions:
            digest.update(f"{caption}\0".encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def make_loader(
    images: "CaptionedImages | StreamedImages | CorePredictions",
    accelerator: Accelerator,
    batch_size: int,
    steps_done: int,
    num_steps: int,
    seed: tuple[int, ...],
    gradient_accumulation_steps: int,
    num_workers: int,
    state: dict | None = None,
) -> DataLoader | StreamLoader:
    """
    Return this process's batches for the steps of a phase that are left, in an order that depends on the seed alone.

    Args:
        images (`CaptionedImages`, `StreamedImages` or `CorePredictions`): The data, at the resolution of the phase.
        accelerator (`Accelerator`): The run's processes.
        batch_size (`int`): The number of images per batch and process.
        steps_done (`int`), num_steps (`int`): How many steps are done, and how many the phase has in all.
        seed (`tuple[int, ...]`): The seed of the order, such as (seed, phase).
        gradient_accumulation_steps (`int`): The number of batches per process and step.
        num_workers (`int`): The number of processes that read, per training process.
        state (`dict`, *optional*): The state of the [`StreamLoader`] after the last step that was done.
    """
    steps_left, batches_per_step = num_steps - steps_done, accelerator.num_processes * gradient_accumulation_steps
    options = {"num_workers": num_workers, "pin_memory": accelerator.device.type == "cuda"}
    if isinstance(images, StreamedImages):
        return StreamLoader(
            images,
            batch_size,
            start=steps_done * batches_per_step,
            num_batches=steps_left * gradient_accumulation_steps,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            seed=seed,
            state=state,
            **options,
        )
    options["worker_init_fn"] = leave_signals_to_the_parent
    order = order_visits(images, batch_size, batches_per_step, steps_done, num_steps, seed)
    if images.varies:
        order = VisitOrder(order, steps_done * batches_per_step * batch_size, seed)
    if len(images.buckets) > 1:
        loader = DataLoader(images, batch_sampler=order, **options)
    else:
        loader = DataLoader(images, batch_size=batch_size, sampler=order, **options)
    return accelerator.prepare(loader)


def order_visits(
    images: "CaptionedImages | CorePredictions",
    batch_size: int,
    batches_per_step: int,
    steps_done: int,
    num_steps: int,
    seed: tuple[int, ...],
) -> Sampler:
    """
    Return the order in which the steps of a phase show images: batches of indices if the images have several shapes, and single
    indices otherwise. `batches_per_step` are those of all processes; the other arguments are those of [`make_loader`].
    """
    steps_left, images_per_step = num_steps - steps_done, batch_size * batches_per_step
    if len(images.buckets) > 1:
        return BucketOrder(images.shapes, batch_size, batches_per_step, steps_done, steps_left, seed)
    return EpochOrder(len(images), steps_done * images_per_step, steps_left * images_per_step, seed)
