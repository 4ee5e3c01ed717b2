"""Networks conditioned on an image, which is more channels of their input, next to x_t.

Saharia et al. 2022, "SR3" and "Palette". Zeros are "no condition", as the null class is "no class".
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# name -> (1 if it has the image's channels, how many besides); docs/conditioning.md describes each
CONDITIONS = {"": (0, 0), "low_res": (1, 0), "gray": (0, 1), "masked": (1, 1), "pairs": (1, 0)}


class Condition(NamedTuple):
    """How images (b, c, h, w) in [-1, 1] become their conditions (b, k, h, w)."""

    kind: str = ""  # a name from CONDITIONS
    scale: int = 4  # how many times smaller low_res is
    dropped: bool = False  # training drops it at times, as guidance needs

    def __call__(self, images: Tensor, noise: Tensor, drop: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(images, conditions or None). Pairs come as 2 c channels, the condition's first.

        noise: normal, (b, c, h, w). drop: (b,) bool in training, where zeros replace the condition.
        """
        if not self.kind:
            return images, None
        given, images = images.chunk(2, 1) if self.kind == "pairs" else (images, images)
        if self.kind == "low_res":  # noisy, as generated ones have errors (Ho et al. 2021, "Cascaded Diffusion Models")
            level = 0.0 if drop is None else 0.05 * noise[:, :1, -1:, -1:].abs()
            given = F.avg_pool2d(images, self.scale) + level * noise[:, :, :: self.scale, :: self.scale]
        cond = self.of_given(given, random_known(noise) if self.kind == "masked" else None)
        return images, cond if drop is None else cond * ~drop[:, None, None, None]

    def of_given(self, images: Tensor, known: Tensor | None = None) -> Tensor:
        """Conditions of a user's images (low_res: small ones). known: (b, 1, h, w), for masked."""
        if self.kind == "low_res":
            return F.interpolate(images, scale_factor=self.scale, mode="bicubic")
        images = luminance(images) if self.kind == "gray" else images
        return images if known is None else torch.cat((images * known, known), 1)

    def restore(self, x_0: Tensor, cond: Tensor) -> Tensor:
        """A predicted x_0 with what the condition tells exactly: known pixels, or the luminance."""
        if self.kind == "masked":
            return torch.where(cond[:, -1:] > 0.5, cond[:, :-1], x_0)
        return x_0 + cond - luminance(x_0) if self.kind == "gray" else x_0


def luminance(images: Tensor) -> Tensor:
    """(b, 3, h, w) -> (b, 1, h, w) by the weights of ITU-R BT.601, as Pillow has it."""
    return 0.299 * images[:, :1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:]


def random_known(noise: Tensor) -> Tensor:
    """(b, 1, h, w) of normal noise (b, c, h, w): 0 in three holes, rectangles or turned strokes."""
    y, x = (torch.linspace(-2, 2, side, device=noise.device) for side in noise.shape[2:])
    center_y, center_x, height, width, angle = noise.flatten(1)[:, :15].view(-1, 3, 5, 1, 1).unbind(2)  # (b, 3, 1, 1)
    y, x, angle = y[:, None] - center_y, x - center_x, 2 * angle.clamp(min=0)  # 0: a rectangle, else a thin stroke
    along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()  # (b, 3, h, w)
    holes = (along.abs() < 0.1 + width.abs()) & (across.abs() < torch.where(angle > 0, 0.2, 0.1 + height.abs()))
    return 1 - holes.any(1, keepdim=True).float()
