"""The Inception network of FID and KID, through torchmetrics, an optional extra."""

import hashlib
import io
from pathlib import Path

import torch
from torch import nn

from utils.checkpoint_contents import check_tensors, weights_digest
from utils.errors import UserError
from utils.torch_files import load_tensors

INSTALL = "pip install torchmetrics torch-fidelity"
INSTEAD = "--features classifier needs neither (its distances compare with its own only)"


class Inception(nn.Module):
    """Pictures (b, 1 or 3, h, w) uint8, made 299x299 within -> the last pooling, (b, 2048)."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    @torch.no_grad()
    def forward(self, images):
        return self.network(images.expand(-1, 3, -1, -1))

    def digest(self):
        """Names these weights: part of the key of whatever is kept of the features."""
        return weights_digest(self.network.state_dict())


def load_inception(weights_path="", device="cpu"):
    """The network of `torchmetrics.image.fid`, with the weights of the FID paper.

    weights_path: a file; "": torch.hub's cache, downloaded (91 MB) where they are missing.
    ValueError: a missing or broken package, or weights that are missing or do not fit.
    """
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as theirs  # torchmetrics imports it only when needed
        from torchmetrics.image.fid import FrechetInceptionDistance

        source = weights_path or theirs.URL_INCEPTION_V3
    except Exception as error:  # whatever a broken package raises
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise UserError(
            f"Inception features need two more packages, and importing them fails ({reason}): {INSTALL}; {INSTEAD}"
        ) from None
    try:
        if weights_path and not Path(weights_path).is_file():
            raise FileNotFoundError("there is no such file")
        weights = load_tensors(weights_path) if weights_path else downloaded_weights(theirs)
        check_tensors(weights)
        copy = io.BytesIO()  # no file for the library's loader: it would run code hidden in one
        torch.save(weights, copy)
        copy.seek(0)
        metric = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=copy)
    except OSError as error:  # urllib's errors too
        what = f"{source} cannot be read" if weights_path else f"the weights cannot be downloaded from {source}"
        raise UserError(f"{what} ({error}): name a copy of the file with --inception_weights; {INSTEAD}") from None
    except Exception as error:  # torch.load and load_state_dict raise all kinds
        what = str(error).splitlines()[0].removeprefix(f"{weights_path}: ")[:400]
        raise UserError(f"{source}: not the Inception weights ({what})") from None
    return Inception(metric.inception).to(device).eval().requires_grad_(False)


def downloaded_weights(theirs):
    """The state dict in torch.hub's cache, downloaded where it is not there. theirs: the library's.

    The file's name holds the first digits of its SHA-256, which is compared before anything is read
    from it. ValueError for a file of other content, OSError where it cannot be downloaded.
    """
    kept = Path(torch.hub.get_dir(), "checkpoints", theirs.URL_INCEPTION_V3.rsplit("/", 1)[1])
    if kept.is_file() and not sha256_of(kept).startswith(kept.stem.rsplit("-", 1)[1]):
        raise UserError(f"{kept} is damaged, or another file: delete it, and it is downloaded again")
    return theirs.load_state_dict_from_url(
        theirs.URL_INCEPTION_V3, map_location="cpu", weights_only=True, check_hash=True
    )


def sha256_of(path):
    """The SHA-256 of a file's content, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()
