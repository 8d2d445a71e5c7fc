# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Publishing and loading with the real client, against a Hub on the loopback interface that fails on demand."""

import io
import logging
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import AutoModel, DDPMPipeline, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from huggingface_hub import EvalResult, HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig
from PIL import Image
from safetensors import SafetensorError

from diffusers_greedy_grow import GreedyGrowPipeline, GrowableUNet2DConditionModel, ShallowUNet2DModel
from diffusers_greedy_grow.hub.cards import make_card
from diffusers_greedy_grow.hub.lineage import add_to_lineage, get_lineage
from diffusers_greedy_grow.hub.upload import UploadError, prepare_repository, upload

from .models.test_foreign_cores import make_foreign
from .testing_utils import draw_one, make_core, make_grown, make_pipeline, run_in_a_shell


TOKEN, STRANGER = "hf_of_the_owner", "hf_of_a_stranger"
DRAW = """
import sys
import torch
import diffusers_greedy_grow
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
torch.save(pipe("a small blue square", latents=noise, num_inference_steps=3, output_type="pt").images, sys.argv[2])
"""


def waiting() -> list[Path]:
    """The folders of uploads that are under way or have failed."""
    return sorted((Path(constants.HF_HOME) / "greedy-grow-uploads").glob("*"))


def count_commits(hub, repo_id: str) -> int:
    return hub.requests.count(f"POST /api/models/{repo_id}/commit/main")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


# ----------------------------------------------------------------------------------------------------------------------
# Push and load


def test_a_pushed_pipeline_loads_in_a_new_process(hub, tmp_path):
    pipeline = make_pipeline(make_grown(), shift=2.0)
    url = pipeline.push_to_hub("owner/push-and-load")
    assert re.fullmatch(rf"{hub.url}/owner/push-and-load/commit/[0-9a-f]{{40}}", url)
    assert count_commits(hub, "owner/push-and-load") == 1
    files = hub.files("owner/push-and-load")
    assert {"README.md", "model_index.json", "unet/config.json", "tokenizer/tokenizer.json"} <= files.keys()
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl", ".py"))]
    assert not waiting()
    subprocess.run([sys.executable, "-c", DRAW, "owner/push-and-load", tmp_path / "image.pt"], check=True)
    assert torch.equal(torch.load(tmp_path / "image.pt"), draw_one(pipeline))


@pytest.mark.parametrize("make", [make_core, make_grown])
def test_a_pushed_model_loads(hub, make):
    model, repo_id = make(), f"owner/{make.__name__}"
    model.push_to_hub(repo_id)
    for loaded in (type(model).from_pretrained(repo_id), AutoModel.from_pretrained(repo_id)):
        assert type(loaded) is type(model)
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_smaller_upload_leaves_no_shards_of_a_larger_one(hub):
    model, repo_id = make_core(), "owner/shards"
    model.push_to_hub(repo_id, max_shard_size="20KB")
    assert sum(name.endswith(".safetensors") for name in hub.files(repo_id)) > 1
    model.push_to_hub(repo_id)
    assert sum(name.endswith(".safetensors") for name in hub.files(repo_id)) == 1
    assert "diffusion_pytorch_model.safetensors.index.json" not in hub.files(repo_id)
    ShallowUNet2DModel.from_pretrained(repo_id, force_download=True)


def test_branch_pull_request_private_variant_and_subfolder(hub):
    core = make_core()
    core.push_to_hub("owner/places", private=True)
    core.push_to_hub("owner/places", revision="experiment", variant="fp16")
    assert "diffusion_pytorch_model.fp16.safetensors" in hub.files("owner/places", "experiment")
    assert "diffusion_pytorch_model.safetensors" in hub.files("owner/places", "main")
    url = core.push_to_hub("owner/places", create_pr=True, commit_message="Better", subfolder="later/unet")
    assert url == f"{hub.url}/owner/places/discussions/1"
    assert "later/unet/config.json" in hub.files("owner/places", "refs/pr/1")
    assert "later/unet/config.json" not in hub.files("owner/places", "main")
    with pytest.raises(OSError):
        ShallowUNet2DModel.from_pretrained("owner/places", token=STRANGER, force_download=True)


