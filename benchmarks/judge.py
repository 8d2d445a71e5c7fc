# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
Judge generated images of any kind: distances to real images by the features of any vision model, and how well the images fit
their captions by any CLIP model.

    python -m benchmarks.judge samples --real data/photos --features facebook/dinov2-base --clip openai/clip-vit-large-patch14-336

`samples` and `data/photos` are captioned images as `grow.py` reads them: a folder of images with captions, or parquet files.
`--features` brings FID, KID, precision and recall; `--clip` brings CMMD and the CLIP score. Compare only scores of the same
models, resolution and numbers of images.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from benchmarks import metrics
from benchmarks.image_features import ClipModel, FeatureModel
from benchmarks.tables import Row, markdown, write_json
from diffusers_greedy_grow.training.data.images import open_image, to_pixel_values
from diffusers_greedy_grow.training.data.rows import BrokenRow, list_captions
from diffusers_greedy_grow.training.data.sources import Selection, load_splits


LABELS = {
    "fid": "FID",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "cmmd": "CMMD",
    "clip_score": "CLIP score",
}
RESIZING = "real images: the center cropped to the samples' aspect ratio, Lanczos to their size; then both by the image processor"


@dataclass
class ImageSet:
    """
    The images of a split, which are decoded as they are needed.

    Attributes:
        argument, source, split: The argument that named it, its value, and the name of the split.
        rows: The rows, with undecoded images and captions.
        size: The height and width of the images. All must have them already unless `resize`.
        resize: Whether to crop and resize the images.
    """

    argument: str
    source: str
    split: str
    rows: Dataset
    size: tuple[int, int]
    resize: bool = False

    @property
    def captions(self) -> list[str]:
        """The first caption of each image, "" where there is none."""
        return [(list_captions(text) or [""])[0] for text in self.rows["text"]]

    def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """
        Yield images `(B, 3, H, W)`, uint8, in their order.

        Raises:
            `ValueError`: if an image is broken, or not of the size that all must have.
        """
        for start in range(0, len(self.rows), batch_size):
            batch = range(start, min(start + batch_size, len(self.rows)))
            yield torch.stack([self.read(i) for i in batch])

    def read(self, index: int) -> torch.Tensor:
        height, width = self.size
        image = open_row(self.argument, self.source, self.rows, index)
        if not self.resize and (image.height, image.width) != self.size:
            raise ValueError(
                f"`{self.argument}={self.source!r}` has images of several sizes: row 0 is {width} x {height} and row {index} is "
                f"{image.width} x {image.height}. Judge images of one size at a time."
            )
        return to_pixel_values(image, height, width)


def open_row(argument: str, source: str, rows: Dataset, index: int) -> Any:
    """Decode the image of a row, or raise a `ValueError` that names it."""
    try:
        return open_image(rows[index]["image"])
    except BrokenRow as error:
        raise ValueError(f"`{argument}={source!r}`, row {index}: {error}. Repair or remove it.") from error


def open_images(
    argument: str,
    source: str,
    split: str = "train",
    image_column: str = "image",
    caption_column: str = "text",
    size: tuple[int, int] | None = None,
) -> ImageSet:
    """
    Open captioned images that `grow.py` could train on.

    Args:
        argument (`str`), source (`str`): The argument that names the images, for errors, and its value.
        split (`str`): The split to judge. Data without splits are the split "train".
        image_column (`str`), caption_column (`str`): The columns to read.
        size (`tuple[int, int]`, *optional*): The height and width to resize to. By default, the images must be of one size.

    Raises:
        `ValueError`: if there is no such source or split, or it is empty.
    """
    try:
        # Not `load_captioned_data`, which makes one row of images that are equal: a model may have drawn them.
        rows = load_splits(None, source, image_column, caption_column, selection=Selection(train_split=split))["train"]
    except ValueError as error:
        raise ValueError(f"`{argument}={source!r}`, split {split!r}, cannot be read: {error}") from error
    if not len(rows):
        raise ValueError(f"`{argument}={source!r}` has no images in its split {split!r}.")
    if size is not None:
        return ImageSet(argument, source, split, rows, size, resize=True)
    first = open_row(argument, source, rows, 0)
    return ImageSet(argument, source, split, rows, (first.height, first.width))


def compute_features(images: ImageSet, models: list[FeatureModel], batch_size: int) -> list[torch.Tensor]:
    """Return the features `(N, D)` of all images by each model. Images are decoded once."""
    parts = [[model(batch) for model in models] for batch in images.batches(batch_size)]
    return [torch.cat(one) for one in zip(*parts)]


def embed_captions(clip: ClipModel, captions: list[str], batch_size: int) -> torch.Tensor:
    """
    Return the embeddings `(N, D)` of captions.

    Raises:
        `ValueError`: if one is empty.
    """
    if "" in captions:
        raise ValueError(f"The CLIP score needs a caption per sample; row {captions.index('')} has none.")
    return torch.cat([clip.embed_texts(captions[i : i + batch_size]) for i in range(0, len(captions), batch_size)])


