"""What predict.py writes, as whole files: images, grid, .npz, and how the images formed."""

import contextlib
import errno
import hashlib
import math
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from utils import distributed
from utils.checkpoint.integrity import weights_digest
from utils.data.decode import attempt
from utils.data.formats import check_regular
from utils.errors import UserError
from utils.files import atomic_write, output_folder, temporary_name
from utils.images import make_grid, save_animation, save_png, to_uint8
from utils.terminal import plural

COLUMNS = 5
SHOWN = 25  # images in the grid
STRIP_IMAGES, STRIP_STEPS, FRAMES, FRAME_MS, LAST_FRAME_MS = 4, 10, 40, 80, 2000


@contextlib.contextmanager
def shared_output_folder(path):
    """The `output_folder` that rank 0 holds for all processes."""
    with output_folder(path, "*.png", "predict_*") if distributed.is_main() else contextlib.nullcontext():
        distributed.barrier()
        yield Path(os.path.realpath(path))


class PredictFiles:
    """Writes images that come in any order and from any process, in bounded memory.

    folder: of `shared_output_folder`. config: predict.py's, resolved. shape: (H, W, C) of an image.
    rows: of the grid, one per class; 0: none. text_of: see `image_texts`. names: of conditions.
    """

    def __init__(self, folder, config, shape, rows, text_of, names=()):
        self.folder, self.config, self.shape, self.text_of = folder, config, tuple(shape), text_of
        self.columns, self.names = config.interpolate or COLUMNS, names
        self.named_once = len({n.casefold() for n in names if not n.startswith("predict_")}) == config.num_images
        self.shown = config.interpolate or rows * COLUMNS or SHOWN
        self.flat = 0  # images of a single color
        self.images = {}  # number -> (H, W, C): those in the grid
        self.trajectories = {}  # number -> [(x_t, x_0), ...], (H, W, C) each: the same, as they form
        kept = np.linspace(0, config.steps - 1, min(FRAMES, config.steps)) if config.trajectory else []
        self.kept_steps = {round(step) for step in kept}
        self.spool = open_spool(self.folder, (config.num_images, *self.shape)) if config.npz else None

    def reuse(self, first, size):
        """Takes the batch from its single files. Returns False where one of them is missing."""
        if not self.config.individual_files:
            return False
        found = {number: self.read(number) for number in range(first, min(first + size, self.config.num_images))}
        if any(image is None for image in found.values()) or (self.kept_steps and first < self.shown):
            return False
        for number, image in found.items():
            self.keep(number, image)
        return True

    def path(self, number):
        name = f"between_{number:06d}.png" if self.config.interpolate else f"seed_{self.config.seed + number:010d}.png"
        own = self.names[number % len(self.names)] if self.names else ""
        return self.folder / (f"{own}.png" if self.named_once else f"{own}_{name}" if own else name)

    def read(self, number):
        """The pixels of a finished single file, None without; UserError: one of other settings."""
        path, wanted = self.path(number), self.text_of(number)
        if not path.exists():
            return None
        found, reason = attempt(read_png, path)
        if reason:
            raise UserError(f"{path} cannot be read ({reason}): delete it")
        pixels, text = found
        differing = [name for name in {**wanted, **text} if text.get(name) != wanted.get(name)]
        if differing:
            what = f"{path} is there already and differs in {', '.join(differing)}"
            raise UserError(f"{what}: move it away, or choose another --save_dir")
        return pixels.reshape(self.shape)

    def add(self, first, pixels):
        """pixels: (n, H, W, C) uint8, the images from number `first` on; padding at the end."""
        for number, image in enumerate(pixels[: self.config.num_images - first], first):
            if self.config.individual_files and self.read(number) is None:  # one may have appeared meanwhile
                save_png(self.path(number), image, self.text_of(number))
            self.keep(number, image)

    def keep(self, number, image):
        self.flat += bool((image == image[0, 0]).all())
        if number < self.shown:
            self.images[number] = image
        if self.spool is not None:
            self.spool[number] = image

    def add_step(self, first, step, x, x_0):
        """Keeps x_t and predicted x_0, (B, C, H, W), of a step for the strip and the animation."""
        count = min(self.shown, self.config.num_images) - first
        if step in self.kept_steps and count > 0:
            for number, pair in enumerate(zip(to_uint8(x[:count]), to_uint8(x_0[:count])), first):
                self.trajectories.setdefault(number, []).append(pair)

    def finish(self):
        """Writes what needs all images. Rank 0 does it, with those of the other processes."""
        if self.spool is not None:
            self.spool.flush()  # other machines that share the folder read it next
        gathered = distributed.gather((self.images, self.trajectories, self.flat))
        if not distributed.is_main():
            return
        *by_number, flat = zip(*gathered)
        images, trajectories = ({number: part[number] for part in parts for number in part} for parts in by_number)
        ordered = np.stack([images[number] for number in sorted(images)])
        save_png(self.named("predict_1x1_results.png"), ordered[0])
        name = "predict_interpolation_results.png" if self.config.interpolate else "predict_5x5_results.png"
        save_png(self.named(name), make_grid(ordered, self.columns))
        if trajectories:
            self.write_trajectories([trajectories[number] for number in sorted(trajectories)])
        if self.spool is not None:
            with atomic_write(self.named("predict_results.npz")) as file:
                np.savez(file, np.asarray(self.spool))  # arr_0, as the ADM evaluation's sample files have it
        if self.config.individual_files:
            print(f"{plural(self.config.num_images, 'single file')} in {self.folder}")
        if sum(flat):
            filled = f"a single color fills {sum(flat):,} of {plural(self.config.num_images, 'image')}"
            print(f"warning: {filled}: try another checkpoint, or --precision fp32")

    def named(self, name):
        """The path of an output, which is printed."""
        print(self.folder / name)
        return self.folder / name

    def write_trajectories(self, trajectories):
        """The strip (a row of x_t over one of x_0 for each image) and the grid's animation."""
        length = len(trajectories[0])
        chosen = [round(step) for step in np.linspace(0, length - 1, min(STRIP_STEPS, length))]
        rows = [steps[step][kind] for steps in trajectories[:STRIP_IMAGES] for kind in (0, 1) for step in chosen]
        save_png(self.named("predict_trajectory_results.png"), make_grid(np.stack(rows), len(chosen)))
        frames = [make_grid(np.stack([pairs[0] for pairs in at_step]), self.columns) for at_step in zip(*trajectories)]
        times = [FRAME_MS] * (length - 1) + [LAST_FRAME_MS]
        save_animation(self.named("predict_trajectory_results.gif"), frames, times)


