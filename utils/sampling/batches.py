"""Batches of new images: all of one size, and every image a function of its own seed."""

import torch

from utils.cpu_threads import set_threads
from utils.device import autocast
from utils.errors import explain_out_of_memory


def sample_batches(diffusion, firsts, batch_size, seed, labels=None, noise=None, options=None):
    """Yields (first, steps) for each of `firsts`: the batch of images first, first + 1, ...

    steps: yields (x, x_0), (batch_size, c, h, w). Image i has the noise of seed + i. All batches
    have one size, so the number of images changes no image. labels: (n,) class ids or None, taken
    in turn as options.cond is. noise: a function of the numbers that replaces the seeds, or None.
    """
    device = diffusion.betas.device
    for first in firsts:
        numbers = torch.arange(first, first + batch_size)
        y = None if labels is None else labels[numbers % len(labels)].to(device)
        start = {"noise": noise(numbers)} if noise else {"seeds": (seed + numbers).tolist()}
        own = options if options.cond is None else options.override(cond=options.cond[numbers % len(options.cond)])
        yield first, diffusion.sample_steps(batch_size, device, y, options=own, **start)


def choose_threads(config, diffusion, device, precision):
    """Sets the number of CPU threads. "auto" times network calls, where there is a diffusion.

    config: of predict.py or utils.evaluate.
    """

    @torch.no_grad()
    def call(count):
        x = torch.zeros(count, diffusion.img_channels, *diffusion.img_size)
        ids = torch.zeros(count, dtype=torch.long)
        # Not the network itself: a compiled one would be compiled again for each number.
        diffusion.network(config.use_ema).forward(x, ids, None if diffusion.num_classes is None else ids)

    with autocast(device, precision), explain_out_of_memory(lambda: advice_for_sampling(config)):
        set_threads(config.num_threads, device, call if diffusion else None, config.batch_size, seconds=0.5)


def last_images(steps):
    """The x (batch_size, c, h, w) after the last of the steps."""
    for x, _ in steps:  # noqa: B007 (only the last x counts)
        pass
    return x


def advice_for_sampling(config):
    """The setting to lower where memory runs out: what a batch needs grows with batch_size."""
    if config.batch_size == 1:
        return "one image at a time is too much: lower --input_shape, or sample with a smaller network"
    return f"{config.batch_size} images at a time are too many; --batch_size {config.batch_size // 2} needs about half"
