# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The app in a real, headless browser, with tiny models. `make test-app` installs what this needs."""

import io
import re
import socket
import time
from importlib.metadata import version

import numpy as np
import pytest
import torch
from huggingface_hub import SpaceCard
from PIL import Image

from diffusers_greedy_grow import GreedyGrowPipeline

from ..testing_utils import make_core, make_grown, make_pipeline
from .browser import find_browser, open_browser, serve


pytest.importorskip("gradio", reason="needs gradio: `make test-app`")
pytest.importorskip("playwright", reason="needs playwright: `make test-app`")
if find_browser() is None:
    pytest.skip("needs Chromium or Chrome: `make test-app`", allow_module_level=True)

from playwright.sync_api import Page as Tab  # noqa: E402
from playwright.sync_api import expect  # noqa: E402

import greedy_grow.main  # noqa: E402
from greedy_grow.app.page import Page  # noqa: E402
from greedy_grow.app.space import write_space  # noqa: E402
from greedy_grow.app.studio import Studio  # noqa: E402


PROMPT = "a small blue square"


@pytest.fixture(scope="module")
def pipeline() -> GreedyGrowPipeline:
    pipeline = make_pipeline(make_grown(), shift=2.0)
    pipeline.register_to_config(detail_variances=[0.03])
    return pipeline


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "grown-32"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def studio(pipeline, folder):
    studio = Studio(pipeline, str(folder))
    yield studio
    studio.close()


@pytest.fixture(scope="module")
def address(studio):
    page = Page(studio, lora=(), takes_any_lora=True)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True)
    yield address
    page.blocks.close()


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


class Visitor:
    """Someone in front of a browser."""

    def __init__(self, browser, address: str):
        self.context = browser.new_context(viewport={"width": 1280, "height": 1400})
        self.context.set_default_timeout(20000)
        self.tab: Tab = self.context.new_page()
        self.foreign: list[str] = []
        self.tab.on("request", lambda request: self.foreign.append(request.url))
        self.tab.goto(address)
        self.status = self.tab.get_by_label("Status")

    def fill(self, label: str, value: object) -> None:
        field = self.tab.get_by_label(label, exact=True)
        field.fill(str(value))
        field.blur()

    def press(self, name: str) -> None:
        self.tab.get_by_role("button", name=name, exact=True).click()

    def open(self, name: str) -> None:
        self.tab.get_by_role("tab", name=name, exact=True).click()

    def draw_slowly(self) -> None:
        """Begin a run of 30 seconds, if the model is `slow`, and wait for a step."""
        self.fill("Prompt", PROMPT)
        self.fill("number input for Steps", 100)
        self.press("Draw")
        self.wait_for("^Step ")

    def wait_for(self, pattern: str) -> str:
        expect(self.status).to_have_value(re.compile(pattern), timeout=30000)
        return self.status.input_value()

    def draw(self, prompt: str = PROMPT, seed: int = 0, steps: int = 2) -> Image.Image:
        self.fill("Prompt", prompt)
        self.fill("Seed", seed)
        self.fill("number input for Steps", steps)
        self.press("Draw")
        self.wait_for(f"^Seed {seed}: ")
        return self.download()

    def download(self) -> Image.Image:
        with self.tab.expect_download() as download:
            self.tab.get_by_text("Download", exact=True).click()
        return Image.open(download.value.path())


@pytest.fixture
def slow(pipeline):
    """Let each step take a while, on any machine."""
    hook = pipeline.unet.register_forward_pre_hook(lambda *arguments: time.sleep(0.3))
    yield
    hook.remove()


@pytest.fixture
def enter(browser, address):
    visitors: list[Visitor] = []

    def enter() -> Visitor:
        visitors.append(Visitor(browser, address))
        return visitors[-1]

    yield enter
    for visitor in visitors:
        visitor.context.close()


def draw_directly(pipeline, seed: int, prompt: str = PROMPT) -> Image.Image:
    made = GreedyGrowPipeline.from_pipe(pipeline)
    return made(prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(seed)).images[0]


def is_same(image: Image.Image, other: Image.Image) -> bool:
    return np.array_equal(np.asarray(image), np.asarray(other))


def make_photo() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(values)


def upload(visitor: Visitor, image: Image.Image, within: str) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    file = {"name": "photo.png", "mimeType": "image/png", "buffer": buffer.getvalue()}
    visitor.tab.locator(f"{within} input[type=file]").set_input_files(file)