def test_a_variant_and_other_files_stay_beside_the_weights(hub):
    core, repo_id = make_core(), "owner/variants"
    core.push_to_hub(repo_id)
    HfApi().upload_file(path_or_fileobj=b"1", path_in_repo="lora/pytorch_lora_weights.safetensors", repo_id=repo_id)
    core.push_to_hub(repo_id, variant="fp16")
    assert {
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
        "lora/pytorch_lora_weights.safetensors",
    } <= hub.files(repo_id).keys()


# ----------------------------------------------------------------------------------------------------------------------
# Growing from and to the Hub


def test_growing_to_the_hub(hub, caplog):
    core = make_pipeline()
    core.push_to_hub("owner/core")
    revision = HfApi().model_info("owner/core").sha
    before = hub.requests.count("POST /api/repos/create")
    with caplog.at_level(logging.INFO, "diffusers_greedy_grow.hub"):
        grown = GreedyGrowPipeline.from_core(
            "owner/core", 32, block_out_channels=(8,), push_to_hub=True, repo_id="owner/grown", commit_message="Grow"
        )
    assert hub.requests.count("POST /api/repos/create") == before + 1
    assert f"Uploaded to {hub.url}/owner/grown/commit/" in caplog.text and TOKEN not in caplog.text
    assert get_lineage(grown.unet) == [
        {"grown_to": 32, "init": "preserve", "core": "owner/core", "core_revision": revision}
    ]
    again = DiffusionPipeline.from_pretrained("owner/grown")
    assert type(again) is GreedyGrowPipeline and torch.equal(draw_one(again), draw_one(grown))
    assert get_lineage(again.unet) == get_lineage(grown.unet)
    data = ModelCard.load("owner/grown").data
    assert data.base_model == "owner/core" and data.base_model_relation == "finetune"
    assert data.library_name == "diffusers" and data.pipeline_tag == "text-to-image"

    # The lineage also names the repository of a core that is passed as an object. A model grows like a pipeline.
    loaded = DiffusionPipeline.from_pretrained("owner/core")
    model = GrowableUNet2DConditionModel.from_core(
        loaded.unet, 32, block_out_channels=(8,), push_to_hub=True, repo_id="owner/grown-unet", revision="trial"
    )
    assert get_lineage(model) == get_lineage(grown.unet)
    assert "config.json" in hub.files("owner/grown-unet", "trial") and not hub.files("owner/grown-unet", "main")


def test_loading_a_core_from_the_hub(hub, tmp_path):
    core, other = make_core(), make_core(num_layers=1)
    core.push_to_hub("owner/loading", private=True)
    first = HfApi().model_info("owner/loading").sha
    other.push_to_hub("owner/loading")
    core.push_to_hub("owner/loading", subfolder="inner", variant="fp16")

    def grow(**kwargs):
        return GrowableUNet2DConditionModel.from_core("owner/loading", 32, block_out_channels=(8,), **kwargs)

    assert grow().config.num_layers == 1
    assert grow(revision=first).config.num_layers == 2
    assert grow(subfolder="inner", variant="fp16").config.num_layers == 2
    assert grow(token=TOKEN, cache_dir=tmp_path / "cache", force_download=True).config.num_layers == 1
    assert (tmp_path / "cache" / "models--owner--loading").exists()
    before = len(hub.requests)
    assert grow(local_files_only=True, cache_dir=tmp_path / "cache").config.num_layers == 1
    assert len(hub.requests) == before
    with pytest.raises(OSError, match="`core='owner/loading'`"):
        grow(token=STRANGER, cache_dir=tmp_path / "stranger")
    with pytest.raises(OSError, match="`core='owner/nowhere'` is not a model"):
        GrowableUNet2DConditionModel.from_core("owner/nowhere", 32)


