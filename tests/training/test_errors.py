# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

import logging
import subprocess
import sys

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from tqdm.auto import tqdm

from diffusers_greedy_grow.training.errors import run_script
from diffusers_greedy_grow.training.setup import TqdmHandler, set_attention_backend

from ..testing_utils import make_core


def fail(error: Exception):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "error,line",
    [
        (ValueError("`seed=-1`:\n  must be positive."), "error: `seed=-1`: must be positive."),
        (FileNotFoundError(2, "No such file or directory", "x"), "error: [Errno 2] No such file or directory: 'x'"),
        (FloatingPointError("core stops at step 5"), "error: core stops at step 5"),
        (LocalEntryNotFoundError("offline"), "error: offline"),
    ],
)
def test_a_users_mistake_ends_in_one_line(error, line, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["grow.py"])
    with pytest.raises(SystemExit) as stopped:
        run_script(fail(error))
    assert stopped.value.code == 2 and capsys.readouterr().err == f"{line}\n"
    monkeypatch.setattr(sys, "argv", ["grow.py", "--debug"])
    with pytest.raises(type(error)):
        run_script(fail(error))


def test_an_error_has_a_line_of_its_own_below_a_progress_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["grow.py"])
    tqdm._instances.clear()  # bars of other tests, which an error has left open, would take the lines above

    def main():
        with tqdm(total=2, initial=1):
            run_script(fail(ValueError("a mistake")))

    with pytest.raises(SystemExit):
        main()
    assert "\nerror: a mistake\n" in capsys.readouterr().err.replace("\r", "\n")


def test_a_fault_of_ours_ends_in_a_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["grow.py"])
    for error in (AttributeError("x"), AssertionError(), RuntimeError("shapes differ")):
        with pytest.raises(type(error)):
            run_script(fail(error))


def write_to_a_full_disk():
    with open("/dev/full", "w", encoding="utf-8") as file:
        file.write("x")


def wrapped():
    try:
        write_to_a_full_disk()
    except OSError as error:
        raise RuntimeError("not saved") from error


@pytest.mark.parametrize(
    "main",
    [
        write_to_a_full_disk,
        wrapped,
        fail(RuntimeError("[enforce fail at inline_container.cc:603] PytorchStreamWriter failed writing file data/0")),
        fail(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 54336 vs 54228")),
        fail(Exception("Error while serializing: I/O error: No space left on device (os error 28)")),  # safetensors
        fail(Exception("Error while serializing: I/O error: File too large (os error 27)")),
        fail(OSError(27, "File too large")),
    ],
)
def test_a_full_disk_says_so(main, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["grow.py"])
    with pytest.raises(SystemExit) as stopped:
        run_script(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert line.startswith("error: The disk is full: ") and "`--resume_from_checkpoint latest`" in line


def test_importing_the_package_prints_nothing():
    code = "import logging, diffusers_greedy_grow; logging.warning('still heard')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and done.stdout == "" and done.stderr == "WARNING:root:still heard\n"


def test_attention_backends_are_set_without_a_warning(capfd):
    set_attention_backend(make_core(), "_native_math")
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ValueError, match="`attention_backend='flash'`"):
        set_attention_backend(make_core(), "flash")


def test_log_lines_name_their_process_only_if_there_are_others(capsys):
    record = logging.LogRecord("x", logging.INFO, "", 0, "[RANK 0] text", (), None)
    for num_processes in (1, 2):
        TqdmHandler(num_processes).emit(record)
    assert capsys.readouterr().out == "text\n[RANK 0] text\n"
