"""The preview: 25 images that a run samples on the way, always from the same noise."""

import numpy as np
import torch

from utils.device import autocast
from utils.images import make_grid, to_uint8

COUNT, COLUMNS = 25, 5


def sample_preview(config, context) -> np.ndarray:
    """A 5x5 grid (H, W, C) uint8 by the EMA, all classes in turn. Training's randomness stays."""
    y = torch.arange(COUNT) % len(context.dataset.classes) if config.class_conditional else None
    steps, seeds = min(config.preview_steps, config.num_timesteps), list(range(config.seed, config.seed + COUNT))
    with autocast(context.device, config.precision):
        x = context.diffusion.sample(COUNT, context.device, y, sampler=config.preview_sampler, steps=steps, seeds=seeds)
    return make_grid(to_uint8(x), COLUMNS)
