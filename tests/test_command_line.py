# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The command line `greedy-grow`, on tiny models and data, and against the loopback Hub."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import EvalResult, HfApi, ModelCard, constants, hf_hub_download
from PIL import Image
from safetensors.torch import load_file

import greedy_grow.main
import greedy_grow.training
from diffusers_greedy_grow import GreedyGrowPipeline
from diffusers_greedy_grow.hub.cards import write_card

from .data_utils import make_image, write_image_folder
from .testing_utils import make_core, make_grown, make_pipeline


ROOT = Path(__file__).parents[1]
FAST = ["--num_inference_steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "grown-32"
    make_pipeline(make_grown(), shift=2.0).save_pretrained(folder)
    return folder


def run(*arguments: object) -> None:
    greedy_grow.main.main([str(argument) for argument in arguments])


def fail(capsys, *arguments: object) -> str:
    """The line of an error after which the program ends with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


# ----------------------------------------------------------------------------------------------------------------------
# The program


def test_help_does_not_wait_for_torch():
    code = "import sys, greedy_grow.main as m; m.build_parser().format_help(); print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert output == "False\n"


@pytest.mark.parametrize(
    "command",
    ["train", "lora", "plan", "sample", "upscale", "inspect", "app", "space", "grow", "push", "data check", "data"],
)
def test_every_command_is_in_a_help(command, capsys):
    *groups, name = command.split()
    with pytest.raises(SystemExit) as ended:
        run(*groups, "--help")
    assert ended.value.code == 0 and f"    {name} " in capsys.readouterr().out


def test_unknown_arguments_and_commands(capsys):
    assert "unrecognized arguments: --steps 3" in fail(capsys, "inspect", "x", "--steps", "3")
    assert "invalid choice" in fail(capsys, "draw")
    assert "the following arguments are required: COMMAND" in fail(capsys)


def test_completion(monkeypatch, tmp_path):
    environment = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "completions"),
        "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": "greedy-grow up",
        "COMP_POINT": "14",
    }
    subprocess.run([sys.executable, "-m", "greedy_grow"], env=environment, cwd=ROOT, check=True)
    assert (tmp_path / "completions").read_text().strip() == "upscale"


@pytest.mark.slow  # builds a wheel
def test_the_wheel_has_all_that_a_clone_has(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(ROOT),
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
    ]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {*zipfile.ZipFile(wheel).namelist()}
    for package in ("diffusers_greedy_grow", "greedy_grow"):
        assert {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")} <= names
    assert {f"greedy_grow/training_examples/{name}.py" for name in ("grow", "train_lora", "minimal")} <= names
    configs = {path.name for path in (ROOT / "training_examples" / "configs").glob("*.yaml")}
    assert {f"greedy_grow/training_examples/configs/{name}" for name in configs} <= names


def test_all_packages_are_listed():
    """Without an editable install, a package that is not listed would be missing."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in ROOT.glob("*greedy_grow/**/*.py")}
    assert {*listed} == {*found, "greedy_grow.training_examples"}


# ----------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.slow  # launched
def test_training_a_tiny_model(tmp_path):
    write_image_folder(tmp_path / "images")
    flags = "--resolutions 8 --hidden_size 16 --num_layers 1 --num_attention_heads 2 --core_steps 2 --num_inference_steps 2"
    arguments = [*flags.split(), "--train_data_dir", tmp_path / "images", "--output_dir", tmp_path / "run"]
    launch = ["--launch", "--cpu --num_processes 1"]
    command = [sys.executable, "-m", "greedy_grow", "train", *launch, *arguments, "--num_validation_images", "4"]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert GreedyGrowPipeline.from_pretrained(tmp_path / "run" / "core").unet.sample_sizes == (8,)


def test_the_exit_code_is_that_of_the_training():
    command = [sys.executable, "-m", "greedy_grow", "train", "--no_such_flag"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "--no_such_flag" in done.stderr


@pytest.mark.slow  # launched
@pytest.mark.parametrize("number,code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_saves_a_checkpoint_although_nobody_reads_the_log(number, code, tmp_path):
    """As Ctrl-C does behind `| tee log`, which it ends, too; and as `timeout` does, whose signal only the launcher gets."""
    write_image_folder(tmp_path / "images")
    flags = (
        "--resolutions 8 --hidden_size 16 --num_layers 1 --num_attention_heads 2 --core_steps 100000 --logging_steps 5"
    )
    arguments = [*flags.split(), "--train_data_dir", tmp_path / "images", "--output_dir", tmp_path / "run"]
    command = [sys.executable, "-m", "greedy_grow", "train", "--launch", "--cpu --num_processes 1", *arguments]
    process = subprocess.Popen(
        [*map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists():
        assert process.poll() is None, process.stdout.read()[-2000:]
        time.sleep(0.1)
    process.stdout.close()
    (os.killpg if number == "SIGINT" else os.kill)(process.pid, getattr(signal, number))
    assert process.wait(timeout=120) == code
    assert list((tmp_path / "run" / "checkpoints").glob("core-*"))


def test_the_commands_that_are_run(monkeypatch):
    commands = []
    monkeypatch.setattr(greedy_grow.training, "become", commands.append)
    monkeypatch.setattr(greedy_grow.training, "launch", commands.append)
    run("train", "--launch", "--num_processes 4 --multi_gpu", "--resolutions", "16", "64", "--seed=1")
    run("plan", "--resolutions", "16", "64")
    run("train", "--help")
    run("lora", "--help")
    launched, planned, helped, helped_with_lora = commands
    script = str(ROOT / "training_examples" / "grow.py")
    assert launched == [*"--num_processes 4 --multi_gpu".split(), script, *"--resolutions 16 64 --seed=1".split()]
    assert planned[1:] == [script, "--plan", "--resolutions", "16", "64"]
    assert helped[1:] == [script, "--help"]
    assert helped_with_lora[1:] == [str(ROOT / "training_examples" / "train_lora.py"), "--help"]


# ----------------------------------------------------------------------------------------------------------------------
# Images


def test_images_are_the_pipelines(folder, tmp_path):
    prompts = ["a small blue square", "a large red circle"]
    run("sample", *prompts, "--model", folder, "--out", tmp_path / "images", "--seed", "7", "--num_images", "2", *FAST)
    files = sorted((tmp_path / "images").glob("*"))
    assert [file.name for file in files] == [f"{i:03d}-seed-{7 + i}.png" for i in range(4)]
    assert Image.open(files[2]).text["prompt"] == prompts[1] and Image.open(files[2]).text["seed"] == "9"
    run("sample", prompts[1], "--model", folder, "--out", tmp_path / "one.png", "--seed", "9", *FAST)
    assert (tmp_path / "one.png").read_bytes() == files[2].read_bytes()
    run(
        "sample", prompts[1], "--model", folder, "--out", tmp_path / "16.png", "--height", "16", "--width", "16", *FAST
    )
    assert Image.open(tmp_path / "16.png").size == (16, 16)


def test_a_seed_that_was_drawn_is_in_the_file(folder, tmp_path):
    run("sample", "a small blue square", "--model", folder, "--out", tmp_path / "a.png", *FAST)
    seed = Image.open(tmp_path / "a.png").text["seed"]
    run("sample", "a small blue square", "--model", folder, "--out", tmp_path / "b.png", "--seed", seed, *FAST)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_an_unconditional_model_needs_no_prompt(tmp_path):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    GreedyGrowPipeline(make_core(cross_attention_dim=None), scheduler).save_pretrained(tmp_path / "core")
    run("sample", "--model", tmp_path / "core", "--out", tmp_path / "a.png", *FAST)
    assert Image.open(tmp_path / "a.png").size == (16, 16)


def test_images_with_a_transparent_ground_are_upscaled_on_white(folder, tmp_path):
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "small.png")
    command = ["upscale", tmp_path / "small.png", "--model", folder, "--prompt", "a square", "--exact", *FAST]
    run(*command, "--out", tmp_path / "large")
    large = Image.open(tmp_path / "large" / "small.png")
    assert large.size == (32, 32) and large.text["exact"] == "True"
    assert np.asarray(large).min() == 255


@pytest.mark.parametrize("mode", ["I;16", "CMYK"])
def test_images_of_other_modes_are_upscaled(mode, folder, tmp_path):
    """PIL alone would turn all grays of 16 bits above 255 white."""
    gray = np.full((16, 16), 32896, np.uint16) if mode == "I;16" else np.full((16, 16), 128, np.uint8)
    image = Image.fromarray(gray)
    image = image if mode == "I;16" else image.convert("RGB").convert(mode)
    image.save(tmp_path / "small.tiff")
    run("upscale", tmp_path / "small.tiff", "--model", folder, "--exact", "--out", tmp_path / "large.png", *FAST)
    assert abs(np.asarray(Image.open(tmp_path / "large.png")).mean() - 128) < 1


def test_bad_arguments_of_images(folder, tmp_path, capsys):
    out = tmp_path / "a.png"
    sample = ["sample", "a", "--model", folder]
    assert "2 images: name a folder" in fail(capsys, "sample", "b", *sample[1:], "--out", out)
    assert "a.jpg` names a file that is not a PNG" in fail(capsys, *sample, "--out", touch(tmp_path / "a.jpg"))
    assert "b.jpg` names a file that is not a PNG" in fail(capsys, *sample, "--out", tmp_path / "b.jpg")
    assert "is not a folder that can be written" in fail(capsys, *sample, "--out", tmp_path / "a.jpg" / "b.png")
    assert "is not a folder that can be written" in fail(capsys, *sample, "--out", tmp_path / "a.jpg" / "b")
    assert "`--out` is empty" in fail(capsys, *sample, "--out", "")
    assert "`--seed -1` must be from 0" in fail(capsys, *sample, "--out", tmp_path / "b", "--seed", "-1")
    assert "`--device lamp` cannot be used" in fail(capsys, *sample, "--out", tmp_path / "b", "--device", "lamp")
    assert "a.png exists" in fail(capsys, *sample, "--out", touch(out))
    run(*sample, "--out", out, "--overwrite", *FAST)
    assert '`core_first` must be "auto" or a noise level, such as 0.8' in fail(
        capsys, *sample, "--out", tmp_path / "b", "--core_first", "much"
    )
    assert "`--num_images 0`" in fail(capsys, *sample, "--out", tmp_path / "b", "--num_images", "0")
    assert "`height=9`" in fail(capsys, *sample, "--out", tmp_path / "b", "--height", "9", *FAST)
    assert "prompt" in fail(capsys, "sample", "--model", folder, "--out", tmp_path / "b", *FAST)
    assert (
        "no such file"
        in fail(capsys, "upscale", tmp_path / "none.png", "--model", folder, "--out", out.parent).lower()
    )
    other = touch(tmp_path / "folder" / "a.png")
    assert "need different names" in fail(capsys, "upscale", out, other, "--model", folder, "--out", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def touch(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.touch()
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Models


def test_a_model_is_described_without_its_weights(folder, tmp_path, capsys, hub):
    GreedyGrowPipeline.from_pretrained(folder).push_to_hub("owner/described", license="apache-2.0")
    for model in (folder, "owner/described"):
        run("inspect", model)
        out = capsys.readouterr().out
        assert "a GreedyGrowPipeline" in out and "resolutions   16 px, 32 px" in out and "stage 32" in out
        assert "32 channels, T5EncoderModel" in out or "32 channels" in out
    assert "apache-2.0" in out and "at commit" in out and "grown" in out
    snapshots = Path(constants.HF_HUB_CACHE) / "models--owner--described" / "snapshots"
    assert list(snapshots.glob("*/unet/config.json")) and not list(snapshots.glob("*/unet/*.safetensors"))
    assert "is not a model" in fail(capsys, "inspect", tmp_path)


def test_the_folder_of_a_run_is_not_a_model(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "run" / "grown-32")
    for command in (["sample", "a cat", "--out", tmp_path / "a.png", "--model"], ["push", "--yes"], ["inspect"]):
        said = fail(capsys, *command, tmp_path / "run", *(["owner/x"] if command[0] == "push" else []))
        assert f"such as {tmp_path / 'run' / 'grown-32'}" in said
    said = fail(capsys, "sample", "a cat", "--out", tmp_path / "a.png", "--model", tmp_path / "nothing")
    assert "does not exist" in said


def test_growing(folder, tmp_path, capsys):
    out = tmp_path / "grown"
    run("grow", folder, "--sample_size", "64", "--block_out_channels", "16,24", "--out", out)
    assert "16 -> 32 -> 64 px" in capsys.readouterr().out
    assert GreedyGrowPipeline.from_pretrained(out).unet.sample_sizes == (16, 32, 64)
    assert "exists" in fail(capsys, "grow", folder, "--sample_size", "64", "--out", out)
    more = ["--out", tmp_path / "b", "--block_out_channels", "16;24"]
    assert "integers with commas" in fail(capsys, "grow", folder, "--sample_size", "64", *more)
    assert "`sample_size=40`" in fail(capsys, "grow", folder, "--sample_size", "40", "--out", tmp_path / "b")


def test_the_card_is_shown_before_publishing(folder, capsys, monkeypatch, hub):
    command = ["push", folder, "owner/pushed-by-command", "--license", "mit"]
    assert "pass `--yes`" in fail(capsys, *command)
    assert not HfApi().repo_exists("owner/pushed-by-command")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    with pytest.raises(SystemExit) as ended:
        run(*command)
    assert ended.value.code == 1 and not HfApi().repo_exists("owner/pushed-by-command")
    assert "license: mit" in capsys.readouterr().out
    run(*command, "--yes")
    assert "owner/pushed-by-command/commit/" in capsys.readouterr().out
    assert GreedyGrowPipeline.from_pretrained("owner/pushed-by-command").unet.sample_sizes == (16, 32)
    assert "license" in fail(capsys, "push", folder, "owner/other", "--license", "mine", "--yes").lower()
    assert "is not a folder" in fail(capsys, "push", folder / "none", "owner/other", "--yes")


def test_what_the_folders_card_says_is_published_with_the_model(tmp_path, capsys, hub):
    """A downloaded card may name any file, but only images of its own folder are uploaded."""
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path / "model")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "image.png")
    results = [EvalResult("text-to-image", "shapes", "Shapes", "accuracy", 0.81, metric_name="shape")]
    gallery = [("a blue square", Image.open(tmp_path / "image.png"))]
    images = {"samples": tmp_path / "image.png", "curves": tmp_path / "image.png", "gallery": gallery}
    write_card(tmp_path / "model", pipeline, "owner/before", license="mit", eval_results=results, **images)
    text = (tmp_path / "model" / "README.md").read_text()
    more = text.replace("widget:\n", "widget:\n- text: a secret\n  output:\n    url: ../image.png\n")
    (tmp_path / "model" / "README.md").write_text(more)
    assert more != text

    run("push", tmp_path / "model", "owner/with-card", "--license", "apache-2.0", "--yes")
    card, files = ModelCard.load("owner/with-card"), hub.files("owner/with-card")
    assert card.data.license == "apache-2.0" and card.data.eval_results == results
    assert [entry["text"] for entry in card.data.widget] == ["a blue square"]
    assert {"samples.png", "curves.png", "images/0.png"} <= files.keys() and "images/1.png" not in files
    assert "owner/before" not in card.content and card.content.strip() in capsys.readouterr().out


@pytest.mark.skipif(find_spec("gradio") is not None, reason="gradio is installed; tests/app has the tests of the app")
def test_the_app_needs_gradio(folder, capsys, tmp_path):
    assert 'pip install "diffusers-greedy-grow[app]"' in fail(capsys, "app", folder)
    assert 'pip install "diffusers-greedy-grow[app]"' in fail(
        capsys, "space", tmp_path / "a", "--model", "owner/model"
    )


def test_without_a_network(folder, capsys, hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    command = ["push", folder, "owner/unreachable", "--license", "mit", "--yes"]
    assert "The network cannot be reached: " in fail(capsys, *command)


def test_published_weights_keep_their_dtype(tmp_path, hub):
    make_pipeline().to(torch.bfloat16).save_pretrained(tmp_path)
    for folder, name in ((tmp_path, "owner/half"), (tmp_path / "unet", "owner/half-unet")):
        run("push", folder, name, "--license", "mit", "--yes")
    weights = "diffusion_pytorch_model.safetensors"
    for path in (hf_hub_download("owner/half", f"unet/{weights}"), hf_hub_download("owner/half-unet", weights)):
        assert load_file(path)["conv_out.weight"].dtype == torch.bfloat16


# ----------------------------------------------------------------------------------------------------------------------
# Data


def test_data_are_checked(tmp_path, capsys):
    folder = write_image_folder(tmp_path / "images", count=40)
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "broken.png").write_bytes(b"no image")
    make_image(3, size=32).resize((48, 40)).save(folder / "wide.png")
    make_image(4).save(folder / "empty.png")
    nearly = make_image(5)
    nearly.putpixel((0, 0), (1, 2, 3))
    nearly.save(folder / "nearly.png")
    for name, text in (
        ("broken", "a broken one"),
        ("wide", "one two three four five six"),
        ("empty", " "),
        ("nearly", "again"),
    ):
        lines.append(json.dumps({"file_name": f"{name}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    run("data", "check", folder, "--contact_sheet", tmp_path / "new" / "sheet.png", "--num_shown", "10")
    out = capsys.readouterr().out
    assert "42 different images to train on, 2 held out" in out
    assert "broken.png" in out and "empty.png" in out and "the caption is empty" in out
    assert "training: 40 images would be used, 2 rows or captions are broken" in out
    assert "nearly.png" in out and "005.png" in out and "2 images are nearly the same as others" in out
    assert "words in each: 1 to 6, median 3" in out and "wide" in out and "which would be enlarged" in out
    sheet = Image.open(tmp_path / "new" / "sheet.png")
    assert sheet.width > 8 * 128 and sheet.height > 2 * 128


def test_data_that_cannot_be_checked(tmp_path, capsys):
    assert "none" in fail(capsys, "data", "check", tmp_path / "none")
    folder = write_image_folder(tmp_path / "images", count=4)
    assert "must end in .png" in fail(capsys, "data", "check", folder, "--contact_sheet", "a.jpg")
    assert "`--num_shown 0`" in fail(capsys, "data", "check", folder, "--num_shown", "0")
    assert "caption_column" in fail(capsys, "data", "check", folder, "--caption_column", "none")


def test_held_out_images_that_are_nearly_training_images(tmp_path, capsys):
    folder = tmp_path / "split"
    folder.mkdir()
    write_image_folder(folder / "train", count=4)
    write_image_folder(folder / "validation", count=1, size=32)
    changed = make_image(0)
    changed.putpixel((0, 0), (1, 2, 3))
    changed.save(folder / "validation" / "000.png")
    run("data", "check", folder)
    out = capsys.readouterr().out
    assert "2 images are nearly the same as others" in out and "2 alike" in out
    line = next(line for line in out.splitlines() if "2 alike" in line)
    assert "training row" in line and "held out row" in line
