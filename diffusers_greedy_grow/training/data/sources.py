# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
Sources of captioned images: a dataset on the Hub, a folder, a file, or, by default, captioned shapes that are drawn when a run
starts.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

from accelerate.logging import get_logger
from datasets import Dataset, Features, Image, IterableDataset, LargeList, List, load_dataset
from datasets.exceptions import DatasetGenerationError

from ..arguments import DataArguments, ImageArguments
from ..shapes.scenes import write_shapes
from .local import LAYOUTS, SPLITS, read_local
from .metadata import UnreadableData, check_column
from .sharing import merge_rows


logger = get_logger(__name__)


FILE_TYPES = (".parquet", ".tar")


@dataclass(frozen=True)
class Selection:
    """
    The part of a source to read.

    Args:
        config_name (`str`, *optional*), revision (`str`, *optional*):
            The configuration of a dataset on the Hub, and its branch, tag or commit.
        train_split (`str`, *optional*), validation_split (`str`, *optional*):
            The names of the splits to train on and to hold out. By default, `train`, and `validation` or `test` if there is
            one.
    """

    config_name: str | None = None
    revision: str | None = None
    train_split: str | None = None
    validation_split: str | None = None

    @classmethod
    def from_arguments(cls, args: ImageArguments) -> "Selection":
        """Return the selection that the arguments of a script describe."""
        return cls(args.dataset_config_name, args.dataset_revision, args.train_split, args.validation_split)


EVERYTHING = Selection()


def check_data_dir(data_dir: str, argument: str = "train_data_dir") -> None:
    """
    Check the value of an `argument`.

    Raises:
        `ValueError`: if `data_dir` is neither a folder nor a file that can be read.
    """
    path = Path(data_dir)
    if not path.exists():
        raise ValueError(f"`{argument}={data_dir!r}` does not exist.")
    if path.is_file() and path.suffix.lower() not in FILE_TYPES:
        raise ValueError(
            f"`{argument}={data_dir!r}` cannot be read: pass a file that ends in {' or '.join(FILE_TYPES)}, or a folder. {LAYOUTS}"
        )


def load_splits(
    dataset_name: str | None,
    data_dir: str | None,
    image_column: str,
    caption_column: str,
    streaming: bool = False,
    selection: Selection = EVERYTHING,
) -> dict[str, Dataset] | dict[str, IterableDataset]:
    """
    Load the splits of a source, each with the columns `image` and `text`. Images stay undecoded, as `bytes` or `path`, so
    that a broken image does not stop the reading of its row.

    Args:
        dataset_name (`str`, *optional*):
            A dataset on the Hub.
        data_dir (`str`, *optional*):
            Instead of a dataset on the Hub, a folder with images, and a text file per image or a `metadata.jsonl` or
            `metadata.csv`; a folder with parquet or WebDataset tar files, or one such file; or a folder that `save_to_disk` has
            written. A folder or file at its top that is named train, validation, val or test is a split.
        image_column (`str`), caption_column (`str`):
            The columns to read. The columns of a WebDataset are file extensions, such as `jpg` and `txt`. A caption is a string
            or a list of strings.
        streaming (`bool`, defaults to `False`):
            Whether to read rows when they are needed, instead of having all of them on disk and in order.
        selection ([`Selection`]):
            The part of the source to read.

    Raises:
        `ValueError`: if there is not exactly one source that can be read, or a split or column is missing or of the wrong type.
    """
    if (dataset_name is None) == (data_dir is None):
        raise ValueError("Pass either `dataset_name` or `train_data_dir`.")
    if dataset_name is not None and Path(dataset_name).is_dir():  # `datasets` would read it by rules of its own
        dataset_name, data_dir = None, dataset_name
    try:
        if dataset_name is not None:
            splits = load_from_hub(dataset_name, streaming, selection)
        else:
            assert data_dir is not None
            check_data_dir(data_dir)
            named = tuple(name for name in (selection.train_split, selection.validation_split) if name is not None)
            splits = read_local(data_dir, image_column, caption_column, streaming, named)
    except UnreadableData as error:
        raise ValueError(f"{data_dir!r} {error}") from error
    except DatasetGenerationError as error:
        raise ValueError(f"{dataset_name or data_dir!r}: {error.__cause__ or error}") from error
    chosen = choose_splits(splits, selection)
    return {name: select_columns(split, name, image_column, caption_column) for name, split in chosen.items()}


def load_from_hub(dataset_name: str, streaming: bool, selection: Selection) -> dict:
    """
    Load all splits of a dataset on the Hub.

    Raises:
        `ValueError`: if the dataset has several configurations and none is named.
    """
    try:
        return load_dataset(dataset_name, name=selection.config_name, revision=selection.revision, streaming=streaming)
    except ValueError as error:
        if "Config name is missing" in str(error):
            raise ValueError(
                f"{dataset_name} has several configurations: pass `dataset_config_name`. {error}"
            ) from error
        raise


