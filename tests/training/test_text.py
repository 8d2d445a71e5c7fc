# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

import contextlib
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, PartialState
from datasets import Dataset

from diffusers_greedy_grow import GreedyGrowPipeline
from diffusers_greedy_grow.training.arguments import DataArguments
from diffusers_greedy_grow.training.data.captioned import CaptionedImages
from diffusers_greedy_grow.training.data.loading import TrainingData, load_training_data
from diffusers_greedy_grow.training.data.rows import BrokenRows
from diffusers_greedy_grow.training.data.streaming import StreamedImages, load_captioned_stream
from diffusers_greedy_grow.training.text import embeddings as embeddings_module
from diffusers_greedy_grow.training.text.captions import (
    CaptionEncoder,
    encode_captions,
    run_text_encoder,
    tokenize_captions,
    warn_of_truncated_captions,
)
from diffusers_greedy_grow.training.text.embeddings import TextEmbeddings, embed_captions, name_encoder
from diffusers_greedy_grow.training.text.small_encoder import build_small_text_encoder, train_small_tokenizer

from ..data_utils import make_image, write_parquet, write_rows
from ..pipelines.test_foreign_pipelines import make_if
from ..testing_utils import CAPTIONS, make_pipeline


# ----------------------------------------------------------------------------------------------------------------------
# The small text encoder


