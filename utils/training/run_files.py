"""What a run shows and writes: progress bar, tables, curves, previews, checkpoints."""

import contextlib
import json
import math
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from utils import distributed
from utils.checkpoint.runs import BEST, LAST, LOGS, SUMMARY
from utils.checkpoint.saving import CheckpointWriter
from utils.data.dataset import conditioned
from utils.device import autocast
from utils.errors import UserError, explain_out_of_memory
from utils.files import TolerantWriter, atomic_write, locked, remove_leftovers
from utils.images import make_grid, save_png, to_uint8
from utils.terminal import as_command
from utils.training.loss_history import LossHistory

COUNT, COLUMNS = 25, 5  # of a preview
CURES = "with a lower --init_lr, --grad_clip 1, or --precision fp32, and look for broken images"  # of bad gradients


class RunWriter:
    """Files and progress bar of a run. Rank 0 writes; all processes call `save` and `stop`."""

    def __init__(self, folder: Path, config, context, start, summary) -> None:
        """start: the ResumePoint. summary: what the folder keeps of how the run was started."""
        self.folder, self.config, self.context, self.start = Path(folder), config, context, start
        self.summary = summary
        self.previews = Path("results/train_out") / self.folder.name
        self.main, self.lock, self.attempt = distributed.is_main(), contextlib.ExitStack(), TolerantWriter(self.folder)

    def __enter__(self) -> "RunWriter":
        if self.main:
            folder = self.folder.resolve()
            refusal = f"another training writes to {folder}: wait for its end, or stop it"
            self.lock.enter_context(locked(self.folder, refusal))
            if self.previews.is_symlink():  # a folder from someone else cannot redirect a write
                self.previews.unlink()
            for place in (folder, self.previews):
                remove_leftovers(place)
            with atomic_write(self.folder / "config.json", "w", encoding="utf-8") as file:
                json.dump(self.context.about.config, file, indent=2)
            path = self.folder / SUMMARY
            before = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
            with atomic_write(path, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{before}{self.summary}\n\n")
            print(f"this run writes to {folder}")
            self.history = LossHistory(self.folder, *self.start.tables)
            self.checkpoints = CheckpointWriter(self.folder, self.config, self.context, self.attempt)
            self.best = self.start.best if (folder / BEST).is_file() else (math.inf, 0)
            if self.start.epoch >= self.config.epochs:
                print(f"its {self.config.epochs} epochs are done already: --epochs with a higher number resumes it")
                self.write_missing()
        images, pause = self.context.steps_per_epoch * self.context.batch_size, 0.2 if sys.stderr.isatty() else 10
        bar = {"unit": "img", "unit_scale": True, "dynamic_ncols": True}
        done, total = self.start.epoch * images + self.start.images, self.config.epochs * images
        self.bar = tqdm(total=total, initial=done, disable=not self.main, mininterval=pause, **bar)
        self.epoch_began, self.epoch_images = time.monotonic(), 0
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
        if self.main:
            self.attempt("the curves", self.history.close)
        self.lock.close()

    def show(self, epoch: int, images: int, loss: float, lr: float) -> None:
        """Moves the progress bar by a batch of `images`. loss: the mean of the epoch, or NaN."""
        self.epoch_images += images
        self.bar.set_description(f"epoch {epoch + 1}/{self.config.epochs}", refresh=False)
        self.bar.set_postfix_str(f"loss {loss:.4f}, learning rate {lr:.1e}", refresh=False)
        self.bar.update(images)

    def save_due(self) -> bool:
        """Whether it is time for a save within the epoch. Rank 0 keeps the time."""
        return self.main and self.checkpoints.is_due()

    def save(self, epoch: int, images: int) -> bool:
        """Writes last.pth within an epoch, with the sums of all processes. Whether it is there."""
        sums = torch.stack(distributed.gather(self.context.meter.sums.cpu()))
        return self.main and self.checkpoints.save_last(epoch, images, sums)

    def stop(self, number: int, saved: bool) -> None:
        """Says how to resume, and ends all processes with the exit code of signal `number`."""
        self.bar.close()
        if self.main:
            where = "from here" if saved else f"from the older state in {LAST}, as this one could not be saved"
            name, command = signal.Signals(number).name, as_command("python", "train.py", "--resume", self.folder)
            print(f"stopped by {name}; `{command}` resumes {where}", flush=True)
            self.attempt("the curves", self.history.close)
        distributed.barrier()  # a process that leaves makes torchrun end the others, and rank 0 may still be writing
        distributed.stop()
        raise SystemExit(128 + number)

    def end_epoch(self, row: dict, seconds: float, memory: float) -> None:
        """Writes all files of an epoch. row: see LossHistory. memory: MiB."""
        epoch, final, period = row["epoch"], row["epoch"] == self.config.epochs, self.config.preview_period
        rate = round(self.epoch_images / max(seconds, 1e-6), 2)
        speed = {"epoch": epoch, "seconds": round(seconds, 3), "images_per_second": rate, "memory_mib": round(memory)}
        if "val_loss" in row:
            if row["val_loss"] < self.best[0] and self.checkpoints.write(BEST):
                self.best = row["val_loss"], epoch
            row["best_epoch"] = self.best[1]  # what a failed save left in the file is known when resuming
        self.attempt("the tables", lambda: self.history.add(row, speed))
        if epoch % self.config.save_period == 0 or final:  # before last.pth: a resumed run does not write it again
            self.checkpoints.save_epoch(epoch)
        if final or self.checkpoints.is_cheap():
            self.checkpoints.save_last(epoch, 0, None)
        if period and (epoch % period == 0 or epoch == 1 or final):
            self.attempt("the preview", lambda: self.preview(epoch, row["step"]))
        self.attempt("the curves", self.history.plot)
        self.epoch_began, self.epoch_images = time.monotonic(), 0

    def write_missing(self) -> None:
        """Writes what a full disk kept back of a run that is done: its end advised to resume it."""
        epoch, step = self.start.epoch, self.start.epoch * self.context.steps_per_epoch
        if not self.start.images and not (self.folder / f"epoch_{epoch:04d}.pth").exists():
            self.checkpoints.save_epoch(epoch)
        if self.config.preview_period and not (self.previews / f"epoch_{epoch:04d}.png").exists():
            self.attempt("the preview", lambda: self.preview(epoch, step))

    def preview(self, epoch: int, step: int) -> None:
        """Samples the preview into a file and TensorBoard."""
        try:
            with explain_out_of_memory(lambda: "a preview samples 25 images at once, --preview_period 0 does without"):
                image = sample_preview(self.config, self.context)
        except UserError as error:
            tqdm.write(f"no preview: {error}")
        else:
            path = self.previews / f"epoch_{epoch:04d}.png"
            save_png(path, image)
            self.history.log("add_image", "preview", image, step, dataformats="HWC")
            tqdm.write(f"preview: {path.resolve()}")

    def finish(self) -> None:
        """Says that the run is over, and how to sample. UserError: something is missing."""
        if not self.main:
            return
        self.bar.close()
        folder, rows = self.folder.resolve(), self.history.losses
        loss = f", loss {float(rows[-1]['loss']):.4f}" if rows and rows[-1].get("loss") else ""
        if missing := ", ".join(sorted(self.attempt.failed)):
            why = "the lines above say why; mend that and resume it"
            raise UserError(f"the epochs are done{loss}, but {missing} could not be written to {folder}: {why}")
        steps, skipped = len(rows) * self.context.steps_per_epoch, sum(float(row.get("skipped") or 0) for row in rows)
        if skipped > steps / 2:
            why = f"{skipped:,.0f} of {steps:,} steps had NaN or infinite gradients and were skipped"
            raise UserError(f"the epochs are done{loss}, but {why}: start again {CURES}")
        model = () if folder.parent == Path(LOGS).resolve() else ("--model_path", self.folder)
        command = as_command("python", "predict.py", *model)
        print(f"done{loss}: weights in {folder / LAST}; `{command}` samples with them")
        if self.best[1]:
            command = as_command("python", "predict.py", "--model_path", self.folder / BEST)
            lowest = f"among the weights saved the validation loss was lowest after epoch {self.best[1]}"
            print(f"{lowest}: `{command}` samples with these")
        print(f"`{as_command('python', '-m', 'utils.report', self.folder)}` makes an HTML report of this run")

    def advice(self) -> str:
        """What to do after too many bad steps."""
        last = self.folder / LAST
        return f"{f'Resume the last good state, {last}, or start' if last.is_file() else 'Start'} again {CURES}"


def sample_preview(config, context):
    """A 5x5 grid (H, W, C) uint8 by the EMA, all classes in turn, always from the same noise."""
    y, cond = torch.arange(COUNT) % len(context.dataset.classes) if config.class_conditional else None, None
    if config.condition:
        source = context.validation or context.dataset  # images held out, where there are any
        numbers = torch.linspace(0, len(source) - 1, COUNT).long()
        images, cond = conditioned(context.diffusion, source, numbers)
        y = source.labels[numbers] if config.class_conditional else None
    options = {"sampler": config.preview_sampler, "cond": cond, "seeds": range(config.seed, config.seed + COUNT)}
    steps = min(config.preview_steps, config.num_timesteps)
    with autocast(context.device, config.precision):
        x = context.diffusion.sample(COUNT, context.device, y, steps=steps, **options)
    x = x if cond is None else torch.cat((cond[:, : config.img_channels].expand_as(x), x, images), 3)  # side by side
    return make_grid(to_uint8(x), COLUMNS)
