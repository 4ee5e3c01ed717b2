"""What a run draws on the way, always from the same noise, so that the pictures of its epochs can be compared."""

from pathlib import Path

import torch

from utils.device import autocast
from utils.images import make_grid, save_png, to_uint8

COUNT, COLUMNS = 25, 5


def preview_labels(num_classes):
    """A class for each of the 25 pictures: all classes in turn. None for a network without classes."""
    return torch.arange(COUNT) % num_classes if num_classes else None


@torch.no_grad()
def draw_preview(diffusion, config, num_classes, device):
    """A 5x5 grid, (H, W, C) uint8, drawn by the averaged weights. Training's randomness is not touched."""
    labels = preview_labels(num_classes if config.class_conditional else 0)
    with autocast(device, config.precision):
        x = diffusion.sample(
            COUNT, device, y=None if labels is None else labels.to(device), sampler=config.preview_sampler,
            steps=min(config.preview_steps, config.num_timesteps), seeds=[config.seed + number for number in range(COUNT)],
        )  # fmt: skip
    return make_grid(to_uint8(x), COLUMNS)


def save_preview(picture, run, epoch):
    """Write results/train_out/<run>/epoch_0010.png and return its path."""
    path = Path("results/train_out") / run / f"epoch_{epoch:04d}.png"
    save_png(path, picture)
    return path
