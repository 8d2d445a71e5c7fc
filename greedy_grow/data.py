# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""`greedy-grow data check`."""

import argparse
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset
from PIL import Image
from tqdm.auto import tqdm

from diffusers_greedy_grow.training.data.images import convert_to_srgb, open_image
from diffusers_greedy_grow.training.data.rows import BrokenRow, check_caption, is_good, list_captions, name_row
from diffusers_greedy_grow.training.data.sources import Selection, load_captioned_data
from diffusers_greedy_grow.training.files import save_image
from diffusers_greedy_grow.training.samples import make_grid, stack_grids


# Of a thumbnail to compare images by, and the mean difference of gray levels below which two images count as copies
THUMBNAIL, COPIES_DIFFER = 16, 4.0
# How many broken rows and copies are named; all are counted.
NAMED = 20
COLUMNS = 8


@dataclass
class Findings:
    """
    What was found in the rows of a split.

    Attributes:
        names: A name per row that would be trained on.
        sizes: The width and height of its image.
        captions: The numbers of words of all captions.
        broken: Broken rows and captions, with the reasons.
        thumbnails: An array `(S, S, 3)`, uint8, of each image.
    """

    names: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    captions: list[int] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)
    thumbnails: list[np.ndarray] = field(default_factory=list)


def find_copies(thumbnails: np.ndarray, names: list[str]) -> list[list[str]]:
    """
    Return groups of images that are nearly the same. Those with the same signs of brightness differences are compared by their
    thumbnails `(N, S, S, 3)`, uint8.
    """
    gray = thumbnails.astype(np.int16).sum(axis=-1)
    cells = gray.reshape(len(gray), 8, THUMBNAIL // 8, 8, THUMBNAIL // 8).sum(axis=(2, 4))
    signs = np.packbits((np.diff(cells, axis=2) > 8).reshape(len(gray), -1), axis=1)
    alike: dict[bytes, list[int]] = defaultdict(list)
    for index, sign in enumerate(signs):
        alike[sign.tobytes()].append(index)
    groups = []
    for candidates in alike.values():
        while len(candidates) > 1:
            first, *others = candidates
            difference = np.abs(thumbnails[others].astype(np.int16) - thumbnails[first]).mean(axis=(1, 2, 3))
            same = [other for other, value in zip(others, difference) if value < COPIES_DIFFER]
            if same:
                groups.append([names[index] for index in (first, *same)])
            candidates = [other for other in others if other not in {*same}]
    return sorted(groups, key=len, reverse=True)


def check_split(rows: Dataset, split: str) -> Findings:
    """Read all rows of a split as training does."""
    findings, broken_images = Findings(), []
    for index, row in enumerate(tqdm(rows, desc=f"Reading {split}", disable=None)):
        place, captions = f"{split} row {index} of {len(rows)}", []
        for caption in dict.fromkeys(list_captions(row["text"])):
            try:
                captions.append(check_caption(caption))
            except BrokenRow as error:
                findings.broken.append((name_row(place, {**row, "text": caption}), str(error)))
        if not captions:
            continue
        name = name_row(place, row)
        try:
            image = open_image(row["image"])
        except BrokenRow as error:
            broken_images.append((name, str(error)))
            continue
        findings.names.append(name)
        findings.sizes.append(image.size)
        findings.captions += [len(caption.split()) for caption in captions]
        small = convert_to_srgb(image, lambda reason: None).convert("RGB")
        findings.thumbnails.append(np.asarray(small.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)))
    findings.broken += broken_images
    return findings


def describe_numbers(values: list[int]) -> str:
    return f"{min(values)} to {max(values)}, median {statistics.median(values):g}"


def report(split: str, findings: Findings) -> None:
    """Print what was found in a split."""
    print(f"\n{split}: {len(findings.names)} images would be used, {len(findings.broken)} rows or captions are broken")
    if findings.names:
        shorter = [min(size) for size in findings.sizes]
        shapes = Counter("square" if w == h else "wide" if w > h else "high" for w, h in findings.sizes)
        print(f"  shorter side    {describe_numbers(shorter)} pixels")
        print(f"  shapes          {', '.join(f'{count} {shape}' for shape, count in shapes.most_common())}")
        print(f"  captions        {len(findings.captions)}, words in each: {describe_numbers(findings.captions)}")
        for resolution in (64, 128, 256, 512, 1024):
            if small := sum(side < resolution for side in shorter):
                print(f"  below {resolution:<4} px   {small} images, which would be enlarged for that resolution")
                break
    for name, reason in findings.broken[:NAMED]:
        print(f"  broken          {name}: {reason}")
    if len(findings.broken) > NAMED:
        print(f"                  and {len(findings.broken) - NAMED} more")


def report_copies(copies: list[list[str]]) -> None:
    """Print groups of images that are nearly the same."""
    print(f"\n{sum(map(len, copies))} images are nearly the same as others")
    for group in copies[:NAMED]:
        print(f"  {len(group)} alike         {'; '.join(group[:3])}{'; ...' if len(group) > 3 else ''}")
    if len(copies) > NAMED:
        print(f"                  and {len(copies) - NAMED} groups more")


def draw_contact_sheet(rows: Dataset, count: int, path: Path) -> int:
    """Write a sheet of images that are spread over the rows, with their captions. Return how many it shows."""
    images, captions = [], []
    for index in np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int):
        row = rows[int(index)]
        good = [caption for caption in list_captions(row["text"]) if is_good(caption)]
        try:
            opened = open_image(row["image"], 128)
        except BrokenRow:
            continue
        if good:
            image = convert_to_srgb(opened, lambda reason: None).convert("RGB")
            side = min(image.size)  # as training crops them
            left, top = (image.width - side) // 2, (image.height - side) // 2
            images.append(
                image.crop((left, top, left + side, top + side)).resize((128, 128), Image.Resampling.LANCZOS)
            )
            captions.append(good[0])
    if not images:
        raise ValueError("There is no image to show in a contact sheet.")
    parts = [slice(start, start + COLUMNS) for start in range(0, len(images), COLUMNS)]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(stack_grids([make_grid({str(part.start): images[part]}, captions[part]) for part in parts]), path)
    return len(images)


def check(args: argparse.Namespace) -> None:
    if args.contact_sheet is not None and not args.contact_sheet.lower().endswith(".png"):
        raise ValueError(f"`--contact_sheet {args.contact_sheet}` must end in .png.")
    if args.num_shown < 1:
        raise ValueError(f"`--num_shown {args.num_shown}` must be 1 or more.")
    selection = Selection(train_split=args.train_split, validation_split=args.validation_split)
    train, held_out = load_captioned_data(
        None, args.folder, args.image_column, args.caption_column, selection=selection
    )
    print(f"{args.folder}: {len(train)} different images to train on, {len(held_out)} held out")
    found = {split: check_split(rows, split) for split, rows in (("training", train), ("held out", held_out))}
    for split, findings in found.items():
        report(split, findings)
    thumbnails = [thumbnail for findings in found.values() for thumbnail in findings.thumbnails]
    if thumbnails:
        names = [name for findings in found.values() for name in findings.names]
        report_copies(find_copies(np.stack(thumbnails), names))
    if args.contact_sheet is not None:
        shown = draw_contact_sheet(train, args.num_shown, Path(args.contact_sheet))
        print(f"\n{args.contact_sheet}: {shown} of the training images")
