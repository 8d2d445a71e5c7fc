# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
LoRA: does an adapter that was trained on a core do the same to a model that was grown from it? This one turns circles green:
it learns from captioned shapes in which circles are, whatever the captions say.

    make demo                                                        # leaves output/core and output/grown-64
    python -m benchmarks.lora --models output/core output/grown-64   # trains on the first, unless it has

Arguments that are not its own go to `train_lora.py`, such as `--mixed_precision bf16 --attention_backend _native_math`.
"""

import argparse
import io
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from benchmarks.tables import RESULTS, describe_machine, markdown, write_json
from diffusers_greedy_grow import GreedyGrowPipeline
from diffusers_greedy_grow.training.samples import draw_samples
from diffusers_greedy_grow.training.seeds import sample_generators
from diffusers_greedy_grow.training.shapes.scenes import (
    HELD_OUT,
    Scene,
    is_held_out,
    parse_caption,
    render,
    sample_scene,
)
from diffusers_greedy_grow.training.shapes.scorer import score_images


SCRIPT = Path(__file__).parents[1] / "training_examples" / "train_lora.py"
NUM_INFERENCE_STEPS, GUIDANCE_SCALE = 20, 3.0


def is_circle(scene: Scene) -> bool:
    return scene.objects[0].shape == "circle"


def make_green(scene: Scene) -> Scene:
    return replace(scene, objects=(replace(scene.objects[0], color="green"), *scene.objects[1:]))


def write_images(
    folder: Path, scenes: Iterable[Scene], image_size: int, texture_cells: int = 16, green_circles: bool = False
) -> Path:
    """Writes `train.parquet` with each scene's image and caption; with `green_circles` the caption's colour is a lie there."""
    rows: dict[str, list] = {"image": [], "text": []}
    for scene in scenes:
        shown = make_green(scene) if green_circles and is_circle(scene) else scene
        buffer = io.BytesIO()
        Image.fromarray(render(shown, image_size, texture_cells)).save(buffer, format="PNG")
        rows["image"].append({"bytes": buffer.getvalue(), "path": None})
        rows["text"].append(scene.caption)
    folder.mkdir(parents=True, exist_ok=True)
    features = Features({"image": ImageFeature(), "text": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    return folder


def sample_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Scenes of one object, none of which is green to begin with or one of the demo's held-out combinations."""
    rng, scenes = np.random.default_rng(seed), []
    while len(scenes) < count:
        scene = sample_scene(rng)
        if scene.objects[0].color != "green" and not is_held_out(scene):
            scenes.append(scene)
    return scenes


def draw(pipeline: GreedyGrowPipeline, captions: list[str], bfloat16: bool = False) -> list[Image.Image]:
    """One image for each caption, from noise of its own."""
    pipeline.set_progress_bar_config(disable=True)
    generators, images = sample_generators((0,), 0, len(captions)), []
    for i in range(0, len(captions), 32):
        with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=bfloat16):
            images += pipeline(
                captions[i : i + 32],
                generator=generators[i : i + 32],
                num_inference_steps=NUM_INFERENCE_STEPS,
                guidance_scale=GUIDANCE_SCALE,
            ).images
    return images


def score(
    images: list[Image.Image], captions: list[str], image_size: int, texture_cells: int = 16
) -> dict[str, float]:
    """
    By the shapes scorer, of images scaled to `image_size`: which share of the circles is green, and of all else has the
    colour and the shape of its caption.
    """
    images = [image.resize((image_size, image_size), Image.Resampling.BICUBIC) for image in images]
    circles = [is_circle(parse_caption(caption)) for caption in captions]

    def shares(of_circles: bool, captions: list[str]) -> dict[str, float]:
        chosen = [i for i, circle in enumerate(circles) if circle == of_circles]
        return score_images([images[i] for i in chosen], [captions[i] for i in chosen], texture_cells)

    green = shares(True, [make_green(parse_caption(caption)).caption for caption in captions])
    others = shares(False, captions)
    return {
        "green circles": green["color"],
        "round circles": green["shape"],
        "others' color": others["color"],
        "others' shape": others["shape"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument(
        "--models", nargs="+", default=["output/core", "output/grown-64"], help="The core is the first."
    )
    parser.add_argument("--work_dir", type=Path, default=Path(__file__).parent / "runs" / "lora")
    parser.add_argument("--num_images", type=int, default=48)
    parser.add_argument("--bfloat16", action="store_true", help="Draw in bfloat16.")
    parser.add_argument("--quick", action="store_true")
    args, others = parser.parse_known_args()
    if args.quick:
        args.num_images, others = 8, [*others, "--max_train_steps", "5"]
    pipelines = {Path(model).name: GreedyGrowPipeline.from_pretrained(model) for model in args.models}
    image_size = max(pipeline.unet.config.sample_size for pipeline in pipelines.values())

    folder = args.work_dir / "lora"
    if not (folder / "pytorch_lora_weights.safetensors").exists():
        data = write_images(args.work_dir / "data", sample_scenes(2000), image_size, green_circles=True)
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", str(SCRIPT)]
        launch += ["--pretrained_model_name_or_path", args.models[0], "--train_data_dir", str(data)]
        subprocess.run([*launch, "--output_dir", str(folder), "--max_train_steps", "600", *others], check=True)

    # Half of the captions are of circles; none says green.
    items = [item for item in HELD_OUT if item.color != "green"]
    scenes = [
        sample_scene(np.random.default_rng(i), first_object=items[i % len(items)]) for i in range(16 * len(items))
    ]
    circles, rest = ([scene.caption for scene in scenes if is_circle(scene) == wanted] for wanted in (True, False))
    captions = [caption for pair in zip(circles, rest) for caption in pair][: args.num_images]
    rows: list[dict] = []
    shown: dict[str, list[Image.Image]] = {}
    for name, pipeline in pipelines.items():
        for arm in (name, f"{name}, LoRA of the core"):
            if arm != name:
                pipeline.load_lora_weights(folder)
            images = draw(pipeline, captions, args.bfloat16)
            shown[arm] = images[:6]
            scores = score(images, captions, image_size)
            rows.append({"model": arm, **{key: f"{value:.2f}" for key, value in scores.items()}})
    print(markdown(rows))
    draw_samples(shown, captions[:6], args.work_dir / "lora.png")
    if not args.quick:
        write_json(RESULTS / "lora.json", {"machine": describe_machine(), "rows": rows})


if __name__ == "__main__":
    main()
