"""Steps whose gradient is not finite reach neither weights nor moments nor the average."""

import pytest
import torch
from conftest import TINY, assert_equal, newest_run, read_file, read_history, run_main

import train
from nets import GaussianDiffusion
from utils.checkpoint.integrity import save_tensors
from utils.checkpoint.saving import CheckpointWriter

RUN = [*TINY, "--epochs", "4", "--seed", "3"]  # 12 steps
BAD = (1, 4, 5, 9)


def poison(patch, values):
    """Make the pictures of the given steps {step: value} NaN or infinite.

    Returns a list that grows by the value, or None, of each step.
    """
    taken, normalize = [], train.normalize

    def poisoned(*arguments, **options):
        x, value = normalize(*arguments, **options), values.get(len(taken))
        taken.append(value)
        if value is not None:
            x[0, 0, 0, 0] = value
        return x

    patch.setattr(train, "normalize", poisoned)
    return taken


def leave_out(patch, bad_steps):
    """Tell the run to leave out these steps, by other means than its own: plain optimizer steps,
    and no flags at all.
    """
    steps, update_ema = iter(range(10**6)), GaussianDiffusion.update_ema
    now = []

    def step(optimizer, scaler, bad):
        now[:] = [next(steps)]
        if now[0] not in bad_steps:
            optimizer.step()
        optimizer.zero_grad()

    patch.setattr(train, "step_unless_bad", step)
    patch.setattr(
        GaussianDiffusion, "update_ema", lambda self, skip=None: None if now[0] in bad_steps else update_ema(self)
    )


@pytest.fixture(autouse=True)
def saves_at_each_epoch(monkeypatch):
    """However long a save takes beside these tiny epochs."""
    monkeypatch.setattr(CheckpointWriter, "is_cheap", lambda self: True)


def last(workplace):
    run = newest_run(workplace)
    return {**read_file(run / "last.pth"), "history": read_history(run)}


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "muon"])
def test_poisoned_steps_are_as_if_left_out(workplace, monkeypatch, optimizer):
    settings = [*RUN, "--optimizer_type", optimizer, "--ema_start", "2"]
    with monkeypatch.context() as patch:
        poison(patch, dict(zip(BAD, (float("nan"), float("inf"), float("-inf"), float("nan")))))
        run_main("train.py", *settings)
    poisoned = last(workplace)
    with monkeypatch.context() as patch:
        leave_out(patch, BAD)
        run_main("train.py", *settings)
    left_out = last(workplace)
    for name in ("weights", "optimizer", "ema_step"):
        assert_equal(poisoned[name], left_out[name], name)
    assert all(value.isfinite().all() for value in poisoned["weights"].values())
    assert poisoned["ema_step"] == 12 - len(BAD)
    assert [row["skipped"] for row in poisoned["history"]] == [1, 2, 0, 1]
    assert all(0 < row["loss"] < 3 and 0 < row["grad_norm"] < 100 for row in poisoned["history"])


