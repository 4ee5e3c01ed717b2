"""Find, check and list images; read and write the list (train_lines.txt) and its class names (train_classes.txt)."""

import contextlib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from utils.data.decode import EXTENSIONS, check_image, describe_error
from utils.data.threads import map_in_threads
from utils.files import atomic_write

SHIPPED = "noto_emoji"  # the folder of datasets/ that comes with the repository
LABELLED_LINE = re.compile(r"([0-9]+);(.+)", re.DOTALL)  # an absolute path never starts with a digit
# File names are bytes on Linux: those that are no UTF-8 are kept as they are. Only "\n" ends a line: a name may hold
# the other characters at which str.splitlines() would cut.
TEXT = {"encoding": "utf-8", "errors": "surrogateescape", "newline": "\n"}
RUN_AGAIN = "run `python txt_annotation.py` (again) to list the images of datasets/"


@dataclass
class Annotation:
    """What a list says. `labels` has one class id for each path, or is None; `classes` are the names, by id."""
    paths: list[str]
    labels: list[int] | None
    classes: list[str]


def printable(text):
    """`text` so that it can be printed on any terminal: what its encoding lacks is escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return str(text).encode(encoding, "backslashreplace").decode(encoding)


def find_images(root):
    """The absolute paths of all image files below `root`, by their extension in any case, sorted.

    Folders and files whose name starts with a dot are left out. Links are followed, each folder is visited once. A
    folder that cannot be read is named and left out. ValueError where `root` itself is no folder.
    """
    root = os.path.abspath(root)
    if not os.path.isdir(root):
        raise ValueError(f"{printable(root)} is not a folder: make it and put images into it, or set datasets_path to where they are")
    paths, folders, links, visited = [], [root], [], set()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)  # links last: a folder is known by its own name where it has one here
        if os.path.realpath(folder) in visited:
            continue
        visited.add(os.path.realpath(folder))
        for entry in _entries(folder):
            if os.path.isdir(entry.path):  # the entry's own is_dir() raises on a link to itself
                (links if entry.is_symlink() else folders).append(entry.path)
            elif _is_image_name(entry.name) and (entry.is_symlink() or entry.is_file()):
                paths.append(entry.path)  # a broken link too, for the check to name it
    return sorted(paths, key=lambda path: path.split(os.sep))


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
    `full=False` reads the headers only: much faster, finds no damage further on.
    """
    def check(path):
        if "\n" in path or "\r" in path:
            return None, "its name holds a line break, which a list of lines cannot keep"
        try:
            return check_image(path, full), None
        except Exception as error:  # Pillow's decoders raise all kinds
            return None, describe_error(error)

    results = list(zip(map_in_threads(check, paths, num_workers, "checking images"), paths))
    good = [(path, size) for (size, _), path in results if size]
    return good, [(path, reason) for (size, reason), path in results if not size]


def label_by_folder(paths):
    """Class folders -> (labels, class names): the class is the folder right below the common root of `paths`.

    (None, []) if any image lies in the root itself: there are no classes then.
    """
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    parts = [os.path.relpath(path, root).split(os.sep) for path in paths]
    if any(len(part) == 1 for part in parts):
        return None, []
    classes = sorted({part[0] for part in parts})
    ids = {name: i for i, name in enumerate(classes)}
    return [ids[part[0]] for part in parts], classes


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
                             f"'<class id>;<absolute path>' on all; {RUN_AGAIN}")
    if not labelled[0]:
        return Annotation(paths, None, [])
    labels = [int(match.group(1)) for match in labelled]
    return Annotation(paths, labels, _read_classes(annotation_path, max(labels)))


def _lines(path):
    """{number: line} of a text file without its empty lines; None where there is no file."""
    text = _read_text(path)
    if text is None:
        return None
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