# ----------------------------------------------------------------------------------------------------------------------
# When the Hub fails


@pytest.mark.parametrize(
    "request_,fault",
    [
        ("POST .*/commit/", "500"),
        ("POST .*/commit/", "429"),
        ("POST .*/commit/", "412"),
        ("POST .*/commit/", "reset"),
        ("POST .*/preupload/", "503"),
        ("POST .*/objects/batch", "500"),
        ("PUT /lfs/", "500"),
        ("PUT /lfs/", "429"),
        ("PUT /lfs/", "reset"),
    ],
)
def test_an_upload_survives_transient_errors(hub, request_, fault):
    repo_id = f"owner/survives-{re.sub('[^a-z]', '', request_)}-{fault}"
    model = make_core(num_layers=1, hidden_size=48)
    torch.seed()
    torch.nn.init.normal_(model.conv_in.bias)  # a large file that the Hub does not have yet
    hub.fail(request_, fault)
    model.push_to_hub(repo_id)
    assert not hub.faults[0].times and not waiting()
    again = ShallowUNet2DModel.from_pretrained(repo_id)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("request_", ["POST .*/commit/", "PUT /lfs/"])
def test_a_failed_upload_loses_nothing(hub, request_, caplog):
    repo_id = f"owner/fails-{'lfs' in request_}"
    hub.fail(request_, "500", times=1000)
    core = make_core()
    torch.seed()  # random weights: a large file that the Hub does not have yet
    with caplog.at_level(logging.ERROR, "diffusers_greedy_grow.hub"):
        grown = GrowableUNet2DConditionModel.from_core(
            core, 32, block_out_channels=(8,), push_to_hub=True, repo_id=repo_id
        )
    assert grown.config.sample_size == 32
    (message,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    folder = Path(re.search("Nothing is lost: all files are in (.*). Upload them", message)[1])
    assert waiting() == [folder] and TOKEN not in message
    kept = GrowableUNet2DConditionModel.from_pretrained(folder)
    assert all(torch.equal(value, kept.state_dict()[name]) for name, value in grown.state_dict().items())
    assert not hub.files(repo_id)
    with pytest.raises(OSError):
        GrowableUNet2DConditionModel.from_pretrained(repo_id)
    other = make_grown(init="random")
    torch.seed()
    torch.nn.init.normal_(other.stages[0].conv_to_inner.bias)
    with pytest.raises(UploadError, match=f"The upload to {repo_id} failed"):
        other.push_to_hub(repo_id)
    assert len(waiting()) == 2  # the first folder is still there
    kept = GrowableUNet2DConditionModel.from_pretrained(folder)
    assert all(torch.equal(value, kept.state_dict()[name]) for name, value in grown.state_dict().items())

    # The command in the message uploads the folder.
    hub.faults.clear()
    run_in_a_shell(re.search("Upload them with `(.*)`", message)[1])
    GrowableUNet2DConditionModel.from_pretrained(repo_id, force_download=True)
    for place in waiting():
        shutil.rmtree(place)


def test_the_command_after_a_failed_upload_removes_older_shards(hub):
    """Otherwise loading would follow the index of the older shards."""
    core, newer, repo_id = make_core(), make_core(), "owner/by hand".replace(" ", "-")
    core.push_to_hub(repo_id, max_shard_size="20KB")
    torch.nn.init.ones_(newer.conv_in.bias)
    hub.fail("POST .*/commit/", "400")
    with pytest.raises(UploadError) as error:
        newer.push_to_hub(repo_id)
    run_in_a_shell(re.search("Upload them with `(.*)`", str(error.value))[1])
    again = ShallowUNet2DModel.from_pretrained(repo_id, force_download=True)
    assert torch.equal(again.conv_in.bias, newer.conv_in.bias)
    for place in waiting():
        shutil.rmtree(place)


def test_a_lost_response_opens_no_second_pull_request(hub):
    core = make_core()
    core.push_to_hub("owner/lost")
    torch.nn.init.ones_(core.conv_in.bias)
    hub.fail("POST .*/commit/", "lost")
    with pytest.raises(UploadError):
        core.push_to_hub("owner/lost", create_pr=True)
    assert len(HfApi().list_repo_refs("owner/lost", include_pull_requests=True).pull_requests) == 1

    # A commit to a branch can be repeated: the second one changes nothing.
    hub.fail("POST .*/commit/", "lost")
    core.push_to_hub("owner/lost")
    again = ShallowUNet2DModel.from_pretrained("owner/lost", force_download=True)
    assert torch.equal(again.conv_in.bias, core.conv_in.bias)
    for place in waiting():
        shutil.rmtree(place)


def test_a_tag_moves_even_if_the_hub_fails_meanwhile(hub, tmp_path):
    core = make_core()
    core.save_pretrained(tmp_path)
    prepare_repository("owner/tags")
    first = upload(tmp_path, "owner/tags", tag="core").oid
    (tmp_path / "more.txt").write_text("more")
    hub.fail("POST .*/tag/", "500", times=2)
    second = upload(tmp_path, "owner/tags", tag="core").oid
    (tag,) = HfApi().list_repo_refs("owner/tags").tags
    assert tag.target_commit == second != first


def test_an_upload_folder_that_cannot_be_made_loses_nothing(hub, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()  # a folder inside a file cannot be made, even by root
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.ERROR, "diffusers_greedy_grow.hub"):
        grown = GrowableUNet2DConditionModel.from_core(
            make_core(), 32, block_out_channels=(8,), push_to_hub=True, repo_id="owner/no-folder"
        )
    assert grown.config.sample_size == 32 and "set HF_HOME to a folder with enough space" in caplog.text
    assert not hub.files("owner/no-folder")


def test_an_error_while_saving_loses_nothing(hub, monkeypatch, caplog):
    """A full disk, for example, is an error of safetensors."""

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    core = make_core()
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with caplog.at_level(logging.ERROR, "diffusers_greedy_grow.hub"):
        grown = GrowableUNet2DConditionModel.from_core(
            core, 32, block_out_channels=(8,), push_to_hub=True, repo_id="owner/full"
        )
    assert grown.config.sample_size == 32 and "No space left on device" in caplog.text and not waiting()


@pytest.mark.parametrize("fault", ["truncate", "reset", "500"])
def test_a_download_that_breaks_off(hub, fault, tmp_path):
    """Loading returns the right weights or raises an error that names the core. It never returns other weights."""
    core = make_core()
    core.push_to_hub("owner/download")
    hub.fail("GET /owner/download/resolve/.*safetensors", fault)
    try:
        grown = GrowableUNet2DConditionModel.from_core(
            "owner/download", 32, block_out_channels=(8,), cache_dir=tmp_path
        )
    except OSError as error:
        assert "`core='owner/download'` cannot be loaded" in str(error)
        grown = GrowableUNet2DConditionModel.from_core(
            "owner/download", 32, block_out_channels=(8,), cache_dir=tmp_path
        )
    state = grown.core.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in core.state_dict().items())


