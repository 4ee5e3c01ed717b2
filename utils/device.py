"""Where and in which numbers a job runs: every "auto" is resolved here, once, and printed."""

import contextlib
import os
import re
import shutil
import sys
from pathlib import Path

import torch

from utils.errors import UserError, is_out_of_memory, one_line
from utils.terminal import plural

ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"}  # the user's settings of PyTorch's allocator
OTHER_BUILDS = "Other builds, also older ones: https://pytorch.org/get-started/locally/"
STEPS_WORTH_COMPILING = 5000  # network calls; compiling takes a minute or more
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name, local_rank=0, processes=1):
    """`find_device`, made the one that this process computes on. "auto": no GPU that fails."""
    if sys.platform == "linux" and torch.version.cuda and not ALLOCATOR & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # memory without gaps
    device = find_device(name, local_rank, processes)
    if device.type == "cuda":
        try:
            torch.cuda.set_device(device)
            torch.ones(1, device=device).add(1).item()  # a build without kernels for the card fails here
        except RuntimeError as error:
            cure = "" if is_out_of_memory(error) else f". {OTHER_BUILDS}"
            reason = f"{device} does not work here ({one_line(error, 120)}){cure}"
            if name != "auto" or processes > 1:
                raise UserError(reason) from None
            print(reason)
            return torch.device("cpu")
        torch.backends.cudnn.benchmark = True  # shapes never change, so the search for fast convolutions pays
    elif name == "auto" and device.type == "cpu" and (reason := missing_cuda()):
        print(reason)
    return device


def missing_cuda():
    """A line, where PyTorch does not see the NVIDIA GPU of this machine; else ""."""
    if torch.cuda.is_available() or "CUDA_VISIBLE_DEVICES" in os.environ or not shutil.which("nvidia-smi"):
        return ""
    version = torch.version.cuda
    why = f"needs a newer driver for its CUDA {version}" if version else "was built without CUDA"
    return f"the NVIDIA GPU of this machine is not used: this PyTorch {why}. {OTHER_BUILDS}"


def find_device(name, local_rank=0, processes=1):
    """The torch.device of a name; "auto": CUDA (the local rank's GPU), Apple's MPS, or the CPU."""
    mps = processes == 1 and torch.backends.mps.is_available()
    here = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    if name == "auto":
        name = next(kind for kind in here if here[kind])
    if not re.fullmatch(r"(cuda|mps|cpu)(:(0|[1-9][0-9]{0,2}))?", name):
        raise UserError(f"device {name!r} is unknown: choose auto, cuda, cuda:1, mps or cpu")
    device = torch.device(name)
    if processes > 1 and (device.type == "mps" or device.index is not None):
        raise UserError(f"device {name!r} is for one process: with torchrun choose cuda (a GPU each) or cpu")
    if not here[device.type]:
        reason = missing_cuda() if device.type == "cuda" else ""
        raise UserError(reason or f"device {name!r}: PyTorch finds no such GPU here; --device auto takes what there is")
    if device.type == "cuda":
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise UserError(f"device {device}: there are {torch.cuda.device_count()} GPUs, and one process needs one")
    return device


def choose_precision(name, device):
    """A name from DTYPES. "auto": bf16 where the processor multiplies in it, fp16 on old GPUs."""
    if device.type == "cuda":
        best = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    else:
        best = "bf16" if device.type == "cpu" and cpu_has_bf16() else "fp32"
    if device.type == "cpu" and name == "fp16":
        raise UserError("precision 'fp16' is for GPUs: on the CPU choose 'fp32' or 'bf16'")
    if name == "bf16" != best and device.type != "mps":
        slow = "GPU emulates bf16, ten times" if device.type == "cuda" else "processor emulates bf16, several times"
        print(f"this {slow} slower than {best}: --precision {best}")
    return best if name == "auto" else name


def cpu_has_bf16():
    """Whether this processor multiplies in bf16. Others emulate it, slower than fp32."""
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
        return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)  # the last one: ARM
    return False


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
    """The peak memory of this process in MiB: the GPU's on CUDA, else its own; 0 on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError, TypeError):
        return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(errors="replace"))[1]) / 2**10
    with contextlib.suppress(ImportError):  # macOS, and sandboxes that leave that line out
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return 0.0


def describe_device(device):
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{device} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)"
    return f"{device} ({plural(torch.get_num_threads(), 'thread')})" if device.type == "cpu" else str(device)


def choose_compile(setting, device, steps):
    """Whether to compile a network for so many steps: "auto" does on CUDA, where it pays."""
    if not (device.type == "cuda" and steps >= STEPS_WORTH_COMPILING if setting == "auto" else setting):
        return False
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever a compiler may throw
        print(f"not compiled, as no compiler works here ({one_line(error, 120)})")
        return False
    print("the first step compiles the network: a minute or more")
    return True


class AsyncHostCopy:
    """The newest value of a device tensor on the host. It never waits for the device."""

    def __init__(self, device):
        self.device, self.value, self.coming, self.arrived = device, None, None, None

    def push(self, tensor):
        if self.device.type != "cuda":
            self.value = tensor
        elif self.arrived is None or self.arrived.query():
            self.value, self.coming = self.coming, tensor.to("cpu", non_blocking=True)  # PyTorch pins its memory
            self.arrived = torch.cuda.current_stream().record_event()
