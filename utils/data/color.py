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
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return _grey_table(source) if mode == "L" else _color_transform(source, mode)
    except MemoryError:
        raise
    except Exception:  # a damaged profile, one of another colour space, or a Pillow without its library
        return None


def _grey_table(source):
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), "L", "RGB", flags=NO_OPTIMIZATION)
    ramp = np.arange(256, dtype=np.uint8)[None]
    table = np.asarray(transform.apply(Image.fromarray(ramp)))[0, :, 0]
    return None if np.abs(table - ramp.astype(int)).max() <= SAME else table.tolist()


def _color_transform(source, mode):
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "RGB":
        levels = np.arange(0, 256, 15, dtype=np.uint8)  # 18 levels, 0 and 255 among them
        colors = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
        found = np.asarray(transform.apply(Image.fromarray(colors)))
        if np.abs(found - colors.astype(int)).max() <= SAME:
            return None
    return transform
