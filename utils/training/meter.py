"""Running sums of an epoch. They stay on the device: reading them would make the host wait."""

import torch
from torch import Tensor

from utils.device import AsyncHostCopy

QUARTERS = 4
# What the sums are, in their order: losses and images by quarter of the timesteps, then these.
LOSSES, IMAGES = slice(0, QUARTERS), slice(QUARTERS, 2 * QUARTERS)
GRAD_NORM, GOOD_STEPS, SKIPPED = range(2 * QUARTERS, 2 * QUARTERS + 3)
SIZE = 2 * QUARTERS + 3


class Meter:
    """The sums. A step with a gradient that is not finite is counted, and adds nothing else."""

    def __init__(self, device: torch.device, num_timesteps: int) -> None:
        # Apple's GPUs have no float64; elsewhere it keeps long epochs exact.
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.device, self.num_timesteps = device, num_timesteps
        self.quarters = torch.arange(QUARTERS, device=device)[:, None]
        self.bad_in_row = torch.zeros((), device=device)
        self.late = AsyncHostCopy(device)
        self.reset()

    def reset(self, sums: Tensor | None = None) -> None:
        """Starts an epoch, or continues with the sums (11,) of a checkpoint."""
        self.sums = (torch.zeros(SIZE) if sums is None else sums).to(self.device, self.dtype)

    def add(self, losses: Tensor, t: Tensor, norm: Tensor, bad: Tensor, counted: Tensor) -> None:
        """losses, t: (b,), of this process. norm, bad, counted (see `counts_as_bad`): 0-dim."""
        inside = ((t * QUARTERS // self.num_timesteps) == self.quarters).to(self.dtype)
        good = 1 - bad
        losses = torch.where(bad > 0, 0, losses.detach()).to(self.dtype)
        counts = torch.stack([torch.where(bad > 0, 0, norm), good, counted]).to(self.dtype)
        self.sums += torch.cat([inside @ losses, inside.sum(1) * good, counts])
        self.bad_in_row = (self.bad_in_row + counted) * bad
        self.late.push(torch.cat([self.sums, self.bad_in_row[None].to(self.dtype)]))

    def latest(self) -> tuple[float, int]:
        """(mean loss of the epoch, bad steps in a row), newest on the host. NaN: no loss yet."""
        values = [0.0] * (SIZE + 1) if self.late.value is None else self.late.value.tolist()
        images = sum(values[IMAGES])
        return sum(values[LOSSES]) / images if images else float("nan"), int(values[SIZE])


def counts_as_bad(bad: Tensor, scaler: torch.amp.GradScaler) -> Tensor:
    """`bad`, but 0 while a GradScaler still halves its factor: overflows are its search."""
    # The scale as a tensor on the device; scaler.get_scale() would make the host wait.
    return bad * (scaler._scale <= 1) if scaler.is_enabled() else bad


def epoch_means(per_rank: Tensor) -> dict[str, float | None]:
    """The columns of an epoch from the sums of all processes (processes, 11). None: no image."""
    total, first = per_rank.double().sum(0).tolist(), per_rank[0].tolist()
    ratios = {"loss": (sum(total[LOSSES]), sum(total[IMAGES]))}
    ratios |= {f"loss_t{i}": pair for i, pair in enumerate(zip(total[LOSSES], total[IMAGES]), 1)}
    # The reduction comes before the norm: norm and counts are the same on every process.
    ratios["grad_norm"] = (first[GRAD_NORM], first[GOOD_STEPS])
    means = {name: value / count if count else None for name, (value, count) in ratios.items()}
    return {**means, "skipped": int(first[SKIPPED])}
