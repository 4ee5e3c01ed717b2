"""A run that is stopped and resumed ends as one that never was: bit for bit, wherever and however
it was stopped.
"""

import os
import signal
import subprocess
import time

import pytest
import torch
from conftest import (
    ENVIRONMENT,
    assert_same_state,
    command,
    newest_run,
    read_file,
    read_history,
    run_main,
    stop_at_step,
    torchrun,
    with_defaults,
)
from kill_run import RUN, kill_and_compare, result

from utils import device as device_module
from utils.checkpoint.integrity import save_tensors


@pytest.fixture
def twin(workplace):
    """Two folders with the same pictures, by the same list."""
    for name in ("whole", "broken"):
        (workplace / name).mkdir()
    return workplace / "whole", workplace / "broken", ["--annotation_path", workplace / "train_lines.txt"]


@pytest.mark.parametrize(("processes", "kills", "epochs"), [(1, 5, 25), (2, 2, 16)])
def test_killed_run_ends_as_an_undisturbed_one(twin, processes, kills, epochs):
    whole, broken, pictures = twin
    kill_and_compare(whole, broken, [*RUN, *pictures], processes, kills, epochs)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signal_saves_within_the_epoch_and_resume_goes_on(twin, monkeypatch, capfd, number):
    """The signal comes in the middle of the second epoch; the step in hand is finished."""
    import train

    whole, broken, pictures = twin
    monkeypatch.chdir(whole)
    run_main("train.py", *RUN, *pictures)
    monkeypatch.chdir(broken)
    steps, normalize = [], train.normalize

    def signal_at_third_step(*arguments, **options):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), number)
        return normalize(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(train, "normalize", signal_at_third_step)
        run_main("train.py", *RUN, *pictures)
    assert end.value.code == 128 + number
    assert "--resume" in capfd.readouterr().out
    position = read_file(newest_run(broken) / "last.pth")["position"]
    assert position["epoch"] == 1 and 0 < position["images"] < 16
    run_main("train.py", "--resume", newest_run(broken))
    (one, one_csv), (other, other_csv) = result(whole), result(broken)
    assert_same_state(one, other)
    assert one_csv == other_csv


def test_second_signal_ends_at_once(tmp_path):
    """A second signal, once the first has been noticed for a second, does not wait for a step that
    hangs.
    """
    script = (
        "import time; from utils.training.signals import StopSignal\nwith StopSignal():\n"
        "    print('ready', flush=True)\n    time.sleep(600)"
    )
    process = subprocess.Popen(
        [*command("")[:1], "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=os.path.dirname(os.path.dirname(__file__)),
    )
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    while b"saving after this step" not in process.stderr.readline():  # noticed, however busy the machine is
        assert process.poll() is None
    time.sleep(1.1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=240) == 128 + signal.SIGTERM


def test_torchrun_stops_all_processes_at_one_step(twin):
    whole, broken, pictures = twin
    settings = [*RUN, *pictures, "--epochs", "200", "--save_minutes", "0"]
    process = subprocess.Popen(
        torchrun(2, "train.py", *settings),
        cwd=broken,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    while process.poll() is None and not list(broken.glob("logs/*/last.pth")):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=240)[0].decode()
    assert "resumes from here" in output, output
    stopped = read_file(newest_run(broken) / "last.pth")["position"]
    assert stopped["epoch"] < 199
    assert "command    torchrun --nproc_per_node 2 train.py" in (newest_run(broken) / "summary.txt").read_text("utf-8")
    assert len(read_file(newest_run(broken) / "last.pth")["sums"]) == 2


@pytest.mark.parametrize("epoch", [2, 4])
def test_a_changed_batch_size_begins_its_epoch_again(twin, monkeypatch, capsys, epoch):
    """The last one too, or the run would end without its row and its files."""
    import train

    _, broken, pictures = twin
    monkeypatch.chdir(broken)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at_step(patch, train, 2 * epoch - 2)  # of two steps an epoch
        run_main("train.py", *RUN, *pictures)
    assert read_file(newest_run(broken) / "last.pth")["position"]["images"] == 16 - 8
    run_main("train.py", "--resume", "latest", "--batch_size", "4")
    assert f"the batch size was 8 and is 4: epoch {epoch} begins again" in capsys.readouterr().out
    rows = read_history(newest_run(broken))
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4] and (newest_run(broken) / "epoch_0004.pth").is_file()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: lines[:-3], True),
        (lambda lines: lines[::-1], True),
        (lambda lines: [f"{1 - int(line[0])}{line[1:]}" for line in lines], True),  # the other class
        (lambda lines: lines, False),
    ],
    ids=["some gone", "another order", "other classes", "the same"],
)
def test_changed_pictures_are_said_and_not_fatal(workplace, capsys, change, said):
    run_main("train.py", *RUN, "--epochs", "1")
    lines = (workplace / "train_lines.txt").read_text().splitlines()
    (workplace / "train_lines.txt").write_text("\n".join(change(lines)) + "\n")
    run_main("train.py", "--resume", "latest", "--epochs", "2")
    assert ("the images are not those of before" in capsys.readouterr().out) == said
    assert len(read_history(newest_run(workplace))) == 2


