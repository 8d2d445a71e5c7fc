# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import PartialState

from diffusers_greedy_grow.training.run_folder import check_replaced, hold_output_dir, lock_file, truncate_metrics


def test_what_no_run_has_made_is_not_replaced(tmp_path):
    (tmp_path / "samples").mkdir()
    with pytest.raises(ValueError, match="holds samples, which this run would replace, but no `config.yaml`"):
        check_replaced(tmp_path, ["checkpoints", "samples"])
    check_replaced(tmp_path, ["checkpoints"])
    (tmp_path / "config.yaml").write_text("")
    check_replaced(tmp_path, ["checkpoints", "samples"])


def test_metrics_after_a_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    truncate_metrics(path, 0, False)  # killed before the first line
    path.write_text("one\ntwo\nthr")
    truncate_metrics(path, 4, False)
    assert path.read_text() == "one\n"
    with pytest.raises(ValueError, match="lacks lines that were there when the checkpoint was saved"):
        truncate_metrics(path, 8, False)
    truncate_metrics(path, 8, resume_with_changes=True)
    assert path.read_text() == "one\n"


# ----------------------------------------------------------------------------------------------------------------------
# One run at a time


HOLD = """
import os
import sys
import time
from pathlib import Path
from accelerate import PartialState
from diffusers_greedy_grow.training.run_folder import hold_output_dir

state = PartialState(cpu=True)
with hold_output_dir(Path(sys.argv[1]), state):
    if sys.argv[2] == "fork" and os.fork() == 0:  # a worker that outlives its run
        print("held", flush=True)
        time.sleep(60)
        os._exit(0)
    if sys.argv[2] == "hold":
        print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path, how: str) -> subprocess.Popen:
    """Start a process that holds `folder` until its input ends."""
    command = [sys.executable, "-c", HOLD, str(folder), how]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    return process


def try_to_hold(folder: Path) -> None:
    with hold_output_dir(folder, PartialState(cpu=True)):
        assert (folder / ".lock").exists()


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path):
    folder = tmp_path / "a" / "output"
    process = hold(folder, "hold")
    for path in (folder, tmp_path / "a" / ".." / "a" / "output"):
        with pytest.raises(
            ValueError,
            match=rf"`output_dir=.*` is in use by process {process.pid} on {socket.gethostname()}, since 20\d\d-.* UTC\. Wait",
        ):
            try_to_hold(path)
    process.communicate()
    assert process.returncode == 0 and not (tmp_path / "a").exists()  # nothing was written to it
    try_to_hold(folder)


@pytest.mark.parametrize("how", ["hold", "fork"])
def test_a_process_that_dies_holds_nothing(how, tmp_path):
    process = hold(tmp_path / "output", how)
    try:
        process.kill()
        process.wait()
        assert (tmp_path / "output" / ".lock").exists()
        try_to_hold(tmp_path / "output")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert list((tmp_path / "output").iterdir()) == []


def test_a_folder_on_a_drive_without_locks(tmp_path, monkeypatch, caplog):
    def cannot(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", cannot)
    with hold_output_dir(tmp_path, PartialState(cpu=True)):
        pass
    assert "cannot be locked (No locks available): start no second run in it" in caplog.text


def test_a_lock_that_was_just_released_is_taken_again(tmp_path, monkeypatch):
    """Another process may have opened the file before its holder removed it."""
    path, lockf = tmp_path / ".lock", fcntl.lockf
    removed = []

    def lock(*args):
        if not removed:
            path.unlink()
            removed.append(path)
        lockf(*args)

    monkeypatch.setattr(fcntl, "lockf", lock)
    with lock_file(path, "it"):
        assert json.loads(path.read_text(encoding="utf-8"))["process"] == os.getpid()
    assert not path.exists()
