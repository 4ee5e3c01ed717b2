"""The conditions of predict.py: an image, or all images of a folder."""

from pathlib import Path

import torch

from utils.data.decode import check_image
from utils.data.search import find_samples
from utils.errors import UserError
from utils.sampling.init_images import load_mask, read_image


class ConditionImages:
    """The condition of each image, `each` images for one. UserError: files that do not fit.

    config: predict.py's. condition: of nets/condition.py. image_format: of the images to sample.
    each: None is 1 for a folder, num_images for a file.
    """

    def __init__(self, config, condition, image_format, each=None):
        path, self.condition = config.condition_image, condition
        self.paths = [Path(found) for found in (find_samples(path) if Path(path).is_dir() else [path])]
        self.each = config.interpolate or each or (1 if len(self.paths) > 1 else config.num_images)
        if config.interpolate and len(self.paths) > 1:
            raise UserError(f"--interpolate is for one condition: name an image of {path}")
        height, width = size = tuple(side // condition.scale for side in image_format.input_shape)
        channels = 1 if condition.kind == "gray" else image_format.img_channels
        own_format = image_format._replace(input_shape=size, img_channels=channels)
        self.images, self.known = torch.cat([read_image(path, own_format) for path in self.paths]).byte(), None
        for path in self.paths if condition.kind == "low_res" else []:  # shrunk ones would lose what they show
            if (found := check_image(path, full=False)) != (width, height):
                wanted = f"{width}x{height} (width x height), which this model enlarges"
                raise UserError(f"{path}: it is {found[0]}x{found[1]}, not {wanted}: resize it")
        if condition.kind == "masked":
            self.known = 1 - torch.cat([load_mask(config, path, image_format) for path in self.paths])

    def __call__(self, numbers):
        """The conditions (n, k, h, w) of images by their numbers (n,); later ones have the last."""
        rows = (numbers // self.each).clamp(max=len(self.paths) - 1)
        known = None if self.known is None else self.known[rows]
        return self.condition.of_file(self.images[rows].float() / 127.5 - 1, known)

    def name(self, number, seed_name):
        """The file of a sample: its condition's name, and its seed's where there are several."""
        stem = self.paths[number // self.each].stem
        return f"{stem}.png" if self.each == 1 else f"{stem}_{seed_name}"
