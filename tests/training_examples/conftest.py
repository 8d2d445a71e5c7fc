# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

import signal
from pathlib import Path

import pytest

from training_examples import grow

from ..data_utils import write_image_folder
from . import launching
from .launching import grow_flags, run


def pytest_configure(config):
    launching.warning_filters[:] = [*config.getini("filterwarnings"), *(config.getoption("pythonwarnings") or [])]


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder of 60 captioned images."""
    return write_image_folder(tmp_path_factory.mktemp("data") / "images", count=60)


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory) -> tuple[Path, str]:
    """The folder of a finished run on `data`, and what the run said. Tests must not change the folder."""
    output_dir = tmp_path_factory.mktemp("finished") / "output"
    return output_dir, run(output_dir, train_data_dir=data)


@pytest.fixture
def here(monkeypatch):
    """Run `grow.py` in this process, to see its exceptions; for what it refuses before it trains."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(signal, "signal", lambda *args: None)  # Ctrl-C is for pytest

    def run_here(output_dir: Path, **arguments) -> None:
        grow.main(grow_flags(output_dir, **arguments))

    return run_here
