"""The randomness of training, a function of seed and position: nothing to save or restore."""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def derive_seed(*parts: object) -> int:
    """A seed of 63 bits from numbers and words, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


class StepNoise(NamedTuple):
    """The random numbers of one step, a row for each image of a batch or of a process's part."""

    t: Tensor  # (B,) int64 timesteps
    noise: Tensor  # (B, C, H, W)
    flip: Tensor  # (B,) bool: mirrored left to right
    drop: Tensor  # (B,) bool: the null class replaces the label, and zeros the condition
    condition: Tensor  # (B, C, H, W), noise for the conditions; (B,) where there are none

    def of_rank(self, rank: int, world_size: int) -> "StepNoise":
        size = len(self.t) // world_size
        return StepNoise(*(rows[rank * size : (rank + 1) * size] for rows in self))


def sample_step_noise(generator, seed, shape, sample_timesteps: Callable, flip=0.0, drop=0.0, cond=False) -> StepNoise:
    """For a whole batch (B, C, H, W). sample_timesteps: (B, generator) -> (B,).

    flip, drop: probabilities. cond: whether images have conditions. No one changes other numbers.
    """
    generator.manual_seed(seed)
    on = {"generator": generator, "device": generator.device}
    t, noise = sample_timesteps(shape[0], generator), torch.randn(shape, **on)
    chosen = [torch.rand(shape[:1], **on) < chance for chance in (flip, drop)]
    return StepNoise(t, noise, *chosen, torch.randn(shape if cond else shape[:1], **on))
