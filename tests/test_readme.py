# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The code of the READMEs runs in its order, against the loopback Hub, where `user` is logged in as `owner`."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model_state_dict

from diffusers_greedy_grow import GreedyGrowPipeline, ShallowUNet2DModel, __version__
from diffusers_greedy_grow.training.arguments import DataArguments, LoraArguments, ModelArguments, TrainingArguments
from diffusers_greedy_grow.training.parsing import parse_buckets
from diffusers_greedy_grow.training.plan import check_buckets

from .testing_utils import draw_one, make_core, make_grown, make_pipeline, run_blocks


ROOT = Path(__file__).parents[1]
DOCS = tuple(f"docs/{page.name}" for page in sorted(ROOT.glob("docs/*.md")))
PAGES = ("README.md", "training_examples/README.md", "CONTRIBUTING.md", *DOCS)
README, TRAINING_README = ((ROOT / page).read_text() for page in PAGES[:2])


def code_of(text: str, title: str) -> list[str]:
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    return re.findall("```python\n(.*?)```", section.replace('"user/', '"owner/'), re.DOTALL)


@pytest.fixture
def published(hub, tmp_path, monkeypatch):
    """Prepare what the sections start from: a repository with the tag `core`, an adapter of the core, and a folder of a run."""
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


def test_readme_code(published):
    titles = ("Quickstart", "Grow and publish", "Other tasks and sizes", "Sample fast")
    quickstart, grow, tasks, fast = (code_of(README, title) for title in titles)
    assert len(quickstart) == len(grow) == len(tasks) == len(fast) == 1
    run_blocks(quickstart + grow + tasks + fast)
    assert (published / "circle.png").exists() and (published / "soft.png").exists()
    assert DiffusionPipeline.from_pretrained("owner/shapes-256").unet.sample_sizes == (16, 32, 256)
    assert "license: apache-2.0" in Path(HfApi().hf_hub_download("owner/shapes-256", "README.md")).read_text(
        encoding="utf-8"
    )
    assert HfApi().model_info("owner/unet-512").private


def test_training_readme_code(published, hub):
    publish, lora = code_of(TRAINING_README, "Publish"), code_of(TRAINING_README, "LoRA")
    assert len(publish) == len(lora) == 1
    names = run_blocks(publish + lora)
    assert type(names["pipe"]) is GreedyGrowPipeline
    assert type(names["core"].unet) is ShallowUNet2DModel
    assert any("/api/models/owner/shapes-64-copy/commit" in request for request in hub.requests)
    pipe, base = names["pipe"], make_pipeline(make_grown(make_core()))
    assert torch.equal(draw_one(pipe), draw_one(base))  # unloaded: the base, bit for bit
    pipe.load_lora_weights("owner/green-circles")
    assert not torch.allclose(draw_one(pipe), draw_one(base), atol=1e-3)
    pipe.unload_lora_weights()
    assert (published / "circle.png").exists() and (published / "green.png").exists()
    assert not pipe.get_list_adapters()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    missing = [link for link in links if "://" not in link and not (ROOT / page).parent.joinpath(link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_flags_of_commands_exist(page):
    """Commands of our scripts use arguments that exist, and so do flags in running text that belong to no other program."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    grow = {field.name for part in (DataArguments, ModelArguments, TrainingArguments) for field in fields(part)}
    known = {"grow": grow, "train_lora": {field.name for field in fields(LoraArguments)}}
    commands = re.findall(r"^ {4,}.*training_examples/(grow|train_lora)\.py(.*)", text, re.MULTILINE)
    commands += [
        ("grow", arguments) for arguments in re.findall(r"^    greedy-grow (?:train|plan) (.*)", text, re.MULTILINE)
    ]
    for script, arguments in commands:
        assert not set(re.findall(r"--(\w+)", arguments.split("#")[0])) - known[script] - {"config"}
    # Those with underscores and a sentence around them, other than accelerate's.
    accelerate = {"num_processes", "num_cpu_threads_per_process", "config_file", "machine_rank", "main_process_ip"}
    accelerate |= {"main_process_port", "dynamo_backend", "dynamo_use_regional_compilation"}
    others = {
        flag
        for file in ("training_examples/data/stickers.py", "greedy_grow/main.py")
        for flag in re.findall(r'"--(\w+)"', (ROOT / file).read_text(encoding="utf-8"))
    }
    assert not set(re.findall(r"--(\w+_\w+)", text)) - known["grow"] - known["train_lora"] - others - accelerate


def test_what_shapes_other_than_squares_need_is_said_where_sizes_are_chosen():
    for text in (README, TRAINING_README, GreedyGrowPipeline.__call__.__doc__):
        (paragraph,) = re.findall(r"[^.]*\bsquares[^.]*\bstretches .*?aspect_ratio_buckets", text, re.DOTALL)
        assert len(paragraph) < 700
    for buckets in re.findall(r'--aspect_ratio_buckets "([^"]+)"', README + TRAINING_README):
        resolution = parse_buckets(buckets)[0][0]
        check_buckets(buckets, [resolution // 4, resolution], make_core(resolution // 4, patch_size=2))


def test_readme_is_short():
    assert len(README.splitlines()) <= 160


def test_figures_of_both_themes_differ_in_colors_only():
    light, dark = ((ROOT / "assets" / f"architecture-{theme}.svg").read_text() for theme in ("light", "dark"))
    assert light != dark
    assert re.sub("#[0-9a-f]{6}", "", light) == re.sub("#[0-9a-f]{6}", "", dark)


def test_version_is_the_same_everywhere():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{__version__}] - " in (ROOT / "CHANGELOG.md").read_text()
