"""The cache and the batches: what is decoded, when it is decoded again, and the order of the
data.
"""

import errno
import hashlib
import json
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_as
from PIL import Image

from utils.data import cache as module
from utils.data.annotation import write_annotation
from utils.data.dataset import (
    ImageDataset,
    epoch_batches,
    fit_batch_size,
    normalize,
    open_dataset,
)
from utils.data.decode import load_image
from utils.data.image_format import ImageFormat
from utils.errors import UserError
from utils.images import to_uint8


@pytest.fixture
def listed(tmp_path):
    """A labelled list of 40 pictures and the folder of its cache: (list, paths, cache folder)."""
    paths, generator = [], np.random.default_rng(0)
    for i in range(40):
        path = tmp_path / "pictures" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(path)
        paths.append(str(path))
    write_annotation(tmp_path / "train_lines.txt", paths, [i % 2 for i in range(40)], ["a", "b"])
    return tmp_path / "train_lines.txt", paths, tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch):
    """How many files were decoded: a list that grows."""
    calls = []
    monkeypatch.setattr(module, "load_image", lambda *args: calls.append(1) or load_image(*args))
    return calls


def open_listed(listed, cache_path="", num_workers=0, **settings):
    image_format = ImageFormat(**{"input_shape": (8, 16), **settings})
    return open_dataset(listed[0], image_format, num_workers, listed[2] if cache_path == "" else cache_path)


# What is in the cache


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"img_channels": 1},
        {"resize_mode": "pad", "background": (9, 0, 200)},
        {"input_shape": (16, 4)},
        {"num_workers": 3},
    ],
)
def test_the_cache_holds_what_load_image_gives(listed, settings):
    data = open_listed(listed, **settings)
    shape = settings.get("input_shape", (8, 16))
    assert len(data) == 40 and data.paths == listed[1] and data.classes == ["a", "b"]
    kept = {name: value for name, value in settings.items() if name not in ("input_shape", "num_workers")}
    expected = torch.from_numpy(np.stack([load_as(path, shape, **kept) for path in listed[1]]))
    images, labels = data.batch(range(40))
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert torch.equal(images, expected) and labels.tolist() == [i % 2 for i in range(40)]
    (image,), (label,) = data.batch([-3])
    assert torch.equal(image, expected[37]) and label == 1


def test_batches_can_be_written_to(listed):
    images, _ = open_listed(listed).batch([1, 2])
    images.zero_()  # the cache itself is read-only: a batch must be a copy
    assert open_listed(listed).batch([1])[0].any()


def test_hashes_are_of_the_files_content(listed):
    Path(listed[1][3]).write_bytes(Path(listed[1][7]).read_bytes())
    data = open_listed(listed)
    assert data.hashes[3] == data.hashes[7] and len(set(data.hashes)) == 39
    assert data.hashes[5] == hashlib.blake2b(Path(listed[1][5]).read_bytes(), digest_size=16).hexdigest()


def test_unlabelled_images_have_label_zero(listed):
    write_annotation(listed[0], listed[1])
    data = open_listed(listed)
    assert data.classes == [] and data.labels.tolist() == [0] * 40


# When it is built again


def test_an_unchanged_list_is_decoded_once(listed, decoded):
    first, second = open_listed(listed), open_listed(listed)
    assert len(decoded) == 40
    assert torch.equal(first.batch(range(40))[0], second.batch(range(40))[0]) and first.hashes == second.hashes


def test_other_labels_need_no_decoding(listed, decoded):
    open_listed(listed)
    write_annotation(listed[0], listed[1], [0] * 39 + [1], ["c", "d"])
    data = open_listed(listed)
    assert len(decoded) == 40 and data.labels.tolist() == [0] * 39 + [1] and data.classes == ["c", "d"]


@pytest.mark.parametrize(
    "settings", [{"input_shape": (16, 8)}, {"img_channels": 1}, {"resize_mode": "stretch"}, {"background": (0, 0, 0)}]
)
def test_another_setting_is_another_cache(listed, decoded, settings):
    open_listed(listed)
    data = open_listed(listed, **settings)
    assert len(decoded) == 80
    assert torch.equal(
        data.images([0])[0], torch.from_numpy(load_as(listed[1][0], **{"input_shape": (8, 16), **settings}))
    )
    open_listed(listed)
    assert len(decoded) == 80  # the first one is still there


