"""The list of images -> a uint8 cache on disk -> batches on the device."""
import contextlib
import hashlib
import io
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from utils.annotation import RUN_AGAIN, printable, read_annotation
from utils.atomic import atomic_write
from utils.images import check_picture_settings, describe_error, load_image
from utils.parallel import map_in_threads

CACHE_VERSION = 1   # part of the key: raise it when load_image gives other pixels or the files change their form
CACHES_KEPT = 4     # the most recently used ones in a folder
NAMES_SHOWN = 10    # files named in a message about many
PROJECT = Path(__file__).resolve().parent.parent


def open_dataset(annotation_path, input_shape, img_channels=3, resize_mode="crop", background=(255, 255, 255), num_workers=0,
                 cache_path=None):
    """The listed images, decoded once into a cache on disk -> ImageDataset.

    The cache is used again while the files' paths, sizes and times and the settings are the same. Files that cannot be
    decoded are named and left out.

    Args:
        annotation_path: the list that txt_annotation.py writes.
        input_shape, img_channels, resize_mode, background: as in `utils.images.load_image`.
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
                "background": tuple(map(int, background))}
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


def _file_stats(paths):
    """(path, size, time, mode) of each file. ValueError if any is gone."""
    stats, gone = [], []
    for path in paths:
        try:
            stat = os.stat(path)
            stats.append((path, stat.st_size, stat.st_mtime_ns, stat.st_mode))  # the mode: a file made readable is tried again
        except OSError:
            gone.append(path)
    if gone:
        raise ValueError(f"{len(gone)} of {len(paths)} listed images are gone: {_some(gone)}; {RUN_AGAIN}")
    return stats


def _some(names):
    shown = ", ".join(printable(name) for name in names[:NAMES_SHOWN])
    return shown + (f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else "")


def _cache_key(settings, stats):
    """A name for the pixels that these settings make of these files."""
    digest = hashlib.sha256(json.dumps([CACHE_VERSION, settings], sort_keys=True).encode())
    for stat in stats:
        digest.update(repr(stat).encode())
    return digest.hexdigest()[:24]


def cache_folders(annotation_path):
    """Where caches may be, best first."""
    beside = Path(annotation_path).absolute().parent / "datasets"
    local = (beside if beside.is_dir() else PROJECT / "datasets") / ".cache"
    user = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    return [local, Path(user or os.path.expanduser("~/.cache")) / "ddpm-pytorch"]


def writable_folder(folders):
    """The first folder that a file can be made in. OSError naming all of them where none is."""
    reasons = []
    for folder in folders:
        try:
            with atomic_write(folder / ".writable"):
                pass
            (folder / ".writable").unlink(missing_ok=True)
            return folder
        except OSError as error:
            reasons.append(f"{printable(folder)} ({error.strerror})")
    raise OSError(f"the cache of decoded images can be written nowhere: {', '.join(reasons)}; make one of these folders writable")


def _cache_files(folder, key):
    return folder / f"{key}.pixels", folder / f"{key}.json"


def _open_cache(folder, key, num_listed):
    """(pixels, index) if there is a whole cache of that key in the folder, else None."""
    pixels_path, index_path = _cache_files(folder, key)
    try:
        index = json.loads(index_path.read_text("utf-8"))
        shape = tuple(index["shape"])
        whole = (shape[0] + len(index["bad"]) == num_listed and len(index["hashes"]) == shape[0]
                 and pixels_path.stat().st_size == np.prod(shape, dtype=np.int64))
        pixels = np.memmap(pixels_path, dtype=np.uint8, mode="r", shape=shape) if whole else None
    except (OSError, ValueError, KeyError, TypeError, IndexError):  # none, or damaged: it is built (again)
        return None
    if pixels is None:
        return None
    with contextlib.suppress(OSError):
        os.utime(index_path)  # the time of its last use, for pruning
    return np.asarray(pixels), index  # a plain view: the memmap class makes each gather slower


def _build_cache(folder, key, paths, settings, num_workers):
    """Decode all files into the cache: the pixels first, row after row, the index that makes them valid last."""
    pixels_path, index_path = _cache_files(folder, key)
    shape = (*settings["input_shape"], settings["img_channels"])
    print(f"decoding {len(paths)} images to {shape[0]}x{shape[1]} (height x width), {np.prod(shape) * len(paths) / 1e6:.1f} MB: "
          f"{printable(pixels_path.absolute())}")
    hashes, bad = [], []
    try:
        with atomic_write(pixels_path) as file:
            for row, (pixels, note) in enumerate(map_in_threads(lambda path: _decode(path, settings), paths, num_workers, "decoding")):
                if pixels is None:
                    bad.append((row, note))
                else:
                    file.write(pixels)
                    hashes.append(note)
            if not hashes:
                _report_bad(paths, bad)
                raise ValueError(f"none of the {len(paths)} listed images can be decoded: put whole images into datasets/ and {RUN_AGAIN}")
        with atomic_write(index_path, "w", encoding="utf-8") as file:
            json.dump({"shape": [len(hashes), *shape], "hashes": hashes, "bad": bad}, file)
    except OSError as error:
        raise OSError(f"the cache of decoded images could not be written ({error.strerror or error}): {printable(pixels_path.absolute())} "
                      f"needs {np.prod(shape) * len(paths) / 1e6:.0f} MB; free some space, or lower input_shape") from error


def _decode(path, settings):
    """(pixels, hash of the file's content), or (None, reason) for a bad file."""
    try:
        content = Path(path).read_bytes()  # once, for both
        pixels = load_image(io.BytesIO(content), **settings)
        return pixels, hashlib.blake2b(content, digest_size=16).hexdigest()
    except Exception as error:  # Pillow's decoders raise all kinds
        return None, describe_error(error)


def _report_bad(paths, bad):
    if not bad:
        return
    print(f"left out {len(bad)} of {len(paths)} listed images, which cannot be decoded: "
          + _some([f"{paths[row]} ({reason})" for row, reason in bad]))


def _prune(folder, key):
    """Delete the caches used longest ago, and what interrupted builds have left; none of the last hour's, which may be in use."""
    def last_use(path):
        return path.stat().st_mtime

    with contextlib.suppress(OSError):  # another process prunes too
        keep = {key, *(path.stem for path in sorted(folder.glob("*.json"), key=last_use)[-CACHES_KEPT:])}
        for path in [*folder.glob("*.json"), *folder.glob("*.pixels"), *folder.glob(".*.tmp")]:
            newest_use = max(last_use(part) for part in (path, path.with_suffix(".json")) if part.exists())
            if path.name.split(".")[0] not in keep and time.time() - newest_use > 3600:
                path.unlink(missing_ok=True)
