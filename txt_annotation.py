"""List the images below datasets/ in train_lines.txt, for train.py."""

import utils.terminal  # noqa: F401 (first: Ctrl-C during the other imports is no traceback)

# isort: split
from collections import Counter
from pathlib import Path

from utils.data.annotation import check_annotation_path, write_annotation
from utils.data.downloads import DATASETS, download
from utils.data.formats import EXTENSIONS
from utils.data.search import (
    check_images,
    describe_classes,
    empty_classes,
    in_words,
    label_by_folder,
    search,
    without_shipped,
)
from utils.errors import UserError, run_script
from utils.settings import choice, flag, parse, pathname, settings, whole
from utils.terminal import first_few, printable

OPTIONAL = "`pip install pillow-heif` brings .heic, Pillow 11.3 or newer .avif"


# fmt: off
@settings
class Config:
    datasets_path: str = "datasets"           # folder of the images; folders below their common root are classes
    annotation_path: str = "train_lines.txt"  # the annotation file to write; class names go next to it
    verify: bool = True                       # decode every image and leave out the bad ones (False: read headers only)
    num_workers: int = 0                      # threads that decode; 0: one per core
    download: str = ""                        # a public dataset to download first; "": none
# fmt: on


SETTINGS = {
    "datasets_path": pathname(),
    "annotation_path": pathname(),
    "verify": flag(),
    "num_workers": whole(0, 1024),
    "download": choice(("", *DATASETS)),
}


def main(arguments=None):
    config = parse(Config, SETTINGS, __doc__, arguments)
    check_annotation_path(config.annotation_path)
    if config.download:
        config.datasets_path = download(config.download, config.datasets_path)
    found, others = search(config.datasets_path)
    check_annotation_path(config.annotation_path, found)
    paths, num_shipped = without_shipped(found, config.datasets_path)
    good, bad = check_images(paths, config.verify, config.num_workers) if paths else ([], [])
    for path, reason in bad:
        print(f"left out {printable(path)}: {reason}")  # its name may hold a line break
    if others:
        skipped = [(extension or "no extension", count) for extension, count in others.most_common()]
        print(f"skipped files: {in_words(skipped)}; {OPTIONAL}")
    if not good:
        folder = Path(config.datasets_path).absolute()
        fault = f"none of the {len(bad)} images in {folder} can be read" if bad else f"no image in {folder}"
        raise UserError(f"{fault}: put images there ({' '.join(EXTENSIONS)}), or set datasets_path to another folder")
    listed, (paths, sizes) = paths, zip(*good)
    labels, classes = label_by_folder(paths)
    names_path = write_annotation(config.annotation_path, paths, labels, classes)
    if num_shipped:
        print(f"your own images are used; the {num_shipped} shipped ones in noto_emoji/ are left out")
    sizes = Counter(f"{width}x{height}" for width, height in sizes).most_common()
    print(f"{len(paths)} images, width x height: {in_words(sizes, 5)}; {len(bad)} bad files left out")
    print(describe_classes(paths, labels, classes))
    if empty := empty_classes(listed, paths):
        print(f"class folders without an image that can be read: {first_few(empty)}")
    print(f"annotation file: {Path(config.annotation_path).absolute()}")
    if names_path:
        print(f"class names: {names_path.absolute()}")


if __name__ == "__main__":
    run_script(main)
