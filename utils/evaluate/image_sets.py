"""Sets of images to compare: a folder, a list (train_lines.txt) or an .npz of other evaluators."""

import contextlib
import hashlib
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from utils.data.annotation import read_annotation, write_annotation
from utils.data.dataset import ImageDataset, open_dataset
from utils.data.decode import check_image
from utils.data.formats import open_image
from utils.data.search import find_images, label_by_folder
from utils.terminal import printable


def natural_shape(path):
    """(H, W, C) of the first picture of a folder, list or .npz: grey ones have 1 channel.

    ValueError where there is none.
    """
    path = Path(path)
    if path.suffix.lower() == ".npz":
        return _npz_shape(path)[1:]
    first = _listed(path)[0]
    try:
        width, height = check_image(first, full=False)
        with open_image(first, whole=False) as image:
            return height, width, 1 if image.mode in ("1", "L") else 3
    except Exception as error:  # Pillow's decoders raise all kinds
        raise ValueError(f"{printable(first)}, the first picture of {printable(path)}, cannot be decoded ({error}): "
                         "name the size with --input_shape and --img_channels") from None


def _listed(path):
    paths = find_images(path) if path.is_dir() else read_annotation(path).paths
    if not paths:
        raise ValueError(f"{printable(path.resolve())} holds no pictures")
    return paths


def open_images(path, shape, resize_mode="crop", background=(255, 255, 255), cache_path=None, icc=True):
    """The ImageDataset of a folder, a list or an .npz, with pixels of shape (H, W, C).

    Folders and lists are decoded into the cache of `utils.data.cache`. The folders in a folder are
    its classes. An .npz holds `arr_0`, uint8 (N, H, W, C), of this shape already.
    ValueError for anything else, and where there is no image.
    """
    path = Path(path)
    if path.suffix.lower() == ".npz":
        return _open_npz(path, tuple(shape))
    if not path.is_dir():
        return open_dataset(path, shape[:2], shape[2], resize_mode, background, cache_path=cache_path, icc=icc)
    paths = _listed(path)
    with TemporaryDirectory() as folder:
        annotation = os.path.join(folder, "lines.txt")
        write_annotation(annotation, paths, *label_by_folder(paths))
        dataset = open_dataset(annotation, shape[:2], shape[2], resize_mode, background, cache_path=cache_path, icc=icc)
    return replace(dataset, name=printable(path.resolve()))


@contextlib.contextmanager
def _open_member(path):
    """Open arr_0.npy of an .npz for reading.

    ValueError where the file lacks it, or the block finds damage in it.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
            yield member
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except OSError:
        raise
    except Exception as error:  # zipfile and numpy's reader of headers raise all kinds
        raise ValueError(f"{path}: no .npz with pictures as arr_0 ({error})") from None


def _npz_shape(path):
    """The shape of arr_0. ValueError unless it is uint8 (N, H, W, 1 or 3), N above 0."""
    with _open_member(path) as member:
        version = np.lib.format.read_magic(member)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = reader(member)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or not np.prod(shape):
        raise ValueError(f"{path}: arr_0 must be uint8 (N, H, W, 1 or 3), not {dtype} {shape}")
    return shape


def _open_npz(path, shape):
    """The ImageDataset of an .npz.

    numpy would read a packed array into memory, so this unpacks it to the disk and maps it.
    """
    own = _npz_shape(path)[1:]
    if own != shape:
        raise ValueError(f"{path} holds pictures of (height, width, channels) {own}, to be compared at {shape}: "
                         "pictures of an .npz are taken as they are")
    # Windows keeps open files
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder, _open_member(path) as member:
        unpacked = os.path.join(folder, "arr_0.npy")
        with open(unpacked, "wb") as file:
            shutil.copyfileobj(member, file)
        pixels = np.asarray(np.load(unpacked, mmap_mode="r", allow_pickle=False))
    hashes = [hashlib.blake2b(picture.tobytes(), digest_size=16).hexdigest() for picture in pixels]
    paths = [f"{printable(path.resolve())}[{number}]" for number in range(len(pixels))]
    return ImageDataset(printable(path.resolve()), pixels, hashes, torch.zeros(len(pixels), dtype=torch.int64), [],
                        paths)
