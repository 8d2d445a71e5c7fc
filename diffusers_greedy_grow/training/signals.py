# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Signals that stop a run: the current step is finished and a checkpoint is saved."""

import multiprocessing
import os
import signal
import sys
import threading

from accelerate import Accelerator


class Interrupt:
    """Catches Ctrl-C and SIGTERM, so that the loop can finish its step and save a checkpoint."""

    def __init__(self):
        self.signal: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number: int, frame) -> None:
        """Handle a signal: remember the first, and stop at once at a second Ctrl-C."""
        if self.signal is None:
            self.signal = number
            text = "a checkpoint is saved after the next training step, then the run stops. Ctrl-C again stops it at once."
            # `os.write` and not `print`: the signal may have interrupted a `print`.
            os.write(2, f"\n{signal.Signals(number).name}: {text}\n".encode())
        elif number == signal.SIGINT:  # a second SIGTERM comes from a scheduler, passed on by the launcher
            sys.exit(128 + number)

    def noted(self, accelerator: Accelerator, ask: bool) -> bool:
        """
        Return whether to stop, because any process has caught a signal. Several processes tell each other only if they
        `ask`, all at the same steps, since that waits for the GPU.
        """
        if accelerator.num_processes == 1:
            return self.signal is not None
        if ask and self.signal is not None:
            accelerator.set_trigger()
        return ask and accelerator.check_trigger()

    @property
    def exit_code(self) -> int:
        """The exit code of a process that the signal stopped."""
        return 128 + (self.signal or signal.SIGTERM)


def leave_signals_to_the_parent(worker_id: int) -> None:
    """
    Make a data loader's worker ignore the signals that stop a run. Ctrl-C, and SIGTERM to a job, reach all of its processes, but
    the training process still needs its workers to finish the step. A SIGTERM from the training process ends them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS does not tell who sent a signal
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_for_the_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
            pass
        os._exit(0)

    threading.Thread(target=wait_for_the_parent, daemon=True).start()
