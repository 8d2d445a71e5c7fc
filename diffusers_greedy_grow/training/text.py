# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
A small text encoder, for data whose language is small: trained with the core from scratch, no download needed. And the
embeddings of one that does not train, on disk.
"""

import hashlib
import json
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from ..pipelines import GreedyGrowPipeline
from ..pipelines.pipeline_greedy_grow import find_cut, tokenize


def train_small_tokenizer(captions: Iterable[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """A lower-case byte-level BPE tokenizer trained on `captions`; knows every string, ends each with `</s>`."""
    special_tokens = ["<pad>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def build_small_text_encoder(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int = 128, num_layers: int = 2
) -> T5EncoderModel:
    """
    A T5 encoder of `num_layers` layers and `hidden_size` channels with random weights. Its word embeddings are three times as
    large as T5's, so that what its layers add does not bury the words: it trains with the core, which has no use for words
    about what only shows at a higher resolution, but the stages around it will need them.
    """
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=hidden_size,
        d_kv=32,
        d_ff=4 * hidden_size,
        num_layers=num_layers,
        num_heads=max(1, hidden_size // 32),
        dropout_rate=0.0,
        feed_forward_proj="gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    text_encoder = T5EncoderModel(config)
    with torch.no_grad():
        text_encoder.get_input_embeddings().weight.mul_(3)
    return text_encoder


def tokenize_captions(
    pipeline: GreedyGrowPipeline, captions: list[str], device: torch.device
) -> dict[str, torch.Tensor]:
    """`input_ids` and `encoder_attention_mask` of `captions`, each `(B, L)`, as the pipeline makes them for prompts."""
    tokens = tokenize(pipeline.tokenizer, captions, pipeline.config.max_sequence_length).to(device, non_blocking=True)
    return {"input_ids": tokens["input_ids"], "encoder_attention_mask": tokens["attention_mask"].bool()}


def warn_of_cut_captions(pipeline: GreedyGrowPipeline, captions: list[str]) -> None:
    """Once, before training, where each step's captions are cut without a word."""
    length = pipeline.config.max_sequence_length
    if cut := find_cut(pipeline.tokenizer, captions, length):
        warnings.warn(
            f"{len(cut)} of {len(captions)} captions are longer than the `max_sequence_length={length}` tokens that are "
            f"read, such as {cut[0][:200]!r}.",
            stacklevel=2,
        )


def encode_captions(
    pipeline: GreedyGrowPipeline, text_encoder: torch.nn.Module, captions: list[str], device: torch.device
) -> dict[str, torch.Tensor]:
    """The model's text arguments for `captions`, as the pipeline makes them for prompts."""
    tokens = tokenize_captions(pipeline, captions, device)
    mask = tokens["encoder_attention_mask"]
    hidden_states = text_encoder(tokens["input_ids"], attention_mask=mask.long()).last_hidden_state
    return {"encoder_hidden_states": hidden_states, "encoder_attention_mask": mask}


# ----------------------------------------------------------------------------------------------------------------------
# Embeddings on disk


def name_encoder(pipeline: GreedyGrowPipeline, *precision: str) -> str:
    """A name that is the same only for the same text encoder, tokenizer, `max_sequence_length` and `precision`."""
    digest = hashlib.sha256(json.dumps([pipeline.config.max_sequence_length, *precision]).encode())
    digest.update(json.dumps(sorted(pipeline.tokenizer.get_vocab().items())).encode())
    config = pipeline.text_encoder.config.to_diff_dict()
    known = {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    for name, weight in pipeline.text_encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def hash_caption(caption: str) -> int:
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "little")


