# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""TODO"""

import multiprocessing
import os
import signal
import sys
import threading

from accelerate import Accelerator


class Interrupt:
    """Notes Ctrl-C and SIGTERM, so that the step at hand is finished and a checkpoint is saved."""

    def __init__(self):
        self.signal: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number: int, frame) -> None:
        if self.signal is None:
            self.signal = number
            text = "a checkpoint is saved after the next training step, then the run stops. Ctrl-C again stops it at once."
            # Not by print, which may be what the signal has interrupted.
            os.write(2, f"\n{signal.Signals(number).name}: {text}\n".encode())
        elif number == signal.SIGINT:  # a second SIGTERM is that of a scheduler, passed on by the launcher
            sys.exit(128 + number)

    def noted(self, accelerator: Accelerator, ask: bool) -> bool:
        """
        Whether to stop: if any process has noted a signal. Several are only heard if they `ask`, all of them at the same
        steps, since that waits for the GPU.
        """
        if accelerator.num_processes == 1:
            return self.signal is not None
        if ask and self.signal is not None:
            accelerator.set_trigger()
        return ask and accelerator.check_trigger()


def leave_signals_to_the_parent(worker_id: int) -> None:
    """
    For each worker of a data loader. Ctrl-C, and SIGTERM to a job, reach all processes of it, but the one that trains still
    needs its workers to finish a step. They end when it does, by a SIGTERM of its own.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS does not tell whose signal it is
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_for_the_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
            pass
        os._exit(0)

    threading.Thread(target=wait_for_the_parent, daemon=True).start()
