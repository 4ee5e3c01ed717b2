"""A run's folder of the first version of the format: it loads, resumes and samples as the code
that wrote it.

tests/data/old_run holds its last.pth after one epoch (packed by xz), and what that code's own three
further epochs and its `predict.py --seed 1 --num_images 4 --guidance_scale 2 --steps 10` gave.
"""

import json
import lzma
from pathlib import Path

import numpy as np
import pytest
from conftest import read_file, read_history, run_main
from PIL import Image

OLD = Path(__file__).parent / "data" / "old_run"


@pytest.fixture
def old_run(workplace):
    """(its folder, what was measured then) in a workplace with the same 24 images."""
    folder = workplace / "logs" / "2026_01_01_00_00_00"
    folder.mkdir(parents=True)
    (folder / "last.pth").write_bytes(lzma.decompress((OLD / "last.pth.xz").read_bytes()))
    (folder / "config.json").write_bytes((OLD / "config.json").read_bytes())
    return folder, json.loads((OLD / "expected.json").read_text())


def test_an_old_run_resumes_and_samples_as_it_did(old_run):
    folder, expected = old_run
    run_main("train.py", "--resume", folder, "--epochs", "4")
    state = read_file(folder / "last.pth")
    ema = sum(
        value.double().abs().sum().item() for name, value in state["weights"].items() if name.startswith("ema_model")
    )
    assert ema == pytest.approx(expected["ema_sum"], rel=1e-6)
    for row, then in zip(read_history(folder), expected["history"], strict=True):
        assert row == pytest.approx(then, rel=1e-4)
    run_main(
        "predict.py",
        "--seed",
        "1",
        "--num_images",
        "4",
        "--guidance_scale",
        "2",
        "--steps",
        "10",
        "--device",
        "cpu",
        "--spacing",
        "logsnr",
    )  # the default then
    pixels = np.asarray(Image.open("results/predict_out/predict_1x1_results.png")).astype(int)
    assert np.abs(pixels - np.array(expected["picture"])).max() <= 1


def test_an_old_run_samples_before_it_is_resumed(old_run):
    run_main("predict.py", "--seed", "1", "--num_images", "2", "--steps", "5", "--device", "cpu")
    assert Path("results/predict_out/predict_5x5_results.png").is_file()
