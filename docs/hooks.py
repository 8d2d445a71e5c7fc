# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
Hooks of MkDocs: the site has the repository's own pages, pictures and linked files, at the same places. So one link works on the
site and in the repository.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


ROOT = Path(__file__).parents[1]
PATTERNS = (
    "*.md",
    "LICENSE",
    "CITATION.cff",
    "assets/*",
    "benchmarks/*.md",
    "benchmarks/*.py",
    "benchmarks/docs/*.md",
    "benchmarks/results/**/*.*",
    "diffusers_greedy_grow/flow.py",
    "docs/*.md",
    "model_cards/**/*.*",
    "notebooks/*.ipynb",
    "training_examples/**/*.*",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the files of `docs_dir`, whose links point out of it, by those of the repository."""
    for file in list(files.documentation_pages()):
        files.remove(file)
    for path in sorted({path for pattern in PATTERNS for path in ROOT.glob(pattern)}):
        name = path.relative_to(ROOT).as_posix()
        if path.is_file() and "__pycache__" not in name:
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between backquotes, as docstrings have them, into code."""
    return re.sub(r"\[(`[^`\]]+`)\](?![(\[])", r"\1", markdown)