def judge(
    samples: ImageSet,
    real: ImageSet,
    features: FeatureModel | None = None,
    clip: ClipModel | None = None,
    batch_size: int = 32,
) -> dict[str, float]:
    """
    Score samples.

    Args:
        samples ([`ImageSet`]), real ([`ImageSet`]): The images to judge, and real ones at the same size.
        features ([`FeatureModel`], *optional*): Brings `fid`, `kid`, `precision` and `recall`.
        clip ([`ClipModel`], *optional*): Brings `cmmd` and `clip_score`.
        batch_size (`int`): Images per batch.

    Raises:
        `ValueError`: if there is no model, or images are broken, too few, or without captions.
    """
    if samples.size != real.size:
        raise ValueError(f"`samples` of size {samples.size} and `real` of size {real.size} must be of one size.")
    models = [model for model in (features, clip) if model is not None]
    if not models:
        raise ValueError("Name a model to judge by: `features`, `clip` or both.")
    texts = embed_captions(clip, samples.captions, batch_size) if clip is not None else None
    by_model = list(zip(*(compute_features(images, models, batch_size) for images in (samples, real))))
    scores: dict[str, float] = {}
    if features is not None:
        ours, theirs = by_model[0]
        scores["fid"] = metrics.frechet_distance(ours, theirs)
        scores["kid"] = metrics.kernel_distance(ours, theirs)
        scores["precision"], scores["recall"] = metrics.precision_recall(ours, theirs)
    if texts is not None:
        ours, theirs = by_model[-1]
        scores["cmmd"] = metrics.clip_distance(ours, theirs)
        scores["clip_score"] = metrics.clip_score(ours, texts)
    return scores


def describe_set(images: ImageSet) -> dict[str, Any]:
    return {"source": images.source, "split": images.split, "images": len(images.rows), "size": list(images.size)}


def make_table(result: dict[str, Any]) -> str:
    """Return the scores as a table, with what each is taken by."""
    rows: list[Row] = []
    for name, value in result["scores"].items():
        model = result["clip" if name in ("cmmd", "clip_score") else "features"]
        revision = f" at {model['revision']}" if model["revision"] else ""
        by = f"{model['features']} of {model['model']}{revision}"
        rows.append({"score": LABELS[name], "value": f"{value:.4g}", "by": by})
    counts = [f"{result[name]['images']} {text}" for name, text in (("samples", "samples"), ("real", "real images"))]
    height, width = result["samples"]["size"]
    return f"{' and '.join(counts)} of {width} x {height} px.\n\n{markdown(rows)}"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    parser.add_argument("samples", help="Folder or file of the captioned images to judge, all of one size.")
    parser.add_argument("--real", required=True, help="Folder or file of real captioned images.")
    parser.add_argument("--features", help="Vision model of transformers, for FID, KID, precision and recall.")
    parser.add_argument("--features_revision", help="Branch, tag or commit of `--features`.")
    parser.add_argument("--clip", help="CLIP model of transformers, for CMMD and the CLIP score.")
    parser.add_argument("--clip_revision", help="Branch, tag or commit of `--clip`.")
    parser.add_argument("--split", default="train", help="Split of the samples.")
    parser.add_argument("--real_split", default="train", help="Split of the real images.")
    parser.add_argument("--image_column", default="image", help="Column of the images, in both.")
    parser.add_argument("--caption_column", default="text", help="Column of the captions, in both.")
    parser.add_argument("--batch_size", type=int, default=32, help="Images per batch.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--output", type=Path, default=Path("judge.json"), help="JSON file to write.")
    args = parser.parse_args(argv)
    if not (args.features or args.clip):
        parser.error("Name a model to judge by: `--features`, `--clip` or both.")
    if args.batch_size < 1:
        parser.error(f"`--batch_size={args.batch_size}` must be at least 1.")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    columns = {"image_column": args.image_column, "caption_column": args.caption_column}
    samples = open_images("samples", args.samples, args.split, **columns)
    real = open_images("real", args.real, args.real_split, size=samples.size, **columns)
    shared: dict[str, Any] = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    features = FeatureModel(args.features, args.features_revision, **shared) if args.features else None
    clip = ClipModel(args.clip, args.clip_revision, **shared) if args.clip else None
    scores = judge(samples, real, features, clip, args.batch_size)
    models = {"features": features, "clip": clip}
    result: dict[str, Any] = {
        "samples": describe_set(samples),
        "real": describe_set(real),
        "resizing": RESIZING,
        **{name: model.describe() for name, model in models.items() if model is not None},
        "scores": scores,
    }
    write_json(args.output, result)
    print(f"{make_table(result)}\n\nWritten to {args.output}.")


if __name__ == "__main__":
    main()
