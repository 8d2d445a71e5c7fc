# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""diffusers finds our classes by name, and still finds its own."""

import json
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers import AutoModel, AutoPipelineForText2Image, DiffusionPipeline
from diffusers.modular_pipelines import modular_pipeline
from diffusers.pipelines import auto_pipeline, pipeline_loading_utils

import diffusers_greedy_grow
from diffusers_greedy_grow import (
    GreedyGrowBlocks,
    GreedyGrowImg2ImgPipeline,
    GreedyGrowInpaintPipeline,
    GreedyGrowModularPipeline,
    GreedyGrowPipeline,
    GrowableUNet2DConditionModel,
    ShallowUNet2DModel,
    registration,
)

from .testing_utils import make_core, make_grown, make_pipeline


MODULAR = (GreedyGrowModularPipeline, GreedyGrowBlocks)
MODELS = (ShallowUNet2DModel, GrowableUNet2DConditionModel)
PIPELINES = {
    "AUTO_TEXT2IMAGE_PIPELINES_MAPPING": GreedyGrowPipeline,
    "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING": GreedyGrowImg2ImgPipeline,
    "AUTO_INPAINT_PIPELINES_MAPPING": GreedyGrowInpaintPipeline,
}


@pytest.mark.parametrize("make", [make_core, make_grown])
@pytest.mark.parametrize("place", ["local", "hub", "cache"])
def test_all_ways_to_load(make, place, hub, tmp_path):
    pipeline = make_pipeline(make())
    where, kwargs = str(tmp_path), {}
    if place == "local":
        pipeline.save_pretrained(tmp_path)
    else:
        where = f"owner/ways-{make.__name__}-{place}"
        pipeline.push_to_hub(where)
    if place == "cache":
        DiffusionPipeline.from_pretrained(where)
        kwargs = {"local_files_only": True}
    before = len(hub.requests)
    for loaded in (
        DiffusionPipeline.from_pretrained(where, **kwargs),
        GreedyGrowPipeline.from_pretrained(where, **kwargs),
        AutoPipelineForText2Image.from_pretrained(where, **kwargs),
        AutoPipelineForText2Image.from_pipe(GreedyGrowPipeline.from_pretrained(where, **kwargs)),
    ):
        assert type(loaded) is GreedyGrowPipeline and type(loaded.unet) is type(pipeline.unet)
        assert loaded.config.max_sequence_length == pipeline.config.max_sequence_length
    model = AutoModel.from_pretrained(where, subfolder="unet", **kwargs)
    assert type(model) is type(pipeline.unet)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in pipeline.unet.state_dict().items())
    if place == "cache":
        assert len(hub.requests) == before


def test_a_bare_model_folder(tmp_path):
    make_grown().save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(str(tmp_path))) is GrowableUNet2DConditionModel


def test_the_index_names_the_package_only(tmp_path):
    make_pipeline(make_grown()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "GreedyGrowPipeline"
    assert index["unet"] == ["diffusers_greedy_grow", "GrowableUNet2DConditionModel"]


def test_registering_twice_changes_nothing():
    modular_names = modular_pipeline.MODULAR_PIPELINE_MAPPING
    tables = (
        pipeline_loading_utils.LOADABLE_CLASSES,
        modular_names,
        *(getattr(auto_pipeline, name) for name in PIPELINES),
    )
    before = [dict(table) for table in tables]
    registration.register(diffusers_greedy_grow.__name__, MODELS, PIPELINES, MODULAR, "greedy-grow")
    assert [dict(table) for table in tables] == before


def test_classes_of_diffusers_still_load(tmp_path):
    scheduler = diffusers.DDPMScheduler()
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        norm_num_groups=4, add_attention=False,
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is diffusers.DDPMPipeline and type(loaded.unet) is diffusers.UNet2DModel
    assert type(AutoModel.from_pretrained(str(tmp_path / "unet"))) is diffusers.UNet2DModel


def test_a_version_of_diffusers_without_the_tables(monkeypatch):
    monkeypatch.delattr(auto_pipeline, "AUTO_TEXT2IMAGE_PIPELINES_MAPPING")
    with pytest.raises(
        ImportError, match='has no table `.*AUTO_TEXT2IMAGE_PIPELINES_MAPPING`.*pip install "diffusers>='
    ):
        registration.register(diffusers_greedy_grow.__name__, MODELS, PIPELINES, MODULAR, "greedy-grow")


def test_importing_the_plugin_registers_it():
    code = (
        "import diffusers_greedy_grow, diffusers; from diffusers import AutoModel; "
        "assert diffusers.GreedyGrowPipeline is diffusers_greedy_grow.GreedyGrowPipeline"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
