"""Images to train on, and runs of train.py for a stated time, in a folder of their own: the user's
datasets/ and logs/ stay as they are.

All of it resumes where it was stopped: what is unpacked, listed, measured or trained is not done
again.
"""

import csv
import gzip
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

from utils.checkpoint.runs import newest_last
from utils.data.annotation import read_annotation, write_annotation
from utils.data.downloads import ARCHIVES, download
from utils.data.search import find_images, label_by_folder
from utils.errors import UserError
from utils.files import atomic_write
from utils.training.step_rng import derive_seed

PROJECT = Path(__file__).resolve().parent.parent
WORK = PROJECT / "results" / "benchmarks"  # ignored by git
RESULTS = PROJECT / "benchmarks" / "results"
DATA = {"fashion_mnist": 1, "emoji": 3}  # name -> number of channels
NETWORKS = {  # train.py's own on a GPU; elsewhere one that two cores train in half an hour
    "cuda": {"input_shape": (32, 32), "channel": 128, "channel_mults": (1, 2, 2, 2), "num_res_blocks": 2},
    "cpu": {"input_shape": (16, 16), "channel": 32, "channel_mults": (1, 2, 2), "num_res_blocks": 1},
}
SPEED_STEPS = {"cuda": 200, "cpu": 20}  # steps a part of the measurement of speed, which has three
VAL_SPLIT = 0.05  # fraction of the images for the validation loss and the bits per dimension
OVERHEAD = 1.05  # an epoch's validation, previews and saves, on top of its steps


def network_options(device, size=0, channel=0):
    """train.py's options for a device, with another size or width where they are not 0."""
    options = dict(NETWORKS["cuda" if device.type == "cuda" else "cpu"])
    return options | ({"input_shape": (size, size)} if size else {}) | ({"channel": channel} if channel else {})


def list_images(data, work=WORK, data_root=""):
    """The train_lines.txt of "fashion_mnist", "emoji" or a folder of images, made below `work`.

    Those of a name are listed once. data_root: a torchvision root that has FashionMNIST/raw; "":
    fetched. UserError for a root without it.
    """
    known, path = data in DATA, Path(data).resolve()
    folder = Path(work).resolve() / (data if known else f"{path.name}_{derive_seed(str(path)):016x}")
    images, annotation = folder / "datasets", folder / "train_lines.txt"
    images.mkdir(parents=True, exist_ok=True)  # the cache of decoded images comes to lie in it
    if annotation.is_file() and known:
        return annotation
    if not known:
        images = path
    elif data == "emoji":
        images = PROJECT / "datasets" / "noto_emoji"
    else:
        if data_root:
            copy_unpacked(data_root, images / ARCHIVES / data)
        download(data, images)
    paths = find_images(images)
    write_annotation(annotation, paths, *label_by_folder(paths))
    return annotation


def copy_unpacked(data_root, target):
    """Brings Fashion-MNIST's files from one torchvision root to another.

    Archives are unpacked here: torchvision refuses those that were recompressed, as Debian's
    package of the same data has them.
    """
    raw, to = Path(data_root) / "FashionMNIST" / "raw", target / "FashionMNIST" / "raw"
    found = [path for path in raw.glob("*-ubyte*") if path.is_file()]
    if not found:
        raise UserError(f"--data_root {data_root}: it has no files in FashionMNIST/raw, where torchvision keeps them")
    for path in found:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rb") as source, atomic_write(to / path.name.removesuffix(".gz")) as file:
            shutil.copyfileobj(source, file)


# Runs


