# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
A core as others train it, in a plain loop of torch and diffusers: `if`, a UNet with the layers of DeepFloyd IF that predicts
the noise of a `DDPMScheduler`, or `prx`, the transformer of PRXPixel that predicts the clean image of a rectified flow with
noise of scale 2. A small text encoder trains with it. The folder `core` gets the original pipeline of diffusers, and
`result.json` the scores of its images. `foreign_cores` runs it.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    IFPipeline,
    PRXPixelPipeline,
    PRXTransformer2DModel,
    UNet2DConditionModel,
)
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_density_for_timestep_sampling
from PIL import Image
from transformers import PreTrainedTokenizerFast, Qwen3VLTextConfig, Qwen3VLTextModel

from benchmarks.evaluate import GUIDANCE_SCALE, load_held_out
from benchmarks.tables import write_json
from diffusers_greedy_grow.training.data.captioned import CaptionedImages
from diffusers_greedy_grow.training.data.images import normalize
from diffusers_greedy_grow.training.data.order import EpochOrder
from diffusers_greedy_grow.training.data.sources import load_captioned_data
from diffusers_greedy_grow.training.evaluation import score_shapes
from diffusers_greedy_grow.training.files import save_pipeline
from diffusers_greedy_grow.training.text.small_encoder import build_small_text_encoder, train_small_tokenizer


RESOLUTION, TEXT_DIM, NUM_TOKENS, NOISE_SCALE = 16, 128, 16, 2.0
# Both have about as many parameters as our core of the other benchmarks.
CHANNELS = (40, 64, 96)
PRX_LAYERS = 6
# Textures at 64 px are finer than the core's pixels.
TEXTURE_CELLS = 16
# PRXPixel's loss is that of the velocity; near the clean image its weight is bounded.
SMALLEST_TIME = 0.05
NUM_INFERENCE_STEPS = {"if": 50, "prx": 20}


# ----------------------------------------------------------------------------------------------------------------------
# The models


def build_if(tokenizer: PreTrainedTokenizerFast) -> IFPipeline:
    """Build the parts of DeepFloyd IF's first stage, small, with random weights. Its variance stays untrained."""
    levels = len(CHANNELS)
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION,
        in_channels=3,
        out_channels=6,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * (levels - 1),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D",) * (levels - 1) + ("ResnetUpsampleBlock2D",),
        only_cross_attention=True,
        cross_attention_norm="group_norm",
        cross_attention_dim=CHANNELS[-1],
        encoder_hid_dim=TEXT_DIM,
        encoder_hid_dim_type="text_proj",
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
        norm_num_groups=8,
        attention_head_dim=32,
    )
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", thresholding=True, sample_max_value=1.5, variance_type="fixed_small"
    )
    encoder = build_small_text_encoder(tokenizer, hidden_size=TEXT_DIM)
    return IFPipeline(tokenizer, encoder, unet, scheduler, None, None, None, requires_safety_checker=False)


def build_prx(tokenizer: PreTrainedTokenizerFast) -> PRXPixelPipeline:
    """Build the parts of PRXPixel, small, with random weights."""
    transformer = PRXTransformer2DModel(
        in_channels=3,
        patch_size=2,
        context_in_dim=TEXT_DIM,
        hidden_size=128,
        num_heads=2,
        depth=PRX_LAYERS,
        axes_dim=[32, 32],
        bottleneck_size=32,
        resolution_embeds=True,
    )
    config = Qwen3VLTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_DIM,
        intermediate_size=4 * TEXT_DIM,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4]},
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = Qwen3VLTextModel(config)
    with torch.no_grad():
        encoder.get_input_embeddings().weight.mul_(3 / 0.02)  # as large as those of our small text encoder
    return PRXPixelPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        text_encoder=encoder,
        tokenizer=tokenizer,
        default_sample_size=RESOLUTION,
        prompt_max_tokens=NUM_TOKENS,
        noise_scale=NOISE_SCALE,
    )


BUILDERS: dict[str, Callable[[PreTrainedTokenizerFast], Any]] = {"if": build_if, "prx": build_prx}


# ----------------------------------------------------------------------------------------------------------------------
# Training


def encode(family: str, pipeline: Any, captions: list[str]) -> dict[str, torch.Tensor]:
    """Return what the model is told of captions, with gradients, but else as the pipeline's `encode_prompt` has it."""
    length = 77 if family == "if" else NUM_TOKENS
    texts = [caption.lower().strip() for caption in captions] if family == "if" else captions
    tokens = pipeline.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids, mask = tokens.input_ids.to(pipeline.device), tokens.attention_mask.to(pipeline.device)
    embeds = pipeline.text_encoder(ids, attention_mask=mask).last_hidden_state
    # `IFPipeline` does not pass the mask on.
    return {"embeds": embeds} if family == "if" else {"embeds": embeds, "mask": mask.bool()}


