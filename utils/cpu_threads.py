"""How many threads PyTorch computes with on a CPU: the number asked for, or the fastest one.

The threads of a layer wait for each other. On cores that other programs use too, and in containers
that may use fewer cores than there are, several can be ten times slower than one.
"""

import os
import statistics
import time

import torch
from tqdm import tqdm

from utils import distributed
from utils.settings import whole
from utils.terminal import plural

NUM_THREADS = whole(1, 1024, "auto")  # the setting of all scripts
MOST = torch.get_num_threads()  # PyTorch's own number, before anything changes it
VARIABLES = {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}  # with which users set it. torchrun sets the first
HOPELESS = 2  # times the time of one thread: still more threads take even longer
NEARLY = 1.03  # times the least time: of these the fewest threads are taken
WINDOW = 15  # seconds of steps whose mean speed counts
CHANGED = 0.6  # ratio of two speeds


def set_threads(asked, device, step, images, seconds=1.5, kept=None) -> int:
    """Sets the number of threads that is `asked` for, and returns it.

    "auto": `kept`, or the result of `fastest_threads`, unless `is_measured` says no. kept: the
    number of a resumed run, whose results depend on it in their last bits. step: None for none.
    """
    if asked != "auto":
        torch.set_num_threads(asked)
    elif is_measured(asked, device) and kept and kept <= MOST:
        torch.set_num_threads(kept)
    elif is_measured(asked, device) and step:
        fastest_threads(step, images, seconds)
    number = min(torch.get_num_threads(), NUM_THREADS.highest)  # what every reader of the checkpoint accepts
    if kept:
        before = "as before" if number == kept else f"before {kept}: the last bits of its results change"
        print(f"the run computes with {plural(number, 'thread')}, {before}")
    return number


def is_measured(asked, device) -> bool:
    """Whether timing decides: on a CPU, where nobody set the number and no other process shares."""
    alone = distributed.world_size() == 1 and not VARIABLES & os.environ.keys()
    return asked == "auto" and device.type == "cpu" and alone and MOST > 1


def fastest_threads(step, images: int, seconds: float) -> int:
    """Sets the number out of 1, 2, 4, ... with which `step(count)` is fastest per image.

    step computes with `count` images, at most `images`; torch's random numbers stay as they were.
    It takes about so many seconds, longer if a step of one image does.
    """
    before, end, times = torch.get_num_threads(), time.perf_counter() + seconds, {}

    def timed(number, count):
        torch.set_num_threads(number)
        began = time.perf_counter()
        step(count)
        return (time.perf_counter() - began) / count

    with torch.random.fork_rng(devices=()):
        for number in sorted({*(2**power for power in range(MOST.bit_length())), MOST}):
            timed(number, 1)  # what a new number of threads needs is made now
            times[number] = [timed(number, 1)]  # a hopeless number would take minutes with more images
            if times[number][0] > HOPELESS * times[1][0]:
                break
        close = [number for number in times if times[number][0] <= HOPELESS * times[1][0]]
        few = max(1, int(seconds / 20 / times[1][0]))
        while time.perf_counter() < end:
            for number in close:  # in turn: what else the machine does meets all of them
                times[number].append(timed(number, min(few * number, images)))
    medians = {number: statistics.median(times[number][1:] or times[number]) for number in times}
    best = next(number for number in times if medians[number] <= NEARLY * min(medians.values()))
    torch.set_num_threads(best)
    if best != before:
        each = ", ".join(f"{1000 * medians[number]:.3g} with {number}" for number in medians)
        tqdm.write(f"num_threads {best} is fastest now: milliseconds per image and step are {each}")
    return best


class SpeedWatch:
    """Compares the speed of a loop with what it was."""

    def __init__(self):
        self.usual, self.steps, self.seconds = None, 0, 0.0

    def changed(self, seconds: float) -> bool:
        """After a step of so many seconds: are the last WINDOW far slower or faster than the first?

        After a True the comparison begins again.
        """
        self.steps, self.seconds = self.steps + 1, self.seconds + seconds
        if self.seconds < WINDOW:
            return False
        speed, self.steps, self.seconds = self.steps / self.seconds, 0, 0.0
        changed = self.usual is not None and not CHANGED <= speed / self.usual <= 1 / CHANGED
        self.usual = None if changed else self.usual or speed
        return changed
