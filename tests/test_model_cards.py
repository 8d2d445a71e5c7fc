# Copyright 2026 The diffusers-greedy-grow authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The cards in `model_cards/`: valid, complete, and every block of code in them runs."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from diffusers_greedy_grow.hub import TAGS

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
    (picture,) = re.findall(r"!\[Samples\]\((.*)\)", card.text)
    assert (path.parents[1] / "core" / picture).exists() or (path.parent / picture).exists()


@pytest.mark.parametrize("path", CARDS, ids=IDS)
def test_code(path, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipeline = make_pipeline(make_core() if path.parent.name == "core" else make_grown())
    pipeline.push_to_hub("owner/shapes-64")
    blocks = re.findall("```python\n(.*?)```", path.read_text(), re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    for block in blocks:
        exec(compile(block.replace("diffusers-greedy-grow/shapes-64", "owner/shapes-64"), str(path), "exec"), names)
    assert (tmp_path / "picture.png").exists() and names["grown"].unet.config.sample_size > 64 - 1