def test_too_many_in_a_row_end_the_run_with_its_last_good_state(workplace, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        poison(patch, dict.fromkeys(range(4, 100), float("nan")))
        run_main("train.py", *RUN, "--epochs", "50", "--max_bad_steps", "5")
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert "5 steps in a row" in error and "--init_lr" in error
    state = last(workplace)
    assert all(value.isfinite().all() for value in state["weights"].values())
    assert state["position"] == {**state["position"], "epoch": 2}
    assert state["bad_in_row"] == 2


@pytest.mark.parametrize(("options", "left"), [((), 4), (("--init_lr", "1e-5"), 6)])
def test_bad_steps_before_a_stop_count_after_it(workplace, monkeypatch, capsys, options, left):
    """A run that is restarted every few steps ends too; another learning rate has a new chance."""
    with monkeypatch.context() as patch:
        poison(patch, {4: float("nan"), 5: float("nan")})
        run_main("train.py", *RUN, "--epochs", "2", "--max_bad_steps", "6")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        taken = poison(patch, dict.fromkeys(range(100), float("nan")))
        run_main("train.py", "--resume", newest_run(workplace), "--epochs", "50", *options)
    assert "6 steps in a row" in capsys.readouterr().err and len(taken) == left


def test_bad_steps_with_good_ones_between_do_not_end_it(workplace, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, dict.fromkeys([2, 3, 5, 6, 8, 9], float("nan")))
        run_main("train.py", *RUN, "--max_bad_steps", "3")
    assert sum(row["skipped"] for row in last(workplace)["history"]) == 6


def test_a_run_that_skipped_most_steps_is_not_done(workplace, monkeypatch, capsys):
    """Fewer than `max_bad_steps`: the run comes to its end, and says that its weights are none."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        poison(patch, dict.fromkeys(range(1, 8), float("nan")))
        run_main("train.py", *RUN)
    said = capsys.readouterr()
    assert end.value.code == 1 and "7 of 12 steps had NaN or infinite gradients" in said.err
    assert "--init_lr" in said.err and "done, loss" not in said.out
    with pytest.raises(SystemExit):  # nor does resuming it make it one
        run_main("train.py", "--resume", "latest")


def test_the_advice_names_only_a_file_that_is_there(workplace, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        poison(patch, dict.fromkeys(range(100), float("nan")))
        run_main("train.py", *RUN, "--max_bad_steps", "2")
    error = capsys.readouterr().err
    assert "Start again with a lower --init_lr" in error and "last.pth" not in error


@pytest.mark.parametrize(
    ("name", "value"), [("exp_avg", "nan"), ("exp_avg", "inf"), ("exp_avg_sq", "nan"), ("exp_avg_sq", "-1")]
)
def test_moments_that_make_the_weights_nan_are_refused_by_the_files_name(workplace, capsys, name, value):
    run_main("train.py", *RUN, "--epochs", "1")
    path = newest_run(workplace) / "last.pth"
    state = read_file(path)
    state["optimizer"]["state"][3][name].flatten()[0] = float(value)
    save_tensors(path, state)
    with pytest.raises(SystemExit):
        run_main("train.py", "--resume", "latest", "--epochs", "2")
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(path.relative_to(workplace)) in error and "damaged" in error and "epoch_XXXX.pth" in error


def test_weights_gone_bad_are_never_saved(workplace, monkeypatch, capsys):
    """Whatever makes the weights NaN, here a broken update, the file keeps the last good ones."""
    steps, original = iter(range(10**6)), train.step_unless_bad

    def breaking(optimizer, scaler, bad):
        original(optimizer, scaler, bad)
        if next(steps) == 6:
            optimizer.param_groups[0]["params"][0].data[0] = float("nan")

    monkeypatch.setattr(train, "step_unless_bad", breaking)
    with pytest.raises(SystemExit) as end:
        run_main("train.py", *RUN)
    said = capsys.readouterr()
    assert end.value.code == 1 and "last.pth: its weights hold NaN" in said.out
    assert "last.pth could not be written to" in said.err
    assert last(workplace)["position"]["epoch"] == 2
    assert all(value.isfinite().all() for value in last(workplace)["weights"].values())


def test_a_gradient_scaler_finding_its_factor_does_not_count_as_bad():
    from utils.training.meter import counts_as_bad

    scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=4.0)
    scaler.scale(torch.zeros(1))  # makes its tensor
    bad = torch.ones(())
    assert counts_as_bad(bad, scaler) == 0
    assert counts_as_bad(bad, torch.amp.GradScaler("cpu", enabled=False)) == 1
    scaler.update(1.0)
    assert counts_as_bad(bad, scaler) == 1


def test_a_save_that_fails_is_said_and_the_training_goes_on(workplace, monkeypatch, capsys):
    from utils.checkpoint import saving as run

    saves, original = [], run.save_checkpoint

    def full(checkpoint):
        saves.append(checkpoint.path.name)
        if len(saves) == 2:
            raise OSError(28, "No space left on device", str(checkpoint.path))
        original(checkpoint)

    monkeypatch.setattr(run, "save_checkpoint", full)
    run_main("train.py", *RUN)
    said = capsys.readouterr().out
    assert "NOT SAVED" in said and "No space left" in said
    assert last(workplace)["position"]["epoch"] == 4
