# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ..testing_utils import heed_hangups


WAIT = """
import signal
import sys
import time
from pathlib import Path
from diffusers_greedy_grow.training.signals import Interrupt

signal.signal(signal.SIGUSR1, signal.SIG_IGN if sys.argv[1] == "ignored" else signal.SIG_DFL)
interrupt, folder = Interrupt(), Path(sys.argv[2])
(folder / "started").touch()
while interrupt.signal is None and not (folder / "stop").exists():
    time.sleep(0.02)
time.sleep(0.2)
print("saving", flush=True)  # what a log line does
print("saving", file=sys.stderr, flush=True)
(folder / "saved").write_text(str(interrupt.exit_code), encoding="utf-8")
"""


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
def test_a_run_whose_terminal_closes_saves(tmp_path):
    """The terminal is gone by then: neither the signal's message nor a log line may end the run."""
    terminal, end = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT, "default", str(tmp_path)],
        stdin=end,
        stdout=end,
        stderr=end,
        start_new_session=True,
        preexec_fn=heed_hangups,
    )
    os.close(end)
    wait_for(tmp_path / "started")
    os.close(terminal)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "saved").read_text(encoding="utf-8") == str(128 + signal.SIGHUP)


@pytest.mark.parametrize("handling", ["default", "ignored"])
def test_the_warning_of_a_scheduler(handling, tmp_path):
    """A signal that is ignored from the start, as SIGHUP is under `nohup`, stays ignored."""
    process = subprocess.Popen([sys.executable, "-c", WAIT, handling, str(tmp_path)], stderr=subprocess.PIPE, stdout=2)
    wait_for(tmp_path / "started")
    process.send_signal(signal.SIGUSR1)
    if handling == "ignored":
        time.sleep(0.5)
        assert process.poll() is None and not (tmp_path / "saved").exists()
        (tmp_path / "stop").touch()
    error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 0
    assert ("SIGUSR1: the run saves its work after the next step" in error) == (handling == "default")
    expected = signal.SIGUSR1 if handling == "default" else signal.SIGTERM
    assert (tmp_path / "saved").read_text(encoding="utf-8") == str(128 + expected)
