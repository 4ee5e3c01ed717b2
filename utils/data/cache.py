"""The uint8 cache on disk: each listed image decoded once."""

import contextlib
import hashlib
import io
import json
import math
import os
import time
from pathlib import Path

import numpy as np

from utils.data.annotation import RUN_AGAIN
from utils.data.decode import load_image
from utils.data.formats import FILE_BYTES, check_regular
from utils.data.read_errors import describe_error, is_damage, system_failure
from utils.data.threads import Budget, map_in_threads
from utils.errors import UserError
from utils.files import PROJECT, atomic_write
from utils.terminal import first_few

CACHE_VERSION = 3  # part of the key: raise it when load_image gives other pixels or the files change their form
CACHES_KEPT = 4  # the most recently used ones in a folder
READING = Budget(FILE_BYTES)  # memory of all threads for the content of files


def open_cache(annotation_path, paths, image_format, cache_path=None, num_workers=0):
    """(pixels, index) of these files in this ImageFormat, decoded or cached.

    pixels: (N, H, W, C) uint8, memory-mapped. index: a dict of shape, hashes, bad ([row, reason]).
    UserError for missing files or none that can be decoded, OSError where nothing can be written.
    """
    key = _cache_key(image_format, paths)
    folders = [Path(cache_path)] if cache_path else cache_folders(annotation_path)
    cache = next(filter(None, (_read_cache(folder, key, len(paths)) for folder in folders)), None)
    if cache is None:
        folder = writable_folder(folders)
        _build_cache(folder / f"{key}.pixels", paths, image_format, num_workers)
        _prune(folder, key)
        cache = _read_cache(folder, key, len(paths))
    _report_bad(paths, cache[1]["bad"])
    return cache


def _cache_key(image_format, paths):
    """A name for these files in this format. UserError if any is gone."""
    settings, gone = [CACHE_VERSION, image_format._asdict()], []
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in paths:
        try:
            stat = os.stat(path)  # with its mode: a new one may allow reading
            digest.update(repr((path, stat.st_size, stat.st_mtime_ns, stat.st_mode)).encode())
        except OSError:
            gone.append(path)
    if gone:
        raise UserError(f"{len(gone)} of {len(paths)} listed images are gone: {first_few(gone, 10)}; {RUN_AGAIN}")
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
            reasons.append(f"{folder} ({error.strerror})")
    raise OSError(f"no folder for the cache of decoded images: {', '.join(reasons)}; make one of these writable")


def _read_cache(folder, key, num_listed):
    """(pixels, index) of a whole cache with that key in the folder, else None."""
    pixels_path, index_path = folder / f"{key}.pixels", folder / f"{key}.json"
    try:
        index = json.loads(index_path.read_text("utf-8"))
        shape, size = tuple(index["shape"]), pixels_path.stat().st_size
        if len(index["hashes"]) != shape[0] or shape[0] + len(index["bad"]) != num_listed or size != math.prod(shape):
            return None
        pixels = np.memmap(pixels_path, dtype=np.uint8, mode="r", shape=shape)
    except (OSError, ValueError, KeyError, TypeError, IndexError):  # none, or damaged: build it (again)
        return None
    with contextlib.suppress(OSError):
        os.utime(index_path)  # the time of its last use, for pruning
    return np.asarray(pixels), index  # a plain view: the memmap class makes each gather slower


def _build_cache(pixels_path, paths, image_format, num_workers):
    """Decode all files into the cache. The index comes last: it makes the pixels valid."""
    shape = height, width, _ = (*image_format.input_shape, image_format.img_channels)
    megabytes, place, hashes, bad = math.prod(shape) * len(paths) / 1e6, pixels_path.absolute(), [], []
    print(f"decoding {len(paths)} images to {height}x{width} (height x width), {megabytes:.1f} MB: {place}")
    try:
        with atomic_write(pixels_path) as file:
            decoded = map_in_threads(lambda path: _decode(path, image_format), paths, num_workers, "decoding")
            for row, (pixels, note) in enumerate(decoded):
                if pixels is None:
                    bad.append((row, note))
                else:
                    file.write(pixels)
                    hashes.append(note)
            if not hashes:
                _report_bad(paths, bad)
                raise UserError(f"none of the {len(paths)} listed images can be decoded: {RUN_AGAIN}")
        with atomic_write(pixels_path.with_suffix(".json"), "w", encoding="utf-8") as file:
            json.dump({"shape": [len(hashes), *shape], "hashes": hashes, "bad": bad}, file)
    except OSError as error:
        advice = f"{place} needs {megabytes:.0f} MB; free some space, or lower input_shape"
        fault = f"the cache of decoded images could not be written ({error.strerror or error})"
        raise OSError(f"{fault}: {advice}") from error


def _decode(path, image_format):
    """(pixels, content hash), or (None, reason) for a bad file. UserError if the system fails."""
    try:
        with READING.take(check_regular(path)):
            content = Path(path).read_bytes()  # once, for both
            return load_image(io.BytesIO(content), image_format), hashlib.blake2b(content, digest_size=16).hexdigest()
    except Exception as error:  # Pillow's decoders raise all kinds
        if not is_damage(error) and not isinstance(error, PermissionError):  # the key holds the file's mode
            raise system_failure(path, error) from error
        return None, describe_error(error)


def _report_bad(paths, bad):
    if bad:
        reasons = first_few([f"{paths[row]} ({reason})" for row, reason in bad], 10)
        print(f"left out {len(bad)} of {len(paths)} listed images, which cannot be decoded: {reasons}")


def _prune(folder, key):
    """Delete the caches used longest ago and the leftovers of interrupted builds."""
    with contextlib.suppress(OSError):  # another process prunes too
        keep = {key, *(path.stem for path in sorted(folder.glob("*.json"), key=os.path.getmtime)[-CACHES_KEPT:])}
        for path in [*folder.glob("*.json"), *folder.glob("*.pixels"), *folder.glob(".*.tmp")]:
            newest_use = max(os.path.getmtime(part) for part in (path, path.with_suffix(".json")) if part.exists())
            if path.name.split(".")[0] not in keep and time.time() - newest_use > 3600:  # another process may use it
                path.unlink(missing_ok=True)
