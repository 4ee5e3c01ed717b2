"""What a run writes and survives: tables that only grow, packages that are broken, saves that
fail, signals, a second run.
"""

import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    ENVIRONMENT,
    PROJECT,
    TINY,
    command,
    newest_run,
    read_file,
    read_history,
    run,
    run_main,
    stop_at_step,
    write_pictures,
)

import train
from utils.checkpoint import saving
from utils.checkpoint.file import Checkpoint
from utils.files import TolerantWriter, atomic_write, locked
from utils.training.loss_history import LossHistory, best_saved, read_table
from utils.training.run_files import RunWriter

RUN = [*TINY, "--epochs", "2", "--seed", "1"]


def test_a_table_comes_back_to_the_letter_up_to_an_epoch(tmp_path):
    path, history = tmp_path / "epoch_loss.csv", LossHistory(tmp_path)
    for epoch in range(1, 6):
        row = {"epoch": epoch, "loss": 0.1 * epoch, "val_loss": None if epoch % 2 else 1 / 3, "step": epoch}
        history.add(row, {"epoch": epoch, "seconds": 1.0})
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines) + b"6,0.6")  # an older version was killed within a row
    LossHistory(tmp_path, read_table(path, 10))
    assert path.read_bytes() == b"".join(lines)
    history = LossHistory(tmp_path, read_table(path, 3))
    assert path.read_bytes() == b"".join(lines[:4])
    history.add({"epoch": 4, "loss": 1.0, "new": 2.0, "step": 4}, {"epoch": 4})
    assert path.read_text().splitlines()[0] == "epoch,loss,val_loss,step,new"


@pytest.mark.parametrize(
    "damage", [b"3,9,0,5", b"3,9,zero", b"3,x,0.5", b",9,0.5", b"3", b"\x00,9,0.5", b'"3,9,0.5', b"\xff,9,0.5"]
)
def test_a_damaged_table_keeps_its_rows_up_to_the_damage(tmp_path, damage):
    path = tmp_path / "epoch_loss.csv"
    path.write_bytes(b"epoch,step,loss\n1,3,0.7\n2,6,0.6\n" + damage + b"\n4,12,0.4\n")
    history = LossHistory(tmp_path, read_table(path, 9))
    assert [row["loss"] for row in history.losses] == ["0.7", "0.6"]
    history.add({"epoch": 3, "step": 9, "loss": 0.5}, {"epoch": 3, "seconds": 1.0})
    history.close()
    assert path.read_text().split() == ["epoch,step,loss", "1,3,0.7", "2,6,0.6", "3,9,0.5"]


def test_a_damaged_table_ends_no_resumed_run(workplace):
    run_main("train.py", *RUN)
    table = newest_run(workplace) / "epoch_loss.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines[:2], lines[2].replace(".", ",", 1)]))
    run_main("train.py", "--resume", "latest", "--epochs", "3")
    assert [row["epoch"] for row in read_history(newest_run(workplace))] == [1, 3]


