"""Tensors -> image files, grids and animations."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from utils.files import atomic_write


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """(B, C, H, W) floats in [-1, 1] on any device -> (B, H, W, C) uint8 array.

    Clamped and rounded: a cast alone wraps 256 to 0. NaN becomes mid-gray.
    """
    pixels = x.detach().float().nan_to_num(nan=0.0, posinf=1.0, neginf=-1.0).clamp(-1, 1).add(1).mul(127.5).round()
    return pixels.byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


def make_grid(images: np.ndarray, columns: int, padding: int = 2, pad_value: int = 255) -> np.ndarray:
    """(N, H, W, C) uint8 pixels -> one image (rows, cols, C), row by row, every pixel as it is.

    `padding` pixels of `pad_value` lie between the images and around them.
    """
    from torchvision.utils import make_grid as tile  # here: it takes a second to import

    tiles = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)  # a copy: a cache's pixels are read-only
    if len(tiles) == 1:  # torchvision leaves a single image without its frame
        grid = torch.nn.functional.pad(tiles[0], (padding,) * 4, value=pad_value)
    else:
        grid = tile(tiles, nrow=columns, padding=padding, pad_value=pad_value)[: tiles.shape[1]]  # it makes gray RGB
    return np.ascontiguousarray(grid.permute(1, 2, 0).numpy())


def _to_pillow(image: np.ndarray) -> Image.Image:
    """uint8 (H, W, 3) or (H, W, 1) -> Pillow image."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def save_png(path: str | Path, image: np.ndarray, text: dict | None = None) -> None:
    """Write uint8 pixels (H, W, C) as a PNG, whole or not at all. text: a dict, its text chunks."""
    chunks = PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, str(value))
    with atomic_write(path) as file:
        _to_pillow(image).save(file, format="PNG", pnginfo=chunks)


def save_animation(path: str | Path, frames: np.ndarray, milliseconds: list[int]) -> None:
    """Write uint8 frames (N, H, W, C) as an endless GIF, whole or not at all.

    milliseconds: a list, the time of each frame. GIF has 256 colors a frame.
    """
    first, *others = map(_to_pillow, frames)
    with atomic_write(path) as file:
        first.save(file, format="GIF", save_all=True, append_images=others, duration=milliseconds, loop=0)
