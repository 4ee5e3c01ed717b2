"""The memory that training needs: an estimate before, advice after it ran out."""

import os
from typing import NamedTuple

import torch

from utils import distributed
from utils.device import autocast
from utils.errors import UserError, is_out_of_memory
from utils.terminal import plural

USABLE = 0.9  # fraction of a device's memory that training can fill: the rest goes to libraries and gaps
COPIES = 5  # of the weights: themselves, EMA, gradients, two moments (Muon's one needs as much: it computes more)
# What the activations take in a compiled network, relative to the same one uncompiled, without and
# with checkpointing: the allocator's peaks of the default network (PyTorch 2.14, bf16). Compiled,
# checkpointing saves a tenth alone, as the compiler recomputes by rules of its own.
COMPILED = {False: 0.53, True: 1.2}
MOMENTS = 2  # of these copies, that come with the first step
SETTINGS = "raise --accumulate, set --activation_checkpointing True, or lower --batch_size, --channel or --input_shape"


class MemoryNeeds(NamedTuple):
    """What training holds in memory at its peak, in bytes."""

    images: int  # that a process works on at a time
    fixed: int  # for any number of images: weights, EMA, gradients, moments
    per_image: float  # for each of them: activations

    @property
    def total(self) -> float:
        return self.fixed + self.images * self.per_image


def measure_needs(config, context) -> MemoryNeeds | None:
    """MemoryNeeds, before anything is compiled; None where no room is left to measure in.

    On CUDA from the peaks of the allocator in real passes of half of the images and of all, or as
    few as fit; else from what the forward passes of one and two images keep.
    """
    images = context.batch_size // (config.accumulate * distributed.world_size())
    weights = sum(p.numel() * p.element_size() for p in context.diffusion.model.parameters())
    few = max(images // 2, 1) if context.device.type == "cuda" else 1
    while few:
        try:
            less, more = (measure_pass(config, context, number) for number in (few, 2 * few))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            few = few // 4 or int(few > 1)
        else:
            per_image = (more - less) / few
            compiled = COMPILED[config.activation_checkpointing] if config.compile else 1
            on_cuda = less - few * per_image + MOMENTS * weights  # the weights are kept once for any number
            fixed = on_cuda if context.device.type == "cuda" else COPIES * weights
            return MemoryNeeds(images, round(fixed), per_image * compiled)
    return None


def print_memory(needs: MemoryNeeds | None, config, device: torch.device) -> None:
    """The estimate of what training holds at once, or a warning where that is not there."""
    if needs is None or 0 < device_memory(device) < needs.total:
        print(f"warning: memory will run out: {advise(needs, config, device)}")
    else:
        activations = f"{mebibytes(needs.images * needs.per_image)} for {plural(needs.images, 'image')} at a time"
        print(f"memory     {mebibytes(needs.fixed)} for weights, EMA, gradients and moments, {activations}")


def advise(needs: MemoryNeeds | None, config, device: torch.device) -> str:
    """What to lower where memory runs out, and how far where that was measured."""
    if needs is None:
        return SETTINGS
    there = device_memory(device)
    fitting = (there * USABLE - needs.fixed) / max(needs.per_image, 1)  # images of a micro-batch
    accumulate = accumulate_that_fits(fitting, needs.images * config.accumulate, config.accumulate)
    instead = f"--accumulate {accumulate} would fit. Else " if accumulate else ""
    need = f"training on {plural(needs.images, 'image')} at a time needs about {mebibytes(needs.total)}"
    has = f", {device} has {mebibytes(there)}" if there else ""
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
    """Bytes for this process: on CUDA what others left free; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def measure_pass(config, context, number: int) -> int:
    """Bytes of a pass of `number` images: its peak on CUDA, else what its forward part keeps."""
    kept = {}

    def count(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    if context.device.type != "cuda":
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            forward(config, context, number)
        return sum(kept.values())
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(context.device)
    with torch.backends.cudnn.flags(enabled=True):  # without its search for fast convolutions
        try_gradients(config, context, number)
    return torch.cuda.max_memory_reserved(context.device)


def try_gradients(config, context, number: int) -> None:
    """Forward and backward pass of `number` black images, of which nothing stays."""
    try:
        forward(config, context, number).backward()
    finally:  # half of a backward pass leaves gradients too
        context.optimizer.zero_grad()


def forward(config, context, number: int) -> torch.Tensor:
    """The loss of `number` black images."""
    x = torch.zeros(number, config.img_channels, *config.input_shape, device=context.device)
    t = torch.zeros(number, dtype=torch.long, device=context.device)
    with autocast(context.device, config.precision):  # without classes the network ignores y
        return context.diffusion(x.to(memory_format=context.layout), y=t, t=t, noise=x)
