"""The memory that training needs: an estimate before, advice after it ran out."""

import os

import torch

from utils import distributed
from utils.device import autocast
from utils.errors import UserError

USABLE = 0.9  # share of a device's memory that training can fill: the rest goes to libraries and gaps
# Of the weights, whatever the batch. Muon keeps one moment of most, and computes in about as much.
COPIES = {"weights and EMA": 2, "gradients": 1, "moments": 2}


def print_memory(config, parts):
    """An estimate of what training holds in memory at once, from the forward pass of one image."""
    size = micro_batch_size(config, parts)
    fixed, per_image = memory_needs(config, parts)
    mib = {name: copies * fixed / sum(COPIES.values()) / 2**20 for name, copies in COPIES.items()}
    mib["activations"] = per_image * size / 2**20
    print("memory     " + ", ".join(f"{value:,.0f} MiB {name}" for name, value in mib.items()))
    print(
        f"           {sum(mib.values()):,.0f} MiB in all for {size} pictures at a time; --accumulate N divides the "
        "activations by N"
    )


def advice_for_training(config, parts):
    """What to lower after memory ran out, and how far where that can be estimated."""
    size = micro_batch_size(config, parts)
    settings = (
        "raise --accumulate (the same update in smaller parts), set --activation_checkpointing True (slower), "
        "or lower --batch_size, --channel or --input_shape"
    )
    try:
        fixed, per_image = memory_needs(config, parts)
    except (RuntimeError, MemoryError):  # no room is left to try it in
        return f"{size} pictures at a time are too many; {settings}"
    there = device_memory(parts.device)
    fitting = (there * USABLE - fixed) / per_image  # images of a micro-batch
    accumulate = accumulate_that_fits(fitting, parts.batch_size, distributed.world_size(), config.accumulate)
    need = f"{size} pictures at a time need about {mebibytes(fixed + size * per_image)}"
    instead = f"--accumulate {accumulate} would fit. Else " if accumulate else ""
    return f"{need}, {parts.device} has {mebibytes(there)} in all; {instead}{settings}"


def check_network_fits(num_parameters, device):
    """ValueError where training needs more than the device's memory. No network is built."""
    needed, there = sum(COPIES.values()) * 4 * num_parameters, device_memory(device)
    if there and needed > there:
        raise UserError(
            f"a network of {num_parameters / 1e9:.2f} billion parameters needs {mebibytes(needed)} for "
            f"weights, gradients and moments; {device} has {mebibytes(there)}: lower --channel, "
            "--channel_mults or --num_res_blocks"
        )


def micro_batch_size(config, parts):
    """Images that one process works on at a time."""
    return parts.batch_size // (config.accumulate * distributed.world_size())


def accumulate_that_fits(images, batch_size, world_size, now):
    """The least `accumulate` above `now` with micro-batches of at most so many images, or None."""
    parts = range(now + 1, batch_size // world_size + 1)
    whole = (number for number in parts if batch_size % (world_size * number) == 0)
    return next((number for number in whole if batch_size // (world_size * number) <= images), None)


def device_memory(device):
    """Bytes that the device has in all."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def mebibytes(count):
    return f"{count / 2**20:,.0f} MiB"


def memory_needs(config, parts):
    """Bytes that training needs: (whatever the batch, for each image of a micro-batch).

    The second is what the backward pass of an image keeps, counted by running its forward pass.
    """
    weights = sum(p.numel() * p.element_size() for p in parts.diffusion.model.parameters())
    kept = {}

    def count(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    device, totals = parts.device, []
    for number in (1, 2):
        kept.clear()
        x = torch.zeros(number, config.img_channels, *config.input_shape, device=device)
        t = torch.zeros(number, dtype=torch.long, device=device)
        y = t if config.class_conditional else None
        with autocast(device, config.precision), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            parts.diffusion(x, y, t=t, noise=torch.zeros_like(x))
        totals.append(sum(kept.values()))
    # The weights are kept once for any number of images: the difference leaves them out.
    return sum(COPIES.values()) * weights, totals[1] - totals[0]