def edited(path, change):
    """The checkpoint at `path` with `change` made to it, as another file."""
    checkpoint = read_file(path)
    change(checkpoint)
    save_tensors(path.with_name("edited.pth"), checkpoint)
    return path.with_name("edited.pth")


@pytest.mark.parametrize(
    ("built", "name", "value"),
    [(["--num_groups", "32"], "num_groups", "8"), (["--schedule", "cosine"], "schedule_shift", "0.5")],
)
def test_a_setting_that_an_older_file_does_not_know_is_what_it_was(workplace, capsys, built, name, value):
    run_main("train.py", *RUN, "--epochs", "1", *built)
    path = newest_run(workplace) / "last.pth"
    was, old = read_file(path)["config"][name], edited(path, lambda checkpoint: checkpoint["config"].pop(name))
    with pytest.raises(SystemExit):
        run_main("train.py", "--resume", old, "--epochs", "2", f"--{name}", value)
    assert f"built with {name} = {was}, which cannot change" in capsys.readouterr().err
    # what the first command may have said
    run_main("train.py", "--resume", old, "--epochs", "2", "--num_groups", "auto")
    assert read_file(newest_run(workplace) / "last.pth")["config"][name] == was


def test_the_density_of_the_timesteps_is_the_runs_own_and_may_change(twin, monkeypatch):
    """A file that does not know it is of a run without, and a run from its weights asks anew."""
    import train

    whole, broken, pictures = twin
    constant = [*pictures, "--init_lr", "1e-3", "--min_lr", "1e-3", "--warmup", "0", "--timestep_sampling", "middle"]
    for folder, epochs in ((whole, 2), (broken, 1)):
        monkeypatch.chdir(folder)
        run_main("train.py", *RUN, *constant, "--epochs", epochs)
    run_main("train.py", "--resume", "latest", "--epochs", "2")
    assert_same_state(result(whole)[0], result(broken)[0])
    assert result(broken)[0]["config"]["timestep_sampling"] == "middle"

    def read(*options):
        return train.read_settings(list(map(str, options)))[0].timestep_sampling

    path = newest_run(broken) / "last.pth"
    assert read("--resume", path, "--timestep_sampling", "logit_normal") == "logit_normal"
    assert (read("--start_from", path), read("--start_from", path, "--timestep_sampling", "middle")) == (
        "uniform",
        "middle",
    )
    old = edited(path, lambda checkpoint: checkpoint["config"].pop("timestep_sampling"))
    monkeypatch.setattr(train, "Config", with_defaults(train.Config, timestep_sampling="logit_normal"))
    assert (read("--resume", path), read("--resume", old), read("--start_from", old)) == (
        "middle",
        "uniform",
        "logit_normal",
    )


