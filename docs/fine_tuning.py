"""The example of docs/training.md: fine-tunes the bundled checkpoint on forty images, in minutes.

    python -m docs.fine_tuning --folder results/fine_tuning

It draws the images there (CC0), trains, samples, and makes the figure.
"""

import os
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import predict
import train
import txt_annotation
from docs.figures import SIZE, WEIGHTS, panels
from utils.errors import run_script
from utils.settings import parse, settings, text

COUNT, UNITS, SCALE = 40, 32, 8  # a house is described in 32x32 units, and drawn in 8x8 pixels each


def house(draw, random):
    """A house: a wall, a roof, a door and a window, in random colors and sizes."""
    color = lambda: tuple(int(value) for value in random.integers(40, 230, 3))  # noqa: E731
    left, right, top = (int(random.integers(low, low + 5)) for low in (3, 24, 12))
    wall, roof, door = color(), color(), color()
    draw.rectangle([left * SCALE, top * SCALE, right * SCALE, 29 * SCALE], fill=wall)
    middle = (left + right) / 2 + random.uniform(-2, 2)
    corners = ((left - 2, top), (right + 2, top), (middle, 3))
    draw.polygon([(x * SCALE, y * SCALE) for x, y in corners], fill=roof)
    place = int(random.integers(left + 2, right - 6))
    draw.rectangle([place * SCALE, 21 * SCALE, (place + 4) * SCALE, 29 * SCALE], fill=door)
    window = right - 6 if place < (left + right) / 2 - 2 else left + 2
    draw.rectangle([window * SCALE, (top + 2) * SCALE, (window + 4) * SCALE, (top + 6) * SCALE], fill=(190, 225, 250))


def draw_images(folder):
    """COUNT images of houses on white."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(COUNT):
        image = Image.new("RGB", (UNITS * SCALE, UNITS * SCALE), "white")
        house(ImageDraw.Draw(image), random)
        image.resize(SIZE, Image.Resampling.LANCZOS).save(folder / f"house_{number:02d}.png")


def pixels(paths):
    """The images of these files as (n, 3, H, W) in [-1, 1]."""
    stacked = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2) / 127.5 - 1


@settings
class Config:
    folder: str = "results/fine_tuning"  # where the images and the run are written


SETTINGS = {"folder": text()}


def main(arguments=None):
    folder = Path(parse(Config, SETTINGS, __doc__, arguments).folder)
    draw_images(folder / "datasets")
    os.chdir(folder)
    txt_annotation.main([])
    began = time.monotonic()
    options = {"start_from": WEIGHTS, "input_shape": SIZE, "preset": "quick", "batch_size": 8, "epochs": 100}
    options |= {"preview_period": 0}
    train.main([f"--{name}={value}" for name, value in options.items()])
    print(f"{time.monotonic() - began:.0f} seconds of training")
    predict.main(["--seed", "1", "--num_images", "8", "--individual_files", "True"])
    samples = sorted(Path("results/predict_out").glob("seed_*.png"))
    rows = [pixels(sorted(Path("datasets").glob("*.png"))[:8]), pixels(samples)]
    panels("fine_tuning", rows, ["given", "sampled"], [""] * 8)


if __name__ == "__main__":
    run_script(main)
