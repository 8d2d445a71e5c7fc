# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The code and the commands of docs/ run, and the site is built without warnings."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import diffusers_greedy_grow
from diffusers_greedy_grow import (
    GreedyGrowImg2ImgPipeline,
    GreedyGrowInpaintPipeline,
    GreedyGrowModularPipeline,
    GreedyGrowPipeline,
    GreedyGrowUpscalePipeline,
)
from greedy_grow.main import build_parser

from .testing_utils import make_core, make_grown, make_pipeline, run_blocks


ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("docs/*.md"))


def code_of(page: str) -> list[str]:
    return re.findall("```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def test_every_block_of_code_is_in_a_test():
    pages = {page.name for page in PAGES if "```python" in page.read_text()}
    assert pages == {"sampling.md", "your_images.md"}


def test_sampling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = make_pipeline(make_grown(sample_size=64), shift=4.0)
    pipe.register_to_config(detail_variances=[0.03])
    pipe.save_pretrained("output/grown-64")
    names = run_blocks(code_of("sampling.md"))
    assert names["core_image"].size == (16, 16) and names["image"].size == names["large"].size == (64, 64)
    half, image = (names[name].crop((0, 0, 32, 64)) for name in ("half", "image"))
    assert half.tobytes() == image.tobytes()
    assert names["again"].size == (16, 16)


def test_your_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_pipeline(make_core()).save_pretrained("output/mine/grown-128")
    run_blocks(code_of("your_images.md"))
    assert Image.open("cat.png").size == (16, 16)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_complete(page):
    """Commands of `greedy-grow` have arguments that it takes; those of `train` and `plan` are grow.py's, see test_readme."""
    text = page.read_text().replace("\\\n", " ")
    for line in re.findall(r"^    greedy-grow (.*)$", text, re.MULTILINE):
        arguments = [part.strip('"') for part in re.findall(r'"[^"]*"|\S+', line)]
        if arguments != ["--help"]:
            _, rest = build_parser().parse_known_args(arguments)
            assert not rest or arguments[0] in ("train", "plan"), line


def test_all_public_names_are_in_the_reference():
    text = (ROOT / "docs" / "api.md").read_text()
    names = [name for name in diffusers_greedy_grow.__all__ if name != "ModelMixin"]  # diffusers' own
    assert [name for name in names if not re.search(rf"^::: \S+\.{name}$", text, re.MULTILINE)] == []


@pytest.mark.slow
def test_the_site_is_built_without_warnings(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[-2000:]
    api = (tmp_path / "docs" / "api" / "index.html").read_text(encoding="utf-8")
    assert "guidance_resolution" in api and "shift_sigma" in api


@pytest.mark.parametrize(
    "documented",
    [
        GreedyGrowPipeline.__call__,
        GreedyGrowImg2ImgPipeline.__call__,
        GreedyGrowInpaintPipeline.__call__,
        GreedyGrowUpscalePipeline.__call__,
        GreedyGrowModularPipeline,
    ],
)
def test_examples_of_docstrings(documented, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_pipeline(make_grown(sample_size=64), shift=4.0).save_pretrained("output/grown-64")
    for name, size in (("sketch", 64), ("circle", 64), ("mask", 64), ("circle-16", 16)):
        Image.new("RGB", (size, size), "white").save(f"{name}.png")
    lines = re.findall(r"^ *>>> (.*)$", documented.__doc__, re.MULTILINE)
    assert len(lines) > 3
    run_blocks(["\n".join(lines)])
