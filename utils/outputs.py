"""What predict.py writes: one picture, the grid, single files, an .npz, and how the pictures formed. Only whole files."""
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from utils import distributed
from utils.atomic import atomic_write
from utils.images import make_grid, save_animation, save_png, to_uint8

COLUMNS = 5
SHOWN = 25
STRIP_IMAGES, STRIP_MOMENTS, FRAMES = 4, 10, 40


class PredictFiles:
    """Takes the pictures as they come, in any order and from any process, and writes them in bounded memory.

    config: predict.py's. rows: of the grid, for one row a class; None: 5, or one for a strip. text: what the pictures depend on, written
    into each single file: one that is there already counts if its text matches, and is an error if not. shape: (H, W, C).
    """

    def __init__(self, config, rows, text, shape):
        self.folder, self.config, self.text = Path(config.save_dir), config, text
        self.columns = config.num_images if config.interpolate else COLUMNS
        self.shown = config.num_images if config.interpolate else rows * COLUMNS if rows else SHOWN
        self.first_ones, self.moments = {}, []
        self.folder.mkdir(parents=True, exist_ok=True)
        self.spool = self._open_spool((config.num_images, *shape)) if config.npz else None

    def have(self, first, size):
        """Whether all pictures of this batch are there already as single files: they are read instead of drawn again."""
        numbers = range(first, min(first + size, self.config.num_images))
        if not self.config.individual_files or (self.config.trajectory and first == 0):
            return False
        found = [self._read(number) for number in numbers]
        if any(picture is None for picture in found):
            return False
        self.add(first, np.stack(found), write=False)
        return True

    def _path(self, number):
        return self.folder / f"seed_{self.config.seed + number:010d}.png"

    def _text(self, number):
        return {**self.text, "seed": str(self.config.seed + number), "number": str(number)}

    def _read(self, number):
        """The pixels of a finished single file; None where there is none. ValueError for one of other settings."""
        path = self._path(number)
        if not path.exists():
            return None
        with Image.open(path) as picture:
            picture.load()
            text, wanted = getattr(picture, "text", {}), self._text(number)
            differing = [name for name in wanted if text.get(name) != wanted[name]]
            if differing:
                raise ValueError(
                    f"{path.resolve()} was drawn with another {', '.join(differing)}: move it away, or choose another --save_dir"
                )
            pixels = np.asarray(picture)
        return pixels if pixels.ndim == 3 else pixels[..., None]

    def add(self, first, pixels, write=True):
        """pixels: (n, H, W, C) uint8, the pictures from number `first` on; those beyond num_images are padding."""
        for number, picture in enumerate(pixels[: self.config.num_images - first], first):
            if write and self.config.individual_files and self._read(number) is None:
                save_png(self._path(number), picture, self._text(number))
            if number < self.shown:
                self.first_ones[number] = picture
            if self.config.npz:
                self.spool[number] = picture

    def _open_spool(self, shape):
        """All pictures in a file on disk rather than in memory, which every process fills at its own places."""
        self.spool_path = self.folder / ".predict_results.npz.tmp"
        if distributed.is_main():
            np.memmap(self.spool_path, np.uint8, "w+", shape=shape).flush()
        distributed.barrier()
        return np.memmap(self.spool_path, np.uint8, "r+", shape=shape)

    def add_moment(self, step, x, x_0):
        """One step of the first batch: x_t and predicted x_0, (B, C, H, W). Kept for the strip and the animation."""
        if len(self._moment_steps() & {step}):
            self.moments.append((to_uint8(x[: self.shown]), to_uint8(x_0[: self.shown])))

    def _moment_steps(self):
        return set(np.linspace(0, self.config.steps - 1, min(FRAMES, self.config.steps)).round().astype(int).tolist())

    def finish(self):
        """Write what needs all pictures. Rank 0 does it, with what the others drew."""
        gathered = distributed.gather(self.first_ones)
        if not distributed.is_main():
            return
        pictures = {number: picture for part in gathered for number, picture in part.items()}
        ordered = np.stack([pictures[number] for number in sorted(pictures)])
        save_png(self._say("predict_1x1_results.png"), ordered[0])
        name = "predict_interpolation_results.png" if self.config.interpolate else "predict_5x5_results.png"
        save_png(self._say(name), make_grid(ordered, self.columns))
        if self.config.trajectory:
            self._write_moments()
        if self.config.npz:
            self._write_npz()
        if self.config.individual_files:
            print(f"{self.config.num_images} single files in {self.folder.resolve()}")

    def _say(self, name):
        path = self.folder / name
        print(path.resolve())
        return path

    def _write_moments(self):
        """The strip (for each of the first pictures a row of x_t over one of x_0) and the animation of the grid forming."""
        chosen = np.linspace(0, len(self.moments) - 1, min(STRIP_MOMENTS, len(self.moments))).round().astype(int)
        images = range(min(STRIP_IMAGES, len(self.moments[0][0])))
        rows = [self.moments[moment][kind][image] for image in images for kind in (0, 1) for moment in chosen]
        save_png(self._say("predict_trajectory_results.png"), make_grid(np.stack(rows), len(chosen)))
        frames = np.stack([make_grid(x, self.columns) for x, _ in self.moments])
        save_animation(self._say("predict_trajectory_results.gif"), frames, [80] * (len(frames) - 1) + [2000])

    def _write_npz(self):
        """arr_0: (num_images, H, W, C) uint8, the layout of the ADM evaluations' sample files."""
        with (
            atomic_write(self._say("predict_results.npz")) as file,
            zipfile.ZipFile(file, "w") as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as member,
        ):
            np.lib.format.write_array_header_1_0(member, np.lib.format.header_data_from_array_1_0(self.spool))
            for start in range(0, len(self.spool), 1024):
                member.write(self.spool[start : start + 1024].tobytes())
        self.spool = None
        self.spool_path.unlink()
