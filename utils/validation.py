"""A share of the pictures that is never trained on, and its loss."""
import torch

from utils import distributed
from utils.dataset import normalise
from utils.device import autocast
from utils.randomness import draw_step, mix


def split_validation(hashes, share):
    """(training rows, validation rows) as int64 tensors. A picture's side depends on its content alone, so it never
    changes: not when the list grows, not when files are renamed, and copies of a picture stay together.

    Args: hashes: a hex digest an image. share: of the images that are kept aside, 0 <= share < 1.
    Raises ValueError where a share was asked for and no picture falls on one of the sides.
    """
    aside = torch.tensor([int(digest[:8], 16) < share * 2**32 for digest in hashes], dtype=torch.bool)
    rows = torch.arange(len(hashes))
    if share and (aside.all() or not aside.any()):
        raise ValueError(f"val_split {share} of {len(hashes)} pictures leaves one side empty: choose another share, or 0")
    return rows[~aside], rows[aside]


@torch.no_grad()
def validation_loss(diffusion, dataset, rows, batch_size, config, device, layout):
    """Mean loss of the averaged weights over `rows`, with the same timesteps and noise every time.

    The timesteps of a batch are spread evenly over 0 ... T - 1. Processes share the pictures out and get the same answer.
    """
    generator = torch.Generator(device)
    total = torch.zeros(2, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    for number, chunk in enumerate(rows.split(batch_size)):
        mine = torch.arange(distributed.rank(), len(chunk), distributed.world_size())
        draws = draw_step(generator, mix(config.seed, "validation", number), (len(chunk), config.img_channels, *config.input_shape), 1)
        t = ((torch.arange(len(chunk)) + 0.5) / len(chunk) * config.num_timesteps).long()
        if len(mine):
            images, labels = dataset.__getitems__(chunk[mine].tolist())
            x, y = normalise(images, device, memory_format=layout), labels.to(device) if config.class_conditional else None
            with autocast(device, config.precision):
                losses = diffusion(x, y, t=t[mine].to(device), noise=draws.noise[mine], use_ema=True, reduction="none")
            total += torch.stack([losses.sum(), losses.new_tensor(len(mine))])
    loss, count = distributed.sum_over_ranks(total).tolist()
    return loss / count
