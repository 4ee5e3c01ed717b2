"""A new run from another's weights: what the network does with the classes stays what it was."""

from pathlib import Path

import pytest
import torch
from conftest import TINY, assert_same_state, read_file, run_main, write_pictures

import train
from nets import build
from nets.architecture import change_classes
from utils.checkpoint.integrity import save_tensors

SETTINGS = {
    "input_shape": (8, 8),
    "img_channels": 3,
    "channel": 8,
    "channel_mults": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (1,),
    "num_timesteps": 20,
    "num_groups": 2,
    "prediction": "v",
}
KNOWN = ["cats", "dogs", "birds"]


def last(folder):
    """The newest checkpoint below a folder of runs."""
    return read_file(max(Path(folder).glob("*/last.pth"), key=lambda path: path.stat().st_mtime_ns))


def trained_network(config, classes):
    """A checkpoint whose EMA differs from its weights, with nothing left at zero."""
    torch.manual_seed(0)
    diffusion = build.from_config(config, len(classes)).eval()
    with torch.no_grad():
        for parameter in diffusion.parameters():
            parameter.normal_(std=0.2)
    return diffusion, {"weights": diffusion.state_dict(), "weights_kind": "full", "config": config, "classes": classes}


def carried(checkpoint, config, classes):
    """The network of `config` with the checkpoint's weights."""
    weights = change_classes(checkpoint["weights"], checkpoint["classes"], classes, config)
    diffusion = build.from_config(config, len(classes)).eval()
    build.load_weights(diffusion, weights, "ema")
    return diffusion


def outputs(diffusion, y=None):
    """What the network and its EMA predict for one batch, which must be the same."""
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([3, 17])
    y = None if y is None else torch.tensor([y, y])
    found = diffusion.ema_model(x, t, y)
    torch.testing.assert_close(diffusion.model(x, t, y), found)
    return found


def test_other_classes_keep_the_rows_of_names_that_both_have():
    config = {**SETTINGS, "class_conditional": True, "label_dropout": 0.1}
    source, checkpoint = trained_network(config, KNOWN)
    new = carried(checkpoint, config, ["dogs", "fish", "cats"])
    ema = dict(source.named_modules())["ema_model"]
    source.model.load_state_dict(ema.state_dict())
    for now, before in {0: 1, 1: 3, 2: 0, 3: 3}.items():  # fish begins as the null class
        torch.testing.assert_close(outputs(new, now), outputs(source, before))


def test_without_a_null_class_a_new_one_begins_as_the_mean():
    config = {**SETTINGS, "class_conditional": True, "label_dropout": 0.0}
    _, checkpoint = trained_network(config, KNOWN)
    weights = change_classes(checkpoint["weights"], KNOWN, ["fish"], config)
    name = "ema_model.downs.0.class_bias.weight"
    torch.testing.assert_close(weights[name][0], checkpoint["weights"][name].mean(0))


def test_a_network_without_classes_does_what_the_null_class_did():
    config = {**SETTINGS, "class_conditional": True, "label_dropout": 0.1}
    source, checkpoint = trained_network(config, KNOWN)
    new = carried(checkpoint, {**config, "class_conditional": False}, [])
    source.model.load_state_dict(source.ema_model.state_dict())
    torch.testing.assert_close(outputs(new), outputs(source, 3), rtol=1e-4, atol=1e-5)


def test_classes_of_a_network_that_had_none_change_nothing_at_first():
    config = {**SETTINGS, "class_conditional": False, "label_dropout": 0.1}
    source, checkpoint = trained_network(config, [])
    new = carried(checkpoint, {**config, "class_conditional": True}, ["a", "b"])
    source.model.load_state_dict(source.ema_model.state_dict())
    for y in range(3):
        torch.testing.assert_close(outputs(new, y), outputs(source))


@pytest.fixture
def given(tmp_path, monkeypatch):
    """A file of two classes, v and cosine. The pictures here have one class of it and a new one."""
    monkeypatch.chdir(tmp_path)
    config = {
        **SETTINGS,
        "channel": 32,
        "channel_mults": (1,),
        "attention_resolutions": (),
        "num_groups": 8,
        "schedule": "cosine",
        "class_conditional": True,
        "label_dropout": 0.1,
    }
    _, checkpoint = trained_network(config, ["even", "odd"])
    save_tensors("given.pth", {"format": 1, "ema_step": 5, **checkpoint})
    write_pictures(tmp_path / "datasets", 16, 12)
    (tmp_path / "datasets" / "odd").rename(tmp_path / "datasets" / "new")
    run_main("txt_annotation.py")
    return "given.pth"


