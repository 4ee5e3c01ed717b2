"""Features of image sets for FID, KID, precision and recall, computed in one pass and cached."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from utils.data.cache import cache_folders, writable_folder
from utils.data.dataset import split_validation
from utils.errors import UserError
from utils.evaluate.classifier import load_feature_net, save_feature_net, train_feature_net
from utils.evaluate.distances import FeatureStatistics
from utils.evaluate.inception import load_inception
from utils.files import atomic_write
from utils.torch_files import load_tensors

CACHE_VERSION = 1  # part of the keys: raise it when features or their files change
KEPT_FILES = 16  # statistics and classifiers in the cache


class Extractor:
    """Images (b, H, W, C) uint8 -> features (b, d) float32 on the CPU, batch_size images at a time.

    network: takes (b, C, H, W) uint8. name: for people. key: changes with the features.
    """

    def __init__(self, network, name, device, batch_size=100):
        self.network, self.name, self.key = network, name, network.digest()
        self.device, self.batch_size = device, batch_size

    @torch.no_grad()
    def __call__(self, images):
        parts = images.permute(0, 3, 1, 2).split(self.batch_size)
        return torch.cat([self.network(part.to(self.device)).float().cpu() for part in parts])


class Collected(NamedTuple):
    """What one pass over images keeps. Its size does not grow with the number of images."""

    statistics: FeatureStatistics
    features: torch.Tensor  # (at most max_features, d) float32; (0, 0) without an extractor
    images: torch.Tensor | None  # (at most max_images, H, W, C) uint8; None for none


def collect(blocks, extractor=None, max_features=10_000, max_images=0):
    """Collected of blocks of images (b, H, W, C): of all, and the first features and images."""
    statistics, features, images = FeatureStatistics(), [], []
    num_features = num_images = 0
    for block in blocks:
        if extractor:
            found = extractor(block)
            statistics.add(found)
            features.append(found[: max_features - num_features])
            num_features += len(features[-1])
        if num_images < max_images:
            images.append(block[: max_images - num_images])
            num_images += len(images[-1])
        if not extractor and num_images == max_images:
            break
    features = torch.cat(features) if features else torch.zeros(0, 0)
    return Collected(statistics, features, torch.cat(images) if images else None)


def with_progress(blocks, count, description):
    """Yields the blocks of `count` images, under a progress bar."""
    with tqdm(total=count, desc=description, unit="img", dynamic_ncols=True, leave=False) as bar:
        for block in blocks:
            yield block
            bar.update(len(block))


class FeatureCache:
    """Feature statistics and classifiers on disk, by a key of the images and the network.

    cache_dir: the folder; "": that of `utils.data.cache` for the list `annotation_path`.
    """

    def __init__(self, cache_dir="", annotation_path="train_lines.txt"):
        self.folders = [Path(cache_dir)] if cache_dir else cache_folders(annotation_path)

    def path(self, ending, *parts):
        """The file for a function of `parts`, there or not. OSError where none can be written."""
        name = f"{hashlib.sha256(repr((CACHE_VERSION, *parts)).encode()).hexdigest()[:24]}.{ending}.pth"
        found = next((folder / name for folder in self.folders if (folder / name).is_file()), None)
        return found or writable_folder(self.folders) / name

    def collected(self, dataset, extractor, max_features):
        """Collected of a whole ImageDataset, read from its file, or computed and written to it."""
        path = self.path("features", dataset.key(), extractor.key, max_features)
        try:
            kept = load_tensors(path)
            return Collected(FeatureStatistics(kept["count"], kept["mean"], kept["scatter"]), kept["features"], None)
        except Exception:  # none yet, or damaged, for which torch.load raises all kinds
            blocks = dataset.blocks(dataset.shuffled(0, seed=0))
            found = collect(with_progress(blocks, len(dataset), "reference"), extractor, max_features)
        with atomic_write(path) as file:
            torch.save({**vars(found.statistics), "features": found.features}, file)
        self.prune(path.parent)
        return found

    def classifier(self, dataset, device):
        """The file of a FeatureNet of its classes, trained on 90 % of the images where missing."""
        if len(dataset.classes) < 2:
            raise UserError(
                "--features classifier learns classes, and the reference has none: sort its "
                "pictures into class folders, name a classifier's file, or use --features inception"
            )
        path = self.path("classifier", dataset.key())
        if not path.is_file():
            if len(set(dataset.hashes)) < 100:
                raise UserError(
                    f"{len(dataset):,} pictures are too few to train a classifier on: "
                    "name the file of one with --features"
                )
            # Digits from the end: the first ones decided already what val_split kept aside.
            parts = split_validation(replace(dataset, hashes=[digest[::-1] for digest in dataset.hashes]), 0.1)
            labelled = [value for part in parts for value in part.batch(range(len(part)))]
            save_feature_net(path, train_feature_net(*labelled, num_classes=len(dataset.classes), device=device))
            self.prune(path.parent)
        return path

    def prune(self, folder):
        """Keep the newest files only."""
        found = [path for ending in ("features", "classifier") for path in folder.glob(f"*.{ending}.pth")]
        for path in sorted(found, key=lambda path: path.stat().st_mtime_ns)[:-KEPT_FILES]:
            path.unlink(missing_ok=True)


def load_extractor(features, dataset, cache, device, batch_size=100, inception_weights=""):
    """The Extractor for "inception", "classifier" (of the dataset's classes) or a net's file."""
    if features == "inception":
        return Extractor(load_inception(inception_weights, device), "Inception, 2048 numbers", device, batch_size)
    path = cache.classifier(dataset, device) if features == "classifier" else Path(features)
    network = load_feature_net(path, device)
    if network.img_channels != dataset.shape[2]:
        raise UserError(
            f"{path}: a feature net for {network.img_channels} channels, but the pictures have {dataset.shape[2]}"
        )
    accuracy = "unknown" if network.accuracy is None else f"{network.accuracy:.1%}"
    name = f"classifier of {network.num_classes} classes, test accuracy {accuracy}, {path.resolve()}"
    return Extractor(network, name, device, batch_size)
