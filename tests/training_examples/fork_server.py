# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
Run scripts in forks of one process that has imported what they import: a short run spends most of its time importing torch,
diffusers and transformers. Each fork runs the file itself as `__main__`. It differs from `python FILE` in one thing: modules
are already imported.

A process with threads should not fork, so the test runner starts this one. It reads requests from stdin and writes exit codes
to stdout, one JSON document per line. `launching.py` is the other side.
"""

import importlib
import json
import os
import runpy
import sys
import traceback
import warnings
from pathlib import Path

from _pytest.config import parse_warning_filter


# Modules that the scripts and their libraries import late, when they are first used.
IMPORTED_LATE = (
    "accelerate.tracking",
    "diffusers.pipelines.pipeline_loading_utils",
    "matplotlib.backends.backend_agg",
    "peft",
    "tensorboard.backend.event_processing.event_accumulator",
    "torch.utils.flop_counter",
    "torch.utils.tensorboard",
    "transformers.models.bert",
)


def run_script(script: str, argv: list[str], environment: dict[str, str], log: str, filters: list[str]) -> int:
    """Run `script` in this process, as `python SCRIPT ARGV` would. Return its exit code."""
    os.setsid()
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    for line in filters:
        warnings.filterwarnings(*parse_warning_filter(line, escape=False))
    sys.argv = [script, *argv]
    sys.path[0] = str(Path(script).parent)
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    return code


def main(scripts: list[str]) -> None:
    """Import what `scripts` import, then serve requests until stdin ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what imports print must not be taken for a reply
    for script in scripts:
        runpy.run_path(script, run_name="imported")
    for name in IMPORTED_LATE:
        importlib.import_module(name)
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            code = 1
            try:
                code = run_script(**json.loads(line))
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), file=replies)


if __name__ == "__main__":
    main(sys.argv[1:])
