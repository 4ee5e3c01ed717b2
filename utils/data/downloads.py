"""Well-known data sets: torchvision downloads and verifies them.

They become files datasets/<name>/<class>/<image>. What was fetched stays in
datasets/.downloads/<name>/, the `root` of torchvision's class, until you delete it. Where a server
is out of reach, put the archives, or what they unpack to, there by hand. Two need a package more:
flowers102 scipy, celeba gdown.
"""

import importlib.util
import re
import shutil
from functools import partial
from pathlib import Path

from tqdm import tqdm

from utils.errors import UserError, one_line
from utils.files import atomic_folder, remove_leftovers

ARCHIVES = ".downloads"  # hidden: what is below it is never listed


def folder_name(class_name):
    """A class name as a folder name for any system and shell: `T-shirt/top` -> `T-shirt-top`."""
    return re.sub(r"[^\w.-]+", "-", re.sub(r"['?]", "", class_name.strip()).replace(" ", "_"))


# torchvision.datasets, root -> (number of images, pairs of a name to write and an image or a file).
def from_arrays(kind, datasets, root):
    """A class of torchvision that holds arrays: numbered PNG files."""
    dataset = getattr(datasets, kind)(root, download=True)
    names = [folder_name(name.split(" - ")[0]) for name in dataset.classes]  # MNIST: "7 - seven"
    return len(dataset), ((f"{names[label]}/{i:05d}.png", image) for i, (image, label) in enumerate(dataset))


def from_files(paths, labels, classes):
    """JPEG files: they stay as they are, byte for byte."""
    names = [folder_name(name) for name in classes]
    return len(paths), ((f"{names[label]}/{path.name}", path) for path, label in zip(paths, labels))


def flowers102(datasets, root):
    if importlib.util.find_spec("scipy") is None:  # before 330 MB are fetched
        raise UserError("it needs the package scipy: pip install scipy")
    # All splits, as "train" alone has 10 images a class.
    splits = [datasets.Flowers102(root, split=split, download=True) for split in ("train", "val", "test")]
    paths = [path for split in splits for path in split._image_files]  # torchvision has no public name for them
    labels = [label for split in splits for label in split._labels]
    numbers = [f"{number:03d}" for number in range(1, 103)]  # of older versions, without names
    return from_files(paths, labels, getattr(datasets.Flowers102, "classes", numbers))


def oxford_pets(datasets, root):
    dataset = datasets.OxfordIIITPet(root, split="trainval", download=True)
    return from_files(dataset._images, dataset._labels, dataset.classes)


def celeba(datasets, root):
    dataset = datasets.CelebA(root, split="train", download=True)
    folder = Path(root) / dataset.base_folder / "img_align_celeba"
    return len(dataset), ((name, folder / name) for name in dataset.filename)


DATASETS = {
    "flowers102": flowers102,
    "cifar10": partial(from_arrays, "CIFAR10"),
    "fashion_mnist": partial(from_arrays, "FashionMNIST"),
    "mnist": partial(from_arrays, "MNIST"),
    "celeba": celeba,
    "oxford_pets": oxford_pets,
    "stl10": partial(from_arrays, "STL10"),
}


def download(name, datasets_path="datasets"):
    """The folder `datasets_path`/`name` of a data set, downloaded, whole, where it is missing."""
    from torchvision import datasets  # it takes seconds, and listing images does without it

    folder, root = Path(datasets_path).absolute() / name, Path(datasets_path).absolute() / ARCHIVES / name
    if folder.is_dir() and any(folder.iterdir()):
        print(f"{folder} is there already: nothing is fetched")
        return str(folder)
    remove_leftovers(folder.parent, name)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as unfinished:
            total, images = DATASETS[name](datasets, root)
            for path, image in tqdm(images, f"unpacking {name}", total, unit="img", dynamic_ncols=True):
                (unfinished / path).parent.mkdir(exist_ok=True)
                if isinstance(image, Path):
                    shutil.copyfile(image, unfinished / path)
                else:
                    image.save(unfinished / path)
    except Exception as error:  # of torchvision, of Pillow, of the network, of the disk
        fault = f"{name} could not be fetched and unpacked: {one_line(error, 500)}"
        raise UserError(f"{fault}; try again, and if that fails too, delete {root} first") from error
    print(f"{name}: unpacked into {folder}; what was fetched is in {root}: you can delete it")
    return str(folder)
