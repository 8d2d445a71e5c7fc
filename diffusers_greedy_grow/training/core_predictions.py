# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
The predictions of a frozen core, computed once for several draws per training image and cached on disk, so that the steps of a
detail phase need not run the core. A draw is the noise, the noise level, the caption and how the image is shown.
"""

import contextlib
import hashlib
import itertools
import json
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..flow import add_noise, sample_sigma
from ..models import GrowableUNet2DConditionModel, ShallowUNet2DModel
from ..pipelines import GreedyGrowPipeline
from .arguments import DataArguments, ModelArguments, TrainingArguments
from .data.captioned import CaptionedImages
from .data.images import normalize
from .data.loading import order_visits
from .files import write_text
from .objective import FlowObjective
from .run_folder import lock_file
from .seeds import sample_seeds
from .signals import Interrupt, leave_signals_to_the_parent
from .text.embeddings import add_weights, name_encoder


logger = get_logger(__name__)

# Takes the place of the step in the keys of random numbers, which are longer than those of steps.
DRAWS = 1002
# What each prediction starts with: a digest of the pixels that it is for. 0 where it has not been written yet.
DIGEST_BYTES = 8
# float16 is precise to 0.0005 for a clean image, but may be too narrow for features.
IMAGE_DTYPE, FEATURES_DTYPE = torch.float16, torch.bfloat16


# ----------------------------------------------------------------------------------------------------------------------
# Draws


@dataclass(frozen=True)
class Draws:
    """
    Draws everything that is random in the visits of training images. A draw depends on the seed, the phase, the image and the
    draw's number alone, so that its noise need not be stored.

    Args:
        seed (`int`), phase (`int`): The run's seed, and the index of the phase.
        count (`int`): The number of draws per image.
        shift (`float`), logit_mean (`float`), logit_std (`float`): The distribution of noise levels, see [`sample_sigma`].
        caption_dropout (`float`): The share of captions to leave empty.
        device (`str`): The kind of device on which noise is drawn, since others draw other noise.
    """

    seed: int
    phase: int
    count: int
    shift: float
    logit_mean: float
    logit_std: float
    caption_dropout: float
    device: str

    def key(self, index: int, number: int) -> tuple[int, ...]:
        """Return the key of draw `number` of the image `index`, which also decides its caption, mirror image and crop."""
        return (self.seed, self.phase, DRAWS, index, number)

    def __call__(
        self, indices: list[int], numbers: list[int], shape: torch.Size, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
        """
        Return noise of `shape`, `(B, C, H, W)`, and noise levels `(B,)`, both on `device`; and per image whether to drop its
        caption. `indices` and `numbers` are those of the images and of their draws.
        """
        noise, generator = torch.empty(shape, device=device), torch.Generator(device)
        sigmas, dropped = [], []
        for image, index, number in zip(noise, indices, numbers, strict=True):
            noise_seed, level_seed = sample_seeds(self.key(index, number), 0, 2)
            image.normal_(generator=generator.manual_seed(noise_seed))
            levels = torch.Generator().manual_seed(level_seed)
            sigmas.append(sample_sigma(1, self.shift, self.logit_mean, self.logit_std, levels))
            dropped.append(torch.rand(1, generator=levels).item() < self.caption_dropout)
        return noise, torch.cat(sigmas).to(device, non_blocking=True), dropped


class DrawnImages(torch.utils.data.Dataset):
    """Training images as a draw shows them: the rows of [`CaptionedImages`] for pairs (image, draw), with the pair as `visit`."""

    def __init__(self, images: CaptionedImages, draws: Draws):
        self.images, self.draws = images, draws

    def __getitem__(self, pair: tuple[int, int]) -> dict:
        index, number = pair
        return {**self.images[index, self.draws.key(index, number)], "visit": f"{index} {number}"}


def read_visits(batch: dict) -> list[tuple[int, int]]:
    """Return the pairs (image, draw) of a batch. They are text in it: loaders move numbers to the GPU, and to read them there waits."""
    return [(int(index), int(number)) for index, number in (visit.split() for visit in batch["visit"])]


def find_read_draws(images: CaptionedImages, draws: Draws, num_steps: int, images_per_step: int) -> np.ndarray:
    """
    Return which draws of which images the steps of a phase read, `(images, draws)`, bool: at most as many draws as epochs. With
    fewer draws than epochs, these are all, but for some of an image whose shape is rare, which an epoch may leave to the next one.

    Args:
        images ([`CaptionedImages`]), draws ([`Draws`]): As for [`CorePredictions`], whose visits are in the order of `draws.seed`
            and `draws.phase`.
        num_steps (`int`), images_per_step (`int`): The steps of the phase, and the images of each, over all processes.
    """
    order = order_visits(images, images_per_step, 1, 0, num_steps, (draws.seed, draws.phase))
    visits = itertools.chain.from_iterable(order) if len(images.buckets) > 1 else iter(order)
    num_epochs = math.ceil(num_steps * images_per_step / len(images))
    read = np.zeros((len(images), min(draws.count, num_epochs)), dtype=bool)
    for epoch in itertools.count():
        indices = np.fromiter(itertools.islice(visits, len(images)), np.int64)
        read[indices, epoch % draws.count] = True
        if len(indices) < len(images) or read.all():
            break
    return read


# ----------------------------------------------------------------------------------------------------------------------
# The file


@dataclass(frozen=True)
class Layout:
    """
    Where the predictions lie in their file: image after image, and for each image draw after draw, of those that are read.

    Args:
        sizes (`list[tuple[int, ...]]`): The height and width of the core's state, for each shape of training images.
        channels (`int`), patch_size (`int`), hidden_size (`int`): The channels of images, and the features of the core.
        read (`np.ndarray` of shape `(images, draws)`): Which draws of each image have a prediction.
        shapes (`np.ndarray` of shape `(images,)`): Which of the `sizes` each image has.
    """

    sizes: list[tuple[int, ...]]
    channels: int
    patch_size: int
    hidden_size: int
    read: np.ndarray
    shapes: np.ndarray

    @classmethod
    def of(cls, unet: GrowableUNet2DConditionModel, images: CaptionedImages, read: np.ndarray) -> "Layout":
        """Return the layout for `images` and the core of `unet`."""
        config, core_size = unet.config, unet.sample_sizes[0]
        sizes = [tuple(side * core_size // images.resolution for side in bucket) for bucket in images.buckets]
        return cls(sizes, config.out_channels, config.patch_size, config.hidden_size, read, images.shapes)

    def image_shape(self, kind: int) -> tuple[int, ...]:
        return self.channels, *self.sizes[kind]

    def features_shape(self, kind: int) -> tuple[int, ...]:
        height, width = self.sizes[kind]
        return self.hidden_size, height // self.patch_size, width // self.patch_size

    @cached_property
    def record_bytes(self) -> np.ndarray:
        """The bytes of a prediction, for each of the `sizes`: a multiple of 8."""
        numbers = [
            math.prod(self.image_shape(kind)) + math.prod(self.features_shape(kind)) for kind in range(len(self.sizes))
        ]
        return np.array([DIGEST_BYTES + -(-2 * count // 8) * 8 for count in numbers])

    @cached_property
    def ends(self) -> np.ndarray:
        """Where each prediction ends, `(images, draws)`."""
        return np.cumsum(self.read * self.record_bytes[self.shapes][:, None]).reshape(self.read.shape)

    @property
    def total_bytes(self) -> int:
        return int(self.ends[-1, -1])

    def start(self, index: int, number: int) -> int:
        """Return where the prediction for draw `number` of the image `index` begins."""
        return int(self.ends[index, number] - self.record_bytes[self.shapes[index]])


class CorePredictions(torch.utils.data.Dataset):
    """
    The cached predictions of a core, as a dataset: the rows of [`DrawnImages`] with `core_image` and `core_features`. A visit of
    an image gets one of its draws, another one in each epoch.

    Args:
        folder (`Path`): The folder for all predictions, of which each part has a folder that is named by its `key`.
        key (`dict`): Everything that decides the predictions, as JSON can hold it.
        images ([`CaptionedImages`]): The training images, at the resolution of the phase.
        draws ([`Draws`]): What is random.
        layout ([`Layout`]): Where each prediction lies.
    """

    varies = True  # so a loader tells it each visit's place in the phase

    def __init__(self, folder: Path, key: dict[str, Any], images: CaptionedImages, draws: Draws, layout: Layout):
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self.key, self.folder = key, folder / digest
        self.rows, self.draws, self.layout = DrawnImages(images, draws), draws, layout
        self.buckets, self.shapes = images.buckets, images.shapes

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def path(self) -> Path:
        return self.folder / "predictions.bin"

    @property
    def unfinished_path(self) -> Path:
        return self.folder / "predictions.bin.tmp"

    def __getitem__(self, visited: tuple[int, tuple[int, ...]]) -> dict:
        """
        Return the row for a visit.

        Raises:
            `ValueError`: if the image is another one than the prediction is for.
        """
        index, (*_, place) = visited
        number = place // len(self) % self.draws.count
        row = self.rows[index, number]
        # Mapped for each visit, not once: a worker process would otherwise get a copy of all predictions.
        kind, start = int(self.shapes[index]), self.layout.start(index, number)
        record = np.array(np.memmap(self.path, np.uint8, "r", start, (int(self.layout.record_bytes[kind]),)))
        if record[:DIGEST_BYTES].tobytes() != take_digest(row):
            raise ValueError(
                f"{self.folder} has predictions for another image number {index}: the images have changed, although their captions "
                "have not. Remove that folder, and the predictions are computed again."
            )
        image_shape, features_shape = self.layout.image_shape(kind), self.layout.features_shape(kind)
        end_of_image = DIGEST_BYTES + 2 * math.prod(image_shape)
        end = end_of_image + 2 * math.prod(features_shape)
        image, features = (
            torch.from_numpy(record[a:b]) for a, b in ((DIGEST_BYTES, end_of_image), (end_of_image, end))
        )
        row["core_image"] = image.view(IMAGE_DTYPE).reshape(image_shape)
        row["core_features"] = features.view(FEATURES_DTYPE).reshape(features_shape)
        return row

    def check_size(self) -> None:
        """Raise an `OSError` if the finished file has lost a part."""
        if (size := self.path.stat().st_size) != self.layout.total_bytes:
            raise OSError(
                f"{self.path} has {size} bytes instead of {self.layout.total_bytes}: it is damaged. Remove {self.folder}, and the "
                "predictions are computed again."
            )

    # ------------------------------------------------------------------------------------------------------------------
    # Writing

    def prepare(self) -> None:
        """
        Make the file, all of zeros, unless an earlier run has begun it.

        Raises:
            `OSError`: if the disk has too little space.
        """
        check_space(self.folder, self.layout.total_bytes, count_bytes(self.folder))
        with self.naming_the_folder():
            write_text(self.folder / "about.json", json.dumps(self.key, indent=1))
            with open(self.unfinished_path, "ab") as file:
                file.truncate(self.layout.total_bytes)

    def find_missing(self) -> list[tuple[int, int]]:
        """Return the pairs (image, draw) that are read and have no prediction yet."""

        def is_missing(index: int, number: int) -> bool:
            file.seek(self.layout.start(index, number))
            return not any(file.read(DIGEST_BYTES))

        # Not mapped to memory: in a file system such as tmpfs, that would fill the parts of the file that are not written yet.
        with open(self.unfinished_path, "rb", buffering=0) as file:
            return [
                (index, number)
                for index, number in np.argwhere(self.layout.read).tolist()
                if is_missing(index, number)
            ]

    def write(self, batch: dict, image: torch.Tensor, features: torch.Tensor) -> None:
        """
        Write the predictions for a batch of [`DrawnImages`].

        Args:
            batch (`dict`): The batch.
            image (`torch.Tensor` of shape `(B, C, h, w)`), features (`torch.Tensor` of shape `(B, hidden_size, h, w)`):
                The core's output.

        Raises:
            `FloatingPointError`: if a prediction is not finite.
            `OSError`: if the disk is full.
        """
        limit = torch.finfo(IMAGE_DTYPE).max
        if not (image.isfinite().all() and features.isfinite().all()):
            raise FloatingPointError(
                f"The core's predictions are not finite for the images {[index for index, _ in read_visits(batch)]}: try `mixed_precision` bf16 or no."
            )
        image, features = image.clamp(-limit, limit).to(IMAGE_DTYPE).cpu(), features.to(FEATURES_DTYPE).cpu()
        with self.naming_the_folder(), open(self.unfinished_path, "r+b") as file:
            for i, (index, number) in enumerate(read_visits(batch)):
                start = self.layout.start(index, number)
                file.seek(start + DIGEST_BYTES)
                for values in (image[i], features[i]):
                    file.write(values.contiguous().view(torch.uint8).numpy().tobytes())
                file.flush()
                # Last, so that a prediction whose writing is cut off counts as missing
                file.seek(start)
                file.write(take_digest({"pixel_values": batch["pixel_values"][i]}))

    @contextlib.contextmanager
    def naming_the_folder(self) -> Iterator[None]:
        """Let an `OSError`, such as that of a full disk, name the folder and the size of the whole."""
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}: the core's predictions, {self.layout.total_bytes / 1e9:.3f} GB in all, cannot be written to "
                f"{self.folder}. `core_predictions_dir` names another disk",
            ) from error


def take_digest(row: dict) -> bytes:
    """Return a digest of the pixels of a row, of `DIGEST_BYTES` that are not all 0."""
    pixels = row["pixel_values"].cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(pixels, digest_size=DIGEST_BYTES - 1).digest() + b"\1"


def count_bytes(folder: Path) -> int:
    """Return the bytes on disk of the predictions in a folder: unwritten parts of a file take no space, so its size does not tell."""
    return sum(getattr(path.stat(), "st_blocks", 0) * 512 for path in folder.glob("predictions.bin*"))  # 0 on Windows


def check_space(folder: Path, needed: int, used: int) -> None:
    """Raise an `OSError` if `needed` bytes do not fit on the disk of `folder`, where `used` bytes of them are already."""
    parent = folder
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if needed - used > free:
        raise OSError(
            f"The core's predictions need {needed / 1e9:.1f} GB in {folder}, of which {used / 1e9:.1f} GB are there already, but "
            f"only {free / 1e9:.1f} GB are free: name another disk by `core_predictions_dir`, or lower `cache_core_predictions`."
        )


# ----------------------------------------------------------------------------------------------------------------------
# Before a run


def check_caching(
    args: TrainingArguments, data_args: DataArguments, model_args: ModelArguments, accelerator: Accelerator
) -> None:
    """Raise a `ValueError` if `cache_core_predictions` cannot hold in this run."""
    if not args.cache_core_predictions:
        return
    assert args.joint_steps is not None
    option = f"`cache_core_predictions={args.cache_core_predictions}`"
    if any(args.joint_steps):
        raise ValueError(
            f"{option} needs a core that stays as it is, but `joint_steps={args.joint_steps}` trains it: pass `joint_steps` 0, or "
            "train a joint phase in another run."
        )
    if model_args.init != "preserve":
        raise ValueError(f'{option} needs a core that predicts images: pass `init="preserve"`.')
    if data_args.streaming:
        raise ValueError(f"{option} needs images that are visited again, and those of `streaming` are not numbered.")
    if accelerator.is_fsdp2:
        raise ValueError(f"{option} runs the core alone, which FSDP2 has sharded: use one GPU or DDP.")


def count_prediction_bytes(unet: GrowableUNet2DConditionModel) -> int:
    """Return the bytes that a prediction for a square image takes on disk."""
    size, config = unet.sample_sizes[0], unet.config
    read, shapes = np.ones((1, 1), dtype=bool), np.zeros(1, dtype=np.int64)
    return Layout([(size, size)], config.out_channels, config.patch_size, config.hidden_size, read, shapes).total_bytes


def count_cached_bytes(
    folder: Path, core: str, fingerprint: str | None, num_images: int, resolution: int, seed: int, num_draws: int
) -> int:
    """
    Return the bytes on disk of the predictions in a folder that a phase of a run would use, as far as that is known before the phase.

    Args:
        folder (`Path`): The folder for all predictions, those of other runs among them.
        core (`str`): The core, from [`name_core`].
        fingerprint (`str`, *optional*), num_images (`int`): A digest of the captions, and the number of training images.
        resolution (`int`): The resolution of the phase.
        seed (`int`), num_draws (`int`): The run's seed, and the number of draws per image.
    """
    known = {"core": core, "captions": fingerprint, "images": num_images, "resolution": resolution}
    known_draws, used = {"seed": seed, "count": num_draws}, 0
    for about in folder.glob("*/about.json"):
        key = json.loads(about.read_text(encoding="utf-8"))
        if known.items() <= key.items() and known_draws.items() <= key["draws"].items():
            used += count_bytes(about.parent)
    return used


def find_predictions_folder(args: TrainingArguments) -> Path:
    """Return the folder for the core's predictions."""
    return Path(args.core_predictions_dir or Path(args.output_dir) / "core_predictions")


