# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Grown models that are saved without their core, and the real client of the Hub that fetches it again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.utils import compute_module_sizes
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    PRXTransformer2DModel,
    TorchAoConfig,
    UNet2DModel,
)
from diffusers.hooks import apply_group_offloading
from huggingface_hub import HfApi, hf_hub_download
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_greedy_grow import GreedyGrowPipeline, GrowableUNet2DConditionModel, ShallowUNet2DModel
from diffusers_greedy_grow.pipelines.foreign import describe_foreign

from .models.test_foreign_cores import make_foreign
from .testing_utils import TEXT_DIM, make_core, make_pipeline, randomize


WEIGHTS = "diffusion_pytorch_model.safetensors"


def make_ddpm(folder: Path, **saving) -> Path:
    """Save a pipeline of diffusers."""
    unet, scheduler = make_foreign("unet")
    DDPMPipeline(unet, scheduler).save_pretrained(folder, **saving)
    return folder


def upload(folder: Path, repo_id: str) -> str:
    """Upload a folder, and return the commit."""
    HfApi().create_repo(repo_id, exist_ok=True)
    return HfApi().upload_folder(repo_id=repo_id, folder_path=folder).oid


def grow(core, **kwargs) -> GreedyGrowPipeline:
    grown = GreedyGrowPipeline.from_core(core, 32, (8,), **kwargs)
    randomize(grown.unet.stages, seed=1)
    return grown