def trained(folder, annotation, options, minutes, epochs=0):
    """(last.pth, record) of a run of train.py with `options` for `epochs`, or for `minutes`.

    It lies in `folder` under a name of its settings: the same settings resume it, or find it
    finished. A measurement of the speed decides once how many epochs `minutes` are. record:
    {epochs, steps, minutes, images_per_second, command, history}.
    """
    settings = {**options, "annotation_path": str(annotation)}
    folder = Path(folder) / f"run_{derive_seed(sorted(settings.items()), minutes, epochs):016x}"
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "epochs.json"
    if not plan.is_file():
        epochs = epochs or epochs_within(
            minutes, images_a_second(folder / "speed", annotation, options), annotation, options
        )
        write_json(plan, {"epochs": epochs})
    epochs = json.loads(plan.read_text("utf-8"))["epochs"]
    settings |= {"epochs": epochs, "preview_period": max(1, epochs // 4), "save_period": epochs}
    checkpoint = newest_last(folder / "logs")
    if checkpoint is None or checkpoint.training.epoch < epochs:
        run_project("train.py", {**settings, "resume": "latest"}, folder)
    path = newest_last(folder / "logs").path
    shown = {name: value for name, value in settings.items() if name != "annotation_path"}
    return path, {
        "command": " ".join(["python train.py", *as_options(shown)]),
        "epochs": epochs,
        **record_of(path.parent),
    }


def record_of(folder):
    """What a run's tables say: its length, and the rows of its history."""
    history, speed = (read_table(folder / name) for name in ("epoch_loss.csv", "speed.csv"))
    return {
        "steps": int(history[-1]["step"]),
        "minutes": sum(row["seconds"] for row in speed) / 60,
        "images_per_second": statistics.median(row["images_per_second"] for row in speed),
        "history": history,
    }


def epochs_within(minutes, rate, annotation, options):
    """How many epochs fit into `minutes` at `rate` images a second: at least one."""
    images = len(read_annotation(annotation).paths) * (1 - options.get("val_split", 0))
    return max(1, math.floor(minutes * 60 * rate / images / OVERHEAD))


def images_a_second(folder, annotation, options):
    """The speed of training, from a few hundred steps at most on the first images.

    What is compiled counts for nothing.
    """
    listed = read_annotation(annotation)
    steps, batch = SPEED_STEPS.get(options.get("device", ""), SPEED_STEPS["cpu"]), options.get("batch_size", 64)
    few = listed.paths[: steps * batch]
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "datasets").mkdir(parents=True)
    write_annotation(folder / "train_lines.txt", few)
    epochs = 3 * max(1, steps * batch // len(few))
    kept = {name: value for name, value in options.items() if name not in ("class_conditional", "val_split")}
    kept |= {
        "annotation_path": str(folder / "train_lines.txt"),
        "epochs": epochs,
        "preview_period": 0,
        "save_period": epochs,
    }
    run_project("train.py", kept, folder)
    rates = [row["images_per_second"] for row in read_table(newest_last(folder / "logs").path.parent / "speed.csv")]
    shutil.rmtree(folder)
    return statistics.median(rates[len(rates) // 3 :])


# Processes and files


def run_project(script, options, folder):
    """Run a script of the project, or a module of it, in `folder`. RuntimeError where it fails.

    Whatever ends this process ends that one too, by a signal on which train.py saves its state.
    """
    command = [
        sys.executable,
        *([str(PROJECT / script)] if script.endswith(".py") else ["-m", script]),
        *as_options(options),
    ]
    with subprocess.Popen(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(PROJECT)}) as process:
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with code {code}")


def as_options(options):
    """{name: value} as a command line that the scripts read: a tuple of one as 1, ."""

    def text(value):
        return ",".join(map(str, value)) + "," * (len(value) == 1) if isinstance(value, tuple) else str(value)

    return [word for name, value in options.items() for word in (f"--{name}", text(value))]


def stop_with_children():
    """Let SIGTERM unwind this process as Ctrl-C does, so that what it started stops too."""

    def leave(number, _frame):
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def read_table(path):
    """The rows of a CSV file of numbers: [{column: number, or None where it is empty}]."""
    with open(path, encoding="utf-8", newline="") as file:
        return [{name: float(value) if value else None for name, value in row.items()} for row in csv.DictReader(file)]


def write_json(path, content):
    with atomic_write(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