def test_a_changed_file_is_decoded_again(listed):
    before = open_listed(listed).images([4])
    stat = os.stat(listed[1][4])
    with Image.open(listed[1][4]) as picture:
        Image.fromarray(255 - np.asarray(picture)).save(listed[1][4])
    os.utime(listed[1][4], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert not torch.equal(open_listed(listed).images([4]), before)


def test_a_file_replaced_by_another_of_its_size_and_time_is_decoded_again(listed):
    before, stat = open_listed(listed).images([4]), os.stat(listed[1][4])
    other = listed[0].parent / "other.png"
    other.write_bytes(Path(listed[1][5]).read_bytes().ljust(stat.st_size, b"\0")[: stat.st_size])
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(other, listed[1][4])
    assert len(open_listed(listed)) < 40 or not torch.equal(open_listed(listed).images([4]), before)


def test_an_added_and_a_removed_file_are_noticed(listed):
    open_listed(listed)
    write_annotation(listed[0], listed[1][1:])
    assert open_listed(listed).paths == listed[1][1:]
    write_annotation(listed[0], listed[1][::-1])
    data = open_listed(listed)
    assert torch.equal(data.images([0])[0], torch.from_numpy(load_as(listed[1][-1], (8, 16))))


# Builds that do not end well


def damage_index(pixels, index):
    index.write_text(index.read_text()[:-5])


def edit_index(index, **changes):
    index.write_text(json.dumps({**json.loads(index.read_text()), **changes}))


def forget_an_image(pixels, index):
    pixels.write_bytes(pixels.read_bytes()[: 39 * 8 * 16 * 3])
    edit_index(index, shape=[39, 8, 16, 3], hashes=["0"] * 39)


def forget_a_hash(pixels, index):
    edit_index(index, hashes=["0"] * 39)


def empty_index(pixels, index):
    index.write_text("{}")


def lengthen_pixels(pixels, index):
    pixels.write_bytes(pixels.read_bytes() + b"0")


def cut_pixels(pixels, index):
    pixels.write_bytes(pixels.read_bytes()[:-1])


def flip_two_bytes(pixels, index):
    content = bytearray(pixels.read_bytes())
    content[500], content[501] = content[501] ^ 255, content[500]
    pixels.write_bytes(content)


def turn_the_shape(pixels, index):
    edit_index(index, shape=[40, 16, 8, 3])


def edit_a_hash(pixels, index):
    edit_index(index, hashes=["0" * 32, *json.loads(index.read_text())["hashes"][1:]])


def nest_the_index(pixels, index):
    index.write_text("[" * 100_000)


def take_the_files_of_another_cache(pixels, index):
    open_listed((pixels.parent.parent / "train_lines.txt", None, pixels.parent / "other"), background=(0, 0, 0))
    for other in (pixels.parent / "other").iterdir():
        other.replace(pixels.with_suffix(other.suffix))


def remove_index(pixels, index):
    index.unlink()


def remove_pixels(pixels, index):
    pixels.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        damage_index,
        empty_index,
        remove_index,
        forget_an_image,
        forget_a_hash,
        cut_pixels,
        lengthen_pixels,
        remove_pixels,
        flip_two_bytes,
        turn_the_shape,
        edit_a_hash,
        nest_the_index,
        take_the_files_of_another_cache,
    ],
)
def test_a_damaged_cache_is_built_again(listed, decoded, damage, capsys):
    first = open_listed(listed)
    whole, hashes = first.batch(range(40))[0].clone(), first.hashes
    (pixels,), (index,) = listed[2].glob("*.pixels"), listed[2].glob("*.json")
    damage(pixels, index)
    before, _ = len(decoded), capsys.readouterr()
    again = open_listed(listed)
    assert torch.equal(again.batch(range(40))[0], whole) and again.hashes == hashes and len(decoded) == before + 40
    (said,) = capsys.readouterr().out.splitlines()
    assert ("again, as the cache is damaged" in said) == (damage is not remove_index)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_a_pipe_in_place_of_the_pixels_is_not_waited_for(listed):
    open_listed(listed)
    (pixels,) = listed[2].glob("*.pixels")
    pixels.unlink()
    os.mkfifo(pixels)
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(60)
    try:
        with pytest.raises(UserError, match=f"{pixels.name} is a device, a pipe"):
            open_listed(listed)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize("writes", [0, 1])
