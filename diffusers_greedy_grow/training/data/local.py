# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
Captioned images on a disk: which files of a folder belong to which split, and how each kind of file is read. Paths are never
read as patterns or URLs, so that a name may hold brackets, asterisks or colons.
"""

import csv
import io
import json
import logging
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pandas
import pyarrow.parquet
from datasets import Dataset, Features, Image, IterableDataset, List, Value, concatenate_datasets
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.packaged_modules.webdataset.webdataset import WebDataset


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


class UnreadableData(ValueError):
    """The reason why a folder cannot be read, as the end of a sentence that begins with its name."""


# ----------------------------------------------------------------------------------------------------------------------
# Splits
def list_files(folder: Path) -> list[Path]:
    """Return all files in a folder and its subfolders, in the order of their paths, without hidden ones."""
    files, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        files += [os.path.join(parent, name) for name in names if not name.startswith(".")]
    return [Path(file) for file in sorted(files)]


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
    captioned = {} if path.is_file() else {split: pair for split, pair in find_images(path, files).items() if pair[0]}
    if captioned and kinds and not metadata_at_the_top:
        raise UnreadableData(
            f"holds images with captions as well as {' and '.join(kinds)} files: name a folder that has one kind."
        )
    if captioned:
        return read_images(captioned, image_column, caption_column, streaming)
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


def check_column(argument: str, column: str, columns: list[str], split: str) -> None:
    """
    Check the name of a column.

    Raises:
        `ValueError`: if it is not among `columns`.
    """
    if column not in columns:
        raise ValueError(f"`{argument}={column!r}` is not in the {split} split, whose columns are {columns}.")


def read_parquet(
    files: dict[str, list[Path]], image_column: str, caption_column: str, streaming: bool
) -> dict[str, Dataset] | dict[str, IterableDataset]:
    """Read two columns of parquet files."""
    columns = [image_column, caption_column]
    for split, paths in files.items():
        schema = pyarrow.parquet.read_schema(paths[0])
        check_column("image_column", image_column, schema.names, split)
        check_column("caption_column", caption_column, schema.names, split)
    if any("::" in str(path) for paths in files.values() for path in paths):
        # `datasets` would read the colons as a chain of URLs.
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


def yield_parquet_rows(files: list[tuple], columns: tuple[str, ...]) -> Iterator[dict]:
    """Yield the rows of parquet files, each given by its path and a stamp."""
    for file, *_ in files:
        with pyarrow.parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(64, columns=list(columns)):
                yield from batch.to_pylist()


def yield_tar_samples(path: str) -> Iterator[dict]:
    """Yield the samples of a WebDataset tar file: the contents of the files that share a name, by their extensions."""

    def read_members() -> Iterator[tuple]:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                if member.isfile() and not Path(member.name).name.startswith((".", "__")):
                    yield member.name, archive.extractfile(member)

    yield from WebDataset._get_pipeline_from_tar(path, read_members())


def choose_image_field(sample: dict, image_column: str) -> str | None:
    """Return the extension of a sample's image: `image_column`, or that of another kind of image."""
    images = [name for name in sample if f".{name.rsplit('.', 1)[-1].lower()}" in IMAGE_SUFFIXES]
    return image_column if image_column in images else images[0] if len(images) == 1 else None


def choose_caption_field(sample: dict, caption_column: str) -> str:
    """Return the extension of a sample's caption: `caption_column`, or, for the default `text`, that of text files."""
    fields = [caption_column, *(suffix[1:] for suffix in CAPTION_SUFFIXES if caption_column == "text")]
    return next((name for name in fields if name in sample), caption_column)


def yield_tar_rows(files: list[tuple], image_column: str, caption_column: str) -> Iterator[dict]:
    """Yield an image, undecoded, and a caption per sample of tar files, each given by its path and a stamp."""
    for path, *_ in files:
        for sample in yield_tar_samples(path):
            field = choose_image_field(sample, image_column)
            image = None if field is None else {"bytes": sample[field], "path": f"{sample['__key__']}.{field}"}
            caption = sample.get(choose_caption_field(sample, caption_column))
            yield {image_column: image, caption_column: caption}


