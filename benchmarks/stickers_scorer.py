# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
A scorer for stickers: a small network that says which style an image has, which category, and which of 50 names fits best.
It is trained on the real training images, and its shares of right answers for real held-out images are printed first.

    python training_examples/data/stickers.py data/stickers
    python -m benchmarks.stickers_scorer train --data data/stickers --text_encoder FOLDER --out output/stickers_scorer
    python -m benchmarks.stickers_scorer score --scorer output/stickers_scorer --images samples --real data/stickers

FOLDER holds a `T5EncoderModel` and its tokenizer. It stays frozen: names that were not trained on are understood as far as it
places their words near those that were. `samples` is a folder of images with captions, as `grow.py` reads them. Training takes
about fifteen minutes on one core with native bfloat16, and 35 on one without.
"""

import argparse
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, load_dataset
from datasets import Image as ImageFeature
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import nn
from transformers import AutoTokenizer, T5EncoderModel

from benchmarks.metrics import kernel_distance
from diffusers_greedy_grow.training.data.images import to_pixel_values
from diffusers_greedy_grow.training.data.sources import load_splits
from diffusers_greedy_grow.training.files import save_pipeline
from diffusers_greedy_grow.training.setup import has_native_bfloat16
from training_examples.data.stickers import find_subject, strip_skin_tone, unify_categories


RESOLUTION = 64
NUM_NAMES = 50


# ----------------------------------------------------------------------------------------------------------------------
# The network
class Block(nn.Module):
    """Two convolutions beside a shortcut, which halve the resolution."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(in_channels, out_channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.layers(x) + self.shortcut(x))


