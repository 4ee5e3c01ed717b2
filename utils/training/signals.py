"""Signals that ask a run to stop: it finishes its step and saves first."""

import contextlib
import os
import signal
import threading
import time

# SIGUSR1: batch schedulers send it before the end. SIGHUP: the terminal or ssh connection is gone.
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")


class StopSignal:
    """`number` is 0, or the signal that asks for a stop. A second one ends the process at once.

    Within a second it is the same: torchrun passes on what the processes have from the terminal.
    """

    number, seen = 0, 0.0

    def __enter__(self) -> "StopSignal":
        self.previous = {}
        if threading.current_thread() is not threading.main_thread():  # Python hears no signals in another
            return self
        for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):  # Windows lacks some
            # nohup ignores SIGHUP: the run is to continue without its terminal.
            if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
                self.previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number, _frame):
        if not self.number:
            self.number, self.seen = number, time.monotonic()
            with contextlib.suppress(OSError):  # os.write, as print is not safe inside a handler
                os.write(2, f"\n{signal.Signals(number).name}: saving after this step (again: quit now)\n".encode())
        elif time.monotonic() - self.seen > 1:
            os._exit(128 + number)
