"""The folders of runs in logs/: a new one, the newest, its weights, its epoch files."""

import re
import time
from pathlib import Path

from utils import distributed
from utils.checkpoint import LAST, load_checkpoint
from utils.errors import UserError

SHIPPED = "emoji.pth"  # the weights that come with the project
EPOCH_FILE = re.compile(r"epoch_(\d+)\.pth")


def epoch_files(folder):
    """The epoch_XXXX.pth of a run, oldest first."""
    found = [path for path in Path(folder).glob("epoch_*.pth") if EPOCH_FILE.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(EPOCH_FILE.fullmatch(path.name)[1]))


def rotate(folder, keep):
    """Deletes all but the newest `keep` epoch files of a run. 0 keeps all."""
    for path in epoch_files(folder)[:-keep] if keep else []:
        path.unlink(missing_ok=True)


def newest_weights(save_dir):
    """The newest weights of each run, newest run first: by time, then by name."""
    found = [weights for folder in Path(save_dir).glob("*") if (weights := _newest_in(folder))]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, str(path)), reverse=True)


def newest_last(save_dir):
    """(path, checkpoint) of the newest last.pth, or (None, None). ValueError for a damaged one."""
    path = next((path for path in newest_weights(save_dir) if path.name == LAST), None)
    if path is None:
        return None, None
    try:
        return path, load_checkpoint(path)
    except ValueError as error:
        older = epoch_files(path.parent)  # an older run is no substitute: resuming writes into it
        instead = f"go on from {older[-1]} with --resume, or" if older else "it has no epoch file to go on from:"
        raise UserError(
            f"{error}; this is the newest run: {instead} name another run's folder, or move {path.parent} away"
        ) from None


def find_checkpoint(resume, save_dir):
    """(path, checkpoint) of `resume`: "" (None, None), "latest" the newest run's, else a path's.

    Rank 0 searches, so that all processes resume the same one. Each reads it for itself.
    """
    path, checkpoint = _find_on_main(resume, save_dir) if distributed.is_main() else (None, None)
    path = distributed.from_main(path)
    return path, load_checkpoint(path) if path and checkpoint is None else checkpoint


def _find_on_main(resume, save_dir):
    if not resume:
        return None, None
    if resume != "latest":
        path = Path(resume)
        if path.is_dir() and not (path / LAST).is_file():
            weights_in(path)  # says what a folder of diffusers needs
        path = path / LAST if path.is_dir() else path
        return path, load_checkpoint(path)
    path, checkpoint = newest_last(save_dir)
    if path is None:
        print(f"--resume latest: no run with a {LAST} in {Path(save_dir).resolve()}; this is a fresh run")
    return path, checkpoint


def find_weights(path, save_dir="logs"):
    """(file, remark) of the weights to sample with.

    path: a run's folder, or a file. "": the newest run, without any run the newest file in
    `save_dir`, and last the shipped weights. ValueError: there are none, or a folder of diffusers.
    """
    if path:
        folder = Path(path)
        return (weights_in(folder), "") if folder.is_dir() else (folder, "")
    if found := newest_weights(save_dir):
        return found[0], ", the newest run's"
    files = sorted(Path(save_dir).glob("*.pth"), key=lambda path: (path.name != SHIPPED, path.stat().st_mtime_ns))
    if files and files[-1].name == SHIPPED:
        return files[-1], ", which come with this project: your own run's go first once there is one"
    if files:
        return files[-1], f", a file in {save_dir}: a run of your own goes first once there is one"
    raise UserError(
        f"{Path(save_dir).resolve()} holds no weights: run `python train.py` first, or name a checkpoint "
        "with --model_path"
    )


def weights_in(folder):
    """The newest weights of a run, else its last.pth. ValueError: a folder of diffusers."""
    found = _newest_in(folder)
    whole = folder.parent if folder.name == "unet" else folder
    if found is None and ((whole / "model_index.json").is_file() or (whole / "unet").is_dir()):
        raise UserError(
            f"{whole}: a folder of diffusers; make a checkpoint of it: python -m utils.convert import {whole} FILE.pth"
        )
    return found or folder / LAST


def _newest_in(folder):
    last = folder / LAST
    return last if last.is_file() else next(iter(epoch_files(folder)[::-1]), None)


def run_folder(checkpoint, source, save_dir):
    """The folder to write to, on all processes: that of the resumed last.pth, else a new one."""
    folder = Path(source).parent if source else None
    if checkpoint and "position" in checkpoint and Path(source).name == LAST and (folder / "config.json").exists():
        return folder  # a copy elsewhere, or under another name, starts a folder of its own
    return distributed.from_main(_new_folder(save_dir) if distributed.is_main() else None)


def _new_folder(save_dir):
    """An empty folder logs/<time>/ that no other run has."""
    name = time.strftime("%Y_%m_%d_%H_%M_%S")
    for suffix in ("", *(f"_{number}" for number in range(2, 1000))):
        folder = Path(save_dir) / f"{name}{suffix}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not folder.is_dir():
                raise UserError(f"{folder.parent} cannot hold runs: it is a file; choose another --save_dir") from None
    raise UserError(f"{save_dir}: no free name for a run")
