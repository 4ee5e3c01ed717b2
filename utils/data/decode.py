"""One image file -> uint8 pixels, and what an exception on the way means."""

import errno
import struct

import numpy as np
from PIL import Image, ImageOps
from PIL.ExifTags import Base

from utils.data.color import to_srgb
from utils.data.formats import open_image
from utils.data.image_format import RESIZE_MODES
from utils.data.threads import one_if_large
from utils.errors import UserError, one_line

DECODE_BYTES = 1_430_000_000  # memory for decoding one image; one that needs more is left out
BYTES_PER_PIXEL = 8  # Pillow's image and the converted one
DECODER_BYTES = {"WEBP": 8, "AVIF": 8, "HEIF": 8}  # and for each pixel the copies of some decoders,
VALUE_BYTES, COMPOSITE_BYTES, PROFILE_BYTES = 16, 5, 4  # floats, a background, colors converted to sRGB,
PROGRESSIVE_BYTES = 6  # and the coefficients of a progressive JPEG at full size
# (scale of a JPEG, how much the image must at least shrink for it). 4 and 2 change a few levels of
# 255. 8 is the mean of 8x8 pixels and shows on thin lines: it leaves four times the pixels needed.
DRAFT_SCALES = ((8, 32), (4, 8), (2, 4))
JPEG_FORMATS = ("JPEG", "MPO")
# Errors of the system that are about one file: it is gone, or may not be read.
ABOUT_THE_FILE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)


def load_image(path, image_format):
    """A path or binary file -> uint8 (height, width, channels) of this format. It closes the file.

    Any Exception for damage. A JPEG that shrinks much is decoded at a reduced scale: nearly the
    same pixels, two to five times faster.
    """
    (height, width), channels, resize_mode, background, icc = image_format
    mode = "L" if channels == 1 else "RGB"
    with open_image(path) as file:
        stored_size = file.size
        extent = _draft(file, mode, (width, height), resize_mode)
        with _memory_for(file, stored_size, max(width, height)):
            image = _flatten(file, background, icc)
            image = image if image.mode == mode else image.convert(mode)  # which would copy it
            orientation = _orientation(file)  # after loading: Pillow turns TIFF files by itself
            image = _resize(image, extent or file.size, orientation, (width, height), resize_mode)
    canvas = Image.new("RGB", (width, height), tuple(background)).convert(mode)
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return np.array(canvas).reshape(height, width, channels)


def check_image(path, full=True):
    """(width, height) of an image, upright; `full` decodes all of it. Raises as `load_image`."""
    with open_image(path, whole=full) as image:
        size, orientation = image.size, _orientation(image)
        if image.format == "TIFF":  # Pillow 11 swaps the size of a turned one here, Pillow 10 does not
            size = image.tag_v2[Base.ImageWidth], image.tag_v2[Base.ImageLength]
        if full and image.format in JPEG_FORMATS:  # a reduced scale reads the whole file too
            image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
        with _memory_for(image, size):
            if full:
                _flatten(image.crop((0, 0, 1, 1)), (255, 255, 255), icc=True)  # crop decodes the whole file first
        return size[::-1] if orientation >= 5 else size


def _memory_for(image, stored_size, side=0):
    """A context to decode an image, and resize it to at most `side` pixels: of large ones, one."""
    pixels = stored_size[0] * stored_size[1]  # in the file, before a JPEG is reduced
    per_pixel = BYTES_PER_PIXEL + DECODER_BYTES.get(image.format, 0) + VALUE_BYTES * (image.mode[0] in "IF")
    per_pixel += COMPOSITE_BYTES * image.has_transparency_data + PROFILE_BYTES * ("icc_profile" in image.info)
    needed = image.height * (image.width * per_pixel + 4 * side)  # Pillow resizes the width first
    needed += pixels * PROGRESSIVE_BYTES * bool(image.info.get("progressive"))
    needed += image.buffer_bytes() if image.format == "TIFF" else 0
    if needed > DECODE_BYTES:
        fault = f"its {pixels / 1e6:.0f} million pixels take {needed / 1e9:.1f} GB to decode"
        raise UserError(f"{fault}, more than the {DECODE_BYTES / 1e9:.1f} GB that one image may take: make it smaller")
    np.empty(needed, dtype=np.uint8)  # here, as decoders call it damage where they get no memory
    return one_if_large(needed)


def _orientation(image):
    """EXIF orientation, 1 (upright) to 8; 1 where there is none or it is not one of these."""
    try:
        orientation = image.getexif().get(Base.Orientation)
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error):
        return 1  # broken metadata does not make the pixels worse
    return int(orientation) if orientation in range(1, 9) else 1


