"""Running sums of an epoch. They stay on the device: reading them would make the host wait."""

import torch

from utils.device import AsyncHostCopy

QUARTERS = 4
# What the sums are, in their order: losses and images by quarter of the timesteps, then these.
LOSSES, IMAGES = slice(0, QUARTERS), slice(QUARTERS, 2 * QUARTERS)
GRAD_NORM, GOOD_STEPS, SKIPPED = range(2 * QUARTERS, 2 * QUARTERS + 3)
SIZE = 2 * QUARTERS + 3


class Meter:
    """Losses by quarter of the timesteps, gradient norms, and counts of good and skipped steps.

    All are of the epoch so far. A step with a gradient that is not finite counts as skipped and
    adds nothing else.
    """

    def __init__(self, device, num_timesteps):
        # Apple's GPUs have no float64; elsewhere it keeps long epochs exact.
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.device, self.num_timesteps = device, num_timesteps
        self.quarters = torch.arange(QUARTERS, device=device)[:, None]
        self.bad_in_row = torch.zeros((), device=device)
        self.late = AsyncHostCopy(device)
        self.reset()

    def reset(self, sums=None):
        """Starts an epoch, or goes on from the sums (11,) of a checkpoint."""
        self.sums = (torch.zeros(SIZE) if sums is None else sums).to(self.device, self.dtype)

    def add(self, losses, t, norm, bad, counted):
        """losses, t: (b,), of this process. norm, bad, counted (see `counts_as_bad`): 0-dim."""
        inside = ((t * QUARTERS // self.num_timesteps) == self.quarters).to(self.dtype)
        good = 1 - bad
        losses = torch.where(bad > 0, 0, losses.detach()).to(self.dtype)
        counts = torch.stack([torch.where(bad > 0, 0, norm), good, counted]).to(self.dtype)
        self.sums += torch.cat([inside @ losses, inside.sum(1) * good, counts])
        self.bad_in_row = (self.bad_in_row + counted) * bad
        self.late.push(torch.cat([self.sums, self.bad_in_row[None].to(self.dtype)]))

    def latest(self):
        """(mean loss of the epoch, bad steps in a row), newest on the host. NaN: no loss yet."""
        if self.late.value is None:
            return float("nan"), 0
        values = self.late.value.tolist()
        images = sum(values[IMAGES])
        return sum(values[LOSSES]) / images if images else float("nan"), int(values[SIZE])


def counts_as_bad(bad, scaler):
    """`bad`, but 0 while a GradScaler still halves its factor: overflows are its search."""
    # The scale as a tensor on the device; scaler.get_scale() would make the host wait.
    return bad * (scaler._scale <= 1) if scaler.is_enabled() else bad


def epoch_means(per_rank):
    """The columns of an epoch from the sums of all processes (processes, 11). None: no image."""
    per_rank = per_rank.to(torch.float64)
    total = per_rank.sum(0).tolist()
    losses, images = total[LOSSES], total[IMAGES]
    # The reduction comes before the norm: norm and counts are the same on every process.
    of_one = per_rank[0].tolist()
    columns = {"loss": sum(losses) / sum(images) if sum(images) else None}
    for quarter, (loss, count) in enumerate(zip(losses, images), 1):
        columns[f"loss_t{quarter}"] = loss / count if count else None
    grad_norm = of_one[GRAD_NORM] / of_one[GOOD_STEPS] if of_one[GOOD_STEPS] else None
    return {**columns, "grad_norm": grad_norm, "skipped": int(of_one[SKIPPED])}
