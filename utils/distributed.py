"""The same code with and without torchrun: every function here works with a single process."""

import atexit
import ctypes
import gc
import inspect
import os
import signal
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from utils.errors import UserError

# The others wait while rank 0 samples previews and saves. torchrun notices a dead rank at once.
TIMEOUT = timedelta(hours=6)
GRACE = 50  # seconds from SIGTERM to the end of a process that waits for others
TORCHRUN = {"WORLD_SIZE": "1", "RANK": "", "LOCAL_RANK": "0", "MASTER_ADDR": "", "MASTER_PORT": ""}  # its variables
OTHER_LAUNCHERS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # their numbers of processes


def start(settings=None):
    """Joins the process group of torchrun, in which rank 0 alone prints from now on.

    NCCL carries CUDA tensors, gloo all others. settings: a dict, the same on all processes.
    UserError: it is not, or torchrun's variables are not whole.
    """
    if launched_processes() > 1 and not dist.is_initialized():
        if sys.platform == "linux":  # SIGTERM when torchrun is killed: else processes would go on beside the next run
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG of <sys/prctl.h>
        if os.name == "posix" and threading.current_thread() is threading.main_thread():
            end_after_sigterm()
        if int(os.environ["RANK"]):
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (rank 0 speaks for all; errors go to stderr)
        nccl = torch.cuda.is_available() and dist.is_nccl_available()  # on Windows gloo carries them, over the host
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=TIMEOUT)
        check_equal(settings or {})


def launched_processes():
    """How many processes torchrun started, from its variables; 1 without it."""
    found = {name: os.environ.get(name) or default for name, default in TORCHRUN.items()}
    if found["WORLD_SIZE"] == "1":
        others = {name: os.environ.get(name) or "1" for name in OTHER_LAUNCHERS if "WORLD_SIZE" not in os.environ}
        if name := next((name for name, count in others.items() if count != "1"), None):
            print(f"warning: {name} is {others[name]}, but this process works alone: only torchrun shares the work")
        return 1
    numbers = [value for name, value in found.items() if name != "MASTER_ADDR"]
    sound = found["MASTER_ADDR"] and all(map(str.isdecimal, numbers)) and int(found["MASTER_PORT"]) < 2**16
    if not sound or int(found["RANK"]) >= int(found["WORLD_SIZE"]):
        said = ", ".join(f"{name}={value}" for name, value in found.items())
        raise UserError(f"{said}: start with torchrun, which sets these variables, or unset WORLD_SIZE")
    return int(found["WORLD_SIZE"])


def check_equal(values):
    """UserError on rank 0 unless a dict of plain values is the same on all processes, which end."""
    first, *others = gather(values)
    for rank, other in enumerate(others, 1):
        if name := next((name for name in first if first[name] != other.get(name)), None):
            if not is_main():
                raise SystemExit(1)
            differ = f"{name} is {first[name]!r} in process 0 and {other.get(name)!r} in process {rank}"
            raise UserError(f"{differ}: give all processes the same settings and images")


def end_after_sigterm():
    """Lets SIGTERM end this process within a minute, also where it waits for another one.

    A handler in Python runs between two instructions, and a collective is one of them. The run
    has the time to save; torchrun itself waits half as long.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)  # hears of signals at once

    def watch():
        while os.read(reading, 1)[0] != signal.SIGTERM:
            pass
        time.sleep(GRACE)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()
        atexit.register(gc.collect)  # its threads end with the last reference, see `wrap`


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank():
    """The number of this process on its own machine: it picks the GPU, and who builds the cache."""
    return int(os.environ.get("LOCAL_RANK") or 0) if dist.is_initialized() else 0


def is_main():
    return rank() == 0


def barrier():
    sum_over_ranks(torch.zeros(1))  # over the CPU: NCCL's own barrier would want to know the GPU


@contextmanager
def one_per_machine_first():
    """Runs the block in one process of each machine, then in the others: they find its files."""
    if local_rank() != 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()


def sum_over_ranks(tensor):
    """The sum over all processes, on each of them. tensor: any shape, changed in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(value):
    """The values of all processes in the order of ranks, on each of them. value: picklable."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(value=None):
    """Rank 0's value, on every process."""
    return gather(value)[0]


def wrap(module):
    """The module with gradients averaged over all processes. Buffers never differ: none is sent."""
    if not dist.is_initialized():
        return module
    # 1x1 kernels have two equal layouts: a gradient in the other one is a small copy, no warning.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    known = inspect.signature(DistributedDataParallel).parameters  # newer versions renamed the option
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    # DDP never lets go of its group, and threads of the main one would abort a process that ends.
    # The gradients are views of what is sent: no second copy of them.
    options = {option: False, "gradient_as_bucket_view": True}
    return DistributedDataParallel(module, process_group=dist.new_group(timeout=TIMEOUT), **options)


class LaggedMax:
    """The maximum over all processes of whole numbers, two steps late, so that none waits."""

    def __init__(self):
        self.pending = []

    def largest(self, *numbers):
        if not dist.is_initialized():
            return list(numbers)
        tensor = torch.tensor(numbers)
        self.pending.append((dist.all_reduce(tensor, dist.ReduceOp.MAX, async_op=True), tensor))
        if len(self.pending) <= 2:
            return [0] * len(numbers)
        work, tensor = self.pending.pop(0)
        work.wait()
        return tensor.tolist()
