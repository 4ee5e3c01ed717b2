"""Several processes compute what one computes."""

import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, TINY, command, newest_run, read_file, read_history, run, run_main, torchrun

from utils import distributed
from utils.errors import UserError
from utils.training.signals import StopSignal

# In float32 on every machine: in bf16 sums of another order are other sums.
RUN = [
    *TINY,
    "--epochs",
    "5",
    "--dropout",
    "0",
    "--horizontal_flip",
    "True",
    "--class_conditional",
    "True",
    "--val_split",
    "0.2",
    "--precision",
    "fp32",
]


def train_in(folder, build, *settings):
    folder.mkdir()
    output = run(build("train.py", *RUN, "--annotation_path", folder.parent / "train_lines.txt", *settings), folder)
    path = newest_run(folder)
    return {**read_file(path / "last.pth"), "history": read_history(path)}, output


def assert_close(one, other):
    """All parameters together to 1e-5 relative, each kernel and matrix to 1e-3: Adam's first steps
    are the gradient's sign, and where that is all but zero, rounding chooses it.
    """
    names = [name for name in one["weights"] if name.startswith("model.")]
    both = [torch.cat([state["weights"][name].double().flatten() for name in names]) for state in (one, other)]
    assert (both[0] - both[1]).norm() < 1e-5 * both[0].norm()
    for name in (name for name in names if one["weights"][name].ndim > 1):
        value, same = one["weights"][name].double(), other["weights"][name].double()
        assert (value - same).norm() < 1e-3 * value.norm().clamp_min(1e-2), name


def test_two_processes_compute_the_update_of_one_also_with_accumulation(workplace):
    one, _ = train_in(workplace / "one", command)
    two, output = train_in(workplace / "two", lambda *arguments: torchrun(2, *arguments))
    parts, _ = train_in(workplace / "parts", lambda *arguments: torchrun(2, *arguments), "--accumulate", "2")
    assert one["ema_step"] == 10
    assert_close(one, two)
    assert_close(one, parts)
    for other in (two, parts):
        for row, same in zip(one["history"], other["history"], strict=True):
            assert row.keys() == same.keys()
            for name, value in row.items():
                assert same[name] == pytest.approx(value, rel=1e-4), name
    assert output.count("this run writes to") == 1 and "2 processes" in output
    assert "broadcast_buffers" not in output  # deprecated in newer versions


def test_two_processes_compute_the_update_of_one_with_other_steps_and_timesteps(workplace):
    settings = ("--optimizer_type", "muon", "--timestep_sampling", "middle")
    one, _ = train_in(workplace / "one", command, *settings)
    two, _ = train_in(workplace / "two", lambda *arguments: torchrun(2, *arguments), *settings)
    assert_close(one, two)


def test_accumulation_in_one_process(workplace):
    run_main("train.py", *RUN)
    one = newest_run(workplace)
    run_main("train.py", *RUN, "--accumulate", "4")
    assert newest_run(workplace) != one
    one, parts = (read_file(folder / "last.pth") for folder in (one, newest_run(workplace)))
    assert_close(one, parts)
    assert one["weights"]["model.out_conv.weight"].any()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted as Linux tells them")
def test_no_thread_that_frees_tensors_of_python_outlives_the_script(workplace):
    """It would abort a process that ends at that moment. Only the gradients' group stays."""
    script = workplace / "counting.py"
    script.write_text(
        "import atexit, pathlib, sys, train\n"
        "from utils import distributed\n"
        "def count(when):\n"
        "    names = [path.read_text() for path in pathlib.Path('/proc/self/task').glob('*/comm')]\n"
        "    print(when, sum('gloo' in name for name in names), file=sys.stderr)\n"
        "atexit.register(count, 'at exit')\n"  # registered first, it runs last
        "leave = distributed.stop\n"
        "distributed.stop = lambda: (count('before'), leave())\n"
        "train.main()\n"
    )
    output = run(["env", f"PYTHONPATH={PROJECT}", *torchrun(2, script, *RUN, "--epochs", "1")], workplace)
    before, at_exit = ([int(count) for count in re.findall(rf"{when} (\d+)", output)] for when in ("before", "at exit"))
    assert len(before) == len(at_exit) == 2
    if not any(before):
        pytest.skip("this version of PyTorch gives its threads no names")
    assert all(0 < 2 * last <= first for first, last in zip(before, at_exit)), (before, at_exit)


def test_a_rank_that_dies_ends_the_run_with_its_error(workplace):
    script = workplace / "dying.py"
    script.write_text(
        "import sys, train\n"
        "from utils import distributed\n"
        "original, steps = train.normalize, []\n"
        "def normalize(*a, **k):\n"
        "    steps.append(1)\n"
        "    if distributed.rank() == 1 and len(steps) == 3:\n"
        "        raise RuntimeError('rank one broke')\n"
        "    return original(*a, **k)\n"
        "train.normalize = normalize\n"
        "train.main()\n"
    )
    # An absolute path: torchrun() leaves it as it is.
    output = run(["env", f"PYTHONPATH={PROJECT}", *torchrun(2, script, *RUN, "--epochs", "300")], workplace, expect=1)
    assert "rank one broke" in output


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_values_that_differ_end_all_processes(monkeypatch, rank):
    values = [{"batch_size": 8, "seed": 1}, {"batch_size": 8, "seed": 1}, {"batch_size": 8, "seed": 2}]
    monkeypatch.setattr(distributed, "gather", lambda value: values)
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    with pytest.raises((UserError, SystemExit)) as end:
        distributed.check_equal(values[rank])
    assert (rank == 0) == ("seed is 1 in process 0 and 2 in process 2" in str(end.value))
    values[2]["seed"] = 1
    distributed.check_equal(values[rank])


