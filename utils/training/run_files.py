"""What a run shows and writes: progress bar, tables, curves, previews, checkpoints."""

import contextlib
import json
import math
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from utils import distributed
from utils.checkpoint import BEST, LAST
from utils.errors import UserError, is_out_of_memory
from utils.files import TolerantWriter, atomic_write, locked, remove_leftovers
from utils.images import save_png
from utils.training.loss_history import LossHistory
from utils.training.preview import sample_preview
from utils.training.saving import Checkpoints


class RunFiles:
    """Files and progress bar of a run. Rank 0 writes; all processes call `save` and `stop`."""

    def __init__(self, folder, config, parts, start):
        self.folder, self.config, self.parts, self.start = Path(folder), config, parts, start
        self.main = distributed.is_main()
        self.attempt, self.lock = TolerantWriter(), contextlib.ExitStack()
        self.images_per_epoch = len(parts.dataset) // parts.batch_size * parts.batch_size

    def __enter__(self):
        if self.main:
            busy = f"another training writes to {self.folder.resolve()}: wait for its end, or stop it"
            self.lock.enter_context(locked(self.folder, busy))
            remove_leftovers(self.folder)
            with atomic_write(self.folder / "config.json", "w", encoding="utf-8") as file:
                json.dump(asdict(self.config), file, indent=2)
            print(f"this run writes to {self.folder.resolve()}")
            if self.start.epoch >= self.config.epochs:
                print(f"its {self.config.epochs} epochs are done already: --epochs with a higher number resumes it")
            self.history = LossHistory(self.folder, *self.start.tables)
            self.checkpoints = Checkpoints(self.folder, self.config, self.parts, self.attempt)
        done = self.start.epoch * self.images_per_epoch + self.start.images
        pause = 0.2 if sys.stderr.isatty() else 10  # seconds
        self.bar = tqdm(
            total=self.config.epochs * self.images_per_epoch,
            initial=done,
            unit="img",
            unit_scale=True,
            disable=not self.main,
            dynamic_ncols=True,
            mininterval=pause,
        )
        self.epoch_began, self.epoch_images = time.monotonic(), 0
        return self

    def __exit__(self, *_):
        self.bar.close()
        if self.main:
            self.attempt("the curves", self.history.close)
        self.lock.close()

    def show(self, epoch, images, loss, lr):
        """Moves the progress bar by a batch of `images`. loss: the mean of the epoch, or NaN."""
        self.epoch_images += images
        self.bar.set_description(f"epoch {epoch + 1}/{self.config.epochs}", refresh=False)
        known = f"loss {loss:.4f}, " if loss == loss else ""
        self.bar.set_postfix_str(f"{known}learning rate {lr:.1e}", refresh=False)
        self.bar.update(images)

    def save_due(self):
        """Whether it is time for a save within the epoch. Rank 0 keeps the time."""
        return self.main and self.checkpoints.is_due()

    def save(self, epoch, images):
        """Writes last.pth within an epoch. Every process calls it: each has sums of its own.

        Returns whether the file is there (on rank 0).
        """
        sums = torch.stack(distributed.gather(self.parts.meter.sums.cpu()))
        return self.main and self.checkpoints.save_last(epoch, images, sums)

    def stop(self, number, saved):
        """Says how to resume, and ends all processes with the exit code of signal `number`."""
        self.bar.close()
        if self.main:
            where = "from here" if saved else f"from the older state that {LAST} has, as this one could not be saved"
            name, command = signal.Signals(number).name, f"python train.py --resume {self.folder}"
            print(f"stopped by {name}; `{command}` goes on {where}", flush=True)
            self.attempt("the curves", self.history.close)
        distributed.barrier()  # a process that leaves makes torchrun end the others, and rank 0 may still be writing
        distributed.stop()
        raise SystemExit(128 + number)

    def end_epoch(self, row, seconds, memory):
        """Tables, checkpoints, preview, curves of an epoch. row: see LossHistory. memory: MiB."""
        epoch, final = row["epoch"], row["epoch"] == self.config.epochs
        per_second = self.epoch_images / max(seconds, 1e-6)
        speed = {"epoch": epoch, "seconds": round(seconds, 3), "images_per_second": round(per_second, 2)}
        speed["memory_mib"] = round(memory)
        best = row.get("val_loss", math.inf) < self.history.lowest("val_loss")[0]
        self.attempt("the tables", lambda: self.history.add(row, speed))
        due = final or self.checkpoints.is_cheap()
        if epoch % self.config.save_period == 0 or final:  # before last.pth: a resumed run does not write it again
            self.checkpoints.save_epoch(epoch)
        if best:
            self.checkpoints.write(BEST)
        if due:
            self.checkpoints.save_last(epoch, 0, None)
        if self.config.preview_period and (epoch % self.config.preview_period == 0 or epoch == 1 or final):
            self.attempt("the preview", lambda: self.preview(epoch, row["step"]))
        self.attempt("the curves", self.history.plot)
        self.epoch_began, self.epoch_images = time.monotonic(), 0
        if final:
            self.finish(row["loss"])

    def finish(self, loss):
        """Says that the run is over, and how to sample. ValueError: something is not written."""
        self.bar.close()
        shown = "" if loss is None else f", loss {loss:.4f}"
        if not self.attempt.failed:
            model = "" if self.folder.resolve().parent == Path("logs").resolve() else f" --model_path {self.folder}"
            print(
                f"done{shown}: weights in {(self.folder / LAST).resolve()}; `python predict.py{model}` draws with them"
            )
            _, epoch = self.history.lowest("val_loss")
            if epoch:
                print(
                    f"the validation loss was lowest after epoch {epoch}: `python predict.py --model_path "
                    f"{self.folder / BEST}` draws with the weights of then"
                )
            print(f"`python -m utils.report {self.folder}` makes a page of this run")
            return
        older = "an older" if (self.folder / LAST).is_file() else "no"
        there = f"{older} {LAST} is" if LAST in self.attempt.failed else f"{LAST} is"
        missing = ", ".join(sorted(self.attempt.failed))
        raise UserError(
            f"the epochs are done{shown}, but {missing} could not be written; {there} in "
            f"{self.folder.resolve()}: free some space and resume it"
        )

    def preview(self, epoch, step):
        """Samples the preview into a file and TensorBoard. Too little memory ends no run."""
        try:
            image = sample_preview(self.config, self.parts)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            tqdm.write("no preview: there is not enough memory to draw 25 pictures at once; the training goes on")
            return
        path = Path("results/train_out") / self.folder.name / f"epoch_{epoch:04d}.png"
        save_png(path, image)
        self.history.add_image(image, step)
        tqdm.write(f"preview: {path.resolve()}")

    def advice(self):
        """What to do after too many bad steps."""
        last = self.folder / LAST
        kept = f"The last good state is {last.resolve()}: go on from it" if last.exists() else "Start again"
        return f"{kept} with a lower --init_lr, --grad_clip 1, or --precision fp32, and look for broken pictures."
