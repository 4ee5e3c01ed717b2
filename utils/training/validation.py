"""The loss of images that are never trained on."""
import torch

from utils import distributed
from utils.data.dataset import normalise
from utils.device import autocast
from utils.training.randomness import draw_step, mix


@torch.no_grad()
def validation_loss(config, parts):
    """The mean loss of the EMA over `parts.validation`, with the same timesteps and noise every time.

    The timesteps of a batch spread evenly over 0 ... T - 1. Each process takes every n-th image, and
    all get the same answer.
    """
    device = parts.device
    generator = torch.Generator(device)
    total = torch.zeros(2, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    for number, batch in enumerate(torch.arange(len(parts.validation)).split(parts.batch_size)):
        shape = (len(batch), config.img_channels, *config.input_shape)
        noise = draw_step(generator, mix(config.seed, "validation", number), shape, 1).noise
        t = ((torch.arange(len(batch)) + 0.5) / len(batch) * config.num_timesteps).long()
        mine = torch.arange(distributed.rank(), len(batch), distributed.world_size())
        if len(mine):
            images, labels = parts.validation.__getitems__(batch[mine])
            x = normalise(images, device, memory_format=parts.layout)
            y = labels.to(device) if config.class_conditional else None
            with autocast(device, config.precision):
                losses = parts.diffusion(x, y, t=t[mine].to(device), noise=noise[mine], use_ema=True, reduction="none")
            total += torch.stack([losses.sum(), losses.new_tensor(len(mine))])
    loss, count = distributed.sum_over_ranks(total).tolist()
    return loss / count
