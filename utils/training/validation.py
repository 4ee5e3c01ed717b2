"""A share of the pictures that is never trained on, and its loss."""

import torch

from utils import distributed
from utils.data.dataset import normalise
from utils.device import autocast
from utils.training.randomness import draw_step, mix


@torch.no_grad()
def validation_loss(diffusion, dataset, batch_size, config, device, layout):
    """Mean loss of the EMA weights over the dataset, with the same timesteps and noise every time.

    The timesteps of a batch are spread evenly over 0 ... T - 1. Each process computes the losses of
    some of the images, and all processes return the same mean.
    """
    generator = torch.Generator(device)
    total = torch.zeros(2, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    for number, chunk in enumerate(torch.arange(len(dataset)).split(batch_size)):
        mine = torch.arange(distributed.rank(), len(chunk), distributed.world_size())
        draws = draw_step(generator, mix(config.seed, "validation", number), (len(chunk), config.img_channels, *config.input_shape), 1)
        t = ((torch.arange(len(chunk)) + 0.5) / len(chunk) * config.num_timesteps).long()
        if len(mine):
            images, labels = dataset.__getitems__(chunk[mine])
            x, y = normalise(images, device, memory_format=layout), labels.to(device) if config.class_conditional else None
            with autocast(device, config.precision):
                losses = diffusion(x, y, t=t[mine].to(device), noise=draws.noise[mine], use_ema=True, reduction="none")
            total += torch.stack([losses.sum(), losses.new_tensor(len(mine))])
    loss, count = distributed.sum_over_ranks(total).tolist()
    return loss / count
