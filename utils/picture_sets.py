"""Sets of pictures to compare: a folder, a list (train_lines.txt) or an .npz as evaluators of the field exchange them."""
import hashlib
import os
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

import numpy as np
import torch
from PIL import Image

from utils.annotation import find_images, label_by_folder, printable, read_annotation, write_annotation
from utils.dataset import open_dataset
from utils.images import FORMATS, check_image

BLOCK_BYTES = 2**23  # pixels that are worked on at once


@dataclass
class PictureSet:
    """Pictures on disk, read a block at a time.

    Attributes: name: for messages. pixels: (N, H, W, C) uint8 array, memory-mapped. hashes: one of the content of each picture.
    labels: int64 tensor (N,), zeros without classes. classes: their names, [] without. paths: of each picture, or its place in the .npz.
    settings: what shaped the pixels besides their files, for keys.
    """

    name: str
    pixels: np.ndarray
    hashes: list
    labels: torch.Tensor
    classes: list
    paths: list
    settings: tuple = ()
    rows: np.ndarray | None = None  # those of `pixels` that belong to the set; None: all

    def __len__(self):
        return len(self.hashes)

    @property
    def shape(self):
        """(H, W, C)."""
        return tuple(self.pixels.shape[1:])

    def take(self, numbers):
        """Pictures by their numbers, 0 to N - 1: (b, H, W, C) uint8 tensor."""
        numbers = np.asarray(numbers)
        return torch.from_numpy(self.pixels[numbers if self.rows is None else self.rows[numbers]])

    def blocks(self, numbers=None):
        """The pictures, or those of these numbers in their order, in blocks (b, H, W, C)."""
        numbers = np.arange(len(self)) if numbers is None else np.asarray(numbers)
        size = max(1, min(256, BLOCK_BYTES // int(np.prod(self.shape))))
        for start in range(0, len(numbers), size):
            yield self.take(numbers[start : start + size])

    def part(self, numbers, remark):
        """A set of some of the pictures; `remark` is added to its name."""
        numbers = np.asarray(numbers)
        rows = numbers if self.rows is None else self.rows[numbers]
        hashes, paths = ([values[i] for i in numbers] for values in (self.hashes, self.paths))
        return replace(self, name=self.name + remark, hashes=hashes, paths=paths, labels=self.labels[torch.from_numpy(numbers)], rows=rows)

    def shuffled(self, count, seed):
        """The numbers of `count` pictures (0: all) in random order: a folder's first ones may all be of one class."""
        order = np.random.default_rng(seed).permutation(len(self))
        return order[:count] if count else order

    def key(self):
        """Names the pixels of all pictures in their order, and their classes."""
        content = repr((self.shape, self.settings, self.classes, self.labels.tolist(), self.hashes))
        return hashlib.sha256(content.encode()).hexdigest()


def natural_shape(path):
    """(H, W, C) of the first picture of a folder, list or .npz: grey ones have 1 channel. ValueError where there is none."""
    path = Path(path)
    if path.suffix.lower() == ".npz":
        return _npz_shape(path)[1:]
    first = _listed(path)[0]
    try:
        width, height = check_image(first, full=False)
        with Image.open(first, formats=FORMATS) as image:
            return height, width, 1 if image.mode in ("1", "L") else 3
    except Exception as error:  # Pillow's decoders raise all kinds
        raise ValueError(f"{printable(first)}, the first picture of {printable(path)}, cannot be decoded ({error}): "
                         "name the size with --input_shape and --img_channels") from None


def _listed(path):
    paths = find_images(path) if path.is_dir() else read_annotation(path).paths
    if not paths:
        raise ValueError(f"{printable(path.resolve())} holds no pictures")
    return paths


def open_pictures(path, shape, resize_mode="crop", background=(255, 255, 255), cache_path=None):
    """The PictureSet of a folder, a list or an .npz, as pixels of shape (H, W, C).

    Those of folders and lists are decoded into the cache of `utils.dataset`; a folder of folders has them for classes. An .npz holds
    `arr_0`, uint8 (N, H, W, C), of this shape already. ValueError for what is none of these or holds no pictures.
    """
    path = Path(path)
    if path.suffix.lower() == ".npz":
        return _open_npz(path, tuple(shape))
    if not path.is_dir():
        dataset = open_dataset(path, shape[:2], shape[2], resize_mode, background, cache_path=cache_path)
    else:
        paths = _listed(path)
        with TemporaryDirectory() as folder:
            annotation = os.path.join(folder, "lines.txt")
            write_annotation(annotation, paths, *label_by_folder(paths))
            dataset = open_dataset(annotation, shape[:2], shape[2], resize_mode, background, cache_path=cache_path)
    settings = (resize_mode, tuple(background))
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
