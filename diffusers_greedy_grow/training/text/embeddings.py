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
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from ...pipelines import GreedyGrowPipeline


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
