"""Memory that runs out: one line that names the settings to lower and what would fit."""
import contextlib
import os
import traceback

import torch

from utils import distributed
from utils.config import NO_MEMORY
from utils.summary import memory_needs

USABLE = 0.9  # share of a device's memory that pictures can fill: the rest goes to libraries and gaps


def is_out_of_memory(error):
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY))


@contextlib.contextmanager
def explain_out_of_memory(advice):
    """Turns running out of memory within into a ValueError for the user; advice() says what to lower, with the memory freed again."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the step that failed
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise ValueError(f"out of memory: {advice()}") from None


def advice_for_training(config, parts):
    """What to lower, and how far where that can be estimated."""
    part = parts.batch_size // (distributed.world_size() * config.accumulate)
    settings = "raise --accumulate (the same update in smaller parts), set --activation_checkpointing True (slower), or lower " \
               "--batch_size, --channel or --input_shape"
    try:
        fixed, per_picture = memory_needs(config, parts)
    except (RuntimeError, MemoryError):  # there is no room left to try it in
        return f"{part} pictures at a time are too many; {settings}"
    there = device_memory(parts.device)
    need = f"{part} pictures at a time need about {mebibytes(fixed + part * per_picture)}, {parts.device} has {mebibytes(there)} in all"
    fitting = accumulate_that_fits((there * USABLE - fixed) / per_picture, parts.batch_size, distributed.world_size(), config.accumulate)
    return f"{need}; {f'--accumulate {fitting} would fit. Else ' if fitting else ''}{settings}"


def accumulate_that_fits(pictures, batch_size, world_size, now):
    """The least number of parts above `now` that leaves at most so many pictures a part; None where not even one picture fits."""
    for parts in range(now + 1, batch_size // world_size + 1):
        if batch_size % (world_size * parts) == 0 and batch_size // (world_size * parts) <= pictures:
            return parts
    return None


def advice_for_drawing(config):
    """Drawing keeps nothing between the network's calls: what is needed falls with the pictures drawn at once."""
    if config.batch_size == 1:
        return "one picture at a time is too much: lower --input_shape, or draw with a smaller network"
    return f"{config.batch_size} pictures at a time are too many; --batch_size {config.batch_size // 2} needs about half"


def device_memory(device):
    """Bytes that the device has in all."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def mebibytes(count):
    return f"{count / 2**20:,.0f} MiB"