def test_a_build_killed_at_any_file_is_not_taken_for_whole(listed, decoded, monkeypatch, writes):
    """Killed before the pixels or the index appears."""
    replace, calls = os.replace, []

    def killed(source, target):
        if len(calls) == writes:
            raise KeyboardInterrupt
        calls.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        open_listed(listed)
    monkeypatch.setattr(os, "replace", replace)
    before = len(decoded)
    assert len(open_listed(listed)) == 40 and len(decoded) == before + 40
    assert sorted(path.suffix for path in listed[2].iterdir()) == [".json", ".pixels"]


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(listed, capsys):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # 40 images of 384 bytes are more
    try:
        with pytest.raises(OSError, match="cache of decoded images could not be written.*free some space"):
            open_listed(listed)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(listed[2].iterdir()) == []
    assert len(open_listed(listed)) == 40


# Files that went bad or are gone


def test_files_gone_bad_are_named_and_left_out(listed, capsys, decoded):
    Path(listed[1][5]).write_bytes(b"no longer a picture")
    Path(listed[1][30]).write_bytes(Path(listed[1][30]).read_bytes()[:100])
    for _ in range(2):  # built, then from the cache
        data = open_listed(listed)
        said = capsys.readouterr().out
        assert "left out 2 of 40" in said and listed[1][5] in said and listed[1][30] in said
        kept = [i for i in range(40) if i not in (5, 30)]
        assert data.paths == [listed[1][i] for i in kept] and data.labels.tolist() == [i % 2 for i in kept]
        expected = np.stack([load_as(listed[1][i], (8, 16)) for i in kept])
        assert torch.equal(data.batch(range(38))[0], torch.from_numpy(expected)) and len(data.hashes) == 38
    assert len(decoded) == 40


def test_a_bad_file_made_good_again_comes_back(listed):
    content = Path(listed[1][5]).read_bytes()
    Path(listed[1][5]).write_bytes(b"bad")
    assert len(open_listed(listed)) == 39
    Path(listed[1][5]).write_bytes(content)
    assert len(open_listed(listed)) == 40


@pytest.mark.parametrize("error", [MemoryError(), *(OSError(i, "x") for i in (errno.EIO, errno.EMFILE, errno.EACCES))])
def test_a_failure_that_may_pass_ends_the_build_and_keeps_nothing(listed, monkeypatch, error):
    annotation, paths = listed[0], listed[1]
    with monkeypatch.context() as patch:

        def fail(*arguments, **settings):
            raise error

        patch.setattr("utils.data.cache.load_image", fail)
        with pytest.raises(ValueError, match="cannot be read now") as caught:
            open_dataset(annotation, ImageFormat((8, 8)), cache_path=annotation.parent / "cache")
    assert any(path in str(caught.value) for path in paths) and "\n" not in str(caught.value)
    assert not [path for path in (annotation.parent / "cache").iterdir() if path.suffix in (".pixels", ".json", ".tmp")]
    assert len(open_dataset(annotation, ImageFormat((8, 8)), cache_path=annotation.parent / "cache")) == len(paths)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_a_pipe_in_the_list_is_left_out(listed, capsys):
    os.unlink(listed[1][2])
    os.mkfifo(listed[1][2])
    assert (
        len(open_dataset(listed[0], ImageFormat((8, 8)), cache_path=listed[0].parent / "cache")) == len(listed[1]) - 1
    )
    assert "is no regular file" in capsys.readouterr().out


