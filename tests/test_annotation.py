"""Finding, checking and listing images, and the script that does it."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.data.annotation import (
    Annotation,
    check_annotation_path,
    classes_path,
    read_annotation,
    write_annotation,
)
from utils.data.formats import EXTENSIONS
from utils.data.search import (
    check_images,
    describe_classes,
    empty_classes,
    find_images,
    label_by_folder,
    search,
    without_shipped,
)
from utils.data.threads import map_in_threads
from utils.errors import UserError
from utils.terminal import printable

PROJECT = Path(__file__).resolve().parents[1]


def make_image(path, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def relative(paths, root):
    return [Path(path).relative_to(root).as_posix() for path in paths]


# Finding


def test_every_extension_in_any_case_at_any_depth(tmp_path):
    names = [f"d{i}/deeper/a{ending}" for i, ending in enumerate((*EXTENSIONS, ".PNG", ".JpEg", ".TIFF"))]
    for name in [*names, "notes.txt", "a.png.part", "png", "archive.zip"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert sorted(relative(find_images(tmp_path), tmp_path)) == sorted(names)


def test_hidden_files_folders_and_the_cache_are_left_out(tmp_path):
    for name in (".cache/a.png", ".hidden.png", "x/.git/a.png", "x/._a.png", "x/a.png"):
        make_image(tmp_path / name)
    assert relative(find_images(tmp_path), tmp_path) == ["x/a.png"]


def test_a_hidden_root_is_searched_all_the_same(tmp_path):
    make_image(tmp_path / ".mine" / "a.png")
    assert len(find_images(tmp_path / ".mine")) == 1


def test_paths_are_absolute_and_sorted_by_folder(tmp_path, monkeypatch):
    for name in ("b/1.png", "a b/1.png", "a/z.png", "a/10.png", "a/2.png", "a-/1.png"):
        make_image(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    found = find_images(".")
    assert all(os.path.isabs(path) for path in found)
    assert relative(found, tmp_path) == ["a/10.png", "a/2.png", "a/z.png", "a b/1.png", "a-/1.png", "b/1.png"]


def test_links_in_circles_end_and_no_folder_is_listed_twice(tmp_path):
    make_image(tmp_path / "data" / "z" / "1.png")
    make_image(tmp_path / "outside" / "2.png")
    (tmp_path / "data" / "z" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "a").symlink_to(tmp_path / "data" / "z")
    (tmp_path / "data" / "zz").symlink_to(tmp_path / "data" / "z")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "outside")
    (tmp_path / "data" / "self").symlink_to(tmp_path / "data" / "self")
    (tmp_path / "data" / "file.png").symlink_to(tmp_path / "outside" / "2.png")
    assert relative(find_images(tmp_path / "data"), tmp_path / "data") == ["file.png", "linked/2.png", "z/1.png"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_a_pipe_is_not_waited_for_and_a_broken_link_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere.png")
    assert relative(find_images(tmp_path), tmp_path) == ["lost.png"]
    _, bad = check_images(find_images(tmp_path))
    assert bad == [(str(tmp_path / "lost.png"), "No such file or directory")]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_a_link_to_a_pipe_is_named_and_not_listed(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe")
    (tmp_path / "terminal.png").symlink_to("/dev/null")
    assert find_images(tmp_path) == []
    said = capsys.readouterr().out
    assert "link.png: no regular file" in said and "terminal.png: no regular file" in said


def test_other_files_are_counted_by_their_ending(tmp_path):
    for name in ("a.png", "a.HEIC", "x/b.heic", "x/c.xcf", "README", ".hidden", "x/.DS_Store", "d.png.part"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    paths, others = search(tmp_path)
    assert relative(paths, tmp_path) == ["a.png"]
    assert others == {".heic": 2, ".xcf": 1, "": 1, ".part": 1}


def test_a_root_that_is_no_folder_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match="missing is not a folder.*datasets_path"):
        find_images(tmp_path / "missing")


SYSTEM = ("@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__MACOSX", "@Recycle")


@pytest.mark.parametrize("name", [*SYSTEM, "$Recycle.Bin"])
@pytest.mark.parametrize("linked", [False, True])
def test_folders_of_the_system_or_a_nas_are_left_out_and_named(tmp_path, capsys, name, linked):
    if linked:
        make_image(tmp_path / "outside" / "thumb.jpg")
        (tmp_path / "data" / "cats").mkdir(parents=True)
        (tmp_path / "data" / "cats" / name).symlink_to(tmp_path / "outside")
    else:
        make_image(tmp_path / "data" / "cats" / name / "1.jpg" / "thumb.jpg")
    for place in ("cats/1.jpg", f"{name}s/2.jpg"):
        make_image(tmp_path / "data" / place)
    make_image(tmp_path / "data" / name / "3.jpg")
    found = relative(find_images(tmp_path / "data"), tmp_path / "data")
    assert sorted(found) == sorted(["cats/1.jpg", f"{name}s/2.jpg"])
    assert capsys.readouterr().out == f"left out 2 folders that a system makes for itself: {name} (2)\n"
    assert len(find_images(tmp_path / "data" / name)) == 1  # asked for


# Checking


def test_each_bad_file_is_left_out_with_its_reason(tmp_path):
    good = [make_image(tmp_path / "a.png", (8, 6)), make_image(tmp_path / "b.png", (5, 9))]
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("no picture at all")
    cut = tmp_path / "cut.jpg"
    make_image(cut, (200, 200))
    cut.write_bytes(cut.read_bytes()[:-900])
    paths = [good[0], str(tmp_path / "empty.png"), str(cut), good[1], str(tmp_path / "text.jpg")]
    whole, bad = check_images(paths)
    assert whole == [(good[0], (8, 6)), (good[1], (5, 9))]
    assert [path for path, _ in bad] == [paths[1], paths[2], paths[4]]
    assert "truncated" in bad[1][1] and "not an image" in bad[2][1] and bad[0][1]


def test_a_name_with_a_line_break_is_left_out(tmp_path):
    path = make_image(tmp_path / "a\nb.png")
    assert check_images([path])[1][0][0] == path


@pytest.mark.parametrize(
    "error, reason",
    [
        (MemoryError(), "out of memory"),
        *[
            (OSError(number, os.strerror(number)), os.strerror(number))
            for number in (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)
        ],
    ],
)
def test_a_failure_of_the_system_ends_the_pass(tmp_path, monkeypatch, error, reason):
    """The image may be whole: it must not be left out."""
    paths = [make_image(tmp_path / f"{i}.png") for i in range(3)]

    def fail(path, full):
        if path == paths[1]:
            raise error
        return 1, 1

    monkeypatch.setattr("utils.data.search.check_image", fail)
    with pytest.raises(ValueError) as caught:
        check_images(paths)
    advice = "see to the system, or lower num_workers, and run this again"
    assert str(caught.value) == f"{paths[1]} cannot be read now ({reason}): {advice}"


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOENT, errno.ELOOP, errno.ENAMETOOLONG])
def test_a_file_that_may_not_be_read_is_left_out(tmp_path, monkeypatch, number):
    def fail(path, full):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("utils.data.search.check_image", fail)
    assert check_images(["/a.png"]) == ([], [("/a.png", os.strerror(number))])


# Printing


@pytest.mark.parametrize(
    "text, shown",
    [
        ("plain name.png", "plain name.png"),
        ("gâteau 蛋糕 👩\u200d🚀.png", "gâteau 蛋糕 👩\u200d🚀.png"),
        ("\x1b]0;owned\x07\x1b[31mred", r"\x1b]0;owned\x07\x1b[31mred"),
        ("a\nb\rc\td\0", r"a\nb\rc\td\x00"),
        ("\x9b31m\x7f", r"\x9b31m\x7f"),
        (Path("/d/\x1bc"), r"/d/\x1bc"),
        ("bytes\udcff", r"bytes\udcff"),
        ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),
        ("a\u2028b", r"a\u2028b"),
    ],
)
def test_what_a_terminal_would_act_on_is_escaped(monkeypatch, text, shown):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert printable(text) == shown


# Classes


@pytest.mark.parametrize(
    "paths, labels, classes",
    [
        (["/d/cats/1.png", "/d/cats/2.png", "/d/dogs/1.png"], [0, 0, 1], ["cats", "dogs"]),
        (["/d/set/dogs/old/1.png", "/d/set/cats/x/y/2.png", "/d/set/dogs/3.png"], [1, 0, 1], ["cats", "dogs"]),
        (["/d/1.png", "/d/2.png"], None, []),
        (["/d/deep/er/1.png", "/d/deep/er/2.png"], None, []),  # one folder alone holds no classes
        (["/d/1.png", "/d/cats/2.png"], None, []),
        (["/d/cats/2.png"], None, []),
        (["/d/cat/1.png", "/d/cats/1.png"], [0, 1], ["cat", "cats"]),  # a common prefix of names is no folder
    ],
)
def test_the_class_is_the_folder_below_the_common_root(paths, labels, classes):
    assert label_by_folder(paths) == (labels, classes)


def test_two_spellings_of_a_name_in_unicode_are_one_class():
    composed, split = "caf\u00e9", "cafe\u0301"
    paths = [f"/d/{split}/1.png", f"/d/{composed}/2.png", "/d/Cafe/3.png"]
    assert label_by_folder(paths) == ([1, 1, 0], ["Cafe", composed])
    assert label_by_folder([f"/d/{split}/1.png", f"/d/{composed}/2.png"])[1] == [composed]


def test_class_folders_without_a_good_image_are_named():
    paths = ["/d/cats/1.png", "/d/dogs/2.png", "/d/owls/old/3.png", "/d/owls/4.png"]
    assert empty_classes(paths, paths) == []
    assert empty_classes(paths, paths[:3]) == []
    assert empty_classes(paths, [paths[0], paths[3]]) == ["dogs"]
    assert empty_classes(paths, paths[:1]) == ["dogs", "owls"]  # that no classes are left is said elsewhere
    assert empty_classes([*paths, "/d/stray.png"], paths[:1]) == []
    assert empty_classes(paths[:1], []) == []


def test_images_beside_class_folders_are_named():
    said = describe_classes(["/d/cats/1.png", "/d/stray.png", "/d/dogs/2.png"], None, [])
    assert said.startswith("no class folders, as stray.png would be in none: move every image")
    assert describe_classes(["/d/1.png", "/d/2.png"], None, []) == "no class folders: the images are unlabeled"
    assert describe_classes(["/d/cats/1.png", "/d/dogs/2.png"], [0, 1], ["cats", "dogs"]).startswith("2 classes")


def test_the_shipped_emoji_alone_have_seven_classes():
    labels, classes = label_by_folder(find_images(PROJECT / "datasets" / "noto_emoji"))
    assert classes == ["activities", "faces", "flags", "food", "nature", "objects", "travel"]
    assert len(labels) == 1296 and labels.count(classes.index("faces")) == 169


def test_the_shipped_emoji_make_way_for_other_images():
    shipped, own = "/d/datasets/noto_emoji/faces/1.png", "/d/datasets/noto_emoji_mine/1.png"
    assert without_shipped([shipped], "/d/datasets") == ([shipped], 0)
    assert without_shipped([shipped, own], "/d/datasets/") == ([own], 1)
    assert without_shipped([shipped], "/d/datasets/noto_emoji") == ([shipped], 0)


# The list

ODD_NAMES = [
    "with space.png",
    " b, c.png",
    "ü/日本/é.png",
    "1;b.png",
    "12;/x.png",
    "a;b;c.png",
    "x\u2028y\x85z\x0b.png",
    "\ufeff.png",
    "tab\t'\"#%\\n.png",
    "car\rriage.png",
    "bytes\udcff.png",
    "end .png ",
]


@pytest.mark.parametrize("labels", [None, [i % 3 for i in range(len(ODD_NAMES))]])
def test_odd_names_survive_the_list(tmp_path, labels):
    paths = [f"{tmp_path}/{name}" for name in ODD_NAMES]
    classes = [] if labels is None else ["a b", "ü;1", " "]
    write_annotation(tmp_path / "train_lines.txt", paths, labels, classes)
    assert read_annotation(tmp_path / "train_lines.txt") == Annotation(paths, labels, classes)


def test_the_format_is_the_agreed_one(tmp_path):
    write_annotation(tmp_path / "train_lines.txt", ["/d/ä b.png", "/d/c.png"], [1, 0], ["cats", "dögs"])
    assert (tmp_path / "train_lines.txt").read_bytes() == "1;/d/ä b.png\n0;/d/c.png\n".encode()
    assert (tmp_path / "train_classes.txt").read_bytes() == "cats\ndögs\n".encode()


def test_class_names_of_an_older_list_go(tmp_path):
    path = tmp_path / "train_lines.txt"
    write_annotation(path, ["/d/1.png"], [0], ["cats"])
    write_annotation(path, ["/d/1.png"], [0], ["dogs"])
    assert read_annotation(path).classes == ["dogs"]
    write_annotation(path, ["/d/1.png"])
    assert [file.name for file in tmp_path.iterdir()] == ["train_lines.txt"]


def test_class_names_lie_beside_the_list():
    assert classes_path("/d/train_lines.txt") == Path("/d/train_classes.txt")
    assert classes_path("/d/flowers.txt") == Path("/d/flowers_classes.txt")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_a_fifo_is_refused_before_the_older_names_go(tmp_path):
    os.mkfifo(tmp_path / "list.txt")
    (tmp_path / "list_classes.txt").write_text("mine\n")
    for attempt in (lambda path: write_annotation(path, ["/d/1.png"], [0], ["cats"]), check_annotation_path):
        with pytest.raises(UserError, match="list.txt is a device, a pipe, a socket"):
            attempt(tmp_path / "list.txt")
    assert (tmp_path / "list_classes.txt").read_text() == "mine\n" and len(os.listdir(tmp_path)) == 2


def list_of(folder, name, classes):
    """A labelled list of one image for each class, as bytes with its names."""
    path = folder / name
    write_annotation(path, [f"/d/{name}.png" for name in classes], list(range(len(classes))), classes)
    return path.read_bytes(), classes_path(path).read_bytes()


@pytest.mark.parametrize("first, second", [("train_lines.txt", "train.txt"), ("train.txt", "train_lines.txt")])
@pytest.mark.parametrize("labels", [[0], None])
def test_class_names_of_another_list_are_never_replaced_or_deleted(tmp_path, first, second, labels):
    kept = list_of(tmp_path, first, ["cats", "dogs"])
    if labels is None:  # it needs no names
        write_annotation(tmp_path / second, ["/d/1.png"])
        assert read_annotation(tmp_path / second).classes == []
    else:
        for _ in range(2):
            with pytest.raises(UserError, match=rf"train_classes\.txt .* not of {second}: .*annotation_path"):
                write_annotation(tmp_path / second, ["/d/1.png"], labels, ["flags"])
        assert not (tmp_path / second).exists()
    assert ((tmp_path / first).read_bytes(), (tmp_path / "train_classes.txt").read_bytes()) == kept
    assert list_of(tmp_path, first, ["birds"]) != kept  # its own list may


@pytest.mark.parametrize("kind", ["file", "folder", "pipe"])
@pytest.mark.parametrize("labels", [[0], None])
def test_what_was_in_the_place_of_the_class_names_before_the_list_stays(tmp_path, kind, labels):
    place = tmp_path / "my_classes.txt"
    if kind == "pipe" and not hasattr(os, "mkfifo"):
        pytest.skip("named pipes")
    {"file": lambda: place.write_text("mine\n"), "folder": place.mkdir, "pipe": lambda: os.mkfifo(place)}[kind]()
    before = stat_without_access_time(place)
    if labels is None:
        write_annotation(tmp_path / "my.txt", ["/d/1.png"])
    else:
        with pytest.raises(UserError, match=r"my_classes\.txt .* not of my\.txt"):
            write_annotation(tmp_path / "my.txt", ["/d/1.png"], labels, ["cats"])
    assert stat_without_access_time(place) == before


def stat_without_access_time(path):
    return *os.stat(path)[:7], *os.stat(path)[8:]


def test_the_same_class_names_are_no_loss(tmp_path):
    list_of(tmp_path, "train_lines.txt", ["cats"])
    (tmp_path / "train_lines.txt").unlink()
    list_of(tmp_path, "train_lines.txt", ["cats"])
    list_of(tmp_path, "train.txt", ["cats"])
    assert read_annotation(tmp_path / "train.txt").classes == ["cats"]


def test_a_list_never_replaces_the_class_names_of_another(tmp_path):
    list_of(tmp_path, "train_lines.txt", ["cats"])
    with pytest.raises(UserError, match=r"train_classes\.txt holds the class names of .*train_lines\.txt"):
        check_annotation_path(tmp_path / "train_classes.txt")
    check_annotation_path(tmp_path / "other_classes.txt")


def test_what_killed_runs_left_of_a_list_goes_with_the_next(tmp_path):
    mine = [f".train_lines.txt.{'a' * 8}.tmp", f".train_classes.txt.{'0' * 8}.tmp"]
    foreign = [f".train_lines.txt.{'x' * 8}.tmp", f".other.txt.{'a' * 8}.tmp", "train_lines.txt.tmp"]
    for name in mine + foreign:
        (tmp_path / name).touch()
    list_of(tmp_path, "train_lines.txt", ["cats"])
    assert sorted(os.listdir(tmp_path)) == sorted([*foreign, "train_lines.txt", "train_classes.txt"])


@pytest.mark.skipif(os.name == "nt", reason="links of POSIX")
def test_a_list_behind_a_link_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "train_lines.txt").symlink_to("elsewhere/list")
    write_annotation(tmp_path / "train_lines.txt", ["/d/1.png"], [0], ["cats"])
    assert (tmp_path / "elsewhere" / "list").read_text() == "0;/d/1.png\n"
    assert (tmp_path / "train_lines.txt").is_symlink()
    assert read_annotation(tmp_path / "train_lines.txt") == Annotation(["/d/1.png"], [0], ["cats"])


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_a_write_that_fails_never_leaves_wrong_names(tmp_path, monkeypatch, fails_at):
    """Killed before the list, between list and names, and after both: the old pair, the new pair,
    or a clear refusal.
    """
    path = tmp_path / "train_lines.txt"
    write_annotation(path, ["/d/old.png"], [0], ["old"])
    replace, calls = os.replace, []

    def failing(source, target):
        if len(calls) == fails_at:
            raise OSError("killed")
        calls.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    try:
        write_annotation(path, ["/d/new.png"], [0], ["new"])
    except OSError:
        assert fails_at < 2
        with pytest.raises(ValueError, match=r"train_classes\.txt is missing.*txt_annotation\.py"):
            read_annotation(path)
    else:
        assert read_annotation(path) == Annotation(["/d/new.png"], [0], ["new"])


def test_a_full_disk_leaves_list_and_names_untouched(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "train_lines.txt"
    write_annotation(path, ["/d/old.png"], [0], ["old"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError):
            write_annotation(path, [f"/d/{i}.png" for i in range(50)], [0] * 50, ["new"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_annotation(path) == Annotation(["/d/old.png"], [0], ["old"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["train_classes.txt", "train_lines.txt"]


@pytest.mark.skipif(os.name == "nt", reason="paths of POSIX")
def test_a_list_saved_by_a_windows_editor_is_read(tmp_path):
    (tmp_path / "train_lines.txt").write_bytes("\ufeff1;/d/ü.png\r\n0;/d/b.png\r\n\r\n".encode())
    (tmp_path / "train_classes.txt").write_bytes("\ufeffcats\r\ndogs\r\n".encode())
    assert read_annotation(tmp_path / "train_lines.txt") == Annotation(
        ["/d/ü.png", "/d/b.png"], [1, 0], ["cats", "dogs"]
    )


@pytest.mark.parametrize(
    "text, classes, message",
    [
        (None, None, "is not there: run `python txt_annotation.py`"),
        ("", None, "lists no image: run `python txt_annotation.py`"),
        ("\n\n", None, "lists no image"),
        ("/d/a.png\n0;/d/b.png\n", "cats\n", "line 2:"),
        ("0;/d/a.png\n/d/b.png\n", "cats\n", "line 2:"),
        ("\n/d/a.png\nb.png\n", None, "line 3:"),
        ("/d/a.png 1,2,3\nsome text\n", None, "line 2:"),
        ("\0\1\2binary", None, "is no text"),
        ("2;/d/a.png\n", "cats\ndogs\n", "uses class id 2, but .* names 2 classes only"),
        ("0;/d/a.png\n", None, "is missing or empty: run"),
        ("0;/d/a.png\n", "cats\ndogs\r\ncats\n", "names cats twice: run"),
    ],
)
def test_a_list_that_cannot_be_used_is_one_clear_line(tmp_path, text, classes, message):
    for name, content in (("train_lines.txt", text), ("train_classes.txt", classes)):
        if content is not None:
            (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        read_annotation(tmp_path / "train_lines.txt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, fault",
    [
        (b"images/a.png", "line 1: images/a.png, not '<absolute path>' on all lines, or"),
        (b"/d/a.png\n0;'/d/a.png'", "line 2: '/d/a.png', not"),
        (b"evil\x1b[31m.png", r"line 1: evil\\x1b\[31m.png, not"),
        ("0;/d/a.png\r\n".encode("utf-16"), "is saved as UTF-16"),
    ],
)
def test_a_line_that_cannot_be_used_is_shown(tmp_path, text, fault):
    (tmp_path / "train_lines.txt").write_bytes(text)
    with pytest.raises(ValueError, match=fault):
        read_annotation(tmp_path / "train_lines.txt")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_list_in_utf_16_is_named_as_one(tmp_path, encoding):
    path = tmp_path / "train_lines.txt"
    path.write_bytes("0;/d/a.png\r\n".encode(encoding))
    with pytest.raises(UserError, match=r"train_lines\.txt is saved as UTF-16, or is no text: save it as UTF-8"):
        read_annotation(path)
    write_annotation(path, ["/d/a.png"], [0], ["cats"])
    classes_path(path).write_bytes("cats\r\n".encode(encoding))
    with pytest.raises(UserError, match=r"train_classes\.txt is saved as UTF-16"):
        read_annotation(path)


@pytest.mark.parametrize("name", [".", "..", "", "/", "logs/", "logs", "./", "a\0b"])
def test_a_list_cannot_be_written_over_a_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    with pytest.raises(ValueError, match="is no name of a file: give one such as train_lines.txt"):
        check_annotation_path(name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_a_pipe_in_the_place_of_list_or_names_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match="pipe.txt is not there"):
        read_annotation(tmp_path / "pipe.txt")
    (tmp_path / "list.txt").write_text("0;/d/a.png\n")
    (tmp_path / "list_classes.txt").symlink_to("pipe.txt")
    with pytest.raises(UserError, match="list_classes.txt is missing"):
        read_annotation(tmp_path / "list.txt")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_a_list_cannot_be_written_into_a_pipe_or_a_device(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", os.devnull):
        with pytest.raises(ValueError, match="is a device, a pipe, a socket"):
            check_annotation_path(path)


def test_a_list_never_replaces_an_image(tmp_path, monkeypatch):
    path = make_image(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is one of the images"):
        check_annotation_path("a.png", [path])
    check_annotation_path("other.png", [path])


# The script


def run_script(folder, *options):
    command = [sys.executable, str(PROJECT / "txt_annotation.py"), *options]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=120
    )


def test_the_script_lists_what_is_good_and_says_what_it_did(tmp_path):
    for name in ("noto_emoji/faces/1.png", "my set/cats/1.PNG", "my set/dögs/1.jpg", "my set/dögs/2.png"):
        make_image(tmp_path / "datasets" / name)
    (tmp_path / "datasets" / "my set" / "cats" / "bad.png").write_bytes(b"bad")
    (tmp_path / "datasets" / "my set" / "owls").mkdir()
    (tmp_path / "datasets" / "my set" / "owls" / "bad.png").write_bytes(b"bad")
    done = run_script(tmp_path)
    assert done.returncode == 0, done.stderr
    listed = read_annotation(tmp_path / "train_lines.txt")
    assert relative(listed.paths, tmp_path / "datasets") == [
        "my set/cats/1.PNG",
        "my set/dögs/1.jpg",
        "my set/dögs/2.png",
    ]
    assert (listed.labels, listed.classes) == ([0, 1, 1], ["cats", "dögs"])
    for said in (
        "3 images, width x height: 8x6 (3)",
        "2 classes: cats (1), dögs (2)",
        "bad.png: not an image",
        "class folders without an image that can be read: owls",
        "the 1 shipped ones",
        str(tmp_path / "train_lines.txt"),
    ):
        assert said in done.stdout
    assert "checking images" in done.stderr


@pytest.mark.parametrize("content", [None, b"broken"])
def test_without_an_image_the_script_fails_and_the_old_list_stays(tmp_path, content):
    (tmp_path / "datasets").mkdir()
    if content:
        (tmp_path / "datasets" / "a.png").write_bytes(content)
    (tmp_path / "train_lines.txt").write_text("/old.png\n")
    done = run_script(tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert str(tmp_path / "datasets") in done.stderr and "put" in done.stderr
    assert (tmp_path / "train_lines.txt").read_text() == "/old.png\n"


def test_the_script_says_what_it_does_not_read_and_why_there_are_no_classes(tmp_path):
    for name in ("cats/1.png", "dogs/2.png", "stray.png", "\x1b]0;x\x07/3.png"):
        make_image(tmp_path / "datasets" / name)
    for name in ("a.heic", "b.HEIC", "c.xyz"):
        (tmp_path / "datasets" / name).touch()
    (tmp_path / "datasets" / "bad\x1b[31m.png").write_bytes(b"bad")
    os.mkfifo(tmp_path / "datasets" / "pipe.png")
    done = run_script(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "skipped files: " in done.stdout and ".xyz (1)" in done.stdout
    assert ".heic (2), " in done.stdout and "pip install pillow-heif" in done.stdout or ".heic" in EXTENSIONS
    assert "no class folders, as stray.png would be in none: move" in done.stdout
    assert r"bad\x1b[31m.png: not an image" in done.stdout and "pipe.png: no regular file" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize(
    "variables",
    [
        {"LANG": "C", "LC_ALL": "C"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "cp1252", "LANG": "C"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
)
def test_names_that_the_terminal_cannot_show_end_nothing(tmp_path, monkeypatch, variables):
    folder = os.fsencode(tmp_path / "datasets")
    for name in ("猫".encode(), b"bytes\xff", b"-dash"):
        os.makedirs(folder + b"/" + name)
        with open(folder + b"/" + name + b"/1.png", "wb") as file:
            Image.new("RGB", (4, 4)).save(file, "PNG")
    (tmp_path / "datasets" / "猫" / "bad.png").write_bytes(b"bad")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, str(PROJECT / "txt_annotation.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr and b"3 classes: -dash (1)" in done.stdout and rb"bytes\udcff" in done.stdout
    assert read_annotation(tmp_path / "train_lines.txt").classes == ["-dash", "bytes\udcff", "猫"]


@pytest.mark.skipif(sys.platform != "linux", reason="names of bytes")
def test_a_list_with_non_ascii_names_is_read_where_the_locale_has_no_utf_8(tmp_path):
    paths = [make_image(tmp_path / "猫" / "ä.png"), make_image(tmp_path / "bytes\udcff.png")]
    write_annotation(tmp_path / "train_lines.txt", paths, [1, 0], ["a", "猫"])
    program = (
        "from utils.data.annotation import read_annotation; from utils.data.cache import open_cache\n"
        "from utils.data.image_format import ImageFormat\n"
        "listed = read_annotation('train_lines.txt')\n"
        "pixels, index = open_cache('train_lines.txt', listed.paths, ImageFormat((8, 8)), 'cache')\n"
        "print(len(pixels), index['bad'], ascii(listed.classes), listed.labels)\n"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    environment["PYTHONPATH"] = str(PROJECT)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == r"2 [] ['a', '\u732b'] [1, 0]", done.stderr


@pytest.mark.parametrize("name", [".", "datasets", "", "datasets/cats/1.png"])
def test_a_list_at_a_wrong_place_is_one_line(tmp_path, name):
    path = Path(make_image(tmp_path / "datasets" / "cats" / "1.png"))
    content = path.read_bytes()
    done = run_script(tmp_path, f"--annotation_path={name}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: annotation_path ")
    assert path.read_bytes() == content


# Threads


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_results_come_in_order(num_workers):
    assert list(map_in_threads(lambda i: i * i, range(1000), num_workers)) == [i * i for i in range(1000)]


def test_only_a_bounded_number_of_items_is_taken_ahead():
    taken = []
    results = map_in_threads(taken.append, range(100_000), num_workers=2)
    for _ in range(2000):
        next(results)
    results.close()
    assert len(taken) < 2500


def test_an_error_is_raised_where_the_results_are_read():
    with pytest.raises(ZeroDivisionError):
        list(map_in_threads(lambda i: 1 / (i - 500), range(1000), 2))
