# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The page in a browser: what one can set, and what one sees of a run."""

import html
import logging
import random
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
from PIL import Image

from ..inspection import describe
from .cards import read_card_with_images
from .studio import IMAGE, INPAINT, TEXT, UPSCALE, Run, Settings, Studio, read_mask


logger = logging.getLogger(__name__)

# Small images fill their place, and one sees their pixels.
CSS = ".picture img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated }"
SEED_MAX = 2**31 - 1
# How many runs may wait; gradio says so to those who come then.
QUEUE_SIZE = 16
# Hours and days, in seconds: how often to look for files that browsers no longer need, and their age
DELETE_CACHE = (3600, 86400)


class Page:
    """
    The page of a studio.

    Args:
        studio ([`Studio`]): The model.
        lora (sequence of `str`): The adapters to choose from.
        takes_any_lora (`bool`): Whether the user may name others.
    """

    def __init__(self, studio: Studio, lora: Sequence[str], takes_any_lora: bool):
        self.studio = studio
        self.runs: dict[str | None, Run] = {}  # the latest one of each browser tab
        with gr.Blocks(title=studio.name, analytics_enabled=False, delete_cache=DELETE_CACHE) as self.blocks:
            with gr.Tab("Draw"), gr.Row():
                with gr.Column():
                    self.shared = self.add_prompts()
                    buttons = self.add_tasks()
                    self.shared |= self.add_settings(lora, takes_any_lora)
                with gr.Column():
                    self.add_results()
            with gr.Tab("Model"):
                self.add_model()
            runs = [self.connect(task, button, own) for task, (button, own) in buttons.items()]
            self.stop.click(self.stop_run, None, [self.status], queue=False, cancels=runs, api_visibility="private")
            self.blocks.unload(self.forget)
        self.blocks.queue(max_size=QUEUE_SIZE)

    def launch(self, **kwargs: Any) -> tuple:
        """Serve the page; see gradio's `Blocks.launch`."""
        return self.blocks.launch(css=CSS, footer_links=[], run_history=False, max_file_size="20mb", **kwargs)

    # ------------------------------------------------------------------------------------------------------------------
    # What one sees

    def add_prompts(self) -> dict[str, Any]:
        gr.Markdown(f"# {self.studio.name.rstrip('/').split('/')[-1]}")
        if not self.studio.has_text:
            gr.Markdown("This model draws without prompts.")
            return {}
        return {
            "prompt": gr.Textbox(label="Prompt", placeholder="What to draw", autofocus=True, max_length=2000),
            "negative_prompt": gr.Textbox(label="Negative prompt", placeholder="What to avoid", max_length=2000),
        }

    def add_tasks(self) -> dict[str, tuple[gr.Button, dict[str, Any]]]:
        """Add a tab for each task. Return their buttons and the settings that are only theirs."""
        tasks: dict[str, tuple[gr.Button, dict[str, Any]]] = {}
        with gr.Tabs():
            with gr.Tab("Text to image"):
                tasks[TEXT] = gr.Button("Draw", variant="primary"), {}
            with gr.Tab("Image to image"):
                self.image = add_image("Begin with", elem_id="begin")
                strength = add_strength(0.8, "How much may change: 1 keeps nothing of the image.")
                tasks[IMAGE] = gr.Button("Change", variant="primary"), {"image": self.image, "strength": strength}
            with gr.Tab("Inpainting"):
                # In pixels of the image
                size = max(self.studio.levels[-1] // 8, 1)
                brush = gr.Brush(size, colors=[("#e03070", 0.6)], color_mode="fixed")
                self.editor = gr.ImageEditor(
                    label="Paint over what is to be drawn again",
                    type="pil",
                    image_mode="RGBA",
                    format="png",
                    sources=["upload", "clipboard"],
                    brush=brush,
                    layers=False,
                    transforms=(),
                    buttons=[],
                    elem_id="editor",
                )
                strength = add_strength(1.0, "Below 1 begins with what is there.")
                tasks[INPAINT] = gr.Button("Fill", variant="primary"), {"editor": self.editor, "strength": strength}
            with gr.Tab("Upscaling"):
                if (fault := self.studio.find_upscaling_fault()) is not None:
                    gr.Markdown(f"This model cannot upscale: {fault}")
                else:
                    tasks[UPSCALE] = self.add_upscaling()
        return tasks

    def add_upscaling(self) -> tuple[gr.Button, dict[str, Any]]:
        inner, size = self.studio.pipeline.unet.sample_sizes[-2:]
        choices = [(f"make it smaller: {inner} px", False), (f"draw it in tiles, {size // inner} times larger", True)]
        own = {
            "image": add_image(f"A small image, up to {inner} x {inner} pixels", elem_id="small"),
            "in_tiles": gr.Radio(choices, value=False, label="If the image is larger"),
            "strength": add_strength(1.0, "Below 1 leaves less to chance."),
            "exact": gr.Checkbox(label="Exact: averaged down, the result is the small image"),
            "guidance_scale": gr.Slider(0, 15, 1.0, step=0.1, label="Guidance scale of upscaling"),
        }
        return gr.Button("Upscale", variant="primary"), own

    def add_settings(self, lora: Sequence[str], takes_any_lora: bool) -> dict[str, Any]:
        studio, config = self.studio, self.studio.pipeline.config
        size = studio.levels[-1]
        with gr.Accordion("Settings"):
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=SEED_MAX)
                dice = gr.Button("⚄ Dice", scale=0, min_width=90)
                dice.click(lambda: random.randint(0, SEED_MAX), None, [seed], queue=False, api_visibility="private")
            steps = gr.Slider(1, 100, 28, step=1, label="Steps")
            guidance = gr.Slider(0, 15, 4.0, step=0.1, label="Guidance scale", info="1 means no guidance.")
            with gr.Row():
                level = gr.Radio(
                    [(f"{one} px", one) for one in studio.levels],
                    value=size,
                    label="Level",
                    info="The resolutions inside the model",
                    visible=len(studio.levels) > 1,
                )
                height, width = (
                    gr.Number(size, label=side, precision=0, minimum=1, maximum=2 * size)
                    for side in ("Height", "Width")
                )
                level.input(lambda one: (one, one), [level], [height, width], queue=False, api_visibility="private")
            scheduler = gr.Dropdown(studio.schedulers, value=studio.own_scheduler, label="Scheduler")
            core_first = gr.Dropdown(
                ["off", *(["auto"] if config.detail_variances else []), "0.9", "0.8", "0.7"],
                value="off",
                label="Core first",
                info="Faster: outer stages join at this noise level.",
                allow_custom_value=True,
                visible=len(studio.levels) > 1,
            )
            with gr.Row(visible=bool(lora) or takes_any_lora):
                info = "A folder, file or repository" if takes_any_lora else None
                adapter = gr.Dropdown(
                    [("none", ""), *lora], value="", label="LoRA", info=info, allow_custom_value=takes_any_lora
                )
                scale = gr.Slider(0, 2, 1.0, step=0.05, label="LoRA scale")
        return {
            "seed": seed,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "height": height,
            "width": width,
            "scheduler": scheduler,
            "core_first": core_first,
            "lora": adapter,
            "lora_scale": scale,
        }

    def add_results(self) -> None:
        self.picture = gr.Image(
            label="Image",
            type="filepath",
            format="png",
            height=512,
            interactive=False,
            buttons=["download", "fullscreen"],
            elem_classes="picture",
        )
        self.status = gr.Textbox(label="Status", interactive=False, max_lines=4)
        with gr.Row():
            self.stop = gr.Button("Stop", variant="stop")
            self.download = gr.DownloadButton("Download", interactive=False)
            reuse = gr.Button("Use as input")
        has_levels = len(self.studio.levels) > 1
        gr.Markdown("The same drawing at each resolution inside the model:", visible=has_levels)
        self.levels = gr.Gallery(
            show_label=False,
            format="png",
            object_fit="contain",
            columns=len(self.studio.levels),
            visible=has_levels,
            interactive=False,
            buttons=[],
            elem_classes="picture",
        )
        copies = [self.image, self.editor]
        reuse.click(lambda path: (path, path), [self.picture], copies, queue=False, api_visibility="private")

    def add_model(self) -> None:
        """Show the lineage and the card."""
        gr.Code(describe(self.studio.name, self.studio.revision), label="Model and lineage", language=None, lines=1)
        text, images = read_card_with_images(self.studio.pipeline, self.studio.name, self.studio.revision)
        with gr.Accordion("Card"):
            gr.Markdown(text)
            for image in images:
                gr.Image(image, interactive=False, show_label=False)

    # ------------------------------------------------------------------------------------------------------------------
    # What happens

    def connect(self, task: str, button: gr.Button, own: dict[str, Any]) -> Any:
        """Let a button draw. Return the event."""
        inputs = {**self.shared, **own}

        def draw(request: gr.Request, *values: Any) -> Iterator[tuple]:
            yield from self.draw(task, dict(zip(inputs, values)), request.session_hash)

        return button.click(
            draw,
            list(inputs.values()),
            [self.picture, self.status, self.download, self.levels],
            api_visibility="private",
            show_progress_on=[self.status],
            concurrency_id="draw",  # one run at a time, whatever the task
            concurrency_limit=1,
        )

    def draw(self, task: str, values: dict[str, Any], session: str | None) -> Iterator[tuple]:
        """Yield what the picture, the status, the download and the levels show, again and again while an image is drawn."""
        keep = gr.skip()
        try:
            run = self.studio.start(read_settings(task, values))
        except ValueError as error:
            yield keep, warn(error), keep, keep
            return
        self.runs[session] = run
        try:
            yield keep, "Starting", gr.DownloadButton(interactive=False), []
            for prediction in run.watch():
                yield self.studio.to_image(prediction), f"Step {run.step} of {run.num_steps}", keep, keep
            if run.is_stopped:
                yield keep, describe_end(run), keep, keep
                return
            with tempfile.TemporaryDirectory() as folder:  # gradio copies the file when it gets its name
                image, levels = run.result()
                path = str(self.studio.write(image, folder, run.settings))
                yield path, describe_end(run), gr.DownloadButton(value=path, interactive=True), label_levels(levels)
        except Exception as error:
            yield keep, warn(error), keep, keep
        finally:  # also if the user has left
            run.stop()

    def stop_run(self, request: gr.Request) -> str:
        run = self.runs.get(request.session_hash)
        if run is not None:
            run.stop()
        return "Nothing is running." if run is None or not run.is_stopped else describe_end(run)

    def forget(self, request: gr.Request) -> None:
        self.runs.pop(request.session_hash, None)


