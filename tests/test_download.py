"""Well-known data sets, from small archives in the layout of the real ones.

No network: each archive's real MD5 is what torchvision is told to expect, so its own checks run.
"""

import gzip
import hashlib
import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets
from torchvision.datasets import utils as fetching

from utils.data import downloads
from utils.data.downloads import DATASETS, download, folder_name
from utils.data.search import find_images, label_by_folder
from utils.errors import run_script

PROJECT = Path(__file__).resolve().parents[1]
random = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """torchvision's two ways to the network; the addresses that were asked for."""
    asked = []

    def refuse(url, *_, **__):
        asked.append(url)
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr(fetching, "_urlretrieve", refuse)
    monkeypatch.setattr(fetching, "_get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr(fetching, "download_file_from_google_drive", refuse)
    monkeypatch.setattr(datasets.celeba, "download_file_from_google_drive", fetch_nothing(refuse))
    return asked


def fetch_nothing(refuse):
    """Of Google Drive: what is there and whole is not fetched again."""

    def fetch(file_id, root, filename, md5):
        if not fetching.check_integrity(os.path.join(root, filename), md5):
            refuse(file_id)

    return fetch


def put(root, name, content):
    """Write an archive; returns its (name, MD5)."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path.name, hashlib.md5(content).hexdigest()


def jpeg(size=(9, 7)):
    file = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(file, "JPEG", quality=31)
    return file.getvalue()


def tar_gz(files):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def archive_root(folder, name):
    return folder / ".downloads" / name


# Archives in the layout of the real ones. Each maker returns {path below the unpacked folder: what
# it should hold}.


def idx(array):
    return gzip.compress(
        bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()
    )


def make_mnist(folder, monkeypatch, name="mnist", reference=datasets.MNIST, classes="0123456789"):
    images, labels = random.integers(0, 256, (12, 28, 28), dtype=np.uint8), np.arange(12, dtype=np.uint8)[::-1] % 10
    raw = archive_root(folder, name) / reference.__name__ / "raw"
    test = images[:2] // 2
    files = {
        "train-images-idx3": images,
        "train-labels-idx1": labels,
        "t10k-images-idx3": test,
        "t10k-labels-idx1": labels[:2],
    }
    monkeypatch.setattr(
        reference, "resources", [put(raw, f"{key}-ubyte.gz", idx(array)) for key, array in files.items()]
    )
    return {f"{classes[label]}/{i:05d}.png": image for i, (image, label) in enumerate(zip(images, labels))}


def make_fashion_mnist(folder, monkeypatch):
    names = ["T-shirt-top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle_boot"]
    return make_mnist(folder, monkeypatch, "fashion_mnist", datasets.FashionMNIST, names)


def make_cifar10(folder, monkeypatch):
    names, images, labels = (
        ["airplane", "frog"],
        random.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8),
        [i % 2 for i in range(12)],
    )
    files = {}
    for number, batch in enumerate(
        ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]
    ):
        share = slice(2 * number, 2 * number + 2)
        files[batch] = pickle.dumps({"data": images[share].reshape(2, -1), "labels": labels[share]})
    files["batches.meta"] = pickle.dumps({"label_names": names})
    sums = {key: hashlib.md5(content).hexdigest() for key, content in files.items()}
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[key, sums[key]] for key in files if key.startswith("data")])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(
        datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    )
    content = tar_gz({f"cifar-10-batches-py/{key}": value for key, value in files.items()})
    monkeypatch.setattr(
        datasets.CIFAR10, "tgz_md5", put(archive_root(folder, "cifar10"), "cifar-10-python.tar.gz", content)[1]
    )
    return {f"{names[i % 2]}/{i:05d}.png": images[i].transpose(1, 2, 0) for i in range(10)}


def make_stl10(folder, monkeypatch):
    names, images, labels = (
        ["airplane", "bird", "car"],
        random.integers(0, 256, (4, 3, 96, 96), dtype=np.uint8),
        [2, 0, 1, 2],
    )
    columns = images.transpose(0, 1, 3, 2).tobytes()  # the files are column by column
    files = {
        "train_X.bin": columns,
        "train_y.bin": bytes(label + 1 for label in labels),
        "unlabeled_X.bin": columns[: 96 * 96 * 3],
        "test_X.bin": columns[: 96 * 96 * 3],
        "test_y.bin": b"\x01",
        "class_names.txt": "\n".join(names).encode(),
    }
    sums = {key: hashlib.md5(content).hexdigest() for key, content in files.items()}
    monkeypatch.setattr(
        datasets.STL10, "train_list", [[key, sums[key]] for key in ("train_X.bin", "train_y.bin", "unlabeled_X.bin")]
    )
    monkeypatch.setattr(datasets.STL10, "test_list", [[key, sums[key]] for key in ("test_X.bin", "test_y.bin")])
    content = tar_gz({f"stl10_binary/{key}": value for key, value in files.items()})
    monkeypatch.setattr(
        datasets.STL10, "tgz_md5", put(archive_root(folder, "stl10"), "stl10_binary.tar.gz", content)[1]
    )
    return {
        f"{names[label]}/{i:05d}.png": image.transpose(1, 2, 0) for i, (image, label) in enumerate(zip(images, labels))
    }


def make_flowers102(folder, monkeypatch):
    savemat = pytest.importorskip("scipy.io").savemat
    pictures, labels, root = (
        [jpeg() for _ in range(6)],
        [12, 102, 1, 60, 12, 1],
        archive_root(folder, "flowers102") / "flowers-102",
    )
    tables = {
        "imagelabels.mat": {"labels": [labels]},
        "setid.mat": {"trnid": [[1, 2]], "valid": [[3, 4]], "tstid": [[6, 5]]},
    }
    files = {
        "image": put(
            root, "102flowers.tgz", tar_gz({f"jpg/image_{i:05d}.jpg": content for i, content in enumerate(pictures, 1)})
        )
    }
    for key, (name, table) in zip(("label", "setid"), tables.items()):
        file = io.BytesIO()
        savemat(file, table)
        files[key] = put(root, name, file.getvalue())
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", files)
    names = {12: "colts_foot", 102: "blackberry_lily", 1: "pink_primrose", 60: "pink-yellow_dahlia"}
    if not hasattr(datasets.Flowers102, "classes"):  # older versions of torchvision do not know the names
        names = {label: f"{label:03d}" for label in names}
    return {f"{names[label]}/image_{i:05d}.jpg": content for i, (content, label) in enumerate(zip(pictures, labels), 1)}


def make_oxford_pets(folder, monkeypatch):
    names, root = ["Abyssinian", "american_bulldog"], archive_root(folder, "oxford_pets") / "oxford-iiit-pet"
    pictures = {f"{name}_{i}": jpeg() for name in names for i in (1, 20, 3)}
    lines = {name: f"{name} {1 + names.index(name.rsplit('_', 1)[0])} 1 1\n" for name in pictures}
    listed = [name for name in pictures if not name.endswith("_3")]
    sheets = {
        "annotations/trainval.txt": "".join(lines[name] for name in listed).encode(),
        "annotations/test.txt": "".join(lines[name] for name in pictures if name not in listed).encode(),
    }
    files = [
        put(root, "images.tar.gz", tar_gz({f"images/{name}.jpg": content for name, content in pictures.items()})),
        put(root, "annotations.tar.gz", tar_gz(sheets)),
    ]
    monkeypatch.setattr(
        datasets.OxfordIIITPet, "_RESOURCES", tuple((f"https://example.org/data/{name}", md5) for name, md5 in files)
    )
    folders = dict(zip(names, ("Abyssinian", "American_Bulldog")))
    return {f"{folders[name.rsplit('_', 1)[0]]}/{name}.jpg": pictures[name] for name in listed}


def make_celeba(folder, monkeypatch):
    pictures, root = {f"{i:06d}.jpg": jpeg() for i in range(1, 6)}, archive_root(folder, "celeba") / "celeba"
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        for name, content in pictures.items():
            archive.writestr(f"img_align_celeba/{name}", content)
    split = {name: int(i >= 3) for i, name in enumerate(pictures)}  # two of five are no training data
    tables = {
        "list_attr_celeba.txt": "5\nYoung\n",
        "identity_CelebA.txt": "",
        "list_bbox_celeba.txt": "5\nid x\n",
        "list_landmarks_align_celeba.txt": "5\neye\n",
        "list_eval_partition.txt": "",
    }
    files = [put(root, "img_align_celeba.zip", zipped.getvalue())]
    for name, head in tables.items():
        lines = [f"{picture} {split[picture] if 'partition' in name else 1}\n" for picture in pictures]
        files.append(put(root, name, (head + "".join(lines)).encode()))
    monkeypatch.setattr(datasets.CelebA, "file_list", [("id", md5, name) for name, md5 in files])
    return {name: pictures[name] for name in pictures if not split[name]}


MAKERS = {
    "flowers102": make_flowers102,
    "cifar10": make_cifar10,
    "fashion_mnist": make_fashion_mnist,
    "mnist": make_mnist,
    "celeba": make_celeba,
    "oxford_pets": make_oxford_pets,
    "stl10": make_stl10,
}


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


def assert_holds(folder, expected):
    assert files_below(folder) == set(expected)
    for name, content in expected.items():
        if isinstance(content, bytes):
            assert (Path(folder) / name).read_bytes() == content, name
        else:
            with Image.open(Path(folder) / name) as picture:
                np.testing.assert_array_equal(np.asarray(picture), content, err_msg=name)


# Unpacking


def test_every_data_set_has_a_test():
    assert list(MAKERS) == list(DATASETS)


@pytest.mark.parametrize("name", MAKERS)
def test_it_is_unpacked_as_image_files_by_class_and_the_archives_are_kept(tmp_path, monkeypatch, name):
    expected = MAKERS[name](tmp_path, monkeypatch)
    archives = files_below(tmp_path)
    folder = download(name, tmp_path)
    assert folder == str(tmp_path / name)
    assert_holds(folder, expected)
    assert archives <= files_below(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".downloads", name]
    labels, classes = label_by_folder(find_images(folder))
    assert classes == sorted({path.split("/")[0] for path in expected if "/" in path}) and (labels is None) == (
        name == "celeba"
    )


@pytest.mark.parametrize("name", ["mnist", "celeba"])
def test_what_is_there_is_neither_fetched_nor_unpacked_again(tmp_path, monkeypatch, capsys, name):
    MAKERS[name](tmp_path, monkeypatch)
    folder = Path(download(name, tmp_path))
    shutil.rmtree(tmp_path / ".downloads")
    (folder / "mine.txt").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capsys.readouterr()
    assert download(name, tmp_path) == str(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert "is there already" in capsys.readouterr().out and not (tmp_path / ".downloads").exists()


def test_archives_that_are_there_are_unpacked_again_without_fetching(tmp_path, monkeypatch, offline):
    expected = make_oxford_pets(tmp_path, monkeypatch)
    shutil.rmtree(download("oxford_pets", tmp_path))
    assert_holds(download("oxford_pets", tmp_path), expected)
    assert offline == []


def test_unpacked_files_of_the_users_own_serve_and_stay(tmp_path, monkeypatch):
    expected = make_oxford_pets(tmp_path, monkeypatch)
    root = tmp_path / ".downloads" / "oxford_pets" / "oxford-iiit-pet"
    for name in ("images", "annotations"):
        shutil.unpack_archive(root / f"{name}.tar.gz", root)
        (root / f"{name}.tar.gz").unlink()
    before = files_below(root)
    assert_holds(download("oxford_pets", tmp_path), expected)
    assert files_below(root) == before


@pytest.mark.parametrize(
    "name, folder",
    [
        ("T-shirt/top", "T-shirt-top"),
        ("pink-yellow dahlia?", "pink-yellow_dahlia"),
        ("colt's foot", "colts_foot"),
        (" 7 ", "7"),
        ('a\\b:c*"<>|', "a-b-c-"),
    ],
)
def test_class_names_become_folder_names(name, folder):
    assert folder_name(name) == folder


# What goes wrong


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "flowers102"])
def test_without_archives_and_network_one_line_says_so(tmp_path, offline, name):
    with pytest.raises(ValueError, match=f"^{name} could not be fetched .*no network here") as error:
        download(name, tmp_path)
    assert "\n" not in str(error.value) and offline
    assert files_below(tmp_path) == set() and [path.name for path in tmp_path.iterdir()] == [".downloads"]


def test_what_was_whole_in_a_cut_download_is_not_fetched_again(tmp_path, monkeypatch):
    expected = make_oxford_pets(tmp_path, monkeypatch)
    root, fetched = tmp_path / ".downloads" / "oxford_pets" / "oxford-iiit-pet", []
    sources = {path.name: path.read_bytes() for path in root.iterdir()}
    shutil.rmtree(root)

    def cut(url, path):
        fetched.append(Path(path).name)
        first = fetched.count("annotations.tar.gz") == 1
        Path(path).write_bytes(sources[fetched[-1]][: -5 if first else None])

    monkeypatch.setattr(fetching, "_urlretrieve", cut)
    with pytest.raises(ValueError, match="oxford_pets could not be fetched.*corrupted"):
        download("oxford_pets", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".downloads"]
    assert_holds(download("oxford_pets", tmp_path), expected)
    assert fetched == ["images.tar.gz", "annotations.tar.gz", "annotations.tar.gz"]


def test_an_archive_of_the_users_that_torchvision_does_not_know_is_not_deleted(tmp_path, monkeypatch):
    make_cifar10(tmp_path, monkeypatch)
    path = tmp_path / ".downloads" / "cifar10" / "cifar-10-python.tar.gz"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="no network here"):
        download("cifar10", tmp_path)
    assert files_below(tmp_path) == {".downloads/cifar10/cifar-10-python.tar.gz"}


@pytest.mark.parametrize("stop", [OSError("no space left"), KeyboardInterrupt()], ids=["disk full", "ctrl-c"])
def test_an_interrupted_unpacking_leaves_no_half_data_set(tmp_path, monkeypatch, stop):
    expected = make_mnist(tmp_path, monkeypatch)
    archives, save, saved = files_below(tmp_path), Image.Image.save, []

    def save_some(picture, path):
        if len(saved) == 5:
            raise stop
        saved.append(path)
        save(picture, path)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", save_some)
        with pytest.raises(KeyboardInterrupt if isinstance(stop, KeyboardInterrupt) else ValueError):
            download("mnist", tmp_path)
    assert len(saved) == 5 and archives <= files_below(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".downloads"]
    assert_holds(download("mnist", tmp_path), expected)


KILLED = """
import os, sys, pickle
from torchvision import datasets
from utils.data import downloads
folder, datasets.OxfordIIITPet._RESOURCES = pickle.load(sys.stdin.buffer)
copy = downloads.shutil.copyfile
done = []
def copy_some(source, target):
    if len(done) == 2:
        os.remove(sorted(source.parent.iterdir())[0])  # as if it had been unpacked by half
        os._exit(9)
    done.append(copy(source, target))
downloads.shutil.copyfile = copy_some
downloads.download("oxford_pets", folder)
"""


def test_what_a_killed_process_unpacked_by_half_is_not_taken_for_whole(tmp_path, monkeypatch):
    """torchvision asks only whether the unpacked folder is there."""
    expected = make_oxford_pets(tmp_path, monkeypatch)
    given = pickle.dumps((str(tmp_path), datasets.OxfordIIITPet._RESOURCES))
    done = subprocess.run([sys.executable, "-c", KILLED], cwd=PROJECT, input=given, capture_output=True)
    assert done.returncode == 9, done.stderr.decode()
    assert any(".tmp/" in path for path in files_below(tmp_path)) and not (tmp_path / "oxford_pets").exists()
    root = tmp_path / ".downloads" / "oxford_pets"
    with pytest.raises(ValueError, match=f"No such file.*delete {root} first"):
        download("oxford_pets", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".downloads"]
    shutil.rmtree(root / "oxford-iiit-pet" / "images")
    assert_holds(download("oxford_pets", tmp_path), expected)


CUT_OFF = """
import os, sys
from pathlib import Path
from torchvision.datasets import utils
from utils.data import downloads
def fetch_half(url, path):
    Path(path).write_bytes(b"half")
    os._exit(9)
utils._urlretrieve, utils._get_redirect_url = fetch_half, lambda url, **_: url
downloads.download("cifar10", sys.argv[1])
"""


def test_an_archive_that_a_killed_process_fetched_by_half_is_fetched_again(tmp_path, monkeypatch):
    done = subprocess.run([sys.executable, "-c", CUT_OFF, tmp_path], cwd=PROJECT, capture_output=True)
    assert done.returncode == 9, done.stderr.decode()
    assert [Path(path).name for path in files_below(tmp_path)] == ["cifar-10-python.tar.gz"]
    expected = make_cifar10(tmp_path, monkeypatch)
    path = tmp_path / ".downloads" / "cifar10" / "cifar-10-python.tar.gz"
    whole = path.read_bytes()
    path.write_bytes(b"half")
    monkeypatch.setattr(fetching, "_urlretrieve", lambda url, path: Path(path).write_bytes(whole))
    assert_holds(download("cifar10", tmp_path), expected)


def test_archives_may_be_links_to_another_folder(tmp_path, monkeypatch, offline):
    expected = make_cifar10(tmp_path, monkeypatch)
    root = tmp_path / ".downloads" / "cifar10"
    (tmp_path / "elsewhere").mkdir()
    (root / "cifar-10-python.tar.gz").rename(tmp_path / "elsewhere" / "c.tar.gz")
    (root / "cifar-10-python.tar.gz").symlink_to(Path("..", "..", "elsewhere", "c.tar.gz"))
    assert_holds(download("cifar10", tmp_path), expected)
    assert offline == [] and (root / "cifar-10-python.tar.gz").is_symlink()


def test_a_package_that_is_missing_is_named_before_anything_is_fetched(tmp_path, monkeypatch, offline):
    monkeypatch.setattr(downloads.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="flowers102 could not be .* needs the package scipy: pip install scipy"):
        download("flowers102", tmp_path)
    assert offline == [] and files_below(tmp_path) == set()


# The command


def test_the_script_lists_what_it_downloaded(tmp_path, monkeypatch, capsys):
    import txt_annotation

    expected = make_fashion_mnist(tmp_path, monkeypatch)
    options = [
        "--download",
        "fashion_mnist",
        "--datasets_path",
        str(tmp_path),
        "--annotation_path",
        str(tmp_path / "train_lines.txt"),
    ]
    monkeypatch.setattr(sys, "argv", ["txt_annotation.py", *options])
    txt_annotation.main()
    lines = (tmp_path / "train_lines.txt").read_text().splitlines()
    classes = (tmp_path / "train_classes.txt").read_text().splitlines()
    assert classes == sorted({path.split("/")[0] for path in expected}) and len(lines) == len(expected)
    wanted = {f"{classes.index(path.split('/')[0])};{tmp_path / 'fashion_mnist' / path}" for path in expected}
    assert set(lines) == wanted
    monkeypatch.setattr(sys, "argv", ["txt_annotation.py", "--download", "birds"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run_script(txt_annotation.main)
    assert capsys.readouterr().err.startswith("error: --download birds: expected one of '', 'flowers102', 'cifar10',")


def test_plain_listing_does_not_import_torchvision(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    code = "import sys, txt_annotation; txt_annotation.main(); assert not {'torch', 'torchvision'} & set(sys.modules)"
    options = ["--datasets_path", tmp_path, "--annotation_path", tmp_path / "lines.txt"]
    done = subprocess.run([sys.executable, "-c", code, *options], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
