"""When last.pth and the epoch files are written, what is in them, and what could not be written."""

import time
from dataclasses import asdict

from tqdm import tqdm

from utils.checkpoint import FORMAT, LAST, save_checkpoint
from utils.checkpoint_contents import all_finite
from utils.run_folders import rotate
from utils.training.resume import images_fingerprint

CHEAP = 0.05  # share of the time that saves at the ends of epochs may take


class Checkpoints:
    """Writes the checkpoints of a run. Only rank 0 has one. attempt: the run's TolerantWriter."""

    def __init__(self, folder, config, parts, attempt):
        self.folder, self.config, self.parts, self.attempt = folder, config, parts, attempt
        self.fingerprint = images_fingerprint(parts.dataset)
        self.saved, self.seconds = time.monotonic(), 0.0  # when last.pth was written, and how long it took

    def is_due(self):
        """Whether `save_minutes` are over. True once: other processes hear of it later."""
        due = time.monotonic() - self.saved >= self.config.save_minutes * 60
        if due:
            self.saved = time.monotonic()
        return due

    def is_cheap(self):
        """Whether a save takes under 5 % of the time since the last: epochs may be short."""
        return time.monotonic() - self.saved >= self.seconds / CHEAP

    def save_last(self, epoch, images, sums):
        """Writes last.pth: weights, and all that resuming needs. Returns whether it is there.

        epoch, images: the position, `images` of them into the epoch. sums: (processes, 11), the
        meters' sums, or None at the start of an epoch. The randomness follows from the position.
        """
        parts = self.parts
        position = {"epoch": epoch, "images": images, "batch_size": parts.batch_size, "pictures": self.fingerprint}
        return self.write(
            LAST,
            {
                "position": position,
                "sums": sums,
                "optimizer": parts.optimizer.state_dict(),
                "scaler": parts.scaler.state_dict(),
                "bad_in_row": int(parts.meter.bad_in_row),
            },
        )

    def save_epoch(self, epoch):
        """Writes epoch_XXXX.pth, weights alone, and deletes old ones."""
        self.write(f"epoch_{epoch:04d}.pth")
        self.attempt("deleting old epoch files", lambda: rotate(self.folder, self.config.keep_last))

    def write(self, name, training_state=None):
        """Writes what sampling needs, and a training state. Returns whether the file is there."""
        diffusion = self.parts.diffusion
        state = {
            "format": FORMAT,
            "config": asdict(self.config),
            "classes": list(self.parts.dataset.classes),
            "weights": diffusion.state_dict(),
            "weights_kind": "full",
            "ema_step": diffusion.ema_step,
            **(training_state or {}),
        }
        began, written = time.monotonic(), False
        if all_finite(state["weights"]):
            written = self.attempt(name, lambda: save_checkpoint(self.folder / name, state))
        else:
            self.attempt.failed.add(name)
            tqdm.write(f"NOT SAVED: the weights hold NaN or infinity; {self.folder / name} stays as it was")
        if name == LAST:  # best.pth or an epoch file does not put it off
            self.saved, self.seconds = time.monotonic(), time.monotonic() - began
        return written
