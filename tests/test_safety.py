# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Hostile or damaged files: loading them raises an error that names the problem, before it allocates memory or runs code."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline
from packaging.version import Version
from safetensors.torch import load_file

from diffusers_greedy_grow import GreedyGrowPipeline, GrowableUNet2DConditionModel, ShallowUNet2DModel

from .testing_utils import make_core, make_grown, make_pipeline, peak_memory


# diffusers 0.42.0 has no message of its own for this.
NO_CLASS = (
    "no class `../../Evil`" if Version(diffusers.__version__) >= Version("0.42.1") else "no attribute ../../Evil"
)


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved grown model."""
    make_grown().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "values,message",
    [
        ({"hidden_size": 2**40}, "`hidden_size=1099511627776` must be a whole number from 1 to 65536"),
        ({"num_layers": 10**9}, "`num_layers=1000000000` must be a whole number from 1 to 1024"),
        ({"sample_size": -32}, "`sample_size=-32`"),
        ({"sample_size": 10**12}, "`sample_size=1000000000000`"),
        ({"block_out_channels": [[16, 10**10]]}, r"`block_out_channels=\[\[16, 10000000000\]\]` must be a tuple of tuples"),
        ({"block_out_channels": [16, 24]}, r"`block_out_channels=\[16, 24\]`"),
        ({"layers_per_block": [10**6]}, r"`layers_per_block=\[1000000\]` must be a tuple of whole numbers from 1 to 64"),
        ({"inner_sample_sizes": "16"}, "`inner_sample_sizes='16'`"),
        ({"hidden_size": "32"}, "`hidden_size='32'`"),
        ({"num_attention_heads": True}, "`num_attention_heads=True`"),
        ({"mlp_ratio": float("inf")}, "`mlp_ratio=inf` must be a number from 1 to 64"),
        ({"patch_size": None}, "`patch_size=None`"),
        ({"init": "../../etc/passwd"}, "`init='../../etc/passwd'` is unknown"),
        ({"new": 1}, r"The configuration has \['new'\], which a GrowableUNet2DConditionModel does not know"),
        ({"auto_map": {"AutoModel": "evil.Evil"}}, "auto_map|custom code"),
        ({"_lineage": "<script>"}, "The configuration's `_lineage` must be a list of dictionaries"),
    ],
)  # fmt: skip
def test_a_hostile_configuration(folder, values, message):
    edit(folder / "config.json", **values)
    before = peak_memory()
    for load in (GrowableUNet2DConditionModel.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(str(folder))
    with pytest.raises((OSError, ValueError), match=message):
        GrowableUNet2DConditionModel.from_core(folder, 64, block_out_channels=(8,))
    assert peak_memory() - before < 200 * 2**20


def test_a_valid_configuration_that_does_not_fit_the_weights(folder):
    """The configuration describes 300 GB of weights. They are never allocated: the shapes are compared first."""
    edit(folder / "config.json", hidden_size=16384, num_attention_heads=64, num_layers=24)
    before = peak_memory()
    with pytest.raises((RuntimeError, ValueError), match="shape"):
        GrowableUNet2DConditionModel.from_pretrained(folder)
    with pytest.raises(OSError, match="shape"):
        GrowableUNet2DConditionModel.from_core(folder, 64, block_out_channels=(8,))
    assert peak_memory() - before < 500 * 2**20


@pytest.mark.parametrize(
    "values,message",
    [
        ({"unet": ["antigravity", "Model"]}, "`unet` in model_index.json is a Model of antigravity, which has not been imported"),
        ({"tokenizer": ["../../evil", "Model"]}, "`tokenizer` in model_index.json is a Model of ../../evil"),
        ({"max_sequence_length": None}, "`max_sequence_length=None` must be a whole number from 1 to"),
        ({"max_sequence_length": 0}, "`max_sequence_length=0` must be"),
        ({"text_encoder": "antigravity"}, "`text_encoder` in model_index.json must be a library and a class"),
        ({"../../evil": ["diffusers", "UNet2DModel"]}, r"The configuration has \['../../evil'\]"),
        ({"scheduler": ["diffusers", "../../Evil"]}, NO_CLASS),
        ({"_class_name": ["evil", "GreedyGrowPipeline"]}, "trust_remote_code|custom|evil"),
    ],
)  # fmt: skip
def test_a_hostile_model_index(tmp_path, values, message):
    make_pipeline().save_pretrained(tmp_path)
    edit(tmp_path / "model_index.json", **values)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for load in (DiffusionPipeline.from_pretrained, GreedyGrowPipeline.from_pretrained):
        with pytest.raises((ValueError, OSError, AttributeError), match=message):
            load(tmp_path)
    assert not (tmp_path / "ran").exists() and "antigravity" not in sys.modules


def test_a_shard_index_that_points_outside_the_folder(tmp_path):
    """Files outside the folder are not read."""
    make_core().save_pretrained(tmp_path / "elsewhere")
    core = make_core()
    core.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    path = tmp_path / "model" / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    outside = "../elsewhere/diffusion_pytorch_model.safetensors"
    edit(path, weight_map=dict.fromkeys(index["weight_map"], outside))
    with pytest.raises((OSError, ValueError), match="parent-directory"):
        ShallowUNet2DModel.from_pretrained(tmp_path / "model")
    with pytest.raises((OSError, ValueError), match="`core="):
        GrowableUNet2DConditionModel.from_core(tmp_path / "model", 32, block_out_channels=(8,))


class Evil:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("what", ["model", "pipeline", "text encoder", "adapter"])
def test_pickles_are_not_read(tmp_path, what):
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path)
    if what == "adapter":
        torch.save(Evil(str(tmp_path / "ran")), tmp_path / "pytorch_lora_weights.bin")
        with pytest.raises((OSError, ValueError)):
            pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.bin")
    elif what == "text encoder":
        (tmp_path / "text_encoder" / "model.safetensors").unlink()
        torch.save(Evil(str(tmp_path / "ran")), tmp_path / "text_encoder" / "pytorch_model.bin")
        with pytest.raises((OSError, ValueError), match="safetensors"):
            GreedyGrowPipeline.from_pretrained(tmp_path)
    else:
        weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()
        load, path = GreedyGrowPipeline.from_pretrained, tmp_path
        if what == "model":
            load, path = ShallowUNet2DModel.from_pretrained, tmp_path / "unet"
        with pytest.raises(OSError, match="safetensors"):
            load(path)
        with pytest.raises(ValueError, match="`use_safetensors=False` asks for pickled weights"):
            load(path, use_safetensors=False)
        with pytest.raises(OSError, match="safetensors"):
            DiffusionPipeline.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("make", [make_core, make_grown, make_pipeline])
def test_pickles_are_not_written(make, tmp_path, hub, caplog):
    made, repo_id = make(), f"owner/no-pickles-{make.__name__}"
    with caplog.at_level(logging.WARNING, "diffusers_greedy_grow.hub"):
        made.save_pretrained(tmp_path, safe_serialization=False)
        made.push_to_hub(repo_id, safe_serialization=False)
    assert caplog.text.count("safetensors are written instead") >= 2
    names = [path.name for path in tmp_path.rglob("*")] + list(hub.files(repo_id))
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"))]
    assert any(name.endswith(".safetensors") for name in names)
    type(made).from_pretrained(tmp_path)


def test_importing_uses_no_network_and_our_sources_run_no_remote_code(tmp_path):
    """Our sources never ask for remote code or for unsafe unpickling."""
    package = Path(__file__).parents[1]
    for path in [*package.glob("diffusers_greedy_grow/**/*.py"), *package.glob("training_examples/*.py")]:
        assert not re.search(
            r"trust_remote_code|pickle\.load|weights_only=False|\b(?<!\.)(eval|exec)\(", path.read_text()
        ), path
    code = "import socket; socket.socket.connect = None; import diffusers_greedy_grow"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.mark.parametrize("subfolder", [None, "unet"])
def test_another_model_is_not_loaded_with_random_weights(subfolder, tmp_path):
    grown, core = make_grown(), make_core()
    for model, other in ((grown, ShallowUNet2DModel), (core, GrowableUNet2DConditionModel)):
        folder = tmp_path / type(model).__name__
        (model if subfolder is None else make_pipeline(model)).save_pretrained(folder)
        with pytest.raises(
            ValueError, match=f"is that of a {type(model).__name__}, not of a {other.__name__}: load it by"
        ):
            other.from_pretrained(folder, subfolder=subfolder)
    with pytest.raises(ValueError, match="is that of a UNet2DModel"):
        ShallowUNet2DModel.from_config({"_class_name": "UNet2DModel", "sample_size": 8})


def test_a_subclass_loads_what_its_base_has_saved(tmp_path):
    class Mine(ShallowUNet2DModel):
        pass

    make_core().save_pretrained(tmp_path / "base")
    mine = Mine.from_pretrained(tmp_path / "base")
    mine.save_pretrained(tmp_path / "mine")
    assert isinstance(ShallowUNet2DModel.from_pretrained(tmp_path / "mine"), ShallowUNet2DModel)


@pytest.mark.parametrize("loader", [GreedyGrowPipeline, GrowableUNet2DConditionModel, ShallowUNet2DModel])
def test_a_path_of_a_folder_that_does_not_exist(loader, tmp_path):
    with pytest.raises((OSError, ValueError), match="no-such-folder"):
        loader.from_pretrained(tmp_path / "no-such-folder")


@pytest.mark.parametrize("dtype", ["auto", torch.float32])
def test_damaged_weights_of_any_dtype(dtype, tmp_path):
    make_core().save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged!" * 8)
    with pytest.raises(OSError):
        ShallowUNet2DModel.from_pretrained(tmp_path, dtype=dtype)
