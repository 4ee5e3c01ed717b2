"""Well-known data sets: fetched and verified by torchvision, unpacked as image files into datasets/<name>/<class>/.

What is fetched (the archives) stays in datasets/.downloads/<name>/ and is not fetched again; it can be deleted at any time. Where a
server is out of reach, put the archives (or what torchvision unpacks from them) there by hand, as its class of that data set does
below its `root`, which is this folder. All of the training data is unpacked:

    mnist, fashion_mnist  "train": 60,000 of 28x28, grey, 10 classes
    cifar10               "train": 50,000 of 32x32, 10 classes
    flowers102            all splits, as "train" alone has 10 a class: 8,189 JPEGs, 102 classes
    oxford_pets           "trainval": 3,680 JPEGs, 37 breeds
    stl10                 "train", the labelled part: 5,000 of 96x96, 10 classes
    celeba                "train": 162,770 JPEGs of 178x218, without classes
"""

import contextlib
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from torchvision import datasets
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

from utils.files import atomic_folder, atomic_write

ARCHIVES = ".downloads"  # hidden: what is below it is never listed
UNFINISHED = ".unfinished"  # in a folder that torchvision fills: it lists the files that were there before


class Pictures(NamedTuple):
    """What a data set unpacks to: `total` pairs of (path below its folder, a picture to write or the file that holds it)."""

    total: int
    files: Iterator


class KnownDataset(NamedTuple):
    """How a data set is read, its archives as {path below torchvision's root: MD5}, and a package that reading it needs."""

    read: Callable[[Path], Pictures]
    archives: Callable[[], dict[str, str]]
    needs: str = ""


def folder_name(class_name):
    """A class name as a folder name for any system and shell: `T-shirt/top` -> `T-shirt-top`, `colt's foot` -> `colts_foot`."""
    return re.sub(r"[^\w.-]+", "-", re.sub(r"['?]", "", class_name.strip()).replace(" ", "_"))


def from_arrays(dataset, classes):
    """A data set whose pictures are arrays: PNG files, numbered in its order."""
    names = [folder_name(name) for name in classes]
    files = ((f"{names[label]}/{number:05d}.png", picture) for number, (picture, label) in enumerate(dataset))
    return Pictures(len(dataset), files)


def from_files(paths, labels, classes):
    """A data set that comes as JPEG files: they are kept as they are, byte for byte."""
    names = [folder_name(name) for name in classes]
    return Pictures(len(paths), ((f"{names[label]}/{path.name}", path) for path, label in zip(paths, labels)))


def mnist(root):
    dataset = datasets.MNIST(root, train=True, download=True)
    return from_arrays(dataset, [name.split(" - ")[0] for name in dataset.classes])  # "7 - seven"


def fashion_mnist(root):
    dataset = datasets.FashionMNIST(root, train=True, download=True)
    return from_arrays(dataset, dataset.classes)


def cifar10(root):
    dataset = datasets.CIFAR10(root, train=True, download=True)
    return from_arrays(dataset, dataset.classes)


def stl10(root):
    dataset = datasets.STL10(root, split="train", download=True)
    return from_arrays(dataset, dataset.classes)


def flowers102(root):
    # torchvision has no public name for the files behind a data set. Older ones do not know the flowers' names.
    splits = [datasets.Flowers102(root, split=split, download=True) for split in ("train", "val", "test")]
    classes = getattr(datasets.Flowers102, "classes", [f"{number:03d}" for number in range(1, 103)])
    paths, labels = (list(chain.from_iterable(getattr(split, name) for split in splits)) for name in ("_image_files", "_labels"))
    return from_files(paths, labels, classes)


def oxford_pets(root):
    dataset = datasets.OxfordIIITPet(root, split="trainval", download=True)
    return from_files(dataset._images, dataset._labels, dataset.classes)


def celeba(root):
    dataset = datasets.CelebA(root, split="train", download=True)
    folder = Path(dataset.root) / dataset.base_folder / "img_align_celeba"
    return Pictures(len(dataset), ((name, folder / name) for name in dataset.filename))


