"""Networks conditioned on an image: super-resolution, colorizing, inpainting, image to image.

The condition is more channels of the network's input, next to x_t (Saharia et al. 2022, "SR3" and
"Palette"). Zeros in its place are "no condition", as the null class is "no class".
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import SettingError, check_choice

CONDITIONS = {  # name -> channels of the condition, by those of the image
    "": lambda channels: 0,
    "low_res": lambda channels: channels,  # the image, made smaller and enlarged again
    "gray": lambda channels: 1,
    "masked": lambda channels: channels + 1,  # its known pixels, and 1 where they are
    "pairs": lambda channels: channels,  # another image, on the left of the same file
}
# The largest standard deviation of the noise on a low_res condition in training; it starts at 0, so
# that both clean and slightly wrong, generated conditions are known (Ho et al. 2021, "Cascaded
# Diffusion Models", section 4.2). Sampling adds none. One of 255 levels is 0.008.
AUGMENTATION = 0.1
HOLE_NUMBERS = 20  # of `random_known`


class Condition(NamedTuple):
    """How images (b, c, h, w) in [-1, 1] become their conditions (b, k, h, w)."""

    kind: str = ""  # a name from CONDITIONS
    scale: int = 1  # how many times smaller low_res is
    dropped: bool = False  # training drops it at times, as guidance needs

    def count_numbers(self, channels: int, height: int, width: int) -> int:
        """How many random numbers each image needs."""
        small = channels * height * width // self.scale**2
        return {"low_res": 1 + small, "masked": HOLE_NUMBERS}.get(self.kind, 0)

    def __call__(self, images: Tensor, numbers: Tensor, augmentation: float = 0.0) -> tuple[Tensor, Tensor | None]:
        """(images, conditions or None). numbers: normal. Pairs: the condition's channels first."""
        if self.kind == "pairs":
            return images.chunk(2, 1)[::-1]
        given = luminance(images) if self.kind == "gray" else images
        known = random_known(uniform(numbers), *images.shape[2:]) if self.kind == "masked" else None
        if self.kind == "low_res":
            given, level = F.avg_pool2d(images, self.scale), augmentation * uniform(numbers[:, :1])
            given = given + (level * numbers[:, 1:]).view_as(given)
        return images, self.of_file(given, known) if self.kind else None

    def of_file(self, images: Tensor, known: Tensor | None = None) -> Tensor:
        """The conditions of what a user gives: small images for low_res, ..., (b, c, h, w).

        known: (b, 1, h, w), for masked: 1 where pixels are kept, 0 where they are sampled.
        """
        if self.kind == "low_res":
            return F.interpolate(images, scale_factor=self.scale, mode="bicubic")
        return images if known is None else torch.cat((images * known, known), 1)

    def restore(self, x_0: Tensor, cond: Tensor) -> Tensor:
        """A predicted x_0 with what the condition tells exactly: known pixels, or the luminance."""
        if self.kind == "masked":
            return torch.where(cond[:, -1:] > 0.5, cond[:, :-1], x_0)
        return x_0 + cond - luminance(x_0) if self.kind == "gray" else x_0


def from_settings(config: Mapping[str, Any]) -> Condition:
    """The Condition of train.py's settings. ValueError: they do not fit together."""
    kind, scale = config.get("condition", ""), config.get("condition_scale", 4)
    check_choice("condition", kind, CONDITIONS)
    if kind == "low_res" and any(side % scale for side in config["input_shape"]):
        raise SettingError(f"input_shape {tuple(config['input_shape'])} is no multiple of condition_scale {scale}")
    if kind == "gray" and config.get("img_channels") == 1:
        raise SettingError("condition gray learns colors: set img_channels 3")
    if kind == "pairs" and config.get("resize_mode", "stretch") != "stretch":
        raise SettingError("condition pairs needs resize_mode stretch: others would shift one half on the other")
    return Condition(kind, scale if kind == "low_res" else 1, bool(config.get("label_dropout")))


def uniform(normal: Tensor) -> Tensor:
    """Normal numbers as uniform ones from 0 to 1."""
    return 0.5 + 0.5 * torch.erf(normal / 2**0.5)


def luminance(images: Tensor) -> Tensor:
    """(b, 3, h, w) -> (b, 1, h, w) by the weights of ITU-R BT.601, as Pillow has it."""
    red, green, blue = images.split(1, 1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def random_known(u: Tensor, height: int, width: int) -> Tensor:
    """(b, 1, h, w): 0 in two rectangles, on a stroke of four lines, or in both. u: from 0 to 1."""
    sides = [(torch.arange(side, device=u.device) + 0.5) / side for side in (height, width)]
    grid = torch.stack(torch.meshgrid(*sides, indexing="ij"), -1)  # (h, w, 2), the image from 0 to 1
    center, half = u[:, :4].reshape(-1, 2, 1, 1, 2), 0.05 + 0.3 * u[:, 4:8].reshape(-1, 2, 1, 1, 2)
    rectangles = ((grid - center).abs() < half).all(-1).any(1)  # (b, h, w)
    points = u[:, 8:18].reshape(-1, 5, 1, 1, 2)
    start, line, radius = points[:, :-1], points.diff(dim=1), 0.03 + 0.05 * u[:, 18, None, None, None]
    along = ((grid - start) * line).sum(-1, keepdim=True) / line.square().sum(-1, keepdim=True)
    stroke = ((grid - start - along.clamp(0, 1) * line).norm(dim=-1) < radius).any(1)
    which = u[:, 19, None, None]
    holes = (rectangles & (which < 0.6)) | (stroke & (which > 0.4))
    return 1 - holes[:, None].float()
