"""Presets, what a dry run says, and the weights of the lowest validation loss."""

import csv
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, assert_same_state, read_file, run_main, with_defaults

import train
from nets import UNet
from nets.architecture import count_flops
from utils.training import summary

NAMES = [name for name in train.PRESETS if name]


def last(folder):
    return next(Path(folder).glob("*/last.pth"))


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_goes_over_the_block_and_options_go_over_the_preset(monkeypatch, name):
    edited = with_defaults(train.Config, channel=96, epochs=7, seed=3, preset=name)
    monkeypatch.setattr(train, "Config", edited)
    values = train.PRESETS[name]
    for arguments in ([], ["--preset", name]):
        config, *_ = train.read_settings(arguments)
        assert {key: getattr(config, key) for key in values} == values
        assert (config.seed, config.preset) == (3, name)
        train.check(config)
    config, *_ = train.read_settings(["--preset", name, "--channel", "64"])
    assert config.channel == 64 and config.prediction == values["prediction"]
    config, *_ = train.read_settings(["--preset", ""])  # the block's own
    assert (config.channel, config.epochs, config.preset) == (96, 7, "")


def test_no_preset_is_the_article(monkeypatch):
    config, *_ = train.read_settings([])
    assert config == train.Config() and (config.channel, config.prediction, config.schedule) == (128, "eps", "linear")


def test_presets_are_listed_and_unknown_ones_refused(capsys):
    with pytest.raises(SystemExit):
        run_main("train.py", "--help")
    text = capsys.readouterr().out
    assert all(name in text for name in NAMES)
    with pytest.raises(SystemExit):
        run_main("train.py", "--preset", "fast")
    assert f"--preset fast: expected one of '', {', '.join(map(repr, NAMES))}" in capsys.readouterr().err


def test_a_run_keeps_what_its_preset_was(workplace, monkeypatch, capsys):
    monkeypatch.setitem(train.PRESETS, "quick", {"prediction": "v", "schedule": "cosine", "dropout": 0.0})
    constant = [*TINY, "--init_lr", "1e-3", "--min_lr", "1e-3", "--warmup", "0"]
    run_main("train.py", *constant, "--preset", "quick", "--epochs", "2", "--save_dir", "whole")
    assert "preset     quick: prediction v, schedule cosine, dropout 0.0" in capsys.readouterr().out
    run_main("train.py", *constant, "--preset", "quick", "--epochs", "1", "--save_dir", "broken")
    monkeypatch.setitem(train.PRESETS, "quick", {"prediction": "x0", "dropout": 0.5})  # a later version's
    run_main("train.py", "--resume", "latest", "--epochs", "2", "--save_dir", "broken")
    whole, broken = (read_file(last(folder)) for folder in ("whole", "broken"))
    assert_same_state(whole, broken)
    assert whole["config"]["prediction"] == "v" and whole["config"]["preset"] == "quick"
    with pytest.raises(SystemExit):
        run_main("train.py", "--resume", last("whole"), "--preset", "")
    assert "was built with preset = quick, which cannot change" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in NAMES if "steps" in train.PRESETS[name]])
def test_a_preset_of_steps_trains_and_resumes_in_whole_epochs(workplace, capsys, name):
    """Ten steps are four epochs of three; a run stopped after two ends with the same bits."""
    small = ["--channel", "8", "--input_shape", "16,16", "--batch_size", "8", "--preview_period", "0"]
    constant = ["--init_lr", "1e-3", "--min_lr", "1e-3", "--warmup", "0", "--device", "cpu"]
    run_main("train.py", "--preset", name, *small, *constant, "--steps", "10", "--save_dir", "whole")
    assert "4 epochs of 3 steps of 8, 12 steps in all" in capsys.readouterr().out
    run_main("train.py", "--preset", name, *small, *constant, "--epochs", "2", "--save_dir", "broken")
    assert "2 epochs of 3 steps" in capsys.readouterr().out  # typed epochs override the preset's steps
    run_main("train.py", "--resume", "latest", "--steps", "10", "--save_dir", "broken")
    whole, broken = (read_file(last(folder)) for folder in ("whole", "broken"))
    assert_same_state(whole, broken)
    assert whole["config"]["steps"] == 10 and whole["resolved"]["epochs"] == 4