# ----------------------------------------------------------------------------------------------------------------------
# Parts of the page


def add_image(label: str, elem_id: str) -> gr.Image:
    """Add a place for an image. A file that is not one is taken away again, in words."""
    image = gr.Image(
        label=label, type="pil", image_mode=None, sources=["upload", "clipboard"], buttons=[], elem_id=elem_id
    )
    # Without gradio's `preprocess`, which would fail for such a file; and in the queue, as warnings are not shown without it.
    image.upload(check_upload, [image], [image], preprocess=False, concurrency_limit=None, api_visibility="private")
    return image


def check_upload(data: dict[str, Any]) -> Any:
    try:
        with Image.open(data["path"]) as image:
            image.verify()
    except (OSError, SyntaxError, Image.DecompressionBombError):  # Pillow's verification raises SyntaxErrors
        gr.Warning("The file is not an image that can be read: choose a PNG, JPEG or WebP file.")
        return None
    return gr.skip()


def add_strength(value: float, info: str) -> gr.Slider:
    return gr.Slider(0.05, 1, value, step=0.05, label="Strength", info=info)


def read_settings(task: str, values: dict[str, Any]) -> Settings:
    """Return the settings from the values of the components by their names, with a random seed if there is none."""
    values = {**values}
    if (editor := values.pop("editor", None)) is not None:
        background = editor["background"]
        if background is not None and background.getchannel("A").getbbox() is None:  # somebody painted on nothing
            background = None
        values |= {"image": background, "mask": read_mask(editor["layers"])}
    if values["seed"] is None:
        values["seed"] = random.randint(0, SEED_MAX)
    return Settings(task, **values)


def warn(error: Exception) -> str:
    """Show an error in words. Return them for the status. The log has what is not the user's fault."""
    if isinstance(error, (ValueError, OSError, ImportError)):
        text = str(error)
    else:
        logger.error("A drawing has failed.", exc_info=error)
        text = f"The drawing has failed, by an error that is not yours: {type(error).__name__}. The server's log has more."
    gr.Warning(html.escape(text))
    return text


def describe_end(run: Run) -> str:
    if run.is_stopped:
        return f"Stopped after step {run.step} of {run.num_steps}." if run.step else "Stopped."
    text = f"Seed {run.settings.seed}: {run.num_steps} steps in {run.seconds:.1f} seconds."
    return f"{text} The prompts are longer than what the model reads." if run.is_truncated else text


def label_levels(levels: dict[int, Image.Image]) -> list[tuple[Image.Image, str]]:
    """Return the images with captions, or none if there is only one."""
    return [(image, f"{size} px") for size, image in levels.items()] if len(levels) > 1 else []
