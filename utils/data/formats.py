"""An image file -> Pillow's image, not decoded yet."""

import contextlib
import importlib
import io
import os
import re
import stat
import struct
import zlib

from PIL import Image, PngImagePlugin, UnidentifiedImageError
from PIL import TiffImagePlugin as tiff

from utils.errors import UserError

FILE_BYTES = 2**30  # largest file that is read: it is held in memory
PROFILE_BYTES = 2**24  # largest ICC profile
TEXT_BYTES = PngImagePlugin.MAX_TEXT_CHUNK  # largest text of a PNG that Pillow reads

# Chunks of a PNG that change how its pixels are shown. The texts may hold an EXIF orientation.
SHOWN_CHUNKS = (b"tRNS", b"eXIf")
TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
EXIF_TEXTS = (b"Raw profile type exif", b"Raw profile type APP1", b"XML:com.adobe.xmp")

WHITE_IS_ZERO, BLACK_IS_ZERO = 0, 1  # of the tag PHOTOMETRIC_INTERPRETATION
UNSIGNED, SIGNED = (1,), (2,)  # of the tag SAMPLEFORMAT
# libtiff returns values in the machine's byte order: "I;16S" and "I;16BS" become "I;16NS".
ORDERED_RAW_MODE = re.compile("(I;16|I;32|F;32)B?([SF])")


def _avif_fault():
    """Why this Pillow reads no AVIF; "" where it does."""
    with contextlib.suppress(Exception):  # an older Pillow has no such module
        if importlib.import_module("PIL.AvifImagePlugin").SUPPORTED:
            return ""
    return "Pillow 11.3 or newer, built with AVIF, reads it"


def _heif_fault():
    """Why HEIC files are not read; "" where the optional plugin is installed and works."""
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
        return ""
    except ModuleNotFoundError:
        return "`pip install pillow-heif` to read it"
    except Exception as error:  # a broken extra must not end the run
        return f"pillow-heif is installed but broken: {type(error).__name__}"


