"""Features of sets of pictures, computed once: by which network, in one pass, and where they are kept."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from utils.checkpoint import load_tensors
from utils.data.cache import cache_folders, writable_folder
from utils.data.dataset import split_validation
from utils.evaluate.classifier import load_feature_net, save_feature_net, train_feature_net
from utils.evaluate.distances import FeatureStatistics
from utils.evaluate.inception import load_inception
from utils.files import atomic_write

CACHE_VERSION = 1  # part of the keys: raise it when features or their files change
KEPT_FILES = 16  # statistics and classifiers in the cache


class Extractor:
    """Pictures (b, H, W, C) uint8 -> features (b, d) float32 on the CPU, batch_size pictures at a time.

    network: takes (b, C, H, W) uint8. name: for people. key: changes with the features.
    """

    def __init__(self, network, name, device, batch_size=100):
        self.network, self.name, self.device, self.batch_size, self.key = network, name, device, batch_size, network.digest()

    @torch.no_grad()
    def __call__(self, images):
        parts = [self.network(part.to(self.device).permute(0, 3, 1, 2)).float().cpu() for part in images.split(self.batch_size)]
        return torch.cat(parts)


class Collected(NamedTuple):
    """What one pass over pictures leaves, in memory that their number does not change."""

    statistics: FeatureStatistics
    features: torch.Tensor  # (at most max_features, d) float32; (0, 0) without an extractor
    pictures: torch.Tensor | None  # (at most max_pictures, H, W, C) uint8; None for none


def collect(blocks, extractor=None, max_features=10_000, max_pictures=0):
    """One pass over blocks of pictures (b, H, W, C). The first features and pictures are kept: random ones, if the order is."""
    statistics, features, pictures = FeatureStatistics(), [], []
    kept = shown = 0
    for images in blocks:
        if extractor:
            found = extractor(images)
            statistics.add(found)
            features.append(found[: max_features - kept])
            kept += len(features[-1])
        if shown < max_pictures:
            pictures.append(images[: max_pictures - shown])
            shown += len(pictures[-1])
        if not extractor and shown == max_pictures:
            break
    return Collected(statistics, torch.cat(features) if features else torch.zeros(0, 0), torch.cat(pictures) if pictures else None)


def with_progress(blocks, count, description):
    """The blocks of `count` pictures, with a progress bar."""
    with tqdm(total=count, desc=description, unit="img", dynamic_ncols=True, leave=False) as bar:
        for images in blocks:
            yield images
            bar.update(len(images))


class FeatureCache:
    """Reference statistics and classifiers on disk, by a key of the pictures and the settings: datasets/.cache, unless told.

    cache_dir: the folder; "": that of `utils.data.cache` for the list `annotation_path`.
    """

    def __init__(self, cache_dir="", annotation_path="train_lines.txt"):
        self.folders = [Path(cache_dir)] if cache_dir else cache_folders(annotation_path)

    def path(self, ending, *parts):
        """Where that which is a function of `parts` is, or is to be kept. OSError where nothing can be written."""
        name = f"{hashlib.sha256(repr((CACHE_VERSION, *parts)).encode()).hexdigest()[:24]}.{ending}.pth"
        found = next((folder / name for folder in self.folders if (folder / name).is_file()), None)
        return found or writable_folder(self.folders) / name

    def collected(self, pictures, extractor, max_features):
        """Collected of all pictures of a PictureSet: read where there is a whole file of it, else computed and kept."""
        path = self.path("features", pictures.key(), extractor.key, max_features)
        statistics = FeatureStatistics()
        try:
            kept = load_tensors(path)
            statistics.count, statistics.mean, statistics.scatter = kept["count"], kept["mean"], kept["scatter"]
            return Collected(statistics, kept["features"], None)
        except Exception:  # none yet, or damaged, for which torch.load raises all kinds
            blocks = pictures.blocks(pictures.shuffled(0, seed=0))
            found = collect(with_progress(blocks, len(pictures), "reference"), extractor, max_features)
        statistics = found.statistics
        kept = {"count": statistics.count, "mean": statistics.mean, "scatter": statistics.scatter, "features": found.features}
        with atomic_write(path) as file:
            torch.save(kept, file)
        self.prune(path.parent)
        return found

    def classifier(self, pictures, device):
        """The file of a FeatureNet of the pictures' classes, trained on nine tenths of them where there is none yet."""
        if len(pictures.classes) < 2:
            raise ValueError("--features classifier learns classes, and the reference has none: sort its pictures into class folders, "
                             "name the file of a classifier, or use --features inception")
        path = self.path("classifier", pictures.key())
        if not path.is_file():
            if len(set(pictures.hashes)) < 100:
                raise ValueError(f"{len(pictures):,} pictures are too few to train a classifier on: name the file of one with --features")
            parts = []
            # Digits from the end: those at the start decided already what val_split kept aside.
            for numbers in split_validation([digest[::-1] for digest in pictures.hashes], 0.1):
                parts += [pictures.take(numbers), pictures.labels[numbers]]
            save_feature_net(path, train_feature_net(*parts, num_classes=len(pictures.classes), device=device))
            self.prune(path.parent)
        return path

    def prune(self, folder):
        """Keep the newest files only."""
        found = [path for ending in ("features", "classifier") for path in folder.glob(f"*.{ending}.pth")]
        for path in sorted(found, key=lambda path: path.stat().st_mtime_ns)[:-KEPT_FILES]:
            path.unlink(missing_ok=True)


def load_extractor(features, pictures, cache, device, batch_size=100, inception_weights=""):
    """The Extractor for `features`: "inception", "classifier" (of the pictures' classes) or the file of a FeatureNet."""
    if features == "inception":
        return Extractor(load_inception(inception_weights, device), "Inception, 2048 numbers", device, batch_size)
    path = cache.classifier(pictures, device) if features == "classifier" else Path(features)
    network = load_feature_net(path, device)
    if network.img_channels != pictures.shape[2]:
        raise ValueError(f"{path}: a feature net for {network.img_channels} channels, but the pictures have {pictures.shape[2]}")
    accuracy = "unknown" if network.accuracy is None else f"{network.accuracy:.1%}"
    name = f"classifier of {network.num_classes} classes, test accuracy {accuracy}, {path.resolve()}"
    return Extractor(network, name, device, batch_size)
