"""The uint8 cache on disk: each listed image decoded once."""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import tempfile
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np

from utils.data.annotation import RUN_AGAIN
from utils.data.decode import attempt, is_damage, load_image
from utils.data.formats import FORMATS, check_regular
from utils.data.threads import map_in_threads, one_if_large
from utils.errors import UserError
from utils.files import PROJECT, atomic_write, read_json, remove_leftovers
from utils.terminal import first_few, plural

CACHE_VERSION = 4  # part of the key: raise it when load_image gives other pixels or the files change their form
CACHES_KEPT = 4  # the most recently used ones in a folder
OWN_NAME = re.compile(r"[0-9a-f]{24}\.(json|pixels)|\.[0-9a-f]{24}\.(json|pixels)\.[0-9a-f]{8}\.tmp")


def open_cache(annotation_path, paths, image_format, cache_path=None, num_workers=0):
    """(pixels, index) of these files in this ImageFormat, cached in `cache_folder`'s folder.

    pixels: (N, H, W, C) uint8, memory-mapped. index: a dict of shape, hashes, bad ([row, reason]).
    UserError for missing files or none that can be decoded, OSError where nothing can be written.
    """
    place = cache_folder(annotation_path, cache_path) / f"{_cache_key(image_format, paths)}.pixels"
    cache = _read_cache(place) or _build_cache(place, paths, image_format, num_workers)
    _prune(place)
    if bad := [f"{paths[row]} ({reason})" for row, reason in cache[1]["bad"]]:
        print(f"left out {len(bad)} of {len(paths)} listed images, which cannot be decoded: {first_few(bad, 10)}")
    return cache


def _cache_key(image_format, paths):
    """A name for these files in this format. UserError if any is gone."""
    gone = [path for path in paths if not os.path.exists(path)]
    if gone:
        raise UserError(f"{len(gone)} of {len(paths)} listed images are gone: {first_few(gone, 10)}; {RUN_AGAIN}")
    digest = hashlib.sha256(json.dumps([CACHE_VERSION, FORMATS, image_format._asdict()]).encode())
    for path, stat in zip(paths, map(os.stat, paths)):
        digest.update(repr((path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)).encode())
    return digest.hexdigest()[:24]


def cache_folder(annotation_path, cache_path=None):
    """`cache_path`, or the first folder that can be written to. OSError where none can."""
    beside, reasons = Path(annotation_path).absolute().parent / "datasets", []
    local = (beside if beside.is_dir() else PROJECT / "datasets") / ".cache"
    user = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    user = Path(user or os.path.expanduser("~/.cache")) / "ddpm-pytorch"
    own = [local, user] if user.is_absolute() else [local]  # without a home a ~ is left, which is no folder
    for folder in [Path(cache_path)] if cache_path else own:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            return folder
        except OSError as error:
            reasons.append(f"{folder} ({error.strerror})")
    raise OSError(f"no folder for the cache of decoded images: {', '.join(reasons)}; make one of these writable")


def _read_cache(pixels_path):
    """(pixels, index) of a whole cache, else None."""
    index_path = pixels_path.with_suffix(".json")
    try:
        index = read_json(index_path)
        if not pixels_path.is_file():  # opening a pipe would wait
            return None
        pixels = np.asarray(np.memmap(pixels_path, dtype=np.uint8, mode="r"))  # the memmap class gathers slower
        pixels, expected = pixels.reshape(index["shape"]), index.pop("checksum")
    except (OSError, ValueError, LookupError, TypeError):  # none, or damaged: build it (again)
        return None
    if expected != _checksum(pixels_path, index, zlib.crc32(pixels)):
        return None
    with contextlib.suppress(OSError):
        for path in (index_path, pixels_path):
            os.utime(path)  # the time of its last use, for pruning
    return pixels, index


def _checksum(pixels_path, index, of_pixels):
    """Of a cache's key, index and pixels: bits that flipped, or files of another key, show."""
    return zlib.crc32(json.dumps([pixels_path.stem, index]).encode(), of_pixels)


def _build_cache(pixels_path, paths, image_format, num_workers):
    """Decode all files into the cache; read it. The index comes last: it makes the pixels valid."""
    shape = height, width, _ = (*image_format.input_shape, image_format.img_channels)
    megabytes, hashes, bad, checksum = math.prod(shape) * len(paths) / 1e6, [], [], 0
    again = ", again, as the cache is damaged" if pixels_path.with_suffix(".json").exists() else ""
    size = f"{height}x{width} (height x width), {megabytes:.1f} MB"
    print(f"decoding {plural(len(paths), 'image')} to {size}{again}: {pixels_path}")
    read = partial(_decode, image_format=image_format)
    decoded = map_in_threads(lambda path: attempt(read, path, is_damage), paths, num_workers, "decoding")
    try:
        with atomic_write(pixels_path) as file:
            for row, (image, reason) in enumerate(decoded):  # a failure that may pass is not kept: it is raised
                if reason:
                    bad.append((row, reason))
                else:
                    file.write(image[0])
                    checksum = zlib.crc32(image[0], checksum)
                    hashes.append(image[1])
            if not hashes:
                fault = f"none of the {len(paths)} listed images can be decoded ({paths[0]}: {bad[0][1]})"
                raise UserError(f"{fault}; {RUN_AGAIN}")
        index = {"shape": [len(hashes), *shape], "hashes": hashes, "bad": bad}
        with atomic_write(pixels_path.with_suffix(".json"), "w", encoding="utf-8") as file:
            json.dump(index | {"checksum": _checksum(pixels_path, index, checksum)}, file)
    except OSError as error:
        if whole := _read_cache(pixels_path):  # another process built the same, and removed our file
            return whole
        fault = f"the cache of decoded images could not be written ({error.strerror or error})"
        raise OSError(f"{fault}: {pixels_path} needs {megabytes:.0f} MB; free some space") from error
    return _read_cache(pixels_path)


def _decode(path, image_format):
    """(pixels, content hash) of a file."""
    with one_if_large(check_regular(path)):
        content = Path(path).read_bytes()  # once, for both
        return load_image(io.BytesIO(content), image_format), hashlib.blake2b(content, digest_size=16).hexdigest()


def _prune(pixels_path):
    """Delete the caches used longest ago and the leftovers of killed builds, by our names alone."""
    remove_leftovers(pixels_path.parent, f"{pixels_path.stem}.*")
    with contextlib.suppress(OSError):  # another process prunes too
        own = [path for path in pixels_path.parent.iterdir() if OWN_NAME.fullmatch(path.name)]
        indexes = sorted((path for path in own if path.suffix == ".json"), key=os.path.getmtime)
        keep = {pixels_path.stem, *(path.stem for path in indexes[-CACHES_KEPT:])}
        for path in own:
            if path.stem not in keep and time.time() - os.path.getmtime(path) > 3600:  # another process may use it
                path.unlink(missing_ok=True)
