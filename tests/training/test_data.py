# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

import io
import json
import struct

import numpy as np
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, DatasetDict
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngImageFile

from diffusers_greedy_grow.flow import pool
from diffusers_greedy_grow.training.data.captioned import CaptionedImages
from diffusers_greedy_grow.training.data.images import (
    normalize,
    open_image,
    to_pixel_values,
    warn_of_small_images,
)
from diffusers_greedy_grow.training.data.order import BucketOrder, EpochOrder
from diffusers_greedy_grow.training.data.rows import BrokenRow, BrokenRows
from diffusers_greedy_grow.training.data.sources import Selection, check_data_dir, load_captioned_data, load_splits
from diffusers_greedy_grow.training.data.streaming import read_files
from diffusers_greedy_grow.training.seeds import sample_generators

from ..data_utils import (
    BROKEN,
    make_bomb,
    make_image,
    make_rows,
    to_bytes,
    write_image_folder,
    write_parquet,
    write_rows,
    write_tar,
)


# ----------------------------------------------------------------------------------------------------------------------
# Loading


def check(rows, i):
    assert set(rows.column_names) == {"image", "text"}
    number = int(rows[i]["text"].split()[-1])
    assert np.array_equal(open_image(rows[i]["image"]), make_image(number))


def test_image_folder(tmp_path):
    folder = write_image_folder(tmp_path / "images")
    train, validation = load_captioned_data(None, str(folder), "image", "text")
    assert (len(train), len(validation)) == (38, 2)
    assert not set(train["text"]) & set(validation["text"])
    check(train, 5)
    check(validation, 1)
    again, _ = load_captioned_data(None, str(folder), "image", "text")
    assert again["text"] == train["text"]


@pytest.mark.parametrize("streaming", [False, True])
def test_images_with_the_names_of_splits_are_one_set(tmp_path, streaming):
    folder = write_image_folder(tmp_path / "images")
    metadata = folder / "metadata.jsonl"
    (folder / "val").mkdir()
    for name, other in (("003.png", "crash_test_3.png"), ("004.png", "train.png"), ("005.png", "val/005.png")):
        (folder / name).rename(folder / other)
        metadata.write_text(metadata.read_text().replace(name, other))
    splits = load_splits(None, str(folder), "image", "text", streaming=streaming)
    assert list(splits) == ["train"]
    assert sorted(row["text"] for row in splits["train"]) == sorted(f"image number {i}" for i in range(40))


def test_nothing_is_held_out_that_is_not_asked_for(tmp_path):
    write_parquet(tmp_path / "one.parquet", 1)
    train, validation = load_captioned_data(None, str(tmp_path / "one.parquet"), "photo", "text", hold_out=False)
    assert (len(train), len(validation)) == (1, 0)


def test_one_parquet_file(tmp_path):
    write_parquet(tmp_path / "data.parquet", caption_column="caption")
    train, validation = load_captioned_data(None, str(tmp_path / "data.parquet"), "photo", "caption")
    assert (len(train), len(validation)) == (38, 2)
    check(train, 0)


@pytest.mark.parametrize("name", ["validation", "test"])
def test_a_folder_of_parquet_files_with_its_own_split(tmp_path, name):
    write_parquet(tmp_path / "train.parquet", 10)
    write_parquet(tmp_path / f"{name}.parquet", 4)
    train, validation = load_captioned_data(None, str(tmp_path), "photo", "text")
    assert (len(train), len(validation)) == (10, 4)
    check(validation, 3)


def test_bad_sources(tmp_path):
    with pytest.raises(ValueError, match="either `dataset_name` or `train_data_dir`"):
        load_captioned_data(None, None, "image", "text")
    with pytest.raises(ValueError, match="`train_data_dir='nowhere'` does not exist"):
        load_captioned_data(None, "nowhere", "image", "text")
    with pytest.raises(ValueError, match="`high_res_data_dir='nowhere'` does not exist"):
        check_data_dir("nowhere", "high_res_data_dir")
    (tmp_path / "data.jsonl").write_text("{}")
    with pytest.raises(
        ValueError, match="data.jsonl'` cannot be read: pass a file that ends in .parquet or .tar, or a"
    ):
        load_captioned_data(None, str(tmp_path / "data.jsonl"), "image", "text")
    (tmp_path / "data.jsonl").unlink()
    write_parquet(tmp_path / "train.parquet", 10)
    with pytest.raises(ValueError, match=r"`image_column='image'` is not in the train split.*\['photo', 'text'\]"):
        load_captioned_data(None, str(tmp_path), "image", "text")
    with pytest.raises(ValueError, match="`caption_column='caption'` is not in the train split"):
        load_captioned_data(None, str(tmp_path), "photo", "caption")
    with pytest.raises(ValueError, match="`image_column='text'` holds .* not images"):
        load_captioned_data(None, str(tmp_path), "text", "text")
    with pytest.raises(ValueError, match="`caption_column='photo'` holds .* not strings"):
        load_captioned_data(None, str(tmp_path), "photo", "photo")
    write_parquet(tmp_path / "one.parquet", 1)
    with pytest.raises(ValueError, match="fewer than two rows"):
        load_captioned_data(None, str(tmp_path / "one.parquet"), "photo", "text")


