"""What txt_annotation.py refuses to write, and what it found, in words."""

import os
from collections import Counter
from pathlib import Path

from utils.data.formats import UNREAD_EXTENSIONS
from utils.data.search import beside_folders, first_of
from utils.errors import UserError
from utils.files import resolve_output


def check_annotation_path(annotation_path, images=()):
    """Refuse a list at a folder or over one of the images: ValueError."""
    path = str(annotation_path)
    if "\0" in path or not Path(path).name or path.endswith(("/", os.sep)) or os.path.isdir(path):
        raise UserError(f"annotation_path {path!r} is no name of a file: give one such as train_lines.txt")
    if str(resolve_output(path)) in map(os.path.realpath, images):
        raise UserError(f"annotation_path {path} is one of the pictures: the list would replace it; give another name")


def describe_sizes(sizes):
    """[(width, height), ...] in words: the most frequent ones."""
    if len(set(sizes)) == 1:
        return "all {}x{} (width x height)".format(*sizes[0])
    shown = [f"{width}x{height} ({count})" for (width, height), count in Counter(sizes).most_common()]
    return "width x height: " + first_of(shown, 5, "other sizes")


def describe_endings(counts):
    """{".heic": 40, "": 2} in words, the most frequent first, with what would read them."""
    remarks = {ending: f" ({why})" for ending, why in UNREAD_EXTENSIONS.items()}
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count} {ending or 'without'}{remarks.get(ending, '')}" for ending, count in ordered]
    return first_of(shown, 10, "other endings")


def describe_classes(paths, labels, classes):
    if labels is not None:
        counts = Counter(labels)
        shown = [f"{name} ({counts[i]})" for i, name in enumerate(classes)]
        return f"{len(classes)} classes: {first_of(shown, 20)}"
    beside, folders = beside_folders(paths)
    if not folders:
        return "no class folders: the images are unlabelled"
    names = first_of([Path(path).name for path in beside], 5)
    return (
        f"no classes, as {names} {'lies' if len(beside) == 1 else 'lie'} beside "
        f"the folder{'s' * (len(folders) > 1)} {first_of(folders, 5)}: the images are unlabelled; "
        "move every image into a folder for classes"
    )
