"""Files that Pillow refuses or reads otherwise than viewers do, each written byte by byte."""

import io
import os
import struct
import subprocess
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import load_as
from PIL import Image, PngImagePlugin, TiffImagePlugin

from utils.data import formats
from utils.data.decode import DECODE_BYTES, check_image, describe_error
from utils.data.formats import open_image
from utils.data.search import check_images

PROJECT = Path(__file__).resolve().parents[1]
HAS_AVIF = ".avif" in formats.EXTENSIONS


def load_same_size(path, channels=1, **settings):
    width, height = check_image(path)
    return load_as(path, (height, width), channels, "stretch", **settings).astype(int)


# TIFF


def write_tiff(path, values, order, photometric, sample_format=1, deflate=False, extra_samples=None, tags=()):
    """A TIFF of one strip by the specification, TIFF 6.0. values: (H, W) or (H, W, C).

    order: "<" or ">".
    """
    height, width, *channels = values.shape
    samples, bits = (channels or [1])[0], values.dtype.itemsize * 8
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    data = zlib.compress(data) if deflate else data
    short, long = 3, 4
    entries = {
        256: (long, width),
        257: (long, height),
        258: (short, bits),
        259: (short, 8 if deflate else 1),
        262: (short, photometric),
        273: (long, 8),
        277: (short, samples),
        278: (long, height),
        279: (long, len(data)),
        339: (short, sample_format),
    }
    if samples == 2:  # two shorts lie in the entry itself
        entries[258] = entries[339] = None
    if extra_samples is not None:
        entries[338] = (short, extra_samples)
    entries.update(tags)
    directory = struct.pack(order + "H", len(entries))
    for tag, entry in sorted(entries.items()):
        if entry is None:
            directory += struct.pack(order + "HHIHH", tag, short, 2, *[bits if tag == 258 else sample_format] * 2)
        else:
            directory += struct.pack(order + "HHI", tag, entry[0], 1) + struct.pack(
                order + {3: "HH", 4: "I"}[entry[0]], entry[1], *[0] * (entry[0] == short)
            )
    data += b"\0" * (len(data) % 2)
    start = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, 8 + len(data))
    path.write_bytes(start + data + directory + struct.pack(order + "I", 0))


RAMP = np.arange(256).reshape(16, 16) / 255  # the shown levels, if 0 is black
KINDS = {  # name -> (values that show RAMP, sample format)
    "uint8": ((RAMP * 255).astype("u1"), 1),
    "int8": (np.rint(RAMP * 127).astype("i1"), 2),
    "uint16": (np.rint(RAMP * 65535).astype("u2"), 1),
    "int16": (np.rint(RAMP * 32767).astype("i2"), 2),
    "uint32": (np.rint(RAMP * (2**32 - 1)).astype("u4"), 1),
    "int32": (np.rint(RAMP * (2**31 - 1)).astype("i4"), 2),
    "float32": (RAMP.astype("f4"), 3),
}


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("planar", [1, 2])  # planes of one sample are no planes
@pytest.mark.parametrize("kind", ["uint8", "uint16", "int32", "float32"])
def test_grey_tiffs_of_every_kind_show_the_same_ramp(tmp_path, kind, order, white_is_zero, deflate, planar):
    values, sample_format = KINDS[kind]
    tags = {284: (3, planar)}.items()
    write_tiff(tmp_path / "a.tif", values, order, 0 if white_is_zero else 1, sample_format, deflate, tags=tags)
    if kind in ("int32", "float32") and order == ">" and deflate:
        ((_, reason),) = check_images([str(tmp_path / "a.tif")])[1]
        name = "signed" if kind == "int32" else "float"
        assert reason == f"a TIFF of 32-bit {name} values, compressed in big-endian order, which is not read"
        return
    shown = 255 * (1 - RAMP if white_is_zero else RAMP)
    assert np.abs(load_same_size(tmp_path / "a.tif")[..., 0] - shown).max() <= 0.51


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    "kind, name", [("int8", "8-bit signed"), ("int16", "16-bit signed"), ("uint32", "32-bit unsigned")]
)
def test_tiffs_that_pillow_would_read_wrong_are_left_out_by_name(tmp_path, kind, name, order, deflate):
    values, sample_format = KINDS[kind]
    write_tiff(tmp_path / "a.tif", values, order, 1, sample_format, deflate)
    for full in (True, False):
        ((_, reason),) = check_images([str(tmp_path / "a.tif")], full)[1]
        assert f"a TIFF of {name} values" in reason and "not read" in reason
    with pytest.raises(ValueError, match=name):
        load_as(tmp_path / "a.tif", (8, 8))