def test_nothing_that_can_be_decoded_is_an_error(listed):
    for path in listed[1]:
        Path(path).write_bytes(b"bad")
    with pytest.raises(ValueError, match=r"none of the 40 .*txt_annotation\.py"):
        open_listed(listed)
    assert list(listed[2].iterdir()) == []


@pytest.mark.parametrize("cached", [True, False])
def test_files_that_are_gone_are_an_error_that_names_them(listed, cached):
    if cached:
        open_listed(listed)
    for path in listed[1][8:21]:
        os.unlink(path)
    message = r"13 of 40 listed images are gone: .* and 3 more; run `python txt_annotation\.py`"
    with pytest.raises(ValueError, match=message) as caught:
        open_listed(listed)
    assert listed[1][8] in str(caught.value) and "\n" not in str(caught.value)


# Where it is


def test_the_cache_lies_in_the_datasets_folder_beside_the_list(listed):
    (listed[0].parent / "datasets").mkdir()
    open_listed(listed, cache_path=None)
    assert len(list((listed[0].parent / "datasets" / ".cache").iterdir())) == 2


def test_a_folder_that_cannot_be_written_makes_way_for_the_users(listed, decoded, monkeypatch):
    (listed[0].parent / "datasets").mkdir()
    (listed[0].parent / "datasets" / ".cache").write_text("a file, so that no folder can be made, even by root")
    monkeypatch.setenv("XDG_CACHE_HOME", str(listed[2]))
    monkeypatch.setenv("LOCALAPPDATA", str(listed[2]))
    for _ in range(2):
        assert len(open_listed(listed, cache_path=None)) == 40
    assert len(decoded) == 40 and len(list((listed[2] / "ddpm-pytorch").iterdir())) == 2


def test_no_folder_to_write_to_is_an_error_that_names_them(listed):
    listed[2].write_text("a file")
    with pytest.raises(OSError, match=re.escape(str(listed[2]))):
        open_listed(listed)


def test_the_caches_used_longest_ago_go(listed):
    old = time.time() - 7200
    for i in range(7):
        open_listed(listed, input_shape=(4 + i, 4))
        for path in listed[2].iterdir():
            if path.stat().st_mtime > time.time() - 3600:
                os.utime(path, (old + i, old + i))
    leftover, foreign = f".{'a' * 24}.pixels.01234567.tmp", ("mine.json", "mine.pixels", ".mine.tmp", ".x.01234567.tmp")
    for name in (leftover, *foreign):
        (listed[2] / name).touch()
        os.utime(listed[2] / name, (old, old))
    open_listed(listed, input_shape=(7, 4))  # used just now, though made long ago
    open_listed(listed, input_shape=(4, 4), img_channels=1)
    assert not (listed[2] / leftover).exists()
    for name in foreign:
        (listed[2] / name).unlink()  # it is there
    kept = sorted(json.loads(path.read_text())["shape"][1:] for path in listed[2].glob("*.json"))
    assert kept == [[4, 4, 1], [7, 4, 3], [9, 4, 3], [10, 4, 3]]
    assert len(list(listed[2].iterdir())) == 8


def test_leftovers_of_killed_builds_go_where_nothing_is_built_too(listed):
    open_listed(listed)
    (pixels,) = listed[2].glob("*.pixels")
    for key, age, stays in (("a" * 24, 7200, False), ("a" * 24, 0, True), (pixels.stem, 0, False)):
        leftover = listed[2] / f".{key}.pixels.01234567.tmp"  # a living build of another key may write the young one
        leftover.touch()
        os.utime(leftover, (time.time() - age,) * 2)
        open_listed(listed)
        assert leftover.exists() == stays


def test_two_builds_of_the_same_cache_do_no_harm(listed, monkeypatch):
    """The first to end removes the file of the other, which takes the finished cache."""
    began, others = [], []

    def load(*arguments):
        if not began:
            began.append(1)
            others.append(open_listed(listed))
        return load_image(*arguments)

    monkeypatch.setattr(module, "load_image", load)
    data = open_listed(listed)
    assert torch.equal(data.batch(range(40))[0], others[0].batch(range(40))[0]) and data.hashes == others[0].hashes
    assert sorted(path.suffix for path in listed[2].iterdir()) == [".json", ".pixels"]


