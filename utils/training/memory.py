"""The memory that training needs: an estimate before, advice after it ran out."""

import os

import torch

from utils import distributed
from utils.device import autocast
from utils.errors import UserError
from utils.terminal import plural

USABLE = 0.9  # fraction of a device's memory that training can fill: the rest goes to libraries and gaps
COPIES = 5  # of the weights: themselves, EMA, gradients, two moments (Muon's one needs as much: it computes more)
SETTINGS = "raise --accumulate, set --activation_checkpointing True, or lower --batch_size, --channel or --input_shape"


def print_memory(config, context) -> None:
    """An estimate of what training holds in memory at once, from the forward pass of one image."""
    size, fixed, per_image = memory_needs(config, context)
    activations = f"{mebibytes(per_image * size)} for activations of {plural(size, 'image')} at a time"
    print(f"memory     {mebibytes(fixed)} for weights, EMA, gradients and moments, {activations} (--accumulate N: 1/N)")


def advice_for_training(config, context) -> str:
    """What to lower after memory ran out, and how far where that can be estimated."""
    try:
        size, fixed, per_image = memory_needs(config, context)
    except (RuntimeError, MemoryError):  # no room is left to try it in
        return SETTINGS
    there = device_memory(context.device)
    fitting = (there * USABLE - fixed) / per_image  # images of a micro-batch
    accumulate = accumulate_that_fits(fitting, size * config.accumulate, config.accumulate)
    instead = f"--accumulate {accumulate} would fit. Else " if accumulate else ""
    need = f"training on {plural(size, 'image')} at a time needs about {mebibytes(fixed + size * per_image)}"
    has = f", {context.device} has {mebibytes(there)} in all" if there else ""
    return f"{need}{has}; {instead}{SETTINGS}"


def check_network_fits(num_parameters: int, device: torch.device) -> None:
    """UserError where training needs more than the device's memory. No network is built."""
    needed, there = COPIES * 4 * num_parameters, device_memory(device)
    if there and needed > there:
        size = f"a network of {num_parameters / 1e9:.2f} billion parameters needs {mebibytes(needed)}"
        raise UserError(
            f"{size}, {device} has {mebibytes(there)}: lower --channel, --channel_mults or --num_res_blocks"
        )


def accumulate_that_fits(images: float, share: int, now: int) -> int | None:
    """The least `accumulate` above `now` that cuts `share` images into parts that fit."""
    return next((n for n in range(now + 1, share + 1) if share % n == 0 and share // n <= images), None)


def mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


def device_memory(device: torch.device) -> int:
    """Bytes that the device has in all; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def memory_needs(config, context) -> tuple[int, int, int]:
    """(images that a process works on at a time, bytes for any number of them, bytes for each)."""
    size = context.batch_size // (config.accumulate * distributed.world_size())
    weights = sum(p.numel() * p.element_size() for p in context.diffusion.model.parameters())
    one, two = (bytes_kept(config, context, number) for number in (1, 2))
    return size, COPIES * weights, two - one  # the weights are kept once for any number of images


def bytes_kept(config, context, number):
    """What the forward pass of `number` images keeps for the backward pass."""
    kept = {}

    def count(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.zeros(number, config.img_channels, *config.input_shape, device=context.device)
    t = torch.zeros(number, dtype=torch.long, device=context.device)
    keeping = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
    with autocast(context.device, config.precision), keeping:
        context.diffusion(x, t if config.class_conditional else None, t=t, noise=torch.zeros_like(x))
    return sum(kept.values())
