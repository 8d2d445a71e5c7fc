# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Cores of others in the benchmarks: trained by a plain loop, drawn by their own pipelines."""

from pathlib import Path

import pytest
import torch
from diffusers.utils import is_ftfy_available

from benchmarks import foreign_core, foreign_cores
from benchmarks.arms import SETTINGS
from benchmarks.cascade import draw_low, load_core_pipeline
from diffusers_greedy_grow import GreedyGrowPipeline
from diffusers_greedy_grow.flow import pool
from diffusers_greedy_grow.training.text.small_encoder import train_small_tokenizer

from ..testing_utils import CAPTIONS


FAMILIES = ["if", pytest.param("prx", marks=pytest.mark.skipif(not is_ftfy_available(), reason="PRXPixel needs ftfy"))]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_core_learns_draws_and_grows(family, tmp_path):
    torch.manual_seed(0)
    pipeline = foreign_core.BUILDERS[family](train_small_tokenizer(CAPTIONS))
    model = pipeline.unet if family == "if" else pipeline.transformer
    assert 2.2e6 < model.num_parameters() < 2.7e6

    # The text is what the pipeline itself tells its model, and both learn.
    text = foreign_core.encode(family, pipeline, CAPTIONS[:2])
    expected = pipeline.encode_prompt(CAPTIONS[:2], do_classifier_free_guidance=False)
    torch.testing.assert_close(text["embeds"], expected[0])
    loss = foreign_core.compute_loss(family, pipeline, torch.rand(2, 3, 16, 16) * 2 - 1, **text)
    loss.backward()
    assert all(p.grad is not None for p in pipeline.text_encoder.parameters())
    assert sum(float(p.grad.abs().sum()) > 0 for p in model.parameters() if p.grad is not None) > 20

    pipeline.save_pretrained(tmp_path)
    (image,) = foreign_core.draw_original(foreign_core.load_original(tmp_path), CAPTIONS[:1])
    assert image.size == (16, 16)
    grown = load_core_pipeline(str(tmp_path), 64)
    assert isinstance(grown, GreedyGrowPipeline) and grown.unet.sample_sizes == (16, 64)
    low = draw_low(grown, str(tmp_path), CAPTIONS[:1], bfloat16=False)
    assert low.shape == (1, 3, 16, 16) and 0 <= low.min() <= low.max() <= 1
    state = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        embeds, mask, _, _ = grown.encode_prompt(CAPTIONS[:1], do_classifier_free_guidance=False)
        output = grown.unet(state, 900.0, embeds, mask).pred_original_sample
    assert pool(output, 4).std() > 1e-3


def test_runs_and_their_table():
    jobs = [
        job
        for family in foreign_cores.NAMES
        for job in foreign_cores.make_jobs(SETTINGS[4], family, 0, Path("images"), Path("core_images"))
    ]
    assert len({job.name for job in jobs}) == len(jobs) == 9
    assert all(job.core in {other.name for other in jobs} for job in jobs if job.core)
    scores = {"shape": 0.5, "color": 0.75, "texture": 1.0, "swd_64": 20.0}
    records = {
        job.name: {
            "name": job.name,
            "keys": job.keys,
            "curve": [{"val_loss": 0.05}],
            "seconds": {"end": 60.0},
            "scores": {"end": scores},
        }
        for job in jobs
    }
    rows = foreign_cores.make_rows(records)
    # Our own core is a run of grow_vs_scratch, whose own images are not scored.
    assert [(row["core"], row["images of"]) for row in rows] == [
        *((foreign_cores.NAMES["own"], arm) for arm in ("grown", "cascade")),
        *((foreign_cores.NAMES[core], arm) for core in ("if", "prx") for arm in ("core", "grown", "cascade")),
    ]
    assert all(row["shapes"] == "0.50" and row["minutes"] == "1.0" for row in rows)