@pytest.mark.skipif(os.name == "nt", reason="links of POSIX")
def test_links_in_a_cache_redirect_no_write_and_foreign_files_behind_one_stay(listed, monkeypatch):
    (listed[0].parent / "datasets").mkdir()
    outside, old = listed[0].parent / "outside", time.time() - 7200
    outside.mkdir()
    (listed[0].parent / "datasets" / ".cache").symlink_to(outside)
    open_listed(listed, cache_path=None)
    foreign = [outside / name for name in ("a.json", "results.pixels", ".writable", f"{'a' * 24}.json.bak")]
    for path in foreign:
        path.write_text("mine")
        os.utime(path, (old, old))
    for path in sorted(outside.glob("?" * 24 + ".*[ns]")):  # as if someone knew the names
        target = outside / ("target" + path.suffix)
        path.replace(target)
        target.write_text("mine")
        path.symlink_to(target)
        foreign.append(target)
    for i in range(7):
        open_listed(listed, cache_path=None, input_shape=(4 + i, 4))
    assert len(open_listed(listed, cache_path=None)) == 40
    assert [path.read_text() for path in foreign] == ["mine"] * 6


def test_a_format_that_this_installation_cannot_read_is_no_lasting_fault(listed, monkeypatch):
    for module_name in ("formats", "cache"):
        monkeypatch.setattr(f"utils.data.{module_name}.FORMATS", ("JPEG",))
    Image.new("RGB", (9, 9)).save(listed[1][0], "JPEG")
    assert len(open_listed(listed)) == 1
    monkeypatch.undo()
    assert len(open_listed(listed)) == 40


def test_caches_used_within_the_hour_stay(listed):
    for i in range(7):
        open_listed(listed, input_shape=(4 + i, 4))
    assert len(list(listed[2].glob("*.pixels"))) == 7


# Batches


def test_an_epoch_takes_every_image_once_and_drops_the_rest():
    batches = epoch_batches(23, 5, seed=1, epoch=0)
    taken = np.concatenate(list(batches))
    assert len(batches) == 4 == len(list(batches)) and all(len(batch) == 5 for batch in batches)
    assert len(set(taken)) == 20 and set(taken) <= set(range(23)) and list(taken) != sorted(taken)


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        return np.concatenate(list(epoch_batches(1000, 10, seed, epoch))).tolist()

    torch.manual_seed(0)
    first = order(3, 4)
    torch.manual_seed(1)
    assert order(3, 4) == first
    assert len({tuple(order(seed, epoch)) for seed in (-1, 0, 3) for epoch in (0, 4, 5)}) == 9


