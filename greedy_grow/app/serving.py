# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Load a model and serve the page, on this machine or as a Space."""

import argparse
import importlib.util
import os
from collections.abc import Sequence

from diffusers_greedy_grow import GreedyGrowPipeline

from ..drawing import load
from .studio import Studio


HERE = ("127.0.0.1", "localhost", "::1")


def check_gradio() -> None:
    if importlib.util.find_spec("gradio") is None:
        raise ValueError('The app needs gradio: pip install "diffusers-greedy-grow[app]".')


def serve(
    model: str,
    revision: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    lora: Sequence[str] = (),
    host: str | None = None,
    port: int | None = None,
) -> None:
    """
    Serve a page that draws with a model, until the program is interrupted.

    Args:
        model (`str`), revision (`str`, *optional*):
            The pipeline's folder, or its repository on the Hub and the branch, tag or commit.
        dtype (`str`, *optional*), device (`str`, *optional*):
            As in `greedy-grow sample`.
        lora (sequence of `str`):
            The LoRA adapters to choose from: folders, files or repositories. On an address of this machine only, the page takes
            any other one, too. Elsewhere it does not, since visitors could then name files of this machine.
        host (`str`, *optional*), port (`int`, *optional*):
            The address to serve at. By default gradio's environment variables decide, as they do in a Space, or else it is
            127.0.0.1, and the first free port from 7860 on.

    Raises:
        `ValueError`: if gradio is not installed, or if the model cannot read prompts.
        `OSError`: if there is no complete, undamaged model, or no free port.
    """
    check_gradio()
    studio = Studio(load(GreedyGrowPipeline, model, revision, dtype, device), model, revision)
    from .page import Page

    is_private = (host or os.environ.get("GRADIO_SERVER_NAME", HERE[0])) in HERE
    page = Page(studio, lora, takes_any_lora=is_private)
    try:
        page.launch(server_name=host, server_port=port)
    finally:
        studio.close()


def run(args: argparse.Namespace) -> None:
    serve(args.model, args.revision, args.dtype, args.device, args.lora, args.host, args.port)