def read_png(path):
    """(pixels, texts) of a PNG. No other decoder is tried: that of EPS starts a program."""
    check_regular(path)  # a pipe would block
    with Image.open(path, formats=["PNG"]) as image:
        image.load()
        pixels = np.asarray(image)
        size = "x".join(map(str, (*pixels.shape, 1)[:3]))
        return pixels, {**image.text, "size": size}  # what it holds, whatever it says


def open_spool(folder, shape):
    """A (N, H, W, C) uint8 array in a file without a name; each process writes its images into it.

    Its space comes back however they end. OSError where the disk has too little.
    """
    file = None
    if distributed.is_main():
        file = tempfile.NamedTemporaryFile(prefix=".predict_", suffix=temporary_name("npz"), dir=folder)  # noqa: SIM115
        try:
            if hasattr(os, "posix_fallocate"):  # a mapped file that gets no space later kills the process
                os.posix_fallocate(file.fileno(), 0, math.prod(shape))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # else a file system that cannot do this
                raise OSError(f"{folder}: too little space for the .npz ({error.strerror})") from None
    name = distributed.from_main(file and file.name)
    spool = np.memmap(file or name, np.uint8, "r+", shape=shape)
    distributed.barrier()
    if file:
        file.close()
    return spool


def image_texts(config, networks, shape, classes, labels, options):
    """The function number -> dict of all that an image depends on, the text of its single file.

    config: resolved, device and precision too. networks: the one that samples, and the guiding
    one. options: SamplingOptions.
    """
    names = ["sampler", "steps", "spacing", "guidance_scale", "use_ema"]
    names += ["guidance_interval"] * bool(options.guidance_interval) + ["clip"] * (not options.clip)
    names += ["strength"] * (options.init is not None)
    text = {"size": "x".join(map(str, shape)), **options.solver_options}
    text |= {name: getattr(options, name) for name in names}
    text |= {"device": config.device, "precision": config.precision}
    if config.individual_files:  # reading all weights takes a moment
        text |= {name: weights_digest(net.state_dict()) for name, net in zip(("weights", "guiding weights"), networks)}

    def text_of(number):
        own = {} if labels is None else {"class": classes[labels[number % len(labels)]]}
        for name in ("init", "mask", "cond"):  # by their values: the name of a file plays no part
            if (images := getattr(options, name)) is not None:
                image = images[number % len(images)].contiguous()
                own[name] = hashlib.blake2b(image.numpy(), digest_size=8).hexdigest()
        own["seed"] = config.seed if config.interpolate else config.seed + number
        if config.interpolate:
            own |= {"seed_to": config.seed_to, "place": f"{number} of 0 to {config.interpolate - 1}"}
        return {name: str(value) for name, value in {**text, **own}.items()}

    return text_of
