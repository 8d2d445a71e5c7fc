# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The card of a model on a page of its own."""

import re
from pathlib import Path

from huggingface_hub import constants

from diffusers_greedy_grow import GreedyGrowPipeline
from diffusers_greedy_grow.hub.cards import make_card, read_gallery

from ..inspection import find_card


# `![Samples](samples.png)`, an image beside the card
IMAGE = re.compile(r"!\[[^\]]*\]\((?!\w+:)([^)\s]+)\)")


def read_card_with_images(pipeline: GreedyGrowPipeline, name: str, revision: str | None) -> tuple[str, list[str]]:
    """
    Read the card of a folder or a repository, or make one if it has none.

    Returns:
        The text in Markdown, without the images that lie beside it, and the files or addresses of these.
    """
    card = find_card(name, revision) or make_card(pipeline, name)
    where = name if Path(name).is_dir() else f"{constants.ENDPOINT}/{name}/resolve/{revision or 'main'}"
    paths = [url for _, url in read_gallery(card)] + IMAGE.findall(card.text)
    images = [path if "://" in path else f"{where}/{path}" for path in paths]
    return IMAGE.sub("", card.text).replace("<Gallery />", ""), [
        image for image in images if "://" in image or Path(image).is_file()
    ]
