"""Images that the user gives: one to change, a mask of what may change, conditions."""

from pathlib import Path

import torch

from utils.data.decode import check_image, describe_error, load_image
from utils.data.search import find_samples
from utils.errors import UserError


def init_options(config, image_format):
    """The SamplingOptions of predict.py's init_image and mask, a dict; {} without them."""
    if not config.init_image:
        return {}
    image = read_image(config.init_image, image_format) / 127.5 - 1
    image = image.expand(config.batch_size, *image.shape[1:])
    options = {"init": image, "strength": config.strength}
    inpainting = {"known": image, "mask": load_mask(config, config.init_image, image_format)} if config.mask else {}
    return options | inpainting


def load_mask(config, path, image_format):
    """A mask (1, 1, H, W), cropped as the image is: 1.0 (sampled) above mid-gray, 0.0 (kept)."""
    mask = (read_image(config.mask, image_format._replace(img_channels=1, background=(0, 0, 0))) > 127.5).float()
    width, height = check_image(config.mask, full=False)
    image_width, image_height = check_image(path, full=False)
    if width * image_height != height * image_width:
        theirs = f"the mask is {width}x{height} and {path} {image_width}x{image_height}"
        raise UserError(f"{config.mask}: {theirs}: they must have the same shape, so that one lies on the other")
    if mask.min() == mask.max():
        color = "white" if mask.max() else "black"
        raise UserError(f"{config.mask}: the mask is all {color}: paint white what is sampled, black what stays")
    return mask


def read_image(path, image_format):
    """An image file as (1, C, H, W) float32, 0 to 255."""
    try:
        pixels = load_image(path, image_format)
    except Exception as error:  # Pillow's decoders raise all kinds
        raise UserError(f"{path}: cannot be read as an image ({describe_error(error)}); name another file") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float()


class ConditionImages:
    """The condition of each sample of predict.py: an image, or all images of a folder in turn.

    config: predict.py's. condition: of nets/condition.py. image_format: of the samples. each: the
    samples of one; None is 1 for a folder, num_images for a file. UserError: files do not fit.
    """

    def __init__(self, config, condition, image_format, each=None):
        path, self.condition, self.known = config.condition_image, condition, None
        folder = Path(path).is_dir()
        self.paths = [Path(found) for found in (find_samples(path) if folder else [path])]
        self.each = config.interpolate or each or (1 if folder else config.num_images)
        if config.interpolate and len(self.paths) > 1:
            raise UserError(f"--interpolate is for one condition: name an image of {path}")
        last = {path.stem.casefold(): path for path in self.paths}  # of those with the same name
        twice = [path for path in self.paths if last[path.stem.casefold()] != path]
        if twice and config.individual_files:
            fault = "another image has this name, and samples have those of their conditions"
            raise UserError(f"{twice[0]}: {fault}: rename one")
        height, width = size = tuple(side // condition.scale for side in image_format.input_shape)
        channels = 1 if condition.kind == "gray" else image_format.img_channels
        own_format = image_format._replace(input_shape=size, img_channels=channels)
        self.images = torch.cat([read_image(path, own_format).byte() for path in self.paths])
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
