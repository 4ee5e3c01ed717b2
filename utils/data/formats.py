"""An image file -> Pillow's image, not decoded yet."""

import contextlib
import importlib
import io
import os
import re
import stat
import struct
import zlib

from PIL import Image, JpegImagePlugin, PngImagePlugin, PpmImagePlugin
from PIL import TiffImagePlugin as tiff

from utils.errors import UserError

FILE_BYTES = 2**30  # largest file that is read: it is held in memory
PngImagePlugin.MAX_TEXT_CHUNK = 2**24  # largest color profile of a PNG; Pillow's limit of 1 MB is too low for some

# What changes how a PNG is shown: chunks, and texts that may hold an EXIF orientation.
SHOWN_CHUNKS = (b"tRNS", b"eXIf", b"iCCP")
EXIF_TEXTS = (b"Raw profile type exif\0", b"Raw profile type APP1\0", b"XML:com.adobe.xmp\0")

JPEG_END, JPEG_SCAN = b"\xff\xd9", b"\xff\xda"  # the marks of its end and of where a scan begins
JPEG_PIXELS = 2**24  # of a JPEG without its end, which is decoded in full to see whether it is whole
PPM_HEADER = 4096  # bytes: Pillow reads headers byte by byte, and copies a plain file for each of its comments
PPM_COMMENT = re.compile(rb"#[^\r\n]*[\r\n]?")

