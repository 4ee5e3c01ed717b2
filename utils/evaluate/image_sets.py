"""Sets of pictures to compare: a folder, a list (train_lines.txt) or an .npz as evaluators of the field exchange them."""

import hashlib
import os
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

import numpy as np
import torch

from utils.data.annotation import find_images, label_by_folder, printable, read_annotation, write_annotation
from utils.data.dataset import PictureSet, open_dataset
from utils.data.decode import check_image
from utils.data.formats import open_image


def natural_shape(path):
    """(H, W, C) of the first picture of a folder, list or .npz: grey ones have 1 channel. ValueError where there is none."""
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


def open_pictures(path, shape, resize_mode="crop", background=(255, 255, 255), cache_path=None, icc=True):
    """The PictureSet of a folder, a list or an .npz, as pixels of shape (H, W, C).

    Those of folders and lists are decoded into the cache of `utils.data.cache`; a folder of folders has them for classes. An .npz holds
    `arr_0`, uint8 (N, H, W, C), of this shape already. ValueError for what is none of these or holds no pictures.
    """
    path = Path(path)
    if path.suffix.lower() == ".npz":
        return _open_npz(path, tuple(shape))
    if not path.is_dir():
        dataset = open_dataset(path, shape[:2], shape[2], resize_mode, background, cache_path=cache_path, icc=icc)
    else:
        paths = _listed(path)
        with TemporaryDirectory() as folder:
            annotation = os.path.join(folder, "lines.txt")
            write_annotation(annotation, paths, *label_by_folder(paths))
            dataset = open_dataset(annotation, shape[:2], shape[2], resize_mode, background, cache_path=cache_path, icc=icc)
    settings = (resize_mode, tuple(background), icc)
    return PictureSet(printable(path.resolve()), dataset.pixels, dataset.hashes, dataset.labels, dataset.classes, dataset.paths, settings)


def _npz_shape(path):
    """The shape of arr_0. ValueError unless it is uint8 (N, H, W, 1 or 3), N above 0."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
            shape, fortran, dtype = _read_header(member)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: no .npz with pictures as arr_0 ({error})") from None
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] not in (1, 3) or not np.prod(shape):
        raise ValueError(f"{path}: arr_0 must be uint8 (N, H, W, 1 or 3), not {dtype} {shape}")
    return shape


def _read_header(member):
    version = np.lib.format.read_magic(member)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return reader(member)


def _open_npz(path, shape):
    """Its pixels are unpacked into a file without a name and mapped from there: numpy itself would hold all of them in memory."""
    count, *own = _npz_shape(path)
    if tuple(own) != shape:
        raise ValueError(f"{path} holds pictures of (height, width, channels) {tuple(own)}, to be compared at {shape}: "
                         "pictures of an .npz are taken as they are")
    size, hashes = int(np.prod(shape)), []
    with TemporaryFile() as file, zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
        _read_header(member)
        for number in range(count):
            picture = member.read(size)
            if len(picture) < size:
                raise ValueError(f"{path}: cut off after {number} of {count} pictures")
            hashes.append(hashlib.blake2b(picture, digest_size=16).hexdigest())
            file.write(picture)
        file.flush()
        pixels = np.asarray(np.memmap(file, dtype=np.uint8, mode="r", shape=(count, *shape)))
    paths = [f"{printable(path.resolve())}[{number}]" for number in range(count)]
    return PictureSet(printable(path.resolve()), pixels, hashes, torch.zeros(count, dtype=torch.int64), [], paths)
