"""Which checkpoint: the runs in logs/, the newest of them, its weights, its epoch files."""

import time
from pathlib import Path

from utils import distributed
from utils.checkpoint.file import Checkpoint, load_checkpoint
from utils.errors import UserError, user_message
from utils.terminal import as_command

LOGS = "logs"  # where runs are looked for unless another folder is named
LAST = "last.pth"
BEST = "best.pth"  # of the lowest validation loss
SUMMARY = "summary.txt"  # what each start of the run printed: command, images, network, steps
ENDINGS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".pth.tar")  # of files of weights, ours or others'
SHIPPED = "emoji.pth"  # the bundled checkpoint


def epoch_files(folder: Path) -> list[Path]:
    """The epoch_XXXX.pth of a run, oldest first."""
    found = [path for path in Path(folder).glob("epoch_*.pth") if path.stem[6:].isdigit()]
    return sorted(found, key=lambda path: int(path.stem[6:]))


def newest_in(folder: Path) -> Path | None:
    """The last.pth of a run, else its newest epoch file, else None."""
    last = folder / LAST
    return last if last.is_file() else next(iter(epoch_files(folder)[::-1]), None)


def newest_weights(save_dir: str | Path = LOGS) -> list[Path]:
    """The newest weights of each run, newest run first: by time, then by name."""
    found = [weights for folder in Path(save_dir).glob("*") if (weights := newest_in(folder))]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, str(path)), reverse=True)


def newest_last(save_dir: str | Path = LOGS) -> Checkpoint | None:
    """The newest last.pth, or None. UserError for a damaged one: an older run is no substitute."""
    path = next((path for path in newest_weights(save_dir) if path.name == LAST), None)
    try:
        return path and load_checkpoint(path)
    except (UserError, OSError) as error:
        advice = "name another run's folder, or an epoch_XXXX.pth of this newest run"
        raise UserError(f"{user_message(error)}; {advice}") from None


def find_resumed(resume: str, save_dir: str) -> Checkpoint | None:
    """The checkpoint of `resume`: "" None, "latest" the newest run's, by rank 0; else a path's."""
    if resume not in ("", "latest"):  # an older epoch file of the folder would begin again without a word
        find_weights(resume)  # says what a folder of diffusers needs
        return load_checkpoint(Path(resume, LAST) if Path(resume).is_dir() else resume)
    found = newest_last(save_dir) if resume and distributed.is_main() else None
    path = distributed.from_main(found and found.path)
    if resume and path is None:
        print(f"--resume latest: no run with a {LAST} in {Path(save_dir).resolve()}; this is a fresh run")
    return found or (path and load_checkpoint(path))


def open_weights(path: str, label: str = "") -> Checkpoint:
    """The checkpoint that `find_weights` finds on rank 0, for all processes. label: printed."""
    path, remark = distributed.from_main(find_weights(path) if distributed.is_main() else None)
    if label:
        print(f"{label}: {path.resolve()}{remark}")
    return load_checkpoint(path, lazily=True)


def find_weights(path: str | Path, save_dir: str | Path = LOGS) -> tuple[Path, str]:
    """(file, remark) of the weights to sample with. UserError: there are none.

    path: a run's folder or a file; "": the newest run's, or else in `save_dir`, the bundled last.
    """
    given = Path(path)
    if path:
        weights = newest_in(given)
        whole = given.parent if given.name == "unet" else given
        if weights is None and ((whole / "model_index.json").is_file() or (whole / "unet").is_dir()):
            command = as_command("python", "-m", "utils.convert", "import", whole, "FILE.pth")
            raise UserError(f"{whole}: of diffusers: `{command}` reads it")
        if weights is None and (inside := [*given.glob("data.pkl"), *given.glob("*/data.pkl")]):
            folder = inside[0].resolve().parent
            command = as_command("zip", "-0", "-r", "weights.pth", folder.name)
            packed = f"in {folder.parent}, `{command}` makes it a file again"
            raise UserError(f"{given}: an unpacked checkpoint: take the file itself, or, {packed}")
        return weights or (given / LAST if given.is_dir() else given), ""
    if found := newest_weights(save_dir):
        return found[0], ", the newest run's"
    files = sorted(Path(save_dir).glob("*.pth"), key=lambda path: (path.name != SHIPPED, path.stat().st_mtime_ns))
    if not files:
        cure = "run `python train.py` first, or name a checkpoint with --model_path"
        raise UserError(f"{save_dir} holds no weights: {cure}")
    what = "bundled" if files[-1].name == SHIPPED else f"a file in {save_dir}"
    return files[-1], f" ({what}; your newest run in {save_dir}/ takes precedence)"


def run_folder(checkpoint: Checkpoint | None, save_dir: str) -> Path:
    """The folder to write to, on all processes: that of the resumed last.pth, else a new one."""
    resumed = checkpoint is not None and checkpoint.training is not None and checkpoint.path.name == LAST
    if resumed and (checkpoint.path.parent / "config.json").exists():
        return checkpoint.path.parent  # a copy elsewhere, or under another name, starts a folder of its own
    folder = Path(save_dir) / time.strftime("%Y_%m_%d_%H_%M_%S")
    while distributed.is_main():
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:  # another run of this second, or a file in place of save_dir
            if not folder.is_dir():
                raise
            folder = folder.with_name(f"{folder.name}_2")
    return distributed.from_main(folder)
