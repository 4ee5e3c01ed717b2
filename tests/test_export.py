"""python -m utils.convert: small files to give away, and files for the reference's code."""

import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import read_file

from nets import UNet, build
from nets.architecture import unet_arguments
from train import Config
from utils.checkpoint.file import load_checkpoint
from utils.checkpoint.integrity import save_tensors
from utils.convert import __main__ as convert
from utils.convert.__main__ import export_reference, export_weights
from utils.convert.diffusers_folder import export_model
from utils.errors import run_script
from utils.settings import typed_options
from utils.training.settings_schema import RUN_SETTINGS

PROJECT = Path(__file__).resolve().parents[1]
SMALL = {
    "input_shape": (8, 8),
    "channel": 32,
    "channel_mults": (1, 2),
    "num_res_blocks": 1,
    "num_timesteps": 50,
    "schedule": "cosine",
}
CLASSES = ["cats", "dogs"]
TABLES = [
    "alphas",
    "alphas_cumprod",
    "betas",
    "reciprocal_sqrt_alphas",
    "remove_noise_coeff",
    "sigma",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
]


def write_run(folder, classes=CLASSES, **settings):
    """A run's last.pth, whose average is not its network, with a training state as large as the
    weights.
    """
    config = asdict(Config(**{**SMALL, "class_conditional": bool(classes), **settings}))
    diffusion = build.from_config(config, len(classes)).eval()
    generator = torch.Generator().manual_seed(0)
    for network, scale in ((diffusion.model, 2.0), (diffusion.ema_model, 1.0)):
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = noise * scale * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3)
    weights = diffusion.state_dict()
    optimizer = {name: torch.zeros_like(value) for name, value in diffusion.model.state_dict().items()}
    save_tensors(
        folder / "last.pth",
        {
            "config": config,
            "classes": list(classes),
            "weights": weights,
            "weights_kind": "full",
            "ema_step": 7,
            "optimizer": {"state": {0: optimizer}},
            "scaler": {},
            "sums": None,
            "bad_in_row": 0,
            "position": {"epoch": 3, "images": 0, "batch_size": 1, "pictures": ""},
        },
    )
    return diffusion


def loaded(path):
    return build.from_checkpoint(load_checkpoint(path))[0]


def draw(diffusion, y=(0, 1, 2)):
    return diffusion.sample(3, "cpu", torch.tensor(y), sampler="ddim", steps=10, seeds=[1, 2, 3])


def test_the_export_draws_what_the_runs_average_draws(tmp_path):
    source = write_run(tmp_path / "run")
    export_weights(tmp_path / "run", tmp_path / "small.pth")
    expected, pictures = draw(source), draw(loaded(tmp_path / "small.pth"))
    assert (
        expected.std() > 0.2
        and (
            expected
            - source.sample(3, "cpu", torch.tensor((0, 1, 2)), use_ema=False, sampler="ddim", steps=10, seeds=[1, 2, 3])
        )
        .abs()
        .max()
        > 0.5
    )
    torch.testing.assert_close(pictures, expected, rtol=0, atol=0.05)
    assert not torch.equal(pictures, expected)  # half precision was rounded to


def test_the_export_holds_the_average_in_half_precision_and_nothing_of_the_training(tmp_path):
    source = write_run(tmp_path / "run")
    export_weights(tmp_path / "run" / "last.pth", tmp_path / "small.pth")
    exported, original = (
        torch.load(tmp_path / "small.pth", weights_only=True),
        read_file(tmp_path / "run" / "last.pth"),
    )
    about = ["classes", "config", "defaults", "format", "resolved", "weights", "weights_kind"]
    assert sorted(exported) == about
    assert exported["defaults"] == {} and exported["resolved"] == {}
    assert exported["weights_kind"] == "ema" and exported["classes"] == CLASSES
    assert exported["config"] == original["config"]
    expected = [*TABLES, *(f"ema_model.{name}" for name in source.ema_model.state_dict())]
    assert sorted(exported["weights"]) == sorted(expected)
    for name, value in exported["weights"].items():
        assert value.dtype == (torch.float32 if name in TABLES else torch.float16), name
        torch.testing.assert_close(value, source.state_dict()[name].to(value.dtype), rtol=0, atol=0)


def test_the_export_is_as_small_as_its_halves(tmp_path):
    source = write_run(tmp_path / "run")
    export_weights(tmp_path / "run", tmp_path / "small.pth")
    weights = sum(parameter.numel() for parameter in source.ema_model.parameters()) * 2
    assert weights < (tmp_path / "small.pth").stat().st_size < weights * 1.15


def test_an_export_is_exported_again_unchanged(tmp_path):
    write_run(tmp_path / "run")
    export_weights(tmp_path / "run", tmp_path / "small.pth")
    export_weights(tmp_path / "small.pth", tmp_path / "again.pth")
    first, second = (read_file(tmp_path / name) for name in ("small.pth", "again.pth"))
    torch.testing.assert_close(first.pop("weights"), second.pop("weights"), rtol=0, atol=0)
    assert first == second