def choose_splits(splits: dict, selection: Selection) -> dict:
    """
    Return the split to train on as `train`, and the one to hold out, if there is one, as `validation` or `test`.

    Raises:
        `ValueError`: if a split is missing.
    """

    def find(argument: str) -> str | None:
        given = getattr(selection, argument)
        name = given if given in splits else SPLITS.get(given, given)  # a folder `val` has been read as `validation`
        if name is not None and name not in splits:
            raise ValueError(f"`{argument}={given!r}` is not in the data, whose splits are {list(splits)}.")
        return name

    train = find("train_split") or "train"
    validation = find("validation_split")
    if train not in splits:
        raise ValueError(
            f"The data has no train split, only {list(splits)}: name one of its files or folders train, or pass `train_split`."
        )
    if validation is not None:
        held_out = {"validation": validation}
    else:
        held_out = {SPLITS[name]: name for name in ("val", "validation", "test") if name in splits and name != train}
    if train in held_out.values():
        raise ValueError(f"`train_split` and `validation_split` are both {train!r}: hold out another split, or none.")
    return {"train": splits[train], **{name: splits[other] for name, other in held_out.items()}}


def select_columns(split, name: str, image_column: str, caption_column: str):
    """
    Return a split with the columns `image`, undecoded, and `text`.

    Raises:
        `ValueError`: if a column is missing or of the wrong type.
    """
    check_column("image_column", image_column, split.column_names, name)
    check_column("caption_column", caption_column, split.column_names, name)
    if not holds_images(split.features[image_column]):
        raise ValueError(
            f"`image_column={image_column!r}` holds {split.features[image_column]}, not images; cast it to "
            "`datasets.Image` or name another column."
        )
    caption = split.features[caption_column]
    if isinstance(caption, List | LargeList):
        caption = caption.feature
    if getattr(caption, "dtype", None) not in ("string", "large_string"):
        raise ValueError(
            f"`caption_column={caption_column!r}` holds {split.features[caption_column]}, not strings; name another "
            "column, or write one caption per image."
        )
    # Cast before renaming, which would decode the images of a stream.
    split = split.cast_column(image_column, Image(decode=False)).select_columns([image_column, caption_column])
    names = {image_column: "image", caption_column: "text"}
    return split.rename_columns({old: new for old, new in names.items() if old != new})


def holds_images(feature) -> bool:
    """Return whether a column holds images: as such, as the bytes of image files, or as structs of `bytes` and `path`."""
    if isinstance(feature, dict | Features):
        return "bytes" in feature and {*feature} <= {"bytes", "path"} and holds_images(feature["bytes"])
    return isinstance(feature, Image) or getattr(feature, "dtype", None) in ("binary", "large_binary")


def load_captioned_data(
    dataset_name: str | None,
    train_data_dir: str | None,
    image_column: str,
    caption_column: str,
    hold_out: bool = True,
    selection: Selection = EVERYTHING,
) -> tuple[Dataset, Dataset]:
    """
    Load images with captions by [`load_splits`], and hold some of them out: the `validation` or `test` split if there is
    one, else, with `hold_out`, 5 % of the images and at most 256, always the same ones. Rows that share an image become one
    row, whose `text` is a list of captions.

    Returns:
        The training and the validation rows, with the columns `image` (undecoded) and `text`.

    Raises:
        `ValueError`: if [`load_splits`] raises it, or if there are fewer than two rows to hold one out.
    """
    splits = load_splits(dataset_name, train_data_dir, image_column, caption_column, selection=selection)
    rows = merge_rows(splits["train"])
    for name in ("validation", "test"):
        if name in splits:
            return rows, merge_rows(splits[name])
    if not hold_out:
        return rows, rows.select([])
    if len(splits["train"]) < 2:
        raise ValueError("The data has fewer than two rows: there is nothing to train on and to hold out.")
    if len(rows) < 2:
        warnings.warn("All rows of the data share one image: the held-out one is trained on, too.", stacklevel=2)
        rows = splits["train"]
    held_out = min(256, max(1, len(rows) // 20))
    split = rows.train_test_split(test_size=held_out, seed=0)
    return split["train"], split["test"]


def write_shapes_once(
    data_args: DataArguments, resolutions: list[int], texture_cells: int, seed: int, output_dir: str | Path
) -> str:
    """
    Draw the captioned shapes that the arguments describe, unless `output_dir` has them already.

    Args:
        data_args ([`DataArguments`]): The number of objects and images.
        resolutions (`list[int]`): The resolutions of the run; shapes are drawn at the last one.
        texture_cells (`int`): The resolution of the core, below which textures vanish.
        seed (`int`): The seed of all scenes.
        output_dir (`str` or `Path`): The folder of the run.

    Returns:
        `str`: The folder with the shapes, which [`load_captioned_data`] reads.
    """
    size, objects, images = resolutions[-1], data_args.shapes_objects, data_args.shapes_images
    held_out = max(256, data_args.num_scored_images)
    name = f"shapes-{size}px-{texture_cells}-cells-{objects}-objects-{images}+{held_out}-seed-{seed}"
    folder = Path(output_dir) / name
    if not (folder / "validation.parquet").exists():
        logger.info(f"Drawing {images} captioned shapes into {folder}.")
        write_shapes(
            folder,
            num_train=images,
            num_validation=held_out,
            image_size=size,
            max_objects=objects,
            texture_cells=texture_cells,
            seed=seed,
        )
    return str(folder)
