# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The text embeddings of all captions, cached on disk, for a text encoder that does not train."""

import hashlib
import itertools
import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object

from ...pipelines import GreedyGrowPipeline
from ..arguments import DataArguments
from ..data.loading import TrainingData, take_fingerprint
from ..data.streaming import StreamedImages
from .captions import CaptionEncoder


logger = get_logger(__name__)

# How many captions a process puts into one part. A run that is stopped loses no more than the part that it is writing.
EMBEDDED_AT_ONCE = 100_000


# ----------------------------------------------------------------------------------------------------------------------
# The store
class TextEmbeddings:
    """
    The embeddings of captions by one text encoder, in a folder.

    The folder holds *parts*, each of which is written once and never changed: the sorted hashes of its captions; where the
    tokens of each begin, and how many there are; and the embeddings of all tokens, memory-mapped, without padding unless the model
    reads it, and then with the mask that tells padding from text. For each
    source whose captions are all there, it also holds a small file that says so, so that the source need not be read again.

    Args:
        folder (`Path`): The folder, for one encoder: see [`name_encoder`].
        keeps_padding (`bool`, defaults to `False`): Whether parts that are added hold padding, too.
    """

    def __init__(self, folder: Path, keeps_padding: bool = False):
        self.folder, self.keeps_padding = folder, keeps_padding
        self.reload()

    def reload(self) -> None:
        """Take in parts that have been written since."""
        # One entry per part; the mask is None for one without padding
        self.data: list[tuple[np.ndarray, torch.dtype, np.ndarray | None]] = []
        # Per caption, sorted by hash: the hash, the part, where its tokens begin in the part, and how many there are.
        columns = [[np.empty(0, dtype)] for dtype in (np.uint64, np.int32, np.int64, np.int64)]
        for index in sorted(self.folder.glob("[0-9a-f]*/index.json")):
            about, part = json.loads(index.read_text(encoding="utf-8")), index.parent
            hashes, starts, counts = (np.load(part / f"{name}.npy") for name in ("hashes", "starts", "counts"))
            numbers = np.full(len(hashes), len(self.data), np.int32)
            for column, values in zip(columns, (hashes, numbers, starts, counts)):
                column.append(values)
            path = part / "embeddings.bin"
            # A file without tokens, of the empty caption alone, cannot be mapped.
            data: np.ndarray = np.empty(0, np.uint8)
            if path.stat().st_size:
                data = np.memmap(path, mode="r", dtype=np.uint8)
            data = data.reshape(-1, about["bytes"])
            mask = np.load(part / "mask.npy") if (part / "mask.npy").exists() else None
            self.data.append((data, getattr(torch, about["dtype"]), mask))
        order = np.argsort(np.concatenate(columns[0]), kind="stable")
        self.hashes, self.parts, self.starts, self.counts = (np.concatenate(column)[order] for column in columns)

    def find(self, caption: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the embedding `(L, D)` of a caption and its mask `(L,)`, or `None` if it is not there."""
        key = np.uint64(hash_caption(caption))
        i = int(np.searchsorted(self.hashes, key))
        if i == len(self.hashes) or self.hashes[i] != key:
            return None
        data, dtype, mask = self.data[self.parts[i]]
        tokens = slice(self.starts[i], self.starts[i] + self.counts[i])
        found = torch.empty(int(self.counts[i]), data.shape[1] // dtype.itemsize, dtype=dtype)
        found.view(torch.uint8).copy_(torch.from_numpy(np.array(data[tokens])))
        return found, torch.ones(len(found), dtype=torch.bool) if mask is None else torch.from_numpy(mask[tokens])

    def __call__(self, captions: list[str], device: torch.device) -> dict[str, torch.Tensor]:
        """
        Return `encoder_hidden_states` and `encoder_attention_mask` of `captions`, padded with zeros to the longest. With some
        tokenizers, empty captions have no tokens; there is at least one of padding.

        Raises:
            `KeyError`: if a caption is not there.
        """
        found = []
        for caption in captions:
            embedding = self.find(caption)
            if embedding is None:
                raise KeyError(
                    f"{self.folder} has no embedding of {caption!r}. If the data has changed since its captions were embedded, "
                    f"remove {self.folder / 'seen-*.json'}: the next start then embeds the new captions."
                )
            found.append(embedding)
        hidden_states, mask = (torch.nn.utils.rnn.pad_sequence([*parts], batch_first=True) for parts in zip(*found))
        if mask.shape[1] == 0:
            hidden_states, mask = F.pad(hidden_states, (0, 0, 0, 1)), F.pad(mask, (0, 1))
        return {
            "encoder_hidden_states": hidden_states.to(device, non_blocking=True),
            "encoder_attention_mask": mask.to(device, non_blocking=True),
        }

    def add(
        self,
        captions: Iterable[str],
        encode: Callable[[list[str]], dict[str, torch.Tensor]],
        batch_size: int = 64,
    ) -> int:
        """
        Write a part with the captions that are not there yet, and return how many these are.

        Args:
            captions (`Iterable[str]`): The captions, which may repeat.
            encode (`Callable`): Returns `encoder_hidden_states` and `encoder_attention_mask` for a list of captions.
            batch_size (`int`): How many captions to encode at once.
        """
        part = self.folder / uuid.uuid4().hex
        temporary = self.folder / f".{part.name}.tmp"
        temporary.mkdir(parents=True)
        try:
            count = write_part(temporary, self.find_missing(captions), encode, batch_size, self.keeps_padding)
        except BaseException:  # Ctrl-C included
            shutil.rmtree(temporary)
            raise
        if count == 0:
            shutil.rmtree(temporary)
        else:
            temporary.rename(part)
        return count

    def find_missing(self, captions: Iterable[str]) -> Iterator[str]:
        """Yield the captions that are not there, each once."""
        seen: set[int] = set()
        for caption in captions:
            key = hash_caption(caption)
            if key not in seen and self.find(caption) is None:
                yield caption
            seen.add(key)

    def marker(self, source: dict) -> Path:
        """
        Return the path of the file that says that all captions of a source are there.

        Args:
            source (`dict`): All that tells the source from others, as JSON can hold it.
        """
        digest = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / f"seen-{digest}.json"

    def mark(self, source: dict) -> None:
        """Note that all captions of a source are there. Must be called after all processes have added theirs."""
        temporary = self.folder / f".{uuid.uuid4().hex}.tmp"  # several runs may write the same marker at once
        temporary.write_text(json.dumps(source, indent=1), encoding="utf-8")
        temporary.replace(self.marker(source))


def write_part(
    folder: Path,
    captions: Iterator[str],
    encode: Callable[[list[str]], dict[str, torch.Tensor]],
    batch_size: int,
    keeps_padding: bool,
) -> int:
    """Write the files of a part, and return the number of captions. Without captions, the part is not complete."""
    hashes: list[int] = []
    counts: list[int] = []
    masks: list[np.ndarray] = []
    about: dict = {}
    with open(folder / "embeddings.bin", "wb") as file:
        while batch := list(itertools.islice(captions, batch_size)):
            conditions = encode(batch)
            hidden_states, mask = conditions["encoder_hidden_states"].cpu(), conditions["encoder_attention_mask"].cpu()
            about = {
                "dtype": str(hidden_states.dtype).removeprefix("torch."),
                "bytes": hidden_states.shape[-1] * hidden_states.itemsize,
            }
            hashes.extend(map(hash_caption, batch))
            kept = torch.ones_like(mask) if keeps_padding else mask
            counts.extend(kept.sum(dim=1).tolist())
            masks.append(mask[kept].numpy())
            file.write(hidden_states[kept].contiguous().view(torch.uint8).numpy().tobytes())
    if hashes:
        order = np.argsort(np.array(hashes, dtype=np.uint64))
        starts = np.cumsum([0, *counts[:-1]])
        np.save(folder / "hashes.npy", np.array(hashes, dtype=np.uint64)[order])
        np.save(folder / "starts.npy", starts[order])
        np.save(folder / "counts.npy", np.array(counts)[order])
        if keeps_padding:
            np.save(folder / "mask.npy", np.concatenate(masks))
        (folder / "index.json").write_text(json.dumps(about), encoding="utf-8")
    return len(hashes)


def hash_caption(caption: str) -> int:
    """Return a hash of 64 bits."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "little")


def name_encoder(pipeline: GreedyGrowPipeline, *precision: str) -> str:
    """Return a name that is the same only for the same text encoder, tokenizer, `max_sequence_length` and `precision`."""
    digest = hashlib.sha256(
        json.dumps(
            [pipeline.config.max_sequence_length, *precision, *filter(None, [pipeline.config.prompt_format])]
        ).encode()
    )
    digest.update(json.dumps(sorted(pipeline.tokenizer.get_vocab().items())).encode())
    config = pipeline.text_encoder.config.to_diff_dict()
    known = {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    add_weights(digest, pipeline.text_encoder)
    return digest.hexdigest()[:16]


def add_weights(digest: Any, module: torch.nn.Module) -> None:
    """Update a `digest` of hashlib with the names and weights of a module."""
    for name, weight in module.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


# ----------------------------------------------------------------------------------------------------------------------
# A run's captions
def embed_captions(
    pipeline: GreedyGrowPipeline,
    accelerator: Accelerator,
    data: TrainingData,
    data_args: DataArguments,
    seed: int,
) -> TextEmbeddings:
    """
    Return the embeddings of all captions of a run, from `text_embeddings_dir`, after adding those that are not there yet: each
    process computes its share. A stream is read for its captions once, and then marked as known.

    Args:
        pipeline ([`GreedyGrowPipeline`]): The pipeline with the text encoder, which moves to the run's device.
        accelerator (`Accelerator`): The run's processes, and the precision to compute in.
        data ([`TrainingData`]): The images with their captions.
        data_args ([`DataArguments`]): The arguments that the data was loaded by.
        seed (`int`): The seed of the run, by which captioned shapes were drawn.
    """
    assert data_args.text_embeddings_dir is not None
    keeps_padding = pipeline.unet.reads_padding
    name = name_encoder(pipeline, accelerator.mixed_precision, *(["padding"] if keeps_padding else []))
    embeddings = TextEmbeddings(Path(data_args.text_embeddings_dir) / name, keeps_padding)
    source = describe_source(data, data_args, seed)
    # Skipped by all processes or by none: another run may be writing the marker at this moment.
    if all(gather_object([embeddings.marker(source).exists()])):
        logger.info(f"All captions have been embedded before: {embeddings.marker(source)} says so.")
        embeddings.reload()
        return embeddings
    pipeline.text_encoder.to(accelerator.device)
    encoder = CaptionEncoder(pipeline, accelerator.device)

    def encode(captions: list[str]) -> dict[str, torch.Tensor]:
        with torch.no_grad(), accelerator.autocast():
            return encoder(captions)

    captions = list_captions(data, accelerator.process_index, accelerator.num_processes)
    added = 0
    while some := list(itertools.islice(captions, EMBEDDED_AT_ONCE)):
        added += embeddings.add(some, encode)
        embeddings.reload()
    logger.info(f"{sum(gather_object([added]))} captions embedded; {embeddings.folder} keeps them.")
    if accelerator.is_main_process:  # all processes are done: they have told how many captions they added
        embeddings.mark(source)
    accelerator.wait_for_everyone()
    embeddings.reload()
    return embeddings


def describe_source(data: TrainingData, data_args: DataArguments, seed: int) -> dict:
    """Return all that tells the captions of a run from those of others, as far as it is known without reading a stream."""
    folders = data_args.train_data_dir, data_args.high_res_data_dir
    return {
        "datasets": [data_args.dataset_name, data_args.high_res_dataset_name],
        "folders": [folder and str(Path(folder).resolve()) for folder in folders],
        "parts": [
            data_args.dataset_config_name,
            data_args.dataset_revision,
            data_args.train_split,
            data_args.validation_split,
        ],
        "columns": [data_args.image_column, data_args.caption_column],
        "shapes": data_args.on_shapes and [data_args.shapes_objects, data_args.shapes_images, seed],
        "files and first rows": [[stream.stream.num_shards, stream.first] for stream in list_streams(data)],
        "fingerprints": [data.fingerprint, take_fingerprint(data.validation)],
    }


def list_captions(data: TrainingData, rank: int, num_processes: int) -> Iterator[str]:
    """
    Return one process's share of all captions, among them the empty one and those that are held out. Of a stream, each
    process reads its own files: a caption that is in several files may come up in several processes.
    """
    known = {"", *data.validation.captions}
    if not data.streams:
        known.update(data.core.all_captions, data.high_res.all_captions)
    own = (stream.read_captions(rank, num_processes) for stream in list_streams(data))
    return itertools.chain(sorted(known)[rank::num_processes], *own)


def list_streams(data: TrainingData) -> list[StreamedImages]:
    """Return the different streams to train on: two if the core has data of its own, none if the data is not streamed."""
    sets = [data.core] if data.high_res is data.core else [data.core, data.high_res]
    return [images for images in sets if isinstance(images, StreamedImages)]
