# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""`greedy-grow inspect`."""

import argparse
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from diffusers_greedy_grow import GreedyGrowPipeline
from diffusers_greedy_grow.hub.cards import describe_entry
from diffusers_greedy_grow.hub.lineage import get_lineage
from diffusers_greedy_grow.models.core_loading import find_core
from diffusers_greedy_grow.training.plan import describe_parts


def name_pipelines(model: str) -> None:
    """
    Raise a `ValueError` if `model` is a path at which nothing is, or the folder of a run, which holds pipelines and is not one
    itself; the message names the newest.
    """
    folder = Path(model)
    if folder.is_dir() and not any((folder / name).exists() for name in ("model_index.json", "config.json")):
        if found := sorted(
            (path.parent for path in folder.glob("*/model_index.json")), key=lambda path: path.stat().st_mtime
        ):
            raise ValueError(f"`{model}` holds the pipelines of a run: name one of them, such as {found[-1]}.")
    # A repository is `name` or `owner/name`.
    if not folder.exists() and (model.count("/") > 1 or model.startswith((".", "/", "~"))):
        raise ValueError(f"`{model}` does not exist: name the folder of a pipeline, or its repository on the Hub.")


def find_card(model: str, revision: str | None) -> ModelCard | None:
    """Return the card of a folder or repository, or None if there is none."""
    card = Path(model) / "README.md"
    if not Path(model).is_dir():
        try:
            card = Path(hf_hub_download(model, "README.md", revision=revision))
        except EntryNotFoundError:
            return None
    return ModelCard.load(card) if card.exists() else None


def read_license(model: str, revision: str | None) -> str | None:
    """Return the license in the card of a folder or repository, or None if there is none."""
    if (card := find_card(model, revision)) is None:
        return None
    return card.data.get("license_name") or card.data.get("license")


def read_pipeline(model: str, revision: str | None) -> dict[str, Any]:
    """Return the configuration of a pipeline, or an empty one for a model alone."""
    try:
        return dict(GreedyGrowPipeline.load_config(model, revision=revision))
    except OSError:
        return {}


def table(rows: list[tuple]) -> str:
    """Format rows as a table, whose first row is its head."""
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(str(value).ljust(width) for value, width in zip(row, widths)).rstrip() for row in rows)


def describe(name: str, revision: str | None) -> str:
    """Describe a model or a pipeline, a folder or a repository, of which no weights are read."""
    model_class, config, _, commit = find_core(name, revision=revision)
    pipeline = read_pipeline(name, revision)
    with torch.device("meta"):  # no weights, but all of their shapes
        model: Any = model_class.from_config(config)
    where = f" at commit {commit}" if commit else ""
    lines = [f"{name}{where}: a {pipeline.get('_class_name', model_class.__name__)}\n"]
    lines.append(f"resolutions   {', '.join(f'{size} px' for size in model.sample_sizes)}")
    lines += [f"{part:<13} {count / 1e6:.1f} M parameters" for part, count in describe_parts(model).items()]
    width = config.get("cross_attention_dim")
    _, encoder = pipeline.get("text_encoder") or (None, None)
    text = "unconditional" if width is None else f"{width} channels, {encoder or 'no encoder inside'}"
    lines.append(f"text          {text}")
    lines.append(f"license       {read_license(name, revision) or 'none in its card'}")
    lineage = [describe_entry(entry) for entry in get_lineage(model)]
    if lineage:
        steps = sum(entry.get("steps", 0) for entry in get_lineage(model))
        lines.append(f"trained       {steps} steps\n")
        lines.append(table([("phase", "resolution", "trained", "steps", "images", "seed"), *lineage]))
    else:
        lines.append("trained       unknown: its configuration has no lineage")
    return "\n".join(lines)


def inspect(args: argparse.Namespace) -> None:
    name_pipelines(args.model)
    print(describe(args.model, args.revision))
