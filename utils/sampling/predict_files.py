"""What predict.py writes, as whole files: images, grid, .npz, and how the images formed."""

import contextlib
import errno
import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from utils import distributed
from utils.checkpoint_contents import weights_digest
from utils.data.read_errors import describe_error
from utils.errors import UserError
from utils.files import atomic_write
from utils.images import make_grid, save_animation, save_png, to_uint8

COLUMNS = 5
SHOWN = 25  # images in the grid
STRIP_IMAGES, STRIP_STEPS, FRAMES = 4, 10, 40
FRAME_MS, LAST_FRAME_MS = 80, 2000


class PredictFiles:
    """Writes images that come in any order and from any process, in bounded memory.

    config: predict.py's, resolved. shape: (H, W, C) of an image. rows: of the grid, one a class;
    0: no classes. text_of: number -> dict of what an image depends on. Its single file holds it:
    an existing file with the same text is used, another one is an error. ValueError where the
    folder cannot be written to.
    """

    def __init__(self, config, shape, rows, text_of):
        self.folder, self.config, self.shape, self.text_of = Path(config.save_dir), config, tuple(shape), text_of
        self.columns = config.interpolate or COLUMNS
        self.shown = config.interpolate or (rows * COLUMNS if rows else SHOWN)
        self.pictures = {}  # number -> (H, W, C): those in the grid
        self.films = {}  # number -> [(x_t, x_0), ...], (H, W, C) each: the same, as they form
        kept = np.linspace(0, config.steps - 1, min(FRAMES, config.steps)) if config.trajectory else []
        self.film_steps = {round(step) for step in kept}
        self.spool = None

    def __enter__(self):
        _check_folder(self.folder)
        if self.config.npz:
            self.spool = _open_spool(self.folder, (self.config.num_images, *self.shape))
        return self

    def __exit__(self, *_):
        if self.spool is not None:
            path, self.spool = self.spool.filename, None  # Windows deletes a file only when nobody has it open
            Path(path).unlink(missing_ok=True)

    def reuse(self, first, size):
        """Takes the batch from its single files. Returns False where one of them is missing."""
        if not self.config.individual_files:
            return False
        found = {number: self._read(number) for number in range(first, min(first + size, self.config.num_images))}
        if any(picture is None for picture in found.values()) or (self.film_steps and first < self.shown):
            return False
        for number, picture in found.items():
            self._keep(number, picture)
        return True

    def _path(self, number):
        name = f"between_{number:06d}.png" if self.config.interpolate else f"seed_{self.config.seed + number:010d}.png"
        return self.folder / name

    def _read(self, number):
        """The pixels of a finished single file, None without; ValueError: one of something else."""
        path, wanted = self._path(number), self.text_of(number)
        try:
            with Image.open(path) as picture:
                picture.load()
                text, pixels = dict(getattr(picture, "text", {})), np.asarray(picture)
        except FileNotFoundError:
            return None
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(
                f"{path.resolve()} cannot be read ({describe_error(error)}): delete it, it is drawn again"
            ) from None
        differing = [name for name in {**wanted, **text} if text.get(name) != wanted.get(name)]
        if differing:
            raise UserError(
                f"{path.resolve()} is there already and differs in {', '.join(differing)}: "
                "move it away, or choose another --save_dir"
            )
        return pixels.reshape(self.shape)

    def add(self, first, pixels):
        """pixels: (n, H, W, C) uint8, the images from number `first` on; padding at the end."""
        for number, picture in enumerate(pixels[: self.config.num_images - first], first):
            if self.config.individual_files and not self._path(number).exists():
                save_png(self._path(number), picture, self.text_of(number))
            self._keep(number, picture)

    def _keep(self, number, picture):
        if number < self.shown:
            self.pictures[number] = picture
        if self.spool is not None:
            self.spool[number] = picture

    def add_step(self, first, step, x, x_0):
        """Keeps x_t and predicted x_0, (B, C, H, W), of a step for the strip and the animation."""
        count = min(self.shown, self.config.num_images) - first
        if step in self.film_steps and count > 0:
            for number, pair in enumerate(zip(to_uint8(x[:count]), to_uint8(x_0[:count])), first):
                self.films.setdefault(number, []).append(pair)

    def finish(self):
        """Writes what needs all images. Rank 0 does it, with those of the other processes."""
        if self.spool is not None:
            self.spool.flush()  # other machines that share the folder read it next
        gathered = distributed.gather((self.pictures, self.films))
        if not distributed.is_main():
            return
        pictures, films = ({number: part[number] for part in parts for number in part} for parts in zip(*gathered))
        ordered = np.stack([pictures[number] for number in sorted(pictures)])
        save_png(self._say("predict_1x1_results.png"), ordered[0])
        name = "predict_interpolation_results.png" if self.config.interpolate else "predict_5x5_results.png"
        save_png(self._say(name), make_grid(ordered, self.columns))
        if films:
            self._write_films([films[number] for number in sorted(films)])
        if self.spool is not None:
            with atomic_write(self._say("predict_results.npz")) as file:
                np.savez(file, self.spool)  # arr_0, as the ADM evaluations' sample files have it; 16 MiB at a time
        if self.config.individual_files:
            print(f"{self.config.num_images} single files in {self.folder.resolve()}")

    def _say(self, name):
        path = self.folder / name
        print(path.resolve())
        return path

    def _write_films(self, films):
        """The strip (a row of x_t over one of x_0 for each image) and the grid's animation."""
        length = len(films[0])
        chosen = [round(step) for step in np.linspace(0, length - 1, min(STRIP_STEPS, length))]
        rows = [film[step][kind] for film in films[:STRIP_IMAGES] for kind in (0, 1) for step in chosen]
        save_png(self._say("predict_trajectory_results.png"), make_grid(np.stack(rows), len(chosen)))
        frames = [make_grid(np.stack([film[step][0] for film in films]), self.columns) for step in range(length)]
        save_animation(self._say("predict_trajectory_results.gif"), frames, [FRAME_MS] * (length - 1) + [LAST_FRAME_MS])