def test_training_goes_on_from_an_export_with_its_average_kept(tmp_path):
    write_run(tmp_path / "run")
    export_weights(tmp_path / "run", tmp_path / "small.pth")
    exported = read_file(tmp_path / "small.pth")
    assert "position" not in exported  # a run of its own, at epoch 0
    diffusion = loaded(tmp_path / "small.pth")
    torch.testing.assert_close(diffusion.model.state_dict(), diffusion.ema_model.state_dict(), rtol=0, atol=0)


# For the reference's code


def test_the_reference_gets_all_its_keys_in_float32(tmp_path):
    source = write_run(tmp_path / "run", num_groups=32)
    export_reference(tmp_path / "run", tmp_path / "bare.pth")
    bare = torch.load(tmp_path / "bare.pth", weights_only=True)
    torch.testing.assert_close(bare, dict(source.state_dict()), rtol=0, atol=0)
    back = build.from_weights(bare, (8, 8)).eval()
    torch.testing.assert_close(draw(back), draw(source), rtol=0, atol=0)


def test_from_averages_alone_the_reference_gets_them_twice(tmp_path):
    write_run(tmp_path / "run", classes=(), num_groups=32)
    export_weights(tmp_path / "run", tmp_path / "small.pth")
    export_reference(tmp_path / "small.pth", tmp_path / "bare.pth")
    bare, small = torch.load(tmp_path / "bare.pth", weights_only=True), loaded(tmp_path / "small.pth")
    assert all(value.dtype == torch.float32 for value in bare.values())
    torch.testing.assert_close(bare, dict(small.state_dict()), rtol=0, atol=0)


def test_the_references_own_file_is_exported_too(tmp_path):
    source = build.from_config({**SMALL, "input_shape": (32, 32)})
    wrapped = {f"module.{name}": value for name, value in source.state_dict().items()}
    save_tensors(tmp_path / "published.pth", wrapped)
    export_weights(tmp_path / "published.pth", tmp_path / "small.pth")
    export_reference(tmp_path / "published.pth", tmp_path / "bare.pth")
    back = loaded(tmp_path / "small.pth")
    for name, value in source.ema_model.state_dict().items():
        torch.testing.assert_close(back.ema_model.state_dict()[name], value.half().float(), rtol=0, atol=0)
    torch.testing.assert_close(
        torch.load(tmp_path / "bare.pth", weights_only=True), dict(source.state_dict()), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prediction": "x0"}, "predicts x0"),
        ({"prediction": "v"}, "predicts v"),
        ({"num_groups": 8}, "has 8 groups in its norms.* --num_groups 32"),
    ],
)
def test_what_the_reference_would_misread_is_refused(tmp_path, settings, message):
    source = write_run(tmp_path / "run", **{"num_groups": 32, **settings})
    with pytest.raises(ValueError, match=message):
        export_reference(tmp_path / "run", tmp_path / "bare.pth")
    assert not (tmp_path / "bare.pth").exists()
    export_weights(tmp_path / "run", tmp_path / "small.pth")
    back = loaded(tmp_path / "small.pth")
    assert back.prediction == source.prediction and back.model.out_norm.num_groups == source.model.out_norm.num_groups


# What the reference's code builds by default, and what its ddpm.py sets.
THEIRS = {"channel_mults": (1, 2, 4, 8), "num_res_blocks": 3, "num_groups": 32}
THEIR_SETTINGS = {"input_shape": (32, 32), "num_timesteps": 1000, "schedule": "linear"}


def shapes_of(**settings):
    """{key: shape} of the network that train.py builds with these settings."""
    config = asdict(Config(**{**SMALL, "attention_resolutions": (1,), **THEIRS, **settings}))
    with torch.device("meta"):
        return {name: value.shape for name, value in UNet(**unet_arguments(config, 2)).state_dict().items()}


def reference_output(folder, capsys, **settings):
    """What the export prints below the sizes."""
    write_run(folder / "run", **{"classes": (), "num_groups": 32, **settings})
    capsys.readouterr()
    export_reference(folder / "run", folder / "bare.pth")
    return capsys.readouterr().out.splitlines()[1:]


def test_a_network_that_the_reference_builds_is_exported_without_a_warning(tmp_path, capsys):
    lines = reference_output(tmp_path, capsys, **THEIRS, **THEIR_SETTINGS)
    assert lines == ["settings to change in the reference's ddpm.py: channel = 32"]  # 128 is slow to test
    network = UNet(3, 32, (1, 2, 4, 8), 3, attention_resolutions=(1,))
    bare = torch.load(tmp_path / "bare.pth", weights_only=True)
    network.load_state_dict({name[6:]: value for name, value in bare.items() if name.startswith("model.")})


