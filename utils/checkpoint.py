"""Checkpoints: one file of plain types and tensors, whole or not there. Reading runs no code."""

from operator import itemgetter
from pathlib import Path

import torch

from utils.checkpoint_contents import check_contents, first_not_finite
from utils.errors import UserError
from utils.files import atomic_write
from utils.torch_files import first_line, load_tensors

FORMAT = 1
LAST = "last.pth"
BEST = "best.pth"  # of the lowest validation loss


class Checkpoint(dict):
    """What a file holds, with the names by which `nets` reads it."""

    weights, kind = property(itemgetter("weights")), property(itemgetter("weights_kind"))
    config, classes = property(itemgetter("config")), property(itemgetter("classes"))


def save_checkpoint(path, checkpoint):
    """Writes a dict of plain types and tensors. OSError where the disk is full or refuses."""
    with atomic_write(path) as file:
        try:
            torch.save(dict(checkpoint) if isinstance(checkpoint, Checkpoint) else checkpoint, file)
        except RuntimeError as error:
            # PyTorch's writer reports a full disk as a RuntimeError, behind its OSError.
            raise OSError(f"{path}: could not be written ({first_line(error)})") from error


def load_checkpoint(path, lazily=False):
    """A checkpoint of this project, or a bare state dict such as the reference saves, on the CPU.

    Returns a dict with `weights` (a state dict), `weights_kind` ("full" or "ema"), `config` (a
    dict, empty for a bare state dict), `classes` (names) and more, as `check_contents` asks for.
    lazily: maps the file, so that what is never used (the optimizer's state) takes no memory.
    ValueError for another file, a damaged one, and weights that hold NaN or infinity.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such checkpoint")
    checkpoint = as_checkpoint(load_tensors(path, lazily), path)
    try:
        check_contents(checkpoint)
    except ValueError as error:
        raise UserError(f"{path}: damaged, or edited: {error}") from None
    if (name := first_not_finite(checkpoint["weights"])) is not None:
        raise UserError(f"{path}: its weights hold NaN or infinity (the first is {name}): take an older checkpoint")
    return checkpoint


def as_checkpoint(loaded, path):
    """The dict of `load_checkpoint` from what a file holds."""
    if isinstance(loaded, dict) and loaded and all(torch.is_tensor(value) for value in loaded.values()):
        loaded = {"weights": loaded}
    if not isinstance(loaded, dict) or not isinstance(loaded.get("weights"), dict):
        found = ", ".join(map(str, list(loaded)[:5])) if isinstance(loaded, dict) else type(loaded).__name__
        raise UserError(f"{path}: neither a checkpoint of this project nor a state dict (it holds: {found})")
    written = loaded.get("format", FORMAT)
    if type(written) is not int or written > FORMAT:
        raise UserError(f"{path}: written by a newer version of this project; update yours to read it")
    return Checkpoint({"weights_kind": "full", "config": {}, "classes": [], **loaded})