SAMPLE_FORMATS = {1: "unsigned", 2: "signed", 3: "float"}  # of the values of a TIFF
TIFF_VALUES = {(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (32, 2), (32, 3)}  # (bits, sample format) that Pillow reads

NEW_SUBFILE_TYPE = 254  # a tag of a TIFF: 1 for a reduced copy
# (photometric interpretation, samples, extra ones) whose separate planes Pillow reads right: RGB,
# with alpha, CMYK.
TIFF_PLANES = {(2, 3, ()), (2, 4, (2,)), (5, 4, ())}

# Formats that some installations read, the module for each, and the extensions.
OPTIONAL = (("AVIF", "PIL.AvifImagePlugin", ".avif", ".avifs"), ("HEIF", "pillow_heif", ".heic", ".heif", ".hif"))


def _readable():
    """(formats, file extensions) of what this installation reads."""
    Image.preinit()  # registers the common formats except WebP
    importlib.import_module("PIL.WebPImagePlugin")
    formats = ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "DIB"]
    extensions = [".bmp", ".dib", ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif"]
    extensions += [".pbm", ".pgm", ".ppm", ".tif", ".tiff"]
    for name, module_name, *endings in OPTIONAL:
        with contextlib.suppress(Exception):  # missing, or broken, which must not end the run
            module = importlib.import_module(module_name)
            getattr(module, "register_heif_opener", bool)()
            if getattr(module, "SUPPORTED", True):
                formats.append(name)
                extensions += endings
    return tuple(formats), tuple(extensions)


# Other decoders (EPS) start programs of their own. MPO, two JPEGs in one file, comes with JPEG.
FORMATS, EXTENSIONS = _readable()


@contextlib.contextmanager
def open_image(source, whole=True):
    """Pillow's image of a path or a binary file, which it closes. whole: False: the header alone.

    UserError as `check_regular` and for none of FORMATS, other exceptions for damage.
    """
    if not hasattr(source, "read"):
        check_regular(source)
        source = open(source, "rb")  # noqa: SIM115 (the next line closes it)
    with source:
        # Not Image.open: it refuses images above a limit that all users of Pillow share.
        prefix = source.read(16).ljust(16, b"\0")
        source.seek(0)
        for name in FORMATS:
            factory, accept = Image.OPEN[name]
            if accept(prefix) in (True, 1):  # a text says why the format is not supported
                break
        else:
            raise UserError("not an image, or of an unknown format")
        opened = {"PNG": _open_png, "JPEG": _open_jpeg, "PPM": _open_ppm, "TIFF": _open_tiff}.get(name)
        with opened(source, whole) if opened else factory(source, "") as image:
            yield image


def check_regular(path):
    """The size of a file in bytes. UserError where it is too large or no regular file."""
    mode, size = os.stat(path).st_mode, os.path.getsize(path)
    if not stat.S_ISREG(mode):  # opening a pipe blocks, and a device never ends
        raise UserError("is a folder" if stat.S_ISDIR(mode) else "is no regular file (a pipe, a socket or a device)")
    if size > FILE_BYTES:
        raise UserError(f"a file of {size / 1e9:.1f} GB; at most {FILE_BYTES / 1e9:.1f} GB are read")
    return size


def _open_png(file, whole):
    """A PNG without chunks that its pixels do not need: Pillow refuses it for a fault in one."""
    header, pixels = [file.read(8)], []
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IDAT" and not whole:
            pixels = [head]
            file.seek(length + 4, os.SEEK_CUR)
            continue
        if kind == b"CgBI":
            raise UserError("Apple's CgBI kind of PNG, which is not read")
        body = file.read(length + 4)
        needed = not kind[0] & 0x20  # a capital letter: Pillow says what is wrong with such a chunk
        sound = zlib.crc32(kind + body[:-4]).to_bytes(4, "big") == body[-4:]
        if needed or (sound and (kind in SHOWN_CHUNKS or body.startswith(EXIF_TEXTS))):
            (pixels if kind in (b"IDAT", b"IEND") else header).extend((head, body))
    image = PngImagePlugin.PngImageFile(io.BytesIO(b"".join(header + pixels)))
    if image.mode == "P" and image.palette is None:
        raise SyntaxError("its palette is missing")
    image.info.setdefault("exif", None)  # else Pillow decodes the pixels to look for it behind them
    return image


def _open_jpeg(file, whole):
    """A JPEG. Pillow calls one truncated that lacks its end mark alone, of two bytes."""
    factory, content = JpegImagePlugin.jpeg_factory, b""
    file.seek(-2, os.SEEK_END)
    if whole and file.read() != JPEG_END:
        file.seek(0)
        content = file.read().rstrip(b"\xff")
    file.seek(0)
    image = factory(file, "")
    if content.rfind(JPEG_END) >= content.rfind(JPEG_SCAN) or image.width * image.height > JPEG_PIXELS:
        return image
    # Where pixels are missing, whatever follows is taken for them.
    ends = [bytes([byte]) * 64 + JPEG_END for byte in (0x12, 0x35, 0x5A, 0x6C, 0x93, 0xA5, 0xD8, 0xE7)]
    with contextlib.suppress(OSError):
        if len({factory(io.BytesIO(content + end), "").tobytes() for end in (JPEG_END, *ends)}) == 1:
            return factory(io.BytesIO(content + JPEG_END), "")
    return image


def _open_ppm(file, whole):
    """A PPM; a plain one, which is text, without its comments. UserError for a long header."""
    head = file.read(PPM_HEADER)
    if head[1:2] in b"123":
        file = io.BytesIO(PPM_COMMENT.sub(b"", head + file.read()))
        head = file.read(PPM_HEADER)
    if len(head) == PPM_HEADER and len(PPM_COMMENT.sub(b"", head).split()) < 4:  # the kind, the sides, the white level
        raise UserError(f"a PPM with a header of more than {PPM_HEADER} bytes, which is not read")
    file.seek(0)
    return PpmImagePlugin.PpmImageFile(file, "")


def _open_tiff(file, whole):
    """The first page of a TIFF that is not marked as a reduced copy of another."""
    image = _Tiff(file, "")
    try:
        while image.tag_v2.get(NEW_SUBFILE_TYPE, 0) & 1:
            image.seek(image.tell() + 1)
    except EOFError:
        raise UserError("a TIFF that holds thumbnails alone, which is not read") from None
    return image


class _Tiff(tiff.TiffImageFile):
    """A TIFF that is refused, by name, where Pillow would read its values wrong."""

    negative = False  # whether 0 is white; Pillow inverts values of up to 8 bits itself

    def _setup(self):
        tags = self.tag_v2
        self.bits, sample_format = tags.get(tiff.BITSPERSAMPLE, (1,)), tags.get(tiff.SAMPLEFORMAT, (1,))[0]
        compression, self.samples = tags.get(tiff.COMPRESSION, 1), tags.get(tiff.SAMPLESPERPIXEL, 1)
        self.is_compressed = compression != 1
        if compression not in tiff.COMPRESSION_INFO:
            raise UserError(f"a TIFF of compression number {compression}, which is not read")
        swapped = self.is_compressed and self.bits[0] == 32 and tags.prefix == b"MM"
        if self.samples == 1:
            tags[tiff.PLANAR_CONFIGURATION] = 1  # one plane either way; Pillow would cut its raw mode short
        layout = tags.get(tiff.PHOTOMETRIC_INTERPRETATION), self.samples, tags.get(tiff.EXTRASAMPLES, ())
        readable = self.bits[0] == 8 and tags.get(tiff.FILLORDER, 1) == 1 and layout in TIFF_PLANES
        planes = tags.get(tiff.PLANAR_CONFIGURATION) == 2 and not readable
        if (self.bits[0], sample_format) not in TIFF_VALUES or swapped or planes:
            kind = f"{self.bits[0]}-bit {SAMPLE_FORMATS.get(sample_format, 'other')} values"
            layout = ", compressed in big-endian order" * swapped + f", in {self.samples} separate planes" * planes
            raise UserError(f"a TIFF of {kind}{layout}, which is not read")
        self.negative = tags.get(tiff.PHOTOMETRIC_INTERPRETATION) == 0 and self.bits not in ((1,), (2,), (4,), (8,))
        if self.negative:
            tags[tiff.PHOTOMETRIC_INTERPRETATION] = 1
        super()._setup()

    def buffer_bytes(self):
        """Memory that libtiff needs besides the image: one strip or tile of the file."""
        tags, (width, height) = self.tag_v2, self.size
        rows = tags.get(tiff.TILELENGTH, min(tags.get(tiff.ROWSPERSTRIP, height), height))
        size = tags.get(tiff.TILEWIDTH, width) * rows * self.samples * max(self.bits) // 8
        return size * self.is_compressed
