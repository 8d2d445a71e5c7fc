# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The method in one page: train a core on captioned shapes of 16 px, grow it to 64 px, train what is new, and sample."""

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils import make_image_grid

from diffusers_greedy_grow import GreedyGrowPipeline, ShallowUNet2DModel
from diffusers_greedy_grow.flow import add_noise, pool, sample_sigma
from diffusers_greedy_grow.training.shapes.scenes import BACKGROUNDS, HELD_OUT, is_held_out, render, sample_scene
from diffusers_greedy_grow.training.text.small_encoder import build_small_text_encoder, train_small_tokenizer


def train(pipe, images, captions, steps, lr, logit_mean, logit_std, sigma_min, batch_size=16):
    """Train what is not frozen. The loss is the squared error of the predicted image over `max(sigma, sigma_min) ** 2`."""
    parameters = [p for part in (pipe.unet, pipe.text_encoder) for p in part.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    losses = []
    for step in range(1, steps + 1):
        rows = torch.randint(len(images), (batch_size,)).tolist()
        x0 = images[rows]
        # One caption in ten is left empty: guidance needs the model's answer without a caption.
        texts = ["" if torch.rand(()) < 0.1 else captions[row] for row in rows]
        embeds, mask, _, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False)
        # Larger images need more noise to be hidden as much. So the shift grows with the resolution: 1 at 16 px, 4 at 64.
        sigma = sample_sigma(batch_size, pipe.scheduler.config.shift, logit_mean, logit_std)
        x = add_noise(x0, torch.randn_like(x0), sigma)
        error = pipe.unet(x, 1000 * sigma, embeds, mask).pred_original_sample - x0
        loss = (error.square().mean(dim=(1, 2, 3)) / sigma.clamp(min=sigma_min) ** 2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 25 == 0:
            print(f"{x0.shape[-1]} px, step {step} of {steps}: loss {np.mean(losses[-25:]):.4f}", flush=True)


def main(core_steps=800, stage_steps=400, num_images=8000, output="output/minimal"):
    # 1. Captioned shapes. Some combinations of attributes are held out, to be drawn at the end.
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    scenes = [scene for scene in (sample_scene(rng) for _ in range(num_images)) if not is_held_out(scene)]
    captions = [scene.caption for scene in scenes]
    images = torch.from_numpy(np.stack([render(scene, 64) for scene in scenes])).permute(0, 3, 1, 2) / 127.5 - 1

    # 2. The core learns what is where, on images averaged down to 16 px, and the text encoder learns along with it.
    # Layout is decided at high noise. The error of the velocity counts, which is the image's error over sigma.
    tokenizer = train_small_tokenizer(captions)
    text_encoder = build_small_text_encoder(tokenizer, hidden_size=128, num_layers=1)
    sizes = {"hidden_size": 128, "num_layers": 4, "num_attention_heads": 2, "cross_attention_dim": 128}
    core = ShallowUNet2DModel(sample_size=16, patch_size=2, **sizes)
    core.zero_init_output()
    pipe = GreedyGrowPipeline(core, FlowMatchEulerDiscreteScheduler(shift=1.0), text_encoder, tokenizer)
    train(pipe, pool(images, 4), captions, core_steps, lr=3e-3, logit_mean=1.0, logit_std=1.0, sigma_min=0.05)
    pipe.save_pretrained(f"{output}/core")

    # 3. Grow: put an encoder and a decoder around the core. They learn the detail while everything else is frozen.
    # Detail shows at lower noise. The error of the image counts, so that the lowest noise does not outweigh the rest.
    grown = GreedyGrowPipeline.from_core(pipe, sample_size=64, block_out_channels=(64,))
    grown.unet.freeze_core()
    grown.text_encoder.requires_grad_(False)
    train(grown, images, captions, stage_steps, lr=1.5e-3, logit_mean=-0.7, logit_std=1.3, sigma_min=1.0)
    grown.save_pretrained(f"{output}/grown-64")

    # 4. Sample both from the same noise. Averaging 4 x 4 pixels divides the noise's standard deviation by 4.
    prompts = [f"{item.phrase} on a {color} background" for item, color in zip(HELD_OUT, [*BACKGROUNDS, *BACKGROUNDS])]
    noise = torch.randn(len(prompts), 3, 64, 64)
    drawn = pipe(prompts, latents=4 * pool(noise, 4)).images + grown(prompts, latents=noise).images
    make_image_grid([image.resize((128, 128), 0) for image in drawn], 2, len(prompts)).save(f"{output}/samples.png")
    print(*prompts, f"{output}/samples.png: the core's images, then those of the grown model", sep="\n")


if __name__ == "__main__":
    main()
