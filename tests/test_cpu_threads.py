"""The number of threads on a CPU, on machines of known speed: nothing here is really timed."""

import itertools
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, assert_same_state, newest_run, read_file, run_main, stop_at_step
from kill_run import RUN

import predict
import train
from utils import cpu_threads, distributed
from utils.cpu_threads import SpeedWatch, fastest_threads, set_threads
from utils.errors import UserError
from utils.evaluate import __main__ as evaluate

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """One of eight cores on which nobody has set the number of threads, and its clock.

    threads: what PyTorch was told last; it computes with one thread all the time.
    """
    fake = SimpleNamespace(threads=8, now=0.0)
    for name in cpu_threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: setattr(fake, "threads", number))
    monkeypatch.setattr(torch, "get_num_threads", lambda: fake.threads)
    monkeypatch.setattr(cpu_threads, "MOST", 8)
    monkeypatch.setattr(cpu_threads, "time", SimpleNamespace(perf_counter=lambda: fake.now))
    return fake


@pytest.fixture
def ideal(machine, monkeypatch):
    """A machine where the steps are real, and eight threads seem to have eight times the speed."""

    def clock():
        machine.now += 1 / machine.threads
        return machine.now

    monkeypatch.setattr(cpu_threads, "time", SimpleNamespace(perf_counter=clock))
    return machine


@pytest.mark.parametrize(
    ("most", "seconds", "best", "tried"),
    [
        (8, lambda n: 1 / n, 8, {1, 2, 4, 8}),
        (6, lambda n: 1 / n, 6, {1, 2, 4, 6}),
        (8, lambda n: 1 if n == 1 else 20, 1, {1, 2}),  # beside other programs
        (8, lambda n: 1 / n if n <= 4 else 2, 4, {1, 2, 4, 8}),  # four of eight cores are allowed
        (8, lambda n: 1 - 0.001 * n, 1, {1, 2, 4, 8}),  # threads do not help
    ],
)
@pytest.mark.parametrize("scale", [1e-3, 5.0])
def test_the_fastest_number_is_found(machine, monkeypatch, most, seconds, best, tried, scale):
    calls = []

    def step(count):
        torch.rand(3)
        assert 1 <= count <= 16
        calls.append((machine.threads, count))
        machine.now += scale * count * seconds(machine.threads)

    monkeypatch.setattr(cpu_threads, "MOST", most)
    state = torch.get_rng_state()
    fastest_threads(step, 16, 2.0)
    assert machine.threads == best
    assert torch.equal(torch.get_rng_state(), state)
    assert {number for number, _ in calls} == tried
    if scale == 1e-3:  # whole steps, until the time is over
        assert calls[-1][1] == 16 and 2 <= machine.now < 2 * 1.5
    else:  # two calls each, and no more than an image per thread
        assert len(calls) <= 2 + 2 * len(tried) and all(count <= number for number, count in calls)


def test_a_short_disturbance_does_not_decide(machine, monkeypatch):
    """Two threads take 0.6 times as long as one, but at their first turn 1.9 times."""
    turns = []

    def step(count):
        turns.append(machine.threads)
        first_turn = machine.threads == 2 and 4 not in turns
        machine.now += 0.02 * count * (1.9 if first_turn else {1: 1, 2: 0.6, 4: 1.5}[machine.threads])

    monkeypatch.setattr(cpu_threads, "MOST", 4)
    fastest_threads(step, 4, 2.0)
    assert machine.threads == 2


def test_a_change_is_one_line(machine, capsys):
    def step(count):
        machine.now += 0.1 * count * (1 if machine.threads == 1 else 1.5)

    machine.threads = 2
    fastest_threads(step, 4, 1.0)
    out = capsys.readouterr().out
    assert out.startswith("num_threads 1 is fastest now") and "100 with 1, 150 with 2, " in out and out.count("\n") == 1
    fastest_threads(step, 4, 1.0)
    assert not capsys.readouterr().out


def test_a_hopeless_number_computes_with_one_image_and_ends_the_search(machine):
    calls = []

    def step(count):
        calls.append((machine.threads, count))
        machine.now += 0.01 * count if machine.threads == 1 else 5.0 * count

    fastest_threads(step, 16, 1.0)
    assert machine.threads == 1
    assert [call for call in calls if call[0] > 1] == [(2, 1)] * 2


@pytest.mark.parametrize(
    ("asked", "there", "kept", "number", "said"),
    [
        ("auto", {}, None, 4, ""),
        ("auto", {"OMP_NUM_THREADS": "3"}, None, 8, ""),  # 8 is what PyTorch made of it
        ("auto", {"MKL_NUM_THREADS": "3"}, None, 8, ""),
        ("auto", {"device": torch.device("cuda")}, None, 8, ""),
        ("auto", {"processes": 2}, None, 8, ""),
        (3, {}, None, 3, ""),
        (3, {"OMP_NUM_THREADS": "1"}, None, 3, ""),
        ("auto", {}, 2, 2, "the run computes with 2 threads, as before"),
        ("auto", {}, 16, 4, "the run computes with 4 threads, before 16: the last bits of its results change"),
        ("auto", {"OMP_NUM_THREADS": "8"}, 1, 8, "8 threads, before 1: the last bits"),
    ],
)
def test_who_decides(machine, monkeypatch, capsys, asked, there, kept, number, said):
    for name in cpu_threads.VARIABLES & there.keys():
        monkeypatch.setenv(name, there[name])
    monkeypatch.setattr(distributed, "world_size", lambda: there.get("processes", 1))
    monkeypatch.setattr(cpu_threads, "fastest_threads", lambda *_: torch.set_num_threads(4))
    assert set_threads(asked, there.get("device", CPU), print, 8, kept=kept) == number == machine.threads
    out = capsys.readouterr().out
    assert said in out and out.count("\n") == bool(said)


