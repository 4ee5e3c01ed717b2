"""The Inception network of FID and KID, through torchmetrics, an optional extra."""

import io
from functools import partial

import torch
from torch import nn

from utils.checkpoint.integrity import check_tensors, load_tensors
from utils.errors import UserError, one_line

ADVICE = (
    "pip install torchmetrics torch-fidelity, or name a file with --inception_weights, or use --features classifier"
)


def load_inception(weights_path: str = "", device: torch.device | str = "cpu") -> nn.Module:
    """The network of the FID paper, (b, 3, h, w) uint8 -> (b, 2048). "": weights of torch.hub."""
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