# ----------------------------------------------------------------------------------------------------------------------
# Splits, paths and layouts


def read_texts(folder, streaming=False, image="image", text="text", **selection) -> dict[str, list[str]]:
    """The captions of each split, sorted, once all of its images are opened."""
    splits = load_splits(None, str(folder), image, text, streaming=streaming, selection=Selection(**selection))
    texts = {}
    for name, split in splits.items():
        rows = list(split) if not streaming else [row for _, row in read_files(split)]
        for row in rows:
            open_image(row["image"])
        texts[name] = sorted(row["text"] for row in rows)
    return texts


def numbered(first: int, count: int) -> list[str]:
    return sorted(f"image number {i}" for i in range(first, first + count))


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_that_only_sound_like_splits_are_no_splits(tmp_path, streaming):
    for i, name in enumerate(("cats", "train_station", "test_photos", "regular", "cats/validation", "x-val", "Test")):
        write_image_folder(tmp_path / name, 3 + i)
    expected = sorted(text for i in range(7) for text in numbered(0, 3 + i))
    assert read_texts(tmp_path, streaming) == {"train": expected}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["images", "parquet", "parquet files"])
def test_folders_and_files_named_as_splits_are_splits(tmp_path, streaming, kind):
    for i, name in enumerate(("train", "val", "test", "regular")):
        if kind == "images":
            write_image_folder(tmp_path / name, 3 + i)
        elif kind == "parquet":
            (tmp_path / name).mkdir()
            write_parquet(tmp_path / name / "test.parquet", 3 + i)
        else:
            write_parquet(tmp_path / f"{name}.parquet", 3 + i)
    image = "image" if kind == "images" else "photo"
    trained = sorted(numbered(0, 3) + numbered(0, 6))  # `regular` is in no split, so it is trained on
    expected = {"train": trained, "validation": numbered(0, 4), "test": numbered(0, 5)}
    assert read_texts(tmp_path, streaming, image) == expected
    chosen = read_texts(tmp_path, streaming, image, train_split="regular", validation_split="test")
    assert chosen == {"train": numbered(0, 6), "validation": numbered(0, 5)}
    for argument in ("train_split", "validation_split"):
        with pytest.raises(ValueError, match=f"`{argument}='dogs'` is not in the data, whose splits are .*'train'"):
            read_texts(tmp_path, streaming, image, **{argument: "dogs"})


def test_the_numbered_files_of_a_split(tmp_path):
    """As the Hub stores them, in `data`. Other words before or after the name make it no split."""
    (tmp_path / "data").mkdir()
    names = (
        "data/train-00000-of-00002",
        "data/train-00001-of-00002",
        "data/test-00000-of-00001",
        "data/test-set",
        "a-val",
    )
    for i, name in enumerate(names):
        write_parquet(tmp_path / f"{name}.parquet", 1, first=i)
    texts = read_texts(tmp_path, image="photo")
    assert texts == {"train": [f"image number {i}" for i in (0, 1, 3, 4)], "test": ["image number 2"]}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "name", ["my [2024] images", "set [12]", "a::b", "a*", "what?", "[!x]", "{a,b}", "100%", "file:c", "~", "zip:a::b"]
)
def test_paths_are_literal(tmp_path, streaming, name):
    for other in ("set 1", "set 2", "ab", "whatx", "y", "a", "b"):
        write_image_folder(tmp_path / other, 2)
        write_parquet(tmp_path / other / "data.parquet", 2)
    write_image_folder(tmp_path / name, 5)
    (tmp_path / name / "004.png").rename(tmp_path / name / f"i{name}.png")
    metadata = tmp_path / name / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("004.png", f"i{name}.png"))
    assert read_texts(tmp_path / name, streaming) == {"train": numbered(0, 5)}
    (tmp_path / "p" / name).mkdir(parents=True)
    write_parquet(tmp_path / "three.parquet", 3)
    (tmp_path / "three.parquet").rename(tmp_path / "p" / name / f"{name}.parquet")
    assert read_texts(tmp_path / "p" / name, streaming, "photo") == {"train": numbered(0, 3)}
    assert read_texts(tmp_path / "p" / name / f"{name}.parquet", streaming, "photo") == {"train": numbered(0, 3)}
    (tmp_path / "t" / name).mkdir(parents=True)
    write_tar(tmp_path / "t" / name / "data.tar", ["png"] * 3)
    assert read_texts(tmp_path / "t" / name, streaming, "png", "txt") == {"train": numbered(0, 3)}