# ----------------------------------------------------------------------------------------------------------------------
# In a phase


class CachedObjective(FlowObjective):
    """
    The loss of a phase's batches of [`CorePredictions`], see [`FlowObjective`]: the same, but the noise, noise levels and dropped
    captions are those of the draws, and the core does not run.

    Args:
        arguments: Those of [`FlowObjective`].
        num_draws (`int`): The number of draws per image.
    """

    def __init__(self, *arguments: Any, num_draws: int):
        super().__init__(*arguments)
        phase = self.phase
        self.draws = Draws(
            self.seed,
            phase.index,
            num_draws,
            self.shift,
            phase.logit_mean,
            phase.logit_std,
            self.caption_dropout,
            self.accelerator.device.type,
        )

    def draw(self, batch, shape, step, place):
        indices, numbers = zip(*read_visits(batch))
        return self.draws([*indices], [*numbers], shape, self.accelerator.device)

    def condition(self, batch, dropped):
        device = self.accelerator.device
        core_output = tuple(
            batch[name].to(device, non_blocking=True).float() for name in ("core_image", "core_features")
        )
        return {**super().condition(batch, dropped), "core_output": core_output}


def cache_core_predictions(
    pipeline: GreedyGrowPipeline,
    images: CaptionedImages,
    objective: CachedObjective,
    images_per_step: int,
    folder: Path,
    fingerprint: str | None,
    num_workers: int,
    interrupt: Interrupt,
) -> CorePredictions:
    """
    Return the core's predictions that the steps of a phase read, after computing those that are not in `folder` yet: each process
    computes its share. A signal stops the run; the next one continues.

    Args:
        pipeline ([`GreedyGrowPipeline`]): The pipeline with the model, which is frozen and on the device that computes.
        images ([`CaptionedImages`]): The training images, at the resolution of the phase.
        objective ([`CachedObjective`]): The loss of the phase, which has the draws.
        images_per_step (`int`): The number of images per step, over all processes.
        folder (`Path`): Where the predictions are cached.
        fingerprint (`str`, *optional*): A digest of the captions.
        num_workers (`int`): The number of processes that read images.
        interrupt (`Interrupt`): Catches the signals that stop the run.

    Raises:
        `OSError`: if the disk has too little space, or the predictions there are damaged.
        `ValueError`: if another run is computing the same predictions there.
    """
    accelerator, phase, unet = objective.accelerator, objective.phase, pipeline.unet
    draws = objective.draws
    read = find_read_draws(images, draws, phase.steps, images_per_step)
    key = make_key(pipeline, images, draws, phase.resolution, fingerprint, accelerator.mixed_precision, read)
    predictions = CorePredictions(folder, key, images, draws, Layout.of(unet, images, read))
    with contextlib.ExitStack() as held:
        is_there = predictions.path.exists()
        if accelerator.is_main_process and not is_there:
            predictions.folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock_file(predictions.folder / ".lock", f"{predictions.folder}"))
            is_there = predictions.path.exists()  # another run may have finished it just now
            if not is_there:
                predictions.prepare()
        # As the main process sees it: a run that finishes the file meanwhile would lead the processes into different branches.
        (is_there,) = broadcast_object_list([is_there])
        if not is_there:
            compute_missing(predictions, unet, objective, num_workers, interrupt)
            if accelerator.is_main_process:
                predictions.unfinished_path.replace(predictions.path)
    accelerator.wait_for_everyone()
    predictions.check_size()
    logger.info(f"{phase.name}: the core's predictions are in {predictions.folder}.")
    return predictions


