"""Tensors -> image files, grids and animations."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from utils.files import atomic_write


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """(B, C, H, W) floats in [-1, 1] -> (B, H, W, C) uint8 array, rounded. NaN becomes mid-gray."""
    pixels = x.detach().float().nan_to_num(nan=0.0).clamp(-1, 1).add(1).mul(127.5).round()
    return pixels.byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


def make_grid(images: np.ndarray, columns: int, padding: int = 2) -> np.ndarray:
    """(N, H, W, C) uint8 pixels -> one image, row by row, white between them and around them."""
    columns = min(columns, len(images))
    frame = ((0, -len(images) % columns), (padding, 0), (padding, 0), (0, 0))  # also whole white images, at the end
    tiles = np.pad(images, frame, constant_values=255)
    rows = [np.concatenate(tiles[first : first + columns], axis=1) for first in range(0, len(tiles), columns)]
    return np.pad(np.concatenate(rows), ((0, padding), (0, padding), (0, 0)), constant_values=255)


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
    """Write uint8 frames (N, H, W, C), each shown for its milliseconds, as an endless GIF."""
    first, *others = map(_to_pillow, frames)
    with atomic_write(path) as file:
        first.save(file, format="GIF", save_all=True, append_images=others, duration=milliseconds, loop=0)
