"""The Inception network of FID and KID, through torchmetrics, an optional extra."""

import hashlib
import io
from pathlib import Path

import torch
from torch import nn

from utils.checkpoint.integrity import check_tensors, load_tensors
from utils.errors import UserError, one_line

INSTEAD = "--features classifier needs neither (its distances compare with its own only)"


def load_inception(weights_path: str = "", device: torch.device | str = "cpu") -> nn.Module:
    """The network of the FID paper, (b, 3, h, w) uint8 -> (b, 2048). "": weights of torch.hub."""
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as library  # torchmetrics imports it only when needed
        from torchmetrics.image.fid import FrechetInceptionDistance

        source = weights_path or library.URL_INCEPTION_V3
    except Exception as error:  # whatever a broken package raises
        reason = f"importing them fails ({type(error).__name__}: {one_line(error, 120)})"
        advice = f"pip install torchmetrics torch-fidelity; {INSTEAD}"
        raise UserError(f"Inception features need two more packages, and {reason}: {advice}") from None
    try:
        weights = load_tensors(weights_path) if weights_path else downloaded_weights(library)
        check_tensors(weights)
        copy = io.BytesIO()  # no file for the library's loader: it would run code hidden in one
        torch.save(weights, copy)
        copy.seek(0)
        metric = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=copy)
    except Exception as error:  # urllib, torch.load and load_state_dict raise all kinds
        advice = f"name a copy of the file with --inception_weights; {INSTEAD}"
        raise UserError(f"no Inception weights in {source} ({one_line(error, 300)}): {advice}") from None
    return metric.inception.to(device).eval().requires_grad_(False)


def downloaded_weights(library) -> dict:
    """The state dict in torch.hub's cache (91 MB), whose name ends with digits of its SHA-256."""
    path = Path(torch.hub.get_dir(), "checkpoints", Path(library.URL_INCEPTION_V3).name)
    if path.is_file() and not hashlib.sha256(path.read_bytes()).hexdigest().startswith(path.stem.rsplit("-", 1)[1]):
        raise UserError(f"{path} is damaged, or another file: delete it, and it is downloaded again")
    return library.load_state_dict_from_url(
        library.URL_INCEPTION_V3, map_location="cpu", weights_only=True, check_hash=True
    )