def test_a_tiff_of_12_bits_is_left_out_by_name(tmp_path):
    write_tiff(tmp_path / "a.tif", KINDS["uint16"][0], "<", 1, tags={258: (3, 12)}.items())
    assert "a TIFF of 12-bit unsigned values" in check_images([str(tmp_path / "a.tif")])[1][0][1]


def planes(path, values, order, deflate=False, photometric=2, extra=()):
    """A TIFF of samples in planes of their own. values: (H, W, C)."""
    height, width, samples = values.shape
    bits, content = values.dtype.itemsize * 8, b""
    data = [values[..., i].astype(values.dtype.newbyteorder(order)).tobytes() for i in range(samples)]
    data = [zlib.compress(plane) for plane in data] if deflate else data
    offsets = [8 + sum(map(len, data[:i])) for i in range(samples)]
    content = b"".join(data) + b"\0" * (sum(map(len, data)) % 2)
    entries = {256: [width], 257: [height], 258: [bits] * samples, 259: [8 if deflate else 1], 262: [photometric]}
    entries |= {273: offsets, 277: [samples], 278: [height], 279: list(map(len, data)), 284: [2]}
    entries |= {338: list(extra)} if extra else {}
    directory = struct.pack(order + "H", len(entries))
    for tag, numbers in sorted(entries.items()):
        kind, form = (4, "I") if tag in (273, 279) else (3, "H")
        packed = struct.pack(order + form * len(numbers), *numbers)
        directory += struct.pack(order + "HHI", tag, kind, len(numbers))
        directory += packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack(order + "I", 8 + len(content))
        content += packed.ljust(-len(packed) % 2 + len(packed), b"\0") if len(packed) > 4 else b""
    start = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, 8 + len(content))
    path.write_bytes(start + content + directory + bytes(4))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_planes_of_colors_are_read_right_or_left_out_by_name(tmp_path, dtype, order, deflate, channels):
    values = np.random.default_rng(0).integers(0, 256, (9, 7, 3))
    planes(tmp_path / "a.tif", (values * (257 if dtype == "u2" else 1)).astype(dtype), order, deflate)
    if dtype == "u2":
        with pytest.raises(ValueError, match="a TIFF of 16-bit unsigned values, in 3 separate planes"):
            load_as(tmp_path / "a.tif", (9, 7), channels)
        return
    shown = values if channels == 3 else values @ np.array([[0.299], [0.587], [0.114]])
    assert np.abs(load_same_size(tmp_path / "a.tif", channels) - shown).max() <= (0 if channels == 3 else 1)


PLANAR = {  # (photometric, samples, extra samples) -> what is shown on black of (H, W, C) levels; None: left out
    (2, 3, ()): lambda x: x,
    (2, 4, (2,)): lambda x: x[..., :3] * x[..., 3:] / 255,
    (5, 4, ()): lambda x: (255 - x[..., :3]) * (255 - x[..., 3:]) / 255,
    **dict.fromkeys([(1, 2, ()), (1, 2, (0,)), (1, 2, (1,)), (1, 2, (2,)), (1, 3, (0, 0)), (2, 4, ())]),
    **dict.fromkeys([(2, 4, (0,)), (2, 5, (0, 0)), (5, 5, (0,)), (6, 3, ()), (8, 3, ())]),
}


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("kind", PLANAR)
def test_other_numbers_of_planes_are_read_right_or_left_out_by_name(tmp_path, kind, deflate):
    photometric, samples, extra = kind
    values = np.random.default_rng(0).integers(0, 256, (9, 7, samples))
    planes(tmp_path / "a.tif", values.astype("u1"), "<", deflate, photometric, extra)
    if PLANAR[kind]:
        found = load_same_size(tmp_path / "a.tif", 3, background=(0, 0, 0))
        assert np.abs(found - PLANAR[kind](values)).max() <= 1
    else:
        ((_, reason),) = check_images([str(tmp_path / "a.tif")])[1]
        assert reason == f"a TIFF of 8-bit unsigned values, in {samples} separate planes, which is not read"