@pytest.mark.parametrize("streaming", [False, True])
def test_text_files_beside_images(tmp_path, streaming):
    for folder in ("", "sub", "sub/sub", "validation"):
        (tmp_path / folder).mkdir(exist_ok=True)
    places = ["1.png", "sub/1.png", "sub/sub/1.JPG", "sub/sub/1.x.png", "validation/1.png"]
    for i, (place, suffix) in enumerate(zip(places, (".txt", ".caption", ".txt", ".TXT", ".txt"))):
        path = tmp_path / place
        make_image(i).save(path)
        path.with_suffix(suffix).write_bytes(
            f"\n image number {i}, schön\r\n".encode("cp1252" if i == 2 else "utf-8-sig")
        )
    (tmp_path / "README.txt").write_text("not a caption")
    expected = [f"image number {i}, schön" for i in range(5)]
    assert read_texts(tmp_path, streaming) == {"train": expected[:4], "validation": expected[4:]}


def test_an_image_without_a_text_file_among_others_is_broken(tmp_path):
    for i in range(4):
        make_image(i).save(tmp_path / f"{i}.png")
        if i != 2:
            (tmp_path / f"{i}.txt").write_text(f"image number {i}")
    rows, _ = load_captioned_data(None, str(tmp_path), "image", "text", hold_out=False)
    images = CaptionedImages(rows, 16, broken=BrokenRows(tmp_path / "broken.jsonl"))
    assert sorted(images.captions) == [f"image number {i}" for i in (0, 1, 3)]
    assert "2.png" in images.broken.path.read_text() and "no caption" in images.broken.path.read_text()


def test_metadata_and_text_files_in_one_folder(tmp_path):
    """Images in a folder with metadata have their captions there; others have text files."""
    write_image_folder(tmp_path / "a", 3)
    (tmp_path / "a" / "000.txt").write_text("another caption")
    (tmp_path / "b").mkdir()
    make_image(7).save(tmp_path / "b" / "7.png")
    (tmp_path / "b" / "7.txt").write_text("image number 7")
    assert read_texts(tmp_path) == {"train": [*numbered(0, 3), "image number 7"]}


@pytest.mark.parametrize("streaming", [False, True])
def test_the_layouts_are_shown_if_there_are_no_captions(tmp_path, streaming):
    layouts = r"[^$]*1\.txt or 1\.caption[^$]*metadata\.jsonl[^$]*\"file_name\": \"1\.png\"[^$]*parquet files"
    (tmp_path / "sub").mkdir()
    with pytest.raises(ValueError, match=r"holds nothing that can be read\. These layouts work:" + layouts):
        load_splits(None, str(tmp_path), "image", "text", streaming=streaming)
    make_image(0).save(tmp_path / "sub" / "1.png")
    with pytest.raises(ValueError, match=r"holds 1 images without captions\. These layouts work:" + layouts):
        load_splits(None, str(tmp_path), "image", "text", streaming=streaming)
    (tmp_path / "sub" / "1.txt").write_text("a caption")
    write_parquet(tmp_path / "data.parquet", 2)
    with pytest.raises(ValueError, match="holds images with captions as well as parquet files"):
        load_splits(None, str(tmp_path), "image", "text", streaming=streaming)


# ----------------------------------------------------------------------------------------------------------------------
# Several captions per image


