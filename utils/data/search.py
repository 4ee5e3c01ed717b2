"""Find image files, check them, take their classes from folders, and say what was found."""

import os
import re
import unicodedata
from collections import Counter

from utils.data.decode import attempt, check_image
from utils.data.formats import EXTENSIONS
from utils.data.threads import map_in_threads
from utils.errors import UserError
from utils.terminal import first_few, plural, printable

OVERVIEW = re.compile(r"(predict|evaluate)_[0-9a-z]+_results\.(png|gif)")  # of predict.py or evaluate, no samples
SHIPPED = "noto_emoji"  # the folder of datasets/ that comes with the repository
# What Windows, Linux, macOS, Synology and QNAP put into folders: trash, thumbnails and snapshots.
SYSTEM_FOLDERS = ("$recycle.bin", "system volume information", "lost+found", "__macosx", "network trash folder")
SYSTEM_FOLDERS += ("temporary items", "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot")


def find_images(root):
    """The absolute paths of all image files below `root`, as `search` finds them."""
    return search(root)[0]


def find_samples(folder):
    """`find_images` without what predict.py puts together. UserError: there are none."""
    paths = [path for path in find_images(folder) if not OVERVIEW.fullmatch(os.path.basename(path))]
    if not paths:
        raise UserError(f"{printable(folder)} holds no images (grids and animations of predict.py are none)")
    return paths


def search(root):
    """(sorted absolute paths of the images, Counter of the extensions of other files) below `root`.

    Names that start with a dot and SYSTEM_FOLDERS are left out. Links are followed; each folder is
    visited once.
    """
    root = os.path.abspath(root)
    if not os.path.isdir(root):
        raise UserError(f"{root} is not a folder: put images into it, or set datasets_path to another folder")
    paths, others, skipped, roots, visited = [], Counter(), Counter(), [root], set()
    for start in roots:  # it grows: links come last, so that a folder below the root keeps its own name
        for folder, subfolders, files in os.walk(start, onerror=lambda error: print(f"left out {error}")):
            if os.path.realpath(folder) in visited:
                subfolders.clear()
                continue
            visited.add(os.path.realpath(folder))
            skipped.update(name for name in subfolders if name.lower() in SYSTEM_FOLDERS)
            subfolders[:] = sorted(name for name in subfolders if name not in skipped and not name.startswith("."))
            below = [os.path.join(folder, name) for name in subfolders]
            roots += filter(os.path.islink, below)
            for path in (os.path.join(folder, name) for name in sorted(files) if not name.startswith(".")):
                if not path.lower().endswith(EXTENSIONS):
                    others[os.path.splitext(path)[1].lower()] += 1
                elif os.path.isfile(path) or not os.path.exists(path):  # check_images names a broken link
                    paths.append(path)
                else:
                    print(f"left out {path}: no regular file")
    if skipped:
        count = plural(skipped.total(), "folder")
        print(f"left out {count} that a system makes for itself: {in_words(skipped.items())}")
    return sorted(paths, key=lambda path: path.split(os.sep)), others


def without_shipped(paths, root):
    """(paths, number left out): without the shipped emoji, if there are any other images."""
    shipped = os.path.join(os.path.abspath(root), SHIPPED, "")
    own = [path for path in paths if not path.startswith(shipped)]
    return (own, len(paths) - len(own)) if own else (paths, 0)


def check_images(paths, full=True, num_workers=0):
    """Decode all images -> (good, bad), lists of (path, (width, height)) and of (path, reason).

    full: False reads the headers only, faster. UserError where the system fails, not the file.
    """

    def check(path):
        if "\n" in path or "\r" in path:
            raise UserError("its name holds a line break, which a list of lines cannot keep")
        return check_image(path, full)

    results = map_in_threads(lambda path: (path, *attempt(check, path)), paths, num_workers, "checking images")
    good, bad = [], []
    for path, size, reason in results:
        (good if size else bad).append((path, size or reason))
    return good, bad


def label_by_folder(paths):
    """(labels, class names): the folders below the common root; (None, []) if it holds an image."""
    parts = _parts_below_common_root(paths)
    if any(len(part) == 1 for part in parts):
        return None, []
    names = [unicodedata.normalize("NFC", part[0]) for part in parts]  # macOS may spell a name otherwise
    classes = sorted(set(names))
    ids = {name: i for i, name in enumerate(classes)}
    return [ids[name] for name in names], classes


def empty_classes(paths, good):
    """The names of the class folders of `paths` that none of the `good` ones is in, sorted."""
    (labels, classes), good = label_by_folder(paths), set(good)
    return sorted(set(classes) - {classes[label] for path, label in zip(paths, labels or []) if path in good})


def _parts_below_common_root(paths):
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, root).split(os.sep) for path in paths]


def in_words(counts, limit=10):
    """[(name, count), ...] as text, such as `cats (3), dogs (2)`."""
    return first_few([f"{name} ({count})" for name, count in counts], limit)


def describe_classes(paths, labels, classes):
    """The classes in words, or why there are none."""
    if labels is not None:
        return f"{len(classes)} classes: {in_words(Counter(classes[label] for label in labels).items(), 20)}"
    beside = sorted(part[0] for part in _parts_below_common_root(paths) if len(part) == 1)
    if len(beside) == len(paths):
        return "no class folders: the images are unlabeled"
    return f"no class folders, as {first_few(beside, 5)} would be in none: move every image into a folder for classes"
