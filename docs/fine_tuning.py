"""The example of docs/training.md: forty images, a few minutes from the weights in the box.

python -m docs.fine_tuning FOLDER     draws the images there (CC0), trains, and draws the figure
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import predict
import train
import txt_annotation
from docs.figures import WEIGHTS, panels
from utils.errors import run_script

COUNT, SIZE, SCALE = 40, 32, 8


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
        image = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), "white")
        house(ImageDraw.Draw(image), random)
        image.resize((SIZE, SIZE), Image.Resampling.LANCZOS).save(folder / f"house_{number:02d}.png")


def pixels(paths):
    """The images of these files as (n, 3, H, W) in [-1, 1]."""
    stacked = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2) / 127.5 - 1


def main():
    if len(sys.argv) != 2:
        raise ValueError("usage: python -m docs.fine_tuning FOLDER")
    folder = Path(sys.argv[1])
    draw_images(folder / "datasets")
    os.chdir(folder)
    txt_annotation.main([])
    began = time.monotonic()
    train.main(
        [
            "--start_from",
            str(WEIGHTS),
            "--preset",
            "quick",
            "--batch_size",
            "8",
            "--epochs",
            "100",
            "--preview_period",
            "0",
        ]
    )
    print(f"{time.monotonic() - began:.0f} seconds of training")
    predict.main(["--seed", "1", "--num_images", "8", "--individual_files", "True"])
    drawn = sorted(Path("results/predict_out").glob("seed_*.png"))
    rows = [pixels(sorted(Path("datasets").glob("*.png"))[:8]), pixels(drawn)]
    panels("fine_tuning", rows, ["given", "drawn"], [""] * 8)


if __name__ == "__main__":
    run_script(main)