def test_a_dry_run_says_the_time_and_changes_nothing(workplace, capsys):
    run_main("train.py", *TINY, "--epochs", "1000", "--dry_run", "True")
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith("time "))
    seconds, rest = line.split(" s a step, 3,000 steps: ")
    assert float(seconds.split()[1]) > 0 and re.fullmatch(r"\d:\d\d:\d\d", rest.split(",")[0])
    assert not Path("logs").exists() and line.endswith(" billion operations per image, forward")


@pytest.mark.parametrize(
    ("epochs", "preset", "line"),
    [
        (1000, "", "time       about 50 minutes on this CPU"),
        (4000, "", "time       about 3 hours on this CPU; `--preset quick` trains on a thousand images in minutes"),
        (4000, "quick", "time       about 3 hours on this CPU"),
    ],
)
def test_a_run_on_a_cpu_says_how_long_it_takes_before_it_begins(workplace, capsys, monkeypatch, epochs, preset, line):
    """By this clock four images take half a second. An epoch has 3 batches of 8."""
    monkeypatch.setattr(train, "train", lambda *_: None)
    monkeypatch.setattr(summary, "time", SimpleNamespace(perf_counter=iter((0, 9, 9.5)).__next__))
    run_main("train.py", "--preset", preset, *TINY, "--epochs", epochs)
    assert line in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(("epochs", "warned"), [(500, False), (501, True)])
def test_how_often_images_are_seen_is_said_and_too_often_warned_of(workplace, capsys, epochs, warned):
    run_main("train.py", *TINY, "--epochs", epochs, "--dry_run", "True")
    text = capsys.readouterr().out
    assert f"each image is seen about {epochs:,} times" in text
    assert ("--val_split 0.1" in text and "python -m utils.evaluate" in text) == warned


def test_operations_of_a_network_that_one_can_count():
    """Two for each multiplication: of all convolutions and matrices, each at its own size."""
    arguments = {
        "img_channels": 3,
        "base_channels": 8,
        "channel_mults": (1, 2),
        "num_res_blocks": 1,
        "time_emb_dim": 16,
        "num_groups": 2,
        "num_classes": 3,
        "attention_resolutions": (1,),
    }
    network, counted = UNet(**arguments), []

    def count(layer, inputs, output):
        where = output.shape[2:].numel() if output.ndim == 4 else 1
        counted.append(2 * layer.weight.numel() * where)

    for layer in network.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            layer.register_forward_hook(count)
    attention = torch.nn.functional.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "torch.nn.functional.scaled_dot_product_attention",
            lambda q, k, v: (counted.append(2 * 2 * q.shape[-2] ** 2 * q.shape[-1]), attention(q, k, v))[1],
        )
        network(torch.zeros(1, 3, 8, 12), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    assert count_flops(arguments, (8, 12)) == sum(counted)


def test_best_pth_has_the_weights_of_the_lowest_validation_loss(workplace, capsys):
    options = [*TINY, "--val_split", "0.3", "--epochs", "6", "--save_period", "1", "--init_lr", "0.02"]
    run_main("train.py", *options)
    folder = next(Path("logs").glob("*/"))
    with open(folder / "epoch_loss.csv", newline="") as file:
        rows = [(float(row["val_loss"]), int(row["epoch"])) for row in csv.DictReader(file)]
    _, epoch = min(rows)
    best, there = read_file(folder / "best.pth"), read_file(folder / f"epoch_{epoch:04d}.pth")
    for name, value in best["weights"].items():
        torch.testing.assert_close(value, there["weights"][name], rtol=0, atol=0)
    assert f"lowest after epoch {epoch}: `python predict.py --model_path" in capsys.readouterr().out
    before = (folder / "best.pth").read_bytes()
    run_main("train.py", "--resume", "latest", "--epochs", "7", "--init_lr", "0.5", "--min_lr", "0.5")
    assert (folder / "best.pth").read_bytes() == before  # a worse epoch after it changes nothing
    run_main("predict.py", "--model_path", folder / "best.pth", "--num_images", "2", "--steps", "2")
    assert f"weights: {(folder / 'best.pth').resolve()}" in capsys.readouterr().out


def test_without_a_validation_share_there_is_no_best(workplace):
    run_main("train.py", *TINY, "--epochs", "1")
    assert not list(Path("logs").glob("*/best.pth"))