@pytest.mark.parametrize("start", [0, 8, 16, 24])
def test_an_epoch_goes_on_where_it_was_left(start):
    whole, rest = epoch_batches(30, 8, 0, 2), epoch_batches(30, 8, 0, 2, start=start)
    assert [batch.tolist() for batch in rest] == [batch.tolist() for batch in whole][start // 8 :]
    assert len(rest) == 3 - start // 8


def test_the_ranks_slices_make_the_whole_batch():
    whole = list(epoch_batches(50, 12, 5, 1, start=12))
    ranks = [list(epoch_batches(50, 12, 5, 1, start=12, rank=rank, world_size=3)) for rank in range(3)]
    np.testing.assert_array_equal(np.concatenate(ranks, axis=1), whole)
    assert len(ranks[0][0]) == 4


def test_the_batches_of_a_subset_hold_its_images_only(listed):
    data, numbers = open_listed(listed), [3, 5, 8, 13, 21, 34]
    subset = data.subset(numbers)
    batches = list(subset.batches(epoch_batches(len(subset), 3, 0, 0)))
    found = sorted(
        (image.numpy().tobytes(), label) for images, labels in batches for image, label in zip(images, labels.tolist())
    )
    assert found == sorted((data.images([number])[0].numpy().tobytes(), number % 2) for number in numbers)
    order = np.concatenate(list(epoch_batches(len(subset), 3, 0, 0)))
    assert [numbers[i] for i in order] == [13, 8, 34, 21, 3, 5]  # pinned: exact resume depends on it
    assert torch.equal(batches[0][0], data.images([13, 8, 34]))


@pytest.mark.parametrize(
    "pin_memory", [False, pytest.param(True, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA"))]
)
def test_the_loader_gives_whole_batches_of_its_order(listed, pin_memory):
    data, batches = open_listed(listed), epoch_batches(40, 16, 0, 0)
    for indices, (images, labels) in zip(batches, data.batches(batches, pin_memory), strict=True):
        assert images.shape == (16, 8, 16, 3) and images.dtype == torch.uint8 and images.is_pinned() == pin_memory
        assert labels.tolist() == [i % 2 for i in indices]
        assert torch.equal(images[5], data.images([indices[5]])[0])


def test_a_batch_is_one_gather():
    class Counting(np.ndarray):
        gathers = 0

        def __getitem__(self, rows):
            Counting.gathers += 1
            return np.asarray(self)[rows]

    pixels = np.zeros((32, 4, 4, 3), dtype=np.uint8).view(Counting)
    data = ImageDataset("pictures", pixels, [""] * 32, torch.zeros(32, dtype=torch.int64), [], [""] * 32)
    assert len(list(data.batches(epoch_batches(32, 8, 0, 0)))) == 4 == Counting.gathers


# Sizes


def test_the_batch_shrinks_to_the_images_there_are(capsys):
    assert fit_batch_size(100, 64) == 64 and capsys.readouterr().out == ""
    assert fit_batch_size(10, 64) == 10
    assert "batch_size is 10, not 64: the annotation file has 10 images" in capsys.readouterr().out
    assert fit_batch_size(10, 64, multiple=4) == 8


@pytest.mark.parametrize(
    "images, batch_size, multiple, message",
    [
        (100, 10, 4, "use 8$"),
        (100, 3, 4, "use 4"),
        (100, 0, 1, "use 1"),
        (100, -5, 2, "use 2"),
        (3, 8, 4, "3 images, too few"),
        (0, 8, 1, "0 images, too few"),
    ],
)
def test_batch_sizes_that_cannot_be_are_refused_with_what_can(images, batch_size, multiple, message):
    with pytest.raises(ValueError, match=message):
        fit_batch_size(images, batch_size, multiple)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (2, 4, 6, 1), (1, 1, 5, 3), (3, 1, 1, 1)])
def test_normalize_scales_and_is_contiguous_as_asked(shape, memory_format):
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    x = normalize(pixels, "cpu", memory_format=memory_format)
    expected = (pixels.double() / 255 * 2 - 1).permute(0, 3, 1, 2)
    torch.testing.assert_close(x.double(), expected, atol=1e-6, rtol=0)
    batch, height, width, channels = shape
    assert x.is_contiguous(memory_format=memory_format) and x.dtype == torch.float32
    assert x.stride() == torch.empty((batch, channels, height, width), memory_format=memory_format).stride()


def test_every_level_survives_there_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
    x = normalize(pixels, "cpu")
    assert (x.min(), x.max()) == (-1, 1)
    np.testing.assert_array_equal(to_uint8(x), pixels.numpy())


def test_only_the_chosen_images_are_mirrored_left_to_right():
    pixels = torch.randint(0, 256, (3, 4, 6, 3), dtype=torch.uint8)
    plain, flipped = normalize(pixels, "cpu"), normalize(pixels, "cpu", flip=torch.tensor([True, False, True]))
    assert torch.equal(flipped[1], plain[1])
    assert torch.equal(flipped[[0, 2]], plain[[0, 2]].flip(-1)) and not torch.equal(flipped[0], plain[0])


def test_an_unwritable_index_is_the_same_clear_error(listed, monkeypatch):
    dump = json.dump

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.json, "dump", full)
    with pytest.raises(OSError, match="No space left on device"):
        open_listed(listed)
    monkeypatch.setattr(module.json, "dump", dump)
    assert len(open_listed(listed)) == 40
