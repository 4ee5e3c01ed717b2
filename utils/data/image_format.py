"""The form in which a network takes images, and how files of other forms are brought to it."""

from typing import NamedTuple


# (width, height) of an image and the wanted one -> the box in its center, and its size afterwards.
def _crop(extent, size):
    scale = min(extent[0] / size[0], extent[1] / size[1])
    return (scale * size[0], scale * size[1]), size


def _pad(extent, size):
    scale = min(size[0] / extent[0], size[1] / extent[1])
    return extent, (max(1, round(scale * extent[0])), max(1, round(scale * extent[1])))


RESIZE_MODES = {"crop": _crop, "stretch": lambda extent, size: (extent, size), "pad": _pad}


class ImageFormat(NamedTuple):
    """What `load_image` makes of a file: uint8 (height, width, channels)."""

    input_shape: tuple[int, int]  # (height, width) in pixels
    img_channels: int = 3  # 3 (RGB) or 1 (gray)
    resize_mode: str = "crop"  # shorter side to size, then the center; or stretch, or pad to size
    background: tuple[int, int, int] = (255, 255, 255)  # what transparent pixels and bars show
    icc: bool = True  # whether an embedded color profile converts to sRGB

    @classmethod
    def from_config(cls, config, **changes):
        """The format in a training's settings, with these changes except None."""
        values = config | {name: value for name, value in changes.items() if value is not None}
        found = {name: values[name] for name in cls._fields if name in values}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})
