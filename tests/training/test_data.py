# Copyright 2026 The diffusers-greedy-grow authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

import io
import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from diffusers_greedy_grow.flow import pool
from diffusers_greedy_grow.training import (
    CaptionedPictures,
    EpochOrder,
    build_small_text_encoder,
    load_captioned_data,
    normalize,
    sample_generators,
    train_small_tokenizer,
)
from diffusers_greedy_grow.training.data import to_pixel_values


def make_image(i: int, size: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (size, size, 3)).astype(np.uint8))


def write_image_folder(folder, count: int = 40):
    folder.mkdir()
    lines = []
    for i in range(count):
        make_image(i).save(folder / f"{i:03}.png")
        lines.append(json.dumps({"file_name": f"{i:03}.png", "text": f"picture number {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def write_parquet(path, count: int = 40, caption_column: str = "text"):
    rows = {"picture": [], caption_column: []}
    for i in range(count):
        buffer = io.BytesIO()
        make_image(i).save(buffer, format="PNG")
        rows["picture"].append({"bytes": buffer.getvalue(), "path": None})
        rows[caption_column].append(f"picture number {i}")
    features = Features({"picture": ImageFeature(), caption_column: Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(path)


# ----------------------------------------------------------------------------------------------------------------------
# Loading


def check(rows, i):
    assert set(rows.column_names) == {"image", "text"}
    number = int(rows[i]["text"].split()[-1])
    assert np.array_equal(rows[i]["image"], make_image(number))


def test_image_folder(tmp_path):
    folder = write_image_folder(tmp_path / "pictures")
    train, validation = load_captioned_data(None, str(folder), "image", "text")
    assert (len(train), len(validation)) == (38, 2)
    assert not set(train["text"]) & set(validation["text"])
    check(train, 5)
    check(validation, 1)
    again, _ = load_captioned_data(None, str(folder), "image", "text")
    assert again["text"] == train["text"]


def test_one_parquet_file(tmp_path):
    write_parquet(tmp_path / "data.parquet", caption_column="caption")
    train, validation = load_captioned_data(None, str(tmp_path / "data.parquet"), "picture", "caption")
    assert (len(train), len(validation)) == (38, 2)
    check(train, 0)


@pytest.mark.parametrize("name", ["validation", "test"])
def test_a_folder_of_parquet_files_with_its_own_split(tmp_path, name):
    write_parquet(tmp_path / "train.parquet", 10)
    write_parquet(tmp_path / f"{name}.parquet", 4)
    train, validation = load_captioned_data(None, str(tmp_path), "picture", "text")
    assert (len(train), len(validation)) == (10, 4)
    check(validation, 3)


def test_bad_sources(tmp_path):
    with pytest.raises(ValueError, match="either `dataset_name` or `train_data_dir`"):
        load_captioned_data(None, None, "image", "text")
    with pytest.raises(ValueError, match="`train_data_dir='nowhere'` does not exist"):
        load_captioned_data(None, "nowhere", "image", "text")
    write_parquet(tmp_path / "train.parquet", 10)
    with pytest.raises(ValueError, match=r"`image_column='image'` is not in the train split.*\['picture', 'text'\]"):
        load_captioned_data(None, str(tmp_path), "image", "text")
    with pytest.raises(ValueError, match="`caption_column='caption'` is not in the train split"):
        load_captioned_data(None, str(tmp_path), "picture", "caption")
    with pytest.raises(ValueError, match="`image_column='text'` holds .* not images"):
        load_captioned_data(None, str(tmp_path), "text", "text")
    with pytest.raises(ValueError, match="`caption_column='picture'` holds .* not strings"):
        load_captioned_data(None, str(tmp_path), "picture", "picture")
    write_parquet(tmp_path / "one.parquet", 1)
    with pytest.raises(ValueError, match="fewer than two rows"):
        load_captioned_data(None, str(tmp_path / "one.parquet"), "picture", "text")


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def test_pictures_are_cropped_scaled_and_upright():
    wide = Image.new("RGB", (90, 30), "red")
    wide.paste("blue", (30, 0, 60, 30))
    pixels = to_pixel_values(wide, 16)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.uint8
    assert (pixels[2] > 200).all() and (pixels[0] < 50).all()  # the centre

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


def test_captioned_pictures(tmp_path):
    train, _ = load_captioned_data(None, str(write_image_folder(tmp_path / "a")), "image", "text")
    cached, uncached = CaptionedPictures(train, 16), CaptionedPictures(train, 16, max_cache_bytes=0)
    assert len(cached) == 38
    for _ in range(2):  # the second time from memory
        for i in (0, 7):
            assert torch.equal(cached[i]["pixel_values"], uncached[i]["pixel_values"])
            assert cached[i]["caption"] == uncached[i]["caption"] == train[i]["text"]


def test_a_row_without_a_caption_is_named():
    image = {"bytes": None, "path": "not read.png"}
    features = Features({"image": ImageFeature(), "text": Value("string")})
    rows = Dataset.from_dict({"image": [image, image], "text": ["a caption", None]}, features=features)
    with pytest.raises(ValueError, match="Row 1 has no caption"):
        CaptionedPictures(rows, 16)


def test_the_core_sees_what_a_grown_model_pools():
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    large = normalize(pixels, 1)
    assert large.min() == -1 and large.max() == 1
    torch.testing.assert_close(normalize(pixels, 4), pool(large, 4))


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
def test_the_order_goes_on_where_it_was_left(start):
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


# ----------------------------------------------------------------------------------------------------------------------
# Text


def test_small_text_encoder(tmp_path):
    captions = ["a large Red circle", "a small blue square, both above a ring", "übergroß 🎉"]
    tokenizer = train_small_tokenizer(captions, vocab_size=400)
    for text in [*captions, "zebra-crossing 日本"]:
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text.lower()
    assert len(tokenizer("a large red circle")["input_ids"]) == 5  # a word each
    assert len(tokenizer("")["input_ids"]) == 1  # an empty caption is not empty to the model
    encoder = build_small_text_encoder(tokenizer, hidden_size=64, num_layers=1).eval()
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    hidden_states = encoder(tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
    assert hidden_states.shape == (*tokens["input_ids"].shape, 64)
    encoder.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again(captions)["input_ids"] == tokenizer(captions)["input_ids"]
