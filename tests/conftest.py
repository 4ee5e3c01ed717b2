"""What the tests share: tiny pictures, and the scripts run as a user runs them."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utils.training.loss_history import LossHistory

PROJECT = Path(__file__).resolve().parent.parent
# One thread: several would wait for each other wherever the machine does something else beside the
# tests. And no matplotlib: it takes nearly half the time of a short run.
os.environ["OMP_NUM_THREADS"] = "1"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PROJECT / "tests/data/without_curves")}
torch.set_num_threads(1)

# The smallest network that has all kinds of blocks.
TINY = (
    *(
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
    ),
    *("--num_timesteps", "20", "--batch_size", "8", "--preview_period", "0", "--ema_start", "3", "--device", "cpu"),
)
# predict.py's options for one image in one step, the same on every machine.
ONE_SAMPLE = [
    "--device",
    "cpu",
    "--precision",
    "fp32",
    "--num_images",
    "1",
    "--batch_size",
    "1",
    "--steps",
    "1",
    "--seed",
    "1",
]


def write_pictures(folder, count=24, size=8, seed=0):
    """`count` noisy PNGs in two class folders."""
    generator = np.random.default_rng(seed)
    for number in range(count):
        path = Path(folder) / ("even" if number % 2 == 0 else "odd") / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def curves():
    """For a test that wants epoch_loss.png to be drawn."""


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """Within this process too, matplotlib draws only for tests of the curves."""
    if "curves" not in request.fixturenames:
        monkeypatch.setattr(LossHistory, "plot", lambda self, final=False: None)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to work in, with 24 tiny pictures and their list."""
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "datasets")
    run_main("txt_annotation.py")
    return tmp_path


def load_as(path, *format_values, **more):
    """`load_image` of a file in the ImageFormat of these values."""
    from utils.data.decode import load_image
    from utils.data.image_format import ImageFormat

    return load_image(path, ImageFormat(*format_values, **more))


def command(script, *arguments):
    return [sys.executable, str(PROJECT / script), *map(str, arguments)]


def torchrun(processes, script, *arguments):
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
        str(PROJECT / script),
        *map(str, arguments),
    ]


def run(arguments, cwd, expect=0, timeout=240):
    """Run a command to its end and return what it printed.

    Fails with its output if it ends with another code.
    """
    done = subprocess.run(arguments, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == expect, f"exit code {done.returncode}, not {expect}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def run_main(script, *arguments):
    """Run a script's main() in this process, in the current folder.

    Much quicker than a process of its own.
    """
    import importlib

    from utils.errors import run_script

    module = importlib.import_module(Path(script).stem)
    before = sys.argv
    sys.argv = [script, *map(str, arguments)]
    try:
        run_script(module.main)
    finally:
        sys.argv = before


def stop_at_step(patch, train, number):
    """Send SIGTERM to this process in the `number`-th step."""
    steps, normalize = [], train.normalize

    def noticing(*arguments, **options):
        steps.append(1)
        if len(steps) == number + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return normalize(*arguments, **options)

    patch.setattr(train, "normalize", noticing)


def with_defaults(config_class, **values):
    """A script's Config as a user edits it: with other defaults."""
    from utils.settings import settings

    return settings(type("Config", (), {**vars(config_class), **values}))


class OnMps(torch.Tensor):
    """A tensor of the CPU that says it is on Apple's GPU, and has no float64 as tensors there."""

    device = property(lambda self: torch.device("mps"))

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")


def randomize(network, seed=0):
    """Zero-initialised layers hide what flows through them: give every parameter a value."""
    generator = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        p.data = torch.randn(p.shape, generator=generator) * (0.1 if p.ndim < 2 else (p.numel() / p.shape[0]) ** -0.5)
    return network


def read_file(path):
    """What the file of a checkpoint holds, as the dict that was saved."""
    return torch.load(path, map_location="cpu", weights_only=True)


def newest_run(folder):
    runs = [path for path in (Path(folder) / "logs").glob("*") if path.is_dir()]
    return max(runs, key=lambda path: path.stat().st_mtime_ns)


def read_history(run):
    """The rows of a run's epoch_loss.csv: [{column: number or None}]."""
    with open(Path(run) / "epoch_loss.csv", encoding="utf-8", newline="") as file:
        return [{name: float(value) if value else None for name, value in row.items()} for row in csv.DictReader(file)]


def assert_same_state(one, other):
    """Two checkpoints agree bit for bit in weights, averages, moments and counters."""
    for name in ("weights", "optimizer", "scaler", "ema_step", "position", "bad_in_row"):
        assert_equal(one[name], other[name], name)


def assert_equal(one, other, name):
    assert type(one) is type(other), name
    if isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one:
            assert_equal(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), name
        for index, pair in enumerate(zip(one, other)):
            assert_equal(*pair, f"{name}[{index}]")
    elif torch.is_tensor(one):
        assert torch.equal(one, other), name
    else:
        assert one == other, name