def compute_missing(
    predictions: CorePredictions,
    unet: GrowableUNet2DConditionModel,
    objective: CachedObjective,
    num_workers: int,
    interrupt: Interrupt,
) -> None:
    """
    Compute this process's share of the predictions that are not there yet, and wait for the other processes. The arguments are
    those of [`cache_core_predictions`].
    """
    accelerator, phase = objective.accelerator, objective.phase
    missing = predictions.find_missing()[accelerator.process_index :: accelerator.num_processes]
    accelerator.wait_for_everyone()  # before any of them is written
    logger.info(f"{phase.name}: {len(missing)} predictions of the core are computed for {predictions.folder}.")
    bar = tqdm(total=len(missing), desc=f"{phase.name}, core", disable=not accelerator.is_main_process)
    for batch in load_pairs(predictions, missing, phase.batch_size, num_workers):
        predictions.write(batch, *predict(unet, objective, batch))
        bar.update(len(batch["visit"]))
        if interrupt.signal is not None:
            break
    bar.close()
    # Only now, all together: a process that ends while others wait for it would end them with an error.
    if any(gather_object([interrupt.signal is not None])):
        logger.info(
            f"The core's predictions so far are in {predictions.folder}. Continue with the same arguments and "
            "`--resume_from_checkpoint latest`."
        )
        sys.exit(interrupt.exit_code)


