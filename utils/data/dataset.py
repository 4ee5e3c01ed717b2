"""The list of images -> a uint8 cache on disk -> batches on the device."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from utils.data.annotation import read_annotation
from utils.data.cache import _build_cache, _cache_key, _file_stats, _open_cache, _prune, _report_bad, cache_folders, writable_folder
from utils.data.decode import check_picture_settings


def open_dataset(annotation_path, input_shape, img_channels=3, resize_mode="crop", background=(255, 255, 255), num_workers=0,
                 cache_path=None, icc=True):
    """The listed images, decoded once into a cache on disk -> ImageDataset.

    The cache is used again while the files' paths, sizes and times and the settings are the same. Files that cannot be
    decoded are named and left out.

    Args:
        annotation_path: the list that txt_annotation.py writes.
        input_shape, img_channels, resize_mode, background, icc: as in `utils.data.decode.load_image`.
        num_workers: threads that decode; 0 = all cores.
        cache_path: folder of the cache. None: `.cache` in the datasets folder beside the list or else of the project, and
            where that cannot be written the user's cache folder.
    Raises:
        ValueError: no list, a malformed one, listed files that are gone, none that can be decoded, unknown settings.
        OSError: the cache cannot be written.
    """
    check_picture_settings(input_shape, img_channels, resize_mode, background)
    annotation = read_annotation(annotation_path)
    settings = {"input_shape": tuple(map(int, input_shape)), "img_channels": img_channels, "resize_mode": resize_mode,
                "background": tuple(map(int, background)), "icc": bool(icc)}
    key = _cache_key(settings, _file_stats(annotation.paths))
    folders = [Path(cache_path)] if cache_path else cache_folders(annotation_path)
    cache = next(filter(None, (_open_cache(folder, key, len(annotation.paths)) for folder in folders)), None)
    if cache is None:
        folder = writable_folder(folders)
        _build_cache(folder, key, annotation.paths, settings, num_workers)
        _prune(folder, key)
        cache = _open_cache(folder, key, len(annotation.paths))
    pixels, index = cache
    _report_bad(annotation.paths, index["bad"])
    return ImageDataset(pixels, index["hashes"], annotation, {row for row, _ in index["bad"]})


class ImageDataset(Dataset):
    """Images as uint8 pixels in a memory-mapped file, gathered a batch at a time.

    Attributes:
        paths: the file of each image.
        hashes: a hash of each file's content, as hex digits.
        labels: int64 tensor (N,), the class ids; zeros where the list has none.
        classes: the class names by id; empty where the list has none.
    """

    def __init__(self, pixels, hashes, annotation, left_out=()):
        kept = [row for row in range(len(annotation.paths)) if row not in left_out]
        self.pixels = pixels  # (N, H, W, C) uint8
        self.hashes = hashes
        self.paths = [annotation.paths[row] for row in kept]
        self.labels = torch.tensor([annotation.labels[row] if annotation.labels else 0 for row in kept], dtype=torch.int64)
        self.classes = list(annotation.classes)
        assert len(self.pixels) == len(self.hashes) == len(self.paths)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        """One image (H, W, C) uint8 and its label, ()."""
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices):
        """A batch in one gather: images (B, H, W, C) uint8 and labels (B,) int64."""
        rows = np.asarray(indices, dtype=np.int64)
        return torch.from_numpy(self.pixels[rows]), self.labels[torch.from_numpy(rows)]


class EpochBatches:
    """The batches of one epoch, as arrays of dataset indices: a batch sampler.

    The order is a function of (seed, epoch) alone. The last batch, if it is not full, is left out.

    Args:
        images: how many images there are, or an array of the indices that take part.
        batch_size: images of the whole batch, over all ranks.
        start: images of this epoch that are consumed already, a multiple of batch_size.
        rank, world_size: each rank gets its contiguous slice of every whole batch.
    """

    def __init__(self, images, batch_size, seed, epoch, start=0, rank=0, world_size=1):
        assert batch_size % world_size == 0 and start % batch_size == 0, (batch_size, world_size, start)
        indices = np.arange(images) if np.ndim(images) == 0 else np.asarray(images, dtype=np.int64)
        generator = np.random.default_rng([seed % 2**64, epoch])
        order = indices[generator.permutation(len(indices))]
        whole = order[:len(order) // batch_size * batch_size].reshape(-1, batch_size)[start // batch_size:]
        share = batch_size // world_size
        self.batches = whole[:, rank * share:(rank + 1) * share]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def data_loader(dataset, batches, pin_memory=False):
    """A DataLoader of whole batches (images, labels). In this process: a gather is cheaper than a queue between two."""
    return DataLoader(dataset, batch_sampler=batches, collate_fn=_identity, num_workers=0, pin_memory=pin_memory)


def _identity(batch):
    return batch


def effective_batch_size(num_images, batch_size, multiple=1):
    """The batch size to train with: `batch_size`, or less where there are fewer images; prints so.

    `multiple` (processes x accumulate) divides it. ValueError, naming what would do, where that cannot be.
    """
    if batch_size < multiple or batch_size % multiple:
        lower, upper = batch_size // multiple * multiple, (max(batch_size, 0) // multiple + 1) * multiple
        nearest = f"{lower} or {upper}" if lower > 0 else f"{upper}"
        raise ValueError(f"batch_size {batch_size} is no positive multiple of {multiple} (processes x accumulate): use {nearest}")
    if num_images < multiple:
        raise ValueError(f"{num_images} images are too few for batches of at least {multiple} (processes x accumulate): "
                         f"lower accumulate or the number of processes, or add images")
    shrunk = min(batch_size, num_images // multiple * multiple)
    if shrunk < batch_size:
        print(f"batch_size is {shrunk}, not {batch_size}: there are {num_images} images")
    return shrunk


def normalise(images, device, flip=None, memory_format=torch.contiguous_format):
    """Pixels -> what the network sees, on the device: uint8 (B, H, W, C) -> float32 (B, C, H, W) in [-1, 1].

    `flip`, (B,) bool, says which images are mirrored left to right. The bytes are copied first, a quarter of the floats.
    """
    pixels = images.to(device, non_blocking=True)
    if flip is not None:
        pixels = torch.where(flip.to(device, non_blocking=True)[:, None, None, None], pixels.flip(2), pixels)
    batch, height, width, channels = pixels.shape
    # A tensor of its own: .to() and .contiguous() keep odd strides where a side or the channels are 1.
    x = torch.empty((batch, channels, height, width), device=device, memory_format=memory_format)
    return x.copy_(pixels.permute(0, 3, 1, 2)).div_(127.5).sub_(1)


def split_validation(hashes, share):
    """(training rows, validation rows) as int64 tensors. A picture's side depends on its content alone, so it never
    changes: not when the list grows, not when files are renamed, and copies of a picture stay together.

    Args: hashes: a hex digest an image. share: of the images that are kept aside, 0 <= share < 1.
    Raises ValueError where a share was asked for and no picture falls on one of the sides.
    """
    aside = torch.tensor([int(digest[:8], 16) < share * 2**32 for digest in hashes], dtype=torch.bool)
    rows = torch.arange(len(hashes))
    if share and (aside.all() or not aside.any()):
        raise ValueError(f"val_split {share} of {len(hashes)} pictures leaves one side empty: choose another share, or 0")
    return rows[~aside], rows[aside]


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
