"""Sets of images to compare: a folder, a list (train_lines.txt) or an .npz of other evaluators."""

import contextlib
import hashlib
import os
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from utils.data.annotation import read_annotation, write_annotation
from utils.data.dataset import ImageDataset, open_dataset
from utils.data.decode import check_image
from utils.data.formats import open_image
from utils.data.read_errors import is_about_the_file
from utils.data.search import find_images, label_by_folder
from utils.data.threads import map_in_threads
from utils.errors import UserError
from utils.terminal import printable

GREY = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes without colour


def survey(path):
    """(Counter of the (height, width), whether one has colour) of a folder, list or .npz.

    It reads the headers alone. Files that cannot be read are left out, as in decoding. ValueError
    where there is no image.
    """
    path = Path(path)
    if path.suffix.lower() == ".npz":
        count, height, width, channels = _npz_shape(path)
        return Counter({(height, width): count}), channels == 3
    found = [header for header in map_in_threads(_header, _listed(path), description="sizes") if header]
    if not found:
        raise UserError(f"no image of {printable(path)} can be decoded")
    return Counter(size for size, _ in found), any(colour for _, colour in found)


def _header(path):
    """((height, width), whether it has colour) of an image; None for a broken one."""
    try:
        width, height = check_image(path, full=False)
        with open_image(path, whole=False) as image:
            return (height, width), image.mode not in GREY
    except Exception as error:  # Pillow's decoders raise all kinds
        if not is_about_the_file(error):
            raise
        return None


def _listed(path):
    paths = find_images(path) if path.is_dir() else read_annotation(path).paths
    if not paths:
        raise UserError(f"{printable(path.resolve())} holds no pictures")
    return paths


def open_images(path, image_format, cache_path=None):
    """The ImageDataset of a folder, a list or an .npz in this ImageFormat.

    Folders and lists are decoded into the cache of `utils.data.cache`. The folders in a folder are
    its classes. An .npz holds `arr_0`, uint8 (N, H, W, C), of its shape already.
    ValueError for anything else, and where there is no image.
    """
    path = Path(path)
    if path.suffix.lower() == ".npz":
        return _open_npz(path, (*image_format.input_shape, image_format.img_channels))
    if not path.is_dir():
        return open_dataset(path, image_format, cache_path=cache_path)
    paths = _listed(path)
    with TemporaryDirectory() as folder:
        annotation = os.path.join(folder, "lines.txt")
        write_annotation(annotation, paths, *label_by_folder(paths))
        dataset = open_dataset(annotation, image_format, cache_path=cache_path)
        return replace(dataset, name=printable(path.resolve()))


@contextlib.contextmanager
def _open_archive(path):
    """Open an .npz as a ZipFile. ValueError where it is none, or the block finds damage in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except OSError:
        raise
    except Exception as error:  # zipfile and numpy's reader of headers raise all kinds
        raise UserError(f"{path}: no .npz with pictures as arr_0 ({error})") from None


def _npz_shape(path):
    """The shape of arr_0. ValueError unless it is uint8 (N, H, W, 1 or 3), N above 0."""
    with _open_archive(path) as archive, archive.open("arr_0.npy") as member:
        version = np.lib.format.read_magic(member)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = reader(member)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or not np.prod(shape):
        raise UserError(f"{path}: arr_0 must be uint8 (N, H, W, 1 or 3), not {dtype} {shape}")
    return shape


def _open_npz(path, shape):
    """The ImageDataset of an .npz, unpacked to the disk and mapped: numpy would fill the memory."""
    own = _npz_shape(path)[1:]
    if own not in (shape, (*shape[:2], 1)):
        raise UserError(
            f"{path} holds pictures of (height, width, channels) {own}, to be compared at {shape}: "
            "pictures of an .npz are taken as they are"
        )
    # Windows keeps open files
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder, _open_archive(path) as archive:
        unpacked = archive.extract("arr_0.npy", folder)
        pixels = np.asarray(np.load(unpacked, mmap_mode="r", allow_pickle=False))
    pixels = np.broadcast_to(pixels, (len(pixels), *shape))  # grey ones as colour
    hashes = [hashlib.blake2b(picture.tobytes(), digest_size=16).hexdigest() for picture in pixels]
    name, labels = printable(path.resolve()), torch.zeros(len(pixels), dtype=torch.int64)
    return ImageDataset(name, pixels, hashes, labels, [], [f"{name}[{number}]" for number in range(len(pixels))])
