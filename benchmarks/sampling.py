# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
What makes sampling fast? Each way to cheaper steps, alone and added to those before it, compared with the plain guided loop
of 30 steps in float32.

    python -m benchmarks.sampling                                    # time: 16 -> 128 and 64 -> 512 px, random weights
    python -m benchmarks.sampling --models "64 -> 256" "64 -> 1024"                     # larger ones, for a GPU
    python -m benchmarks.sampling --pipeline output/grown-128 --data data_folder        # images: scorer and distances
    python -m benchmarks.sampling --quick
    python -m benchmarks.sampling --report                           # reports and plot from the records
"""

import argparse
import json
import statistics
import tempfile
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging

from benchmarks.evaluate import load_held_out, make_noise, score
from benchmarks.tables import (
    Row,
    add_report_arguments,
    draw_bars,
    keep_rows,
    markdown,
    mean_and_deviation,
    measured_sections,
    read_rows,
    render_report,
    report_command,
    write_reports,
)
from diffusers_greedy_grow import GreedyGrowPipeline, ShallowUNet2DModel
from diffusers_greedy_grow.training.text.small_encoder import build_small_text_encoder, train_small_tokenizer


logging.set_verbosity_error()

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_STEPS, GUIDANCE_SCALE = 30, 3.0
# The first call compiles the blocks; the second captures CUDA graphs of what runs once per call.
NUM_WARMUPS = 2 if DEVICE.type == "cuda" else 1
# The core's size, patch, hidden size, layers and heads; the stage's size and channels; the batch.
MODELS: dict[str, tuple[int, int, int, int, int, int, tuple[int, ...], int]] = {
    "16 -> 128": (16, 2, 128, 6, 2, 128, (24, 32, 64, 96), 4),
    "64 -> 512": (64, 4, 512, 8, 8, 512, (64, 128, 256), 1),
    "64 -> 256": (64, 4, 1024, 12, 16, 256, (128, 256), 4),
    "8 -> 16": (8, 2, 32, 1, 1, 16, (8,), 1),  # to rehearse
    "64 -> 1024": (64, 4, 1024, 12, 16, 1024, (64, 128, 256, 512), 1),
}
TIME_NOTE = """
Random weights. The baseline is the plain loop: 30 Euler steps in float32, guidance by running everything twice. Arms that
begin with "..." add one way to all those before them. *speed*: relative to the plain loop, median, smallest and largest.
""".strip()
IMAGES_NOTE = """
The baseline is the plain loop in float32: 30 Euler steps, guidance by running everything twice. Distances (SWD) and shares
are explained in [grow_vs_scratch.md](grow_vs_scratch.md); ± is the standard deviation over draws of noise.
""".strip()
# As grow.py measures it on captioned shapes between 16 and 32 px.
DETAIL_VARIANCE = 0.0275
# Settings that each way adds: those in `OF_LOAD` are for `load`, the others for `sample`.
OF_LOAD = ("dtype", "compile_mode", "whole", "backend")
WAYS: dict[str, dict[str, Any]] = {
    "text projected once": {"own_loop": False},
    "core first": {"core_first": "auto"},
    "bfloat16": {"dtype": torch.bfloat16},
    "compiled blocks": {"compile_mode": "default"},
    **({"blocks as CUDA graphs": {"compile_mode": "reduce-overhead"}} if torch.cuda.is_available() else {}),
    "half of the steps": {"num_steps": NUM_STEPS // 2},
    "guidance in the first 80 % of steps": {"stop": 0.8},  # the pipeline's default
    "guidance at the core": {"guidance_resolution": "core"},
}


def build_pipeline(
    core: int, patch: int, hidden: int, layers: int, heads: int, size: int, channels: tuple[int, ...], batch: int
) -> tuple[GreedyGrowPipeline, list[str]]:
    """Return a grown pipeline with random weights, and prompts for one batch."""
    prompts = ["a large red striped circle on a white background", "a small blue plain star on a gray background"]
    tokenizer = train_small_tokenizer(prompts)
    unet = ShallowUNet2DModel(
        sample_size=core,
        patch_size=patch,
        hidden_size=hidden,
        num_layers=layers,
        num_attention_heads=heads,
        cross_attention_dim=128,
    )
    pipeline = GreedyGrowPipeline(
        unet=unet,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        text_encoder=build_small_text_encoder(tokenizer, 128, 1),
        tokenizer=tokenizer,
    )
    pipeline = GreedyGrowPipeline.from_core(
        pipeline, size, block_out_channels=channels, detail_variance=DETAIL_VARIANCE
    )
    return pipeline, (prompts * batch)[:batch]


@cache
def load(
    folder: str,
    dtype: torch.dtype = torch.float32,
    compile_mode: str | None = None,
    whole: bool = False,
    backend: str = "inductor",
) -> GreedyGrowPipeline:
    """Load a saved pipeline as an arm runs it."""
    pipeline = GreedyGrowPipeline.from_pretrained(folder, dtype=dtype).to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    if compile_mode:
        unet = pipeline.unet
        # Arms that share a pipeline have batches of two sizes; each is compiled for its own, as when it runs alone.
        compile_it = partial(unet.compile, fullgraph=True) if whole else unet.compile_repeated_blocks
        compile_it(mode=compile_mode, backend=backend, dynamic=False)
    return pipeline


def load_arm(folder: str, settings: dict[str, Any]) -> tuple[GreedyGrowPipeline, dict[str, Any]]:
    """Return the pipeline of an arm, and its remaining settings, which are for [`sample`]."""
    of_load = {name: settings[name] for name in OF_LOAD if name in settings}
    return load(folder, **of_load), {name: value for name, value in settings.items() if name not in of_load}


@torch.no_grad()
def plain_loop(pipeline: GreedyGrowPipeline, prompts: list[str], latents: torch.Tensor) -> torch.Tensor:
    """Return images in [0, 1] by the usual classifier-free guidance, which runs everything twice in each step."""
    device = latents.device
    text, mask, negative_text, negative_mask = pipeline.encode_prompt(prompts, device)
    assert mask is not None and negative_text is not None and negative_mask is not None
    text, mask = torch.cat([text, negative_text]), torch.cat([mask, negative_mask])
    pipeline.scheduler.set_timesteps(NUM_STEPS, device=device)
    for t in pipeline.scheduler.timesteps:
        states = torch.cat([latents, latents])
        torch.compiler.cudagraph_mark_step_begin()  # for blocks that are CUDA graphs, as in the pipeline
        velocity = pipeline.unet(states, t.expand(len(states)), text, mask, return_dict=False)[0].float()
        velocity, negative_velocity = velocity.chunk(2)
        velocity = negative_velocity + GUIDANCE_SCALE * (velocity - negative_velocity)
        latents = pipeline.scheduler.step(velocity, t, latents, return_dict=False)[0]
    return (latents / 2 + 0.5).clamp(0, 1)


def sample(
    pipeline: GreedyGrowPipeline,
    prompts: list[str],
    latents: torch.Tensor,
    own_loop: bool = True,
    stop: float = 1.0,
    num_steps: int = NUM_STEPS,
    **kwargs: Any,
) -> torch.Tensor:
    """Return images in [0, 1] by the plain loop, or by the pipeline if anything differs from it."""
    if own_loop and not kwargs and stop == 1.0 and num_steps == NUM_STEPS:
        return plain_loop(pipeline, prompts, latents)
    images = pipeline(
        prompts,
        latents=latents,
        num_inference_steps=num_steps,
        guidance_scale=GUIDANCE_SCALE,
        guidance_stop=stop,
        output_type="pt",
        **kwargs,
    ).images
    return images.float()


def list_arms(alone: bool = True, whole: bool = False) -> dict[str, dict[str, Any]]:
    """
    Return the plain loop, each way `alone`, and each way together with all before it; or with `whole` the plain loop, all ways
    together, and these with the whole model compiled instead of its blocks.
    """
    arms: dict[str, dict[str, Any]] = {"plain loop": {}}
    if whole:
        everything = {name: value for settings in WAYS.values() for name, value in settings.items()}
        return {**arms, "all ways": everything, "all ways, the whole model compiled": {**everything, "whole": True}}
    for name, settings in WAYS.items() if alone else ():
        arms[name] = settings
    together: dict[str, Any] = {}
    for name, settings in WAYS.items():
        together = {**together, **settings}
        if together not in arms.values():
            arms[f"... + {name}"] = dict(together)
    return arms


def measure_time(args: argparse.Namespace) -> list[Row]:
    """Return one row per model and arm."""
    rows: list[Row] = []
    torch._dynamo.config.recompile_limit = 64  # the pipelines of all arms have the same blocks
    for name in args.models:
        torch.compiler.reset()  # or the first model's graphs would count against the second's limit
        load.cache_clear()
        pipeline, prompts = build_pipeline(*MODELS[name])
        latents = make_noise(len(prompts), pipeline.unet.config.sample_size).to(DEVICE)
        arms = {
            arm: settings
            for arm, settings in list_arms(not args.together, args.whole).items()
            if arm in (args.arms or {arm})
        }
        for settings in arms.values():
            if "compile_mode" in settings:
                settings["backend"] = args.backend or "inductor"
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        with tempfile.TemporaryDirectory() as folder:
            pipeline.save_pretrained(folder)
            for repeat in range(-NUM_WARMUPS, args.repeats):
                for arm, settings in arms.items():
                    pipeline, settings = load_arm(folder, settings)
                    synchronize()
                    started = time.perf_counter()
                    sample(pipeline, prompts, latents, **settings)
                    synchronize()
                    taken = time.perf_counter() - started
                    print(f"{name}, {arm}: {taken:.2f} s{', to warm up' if repeat < 0 else ''}", flush=True)
                    if repeat >= 0:
                        seconds[arm].append(taken)
        for arm in arms:
            ratios = [plain / own for plain, own in zip(seconds["plain loop"], seconds[arm])]
            rows.append(
                {
                    "pixels": name,
                    "arm": arm,
                    "seconds per image": f"{statistics.median(seconds[arm]) / len(prompts):.3f}",
                    "speed": f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})",
                }
            )
    return rows


def measure_images(args: argparse.Namespace) -> list[Row]:
    """Return one row per arm."""
    size = load(args.pipeline).unet.config.sample_size
    captions, real = load_held_out(args.data, size, args.num_images)
    scores: dict[str, list[dict]] = {}
    arms: dict[str, dict] = {}
    for arm, settings in list_arms().items():
        settings = {name: value for name, value in settings.items() if name != "compile_mode"}
        if settings:  # the pipeline draws the same images as the plain loop
            settings["own_loop"] = False
            if args.bfloat16:
                settings["dtype"] = torch.bfloat16
        if settings not in arms.values():  # compiling does not change the images
            arms[arm] = settings
    for seed in args.seeds:
        latents = make_noise(len(captions), size, seed).to(DEVICE)
        for arm, settings in arms.items():
            pipeline, settings = load_arm(args.pipeline, settings)
            images = [
                sample(pipeline, captions[i : i + 8], latents[i : i + 8], **settings).cpu()
                for i in range(0, len(captions), 8)
            ]
            scores.setdefault(arm, []).append(score(torch.cat(images), captions, real))
            print(arm, seed, json.dumps(scores[arm][-1]), flush=True)
    return [
        {"arm": arm, **{name: mean_and_deviation([run[name] for run in runs], 2) for name in runs[0]}}
        for arm, runs in scores.items()
    ]


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def make_reports(args: argparse.Namespace) -> dict[Path, str]:
    """Return the reports of the records that there are, by the files that they belong to."""
    command, reports = report_command("sampling", args), {}
    sections = measured_sections(args.results_dir / "sampling.json")
    if sections:
        title = "What makes sampling fast? Full tables"
        reports[args.results_dir / "sampling.md"] = render_report(command, title, sections, TIME_NOTE)
    sections = measured_sections(args.results_dir / "sampling_images.json")
    if sections:
        for section in sections:
            section.rows = [
                {name.replace("swd_", "SWD "): value for name, value in row.items()} for row in section.rows
            ]
        title = "What does fast sampling change in the images? Full tables"
        reports[args.results_dir / "sampling_images.md"] = render_report(command, title, sections, IMAGES_NOTE)
    return reports


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    add_report_arguments(parser)
    parser.add_argument("--models", nargs="+", default=list(MODELS)[:2], choices=list(MODELS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--together", action="store_true", help="Time: leave out what each way brings alone.")
    parser.add_argument("--whole", action="store_true", help="Time: compile the whole model, which takes long.")
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=list(list_arms()),
        help="Time: the arms, the plain loop among them; all by default.",
    )
    parser.add_argument(
        "--backend", help="Time: the backend of torch.compile, inductor by default; eager compiles nothing."
    )
    parser.add_argument("--pipeline", help="Images: a trained pipeline, to score its images.")
    parser.add_argument("--data", help="Images: the folder of captioned images that the pipeline was trained on.")
    parser.add_argument("--num_images", type=int, default=96)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bfloat16", action="store_true", help="Images: all arms but the plain loop in bfloat16.")
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.quick:
        args.models, args.repeats, args.num_images, args.seeds = args.models[:1], 1, 8, args.seeds[:2]
        print(markdown(measure_images(args) if args.pipeline else measure_time(args)))
        return
    times = args.results_dir / "sampling.json"
    if not args.report:
        if args.pipeline:
            keep_rows(args.results_dir / "sampling_images.json", measure_images(args), "arm", args)
        else:
            keep_rows(times, measure_time(args), "pixels", args)
    write_reports(make_reports(args))
    if times.exists():
        draw_bars(read_rows(times), "pixels", "arm", "speed", args.results_dir / "sampling.png")


if __name__ == "__main__":
    main()
