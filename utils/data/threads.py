"""A function over many items: in threads, in order, with a progress bar and bounded memory."""

import contextlib
import os
import threading
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from tqdm import tqdm

CHUNK = 16  # items a task: a future costs about 40 us, decoding a small image 150 us
LARGE = 2**27  # bytes
LARGE_JOB = threading.RLock()


def one_if_large(size):
    """A context for a job that takes `size` bytes: of large ones, one runs at a time."""
    return LARGE_JOB if size > LARGE else contextlib.nullcontext()


def map_in_threads(function, items, num_workers=0, description=None):
    """Yield `function(item)` for each item of the list, in order, with a progress bar.

    num_workers: threads; 0: one for each core. What `function` raises is raised here.
    """
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
