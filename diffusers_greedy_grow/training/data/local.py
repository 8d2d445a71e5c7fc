# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
Captioned images on a disk: which files of a folder belong to which split, and how each kind of file is read. Paths are never
read as patterns or URLs, so that a name may hold brackets, asterisks or colons.
"""

import itertools
import json
import logging
import os
import re
import tarfile
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet
from datasets import Dataset, Features, Image, IterableDataset, List, Value, concatenate_datasets
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from datasets.table import table_cast

from .metadata import UnreadableData, check_column, decode_text, read_metadata, replace_surrogates


# Unlike accelerate's, this logger works before there is an `Accelerator`.
logger = logging.getLogger(__name__)


SPLITS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
SHARD = re.compile(r"-\d{5}-of-\d{5}$")  # at the end of a name, as the Hub numbers the files of a split

IMAGE_SUFFIXES = {*ImageFolder.EXTENSIONS}
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_SUFFIXES = (".txt", ".caption")

LAYOUTS = """These layouts work:
  1. images with a text file of the same name beside each, such as 1.png and 1.txt or 1.caption, also in subfolders;
  2. images and a metadata.jsonl with a line per image, such as {"file_name": "1.png", "text": "a caption"}, or a metadata.csv;
  3. parquet files with a column of images and one of captions, or WebDataset tar files."""


# ----------------------------------------------------------------------------------------------------------------------
# Splits
def list_files(folder: Path) -> list[Path]:
    """Return all files in a folder and its subfolders, in the order of their paths, without hidden ones."""
    return [Path(file) for file in sorted(yield_files(str(folder), ()))]


def yield_files(folder: str, above: tuple[str, ...]) -> Iterator[str]:
    """Yield the paths of all files in a folder, unless it is, by a link, one of the folders `above` it."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir() and not entry.name.startswith((".", "__")):
                yield from yield_files(entry.path, (*above, real))
            elif not entry.is_dir() and not entry.name.startswith("."):
                yield entry.path


def find_split(path: Path, folder: Path, names: dict[str, str]) -> str | None:
    """
    Return the split of a file: the name of its folder at the top, or its own name at the top, must be one of `names` exactly.
    The files `data/train-00000-of-00002.parquet`, as the Hub stores them, belong to `train`.
    """
    parts = path.relative_to(folder).parts
    stem, is_image = path.stem, path.suffix.lower() in IMAGE_SUFFIXES
    is_shard = SHARD.search(stem) is not None
    if not is_image and (len(parts) == 1 or (len(parts) == 2 and parts[0] == "data" and is_shard)):
        return names.get(SHARD.sub("", stem))
    return names.get(parts[0]) if len(parts) > 1 else None


def sort_into_splits(folder: Path, extra_names: tuple[str, ...] = ()) -> dict[str, list[Path]]:
    """
    Return the files of each split of a folder. Files in no split belong to `train`.

    Args:
        folder (`Path`): The folder.
        extra_names (`tuple[str, ...]`): Names of splits beside train, validation, val and test.
    """
    files = list_files(folder)
    names = SPLITS | {name: name for name in extra_names if name not in SPLITS}
    # With metadata at the top, subfolders hold its images, whatever their names, unless they have metadata of their own.
    if any((folder / name).exists() for name in METADATA_NAMES):
        own = {path.relative_to(folder).parts[0] for path in files if path.name in METADATA_NAMES}
        names = {name: split for name, split in names.items() if name in own}
    splits: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        splits[find_split(path, folder, names) or "train"].append(path)
    return dict(splits)


