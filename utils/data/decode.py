"""One image file -> uint8 pixels."""

import contextlib
import errno
import struct
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base
from PIL.Image import Transpose

from utils.data.color import to_srgb
from utils.data.formats import open_image
from utils.data.threads import Budget
from utils.errors import UserError

DECODE_BYTES = 1_430_000_000  # memory of all threads for decoding; one image that needs more is left out
# Bytes for each pixel: Pillow's image and the converted one. Some decoders keep more copies.
BYTES_PER_PIXEL, BYTES_PER_PIXEL_OF = 8, {"WEBP": 16, "AVIF": 16, "HEIF": 16}
PROGRESSIVE_BYTES = 6  # and for each pixel of a progressive JPEG at full size, its coefficients
DECODING = Budget(DECODE_BYTES)
LARGEST_PASS = 2**26  # pixels between the two passes of a resize, where the image itself has fewer
STRIP_PIXELS = 2**21  # pixels that are converted at once: intermediate values take up to 30 bytes each
# Errors of the system that are about one file: it is gone, or may not be read.
ABOUT_THE_FILE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
UPRIGHT = {  # EXIF orientation -> what brings the image upright
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
# (scale of a JPEG, how much the image must at least shrink for it). 4 and 2 change a few levels of
# 255. 8 is the mean of 8x8 pixels and shows on thin lines: it leaves four times the pixels needed.
DRAFT_SCALES = ((8, 32), (4, 8), (2, 4))
JPEG_FORMATS = ("JPEG", "MPO")
FULL_RANGES = {"I;12": 4095, "I;16S": 32767, "I;16BS": 32767, "I;16NS": 32767}  # raw modes that fill less than 16 bits


def load_image(path, input_shape, img_channels=3, resize_mode="crop", background=(255, 255, 255), icc=True):
    """One image file -> uint8 array (height, width, img_channels).

    The image is brought upright (EXIF), composited on `background`, scaled from the full range of
    its mode to 8 bits, and resized (bicubic, antialiased). A JPEG that shrinks much is decoded at a
    reduced scale: nearly the same pixels, two to five times faster.

    path: a path, or a binary file that can seek. input_shape: (height, width) in pixels.
    img_channels: 3 (RGB) or 1 (grey). background: (red, green, blue). resize_mode: "crop" (shorter
    side to size, then the centre), "stretch" (each side to size) or "pad" (the whole image, centred
    on `background`). icc: whether an embedded profile converts to sRGB.
    ValueError for an unknown setting or an image above DECODE_BYTES; any Exception for damage.
    """
    check_picture_settings(input_shape, img_channels, resize_mode, background)
    height, width = input_shape
    mode = "L" if img_channels == 1 else "RGB"
    with open_image(path) as image:
        stored_size = image.size
        extent = _draft(image, mode, (width, height), resize_mode)
        with _memory_for(image, stored_size):
            picture = _opaque(image, background, icc)
            orientation = _orientation(image)  # after loading: Pillow turns TIFF files by itself
            picture = picture if picture.mode == mode else picture.convert(mode)
            picture = _resize(picture, extent or image.size, orientation, (width, height), RESIZE_MODES[resize_mode])
    canvas = Image.new("RGB", (width, height), tuple(background)).convert(mode)
    canvas.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
    return np.array(canvas).reshape(height, width, img_channels)


def check_picture_settings(input_shape, img_channels, resize_mode, background):
    """ValueError, with what is known, for settings that `load_image` does not know."""
    if len(input_shape) != 2 or any(int(side) != side or side < 1 for side in input_shape):
        raise UserError(f"input_shape {tuple(input_shape)}: give height and width in pixels, such as 32,32")
    if img_channels not in (1, 3):
        raise UserError(f"img_channels {img_channels}: use 3 (RGB) or 1 (grey)")
    if resize_mode not in RESIZE_MODES:
        raise UserError(f"resize_mode {resize_mode!r} is not known: use one of {', '.join(RESIZE_MODES)}")
    if len(background) != 3 or any(int(level) != level or not 0 <= level <= 255 for level in background):
        raise UserError(f"background {tuple(background)}: give red, green and blue from 0 to 255, such as 255,255,255")


def check_image(path, full=True):
    """(width, height) of an image, upright; `full` decodes all of it. Raises as `load_image`."""
    with open_image(path, whole=full) as image:
        size = image.size
        if full:
            if image.format in JPEG_FORMATS:  # a reduced scale reads the whole file too
                image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
            with _memory_for(image, size):
                _opaque(image.crop((0, 0, 1, 1)), (255, 255, 255))  # crop decodes the whole file first
            size = size if image.format in JPEG_FORMATS else image.size  # Pillow turns TIFF files by itself
        else:
            _bytes_to_decode(image, size)
            if image.format == "TIFF":  # Pillow 11 swaps the size of a turned one here, Pillow 10 does not
                size = image.tag_v2[Base.ImageWidth], image.tag_v2[Base.ImageLength]
        return size[::-1] if _orientation(image) >= 5 else size


def is_damage(error):
    """Whether the file's content is the cause. Too little memory, EIO, EMFILE, ... may pass."""
    if isinstance(error, OSError):  # Pillow's own have no number
        return error.errno in (None, errno.EINVAL)  # EINVAL: the content names a place before the file's start
    return not isinstance(error, MemoryError)


def is_about_the_file(error):
    """Whether a failure concerns this file alone: it is damaged, gone, or may not be read."""
    return is_damage(error) or (isinstance(error, OSError) and error.errno in ABOUT_THE_FILE)


def describe_error(error):
    """Why an image file could not be decoded, in one line for the user."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture, or of an unknown format"  # Pillow's own text repeats the path
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more pixels than are read ({DECODE_BYTES / BYTES_PER_PIXEL / 1e6:.0f} million)"
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    cause = error.__cause__ or error  # Pillow raises some again as SyntaxError
    bare = isinstance(error, LookupError) or isinstance(cause, (struct.error, EOFError, zlib.error))
    return f"damaged ({text})" if bare else text


@contextlib.contextmanager
def _memory_for(image, stored_size):
    """Hold the memory for decoding within the block, once other threads have freed enough."""
    needed = _bytes_to_decode(image, stored_size)
    with DECODING.take(needed):
        try:
            yield
        except Exception as error:
            if isinstance(error, MemoryError) or _is_free(needed):  # decoders call it damage too
                raise
            raise MemoryError(f"{needed / 1e6:.0f} MB to decode it") from error


def _bytes_to_decode(image, stored_size):
    """The memory that decoding takes. ValueError where it exceeds DECODE_BYTES."""
    pixels = stored_size[0] * stored_size[1]  # in the file, before a JPEG is reduced
    needed = image.width * image.height * BYTES_PER_PIXEL_OF.get(image.format, BYTES_PER_PIXEL)
    if image.info.get("progressive"):
        needed += pixels * PROGRESSIVE_BYTES
    if image.format == "TIFF":
        needed += image.buffer_bytes()
    if needed > DECODE_BYTES:
        raise UserError(
            f"its {pixels / 1e6:.0f} million pixels take {needed / 1e9:.1f} GB to decode, "
            f"more than the {DECODE_BYTES / 1e9:.1f} GB that one image may take: make it smaller"
        )
    return needed


def _is_free(size):
    """Whether so many bytes are free now."""
    try:
        return np.empty(size, dtype=np.uint8).size == size
    except MemoryError:
        return False


def _orientation(image):
    """EXIF orientation, 1 (upright) to 8; 1 where there is none or it cannot be read."""
    try:
        return int(image.getexif().get(Base.Orientation, 1))
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, struct.error):
        return 1  # broken metadata does not make the pixels worse


def _draft(image, mode, size, resize_mode):
    """Choose the reduced scale of a JPEG -> the (width, height) it covers. Other formats: None."""
    if image.format not in JPEG_FORMATS:
        return None
    box, inner = RESIZE_MODES[resize_mode](image.size, size[::-1] if _orientation(image) >= 5 else size)
    shrinkage = min(outer_side / inner_side for outer_side, inner_side in zip(box, inner))
    scale = next((scale for scale, least in DRAFT_SCALES if shrinkage >= least), 1)
    drafted = image.draft(mode, (image.width // scale, image.height // scale))
    return drafted and drafted[1][2:]  # with fractions: the last row and column are partly filler


class Meaning(NamedTuple):  # of the values of a file
    raw_mode: str  # how the file stores its pixels ("I;16B", "L;2", ...); "" if unknown
    dtype: str | None  # NumPy's type of the values, where Pillow has another
    negative: bool  # whether 0 is white
    background: tuple
    profile: bytes | None  # the embedded ICC profile, where it is applied


def _opaque(image, background, icc=True):
    """The image in mode L or RGB, without transparency. Strips bound the memory."""
    raw_mode = _raw_mode(image)  # loading forgets it
    image.load()
    profile = image.info.get("icc_profile") if icc else None
    dtype, negative = getattr(image, "dtype", None), getattr(image, "negative", False)
    meaning = Meaning(raw_mode, dtype, negative, tuple(background), profile or None)
    if image.mode in ("L", "RGB") and not (image.has_transparency_data or dtype or negative or profile):
        return image
    full_range = _full_range(image, meaning) if image.mode[0] in "IF" or dtype else None
    picture = None
    for left, top, strip in _strips(image):
        converted = _opaque_values(strip, meaning, full_range) if full_range else _opaque_levels(strip, meaning)
        picture = picture or Image.new(converted.mode, image.size)
        picture.paste(converted, (left, top))
    return picture


def _strips(image):
    """Yield (left, top, part) for parts of at most STRIP_PIXELS; a small image is one part."""
    width = min(image.width, STRIP_PIXELS)
    height = min(image.height, STRIP_PIXELS // width)
    if (width, height) == image.size:
        yield 0, 0, image
        return
    for top in range(0, image.height, height):
        for left in range(0, image.width, width):
            yield left, top, image.crop((left, top, min(left + width, image.width), min(top + height, image.height)))


def _opaque_values(strip, meaning, full_range):
    """Integers or floats in mode L, scaled from their full range; below 0 is black, NaN too."""
    values = np.asarray(strip, dtype=meaning.dtype)  # same bits: signed and unsigned wrap
    levels = np.clip(values / full_range, 0, 1)
    levels = np.nan_to_num(1 - levels if meaning.negative else levels, nan=0.0)
    picture = Image.fromarray(np.rint(255 * levels).astype(np.uint8))
    transparent = strip.info.get("transparency")
    opaque = Image.fromarray(values != transparent) if isinstance(transparent, int) else None
    return _shown(picture, opaque, meaning)


def _opaque_levels(strip, meaning):
    """8-bit modes in mode L or RGB."""
    if strip.has_transparency_data and strip.mode not in ("LA", "RGBA"):
        _repair_transparency(strip, meaning.raw_mode)
        strip = strip.convert("LA" if strip.mode in ("L", "La") else "RGBA")
    alpha = strip.getchannel("A") if strip.mode in ("LA", "RGBA") else None
    if strip.mode not in ("L", "RGB", "CMYK"):
        strip = strip.convert("L" if strip.mode in ("1", "LA") else "RGB")
    if meaning.negative:
        strip = strip.point(lambda level: 255 - level)
    return _shown(strip, alpha, meaning)


def _shown(picture, alpha, meaning):
    """Colours in mode L, RGB or CMYK and their alpha as a viewer shows them: mode L or RGB."""
    if meaning.profile:
        picture = to_srgb(picture, meaning.profile)
    if picture.mode == "CMYK":
        picture = picture.convert("RGB")
    if alpha is None:
        return picture
    canvas = Image.new("RGB", picture.size, meaning.background)
    canvas.paste(picture.convert("RGB"), mask=alpha)
    return canvas


def _raw_mode(image):
    arguments = image.tile[0][3] if getattr(image, "tile", None) else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _repair_transparency(image, raw_mode):
    """Scale the one transparent value of a PNG to 8 bits, as Pillow scales the pixels."""
    value = image.info.get("transparency")
    if raw_mode in ("L;2", "L;4") and isinstance(value, int):
        image.info["transparency"] = value * {"L;2": 85, "L;4": 17}[raw_mode]
    elif raw_mode == "RGB;16B" and isinstance(value, tuple):
        image.info["transparency"] = tuple(level >> 8 for level in value)


def _full_range(image, meaning):
    """The value of white: by the format, or the least of 1 (floats), 255, 65535 that holds all."""
    if meaning.raw_mode in FULL_RANGES:
        return FULL_RANGES[meaning.raw_mode]
    if meaning.dtype == "int8":
        return 127
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):
        return 65535
    parts = (np.asarray(strip, dtype=meaning.dtype) for _, _, strip in _strips(image))
    largest = max(float(np.max(part, initial=0, where=np.isfinite(part))) for part in parts)
    for full_range in (1, 255, 65535)[0 if image.mode == "F" else 1 :]:
        if largest <= full_range * 1.01:  # resampling overshoots a little
            return full_range
    return largest if image.mode == "F" else np.iinfo(meaning.dtype or np.int32).max


# Each takes the (width, height) of the image and the wanted one. It returns the size of the centred
# box that is resized, and the size that it is resized to.
def _crop(extent, size):
    scale = min(extent[0] / size[0], extent[1] / size[1])
    return (scale * size[0], scale * size[1]), size


def _pad(extent, size):
    scale = min(size[0] / extent[0], size[1] / extent[1])
    return extent, (max(1, round(scale * extent[0])), max(1, round(scale * extent[1])))


RESIZE_MODES = {"crop": _crop, "stretch": lambda extent, size: (extent, size), "pad": _pad}


def _resize(picture, extent, orientation, size, resize_mode):
    """Resize, then bring the small result upright. size: upright. extent: what the pixels cover."""
    box, inner = resize_mode(extent, size[::-1] if orientation >= 5 else size)
    margins = [max((whole - part) / 2, 0) for whole, part in zip(extent, box)]
    corners = (*margins, *(min(whole - margin, whole) for whole, margin in zip(extent, margins)))
    if inner[0] * picture.height > max(LARGEST_PASS, picture.width * picture.height):
        # Pillow resizes the width first: a thin image of many rows would take all memory.
        rows = (0, corners[1], picture.width, corners[3])
        picture = picture.resize((picture.width, inner[1]), Image.Resampling.BICUBIC, box=rows)
        corners = (corners[0], 0, corners[2], inner[1])
    picture = picture.resize(inner, Image.Resampling.BICUBIC, box=corners)
    return picture.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else picture