def _check_folder(folder):
    """ValueError before hours of sampling where the images cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{folder.resolve()} cannot be written to ({error.strerror}): choose another --save_dir"
        ) from None


def _open_spool(folder, shape):
    """A (N, H, W, C) uint8 array in a file; every process writes its own images into it.

    The file loses its name once all processes have it open, so its space comes back however they
    end. OSError where the disk has too little space.
    """
    path = distributed.from_main(folder / f".predict_results.{os.getpid()}.tmp")
    if distributed.is_main():
        np.lib.format.open_memmap(path, "w+", np.uint8, shape)
        _reserve(path)
    distributed.barrier()
    spool = np.lib.format.open_memmap(path, "r+")
    distributed.barrier()
    if distributed.is_main():
        with contextlib.suppress(PermissionError):  # Windows keeps the name of an open file
            path.unlink()
    return spool


def image_texts(config, networks, shape, classes, labels, settings):
    """The function number -> dict of all that this image depends on, for its single file.

    networks: the one that samples and, with a guiding model, that one's.
    """
    text = {name: str(value) for name, value in settings.items() if name not in ("known", "guiding_model")}
    for name in {"init", "mask"} & set(settings):  # by their values: the name of a file plays no part
        text[name] = hashlib.blake2b(settings[name][:1].contiguous().numpy(), digest_size=8).hexdigest()
    text["size"] = "x".join(map(str, shape))
    if config.individual_files:  # reading all weights takes a moment
        for name, network in zip(("weights", "guiding weights"), networks):
            text[name] = weights_digest(network.state_dict())

    def text_of(number):
        label = {} if labels is None else {"class": classes[labels[number % len(labels)]]}
        if config.interpolate:
            place = f"{number} of 0 to {config.interpolate - 1}"
            return {**text, **label, "seed": str(config.seed), "seed_to": str(config.seed_to), "place": place}
        return {**text, **label, "seed": str(config.seed + number)}

    return text_of


def _reserve(path):
    """Takes the space of a new file now: a mapped file that gets none later kills the process."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # others: a file system that cannot do this
            path.unlink()
            raise OSError(f"{path.parent.resolve()}: too little space for the .npz ({error.strerror})") from None
