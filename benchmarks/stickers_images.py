# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
Draw held-out stickers with a trained pipeline, score them, and show some beside the real ones.

    python -m benchmarks.stickers_images --pipeline output/stickers-128/grown-128 --data data/stickers \
        --scorer output/stickers_scorer --out output/stickers-128/held_out

OUT gets `stickers.png`: 16 images of combinations of subject and style that were not trained on, and 8 of subjects that were not
trained on in any style, each above the real one. They are drawn by lot. With `--scorer`, `scores.json` has the scores of
`--count` images of each split, beside those of the real images.
"""

import argparse
import random
from pathlib import Path

import torch
from datasets import load_dataset
from diffusers.image_processor import VaeImageProcessor

from benchmarks.evaluate import draw_images
from benchmarks.stickers_scorer import StickersScorer, describe, score_images
from benchmarks.tables import write_json
from diffusers_greedy_grow import GreedyGrowPipeline
from diffusers_greedy_grow.training.data.images import to_pixel_values
from diffusers_greedy_grow.training.files import save_image
from diffusers_greedy_grow.training.samples import make_grid, stack_grids
from diffusers_greedy_grow.training.setup import has_native_bfloat16


COLUMNS = 8
# The images of the grid, by split: combinations that are new, and subjects that are new.
SHOWN = {"validation": 2 * COLUMNS, "test": COLUMNS}


def choose(data: Path, split: str, count: int, resolution: int) -> tuple[list[str], torch.Tensor]:
    """Return captions of a split, drawn by lot, and their images `(B, 3, R, R)` in [0, 1]; fewer if the split has fewer."""
    rows = load_dataset("parquet", data_files={split: str(data / f"{split}.parquet")})[split]
    places = random.Random(0).sample(range(len(rows)), min(count, len(rows)))
    chosen = rows.select(places)
    return list(chosen["text"]), torch.stack([to_pixel_values(image, resolution) for image in chosen["image"]]) / 255


def show(blocks: list[tuple[list[str], torch.Tensor, torch.Tensor]], path: Path) -> None:
    """Write blocks of captions, drawn and real images below each other, [`COLUMNS`] in a row."""
    grids = []
    for captions, drawn, real in blocks:
        for i in range(0, len(captions), COLUMNS):
            row = slice(i, i + COLUMNS)
            rows = {
                name: VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images[row]))
                for name, images in (("drawn", drawn), ("real", real))
            }
            grids.append(make_grid(rows, captions[row]))
    save_image(stack_grids(grids), path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    parser.add_argument("--pipeline", type=Path, required=True, help="The folder of a pipeline, such as grown-128.")
    parser.add_argument("--data", type=Path, required=True, help="The stickers' folder.")
    parser.add_argument("--out", type=Path, required=True, help="The folder to write to.")
    parser.add_argument("--scorer", type=Path, help="The folder of a trained benchmarks/stickers_scorer.")
    parser.add_argument("--count", type=int, default=200, help="How many images of each split are scored.")
    parser.add_argument("--guidance_scale", type=float, default=2.5)
    parser.add_argument("--num_inference_steps", type=int, default=28)
    args = parser.parse_args(argv)

    pipeline = GreedyGrowPipeline.from_pretrained(args.pipeline)
    bfloat16 = has_native_bfloat16()
    if bfloat16:
        pipeline.unet.set_attention_backend("_native_math")
    scorer = None if args.scorer is None else StickersScorer.from_pretrained(args.scorer, use_safetensors=True)
    args.out.mkdir(parents=True, exist_ok=True)
    arguments = {"guidance_scale": args.guidance_scale, "num_inference_steps": args.num_inference_steps}
    blocks, scores = [], {}
    for split, shown in SHOWN.items():
        count = shown if scorer is None else max(shown, args.count)
        captions, real = choose(args.data, split, count, pipeline.unet.config.sample_size)
        drawn = draw_images(pipeline, captions, bfloat16, **arguments)
        blocks.append((captions[:shown], drawn[:shown], real[:shown]))
        if scorer is not None:
            own, of_real = score_images(scorer, drawn, captions, real), score_images(scorer, real, captions)
            scores[split] = {"images": len(drawn), "drawn": own, "real": of_real}
            print(f"{split}: drawn {describe(own)}; real {describe(of_real)}", flush=True)
    show(blocks, args.out / "stickers.png")
    if scores:
        write_json(args.out / "scores.json", {"settings": arguments, "scores": scores})


if __name__ == "__main__":
    main()