class StickersScorer(ModelMixin, ConfigMixin):
    """
    The network. It knows the styles and names of a data set.

    Args:
        styles (`list[str]`): The styles.
        categories (`list[str]`): The categories.
        names (`dict[str, str]`): The category of each name, or "" if it is unknown.
        text_dim (`int`): The size of a name's text embedding.
        widths (`tuple[int, ...]`): The channels of the blocks. The last one is the number of features.
        embedding_dim (`int`): The size of the space in which images and names are compared.
        accuracy (`dict`, *optional*): The scores of real held-out images, by split.
    """

    @register_to_config
    def __init__(
        self,
        styles: list[str],
        categories: list[str],
        names: dict[str, str],
        text_dim: int,
        widths: tuple[int, ...],
        embedding_dim: int = 128,
        accuracy: dict[str, dict[str, float]] | None = None,
    ):
        super().__init__()
        self.blocks = nn.Sequential(*[Block(*pair) for pair in zip((3, *widths), widths)])
        self.style_head = nn.Linear(widths[-1], len(styles))
        self.category_head = nn.Linear(widths[-1], len(categories))
        self.image_head = nn.Linear(widths[-1], embedding_dim)
        self.text_head = nn.Sequential(nn.LayerNorm(text_dim), nn.Dropout(0.1), nn.Linear(text_dim, embedding_dim))
        self.log_scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("text_embeddings", torch.zeros(len(names), text_dim))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the features `(B, D)` of images `(B, 3, 64, 64)` in [0, 1]."""
        return self.blocks(images).mean(dim=(2, 3)).float()

    def match(self, features: torch.Tensor, names: torch.Tensor) -> torch.Tensor:
        """Return how well images with `features` `(B, D)` fit names, which are given by number `(N,)`: `(B, N)`."""
        images = F.normalize(self.image_head(features), dim=-1)
        texts = F.normalize(self.text_head(self.text_embeddings[names]), dim=-1)
        return self.log_scale.exp().clamp(max=100) * images @ texts.T


def shrink(images: torch.Tensor) -> torch.Tensor:
    """
    Return images `(B, 3, R, R)` in [0, 1] at the scorer's resolution.

    Raises:
        `ValueError`: if they have another shape, are smaller, or leave [0, 1].
    """
    if images.ndim != 4 or images.shape[1] != 3 or not RESOLUTION <= images.shape[2] == images.shape[3]:
        raise ValueError(
            f"`images` of shape {tuple(images.shape)} must be (B, 3, R, R) with R of at least {RESOLUTION}: the scorer was not "
            "trained on enlarged images."
        )
    if not 0 <= images.min() <= images.max() <= 1:
        raise ValueError(
            f"`images` must be in [0, 1]; got {images.min():.3g} to {images.max():.3g}. Divide bytes by 255, and clamp samples."
        )
    return F.interpolate(images.float(), size=(RESOLUTION, RESOLUTION), mode="bilinear", antialias=True).clamp(0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Scores
def read_captions(scorer: StickersScorer, captions: Sequence[str]) -> tuple[list[str], list[str]]:
    """
    Return the names and the styles of captions.

    Raises:
        `ValueError`: if a caption is not a name and a style that the scorer knows.
    """
    config = scorer.config
    pairs = [tuple(caption.rpartition(", ")[::2]) for caption in captions]
    unknown = [f"{name}, {style}" for name, style in pairs if name not in config.names or style not in config.styles]
    if unknown:
        raise ValueError(
            f"`captions` has {len(unknown)} captions that the scorer does not know, such as {unknown[0]!r}: a caption must be a "
            f"name of its data set, a comma and one of {[*config.styles]}."
        )
    return [name for name, _ in pairs], [style for _, style in pairs]


@torch.no_grad()
def compute_features(scorer: StickersScorer, images: torch.Tensor) -> torch.Tensor:
    """Return the features `(B, D)` of images `(B, 3, R, R)` in [0, 1]."""
    scorer.eval()
    return torch.cat([scorer(shrink(batch)) for batch in images.split(128)])


@torch.no_grad()
def score_images(
    scorer: StickersScorer, images: torch.Tensor, captions: Sequence[str], real: torch.Tensor | None = None
) -> dict[str, float]:
    """
    Score how much of their captions images show.

    Args:
        scorer ([`StickersScorer`]): The trained scorer.
        images (`torch.Tensor` of shape `(B, 3, R, R)`): The images in [0, 1], of at least 64 pixels.
        captions (sequence of `str`): Their captions, "name, style".
        real (`torch.Tensor` of shape `(N, 3, R', R')`, *optional*): Real images.

    Returns:
        `dict[str, float]`: `style` and `category` are the shares of images for which the network names those of the caption
        (images whose category is unknown do not count). `retrieval` is the share for which the caption's name fits better than
        49 other names, drawn by the name itself; guessing has .02. With `real`, `kid` is the [`kernel_distance`] of the
        network's scaled features from those of the real images, times 1000.

    Raises:
        `ValueError`: if the images or captions do not fit the scorer.
    """
    if len(images) != len(captions):
        raise ValueError(f"`images` and `captions` must be as many; got {len(images)} and {len(captions)}.")
    names, styles = read_captions(scorer, captions)
    config, features = scorer.config, compute_features(scorer, images)
    found_styles = scorer.style_head(features).argmax(-1).tolist()
    found_categories = scorer.category_head(features).argmax(-1).tolist()
    known = [i for i, name in enumerate(names) if config.names[name]]
    all_names = {name: i for i, name in enumerate(config.names)}
    fits = scorer.match(features, torch.arange(len(all_names)))
    retrieved = [bool(fits[i, draw_names(all_names, name)].argmax() == 0) for i, name in enumerate(names)]
    scores = {"style": np.mean([config.styles[i] == style for i, style in zip(found_styles, styles)])}
    if known:
        right = [config.categories[found_categories[i]] == config.names[names[i]] for i in known]
        scores["category"] = np.mean(right)
    scores["retrieval"] = np.mean(retrieved)
    if real is not None:
        # Scaled to a mean square of 1, so that no image outweighs the rest.
        scaled = [F.normalize(one) * one.shape[1] ** 0.5 for one in (features, compute_features(scorer, real))]
        scores["kid"] = 1000 * kernel_distance(*scaled)
    return {name: float(value) for name, value in scores.items()}


def draw_names(names: dict[str, int], name: str) -> list[int]:
    """Return the numbers of a name and of other ones, always the same for the same name."""
    others = random.Random(name).sample(sorted({*names} - {name}), min(NUM_NAMES, len(names)) - 1)
    return [names[other] for other in [name, *others]]


# ----------------------------------------------------------------------------------------------------------------------
# Training
def load_pixels(images: Iterable[Image.Image]) -> torch.Tensor:
    """Return images as bytes `(B, 3, 64, 64)`, upright, on white, cropped to squares, and shrunk as samples are."""
    squares = (to_pixel_values(image, min(image.size)).unsqueeze(0) / 255 for image in images)
    return torch.cat([(shrink(square) * 255).round().to(torch.uint8) for square in squares])


def embed_names(names: Sequence[str], text_encoder: str) -> torch.Tensor:
    """Return the mean output of a T5 encoder's folder for each name: `(N, D)`."""
    tokenizer, model = AutoTokenizer.from_pretrained(text_encoder), T5EncoderModel.from_pretrained(text_encoder)
    embeddings = []
    for i in range(0, len(names), 256):
        tokens = tokenizer(list(names[i : i + 256]), padding=True, return_tensors="pt")
        mask = tokens["attention_mask"]
        with torch.no_grad():
            hidden = model(tokens["input_ids"], attention_mask=mask).last_hidden_state.float()
        embeddings.append((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
    return torch.cat(embeddings)


def augment(images: torch.Tensor, may_flip: torch.Tensor) -> torch.Tensor:
    """Return images `(B, 3, R, R)` in [0, 1], scaled, shifted, on paper that is not quite white, and, if they may, flipped."""
    count = len(images)
    scale = 1 + 0.3 * (torch.rand(count) - 0.5)
    flip = torch.where(may_flip & (torch.rand(count) < 0.5), -1.0, 1.0)
    zeros = torch.zeros(count)
    shift = 0.2 * (torch.rand(2, count) - 0.5)
    rows = [torch.stack([scale * flip, zeros, shift[0]], -1), torch.stack([zeros, scale, shift[1]], -1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    ink = F.grid_sample(1 - images, grid, align_corners=False)  # beyond the edges there is no ink
    paper = 1 - 0.2 * torch.rand(count, 3, 1, 1) * (torch.rand(count, 1, 1, 1) < 0.5)
    return (1 - ink) * paper


def find_targets(scorer: StickersScorer, rows: Dataset) -> torch.Tensor:
    """Return style, category (-1 if unknown) and name of each row, by number: `(B, 3)`."""
    config = scorer.config
    categories = {category: i for i, category in enumerate(config.categories)}
    numbers = {name: i for i, name in enumerate(config.names)}
    return torch.tensor(
        [
            (config.styles.index(style), categories.get(config.names[name], -1), numbers[name])
            for name, style in zip(rows["name"], rows["style"])
        ]
    )


def fit(scorer: StickersScorer, rows: Dataset, epochs: int, batch_size: int, learning_rate: float) -> None:
    """Train the scorer on rows, and print the mean loss of each epoch."""
    pixels, targets = load_pixels(rows["image"]), find_targets(scorer, rows)
    may_flip = torch.tensor([not {"left", "right"} & {*name.split()} for name in rows["name"]])
    # Names that are held out are not even wrong answers.
    names, positions = targets[:, 2].unique(return_inverse=True)
    scorer.to(memory_format=torch.channels_last)
    decayed = [p for p in scorer.parameters() if p.ndim > 1]
    others = [p for p in scorer.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}])
    steps = len(rows) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=epochs * steps)
    bfloat16 = has_native_bfloat16()
    for epoch in range(1, epochs + 1):
        scorer.train()
        losses = []
        for batch in torch.randperm(len(rows))[: steps * batch_size].split(batch_size):
            images = augment(pixels[batch] / 255, may_flip[batch]).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                features = scorer(images)
            loss = F.cross_entropy(scorer.style_head(features), targets[batch, 0])
            loss = loss + F.cross_entropy(scorer.match(features, names), positions[batch])
            if (targets[batch, 1] >= 0).any():
                loss = loss + F.cross_entropy(scorer.category_head(features), targets[batch, 1], ignore_index=-1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch} of {epochs}: loss {np.mean(losses):.3f}", flush=True)


def train(
    data: Path,
    text_encoder: str,
    out: Path,
    epochs: int = 20,
    batch_size: int = 128,
    learning_rate: float = 4e-3,
    widths: tuple[int, ...] = (32, 64, 128, 256),
    seed: int = 0,
) -> StickersScorer:
    """
    Train a scorer on the `train` split of a folder that `training_examples/data/stickers.py` wrote, score the real images of
    the other splits, and save it to the folder `out`.

    Raises:
        `ValueError`: if the folder has no training data or fewer rows than a batch.
    """
    files = {path.stem: str(path) for path in sorted(data.glob("*.parquet"))}
    if "train" not in files:
        raise ValueError(f"`data={str(data)!r}` has no train.parquet: training_examples/data/stickers.py writes one.")
    splits = load_dataset("parquet", data_files=files)
    if len(splits["train"]) < batch_size:
        raise ValueError(f"`batch_size={batch_size}` is larger than the {len(splits['train'])} training images.")
    names = [name for split in splits.values() for name in split["name"]]
    categories = [category for split in splits.values() for category in split["category"]]
    known = {*names}
    subjects = [find_subject(strip_skin_tone(name, known)) for name in names]
    by_name = dict(sorted(zip(names, unify_categories(subjects, categories))))
    embeddings = embed_names([*by_name], text_encoder)  # sorted, as the saved configuration is
    torch.manual_seed(seed)
    scorer = StickersScorer(
        styles=sorted({*splits["train"]["style"]}),
        categories=sorted({*by_name.values()} - {""}),
        names=by_name,
        text_dim=embeddings.shape[1],
        widths=widths,
    )
    scorer.text_embeddings.copy_(embeddings)
    fit(scorer, splits["train"], epochs, batch_size, learning_rate)
    accuracy = {}
    for name in ("validation", "test"):
        if name in splits:
            accuracy[name] = score_images(scorer, load_pixels(splits[name]["image"]) / 255, splits[name]["text"])
    scorer.register_to_config(accuracy=accuracy)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_pipeline(scorer, out)
    return scorer


# ----------------------------------------------------------------------------------------------------------------------
# Command line
def print_accuracy(scorer: StickersScorer) -> None:
    for split, scores in (scorer.config.accuracy or {}).items():
        print(f"real images of {split}: {describe(scores)}", flush=True)


def describe(scores: dict[str, float]) -> str:
    """Return scores as text, in the order that [`score_images`] gives them, which a saved configuration sorts."""
    order = ("style", "category", "retrieval", "kid")
    return ", ".join(f"{name} {scores[name]:.3f}" for name in order if name in scores)


def load_captioned(folder: str, split: str) -> tuple[torch.Tensor, list[str]]:
    """Return the images of a split, in [0, 1] and at the scorer's resolution, and their captions."""
    splits = load_splits(None, folder, "image", "text")
    if split not in splits:
        raise ValueError(f"{folder!r} has no split {split!r}, only {[*splits]}.")
    rows = splits[split].cast_column("image", ImageFeature())
    return load_pixels(rows["image"]) / 255, list(rows["text"])


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="Train a scorer.")
    training.add_argument("--data", type=Path, required=True, help="The stickers' folder.")
    training.add_argument("--text_encoder", required=True, help="The folder of a T5EncoderModel and its tokenizer.")
    training.add_argument("--out", type=Path, required=True, help="The folder to write the scorer to.")
    training.add_argument("--epochs", type=int, default=20)
    training.add_argument("--seed", type=int, default=0)
    scoring = commands.add_parser("score", help="Score images.")
    scoring.add_argument("--scorer", type=Path, required=True, help="The folder of a trained scorer.")
    scoring.add_argument("--images", required=True, help="A folder of images with captions.")
    scoring.add_argument("--split", default="train", help="The split of `--images`.")
    scoring.add_argument("--real", help="A folder of real images to take the kernel distance to.")
    scoring.add_argument("--real_split", default="validation", help="The split of `--real`.")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.command == "train":
        print_accuracy(train(args.data, args.text_encoder, args.out, args.epochs, seed=args.seed))
        return
    scorer = StickersScorer.from_pretrained(args.scorer, use_safetensors=True)
    print_accuracy(scorer)
    images, captions = load_captioned(args.images, args.split)
    real = load_captioned(args.real, args.real_split)[0] if args.real else None
    print(f"{args.images}: {describe(score_images(scorer, images, captions, real))}")


if __name__ == "__main__":
    main()
