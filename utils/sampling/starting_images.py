"""The pictures that a drawing can start from: one to be changed, and a mask of what may change in it."""

import hashlib

import torch

from utils.data.decode import check_image, describe_error, load_image


def load_picture(path, input_shape, img_channels, trained):
    """A picture file, converted as the training pictures were: (1, C, H, W) float32 in [-1, 1].

    trained: the settings of the training, a dict by field name; it says how a picture is made to fit and what shows through it.
    ValueError where the file cannot be read.
    """
    return _load(path, input_shape, img_channels, trained, tuple(trained.get("background", (255, 255, 255)))) / 127.5 - 1


def load_mask(path, picture_path, input_shape, trained):
    """A mask, (1, 1, H, W): 1. where it is lighter than mid-grey (drawn anew), else 0. (kept); it is cut as the picture is.

    ValueError where it cannot be read, is not of the picture's shape, or asks for nothing or for everything.
    """
    mask = (_load(path, input_shape, 1, trained, (0, 0, 0)) > 127.5).float()
    (width, height), (picture_width, picture_height) = check_image(path, full=False), check_image(picture_path, full=False)
    if width * picture_height != height * picture_width:
        raise ValueError(f"{path}: the mask is {width}x{height} and {picture_path} {picture_width}x{picture_height}: "
                         "they must have the same shape, so that one lies on the other")
    if mask.min() == mask.max():
        raise ValueError(f"{path}: the mask is all {'white' if mask.max() else 'black'}: paint white what is drawn anew, black what stays")
    return mask


def _load(path, input_shape, img_channels, trained, background):
    """A picture file as (1, C, H, W) float32, 0 to 255."""
    try:
        resize_mode, icc = trained.get("resize_mode", "crop"), trained.get("icc", True)
        pixels = load_image(path, input_shape, img_channels, resize_mode, background, icc)
    except Exception as error:  # Pillow's decoders raise all kinds
        raise ValueError(f"{path}: cannot be read as a picture ({describe_error(error)}); name another file") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float()


def picture_digest(picture):
    """A short digest of a picture's values, a CPU tensor: it tells two pictures apart whatever their files are called."""
    return hashlib.blake2b(picture.contiguous().numpy().tobytes(), digest_size=8).hexdigest()