def test_images_differ_by_seed_and_are_the_pipelines(enter, pipeline):
    visitor = enter()
    one, other, again = (visitor.draw(seed=seed) for seed in (1, 2, 1))
    assert is_same(one, again) and is_same(one, draw_directly(pipeline, 1))
    assert is_same(other, draw_directly(pipeline, 2)) and not is_same(one, other)
    assert one.text["prompt"] == PROMPT and one.text["seed"] == "1"
    expect(visitor.tab.locator(".picture img")).to_have_count(3)  # the image, and it at two levels
    visitor.press("⚄ Dice")
    expect(visitor.tab.get_by_label("Seed", exact=True)).not_to_have_value("1")
    assert [url for url in visitor.foreign if "127.0.0.1" not in url and not url.startswith(("data:", "blob:"))] == []


def test_a_run_is_watched_and_stopped(enter, studio, slow):
    visitor = enter()
    visitor.draw_slowly()
    (run,) = studio.runs
    first, picture = visitor.status.input_value(), visitor.tab.locator(".picture img").first
    address = picture.get_attribute("src")
    expect(visitor.status).not_to_have_value(first)
    expect(picture).not_to_have_attribute("src", address)
    visitor.press("Stop")
    visitor.wait_for(r"^Stopped after step \d+ of 100\.$")
    assert run.future.result(20) is not None and run.step < 100
    visitor.draw(seed=5)
    visitor.press("Stop")
    visitor.wait_for("^Nothing is running.$")


def test_users_do_not_disturb_each_other(enter, studio, pipeline, slow):
    """The second one waits, leaves the queue, comes again, and gets an image after the first one has been stopped."""
    first, second = enter(), enter()
    first.draw_slowly()
    (run,) = studio.runs
    second.fill("Prompt", "a large red circle")
    second.fill("Seed", 7)
    second.fill("number input for Steps", 2)
    second.press("Draw")
    expect(second.tab.get_by_text("queue: 1/1")).to_be_visible()
    second.press("Stop")
    second.wait_for("^Nothing is running.$")
    assert not run.is_stopped
    second.press("Draw")
    expect(second.tab.get_by_text("queue: 1/1")).to_be_visible()
    first.press("Stop")
    first.wait_for("^Stopped after")
    second.wait_for("^Seed 7: 2 steps")
    assert is_same(second.download(), draw_directly(pipeline, 7, "a large red circle"))


def test_a_run_ends_when_its_user_leaves(enter, studio, slow):
    visitor = enter()
    visitor.draw_slowly()
    (run,) = studio.runs
    visitor.context.close()
    run.future.result(20)
    assert run.is_stopped and run.step < 100


def test_a_mask_is_drawn(enter):
    visitor = enter()
    visitor.open("Inpainting")
    visitor.fill("Prompt", PROMPT)
    visitor.fill("number input for Steps", 2)
    visitor.press("Fill")
    visitor.wait_for("^There is no image")
    photo = make_photo()
    upload(visitor, photo, "#editor")
    canvas = visitor.tab.locator("#editor canvas").first
    expect(canvas).to_be_visible()
    visitor.press("Fill")
    visitor.wait_for("^There is no mask")
    box = canvas.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    visitor.tab.mouse.move(*middle)
    visitor.tab.mouse.down()
    visitor.tab.mouse.move(middle[0] + 5, middle[1] + 5, steps=5)
    visitor.tab.mouse.up()
    visitor.press("Fill")
    visitor.wait_for("^Seed ")
    filled = np.asarray(visitor.download())
    same = (filled == np.asarray(photo)).all(axis=-1)
    assert 0.2 < same.mean() < 0.999 and not same[15:17, 15:17].all()


def test_images_to_begin_with(enter):
    """One that was drawn is changed, and a file is upscaled."""
    visitor = enter()
    drawn = visitor.draw(seed=1)
    visitor.press("Use as input")
    visitor.open("Image to image")
    visitor.press("Change")
    visitor.wait_for("^Seed 1: 1 steps")
    changed = visitor.download()
    assert changed.text["task"] == "image to image" and changed.text["strength"] == "0.8"
    assert not is_same(changed, drawn)
    visitor.open("Upscaling")
    upload(visitor, Image.new("RGBA", (16, 16), (0, 0, 0, 0)), "#small")
    visitor.tab.get_by_label("Exact: averaged down").check()
    visitor.press("Upscale")
    visitor.wait_for("^Seed 1: 2 steps")
    upscaled = visitor.download()
    assert upscaled.size == (32, 32) and np.asarray(upscaled).min() == 255  # on white