def write_captions(folder, kind: str, count: int = 40, captions: int = 5):
    """Several captions for each image, "caption k of i": as rows of one file or of its bytes, or as lists."""
    folder.mkdir()
    rows = [(i, k) for k in range(captions) for i in range(count)]
    names = {(i, k): f"{i}.png" if k else f"./{i}.png" for i, k in rows}
    if kind == "files":
        for (i, _), name in names.items():
            make_image(i).save(folder / name)
        lines = [{"file_name": names[row], "text": f"caption {row[1]} of {row[0]}"} for row in rows]
    elif kind == "lists":
        for i in range(count):
            make_image(i).save(folder / f"{i}.png")
        lines = [
            {"file_name": f"{i}.png", "text": [f"caption {k} of {i}" for k in range(captions)]} for i in range(count)
        ]
    else:
        write_rows(
            folder / "data.parquet", [(make_image(i), f"caption {k} of {i}") for i, k in rows], image_column="image"
        )
        return folder
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", ["files", "bytes", "lists"])
def test_rows_that_share_an_image_are_one_image(tmp_path, kind):
    folder = write_captions(tmp_path / "data", kind)
    train, validation = (CaptionedImages(rows, 32) for rows in load_captioned_data(None, str(folder), "image", "text"))
    assert (len(train), len(validation)) == (38, 2)
    numbers = []
    for images in (train, validation):
        for i in range(len(images)):
            number = int(images.captions[i].split()[-1])
            numbers.append(number)
            assert sorted(images.caption_lists[i]) == [f"caption {k} of {number}" for k in range(5)]
            assert images[i]["caption"] == images.captions[i]
            assert {images[i, (0, visit)]["caption"] for visit in range(60)} == {*images.caption_lists[i]}
            assert np.array_equal(images[i]["pixel_values"].permute(1, 2, 0), make_image(number))
    assert sorted(numbers) == list(range(40))
    chosen = train.select(np.array([3, 1]))
    assert chosen.caption_lists == [train.caption_lists[3], train.caption_lists[1]]
    assert chosen.all_captions == train.caption_lists[3] + train.caption_lists[1]


def test_different_images_of_one_length_are_not_joined(tmp_path):
    same_end = [
        (Image.fromarray(np.concatenate([np.array(make_image(i)), np.zeros((9, 32, 3), np.uint8)]))) for i in range(8)
    ]
    write_rows(tmp_path / "data.parquet", [(to_bytes(image.transpose(1), "BMP"), "a caption") for image in same_end])
    rows, _ = load_captioned_data(None, str(tmp_path), "photo", "text", hold_out=False)
    assert len(rows) == 8 and list(rows["text"]) == ["a caption"] * 8


def test_broken_captions_of_several_are_left_out(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    lines = []
    for i, text in enumerate((["good", " ", None, "x" * 6000, "good", "better"], [], [" "], ["fine"])):
        make_image(i).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    rows, _ = load_captioned_data(None, str(folder), "image", "text", hold_out=False)
    images = CaptionedImages(rows, 16, broken=BrokenRows(tmp_path / "broken.jsonl"))
    assert images.caption_lists == [["good", "better"], ["fine"]]
    assert len(images.broken.path.read_text().splitlines()) == 5


# ----------------------------------------------------------------------------------------------------------------------
# Data of others


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_save_to_disk(tmp_path, streaming):
    write_parquet(tmp_path / "train.parquet", 4)
    rows = Dataset.from_parquet(str(tmp_path / "train.parquet"))
    rows.save_to_disk(tmp_path / "saved", num_shards=2)
    (tmp_path / "saved").rename(tmp_path / "a::b [1]")
    assert read_texts(tmp_path / "a::b [1]", streaming, "photo") == {"train": numbered(0, 4)}
    DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "splits")
    expected = {"train": numbered(0, 4), "test": numbered(1, 1)}
    assert read_texts(tmp_path / "splits", streaming, "photo") == expected


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["data", "i::j"])
def test_parquet_files_of_bytes(tmp_path, streaming, name):
    files = [to_bytes(make_image(i)) for i in range(3)]
    for kind, images in (
        ("bytes", files),
        ("struct", [{"bytes": file, "path": "x.png"} for file in files]),
        ("turned", [{"path": "x.png", "bytes": file} for file in files]),
        ("only bytes", [{"bytes": file} for file in files]),
    ):
        path = tmp_path / f"{name} {kind}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"image": images, "text": numbered(0, 3)}), path)
        assert read_texts(path, streaming) == {"train": numbered(0, 3)}, kind


@pytest.mark.parametrize("streaming", [False, True])
def test_tars_of_images_with_different_extensions(tmp_path, streaming):
    write_tar(tmp_path / "data.tar", ["jpg", "png", "webp", "jpg"])
    for image, text in (("jpg", "txt"), ("webp", "txt"), ("image", "text")):
        assert read_texts(tmp_path / "data.tar", streaming, image, text) == {"train": numbered(0, 4)}
    with pytest.raises(ValueError, match=r"`caption_column='json'` is not in the train split, .*'txt'"):
        read_texts(tmp_path / "data.tar", streaming, "jpg", "json")
    write_tar(tmp_path / "data.tar", ["png"] * 6)  # a changed file is read again
    assert read_texts(tmp_path / "data.tar", streaming, "jpg", "txt") == {"train": numbered(0, 6)}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_metadata_in_csv(tmp_path, streaming, encoding, separator):
    captions = ["None", "NA", "null", "nan", "schön, ja", 'sie sagt ""ja""; nein', "12", "two\nlines"]
    lines = [separator.join(("file_name", "text"))]
    for i, caption in enumerate(captions):
        make_image(i).save(tmp_path / f"{i}.png")
        lines.append(f'{i}.png{separator}"{caption}"')
    (tmp_path / "metadata.csv").write_bytes("\r\n".join(lines).encode(encoding))
    expected = sorted(caption.replace('""', '"') for caption in captions)
    assert read_texts(tmp_path, streaming) == {"train": expected}


