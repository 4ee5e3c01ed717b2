"""Choosing device, precision and compiling, as machines with GPUs would answer."""

import os
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, newest_run, run_main

import train
from utils import device, distributed
from utils.checkpoint import resume
from utils.errors import UserError

CUDA = torch.device("cuda", 0)
NO_KERNEL = "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be"


@pytest.fixture
def gpu(monkeypatch):
    """torch.cuda as with one GPU that takes a tensor of ones."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "ones", lambda *shape, device: torch.zeros(1))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    return monkeypatch


@pytest.mark.parametrize(
    "version, tool, hidden, said",
    [
        (None, "nvidia-smi", {}, "was built without CUDA"),
        ("13.0", "nvidia-smi", {}, "needs a newer driver for its CUDA 13.0"),
        (None, None, {}, ""),
        (None, "nvidia-smi", {"CUDA_VISIBLE_DEVICES": ""}, ""),
    ],
)
def test_an_nvidia_gpu_that_pytorch_does_not_see_is_said(monkeypatch, capsys, version, tool, hidden, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(device.shutil, "which", lambda name: tool)
    monkeypatch.setattr(os, "environ", hidden)
    assert device.choose_device("auto").type == "cpu"
    out = capsys.readouterr().out
    assert said in out and bool(said) == ("https://pytorch.org" in out) and out.count("\n") == bool(said)
    device.choose_device("cpu")
    assert not capsys.readouterr().out  # as asked
    with pytest.raises(UserError, match=said or "PyTorch finds no such GPU here"):
        device.choose_device("cuda")


def test_a_gpu_without_kernels_is_passed_over_or_refused_in_a_line(gpu, capsys):
    def fail(*shape, device):
        raise RuntimeError(NO_KERNEL)

    assert device.choose_device("auto") == CUDA
    gpu.setattr(torch, "ones", fail)
    assert device.choose_device("auto").type == "cpu"
    said = capsys.readouterr().out
    assert "cuda:0 does not work" in said and "no kernel image" in said and said.count("\n") == 1
    for name, processes in (("cuda", 1), ("cuda:0", 1), ("auto", 2)):  # of several processes none may go elsewhere
        with pytest.raises(UserError, match="no kernel image"):
            device.choose_device(name, 0, processes)


@pytest.mark.parametrize(
    "capability, best, warning",
    [((6, 1), "fp16", True), ((7, 5), "fp16", True), ((8, 0), "bf16", False), ((9, 0), "bf16", False)],
)
def test_bf16_is_for_gpus_that_have_it(gpu, capsys, capability, best, warning):
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert device.choose_precision("auto", CUDA) == best and not capsys.readouterr().out
    assert device.choose_precision("bf16", CUDA) == "bf16"
    assert ("this GPU emulates bf16" in capsys.readouterr().out) == warning


@pytest.mark.parametrize(
    "setting, kind, steps, expected",
    [
        ("auto", "cuda", device.STEPS_WORTH_COMPILING, True),
        ("auto", "cuda", device.STEPS_WORTH_COMPILING - 1, False),
        ("auto", "cpu", 10**6, False),
        (True, "cuda", 1, True),
        (True, "cpu", 1, True),
        (False, "cuda", 10**6, False),
    ],
)
def test_auto_compiles_where_it_pays(gpu, capsys, setting, kind, steps, expected):
    gpu.setattr(torch, "compile", lambda function: function)
    assert device.choose_compile(setting, torch.device(kind), steps) is expected
    assert ("compiles the network: a minute or more" in capsys.readouterr().out) == expected


def test_the_steps_that_are_left_decide_about_compiling(workplace, monkeypatch):
    asked = []
    monkeypatch.setattr(train, "choose_compile", lambda *arguments: asked.append(arguments) or False)
    run_main("train.py", *TINY, "--epochs", 2)
    run_main("train.py", "--resume", newest_run(workplace), "--epochs", 7)
    assert [(setting, steps) for setting, _, steps in asked] == [("auto", 2 * 3), ("auto", 5 * 3)]


@pytest.mark.parametrize("given, there", [({}, "expandable_segments:True"), ({"PYTORCH_ALLOC_CONF": "x"}, None)])
def test_the_allocator_leaves_no_gaps_unless_the_user_sets_it(monkeypatch, given, there):
    monkeypatch.setattr(os, "environ", dict(given))
    monkeypatch.setattr(device.sys, "platform", "linux")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    device.choose_device("cpu")
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == there


@pytest.mark.parametrize("saved, processes, kept", [("cuda:0", 1, True), ("cuda:0", 2, False), ("cuda:1", 1, False)])
def test_a_run_of_one_gpu_resumes_on_another_and_under_torchrun(gpu, capsys, saved, processes, kept):
    checkpoint = SimpleNamespace(training=True, config={"device": saved, "precision": "bf16", "compile": True})
    gpu.setattr(distributed, "world_size", lambda: processes)
    chosen = resume.machine(checkpoint, {})
    assert chosen == ({} if kept else {"device": "auto", "precision": "auto", "compile": "auto"})
    assert (f"the run was on {saved}" in capsys.readouterr().out) == (not kept)