@pytest.mark.parametrize(
    "settings, argument, options",
    [
        (
            {"channel_mults": (1, 2, 2, 2), "num_res_blocks": 2},
            "channel_mults=(1, 2, 2, 2) instead of (1, 2, 4, 8), num_res_blocks=2 instead of 3",
            "--channel_mults 1,2,4,8 --num_res_blocks 3",
        ),
        ({"attention_resolutions": ()}, "attention_resolutions=() instead of (1,)", "--attention_resolutions 1,"),
        ({"img_channels": 1}, "img_channels=1 instead of 3", "--img_channels 3"),
        ({"classes": CLASSES}, "num_classes=3 instead of None", "--class_conditional False"),
    ],
)
def test_a_network_that_the_reference_does_not_build_gets_a_warning(tmp_path, capsys, settings, argument, options):
    line = reference_output(tmp_path, capsys, **THEIRS | THEIR_SETTINGS | settings)[0]
    assert line.startswith("warning: the reference's unchanged code cannot load these weights")
    assert f"train.py: {argument}. Or" in line and line.endswith(f": python train.py {options}")
    settings = {**settings, "class_conditional": "classes" in settings}
    settings.pop("classes", None)
    with torch.device("meta"):
        theirs = {name: value.shape for name, value in UNet(3, 32, (1, 2, 4, 8), 3).state_dict().items()}
    assert shapes_of(**settings) != theirs
    typed = typed_options(Config, RUN_SETTINGS, "", options.split())
    assert shapes_of(**settings | typed) == theirs  # the options really help


def test_the_references_settings_are_named_where_these_differ(tmp_path, capsys):
    lines = reference_output(tmp_path, capsys, **THEIRS, schedule="cosine")
    assert lines[0] == (
        "settings to change in the reference's ddpm.py: channel = 32, input_shape = (8, 8), num_timesteps = 50"
    )
    assert lines[1].startswith("the schedule is not the reference's linear one") and len(lines) == 2


def test_the_references_network_has_the_size_that_the_warning_names():
    with torch.device("meta"):
        network = UNet(3, channel_mults=(1, 2, 4, 8), num_res_blocks=3)
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 1) == 295.5


# Mistakes


def test_nothing_is_overwritten_not_even_the_run_itself(tmp_path):
    write_run(tmp_path / "run")
    before = (tmp_path / "run" / "last.pth").read_bytes()
    with pytest.raises(ValueError, match="is there already"):
        export_weights(tmp_path / "run", tmp_path / "run" / "last.pth")
    assert (tmp_path / "run" / "last.pth").read_bytes() == before


def killed_export(function, *arguments):
    """Runs an export in a process that is killed when it gives its file the final name."""
    child = os.fork()
    if child == 0:
        try:
            os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
            function(*arguments)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("format", ["weights", "reference", "diffusers", "import"])
def test_what_a_killed_export_left_goes_with_the_next_one_of_that_name(tmp_path, format):
    write_run(tmp_path / "run", classes=(), num_groups=32)
    source, target = tmp_path / "run", tmp_path / "out" / "small[1].pth"
    if format in ("diffusers", "import"):
        pytest.importorskip("diffusers")
    if format == "import":
        export_model(tmp_path / "run", tmp_path / "folder")
        source = tmp_path / "folder"
    export = convert.COMMANDS[format]
    killed_export(export, source, target)
    left = os.listdir(target.parent)
    assert len(left) == 1 and left[0].startswith(".small[1].pth.")
    other = target.parent / ".small1.pth.0123abcd.tmp"  # of another name: perhaps being written
    other.touch()
    export(source, target)
    assert sorted(os.listdir(target.parent)) == [other.name, target.name]


def test_weights_that_half_precision_cannot_hold_are_refused(tmp_path):
    source = write_run(tmp_path / "run", num_groups=32)
    source.ema_model.out_conv.bias.data[0] = 1e5
    save_tensors(
        tmp_path / "run" / "last.pth",
        {**read_file(tmp_path / "run" / "last.pth"), "weights": source.state_dict()},
    )
    with pytest.raises(ValueError, match="65504"):
        export_weights(tmp_path / "run", tmp_path / "small.pth")
    export_reference(tmp_path / "run", tmp_path / "bare.pth")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["bare.pth", "run"]


def test_weights_that_are_not_those_of_their_settings_are_refused(tmp_path):
    source = write_run(tmp_path / "run")
    weights = source.state_dict()
    del weights["ema_model.init_conv.bias"]
    save_tensors(tmp_path / "run" / "last.pth", {**read_file(tmp_path / "run" / "last.pth"), "weights": weights})
    with pytest.raises(ValueError, match="missing: ema_model.init_conv.bias"):
        export_weights(tmp_path / "run", tmp_path / "small.pth")


# The command


def test_the_command_takes_a_runs_folder_and_a_mistake_is_one_line(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "run", num_groups=32)
    command = [sys.executable, "-m", "utils.convert", "weights", tmp_path / "run", tmp_path / "out" / "small.pth"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_file(tmp_path / "out" / "small.pth")["weights_kind"] == "ema"
    monkeypatch.setattr(sys, "argv", ["convert", "reference", str(tmp_path / "run"), str(tmp_path / "bare.pth")])
    convert.main()
    assert "model.init_conv.bias" in torch.load(tmp_path / "bare.pth", weights_only=True)
    with pytest.raises(SystemExit):
        run_script(convert.main)
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'bare.pth'} is there already")