def compute_loss(family: str, pipeline: Any, x0: torch.Tensor, embeds: torch.Tensor, mask: Any = None) -> torch.Tensor:
    """Return the loss of clean images `(B, 3, 16, 16)` in [-1, 1], by which the family is trained."""
    noise = torch.randn_like(x0)
    if family == "if":
        scheduler = pipeline.scheduler
        timestep = torch.randint(scheduler.config.num_train_timesteps, (len(x0),), device=x0.device)
        output = pipeline.unet(scheduler.add_noise(x0, noise, timestep), timestep, embeds, return_dict=False)[0]
        return F.mse_loss(output[:, :3].float(), noise)
    # At noise of scale 2 these are the levels that our cores of 16 px train on.
    time = compute_density_for_timestep_sampling("logit_normal", len(x0), 0.3, 1.0, device=x0.device)
    share = time.view(-1, 1, 1, 1)
    y = (1 - share) * x0 + share * NOISE_SCALE * noise
    clean = pipeline.transformer(y, time, embeds, mask, return_dict=False)[0].float()
    return ((clean - x0) / share.clamp(min=SMALLEST_TIME)).square().mean()


def train(family: str, pipeline: Any, args: argparse.Namespace) -> float:
    """Train the model and its text encoder, leave both with their averaged weights, and return the seconds of training."""
    rows, _ = load_captioned_data(None, args.train_data_dir, "image", "text")
    images = CaptionedImages(rows, RESOLUTION)
    order = EpochOrder(len(images), 0, args.steps * args.batch_size, seed=(args.seed, 0))
    loader = torch.utils.data.DataLoader(images, batch_size=args.batch_size, sampler=order)
    model = pipeline.unet if family == "if" else pipeline.transformer
    parameters = [*model.train().parameters(), *pipeline.text_encoder.train().parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.99), fused=True)
    warmup = min(100, args.steps // 10)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=args.steps)
    ema = EMAModel(parameters, decay=0.998)
    bfloat16 = args.mixed_precision == "bf16"
    started = time.perf_counter()
    for step, batch in enumerate(loader):
        x0 = normalize(batch["pixel_values"].to(pipeline.device))
        captions = ["" if drop else text for drop, text in zip(torch.rand(len(x0)) < 0.1, batch["caption"])]
        with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=bfloat16):
            loss = compute_loss(family, pipeline, x0, **encode(family, pipeline, captions))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(parameters)
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.4f}, {time.perf_counter() - started:.0f} s", flush=True)
    seconds = time.perf_counter() - started
    ema.copy_to(parameters)
    for component in (model, pipeline.text_encoder):
        component.requires_grad_(False).eval()
    return seconds


# ----------------------------------------------------------------------------------------------------------------------
# Its images


def draw_original(pipeline: Any, captions: list[str]) -> list[Image.Image]:
    """Draw images by the pipeline of diffusers itself, with its own scheduler."""
    pipeline.set_progress_bar_config(disable=True)
    family = "if" if isinstance(pipeline, IFPipeline) else "prx"
    batch_size = 32 if family == "if" else 1  # PRXPixelPipeline of diffusers 0.42 guides one prompt at a time
    own: dict[str, Any] = {"clean_caption": False} if family == "if" else {"use_resolution_binning": False}
    own |= {"height": RESOLUTION, "width": RESOLUTION, "num_inference_steps": NUM_INFERENCE_STEPS[family]}
    images = []
    for i in range(0, len(captions), batch_size):
        prompts = captions[i : i + batch_size]
        generators = [torch.Generator().manual_seed(i + j) for j in range(len(prompts))]
        images += pipeline(prompts, guidance_scale=GUIDANCE_SCALE, generator=generators, **own).images
    return images


def load_original(folder: str | Path) -> Any:
    """Load a pipeline that this script saved."""
    index = DiffusionPipeline.load_config(folder)
    arguments = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in index else {}
    return DiffusionPipeline.from_pretrained(folder, **arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    parser.add_argument("--family", required=True, choices=BUILDERS)
    parser.add_argument("--train_data_dir", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixed_precision", default="no")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    rows, _ = load_captioned_data(None, args.train_data_dir, "image", "text")
    pipeline = BUILDERS[args.family](train_small_tokenizer(rows["text"]))
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    seconds = train(args.family, pipeline, args)
    save_pipeline(pipeline, args.output_dir / "core")
    captions, _ = load_held_out(args.train_data_dir, RESOLUTION)
    scores = score_shapes(draw_original(pipeline, captions), captions, 64, TEXTURE_CELLS)
    result = {
        "images": {"core": args.steps * args.batch_size},
        "seconds": {"core": seconds},
        "curve": [],  # the families' own losses do not compare
        "scores": {"core": scores},
    }
    write_json(args.output_dir / "result.json", result)


if __name__ == "__main__":
    main()
