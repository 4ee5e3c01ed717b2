"""An image file -> Pillow's image, not decoded yet."""

import contextlib
import importlib
import io
import os
import stat
import struct
import zlib

from PIL import Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

FILE_BYTES = 2**30  # largest file that is read: it is held in memory
PROFILE_BYTES = 2**24  # largest ICC profile
TEXT_BYTES = PngImagePlugin.MAX_TEXT_CHUNK  # largest text of a PNG that Pillow reads

# Chunks of a PNG that change how its pixels are shown. The texts may hold an EXIF orientation.
SHOWN_CHUNKS = (b"tRNS", b"eXIf")
TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
EXIF_TEXTS = (b"Raw profile type exif", b"Raw profile type APP1", b"XML:com.adobe.xmp")

BITS_PER_SAMPLE, COMPRESSION, PHOTOMETRIC, SAMPLES_PER_PIXEL, ROWS_PER_STRIP = 258, 259, 262, 277, 278
TILE_WIDTH, TILE_LENGTH, SAMPLE_FORMAT = 322, 323, 339
WHITE_IS_ZERO, BLACK_IS_ZERO = 0, 1  # of PHOTOMETRIC
UNSIGNED, SIGNED = (1,), (2,)  # of SAMPLE_FORMAT
# libtiff hands over the machine's byte order. Pillow knows that for unsigned 16 bits only.
NATIVE_RAW_MODES = {
    "I;16S": "I;16NS", "I;16BS": "I;16NS", "I;32S": "I;32NS", "I;32BS": "I;32NS", "F;32F": "F;32NF", "F;32BF": "F;32NF",
}  # fmt: skip


def _avif_fault():
    """Why this Pillow reads no AVIF; "" where it does."""
    try:
        return "" if importlib.import_module("PIL.AvifImagePlugin").SUPPORTED else "this Pillow was built without AVIF"
    except Exception:  # an older Pillow
        return "Pillow 11.3 or newer reads it"


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
    """(formats, file name endings, {ending: why not}) of what this installation reads."""
    formats = ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "DIB"]
    extensions = [".bmp", ".dib", ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".pbm", ".pgm", ".ppm"]
    extensions += [".tif", ".tiff"]
    unread = {}
    Image.preinit()  # registers the common formats but WebP
    importlib.import_module("PIL.WebPImagePlugin")
    for name, endings, fault in (
        ("AVIF", (".avif", ".avifs"), _avif_fault()),
        ("HEIF", (".heic", ".heif", ".hif"), _heif_fault()),
    ):
        if fault or name not in Image.OPEN:
            unread.update(dict.fromkeys(endings, fault))
        else:
            formats.append(name)
            extensions += endings
    return tuple(formats), tuple(extensions), unread


# Only these decoders look at a file: others (EPS) start programs of their own.
# MPO, two JPEGs in one file, comes with JPEG.
FORMATS, EXTENSIONS, UNREAD_EXTENSIONS = _readable()


@contextlib.contextmanager
def open_image(source, whole=True):
    """Pillow's image of a file, not decoded yet.

    Args:
        source: a path, or a binary file that can seek.
        whole: False where only the header will be read.
    Raises:
        ValueError: no regular file, which could block for ever, or one of more than FILE_BYTES.
        UnidentifiedImageError: none of FORMATS. Anything else is a damaged file.
    """
    with contextlib.ExitStack() as opened:
        if not hasattr(source, "read"):
            check_regular(source)
            source = opened.enter_context(open(source, "rb"))
        yield opened.enter_context(_identify(source, whole))


def check_regular(path):
    """The size of a file in bytes.

    Raises ValueError for what is no regular file, after following links, or too large. Opening a
    pipe blocks, and a device never ends.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(
            "is a folder" if stat.S_ISDIR(status.st_mode) else "is no regular file (a pipe, a socket or a device)"
        )
    return _check_size(status.st_size)


def _check_size(size):
    if size > FILE_BYTES:
        raise ValueError(f"a file of {size / 1e9:.1f} GB; at most {FILE_BYTES / 1e9:.1f} GB are read")
    return size


def _identify(file, whole):
    """The image by the first of FORMATS that knows its beginning.

    `Image.open` would do the same. It refuses images by a limit of its own, which belongs to all users of Pillow.
    """
    _check_size(file.seek(0, os.SEEK_END))
    file.seek(0)
    prefix = file.read(16)
    file.seek(0)
    for name in FORMATS:
        factory, accept = Image.OPEN[name]
        if _accepts(accept, prefix):
            return _open_png(file, whole) if name == "PNG" else _Tiff(file) if name == "TIFF" else factory(file, "")
    raise UnidentifiedImageError("cannot identify the image")


def _accepts(accept, prefix):
    try:
        return accept(prefix) in (True, 1)  # a text says why the format is not supported
    except (IndexError, struct.error):  # too short a file
        return False


# PNG


def _open_png(file, whole):
    """A PNG without the chunks that do not change its pixels.

    Pillow refuses a whole image for a long text, a large profile or a wrong checksum in such a
    chunk. Other readers leave the chunk out.
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
        elif kind in (*SHOWN_CHUNKS, *TEXT_CHUNKS, b"iCCP"):
            body = file.read(length + 4)
            if kind == b"iCCP":
                profile = _profile(kind, body)
            elif _is_intact(kind, body) and (kind in SHOWN_CHUNKS or _holds_exif(kind, body[:-4], texts)):
                before += [head, body]
        else:
            file.seek(length + 4, os.SEEK_CUR)
    image = PngImagePlugin.PngImageFile(io.BytesIO(b"".join(before + data)))
    if profile:
        image.info["icc_profile"] = profile
    if not whole:
        image.info.setdefault("exif", None)  # else Pillow decodes the pixels to look for it behind them
    return image