def test_a_file_of_weights_alone_starts_a_run_that_keeps_their_average(workplace, capsys):
    run_main("train.py", *RUN, "--epochs", "1", "--ema_decay", "0.9999")
    first = newest_run(workplace)
    average = read_file(first / "last.pth")["weights"]
    exported = edited(first / "epoch_0001.pth", lambda checkpoint: checkpoint.pop("ema_step"))
    capsys.readouterr()
    run_main("train.py", "--resume", exported, "--epochs", "1", "--init_lr", "0.1")
    assert "weights only: starting a new run at epoch 1" in capsys.readouterr().out
    assert newest_run(workplace) != first
    after = read_file(newest_run(workplace) / "last.pth")["weights"]
    moved = {
        kind: (after[f"{kind}.init_conv.weight"] - average[f"{kind}.init_conv.weight"]).norm()
        for kind in ("model", "ema_model")
    }
    assert 0 < moved["ema_model"] < 0.01 * moved["model"]


def test_only_typed_settings_override_the_runs_own(workplace, capsys, monkeypatch):
    """What is ignored is said: of the defaults that the user edited those that could change."""
    import train

    run_main("train.py", *RUN, "--epochs", "1")
    saved = read_file(newest_run(workplace) / "last.pth")
    assert saved["config"]["init_lr"] == saved["config"]["precision"] == "auto"
    assert saved["resolved"]["init_lr"] == 8e-4 and saved["resolved"]["precision"] in ("fp32", "bf16")
    capsys.readouterr()
    edited = with_defaults(train.Config, grad_clip=0.5, channel=64, batch_size=16, save_dir="elsewhere")
    monkeypatch.setattr(train, "Config", edited)
    run_main("train.py", "--resume", newest_run(workplace), "--epochs", "2", "--init_lr", "1e-3")
    ignored = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("ignored when resuming"))
    assert ignored.split(": ")[1] == "batch_size, grad_clip"  # channel could not change; preview_period was typed
    config = read_file(newest_run(workplace) / "last.pth")["config"]
    assert (config["epochs"], config["init_lr"], config["channel"], config["batch_size"]) == (2, 1e-3, 32, 8)


@pytest.mark.parametrize(
    "option", [("--channel", "64"), ("--schedule", "cosine"), ("--input_shape", "16,16"), ("--label_dropout", "0")]
)
def test_what_a_run_is_built_from_cannot_change(workplace, capsys, option):
    run_main("train.py", *RUN, "--epochs", "1")
    before = (newest_run(workplace) / "last.pth").read_bytes()
    with pytest.raises(SystemExit) as end:
        run_main("train.py", "--resume", "latest", *option)
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert option[0] in error and "cannot change" in error
    assert (newest_run(workplace) / "last.pth").read_bytes() == before


def test_resume_latest_without_a_run_is_a_fresh_one(workplace, capsys):
    run_main("train.py", *RUN, "--epochs", "1", "--resume", "latest")
    assert "this is a fresh run" in capsys.readouterr().out


def test_resume_latest_stops_at_a_damaged_newest_run(workplace, capsys):
    """It names the file and the ways on.

    The older run is not touched, and a path to it goes on with it.
    """
    run_main("train.py", *RUN, "--epochs", "1")
    first = newest_run(workplace)
    whole = (first / "last.pth").read_bytes()
    (workplace / "logs/later").mkdir()
    (workplace / "logs/later/last.pth").write_bytes(whole[:5000])
    with pytest.raises(SystemExit) as end:
        run_main("train.py", "--resume", "latest", "--epochs", "2")
    assert end.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "logs/later/last.pth: damaged" in line and "name another run's folder, or an epoch_XXXX.pth" in line
    assert (first / "last.pth").read_bytes() == whole
    run_main("train.py", "--resume", first, "--epochs", "2")
    assert read_file(first / "last.pth")["position"]["epoch"] == 2