def test_a_run_starts_from_a_file(given, capsys):
    run_main(
        "train.py",
        *TINY,
        "--start_from",
        given,
        "--input_shape",
        "12,12",
        "--class_conditional",
        "True",
        "--epochs",
        "1",
        "--init_lr",
        "0",
    )
    assert f"starting from {given}, with its network and schedule" in capsys.readouterr().out
    before, after = read_file(given), last("logs")
    assert after["config"]["prediction"] == "v" and after["config"]["schedule"] == "cosine"
    assert after["config"]["input_shape"] == (12, 12) and after["position"]["epoch"] == 1
    assert (before["classes"], after["classes"]) == (["even", "odd"], ["even", "new"])
    for name, value in after["weights"].items():
        expected = before["weights"][
            name.replace("ema_model.", "model.").replace("model.", "ema_model.")
            if name not in before["weights"] or "model." in name
            else name
        ]
        if name.endswith("class_bias.weight"):
            expected = expected[[0, 2, 2]]
        torch.testing.assert_close(value, expected, rtol=0, atol=0)


def test_a_run_that_started_from_a_file_resumes_exactly(given):
    constant = ("--init_lr", "1e-3", "--min_lr", "1e-3", "--warmup", "0")
    options = [*TINY, *constant, "--start_from", given, "--class_conditional", "True"]
    run_main("train.py", *options, "--epochs", "2", "--save_dir", "whole")
    run_main("train.py", *options, "--epochs", "1", "--save_dir", "broken")
    run_main("train.py", "--resume", "latest", "--epochs", "2", "--save_dir", "broken")
    assert_same_state(last("whole"), last("broken"))


def test_the_printed_span_of_the_ema_is_that_of_its_counter(given, capsys):
    """A new run counts from 0; where it starts from weights, the EMA has begun."""

    def said(*options):
        run_main("train.py", *TINY, "--ema_start", "20", *options)
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("EMA  "))

    dry, conditional = ("--dry_run", "True"), ("--class_conditional", "True", "--start_from", given)
    never = "never starts: ema_start is 20, and the run has 20 steps; its samples come from the last weights"
    assert said("--epochs", "10", *dry).endswith(never)
    assert said("--epochs", "20", *dry).endswith("about the last 3 of 40 steps at the end")  # (10 + 20) / 9
    assert said("--epochs", "20", *dry, *conditional).endswith(
        "about the last 6 of 40 steps at the end"
    )  # (10 + 40) / 9
    said("--epochs", "1", *conditional)
    assert said("--resume", "latest", "--epochs", "20", *dry).endswith("about the last 6 of 40 steps at the end")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--img_channels", "1"], "was built with img_channels = 3, which cannot change"),
        (["--channel", "64"], "was built with channel = 32, which cannot change"),
        (["--prediction", "eps"], "was built with prediction = v, which cannot change"),
        (["--resume", "given.pth"], "given.pth was built with start_from = '', which cannot change"),
    ],
)
def test_what_the_weights_cannot_do_is_refused_by_name(given, capsys, options, message):
    typed = [option for pair in zip(TINY[::2], TINY[1::2]) for option in pair if pair[0] != options[0]]
    with pytest.raises(SystemExit):
        run_main("train.py", *typed, "--start_from", "given.pth", *options)
    assert message in capsys.readouterr().err


def test_weights_alone_and_bare_ones_are_fine(given):
    whole = read_file(given)
    average = {
        name: value.half() if name.startswith("ema_model.") else value
        for name, value in whole["weights"].items()
        if not name.startswith("model.")
    }
    about = {name: whole[name] for name in ("format", "config", "classes")}
    save_tensors("small.pth", {**about, "weights_kind": "ema", "weights": average})
    torch.save({f"module.{name}": value for name, value in whole["weights"].items()}, "bare.pth")
    typed = [word for word in TINY if word not in ("--num_timesteps", "20")]
    for name, groups in (("small", "8"), ("bare", "32")):
        run_main("train.py", *typed, "--start_from", f"{name}.pth", "--epochs", "1", "--save_dir", name)
        started = last(name)
        assert "model.downs.0.class_bias.weight" not in started["weights"]
        assert (started["config"]["num_groups"], started["config"]["num_timesteps"]) == (int(groups), 20)


def test_the_carried_settings_are_those_of_the_weights():
    from utils.checkpoint.resume import WEIGHTS

    assert set(WEIGHTS) <= set(train.Config.__dataclass_fields__)
    assert "channel" in WEIGHTS and "prediction" in WEIGHTS and "input_shape" not in WEIGHTS


def test_a_preset_does_not_say_what_bare_weights_predict(given):
    weights = read_file(given)["weights"]
    torch.save(weights, "bare.pth")
    config, *_ = train.read_settings(["--start_from", "bare.pth", "--preset", "quick", "--channel", "32"])
    assert (config.prediction, config.schedule, config.num_groups, config.optimizer_type) == (
        "eps",
        "cosine",
        32,
        "muon",
    )
