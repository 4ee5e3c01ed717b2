"""A function over many items: in threads, in order, with a progress bar and bounded memory."""

import contextlib
import os
import threading
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from tqdm import tqdm

from utils.errors import UserError

CHUNK = 16  # items a task: a future costs about 40 us, decoding a small image 150 us


class Budget:
    """A number of bytes that threads share: a large job waits until the others have left enough."""

    def __init__(self, size):
        self.size, self.taken, self.changed = size, 0, threading.Condition()

    @contextlib.contextmanager
    def take(self, amount):
        """Hold `amount` bytes within the block, at most the whole budget."""
        amount = min(amount, self.size)
        with self.changed:
            self.changed.wait_for(lambda: self.taken + amount <= self.size)
            self.taken += amount
        try:
            yield
        finally:
            with self.changed:
                self.taken -= amount
                self.changed.notify_all()


def map_in_threads(function, items, num_workers=0, description=None):
    """Yield `function(item)` for each item of the list, in order, with a progress bar.

    num_workers: threads; 0: one for each core that this process may use. They help where the work
    releases the interpreter (Pillow's decoders, hashing, reading). What it raises is raised here.
    """
    if num_workers < 0:
        raise UserError(f"num_workers {num_workers}: use 0 for all cores, or a positive number")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = num_workers or cores
    executor, starts = ThreadPoolExecutor(workers), range(0, len(items), CHUNK)
    tasks = (executor.submit(list, map(function, items[start : start + CHUNK])) for start in starts)
    try:
        with warnings.catch_warnings(), tqdm(total=len(items), desc=description, unit="img") as progress:
            warnings.filterwarnings("ignore", module="PIL")  # users need no warning of odd metadata
            waiting = deque(islice(tasks, 4 * workers))  # not all items at once
            while waiting:
                results = waiting.popleft().result()
                waiting.extend(islice(tasks, 1))
                progress.update(len(results))
                yield from results
    finally:
        executor.shutdown(cancel_futures=True)
