# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The README's code runs in its order, against the loopback Hub; only `user` is the one who is logged in there."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model_state_dict

from diffusers_greedy_grow import GreedyGrowPipeline

from .testing_utils import draw_one, make_core, make_grown, make_pipeline


README = (Path(__file__).parents[1] / "README.md").read_text()


def code_of(title: str) -> list[str]:
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)
    return re.findall("```python\n(.*?)```", section.replace('"user/', '"owner/'), re.DOTALL)


@pytest.fixture
def published(hub, tmp_path, monkeypatch):
    """What the sections start from: a repository with the tag `core`, an adapter of the core, and a folder of a run."""
    monkeypatch.chdir(tmp_path)
    core = make_core()
    make_pipeline(core).push_to_hub("owner/shapes-64")
    HfApi().create_tag("owner/shapes-64", tag="core", exist_ok=True)
    grown = make_pipeline(make_grown(core))
    grown.register_to_config(detail_variances=[0.03])
    grown.push_to_hub("owner/shapes-64")
    grown.save_pretrained("output/grown-64")
    core.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    GreedyGrowPipeline.save_lora_weights("lora", get_peft_model_state_dict(core))
    HfApi().create_repo("owner/green-circles", exist_ok=True)
    HfApi().upload_folder(repo_id="owner/green-circles", folder_path="lora")
    return tmp_path


def test_from_the_hub(published, hub):
    blocks, names = code_of("From the Hub") + code_of("LoRA"), {}
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert type(names["pipe"]) is GreedyGrowPipeline and names["core"].unet.sample_sizes == (16,)
    again = DiffusionPipeline.from_pretrained("owner/shapes-256")
    assert again.unet.sample_sizes == (16, 32, 256)
    assert (
        "private" in HfApi().model_info("owner/shapes-256").__dict__ and HfApi().model_info("owner/shapes-256").private
    )
    assert {"owner/unet-128", "owner/shapes-64-copy"} <= {
        request.split("/api/models/")[1].split("/commit")[0] for request in hub.requests if "/commit/" in request
    }
    pipe, adapter = names["pipe"], make_pipeline(make_grown(make_core()))
    assert torch.equal(draw_one(pipe), draw_one(adapter))  # unloaded: the base, bit for bit
    pipe.load_lora_weights("owner/green-circles")
    assert not torch.allclose(draw_one(pipe), draw_one(adapter), atol=1e-3)
    pipe.unload_lora_weights()
    assert (published / "circle.png").exists() and (published / "green.png").exists()
    assert not names["pipe"].get_list_adapters()


def test_quickstart_and_faster_sampling(published):
    blocks, names = code_of("Quickstart") + code_of("Faster sampling"), {}
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert (published / "circle.png").exists() and (published / "soft.png").exists()
