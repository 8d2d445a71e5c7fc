# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Folders as people have them: from other systems, in other encodings, cut off, and with links."""

import json
import tarfile
import unicodedata
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from diffusers_greedy_grow.training.data.sources import Selection, load_splits
from tests.data_utils import add_member, make_image, to_bytes, write_image_folder, write_parquet, write_tar


def read_texts(source: Path, streaming: bool = False, image: str = "image", text: str = "text", **selection) -> dict:
    """The captions of each split, in order."""
    splits = load_splits(None, str(source), image, text, streaming, Selection(**selection))
    return {name: [row["text"] for row in split] for name, split in splits.items()}


def write_images(folder: Path, count: int = 3) -> Path:
    """Writes images without captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        make_image(i).save(folder / f"{i}.png")
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# Folders


@pytest.mark.parametrize("streaming", [False, True])
def test_a_split_may_be_named_as_its_folder(tmp_path, streaming):
    for name in ("train", "val"):
        write_image_folder(tmp_path / name, 2 + (name == "val"))
    texts = read_texts(tmp_path, streaming, train_split="train", validation_split="val")
    assert {name: len(split) for name, split in texts.items()} == {"train": 2, "validation": 3}


def test_a_link_to_another_folder_is_read_and_one_to_a_folder_above_is_not(tmp_path):
    write_image_folder(tmp_path / "all", 4)
    write_image_folder(tmp_path / "all" / "held out", 2)
    (tmp_path / "val").symlink_to(tmp_path / "all" / "held out")
    (tmp_path / "all" / "top").symlink_to(tmp_path)
    assert len(read_texts(tmp_path)["validation"]) == 2


def test_images_that_metadata_does_not_name_are_counted(tmp_path, caplog):
    write_image_folder(tmp_path / "a", 3)
    make_image(9).save(tmp_path / "a" / "extra.png")
    (tmp_path / "val").mkdir()
    make_image(9).save(tmp_path / "val" / "extra.png")
    assert len(read_texts(tmp_path)["train"]) == 3
    assert f"2 images have no captions and are left out, such as {tmp_path / 'a' / 'extra.png'}" in caplog.text


def test_accented_names_as_macos_writes_them(tmp_path):
    """Its letters are two characters each, in metadata and text files of other systems they are one."""
    for folder in ("metadata", "text"):
        (tmp_path / folder).mkdir()
        make_image(0).save(tmp_path / folder / f"{unicodedata.normalize('NFD', 'é')}.png")
    (tmp_path / "metadata" / "metadata.jsonl").write_text('{"file_name": "é.png", "text": "one"}', encoding="utf-8")
    (tmp_path / "text" / "é.txt").write_text("two")
    splits = load_splits(None, str(tmp_path), "image", "text")
    assert [row["text"] for row in splits["train"]] == ["one", "two"]
    assert all(Path(row["image"]["path"]).exists() for row in splits["train"])


def test_a_name_that_is_not_utf8(tmp_path):
    make_image(0).save(tmp_path / "1.png")
    (tmp_path / "1.png").rename(str(tmp_path / "\udce9.png"))
    (tmp_path / "\udce9.txt").write_text("one")
    with pytest.raises(ValueError, match=r"rename '.*\\udce9.png', whose name is not UTF-8"):
        read_texts(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Text


@pytest.mark.parametrize(
    "rows,message",
    [
        ("0.png,a cat\n1.png,a cat, on a mat\n", "line 3 of .*: it has more fields than the header: put a caption"),
        ("0.png,a cat, on a mat\n1.png,a dog, asleep\n", "line 2 of .*: it has more fields than the header"),
        ('0.png,"a cat\n1.png,"a dog"\n', "line 3 of .*metadata.csv: "),
    ],
)
def test_a_table_whose_fields_are_not_quoted(tmp_path, rows, message):
    """pandas takes the first column for the names of rows."""
    (write_images(tmp_path) / "metadata.csv").write_text("file_name,text\n" + rows)
    with pytest.raises(ValueError, match=message):
        read_texts(tmp_path)


def test_spaces_line_breaks_and_missing_fields_in_a_table(tmp_path):
    content = '\ufefffile_name, text\r0.png, "a cat, ""Tom""\r\nasleep"\r\r1.png, 5" wide\r2.png\r'
    (write_images(tmp_path) / "metadata.csv").write_bytes(content.encode())
    assert read_texts(tmp_path) == {"train": ['a cat, "Tom"\nasleep', '5" wide', None]}


def test_text_in_other_encodings(tmp_path, caplog):
    """Windows' western one is read with a warning. What cannot be text is no caption, and ends the reading of metadata."""
    for i, content in enumerate(("schön".encode("cp1252"), "cat".encode("utf-16-le"), b"\x81\x8d", b"fine\r\n")):
        make_image(i).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_bytes(content)
    assert read_texts(tmp_path) == {"train": ["schön", None, None, "fine"]}
    assert caplog.text.count("is read as Windows-1252") == 1 and str(tmp_path) in caplog.text
    (tmp_path / "metadata.csv").write_bytes("file_name,text\n0.png,真\n".encode("shift-jis"))
    with pytest.raises(ValueError, match="metadata.csv is not text in UTF-8"):
        read_texts(tmp_path)