def read_tars(
    files: dict[str, list[Path]], image_column: str, caption_column: str, streaming: bool
) -> dict[str, Dataset] | dict[str, IterableDataset]:
    """Read WebDataset tar files. Their images may have different extensions."""
    features = Features({image_column: Image(decode=False), caption_column: Value("string")})
    splits = {}
    for split, paths in files.items():
        samples = [sample for _, sample in zip(range(5), yield_tar_samples(str(paths[0])))]
        columns = list(dict.fromkeys(name for sample in samples for name in sample))
        if samples and not any(choose_image_field(sample, image_column) for sample in samples):
            check_column("image_column", image_column, columns, split)
            raise ValueError(
                f"`image_column={image_column!r}` holds no images; name another extension of the tar files' members."
            )
        if not any(choose_caption_field(sample, caption_column) in sample for sample in samples):
            check_column("caption_column", caption_column, columns, split)
        for sample in samples:
            caption = sample.get(choose_caption_field(sample, caption_column))
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
def find_images(folder: Path, files: dict[str, list[Path]]) -> dict[str, tuple[list[Path], list[Path]]]:
    """
    Return the files that name the captions of each split, metadata and images, if there are captions. An image in a folder
    with metadata, or below one, has its caption there; any other has it in a text file of its own.
    """
    metadata = {split: [path for path in paths if path.name in METADATA_NAMES] for split, paths in files.items()}
    described = {path.parent for paths in metadata.values() for path in paths}
    found, bare = {}, 0
    for split, paths in files.items():
        images = [
            path
            for path in paths
            if path.suffix.lower() in IMAGE_SUFFIXES and not described.intersection(path.parents)
        ]
        texts = {path.with_suffix("") for path in paths if path.suffix.lower() in CAPTION_SUFFIXES}
        if any(path.with_suffix("") in texts for path in images):
            found[split] = (metadata[split] + images, paths)
        else:
            bare += len(images)
            found[split] = (metadata[split], paths)
    if bare and any(sources for sources, _ in found.values()):
        logger.warning(f"{bare} images in {folder} have no captions and are left out.")
    return found


def read_images(
    splits: dict[str, tuple[list[Path], list[Path]]], image_column: str, caption_column: str, streaming: bool
) -> dict[str, Dataset] | dict[str, IterableDataset]:
    """Read the rows of images with metadata or text files, as [`find_images`] returns them."""
    result = {}
    for split, (sources, paths) in splits.items():
        texts = {
            (path.with_suffix(""), path.suffix.lower()): path
            for path in paths
            if path.suffix.lower() in CAPTION_SUFFIXES
        }
        rows: list[tuple[str, object]] = []
        for path in sources:
            if path.name in METADATA_NAMES:
                rows += read_metadata(path, image_column, caption_column, split)
                continue
            check_column("image_column", image_column, ["image", "text"], split)
            check_column("caption_column", caption_column, ["image", "text"], split)
            found = [texts.get((path.with_suffix(""), suffix)) for suffix in CAPTION_SUFFIXES]
            text = next((text for text in found if text is not None), None)
            rows.append((str(path), None if text is None else decode_text(text.read_bytes()).strip()))
        captions = [caption for _, caption in rows]
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
    return result


def flatten(caption: object) -> list:
    """Return the captions of a row as a list."""
    return caption if isinstance(caption, list) else [caption]


def decode_text(content: bytes) -> str:
    """Return the text of a file in UTF-8, in UTF-16 with its mark, or, if it is neither, in Windows' western code page."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


def is_file_name(column: str) -> bool:
    """Return whether a column of metadata names files."""
    return column == "file_name" or column.endswith("_file_name")


def parse_metadata(path: Path) -> list[dict]:
    """
    Return the rows of a metadata file.

    Raises:
        [`UnreadableData`]: if it cannot be parsed.
    """
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    text = decode_text(path.read_bytes())
    if path.suffix == ".csv":
        head = text.split("\n", 1)[0].rstrip("\r")
        separators = [sep for sep in ",;\t" if any(map(is_file_name, next(csv.reader([head], delimiter=sep), [])))]
        # Captions such as "None" and "NA" are text.
        options: dict = {"sep": (separators or [","])[0], "dtype": str, "keep_default_na": False}
        return pandas.read_csv(io.StringIO(text), **options).to_dict("records")
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not `splitlines`: a caption may hold other line breaks
        if line.strip():
            try:
                rows.append({**json.loads(line)})
            except (ValueError, TypeError) as error:
                raise UnreadableData(
                    f"cannot be read: line {number} of {path} is not a JSON object: {error}"
                ) from error
    return rows


def read_metadata(path: Path, image_column: str, caption_column: str, split: str) -> list[tuple[str, object]]:
    """
    Return the path of each image that a metadata file names, and its caption.

    Raises:
        [`UnreadableData`]: if the file cannot be parsed or a row names no image.
        `ValueError`: if there is no such column.
    """
    rows = parse_metadata(path)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if not any(map(is_file_name, columns)) and rows:
        raise UnreadableData(f"cannot be read: {path} has no column `file_name`, only {columns}.")
    shown = [(name[: -len("_file_name")] or "image") if is_file_name(name) else name for name in columns]
    if rows:
        check_column("image_column", image_column, shown, split)
        check_column("caption_column", caption_column, shown, split)
    file_column = next((name for name, other in zip(columns, shown) if other == image_column), "file_name")
    if rows and not is_file_name(file_column):
        raise ValueError(
            f"`image_column={image_column!r}` holds values, not images; name a column of {path} that ends in file_name."
        )
    result = []
    for number, row in enumerate(rows, 1):
        name = row.get(file_column)
        if not isinstance(name, str) or not name:
            raise UnreadableData(f"cannot be read: row {number} of {path} names no image in `{file_column}`.")
        file = os.path.normpath(path.parent / name)
        if "\\" in name and not os.path.exists(file):  # written on Windows
            file = os.path.normpath(path.parent / name.replace("\\", "/"))
        result.append((file, row.get(caption_column)))
    return result