# ----------------------------------------------------------------------------------------------------------------------
# Kinds of files
def read_local(
    data_dir: str,
    image_column: str,
    caption_column: str,
    streaming: bool = False,
    extra_splits: tuple[str, ...] = (),
) -> dict[str, Dataset] | dict[str, IterableDataset]:
    """
    Read the splits of a folder, or of one parquet or tar file.

    Args:
        data_dir (`str`): The folder or file.
        image_column (`str`), caption_column (`str`): The columns to read.
        streaming (`bool`): Whether to read rows when they are needed.
        extra_splits (`tuple[str, ...]`): Names of splits beside train, validation, val and test.

    Raises:
        [`UnreadableData`]: if the folder holds nothing that can be read.
    """
    path = Path(os.path.abspath(data_dir))
    if saved := read_saved(path):
        return {name: rows.to_iterable_dataset() for name, rows in saved.items()} if streaming else saved
    files = {"train": [path]} if path.is_file() else sort_into_splits(path, extra_splits)
    kinds: dict[str, dict[str, list[Path]]] = defaultdict(dict)
    for split, paths in files.items():
        for suffix, kind in ((".parquet", "parquet"), (".tar", "tar")):
            found = [path for path in paths if path.suffix.lower() == suffix and path.name not in METADATA_NAMES]
            if found:
                kinds[kind][split] = found
    metadata_at_the_top = any((path / name).exists() for name in METADATA_NAMES)
    captioned = {} if path.is_file() else find_images(files)
    if captioned and kinds and not metadata_at_the_top:
        raise UnreadableData(
            f"holds images with captions as well as {' and '.join(kinds)} files: name a folder that has one kind."
        )
    if captioned:
        return read_images(captioned, files, image_column, caption_column, streaming)
    if len(kinds) > 1:
        raise UnreadableData(f"holds {' and '.join(kinds)} files: name a folder that has one kind.")
    if "parquet" in kinds:
        return read_parquet(kinds["parquet"], image_column, caption_column, streaming)
    if "tar" in kinds:
        return read_tars(kinds["tar"], image_column, caption_column, streaming)
    images = sum(path.suffix.lower() in IMAGE_SUFFIXES for paths in files.values() for path in paths)
    raise UnreadableData(
        f"holds {f'{images} images without captions' if images else 'nothing that can be read'}. {LAYOUTS}"
    )


def read_saved(folder: Path) -> dict[str, Dataset]:
    """Return the splits of a folder that `save_to_disk` has written; none if it is another folder."""
    if (folder / "dataset_dict.json").exists():
        names = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    elif (folder / "state.json").exists() and (folder / "dataset_info.json").exists():
        return {"train": read_saved_split(folder)}
    else:
        return {}
    return {SPLITS.get(name, name): read_saved_split(folder / name) for name in names}


def read_saved_split(folder: Path) -> Dataset:
    """Return the rows of one split that `save_to_disk` has written."""
    files = json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]
    return concatenate_datasets([Dataset.from_file(str(folder / file["filename"])) for file in files])


def find_stamp(path: Path) -> tuple[int, int]:
    """Return what tells that a file has changed."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def read_parquet(
    files: dict[str, list[Path]], image_column: str, caption_column: str, streaming: bool
) -> dict[str, Dataset] | dict[str, IterableDataset]:
    """Read two columns of parquet files."""
    columns = [image_column, caption_column]
    files = {split: check_parquet(paths, image_column, caption_column, split) for split, paths in files.items()}
    if any(sign in str(path) for paths in files.values() for path in paths for sign in ("::", "$")):
        # `datasets` would read the colons as a chain of URLs, and the name after the dollar as a variable.
        splits = {}
        for split, paths in files.items():
            features = Features.from_arrow_schema(pyarrow.parquet.read_schema(paths[0]))
            undecoded = {c: Image(decode=False) if isinstance(features[c], Image) else features[c] for c in columns}
            read = IterableDataset.from_generator if streaming else Dataset.from_generator
            arguments = {"files": [(str(path), *find_stamp(path)) for path in paths], "columns": tuple(columns)}
            splits[split] = read(yield_parquet_rows, features=Features(undecoded), gen_kwargs=arguments)
        return splits
    data_files = DataFilesDict(
        {
            split: DataFilesList(
                [str(path) for path in paths], [(str(path), *map(str, find_stamp(path))) for path in paths]
            )
            for split, paths in files.items()
        }
    )
    builder = Parquet(data_files=data_files, columns=list(dict.fromkeys(columns)))
    if streaming:
        return dict(builder.as_streaming_dataset())
    builder.download_and_prepare()
    return dict(builder.as_dataset())


def check_parquet(paths: list[Path], image_column: str, caption_column: str, split: str) -> list[Path]:
    """
    Return the parquet files of a split that have rows, since `datasets` fails at others.

    Raises:
        [`UnreadableData`]: if one cannot be read, or has a column of another type than the first, or none has rows.
        `ValueError`: if one lacks a column.
    """
    columns, first, filled = list(dict.fromkeys([image_column, caption_column])), None, []
    for path in paths:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                schema, num_rows = file.schema_arrow, file.metadata.num_rows
        except (OSError, pyarrow.ArrowException) as error:
            raise UnreadableData(f"cannot be read: {path} is not a parquet file: {error}") from error
        if not num_rows:
            continue
        check_column("image_column", image_column, schema.names, split)
        check_column("caption_column", caption_column, schema.names, split)
        filled.append(path)
        own = Features.from_arrow_schema(schema)
        first = first or Features({column: own[column] for column in columns}).arrow_schema
        try:
            table_cast(schema.empty_table().select(columns), first)
        except (TypeError, KeyError, pyarrow.ArrowException) as error:
            raise UnreadableData(f"cannot be read: {path} does not fit {filled[0]}: {error}") from error
    if not filled:
        raise UnreadableData(f"holds parquet files without rows, such as {paths[0]}.")
    return filled


def yield_parquet_rows(files: list[tuple], columns: tuple[str, ...]) -> Iterator[dict]:
    """Yield the rows of parquet files, each given by its path and a stamp."""
    for file, *_ in files:
        with pyarrow.parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(64, columns=list(columns)):
                yield from batch.to_pylist()


class UndecodedText(WebDataset):
    """Leaves text as bytes, since not all of it is UTF-8."""

    DECODERS = {name: one for name, one in WebDataset.DECODERS.items() if one != WebDataset.DECODERS["txt"]}


def yield_tar_samples(path: str) -> Iterator[dict]:
    """
    Yield the samples of a WebDataset tar file: the contents of the files that share a name, by their extensions.

    Raises:
        `ValueError`: if the file is broken.
    """

    def read_members() -> Iterator[tuple]:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                if member.isfile() and not Path(member.name).name.startswith((".", "__")):
                    yield member.name, archive.extractfile(member)

    try:
        yield from UndecodedText._get_pipeline_from_tar(path, read_members())
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def choose_image_field(sample: dict, image_column: str) -> str | None:
    """Return the extension of a sample's image: `image_column`, or that of another kind of image."""
    images = [name for name in sample if f".{name.rsplit('.', 1)[-1].lower()}" in IMAGE_SUFFIXES]
    return image_column if image_column in images else images[0] if len(images) == 1 else None


