# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
The cascade that growing replaces: a core, and a super-resolution UNet of diffusers that is trained separately on images
and their pooled versions. Noise of random strength on the pooled images makes the UNet robust to the core's mistakes (as in
Ho et al., 2022, but the UNet is not told the strength). Guidance acts in the core only. `grow_vs_scratch` runs it as one of
its arms.
"""

import argparse
import functools
import time
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.evaluate import NUM_INFERENCE_STEPS, draw_images, load_held_out, make_noise, score
from benchmarks.foreign_core import draw_original, load_original
from benchmarks.queue_of_runs import STAGE_LEVELS
from benchmarks.tables import write_json
from diffusers_greedy_grow import GreedyGrowPipeline
from diffusers_greedy_grow.flow import add_noise, enlarge, expand, pool, sample_sigma, velocity_from_clean
from diffusers_greedy_grow.training.data.captioned import CaptionedImages
from diffusers_greedy_grow.training.data.images import normalize
from diffusers_greedy_grow.training.data.order import EpochOrder
from diffusers_greedy_grow.training.data.sources import load_captioned_data
from diffusers_greedy_grow.training.objective import SIGMA_MIN_OF_LOSS


# The largest deviation of the noise on the pooled images in training; there is none in sampling.
AUGMENTATION = 0.2


def build_unet(resolution: int, channels: tuple[int, ...], cross_attention_dim: int) -> UNet2DConditionModel:
    """Build a UNet that reads the noisy image and the enlarged low-resolution one, and text at the smallest grid."""
    levels = len(channels)
    unet = UNet2DConditionModel(
        sample_size=resolution,
        in_channels=6,
        out_channels=3,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * (levels - 1) + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
        mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    # Like our stages, it starts by returning the enlarged image.
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    return unet


@functools.cache
def count_flops(resolution: int, channels: tuple[int, ...], cross_attention_dim: int, num_tokens: int) -> int:
    """Count the operations of one image, forward and backward."""
    with torch.device("meta"):
        unet = build_unet(resolution, channels, cross_attention_dim)
        inputs = torch.empty(1, 6, resolution, resolution), torch.empty(1)
        with FlopCounterMode(display=False) as counter:
            unet(*inputs, torch.empty(1, num_tokens, cross_attention_dim)).sample.sum().backward()
    return counter.get_total_flops()


def predict(
    unet: UNet2DConditionModel,
    x: torch.Tensor,
    sigma: torch.Tensor,
    low: torch.Tensor,
    factor: int,
    **text: torch.Tensor,
) -> torch.Tensor:
    """Return the clean image: the enlarged low-resolution image plus the UNet's output."""
    enlarged = enlarge(low, factor)
    detail = unet(torch.cat([x, enlarged], dim=1), 1000 * sigma, return_dict=False, **text)[0]
    return enlarged + detail.float()


def is_ours(core: str) -> bool:
    """Return whether a folder holds one of our pipelines, not one of diffusers."""
    return DiffusionPipeline.load_config(core)["_class_name"] == "GreedyGrowPipeline"


def load_core_pipeline(core: str, resolution: int) -> GreedyGrowPipeline:
    """Load the pipeline of a core, or grow one of diffusers, for its text encoder."""
    if is_ours(core):
        return GreedyGrowPipeline.from_pretrained(core)
    return GreedyGrowPipeline.from_core(core, resolution)


def encode(pipeline: GreedyGrowPipeline, captions: list[str]) -> dict[str, torch.Tensor]:
    embeds, mask, _, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
    assert mask is not None
    embeds = embeds.float()  # a pretrained encoder may be in float16
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


def draw_low(pipeline: GreedyGrowPipeline, core: str, captions: list[str], bfloat16: bool) -> torch.Tensor:
    """Draw the core's images `(B, 3, R, R)` in [0, 1], by the `pipeline` or, if the folder `core` has another, by that one."""
    if is_ours(core):
        return draw_images(pipeline, captions, bfloat16)
    original = load_original(core).to(pipeline.device)
    return VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(draw_original(original, captions)))