def list_tensors(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= {*file.keys()}
    return names


def same(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two models have the same weights, in the same order and in the same dtypes."""
    state, others = model.state_dict(), other.state_dict()
    return [*state] == [*others] and all(
        value.dtype == others[name].dtype and torch.equal(value, others[name]) for name, value in state.items()
    )


@pytest.fixture(scope="module")
def core_folder(tmp_path_factory) -> Path:
    return make_ddpm(tmp_path_factory.mktemp("core"))


# ----------------------------------------------------------------------------------------------------------------------
# What loads again


def test_a_core_in_a_folder(core_folder, tmp_path):
    grown = grow(core_folder)
    names = [name for name, _ in grown.unet.named_parameters()]
    grown.save_pretrained(tmp_path / "grown", core="reference")
    assert [name for name, _ in grown.unet.named_parameters()] == names  # the model itself keeps its core
    saved = list_tensors(tmp_path / "grown")
    assert saved == {name for name in grown.unet.state_dict() if name.startswith("stages.")}
    size = sum(path.stat().st_size for path in (tmp_path / "grown" / "unet").iterdir())
    assert size < 4 * sum(parameter.numel() for parameter in grown.unet.stages.parameters()) + 50_000
    for loader in (GreedyGrowPipeline, DiffusionPipeline):
        loaded = loader.from_pretrained(tmp_path / "grown")
        assert type(loaded) is GreedyGrowPipeline and same(loaded.unet, grown.unet)
        assert "_core_reference" not in loaded.unet.config
    # It can be saved again in both ways, grow again, and what was grown refers to the same core.
    loaded.save_pretrained(tmp_path / "copy")
    assert list_tensors(tmp_path / "copy") == {*grown.unet.state_dict()}
    assert same(GreedyGrowPipeline.from_pretrained(tmp_path / "copy").unet, grown.unet)
    again = GreedyGrowPipeline.from_core(tmp_path / "grown", 64, (8,))
    again.save_pretrained(tmp_path / "again", core="reference")
    assert {name.split(".")[0] for name in list_tensors(tmp_path / "again")} == {"stages"}
    assert same(GreedyGrowPipeline.from_pretrained(tmp_path / "again").unet, again.unet)
    # A copy in the same folder takes the reference's place.
    grown.save_pretrained(tmp_path / "grown")
    assert same(GreedyGrowPipeline.from_pretrained(tmp_path / "grown").unet, grown.unet)
    assert "_core_reference" not in json.loads((tmp_path / "grown" / "unet" / "config.json").read_text())


def test_models_alone(tmp_path):
    """Cores that are loaded by diffusers, and our own, also with parts left out."""
    prx, flow = make_foreign("prx")
    prx.save_pretrained(tmp_path / "prx" / "transformer")
    make_core().save_pretrained(tmp_path / "own")
    loaded = PRXTransformer2DModel.from_pretrained(tmp_path / "prx", subfolder="transformer")
    for core, kwargs in (
        (loaded, {"process": flow, "core_sample_size": 16}),
        (ShallowUNet2DModel.from_pretrained(tmp_path / "own"), {}),
        (tmp_path / "own", {"init": "random"}),
    ):
        grown = GrowableUNet2DConditionModel.from_core(core, 32, (8,), **kwargs)
        grown.save_pretrained(tmp_path / "grown", core="reference")
        assert {name.split(".")[0] for name in list_tensors(tmp_path / "grown")} == {"stages"}
        assert same(GrowableUNet2DConditionModel.from_pretrained(tmp_path / "grown"), grown)


def test_a_core_on_the_hub(hub, core_folder, tmp_path):
    """A reference is to a commit. Once it is in the cache, nothing is asked of the Hub."""
    commit = upload(core_folder, "owner/ddpm")
    grown = grow("owner/ddpm", cache_dir=tmp_path / "cache")
    grown.push_to_hub("owner/ddpm-grown", core="reference")
    config = json.loads(hub.files("owner/ddpm-grown")["unet/config.json"])
    assert config["_core_reference"]["core"] == "owner/ddpm" and config["_core_reference"]["revision"] == commit
    assert config["_core_reference"]["files"] == [f"unet/{WEIGHTS}"]

    # The repository of the core moves on.
    state = load_file(core_folder / "unet" / WEIGHTS)
    changed = shutil.copytree(core_folder, tmp_path / "changed")
    save_file({name: value + 1 for name, value in state.items()}, changed / "unet" / WEIGHTS, {"format": "pt"})
    upload(changed, "owner/ddpm")
    for loader in (GreedyGrowPipeline, DiffusionPipeline):
        cache = tmp_path / loader.__name__
        loaded = loader.from_pretrained("owner/ddpm-grown", cache_dir=cache)
        assert same(loaded.unet, grown.unet) and (cache / "models--owner--ddpm").is_dir()
        before = len(hub.requests)
        offline = loader.from_pretrained("owner/ddpm-grown", cache_dir=cache, local_files_only=True)
        assert same(offline.unet, grown.unet) and len(hub.requests) == before
    alone = GrowableUNet2DConditionModel.from_pretrained("owner/ddpm-grown", subfolder="unet", cache_dir=cache)
    assert same(alone, grown.unet)
    # What was loaded still knows its core, from the lineage.
    loaded.save_pretrained(tmp_path / "again", core="reference")
    assert same(GreedyGrowPipeline.from_pretrained(tmp_path / "again").unet, grown.unet)


def test_a_core_without_a_known_commit(hub, tmp_path):
    """diffusers does not keep the commit of a model that it loads from a subfolder of a repository."""
    commit = upload(make_ddpm(tmp_path / "core"), "owner/plain")
    unet = UNet2DModel.from_pretrained("owner/plain", subfolder="unet")
    grown = GrowableUNet2DConditionModel.from_core(unet, 32, (8,), process=DDPMScheduler())
    grown.save_pretrained(tmp_path / "grown", core="reference")
    reference = json.loads((tmp_path / "grown" / "config.json").read_text())["_core_reference"]
    assert reference["revision"] == commit and reference["core"] == "owner/plain"
    assert same(GrowableUNet2DConditionModel.from_pretrained(tmp_path / "grown"), grown)


def test_a_core_of_which_the_cache_holds_something_else(hub, core_folder, tmp_path):
    folder = shutil.copytree(core_folder, tmp_path / "core")
    (folder / "text_encoder").mkdir()
    save_file({"weight": torch.zeros(1)}, folder / "text_encoder" / "model.safetensors")
    upload(folder, "owner/partly")
    hf_hub_download("owner/partly", "text_encoder/model.safetensors")
    grown = grow("owner/partly", cache_dir=tmp_path / "cache")
    grown.save_pretrained(tmp_path / "grown", core="reference")
    assert same(GreedyGrowPipeline.from_pretrained(tmp_path / "grown").unet, grown.unet)


def test_shards_and_variants(tmp_path):
    core = make_ddpm(tmp_path / "core", variant="fp16", max_shard_size="40KB")
    assert len(list((core / "unet").glob("*.fp16-*.safetensors"))) > 1
    grown = grow(core, variant="fp16")
    for saving in ({"max_shard_size": "20KB"}, {"variant": "ema"}, {"variant": "ema", "max_shard_size": "20KB"}):
        for where in ("copy", "reference"):
            folder = tmp_path / f"{where}-{'-'.join(saving)}"
            grown.save_pretrained(folder, core=where, **saving)
            files = [path.name for path in (folder / "unet").glob("*.safetensors")]
            assert len(files) > 1 or "max_shard_size" not in saving
            loaded = GreedyGrowPipeline.from_pretrained(folder, variant=saving.get("variant"))
            assert same(loaded.unet, grown.unet)
            assert all(name.startswith("stages.") for name in list_tensors(folder)) == (where == "reference")


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_a_core_in_another_dtype_than_its_files(core_folder, tmp_path, dtype):
    """A reference gives the same model as a copy, whatever both are loaded in."""
    grown = grow(core_folder, dtype=torch.bfloat16)
    assert grown.unet.core.conv_in.weight.dtype == torch.bfloat16
    for where in ("copy", "reference"):
        grown.save_pretrained(tmp_path / where, core=where)
    copied, referred = (
        GreedyGrowPipeline.from_pretrained(tmp_path / where, **({} if dtype is None else {"dtype": dtype}))
        for where in ("copy", "reference")
    )
    assert same(referred.unet, copied.unet)
    assert referred.unet.core.conv_in.weight.dtype == (dtype or torch.float32)
    # It can be saved as a reference again: rounded values in float32 are still the core's.
    referred.save_pretrained(tmp_path / "again", core="reference")
    again = GreedyGrowPipeline.from_pretrained(tmp_path / "again", dtype=dtype or torch.float32)
    assert same(again.unet, referred.unet)


def test_weights_with_old_names(core_folder, tmp_path):
    """Published UNets have attention layers under the names of earlier versions, which diffusers changes when loading."""
    folder = shutil.copytree(core_folder, tmp_path / "core")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, value in load_file(folder / "unet" / WEIGHTS).items():
        for new_name, old_name in old.items():
            if "attentions" in name:
                name = name.replace(f".{new_name}.", f".{old_name}.")
        state[name] = value
    assert any(".query." in name for name in state)
    save_file(state, folder / "unet" / WEIGHTS, {"format": "pt"})
    grown = grow(folder)
    grown.save_pretrained(tmp_path / "grown", core="reference")
    assert same(GreedyGrowPipeline.from_pretrained(tmp_path / "grown").unet, grown.unet)


@torch.no_grad()
def test_loading_with_less_memory(core_folder, tmp_path):
    """In shards, too, whose tensors reach diffusers in another way."""
    grown = grow(core_folder).unet
    sample = torch.randn(1, 3, 32, 32)
    expected = grown(sample, 500).sample
    for i, saving in enumerate(({}, {"max_shard_size": "20KB"})):
        folder = tmp_path / str(i)
        grown.save_pretrained(folder, core="reference", **saving)
        for kwargs in (
            {"device_map": "auto"},
            {
                "device_map": "auto",
                "max_memory": {"cpu": compute_module_sizes(grown)[""] // 2},
                "offload_folder": tmp_path / f"offload-{i}",
            },
            {"low_cpu_mem_usage": True, "disable_mmap": True},
        ):
            loaded = GrowableUNet2DConditionModel.from_pretrained(folder, **kwargs)
            assert torch.equal(loaded(sample, 500).sample, expected)
        (loaded, info) = GrowableUNet2DConditionModel.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())


@torch.no_grad()
def test_a_referred_core_in_eight_bits(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    prx, flow = make_foreign("prx")
    prx.save_pretrained(tmp_path / "core")
    core = PRXTransformer2DModel.from_pretrained(tmp_path / "core")
    grown = GrowableUNet2DConditionModel.from_core(core, 32, (8,), process=flow, core_sample_size=16)
    for where in ("copy", "reference"):
        grown.save_pretrained(tmp_path / where, core=where)
    copied, referred = (
        GrowableUNet2DConditionModel.from_pretrained(
            tmp_path / where,
            quantization_config=TorchAoConfig(torchao.Int8WeightOnlyConfig(version=2)),
            dtype=torch.float32,
        )
        for where in ("copy", "reference")
    )
    inputs = torch.randn(1, 3, 32, 32), 500, torch.randn(1, 6, TEXT_DIM)
    assert torch.equal(referred(*inputs).sample, copied(*inputs).sample)
    eight = [name for name, p in referred.core.named_parameters() if type(p).__module__.startswith("torchao")]
    assert len(eight) > 4
    with pytest.raises(
        ValueError, match="compares the core with the files .* is quantized, by a `quantization_config`"
    ):
        referred.save_pretrained(tmp_path / "again", core="reference")
    referred.save_pretrained(tmp_path / "again")
    again = GrowableUNet2DConditionModel.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(again(*inputs).sample, referred(*inputs).sample)
    by_hand = GrowableUNet2DConditionModel.from_pretrained(tmp_path / "reference")
    torchao.quantize_(by_hand, torchao.Int8WeightOnlyConfig(version=2))
    with pytest.raises(ValueError, match="compares the core with the files .* has weights of the type Int8Tensor"):
        by_hand.save_pretrained(tmp_path / "by hand", core="reference")


# ----------------------------------------------------------------------------------------------------------------------
# What is refused when saving


def test_a_core_that_has_changed_is_not_referred_to(core_folder, tmp_path):
    grown = grow(core_folder)
    optimizer = torch.optim.SGD(grown.unet.parameters(), lr=1e-3)
    sample = torch.randn(1, 3, 32, 32)
    grown.unet.freeze_core()
    grown.unet(sample, 500).sample.square().mean().backward()
    optimizer.step()
    grown.save_pretrained(tmp_path / "detail", core="reference")
    grown.unet.unfreeze_core()
    grown.unet(sample, 500).sample.square().mean().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="the core is not, or no longer, the one in .*trained further.*core=.copy."):
        grown.save_pretrained(tmp_path / "joint", core="reference")
    assert not (tmp_path / "joint").exists()

    fused = grow(core_folder)
    fused.unet.add_adapter(LoraConfig(r=2, target_modules=["core.conv_in"], init_lora_weights=False))
    with pytest.raises(ValueError, match="are attached"):
        fused.save_pretrained(tmp_path / "fused", core="reference")
    fused.fuse_lora()
    fused.unload_lora_weights()
    with pytest.raises(ValueError, match="or have fused adapters"):
        fused.save_pretrained(tmp_path / "fused", core="reference")
    fused.save_pretrained(tmp_path / "fused")


def test_a_core_from_nowhere_is_not_referred_to(hub, core_folder, tmp_path):
    grown = GrowableUNet2DConditionModel.from_core(make_foreign("unet")[0], 32, (8,), process=DDPMScheduler())
    with pytest.raises(ValueError, match="it is unknown where the core of this model came from"):
        grown.save_pretrained(tmp_path / "grown", core="reference")
    # A copy does not say where the folder of its core was: that is nobody else's business.
    grow(core_folder).save_pretrained(tmp_path / "copy")
    assert str(core_folder) not in (tmp_path / "copy" / "unet" / "config.json").read_text()
    with pytest.raises(ValueError, match="it is unknown where"):
        GreedyGrowPipeline.from_pretrained(tmp_path / "copy").save_pretrained(tmp_path / "again", core="reference")
    for model in (make_core(), make_pipeline()):
        with pytest.raises(ValueError, match='`core=.reference.` must be "copy" for a ShallowUNet2DModel'):
            model.save_pretrained(tmp_path / "own", core="reference")
    with pytest.raises(ValueError, match='`core=.link.` must be "copy" or "reference"'):
        grown.save_pretrained(tmp_path / "link", core="link")
    before = len(hub.requests)
    with pytest.raises(ValueError, match="came from the folder .*, which others do not have"):
        grow(core_folder).push_to_hub("owner/local", core="reference")
    with pytest.raises(ValueError, match="came from the folder .*, which others do not have"):
        grow(core_folder).save_pretrained(tmp_path / "pushed", core="reference", push_to_hub=True)
    assert len(hub.requests) == before and not (tmp_path / "pushed").exists()


def test_the_core_is_not_overwritten(core_folder, tmp_path):
    """Saving the stages in the core's place would leave neither of the two."""
    folder = shutil.copytree(core_folder, tmp_path / "core")
    before = (folder / "unet" / WEIGHTS).read_bytes()
    grown = grow(folder)
    for save in (grown.save_pretrained, lambda _, core: grown.unet.save_pretrained(folder / "unet", core=core)):
        with pytest.raises(ValueError, match="holds the core, or its pipeline, which would be replaced"):
            save(folder, core="reference")
    assert (folder / "unet" / WEIGHTS).read_bytes() == before
    # A core that its pipeline has elsewhere than a grown one
    (folder / "unet").rename(folder / "transformer")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"unet"', '"transformer"'))
    before = index.read_bytes()
    grown.unet.core_folder = str(folder)
    with pytest.raises(ValueError, match="holds the core, or its pipeline, which would be replaced"):
        grown.save_pretrained(folder, core="reference")
    assert index.read_bytes() == before
    grown.save_pretrained(tmp_path, core="reference")  # the folder around it is free
    assert same(GreedyGrowPipeline.from_pretrained(tmp_path).unet, grown.unet)


def test_a_pipeline_without_subfolders(hub, tmp_path):
    """As old repositories of DDPM are, in a folder and on the Hub."""
    core = make_ddpm(tmp_path / "core")
    expected = grow(core).unet.core
    for component in ("unet", "scheduler"):
        for path in (core / component).iterdir():
            path.rename(core / path.name)
        (core / component).rmdir()
    assert same(grow(DDPMPipeline.from_pretrained(core)).unet.core, expected)
    assert describe_foreign(core).model.config.sample_size == 16
    upload(core, "owner/old-ddpm")
    for source in (core, "owner/old-ddpm"):
        grown = grow(source)
        assert same(grown.unet.core, expected)
        grown.save_pretrained(tmp_path / "saved", core="reference")
        assert same(GreedyGrowPipeline.from_pretrained(tmp_path / "saved").unet, grown.unet)
    with pytest.raises(ValueError, match="holds the core, or its pipeline, which would be replaced"):
        grow(core).save_pretrained(core, core="reference")
    (core / "config.json").unlink()
    with pytest.raises(OSError, match="config.json"):
        grow(core)


def test_a_core_whose_weights_are_not_as_they_were(core_folder, tmp_path):
    """Each error names the cause, and that the model must be loaded again without it."""
    cpu = torch.device("cpu")

    def cast(pipeline):
        pipeline.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)

    def offload(pipeline):
        path = str(tmp_path / "disk")
        pipeline.unet.enable_group_offload(cpu, offload_type="leaf_level", offload_to_disk_path=path)

    def offload_the_stage(pipeline):
        path = str(tmp_path / "disk of the stage")
        apply_group_offloading(
            pipeline.unet.stages[0], onload_device=cpu, offload_type="leaf_level", offload_to_disk_path=path
        )

    for change, message in (
        (
            cast,
            "`unet` cannot be saved: its weights are rounded to float8_e4m3fn, by `enable_layerwise_casting`, .* Load it again",
        ),
        (offload, "`unet` cannot be saved: its weights are on the disk, by group offloading .* Load it again without"),
        (offload_the_stage, "`unet` cannot be saved: its weights are on the disk, by group offloading"),
        (
            lambda pipeline: pipeline.enable_sequential_cpu_offload(device="cpu"),
            "`unet` cannot be saved: .* or the meta device",
        ),
    ):
        grown = grow(core_folder)
        change(grown)
        with pytest.raises(ValueError, match=message):
            grown.save_pretrained(tmp_path / "saved", core="reference")
        with pytest.raises(ValueError, match=message):
            grown.push_to_hub("owner/changed", core="reference")
        assert not (tmp_path / "saved").exists()
    # Other kinds of offloading leave the weights in memory.
    grown = grow(core_folder)
    grown.unet.enable_group_offload(cpu, offload_type="leaf_level")
    grown.save_pretrained(tmp_path / "saved", core="reference")
    assert same(GreedyGrowPipeline.from_pretrained(tmp_path / "saved").unet, grown.unet)


def test_a_core_that_has_left_its_place(hub, core_folder, tmp_path):
    folder = shutil.copytree(core_folder, tmp_path / "core")
    grown = grow(folder)
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="there are no weights of a model of diffusers"):
        grown.save_pretrained(tmp_path / "grown", core="reference")
    upload(core_folder, "owner/leaves")
    grown = grow("owner/leaves", cache_dir=tmp_path / "cache")
    hub.fail("GET /api/models/owner/leaves", "404", times=9)
    with pytest.raises(OSError, match="`owner/leaves` at `.*` cannot be read, to compare the core with it"):
        grown.push_to_hub("owner/gone", core="reference")


