"""Which sizes fit a UNet, and what it costs. Nobody needs it to understand the network."""

import math

import torch

from .errors import SettingError
from .unet import MAX_GROUPS, UNet


def choose_groups(num_groups, channel):
    """`num_groups`; for "auto" the most groups, up to 32, that have at least four channels each.

    In a group of one channel, group norm removes the shift by time and class.
    """
    if num_groups != "auto":
        return num_groups
    return max(n for n in range(1, MAX_GROUPS + 1) if channel % n == 0 and n <= max(1, channel // 4))


def check_levels(channel_mults, attention_resolutions):
    """ValueError unless there is a level and attention_resolutions are existing levels."""
    if not channel_mults:
        raise SettingError("channel_mults is empty: the network needs at least one level, such as 1,")
    last = len(channel_mults) - 1
    unknown = [level for level in attention_resolutions if level not in range(last + 1)]
    if unknown:
        raise SettingError(f"attention_resolutions must be levels from 0 to {last} (see channel_mults), not {unknown}")


def check_input_shape(input_shape, levels):
    """ValueError unless every level but the last can halve `input_shape` (height, width)."""
    factor = 2 ** (levels - 1)
    if any(size < 1 or size % factor for size in input_shape):
        near = [tuple(max(rounded(n / factor), 1) * factor for n in input_shape) for rounded in (math.floor, math.ceil)]
        raise SettingError(
            f"input_shape {tuple(input_shape)} does not fit {levels} levels: height and width must be "
            f"multiples of {factor}, such as {' or '.join(str(shape) for shape in dict.fromkeys(near))}"
        )


def count_parameters(arguments):
    """The number of parameters of UNet(**arguments), without memory for them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in UNet(**arguments).parameters())


def count_flops(arguments, input_shape):
    """Floating-point operations of UNet(**arguments) for one image (height, width), forward."""
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton, a fifth of a second at each start

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = UNet(**arguments)
        y = None if network.num_classes is None else torch.zeros(1, dtype=torch.long)
        network(torch.empty(1, arguments["img_channels"], *input_shape), torch.zeros(1), y)
    return counter.get_total_flops()
