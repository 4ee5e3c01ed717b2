"""Embedded colour profiles against the definitions of the colour spaces."""

import importlib
import io
import struct
import types

import numpy as np
import pytest
import torch
from conftest import load_as
from PIL import Image, ImageCms

import train
from nets import Condition
from utils.data.annotation import write_annotation
from utils.data.color import to_srgb
from utils.data.dataset import open_dataset
from utils.data.decode import check_image
from utils.data.formats import EXTENSIONS
from utils.data.image_format import ImageFormat

# Columns: the XYZ (D50) of red, green and blue.
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])


def icc_profile(space, tags, kind=b"mntr"):
    """A version 2 ICC profile by its specification. tags: {signature: data}."""
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    size = start + len(body)
    header = struct.pack(">I4sI4s4s4s12x4s", size, b"\0\0\0\0", 0x02100000, kind, space, b"XYZ ", b"acsp")
    header += bytes(28) + struct.pack(">iii", 63190, 65536, 54061)  # D50 in 16.16 fixed point
    return header.ljust(128, b"\0") + table + body


def xyz(values):
    return b"XYZ \0\0\0\0" + struct.pack(">iii", *(round(65536 * value) for value in values))


def gamma(value):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(256 * value))


def text():
    return b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(78)


COMMON_TAGS = {b"desc": text(), b"cprt": b"text\0\0\0\0x\0", b"wtpt": xyz((0.9642, 1, 0.8249))}


