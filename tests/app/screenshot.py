# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
Draw with a model in the app and write what one sees to a PNG:

    python -m tests.app.screenshot MODEL assets/app.png
"""

import argparse
import re

from PIL import Image

from .browser import open_browser, serve


PROMPT = "a large blue dotted star on a white background"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    with serve("-m", "greedy_grow", "app", args.model) as (address, _), open_browser() as browser:
        from playwright.sync_api import expect

        tab = browser.new_page(viewport={"width": 1280, "height": 1120})
        tab.goto(address)
        tab.get_by_label("Prompt", exact=True).fill(args.prompt)
        tab.get_by_label("Seed", exact=True).fill(str(args.seed))
        tab.get_by_role("button", name="Draw", exact=True).click()
        expect(tab.get_by_label("Status")).to_have_value(re.compile("^Seed "), timeout=300000)
        pictures = tab.locator(".picture img")
        tab.wait_for_function(
            "pictures => pictures.every(picture => picture.complete)", arg=pictures.element_handles()
        )
        tab.mouse.move(0, 0)
        tab.screenshot(path=args.out)
    Image.open(args.out).convert("RGB").save(args.out, optimize=True)


if __name__ == "__main__":
    main()
