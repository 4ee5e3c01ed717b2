"""Find, check and list images; read and write the list (train_lines.txt) and its class names (train_classes.txt)."""

import contextlib
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from utils.data.decode import check_image, describe_error, is_about_the_file
from utils.data.formats import EXTENSIONS
from utils.data.threads import map_in_threads
from utils.files import atomic_write

SHIPPED = "noto_emoji"  # the folder of datasets/ that comes with the repository
LABELLED_LINE = re.compile(r"([0-9]+);(.+)", re.DOTALL)  # an absolute path never starts with a digit
# File names are bytes on Linux: those that are no UTF-8 are kept as they are. Only "\n" ends a line: a name may hold
# the other characters at which str.splitlines() would cut.
TEXT = {"encoding": "utf-8", "errors": "surrogateescape", "newline": "\n"}
UTF16_STARTS = ("\udcff\udcfe", "\udcfe\udcff")  # its byte order marks, read as UTF-8 in this way
# Characters that a terminal acts on or cannot show: controls, line separators, marks of the
# writing direction, lone surrogates.
RAW_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
RUN_AGAIN = "run `python txt_annotation.py` (again) to list the images of datasets/"


@dataclass
class Annotation:
    """What a list says. `labels` has one class id for each path, or is None; `classes` are the names, by id."""
    paths: list[str]
    labels: list[int] | None
    classes: list[str]


def printable(text):
    """`text` in one line that any terminal can show: controls and what it lacks are escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    escaped = RAW_CHARACTERS.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))
    return escaped.encode(encoding, "backslashreplace").decode(encoding)


def find_images(root):
    """The absolute paths of all image files below `root`, as `search` finds them."""
    return search(root)[0]


def search(root):
    """(paths, others) of the files below `root`.

    paths: the absolute paths of the images, by their extension in any case, sorted. others: how many other files there
    are of each extension, a Counter.

    Folders and files whose name starts with a dot are left out. Links are followed, each folder is visited once. A
    folder that cannot be read, and what is no regular file, is named and left out. ValueError where `root` itself is no
    folder.
    """
    root = os.path.abspath(root)
    if not os.path.isdir(root):
        raise ValueError(f"{printable(root)} is not a folder: make it and put images into it, or set datasets_path to where they are")
    paths, others, folders, links, visited = [], Counter(), [root], [], set()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)  # links last: a folder is known by its own name where it has one here
        if os.path.realpath(folder) in visited:
            continue
        visited.add(os.path.realpath(folder))
        for entry in _entries(folder):
            if os.path.isdir(entry.path):  # the entry's own is_dir() raises on a link to itself
                (links if entry.is_symlink() else folders).append(entry.path)
            elif not _is_image_name(entry.name):
                others[os.path.splitext(entry.name)[1].lower()] += 1
            elif _may_be_opened(entry):
                paths.append(entry.path)
            else:
                print(f"left out {printable(entry.path)}: no regular file")
    return sorted(paths, key=lambda path: path.split(os.sep)), others


def _may_be_opened(entry):
    """Whether it is a regular file, after following links, or a broken link. Others may block.

    The check names the broken link.
    """
    return entry.is_symlink() and not os.path.exists(entry.path) or os.path.isfile(entry.path)


def _entries(folder):
    """The visible entries of a folder, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        print(f"left out {printable(folder)}: {error.strerror}")
        return []


def _is_image_name(name):
    return name.lower().endswith(EXTENSIONS)


def without_shipped(paths, root):
    """`paths` without the shipped emoji if anything else is among them, and the number left out."""
    shipped = os.path.join(os.path.abspath(root), SHIPPED, "")
    own = [path for path in paths if not path.startswith(shipped)]
    return (own, len(paths) - len(own)) if own else (paths, 0)


def check_images(paths, full=True, num_workers=0):
    """Decode all images in threads, with a progress bar.

    Returns (good, bad): good is a list of (path, (width, height)), bad one of (path, reason), both in order.
    `full=False` reads the headers only: much faster, finds no damage further on. ValueError where a failure is not the
    file's own: memory that runs out, a disk that fails.
    """
    def check(path):
        if "\n" in path or "\r" in path:
            return None, "its name holds a line break, which a list of lines cannot keep"
        try:
            return check_image(path, full), None
        except Exception as error:  # Pillow's decoders raise all kinds
            if not is_about_the_file(error):
                raise passing_failure(path, error) from error
            return None, describe_error(error)

    results = list(zip(map_in_threads(check, paths, num_workers, "checking images"), paths))
    good = [(path, size) for (size, _), path in results if size]
    return good, [(path, reason) for (size, reason), path in results if not size]


def passing_failure(path, error):
    """The ValueError that ends a pass over many files: this one may be whole."""
    if isinstance(error, MemoryError):
        return ValueError(f"out of memory while decoding {printable(path)}: lower num_workers, or end other programs; "
                          "nothing was kept")
    return ValueError(f"{printable(path)} cannot be read now ({printable(describe_error(error))}): "
                      "see to the disk or the system and run this again; nothing was kept")