def choose_caption_field(sample: dict, caption_column: str) -> str:
    """Return the extension of a sample's caption: `caption_column`, or, for the default `text`, that of text files."""
    fields = [caption_column.lower(), *(suffix[1:] for suffix in CAPTION_SUFFIXES if caption_column == "text")]
    names = {name.lower(): name for name in sample}
    return next((names[field] for field in fields if field in names), caption_column)


def get_caption(sample: dict, caption_column: str) -> object:
    """Return the caption of a sample, as text if it is a file of text."""
    caption = sample.get(choose_caption_field(sample, caption_column))
    if not isinstance(caption, bytes):
        return caption
    text = decode_text(caption, sample["__url__"])
    return None if text is None else text.strip()


def yield_tar_rows(files: list[tuple], image_column: str, caption_column: str) -> Iterator[dict]:
    """Yield an image, undecoded, and a caption per sample of tar files, each given by its path and a stamp."""
    for path, *_ in files:
        for sample in yield_tar_samples(path):
            field = choose_image_field(sample, image_column)
            image = None if field is None else {"bytes": sample[field], "path": f"{sample['__key__']}.{field}"}
            yield {image_column: image, caption_column: get_caption(sample, caption_column)}


def read_tars(
    files: dict[str, list[Path]], image_column: str, caption_column: str, streaming: bool
) -> dict[str, Dataset] | dict[str, IterableDataset]:
    """Read WebDataset tar files. Their images may have different extensions."""
    features = Features({image_column: Image(decode=False), caption_column: Value("string")})
    splits = {}
    for split, paths in files.items():
        every_sample = (sample for path in paths for sample in yield_tar_samples(str(path)))
        samples = list(itertools.islice(every_sample, 5))
        columns = list(dict.fromkeys(name for sample in samples for name in sample if not name.startswith("__")))
        if not samples:
            raise UnreadableData(f"holds tar files without samples, such as {paths[0]}.")
        if not any(choose_image_field(sample, image_column) for sample in samples):
            check_column("image_column", image_column, columns, split)
            raise ValueError(
                f"`image_column={image_column!r}` holds no images; name another extension of the tar files' members."
            )
        if not any(choose_caption_field(sample, caption_column) in sample for sample in samples):
            check_column("caption_column", caption_column, columns, split)
        for sample in samples:
            caption = get_caption(sample, caption_column)
            if not isinstance(caption, str | None):
                raise ValueError(
                    f"`caption_column={caption_column!r}` holds {type(caption).__name__}, not strings; name another column, or "
                    "write one caption per image."
                )
        arguments = {
            "files": [(str(path), *find_stamp(path)) for path in paths],
            "image_column": image_column,
            "caption_column": caption_column,
        }
        read = IterableDataset.from_generator if streaming else Dataset.from_generator
        splits[split] = read(yield_tar_rows, features=features, gen_kwargs=arguments)
    return splits


