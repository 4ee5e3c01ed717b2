"""Files of torch.save: written whole, read without running code, compared with their checksums."""

import errno
import hashlib
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from utils.errors import UserError, is_out_of_memory, one_line
from utils.files import atomic_write
from utils.settings import shown

NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64)
TEXTS = {  # how a text file in place of weights begins -> what it is, and what to do
    b"version https://git-lfs": "the pointer that git-lfs leaves in place of the weights: run `git lfs pull`",
    b"<": "a web page instead of the weights: download the file itself, not the page that shows it",
}
SAFETENSORS = b'\0\0{"'  # the end of the length of its JSON, in 8 bytes, and the beginning


def save_tensors(path: Path, values: dict) -> None:
    """Writes plain types and tensors, whole or not at all. OSError: the disk refuses."""
    with atomic_write(path) as file:
        try:
            torch.save(values, file)
        except RuntimeError as error:  # how PyTorch's writer reports a full disk, behind its OSError
            raise OSError(f"{path}: could not be written ({one_line(error)})") from error


def load_tensors(path: Path, lazily: bool = False, what: str = "PyTorch checkpoint") -> Any:
    """Tensors and plain values of a file, on the CPU.

    It compares all checksums, also where it maps them `lazily`. UserError: damaged, or no `what`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such {what}")
    with open(path, "rb") as file:
        start = file.read(512)
    for beginning, kind in TEXTS.items():
        if start.lstrip().startswith(beginning):
            raise UserError(f"{path}: a text file, {kind}")
    if start[6:10] == SAFETENSORS:
        convert = f"torch.save(safetensors.torch.load_file({path.name!r}), 'weights.pth')"
        raise UserError(f"{path}: of safetensors, no {what}: {convert} in Python converts it")
    try:
        if zipped := zipfile.is_zipfile(path):
            compare_checksums(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=lazily and zipped)
    except Exception as error:  # the unpickler raises all kinds on a file of something else
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # of the system: it may pass
            error.filename = error.filename or str(path)
            raise
        if is_out_of_memory(error):
            raise
        reason = one_line(error)
        if isinstance(error, pickle.UnpicklingError):
            if zipped or start.startswith(pickle.PROTO):
                unsafe = "not tensors and plain values only: loading it could run code hidden in it"
                raise UserError(f"{path}: {unsafe}") from None
            reason = f"it begins with {start[:8]!r}"  # the unpickler's own words are long, and advise to trust the file
        raise UserError(f"{path}: damaged, or no {what} ({reason})") from None


def compare_checksums(path: Path) -> None:
    """Reads every part of a zip file. UserError where one is not what was written."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        compressed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)  # never by PyTorch: it maps bytes
        if compressed or len({part.filename for part in parts}) < len(parts):
            raise UserError("its parts are compressed, or two have one name")
        if (damaged := archive.testzip()) is not None:
            raise UserError(f"{damaged} is not what was written")


def check_plain(value: Any, name: str) -> None:
    """UserError unless a value is made of plain values and tensors that its file really holds."""
    if torch.is_tensor(value):  # one of a few bytes can claim any shape by repeating them
        plain = value.layout == torch.strided and value.device.type == "cpu" and value.dtype in (*NUMBERS, torch.bool)
        if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"{shown(name)} is no tensor of plain numbers")
    elif isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            check_plain(item, f"{name}.{key}")
    elif not isinstance(value, (str, int, float, type(None))):
        raise UserError(f"{shown(name)} is {shown(value)}, no plain value")


def check_tensors(state_dict: Any) -> None:
    """UserError unless it maps names to plain tensors of numbers that the file really holds."""
    if not isinstance(state_dict, dict):
        raise UserError(f"its weights are {shown(state_dict)}, no state dict")
    for name, value in state_dict.items():
        if type(name) is not str or not torch.is_tensor(value) or value.dtype not in NUMBERS:
            raise UserError(f"{shown(name)} in its weights is no tensor of plain numbers")
    check_plain(state_dict, "weights")


def first_not_finite(state_dict: dict) -> str | None:
    """The name of the first floating-point tensor that holds NaN or infinity; None without any."""
    floats = ((name, value) for name, value in state_dict.items() if value.is_floating_point())
    return next((name for name, value in floats if not value.isfinite().all()), None)


def weights_digest(state_dict: dict) -> str:
    """A short digest of all values of a network. It names the network in files of its images."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in state_dict.items():
        digest.update(name.encode())
        value = value.detach().cpu()
        digest.update(value.flatten().view(torch.uint8).numpy().data if value.ndim else str(value.item()).encode())
    return digest.hexdigest()
