"""The randomness of training, a function of seed and position: nothing to save or restore."""

import hashlib
from typing import NamedTuple

import torch


def mix(*parts):
    """A seed of 63 bits from numbers and words, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


class Draws(NamedTuple):
    """The random numbers of one step, a row for each image of a batch or of a process's part."""

    t: torch.Tensor  # (B,) int64 timesteps
    noise: torch.Tensor  # (B, C, H, W)
    flip: torch.Tensor  # (B,) bool: mirrored left to right
    drop: torch.Tensor  # (B,) bool: the null class replaces the label

    def of_rank(self, rank, world_size):
        """The rows of one process: slice `rank` of `world_size` equal ones."""
        size = len(self.t) // world_size
        return Draws(*(rows[rank * size : (rank + 1) * size] for rows in self))


def draw_step(generator, seed, shape, num_timesteps, flip=0.0, drop=0.0):
    """The Draws of one step for the whole batch.

    generator: on the device; seeded anew here. seed: from `mix(seed, epoch, step)`.
    shape: (B, C, H, W) of the whole batch. flip, drop: probabilities.
    The order of the draws is fixed: no option changes the numbers of another.
    """
    generator.manual_seed(seed)
    arguments = {"generator": generator, "device": generator.device}
    t = torch.randint(num_timesteps, shape[:1], **arguments)
    noise = torch.randn(shape, **arguments)
    return Draws(t, noise, *(torch.rand(shape[:1], **arguments) < chance for chance in (flip, drop)))