def test_a_full_disk_costs_neither_table_a_row(tmp_path, monkeypatch):
    history = LossHistory(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        history.add({"epoch": 1, "step": 3, "loss": 0.5}, {"epoch": 1, "seconds": 1.0})
    history.add({"epoch": 2, "step": 6, "loss": 0.4}, {"epoch": 2, "seconds": 1.0})
    assert [len(read_table(tmp_path / name, 9)) for name in ("epoch_loss.csv", "speed.csv")] == [2, 2]


def test_a_validation_loss_that_is_nan_hides_no_later_one():
    losses = [{"epoch": str(epoch), "val_loss": loss} for epoch, loss in enumerate(("", "nan", "0.5", "0.6"), 1)]
    assert best_saved(losses) == (0.5, 3) and best_saved([]) == (math.inf, 0)


# The folder goes while the run writes to it


def test_a_run_whose_folder_was_renamed_says_so_once_and_makes_no_other(workplace, monkeypatch, capsys):
    end_epoch = RunWriter.end_epoch

    def renaming(self, row, *arguments):
        if row["epoch"] == 2:
            self.folder.rename(workplace / "elsewhere")
        end_epoch(self, row, *arguments)

    monkeypatch.setattr(RunWriter, "end_epoch", renaming)
    with pytest.raises(SystemExit) as end:
        run_main("train.py", *RUN, "--epochs", "3")
    said = capsys.readouterr()
    assert end.value.code == 1 and "last.pth, the curves, the tables could not be written" in said.err
    assert "NOT SAVED: last.pth" in said.out and "was removed or renamed" in said.out
    assert not list((workplace / "logs").iterdir()) and len(read_history(workplace / "elsewhere")) == 1


@pytest.mark.parametrize("writer", ["training.loss_history", "checkpoint.integrity"])
def test_a_folder_that_goes_within_a_write_is_not_made_again(workplace, monkeypatch, writer):
    """Plotting takes a second, and so may the check of large weights."""
    writes, write = [], atomic_write

    def renaming(path, *arguments, **options):
        writes.append(path)
        if len(writes) == 3:
            Path("logs").rename("elsewhere")
        return write(path, *arguments, **options)

    monkeypatch.setattr(f"utils.{writer}.atomic_write", renaming)
    with pytest.raises(SystemExit):
        run_main("train.py", *RUN, "--save_period", "1")
    assert len(writes) >= 3 and not Path("logs").exists()


def test_writes_succeed_again_once_the_folder_is_back(tmp_path):
    attempt = TolerantWriter(tmp_path / "run")
    assert not attempt("table", lambda: None) and attempt.failed == {"table"}
    (tmp_path / "run").mkdir()
    assert attempt("table", lambda: None) and not attempt.failed


# Packages that are there but broken


@pytest.mark.parametrize("package", ["matplotlib", "tensorboard"])
def test_a_broken_package_ends_no_training(tmp_path, package):
    write_pictures(tmp_path / "datasets")
    run(command("txt_annotation.py"), tmp_path)
    broken = tmp_path / "broken" / package
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise TypeError('built for another numpy')\n")
    environment = {**ENVIRONMENT, "PYTHONPATH": str(broken.parent)}
    done = subprocess.run(
        command("train.py", *RUN), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{package} is here, but fails (TypeError: built for another numpy)") == 1
    assert len(read_history(newest_run(tmp_path))) == 2


def test_a_broken_backend_of_matplotlib_is_one_line(tmp_path, monkeypatch, capsys, curves):
    history = LossHistory(tmp_path)
    history.add({"epoch": 1, "step": 1, "loss": 0.5, "loss_t1": 0.5}, {"epoch": 1, "seconds": 1.0})
    backends = pytest.importorskip("matplotlib.backends")
    monkeypatch.delattr(backends, "backend_agg", raising=False)  # where another test has imported it
    monkeypatch.delitem(sys.modules, "matplotlib.backends.backend_agg", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.backends._backend_agg", None)  # its compiled part
    history.plot(final=True)
    assert "no loss curve is plotted" in capsys.readouterr().out and not (tmp_path / "epoch_loss.png").exists()


def test_the_backend_of_a_notebook_draws_the_curve_all_the_same(tmp_path):
    write_pictures(tmp_path / "datasets")
    run(command("txt_annotation.py"), tmp_path)
    backend = "module://matplotlib_inline_nowhere.backend_inline"
    environment = {**ENVIRONMENT, "PYTHONPATH": "", "MPLBACKEND": backend}
    done = subprocess.run(
        command("train.py", *RUN), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert (newest_run(tmp_path) / "epoch_loss.png").is_file()


@pytest.mark.parametrize("method", ["add_scalar", "add_image", "close"])
def test_whatever_tensorboard_raises_later_costs_only_its_curves(tmp_path, monkeypatch, capsys, method):
    def fail(*arguments, **options):
        raise TypeError("another protobuf")

    monkeypatch.setattr(pytest.importorskip("torch.utils.tensorboard").SummaryWriter, method, fail)
    history = LossHistory(tmp_path)
    for epoch in (1, 2):
        history.add({"epoch": epoch, "step": epoch, "loss": 0.5}, {"epoch": epoch, "seconds": 1.0})
        history.log("add_image", "preview", np.zeros((2, 2, 3), np.uint8), epoch, dataformats="HWC")
    history.close()
    assert [len(read_table(tmp_path / name, 9)) for name in ("epoch_loss.csv", "speed.csv")] == [2, 2]
    assert capsys.readouterr().out.count("tensorboard is here, but fails (TypeError: another protobuf)") == 1


def test_a_curve_that_cannot_be_plotted_costs_only_itself(tmp_path, monkeypatch, capsys, curves):
    def fail(*arguments, **options):
        raise OSError("no font cache")

    monkeypatch.setattr(pytest.importorskip("matplotlib.figure").Figure, "savefig", fail)
    history = LossHistory(tmp_path)
    history.add({"epoch": 1, "step": 1, "loss": 0.5, "loss_t1": 0.5}, {"epoch": 1, "seconds": 1.0})
    history.plot(final=True)
    history.close()
    assert capsys.readouterr().out.count("no loss curve is plotted") == 1
    assert not (tmp_path / "epoch_loss.png").exists() and len(read_table(tmp_path / "epoch_loss.csv", 9)) == 1


# Saves that fail


def test_a_run_that_saved_nothing_ends_with_exit_code_1(workplace, monkeypatch, capsys):
    def full(checkpoint):
        raise OSError(28, "No space left on device", str(checkpoint.path))

    monkeypatch.setattr(saving, "save_checkpoint", full)
    with pytest.raises(SystemExit) as end:
        run_main("train.py", *RUN)
    error = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 1
    assert "epoch_0002.pth, last.pth could not be written to" in error
    assert "the epochs are done" in error


def test_a_save_that_comes_good_is_no_failure(workplace, monkeypatch):
    saves, save = [], saving.save_checkpoint

    def full_once(checkpoint):
        path = checkpoint.path
        saves.append(path.name)
        if path.name == "last.pth" and saves.count("last.pth") == 1:
            raise OSError(28, "No space left on device", str(path))
        save(checkpoint)

    monkeypatch.setattr(saving, "save_checkpoint", full_once)
    monkeypatch.setattr(saving.CheckpointWriter, "is_cheap", lambda self: True)
    run_main("train.py", *RUN)
    assert read_file(newest_run(workplace) / "last.pth")["position"]["epoch"] == 2


def validation_losses(patch, *values):
    """Has the run find these validation losses, one an epoch."""
    found = iter(values)
    patch.setattr(train, "validation_loss", lambda config, context: next(found))


def full_for(patch, *names):
    """Lets no file of these names be written."""
    save = saving.save_checkpoint

    def full(checkpoint):
        if checkpoint.path.name in names:
            raise OSError(28, "No space left on device", str(checkpoint.path))
        save(checkpoint)

    patch.setattr(saving, "save_checkpoint", full)


def test_a_missed_best_pth_is_known_after_resuming(workplace, monkeypatch, capsys):
    """What best.pth holds counts, not what it was to hold: the next better one replaces it."""
    options = [*RUN, "--val_split", "0.3", "--save_period", "1"]
    with monkeypatch.context() as patch:
        validation_losses(patch, 0.9)
        run_main("train.py", *options, "--epochs", "1")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        validation_losses(patch, 0.5)
        full_for(patch, "best.pth")
        run_main("train.py", "--resume", "latest", "--epochs", "2")
    assert "best.pth could not be written" in capsys.readouterr().err
    run = newest_run(workplace)
    assert best_epochs(run) == [1, 1]
    validation_losses(monkeypatch, 0.95, 0.7, 0.8)
    run_main("train.py", "--resume", "latest", "--epochs", "3")
    assert "lowest after epoch 1: `" in capsys.readouterr().out and best_epochs(run) == [1, 1, 1]
    run_main("train.py", "--resume", "latest", "--epochs", "5")
    assert "lowest after epoch 4: `" in capsys.readouterr().out and best_epochs(run) == [1, 1, 1, 4, 4]
    best, there = (read_file(run / name)["weights"] for name in ("best.pth", "epoch_0004.pth"))
    assert all(torch.equal(value, there[name]) for name, value in best.items())


def best_epochs(run):
    return [row["best_epoch"] for row in read_history(run)]


@pytest.mark.parametrize("change", [("--val_split", "0.5"), ("--loss_type", "l1"), ("--dropout", "0"), "deleted"])
def test_a_validation_loss_of_another_kind_is_no_lower_one(workplace, monkeypatch, change):
    """Other images or another loss: losses of before say nothing about those of now."""
    validation_losses(monkeypatch, 0.5, 0.6)
    run_main("train.py", *RUN, "--val_split", "0.3", "--epochs", "1")
    if change == "deleted":
        (newest_run(workplace) / "best.pth").unlink()
    run_main("train.py", "--resume", "latest", "--epochs", "2", *(change if change != "deleted" else ()))
    assert best_epochs(newest_run(workplace)) == ([1, 1] if change == ("--dropout", "0") else [1, 2])


def test_resuming_a_run_that_is_done_writes_what_it_lacks(workplace, monkeypatch, capsys):
    options = [*RUN, "--preview_period", "1", "--preview_steps", "1"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        full_for(patch, "epoch_0002.pth")
        patch.setattr(RunWriter, "preview", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        run_main("train.py", *options)
    assert "epoch_0002.pth, the preview could not be written" in capsys.readouterr().err
    run = newest_run(workplace)
    last = (run / "last.pth").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        full_for(patch, "epoch_0002.pth")
        run_main("train.py", "--resume", "latest")
    run_main("train.py", "--resume", "latest")
    assert (run / "epoch_0002.pth").is_file() and (run / "last.pth").read_bytes() == last
    assert (workplace / "results/train_out" / run.name / "epoch_0002.png").is_file()


def test_old_weights_of_higher_epochs_cost_no_new_ones(workplace):
    """A run that is resumed at an earlier state has them in its folder."""
    run_main("train.py", *RUN, "--epochs", "1", "--save_period", "1", "--keep_last", "2")
    run = newest_run(workplace)
    (run / "epoch_0900.pth").write_bytes((run / "epoch_0001.pth").read_bytes())
    run_main("train.py", "--resume", run, "--epochs", "4")
    names = [path.name for path in sorted(run.glob("epoch_*.pth"))]
    assert names == ["epoch_0003.pth", "epoch_0004.pth", "epoch_0900.pth"]


def test_a_resumed_run_removes_what_a_kill_left(workplace):
    options = [*RUN, "--preview_period", "1", "--preview_steps", "1"]
    run_main("train.py", *options, "--epochs", "1")
    run = newest_run(workplace)
    left = [run / ".last.pth.0123abcd.tmp", workplace / "results/train_out" / run.name / ".epoch_0001.png.0123abcd.tmp"]
    for path in left:
        path.write_bytes(b"half")
    run_main("train.py", "--resume", run, "--epochs", "2")
    assert not any(path.exists() for path in left)


FIXED = (
    "config.json",
    "epoch_loss.csv",
    "speed.csv",
    "epoch_loss.png",
    "last.pth",
    "best.pth",
    "epoch_0002.pth",
    ".lock",
)


def test_a_run_never_writes_through_a_link(workplace, curves):
    """A run's folder from someone else cannot redirect a write, of a file or of TensorBoard's."""
    run_main("train.py", *RUN, "--epochs", "1", "--val_split", "0.3")
    run, victim, elsewhere = newest_run(workplace), workplace / "victim", workplace / "elsewhere"
    elsewhere.mkdir()
    victim.write_text("mine")
    for name in FIXED:
        path, target = run / name, victim
        if name == "last.pth":  # which has to be read
            target = elsewhere.with_name("their.pth")
            path.rename(target)
        path.unlink(missing_ok=True)
        path.symlink_to(target)
    their = (workplace / "their.pth").read_bytes()
    shutil.rmtree(run / "tensorboard", ignore_errors=True)
    (run / "tensorboard").symlink_to(elsewhere, target_is_directory=True)
    previews = workplace / "results" / "train_out" / run.name
    previews.parent.mkdir(parents=True)
    previews.symlink_to(elsewhere, target_is_directory=True)
    run_main("train.py", "--resume", run, "--epochs", "2", "--preview_period", "1", "--preview_steps", "1")
    assert [path.name for path in previews.iterdir()] == ["epoch_0002.png"]
    assert victim.read_text() == "mine" and (workplace / "their.pth").read_bytes() == their
    assert not list(elsewhere.iterdir()) and not any((run / name).is_symlink() for name in FIXED)


def test_a_pipe_in_place_of_a_table_is_refused_in_a_line(workplace, capsys):
    """Reading it would wait, and it is nothing to replace."""
    run_main("train.py", *RUN, "--epochs", "1")
    run = newest_run(workplace)
    (run / "speed.csv").unlink()
    os.mkfifo(run / "speed.csv")
    with pytest.raises(SystemExit):
        run_main("train.py", "--resume", run, "--epochs", "2")
    assert "speed.csv is a device, a pipe" in capsys.readouterr().err.splitlines()[-1]


# Signals, and a second run


STARTED = []


@pytest.fixture(autouse=True)
def kill_what_was_started():
    """A test that fails leaves no training behind."""
    yield
    for process in STARTED:
        process.kill()
    STARTED.clear()


def start_training(folder, *settings, **options):
    """A training process of many epochs that has written its first last.pth."""
    arguments = command("train.py", *TINY, "--epochs", "100000", "--save_minutes", "0", *settings)
    before = set(folder.glob("logs/*/last.pth"))
    process = subprocess.Popen(
        arguments, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )
    STARTED.append(process)
    deadline = time.monotonic() + 120
    while not set(folder.glob("logs/*/last.pth")) - before:  # of this process: it handles signals now
        if time.monotonic() > deadline or process.poll() is not None:
            process.kill()  # or reading its output would wait for all of its epochs
            pytest.fail(process.stdout.read().decode())
        time.sleep(0.05)
    return process


@pytest.fixture
def listed(tmp_path):
    write_pictures(tmp_path / "datasets")
    run(command("txt_annotation.py"), tmp_path)
    return tmp_path


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP here")
def test_a_lost_terminal_saves_and_under_nohup_it_is_ignored(listed):
    # The tests themselves may run under nohup.
    process = start_training(listed, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
    process.send_signal(signal.SIGHUP)
    output = process.communicate(timeout=240)[0].decode()
    assert process.returncode == 128 + signal.SIGHUP and "stopped by SIGHUP" in output
    assert read_file(newest_run(listed) / "last.pth")["position"]

    process = start_training(listed, "--seed", "2", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)  # the first signal that it heeds decides how it ends
    output = process.communicate(timeout=240)[0].decode()
    assert process.returncode == 128 + signal.SIGTERM and "stopped by SIGTERM" in output and "SIGHUP" not in output


def test_a_training_runs_in_a_thread(workplace):
    """As a web page starts it. Signals are heard in the main thread alone: it does without."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run_main, "train.py", *TINY, "--epochs", "1").result()
    assert (newest_run(workplace) / "last.pth").is_file()


def test_a_second_training_in_the_same_folder_is_refused(listed):
    process = start_training(listed)
    folder = newest_run(listed)
    options = {"cwd": listed, "env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": 120}
    again = subprocess.run(command("train.py", "--resume", folder), **options)
    assert again.returncode == 1 and "another training writes to" in again.stderr.splitlines()[-1]
    process.kill()
    process.communicate()
    with locked(folder, "busy"):  # the end of the process freed it
        pass


def test_a_lock_refuses_another_process_only_while_it_is_held(tmp_path):
    script = f"import sys; sys.path.insert(0, {str(PROJECT)!r})\nfrom utils.files import locked\n"
    script += f"with locked({str(tmp_path)!r}, 'busy'): pass"
    with locked(tmp_path, "busy"):
        assert b"UserError: busy" in subprocess.run([sys.executable, "-c", script], capture_output=True).stderr
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


class Clock:
    """Stands in for the module `time`: a save takes 2 seconds, and nothing else any."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(saving, "time", clock)
    monkeypatch.setattr(saving, "save_checkpoint", lambda checkpoint: setattr(clock, "now", clock.now + 2))
    return clock


@pytest.fixture
def checkpoints(tmp_path, monkeypatch, clock):
    """The writer of a run's checkpoints, with a save every 10 minutes."""
    monkeypatch.setattr(saving, "images_fingerprint", lambda dataset: "")
    about = Checkpoint(tmp_path, {}, "full", {}, [])
    context = SimpleNamespace(dataset=None, about=about, diffusion=torch.nn.Linear(1, 1))
    context.diffusion.ema_step = 0
    return saving.CheckpointWriter(
        tmp_path, train.Config(save_minutes=10), context, lambda name, write: write() is None
    )


def test_other_checkpoints_do_not_put_off_last_pth(checkpoints, clock):
    """Short epochs with a best.pth each, or an epoch file, would keep it from being written."""
    assert checkpoints.write("last.pth")
    clock.now += 596
    for name in ("best.pth", "epoch_0001.pth"):
        assert checkpoints.write(name) and checkpoints.is_cheap()
    assert checkpoints.is_due()
    assert checkpoints.write("last.pth") and not checkpoints.is_due() and not checkpoints.is_cheap()


def test_a_save_at_the_end_of_an_epoch_takes_at_most_a_twentieth_of_the_time(checkpoints, clock):
    assert checkpoints.is_cheap()  # how long a save takes is not known yet
    assert checkpoints.write("last.pth")
    for seconds, cheap in ((0, False), (38, False), (3, True)):  # it took 2
        clock.now += seconds
        assert checkpoints.is_cheap() == cheap


def test_a_save_is_due_once_in_its_minutes(checkpoints, clock):
    """Other processes hear of it two steps later: until then it is not due again."""
    for seconds, due in ((599, False), (1, True), (0, False), (599, False), (1, True), (0, False)):
        clock.now += seconds
        assert checkpoints.is_due() == due


@pytest.mark.parametrize(
    ("save_dir", "command"), [("logs", "python predict.py"), ("runs", "python predict.py --model_path runs/")]
)
def test_the_end_of_a_run_names_a_command_that_draws_with_it(workplace, capsys, save_dir, command):
    run_main("train.py", *TINY, "--epochs", "1", "--save_dir", save_dir)
    named = capsys.readouterr().out.split("`")[1]
    assert named.startswith(command) and ("--model_path" in named) == (save_dir != "logs")


def test_printed_commands_can_be_copied(workplace, monkeypatch, capsys):
    """Also where the name of the folder holds what a shell acts on."""
    settings = [*RUN, "--save_dir", "my runs; it's $HOME", "--val_split", "0.3"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at_step(patch, train, 3)
        run_main("train.py", *settings)
    (resume,) = capsys.readouterr().out.split("`")[1::2]
    run_main(*shlex.split(resume)[1:])
    draw, draw_best, report = capsys.readouterr().out.split("`")[1::2]
    for words in map(shlex.split, (draw, draw_best)):
        assert words[:3] == ["python", "predict.py", "--model_path"] and Path(words[3]).exists() and len(words) == 4
    assert shlex.split(report)[:3] == ["python", "-m", "utils.report"] and Path(shlex.split(report)[3]).is_dir()