@pytest.mark.parametrize("token,status", [("hf_nobody", 401), (STRANGER, 403)])
def test_a_token_without_write_access_stops_before_growing(hub, token, status, monkeypatch):
    adapted, grown = make_pipeline(), make_pipeline(make_grown())
    adapted.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))

    def never(*args, **kwargs):
        raise AssertionError("growing has begun")

    monkeypatch.setattr(torch.nn.Module, "load_state_dict", never)
    with pytest.raises(HfHubHTTPError) as error:
        GrowableUNet2DConditionModel.from_core(
            make_core(), 32, block_out_channels=(8,), push_to_hub=True, repo_id="owner/forbidden", token=token
        )
    assert error.value.response.status_code == status and token not in str(error.value)

    # The same holds for a repository that everybody may read.
    make_core().push_to_hub("owner/public")
    with pytest.raises(HfHubHTTPError) as error:
        GrowableUNet2DConditionModel.from_core(
            make_core(), 32, block_out_channels=(8,), push_to_hub=True, repo_id="owner/public", token=token
        )
    assert error.value.response.status_code in (401, 403)
    with pytest.raises(ValueError, match="`push_to_hub=True` needs a `repo_id`"):
        GrowableUNet2DConditionModel.from_core(make_core(), 32, block_out_channels=(8,), push_to_hub=True)
    with pytest.raises(ValueError, match="`token` has blanks"):
        make_core().push_to_hub("owner/blanks", token=f"{TOKEN}\n")
    with pytest.raises(ValueError, match="a pull request goes to `main`"):
        make_core().push_to_hub("owner/blanks", create_pr=True, revision="trial")
    with pytest.raises(TypeError, match=r"\['licence'\] are not arguments of `push_to_hub`"):
        make_core().push_to_hub("owner/blanks", licence="mit")
    with pytest.raises(ValueError, match="`sample_size=20`"):
        GrowableUNet2DConditionModel.from_core(make_core(), 20, push_to_hub=True, repo_id="owner/blanks")
    with pytest.raises(ValueError, match="`sample_size=20`"):
        GreedyGrowPipeline.from_core(make_pipeline(), 20, push_to_hub=True, repo_id="owner/blanks")
    for core, what in ((adapted, "adapters"), (grown, "needs those of the stages inside")):
        with pytest.raises(ValueError, match=what):
            GreedyGrowPipeline.from_core(core, 64, detail_variance=0.1, push_to_hub=True, repo_id="owner/blanks")
    assert not HfApi().repo_exists("owner/blanks")
    with pytest.raises(ValueError, match="no/name/at-all"):
        GrowableUNet2DConditionModel.from_core(make_core(), 32, push_to_hub=True, repo_id="no/name/at-all")


