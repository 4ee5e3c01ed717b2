"""Checkpoints: one file of plain types and tensors, written whole or not at all, read without running any code in it."""

import codecs
import hashlib
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from utils.config import shown
from utils.files import atomic_write

FORMAT = 1
LAST = "last.pth"
ZIP = b"PK\x03\x04"  # how a file of PyTorch begins, since 1.6
EPOCH_FILE = re.compile(r"epoch_(\d+)\.pth")


def save_checkpoint(path, checkpoint):
    """Write a dict of plain types and tensors. Raises OSError where the disk is full or the folder cannot be written."""
    with atomic_write(path) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:
            # PyTorch's own writer reports a full disk as a RuntimeError, behind the OSError that it caught.
            raise OSError(f"{path}: could not be written ({_first_line(error)})") from error


def load_checkpoint(path, lazily=False):
    """Read a checkpoint of this project, or a bare state dict such as the reference saves.

    Returns a dict with at least `weights` (a state dict), `weights_kind` ("full" or "ema"), `config`
    (a dict, empty for a bare state dict) and `classes` (a list of names), all on the CPU and of the
    kinds that `check_contents` asks for. `lazily` maps the file, so that what is never used (the
    optimizer's state, when drawing) takes no memory. ValueError for what is no such file, for a
    damaged one, and for weights that hold NaN or infinity.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such checkpoint")
    checkpoint = _understand(load_tensors(path, lazily), path)
    try:
        check_contents(checkpoint)
    except ValueError as error:
        raise ValueError(f"{path}: damaged, or edited: {error}") from None
    name = first_not_finite(checkpoint["weights"])
    if name is not None:
        raise ValueError(f"{path}: its weights hold NaN or infinity (the first is {name}): take an older checkpoint")
    return checkpoint


def load_tensors(path, lazily=False, what="PyTorch checkpoint"):
    """What torch.save wrote into a file, on the CPU: tensors and plain values, no code is run.

    Every file of PyTorch's that this project reads goes through here. The checksums of the whole
    file are compared, also `lazily`: that takes 0.2 s for 430 MB. Files of PyTorch before 1.6 have
    none. what: the noun in messages. ValueError of one line for a file of something else, or a damaged
    one; OSError from the system.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such {what}")
    with open(path, "rb") as file:
        start = file.read(512)
    if _is_text(start):
        raise ValueError(f"{path}: a text file, {_kind_of_text(start) or f'no {what}'}")
    try:
        zipped = start.startswith(ZIP) or zipfile.is_zipfile(path)
        if zipped:
            _compare_checksums(path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # the error says it
            return torch.load(path, map_location="cpu", weights_only=True, mmap=lazily and zipped)
    except (OSError, MemoryError):
        raise
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: not a file of tensors and plain values only; it is refused, as loading it could run code hidden in it"
        ) from None
    except Exception as error:  # the unpickler raises all kinds on a file of something else
        raise ValueError(f"{path}: damaged, or no {what} ({_first_line(error)})") from None


def _compare_checksums(path):
    """Read every part of a zip file. ValueError where one is not what was written."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if len(set(names)) < len(names):
            raise ValueError("two of its parts have one name")
        for part in archive.infolist():
            if part.compress_type != zipfile.ZIP_STORED:  # PyTorch writes none, and maps the bytes as they are
                raise ValueError("its parts are compressed")
            with archive.open(part) as content:
                while content.read(2**20):
                    pass


def _is_text(start):
    """Whether the first bytes of a file are text for people."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(start)  # the last character may be cut
    except UnicodeDecodeError:
        return False
    return bool(text.strip()) and all(ord(character) >= 32 or character.isspace() for character in text)


def _kind_of_text(start):
    """What a text file is that often lies in place of weights, and what to do; "" for another one."""
    start = start.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "the pointer that git-lfs leaves in place of the weights: run `git lfs pull`"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page instead of the weights: download the file itself, not the page that shows it"
    return ""


def _first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def _understand(loaded, path):
    if isinstance(loaded, dict) and isinstance(loaded.get("weights"), dict):
        written = loaded.get("format", FORMAT)
        if type(written) is not int or written > FORMAT:
            raise ValueError(f"{path}: written by a newer version of this project; update yours to read it")
        return {"weights_kind": "full", "config": {}, "classes": [], **loaded}
    if isinstance(loaded, dict) and loaded and all(torch.is_tensor(value) for value in loaded.values()):
        return {"weights": loaded, "weights_kind": "full", "config": {}, "classes": []}
    found = ", ".join(map(str, list(loaded)[:5])) if isinstance(loaded, dict) else type(loaded).__name__
    raise ValueError(f"{path}: neither a checkpoint of this project nor a state dict (it holds: {found})")