def _readable():
    """(formats, file extensions, {extension: why not}) of what this installation reads."""
    Image.preinit()  # registers the common formats except WebP
    importlib.import_module("PIL.WebPImagePlugin")
    formats = ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "DIB"]
    extensions, unread = [".bmp", ".dib", ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif"], {}
    extensions += [".pbm", ".pgm", ".ppm", ".tif", ".tiff"]
    avif, heif = (".avif", ".avifs"), (".heic", ".heif", ".hif")
    for name, optional, fault in (("AVIF", avif, _avif_fault()), ("HEIF", heif, _heif_fault())):
        if fault or name not in Image.OPEN:
            unread.update(dict.fromkeys(optional, fault))
        else:
            formats.append(name)
            extensions += optional
    return tuple(formats), tuple(extensions), unread


# Other decoders (EPS) start programs of their own. MPO, two JPEGs in one file, comes with JPEG.
FORMATS, EXTENSIONS, UNREAD_EXTENSIONS = _readable()


@contextlib.contextmanager
def open_image(source, whole=True):
    """Pillow's image of a file, not decoded yet.

    source: a path, or a binary file that can seek. whole: False where only the header will be read.
    ValueError as `check_regular`, UnidentifiedImageError for none of FORMATS, others for damage.
    """
    with contextlib.ExitStack() as opened:
        if not hasattr(source, "read"):
            check_regular(source)
            source = opened.enter_context(open(source, "rb"))
        yield opened.enter_context(_identify(source, whole))


def check_regular(path):
    """The size of a file in bytes. ValueError where it is too large or no regular file."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise UserError("is a folder")
    if not stat.S_ISREG(status.st_mode):  # opening a pipe blocks, and a device never ends
        raise UserError("is no regular file (a pipe, a socket or a device)")
    if status.st_size > FILE_BYTES:
        raise UserError(f"a file of {status.st_size / 1e9:.1f} GB; at most {FILE_BYTES / 1e9:.1f} GB are read")
    return status.st_size


def _identify(file, whole):
    """The image by the first of FORMATS that accepts its first bytes."""
    # Not Image.open: it refuses images above a limit that all users of Pillow share.
    file.seek(0)
    prefix = file.read(16).ljust(16, b"\0")
    file.seek(0)
    for name in FORMATS:
        factory, accept = Image.OPEN[name]
        if accept(prefix) in (True, 1):  # a text says why the format is not supported
            return _open_png(file, whole) if name == "PNG" else _Tiff(file) if name == "TIFF" else factory(file, "")
    raise UnidentifiedImageError("cannot identify the image")


def _open_png(file, whole):
    """A PNG without the chunks that do not change its pixels.

    Pillow refuses an image for a long text, a large profile or a wrong checksum in one of them.
    """
    before, data, texts, profile = [file.read(8)], [], set(), None
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IDAT" and not whole:
            data = [head]
            file.seek(length + 4, os.SEEK_CUR)
        elif not kind[0] & 0x20:  # a capital letter: the image needs the chunk, and Pillow checks it
            (data if data or kind == b"IDAT" else before).extend((head, file.read(length + 4)))
            if kind == b"IEND":
                break
        elif kind == b"iCCP":
            profile = _profile(file.read(length + 4))
        elif kind in SHOWN_CHUNKS + TEXT_CHUNKS:
            body = file.read(length + 4)  # content and checksum
            if _is_kept(kind, body, texts):
                before += [head, body]
        else:
            file.seek(length + 4, os.SEEK_CUR)
    image = PngImagePlugin.PngImageFile(io.BytesIO(b"".join(before + data)))
    if profile:
        image.info["icc_profile"] = profile
    if not whole:
        image.info.setdefault("exif", None)  # else Pillow decodes the pixels to look for it behind them
    return image


def _is_kept(kind, body, texts):
    """Whether a chunk is sound and is no text, or the first of its keyword that may hold EXIF."""
    keyword = body.partition(b"\0")[0]
    if kind in TEXT_CHUNKS and (keyword not in EXIF_TEXTS or keyword in texts or len(body) > TEXT_BYTES):
        return False
    stream = PngImagePlugin.PngStream(io.BytesIO(body))
    try:
        stream.crc(kind, stream.call(kind, 0, len(body) - 4))
    except (SyntaxError, ValueError, OSError, struct.error):
        return False
    texts.add(keyword)
    return True


def _profile(body):
    """The ICC profile of an iCCP chunk; None for a damaged or too large one."""
    unpacker = zlib.decompressobj()
    try:
        PngImagePlugin.PngStream(io.BytesIO(body[-4:])).crc(b"iCCP", body[:-4])
        profile = unpacker.decompress(body[:-4].partition(b"\0")[2][1:], PROFILE_BYTES)
    except (SyntaxError, struct.error, zlib.error):
        return None
    return profile if unpacker.eof else None


class _Tiff(tiff.TiffImageFile):
    """A TIFF with more kinds of pixels than Pillow's table lists."""

    negative = False  # whether 0 is white; Pillow inverts unsigned values of up to 8 bits itself
    dtype = None  # NumPy's type of the values where Pillow has another

    def _setup(self):
        tags = self.tag_v2
        bits, sample_format = tags.get(tiff.BITSPERSAMPLE, (1,)), tags.get(tiff.SAMPLEFORMAT, UNSIGNED)
        samples = tags.get(tiff.SAMPLESPERPIXEL, 1)
        inverted_by_pillow = bits in ((1,), (2,), (4,), (8,)) and sample_format == UNSIGNED and samples == 1
        self.negative = tags.get(tiff.PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO and not inverted_by_pillow
        if self.negative:
            tags[tiff.PHOTOMETRIC_INTERPRETATION] = BLACK_IS_ZERO
        if bits == (8,) and sample_format == SIGNED and samples == 1:
            self.dtype = "int8"
        if bits == (32,) and sample_format == UNSIGNED:
            self.dtype = "uint32"
            tags[tiff.SAMPLEFORMAT] = SIGNED  # Pillow has signed integers only: the bits are the same
        super()._setup()
        if self.tile and self.tile[0][0] == "libtiff":
            tile, (raw_mode, *others) = self.tile[0], self.tile[0][3]
            arguments = (ORDERED_RAW_MODE.sub(r"\1N\2", raw_mode), *others)
            self.tile[0] = tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments)

    def buffer_bytes(self):
        """Memory that libtiff needs besides the image: one strip or tile of the file."""
        tags, (width, height) = self.tag_v2, self.size
        bits, samples = tags.get(tiff.BITSPERSAMPLE, (8,)), tags.get(tiff.SAMPLESPERPIXEL, 1)
        rows = tags.get(tiff.TILELENGTH, min(tags.get(tiff.ROWSPERSTRIP, height), height))
        size = tags.get(tiff.TILEWIDTH, width) * rows * samples * max(bits) // 8
        return 0 if tags.get(tiff.COMPRESSION, 1) == 1 else size