def label_by_folder(paths):
    """Class folders -> (labels, class names): the class is the folder right below the common root of `paths`.

    (None, []) if any image lies in the root itself: there are no classes then.
    """
    parts = _parts_below_common_root(paths)
    if any(len(part) == 1 for part in parts):
        return None, []
    classes = sorted({part[0] for part in parts})
    ids = {name: i for i, name in enumerate(classes)}
    return [ids[part[0]] for part in parts], classes


def beside_folders(paths):
    """(paths, folder names): the images in the common root itself, and the folders beside them.

    As long as there are both, `label_by_folder` finds no classes.
    """
    parts = _parts_below_common_root(paths)
    beside = sorted(path for path, part in zip(paths, parts) if len(part) == 1)
    return beside, sorted({part[0] for part in parts if len(part) > 1})


def _parts_below_common_root(paths):
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, root).split(os.sep) for path in paths]


def check_annotation_path(annotation_path, images=()):
    """ValueError where no list can be written: at a folder, or at one of the images themselves."""
    path = str(annotation_path)
    if "\0" in path or not Path(path).name or path.endswith(("/", os.sep)) or os.path.isdir(path):
        raise ValueError(f"annotation_path {printable(path)!r} is no name of a file: give one such as train_lines.txt")
    if os.path.realpath(path) in map(os.path.realpath, images):
        raise ValueError(f"annotation_path {printable(path)} is one of the pictures: the list would replace it; "
                         "give another name")


def classes_path(annotation_path):
    """Where the class names of a list are: train_lines.txt -> train_classes.txt, other.txt -> other_classes.txt."""
    path = Path(annotation_path)
    return path.with_name(path.stem.removesuffix("_lines") + "_classes" + path.suffix)


def write_annotation(annotation_path, paths, labels=None, classes=()):
    """Write the list and, if there are labels, its class names beside it; class names of an older list go.

    A kill in between leaves a list without class names, which `read_annotation` refuses, never one with wrong names.
    """
    names_path = classes_path(annotation_path)
    names = "".join(f"{name}\n" for name in classes) if labels is not None else None
    changed = _read_text(names_path) != names
    with atomic_write(annotation_path, "w", **TEXT) as file:
        file.writelines(f"{path}\n" if labels is None else f"{labels[i]};{path}\n" for i, path in enumerate(paths))
        file.flush()  # a full disk shows here, while the older pair is whole
        if changed:
            names_path.unlink(missing_ok=True)
    if changed and names is not None:
        with atomic_write(names_path, "w", **TEXT) as file:
            file.write(names)


def read_annotation(annotation_path):
    """Read a list and its class names -> Annotation. ValueError, saying what to do, where it is missing, empty or malformed."""
    lines = _lines(annotation_path)
    if lines is None:
        raise ValueError(f"{printable(annotation_path)} is not there: {RUN_AGAIN}")
    if not lines:
        raise ValueError(f"{printable(annotation_path)} lists no image: {RUN_AGAIN}")
    labelled = [LABELLED_LINE.fullmatch(line) for line in lines.values()]
    paths = [match.group(2) if match else line for match, line in zip(labelled, lines.values())]
    for number, path, match in zip(lines, paths, labelled):
        if not os.path.isabs(path) or "\0" in path or bool(match) != bool(labelled[0]):
            raise ValueError(f"{printable(annotation_path)}, line {number}: expected '<absolute path>' on all lines, or "
                             f"'<class id>;<absolute path>' on all{_fault(path)}; {RUN_AGAIN}")
    if not labelled[0]:
        return Annotation(paths, None, [])
    labels = [int(match.group(1)) for match in labelled]
    return Annotation(paths, labels, _read_classes(annotation_path, max(labels)))


def _fault(path):
    """What is wrong with the path of a line, for the message; "" where only its label is."""
    if path[0] in "\"'":
        return ", not a path in quotes"
    if re.match(r"[A-Za-z]:[\\/]", path) and os.name != "nt":
        return ", not a path of Windows"
    if "\0" not in path and not os.path.isabs(path):
        return f", not a relative path or another text ({printable(path[:60])})"
    return ""


def _lines(path):
    """{number: line} of a text file without its empty lines; None where there is no file.

    Raises ValueError for UTF-16.
    """
    text = _read_text(path)
    if text is None:
        return None
    if text.startswith(UTF16_STARTS) or (text[:4].count("\0") == 2 and "\0\0" in (text[:4:2], text[1:4:2])):
        raise ValueError(f"{printable(path)} is saved as UTF-16: save it as UTF-8, or {RUN_AGAIN}")
    lines = (line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n"))  # as Windows editors save them
    return {number: line for number, line in enumerate(lines, 1) if line}


def _read_text(path):
    with contextlib.suppress(FileNotFoundError, IsADirectoryError), open(path, **TEXT) as file:
        return file.read()
    return None


def _read_classes(annotation_path, largest):
    path = classes_path(annotation_path)
    classes = list((_lines(path) or {}).values())
    if len(classes) <= largest:
        raise ValueError(f"{printable(annotation_path)} uses class id {largest}, but {printable(path)} "
                         f"{f'names {len(classes)} classes only' if classes else 'is missing or empty'}: {RUN_AGAIN}")
    return classes