def test_half_an_emoji_in_a_caption(tmp_path):
    lines = [json.dumps({"file_name": "0.png", "text": text}) for text in ("cut \ud83d", ["whole 😀", "\ude00"])]
    (write_images(tmp_path) / "metadata.jsonl").write_text("\n".join(lines))
    assert read_texts(tmp_path) == {"train": [["cut ?"], ["whole 😀", "?"]]}


# ----------------------------------------------------------------------------------------------------------------------
# Parquet and tar files


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dollar_in_a_path_is_not_a_variable(tmp_path, streaming, monkeypatch):
    monkeypatch.setenv("SET", "other")
    for name, count in (("$SET", 3), ("other", 2)):
        (tmp_path / name).mkdir()
        write_parquet(tmp_path / name / "data.parquet", count)
    assert len(read_texts(tmp_path / "$SET", streaming, "photo")["train"]) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_files_without_rows_are_left_out(tmp_path, streaming):
    write_parquet(tmp_path / "b.parquet", 3)
    empty = pyarrow.parquet.read_schema(tmp_path / "b.parquet").empty_table()
    pyarrow.parquet.write_table(empty, tmp_path / "a.parquet")
    assert len(read_texts(tmp_path, streaming, "photo")["train"]) == 3
    (tmp_path / "b.parquet").unlink()
    with pytest.raises(ValueError, match="holds parquet files without rows, such as .*a.parquet"):
        read_texts(tmp_path, streaming, "photo")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["types", "columns", "junk"])
def test_parquet_files_that_differ_are_named(tmp_path, streaming, kind):
    """When they are opened, not when their rows are read."""
    images, texts = [to_bytes(make_image(0))], ["one"]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "text": texts}), tmp_path / "a.parquet")
    other = {"image": [{"bytes": images[0]}], "text": texts} if kind == "types" else {"image": images, "words": texts}
    pyarrow.parquet.write_table(pyarrow.table(other), tmp_path / "b.parquet")
    if kind == "junk":
        (tmp_path / "b.parquet").write_bytes(b"junk" * 100)
    message = {"types": "b.parquet does not fit .*a.parquet", "junk": "b.parquet is not a parquet file"}
    with pytest.raises(ValueError, match=message.get(kind, r"`caption_column='text'` is not in .*'words'")):
        load_splits(None, str(tmp_path), "image", "text", streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_captions_in_tar_files(tmp_path, streaming):
    """The first tar file is empty; captions have other extensions and encodings, and line breaks at their ends."""
    tarfile.open(tmp_path / "a.tar", "w").close()
    captions = (("txt", b"\xef\xbb\xbfone\r\n"), ("caption", b"two"), ("TXT", b"sch\xf6n"), ("txt", b"four\0"))
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        for i, (extension, caption) in enumerate(captions):
            add_member(archive, f"{i}.PNG", to_bytes(make_image(i)))
            add_member(archive, f"{i}.{extension}", caption)
    assert read_texts(tmp_path, streaming) == {"train": ["one", "two", "schön", None]}
    (tmp_path / "b.tar").unlink()
    with pytest.raises(ValueError, match="holds tar files without samples, such as .*a.tar"):
        read_texts(tmp_path, streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("content", ["cut off", "junk"])
def test_a_broken_tar_file_is_named(tmp_path, streaming, content):
    write_tar(tmp_path / "a.tar", ["png"] * 9)
    size = (tmp_path / "a.tar").stat().st_size
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(b"junk" * 300 if content == "junk" else whole[: size * 2 // 3])
    with pytest.raises(ValueError, match="a.tar cannot be read: "):
        read_texts(tmp_path, streaming, "png", "txt")
