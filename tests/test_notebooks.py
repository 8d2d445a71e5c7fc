# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The notebooks run from the first cell to the last, at the sizes that they choose without a GPU."""

import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


NOTEBOOKS = sorted(Path(__file__).parents[1].glob("notebooks/*.ipynb"))
# How many images each shows, which are there only if everything before has worked: `!command` raises no error.
IMAGES = {"grow_your_images": 9, "start_from_a_published_model": 2}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_not_committed(path):
    cells = nbformat.read(path, as_version=4).cells
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]
    # What needs a network or an account is left out by the tag that nbclient, nbmake and Jupyter know.
    tagged = [cell.source for cell in cells if "skip-execution" in cell.metadata.get("tags", [])]
    assert len(tagged) == 2 and "pip install" in tagged[0] and "notebook_login()" in tagged[1]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")  # for `!greedy-grow`
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == IMAGES[path.stem]
    printed = "".join(output.get("text", "") for output in outputs)
    assert "error:" not in printed and "Traceback" not in printed