@torch.no_grad()
def draw_cascade(
    unet: UNet2DConditionModel, pipeline: GreedyGrowPipeline, low: torch.Tensor, captions: list[str], bfloat16: bool
) -> torch.Tensor:
    """Draw images `(B, 3, R, R)` in [0, 1]: the core's, `low`, enlarged by the UNet from separate noise."""
    device, size = unet.device, unet.config.sample_size
    factor, low = size // low.shape[-1], 2 * low.to(device) - 1
    noise = make_noise(len(captions), size, seed=1)  # other noise than the core's
    scheduler = FlowMatchEulerDiscreteScheduler(shift=float(factor))
    images = []
    for i in range(0, len(captions), 8):
        scheduler.set_timesteps(NUM_INFERENCE_STEPS, device=device)
        x = noise[i : i + 8].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            text = encode(pipeline, captions[i : i + 8])
            for t in scheduler.timesteps:
                sigma = (t / 1000).expand(len(x))
                velocity = velocity_from_clean(x, predict(unet, x, sigma, low[i : i + 8], factor, **text), sigma)
                x = scheduler.step(velocity, t, x, return_dict=False)[0]
        images.append((x.float() / 2 + 0.5).clamp(0, 1).cpu())
    return torch.cat(images)


def train(unet: UNet2DConditionModel, pipeline: GreedyGrowPipeline, args: argparse.Namespace) -> float:
    """Train the UNet, leave it with its averaged weights, and return the seconds of training."""
    device, bfloat16 = unet.device, args.mixed_precision == "bf16"
    factor = args.resolution // pipeline.unet.sample_sizes[0]
    rows, _ = load_captioned_data(None, args.train_data_dir, "image", "text")
    images = CaptionedImages(rows, args.resolution)
    order = EpochOrder(len(images), 0, args.steps * args.batch_size, seed=(args.seed, 1))
    loader = torch.utils.data.DataLoader(images, batch_size=args.batch_size, sampler=order)
    # As in grow.py.
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), fused=True)
    warmup = min(100, args.steps // 10)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=args.steps)
    ema = EMAModel(unet.parameters(), decay=0.998)
    levels = STAGE_LEVELS
    mean, deviation, weighting = (levels[name][-1] for name in ("logit_mean", "logit_std", "loss_weighting"))
    started = time.perf_counter()
    for step, batch in enumerate(loader):
        x0 = normalize(batch["pixel_values"].to(device))
        sigma = sample_sigma(len(x0), float(factor), mean, deviation, device=device)
        low = pool(x0, factor)
        low = low + AUGMENTATION * expand(torch.rand(len(x0), device=device), low) * torch.randn_like(low)
        captions = ["" if drop else text for drop, text in zip(torch.rand(len(x0)) < 0.1, batch["caption"])]
        x = add_noise(x0, torch.randn_like(x0), sigma)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            with torch.no_grad():
                text = encode(pipeline, captions)
            clean = predict(unet, x, sigma, low, factor, **text)
        scale = 1.0 if weighting == "clean" else expand(sigma, x0).clamp(min=SIGMA_MIN_OF_LOSS)
        loss = ((clean - x0) / scale).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.4f}, {time.perf_counter() - started:.0f} s", flush=True)
    seconds = time.perf_counter() - started
    ema.copy_to(unet.parameters())
    return seconds


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    parser.add_argument("--core", required=True)
    parser.add_argument("--train_data_dir", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--resolution", type=int, required=True)
    parser.add_argument("--block_out_channels", type=int, nargs="+", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixed_precision", default="no")
    parser.add_argument("--scorer", help="Folder of a trained benchmarks/stickers_scorer.")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bfloat16 = args.mixed_precision == "bf16"
    pipeline = load_core_pipeline(args.core, args.resolution).to(device)
    unet = build_unet(args.resolution, tuple(args.block_out_channels), pipeline.unet.config.cross_attention_dim)
    unet.to(device).train()
    if bfloat16 and device.type == "cpu":
        unet.set_attention_backend("_native_math")
        pipeline.unet.set_attention_backend("_native_math")

    seconds = train(unet, pipeline, args)
    unet.eval()

    captions, real = load_held_out(args.train_data_dir, args.resolution)
    low = draw_low(pipeline, args.core, captions, bfloat16)
    images = draw_cascade(unet, pipeline, low, captions, bfloat16)
    result = {
        "images": {"cascade": args.steps * args.batch_size},
        "seconds": {"cascade": seconds},
        "curve": [],  # its loss, given the true low resolution, is not comparable
        "scores": {"cascade": score(images, captions, real, args.scorer)},
    }
    unet.save_pretrained(args.output_dir / "super-resolution")
    write_json(args.output_dir / "result.json", result)


if __name__ == "__main__":
    main()
