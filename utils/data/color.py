"""Embedded colour profiles -> sRGB."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

SAME = 2  # levels of 255 that a profile may differ from sRGB by: it is another rounding of sRGB itself
NO_OPTIMIZATION = 0x0100  # a flag of LittleCMS: it would interpolate greys between few levels


def to_srgb(picture, profile):
    """An image of mode L, RGB or CMYK as sRGB: mode L stays, the others become RGB.

    `profile` is the content of an ICC profile. The image stays as it is where the profile is
    damaged, belongs to another colour space than the pixels, or is sRGB.
    """
    conversion = _conversion(profile, picture.mode)
    if conversion is None:
        return picture
    return picture.point(conversion) if picture.mode == "L" else conversion.apply(picture)


@lru_cache(maxsize=32)  # most files of a folder share one profile; building a transform takes milliseconds
def _conversion(profile, mode):
    """Pillow's transform to sRGB, for mode L a table of 256 levels. None: no conversion."""
    flags = NO_OPTIMIZATION if mode == "L" else 0
    try:
        source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, target, mode, "RGB", flags=flags)
        if mode == "CMYK":
            return transform
        levels = np.arange(0, 256, 1 if mode == "L" else 15, dtype=np.uint8)  # of colours 18, 0 and 255 among them
        colors = levels if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)
        found = np.asarray(transform.apply(Image.fromarray(colors[None])))[0]
        found = found[:, 0] if mode == "L" else found
    except MemoryError:
        raise
    except Exception:  # a damaged profile, one of another colour space, or a Pillow without its library
        return None
    if np.abs(found - colors.astype(int)).max() <= SAME:
        return None
    return found.tolist() if mode == "L" else transform
