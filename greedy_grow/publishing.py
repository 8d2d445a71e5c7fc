# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""`greedy-grow grow` and `greedy-grow push`."""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffusers_greedy_grow import GreedyGrowPipeline
from diffusers_greedy_grow.hub.cards import read_card, write_card
from diffusers_greedy_grow.hub.upload import check_license
from diffusers_greedy_grow.models.core_loading import load_core
from diffusers_greedy_grow.training.files import save_pipeline
from diffusers_greedy_grow.training.parsing import parse_channels

from .inspection import name_pipelines


def grow(args: argparse.Namespace) -> None:
    out = Path(args.out)
    if out.exists():
        raise ValueError(f"`--out {args.out}` exists: name a folder that does not.")
    try:
        channels = parse_channels(args.block_out_channels)
    except ValueError:
        raise ValueError(
            f"`--block_out_channels {args.block_out_channels}` must be integers with commas between them, such as 128,256."
        ) from None
    grown = GreedyGrowPipeline.from_core(args.core, args.sample_size, channels, init=args.init, revision=args.revision)
    save_pipeline(grown, out)
    print(f"{out}: {' -> '.join(map(str, grown.unet.sample_sizes))} px. The new stage is untrained.")


def load(folder: str) -> Any:
    """Load a pipeline or a model alone."""
    if not Path(folder).is_dir():
        raise ValueError(f"`{folder}` is not a folder: name that of a pipeline or model.")
    name_pipelines(folder)
    if (Path(folder) / "model_index.json").exists():
        return GreedyGrowPipeline.from_pretrained(folder, dtype="auto")
    return load_core(folder, dtype="auto")


def push(args: argparse.Namespace) -> None:
    check_license(args.license)
    pushed = load(args.folder)
    given = {"license": args.license, "datasets": args.datasets, "samples": args.samples}
    card = read_card(Path(args.folder)) | {name: value for name, value in given.items() if value is not None}
    with TemporaryDirectory() as folder:
        write_card(Path(folder), pushed, args.repo_id, core=args.core, **card)
        shown = Path(folder, "README.md").read_text(encoding="utf-8")
    print(f"The card of {args.repo_id}:\n\n{shown}\n")
    if not args.yes:
        if not sys.stdin.isatty():
            raise ValueError("Nobody is there to answer: pass `--yes` to publish without a question.")
        if input(f"Publish {args.folder} as {args.repo_id}? [y/N] ").strip().lower() not in ("y", "yes"):
            print("Nothing was published.")
            sys.exit(1)
    address = pushed.push_to_hub(
        args.repo_id,
        private=args.private or None,
        revision=args.revision,
        create_pr=args.create_pr,
        core=args.core,
        **card,
    )
    print(address)