def test_a_file_of_weights_only_starts_a_run_of_its_own(workplace):
    run_main("train.py", *RUN, "--epochs", "1")
    first = newest_run(workplace)
    weights = read_file(first / "epoch_0001.pth")
    assert "optimizer" not in weights
    run_main("train.py", "--resume", first / "epoch_0001.pth", "--epochs", "1")
    assert newest_run(workplace) != first
    ours = read_file(newest_run(workplace) / "last.pth")
    # Its average goes on from where it was: no first update overwrites it.
    assert ours["ema_step"] == weights["ema_step"] + 2


def test_average_and_its_counter_survive(workplace):
    run_main("train.py", *RUN, "--epochs", "2")
    checkpoint = read_file(newest_run(workplace) / "last.pth")
    assert checkpoint["ema_step"] == 4
    pairs = [
        (value, checkpoint["weights"]["ema_" + name])
        for name, value in checkpoint["weights"].items()
        if name.startswith("model.")
    ]
    assert any(not torch.equal(*pair) for pair in pairs)


def test_a_bare_state_dict_of_the_reference_goes_on(workplace, capsys):
    """Its architecture is read off its shapes, its schedule off its buffers, and its average
    counts as begun.
    """
    import numpy as np

    from nets import GaussianDiffusion, UNet

    network = UNet(3, 32, (1, 2), 1, num_classes=2, attention_resolutions=(0,))
    betas = np.linspace(1e-3, 0.3, 50)
    bare = GaussianDiffusion(network, (8, 8), 3, 2, betas).state_dict()
    bare["ema_model.init_conv.bias"] = torch.full((32,), 7.0)
    torch.save({f"module.{name}": value for name, value in bare.items()}, workplace / "reference.pth")
    run_main(
        "train.py",
        "--resume",
        "reference.pth",
        "--input_shape",
        "8,8",
        "--epochs",
        "1",
        "--batch_size",
        "8",
        "--preview_period",
        "0",
    )
    ours = read_file(newest_run(workplace) / "last.pth")
    torch.testing.assert_close(ours["weights"]["betas"], torch.tensor(betas, dtype=torch.float32))
    assert ours["ema_step"] == 2000 + 3
    assert 6.99 < float(ours["weights"]["ema_model.init_conv.bias"][0]) < 7
    assert ours["config"]["num_timesteps"] == 50 and ours["config"]["label_dropout"] == 0


def test_weights_alone_start_a_run_on_whatever_is_here(workplace, capsys):
    run_main("train.py", *RUN, "--epochs", "1", "--save_period", "1")
    weights = newest_run(workplace) / "epoch_0001.pth"
    state = read_file(weights)
    state["config"].update(device="cuda:3", precision="bf16", compile=True)
    save_tensors("weights.pth", state)
    capsys.readouterr()
    run_main("train.py", "--resume", "weights.pth", "--dry_run", "True")
    said = capsys.readouterr().out
    assert "device     cpu" in said and "compile False" in said and "the run was on" not in said


def test_numbers_that_the_processor_emulates_are_said(workplace, monkeypatch, capsys):
    monkeypatch.setattr(device_module, "cpu_has_bf16", lambda: False)
    run_main("train.py", *RUN, "--precision", "bf16", "--dry_run", "True")
    assert "this processor emulates bf16" in capsys.readouterr().out


def test_a_folder_that_lost_its_last_pth_does_not_begin_again(workplace, capsys):
    run_main("train.py", *RUN, "--epochs", "1", "--save_period", "1")
    run = newest_run(workplace)
    (run / "last.pth").unlink()
    with pytest.raises(SystemExit):
        run_main("train.py", "--resume", run)
    assert "last.pth: there is no such" in capsys.readouterr().err


def test_peak_memory_is_known_without_the_systems_line(monkeypatch):
    monkeypatch.setattr(device_module.Path, "read_text", lambda *_, **__: "Name: python")
    assert device_module.peak_memory(torch.device("cpu")) > 50