def test_a_speed_that_changes_is_noticed_once(machine):
    watch = SpeedWatch()

    def run(seconds_per_step, seconds, between=0.0):
        changes, end = 0, machine.now + seconds
        while machine.now < end:
            machine.now += seconds_per_step + between
            changes += watch.changed(seconds_per_step)
        return changes

    assert run(0.1, 60) == 0
    assert run(5.0, 5) == 0  # one slow step
    assert run(0.1, 60, between=0.5) == 0  # previews and saves do not count
    assert run(0.15, 60) == 0
    assert run(0.25, 200) == 1
    assert run(0.1, 200) == 1
    assert run(20.0, 200) == 1  # longer than what is compared


def test_timing_leaves_no_trace_in_a_run(workplace, ideal, monkeypatch):
    """Timed before the first step and after two others, with dropout: the same bits as without."""
    runs, looks = [], itertools.count(1)
    monkeypatch.setattr(SpeedWatch, "changed", lambda self, seconds: next(looks) in (2, 5))
    for asked in ("auto", 1):
        run_main("train.py", *RUN, "--epochs", "3", "--accumulate", "2", "--num_threads", asked)
        runs.append(read_file(newest_run(workplace) / "last.pth"))
    assert_same_state(*runs)
    assert [run["resolved"]["num_threads"] for run in runs] == [8, 1]


def stopped_run(monkeypatch, numbers):
    """A run that found numbers[0], and the next after its second step; stopped after the third."""
    found, looks = iter(numbers), itertools.count(1)
    monkeypatch.setattr(cpu_threads, "fastest_threads", lambda *_: torch.set_num_threads(next(found)))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(SpeedWatch, "changed", lambda self, seconds: next(looks) == 2 and len(numbers) > 1)
        stop_at_step(patch, train, 2)
        run_main("train.py", *TINY, "--epochs", "3")
    return read_file(newest_run(os.getcwd()) / "last.pth")


@pytest.mark.parametrize("numbers", [[4], [4, 2]])
def test_a_run_keeps_what_it_found_apart_from_what_was_asked(workplace, machine, monkeypatch, numbers):
    saved = stopped_run(monkeypatch, numbers)
    assert (saved["config"]["num_threads"], saved["resolved"]["num_threads"]) == ("auto", numbers[-1])


@pytest.mark.parametrize(
    ("options", "asked", "number", "said"),
    [
        ((), "auto", 4, "4 threads, as before"),
        (("--num_threads", "auto"), "auto", 2, ""),
        (("--num_threads", "3"), 3, 3, ""),
    ],
)
def test_a_resumed_run_keeps_its_number_unless_one_is_typed(
    workplace, machine, monkeypatch, capsys, options, asked, number, said
):
    stopped_run(monkeypatch, [4])
    capsys.readouterr()
    monkeypatch.setattr(cpu_threads, "fastest_threads", lambda *_: torch.set_num_threads(2))
    run_main("train.py", "--resume", "latest", *options)
    out = capsys.readouterr().out
    assert said in out and bool(said) == ("the run computes with" in out) and f"cpu ({number} threads)" in out
    saved = read_file(newest_run(workplace) / "last.pth")
    assert (saved["config"]["num_threads"], saved["resolved"]["num_threads"]) == (asked, number)


def test_commands_that_sample_time_the_network(workplace, ideal, capsys):
    run_main("train.py", *TINY, "--epochs", "1", "--class_conditional", "True", "--num_threads", "1")
    arguments = ["--device", "cpu", "--steps", "2", "--seed", "1", "--num_threads"]
    images = []
    for asked in ("1", "auto"):
        capsys.readouterr()
        predict.main([*arguments, asked, "--save_dir", asked])
        out = capsys.readouterr().out
        assert ("num_threads 8 is fastest now" in out) == (asked == "auto") and f"cpu ({ideal.threads} thread" in out
        images.append([path.read_bytes() for path in sorted((workplace / asked).glob("*.png"))])
        ideal.threads = 1
    assert images[0] and images[0] == images[1]
    compared = ["--distances", "False", "--num_images", "8", "--batch_size", "4"]
    evaluate.main([*arguments, "auto", *compared])
    assert ideal.threads == 8
    evaluate.main([*arguments, "auto", *compared, "--samples", "datasets"])  # no network
    assert ideal.threads == 8


@pytest.mark.parametrize("value", ["0", "1025", "all"])
def test_a_number_out_of_range_is_refused(value):
    for main in (train.main, predict.main, evaluate.main):
        with pytest.raises(UserError, match="a whole number from 1 to 1024 or 'auto'"):
            main(["--num_threads", value])
