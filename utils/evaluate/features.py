"""Features of image sets for FID, KID, precision and recall, computed in one pass and cached."""

import hashlib
import io
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from utils.checkpoint.integrity import check_tensors, first_not_finite, load_tensors, save_tensors, weights_digest
from utils.data.cache import cache_folder
from utils.data.dataset import split_validation
from utils.errors import UserError, one_line
from utils.evaluate.distances import FeatureStatistics

CACHE_VERSION = 1  # part of the keys: raise it when features or their files change
KEPT_FILES = 8  # of statistics, and of classifiers, in the cache
ADVICE = "pip install torchmetrics torch-fidelity, or set --inception_weights FILE or --features classifier"
FORMAT, MAX_CHANNELS, MAX_CLASSES = 1, 4, 100_000  # a file that claims more must not build a network of any size
WIDTHS = (32, 64, 128)
STEPS, RATE = 1400, 2e-3  # the highest learning rate


class Extractor:
    """Images (b, H, W, C) uint8 -> features (b, d) float32 on the CPU. channels: 3 repeats gray."""

    def __init__(self, network, name, device, batch_size=100, channels=-1):
        self.network, self.name, self.key = network, name, weights_digest(network.state_dict())
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
        folder = cache_folder(self.annotation_path, self.cache_dir)
        for old in sorted(folder.glob(f"{'[0-9a-f]' * 24}.{kind}.pth"), key=os.path.getmtime)[:-KEPT_FILES]:
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
            found = f"{classes} classes and {different} different images"
            raise UserError(f"--features classifier needs 2 class folders and 100 images, not {found}: name its file")
        path = self.path("classifier", dataset.key())
        if not path.is_file():
            # Digits from the end: the first ones decided already what val_split kept aside.
            parts = split_validation(replace(dataset, hashes=[digest[::-1] for digest in dataset.hashes]), 0.1)
            batches = (part.batch(range(len(part))) for part in parts)
            save_feature_net(path, train_feature_net(*batches, classes, device=device))
        return path


def load_extractor(features, dataset, cache, device, batch_size=100, inception_weights=""):
    """The Extractor for "inception", "classifier" (of the dataset's classes) or a net's file."""
    if features == "inception":
        return Extractor(load_inception(inception_weights, device), "Inception, 2048 numbers", device, batch_size, 3)
    path = cache.classifier(dataset, device) if features == "classifier" else Path(features)
    network = load_feature_net(path, device)
    if network.img_channels != dataset.pixels.shape[3]:
        raise UserError(f"{path}: a feature net of {network.img_channels} channels does not fit these images")
    name = f"classifier of {network.num_classes} classes, test accuracy {network.accuracy}, {path.resolve()}"
    return Extractor(network, name, device, batch_size)


def load_inception(weights_path="", device="cpu"):
    """torchmetrics' Inception of FID: (b, 3, h, w) uint8 -> (b, 2048). "": weights of torch.hub."""
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as library  # torchmetrics imports it only when needed
        from torchmetrics.image.fid import FrechetInceptionDistance

        # 91 MB, in torch.hub's cache; the name ends with digits of the SHA-256.
        download = partial(library.load_state_dict_from_url, map_location="cpu", weights_only=True, check_hash=True)
        weights = load_tensors(weights_path) if weights_path else download(library.URL_INCEPTION_V3)
        check_tensors(weights)
        copy = io.BytesIO()  # no file for the library's loader: it would run code hidden in one
        torch.save(weights, copy)
        copy.seek(0)
        metric = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=copy)
    except Exception as error:  # a broken package, urllib, torch.load and load_state_dict raise all kinds
        raise UserError(f"no Inception features ({type(error).__name__}: {one_line(error, 300)}): {ADVICE}") from None
    return metric.inception.to(device).eval().requires_grad_(False)


class FeatureNet(nn.Module):
    """A small classifier: its features tell how alike image sets are where Inception cannot."""

    num_features = WIDTHS[-1]  # torchmetrics asks for it
    accuracy: float | None = None  # on test images

    def __init__(self, img_channels, num_classes):
        super().__init__()
        self.img_channels, self.num_classes = img_channels, num_classes
        layers = []
        for channels, width in zip((img_channels, *WIDTHS), WIDTHS):  # each halves the size
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(self.num_features, num_classes)

    def forward(self, images):
        """Images (b, c, h, w) uint8, 8x8 or more -> features (b, 128) float32."""
        return self.layers(images.to(self.head.weight.dtype) / 127.5 - 1).mean((2, 3))


def train_feature_net(training, test, num_classes, *, epochs=None, batch_size=128, seed=0, device="cpu"):
    """A FeatureNet in eval mode. training, test: images (n, h, w, c) uint8 and labels (n,)."""
    images, labels = training
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # the global generator belongs to the caller
        torch.manual_seed(seed)
        net = FeatureNet(images.shape[-1], num_classes).to(device)
    batch_size = min(batch_size, len(labels))
    steps_per_epoch = len(labels) // batch_size
    epochs = epochs or max(1, round(STEPS * batch_size / len(labels)))
    optimizer = torch.optim.Adam(net.parameters(), RATE)  # with one cycle of the rate (Smith & Topin 2018)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * steps_per_epoch + 1)
    for _ in tqdm(range(epochs), desc="feature net", unit="epoch", dynamic_ncols=True, leave=False):
        for rows in torch.randperm(len(labels), generator=generator).split(batch_size)[:steps_per_epoch]:
            batch = shift_randomly(images[rows].to(device).permute(0, 3, 1, 2), generator)
            loss = F.cross_entropy(net.head(net(batch)), labels[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval().requires_grad_(False)
    parts = test[0].permute(0, 3, 1, 2).split(500)
    found = torch.cat([net.head(net(part.to(device))).argmax(1).cpu() for part in parts])
    net.accuracy = round((found == test[1]).double().mean().item(), 4)
    return net


def shift_randomly(images, generator):
    """The batch, moved by up to 2 pixels with repeated borders: position must not matter."""
    for dim, shift in zip((2, 3), torch.randint(-2, 3, (2,), generator=generator).tolist()):
        rows = (torch.arange(images.shape[dim]) + shift).clamp(0, images.shape[dim] - 1)
        images = images.index_select(dim, rows.to(images.device))
    return images


def save_feature_net(path, net):
    about = {name: getattr(net, name) for name in ("img_channels", "num_classes", "accuracy")}
    weights = {name: value.cpu() for name, value in net.state_dict().items()}
    save_tensors(path, {"feature_net": FORMAT, **about, "weights": weights})


def load_feature_net(path, device="cpu"):
    """The net of a file that `save_feature_net` wrote, in eval mode. UserError for others."""
    loaded = load_tensors(path, what="feature net")
    try:
        channels, classes = loaded["img_channels"], loaded["num_classes"]
        if loaded["feature_net"] != FORMAT or not (channels <= MAX_CHANNELS and classes <= MAX_CLASSES):
            raise UserError("of another version, or too large")
        net = FeatureNet(channels, classes)
        net.accuracy = None if loaded["accuracy"] is None else float(loaded["accuracy"])
        check_tensors(loaded["weights"])
        net.load_state_dict(loaded["weights"])
        if first_not_finite(loaded["weights"]) is not None:
            raise UserError("its weights hold NaN or infinity")
    except Exception as error:  # values of any kind end in errors of any kind
        raise UserError(f"{path}: no feature net of this version, or a damaged one ({one_line(error, 400)})") from None
    return net.to(device).eval().requires_grad_(False)
