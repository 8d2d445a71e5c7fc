# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
Evaluate a run of `grow.py`: collect its held-out losses, and score the images of the pipelines that it left with a scorer of
shapes or stickers and the sliced Wasserstein distance to real images. The result is `result.json` in the run's folder.

    python -m benchmarks.evaluate benchmarks/runs/some-run data_folder
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from benchmarks import stickers_scorer
from benchmarks.stickers_scorer import StickersScorer
from benchmarks.swd import sliced_wasserstein
from benchmarks.tables import write_json
from diffusers_greedy_grow import GreedyGrowPipeline
from diffusers_greedy_grow.training.data.captioned import CaptionedImages
from diffusers_greedy_grow.training.data.sources import load_captioned_data
from diffusers_greedy_grow.training.seeds import sample_generators
from diffusers_greedy_grow.training.shapes.scorer import score_images


NUM_IMAGES, NUM_INFERENCE_STEPS, GUIDANCE_SCALE = 96, 20, 3.0


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def read_run(folder: Path) -> tuple[dict[str, int], dict[str, float], list[dict]]:
    """Return by phase the images seen and the seconds of training, and the lines of metrics with a held-out loss."""
    metrics = read_metrics(folder)
    images: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for line in metrics:
        if "images_per_second" in line:
            phase, before = line["phase"], images.get(line["phase"], 0)
            seconds[phase] = seconds.get(phase, 0.0) + (line["images"] - before) / line["images_per_second"]
            images[phase] = line["images"]
    return images, seconds, [line for line in metrics if "val_loss" in line]


def make_noise(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Draw noise `(count, 3, size, size)`, with one generator per image."""
    return randn_tensor((count, 3, size, size), generator=sample_generators((seed,), 0, count))


def draw_images(pipeline: GreedyGrowPipeline, captions: list[str], bfloat16: bool, **kwargs: Any) -> torch.Tensor:
    """Draw images `(B, 3, R, R)` in [0, 1], from the same noise with every pipeline."""
    noise = make_noise(len(captions), pipeline.unet.config.sample_size)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": NUM_INFERENCE_STEPS, "guidance_scale": GUIDANCE_SCALE, **kwargs}
    images: list[torch.Tensor] = []
    for i in range(0, len(captions), 8):
        with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=bfloat16):
            batch = pipeline(captions[i : i + 8], latents=noise[i : i + 8], output_type="pt", **arguments)
        images.append(batch.images.float().cpu())
    return torch.cat(images)


def check_captions(scorer: str, captions: list[str]) -> None:
    """Raise a `ValueError` if a stickers scorer cannot be loaded from the folder `scorer`, or does not know all captions."""
    try:
        stickers_scorer.read_captions(StickersScorer.from_pretrained(scorer, use_safetensors=True), captions)
    except OSError as error:
        raise ValueError(f"`scorer={scorer!r}` is not a trained benchmarks.stickers_scorer: {error}") from error


def score(
    images: torch.Tensor, captions: list[str], real: torch.Tensor, scorer: str | None = None
) -> dict[str, float]:
    """
    Return the distances `swd_<pixels>` and the scores of a stickers `scorer`, which is a folder; without one, the shapes
    scorer's shares if the captions are of shapes. Below 64 px, stickers are not scored, and textures are left out: there the
    scorer of shapes is wrong for a quarter of the real images.
    """
    scores = {f"swd_{size}": value for size, value in sliced_wasserstein(images, real).items()}
    if scorer is not None:
        if images.shape[-1] < stickers_scorer.RESOLUTION:
            return scores
        network = StickersScorer.from_pretrained(scorer, use_safetensors=True)
        return scores | stickers_scorer.score_images(network, images, captions, real)
    arrays = [(image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy() for image in images]
    try:
        scores |= score_images(arrays, captions)
    except ValueError:  # captions that are not of shapes
        pass
    if images.shape[-1] < 64:
        scores.pop("texture", None)
    return scores


def load_held_out(data_folder: str, resolution: int, count: int = NUM_IMAGES) -> tuple[list[str], torch.Tensor]:
    """Return captions that are not trained on, and their images in [0, 1]."""
    _, rows = load_captioned_data(None, data_folder, "image", "text")
    images = CaptionedImages(rows, resolution)
    count = min(count, len(images))
    pixel_values = torch.stack([images[i]["pixel_values"] for i in range(count)])
    return images.captions[:count], pixel_values.float() / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    parser.add_argument("folder", type=Path)
    parser.add_argument("data_folder")
    parser.add_argument("--mixed_precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--scorer", help="Folder of a trained benchmarks/stickers_scorer.")
    args = parser.parse_args()

    images, seconds, curve = read_run(args.folder)
    scores = {}
    for phase in seconds:
        pipeline = GreedyGrowPipeline.from_pretrained(args.folder / phase)
        if pipeline.unet.sample_sizes == (pipeline.unet.config.sample_size,):
            continue  # a core; the models grown from it are scored
        started = time.perf_counter()
        bfloat16 = args.mixed_precision == "bf16"
        if torch.cuda.is_available():
            pipeline.to("cuda")
        elif bfloat16:
            pipeline.unet.set_attention_backend("_native_math")
        captions, real = load_held_out(args.data_folder, pipeline.unet.config.sample_size)
        scores[phase] = score(draw_images(pipeline, captions, bfloat16), captions, real, args.scorer)
        print(f"{phase}: {scores[phase]} in {time.perf_counter() - started:.0f} s", flush=True)

    nearest = {line["phase"]: line["nearest_ratio"] for line in read_metrics(args.folder) if "nearest_ratio" in line}
    result = {"images": images, "seconds": seconds, "curve": curve, "scores": scores, "nearest_ratio": nearest}
    write_json(args.folder / "result.json", result)


if __name__ == "__main__":
    main()