# ----------------------------------------------------------------------------------------------------------------------
# Cards


def test_a_card_is_complete(hub, tmp_path):
    core = make_pipeline()
    add_to_lineage(core.unet, phase="core", resolution=16, trained="everything", steps=10, images=320, seed=0)
    core.push_to_hub("owner/card-core", license="apache-2.0")
    results = [
        EvalResult("text-to-image", "shapes", "Captioned shapes", "accuracy", 0.81, metric_name="shape"),
        EvalResult("text-to-image", "shapes", "Captioned shapes", "accuracy", 0.7, metric_name="texture"),
    ]
    grown = GreedyGrowPipeline.from_core("owner/card-core", 32, block_out_channels=(8,))
    grid = tmp_path / "grid.png"
    grown.image_processor.postprocess(2 * draw_one(grown) - 1)[0].save(grid)
    image = Image.new("RGB", (8, 8), "red")
    more = {"gallery": [('a "red" square: plain', image), ("a heart", image)], "curves": grid}
    grown.push_to_hub(
        "owner/card", license="apache-2.0", datasets=["owner/shapes"], eval_results=results, samples=grid, **more
    )
    card = ModelCard.load("owner/card")
    card.validate()
    assert card.data.eval_results == results and card.data.datasets == ["owner/shapes"]
    revision = HfApi().model_info("owner/card-core").sha
    for text in (
        "a core of\n16 x 16 pixels, grown to 32 x 32.",
        "**Not trained at 32 x 32 pixels yet**",
        "| core | 16 | everything | 10 | 320 | 0 |",
        f"| grown from `owner/card-core` at `{revision[:12]}`, `init='preserve'` | 32 |",
        "| Captioned shapes | texture | 0.7 |",
        "![Samples](samples.png)",
        "<Gallery />",
        r'pipe("a \"red\" square: plain")',
        "![Losses by phase](curves.png)",
        "@article{vasconcelos2024greedy",
    ):
        assert text in card.text, text
    files = hub.files("owner/card")
    assert files["samples.png"] == files["curves.png"] == grid.read_bytes()
    assert [(entry["text"], entry["output"]["url"]) for entry in card.data.widget] == [
        ('a "red" square: plain', "images/0.png"),
        ("a heart", "images/1.png"),
    ]
    assert Image.open(io.BytesIO(files["images/1.png"])).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    "argument,message",
    [
        ({"gallery": ["a heart"]}, r"`gallery` must hold pairs .* has 'a heart'"),
        ({"gallery": [("a heart", "heart.png")]}, "`gallery` must hold pairs"),
        ({"gallery": [("a heart", Image.new("RGB", (8, 8)), 3)]}, "`gallery` must hold pairs"),
        ({"curves": "none.png"}, "`curves='none.png'` is not a file"),
    ],
)
def test_images_that_are_none_are_refused_before_anything_else(argument, message, hub):
    with pytest.raises(ValueError, match=message):
        make_pipeline().push_to_hub("owner/no-images", **argument)
    assert not HfApi().repo_exists("owner/no-images")


