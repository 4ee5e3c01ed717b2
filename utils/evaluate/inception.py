"""The Inception network that FID and KID are defined with, through torchmetrics (an optional
extra; its weights are downloaded once).
"""

import hashlib
import io
from pathlib import Path

import torch
from torch import nn

from utils.checkpoint_contents import check_tensors, weights_digest
from utils.torch_files import load_tensors

INSTALL = "pip install torchmetrics torch-fidelity"
INSTEAD = "--features classifier needs neither (its distances compare with its own only)"


class Inception(nn.Module):
    """Pictures (b, 1 or 3, h, w) uint8 -> the 2048 features of the last pooling, (b, 2048) float32.

    Resized to 299x299 within.
    """

    num_features = 2048

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
    ValueError: a missing package, or weights that are missing or do not fit.
    """
    try:
        import torch_fidelity  # noqa: F401 (torchmetrics needs it, but can be imported without)
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ValueError(f"Inception features need two more packages ({error.name} is missing): "
                         f"{INSTALL}; {INSTEAD}") from None
    except Exception as error:  # whatever a broken package raises
        raise ValueError(f"torchmetrics or torch-fidelity is here, but fails ({type(error).__name__}: "
                         f"{' '.join(str(error).split())[:120]}): {INSTALL} again; {INSTEAD}") from None
    try:
        weights = load_tensors(named_file(weights_path)) if weights_path else downloaded_weights()
        check_tensors(weights)
        # The library's loader would run code hidden in a file: it gets what was read without, and
        # no file.
        copy = io.BytesIO()
        torch.save(weights, copy)
        copy.seek(0)
        metric = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=copy)
    except OSError as error:  # urllib's errors too
        what = (f"{weights_path} cannot be read" if weights_path else
                f"the Inception weights cannot be downloaded from {weights_address()}")
        raise ValueError(f"{what} ({error}): name a copy of the file with --inception_weights; {INSTEAD}") from None
    except Exception as error:  # torch.load and load_state_dict raise all kinds
        what = str(error).splitlines()[0].removeprefix(f"{weights_path}: ")[:400]
        raise ValueError(f"{weights_path or weights_address()}: not the Inception weights ({what})") from None
    return Inception(metric.inception).to(device).eval().requires_grad_(False)


def named_file(path):
    """The path of a file that a user names. OSError where there is none."""
    if not Path(path).is_file():
        raise FileNotFoundError("there is no such file")
    return path


def downloaded_weights():
    """The state dict in torch.hub's cache, downloaded where it is not there.

    The file's name holds the first digits of its SHA-256, which is compared before anything is read
    from it. ValueError for a file of other content, OSError where it cannot be downloaded.
    """
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    kept = Path(torch.hub.get_dir(), "checkpoints", theirs.URL_INCEPTION_V3.rsplit("/", 1)[1])
    if kept.is_file() and not sha256_of(kept).startswith(kept.stem.rsplit("-", 1)[1]):
        raise ValueError(f"{kept} is damaged, or another file: delete it, and it is downloaded again")
    return theirs.load_state_dict_from_url(theirs.URL_INCEPTION_V3, map_location="cpu", weights_only=True,
                                           check_hash=True)


def sha256_of(path):
    """The SHA-256 of a file's content, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def weights_address():
    """Where torch-fidelity downloads the weights from."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return URL_INCEPTION_V3