DATASETS = {
    "flowers102": KnownDataset(flowers102, lambda: below("flowers-102", datasets.Flowers102._file_dict.values()), "scipy"),
    "cifar10": KnownDataset(cifar10, lambda: {datasets.CIFAR10.filename: datasets.CIFAR10.tgz_md5}),
    "fashion_mnist": KnownDataset(fashion_mnist, lambda: below("FashionMNIST/raw", datasets.FashionMNIST.resources)),
    "mnist": KnownDataset(mnist, lambda: below("MNIST/raw", datasets.MNIST.resources)),
    "celeba": KnownDataset(celeba, lambda: below("celeba", ((name, md5) for _, md5, name in datasets.CelebA.file_list))),
    "oxford_pets": KnownDataset(oxford_pets, lambda: below("oxford-iiit-pet", datasets.OxfordIIITPet._RESOURCES)),
    "stl10": KnownDataset(stl10, lambda: {datasets.STL10.filename: datasets.STL10.tgz_md5}),
}


def below(folder, files):
    """(name or URL, MD5) pairs of torchvision -> {path: MD5} of the files in `folder`."""
    return {f"{folder}/{name.rsplit('/', 1)[-1]}": md5 for name, md5 in files}


def download(name, datasets_path="datasets"):
    """The folder of a data set, `datasets_path`/`name`: fetched and unpacked unless it is there already.

    It appears when it is whole. ValueError of one line: an unknown name, or a data set that could not be fetched or unpacked.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")
    folder = Path(datasets_path) / name
    if folder.is_dir() and any(folder.iterdir()):
        print(f"{folder.absolute()} is there already: nothing is fetched")
        return str(folder)
    needs = DATASETS[name].needs
    if needs and importlib.util.find_spec(needs) is None:
        raise ValueError(f"reading {name} needs the package {needs}: pip install {needs}")
    for leftover in folder.parent.glob(f".{name}.*.tmp"):  # of a process that was killed
        shutil.rmtree(leftover)
    fetch_and_unpack(name, folder, folder.parent / ARCHIVES / name)
    return str(folder)


def fetch_and_unpack(name, folder, root):
    """Fill `folder` from `root`, where torchvision fetches and unpacks. ValueError, with nothing half left, where that fails.

    What lay in `root` before stays there, archives and unpacked files that the user had from elsewhere.
    """
    archives, unfinished = DATASETS[name].archives(), root / UNFINISHED
    root.mkdir(parents=True, exist_ok=True)
    if unfinished.exists():  # a process was killed: torchvision would take what it half unpacked for whole
        earlier = json.loads(unfinished.read_text(encoding="utf-8"))
        remove_damaged(root, {name: md5 for name, md5 in archives.items() if name not in earlier}, {})
        remove_all_but(root, [*archives, *earlier])
    before = {path.relative_to(root).as_posix(): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    with atomic_write(unfinished, "w", encoding="utf-8") as file:
        json.dump(list(before), file)
    try:
        with atomic_folder(folder) as temporary:
            write_pictures(DATASETS[name].read(root), temporary, name)
    except BaseException as error:
        remove_damaged(root, archives, before)
        if not isinstance(error, Exception):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} could not be fetched and unpacked, and nothing half is left: {reason}") from error
    finally:
        remove_all_but(root, [*archives, *before])
    print(f"{name}: unpacked into {folder.absolute()}; what was fetched is kept in {root.absolute()}, where it can be deleted")


def write_pictures(pictures, folder, name):
    """Write PNG files, or take over those that torchvision unpacked. ValueError where a name would be taken twice."""
    for path, picture in tqdm(pictures.files, f"unpacking {name}", pictures.total, unit="img", dynamic_ncols=True):
        path = folder / path
        if path.exists():
            raise ValueError(f"it has two pictures called {path.name}")
        path.parent.mkdir(exist_ok=True)
        if isinstance(picture, Path):
            link_or_copy(picture, path)
        else:
            picture.save(path)


def link_or_copy(source, target):
    """The same file under a second name: no time and no space, where the file system can do that."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def remove_damaged(root, archives, before):
    """Delete the archives that were written since `before`, {path: time}, and are not whole: one of them was being fetched."""
    for name, md5 in archives.items():
        path = root / name
        if path.is_file() and path.stat().st_mtime_ns != before.get(name) and not check_integrity(path, md5):
            path.unlink()


def remove_all_but(root, kept):
    """Delete all files below `root` but those `kept`, paths below it, and the folders that this empties."""
    kept = {root / name for name in kept}
    for path in sorted(root.rglob("*"), reverse=True):  # a folder's files before the folder
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):  # it holds something
                path.rmdir()
        elif path not in kept:
            path.unlink()