@pytest.mark.parametrize(
    "metadata,expected",
    [
        (
            "license: other\nlicense_name: deepfloyd\nlicense_link: LICENSE-MODEL",
            {
                "license": "other",
                "license_name": "deepfloyd",
                "license_link": "{url}/{repo_id}/blob/{revision}/LICENSE-MODEL",
            },
        ),
        (
            "license: other\nlicense_name: mine\nlicense_link: https://example.com",
            {"license": "other", "license_name": "mine", "license_link": "https://example.com"},
        ),
        ("license: mit", {"license": "mit"}),
        ("tags: [a]", {}),
        (None, {}),
    ],
)
def test_a_card_has_the_license_of_the_core(hub, tmp_path, metadata, expected):
    folder = tmp_path / "core"
    DDPMPipeline(*make_foreign("unet")).save_pretrained(folder)
    if metadata is not None:
        (folder / "README.md").write_text(f"---\n{metadata}\n---\n# A core")
    repo_id = f"owner/licensed-{len(metadata or '')}"
    HfApi().create_repo(repo_id)
    revision = HfApi().upload_folder(repo_id=repo_id, folder_path=folder).oid
    if metadata == "tags: [a]":  # the Hub would refuse such a card
        (folder / "README.md").write_text("---\nlicense: [\n---\n")
    names = ("license", "license_name", "license_link")
    for source, link in ((repo_id, True), (folder, False)):
        grown = GreedyGrowPipeline.from_core(source, 32, block_out_channels=(8,))
        card = make_card(grown, "owner/grown")
        found = {name: card.data.get(name) for name in names if card.data.get(name)}
        if link:
            assert found == {
                name: value.format(url=hub.url, repo_id=repo_id, revision=revision) for name, value in expected.items()
            }
            assert ("The license is that of the core" in card.text) == bool(expected)
        else:
            assert found.keys() == expected.keys()
        if "license" in expected:  # a license of one's own is kept
            assert make_card(grown, "owner/grown", license="apache-2.0").data.license == "apache-2.0"


def test_a_card_says_where_the_core_is(hub, tmp_path):
    DDPMPipeline(*make_foreign("unet")).save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: openrail\n---\n")
    HfApi().create_repo("owner/ddpm-core", exist_ok=True)
    revision = HfApi().upload_folder(repo_id="owner/ddpm-core", folder_path=tmp_path).oid
    grown = GreedyGrowPipeline.from_core("owner/ddpm-core", 32, block_out_channels=(8,))
    place = f"[`owner/ddpm-core`](https://huggingface.co/owner/ddpm-core) at `{revision[:12]}`"
    for core, text in (
        (
            "reference",
            f"Only the growth stages are stored here: loading fetches the core from {place}. The license is",
        ),
        ("copy", f"The core is stored here, too, as a copy. It came from {place}. The license is that of the core."),
    ):
        grown.push_to_hub("owner/where", core=core)
        card = ModelCard.load("owner/where")
        assert text in card.text
        assert f"It has {grown.unet.num_parameters() / 1e6:.1f} M parameters" in card.text
        assert card.data.base_model == "owner/ddpm-core" and card.data.base_model_relation == "finetune"
        assert card.data.license == "openrail"
    # What is grown from there has the same license, and its core the same place.
    again = GreedyGrowPipeline.from_core("owner/where", 64, block_out_channels=(8,))
    card = make_card(again, "owner/again")
    assert (
        card.data.base_model == "owner/where" and card.data.license == "openrail" and f"came from {place}" in card.text
    )


