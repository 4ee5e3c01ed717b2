"""Embedded color profiles -> sRGB."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

SAME = 2  # levels of 255 that a profile may differ from sRGB by: it is another rounding of sRGB itself
NO_OPTIMIZATION = 0x0100  # a flag of LittleCMS: it would interpolate grays between few levels


def to_srgb(image, profile):
    """An image of mode L, RGB or CMYK as sRGB (L or RGB) by its ICC profile, or as it is."""
    transform = _transform(profile, image.mode)
    if transform is None:
        return image
    converted = transform.apply(image)
    return converted.getchannel("R") if image.mode == "L" else converted


@lru_cache(maxsize=32)  # most files of a folder share one profile; building a transform takes milliseconds
def _transform(profile, mode):
    """Pillow's transform to sRGB; None where nothing is to be converted."""
    try:
        source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, target, mode, "RGB", flags=NO_OPTIMIZATION * (mode == "L"))
    except (ImageCms.PyCMSError, OSError, ImportError):  # damaged, of another color space; no LittleCMS
        return None
    if mode == "CMYK":
        return transform
    cube = Image.fromarray((np.indices((18, 18, 18), np.uint8) * 15).reshape(3, 1, -1).transpose(1, 2, 0))
    before = cube.convert(mode)
    change = np.asarray(transform.apply(before), dtype=int) - np.asarray(before.convert("RGB"))
    return None if np.abs(change).max() <= SAME else transform