def test_small_text_encoder(tmp_path):
    captions = ["a large Red circle", "a small blue square, both above a ring", "übergroß 🎉"]
    tokenizer = train_small_tokenizer(captions, vocab_size=400)
    for text in [*captions, "zebra-crossing 日本"]:
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text.lower()
    assert len(tokenizer("a large red circle")["input_ids"]) == 5  # a token per word, and the end
    assert len(tokenizer("")["input_ids"]) == 1  # an empty caption has a token, too
    encoder = build_small_text_encoder(tokenizer, hidden_size=64, num_layers=1).eval()
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    hidden_states = encoder(tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
    assert hidden_states.shape == (*tokens["input_ids"].shape, 64)
    encoder.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again(captions)["input_ids"] == tokenizer(captions)["input_ids"]


def test_the_text_encoder_gets_a_mask_that_it_need_not_read():
    """The embeddings are those of the usual mask, bit for bit, with padding and without."""
    tokenizer = train_small_tokenizer(CAPTIONS)
    encoder = build_small_text_encoder(tokenizer, hidden_size=64).eval()
    assert encoder.config._attn_implementation == "sdpa"
    masks = []
    encoder.encoder.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    for captions in (CAPTIONS, CAPTIONS[:1]):
        tokens = tokenizer(captions, padding=True, return_tensors="pt")
        expected = encoder(tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        actual = run_text_encoder(encoder, tokens["input_ids"], tokens["attention_mask"].bool())
        assert torch.equal(actual, expected) and masks[-1].ndim == 4


def test_words_outweigh_what_is_around_them():
    """In a new small text encoder, so that stages find words that the core learns nothing from, such as textures."""
    colors, textures, shapes = ("red", "blue", "green"), ("plain", "dotted", "striped"), ("circle", "star", "ring")
    captions = [f"a {a} {b} {c}" for a in colors for b in textures for c in shapes]
    tokenizer = train_small_tokenizer(captions)
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    torch.manual_seed(0)
    with torch.no_grad():
        hidden_states = build_small_text_encoder(tokenizer)(**tokens).last_hidden_state
    textured = hidden_states[:, 2].reshape(3, 3, 3, -1)  # by color, texture and shape
    words = textured.mean(dim=(0, 2), keepdim=True)
    between = (words - words.mean(dim=1, keepdim=True)).square().sum(dim=-1).mean()
    within = (textured - words).square().sum(dim=-1).mean()
    assert within < 0.1 * between


# ----------------------------------------------------------------------------------------------------------------------
# Captions


def test_a_warning_of_truncated_captions_comes_before_training_and_not_in_each_step(recwarn):
    pipeline, long = make_pipeline(), "a red circle " * 50
    encoded = encode_captions(pipeline, pipeline.text_encoder, [long, CAPTIONS[0]], torch.device("cpu"))
    assert encoded["encoder_hidden_states"].shape[1] == pipeline.config.max_sequence_length
    warn_of_truncated_captions(pipeline, CAPTIONS)
    assert not recwarn.list
    warn_of_truncated_captions(pipeline, [*CAPTIONS, long])
    (warning,) = recwarn.list
    assert f"1 of {len(CAPTIONS) + 1} captions are longer than the `max_sequence_length=24` tokens" in str(
        warning.message
    )


def test_each_way_of_encoding_captions(tmp_path):
    """Tokens for an encoder that trains, the output of a frozen encoder, or its cached output."""
    pipeline, device = make_pipeline(), torch.device("cpu")
    captions = ["", CAPTIONS[2]]
    tokens = CaptionEncoder(pipeline, device, trains=True)(captions)
    assert list(tokens) == ["input_ids", "encoder_attention_mask"]
    assert all(
        torch.equal(tokens[name], value) for name, value in tokenize_captions(pipeline, captions, device).items()
    )
    with torch.no_grad():
        live = CaptionEncoder(pipeline, device)(captions)
        expected = encode_captions(pipeline, pipeline.text_encoder, captions, device)
    assert list(live) == ["encoder_hidden_states", "encoder_attention_mask"]
    assert all(torch.equal(live[name], value) for name, value in expected.items())

    embeddings = TextEmbeddings(tmp_path)
    embeddings.add(captions, lambda some: live)
    embeddings.reload()
    pipeline.text_encoder = None  # cached embeddings do without it
    cached = CaptionEncoder(pipeline, device, embeddings=embeddings)(captions)
    mask = live["encoder_attention_mask"]
    assert torch.equal(cached["encoder_attention_mask"], mask)
    assert torch.equal(cached["encoder_hidden_states"][mask], live["encoder_hidden_states"][mask])
    with pytest.raises(ValueError, match="Cached `embeddings` cannot replace a text encoder that trains"):
        CaptionEncoder(pipeline, device, trains=True, embeddings=embeddings)


# ----------------------------------------------------------------------------------------------------------------------
# Cached embeddings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_embeddings(tmp_path, dtype):
    pipeline = make_pipeline()
    pipeline.text_encoder.to(dtype)
    calls = []

    def encode(captions):
        calls.extend(captions)
        with torch.no_grad():
            return encode_captions(pipeline, pipeline.text_encoder, captions, torch.device("cpu"))

    first, embeddings = TextEmbeddings(tmp_path), TextEmbeddings(tmp_path)
    # Two processes add their shares; then a run adds another caption.
    shares = [*CAPTIONS[:2]] * 2, [*CAPTIONS[2:], ""]
    assert first.add(shares[0], encode) + embeddings.add(shares[1], encode) == 4
    embeddings.reload()
    assert embeddings.add([*CAPTIONS, "something else"], encode, batch_size=1) == 1
    num_parts, num_files = len(list(tmp_path.glob("*/index.json"))), len(os.listdir("/proc/self/fd"))
    assert embeddings.find("something else") is None
    more = TextEmbeddings(tmp_path)
    assert (
        len(os.listdir("/proc/self/fd")) - num_files == num_parts > 1
    )  # one open file per part: large data has many parts
    embeddings = more
    assert sorted(calls) == sorted([*CAPTIONS, "", "something else"])
    captions = ["", CAPTIONS[2], "something else"]
    kept, expected = embeddings(captions, torch.device("cpu")), encode(captions)
    mask = expected["encoder_attention_mask"]
    assert torch.equal(kept["encoder_attention_mask"], mask) and not mask.all()
    tolerance = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(
        kept["encoder_hidden_states"][mask], expected["encoder_hidden_states"][mask], **tolerance
    )
    assert kept["encoder_hidden_states"].dtype == dtype
    with pytest.raises(KeyError, match="has no embedding of 'a cat'"):
        embeddings(["a cat"], torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_caption_without_tokens(dtype, tmp_path):
    """The empty caption has none with tokenizers that add no token of their own, such as that of PRXPixel."""

    def encode(captions):
        mask = torch.tensor([[len(caption) > place for place in range(4)] for caption in captions])
        hidden_states = torch.arange(4.0)[:, None] + torch.arange(3.0)
        return {
            "encoder_hidden_states": hidden_states.to(dtype).expand(len(captions), 4, 3),
            "encoder_attention_mask": mask,
        }

    embeddings = TextEmbeddings(tmp_path)
    for captions in ([""], ["ab", ""]):  # the empty one alone, in a part of its own, and together with another one
        embeddings.add(captions, encode)
        embeddings.reload()
        again = TextEmbeddings(tmp_path)
        for store in (embeddings, again):
            found = store([""], torch.device("cpu"))
            assert found["encoder_hidden_states"].shape == (1, 1, 3) and found["encoder_hidden_states"].dtype == dtype
            assert found["encoder_attention_mask"].tolist() == [[False]]
    found = embeddings(["", "ab"], torch.device("cpu"))
    assert found["encoder_attention_mask"].tolist() == [[False, False], [True, True]]
    assert torch.equal(found["encoder_hidden_states"][1], encode(["ab"])["encoder_hidden_states"][0, :2])
    other = TextEmbeddings(tmp_path / "other")
    other.add(["ab", ""], encode)
    other.reload()
    assert not other([""], torch.device("cpu"))["encoder_attention_mask"].any()


def test_nothing_is_left_of_embeddings_that_were_interrupted(tmp_path):
    def encode(captions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TextEmbeddings(tmp_path).add(["a circle"], encode)
    assert not list(tmp_path.iterdir())


def test_embeddings_are_of_one_encoder():
    pipeline = make_pipeline()
    names = {name_encoder(pipeline, "no"), name_encoder(make_pipeline(), "no")}
    assert len(names) == 1
    names.add(name_encoder(pipeline, "bf16"))
    with torch.no_grad():
        next(pipeline.text_encoder.parameters())[0, 0] += 1
    names.add(name_encoder(pipeline, "no"))
    pipeline.register_to_config(max_sequence_length=5)
    names.add(name_encoder(pipeline, "no"))
    assert len(names) == 4


# ----------------------------------------------------------------------------------------------------------------------
# The captions of a run


def embed(
    pipeline, source: Path, folder: Path, rows_read: list, rank: int = 0, num_processes: int = 1, num_held_out: int = 4, **kwargs
) -> TextEmbeddings:  # fmt: skip
    """Embeds the captions of a stream as one of several processes. `rows_read` then holds the rows that this has read."""
    data_args = DataArguments(
        train_data_dir=str(source), image_column="photo", streaming=True, text_embeddings_dir=str(folder), **kwargs
    )
    columns = data_args.image_column, data_args.caption_column
    stream, held_out, first = load_captioned_stream(None, str(source), *columns, num_held_out)
    images = StreamedImages(stream, first, 8)
    PartialState(cpu=True)  # which logging asks for
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), mixed_precision="no", autocast=contextlib.nullcontext, wait_for_everyone=lambda: None,
        process_index=rank, num_processes=num_processes, is_main_process=rank == 0,
    )  # fmt: skip
    rows_read.clear()
    return embed_captions(
        pipeline, accelerator, TrainingData(images, images, CaptionedImages(held_out, 8)), data_args, 0
    )


def test_a_stream_is_read_for_its_embeddings_once(files, tmp_path, rows_read):
    """Each of two processes reads its own files. A changed source is read again, and only its new captions are embedded."""
    source = shutil.copytree(files, tmp_path / "data")
    pipeline, folder = make_pipeline(), tmp_path / "embeddings"

    def start(**kwargs):
        return embed(pipeline, source, folder, rows_read, **kwargs)

    start(rank=1, num_processes=2)
    assert {file for file, _ in rows_read} == {1, 3} and not list(folder.glob("*/seen-*"))
    start(rank=0, num_processes=2)
    assert {file for file, _ in rows_read} == {0, 2}
    (marker,) = folder.glob("*/seen-*.json")
    parts = sorted(folder.glob("*/*/index.json"))
    for rank, num_processes in ((0, 1), (0, 2), (1, 2)):
        embeddings = start(rank=rank, num_processes=num_processes)
        assert not rows_read
    assert len(embeddings.hashes) == 25 and all(embeddings.find(f"image number {i}") is not None for i in range(24))
    # Another caption column, with the same captions in the held-out rows; then more held-out rows.
    for i, file in enumerate(sorted(source.iterdir())):
        rows = Dataset.from_parquet(str(file))
        others = [f"image number {j + (j > 3)}" for j in range(6 * i, 6 * i + 6)]
        rows.add_column("other", others).to_parquet(file)
    start(caption_column="other")
    assert len(rows_read) == 24
    start(num_held_out=5)
    assert len(rows_read) == 24
    added = [part for part in folder.glob("*/*/index.json") if part not in parts]
    assert len(added) == 1 and len(list(folder.glob("*/seen-*.json"))) == 3
    assert len(start().hashes) == 26 and not rows_read
    # The files change, which the marker cannot know.
    write_rows(source / "3.parquet", [(make_image(i), f"a new image {i}") for i in range(6)])
    embeddings = start()
    with pytest.raises(KeyError, match=rf"no embedding of 'a new image 5'.*remove {re.escape(str(marker.parent))}/se"):
        embeddings(["a new image 5"], torch.device("cpu"))
    marker.unlink()
    assert start().find("a new image 5") is not None and len(rows_read) == 24


def test_a_stream_that_was_not_read_to_its_end_is_read_again(files, tmp_path, rows_read, monkeypatch):
    pipeline, folder, encoded = make_pipeline(), tmp_path / "embeddings", []

    def interrupt(text_encoder, args):
        encoded.extend(args[0])
        if len(encoded) > 15:
            raise KeyboardInterrupt

    monkeypatch.setattr(embeddings_module, "EMBEDDED_AT_ONCE", 5)
    hook = pipeline.text_encoder.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        embed(pipeline, files, folder, rows_read)
    hook.remove()
    assert not list(folder.glob("*/seen-*")) and len(list(folder.glob("*/*/index.json"))) == 3
    embeddings = embed(pipeline, files, folder, rows_read)
    assert len(rows_read) == 24 and len(embeddings.hashes) == 25 and len(list(folder.glob("*/seen-*.json"))) == 1


def test_captions_of_data_in_order_are_embedded_once(tmp_path):
    """The captions of the core's own data and of the stages' data, some of which are the same."""
    write_parquet(tmp_path / "core.parquet", 12)
    write_parquet(tmp_path / "high.parquet", 12, first=6)
    pipeline, folder = make_pipeline(), tmp_path / "embeddings"
    accelerator = Accelerator(cpu=True)
    data_args = DataArguments(
        train_data_dir=str(tmp_path / "core.parquet"), high_res_data_dir=str(tmp_path / "high.parquet"),
        image_column="photo", text_embeddings_dir=str(folder),
    )  # fmt: skip
    data = load_training_data(data_args, [8, 16], data_args.train_data_dir, BrokenRows(), seed=0)
    embeddings = embed_captions(pipeline, accelerator, data, data_args, seed=0)
    captions = ["", *(f"image number {i}" for i in range(18))]
    assert len(embeddings.hashes) == 19 and all(embeddings.find(caption) is not None for caption in captions)
    parts = list(folder.glob("*/*/index.json"))
    again = embed_captions(make_pipeline(), accelerator, data, data_args, seed=0)
    assert len(again.hashes) == 19 and list(folder.glob("*/*/index.json")) == parts
    assert len(list(folder.glob("*/seen-*.json"))) == 1


@torch.no_grad()
def test_padding_is_kept_for_a_core_that_reads_it(tmp_path):
    """DeepFloyd IF attends to all tokens. Its core must see the same text in training as in sampling, whatever else is in the batch."""
    write_parquet(tmp_path / "images.parquet", 4)
    pipeline = GreedyGrowPipeline.from_core(make_if(), 32, (8,))
    data_args = DataArguments(
        train_data_dir=str(tmp_path / "images.parquet"), image_column="photo", text_embeddings_dir=str(tmp_path / "texts")
    )  # fmt: skip
    data = load_training_data(data_args, [16, 32], data_args.train_data_dir, BrokenRows(), seed=0)
    embeddings = embed_captions(pipeline, Accelerator(cpu=True), data, data_args, seed=0)
    state, time = torch.randn(1, 3, 32, 32), torch.tensor([600.0])
    for captions in (["image number 1"], ["", "image number 2"]):
        cached = embeddings(captions, torch.device("cpu"))
        live = encode_captions(pipeline, pipeline.text_encoder, captions, torch.device("cpu"))
        assert cached["encoder_hidden_states"].shape[1] == 77 and not live["encoder_attention_mask"].all()
        for name, value in live.items():
            torch.testing.assert_close(cached[name], value)
        size = len(captions), -1, -1, -1
        actual, expected = (pipeline.unet.predict_core(state.expand(size), time, **text)[0] for text in (cached, live))
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
