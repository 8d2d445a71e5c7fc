# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Tiny models, inputs and pipelines with real components."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusers_greedy_grow import GreedyGrowPipeline, GrowableUNet2DConditionModel, ShallowUNet2DModel
from diffusers_greedy_grow.training.text.small_encoder import build_small_text_encoder, train_small_tokenizer


TEXT_DIM = 32
CAPTIONS = ["a large red circle on a white background", "a small blue square", "two green stars above a yellow ring"]


def peak_memory() -> int:
    """The most that this process has held, in bytes. Not `ru_maxrss`, which begins with that of the process that started this one."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))[1]) * 1024


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Gives every parameter a random value, so that no test passes because a layer starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.5 / max(1, parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def make_core(sample_size: int = 16, patch_size: int = 4, **kwargs) -> ShallowUNet2DModel:
    config = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "cross_attention_dim": TEXT_DIM, **kwargs}
    torch.manual_seed(0)
    return randomize(ShallowUNet2DModel(sample_size=sample_size, patch_size=patch_size, **config))


def make_grown(core: ShallowUNet2DModel | GrowableUNet2DConditionModel | None = None, sample_size: int = 32, **kwargs):
    """A grown model in which everything, the new stage too, has random weights."""
    torch.manual_seed(1)
    config = {"block_out_channels": (16, 24), **kwargs}
    return randomize(GrowableUNet2DConditionModel.from_core(core or make_core(), sample_size, **config), seed=1)


def make_inputs(
    batch_size: int = 2, height: int = 16, width: int = 16, seed: int = 0, text_dim: int | None = TEXT_DIM
):
    """A state, timesteps, text embeddings and a mask that leaves the end of the first text out."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "sample": torch.randn(batch_size, 3, height, width, generator=generator),
        "timestep": 20 + 960 * torch.rand(batch_size, generator=generator),
    }
    if text_dim is not None:
        mask = torch.ones(batch_size, 6, dtype=torch.bool)
        mask[0, 4:] = False
        inputs["encoder_hidden_states"] = torch.randn(batch_size, 6, text_dim, generator=generator)
        inputs["encoder_attention_mask"] = mask
    return inputs


def make_pipeline(unet: torch.nn.Module | None = None, shift: float = 1.0) -> GreedyGrowPipeline:
    torch.manual_seed(2)
    tokenizer = train_small_tokenizer(CAPTIONS)
    pipeline = GreedyGrowPipeline(
        unet=unet or make_core(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        text_encoder=build_small_text_encoder(tokenizer, hidden_size=TEXT_DIM, num_layers=1).eval(),
        tokenizer=tokenizer,
        max_sequence_length=24,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_one(pipeline: GreedyGrowPipeline, **kwargs) -> torch.Tensor:
    """One image `(1, C, H, W)` in [0, 1], in three steps from always the same noise."""
    size = pipeline.unet.config.sample_size
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    return pipeline("a small blue square", latents=noise, num_inference_steps=3, output_type="pt", **kwargs).images


def run_blocks(blocks: list[str]) -> dict:
    """Run blocks of code of a page one after the other, and return their names."""
    names: dict = {}
    for block in blocks:
        exec(compile(block, "page", "exec"), names)
    return names


def run_in_a_shell(command: str) -> None:
    """With the `hf` of this environment."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(command, shell=True, check=True, env={**os.environ, "PATH": path})


def heed_hangups() -> None:
    """Let a child process receive SIGHUP, for `preexec_fn`: it would inherit that `nohup` ignores the signal."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
