"""Signals that ask a run to stop: it finishes its step and saves first."""

import contextlib
import os
import signal
import time

# SIGUSR1: batch schedulers send it before the end. SIGHUP: the terminal or ssh connection is gone.
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")


class StopSignal:
    """`number` is 0, or the signal that asks for a stop. A second signal ends the process at once.

    A signal within a second of the first is the same one: torchrun passes it on to processes that
    have it from the terminal already.
    """

    def __init__(self):
        self.number, self.seen = 0, 0.0

    def __enter__(self):
        self.previous = {}
        for name in NAMES:
            number = getattr(signal, name, None)  # Windows lacks some
            if number is None or (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                continue  # nohup ignores SIGHUP: the run is to go on without its terminal
            self.previous[name] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for name, handler in self.previous.items():
            signal.signal(getattr(signal, name), handler)

    def _handle(self, number, _frame):
        if self.number and time.monotonic() - self.seen > 1:
            os._exit(128 + number)
        if not self.number:
            self.number, self.seen = number, time.monotonic()
            with contextlib.suppress(OSError):  # os.write, as print is not safe inside a handler
                name = signal.Signals(number).name
                os.write(2, f"\n{name}: finishing the step and saving (once more: out at once)\n".encode())
