"""Features of image sets for FID, KID, precision and recall, computed in one pass and cached."""

import hashlib
import io
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from utils.checkpoint.integrity import check_tensors, load_tensors, save_tensors, weights_digest
from utils.data.cache import cache_folder
from utils.data.dataset import split_validation
from utils.errors import UserError, one_line
from utils.evaluate.classifier import load_feature_net, save_feature_net, train_feature_net
from utils.evaluate.distances import FeatureStatistics
from utils.files import remove_leftovers
from utils.terminal import plural

CACHE_VERSION = 1  # part of the keys: raise it when features or their files change
KEPT_FILES = 8  # of statistics, and of classifiers, in the cache
ADVICE = "pip install torch-fidelity, or set --inception_weights FILE or --features classifier"


class Extractor:
    """Images (b, H, W, C) uint8 -> features (b, d) float32 on the CPU. channels: 3 repeats gray."""

    def __init__(self, network, name, device, batch_size=100, channels=-1):
        self.network, self.name = network, name
        # Its code too: another Inception of the same weights may resize the images in another way.
        self.key = f"{type(network).__name__} {weights_digest(network.state_dict())}"
        self.device, self.batch_size, self.channels = device, batch_size, channels

    @torch.no_grad()
    def __call__(self, images):
        parts = images.permute(0, 3, 1, 2).expand(-1, self.channels, -1, -1).split(self.batch_size)
        return torch.cat([self.network(part.to(self.device)).float().cpu() for part in parts])


class FeatureSet(NamedTuple):  # its size does not grow with the number of images
    statistics: FeatureStatistics  # of all images
    features: Tensor  # (at most max_features, d) float32; (0, 0) without an extractor
    images: Tensor | None = None  # (at most max_images, H, W, C) uint8


def collect(blocks, extractor=None, max_features=10_000, max_images=0):
    """The FeatureSet of blocks of images (b, H, W, C). extractor: None keeps images alone."""
    statistics, features, images = FeatureStatistics(), [], []
    for block in blocks:
        images.append(block[: max_images - sum(map(len, images))])
        if extractor:
            found = extractor(block)
            statistics.add(found)
            features.append(found[: max_features - sum(map(len, features))])
        elif sum(map(len, images)) == max_images:
            break
    return FeatureSet(statistics, torch.cat(features) if features else torch.zeros(0, 0), torch.cat(images))


def with_progress(blocks, count, description):
    with tqdm(total=count, desc=description, unit="img", dynamic_ncols=True, leave=False) as bar:
        for block in blocks:
            yield block
            bar.update(len(block))


class FeatureCache(NamedTuple):
    """Feature statistics and classifiers on disk, by a key of the images and the network."""

    cache_dir: str = ""
    annotation_path: str = "train_lines.txt"

    def path(self, kind, *parts):
        """The file for a function of `parts`, there or not; old ones go. OSError: none can be."""
        digest = hashlib.sha256(repr((CACHE_VERSION, *parts)).encode()).hexdigest()
        folder, own = cache_folder(self.annotation_path, self.cache_dir), f"{'[0-9a-f]' * 24}.{kind}.pth"
        remove_leftovers(folder, own)
        for old in sorted(folder.glob(own), key=os.path.getmtime)[:-KEPT_FILES]:
            old.unlink(missing_ok=True)
        return folder / f"{digest[:24]}.{kind}.pth"

    def collected(self, dataset, extractor, max_features):
        """The FeatureSet of a whole dataset, read from its file, or computed and written to it."""
        path = self.path("features", dataset.key(), extractor.key, max_features)
        try:
            kept = load_tensors(path)
            return FeatureSet(FeatureStatistics(kept["count"], kept["mean"], kept["scatter"]), kept["features"])
        except Exception:  # none yet, or damaged, for which torch.load raises all kinds
            blocks = dataset.blocks(dataset.shuffled(0, seed=0))
            found = collect(with_progress(blocks, len(dataset), "reference"), extractor, max_features)
        save_tensors(path, {**vars(found.statistics), "features": found.features})
        return found

    def classifier(self, dataset, device):
        """The file of a FeatureNet of its classes, trained on 90 % of the images where missing."""
        classes, different = len(dataset.classes), len(set(dataset.hashes))
        if classes < 2 or different < 100:
            found = f"{plural(classes, 'class', 'es')} and {plural(different, 'different image')}"
            raise UserError(f"--features classifier needs 2 class folders and 100 images, not {found}: name its file")
        path = self.path("classifier", dataset.key())
        if not path.is_file():
            # Digits from the end: the first ones decided already what val_split kept aside.
            parts = split_validation(replace(dataset, hashes=[digest[::-1] for digest in dataset.hashes]), 0.1)
            batches = ((part.images(range(len(part))), part.labels) for part in parts)
            save_feature_net(path, train_feature_net(*batches, classes, device=device))
        return path


def load_extractor(features, dataset, cache, device, batch_size=100, inception_weights=""):
    """The Extractor for "inception", "classifier" (of the dataset's classes) or a net's file."""
    if features == "inception":
        network, name = load_inception(inception_weights, device), "Inception of torch-fidelity, 2048 numbers"
        return Extractor(network, name, device, batch_size, channels=3)
    path = cache.classifier(dataset, device) if features == "classifier" else Path(features)
    network = load_feature_net(path, device)
    if network.img_channels != dataset.pixels.shape[-1]:
        channels = plural(network.img_channels, "channel")
        raise UserError(f"{path}: a feature net of {channels} does not fit these images")
    name = f"classifier of {network.num_classes} classes, test accuracy {network.accuracy}, {path.resolve()}"
    return Extractor(network, name, device, batch_size)


def load_inception(weights_path="", device="cpu"):
    """torch-fidelity's Inception of FID: (b, 3, h, w) uint8 -> (b, 2048). "": torch.hub's weights.

    It resizes without antialiasing, as the paper's graph does; torchmetrics since 1.8 does with it.
    """
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as library

        # 91 MB, in torch.hub's cache; the name ends with digits of the SHA-256.
        download = partial(library.load_state_dict_from_url, map_location="cpu", weights_only=True, check_hash=True)
        weights = load_tensors(weights_path) if weights_path else download(library.URL_INCEPTION_V3)
        check_tensors(weights)
        copy = io.BytesIO()  # no file for the library's loader: it would run code hidden in one
        torch.save(weights, copy)
        copy.seek(0)
        network = library.FeatureExtractorInceptionV3("inception", ["2048"], copy)
    except Exception as error:  # a broken package, urllib, torch.load and load_state_dict raise all kinds
        raise UserError(f"no Inception features ({type(error).__name__}: {one_line(error, 300)}): {ADVICE}") from None
    network.register_forward_hook(lambda module, inputs, found: found[0])  # it returns a tuple
    return network.to(device).eval().requires_grad_(False)