def test_what_does_not_fit_is_said(enter, tmp_path):
    visitor = enter()
    visitor.press("Draw")
    visitor.wait_for("^The prompt is empty: type what to draw.$")
    expect(visitor.tab.get_by_test_id("toast-body")).to_contain_text("The prompt is empty")
    visitor.fill("Prompt", PROMPT)
    visitor.fill("Height", 9)
    visitor.press("Draw")
    visitor.wait_for("^`height=9` and `width=32` must be positive multiples of")
    visitor.tab.get_by_label("16 px").check()
    expect(visitor.tab.get_by_label("Height", exact=True)).to_have_value("16")
    assert visitor.draw().size == (16, 16)
    visitor.fill("Height", 10**6)
    visitor.press("Draw")
    expect(visitor.tab.get_by_text("is greater than maximum value 64")).to_be_visible()
    visitor.fill("Height", 16)
    visitor.fill("LoRA", tmp_path)
    visitor.tab.keyboard.press("Enter")
    visitor.press("Draw")
    visitor.wait_for(re.escape(str(tmp_path)))
    visitor.open("Image to image")
    file = {"name": "photo.png", "mimeType": "image/png", "buffer": b"no image"}
    visitor.tab.locator("#begin input[type=file]").set_input_files(file)
    expect(visitor.tab.get_by_text("The file is not an image that can be read")).to_be_visible()
    visitor.press("Change")
    visitor.wait_for("^There is no image")


def test_the_model_is_described(enter, folder):
    visitor = enter()
    visitor.open("Model")
    for text in ("resolutions   16 px, 32 px", "Grow it further"):
        expect(visitor.tab.get_by_text(text)).to_be_visible()


# ----------------------------------------------------------------------------------------------------------------------
# Serving


def fail(capsys, *arguments: object) -> str:
    """The line of an error after which the program ends with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        greedy_grow.main.main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_what_cannot_be_served_is_said_at_once(folder, pipeline, tmp_path, capsys):
    assert "none" in fail(capsys, "app", tmp_path / "none")
    pipeline.save_pretrained(tmp_path / "damaged")
    weights = tmp_path / "damaged" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "diffusion_pytorch_model.safetensors" in fail(capsys, "app", tmp_path / "damaged")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"{port}" in fail(capsys, "app", folder, "--port", port)


def test_a_core_alone_cannot_upscale(tmp_path):
    core = make_pipeline(make_core())
    core.save_pretrained(tmp_path)
    studio = Studio(core, str(tmp_path))
    page = Page(studio, lora=["owner/lora"], takes_any_lora=False)
    parts = [component["props"] for component in page.blocks.get_config_file()["components"]]
    values = [str(part.get("value")) for part in parts]
    assert "Upscale" not in values and any("This model cannot upscale: `unet` has no growth" in one for one in values)
    hidden = {part["label"] for part in parts if part.get("label") and not part.get("visible", True)}
    assert {"Level", "Core first"} <= hidden
    # Visitors from elsewhere choose from the adapters that were named.
    (adapters,) = (part for part in parts if part.get("label") == "LoRA")
    assert adapters["choices"] == [("none", ""), ("owner/lora", "owner/lora")] and not adapters["allow_custom_value"]
    studio.close()


def test_a_space_serves_the_app(browser, pipeline, tmp_path, capsys, hub):
    pipeline.push_to_hub("owner/served")
    command = ["space", tmp_path / "space", "--model", "owner/served"]
    greedy_grow.main.main([str(argument) for argument in command])
    assert "hf upload" in capsys.readouterr().out
    card = SpaceCard.load(tmp_path / "space" / "README.md")
    assert card.data.sdk == "gradio" and card.data.sdk_version == version("gradio")
    assert card.data.app_file == "app.py" and card.data.models == ["owner/served"] and "# served" in card.text
    requirements = (tmp_path / "space" / "requirements.txt").read_text()
    assert requirements == f"diffusers-greedy-grow[app]=={version('diffusers-greedy-grow')}\n"
    with serve(tmp_path / "space" / "app.py") as (address, _):
        visitor = Visitor(browser, address)
        assert is_same(visitor.draw(seed=3), draw_directly(pipeline, 3))
        visitor.context.close()
    assert "exists" in fail(capsys, *command)
    assert "publish it first" in fail(capsys, "space", tmp_path / "b", "--model", tmp_path)
    assert "owner/nothing" in fail(capsys, "space", tmp_path / "b", "--model", "owner/nothing")
    assert not (tmp_path / "b").exists()
    write_space(tmp_path / "c", "owner/served", revision="main", lora=["owner/lora"])
    code = (tmp_path / "c" / "app.py").read_text()
    assert code.endswith("\nserve('owner/served', revision='main', lora=['owner/lora'])\n")
