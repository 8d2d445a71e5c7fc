# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Model cards of models, pipelines and adapters. Their text is in `templates/`."""

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, constants, hf_hub_download
from huggingface_hub.errors import HTTPError
from PIL import Image
from yaml import YAMLError

from .lineage import get_lineage
from .references import find_core_source


TEMPLATES = Path(__file__).parent / "templates"
GALLERY = "images"  # the folder of a card's single images
EXAMPLE = "a large red striped circle on a white background"  # the prompt of a card without a gallery
TAGS = ["diffusers", "diffusers-greedy-grow", "greedy-growing", "pixel-space", "flow-matching"]


def make_card(
    pushed,
    repo_id: str,
    license: str | None = None,
    datasets: list[str] | None = None,
    eval_results: list[EvalResult] | None = None,
    samples: str | None = None,
    gallery: dict[str, str] = {},
    curves: str | None = None,
    tag: str | None = None,
    core: str = "copy",
) -> ModelCard:
    """
    Make the card of a model or pipeline: metadata for the Hub, how to use and grow it, and its lineage. Without a `license`, it
    has that of the core that it was grown from, if the core's own card can be read.

    Args:
        pushed ([`GreedyGrowPipeline`], [`ShallowUNet2DModel`] or [`GrowableUNet2DConditionModel`]):
            The model or pipeline that is published.
        repo_id (`str`):
            The repository that it is published to.
        license (`str`, *optional*), datasets (`list[str]`, *optional*):
            Identifiers of the Hub.
        eval_results (`list[EvalResult]`, *optional*):
            Results for the metadata and for a table.
        samples (`str`, *optional*), curves (`str`, *optional*):
            The file names of a grid of samples and of a plot of the losses in the repository, which the card shows.
        gallery (`dict[str, str]`, defaults to `{}`):
            The prompts of single images, by the images' file names in the repository. The Hub shows them first.
        tag (`str`, *optional*):
            The tag of the repository that the card describes and loads.
        core (`str`, defaults to `"copy"`):
            How the core is stored; see [`HubMixin.save_pretrained`].

    Returns:
        [`~huggingface_hub.ModelCard`]
    """
    model = getattr(pushed, "unet", pushed)
    is_pipeline = model is not pushed
    lineage = get_lineage(model)
    cores = [entry["core"] for entry in lineage if entry.get("core")]
    name = repo_id.split("/")[-1]
    has_text = model.config.cross_attention_dim is not None
    relation: dict = {"base_model": cores[-1], "base_model_relation": "finetune"} if cores else {}
    licensed: dict[str, Any] = {"license": license} if license is not None else find_license(model)
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image" if has_text else "unconditional-image-generation",
        tags=TAGS,
        datasets=datasets,
        eval_results=eval_results or None,
        model_name=name if eval_results else None,
        widget=[{"text": prompt, "output": {"url": file}} for file, prompt in gallery.items()] or None,
        **licensed,
        **relation,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "model_card.md"),
        name=name,
        repo_id=repo_id,
        tag=tag,
        is_pipeline=is_pipeline,
        has_text=has_text,
        cleans_prompts=is_pipeline and pushed.config.get("prompt_format") == "prx_pixel",
        has_core_of_others=model.config.get("core_config") is not None,
        class_name=type(pushed).__name__,
        grown_class_name="GreedyGrowPipeline" if is_pipeline else "GrowableUNet2DConditionModel",
        sizes=model.sample_sizes,
        parameters=f"{model.num_parameters() / 1e6:.1f} M",
        untrained=bool(lineage) and "grown_to" in lineage[-1],
        lineage=[describe_entry(entry) for entry in lineage],
        results=[(result.dataset_name, result.metric_name, result.metric_value) for result in eval_results or []],
        samples=samples,
        has_gallery=bool(gallery),
        prompt=json.dumps(next(iter(gallery.values()), EXAMPLE), ensure_ascii=False),
        curves=curves,
        core=describe_core(model),
        core_is_referred_to=core == "reference",
        has_license_of_core=license is None and bool(licensed),
    )


def describe_core(model) -> str | None:
    """Return the repository of a grown model's core, and its commit, as a card names them; or None, if it is not on the Hub."""
    if getattr(model, "core_folder", None) is not None:
        return None
    try:
        core, revision = find_core_source(model)
    except ValueError:  # unknown, or not a grown model
        return None
    return f"[`{core}`](https://huggingface.co/{core})" + (f" at `{revision[:12]}`" if revision else "")


def find_license(model) -> dict[str, str]:
    """
    Return the license in the card of the model that this one was grown from, or of the nearest before it whose card has one:
    `license`, and for one that the Hub does not know, `license_name` and `license_link`. Return an empty dictionary if there is
    none, or no card can be read.
    """
    sources = [(entry["core"], entry.get("core_revision")) for entry in get_lineage(model) if entry.get("core")][::-1]
    if (folder := getattr(model, "core_folder", None)) is not None:
        # A pipeline has its card beside the model's folder.
        sources += [(folder, None), (str(Path(folder).parent), None)]
    for source, revision in sources:
        try:
            path = Path(source, "README.md")
            if not Path(source).is_dir():
                path = Path(hf_hub_download(source, "README.md", revision=revision))
            data = ModelCard.load(path).data
        except (OSError, ValueError, HTTPError, YAMLError):
            continue
        if not isinstance(license := data.get("license"), str):
            continue
        found = {"license": license, **{name: data.get(name) for name in ("license_name", "license_link")}}
        link = found["license_link"]
        if link and "://" not in link and not Path(source).is_dir():  # a file of the core's repository
            found["license_link"] = f"{constants.ENDPOINT}/{source}/blob/{revision or 'main'}/{link}"
        return {name: value for name, value in found.items() if isinstance(value, str)}
    return {}


