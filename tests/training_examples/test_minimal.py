# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The method in one page, run for real with fewer steps and images."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "training_examples" / "minimal.py"
SMALL = "from training_examples.minimal import main; main(core_steps=50, stage_steps=50, num_images=200, output={!r})"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    """The folder and the log of a small run."""
    folder = tmp_path_factory.mktemp("minimal")
    command = [sys.executable, "-c", SMALL.format(str(folder))]
    return folder, subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_it_fits_on_one_page():
    assert len(SCRIPT.read_text().splitlines()) <= 80


@pytest.mark.slow
def test_losses_fall(run):
    for resolution in (16, 64):
        losses = [float(loss) for loss in re.findall(rf"^{resolution} px, .*: loss (\S+)$", run[1], re.MULTILINE)]
        assert len(losses) == 2 and losses[1] < 0.95 * losses[0]


@pytest.mark.slow
def test_what_it_saves_loads_and_samples(run):
    folder, _ = run
    core, grown = (DiffusionPipeline.from_pretrained(folder / name) for name in ("core", "grown-64"))
    assert core.unet.sample_sizes == (16,) and core.scheduler.config.shift == 1
    assert grown.unet.sample_sizes == (16, 64) and grown.scheduler.config.shift == 4
    for name, value in core.unet.state_dict().items():
        assert value.equal(grown.unet.core.state_dict()[name]), "the stage trains around a frozen core"
    prompt = "a large red striped circle on a white background"
    (image,) = grown(prompt, num_inference_steps=2).images
    assert image.size == (64, 64) and np.asarray(image).std() > 0


@pytest.mark.slow
def test_it_draws_a_grid_of_both(run):
    folder, log = run
    prompts = re.findall(r"^a (?:small|large) .* background$", log, re.MULTILINE)
    with Image.open(folder / "samples.png") as grid:
        assert len(prompts) == 8 and grid.size == (8 * 128, 2 * 128)
        images = np.asarray(grid, dtype=float)
    # Each pixel of the core's row is a square of 8 x 8; the grown model's are of 2 x 2.
    core = images[:128].reshape(16, 8, 128, 8, 3)
    assert (
        np.ptp(core, axis=(1, 3)).max() == 0 and np.ptp(images[128:].reshape(16, 8, 128, 8, 3), axis=(1, 3)).max() > 0
    )
