"""Checkpoints: one file of plain types and tensors, written whole or not at all, read without running any code in it."""

import codecs
import hashlib
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch

from utils.checkpoint_contents import check_contents
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
