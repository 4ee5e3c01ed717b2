"""Pictures in and out: every mode and orientation against arithmetic or an independent
implementation.
"""

import errno
import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_as
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from utils.data import decode as images
from utils.data import threads
from utils.data.decode import check_image, describe_error, is_about_the_file, is_damage
from utils.data.image_format import RESIZE_MODES, ImageFormat
from utils.data.threads import map_in_threads
from utils.images import make_grid, save_animation, save_png, to_uint8

ORIENTATION = 0x0112
PROJECT = Path(__file__).resolve().parents[1]


def smooth(width, height, seed=0):
    """A picture without fine detail: any good resize gives nearly the same."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def load_same_size(path, channels=3, **settings):
    """The file at its own size, where resizing is the identity."""
    width, height = check_image(path)
    return load_as(path, (height, width), channels, "stretch", **settings).astype(int)


def over(rgba, background):
    """Compositing by its definition, in float64."""
    rgba = np.asarray(rgba, dtype=float)
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + np.array(background) * (1 - alpha)


def write_png(path, rows, bit_depth, color_type, transparent=None):
    """A PNG by hand, for forms that Pillow reads but does not write.

    `rows`: integer array (H, W) or (H, W, C).
    """
    height, width = rows.shape[:2]
    if bit_depth == 16:
        lines = [row.astype(">u2").tobytes() for row in rows]
    else:
        bits = ((rows[..., None] >> np.arange(bit_depth)[::-1]) & 1).reshape(height, -1).astype(np.uint8)
        lines = [np.packbits(line).tobytes() for line in bits]
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, 0))]
    if transparent is not None:
        chunks.append((b"tRNS", np.array(transparent, dtype=">u2").tobytes()))
    chunks += [(b"IDAT", zlib.compress(b"".join(b"\0" + line for line in lines))), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    stored = smooth(48, 32)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"a.{suffix}"
    stored.save(
        path, exif=exif, **{"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    )
    stored.getexif()[ORIENTATION] = orientation
    upright = ImageOps.exif_transpose(stored)
    assert (
        check_image(path)
        == check_image(path, full=False)
        == upright.size
        == ((32, 48) if orientation >= 5 else (48, 32))
    )
    error = np.abs(load_same_size(path) - np.asarray(upright, dtype=int))
    assert error.max() <= (4 if suffix == "jpg" else 0)


@pytest.mark.parametrize("orientation", [3, 6, 8])
@pytest.mark.parametrize("mode", ["crop", "stretch", "pad"])
def test_a_turned_jpeg_read_at_a_reduced_scale_lies_right(tmp_path, orientation, mode):
    stored = smooth(415, 330)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored.save(tmp_path / "a.jpg", quality=95, exif=exif)
    stored.getexif()[ORIENTATION] = orientation
    ImageOps.exif_transpose(stored).save(tmp_path / "upright.png")
    turned, upright = (load_as(tmp_path / name, (24, 17), 3, mode).astype(int) for name in ("a.jpg", "upright.png"))
    assert np.abs(turned - upright).max() <= 6


@pytest.mark.parametrize("orientation", [0, 9, 255, 65535])
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_an_orientation_that_is_none_turns_nothing(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    smooth(48, 32).save(tmp_path / f"a.{suffix}", exif=exif)
    smooth(48, 32).save(tmp_path / f"upright.{suffix}")
    assert check_image(tmp_path / f"a.{suffix}") == check_image(tmp_path / f"a.{suffix}", full=False) == (48, 32)
    found, upright = (load_as(tmp_path / f"{name}.{suffix}", (24, 40)) for name in ("a", "upright"))
    np.testing.assert_array_equal(found, upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_no_harm(tmp_path):
    smooth(16, 16).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert load_as(tmp_path / "a.jpg", (16, 16)).shape == (16, 16, 3)


# Transparency

BACKGROUND = (10, 200, 90)


def rgba_ramp():
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    pixels[..., 3] = np.arange(256).reshape(16, 16)
    return pixels


def test_rgba_is_composited_on_the_background(tmp_path):
    pixels = rgba_ramp()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = load_same_size(tmp_path / "a.png", background=BACKGROUND)
    assert np.abs(found - over(pixels, BACKGROUND)).max() <= 1
    white = load_same_size(tmp_path / "a.png")
    assert (white[0, 0] == 255).all()  # fully transparent there


def test_grey_with_alpha_is_composited(tmp_path):
    grey = rgba_ramp()[..., [0, 3]]
    Image.fromarray(grey, "LA").save(tmp_path / "a.png")
    expected = over(grey[..., [0, 0, 0, 1]], BACKGROUND)
    assert np.abs(load_same_size(tmp_path / "a.png", background=BACKGROUND) - expected).max() <= 1
    luma = expected @ np.array([0.299, 0.587, 0.114])
    assert np.abs(load_same_size(tmp_path / "a.png", 1, background=BACKGROUND)[..., 0] - luma).max() <= 1.6


@pytest.mark.parametrize("transparency", [3, bytes([255, 0, 128, 30])])
def test_palette_with_transparency_is_composited(tmp_path, transparency):
    palette = [250, 0, 0, 0, 240, 0, 0, 0, 230, 90, 80, 70]
    picture = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) % 4, "P")
    picture.putpalette(palette)
    picture.save(tmp_path / "a.png", transparency=transparency)
    alphas = [255, 255, 255, 0] if transparency == 3 else list(transparency)
    colours = np.concatenate([np.array(palette).reshape(4, 3), np.array(alphas)[:, None]], axis=1)
    expected = over(colours[np.arange(16).reshape(4, 4) % 4], BACKGROUND)
    assert np.abs(load_same_size(tmp_path / "a.png", background=BACKGROUND) - expected).max() <= 1


def test_gif_gives_its_first_frame_with_transparency(tmp_path):
    first = Image.fromarray(np.array([[0, 1], [1, 0]], dtype=np.uint8), "P")
    first.putpalette([255, 0, 0, 0, 0, 255])
    first.save(tmp_path / "a.gif", transparency=1, save_all=True, append_images=[Image.new("P", (2, 2))])
    found = load_same_size(tmp_path / "a.gif", background=BACKGROUND)
    np.testing.assert_array_equal(found, [[(255, 0, 0), BACKGROUND], [BACKGROUND, (255, 0, 0)]])


def test_palette_with_alpha_mode_is_composited(tmp_path):
    picture = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    picture.putpalette([200, 100, 0, 0, 0, 255])
    picture = picture.convert("PA")
    picture.putalpha(Image.fromarray(np.array([[255, 51]], dtype=np.uint8)))
    assert picture.mode == "PA"
    found = np.asarray(images._flatten(picture, BACKGROUND, True), dtype=int)
    assert np.abs(found - over([[(200, 100, 0, 255), (0, 0, 255, 51)]], BACKGROUND)).max() <= 1


@pytest.mark.parametrize("bit_depth", [1, 2, 4, 8, 16])
def test_grey_png_with_one_transparent_value(tmp_path, bit_depth):
    white = 2**bit_depth - 1
    rows = np.linspace(0, white, 16).round().astype(int).reshape(2, 8)
    transparent = int(rows[0, 5])
    write_png(tmp_path / "a.png", rows, bit_depth, 0, [transparent])
    expected = np.where((rows == transparent)[..., None], BACKGROUND, (rows / white * 255)[..., None])
    assert np.abs(load_same_size(tmp_path / "a.png", background=BACKGROUND) - expected).max() <= 0.6


@pytest.mark.parametrize("bit_depth", [8, 16])
def test_rgb_png_with_one_transparent_colour(tmp_path, bit_depth):
    white = 2**bit_depth - 1
    rows = np.random.default_rng(2).integers(0, white, (4, 5, 3))
    write_png(tmp_path / "a.png", rows, bit_depth, 2, rows[1, 2])
    expected = rows / white * 255
    expected[1, 2] = BACKGROUND
    assert np.abs(load_same_size(tmp_path / "a.png", background=BACKGROUND) - expected).max() <= 1


# Depth and colour

RAMP16 = (np.arange(256) * 257).reshape(16, 16)  # 0 ... 65535: 16 bits that are k/255 exactly


@pytest.mark.parametrize("byte_order", ["<u2", ">u2"])
@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_keeps_its_full_range(tmp_path, byte_order, suffix):
    path = tmp_path / f"a.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5\n16 16\n65535\n" + RAMP16.astype(">u2").tobytes())
    elif byte_order == ">u2" and suffix == "tif":
        Image.frombytes("I;16B", (16, 16), RAMP16.astype(">u2").tobytes()).save(path)
    else:
        Image.fromarray(RAMP16.astype("<u2")).save(path)
    np.testing.assert_array_equal(load_same_size(path, 1)[..., 0], RAMP16 // 257)


@pytest.mark.parametrize("mode, dtype", [("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2")])
def test_16_bit_modes_of_both_byte_orders(mode, dtype):
    picture = Image.frombytes(mode, (16, 16), RAMP16.astype(dtype).tobytes())
    np.testing.assert_array_equal(np.asarray(images._flatten(picture, BACKGROUND, True)), RAMP16 // 257)


def test_a_dark_16_bit_picture_stays_dark(tmp_path):
    Image.fromarray((RAMP16 // 257).astype(np.uint16)).save(tmp_path / "a.png")
    (tmp_path / "a.pgm").write_bytes(b"P5\n16 16\n65535\n" + (RAMP16 // 257).astype(">u2").tobytes())
    Image.fromarray((RAMP16 // 257).astype(np.uint16)).save(tmp_path / "a.tif")
    for name in ("a.png", "a.pgm", "a.tif"):
        assert load_same_size(tmp_path / name).max() == 1  # 255 of 65535


def test_16_bit_colour_keeps_its_full_range(tmp_path):
    rows = np.stack([RAMP16, RAMP16.T, RAMP16[::-1]], axis=-1)
    write_png(tmp_path / "a.png", rows, 16, 2)
    np.testing.assert_array_equal(load_same_size(tmp_path / "a.png"), rows // 257)


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_float_tiff_by_its_maximum(tmp_path, white):
    values = np.linspace(0, white, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "a.tiff")
    expected = values.astype(float) / white * 255
    assert np.abs(load_same_size(tmp_path / "a.tiff")[..., 0] - expected).max() <= 0.51


def test_float_tiff_with_values_that_are_no_numbers(tmp_path):
    Image.fromarray(np.array([[np.nan, np.inf, -np.inf], [-3, 0.5, 1]], dtype=np.float32)).save(tmp_path / "a.tiff")
    np.testing.assert_array_equal(load_same_size(tmp_path / "a.tiff", 1)[..., 0], [[0, 255, 0], [0, 128, 255]])


@pytest.mark.parametrize("white", [255, 65535, 2**31 - 1])
def test_32_bit_integers_by_their_maximum(tmp_path, white):
    values = np.linspace(0, white, 64).astype(np.int32).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "a.tiff")
    assert np.abs(load_same_size(tmp_path / "a.tiff")[..., 0] - values / white * 255).max() <= 0.51


def test_black_and_white(tmp_path):
    bits = np.random.default_rng(3).integers(0, 2, (9, 11)).astype(bool)
    for name in ("a.png", "a.pbm", "a.tif"):
        Image.fromarray(bits).save(tmp_path / name)
        np.testing.assert_array_equal(load_same_size(tmp_path / name, 1)[..., 0], bits * 255)


def test_cmyk_by_its_definition(tmp_path):
    pixels = np.random.default_rng(4).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    Image.fromarray(pixels, "CMYK").save(tmp_path / "a.tif")
    ink = pixels / 255
    expected = 255 * (1 - ink[..., :3]) * (1 - ink[..., 3:])
    assert np.abs(load_same_size(tmp_path / "a.tif") - expected).max() <= 2
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(load_same_size(tmp_path / "a.jpg") - [255, 0, 0]).max() <= 3


def test_lab_comes_back_as_the_colours_it_was_made_of(tmp_path):
    colours = smooth(8, 8).point(lambda level: 60 + level // 2)
    lab = ImageCms.profileToProfile(
        colours, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    lab.save(tmp_path / "a.tif")
    assert np.abs(load_same_size(tmp_path / "a.tif") - np.asarray(colours, dtype=int)).max() <= 6


@pytest.mark.parametrize("name", ["a.bmp", "a.dib", "a.png", "a.ppm", "a.tif", "a.webp", "a.gif"])
def test_formats_keep_plain_colours(tmp_path, name):
    pixels = np.zeros((4, 6, 3), dtype=np.uint8)
    pixels[:, 3:] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / name, **({"lossless": True} if name == "a.webp" else {}))
    np.testing.assert_array_equal(load_same_size(tmp_path / name), pixels)


def test_grey_is_luma_and_colour_of_grey_is_grey(tmp_path):
    picture = smooth(8, 8)
    picture.save(tmp_path / "a.png")
    luma = np.asarray(picture, dtype=float) @ np.array([0.299, 0.587, 0.114])
    assert np.abs(load_same_size(tmp_path / "a.png", 1)[..., 0] - luma).max() <= 1
    picture.convert("L").save(tmp_path / "grey.png")
    grey = load_same_size(tmp_path / "grey.png")
    assert (grey == grey[..., :1]).all()
    picture.save(tmp_path / "a.jpg", quality=95)
    assert np.abs(load_same_size(tmp_path / "a.jpg", 1)[..., 0] - luma).max() <= 8


# Size


@pytest.mark.parametrize("size", [(320, 160), (160, 320), (20, 10)])
@pytest.mark.parametrize("shape", [(32, 32), (24, 40), (40, 24)])
def test_crop_is_torchvisions_resize_and_centre_crop(tmp_path, size, shape):
    picture = smooth(*size)
    picture.save(tmp_path / "a.png")
    scale = max(shape[0] / size[1], shape[1] / size[0])
    inner = [round(scale * size[1]), round(scale * size[0])]  # (height, width), whole numbers for these sizes
    tensor = F.resize(F.pil_to_tensor(picture).float(), inner, v2.InterpolationMode.BICUBIC, antialias=True)
    expected = F.center_crop(tensor, list(shape)).clamp(0, 255).permute(1, 2, 0).numpy()
    found = load_as(tmp_path / "a.png", shape, 3, "crop")
    assert found.shape == (*shape, 3) and found.dtype == np.uint8
    assert np.abs(found - expected).max() <= 1.5


def test_stretch_is_torchvisions_resize(tmp_path):
    picture = smooth(90, 50)
    picture.save(tmp_path / "a.png")
    expected = F.resize(F.pil_to_tensor(picture).float(), [24, 40], v2.InterpolationMode.BICUBIC, antialias=True).clamp(
        0, 255
    )
    found = load_as(tmp_path / "a.png", (24, 40), 3, "stretch")
    assert np.abs(found - expected.permute(1, 2, 0).numpy()).max() <= 1.5


def test_shrinking_is_antialiased(tmp_path):
    checkers = np.indices((256, 256)).sum(0) % 2 * 255
    Image.fromarray(checkers.astype(np.uint8)).save(tmp_path / "a.png")
    assert np.abs(load_as(tmp_path / "a.png", (32, 32), 1).astype(int) - 127).max() <= 6


@pytest.mark.parametrize("size, bars", [((40, 20), np.s_[:8]), ((20, 40), np.s_[:, :8])])
@pytest.mark.parametrize("channels", [1, 3])
def test_pad_shows_the_whole_picture_between_bars(tmp_path, size, bars, channels):
    Image.new("RGB", size, (255, 0, 0)).save(tmp_path / "a.png")
    found = load_as(tmp_path / "a.png", (32, 32), channels, "pad", background=(0, 0, 255))
    red, blue = ((76,), (29,)) if channels == 1 else ((255, 0, 0), (0, 0, 255))
    assert (found[bars] == blue).all() and (np.rot90(found, 2)[bars] == blue).all()
    assert (found == red).all(axis=-1).sum() == 32 * 16


def test_a_hair_thin_picture_is_no_error(tmp_path):
    Image.new("RGB", (1000, 1), (9, 9, 9)).save(tmp_path / "a.png")
    for mode in RESIZE_MODES:
        assert load_as(tmp_path / "a.png", (8, 16), 3, mode).shape == (8, 16, 3)


# JPEG at a reduced scale


@pytest.mark.parametrize(
    "size, reduced",
    [((640, 480), (160, 120)), ((1155, 1659), (145, 208)), ((130, 150), (65, 75)), ((100, 100), (100, 100))],
)
def test_large_jpegs_are_decoded_small_and_look_the_same(tmp_path, monkeypatch, size, reduced):
    smooth(*size).save(tmp_path / "a.jpg", quality=95)
    Image.open(tmp_path / "a.jpg").convert("RGB").save(tmp_path / "a.png")
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, *args, **kwargs: sizes.append(self.size) or resize(self, *args, **kwargs)
    )
    for mode in RESIZE_MODES:
        from_jpeg, from_png = (load_as(tmp_path / name, (32, 32), 3, mode).astype(int) for name in ("a.jpg", "a.png"))
        assert np.abs(from_jpeg - from_png).max() <= 3
        assert sizes[0] == reduced or mode == "pad"
        sizes.clear()


def test_the_reduced_scale_of_a_turned_jpeg_is_for_its_upright_shape(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    smooth(100, 800).save(tmp_path / "a.jpg", exif=exif)
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, *args, **kwargs: sizes.append(self.size) or resize(self, *args, **kwargs)
    )
    load_as(tmp_path / "a.jpg", (50, 10), 3, "stretch")  # 100 -> 50 and 800 -> 10: no room for less
    assert sizes == [(100, 800)]


def test_reduced_jpegs_keep_their_place(tmp_path):
    """The last column of a reduced JPEG is partly filler: stretched as if it were whole, all
    pixels move.
    """
    ramp = np.tile(np.linspace(0, 255, 321), (321, 1))  # 321 = 5 * 64 + 1
    Image.fromarray(np.rint(ramp).astype(np.uint8)).save(tmp_path / "a.jpg", quality=100)
    found = load_as(tmp_path / "a.jpg", (10, 10), 1)[0, :, 0]
    assert np.abs(found - 255 / 320 * (32.1 * (np.arange(10) + 0.5) - 0.5))[2:-2].max() <= 0.8


# The format


def test_a_format_takes_what_the_settings_say_and_the_defaults_for_the_rest():
    trained = {"input_shape": (24, 32), "background": [1, 2, 3], "icc": False, "batch_size": 64}
    assert ImageFormat.from_config(trained) == ((24, 32), 3, "crop", (1, 2, 3), False)
    changed = ImageFormat.from_config(trained, input_shape=(8, 9), img_channels=1, resize_mode=None, icc=True)
    assert changed == ((8, 9), 1, "crop", (1, 2, 3), True)
    assert ImageFormat((8, 8)) == ((8, 8), 3, "crop", (255, 255, 255), True)


# What is refused


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tif", "webp", "bmp"])
def test_a_truncated_file_is_found_by_decoding_it(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    for read in (check_image, lambda path: load_as(path, (8, 8))):
        with pytest.raises(Exception) as caught:  # noqa: B017, PT011 - Pillow's decoders raise all kinds
            read(path)
        assert describe_error(caught.value)


def test_what_is_no_picture_is_described_without_its_path(tmp_path):
    (tmp_path / "a.png").write_text("not a picture")
    with pytest.raises(ValueError) as caught:
        check_image(tmp_path / "a.png")
    assert describe_error(caught.value) == "not an image, or of an unknown format"


def test_reading_headers_only_is_possible(tmp_path):
    smooth(64, 48).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-100])
    assert check_image(tmp_path / "a.png", full=False) == (64, 48)


def test_other_formats_are_not_even_tried(tmp_path):
    smooth(8, 8).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(ValueError, match="not an image"):
        check_image(tmp_path / "a.png")


# Failures: of the content, or of the system


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        SyntaxError("x"),
        struct.error("x"),
        zlib.error("x"),
        KeyError(273),
        EOFError(),
        OverflowError(),
        TypeError(),
        OSError("image file is truncated"),
        UnidentifiedImageError("x"),
        Image.DecompressionBombError("x"),
        OSError(errno.EINVAL, "seek"),
    ],
)
def test_damage_of_the_content_is_told(error):
    assert is_damage(error) and is_about_the_file(error)
    assert describe_error(error) and "attack" not in describe_error(error)


@pytest.mark.parametrize(
    "error", [KeyError(273), IndexError("string index out of range"), AssertionError(), TypeError("x")]
)
def test_an_accident_of_a_decoder_is_no_reason(error):
    assert describe_error(error) == "damaged (its parts do not fit together)"


@pytest.mark.parametrize(
    "number", [errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOSPC, errno.ETIMEDOUT]
)
def test_a_failure_of_the_system_is_no_damage(number):
    error = OSError(number, os.strerror(number))
    assert not is_damage(error) and not is_about_the_file(error) and describe_error(error) == os.strerror(number)
    error = MemoryError()
    assert not is_damage(error) and not is_about_the_file(error) and describe_error(error) == "out of memory"


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES])
def test_a_file_that_is_gone_or_closed_is_no_damage_but_its_own_fault(number):
    assert not is_damage(OSError(number, "x")) and is_about_the_file(OSError(number, "x"))


def test_a_decoder_that_lacks_memory_is_not_taken_for_damage(tmp_path, monkeypatch):
    """Pillow's decoders say "broken data stream" where they get none."""
    smooth(64, 64).save(tmp_path / "a.png")

    def fail(self):
        raise OSError("broken data stream when reading image file")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(OSError, match="broken data stream"):
        load_as(tmp_path / "a.png", (8, 8))

    def full(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(images.np, "empty", full)
    with pytest.raises(MemoryError) as caught:
        load_as(tmp_path / "a.png", (8, 8))
    assert not is_damage(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space")
def test_too_little_memory_is_not_kept_as_damage(tmp_path):
    Image.new("RGB", (9000, 9000)).save(tmp_path / "a.png")
    code = (
        "import resource, sys; from utils.data.search import check_images\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))\n"
        "check_images([sys.argv[1]], num_workers=1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.png")], cwd=PROJECT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "cannot be read now (out of memory)" in done.stderr


def test_of_large_images_one_is_decoded_at_a_time(tmp_path, monkeypatch):
    """Small ones are not held up by them."""
    counts, now, flatten = {"large": 0, "small": 0}, {"large": 0, "small": 0}, images._flatten

    def observed(image, *arguments):
        kind = "large" if image.width > 50 else "small"
        now[kind] += 1
        counts[kind] = max(counts[kind], now[kind])
        time.sleep(0.002)
        now[kind] -= 1
        return flatten(image, *arguments)

    smooth(100, 100).save(tmp_path / "large.png")
    smooth(10, 10).save(tmp_path / "small.png")
    monkeypatch.setattr(threads, "LARGE", 50_000)
    monkeypatch.setattr(images, "_flatten", observed)
    for name in ("large", "small"):
        list(map_in_threads(lambda _, name=name: load_as(tmp_path / f"{name}.png", (8, 8)), range(160), 8))
    assert counts["large"] == 1 < counts["small"]


# Pictures out


def test_to_uint8_clamps_and_rounds():
    x = torch.tensor([-1, 1, 1.02, -7, 0.0, 1 / 255, 2.4 / 255, torch.nan, torch.inf, -torch.inf]).reshape(1, 1, 2, 5)
    assert to_uint8(x).shape == (1, 2, 5, 1)
    assert to_uint8(x).ravel().tolist() == [0, 255, 255, 0, 128, 128, 129, 128, 255, 0]
    assert to_uint8(x.bfloat16()).dtype == np.uint8


def test_to_uint8_moves_channels_last():
    x = torch.rand(2, 3, 4, 5) * 2 - 1
    expected = np.rint((x.numpy().astype(float) + 1) * 127.5).transpose(0, 2, 3, 1)
    assert np.abs(to_uint8(x) - expected).max() <= 1  # a tie may fall either way in float32


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 5, 6])
def test_a_grid_holds_every_image_pixel_for_pixel(channels, count):
    tiles = np.random.default_rng(0).integers(0, 256, (count, 4, 6, channels), dtype=np.uint8)
    grid = make_grid(tiles, columns=3)
    columns, rows = min(count, 3), -(-count // 3)
    assert grid.shape == (rows * 6 + 2, columns * 8 + 2, channels)
    for i, tile in enumerate(tiles):
        top, left = 2 + i // 3 * 6, 2 + i % 3 * 8
        np.testing.assert_array_equal(grid[top : top + 4, left : left + 6], tile)
        grid[top : top + 4, left : left + 6] = 255
    assert (grid == 255).all()


def test_png_with_its_text(tmp_path):
    pixels = rgba_ramp()[..., :3]
    save_png(tmp_path / "new" / "a.png", pixels, {"seed": 7, "class": "gâteau 蛋糕"})
    with Image.open(tmp_path / "new" / "a.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), pixels)
        assert picture.text == {"seed": "7", "class": "gâteau 蛋糕"}
    save_png(tmp_path / "grey.png", pixels[..., :1])
    assert Image.open(tmp_path / "grey.png").mode == "L"


def test_a_failed_write_leaves_the_older_picture(tmp_path, monkeypatch):
    save_png(tmp_path / "a.png", np.zeros((4, 4, 3), dtype=np.uint8))
    before = (tmp_path / "a.png").read_bytes()

    def half(self, file, **options):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="disk full"):
        save_png(tmp_path / "a.png", np.ones((4, 4, 3), dtype=np.uint8))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"] and (tmp_path / "a.png").read_bytes() == before


def test_an_animation_has_all_frames_and_times(tmp_path):
    frames = np.zeros((4, 16, 24, 3), dtype=np.uint8)
    frames[np.arange(4), :, np.arange(4) * 6] = 255
    save_animation(tmp_path / "a.gif", frames, [50, 50, 50, 800])
    with Image.open(tmp_path / "a.gif") as animation:
        assert (animation.n_frames, animation.size, animation.info["loop"]) == (4, (24, 16), 0)
        for i in range(4):
            animation.seek(i)
            shown = np.asarray(animation.convert("L"), dtype=int)
            assert shown[:, i * 6].min() > 150 and animation.info.get("duration", 0) in ((800,) if i == 3 else (50,))
