# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""A headless browser and the app in a process of its own. Alone, this program says by its exit code whether there is a browser."""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


ROOT = Path(__file__).parents[2]


def find_browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


@contextmanager
def serve(*command: object, **environment: str) -> Iterator[tuple[str, list[str]]]:
    """Run a Python program that serves the app. Yield the address and all lines that the program prints."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines: list[str] = []
    address = None
    try:
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"Running on local URL:\s+(\S+)", line):
                address = found[1]
                break
        assert address is not None, "".join(lines)
        threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True).start()
        yield address, lines
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def open_browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        yield browser
        browser.close()


if __name__ == "__main__":
    sys.exit(find_browser() is None)
