"""Images to start from: an image to change, and a mask of the part that may change."""

import torch

from utils.data.decode import check_image, load_image
from utils.data.image_format import ImageFormat
from utils.data.read_errors import describe_error
from utils.errors import UserError


def starting_settings(config, diffusion, trained):
    """The arguments of `diffusion.sample_steps` for predict.py's init_image and mask; {} without.

    trained: the training's settings by field name. The image is converted as its images were.
    ValueError where a file cannot be read.
    """
    if not config.init_image:
        return {}
    image_format = ImageFormat.from_config(trained, input_shape=diffusion.img_size, img_channels=diffusion.img_channels)
    image = _load(config.init_image, image_format) / 127.5 - 1
    image = image.expand(config.batch_size, *image.shape[1:])
    settings = {"init": image, "strength": config.strength}
    if config.mask:
        mask = load_mask(config.mask, config.init_image, image_format)
        settings |= {"known": image, "mask": mask, "resamplings": config.resamplings}
    return settings


def load_mask(path, image_path, image_format):
    """A mask (1, 1, H, W), cropped as the image is: 1.0 (sampled) above mid-grey, else 0.0 (kept).

    ValueError where it cannot be read, has another shape than the image, or is of one value.
    """
    mask = (_load(path, image_format._replace(img_channels=1, background=(0, 0, 0))) > 127.5).float()
    (width, height), (image_width, image_height) = check_image(path, full=False), check_image(image_path, full=False)
    if width * image_height != height * image_width:
        raise UserError(
            f"{path}: the mask is {width}x{height} and {image_path} {image_width}x{image_height}: "
            "they must have the same shape, so that one lies on the other"
        )
    if mask.min() == mask.max():
        raise UserError(
            f"{path}: the mask is all {'white' if mask.max() else 'black'}: "
            "paint white what is drawn anew, black what stays"
        )
    return mask


def _load(path, image_format):
    """An image file as (1, C, H, W) float32, 0 to 255."""
    try:
        pixels = load_image(path, image_format)
    except Exception as error:  # Pillow's decoders raise all kinds
        raise UserError(f"{path}: cannot be read as a picture ({describe_error(error)}); name another file") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
