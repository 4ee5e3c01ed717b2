"""Images a second that the cache gives through the DataLoader, on one core: python -m benchmarks.gather"""
import argparse
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from utils.data.annotation import Annotation
from utils.data.dataset import EpochBatches, ImageDataset, data_loader


def synthetic_dataset(folder, num_images, height, width, channels):
    """A cache of random pixels, written in pieces and memory-mapped as a real one is."""
    path, generator = Path(folder) / "pixels", np.random.default_rng(0)
    with open(path, "wb") as file:
        for start in range(0, num_images, 1000):
            file.write(generator.bytes(min(1000, num_images - start) * height * width * channels))
    pixels = np.asarray(np.memmap(path, dtype=np.uint8, mode="r", shape=(num_images, height, width, channels)))
    names = [str(i) for i in range(num_images)]
    return ImageDataset(pixels, names, Annotation(names, None, []))


def images_per_second(dataset, batch_size, epoch):
    start, images = time.perf_counter(), 0
    for pixels, _labels in data_loader(dataset, EpochBatches(len(dataset), batch_size, seed=0, epoch=epoch)):
        images += len(pixels)
    return images / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, default in (("num_images", 20_000), ("batch_size", 64), ("height", 32), ("width", 32), ("channels", 3), ("epochs", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        dataset = synthetic_dataset(folder, options.num_images, options.height, options.width, options.channels)
        rates = [images_per_second(dataset, options.batch_size, epoch) for epoch in range(options.epochs + 2)][2:]  # 2 to warm up
    print(f"{options.height}x{options.width}x{options.channels}, batches of {options.batch_size}, {options.num_images} images, "
          f"1 core, {options.epochs} epochs: median {statistics.median(rates):,.0f} images/s "
          f"(from {min(rates):,.0f} to {max(rates):,.0f})")


if __name__ == "__main__":
    main()
