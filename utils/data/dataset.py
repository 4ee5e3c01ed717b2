"""The list of images -> a uint8 cache on disk -> batches on the device."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from utils.data.annotation import read_annotation
from utils.data.cache import open_cache
from utils.errors import UserError
from utils.terminal import plural, printable

BLOCK_BYTES = 2**23  # pixels in memory at once, where a measure reads a whole data set


def open_dataset(annotation_path, image_format, num_workers=0, cache_path=None, condition="", annotation=None):
    """The ImageDataset of a list. Arguments, errors: `open_cache`; UserError for a bad list.

    annotation: the list, where no file holds it; annotation_path then only names the images.
    """
    pairs, (height, width) = condition == "pairs", image_format.input_shape  # each image to the right of its condition
    image_format = image_format._replace(input_shape=(height, width * (1 + pairs)))
    annotation = annotation or read_annotation(annotation_path)
    pixels, index = open_cache(annotation_path, annotation.paths, image_format, cache_path, num_workers)
    pixels = pixels.reshape(len(pixels), height, 2, width, -1).swapaxes(2, 3) if pairs else pixels
    kept = np.delete(np.arange(len(annotation.paths)), [row for row, _ in index["bad"]])
    labels = torch.tensor([annotation.labels[row] if annotation.labels else 0 for row in kept], dtype=torch.int64)
    name, paths = printable(Path(annotation_path).resolve()), [annotation.paths[row] for row in kept]
    return ImageDataset(name, pixels, index["hashes"], labels, annotation.classes, paths, tuple(image_format[2:]))


@dataclass(eq=False)
class ImageDataset:
    """N images as uint8 pixels in a memory-mapped file, gathered a batch or a block at a time."""

    name: str  # for messages
    pixels: np.ndarray  # (M, H, W, C) uint8, memory-mapped; of pairs (M, H, W, 2, C)
    hashes: list  # hex digits for each image: a hash of its content
    labels: torch.Tensor  # (N,) int64, the class ids; zeros without classes
    classes: list  # the class names by id; [] without classes
    paths: list  # the file of each image, or its place in an .npz
    settings: tuple = ()  # what shaped the pixels besides the files; a part of the key
    rows: np.ndarray | None = None  # (N,) the row of `pixels` for each image; None: all rows in order

    def __post_init__(self):
        self.rows = np.arange(len(self.pixels)) if self.rows is None else self.rows

    def __len__(self):
        return len(self.hashes)

    def images(self, numbers):
        """Images by their numbers, 0 to N - 1, in one gather: (B, H, W, C) uint8 tensor."""
        return self.batch(numbers)[0][..., -self.pixels.shape[-1] :]

    def batch(self, numbers):
        """Images (B, H, W, C) uint8, labels (B,) int64. Pairs: 2 C, the condition's first."""
        numbers = np.asarray(numbers, dtype=np.int64)
        return torch.from_numpy(self.pixels[self.rows[numbers]]).flatten(3), self.labels[numbers]

    def batches(self, numbers, pin_memory=False):
        """Yields (images, labels) of each batch. pin_memory: in page-locked memory, for CUDA."""
        for batch in numbers:  # a gather here costs less than a queue between processes
            images, labels = self.batch(batch)
            yield (images.pin_memory(), labels.pin_memory()) if pin_memory else (images, labels)

    def blocks(self, numbers=None):
        """Yields all images, or those of these numbers, in order, in blocks (b, H, W, C) uint8."""
        numbers = np.arange(len(self)) if numbers is None else np.asarray(numbers)
        size = max(1, min(256, BLOCK_BYTES // int(np.prod(self.pixels.shape[1:]))))
        for start in range(0, len(numbers), size):
            yield self.images(numbers[start : start + size])

    def is_gray(self):
        """Whether the channels of all pixels are equal. The first block with a color answers."""
        return all(bool((block == block[..., :1]).all()) for block in self.blocks())

    def subset(self, numbers, remark=""):
        """The ImageDataset of these images, over the same pixels. Its name ends with `remark`."""
        hashes, paths = ([values[i] for i in numbers] for values in (self.hashes, self.paths))
        parts = {"hashes": hashes, "labels": self.labels[numbers], "paths": paths, "rows": self.rows[numbers]}
        return replace(self, name=self.name + remark, **parts)

    def shuffled(self, count, seed):
        """`count` numbers (0: all) in random order. A folder's first images may be of one class."""
        return np.random.default_rng(seed).permutation(len(self))[: count or None]

    def key(self):
        """A digest of all pixels in their order, and of the classes."""
        content = self.pixels.shape[1:], self.settings, self.classes, self.labels.tolist(), self.hashes
        return hashlib.sha256(repr(content).encode()).hexdigest()


def split_validation(dataset, share):
    """(training, validation) ImageDatasets: about this fraction of the images is for validation."""
    # By content: no image changes sides when the list grows, and copies of an image stay together.
    aside = np.array([int(digest[:8], 16) < share * 2**32 for digest in dataset.hashes], dtype=bool)
    if share and (aside.all() or not aside.any()):
        split = f"val_split {share} of {plural(len(dataset), 'image')}"
        raise UserError(f"{split} leaves one side empty: choose another, or 0")
    training = dataset.subset(np.flatnonzero(~aside), f", without val_split {share:g}") if share else dataset
    return training, dataset.subset(np.flatnonzero(aside), f", val_split {share:g}")


def epoch_batches(num_images, batch_size, seed, epoch, start=0, rank=0, world_size=1):
    """Image numbers of a rank's slice of each batch: (batches, batch_size / world_size).

    The order is a function of (seed, epoch). start: images of this epoch that earlier steps used.
    """
    assert batch_size % world_size == 0 and start % batch_size == 0, (batch_size, world_size, start)
    order = np.random.default_rng([seed % 2**64, epoch]).permutation(num_images)
    whole = order[: num_images // batch_size * batch_size].reshape(-1, batch_size)[start // batch_size :]
    return np.split(whole, world_size, axis=1)[rank]


def fit_batch_size(num_images, batch_size, multiple=1):
    """`batch_size`, or less for fewer images: a multiple of `multiple`, processes x accumulate."""
    if batch_size < multiple or batch_size % multiple:
        fit = max(multiple, batch_size // multiple * multiple)
        raise UserError(f"batch_size {batch_size} is no multiple of {multiple} (processes x accumulate): use {fit}")
    if num_images < multiple:
        have = f"the annotation file has {plural(num_images, 'image')}"
        raise UserError(f"{have}, too few for batches of {multiple} (processes x accumulate)")
    shrunk = min(batch_size, num_images // multiple * multiple)
    if shrunk < batch_size:
        print(f"batch_size is {shrunk}, not {batch_size}: the annotation file has {plural(num_images, 'image')}")
    return shrunk


def normalize(images, device, flip=None, memory_format=torch.contiguous_format):
    """uint8 (B, H, W, C) -> float32 (B, C, H, W) in [-1, 1]. flip: (B,) bool, what to mirror."""
    on_cuda = torch.device(device).type == "cuda"  # elsewhere a copy that is not waited for may be read too early
    pixels = images.to(device, non_blocking=on_cuda)  # bytes: a quarter of the memory of floats
    if flip is not None:
        pixels = torch.where(flip.to(device, non_blocking=on_cuda)[:, None, None, None], pixels.flip(2), pixels)
    batch, height, width, channels = pixels.shape
    # A new tensor: .to() and .contiguous() keep odd strides where a side or the channels are 1.
    x = torch.empty((batch, channels, height, width), device=device, memory_format=memory_format)
    return x.copy_(pixels.permute(0, 3, 1, 2)).div_(127.5).sub_(1)


def conditioned(diffusion, dataset, numbers, memory_format=torch.contiguous_format):
    """(images, conditions or None) by their numbers (n,), which seed the holes of masked ones."""
    x = normalize(dataset.batch(numbers)[0], diffusion.betas.device, memory_format=memory_format)
    seeds = numbers if diffusion.condition.kind == "masked" else []  # nothing else is random here
    noise = [torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    return diffusion.condition(x, torch.stack(noise).to(x.device) if noise else x)
