"""Find image files, check them, take their classes from folders, and say what was found."""

import os
from collections import Counter

from utils.data.decode import check_image
from utils.data.formats import EXTENSIONS, UNREAD_EXTENSIONS
from utils.data.read_errors import describe_error, is_about_the_file, system_failure
from utils.data.threads import map_in_threads
from utils.errors import UserError
from utils.terminal import first_few

SHIPPED = "noto_emoji"  # the folder of datasets/ that comes with the repository


def find_images(root):
    """The absolute paths of all image files below `root`, as `search` finds them."""
    return search(root)[0]


def search(root):
    """(sorted absolute paths of the images, Counter of the extensions of other files) below `root`.

    Names that start with a dot are left out. Links are followed; each folder is visited once.
    Folders that cannot be read and images that are no regular files are printed and left out.
    """
    root = os.path.abspath(root)
    if not os.path.isdir(root):
        raise UserError(f"{root} is not a folder: put images into it, or set datasets_path to another folder")
    paths, others, folders, links, visited = [], Counter(), [root], [], set()
    while folders or links:
        # Links come last: a folder below the root keeps its own name.
        folder = folders.pop() if folders else links.pop(0)
        if os.path.realpath(folder) in visited:
            continue
        visited.add(os.path.realpath(folder))
        for entry in _visible_entries(folder):
            if os.path.isdir(entry.path):  # the entry's own is_dir() raises on a link to itself
                (links if entry.is_symlink() else folders).append(entry.path)
            elif not entry.name.lower().endswith(EXTENSIONS):
                others[os.path.splitext(entry.name)[1].lower()] += 1
            elif os.path.isfile(entry.path) or not os.path.exists(entry.path):  # check_images names a broken link
                paths.append(entry.path)
            else:
                print(f"left out {entry.path}: no regular file")
    return sorted(paths, key=lambda path: path.split(os.sep)), others


def _visible_entries(folder):
    """The entries of a folder whose name does not start with a dot, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
        return sorted(visible, key=lambda entry: entry.name)
    except OSError as error:
        print(f"left out {folder}: {error.strerror}")
        return []


def without_shipped(paths, root):
    """(paths, number left out): without the shipped emoji, if there are any other images."""
    shipped = os.path.join(os.path.abspath(root), SHIPPED, "")
    own = [path for path in paths if not path.startswith(shipped)]
    return (own, len(paths) - len(own)) if own else (paths, 0)


def check_images(paths, full=True, num_workers=0):
    """Decode all images -> (good, bad), lists of (path, (width, height)) and of (path, reason).

    full: False reads the headers only. This is much faster and misses damage behind them.
    UserError where the system fails, not the file: too little memory, or a broken disk.
    """

    def check(path):
        if "\n" in path or "\r" in path:
            return None, "its name holds a line break, which a list of lines cannot keep"
        try:
            return check_image(path, full), None
        except Exception as error:  # Pillow's decoders raise all kinds
            if not is_about_the_file(error):
                raise system_failure(path, error) from error
            return None, describe_error(error)

    results = list(zip(paths, map_in_threads(check, paths, num_workers, "checking images")))
    good = [(path, size) for path, (size, _) in results if size]
    return good, [(path, reason) for path, (size, reason) in results if not size]


def label_by_folder(paths):
    """(labels, class names): the folders below the common root; (None, []) if it holds an image."""
    parts = _parts_below_common_root(paths)
    if any(len(part) == 1 for part in parts):
        return None, []
    classes = sorted({part[0] for part in parts})
    ids = {name: i for i, name in enumerate(classes)}
    return [ids[part[0]] for part in parts], classes


def _parts_below_common_root(paths):
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, root).split(os.sep) for path in paths]


def describe_sizes(sizes):
    """[(width, height), ...] in words: the most frequent ones."""
    if len(set(sizes)) == 1:
        return "all {}x{} (width x height)".format(*sizes[0])
    shown = [f"{width}x{height} ({count})" for (width, height), count in Counter(sizes).most_common()]
    return "width x height: " + first_few(shown, 5, "other sizes")


def describe_endings(counts):
    """{".heic": 40, "": 2} in words, the most frequent first, with what would read them."""
    remarks = {ending: f" ({why})" for ending, why in UNREAD_EXTENSIONS.items()}
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count} {ending or 'without'}{remarks.get(ending, '')}" for ending, count in ordered]
    return first_few(shown, 10, "other endings")


def describe_classes(paths, labels, classes):
    """The classes in words, or why there are none."""
    if labels is not None:
        counts = Counter(labels)
        shown = [f"{name} ({counts[i]})" for i, name in enumerate(classes)]
        return f"{len(classes)} classes: {first_few(shown, 20)}"
    parts = _parts_below_common_root(paths)
    beside = sorted(part[0] for part in parts if len(part) == 1)
    folders = sorted({part[0] for part in parts if len(part) > 1})
    if not folders:
        return "no class folders: the images are unlabelled"
    return (
        f"no classes, as {first_few(beside, 5)} {'lies' if len(beside) == 1 else 'lie'} beside "
        f"the folder{'s' * (len(folders) > 1)} {first_few(folders, 5)}: the images are unlabelled; "
        "move every image into a folder for classes"
    )
