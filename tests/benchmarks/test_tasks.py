# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The benchmark of the pipelines that start from an image, on a few shapes with a tiny model."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import tables, tasks
from diffusers_greedy_grow.training.shapes.scenes import write_shapes

from ..testing_utils import make_grown, make_pipeline


def test_rows_and_images(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "NUM_INFERENCE_STEPS", 2)
    write_shapes(tmp_path / "shapes", num_train=8, num_validation=10, image_size=64, texture_cells=16)
    make_pipeline(make_grown(sample_size=64), shift=4.0).save_pretrained(tmp_path / "grown")
    results = tmp_path / "results"
    results.mkdir()
    arguments = ["--pipeline", str(tmp_path / "grown"), "--data", str(tmp_path / "shapes"), "--num_images", "9"]
    tasks.main([*arguments, "--results_dir", str(results)])
    report = (results / "tasks.md").read_text(encoding="utf-8")
    rows = {
        line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in report.splitlines() if "|" in line
    }
    # Interpolation keeps the small image to a few gray levels, and `exact` up to rounding in bfloat16.
    assert float(rows["Lanczos"][0]) > float(rows["bicubic"][0]) > 25 and float(rows["grown model, exact"][0]) > 35
    assert float(rows["grown model"][0]) < float(rows["grown model, exact"][0])
    assert rows["without"][-1].startswith("0") and rows["jump_length=4, jump_n_sample=3"][-1].startswith("0")
    shown = {path.name: np.array(Image.open(path)) for path in Path(results).glob("*.png")}
    assert {*shown} == {f"tasks_{name}.png" for name in ("upscaling", "inpainting", "img2img", "levels", "gallery")}
    assert {"64 px", "level_images[16]", "64 px, pooled", "height=16, width=16"} <= rows.keys()
    assert all(image.std() > 10 for image in shown.values())


@pytest.mark.slow  # two processes of their own
def test_tiles_need_less_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "SIDES", (256,))
    tasks.main(["--tiles", "--results_dir", str(tmp_path)])
    (row,) = tables.read_rows(tmp_path / "tasks_tiles.json")
    assert float(row["in tiles, GB"]) < float(row["as a whole, GB"])
