# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
Does a LoRA of a core work on a model grown from it? This adapter turns circles green: it learns from captioned shapes whose
circles are green whatever the caption says.

    make demo                                                        # leaves output/core and output/grown-64
    python -m benchmarks.lora --models output/core output/grown-64   # trains on the first, unless that is done
    python -m benchmarks.lora --report                               # the report from the records

Further arguments go to `train_lora.py`, such as `--mixed_precision bf16 --attention_backend _native_math`.
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

from benchmarks.tables import (
    ROOT,
    Row,
    add_report_arguments,
    keep_rows,
    markdown,
    measured_sections,
    render_report,
    report_command,
    write_reports,
)
from diffusers_greedy_grow import GreedyGrowPipeline
from diffusers_greedy_grow.training.samples import draw_grid
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


SCRIPT = ROOT / "training_examples" / "train_lora.py"
NOTE = (
    "Shares of 24 captions of circles, none of them green, and of 24 captions of other shapes, by the shapes scorer."
)
NUM_INFERENCE_STEPS, GUIDANCE_SCALE = 20, 3.0


def is_circle(scene: Scene) -> bool:
    return scene.objects[0].shape == "circle"


def make_green(scene: Scene) -> Scene:
    return replace(scene, objects=(replace(scene.objects[0], color="green"), *scene.objects[1:]))


def write_images(
    folder: Path, scenes: Iterable[Scene], image_size: int, texture_cells: int = 16, green_circles: bool = False
) -> Path:
    """Write each scene's image and caption to `train.parquet`; with `green_circles`, circles are green whatever the caption."""
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
    """Sample scenes of one object, without green objects and without the demo's held-out combinations."""
    rng = np.random.default_rng(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = sample_scene(rng)
        if scene.objects[0].color != "green" and not is_held_out(scene):
            scenes.append(scene)
    return scenes


def draw(pipeline: GreedyGrowPipeline, captions: list[str], bfloat16: bool = False) -> list[Image.Image]:
    """Draw one image per caption, each from its own noise."""
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
    Scale images to `image_size` and score them: the share of circles that are green and that are circles, and the share of
    other objects with their caption's color and shape.
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


def measure(args: argparse.Namespace, train_flags: list[str]) -> list[Row]:
    """Train the adapter if that is not done, and return one row per model, without and with it."""
    pipelines = {Path(model).name: GreedyGrowPipeline.from_pretrained(model) for model in args.models}
    image_size = max(pipeline.unet.config.sample_size for pipeline in pipelines.values())

    folder = args.work_dir / "lora"
    if not (folder / "pytorch_lora_weights.safetensors").exists():
        data = write_images(args.work_dir / "data", sample_scenes(2000), image_size, green_circles=True)
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", str(SCRIPT)]
        launch += ["--pretrained_model_name_or_path", args.models[0], "--train_data_dir", str(data)]
        subprocess.run([*launch, "--output_dir", str(folder), "--max_train_steps", "600", *train_flags], check=True)

    # Half of the captions are of circles; none says green.
    items = [item for item in HELD_OUT if item.color != "green"]
    scenes = [
        sample_scene(np.random.default_rng(i), first_object=items[i % len(items)]) for i in range(16 * len(items))
    ]
    circles, rest = ([scene.caption for scene in scenes if is_circle(scene) == wanted] for wanted in (True, False))
    captions = [caption for pair in zip(circles, rest) for caption in pair][: args.num_images]
    rows: list[Row] = []
    shown: dict[str, list[Image.Image]] = {}
    for name, pipeline in pipelines.items():
        for arm in (name, f"{name}, LoRA of the core"):
            if arm != name:
                pipeline.load_lora_weights(folder)
            images = draw(pipeline, captions, args.bfloat16)
            shown[arm] = images[:6]
            scores = score(images, captions, image_size)
            rows.append({"model": arm, **{key: f"{value:.2f}" for key, value in scores.items()}})
    draw_grid(shown, captions[:6], args.work_dir / "lora.png")
    return rows


def make_reports(args: argparse.Namespace) -> dict[Path, str]:
    """Return the report by the file that it belongs to."""
    sections = measured_sections(args.results_dir / "lora.json")
    title = "Does a LoRA of a core work on a model grown from it? Full tables"
    return {args.results_dir / "lora.md": render_report(report_command("lora", args), title, sections, NOTE)}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    add_report_arguments(parser)
    parser.add_argument(
        "--models", nargs="+", default=["output/core", "output/grown-64"], help="Pipeline folders, the core first."
    )
    parser.add_argument("--work_dir", type=Path, default=Path(__file__).parent / "runs" / "lora")
    parser.add_argument("--num_images", type=int, default=48)
    parser.add_argument("--bfloat16", action="store_true", help="Draw in bfloat16.")
    parser.add_argument("--quick", action="store_true")
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    return build_parser().parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args, train_flags = build_parser().parse_known_args(argv)
    if args.quick:
        args.num_images = 8
        print(markdown(measure(args, [*train_flags, "--max_train_steps", "5"])))
        return
    if not args.report:
        keep_rows(args.results_dir / "lora.json", measure(args, train_flags), "model", args)
    write_reports(make_reports(args))


if __name__ == "__main__":
    main()
