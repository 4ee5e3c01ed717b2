"""The loss of images that are never trained on."""

import numpy as np
import torch

from utils import distributed
from utils.data.dataset import normalize
from utils.device import autocast
from utils.training.step_rng import derive_seed, sample_step_noise

GOLDEN_RATIO = (5**0.5 - 1) / 2  # its multiples, modulo 1, are even over every stretch of whole numbers


@torch.no_grad()
def validation_loss(config, context) -> float:
    """The EMA's mean loss over `context.validation`, always at the same timesteps and noise."""
    device, images, generator = context.device, context.validation, torch.Generator(context.device)
    condition, total = context.diffusion.condition, torch.zeros(2, dtype=context.meter.dtype, device=device)
    mine = slice(distributed.rank(), None, distributed.world_size())  # of a batch's images: every n-th
    for number, first in enumerate(range(0, len(images), context.batch_size)):
        size = min(context.batch_size, len(images) - first)
        shape = (size, config.img_channels, *config.input_shape)
        seed, count = derive_seed(config.seed, "validation", number), condition.count_numbers(*shape[1:])
        step_noise = sample_step_noise(generator, seed, shape, context.diffusion.sample_timesteps, count=count)
        # Evenly over 0 ... T - 1 within each class too: an annotation file is sorted by class.
        place = (torch.arange(first, first + size, dtype=torch.float64) * GOLDEN_RATIO + 0.5) % 1
        t = (place * config.num_timesteps).long()
        pixels, labels = images.batch(np.arange(first, first + size)[mine])
        if len(pixels):
            x = normalize(pixels, device, memory_format=context.layout)
            x, cond = condition(x, step_noise.condition[mine])
            y, t = labels.to(device) if config.class_conditional else None, t[mine].to(device)
            with autocast(device, config.precision):
                given = {"t": t, "noise": step_noise.noise[mine], "cond": cond}
                losses = context.diffusion(x, y, **given, use_ema=True, reduction="none")
            total += torch.stack([losses.sum(), losses.new_tensor(len(x))])
    loss, count = distributed.sum_over_ranks(total).tolist()
    return loss / count
