"""Kill a training run again and again, and compare its end with an undisturbed run's:
`PYTHONPATH=. python tests/kill_run.py 200`.

A second number seeds the moments of the kills.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import ENVIRONMENT, TINY, assert_same_state, command, read_file, run, run_main, torchrun, write_pictures

RUN = [*TINY, "--epochs", "4", "--val_split", "0.1", "--class_conditional", "True", "--seed", "5"]


def result(folder):
    """(checkpoint, epoch_loss.csv) of the only run in `folder`."""
    runs = [path for path in (folder / "logs").glob("*") if path.is_dir()]
    assert len(runs) == 1
    return read_file(runs[0] / "last.pth"), (runs[0] / "epoch_loss.csv").read_text()


def kill_while_training(arguments, folder, after):
    """Start a run, wait until it has saved a step of its own, and `after` seconds later kill it.

    Whether it was alive then.
    """
    process = subprocess.Popen(
        arguments, cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    began, deadline = time.time_ns(), time.monotonic() + 120
    while process.poll() is None and not any(
        path.stat().st_mtime_ns > began for path in folder.glob("logs/*/last.pth")
    ):
        assert time.monotonic() < deadline, "the run saves nothing"
        time.sleep(0.005)
    time.sleep(after)
    alive = process.poll() is None
    for pid in [process.pid, *children(process.pid)]:  # torchrun's processes have process groups of their own
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    return alive


def children(parent):
    """The processes that `parent` has started, from Linux's own table."""
    with contextlib.suppress(OSError):
        return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    return []


def kill_and_compare(whole, broken, settings, processes, kills, epochs, seed=3):
    """Train in `whole` undisturbed, in `broken` with so many kills.

    Both must end bit for bit the same.
    """
    settings = [*settings, "--epochs", epochs, "--save_minutes", "0"]
    build = command if processes == 1 else lambda *arguments: torchrun(processes, *arguments)
    run(build("train.py", *settings), whole, timeout=240 + 2 * epochs)
    moments = random.Random(seed)
    for number in range(kills):
        hit = kill_while_training(
            [*build("train.py", *settings), "--resume", "latest"], broken, moments.uniform(0, 0.1)
        )
        assert hit, f"kill {number + 1} came after the end of the run"
    run([*build("train.py", *settings), "--resume", "latest"], broken, timeout=240 + 2 * epochs)
    (one, one_csv), (other, other_csv) = result(whole), result(broken)
    assert_same_state(one, other)
    assert one_csv == other_csv


def main(kills=200, seed=3):
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_pictures("datasets")
        run_main("txt_annotation.py")
        for name in ("whole", "broken"):
            Path(name).mkdir()
        settings = [*RUN, "--annotation_path", Path("train_lines.txt").resolve()]
        kill_and_compare(Path("whole"), Path("broken"), settings, 1, kills, 5 * kills, seed)
        print(
            f"{kills} kills, {5 * kills} epochs: weights, averages, moments and losses are those of the undisturbed run"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