@torch.no_grad()
def predict(
    unet: GrowableUNet2DConditionModel, objective: CachedObjective, batch: dict
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the core's output for a batch of [`DrawnImages`]."""
    accelerator = objective.accelerator
    x0 = normalize(batch["pixel_values"].to(accelerator.device))
    noise, sigma, dropped = objective.draw(batch, x0.shape, 0, 0)
    with accelerator.autocast():
        conditions = FlowObjective.condition(objective, batch, dropped)
        return unet.predict_core(add_noise(x0, noise, sigma), 1000 * sigma, **conditions)


def load_pairs(
    predictions: CorePredictions, pairs: list[tuple[int, int]], batch_size: int, num_workers: int
) -> Iterator[dict]:
    """Return batches of [`DrawnImages`] for `pairs` (image, draw), each of one shape."""
    by_shape = [
        [pair for pair in pairs if predictions.shapes[pair[0]] == kind] for kind in range(len(predictions.buckets))
    ]
    batches = [alike[i : i + batch_size] for alike in by_shape for i in range(0, len(alike), batch_size)]
    return iter(
        DataLoader(
            predictions.rows,
            batch_sampler=batches,
            num_workers=num_workers,
            worker_init_fn=leave_signals_to_the_parent,
        )
    )


def name_core(unet: GrowableUNet2DConditionModel | ShallowUNet2DModel) -> str:
    """Return a name that is the same only for the same core, of a grown model or alone."""
    core: Any = getattr(unet, "core", unet)
    digest = hashlib.sha256(
        json.dumps([type(core).__name__, core.growth_config], sort_keys=True, default=str).encode()
    )
    add_weights(digest, core)
    return digest.hexdigest()[:16]


def make_key(
    pipeline: GreedyGrowPipeline,
    images: CaptionedImages,
    draws: Draws,
    resolution: int,
    fingerprint: str | None,
    precision: str,
    read: np.ndarray,
) -> dict[str, Any]:
    """Return everything that decides the core's predictions, as JSON can hold it."""
    return {
        "core": name_core(pipeline.unet),
        "text encoder": name_encoder(pipeline, precision),
        "captions": fingerprint,
        "images": len(images),
        "resolution": resolution,
        "shapes": [[*images.buckets], hashlib.sha256(images.shapes.tobytes()).hexdigest()[:16]],
        "resolution of images": images.resolution,
        "augmentation": asdict(images.augmentation),
        "draws": asdict(draws),
        "read": hashlib.sha256(np.packbits(read).tobytes()).hexdigest()[:16],
    }
