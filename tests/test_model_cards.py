# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The cards in `model_cards/`: valid, complete, and every block of code in them runs."""

import re
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard

from diffusers_greedy_grow.hub.cards import TAGS

from .testing_utils import make_core, make_grown, make_pipeline


CARDS = sorted((Path(__file__).parents[1] / "model_cards").glob("*/README.md"))
IDS = [path.parent.name for path in CARDS]


def test_there_is_a_card_for_each_phase_of_the_demo():
    assert IDS == ["core", "grown-64", "grown-64-detail"]


@pytest.mark.parametrize("path", CARDS, ids=IDS)
def test_metadata(path, hub):
    card, phase = ModelCard.load(path), path.parent.name
    card.validate()
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
    assert card.data.license == "apache-2.0" and set(TAGS) <= set(card.data.tags)
    figures = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert {"held-out loss", "color", "shape", "texture"} <= figures.keys()
    assert f"This is the state of the tag `{phase}`" in card.text
    assert re.search(rf"\| {phase} \| (16|64) \| .* \| \d+ \| \d+ \| 0 \|", card.text)
    for name, value in figures.items():
        assert f"| {name} | {value} |" in card.text
    (image,) = re.findall(r"!\[Samples\]\((.*)\)", card.text)
    assert (path.parent / image).exists()


@pytest.fixture(scope="module")
def published():
    """A repository with small models under the tags of the demo."""
    core = make_core()
    for tag, model in (("core", core), ("grown-64-detail", make_grown(core)), ("grown-64", make_grown(core))):
        make_pipeline(model).push_to_hub("owner/cards-64")
        HfApi().create_tag("owner/cards-64", tag=tag)


@pytest.mark.parametrize("path", CARDS, ids=IDS)
def test_code(path, published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall("```python\n(.*?)```", path.read_text(), re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    for block in blocks:
        exec(compile(block.replace("diffusers-greedy-grow/shapes-64", "owner/cards-64"), str(path), "exec"), names)
    inner = (16,) if path.parent.name == "core" else (16, 32)
    assert names["pipe"].unet.sample_sizes == inner and (tmp_path / "image.png").exists()
    assert names["grown"].unet.sample_sizes == (*inner, 64 if path.parent.name == "core" else 256)
