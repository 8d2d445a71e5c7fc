# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""Signals that stop a run: the current step is finished and a checkpoint is saved."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading

from accelerate import Accelerator


# A closed terminal, and Slurm's warning (`#SBATCH --signal=USR1@120`).
WARNINGS = [getattr(signal, name) for name in ("SIGHUP", "SIGUSR1") if hasattr(signal, name)]  # Windows has neither


class Interrupt:
    """Catches Ctrl-C, SIGTERM, SIGHUP and SIGUSR1, so that the loop can finish its step and save a checkpoint."""

    def __init__(self):
        self.signal: int | None = None
        self.terminals = [number for number in (1, 2) if os.isatty(number)]
        for number in (signal.SIGINT, signal.SIGTERM, *WARNINGS):
            # `nohup` ignores SIGHUP: then the run continues when the terminal closes.
            if number not in WARNINGS or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.note)

    def note(self, number: int, frame) -> None:
        """Handle a signal: remember the first, and stop at once at a second Ctrl-C."""
        for terminal in self.terminals:
            if not os.isatty(terminal):  # it has been closed, and a log line would end the run
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, terminal)
                os.close(nowhere)
        if self.signal is None:
            self.signal = number
            text = "the run saves its work after the next step and stops. Ctrl-C again stops it at once."
            # `os.write` and not `print`: the signal may have interrupted a `print`.
            with contextlib.suppress(OSError):  # stderr may be a closed pipe
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
    Make a data loader's worker ignore the signals that stop a run. Ctrl-C, and a signal to a job, reach all of its processes, but
    the training process still needs its workers to finish the step. A SIGTERM from the training process ends them.
    """
    for number in (signal.SIGINT, *WARNINGS):
        signal.signal(number, signal.SIG_IGN)
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
