"""List the images below datasets/ in train_lines.txt, for train.py."""
import utils.terminal  # noqa: F401 (first: Ctrl-C during the other imports is no traceback)

# isort: split
from collections import Counter
from pathlib import Path

from utils.config import check_values, parse_config, settings
from utils.data.annotation import check_annotation_path, write_annotation
from utils.data.formats import EXTENSIONS, UNREAD_EXTENSIONS
from utils.data.search import SHIPPED, beside_folders, check_images, label_by_folder, search, without_shipped
from utils.errors import run_script
from utils.terminal import printable


@settings
class Config:
    datasets_path: str = "datasets"           # folder of the images; folders below their common root are classes
    annotation_path: str = "train_lines.txt"  # the list to write; the class names go beside it
    verify: bool = True                       # decode every image and leave out the bad ones (False: read headers only)
    num_workers: int = 0                      # threads that decode; 0 = all cores
    download: str = ""                        # fetch flowers102 cifar10 fashion_mnist mnist celeba oxford_pets or stl10


def main(arguments=None):
    config = parse_config(Config, __doc__, arguments)
    check_values(config, num_workers=(0, 1024))
    check_annotation_path(config.annotation_path)
    if config.download:
        from utils.data.downloads import download  # torchvision takes seconds to import

        config.datasets_path = download(config.download, config.datasets_path)
    found, others = search(config.datasets_path)
    check_annotation_path(config.annotation_path, found)
    paths, num_shipped = without_shipped(found, config.datasets_path)
    good, bad = check_images(paths, config.verify, config.num_workers) if paths else ([], [])
    for path, reason in bad:
        print(f"left out {printable(path)}: {reason}")  # its name may hold a line break
    if others:
        print(f"files of other endings, which are not read: {describe_endings(others)}")
    if not good:
        raise ValueError(nothing_found(Path(config.datasets_path).absolute(), len(bad)))
    paths, sizes = zip(*good)
    labels, classes = label_by_folder(paths)
    names_path = write_annotation(config.annotation_path, paths, labels, classes)
    if num_shipped:
        print(f"your own images are used; the {num_shipped} shipped ones in {SHIPPED}/ are left out")
    print(f"{len(paths)} images, {describe_sizes(sizes)}; {len(bad)} bad files left out")
    print(describe_classes(paths, labels, classes))
    print(f"list: {Path(config.annotation_path).absolute()}")
    if names_path:
        print(f"class names: {names_path.absolute()}")


def nothing_found(folder, num_bad):
    problem = f"none of the {num_bad} images in {folder} can be read" if num_bad else f"no image in {folder}"
    return f"{problem}: put images there ({' '.join(EXTENSIONS)}), or set datasets_path to another folder"


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
    return (f"no classes, as {names} {'lies' if len(beside) == 1 else 'lie'} beside "
            f"the folder{'s' * (len(folders) > 1)} {first_of(folders, 5)}: the images are unlabelled; "
            "move every image into a folder for classes")


def first_of(words, limit, others="more"):
    """The first `limit` words, and how many others there are."""
    return ", ".join(words[:limit]) + (f" and {len(words) - limit} {others}" if len(words) > limit else "")


if __name__ == "__main__":
    run_script(main)
