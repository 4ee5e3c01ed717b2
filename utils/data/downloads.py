"""Well-known data sets: torchvision downloads and verifies them.

They become files datasets/<name>/<class>/<image>. Whole archives stay in
datasets/.downloads/<name>/, the `root` of torchvision's class, until you delete them. Where a
server is out of reach, put the archives, or what they unpack to, there by hand. All training data:

    mnist, fashion_mnist  "train": 60,000 of 28x28, grey, 10 classes
    cifar10               "train": 50,000 of 32x32, 10 classes
    flowers102            all splits, as "train" alone has 10 a class: 8,189 JPEGs, 102 classes
    oxford_pets           "trainval": 3,680 JPEGs, 37 breeds
    stl10                 "train", the labelled part: 5,000 of 96x96, 10 classes
    celeba                "train": 162,770 JPEGs of 178x218, without classes
"""

import importlib.util
import os
import re
import shutil
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from torchvision.datasets import CIFAR10, MNIST, STL10, CelebA, FashionMNIST, Flowers102, OxfordIIITPet
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

from utils.errors import UserError, one_line
from utils.files import atomic_folder

ARCHIVES = ".downloads"  # hidden: what is below it is never listed


def folder_name(class_name):
    """A class name as a folder name for any system and shell: `T-shirt/top` -> `T-shirt-top`."""
    return re.sub(r"[^\w.-]+", "-", re.sub(r"['?]", "", class_name.strip()).replace(" ", "_"))


def from_arrays(kind, root):
    """What a reader returns, for a class of torchvision that holds arrays: numbered PNG files."""
    dataset = kind(root, download=True)
    names = [folder_name(name.split(" - ")[0]) for name in dataset.classes]  # MNIST: "7 - seven"
    return len(dataset), ((f"{names[label]}/{i:05d}.png", image) for i, (image, label) in enumerate(dataset))


def from_files(paths, labels, classes):
    """What a reader returns, for a data set of JPEG files: they stay as they are, byte for byte."""
    names = [folder_name(name) for name in classes]
    return len(paths), ((f"{names[label]}/{path.name}", path) for path, label in zip(paths, labels))


def flowers102(root):
    splits = [Flowers102(root, split=split, download=True) for split in ("train", "val", "test")]
    paths = [path for split in splits for path in split._image_files]  # torchvision has no public name for them
    labels = [label for split in splits for label in split._labels]
    classes = getattr(Flowers102, "classes", [f"{number:03d}" for number in range(1, 103)])  # older versions: none
    return from_files(paths, labels, classes)


def oxford_pets(root):
    dataset = OxfordIIITPet(root, split="trainval", download=True)
    return from_files(dataset._images, dataset._labels, dataset.classes)


def celeba(root):
    dataset = CelebA(root, split="train", download=True)
    folder = Path(dataset.root) / dataset.base_folder / "img_align_celeba"
    return len(dataset), ((name, folder / name) for name in dataset.filename)


# A reader: torchvision's root -> (number of images, pairs of a path to write and a Pillow image or
# its file). And the archives: their folder below the root, (name or URL, MD5) of each.
DATASETS = {
    "flowers102": (flowers102, "flowers-102", lambda: Flowers102._file_dict.values()),
    "cifar10": (partial(from_arrays, CIFAR10), "", lambda: [(CIFAR10.filename, CIFAR10.tgz_md5)]),
    "fashion_mnist": (partial(from_arrays, FashionMNIST), "FashionMNIST/raw", lambda: FashionMNIST.resources),
    "mnist": (partial(from_arrays, MNIST), "MNIST/raw", lambda: MNIST.resources),
    "celeba": (celeba, "celeba", lambda: [(name, md5) for _, md5, name in CelebA.file_list]),
    "oxford_pets": (oxford_pets, "oxford-iiit-pet", lambda: OxfordIIITPet._RESOURCES),
    "stl10": (partial(from_arrays, STL10), "", lambda: [(STL10.filename, STL10.tgz_md5)]),
}


def download(name, datasets_path="datasets"):
    """The folder `datasets_path`/`name` of a data set, downloaded, whole, where it is missing."""
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")
    folder, root = Path(datasets_path) / name, Path(datasets_path) / ARCHIVES / name
    if folder.is_dir() and any(folder.iterdir()):
        print(f"{folder.absolute()} is there already: nothing is fetched")
        return str(folder)
    if name == "flowers102" and importlib.util.find_spec("scipy") is None:  # torchvision itself names gdown
        raise UserError(f"reading {name} needs the package scipy: pip install scipy")
    for parent in (folder.parent, root.parent):  # a killed process leaves its temporary folders: start anew
        for leftover in parent.glob(f".{name}.*.tmp"):
            shutil.rmtree(leftover)
    root.parent.mkdir(parents=True, exist_ok=True)
    try:
        fetch_and_unpack(name, folder, root)
    except Exception as error:  # of torchvision, of Pillow, of the network, of the disk
        fault = f"{name} could not be fetched and unpacked, and nothing half is left"
        raise UserError(f"{fault}: {one_line(error, 500)}") from error
    print(f"{name}: unpacked into {folder.absolute()}; its archives are in {root.absolute()}: you can delete them")
    return str(folder)


def fetch_and_unpack(name, folder, root):
    """Fill `folder` from a temporary one of torchvision's. New whole archives move to `root`."""
    read, below, listed = DATASETS[name]
    archives = {Path(below, archive.rsplit("/", 1)[-1]): md5 for archive, md5 in listed()}
    with TemporaryDirectory(".tmp", f".{name}.", root.parent) as temporary:
        link_whole(root, temporary, archives)
        try:
            with atomic_folder(folder) as unfinished:
                write_images(*read(temporary), unfinished, name)
        finally:
            for archive, md5 in archives.items():
                if not (root / archive).exists() and check_integrity(Path(temporary, archive), md5):
                    (root / archive).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(Path(temporary, archive), root / archive)


def link_whole(root, target, archives):
    """Links `target` to the files of `root`, except damaged archives, which would be replaced."""

    def damaged(folder, names):
        sums = {path: archives.get(path.relative_to(root)) for path in (Path(folder, name) for name in names)}
        return [path.name for path, md5 in sums.items() if md5 and not check_integrity(path, md5)]

    if root.is_dir():
        shutil.copytree(root, target, ignore=damaged, copy_function=link_or_copy, dirs_exist_ok=True)


def write_images(total, images, folder, name):
    """Write PNG files, or link unpacked ones. ValueError where two images have one name."""
    for path, image in tqdm(images, f"unpacking {name}", total, unit="img", dynamic_ncols=True):
        path = folder / path
        if path.exists():
            raise UserError(f"it has two pictures called {path.name}")
        path.parent.mkdir(exist_ok=True)
        if isinstance(image, Path):
            link_or_copy(image, path)
        else:
            image.save(path)


def link_or_copy(source, target):
    """The same file under a second name, by a hard link where the file system has them."""
    try:
        os.link(os.path.realpath(source), target)  # of the file itself: a relative link would lead nowhere from there
    except OSError:
        shutil.copyfile(source, target)