@pytest.mark.parametrize("streaming", [False, True])
def test_absolute_paths_and_other_columns_in_metadata(tmp_path, streaming):
    (tmp_path / "images" / "sub").mkdir(parents=True)
    (tmp_path / "meta").mkdir()
    names = [str(tmp_path / "images" / "0.png"), "../images/1.png", "..\\images\\sub\\2.png"]
    for i, place in enumerate(("0.png", "1.png", "sub/2.png")):
        make_image(i).save(tmp_path / "images" / place)
    rows = [{"photo_file_name": name, "words": f"image number {i}", "n": i} for i, name in enumerate(names)]
    (tmp_path / "meta" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert read_texts(tmp_path / "meta", streaming, "photo", "words") == {"train": numbered(0, 3)}
    with pytest.raises(ValueError, match=r"`image_column='image'` is not in the train.*\['photo', 'words', 'n'\]"):
        read_texts(tmp_path / "meta", streaming)
    with pytest.raises(ValueError, match="`caption_column='n'` holds int, not strings"):
        read_texts(tmp_path / "meta", streaming, "photo", "n")
    (tmp_path / "meta" / "metadata.jsonl").write_text('{"photo_file_name": "1.png"}\n{"photo')
    with pytest.raises(ValueError, match="line 2 of .*metadata.jsonl is not a JSON object"):
        read_texts(tmp_path / "meta", streaming)


# ----------------------------------------------------------------------------------------------------------------------
# Images


def test_a_warning_of_enlarged_images_comes_once(recwarn):
    warn_of_small_images.cache_clear()
    file = io.BytesIO()
    Image.new("RGB", (90, 60)).save(file, format="PNG")
    for size in (32, 60, 64, 64):
        to_pixel_values(open_image({"bytes": file.getvalue(), "path": None}), size)
    assert ["less than 64 x 64 pixels" in str(warning.message) for warning in recwarn.list] == [True]


def test_images_are_cropped_scaled_and_upright():
    wide = Image.new("RGB", (90, 30), "red")
    wide.paste("blue", (30, 0, 60, 30))
    pixels = to_pixel_values(wide, 16)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.uint8
    assert (pixels[2] > 200).all() and (pixels[0] < 50).all()  # the center

    same = to_pixel_values(make_image(0), 32)
    assert np.array_equal(same.permute(1, 2, 0).numpy(), make_image(0))

    transparent = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert (to_pixel_values(transparent, 16) == 255).all()
    palette = make_image(1).convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert (to_pixel_values(palette, 32)[:, 0, 0] == 255).all()
    assert to_pixel_values(Image.new("L", (20, 20), 7), 16).shape == (3, 16, 16)

    turned = Image.new("RGB", (32, 32), "white")
    turned.paste("black", (0, 0, 32, 16))  # the upper half
    exif = turned.getexif()
    exif[0x0112] = 3  # turned by 180 degrees
    buffer = io.BytesIO()
    turned.save(buffer, format="PNG", exif=exif)
    assert (to_pixel_values(Image.open(buffer), 32)[:, :16] == 255).all()


def test_captioned_images(tmp_path):
    train, _ = load_captioned_data(None, str(write_image_folder(tmp_path / "a")), "image", "text")
    cached, uncached = CaptionedImages(train, 16), CaptionedImages(train, 16, max_cache_bytes=0)
    assert len(cached) == 38
    few = CaptionedImages(train, 16, max_cache_bytes=2 * 3 * 16**2).select(np.array([5, 1]))
    assert few.cache is not None and uncached.select(np.array([5])).cache is None
    for _ in range(2):  # the second time from memory
        for i in (0, 7):
            assert torch.equal(cached[i]["pixel_values"], uncached[i]["pixel_values"])
            assert cached[i]["caption"] == uncached[i]["caption"] == train[i]["text"]


def test_broken_rows_are_left_out_and_named(tmp_path):
    """A row whose image is broken is replaced by the next one; a row whose caption is broken is left out."""
    rows = [(image, caption) for image, caption, _ in BROKEN.values()]
    write_rows(tmp_path / "train.parquet", rows + [(make_image(i), f"image number {i}") for i in range(5)])
    write_parquet(tmp_path / "test.parquet", 2)
    train, _ = load_captioned_data(None, str(tmp_path), "photo", "text")
    broken = BrokenRows(tmp_path / "broken.jsonl", max_share=0.02)
    images = CaptionedImages(train, 16, broken=broken)
    assert len(images) == len(BROKEN) + 5 - 3
    for _ in range(2):
        for i in range(len(images)):
            example = images[i]
            number = max(0, i - len(BROKEN) + 3)
            assert example["caption"] == f"image number {number}"
            assert torch.equal(example["pixel_values"], to_pixel_values(make_image(number), 16))
    lines = {line["row"]: line["reason"] for line in map(json.loads, broken.path.read_text().splitlines())}
    assert broken.found() == len(lines) == len(BROKEN)
    for kind, (_, caption, reason) in BROKEN.items():
        (said,) = [lines[row] for row in lines if row.endswith(repr((caption or "")[:80]))]
        assert reason in said, kind

    few = CaptionedImages(
        train, 16, broken=BrokenRows(max_share=0.004)
    )  # 4 of 1000 rows may be broken; 3 captions are
    with pytest.raises(ValueError, match="5 of 5 rows read are broken, which is beyond `max_broken_share=0.004`"):
        few[0]
    with pytest.raises(ValueError, match="1 of 15 rows read are broken.* The last one is row .*: the caption"):
        CaptionedImages(train, 16, broken=BrokenRows(max_share=0))


def test_the_share_of_broken_images():
    """Each row counts once: 24 broken rows of 1500 are more than 1 %."""
    good = to_bytes(make_image(0, size=2))
    images = CaptionedImages(make_rows([b"broken" if i % 62 == 61 else good for i in range(1500)]), 2)
    with pytest.raises(ValueError, match=r"1\d of \d+ rows read are broken, which is beyond `max_broken_share=0.01`"):
        for i in range(1500):
            images[i]


def test_no_image_of_a_shape_can_be_read(tmp_path):
    images = CaptionedImages(make_rows([b"broken"] * 3), 16, broken=BrokenRows(tmp_path / "broken_rows.jsonl"))
    message = (
        "no readable image among the 3 of the shape 16 x 16: repair the data, whose broken rows .*broken_rows.jsonl"
    )
    with pytest.raises(ValueError, match=message):
        images[1]
    assert images.broken.found() == 3


def write_shapes_of_images(path, count: int = 24):
    """Writes square, wide and high images in turn."""
    shapes = ((32, 32), (32, 16), (16, 40))
    write_rows(path, [(make_image(i).resize(shapes[i % 3]), f"image number {i}") for i in range(count)])


def test_images_of_several_shapes(tmp_path, monkeypatch):
    write_shapes_of_images(tmp_path / "data.parquet")
    train, _ = load_captioned_data(None, str(tmp_path / "data.parquet"), "photo", "text")
    images = CaptionedImages(train, 16, [(16, 16), (8, 16), (24, 8)])
    for i in range(len(images)):
        kind = int(images.captions[i].split()[-1]) % 3
        assert images.shapes[i] == kind
        assert images[i]["pixel_values"].shape == (3, *[(16, 16), (8, 16), (24, 8)][kind])
    assert images.at(8)[int(np.flatnonzero(images.shapes == 2)[0])]["pixel_values"].shape == (3, 12, 4)
    lying = make_image(0).resize((32, 16))
    exif = lying.getexif()
    exif[0x0112] = 6  # turned by 90 degrees, so the image is high
    buffer = io.BytesIO()
    lying.save(buffer, format="PNG", exif=exif)
    write_rows(tmp_path / "lying.parquet", [(buffer.getvalue(), "high")] * 2)
    train, _ = load_captioned_data(None, str(tmp_path / "lying.parquet"), "photo", "text")
    images = CaptionedImages(train, 16, [(8, 16), (16, 8)])
    assert images.shapes[0] == 1 and images[0]["pixel_values"].shape == (3, 16, 8)
    with (
        monkeypatch.context() as patch
    ):  # the header is enough: decoding all images of a large dataset would take hours
        patch.setattr(PngImageFile, "load", None)
        assert CaptionedImages(train, 16, [(8, 16), (16, 8)]).shapes.tolist() == [1] * len(train)
    lying.save(buffer := io.BytesIO(), format="PNG", exif=b"garbage")
    write_rows(tmp_path / "damaged.parquet", [(buffer.getvalue(), "damaged"), (lying, "wide"), (lying, "wide")])
    rows, _ = load_captioned_data(None, str(tmp_path / "damaged.parquet"), "photo", "text", hold_out=False)
    images = CaptionedImages(rows, 16, [(8, 16), (16, 8)])
    assert images[0]["caption"] == "wide" and images.broken.broken == 1


def test_steps_have_one_shape_and_epochs_every_row():
    shapes = np.array([0, 1, 2] * 8)
    batches = list(BucketOrder(shapes, 2, 2, start=0, num_steps=18, seed=(0, 1)))
    assert len(batches) == 36 and all(len(batch) == 2 for batch in batches)
    for first, second in zip(batches[::2], batches[1::2]):
        assert len({*shapes[first], *shapes[second]}) == 1
    counts = np.bincount(sum(batches, []))
    assert len(counts) == 24 and counts.min() >= 2 and counts.max() <= 4 and counts.sum() == 72
    for start in (1, 7, 17):
        order = BucketOrder(shapes, 2, 2, start=start, num_steps=18 - start, seed=(0, 1))
        assert len(order) == 36 - 2 * start and list(order) == batches[2 * start :]


def test_the_core_sees_what_a_grown_model_pools():
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    large = normalize(pixels, 1)
    assert large.min() == -1 and large.max() == 1
    torch.testing.assert_close(normalize(pixels, 4), pool(large, 4))


# ----------------------------------------------------------------------------------------------------------------------
# Colours


def make_profile(primaries: dict[str, tuple[float, ...]], gamma: float | None = None) -> bytes:
    """An ICC profile with sRGB's tags but other primaries (D50) and, with `gamma`, another curve."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for i in range(struct.unpack(">I", profile[128:132])[0]):
        tag, offset, _ = struct.unpack(">4sII", profile[132 + 12 * i : 144 + 12 * i])
        if tag.decode() in primaries:
            values = (round(value * 65536) for value in primaries[tag.decode()])
            profile[offset + 8 : offset + 20] = struct.pack(">3i", *values)
        if gamma is not None and tag in (b"rTRC", b"gTRC", b"bTRC"):
            curve = struct.pack(">4s4xHHi", b"para", 0, 0, round(gamma * 65536))
            profile[offset : offset + len(curve)] = curve
    return bytes(profile)


DISPLAY_P3 = make_profile(
    {"rXYZ": (0.51512, 0.24120, -0.00105), "gXYZ": (0.29198, 0.69225, 0.04189), "bXYZ": (0.15710, 0.06657, 0.78407)}
)
ADOBE_RGB = make_profile(
    {"rXYZ": (0.60974, 0.31111, 0.01947), "gXYZ": (0.20528, 0.62567, 0.06087), "bXYZ": (0.14919, 0.06322, 0.74457)},
    gamma=2.19922,
)
GREEN = (40, 160, 60)


def write_wide(profile: bytes, format: str = "PNG", mode: str = "RGB", **options) -> bytes:
    """The file of a green image whose colours are written by a profile."""
    srgb, opened = ImageCms.createProfile("sRGB"), ImageCms.ImageCmsProfile(io.BytesIO(profile))
    wide = ImageCms.profileToProfile(Image.new("RGB", (64, 64), GREEN), srgb, opened)
    assert np.abs(np.array(wide)[0, 0].astype(int) - GREEN).max() > 20
    buffer = io.BytesIO()
    wide = wide.convert(mode, palette=Image.Palette.ADAPTIVE)  # without dithering
    wide.save(buffer, format=format, icc_profile=profile, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("profile", [DISPLAY_P3, ADOBE_RGB], ids=["display p3", "adobe rgb"])
@pytest.mark.parametrize(
    "kind",
    [
        {"format": "JPEG", "quality": 100, "subsampling": 0},
        {},
        {"mode": "RGBA"},
        {"mode": "P"},
        {"format": "WEBP", "lossless": True},
    ],
    ids=["jpeg", "png", "transparency", "palette", "webp"],
)
def test_colour_profiles_are_converted(profile, kind):
    images = CaptionedImages(make_rows([write_wide(profile, **kind)] * 2), 16)
    pixels = images[0]["pixel_values"].int()
    assert (pixels - torch.tensor(GREEN)[:, None, None]).abs().max() <= 3 and not images.broken.ignored


def test_transparent_parts_are_white_behind_a_profile():
    image = Image.open(io.BytesIO(write_wide(DISPLAY_P3, mode="RGBA")))
    image.putalpha(Image.new("L", image.size, 0))
    image.info["icc_profile"] = DISPLAY_P3
    assert (to_pixel_values(image, 16) == 255).all()


def test_gray_images_with_profiles():
    """The profile of colours that was left in a gray image says what the gray is."""
    gray = Image.new("L", (16, 16), 100)
    for profile, expected in ((DISPLAY_P3, 100), (ADOBE_RGB, 99)):
        gray.info["icc_profile"] = profile
        assert abs(int(to_pixel_values(gray, 16)[0, 0, 0]) - expected) <= 1
        assert int(to_pixel_values(gray, 16).float().std(dim=0).max()) == 0


def test_images_in_srgb_stay_as_they_are():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = make_image(0)
    image.info["icc_profile"] = srgb
    assert np.array_equal(to_pixel_values(image, 32).permute(1, 2, 0).numpy(), make_image(0))


def test_broken_profiles_are_ignored_and_counted(tmp_path):
    profiles = [b"garbage", DISPLAY_P3[:200], b"\0" * 500, DISPLAY_P3]
    files = []
    for profile in profiles:
        make_image(0).save(buffer := io.BytesIO(), format="PNG", icc_profile=profile)
        files.append(buffer.getvalue())
    cmyk = make_image(0).convert("CMYK")
    cmyk.save(buffer := io.BytesIO(), format="JPEG", icc_profile=DISPLAY_P3)  # of other colours than the image
    images = CaptionedImages(make_rows([*files, buffer.getvalue()]), 32, broken=BrokenRows(tmp_path / "rows.jsonl"))
    with pytest.warns(UserWarning, match="row 0 of 5.* a color profile that cannot be used"):
        pixels = [images[i]["pixel_values"] for i in range(5)]
    assert all(np.array_equal(pixels[i].permute(1, 2, 0), make_image(0)) for i in range(3))
    assert images.broken.ignored == images.broken.found("ignored") == 4
    assert images.broken.broken == images.broken.found() == 0


# ----------------------------------------------------------------------------------------------------------------------
# Large images


def test_large_photos_are_decoded_small(tmp_path):
    """102 megapixels, which PIL only warns of, are decoded at a fraction of their size."""
    photo = Image.new("RGB", (11_648, 8_736), (200, 50, 50))
    photo.paste((50, 50, 200), (0, 0, 11_648, 4_368))
    photo.save(tmp_path / "photo.jpg", quality=60)
    del photo
    decoded = open_image({"bytes": None, "path": str(tmp_path / "photo.jpg")}, 64)
    assert decoded.width * decoded.height < 4e6 and min(decoded.size) >= 128
    rows = make_rows([(tmp_path / "photo.jpg").read_bytes()] * 2)
    images = CaptionedImages(rows, 64, [(64, 64), (48, 64)])
    assert images.shapes.tolist() == [1, 1]  # read from the header
    pixels = images[0]["pixel_values"]
    assert (pixels[2, :20] > 180).all() and (pixels[0, 28:] > 180).all() and not images.broken.broken


def test_the_limit_of_pixels_can_be_moved():
    with pytest.raises(BrokenRow, match="20000 x 10000 pixels.* raise `max_image_pixels=178956970`"):
        open_image({"bytes": make_bomb(), "path": None})
    with pytest.raises(BrokenRow, match="truncated"):  # opened, and found to be only a header
        open_image({"bytes": make_bomb(), "path": None}, max_image_pixels=200_000_000)
    images = CaptionedImages(make_rows([to_bytes(make_image(0))] * 2), 16, max_image_pixels=32 * 32 - 1)
    with pytest.raises(ValueError, match="no readable image"):
        images[0]
    assert Image.MAX_IMAGE_PIXELS is not None


def test_gray_images_of_16_bits():
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)[None].repeat(256, axis=0)
    pixels = CaptionedImages(make_rows([to_bytes(Image.fromarray(ramp))] * 2), 256)[0]["pixel_values"]
    assert torch.equal(pixels, torch.arange(256, dtype=torch.uint8).expand(3, 256, 256))


# ----------------------------------------------------------------------------------------------------------------------
# Order and noise


def test_every_epoch_shows_every_row_once_in_its_own_order():
    order = list(EpochOrder(10, 0, 35, (0, 1)))
    assert len(order) == 35
    epochs = [order[:10], order[10:20], order[20:30]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(EpochOrder(10, 0, 35, (0, 2))) != order


@pytest.mark.parametrize("start", [1, 10, 17, 34, 35])
def test_the_order_resumes_where_it_stopped(start):
    order = list(EpochOrder(10, 0, 35, (3,)))
    sampler = EpochOrder(10, start, 35 - start, (3,))
    assert len(sampler) == 35 - start and list(sampler) == order[start:]


def test_noise_depends_on_the_place_in_the_global_batch_only():
    def draw(key, first, count):
        return [torch.randn(4, generator=generator) for generator in sample_generators(key, first, count)]

    batch = draw((0, 1, 2), 0, 8)
    halves = draw((0, 1, 2), 0, 4) + draw((0, 1, 2), 4, 4)
    assert all(torch.equal(a, b) for a, b in zip(batch, halves))
    assert len({tuple(noise.tolist()) for noise in batch + draw((0, 1, 3), 0, 8) + draw((1, 1, 2), 0, 8)}) == 24
