"""Several processes compute what one computes."""

import re
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, TINY, command, newest_run, read_file, read_history, run, run_main, torchrun

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


def test_two_processes_compute_the_update_of_one_with_orthogonal_steps(workplace):
    one, _ = train_in(workplace / "one", command, "--optimizer_type", "muon")
    two, _ = train_in(workplace / "two", lambda *arguments: torchrun(2, *arguments), "--optimizer_type", "muon")
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
