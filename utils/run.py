"""A run: how it is found and gone on with, and what it writes."""
import hashlib
import json
import signal
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from utils import distributed
from utils.atomic import atomic_write, remove_leftovers
from utils.checkpoint import FORMAT, LAST, all_finite, load_checkpoint, newest_last, rotate, save_checkpoint
from utils.device import is_available
from utils.loss_history import LossHistory
from utils.memory import is_out_of_memory
from utils.optimizer import restore_optimizer
from utils.preview import draw_preview, save_preview

# What a run is built from. A label_dropout above zero adds the null class, so it cannot come or go either.
FIXED = (
    "input_shape", "img_channels", "channel", "channel_mults", "num_res_blocks", "attention_resolutions", "num_groups",
    "class_conditional", "schedule", "num_timesteps", "schedule_low", "schedule_high", "prediction",
)  # fmt: skip


def find_checkpoint(resume, save_dir):
    """(path, checkpoint) that `resume` asks for: "" none, "latest" the newest run's, else a path; (None, None) if none.

    Rank 0 looks, so that all processes go on with the same one; each reads it for itself.
    """
    path, checkpoint = _look(resume, save_dir) if distributed.is_main() else (None, None)
    path = distributed.from_main(path)
    return path, load_checkpoint(path) if path and checkpoint is None else checkpoint


def _look(resume, save_dir):
    if not resume:
        return None, None
    if resume != "latest":
        path = Path(resume)
        path = path / LAST if path.is_dir() else path
        return path, load_checkpoint(path)
    path, checkpoint = newest_last(save_dir)
    if path is None:
        print(f"--resume latest: no run with a readable {LAST} in {Path(save_dir).resolve()}; this is a fresh run")
    return path, checkpoint


def merge_config(config_class, typed, checkpoint, source):
    """The settings to go on with: the checkpoint's, and over them only what was typed on the command line.

    Args: typed: {name: value}. checkpoint: its dict. source: its path, for messages. Raises ValueError for a typed
    setting that the run was built with; prints the values of the script's block that are not used.
    """
    known = {field.name for field in fields(config_class)}
    typed = {name: value for name, value in typed.items() if name not in FIXED or value != "auto"}  # it became what the run has
    base = config_class(**{name: value for name, value in checkpoint["config"].items() if name in known})
    for name, value in typed.items():
        same = getattr(base, name) == value if name != "label_dropout" else (base.label_dropout > 0) == (value > 0)
        if name in checkpoint["config"] and name in (*FIXED, "label_dropout") and not same:
            raise ValueError(
                f"--{name} {value}: {source} was built with {name} = {getattr(base, name)}, which cannot change; "
                "leave it out, or start a fresh run"
            )
    script = config_class()
    unused = [name for name in sorted(known - set(typed) - {"resume"}) if getattr(script, name) not in ("auto", getattr(base, name))]
    if unused:
        print(f"not used, as the run goes on with its own (type them as options to change them): {', '.join(unused)}")
    if "device" not in typed and not is_available(base.device):
        print(f"the run was on {base.device}, which is not here: device, precision and compile are chosen anew")
        base = replace(base, device="auto", precision="auto", compile="auto")
    return replace(base, **typed)


def run_folder(checkpoint, source, save_dir):
    """The folder to write to: that of the run whose `last.pth` is gone on with, else a new one, the same on all processes."""
    folder = Path(source).parent if source else None
    if checkpoint and "position" in checkpoint and Path(source).name == LAST and (folder / "config.json").exists():
        return folder  # a copy elsewhere, or under another name, starts a folder of its own
    return distributed.from_main(_new_folder(save_dir) if distributed.is_main() else None)


def _new_folder(save_dir):
    """An empty folder logs/<time>/ that no other run has."""
    name = time.strftime("%Y_%m_%d_%H_%M_%S")
    for suffix in ("", *(f"_{number}" for number in range(2, 1000))):
        folder = Path(save_dir) / f"{name}{suffix}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not folder.is_dir():
                raise ValueError(f"{folder.parent} cannot hold runs: it is a file; choose another --save_dir") from None
    raise ValueError(f"{save_dir}: no free name for a run")


def check_classes(config, classes, checkpoint):
    """Raise ValueError unless the pictures' classes are those that the run was built with."""
    if not config.class_conditional or not checkpoint:
        return
    known = checkpoint["classes"]
    if known and known != classes:
        raise ValueError(f"the run's classes are {', '.join(known)}, and the list's are {', '.join(classes) or 'none'}: they cannot change")


class Start(NamedTuple):
    """Where a run begins, or goes on."""

    epoch: int = 0
    images: int = 0  # taken already in this epoch
    sums: torch.Tensor | None = None  # this process's running sums of the epoch
    rows: tuple = ()  # of the loss history
    speed_rows: tuple = ()


def restore(checkpoint, parts, config):
    """Put optimizer and scaler back as they were; returns the Start. The weights are in place already.

    A checkpoint without a training state (a file of weights only) starts a run of its own at epoch 0.
    """
    if not checkpoint or "position" not in checkpoint:
        if checkpoint and distributed.is_main():
            print(f"a file of weights alone: a run of its own starts from them at epoch 1; a {LAST} goes on where it was")
        return Start()
    restore_optimizer(parts.optimizer, checkpoint["optimizer"])
    if checkpoint["scaler"]:
        parts.scaler.load_state_dict(checkpoint["scaler"])
    if all(checkpoint["config"][name] == getattr(config, name) for name in ("init_lr", "grad_clip", "precision")):
        parts.meter.bad_in_row.fill_(checkpoint["bad_in_row"])  # else it has a new chance
    epoch, images, batch_size, fingerprint = (checkpoint["position"][name] for name in ("epoch", "images", "batch_size", "pictures"))
    changed = []
    if fingerprint != pictures_fingerprint(parts.dataset, parts.rows):
        changed.append("the pictures are not those of before")
    if batch_size != parts.batch_size:
        changed.append(f"the batch size was {batch_size} and is {parts.batch_size}")
    rows, speed_rows = checkpoint["history"], checkpoint["speed"]
    if changed and distributed.is_main():
        print(f"{'; '.join(changed)}{': going on with the next epoch' if images else ''}")
    if changed and images:
        return Start(epoch + 1, 0, None, rows, speed_rows)
    return Start(epoch, images, _own_sums(checkpoint["sums"]), rows, speed_rows)


def _own_sums(per_rank):
    """This process's row of the saved sums; with another number of processes, rank 0 takes them all."""
    if per_rank is None:
        return None
    if len(per_rank) == distributed.world_size():
        return per_rank[distributed.rank()]
    return per_rank.sum(0) * float(distributed.is_main())


def pictures_fingerprint(dataset, rows):
    """A digest of the training pictures' content and classes, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows.tolist():
        digest.update(f"{dataset.hashes[row]} {int(dataset.labels[row])};".encode())
    return digest.hexdigest()


class RunFiles:
    """Everything a run writes: progress bar, checkpoints, tables, curves, previews. Only rank 0 does, and only it prints."""

    def __init__(self, folder, config, parts, start):
        self.folder, self.config, self.parts, self.start = Path(folder), config, parts, start
        self.main = distributed.is_main()
        self.fingerprint = pictures_fingerprint(parts.dataset, parts.rows)
        self.per_epoch = len(parts.rows) // parts.batch_size * parts.batch_size

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