def describe_entry(entry: dict[str, Any]) -> tuple:
    """Return the row of a lineage entry in a card's table: phase, resolution, trained part, steps, images, seed."""
    if "grown_to" in entry:
        core, revision = entry.get("core"), entry.get("core_revision")
        source = f" from `{core}`" + (f" at `{revision[:12]}`" if revision else "") if core else ""
        return (f"grown{source}, `init={entry.get('init')!r}`", entry["grown_to"], "", "", "", "")
    row = {name: entry.get(name, "") for name in ("phase", "resolution", "trained", "steps", "images", "seed")}
    if "best_step" in entry:
        row["steps"] = (
            f"{row['steps']}; weights of step {entry['best_step']}, held-out loss {entry['best_val_loss']:.4g}"
        )
    return tuple(row.values())


def write_card(
    folder: Path,
    pushed,
    repo_id: str,
    samples: str | Path | None = None,
    gallery: Iterable[tuple[str, Image.Image]] = (),
    curves: str | Path | None = None,
    **card: Any,
) -> None:
    """
    Write the card of `pushed` into the folder that holds it, and its images beside it.

    Args:
        folder (`Path`), pushed, repo_id (`str`):
            The folder, what it holds, and the repository that it is published to.
        samples (`str` or `Path`, *optional*), curves (`str` or `Path`, *optional*):
            The files of a grid of samples and of a plot of the losses.
        gallery (`Iterable[tuple[str, Image.Image]]`, defaults to `()`):
            Prompts and their images.
        card:
            More arguments of [`make_card`].
    """
    for name, source in (("samples", samples), ("curves", curves)):
        if source is not None:
            card[name] = name + Path(source).suffix
            shutil.copy(source, folder / card[name])
    card["gallery"] = {}
    for index, (prompt, image) in enumerate(gallery):
        file = f"{GALLERY}/{index}.png"
        (folder / GALLERY).mkdir(exist_ok=True)
        image.save(folder / file)
        card["gallery"][file] = prompt
    make_card(pushed, repo_id, **card).save(folder / "README.md")


def read_card(folder: Path) -> dict[str, Any]:
    """
    Return what the card in a folder says that its model does not: `license`, `datasets`, `eval_results`, `samples`, `gallery` and
    `curves`, as [`HubMixin.push_to_hub`] takes them. Only the card of a folder that training or a push has written is read:
    otherwise the dictionary is empty.
    """
    try:
        card = ModelCard.load(folder / "README.md")
    except (OSError, ValueError, YAMLError):
        return {}
    if not set(TAGS) <= set(card.data.tags or []):
        return {}
    found = {name: card.data.get(name) for name in ("license", "datasets", "eval_results")}
    if card.data.get("license_name"):
        # A license that the Hub does not know is the core's: [`find_license`] finds it together with its name.
        del found["license"]
    for name in ("samples", "curves"):
        if match := re.search(rf"!\[.*\]\(({name}\.\w+)\)", card.text):
            found[name] = folder / match[1]
    # No other files: a downloaded card may name any.
    gallery = [(prompt, url) for prompt, url in read_gallery(card) if re.fullmatch(rf"{GALLERY}/\d+\.png", url)]
    found["gallery"] = [(prompt, Image.open(folder / url)) for prompt, url in gallery]
    return {name: value for name, value in found.items() if value}


def read_gallery(card: ModelCard) -> list[tuple[str, str]]:
    """Return the prompts and the files or addresses of the images in a card's gallery. Examples without an image are left out."""
    entries = [entry for entry in card.data.get("widget") or [] if isinstance(entry.get("output"), dict)]
    return [(str(entry.get("text", "")), str(entry["output"].get("url"))) for entry in entries]


def make_lora_card(
    repo_id: str,
    base_model: str,
    revision: str | None,
    prompt: str,
    samples: str,
    trained: str,
    license: str | None = None,
    datasets: list[str] | None = None,
) -> ModelCard:
    """
    Make the card of a LoRA adapter.

    Args:
        repo_id (`str`):
            The repository that it is published to.
        base_model (`str`), revision (`str`, *optional*):
            The pipeline that it was trained on, a repository or a folder.
        prompt (`str`):
            The prompt of the example.
        samples (`str`):
            The file name of an image in the repository, which the card shows.
        trained (`str`):
            A short description of the training.
        license (`str`, *optional*), datasets (`list[str]`, *optional*):
            Identifiers of the Hub.

    Returns:
        [`~huggingface_hub.ModelCard`]
    """
    is_folder = Path(base_model).exists()
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[*TAGS, "lora"],
        license=license,
        datasets=datasets,
        **({} if is_folder else {"base_model": base_model, "base_model_relation": "adapter"}),  # type: ignore[arg-type]
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "lora_card.md"),
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        base_model=base_model,
        revision=revision,
        prompt=json.dumps(prompt, ensure_ascii=False),
        trained=trained,
        samples=samples,
    )