def rgb_profile(primaries, exponent=2.2):
    tags = COMMON_TAGS | {name: xyz(primaries[:, i]) for i, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    return icc_profile(b"RGB ", tags | {name: gamma(exponent) for name in (b"rTRC", b"gTRC", b"bTRC")})


def grey_profile(exponent):
    return icc_profile(b"GRAY", COMMON_TAGS | {b"kTRC": gamma(exponent)})


def srgb_profile():
    """sRGB with its curve as a table: a conversion would round a few colours otherwise."""
    x = np.arange(1024) / 1023
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    curve = b"curv\0\0\0\0" + struct.pack(">I", 1024) + np.rint(65535 * linear).astype(">u2").tobytes()
    tags = COMMON_TAGS | {name: xyz(SRGB[:, i]) for i, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    return icc_profile(b"RGB ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))


def encode(linear):
    """Linear light, 0 to 1, as sRGB levels (IEC 61966-2-1)."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def shown(pixels, primaries, exponent=2.2):
    linear = (np.asarray(pixels) / 255.0) ** exponent
    return encode(linear @ (np.linalg.inv(SRGB) @ primaries).T)


def colours(seed=0):
    return np.random.default_rng(seed).integers(30, 226, (16, 16, 3), dtype=np.uint8)


def same_size(path, channels=3, **settings):
    width, height = check_image(path)
    return load_as(path, (height, width), channels, "stretch", **settings).astype(int)


LOSSLESS = {
    "webp": {"lossless": True},
    "jpg": {"quality": 100, "subsampling": 0},
    "avif": {"quality": 100, "subsampling": "4:4:4"},
}


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", *["avif"] * (".avif" in EXTENSIONS)])
def test_a_wide_gamut_becomes_srgb_as_computed(tmp_path, suffix):
    pixels = np.kron(colours()[:4, :4], np.ones((8, 8, 1), dtype=np.uint8))
    Image.fromarray(pixels).save(
        tmp_path / f"a.{suffix}", icc_profile=rgb_profile(DISPLAY_P3), **LOSSLESS.get(suffix, {})
    )
    expected, exact = shown(pixels, DISPLAY_P3), 2 if suffix in ("png", "tif", "webp") else 8
    assert np.abs(same_size(tmp_path / f"a.{suffix}") - expected).max() <= exact
    assert np.abs(same_size(tmp_path / f"a.{suffix}", icc=False) - pixels).max() <= (0 if exact == 2 else 6)
    assert np.abs(expected - pixels).max() > 20


def test_linear_light_is_converted(tmp_path):
    Image.fromarray(colours()).save(tmp_path / "a.png", icc_profile=rgb_profile(SRGB, 1.0))
    assert np.abs(same_size(tmp_path / "a.png") - shown(colours(), SRGB, 1.0)).max() <= 2


def test_transparency_is_composited_in_srgb(tmp_path):
    """The background keeps its colour: it has no profile."""
    pixels = np.dstack([colours(), np.random.default_rng(1).integers(0, 256, (16, 16, 1), dtype=np.uint8)])
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=rgb_profile(DISPLAY_P3))
    background, alpha = (200, 30, 10), pixels[..., 3:] / 255
    expected = alpha * shown(pixels[..., :3], DISPLAY_P3) + (1 - alpha) * np.array(background)
    assert np.abs(same_size(tmp_path / "a.png", background=background) - expected).max() <= 2.5


def test_a_palette_is_converted(tmp_path):
    palette = colours()[0].reshape(-1)
    picture = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4), "P")
    picture.putpalette(palette.tolist())
    picture.save(tmp_path / "a.png", icc_profile=rgb_profile(DISPLAY_P3))
    assert np.abs(same_size(tmp_path / "a.png") - shown(palette.reshape(4, 4, 3), DISPLAY_P3)).max() <= 2


@pytest.mark.parametrize("dtype, alpha", [(np.uint8, False), (np.uint8, True), (np.uint16, False)])
def test_grey_is_converted(tmp_path, dtype, alpha):
    ramp = np.arange(256).reshape(16, 16)
    white = np.iinfo(dtype).max
    values = (ramp * (white // 255)).astype(dtype)
    image = Image.fromarray(np.dstack([values, np.full_like(values, 255)]), "LA") if alpha else Image.fromarray(values)
    image.save(tmp_path / "a.png", icc_profile=grey_profile(1.0))
    expected = encode(ramp / 255)
    for channels in (1, 3):
        assert np.abs(same_size(tmp_path / "a.png", channels) - expected[..., None]).max() <= 1.5
    assert (same_size(tmp_path / "a.png", 1, icc=False)[..., 0] == ramp).all()


def cmyk_profile():
    """Inks of a press that is nothing like Pillow's formula: a table of 2 x 2 x 2 x 2 Lab
    colours.
    """
    corners = np.indices((2,) * 4).reshape(4, -1).T
    lightness = [255 * (1 - 0.2 * c - 0.3 * m - 0.1 * y) * (1 - 0.8 * k) for c, m, y, k in corners]
    ab = [(128 + 40 * m - 30 * c, 128 + 50 * y - 20 * c) for c, m, y, _ in corners]
    grid = np.clip(np.column_stack([lightness, ab]), 0, 255).round().astype(np.uint8).tobytes()
    matrix = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    # mft1: tables of 256 entries for each channel before and after the grid
    curve = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + curve * 4 + grid + curve * 3
    profile = icc_profile(b"CMYK", COMMON_TAGS | {b"A2B0": table}, b"prtr")
    return profile[:20] + b"Lab " + profile[24:]


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_is_converted_by_its_profile(tmp_path, suffix):
    Image.new("CMYK", (16, 16), (0, 255, 0, 0)).save(
        tmp_path / f"a.{suffix}", icc_profile=cmyk_profile(), **LOSSLESS.get(suffix, {})
    )
    # L* = 70, a* = 40 of the magenta corner, b* = 0 -> XYZ (D50) -> sRGB
    fy = (70 + 16) / 116
    white = np.array([0.9642, 1, 0.8249])
    expected = encode(np.linalg.inv(SRGB) @ (white * np.array([fy + 40 / 500, fy, fy]) ** 3))
    assert np.abs(same_size(tmp_path / f"a.{suffix}") - expected).max() <= 4
    assert np.abs(same_size(tmp_path / f"a.{suffix}", icc=False) - [255, 0, 255]).max() <= 3


@pytest.mark.parametrize(
    "profile",
    [
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        b"",
        b"no profile",
        rgb_profile(DISPLAY_P3)[:200],
        grey_profile(1.0),
        cmyk_profile(),
        srgb_profile(),
        rgb_profile(DISPLAY_P3).replace(b"curv", b"xxxx"),
        bytes(5000),
    ],
)
def test_a_profile_of_srgb_or_of_another_space_or_damaged_changes_nothing(tmp_path, profile):
    pixels = colours()
    pixels[0, 0] = 0, 240, 0
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=profile)
    np.testing.assert_array_equal(same_size(tmp_path / "a.png"), pixels)


def test_a_profile_of_more_than_a_megabyte_is_applied(tmp_path):
    profile = rgb_profile(DISPLAY_P3)
    profile = struct.pack(">I", len(profile) + 2**21) + profile[4:] + np.random.default_rng(0).bytes(2**21)
    Image.fromarray(colours()).save(tmp_path / "a.png", icc_profile=profile)
    assert np.abs(same_size(tmp_path / "a.png") - shown(colours(), DISPLAY_P3)).max() <= 2


def test_memory_that_runs_out_is_not_a_damaged_profile(monkeypatch):
    def fail(*arguments, **more):
        raise MemoryError

    monkeypatch.setattr(ImageCms, "buildTransform", fail)
    with pytest.raises(MemoryError):
        to_srgb(Image.new("RGB", (2, 2)), rgb_profile(DISPLAY_P3, 1.9))


def test_the_setting_makes_caches_of_its_own(tmp_path):
    Image.fromarray(colours()).save(tmp_path / "a.png", icc_profile=rgb_profile(DISPLAY_P3))
    write_annotation(tmp_path / "lines.txt", [str(tmp_path / "a.png")])
    converted, kept, again = (
        open_dataset(tmp_path / "lines.txt", ImageFormat((16, 16), icc=icc), cache_path=tmp_path / "cache").pixels[0]
        for icc in (True, False, True)
    )
    np.testing.assert_array_equal(kept, colours())
    np.testing.assert_array_equal(converted, again)
    assert np.abs(converted - shown(colours(), DISPLAY_P3)).max() <= 2


def test_the_training_hands_the_setting_on(monkeypatch):
    class Reached(Exception):
        pass

    def reached(annotation_path, image_format, num_workers, **options):
        raise Reached(image_format.icc)

    monkeypatch.setattr(train, "open_dataset", reached)
    for icc in (True, False):
        with pytest.raises(Reached, match=str(icc)):
            train.prepare(train.Config(icc=icc), torch.device("cpu"), None, None)


def test_the_evaluation_takes_the_setting_of_the_training(monkeypatch, tmp_path):
    evaluate = importlib.import_module("utils.evaluate.__main__")
    Image.fromarray(colours()).save(tmp_path / "a.png", icc_profile=rgb_profile(DISPLAY_P3))
    network = types.SimpleNamespace(img_size=(16, 16), img_channels=3, condition=Condition())
    for trained, typed, expected in (
        ({}, None, True),
        ({"icc": False}, None, False),
        ({"icc": False}, True, True),
        ({}, False, False),
    ):
        config = evaluate.Config(icc=typed, cache_dir=str(tmp_path / "cache"))
        found = (
            evaluate.make_opener(config, evaluate.Model(network, [], types.SimpleNamespace(config=trained), "x"))[0](
                tmp_path
            )
            .images([0])
            .numpy()
        )
        assert (np.abs(found - colours()).max() > 20) == expected


def test_profiles_are_applied_by_many_threads_alike(tmp_path):
    profile = rgb_profile(DISPLAY_P3)
    for i in range(200):
        Image.fromarray(colours(i)).save(tmp_path / f"{i:03}.png", icc_profile=profile)
    paths = [str(tmp_path / f"{i:03}.png") for i in range(200)]
    write_annotation(tmp_path / "lines.txt", paths)
    dataset = open_dataset(tmp_path / "lines.txt", ImageFormat((16, 16)), num_workers=8, cache_path=tmp_path / "cache")
    for i in range(200):
        assert np.abs(dataset.pixels[i] - shown(colours(i), DISPLAY_P3)).max() <= 2


def test_bytes_of_a_file_are_read_like_the_file(tmp_path):
    Image.fromarray(colours()).save(tmp_path / "a.png", icc_profile=rgb_profile(DISPLAY_P3))
    content = io.BytesIO((tmp_path / "a.png").read_bytes())
    np.testing.assert_array_equal(load_as(content, (16, 16)), same_size(tmp_path / "a.png"))
