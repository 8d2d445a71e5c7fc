# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
Sources of captioned images: a dataset on the Hub, a folder, a file, or, by default, captioned shapes that are drawn when a run
starts.
"""

from pathlib import Path

from accelerate.logging import get_logger
from datasets import Dataset, Image, IterableDataset, load_dataset

from ..arguments import DataArguments
from ..shapes.scenes import write_shapes


logger = get_logger(__name__)


FILE_TYPES = {".parquet": "parquet", ".tar": "webdataset"}


def check_data_dir(data_dir: str, argument: str = "train_data_dir") -> None:
    """
    Check the value of an `argument`.

    Raises:
        `ValueError`: if `data_dir` is neither a folder nor a file that can be read.
    """
    path = Path(data_dir)
    if not path.exists():
        raise ValueError(f"`{argument}={data_dir!r}` does not exist.")
    if path.is_file() and path.suffix not in FILE_TYPES:
        raise ValueError(
            f"`{argument}={data_dir!r}` cannot be read: pass a file that ends in {' or '.join(FILE_TYPES)}, or a folder with such "
            "files or with images and a metadata.jsonl or metadata.csv."
        )


def load_splits(
    dataset_name: str | None, data_dir: str | None, image_column: str, caption_column: str, streaming: bool = False
) -> dict[str, Dataset] | dict[str, IterableDataset]:
    """
    Load the splits of a source, each with the columns `image` and `text`. Images stay undecoded, as `bytes` or `path`, so
    that a broken image does not stop the reading of its row.

    Args:
        dataset_name (`str`, *optional*):
            A dataset on the Hub.
        data_dir (`str`, *optional*):
            Instead of a dataset on the Hub, a folder with images and a `metadata.jsonl` or `metadata.csv` (an imagefolder), a folder
            with parquet or WebDataset tar files, or one such file.
        image_column (`str`), caption_column (`str`):
            The columns to read. The columns of a WebDataset are file extensions, such as `jpg` and `txt`.
        streaming (`bool`, defaults to `False`):
            Whether to read rows when they are needed, instead of having all of them on disk and in order.

    Raises:
        `ValueError`: if there is not exactly one source that can be read, or a column is missing or of the wrong type.
    """
    if dataset_name is not None and data_dir is None:
        splits = load_dataset(dataset_name, streaming=streaming)
    elif data_dir is not None and dataset_name is None:
        check_data_dir(data_dir)
        if Path(data_dir).is_file():
            splits = load_dataset(FILE_TYPES[Path(data_dir).suffix], data_files=data_dir, streaming=streaming)
        elif any((Path(data_dir) / f"metadata.{kind}").exists() for kind in ("jsonl", "csv")):
            # Name the split: else `datasets` would make one of each image that is called like `crash_test_1.png`.
            splits = load_dataset("imagefolder", data_dir=data_dir, data_files={"train": "**"}, streaming=streaming)
        else:
            splits = load_dataset(data_dir, streaming=streaming)
    else:
        raise ValueError("Pass either `dataset_name` or `train_data_dir`.")

    for name, split in splits.items():
        for argument, column in (("image_column", image_column), ("caption_column", caption_column)):
            if column not in split.column_names:
                raise ValueError(
                    f"`{argument}={column!r}` is not in the {name} split, whose columns are {split.column_names}."
                )
        if not isinstance(split.features[image_column], Image):
            raise ValueError(
                f"`image_column={image_column!r}` holds {split.features[image_column]}, not images; cast it to "
                "`datasets.Image` or name another column."
            )
        if getattr(split.features[caption_column], "dtype", None) not in ("string", "large_string"):
            raise ValueError(
                f"`caption_column={caption_column!r}` holds {split.features[caption_column]}, not strings; name another "
                "column, or write one caption per image."
            )
        # Cast before renaming, which would decode the images of a stream.
        split = split.cast_column(image_column, Image(decode=False)).select_columns([image_column, caption_column])
        names = {image_column: "image", caption_column: "text"}
        splits[name] = split.rename_columns({old: new for old, new in names.items() if old != new})
    if "train" not in splits:
        raise ValueError(f"The data has no train split, only {list(splits)}: name one of its files or folders train.")
    return splits


def load_captioned_data(
    dataset_name: str | None, train_data_dir: str | None, image_column: str, caption_column: str, hold_out: bool = True
) -> tuple[Dataset, Dataset]:
    """
    Load images with captions by [`load_splits`], and hold some of them out: the `validation` or `test` split if there is
    one, else, with `hold_out`, 5 % of the rows and at most 256, always the same ones.

    Returns:
        The training and the validation rows, with the columns `image` (undecoded) and `text`.

    Raises:
        `ValueError`: if [`load_splits`] raises it, or if there are fewer than two rows to hold one out.
    """
    splits = load_splits(dataset_name, train_data_dir, image_column, caption_column)
    for name in ("validation", "test"):
        if name in splits:
            return splits["train"], splits[name]
    if not hold_out:
        return splits["train"], splits["train"].select([])
    if len(splits["train"]) < 2:
        raise ValueError("The data has fewer than two rows: there is nothing to train on and to hold out.")
    held_out = min(256, max(1, len(splits["train"]) // 20))
    split = splits["train"].train_test_split(test_size=held_out, seed=0)
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
