"""Signals that ask a run to stop: the step in hand is finished and saved first."""

import os
import signal
import time

NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")  # SIGUSR1: batch schedulers send it ahead of the end


class StopSignal:
    """`number` is 0, or the signal that asked for a stop. A second signal ends the process at once.

    torchrun passes a signal on to processes that the terminal may have sent it to already, so one that follows within
    a second is the same one.
    """

    def __init__(self):
        self.number, self.seen = 0, 0.0

    def __enter__(self):
        self.previous = {}
        for name in NAMES:
            if hasattr(signal, name):  # Windows has no SIGUSR1
                self.previous[name] = signal.signal(getattr(signal, name), self._handle)
        return self

    def __exit__(self, *_):
        for name, handler in self.previous.items():
            signal.signal(getattr(signal, name), handler)

    def _handle(self, number, _frame):
        if self.number and time.monotonic() - self.seen > 1:
            os._exit(128 + number)
        if not self.number:
            self.number, self.seen = number, time.monotonic()
            # os.write: print is not safe inside a handler.
            os.write(2, f"\n{signal.Signals(number).name}: finishing the step and saving (once more: out at once)\n".encode())