# What a checkpoint may hold


def check_contents(checkpoint):
    """ValueError that names the first value of a wrong kind or out of range, before anything is built from it.

    Lists among the settings become tuples. Settings that are not in SETTINGS stay as they are:
    `train.py` holds its own against their types. Sizes are compared in `nets.weights.check_sizes`.
    """
    check_tensors(checkpoint["weights"])
    _expect("weights_kind", checkpoint["weights_kind"] in ("full", "ema"), checkpoint["weights_kind"], "full or ema")
    config, classes = checkpoint["config"], checkpoint["classes"]
    _expect("config", isinstance(config, dict) and all(type(name) is str for name in config), config, "a dict of settings by name")
    checkpoint["config"] = config = {name: tuple(value) if type(value) is list else value for name, value in config.items()}
    for name, setting in SETTINGS.items():
        if name in config:
            _expect(name, setting.allows(config[name]), config[name], setting)
    unique = isinstance(classes, list) and all(type(name) is str for name in classes) and len(set(classes)) == len(classes)
    _expect("classes", unique, classes, "a list of different names")
    for name in ("ema_step", "bad_in_row"):
        if name in checkpoint:
            _expect(name, COUNT.allows(checkpoint[name]), checkpoint[name], COUNT)
    if "position" in checkpoint:
        _check_training(checkpoint)


def _check_training(checkpoint):
    """The part of `check_contents` for what a training is resumed from."""
    missing = [name for name in TRAINING if name not in checkpoint]
    if missing:
        raise ValueError(f"it has a position, but no {', '.join(missing)}")
    position, sums, scaler = (checkpoint[name] for name in ("position", "sums", "scaler"))
    counts = isinstance(position, dict) and all(COUNT.allows(position.get(name)) for name in ("epoch", "images", "batch_size"))
    _expect("position", counts and type(position.get("pictures")) is str, position, "epoch, images, batch_size and pictures")
    _expect("sums", sums is None or (torch.is_tensor(sums) and sums.ndim == 2 and sums.is_floating_point()), sums, "a table of numbers")
    optimizer = checkpoint["optimizer"]
    _expect("optimizer", isinstance(optimizer, dict) and isinstance(optimizer.get("state"), dict), optimizer, "the state of an optimizer")
    _expect("scaler", isinstance(scaler, dict) and all(FINITE.allows(value) for value in scaler.values()), scaler, "a dict of numbers")
    for name in ("history", "speed"):
        rows = checkpoint[name]
        _expect(name, isinstance(rows, list) and all(isinstance(row, dict) and COUNT.allows(row.get("epoch")) for row in rows), rows,
                "a list of rows")


def _expect(name, fits, found, expected):
    if not fits:
        raise ValueError(f"{name} is {shown(found)}, not {expected}")


def check_tensors(state_dict):
    """ValueError unless it maps names to plain tensors of numbers that the file really holds.

    A tensor of a few bytes can claim any shape by repeating them.
    """
    if not isinstance(state_dict, dict):
        raise ValueError(f"its weights are {shown(state_dict)}, no state dict")
    for name, value in state_dict.items():
        plain = type(name) is str and torch.is_tensor(value) and value.layout == torch.strided and value.device.type == "cpu"
        if not plain or value.dtype not in NUMBERS or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{shown(name)} in its weights is no tensor of plain numbers")


class Kind(NamedTuple):
    """What a value may be: of type `kind`, from `lowest` to `highest`; `count` such values in a tuple; or one of `words`."""

    kind: type
    lowest: float | None = None
    highest: float | None = None
    count: range | None = None
    words: tuple = ()

    def allows(self, value):
        if self.words and isinstance(value, str) and value in self.words:
            return True
        if self.count is not None:
            return type(value) is tuple and len(value) in self.count and all(self._replace(count=None).allows(item) for item in value)
        fits = type(value) is self.kind or (self.kind is float and type(value) is int)
        return fits and (self.lowest is None or self.lowest <= value <= self.highest)

    def __str__(self):
        noun = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}[self.kind]
        span = "" if self.lowest is None else f" from {self.lowest} to {self.highest}"
        several = "" if self.count is None else f", {self.count[0]}{' or more' * (len(self.count) > 1)} of them"
        return f"{noun}{span}{several}{''.join(f' or {word}' for word in self.words)}"