def _is_intact(kind, body):
    """Whether a chunk is whole and its checksum is right."""
    return len(body) >= 4 and zlib.crc32(body[:-4], zlib.crc32(kind)) == int.from_bytes(body[-4:], "big")


def _profile(kind, body):
    """The ICC profile of an iCCP chunk; None where it is damaged or too large."""
    return _inflate(body[:-4].partition(b"\0")[2][1:], PROFILE_BYTES) if _is_intact(kind, body) else None


def _holds_exif(kind, body, seen):
    """Whether a text may hold an EXIF orientation and Pillow reads it.

    `seen`: the keywords of earlier texts.
    """
    keyword, _, text = body.partition(b"\0")
    if keyword not in EXIF_TEXTS or keyword in seen or len(body) > TEXT_BYTES:
        return False
    seen.add(keyword)
    if kind == b"zTXt":
        return _inflate(text[1:], TEXT_BYTES) is not None
    compressed = kind == b"iTXt" and text[:1] == b"\1"
    return not compressed or _inflate(text[2:].split(b"\0", 2)[-1], TEXT_BYTES) is not None


def _inflate(data, limit):
    """The zlib stream unpacked; None where it is damaged or longer than `limit` bytes."""
    unpacker = zlib.decompressobj()
    try:
        content = unpacker.decompress(data, limit)
    except zlib.error:
        return None
    return content if unpacker.eof else None


# TIFF


class _Tiff(TiffImagePlugin.TiffImageFile):
    """A TIFF with more kinds of pixels than Pillow's table lists.

    Attributes:
        negative: Whether 0 is white. Pillow inverts unsigned values of up to 8 bits itself.
        dtype: NumPy's type of the values where Pillow takes another; else None.
    """

    negative, dtype = False, None

    def _setup(self):
        tags = self.tag_v2
        bits, sample_format = tags.get(BITS_PER_SAMPLE, (1,)), tags.get(SAMPLE_FORMAT, UNSIGNED)
        samples = tags.get(SAMPLES_PER_PIXEL, 1)
        inverted_by_pillow = bits in ((1,), (2,), (4,), (8,)) and sample_format == UNSIGNED and samples == 1
        self.negative = tags.get(PHOTOMETRIC) == WHITE_IS_ZERO and not inverted_by_pillow
        if self.negative:
            tags[PHOTOMETRIC] = BLACK_IS_ZERO
        if bits == (8,) and sample_format == SIGNED and samples == 1:
            self.dtype = "int8"
        if bits == (32,) and sample_format == UNSIGNED:
            self.dtype = "uint32"
            tags[SAMPLE_FORMAT] = SIGNED  # Pillow has signed integers only: the bits are the same
        super()._setup()
        self._take_native_order()

    def _take_native_order(self):
        if self.tile and self.tile[0][0] == "libtiff":
            tile, (raw_mode, *others) = self.tile[0], self.tile[0][3]
            arguments = (NATIVE_RAW_MODES.get(raw_mode, raw_mode), *others)
            self.tile[0] = tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments)

    def buffer_bytes(self):
        """Memory that libtiff needs besides the image: one strip or tile of the file."""
        tags, (width, height) = self.tag_v2, self.size
        bits, samples = tags.get(BITS_PER_SAMPLE, (8,)), tags.get(SAMPLES_PER_PIXEL, 1)
        columns = tags.get(TILE_WIDTH, width)
        rows = tags.get(TILE_LENGTH, min(tags.get(ROWS_PER_STRIP, height), height))
        return 0 if tags.get(COMPRESSION, 1) == 1 else columns * rows * samples * max(bits) // 8
