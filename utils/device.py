"""Where and in which numbers a job runs: every "auto" is resolved here, once, and printed."""

import contextlib
import platform
import re
from pathlib import Path

import torch

from utils.errors import UserError, one_line

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name, local_rank=0, processes=1):
    """torch.device for a name, or for "auto": CUDA, else Apple's MPS, else the CPU.

    Each of several processes takes the GPU of its local rank. MPS has no reductions over processes.
    ValueError for a device that is not here.
    """
    if name == "auto":
        mps = is_available("mps") and processes == 1
        name = "cuda" if is_available("cuda") else "mps" if mps else "cpu"
    if processes > 1 and (name.startswith("mps") or ":" in name):
        raise UserError(f"device {name!r} is for one process: with torchrun choose cuda (a GPU each) or cpu")
    if not re.fullmatch(r"(cuda|mps|cpu)(:(0|[1-9][0-9]{0,2}))?", name):
        raise UserError(f"device {name!r} is unknown: choose auto, cuda, cuda:1, mps or cpu")
    device = torch.device(name)
    if not is_available(name):
        gpu = "CUDA" if device.type == "cuda" else "Apple"
        raise UserError(f"device {name!r}: PyTorch finds no {gpu} GPU here; --device auto takes what there is")
    if device.type == "cuda":
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise UserError(f"device {device}: there are {torch.cuda.device_count()} GPUs, and one process needs one")
        torch.cuda.set_device(device)
        # Shapes never change within a run, so the search for the fastest convolution pays.
        torch.backends.cudnn.benchmark = True
    return device


def choose_precision(name, device):
    """A name from DTYPES. "auto": bf16 where the processor multiplies in it, fp16 on old GPUs."""
    if name != "auto":
        if name not in DTYPES:
            raise UserError(f"precision {name!r} is unknown: choose auto, {', '.join(DTYPES)}")
        if name == "fp16" and device.type == "cpu":
            raise UserError("precision 'fp16' is for GPUs: on the CPU choose 'fp32' or 'bf16'")
        if name == "bf16" and device.type == "cpu" and not cpu_has_bf16():
            print("this processor emulates bf16, several times slower than fp32: --precision fp32")
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return "bf16" if device.type == "cpu" and cpu_has_bf16() else "fp32"


def cpu_has_bf16():
    """Whether this processor multiplies in bf16. Others emulate it, slower than fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    words = {"bf16"} if platform.machine() in ("aarch64", "arm64") else {"avx512_bf16", "amx_bf16"}
    return not words.isdisjoint(flags.split())


def autocast(device, precision):
    """The context in which the network runs; with fp32 one that does nothing."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def round_weights(network, precision):
    """Rounds the weights once, as autocast does at every call. For a network that only samples."""
    if precision != "fp32":
        for module in network.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                module.to(DTYPES[precision])


def memory_format(device, precision):
    """channels_last where convolutions are faster in it: half precision on CUDA, oneDNN on CPUs."""
    faster = {"cuda": precision != "fp32", "cpu": torch.backends.mkldnn.is_available()}
    return torch.channels_last if faster.get(device.type) else torch.contiguous_format


def peak_memory(device):
    """The peak memory of this process so far in MiB: the GPU's on CUDA, else its own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError):  # Linux: getrusage would count what the parent held when it started this process
        if found := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(errors="replace")):
            return int(found[1]) / 2**10
    try:  # also where a sandbox leaves that line out
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if platform.system() == "Darwin" else peak / 2**10


def describe_device(device):
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{device} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)"
    threads = torch.get_num_threads()
    return f"{device} ({threads} thread{'s' * (threads > 1)})" if device.type == "cpu" else str(device)


def is_available(name):
    """Whether a device of this name ("cuda", "mps", "cpu") is here."""
    kind = name.split(":")[0]
    if kind == "cuda":
        return torch.cuda.is_available()
    return kind == "cpu" or (kind == "mps" and torch.backends.mps.is_available())


def is_here(name, processes):
    """Whether a run on this device ("auto", "cuda", "cuda:1", ...) can go on here."""
    kind, _, index = name.partition(":")
    counted = torch.cuda.device_count() if kind == "cuda" else 1
    return name == "auto" or (
        is_available(kind) and (not index or (processes == 1 and index.isdigit() and int(index) < counted))
    )


def choose_compile(setting, device):
    """Whether to compile the network. "auto" does on CUDA, where it pays within an epoch.

    Without a working compiler it says so in a line and returns False.
    """
    if setting == "auto":
        setting = device.type == "cuda"
    if setting:
        try:
            torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
        except Exception as error:  # whatever a compiler may throw
            print(f"not compiled, as no compiler works here ({one_line(error, 120)})")
            return False
    return bool(setting)


class AsyncHostCopy:
    """The newest value of a device tensor on the host. It never waits for the device."""

    def __init__(self, device):
        self.value, self.device, self.arrived = None, device, None

    def push(self, tensor):
        if self.device.type != "cuda":
            self.value = tensor
        elif self.arrived is None or self.arrived.query():
            if self.arrived is not None:
                self.value = self.landing.clone()
            else:
                self.landing = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                self.arrived = torch.cuda.Event()
            self.landing.copy_(tensor, non_blocking=True)
            self.arrived.record()
