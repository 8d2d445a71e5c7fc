# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""Runs that publish their phases with the real client, to the loopback Hub."""

import io
import json
import re
import subprocess
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from safetensors.torch import load

from diffusers_greedy_grow import GreedyGrowPipeline
from diffusers_greedy_grow.hub.cards import read_gallery
from diffusers_greedy_grow.hub.lineage import get_lineage

from ..testing_utils import run_in_a_shell
from .launching import GROW, assert_same_weights, grow_flags, launch_script, run, run_script, weights


TOKEN = "hf_of_the_owner"
PHASES = ["core", "grown-16-detail", "grown-16"]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def publish(output_dir: Path, token: str = TOKEN, **arguments) -> subprocess.CompletedProcess:
    """Run `grow.py` in a fork, with `--push_to_hub`."""
    return run_script(GROW, grow_flags(output_dir, push_to_hub=True, **arguments), hub=True, HF_TOKEN=token)


def list_tags(repo_id: str) -> dict[str, str]:
    return {tag.name: tag.target_commit for tag in HfApi().list_repo_refs(repo_id).tags}


@pytest.mark.slow
def test_every_phase_is_published(hub, data, tmp_path):
    repo_id, output_dir = "owner/phases", tmp_path / "output"
    HfApi().create_repo(repo_id)
    HfApi().create_tag(repo_id, tag="core")  # left by an earlier run
    arguments = {"hub_model_id": repo_id, "hub_license": "mit", "hub_steps": 5, "train_data_dir": data}
    done = launch_script(GROW, grow_flags(output_dir, push_to_hub=True, **arguments), hub=True, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stdout[-5000:]

    tags = list_tags(repo_id)
    assert list(tags) and tags.keys() == {*PHASES}
    assert tags["grown-16"] == HfApi().model_info(repo_id).sha
    for phase in PHASES:
        assert f"Uploaded to {hub.url}/{repo_id}/commit/{tags[phase]}." in done.stdout
        published = load(hub.files(repo_id, phase)[WEIGHTS])
        assert all(value.equal(published[name]) for name, value in weights(output_dir / phase).items())
    titles = [commit.title for commit in HfApi().list_repo_commits(repo_id, revision="training")]
    assert "core, step 5" in titles
    left_out = re.findall(r"(\S+): step (\d+) is not published, since the previous upload", done.stdout)
    for phase, step in (("core", 5), ("core", 10), ("grown-16-detail", 5), ("grown-16", 5)):
        assert (f"{phase}, step {step}" in titles) != ((phase, str(step)) in left_out)
    assert not any((output_dir / "uploads").iterdir())

    # The card lists all phases, and the pipeline loads as a user loads it.
    card = ModelCard.load(repo_id)
    card.validate()
    assert card.data.license == "mit" and card.data.model_name == "phases"
    assert {result.metric_name for result in card.data.eval_results} == {
        "held-out loss", "held-out loss, low band", "held-out loss, high band"
    }  # fmt: skip
    for text in (
        "| core | 8 | everything | 12 | 48 | 0 |",
        "| grown, `init='preserve'` | 16 |",
        "| grown-16-detail | 16 | the new stage | 6 | 24 | 0 |",
        "| grown-16 | 16 | everything | 6 | 24 | 0 |",
        "![Samples](samples.png)",
        "![Losses by phase](curves.png)",
        "<Gallery />",
        "This card describes the tag `grown-16`",
    ):
        assert text in card.text, text
    files = hub.files(repo_id)
    assert files["samples.png"] == (output_dir / "samples.png").read_bytes()
    assert files["curves.png"] == (output_dir / "loss.png").read_bytes()
    for index, (prompt, url) in enumerate(read_gallery(card)):
        row = Image.open(output_dir / "samples" / "grown-16.png").crop((16 * index, 0, 16 * (index + 1), 16))
        assert prompt == json.loads(Image.open(output_dir / "samples" / "grown-16.png").info["captions"])[index]
        assert Image.open(io.BytesIO(files[url])).tobytes() == row.tobytes()
    pipeline = DiffusionPipeline.from_pretrained(repo_id, revision="core")
    assert type(pipeline) is GreedyGrowPipeline and pipeline.unet.sample_sizes == (8,)
    assert [entry["phase"] for entry in get_lineage(pipeline.unet)] == ["core"]

    # The token is written nowhere.
    assert TOKEN not in done.stdout
    places = [path for path in output_dir.rglob("*") if path.is_file()]
    assert len(places) > 20 and not [path for path in places if TOKEN.encode() in path.read_bytes()]
    for revision in (*PHASES, "training"):
        assert not [name for name, content in hub.files(repo_id, revision).items() if TOKEN.encode() in content]


@pytest.mark.slow
def test_growing_a_core_from_the_hub(hub, data, tmp_path):
    """The core is a tag of another repository, and the card names it."""
    assert publish(tmp_path / "first", hub_model_id="owner/first", train_data_dir=data).returncode == 0
    done = publish(
        tmp_path / "second", hub_model_id="owner/second", core="owner/first", core_revision="core", train_data_dir=data,
        joint_steps=0,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    pipeline = GreedyGrowPipeline.from_pretrained("owner/second")
    revision = list_tags("owner/first")["core"]
    assert [entry.get("core_revision") for entry in get_lineage(pipeline.unet)] == [None, revision, None]
    card = ModelCard.load("owner/second")
    assert card.data.base_model == "owner/first" and f"grown from `owner/first` at `{revision[:12]}`" in card.text


def test_failed_uploads_do_not_stop_a_run(hub, data, tmp_path):
    repo_id, output_dir = "owner/never", tmp_path / "output"
    hub.fail(f"POST /api/models/{repo_id}/commit/", "400", times=1000)
    done = publish(output_dir, hub_model_id=repo_id, train_data_dir=data)
    assert done.returncode == 0, done.stdout[-5000:]
    assert not hub.files(repo_id) and TOKEN not in done.stdout
    assert done.stdout.count("Nothing is lost: all files are in") == len(PHASES)

    # The command in the message uploads the rest.
    hub.faults.clear()
    for command_of_phase in re.findall("Upload them with `(.*?)`", done.stdout):
        run_in_a_shell(command_of_phase)
    assert list_tags(repo_id).keys() == {*PHASES}
    assert load(hub.files(repo_id, "core")[WEIGHTS]).keys() == weights(output_dir / "core").keys()


@pytest.mark.slow
def test_publishing_does_not_change_training_and_is_resumed(hub, data, tmp_path):
    plain, pushed = tmp_path / "plain", tmp_path / "pushed"
    run(plain, train_data_dir=data)
    assert publish(pushed, hub_model_id="owner/same", hub_steps=3, train_data_dir=data).returncode == 0
    for phase in PHASES:
        assert_same_weights(plain / phase, pushed / phase)
    before = list_tags("owner/same")
    again = publish(pushed, hub_model_id="owner/same", train_data_dir=data, resume_from_checkpoint="latest")
    assert again.returncode == 0, again.stdout[-5000:]
    assert list_tags("owner/same").keys() == before.keys()


@pytest.mark.parametrize("token,message", [("hf_nobody", "401"), ("hf_of_a_stranger", "403")])
def test_missing_permission_is_an_error_before_training(hub, data, tmp_path, token, message):
    done = publish(tmp_path / "output", token, hub_model_id="owner/forbidden", train_data_dir=data)
    assert done.returncode != 0 and message in done.stdout and token not in done.stdout
    assert not (tmp_path / "output").exists()


def test_an_unknown_license_is_an_error_before_training(hub, data, tmp_path):
    done = publish(tmp_path / "output", hub_model_id="owner/license", hub_license="apache-3.0", train_data_dir=data)
    assert done.returncode != 0 and "must be one of" in done.stdout
    assert not (tmp_path / "output").exists()
