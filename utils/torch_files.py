"""Reads every file that torch.save wrote. No code in it runs."""

import codecs
import pickle
import warnings
import zipfile
from pathlib import Path

import torch

from utils.errors import UserError

ZIP = b"PK\x03\x04"  # the first bytes of a file of PyTorch, since 1.6


def load_tensors(path, lazily=False, what="PyTorch checkpoint"):
    """Tensors and plain values of a file, on the CPU.

    It compares the checksums of the whole file, also `lazily`, which maps the tensors: 0.2 s for
    430 MB. Files older than PyTorch 1.6 have no checksums. what: the noun in messages.
    ValueError of one line for a damaged file or one of another kind; OSError from the system.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such {what}")
    with open(path, "rb") as file:
        start = file.read(512)
    if is_text(start):
        raise UserError(f"{path}: a text file, {kind_of_text(start) or f'no {what}'}")
    try:
        zipped = start.startswith(ZIP) or zipfile.is_zipfile(path)
        if zipped:
            compare_checksums(path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # the error says it
            return torch.load(path, map_location="cpu", weights_only=True, mmap=lazily and zipped)
    except (OSError, MemoryError):
        raise
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: not a file of tensors and plain values only; it is refused, as loading it could run "
            "code hidden in it"
        ) from None
    except Exception as error:  # the unpickler raises all kinds on a file of something else
        raise UserError(f"{path}: damaged, or no {what} ({first_line(error)})") from None


def compare_checksums(path):
    """Reads every part of a zip file. ValueError where one is not what was written."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if len(set(names)) < len(names):
            raise UserError("two of its parts have one name")
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise UserError("its parts are compressed")  # PyTorch compresses none, and maps the bytes
        if (damaged := archive.testzip()) is not None:
            raise UserError(f"{damaged} is not what was written")


def is_text(start):
    """Whether the first bytes of a file are text."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(start)  # the last character may be cut
    except UnicodeDecodeError:
        return False
    return bool(text.strip()) and all(ord(character) >= 32 or character.isspace() for character in text)


def kind_of_text(start):
    """What a text file in place of weights is, and what to do; "" for an unknown one."""
    start = start.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "the pointer that git-lfs leaves in place of the weights: run `git lfs pull`"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page instead of the weights: download the file itself, not the page that shows it"
    return ""


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
