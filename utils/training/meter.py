"""Running sums of an epoch, kept on the device: reading them would make the host wait."""

import torch

QUARTERS = 4


class Meter:
    """Losses by quarter of the timesteps, gradient norms, and counts of good and skipped steps, of the epoch so far.

    A skipped step (a gradient that was not finite) counts as skipped and adds nothing else.
    """

    def __init__(self, device, num_timesteps):
        # Apple's GPUs have no float64; elsewhere it keeps long epochs exact.
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.device, self.num_timesteps = device, num_timesteps
        self.quarters = torch.arange(QUARTERS, device=device)[:, None]
        self.bad_in_row = torch.zeros((), device=device)
        self.late = LateCopy(device)
        self.reset()

    def reset(self, sums=None):
        """Start an epoch, or go on with the sums that a checkpoint kept."""
        size = 2 * QUARTERS + 3
        self.sums = torch.zeros(size, dtype=self.dtype, device=self.device) if sums is None else sums.to(self.device, self.dtype)

    def add(self, losses, t, norm, bad, counts_as_bad):
        """losses, t: (b,), this process's images. norm, bad: 0-dim. counts_as_bad: 0-dim, whether `bad` is held against the run."""
        inside = ((t * QUARTERS // self.num_timesteps) == self.quarters).to(self.dtype)
        good = 1 - bad
        losses = torch.where(bad > 0, 0, losses.detach()).to(self.dtype)
        counts = torch.stack([torch.where(bad > 0, 0, norm), good, counts_as_bad]).to(self.dtype)
        self.sums += torch.cat([inside @ losses, inside.sum(1) * good, counts])
        self.bad_in_row = (self.bad_in_row + counts_as_bad) * bad
        self.late.push(torch.cat([self.sums, self.bad_in_row[None].to(self.dtype)]))

    def shown(self):
        """(mean loss of the epoch so far, bad steps in a row), as the host last heard of them; rank 0's share only."""
        if self.late.value is None:
            return float("nan"), 0
        values = self.late.value.tolist()
        return sum(values[:QUARTERS]) / max(1.0, sum(values[QUARTERS : 2 * QUARTERS])), int(values[-1])


def summary(per_rank):
    """The columns of an epoch from every process's sums: (processes, sums). Columns that saw no image are None."""
    per_rank = per_rank.to(torch.float64)
    total = per_rank.sum(0).tolist()
    losses, images = total[:QUARTERS], total[QUARTERS : 2 * QUARTERS]
    # The norm is taken after the reduction and is the same on every process.
    norm, good, skipped = per_rank[0, 2 * QUARTERS :].tolist()
    columns = {"loss": sum(losses) / sum(images) if sum(images) else None}
    for quarter, (loss, count) in enumerate(zip(losses, images), 1):
        columns[f"loss_t{quarter}"] = loss / count if count else None
    return {**columns, "grad_norm": norm / good if good else None, "skipped": int(skipped)}


class LateCopy:
    """The newest value of a device tensor that has reached the host, without ever waiting for it."""

    def __init__(self, device):
        self.value, self.device, self.arrived = None, device, None

    def push(self, tensor):
        if self.device.type != "cuda":
            self.value = tensor
        elif self.arrived is None or self.arrived.query():
            if self.arrived is not None:
                self.value = self.landing.clone()
            else:
                self.landing = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                self.arrived = torch.cuda.Event()
            self.landing.copy_(tensor, non_blocking=True)
            self.arrived.record()
