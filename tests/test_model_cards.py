# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The cards in `model_cards/` are valid, complete and up to date with the template, and their code runs."""

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard

from diffusers_greedy_grow.hub.cards import TAGS, make_card

from .testing_utils import make_core, make_grown, make_pipeline


CARDS = sorted((Path(__file__).parents[1] / "model_cards").glob("*/README.md"))
IDS = [path.parent.name for path in CARDS]
REPOSITORY = "diffusers-greedy-grow/shapes-64"


def read_lineage(text: str) -> list[dict[str, Any]]:
    """Read the lineage back from a card's table."""
    lineage: list[dict[str, Any]] = []
    for row in re.findall(r"^\| (.*) \|$", text.split("## Training history")[1].split("## ")[0], re.MULTILINE)[2:]:
        phase, resolution, trained, *numbers = row.split(" | ")
        if phase == "grown, `init='preserve'`":
            lineage.append({"grown_to": int(resolution), "init": "preserve"})
        else:
            entry = {"phase": phase, "resolution": int(resolution), "trained": trained}
            lineage.append(entry | dict(zip(("steps", "images", "seed"), map(int, numbers), strict=True)))
    return lineage


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
    assert f"This card describes the tag `{phase}`" in card.text
    assert re.search(rf"\| {phase} \| (16|64) \| .* \| \d+ \| \d+ \| 0 \|", card.text)
    for name, value in figures.items():
        assert f"| {name} | {value} |" in card.text
    (image,) = re.findall(r"!\[Samples\]\((.*)\)", card.text)
    assert (path.parent / image).exists()


@pytest.mark.parametrize("path", CARDS, ids=IDS)
def test_the_text_is_what_a_push_writes(path, monkeypatch):
    """A new template needs new cards: the command in model_cards/README.md makes them."""
    found = ModelCard.load(path)
    core = make_core()
    pipeline = make_pipeline(core if path.parent.name == "core" else make_grown(core, 64))
    pipeline.unet.register_to_config(_lineage=read_lineage(found.text))
    millions = float(re.search(r"It has (.*) M parameters", found.text)[1])
    monkeypatch.setattr(pipeline.unet, "num_parameters", lambda: millions * 1e6)
    card = make_card(
        pipeline,
        REPOSITORY,
        license=found.data.license,
        eval_results=found.data.eval_results,
        samples="samples.png",
        gallery={entry["output"]["url"]: entry["text"] for entry in found.data.get("widget") or []},
        curves="curves.png" if (path.parent / "curves.png").exists() else None,
        tag=path.parent.name,
    )
    assert str(found) == str(card)


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
        exec(compile(block.replace(REPOSITORY, "owner/cards-64"), str(path), "exec"), names)
    inner = (16,) if path.parent.name == "core" else (16, 32)
    assert names["pipe"].unet.sample_sizes == inner and (tmp_path / "image.png").exists()
    assert names["grown"].unet.sample_sizes == (*inner, 64 if path.parent.name == "core" else 256)
