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
    init = {"init": image, "strength": config.strength}
    return {**init, "known": image, "mask": load_mask(config, config.init_image, image_format)} if config.mask else init


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


def load_conditions(config, condition, image_format):
    """(names, conditions (n, k, h, w)) of condition_image, a file or a folder."""
    paths = find_samples(config.condition_image) if Path(config.condition_image).is_dir() else [config.condition_image]
    height, width = size = tuple(side // condition.scale for side in image_format.input_shape)
    images = torch.cat([read_image(path, image_format._replace(input_shape=size)) for path in paths]) / 127.5 - 1
    for path in paths if condition.scale > 1 else []:  # shrunk ones would lose what they show
        if (found := check_image(path, full=False)) != (width, height):
            raise UserError(f"{path}: it is {found[0]}x{found[1]}, and this model enlarges images of {width}x{height}")
    known = torch.cat([1 - load_mask(config, path, image_format) for path in paths]) if config.mask else None
    return [Path(path).stem for path in paths], condition.of_given(images, known)