def test_a_card_that_the_hub_refuses_loses_nothing(hub):
    core = make_core()
    with pytest.raises(UploadError, match='(?s)"license" must be one of.*Nothing is lost'):
        core.push_to_hub("owner/refused", license="apache-3.0")
    assert not hub.files("owner/refused")
    core.push_to_hub("owner/refused", license="apache-2.0")
    assert ModelCard.load("owner/refused").data.license == "apache-2.0"


@pytest.mark.slow
@pytest.mark.parametrize("make", [make_core, make_grown, make_pipeline])
def test_the_code_of_a_card_runs(hub, make, tmp_path):
    repo_id = f"owner/run-{make.__name__}"
    make().push_to_hub(repo_id)
    card = ModelCard.load(repo_id)
    blocks = re.findall("```python\n(.*?)```", card.text, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        subprocess.run([sys.executable, "-c", block], check=True, cwd=tmp_path)
    assert (tmp_path / "image.png").exists() == (make is make_pipeline)


def test_a_card_names_the_error_without_the_plugin(hub):
    pipeline = make_pipeline()
    pipeline.push_to_hub("owner/without")
    assert "GreedyGrowPipeline" in make_card(pipeline, "owner/without", eval_results=[]).text
    code = "from diffusers import DiffusionPipeline; DiffusionPipeline.from_pretrained('owner/without')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode and re.search(
        "(AttributeError|ValueError).*(GreedyGrowPipeline|diffusers_greedy_grow)", done.stderr
    )


def test_saving_can_push(hub, tmp_path):
    """`save_pretrained(push_to_hub=True)` pushes as diffusers does, with our card."""
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path / "a", True, push_to_hub=True, repo_id="owner/saved", private=True)
    make_core().save_pretrained(tmp_path / "saved-core", push_to_hub=True)
    assert (
        "import diffusers_greedy_grow" in ModelCard.load("owner/saved").text
        and HfApi().model_info("owner/saved").private
    )
    assert "import diffusers_greedy_grow" in ModelCard.load("owner/saved-core").text


def test_a_pipeline_is_grown_around_its_own_model(hub):
    """It is not grown around another model in the same repository."""
    make_core(num_layers=1).push_to_hub("owner/beside")
    make_pipeline(make_core()).push_to_hub("owner/beside")
    assert GreedyGrowPipeline.from_core("owner/beside", 32, block_out_channels=(8,)).unet.config.num_layers == 2


def test_the_card_of_a_tag_loads_its_tag(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card = make_card(make_pipeline(), "owner/tagged", tag="core")
    make_pipeline().push_to_hub("owner/tagged")
    HfApi().create_tag("owner/tagged", tag="core")
    make_pipeline(make_grown()).push_to_hub("owner/tagged")
    names: dict = {}
    for block in re.findall("```python\n(.*?)```", card.text, re.DOTALL):
        exec(compile(block, "card", "exec"), names)
    assert names["pipe"].unet.sample_sizes == (16,) and names["grown"].unet.sample_sizes == (16, 64)
    assert "--core_revision core" in card.text


def test_the_card_of_an_unconditional_pipeline_runs(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipeline = GreedyGrowPipeline(make_core(cross_attention_dim=None), FlowMatchEulerDiscreteScheduler())
    pipeline.push_to_hub("owner/unconditional")
    card = ModelCard.load("owner/unconditional")
    assert card.data.pipeline_tag == "unconditional-image-generation"
    exec(compile(re.findall("```python\n(.*?)```", card.text, re.DOTALL)[0], "card", "exec"), {})
