"""The loss of images that are never trained on."""

import numpy as np
import torch

from utils import distributed
from utils.data.dataset import conditioned
from utils.device import autocast
from utils.training.step_rng import derive_seed, sample_step_noise

GOLDEN_RATIO = (5**0.5 - 1) / 2  # its multiples, modulo 1, are even over every stretch of whole numbers


@torch.no_grad()
def validation_loss(config, context) -> float:
    """The EMA's mean loss over `context.validation`, always at the same timesteps and noise."""
    device, images, generator = context.device, context.validation, torch.Generator(context.device)
    total = torch.zeros(2, dtype=context.meter.dtype, device=device)
    mine = slice(distributed.rank(), None, distributed.world_size())  # of a batch's images: every n-th
    for number, first in enumerate(range(0, len(images), context.batch_size)):
        size = min(context.batch_size, len(images) - first)
        shape = (size, config.img_channels, *config.input_shape)
        seed = derive_seed(config.seed, "validation", number)
        noise = sample_step_noise(generator, seed, shape, context.diffusion.sample_timesteps).noise
        # Evenly over 0 ... T - 1 within each class too: an annotation file is sorted by class.
        place = (torch.arange(first, first + size, dtype=torch.float64) * GOLDEN_RATIO + 0.5) % 1
        t = (place * config.num_timesteps).long()
        numbers = np.arange(first, first + size)[mine]
        if len(numbers):
            x, cond = conditioned(context.diffusion, images, numbers, context.layout)
            y, t = images.labels[numbers].to(device) if config.class_conditional else None, t[mine].to(device)
            with autocast(device, config.precision):
                losses = context.diffusion(x, y, t=t, noise=noise[mine], cond=cond, use_ema=True, reduction="none")
            total += torch.stack([losses.sum(), losses.new_tensor(len(x))])
    loss, count = distributed.sum_over_ranks(total).tolist()
    return loss / count
