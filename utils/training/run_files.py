"""What a run writes."""

import json
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from utils import distributed
from utils.checkpoint import FORMAT, LAST, all_finite, rotate, save_checkpoint
from utils.errors import is_out_of_memory
from utils.files import atomic_write, remove_leftovers
from utils.training.loss_history import LossHistory
from utils.training.preview import draw_preview, save_preview
from utils.training.resume import pictures_fingerprint


class RunFiles:
    """Everything a run writes: progress bar, checkpoints, tables, curves, previews. Only rank 0 does, and only it prints."""

    def __init__(self, folder, config, parts, start):
        self.folder, self.config, self.parts, self.start = Path(folder), config, parts, start
        self.main = distributed.is_main()
        self.fingerprint = pictures_fingerprint(parts.dataset)
        self.per_epoch = len(parts.dataset) // parts.batch_size * parts.batch_size

    def __enter__(self):
        done = self.start.epoch * self.per_epoch + self.start.images
        if self.main:
            remove_leftovers(self.folder)
            with atomic_write(self.folder / "config.json", "w", encoding="utf-8") as file:
                json.dump(asdict(self.config), file, indent=2)
            print(f"this run writes to {self.folder.resolve()}")
            if self.start.epoch >= self.config.epochs:
                print(f"its {self.config.epochs} epochs are done already: --epochs with a higher number goes on")
            self.history = LossHistory(self.folder, self.start.rows, self.start.speed_rows)
        self.bar = tqdm(
            total=self.config.epochs * self.per_epoch, initial=done, unit="img", unit_scale=True, disable=not self.main, dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 10,
        )  # fmt: skip
        self.saved, self.cost = time.monotonic(), 0.0
        self.epoch_began, self.epoch_images = time.monotonic(), 0
        return self

    def __exit__(self, *_):
        self.bar.close()
        if self.main:
            self._try(self.history.close)

    def show(self, epoch, images, loss, rate):
        """Move the progress bar by a batch. loss: of the epoch so far, as far as it is known without waiting for the GPU."""
        self.epoch_images += images
        self.bar.set_description(f"epoch {epoch + 1}/{self.config.epochs}", refresh=False)
        known = f"loss {loss:.4f}, " if loss == loss else ""  # NaN: a GPU has not told it yet
        self.bar.set_postfix_str(f"{known}rate {rate:.1e}", refresh=False)
        self.bar.update(images)

    def seconds(self):
        """Seconds that the steps of this epoch took (of those since the start of the process)."""
        return time.monotonic() - self.epoch_began

    def save_due(self):
        """Whether `save_minutes` have gone by since the last save. Said once: the others hear of it a few steps later."""
        due = time.monotonic() - self.saved >= self.config.save_minutes * 60
        if due:
            self.saved = time.monotonic()
        return due

    def save(self, epoch, images):
        """Write last.pth at a position within an epoch. Every process must call it: each has running sums of its own.

        Returns whether it is there (on rank 0).
        """
        sums = torch.stack(distributed.gather(self.parts.meter.sums.cpu()))
        return self.main and self._save(LAST, {**self._weights(), **self._training(epoch, images, sums)})

    def stop(self, number, saved):
        """Say how to go on, and leave with the exit code that shells give a signal's end, all processes together."""
        self.bar.close()
        if self.main:
            where = "from here" if saved else f"from the older state that {LAST} has, as this one could not be saved"
            print(f"stopped by {signal.Signals(number).name}; `python train.py --resume {self.folder}` goes on {where}", flush=True)
            self._try(self.history.close)
        distributed.barrier()  # a process that leaves makes torchrun end the others, and rank 0 may still be writing
        distributed.stop()
        raise SystemExit(128 + number)

    def end_epoch(self, row, seconds, memory):
        """Tables, curves, preview and checkpoints at the end of an epoch. row: see LossHistory. memory: MiB."""
        epoch, final = row["epoch"], row["epoch"] == self.config.epochs
        rate = self.epoch_images / max(seconds, 1e-6)
        speed = {"epoch": epoch, "seconds": round(seconds, 3), "images_per_second": round(rate, 2), "memory_mib": round(memory)}
        self._try(lambda: self.history.add(row, speed, row["step"]))
        due = final or self.worthwhile()
        if epoch % self.config.save_period == 0 or final:  # before last.pth: a run that goes on from there does not come back for it
            self._save(f"epoch_{epoch:04d}.pth", self._weights())
        saved = due and self._save(LAST, {**self._weights(), **self._training(epoch, 0, None)})
        if self.config.preview_period and (epoch % self.config.preview_period == 0 or final):
            self._try(lambda: self._preview(epoch, row["step"]))
        self._try(self.history.plot)
        self.epoch_began, self.epoch_images = time.monotonic(), 0
        if final:
            self.bar.close()
            loss = "" if row["loss"] is None else f", loss {row['loss']:.4f}"
            if saved:
                print(f"done{loss}: weights in {(self.folder / LAST).resolve()}; `python predict.py` draws with them")
            else:
                print(f"done{loss}, but the last weights could not be saved: {self.folder.resolve()} has older ones")

    def worthwhile(self):
        """Whether a save costs under 5 % of the time since the last one: epochs may be shorter than a save takes."""
        return time.monotonic() - self.saved >= 20 * self.cost

    def advice(self):
        """What to do after too many bad steps."""
        last = self.folder / LAST
        kept = f"The last good state is {last.resolve()}: go on from it" if last.exists() else "Start again"
        return f"{kept} with a lower --init_lr, --grad_clip 1, or --precision fp32, and look for broken pictures."

    def _preview(self, epoch, step):
        try:
            picture = draw_preview(self.parts.diffusion, self.config, len(self.parts.dataset.classes), self.parts.device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            tqdm.write("no preview: there is not enough memory to draw 25 pictures at once; the training goes on")
            return
        path = save_preview(picture, self.folder.name, epoch)
        self.history.add_picture(picture, step)
        tqdm.write(f"preview: {path.resolve()}")

    def _weights(self):
        """What drawing needs."""
        diffusion = self.parts.diffusion
        return {
            "format": FORMAT, "config": asdict(self.config), "classes": list(self.parts.dataset.classes), "weights": diffusion.state_dict(),
            "weights_kind": "full", "ema_step": diffusion.ema_step,
        }  # fmt: skip

    def _training(self, epoch, images, sums):
        """What going on needs besides: no random state, as the run's randomness is a function of seed and position."""
        position = {"epoch": epoch, "images": images, "batch_size": self.parts.batch_size, "pictures": self.fingerprint}
        return {
            "position": position, "sums": sums, "optimizer": self.parts.optimizer.state_dict(), "scaler": self.parts.scaler.state_dict(),
            "bad_in_row": int(self.parts.meter.bad_in_row), "history": self.history.rows, "speed": self.history.speed_rows,
        }  # fmt: skip

    def _save(self, name, state):
        """Write a checkpoint; returns whether it is there. A failure is said, and the next save tries again: the training goes on."""
        began, saved = time.monotonic(), False
        if all_finite(state["weights"]):
            saved = self._try(lambda: save_checkpoint(self.folder / name, state))
            self._try(lambda: rotate(self.folder, self.config.keep_last))
        else:
            tqdm.write(f"NOT SAVED: the weights hold NaN or infinity; {self.folder / name} stays as it was")
        self.saved, self.cost = time.monotonic(), time.monotonic() - began
        return saved

    def _try(self, write):
        try:
            write()
        except OSError as error:
            tqdm.write(f"NOT SAVED: {error}; the training goes on, and the next save tries again")
            return False
        return True
