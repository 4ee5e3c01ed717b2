"""One picture file -> uint8 pixels."""

import struct

import numpy as np
from PIL import Image, UnidentifiedImageError

EXTENSIONS = (".bmp", ".dib", ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".pbm", ".pgm", ".ppm", ".tif", ".tiff")
# Only these decoders look at a file: others (EPS) start programs of their own. MPO, two JPEGs in one file, comes with JPEG.
FORMATS = ("BMP", "DIB", "PNG", "JPEG", "WEBP", "GIF", "PPM", "TIFF")
TIFF_WIDTH, TIFF_HEIGHT, ORIENTATION_TAG = 256, 257, 274
UPRIGHT = {  # EXIF orientation -> what brings the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# How much a picture must shrink for a JPEG to be decoded at a DCT scale: 1/2 and 1/4 leave twice the pixels needed, where the
# result differs by a few levels of 255. 1/8 is a plain mean of 8x8 pixels and shows on thin lines, so it must leave four times.
DRAFT_SCALES = ((8, 32), (4, 8), (2, 4))
FULL_RANGES = {"I;12": 4095, "I;16S": 32767, "I;16BS": 32767}  # raw modes that fill less than 16 bits


def load_image(path, input_shape, img_channels=3, resize_mode="crop", background=(255, 255, 255)):
    """One picture file as uint8 pixels of the network's size.

    The EXIF orientation is applied, transparency composited on `background` (red, green, blue), 16-bit, integer and float
    modes scaled from their full range; then resized (bicubic, antialiased). A JPEG that shrinks
    much is decoded at a reduced scale: nearly the same pixels, two to five times faster.

    Args:
        path: a path, or a binary file that can seek.
        input_shape: (height, width) in pixels.
        img_channels: 3 (RGB) or 1 (grey).
        resize_mode: "crop" (shorter side to size, then the centre), "stretch" (the shape is not kept) or "pad" (the
            whole picture, centred on `background`).
    Returns:
        uint8 array (height, width, img_channels).
    Raises:
        ValueError: an unknown setting. Anything else (OSError, SyntaxError, struct.error, ...) is a file that Pillow
            cannot decode: its decoders raise all kinds, so callers catch Exception.
    """
    check_picture_settings(input_shape, img_channels, resize_mode, background)
    height, width = input_shape
    mode = "L" if img_channels == 1 else "RGB"
    with Image.open(path, formats=FORMATS) as image:
        extent = _draft(image, mode, (width, height), resize_mode)
        picture = _opaque(image, background)
        turn = _orientation(image)  # after loading: Pillow turns TIFF files by itself
        extent = extent or image.size
    if picture.mode != mode:
        picture = picture.convert(mode)
    picture = _resize(picture, extent, turn, (width, height), RESIZE_MODES[resize_mode])
    if picture.size != (width, height):
        picture = _centre(picture, (width, height), background)
    return np.array(picture, dtype=np.uint8).reshape(height, width, img_channels)


def check_picture_settings(input_shape, img_channels, resize_mode, background):
    """Refuse settings that no picture can be loaded with: ValueError saying what is known."""
    if len(input_shape) != 2 or any(int(side) != side or side < 1 for side in input_shape):
        raise ValueError(f"input_shape {tuple(input_shape)}: give height and width in pixels, such as 32,32")
    if img_channels not in (1, 3):
        raise ValueError(f"img_channels {img_channels}: use 3 (RGB) or 1 (grey)")
    if resize_mode not in RESIZE_MODES:
        raise ValueError(f"resize_mode {resize_mode!r} is not known: use one of {', '.join(RESIZE_MODES)}")
    if len(background) != 3 or any(int(level) != level or not 0 <= level <= 255 for level in background):
        raise ValueError(f"background {tuple(background)}: give red, green and blue from 0 to 255, such as 255,255,255")


def check_image(path, full=True):
    """(width, height) of a picture file, upright. Raises as `load_image` does where it cannot be decoded.

    `full` decodes every pixel, at full size, and tries the conversion; otherwise only the header is read.
    """
    with Image.open(path, formats=FORMATS) as image:
        if full:
            _opaque(image.crop((0, 0, 1, 1)), (255, 255, 255))  # crop decodes the whole file first
        width, height = image.size
        if image.format == "TIFF" and not full:  # Pillow 11 swaps the size of a turned one before it is loaded, 10 does not
            width, height = image.tag_v2[TIFF_WIDTH], image.tag_v2[TIFF_HEIGHT]
        return (height, width) if _orientation(image) >= 5 else (width, height)


def describe_error(error):
    """Why a picture file could not be decoded, in one line for the user."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture, or of an unknown format"  # Pillow's own text repeats the path
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _orientation(image):
    """EXIF orientation, 1 (upright) to 8; 1 where there is none or it cannot be read."""
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, struct.error):
        return 1  # broken metadata does not make the pixels worse


def _draft(image, mode, size, resize_mode):
    """Have a JPEG decoded at one of its reduced scales, where the pixels left are plenty.

    Returns the (width, height) that the picture then covers, fractions of a pixel included: the last row and column of a
    reduced JPEG are partly filler. None for other formats, which have no such scales.
    """
    if image.format not in ("JPEG", "MPO"):
        return None
    box, inner = RESIZE_MODES[resize_mode](image.size, size[::-1] if _orientation(image) >= 5 else size)
    shrinkage = min(outer_side / inner_side for outer_side, inner_side in zip(box, inner))
    scale = next((scale for scale, least in DRAFT_SCALES if shrinkage >= least), 1)
    drafted = image.draft(mode, (image.width // scale, image.height // scale))
    return drafted and drafted[1][2:]


def _opaque(image, background):
    """The picture in mode L or RGB, without transparency."""
    raw_mode = _raw_mode(image)
    image.load()
    if image.mode[0] in "IF":
        return _eight_bit(image, raw_mode, background)
    if image.has_transparency_data:
        _repair_transparency(image, raw_mode)
        image = image.convert("RGBA")
        return _composite(image, image.getchannel("A"), background)
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("RGB")


def _raw_mode(image):
    """How the file stores its pixels ("I;16B", "L;2", ...), known until it is loaded; "" where it is not."""
    arguments = image.tile[0][3] if getattr(image, "tile", None) else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _repair_transparency(image, raw_mode):
    """Bring the one transparent value of a PNG to the 8 bits of its pixels: Pillow keeps it as the file has it."""
    value = image.info.get("transparency")
    if raw_mode in ("L;2", "L;4") and isinstance(value, int):
        image.info["transparency"] = value * {"L;2": 85, "L;4": 17}[raw_mode]
    elif raw_mode == "RGB;16B" and isinstance(value, tuple):
        image.info["transparency"] = tuple(level >> 8 for level in value)


def _composite(picture, alpha, background):
    """`picture` over a plain background, mixed by `alpha` (mode L)."""
    canvas = Image.new("RGB", picture.size, tuple(background))
    canvas.paste(picture.convert("RGB"), mask=alpha)
    return canvas


def _eight_bit(image, raw_mode, background):
    """An integer or float picture scaled from its full range to 0..255; below 0 is black, NaN too."""
    values = np.asarray(image)
    if raw_mode == "I;32N":
        values = values.view(np.uint32)  # unsigned in the file; Pillow has signed integers only
    scaled = np.nan_to_num(values / _full_range(image, values, raw_mode), nan=0.0, posinf=1.0, neginf=0.0)
    picture = Image.fromarray(np.rint(255 * np.clip(scaled, 0, 1)).astype(np.uint8))
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return picture
    alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
    return _composite(picture, alpha, background)


def _full_range(image, values, raw_mode):
    """The value that is white: by the format where it says so, else the smallest of 1 (floats), 255, 65535 that holds all."""
    if raw_mode in FULL_RANGES:
        return FULL_RANGES[raw_mode]
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):
        return 65535
    is_float = values.dtype.kind == "f"
    largest = float(np.max(values, initial=0, where=np.isfinite(values)))
    for full_range in (1, 255, 65535)[0 if is_float else 1:]:
        if largest <= full_range * 1.01:  # resampling overshoots a little
            return full_range
    return largest if is_float else np.iinfo(values.dtype).max


# Each takes the picture's (width, height) and the wanted one, and gives the size of the centred box to be resized and the
# size that it is resized to.


def _crop(extent, size):
    scale = min(extent[0] / size[0], extent[1] / size[1])
    return (scale * size[0], scale * size[1]), size


def _stretch(extent, size):
    return extent, size


def _pad(extent, size):
    scale = min(size[0] / extent[0], size[1] / extent[1])
    return extent, (max(1, round(scale * extent[0])), max(1, round(scale * extent[1])))


RESIZE_MODES = {"crop": _crop, "stretch": _stretch, "pad": _pad}


def _resize(picture, extent, orientation, size, resize_mode):
    """Resize first and turn the small result upright. `size` is the upright one, `extent` what the file's pixels cover."""
    box, inner = resize_mode(extent, size[::-1] if orientation >= 5 else size)
    margins = [max((whole - part) / 2, 0) for whole, part in zip(extent, box)]
    corners = (*margins, *(min(whole - margin, whole) for whole, margin in zip(extent, margins)))
    picture = picture.resize(inner, Image.Resampling.BICUBIC, box=corners)
    return picture.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else picture


def _centre(picture, size, background):
    canvas = Image.new("RGB", size, tuple(background)).convert(picture.mode)
    canvas.paste(picture, ((size[0] - picture.width) // 2, (size[1] - picture.height) // 2))
    return canvas
