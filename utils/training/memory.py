"""Memory that runs out: one line that names the settings to lower and what would fit."""

import os

import torch

from utils import distributed
from utils.device import autocast

USABLE = 0.9  # share of a device's memory that pictures can fill: the rest goes to libraries and gaps


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


def device_memory(device):
    """Bytes that the device has in all."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def mebibytes(count):
    return f"{count / 2**20:,.0f} MiB"


def print_memory(config, parts):
    """An estimate of what training holds in memory at once, from one image's forward pass."""
    size = parts.batch_size // (config.accumulate * distributed.world_size())
    fixed, per_picture = memory_needs(config, parts)
    # Of the five copies two are the weights and their average, one the gradients, two the moments.
    mib = [value / 2**20 for value in (fixed * 2 / 5, fixed / 5, fixed * 2 / 5, per_picture * size)]
    names = ("weights and average", "gradients", "moments", "activations")
    print("memory     " + ", ".join(f"{value:,.0f} MiB {name}" for value, name in zip(mib, names)))
    print(f"           {sum(mib):,.0f} MiB in all for {size} pictures at a time; --accumulate N divides the activations by N")


def memory_needs(config, parts):
    """Bytes that training needs: (whatever the batch, for each picture of it)."""
    weights = sum(p.numel() * p.element_size() for p in parts.diffusion.model.parameters())
    return 5 * weights, activation_bytes(config, parts)


def activation_bytes(config, parts):
    """Bytes that the backward pass of one image keeps, counted by running its forward pass."""
    kept = {}

    def count(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    diffusion, device = parts.diffusion, parts.device
    images = [torch.zeros(number, config.img_channels, *config.input_shape, device=device) for number in (1, 2)]
    totals = []
    for x in images:
        kept.clear()
        y = torch.zeros(len(x), dtype=torch.long, device=device) if config.class_conditional else None
        t = torch.zeros(len(x), dtype=torch.long, device=device)
        with autocast(device, config.precision), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = diffusion(x, y, t=t, noise=torch.zeros_like(x))
        totals.append(sum(kept.values()))
        del loss
    # Weights are among what is kept, once for any number of images: the difference of two sizes leaves them out.
    return totals[1] - totals[0]
