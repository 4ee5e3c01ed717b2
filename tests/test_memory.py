"""Running out of memory, and what saves it."""

import pytest
import torch
from conftest import TINY, run_main

import predict
import train
from utils.errors import explain_out_of_memory, is_out_of_memory
from utils.training import memory
from utils.training.memory import accumulate_that_fits

SMALL = {
    "input_shape": (8, 8),
    "channel": 32,
    "channel_mults": (1, 2),
    "num_res_blocks": 1,
    "batch_size": 8,
    "dropout": 0.5,
}


@pytest.fixture
def parts(workplace):
    """(config, parts) of a small job on the 24 images of the workplace."""

    def make(**settings):
        asked = train.Config(**{**SMALL, "device": "cpu", "precision": "fp32", "compile": False, **settings})
        config, device = train.resolve(asked)
        return config, train.prepare(config, device, None, train.saved_settings(asked, config, []))

    return make


def gradients(_, parts):
    parts.diffusion.train()
    generator = torch.Generator().manual_seed(0)
    # a fresh network's branches end in zeros, which let no gradient through
    for parameter in parts.diffusion.model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    x, t = torch.linspace(-1, 1, 4 * 3 * 64).view(4, 3, 8, 8), torch.tensor([0, 10, 500, 999])
    torch.manual_seed(1)
    parts.diffusion(x, t=t, noise=x.flip(0)).backward()
    return [parameter.grad for parameter in parts.diffusion.model.parameters()]


def test_the_setting_for_checkpointing_reaches_the_network_and_leaves_the_gradients_equal(parts):
    plain, saving = parts(), parts(activation_checkpointing=True)
    assert saving[1].diffusion.model.activation_checkpointing and not plain[1].diffusion.model.activation_checkpointing
    expected = gradients(*plain)
    assert sum(grad.abs().max() > 0 for grad in expected) > 0.9 * len(expected)
    for one, other in zip(expected, gradients(*saving)):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:116] DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 8 bytes"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
    ],
)
def test_memory_errors_of_all_devices_are_known(error):
    assert is_out_of_memory(error)


def test_other_errors_pass_unchanged():
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError) as raised, explain_out_of_memory(lambda: "not asked for"):
        raise error
    assert raised.value is error


def test_training_out_of_memory_is_a_line_with_the_settings_and_what_would_fit(parts, monkeypatch):
    config, built = parts()
    _, fixed, per_image = memory.memory_needs(config, built)
    monkeypatch.setattr(memory, "device_memory", lambda device: (fixed + 2.5 * per_image) / memory.USABLE)

    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(ValueError) as raised, explain_out_of_memory(lambda: memory.advice_for_training(config, built)):
        fail()
    text = str(raised.value)
    assert "\n" not in text and text.startswith("out of memory: training on 8 images at a time needs about")
    assert "--accumulate 4 would fit" in text  # 2 images at a time
    for setting in ("--activation_checkpointing True", "--batch_size", "--channel", "--input_shape"):
        assert setting in text


def test_a_system_that_does_not_tell_its_memory_is_not_said_to_have_none(parts, monkeypatch):
    config, built = parts()
    monkeypatch.setattr(memory, "device_memory", lambda device: 0)  # Windows
    text = memory.advice_for_training(config, built)
    assert "MiB; raise --accumulate" in text and " in all" not in text


def test_where_the_estimate_runs_out_of_memory_too_the_settings_are_named_still(parts, monkeypatch):
    config, built = parts()

    def fail(*arguments):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(memory, "memory_needs", fail)
    assert "--accumulate" in memory.advice_for_training(config, built)


@pytest.mark.parametrize(
    "images, share, now, expected",
    [(16, 64, 1, 4), (15, 64, 1, 8), (16, 32, 1, 2), (1, 12, 2, 12), (0.5, 64, 1, None), (5, 64, 8, 16), (3, 3, 1, 3)],
)
def test_the_parts_of_a_batch_that_fit(images, share, now, expected):
    assert accumulate_that_fits(images, share, now) == expected


def test_train_and_predict_end_in_the_line(workplace, monkeypatch, capsys):
    from utils.errors import run_script

    def fail(*arguments, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    options = [
        "--input_shape",
        "8,8",
        "--channel",
        "32",
        "--channel_mults",
        "1,",
        "--num_res_blocks",
        "1",
        "--attention_resolutions",
        "()",
        "--batch_size",
        "8",
        "--device",
        "cpu",
        "--preview_period",
        "0",
    ]
    monkeypatch.setattr("sys.argv", ["train.py", *options, "--epochs", "1"])
    train.main()
    capsys.readouterr()
    monkeypatch.setattr("nets.diffusion.GaussianDiffusion.forward", fail)
    monkeypatch.setattr("nets.diffusion.GaussianDiffusion.sample_steps", fail)
    for script, arguments in (
        (train, [*options, "--epochs", "1"]),
        (predict, ["--device", "cpu", "--seed", "1", "--batch_size", "6"]),
    ):
        monkeypatch.setattr("sys.argv", ["script.py", *arguments])
        with pytest.raises(SystemExit) as raised:
            run_script(script.main)
        error = capsys.readouterr().err.splitlines()[-1]
        assert raised.value.code == 1 and error.startswith("error: out of memory"), error
        assert "--batch_size" in error
    assert "--batch_size 3 needs about half" in error


@pytest.mark.parametrize("settings", [("--channel", "32768"), ("--num_res_blocks", "1024", "--channel", "2048")])
def test_a_network_that_no_memory_holds_is_refused_before_it_is_built(workplace, capsys, settings):
    with pytest.raises(SystemExit) as end:
        run_main("train.py", *TINY, "--num_groups", "1", *settings, "--dry_run", "True")
    assert end.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: a network of") and "lower --channel" in error