def test_a_tiff_of_another_compression_is_left_out_by_name(tmp_path):
    write_tiff(tmp_path / "a.tif", KINDS["uint8"][0], "<", 1, tags={259: (3, 33003)}.items())
    ((_, reason),) = check_images([str(tmp_path / "a.tif")])[1]
    assert reason == "a TIFF of compression number 33003, which is not read"


@pytest.mark.parametrize("sizes", [(8, 40), (8, 4, 40, 20), (40, 8), (8,)])
def test_a_page_that_is_a_thumbnail_is_no_image(tmp_path, sizes):
    """Sizes of pages; all but 40 are marked as reduced."""
    pages, tags = [], []
    for size in sizes:
        pages.append(Image.new("RGB", (size, size // 2), (size, 0, 0)))
        tags.append(TiffImagePlugin.ImageFileDirectory_v2())
        tags[-1][254] = int(size != 40)
    with TiffImagePlugin.AppendingTiffWriter(str(tmp_path / "a.tif"), new=True) as file:
        for page, directory in zip(pages, tags):
            page.save(file, "TIFF", tiffinfo=directory)
            file.newFrame()
    for full in (True, False):
        good, bad = check_images([str(tmp_path / "a.tif")], full)
        if sizes == (8,):
            assert bad[0][1] == "a TIFF that holds thumbnails alone, which is not read"
        else:
            assert good == [(str(tmp_path / "a.tif"), (40, 20))]
    if sizes != (8,):
        assert load_as(tmp_path / "a.tif", (4, 8))[2, 3].tolist() == [40, 0, 0]


@pytest.mark.parametrize("kind", ["int32", "float32"])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_values_below_zero_are_below_the_darkest_or_the_lightest(tmp_path, kind, white_is_zero):
    values, sample_format = KINDS[kind]
    values = values.copy()
    values[0, 5], values[3, 3] = -1, values.min() - 100
    write_tiff(tmp_path / "a.tif", values, "<", 0 if white_is_zero else 1, sample_format)
    found = load_same_size(tmp_path / "a.tif")[..., 0]
    assert found[0, 5] == found[3, 3] == (255 if white_is_zero else 0)


def test_what_is_no_number_is_black_in_a_negative_too(tmp_path):
    values = np.array([[np.nan, np.inf, -np.inf], [0, 0.25, 1]], dtype="f4")
    write_tiff(tmp_path / "a.tif", values, "<", 0, 3)
    np.testing.assert_array_equal(load_same_size(tmp_path / "a.tif")[..., 0], [[0, 0, 255], [255, 191, 0]])


def test_a_missing_photometric_tag_inverts_no_16_bits(tmp_path):
    values, _ = KINDS["uint16"]
    write_tiff(tmp_path / "a.tif", values, "<", 1)
    content = bytearray((tmp_path / "a.tif").read_bytes())
    place = content.rindex(struct.pack("<HHI", 262, 3, 1))
    content[place : place + 2] = struct.pack("<H", 263)  # another tag
    (tmp_path / "a.tif").write_bytes(content)
    assert np.abs(load_same_size(tmp_path / "a.tif")[..., 0] - 255 * RAMP).max() <= 0.51


@pytest.mark.parametrize("premultiplied", [False, True])
@pytest.mark.parametrize("deflate", [False, True])
def test_grey_with_alpha_is_composited_as_its_tag_says(tmp_path, premultiplied, deflate):
    if premultiplied and (b"II", 1, (1,), 1, (8, 8), (1,)) not in TiffImagePlugin.OPEN_INFO:
        pytest.skip("an older Pillow reads none")
    generator = np.random.default_rng(0)
    alpha = generator.integers(0, 256, (16, 16))
    grey = generator.integers(0, alpha + 1) if premultiplied else generator.integers(0, 256, (16, 16))
    values = np.stack([grey, alpha], axis=-1).astype("u1")
    write_tiff(tmp_path / "a.tif", values, "<", 1, deflate=deflate, extra_samples=1 if premultiplied else 2)
    inside = grey if premultiplied else grey * alpha / 255
    for background in ((0, 0, 0), (255, 255, 255), (100, 100, 100)):
        found = load_same_size(tmp_path / "a.tif", background=background)[..., 0]
        assert np.abs(found - (inside + background[0] * (1 - alpha / 255))).max() <= 1.5  # two roundings


def test_a_tiff_of_an_unknown_kind_says_so(tmp_path):
    write_tiff(tmp_path / "a.tif", RAMP.astype("f8"), "<", 1, 3)
    assert "a TIFF of 64-bit float values" in check_images([str(tmp_path / "a.tif")])[1][0][1]


# PNG


def chunk(kind, data, checksum=None):
    right = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", right if checksum is None else checksum)


def png(*before_pixels, after_pixels=(), pixels=b"\0\x10\x20\x30"):
    """A PNG of one pixel."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            header,
            *before_pixels,
            chunk(b"IDAT", zlib.compress(pixels)),
            *after_pixels,
            chunk(b"IEND", b""),
        ]
    )


PALETTE = png()[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 3, 0, 0, 0)) + chunk(b"PLTE", b"123456")
PALETTE += chunk(b"IDAT", zlib.compress(b"\0\1")) + chunk(b"IEND", b"")
LONG = bytes(3 * 2**20)  # above Pillow's limit of 1 MB


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"workflow\0\0" + zlib.compress(LONG)),
        chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(LONG)),
        chunk(b"tEXt", b"prompt\0" + bytes(70 * 2**20)),
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(LONG)),
        chunk(b"iCCP", b"profile\0\0" + b"no zlib stream"),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(LONG)),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(LONG)),
        chunk(b"pHYs", b"123456789", checksum=1),
        chunk(b"gAMA", b"1234", checksum=1),
        chunk(b"tEXt", b"a\0b", checksum=1),
        chunk(b"eXIf", b"MM\0*", checksum=1),
        chunk(b"pHYs", b"short"),
        chunk(b"gAMA", b""),
        chunk(b"acTL", b"12"),
        chunk(b"cHRM", b"1"),
    ],
)
@pytest.mark.parametrize("after", [False, True])
def test_chunks_that_no_pixel_depends_on_do_no_harm(tmp_path, extra, after):
    (tmp_path / "a.png").write_bytes(png(after_pixels=[extra]) if after else png(extra))
    assert load_same_size(tmp_path / "a.png", 3).tolist() == [[[16, 32, 48]]]
    assert check_image(tmp_path / "a.png", full=False) == (1, 1)


@pytest.mark.parametrize(
    "broken, reason",
    [
        (png()[:29] + b"abcd" + png()[33:], "checksum in b'IHDR'"),
        (png(chunk(b"PLTE", b"123", checksum=5)), "checksum in b'PLTE'"),
        (png()[:-30], "damaged"),
        (png()[:-25], "truncated"),
        (png(chunk(b"iCCP", b"no zero byte")), "iCCP chunk"),
        (PALETTE[:33] + PALETTE[33 + 12 + 6 :], "damaged (its palette is missing)"),
        (png()[:8] + chunk(b"CgBI", b"1234") + png()[8:], "Apple's CgBI kind of PNG, which is not read"),
        (png(chunk(b"tEXt", b"XML:com.adobe.xmp\0" + bytes(10**6)) * 80), "Too much memory used in text chunks"),
    ],
)
def test_damage_of_a_png_is_given_its_true_reason(tmp_path, broken, reason):
    (tmp_path / "a.png").write_bytes(broken)
    ((path, found),) = check_images([str(tmp_path / "a.png")])[1]
    assert path == str(tmp_path / "a.png") and reason in found


@pytest.mark.parametrize("kind", [b"eXIf", b"zTXt"])
def test_the_orientation_in_a_png_is_kept(tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = exif.tobytes()[6:]
    raw = b"Raw profile type exif\0\0" + zlib.compress(
        b"\nexif\n%8d\n" % (len(content) + 6) + (b"Exif\0\0" + content).hex().encode()
    )
    image = Image.new("RGB", (3, 2))
    image.save(tmp_path / "plain.png")
    plain = (tmp_path / "plain.png").read_bytes()
    (tmp_path / "a.png").write_bytes(plain[:33] + chunk(kind, content if kind == b"eXIf" else raw) + plain[33:])
    assert check_image(tmp_path / "a.png") == check_image(tmp_path / "a.png", full=False) == (2, 3)


# JPEG


def jpeg(seed=0, **options):
    """A noisy JPEG of 40 x 24 pixels."""
    noise = np.random.default_rng(seed).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).save(content, "JPEG", **options)
    return content.getvalue()


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("restart", [0, 1])
@pytest.mark.parametrize("missing", [1, 2])
def test_a_jpeg_that_lacks_its_end_mark_alone_is_whole(tmp_path, progressive, restart, missing):
    content = jpeg(progressive=progressive, restart_marker_blocks=restart)
    (tmp_path / "whole.jpg").write_bytes(content)
    (tmp_path / "a.jpg").write_bytes(content[:-missing])
    for full in (True, False):
        assert check_images([str(tmp_path / "a.jpg")], full) == ([(str(tmp_path / "a.jpg"), (40, 24))], [])
    for shape in ((24, 40), (3, 5)):
        np.testing.assert_array_equal(*(load_as(tmp_path / name, shape) for name in ("whole.jpg", "a.jpg")))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_jpeg_that_lacks_more_is_damaged(tmp_path, progressive, seed):
    content = jpeg(seed, progressive=progressive)
    for missing in range(3, 40):
        (tmp_path / "a.jpg").write_bytes(content[:-missing])
        ((_, reason),) = check_images([str(tmp_path / "a.jpg")])[1]
        assert "truncated" in reason
        with pytest.raises(OSError, match="truncated"):
            load_as(tmp_path / "a.jpg", (8, 8))


def test_what_follows_the_end_mark_of_a_jpeg_does_no_harm(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg() + b"maker's notes" * 9)
    (tmp_path / "b.jpg").write_bytes(jpeg())
    np.testing.assert_array_equal(*(load_as(tmp_path / name, (24, 40)) for name in ("a.jpg", "b.jpg")))


# PPM

COMMENTS = b"#\n" * 5000  # Pillow's reader takes minutes for millions of them


@pytest.mark.parametrize(
    "content",
    [
        b"P3\n2 1\n" + COMMENTS + b"255\n1 2 3 " + COMMENTS + b"4 5 6\n",
        b"P3 # a comment\n2 1 # of two\n#\r\n255\n1 2 3 4 #\n5 6",
        b"P6\n#" + b"a" * 1000 + b"\n2 1\n255\n\1\2\3\4\5\6",
        b"P6 2 1 255\n\1\2\3\4\5\6" + b" " * 9000,
    ],
)
def test_comments_of_a_ppm_do_no_harm(tmp_path, content):
    (tmp_path / "a.ppm").write_bytes(content)
    with open_image(tmp_path / "a.ppm") as image:
        assert content.startswith(b"P6") or b"#" not in image.fp.read()
    assert check_image(tmp_path / "a.ppm", full=False) == check_image(tmp_path / "a.ppm") == (2, 1)
    assert load_as(tmp_path / "a.ppm", (1, 2)).tolist() == [[[1, 2, 3], [4, 5, 6]]]


@pytest.mark.parametrize("filler", [b"#\n", b" "])
@pytest.mark.parametrize("kind", [b"P3", b"P4", b"P5", b"P6"])
def test_a_ppm_of_an_endless_header_is_left_out_by_name(tmp_path, filler, kind):
    (tmp_path / "a.ppm").write_bytes(kind + b"\n" + filler * 9000 + b"2 1\n255\n\1\2\3\4\5\6")
    found = check_images([str(tmp_path / "a.ppm")])
    if kind == b"P3" and filler != b" ":  # a plain one loses its comments first
        assert "damaged" in found[1][0][1]
    else:
        assert found[1][0][1] == "a PPM with a header of more than 4096 bytes, which is not read"


def test_the_other_limits_of_pillow_stay_as_they_are():
    code = (
        "from PIL import Image, ImageFile, PngImagePlugin as p; a = Image.MAX_IMAGE_PIXELS, p.MAX_TEXT_MEMORY\n"
        "import utils.data.decode\n"
        "assert a == (Image.MAX_IMAGE_PIXELS, p.MAX_TEXT_MEMORY) and not ImageFile.LOAD_TRUNCATED_IMAGES"
    )
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True)
    assert PngImagePlugin.MAX_TEXT_CHUNK == 2**24  # of a color profile


# Large images


def webp_of(width, height):
    """A WebP of 34 bytes or so that claims this size: one colour needs no data."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (9, 9, 9)).save(file, "WEBP", lossless=True)
    content = bytearray(file.getvalue())
    place = content.index(b"VP8L") + 9
    (bits,) = struct.unpack_from("<I", content, place)
    struct.pack_into("<I", content, place, bits >> 28 << 28 | (height - 1) << 14 | (width - 1))
    return bytes(content)


def huge_png(width, height):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"".join([b"\x89PNG\r\n\x1a\n", header, chunk(b"IDAT", zlib.compress(b"\0")), chunk(b"IEND", b"")])


@pytest.mark.parametrize(
    "content, megapixels",
    [(webp_of(12800, 12800), 164), (huge_png(20000, 20000), 400), (huge_png(2**31 - 1, 9), 19327)],
)
def test_an_image_over_the_limit_is_left_out_with_its_reason(tmp_path, content, megapixels):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"its {megapixels} million pixels take \d+\.\d GB to decode, more than the 1\.4 GB"
    ):
        load_as(tmp_path / "a.png", (8, 8))
    for full in (True, False):
        ((_, reason),) = check_images([str(tmp_path / "a.png")], full)[1]
        assert "million pixels" in reason and "attack" not in reason


def test_a_small_tiff_of_one_huge_tile_is_left_out(tmp_path):
    tiled = {322: (4, 2**15), 323: (4, 2**16), 324: (4, 8), 325: (4, 20)}
    write_tiff(tmp_path / "a.tif", KINDS["uint8"][0], "<", 1, deflate=True, tags=tiled.items())
    with pytest.raises(ValueError, match="GB to decode"):
        load_as(tmp_path / "a.tif", (8, 8))


def test_a_large_jpeg_that_shrinks_is_read(tmp_path, monkeypatch):
    Image.new("RGB", (1024, 1024), (200, 0, 0)).save(tmp_path / "a.jpg", quality=95)
    Image.new("RGB", (1024, 1024), (200, 0, 0)).save(tmp_path / "progressive.jpg", progressive=True)
    monkeypatch.setattr("utils.data.decode.DECODE_BYTES", 2**20)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2**10)
    assert check_image(tmp_path / "a.jpg") == (1024, 1024)
    assert np.abs(load_as(tmp_path / "a.jpg", (16, 16)).astype(int) - [200, 0, 0]).max() <= 2
    with pytest.raises(ValueError, match="1 million pixels"):
        load_as(tmp_path / "progressive.jpg", (16, 16))


def test_images_above_pillows_limit_are_read(tmp_path, monkeypatch):
    for name in ("a.png", "a.gif", "a.bmp", "a.ppm"):
        Image.new("RGB", (64, 32), (255, 0, 0)).save(tmp_path / name)
        with monkeypatch.context() as patch:
            patch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
            assert check_image(tmp_path / name) == (64, 32)
            assert (load_as(tmp_path / name, (4, 4)) == [255, 0, 0]).mean() > 0.6


MEASURE = """
import sys
from utils.data import decode, threads
from utils.data.image_format import ImageFormat

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

reckoned = []
decode.one_if_large = lambda size: reckoned.append(size) or threads.one_if_large(size)
before = peak()
decode.load_image(sys.argv[1], ImageFormat((8, 8)))
print((peak() - before) / reckoned[0])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "mode, suffix",
    [
        ("RGBA", "png"),
        ("RGB", "webp"),
        ("F", "tif"),
        ("CMYK", "tif"),
        ("I;16", "png"),
        ("P", "gif"),
        ("LA", "png"),
    ],
)
def test_decoding_takes_no_more_memory_than_is_reckoned(tmp_path, mode, suffix):
    size = 3000, 3000
    path = tmp_path / f"a.{suffix}"
    Image.new(mode, size).save(path, **({"lossless": True} if suffix == "webp" else {}))
    command = [sys.executable, "-c", MEASURE, str(path)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    assert float(done.stdout) <= 1.3


def test_the_limit_keeps_a_process_below_two_and_a_half_gigabytes():
    assert DECODE_BYTES < 1.5e9 and formats.FILE_BYTES < 1.1e9


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png())
    os.truncate(path, formats.FILE_BYTES + 1)  # a sparse file
    for full in (True, False):
        assert check_images([str(path)], full)[1] == [(str(path), "a file of 1.1 GB; at most 1.1 GB are read")]


@pytest.mark.parametrize("mode", ["crop", "stretch", "pad"])
def test_a_hair_of_many_rows_is_left_out_where_its_resize_takes_much_memory(tmp_path, mode):
    Image.new("L", (1, 2_000_000)).save(tmp_path / "a.png")
    assert load_as(tmp_path / "a.png", (8, 64), 1, mode).shape == (8, 64, 1)
    with pytest.raises(ValueError, match="its 2 million pixels take 2.1 GB to decode"):
        load_as(tmp_path / "a.png", (8, 256), 1, mode)


# Regular files


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
@pytest.mark.parametrize("linked", [False, True])
def test_a_pipe_is_refused_at_once(tmp_path, linked):
    os.mkfifo(tmp_path / "pipe.png")
    path = tmp_path / "pipe.png"
    if linked:
        path = tmp_path / "link.png"
        path.symlink_to(tmp_path / "pipe.png")
    for full in (True, False):
        assert check_images([str(path)], full)[1] == [(str(path), "is no regular file (a pipe, a socket or a device)")]
    with pytest.raises(ValueError, match="no regular file"):
        load_as(path, (8, 8))


def test_a_folder_is_named_as_one(tmp_path):
    assert check_images([str(tmp_path)])[1] == [(str(tmp_path), "is a folder")]


# Formats of optional plugins


@pytest.mark.skipif(not HAS_AVIF, reason="this Pillow reads no AVIF")
def test_avif_is_read_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (48, 32), (200, 30, 30)).save(tmp_path / "a.avif", exif=exif, quality=95)
    assert check_image(tmp_path / "a.avif") == (32, 48)
    assert np.abs(load_as(tmp_path / "a.avif", (8, 8)).astype(int) - [200, 30, 30]).max() <= 6


def reload_with(monkeypatch, plugin):
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    return formats._readable()


def test_heic_is_read_where_its_plugin_is_installed(monkeypatch):
    plugin = types.SimpleNamespace(register_heif_opener=lambda: Image.register_open("HEIF", None))
    for registry in (Image.OPEN, Image.ID):
        monkeypatch.setattr(Image, "OPEN" if registry is Image.OPEN else "ID", registry.copy())
    names, endings = reload_with(monkeypatch, plugin)
    assert "HEIF" in names and ".heic" in endings


@pytest.mark.parametrize(
    "error", [ImportError("libheif.so.1"), TypeError("metaclass"), OSError("bad library"), RuntimeError()]
)
def test_a_broken_plugin_ends_nothing(monkeypatch, error):
    def fail():
        raise error

    _, endings = reload_with(monkeypatch, types.SimpleNamespace(register_heif_opener=fail))
    assert ".heic" not in endings and ".png" in endings


def test_a_missing_plugin_ends_nothing(monkeypatch):
    _, endings = reload_with(monkeypatch, None)  # its import raises ModuleNotFoundError
    assert ".heic" not in endings and ".png" in endings


def test_an_unknown_format_is_no_picture():
    for content in (b"", b"P", b"%!PS-Adobe-3.0 EPSF-3.0", b"GIF", b"text " * 99):
        with pytest.raises(ValueError) as caught, open_image(io.BytesIO(content)):
            pass
        assert describe_error(caught.value) == "not an image, or of an unknown format"