def _draft(image, mode, size, resize_mode):
    """Choose the reduced scale of a JPEG -> the (width, height) it covers. Other formats: None."""
    if image.format not in JPEG_FORMATS:
        return None
    box, inner = RESIZE_MODES[resize_mode](image.size, size[::-1] if _orientation(image) >= 5 else size)
    shrinkage = min(outer_side / inner_side for outer_side, inner_side in zip(box, inner))
    scale = next((scale for scale, least in DRAFT_SCALES if shrinkage >= least), 1)
    drafted = image.draft(mode, (image.width // scale, image.height // scale))
    return drafted and drafted[1][2:]  # with fractions: the last row and column are partly filler


def _flatten(image, background, icc):
    """The image as a viewer shows it: mode L or RGB, sRGB, without transparency."""
    _scale_transparency(image)
    image.load()
    profile, negative = icc and image.info.get("icc_profile"), getattr(image, "negative", False)
    if image.mode[0] in "IF":
        image, negative = _scale_values(image, negative), False
    elif image.has_transparency_data and image.mode not in ("LA", "RGBA"):
        image = image.convert("LA" if image.mode in ("L", "La") else "RGBA")
    colors = image
    if image.mode not in ("L", "RGB", "CMYK"):
        colors = image.convert("L" if image.mode in ("1", "LA") else "RGB")
    if negative:
        colors = ImageOps.invert(colors)
    if profile:
        colors = to_srgb(colors, profile)
    if colors.mode == "CMYK":
        colors = colors.convert("RGB")
    if image.mode not in ("LA", "RGBA"):
        return colors
    canvas = Image.new("RGB", image.size, tuple(background))
    canvas.paste(colors, mask=image)
    return canvas


def _scale_transparency(image):
    """Scale the one transparent value of a PNG to 8 bits, as Pillow will scale the pixels."""
    raw_mode = image.tile[0][3] if image.format == "PNG" and image.tile else ""
    value = image.info.get("transparency")
    if raw_mode in ("L;2", "L;4") and isinstance(value, int):
        image.info["transparency"] = value * {"L;2": 85, "L;4": 17}[raw_mode]
    elif raw_mode == "RGB;16B" and isinstance(value, tuple):
        image.info["transparency"] = tuple(level >> 8 for level in value)


def _scale_values(image, negative):
    """Integers or floats as mode L, or LA where one value is transparent; NaN is black."""
    values = np.asarray(image)
    largest = float(np.max(values, initial=0, where=np.isfinite(values)))
    # White: by the format, or the least that holds all values; resampling overshoots a little.
    known = (255, 65535, np.iinfo(np.int32).max) if image.mode == "I" else (1, 255, 65535, largest)
    by_format = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")
    white = 65535 if by_format else next(white for white in known if largest <= white * 1.01)
    levels = np.clip(values.astype(np.float32) / white, 0, 1)
    scaled = Image.fromarray(np.rint(255 * np.nan_to_num(1 - levels if negative else levels)).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        scaled.putalpha(Image.fromarray(values != transparent))
    return scaled


def _resize(image, extent, orientation, size, resize_mode):
    """Resize, then bring the small result upright. size: upright. extent: what the pixels cover."""
    box, inner = RESIZE_MODES[resize_mode](extent, size[::-1] if orientation >= 5 else size)
    margins = [max((whole - part) / 2, 0) for whole, part in zip(extent, box)]
    corners = (*margins, *(min(whole - margin, whole) for whole, margin in zip(extent, margins)))
    image = image.resize(inner, Image.Resampling.BICUBIC, box=corners)
    image.info.clear()
    image.getexif()[Base.Orientation] = orientation
    return ImageOps.exif_transpose(image)


def is_damage(error):
    """Whether the file's content is the cause. Too little memory, EIO, EACCES, ... may pass."""
    if isinstance(error, OSError):  # Pillow's own have no number
        return error.errno in (None, errno.EINVAL)  # EINVAL: the content names a place before the file's start
    return not isinstance(error, MemoryError)


def is_about_the_file(error):
    """Whether a failure concerns this file alone: it is damaged, gone, or may not be read."""
    return is_damage(error) or getattr(error, "errno", None) in ABOUT_THE_FILE


def attempt(read, path, is_bad=is_about_the_file):
    """(read(path), None), or (None, reason) for a bad file. UserError where the system fails."""
    try:
        return read(path), None
    except Exception as error:  # Pillow's decoders raise all kinds
        if is_bad(error):
            return None, describe_error(error)
        fault = f"{path} cannot be read now ({describe_error(error)})"
        raise UserError(f"{fault}: see to the system, or lower num_workers, and run this again") from error


def describe_error(error):
    """Why an image file could not be decoded, in one line for the user."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError):
        return "out of memory"
    accident = isinstance(error, (AssertionError, LookupError, TypeError))  # its text is about Pillow's own code
    fault = "its parts do not fit together" if accident else one_line(error)
    return getattr(error, "strerror", None) or f"damaged ({fault})"