# ----------------------------------------------------------------------------------------------------------------------
# What is refused when loading


def test_a_core_that_is_not_there_any_more(hub, core_folder, tmp_path):
    folder = shutil.copytree(core_folder, tmp_path / "core")
    grow(folder).save_pretrained(tmp_path / "grown", core="reference")
    weights = folder / "unet" / WEIGHTS
    original = weights.read_bytes()
    state = load_file(weights)

    def fails(error, message: str) -> None:
        for load in (
            lambda: GreedyGrowPipeline.from_pretrained(tmp_path / "grown"),
            lambda: GrowableUNet2DConditionModel.from_pretrained(tmp_path / "grown" / "unet"),
        ):
            with pytest.raises(error, match=message):
                load()

    weights.unlink()
    fails(OSError, f"refers to its core in .*core`, but there is no file `unet/{WEIGHTS}` in it")
    weights.write_bytes(original[:-100])
    fails(OSError, f"{WEIGHTS}` is damaged")
    save_file({**state, "conv_in.bias": state["conv_in.bias"] + 1e-3}, weights, {"format": "pt"})
    fails(ValueError, "which has changed since the model was saved: other values. Put back")
    save_file({**state, "conv_in.bias": state["conv_in.bias"][:-1].clone()}, weights, {"format": "pt"})
    fails(ValueError, "which has changed since the model was saved")
    del state["conv_in.bias"]
    save_file(state, weights, {"format": "pt"})
    fails(ValueError, r"has changed since the model was saved: it lacks \['conv_in.bias'\]")
    weights.write_bytes(original)
    GreedyGrowPipeline.from_pretrained(tmp_path / "grown")


