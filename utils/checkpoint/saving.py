"""When the checkpoints of a run are written, and what could not be written."""

import time
from dataclasses import replace
from functools import partial

from utils.checkpoint.file import TrainingState, save_checkpoint
from utils.checkpoint.resume import images_fingerprint
from utils.checkpoint.runs import LAST, epoch_files

MAX_SAVE_SHARE = 0.05  # of the time, for saves at the ends of epochs


class CheckpointWriter:
    """Writes the checkpoints of a run. Only rank 0 has one. attempt: the run's TolerantWriter."""

    def __init__(self, folder, config, context, attempt):
        self.folder, self.config, self.context, self.attempt = folder, config, context, attempt
        self.fingerprint = images_fingerprint(context.dataset)
        self.saved, self.seconds = time.monotonic(), 0.0  # when last.pth was written, and how long it took

    def is_due(self):
        """Whether `save_minutes` are over. True once: other processes hear of it later."""
        due = time.monotonic() - self.saved >= self.config.save_minutes * 60
        self.saved = time.monotonic() if due else self.saved
        return due

    def is_cheap(self):
        """Whether a save takes under 5 % of the time since the last: epochs may be short."""
        return time.monotonic() - self.saved >= self.seconds / MAX_SAVE_SHARE

    def save_last(self, epoch, images, sums):
        """Writes last.pth with a TrainingState of this position and sums. Whether it is there."""
        context = self.context
        moments, scaler = context.optimizer.state_dict(), context.scaler.state_dict()
        position = (epoch, images, context.batch_size, self.fingerprint)
        return self.write(LAST, TrainingState(*position, sums, moments, scaler, int(context.meter.bad_in_row)))

    def save_epoch(self, epoch):
        """Writes epoch_XXXX.pth, weights alone. Of those up to it the newest `keep_last` stay."""
        self.write(f"epoch_{epoch:04d}.pth")
        # Later ones are of an older run in this folder that went further.
        found = [path for path in epoch_files(self.folder) if int(path.stem[6:]) <= epoch]
        for path in found[: -self.config.keep_last] if self.config.keep_last else []:
            self.attempt("deleting old epoch files", partial(path.unlink, missing_ok=True))

    def write(self, name, training=None):
        """Writes what sampling needs, and a training state. Returns whether the file is there."""
        diffusion, began = self.context.diffusion, time.monotonic()
        values = {"weights": diffusion.state_dict(), "ema_step": diffusion.ema_step, "training": training}
        checkpoint = replace(self.context.about, path=self.folder / name, **values)
        written = self.attempt(name, lambda: save_checkpoint(checkpoint))
        if name == LAST:  # best.pth or an epoch file does not put it off
            self.saved, self.seconds = time.monotonic(), time.monotonic() - began
        return written