# ----------------------------------------------------------------------------------------------------------------------
# Images with metadata or with text files
def get_stem(path: Path) -> str:
    """Return a path without its suffix. An accented letter may be one character in one name and two in another."""
    return unicodedata.normalize("NFC", str(path.with_suffix("")))


def find_images(files: dict[str, list[Path]]) -> dict[str, list[Path]]:
    """
    Return the files that name the captions of each split, metadata and images, if there are captions. An image in a folder
    with metadata, or below one, has its caption there; any other has it in a text file of its own.
    """
    metadata = {split: [path for path in paths if path.name in METADATA_NAMES] for split, paths in files.items()}
    described = {path.parent for paths in metadata.values() for path in paths}
    found = {}
    for split, paths in files.items():
        images = [
            path
            for path in paths
            if path.suffix.lower() in IMAGE_SUFFIXES and not described.intersection(path.parents)
        ]
        texts = {get_stem(path) for path in paths if path.suffix.lower() in CAPTION_SUFFIXES}
        has_texts = any(get_stem(path) in texts for path in images)
        if sources := metadata[split] + images * has_texts:
            found[split] = sources
    return found


def read_images(
    splits: dict[str, list[Path]],
    files: dict[str, list[Path]],
    image_column: str,
    caption_column: str,
    streaming: bool,
) -> dict[str, Dataset] | dict[str, IterableDataset]:
    """
    Read the rows of images with metadata or text files: those that [`find_images`] returns, among all `files`. Warn of other
    images.
    """
    result = {}
    left_out = {str(path) for paths in files.values() for path in paths if path.suffix.lower() in IMAGE_SUFFIXES}
    for split, sources in splits.items():
        texts = {
            (get_stem(path), path.suffix.lower()): path
            for path in files[split]
            if path.suffix.lower() in CAPTION_SUFFIXES
        }
        rows: list[tuple[str, object]] = []
        for path in sources:
            if path.name in METADATA_NAMES:
                rows += read_metadata(path, image_column, caption_column, split)
                continue
            check_column("image_column", image_column, ["image", "text"], split)
            check_column("caption_column", caption_column, ["image", "text"], split)
            found = [texts.get((get_stem(path), suffix)) for suffix in CAPTION_SUFFIXES]
            text = next((text for text in found if text is not None), None)
            caption = None if text is None else decode_text(text.read_bytes(), str(text.parent))
            rows.append((str(path), None if caption is None else caption.strip()))
        left_out.difference_update(name for name, _ in rows)
        if unnamed := next((name for name, _ in rows if replace_surrogates(name) != name), None):
            raise UnreadableData(f"cannot be read: rename {ascii(unnamed)}, whose name is not UTF-8.")
        captions = [replace_surrogates(caption) for _, caption in rows]
        features = Features({image_column: Image(decode=False), caption_column: Value("string")})
        if any(isinstance(caption, list) for caption in captions):
            captions = [[caption] if isinstance(caption, str) else caption for caption in captions]
            features[caption_column] = List(Value("string"))
        wrong = next(
            (one for caption in captions for one in flatten(caption) if not isinstance(one, str | None)), None
        )
        if wrong is not None:
            raise ValueError(
                f"`caption_column={caption_column!r}` holds {type(wrong).__name__}, not strings; name another column, or write "
                "one caption per image."
            )
        images = [{"bytes": None, "path": name} for name, _ in rows]
        data = Dataset.from_dict({image_column: images, caption_column: captions}, features=features)
        result[split] = data.to_iterable_dataset() if streaming else data
    if left_out:
        logger.warning(f"{len(left_out)} images have no captions and are left out, such as {min(left_out)}.")
    return result


def flatten(caption: object) -> list:
    """Return the captions of a row as a list."""
    return caption if isinstance(caption, list) else [caption]
