"""List the images below datasets/ in train_lines.txt, for train.py."""
import utils.terminal  # noqa: F401 (first: Ctrl-C during the other imports is no traceback)

# isort: split
from collections import Counter
from pathlib import Path

from utils.config import check_values, parse_config, settings
from utils.data.annotation import (
    SHIPPED,
    beside_folders,
    check_annotation_path,
    check_images,
    classes_path,
    label_by_folder,
    printable,
    search,
    without_shipped,
    write_annotation,
)
from utils.data.formats import EXTENSIONS, UNREAD_EXTENSIONS
from utils.errors import run_script


@settings
class Config:
    datasets_path: str = "datasets"            # folder of the images, of any depth; folders right below the common root are classes
    annotation_path: str = "train_lines.txt"   # the list that is written; class names go beside it
    verify: bool = True                        # decode every image fully and leave out the bad ones (False: read headers only)
    num_workers: int = 0                       # threads for that; 0 = all cores
    download: str = ""                         # fetch and list one of: flowers102 cifar10 fashion_mnist mnist celeba oxford_pets stl10


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
        print(f"left out {printable(path)}: {printable(reason)}")
    if others:
        print(f"files of other endings, which are not read: {describe_endings(others)}")
    if not good:
        raise ValueError(nothing_found(config.datasets_path, len(bad)))

    paths = [path for path, _ in good]
    labels, classes = label_by_folder(paths)
    write_annotation(config.annotation_path, paths, labels, classes)

    if num_shipped:
        print(f"your own images are used; the {num_shipped} shipped ones in {SHIPPED}/ are left out")
    print(f"{len(paths)} images, {describe_sizes([size for _, size in good])}{f'; {len(bad)} bad files left out' if bad else ''}")
    print(describe_classes(paths, labels, classes))
    print(f"list: {printable(Path(config.annotation_path).absolute())}")
    if labels is not None:
        print(f"class names: {printable(classes_path(config.annotation_path).absolute())}")


def nothing_found(folder, num_bad):
    where = printable(Path(folder).absolute())
    if num_bad:
        return f"none of the {num_bad} images in {where} can be read: put whole images there, or set datasets_path to another folder"
    return f"no image in {where}: put images there ({' '.join(EXTENSIONS)}), or set datasets_path to where they are"


def describe_sizes(sizes):
    """[(width, height), ...] in words: all equal, or the most frequent ones."""
    counts = Counter(sizes).most_common()
    shown = ", ".join(f"{width}x{height} ({count})" for (width, height), count in counts[:5])
    if len(counts) == 1:
        return f"all {counts[0][0][0]}x{counts[0][0][1]} (width x height)"
    return f"width x height: {shown}{f' and {len(counts) - 5} other sizes' if len(counts) > 5 else ''}"


def describe_endings(counts):
    """{".heic": 40, "": 2} in words, the most frequent first, with what would read them."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    remarks = {ending: f" ({why})" for ending, why in UNREAD_EXTENSIONS.items()}
    shown = [f"{count} {printable(ending) or 'without'}{remarks.get(ending, '')}" for ending, count in ordered[:10]]
    return ", ".join(shown) + (f" and {len(ordered) - 10} other endings" if len(ordered) > 10 else "")


def describe_classes(paths, labels, classes):
    if labels is None:
        beside, folders = beside_folders(paths)
        if not folders:
            return "no class folders: the images are unlabelled"
        return (f"no classes, as {first_names([Path(path).name for path in beside])} "
                f"{'lies' if len(beside) == 1 else f'({len(beside)} images) lie'} "
                f"beside the folder{'s' * (len(folders) > 1)} {first_names(folders)}: the images are unlabelled; "
                "move every image into a folder for classes")
    counts = Counter(labels)
    shown = ", ".join(f"{printable(name)} ({counts[i]})" for i, name in list(enumerate(classes))[:20])
    return f"{len(classes)} class{'es' if len(classes) > 1 else ''}: {shown}{' ...' if len(classes) > 20 else ''}"


def first_names(names):
    return ", ".join(map(printable, names[:5])) + (" ..." if len(names) > 5 else "")


if __name__ == "__main__":
    run_script(main)
