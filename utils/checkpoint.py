"""Checkpoints: one file of plain types and tensors, written whole or not at all, read without running any code in it."""

import hashlib
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch

from utils.files import atomic_write

FORMAT = 1
LAST = "last.pth"
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

    Returns a dict with at least `weights` (a state dict), `weights_kind` ("full" or "ema"), `config` (a dict, empty for
    a bare state dict) and `classes` (a list of names), all on the CPU. `lazily` maps the file, so that what is never
    used (the optimizer's state, when drawing) is never read. Raises ValueError for what is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such checkpoint")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # the error says it
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=lazily and zipfile.is_zipfile(path))
    except OSError:
        raise
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: not a file of tensors and plain values only; it is refused, as loading it could run code hidden in it"
        ) from None
    except Exception as error:  # the unpickler raises all kinds on a file of something else
        raise ValueError(f"{path}: damaged, or no PyTorch checkpoint ({_first_line(error)})") from None
    return _understand(loaded, path)


def _first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def _understand(loaded, path):
    if isinstance(loaded, dict) and isinstance(loaded.get("weights"), dict):
        if loaded.get("format", FORMAT) > FORMAT:
            raise ValueError(f"{path}: written by a newer version of this project; update yours to read it")
        return {"weights_kind": "full", "config": {}, "classes": [], **loaded}
    if isinstance(loaded, dict) and loaded and all(torch.is_tensor(value) for value in loaded.values()):
        return {"weights": loaded, "weights_kind": "full", "config": {}, "classes": []}
    found = ", ".join(map(str, list(loaded)[:5])) if isinstance(loaded, dict) else type(loaded).__name__
    raise ValueError(f"{path}: neither a checkpoint of this project nor a state dict (it holds: {found})")


def all_finite(state_dict):
    """Whether every floating-point tensor in it is free of NaN and infinity: nothing else is ever saved."""
    return all(bool(value.isfinite().all()) for value in state_dict.values() if value.is_floating_point())


def rotate(folder, keep):
    """Delete all but the newest `keep` epoch files of a run (0 keeps all)."""
    for path in epoch_files(folder)[:-keep] if keep else []:
        path.unlink(missing_ok=True)


def epoch_files(folder):
    """The epoch_XXXX.pth of a run, oldest first."""
    found = [path for path in Path(folder).glob("epoch_*.pth") if EPOCH_FILE.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(EPOCH_FILE.fullmatch(path.name)[1]))


def newest_last(save_dir):
    """The `last.pth` of the newest run that has a readable one, and what it holds; (None, None) without any."""
    for path in sorted(Path(save_dir).glob(f"*/{LAST}"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            return path, load_checkpoint(path)
        except (ValueError, OSError) as error:
            print(f"left out: {error}")
    return None, None


def find_weights(path, save_dir="logs"):
    """(file, remark) of the weights to draw with: `path`, a run's folder or a file, or for "" the newest run's.

    Without any run the weights that come with the project are taken. ValueError where there are none at all.
    """
    if path:
        folder = Path(path)
        return (_newest_in(folder) or folder / LAST, "") if folder.is_dir() else (folder, "")
    runs = [found for folder in Path(save_dir).glob("*/") if (found := _newest_in(folder))]
    if runs:
        return max(runs, key=lambda found: (found.stat().st_mtime_ns, str(found))), ", the newest run's"
    shipped = next(iter(sorted(Path(save_dir).glob("*.pth"))), None)
    if shipped:
        return shipped, ", which come with this project: your own run's go first once there is one"
    raise ValueError(f"{Path(save_dir).resolve()} holds no weights: run `python train.py` first, or name a checkpoint with --model_path")


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