class TextEmbeddings:
    """
    Captions' embeddings in a folder. It holds parts, each written once and then never changed: the hashes of its captions in
    order, where their tokens begin and how many there are, and the tokens' embeddings without padding, memory-mapped. Besides,
    it holds a small file for each source all of whose captions are there, so that nobody need read it again to find that out.

    Args:
        folder (`Path`): Of one encoder, see [`name_encoder`].
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.reload()

    def reload(self) -> None:
        """Takes in parts that have been written since."""
        self.data: list[tuple[np.ndarray, torch.dtype]] = []  # of each part
        # Of all captions in the order of their hashes: the hash, the part, where in it the tokens begin, how many there are.
        columns = [[np.empty(0, dtype)] for dtype in (np.uint64, np.int32, np.int64, np.int64)]
        for index in sorted(self.folder.glob("[0-9a-f]*/index.json")):
            about, part = json.loads(index.read_text()), index.parent
            hashes, starts, counts = (np.load(part / f"{name}.npy") for name in ("hashes", "starts", "counts"))
            numbers = np.full(len(hashes), len(self.data), np.int32)
            for column, values in zip(columns, (hashes, numbers, starts, counts)):
                column.append(values)
            data = np.memmap(part / "embeddings.bin", mode="r", dtype=np.uint8).reshape(-1, about["bytes"])
            self.data.append((data, getattr(torch, about["dtype"])))
        order = np.argsort(np.concatenate(columns[0]), kind="stable")
        self.hashes, self.parts, self.starts, self.counts = (np.concatenate(column)[order] for column in columns)

    def find(self, caption: str) -> torch.Tensor | None:
        """The embedding `(L, D)` of a caption, if it is there."""
        key = np.uint64(hash_caption(caption))
        i = int(np.searchsorted(self.hashes, key))
        if i == len(self.hashes) or self.hashes[i] != key:
            return None
        data, dtype = self.data[self.parts[i]]
        tokens = np.array(data[self.starts[i] : self.starts[i] + self.counts[i]])
        return torch.from_numpy(tokens).view(dtype)

    def __call__(self, captions: list[str], device: torch.device) -> dict[str, torch.Tensor]:
        """
        What [`encode_captions`] returns, padded with zeros.

        Raises:
            `KeyError`: if a caption is not there.
        """
        found = []
        for caption in captions:
            embedding = self.find(caption)
            if embedding is None:
                raise KeyError(
                    f"{self.folder} has no embedding of {caption!r}. If the data is no longer what it was when its captions were "
                    f"embedded, remove {self.folder / 'seen-*.json'}: the next start then embeds those that are new."
                )
            found.append(embedding)
        lengths = torch.tensor([len(one) for one in found])
        hidden_states = torch.nn.utils.rnn.pad_sequence(found, batch_first=True)
        mask = torch.arange(hidden_states.shape[1]) < lengths.unsqueeze(1)
        return {
            "encoder_hidden_states": hidden_states.to(device, non_blocking=True),
            "encoder_attention_mask": mask.to(device, non_blocking=True),
        }

    def marker(self, source: dict) -> Path:
        """The file that says that all captions of a source are there. What JSON can hold must tell it from any other."""
        digest = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / f"seen-{digest}.json"

    def mark(self, source: dict) -> None:
        """To be called when they have been added by all processes."""
        temporary = self.folder / f".{uuid.uuid4().hex}.tmp"  # several runs may write the same one
        temporary.write_text(json.dumps(source, indent=1))
        temporary.replace(self.marker(source))

    def add(
        self,
        captions: Iterable[str],
        encode: Callable[[list[str]], dict[str, torch.Tensor]],
        batch_size: int = 64,
    ) -> int:
        """
        Writes a part with the captions that are not there yet, and returns how many.

        Args:
            captions (`Iterable[str]`): Also the same one several times.
            encode (`Callable`): Returns for a list of captions what [`encode_captions`] does.
            batch_size (`int`): How many captions are encoded at once.
        """
        part = self.folder / uuid.uuid4().hex
        temporary = self.folder / f".{part.name}.tmp"
        hashes: list[int] = []
        counts: list[int] = []
        batch: list[str] = []
        about: dict = {}
        seen: set[int] = set()
        temporary.mkdir(parents=True)
        try:
            with open(temporary / "embeddings.bin", "wb") as file:

                def write() -> None:
                    conditions = encode(batch)
                    hidden_states, mask = (
                        conditions["encoder_hidden_states"].cpu(),
                        conditions["encoder_attention_mask"],
                    )
                    about.update(
                        dtype=str(hidden_states.dtype).removeprefix("torch."),
                        bytes=hidden_states.shape[-1] * hidden_states.itemsize,
                    )
                    counts.extend(mask.sum(dim=1).tolist())
                    file.write(hidden_states[mask.cpu()].contiguous().view(torch.uint8).numpy().tobytes())
                    batch.clear()

                for caption in captions:
                    key = hash_caption(caption)
                    if key in seen:
                        continue
                    seen.add(key)
                    if self.find(caption) is None:
                        hashes.append(key)
                        batch.append(caption)
                    if len(batch) == batch_size:
                        write()
                if batch:
                    write()
        except BaseException:  # Ctrl-C, too
            shutil.rmtree(temporary)
            raise
        if not hashes:
            shutil.rmtree(temporary)
            return 0
        order = np.argsort(np.array(hashes, dtype=np.uint64))
        starts = np.cumsum([0, *counts[:-1]])
        np.save(temporary / "hashes.npy", np.array(hashes, dtype=np.uint64)[order])
        np.save(temporary / "starts.npy", starts[order])
        np.save(temporary / "counts.npy", np.array(counts)[order])
        (temporary / "index.json").write_text(json.dumps(about))
        temporary.rename(part)
        return len(hashes)