def test_a_core_on_the_hub_that_cannot_be_fetched(hub, core_folder, tmp_path):
    upload(core_folder, "owner/fetched")
    grow("owner/fetched", cache_dir=tmp_path / "first").save_pretrained(tmp_path / "grown", core="reference")
    path = tmp_path / "grown" / "unet" / "config.json"
    config = json.loads(path.read_text())

    def load(**changes):
        path.write_text(json.dumps({**config, "_core_reference": {**config["_core_reference"], **changes}}))
        return GreedyGrowPipeline.from_pretrained(tmp_path / "grown", cache_dir=tmp_path / "cache")

    message = "The core of this model is in `owner/{}` at `{}`, but its file `unet/.*` cannot be fetched"
    with pytest.raises(OSError, match=message.format("fetched", "0" * 12)):
        load(revision="0" * 40)
    with pytest.raises(OSError, match=message.format("nowhere", config["_core_reference"]["revision"][:12])):
        load(core="owner/nowhere")
    with pytest.raises(OSError, match="cannot be fetched"):
        path.write_text(json.dumps(config))
        GreedyGrowPipeline.from_pretrained(tmp_path / "grown", cache_dir=tmp_path / "empty", local_files_only=True)
    for changes in (
        {"revision": "main"},
        {"files": ["unet/model.bin"]},
        {"files": ["../model.safetensors"]},
        {"files": ["/model.safetensors"]},
        {"files": 3},
        {"core": 3},
        {"dtype": "load"},
        {"dtype": None},
        {"other_dtypes": []},
        {"code": 1},
    ):
        with pytest.raises(ValueError, match="The configuration's `_core_reference` must have"):
            load(**changes)
    with pytest.raises(ValueError, match="has changed since the model was saved: other values"):
        load(digest="0" * 64)
    load()