def forked(work, folder):
    """Two processes that run work(rank), as torchrun would start them, but quicker."""

    def process(rank):
        os.dup2(os.open(folder / f"errors_{rank}.txt", os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr, sys.stdout = open(2, "w", closefd=False), open(os.devnull, "w")  # noqa: SIM115
        os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        work(rank)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [multiprocessing.get_context("fork").Process(target=process, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    return processes


def shorten(lines):
    """The annotation file in a folder of its own, without the last image."""
    names = Path("train_classes.txt").read_text()
    os.mkdir("other")
    os.chdir("other")
    Path("train_lines.txt").write_text("".join(lines[:-1]))
    Path("train_classes.txt").write_text(names)
    return []


OWN = {  # of process 1: further options; what is said
    "settings": (lambda lines: ["--batch_size", "4"], "batch_size is 8 in process 0 and 4 in process 1"),
    "resume": (lambda lines: ["--resume", "logs/x"], "resume is '' in process 0 and 'logs/x' in process 1"),
    "images": (shorten, "the digest of the images is"),
}


@pytest.mark.skipif(os.name != "posix", reason="Windows does not fork")
@pytest.mark.parametrize("own", OWN)
def test_what_differs_by_process_ends_the_run_in_one_line(workplace, own):
    change, words = OWN[own]
    lines = Path("train_lines.txt").read_text().splitlines(keepends=True)
    processes = forked(lambda rank: run_main("train.py", *RUN, *(change(lines) if rank else [])), workplace)
    try:
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [1, 1]
    finally:
        for process in processes:
            process.kill()
    errors = "".join((workplace / f"errors_{rank}.txt").read_text() for rank in range(2)).splitlines()
    (line,) = [line for line in errors if line.startswith("error: ")]
    assert words in line
    assert not (workplace / "logs").exists()


@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGTERM")
def test_sigterm_ends_a_process_that_waits_for_another(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "GRACE", 0.5, raising=False)

    def work(rank):
        distributed.start()
        with StopSignal():
            (tmp_path / str(rank)).touch()
            if rank == 0:
                distributed.barrier()
            time.sleep(600)

    processes = forked(work, tmp_path)
    try:
        while not all((tmp_path / str(rank)).exists() for rank in range(2)):
            assert all(process.is_alive() for process in processes)
            time.sleep(0.1)
        time.sleep(0.5)  # until it waits
        os.kill(processes[0].pid, signal.SIGTERM)
        processes[0].join(240)
        assert processes[0].exitcode == 128 + signal.SIGTERM
    finally:
        for process in processes:
            process.kill()


WHOLE = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"RANK": None},
        {"RANK": ""},
        {"RANK": "first"},
        {"RANK": "2"},
        {"RANK": "-1"},
        {"WORLD_SIZE": "two"},
        {"WORLD_SIZE": "0"},
        {"LOCAL_RANK": "x"},
        {"MASTER_ADDR": None},
        {"MASTER_ADDR": ""},
        {"MASTER_PORT": None},
        {"MASTER_PORT": "99999"},
    ],
)
def test_variables_that_torchrun_would_not_leave_so_are_refused(monkeypatch, capsys, wrong):
    for name, value in {**WHOLE, **wrong}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    for script in ("train.py", "predict.py"):
        with pytest.raises(SystemExit) as end:
            run_main(script)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert end.value.code == 1 and "start with torchrun, which sets these variables" in line


@pytest.mark.parametrize("world_size", [None, "", "1"])
@pytest.mark.parametrize("launcher", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", None])
def test_another_launcher_than_torchrun_is_warned_about(monkeypatch, capsys, world_size, launcher):
    for name, value in {"WORLD_SIZE": world_size, launcher: "4"}.items():
        if name and value is not None:
            monkeypatch.setenv(name, value)
    distributed.start()
    assert distributed.world_size() == 1
    warned = f"warning: {launcher} is 4" in capsys.readouterr().out
    assert warned == (launcher is not None and world_size is None)


@pytest.mark.parametrize(
    ("cuda", "nccl", "backend"), [(True, True, "cpu:gloo,cuda:nccl"), (True, False, "gloo"), (False, True, "gloo")]
)
def test_gloo_stands_in_for_nccl_where_pytorch_has_none(monkeypatch, cuda, nccl, backend):
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda name, **_: asked.append(name))
    monkeypatch.setattr(distributed, "end_after_sigterm", lambda: None)
    monkeypatch.setattr(sys, "platform", "win32")
    distributed.start()
    assert asked == [backend]


@pytest.mark.parametrize("options", [["--local-rank=0"], ["--local_rank", "0"]])
def test_the_option_of_an_older_launcher_names_torchrun(capsys, options):
    with pytest.raises(SystemExit):
        run_main("train.py", *options)
    assert "start with torchrun instead" in capsys.readouterr().err
