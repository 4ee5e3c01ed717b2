"""Sets of images to compare: a folder, a list (train_lines.txt) or an .npz of other evaluators."""

import hashlib
import zipfile
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from utils.data.annotation import Annotation, read_annotation
from utils.data.dataset import ImageDataset, open_dataset
from utils.data.decode import attempt, check_image
from utils.data.formats import open_image
from utils.data.search import find_samples, label_by_folder
from utils.data.threads import map_in_threads
from utils.errors import UserError, one_line
from utils.terminal import plural, printable

MAX_RATIO, ALWAYS_ALLOWED = 20, 2**26  # an .npz that unpacks to more than both may be made to fill the disk


def scan_sizes(path):
    """(Counter of (height, width), whether an image has color) of a folder, list or .npz."""
    path = Path(path)
    if path.suffix.lower() == ".npz":
        count, height, width, channels = _read_npz(path).shape
        return Counter({(height, width): count}), channels == 3
    paths = find_samples(path) if path.is_dir() else read_annotation(path).paths
    headers = map_in_threads(lambda path: attempt(_header, path), paths, description="sizes")
    found = [header for header, _ in headers if header]
    if not found:
        raise UserError(f"no image of {printable(path)} can be decoded")
    return Counter(size for size, _ in found), any(has_color for _, has_color in found)


def _header(path):
    """((height, width), whether it has color) of an image."""
    with open_image(path, whole=False) as image:
        return check_image(path, full=False)[::-1], Image.getmodebase(image.mode) != "L"


def open_images(path, image_format, cache_path=None, condition=""):
    """The ImageDataset of a folder (whose folders are classes), a list or an .npz of this size."""
    path = Path(path)
    if path.suffix.lower() == ".npz":
        if condition == "pairs":
            raise UserError(f"{path}: an .npz holds no pairs: name a folder or an annotation file")
        return _open_npz(path, (*image_format.input_shape, image_format.img_channels))
    paths = find_samples(path) if path.is_dir() else []
    annotation = Annotation(paths, *label_by_folder(paths)) if paths else None
    return open_dataset(path, image_format, cache_path=cache_path, condition=condition, annotation=annotation)


def different_images(dataset):
    """The ImageDataset without duplicates: of images with the same pixels the first stays."""
    firsts = {}
    for number, image in enumerate(image for block in dataset.blocks() for image in block):
        firsts.setdefault(_pixel_hash(image.numpy()), number)
    if len(firsts) < 3:  # an image among them has a nearest and a second nearest one
        found = f"{plural(len(firsts), 'different image')} in {dataset.name}"
        raise UserError(f"the search for copies needs 3, not {found}: add images, or --nearest False")
    return dataset.subset(list(firsts.values()))


def _pixel_hash(pixels):
    return hashlib.blake2b(pixels.tobytes(), digest_size=16).hexdigest()


def _open_npz(path, shape):
    pixels = _read_npz(path)
    if pixels.shape[1:] not in (shape, (*shape[:2], 1)):
        raise UserError(f"{path} holds images of {pixels.shape[1:]}, not {shape}, and they are taken as they are")
    pixels = np.broadcast_to(pixels, (len(pixels), *shape))  # gray ones as color
    hashes = list(map(_pixel_hash, pixels))
    name, labels = printable(path.resolve()), torch.zeros(len(pixels), dtype=torch.int64)
    return ImageDataset(name, pixels, hashes, labels, [], [f"{name}[{i}]" for i in range(len(pixels))])


def _read_npz(path):
    """arr_0, uint8 (N, H, W, 1 or 3), unpacked and mapped (Windows keeps open files)."""
    try:
        with zipfile.ZipFile(path) as archive, TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            if {"mu.npy", "sigma.npy"} <= set(archive.namelist()):
                raise UserError("it holds mu and sigma, the statistics of features: name the images themselves")
            if archive.getinfo("arr_0.npy").file_size > max(MAX_RATIO * path.stat().st_size, ALWAYS_ALLOWED):
                raise UserError(f"packed by more than {MAX_RATIO} to 1: save it without compression, by numpy.savez")
            pixels = np.load(archive.extract("arr_0.npy", folder), mmap_mode="r", allow_pickle=False)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] not in (1, 3) or not pixels.size:
            raise UserError(f"it must be uint8 (N, H, W, 1 or 3), not {pixels.dtype} {pixels.shape}")
    except Exception as error:  # zipfile and numpy raise all kinds
        raise UserError(f"{path}: no .npz with images as arr_0 ({one_line(error, 200)})") from None
    return np.asarray(pixels)
