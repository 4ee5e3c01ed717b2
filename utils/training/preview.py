"""The preview: 25 images that a run samples on the way, always from the same noise."""
from pathlib import Path

import torch

from utils.device import autocast
from utils.images import make_grid, save_png, to_uint8

COUNT, COLUMNS = 25, 5


def preview_labels(num_classes):
    """A class for each of the 25 images, all in turn; None for a network without classes."""
    return torch.arange(COUNT) % num_classes if num_classes else None


@torch.no_grad()
def sample_preview(config, parts):
    """A 5x5 grid (H, W, C) uint8, sampled with the EMA. It leaves training's randomness alone."""
    labels = preview_labels(len(parts.dataset.classes) if config.class_conditional else 0)
    with autocast(parts.device, config.precision):
        x = parts.diffusion.sample(
            COUNT, parts.device, y=None if labels is None else labels.to(parts.device),
            sampler=config.preview_sampler, steps=min(config.preview_steps, config.num_timesteps),
            seeds=list(range(config.seed, config.seed + COUNT)),
        )  # fmt: skip
    return make_grid(to_uint8(x), COLUMNS)


def save_preview(image, run, epoch):
    """Writes results/train_out/<run>/epoch_0010.png and returns its path."""
    path = Path("results/train_out") / run / f"epoch_{epoch:04d}.png"
    save_png(path, image)
    return path
