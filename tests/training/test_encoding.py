# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Files are written and read as UTF-8 whatever the locale."""

import os
import subprocess
import sys

import yaml


IN_ASCII = """
import sys
from pathlib import Path

from accelerate.logging import get_logger

from diffusers_greedy_grow.training.files import write_text
from diffusers_greedy_grow.training.parsing import parse_arguments
from diffusers_greedy_grow.training.run_folder import claim_output_dir, find_finished
from diffusers_greedy_grow.training.setup import set_up

folder = Path(sys.argv[1])
data, model, training = parse_arguments(["--config", str(folder / "given.yaml")], "")
assert data.validation_prompts == ["gr\\u00fcn", "\\u7dd1 \\U0001f600"], data
set_up(training)
get_logger("test").info(data.validation_prompts[1])
write_text(folder / "text.txt", data.validation_prompts[1])
claim_output_dir(folder, {"validation_prompts": data.validation_prompts, "resolutions": [8]}, [], None, False)
assert find_finished(folder) == []
assert parse_arguments(["--config", str(folder / "config.yaml")], "")[0].validation_prompts == data.validation_prompts
"""


def test_a_config_with_umlauts_in_an_ascii_locale(tmp_path):
    prompts = ["grün", "緑 \U0001f600"]
    given = yaml.safe_dump({"output_dir": str(tmp_path), "validation_prompts": prompts}, allow_unicode=True)
    assert "grün" in given
    (tmp_path / "given.yaml").write_bytes(given.encode())
    ascii_locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, "-c", IN_ASCII, str(tmp_path)],
        env={**os.environ, **ascii_locale},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "\\u7dd1 \\U0001f600" in done.stdout  # log lines show what the terminal cannot
    assert (tmp_path / "text.txt").read_bytes().decode() == prompts[1]
    assert "grün" in (tmp_path / "config.yaml").read_bytes().decode()  # readable, too
