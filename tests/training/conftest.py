# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import pytest

from diffusers_greedy_grow.training.data import streaming

from ..data_utils import make_image, write_rows


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder of four parquet files of six rows each, all different, every third one wide."""
    folder = tmp_path_factory.mktemp("files")
    for i in range(0, 24, 6):
        shapes = [(40, 10) if j % 3 == 0 else (32, 32) for j in range(i, i + 6)]
        rows = [(make_image(j).resize(shape), f"image number {j}") for j, shape in zip(range(i, i + 6), shapes)]
        write_rows(folder / f"{i // 6}.parquet", rows)
    return folder


@pytest.fixture
def rows_read(monkeypatch) -> list[tuple[int, int]]:
    """The places of the rows that have been read from any stream."""
    places, read_files = [], streaming.read_files

    def read_and_note(*args):
        for place, row in read_files(*args):
            places.append(place)
            yield place, row

    monkeypatch.setattr(streaming, "read_files", read_and_note)
    return places