MOST = 2**53  # no count of a run is larger, and a float holds each whole number up to it
COUNT, FINITE = Kind(int, 0, MOST), Kind(float, -1e300, 1e300)
NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64)
TRAINING = ("optimizer", "scaler", "sums", "bad_in_row", "history", "speed")
# The settings of train.py that networks and pictures are made by; those of the training are checked where it is resumed.
SETTINGS = {
    "input_shape": Kind(int, 1, 2**14, range(2, 3)), "img_channels": Kind(int, 1, MOST), "channel": Kind(int, 1, MOST),
    "channel_mults": Kind(int, 1, MOST, range(1, 33)), "num_res_blocks": Kind(int, 0, MOST),
    "attention_resolutions": Kind(int, 0, 31, range(33)), "num_groups": Kind(int, 1, MOST, words=("auto",)),
    "dropout": Kind(float, 0, 1), "activation_checkpointing": Kind(bool), "class_conditional": Kind(bool),
    "label_dropout": Kind(float, 0, 1), "schedule": Kind(str), "num_timesteps": Kind(int, 1, MOST),
    "schedule_low": Kind(float, 0, 1e6), "schedule_high": Kind(float, 0, 1e6), "prediction": Kind(str), "loss_type": Kind(str),
    "loss_weighting": Kind(str), "min_snr_gamma": Kind(float, 0, 1e6), "ema_decay": Kind(float, 0, 1), "ema_start": COUNT,
    "ema_warmup": Kind(bool), "resize_mode": Kind(str), "background": Kind(int, 0, 255, range(3, 4)), "val_split": Kind(float, 0, 1),
}  # fmt: skip


def first_not_finite(state_dict):
    """The name of the first floating-point tensor in it that holds NaN or infinity; None without any."""
    return next((name for name, value in state_dict.items() if value.is_floating_point() and not value.isfinite().all()), None)


def all_finite(state_dict):
    """Whether every floating-point tensor in it is free of NaN and infinity: nothing else is ever saved."""
    return first_not_finite(state_dict) is None


def rotate(folder, keep):
    """Delete all but the newest `keep` epoch files of a run (0 keeps all)."""
    for path in epoch_files(folder)[:-keep] if keep else []:
        path.unlink(missing_ok=True)


def epoch_files(folder):
    """The epoch_XXXX.pth of a run, oldest first."""
    found = [path for path in Path(folder).glob("epoch_*.pth") if EPOCH_FILE.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(EPOCH_FILE.fullmatch(path.name)[1]))


def runs(save_dir):
    """The newest weights of each run in it, newest first by time, then by name: `last.pth`, else the last epoch file."""
    found = [weights for folder in Path(save_dir).glob("*/") if (weights := _newest_in(folder))]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, str(path)), reverse=True)


def newest_last(save_dir):
    """The `last.pth` of the newest run that has one, and what it holds; (None, None) without any.

    ValueError where it cannot be read: to go on with an older run would be a surprise, and write into it.
    """
    path = next((path for path in runs(save_dir) if path.name == LAST), None)
    if path is None:
        return None, None
    try:
        return path, load_checkpoint(path)
    except ValueError as error:
        older = epoch_files(path.parent)
        instead = f"go on from {older[-1]} with --resume, or" if older else "it has no epoch file to go on from:"
        raise ValueError(f"{error}; this is the newest run: {instead} name another run's folder, or move {path.parent} away") from None


def find_weights(path, save_dir="logs"):
    """(file, remark) of the weights to draw with: `path`, a run's folder or a file, or for "" the newest run's.

    Without any run the weights that come with the project are taken. ValueError where there are none
    at all, and for a folder of diffusers.
    """
    if path:
        folder = Path(path)
        return (weights_in(folder), "") if folder.is_dir() else (folder, "")
    found = runs(save_dir)
    if found:
        return found[0], ", the newest run's"
    shipped = next(iter(sorted(Path(save_dir).glob("*.pth"))), None)
    if shipped:
        return shipped, ", which come with this project: your own run's go first once there is one"
    raise ValueError(f"{Path(save_dir).resolve()} holds no weights: run `python train.py` first, or name a checkpoint with --model_path")


def weights_in(folder):
    """The newest weights of a run's folder: `last.pth` where there are none. ValueError for a folder of diffusers."""
    found = _newest_in(folder)
    whole = folder.parent if folder.name == "unet" else folder
    if found is None and ((whole / "model_index.json").is_file() or (whole / "unet").is_dir()):
        raise ValueError(f"{whole}: a folder of diffusers; make a checkpoint of it: python -m utils.convert import {whole} FILE.pth")
    return found or folder / LAST


def _newest_in(folder):
    last = folder / LAST
    return last if last.is_file() else next(iter(epoch_files(folder)[::-1]), None)


def weights_digest(state_dict):
    """A short digest of all values of a network: it tells whose picture a picture is."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in state_dict.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().data if value.ndim else str(value.item()).encode())
    return digest.hexdigest()
