# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""`greedy-grow space`: a folder to publish as a Hugging Face Space, which serves the app on free CPU hardware."""

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import SpaceCard, SpaceCardData
from huggingface_hub.utils import validate_repo_id

from diffusers_greedy_grow import GreedyGrowPipeline, __version__

from .serving import check_gradio


APP = """from greedy_grow.app import serve


serve({arguments})
"""
TEXT = """
# {name}

Draw with [`{model}`](https://huggingface.co/{model}), a model in pixel space, grown with diffusers-greedy-grow.
"""
PUBLISH = """{folder} is ready. To publish it:

  hf repos create user/{name} --type space --space-sdk gradio --flavor cpu-basic
  hf upload user/{name} {folder} --type space"""


def run(args: argparse.Namespace) -> None:
    write_space(args.folder, args.model, args.revision, args.lora)
    print(PUBLISH.format(folder=args.folder, name=Path(args.folder).resolve().name))


def write_space(folder: str | Path, model: str, revision: str | None = None, lora: Sequence[str] = ()) -> None:
    """
    Write the files of a Space: its card, requirements and program.

    Args:
        folder (`str` or `Path`): The new folder.
        model (`str`), revision (`str`, *optional*): The pipeline's repository on the Hub, and its branch, tag or commit.
        lora (sequence of `str`): The repositories of adapters to choose from.

    Raises:
        `ValueError`: if the folder exists, if `model` or an adapter is not a repository, or if gradio is not installed.
        `OSError`: if there is no such pipeline on the Hub.
    """
    check_gradio()  # its version is the Space's
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"`{folder}` exists: name a folder that does not.")
    for name in (model, *lora):
        if Path(name).exists():
            raise ValueError(
                f"`{name}` is a folder or file of this machine: publish it first, and name its repository."
            )
        validate_repo_id(name)
    GreedyGrowPipeline.load_config(model, revision=revision)

    name = model.split("/")[-1]
    card = SpaceCardData(
        title=name,
        sdk="gradio",
        sdk_version=metadata.version("gradio"),
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        app_file="app.py",
        models=[model, *lora],
        tags=["diffusers-greedy-grow"],
        suggested_hardware="cpu-basic",
    )
    given = {"revision": revision, "lora": [*lora] or None}
    arguments = [repr(model), *(f"{key}={value!r}" for key, value in given.items() if value is not None)]
    files = {
        "README.md": str(SpaceCard(f"---\n{card.to_yaml()}\n---\n{TEXT.format(name=name, model=model)}")),
        "requirements.txt": f"diffusers-greedy-grow[app]=={__version__}\n",
        "app.py": APP.format(arguments=", ".join(arguments)),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as temporary:
        whole = Path(temporary) / folder.name
        whole.mkdir()
        for file, text in files.items():
            (whole / file).write_text(text, encoding="utf-8")
        whole.rename(folder)
