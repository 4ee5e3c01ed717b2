"""Read and write the list of images (train_lines.txt) and its class names (train_classes.txt)."""

import codecs
import glob
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError
from utils.files import atomic_write, remove_leftovers, resolve_output
from utils.terminal import printable

LINE = re.compile(r"(?:([0-9]+);)?(.+)", re.DOTALL)  # an absolute path never starts with a digit
LABELED = re.compile(rb"(\xef\xbb\xbf)?\s*[0-9]+;")  # how such a file begins
# File names are bytes on Linux: bytes that are not UTF-8 stay as they are. Only "\n" ends a line: a
# name may hold the other characters that end a line for str.splitlines().
TEXT = {"encoding": "utf-8", "errors": "surrogateescape", "newline": "\n"}
PATHS = TEXT | {"encoding": sys.getfilesystemencoding()}  # UTF-8 but for odd locales, which keep the bytes too
RUN_AGAIN = "run `python txt_annotation.py` (again) to list the images of datasets/"


@dataclass
class Annotation:
    """The content of a list: a class id for each path, or None; the class names by id."""

    paths: list[str]
    labels: list[int] | None
    classes: list[str]


def classes_path(annotation_path):
    """train_lines.txt -> train_classes.txt, other.txt -> other_classes.txt, in the same folder."""
    path = Path(annotation_path)
    return path.with_name(path.stem.removesuffix("_lines") + "_classes" + path.suffix)


def _labeled_lists(names_path):
    """Which of the two lists with these class names, train_lines.txt and train.txt, use them."""
    stem = names_path.stem.removesuffix("_classes")
    lists = [names_path.with_name(stem + ending + names_path.suffix) for ending in ("_lines", "")]
    return [path for path in lists if path.is_file() and LABELED.match(path.read_bytes())]


def check_annotation_path(annotation_path, images=()):
    """Refuse a list at a folder or a device, over an image or class names: UserError."""
    path = str(annotation_path)
    if "\0" in path or not Path(path).name or path.endswith(("/", os.sep)) or os.path.isdir(path):
        raise UserError(f"annotation_path {path!r} is no name of a file: give one such as train_lines.txt")
    if str(resolve_output(path)) in map(os.path.realpath, images):
        raise UserError(f"annotation_path {path} is one of the images and would be overwritten; give another name")
    if Path(path).stem.endswith("_classes") and (lists := _labeled_lists(Path(path))):
        raise UserError(f"annotation_path {path} holds the class names of {lists[0]}: give another name")


def write_annotation(annotation_path, paths, labels=None, classes=()):
    """Write the list and, with labels, its class names -> the path of the class names, or None.

    A kill in between leaves a list without class names, which `read_annotation` refuses. UserError
    where other class names than those of this list would be replaced.
    """
    list_path, names_path = resolve_output(annotation_path), classes_path(annotation_path)
    names = "".join(f"{name}\n" for name in classes).encode(TEXT["encoding"], TEXT["errors"])
    same = labels is not None and names_path.is_file() and names_path.read_bytes() == names
    own = names_path.is_file() and _labeled_lists(names_path) == [Path(annotation_path)]
    if labels is not None and os.path.lexists(names_path) and not (same or own):
        fault = f"{names_path} is there already, and not of {Path(annotation_path).name}"
        raise UserError(f"{fault}: move it away, or give another annotation_path")
    for path in (list_path, names_path):
        remove_leftovers(path.parent, glob.escape(path.name))
    with atomic_write(list_path, "w", **PATHS) as file:
        file.writelines(f"{path}\n" if labels is None else f"{labels[i]};{path}\n" for i, path in enumerate(paths))
        file.flush()  # a full disk fails here, while the older pair is whole
        if own and not same:
            names_path.unlink()
    if labels is None:
        return None
    if not same:
        with atomic_write(names_path) as file:
            file.write(names)
    return names_path


def read_annotation(annotation_path):
    """Read a list and its class names. UserError for a missing, empty or malformed one."""
    lines, names_path = _lines(annotation_path, PATHS), classes_path(annotation_path)
    if not lines:
        raise UserError(f"{annotation_path} {'is not there' if lines is None else 'lists no image'}: {RUN_AGAIN}")
    labels, paths = map(list, zip(*(LINE.fullmatch(line).groups() for line in lines.values())))
    for number, label, path in zip(lines, labels, paths):
        if not os.path.isabs(path) or "\0" in path or (label is None) != (labels[0] is None):
            expected = "'<absolute path>' on all lines, or '<class id>;<absolute path>' on all, in UTF-8"
            raise UserError(f"{annotation_path}, line {number}: {printable(path[:60])}, not {expected}; {RUN_AGAIN}")
    if labels[0] is None:
        return Annotation(paths, None, [])
    labels, classes = list(map(int, labels)), list((_lines(names_path, TEXT) or {}).values())
    if len(classes) <= max(labels):
        known = f"names {len(classes)} classes only" if classes else "is missing or empty"
        raise UserError(f"{annotation_path} uses class id {max(labels)}, but {names_path} {known}: {RUN_AGAIN}")
    for name, times in Counter(classes).items():
        if times > 1:  # a checkpoint with such names could not be loaded
            raise UserError(f"{names_path} names {printable(name)} twice: {RUN_AGAIN}")
    return Annotation(paths, labels, classes)


def _lines(path, form):
    """{number: line} without empty lines; None where there is no file."""
    if not os.path.isfile(path):
        return None
    # Windows editors write the mark at the start, and "\r" at the end of a line.
    text = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).decode(form["encoding"], form["errors"])
    if "\0" in text:
        raise UserError(f"{path} is saved as UTF-16, or is no text: save it as UTF-8")
    lines = enumerate((line.removesuffix("\r") for line in text.split("\n")), 1)
    return {number: line for number, line in lines if line}
