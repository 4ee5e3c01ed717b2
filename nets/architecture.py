"""The UNet's arguments, from settings or bare weights; which sizes fit; what a network costs."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .condition import CONDITIONS, Condition
from .errors import SettingError, check_choice
from .schedules import check_betas, make_betas, schedule_tables
from .unet import MAX_GROUPS, UNet

Weights = dict[str, Tensor]  # a state dict
TABLES = tuple(schedule_tables(np.full(1, 0.5)))  # the buffers' names


def arguments_of(function: Callable, settings: Mapping[str, Any], **given: Any) -> dict[str, Any]:
    """The arguments of a function or class: those given, settings of their names, its defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name: settings.get(parameter.name, parameter.default) for parameter in parameters} | given


def unet_arguments(config: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """The UNet's arguments from train.py's settings. ValueError: they do not fit together."""
    rows, _ = class_rows(config, num_classes)
    renamed = {"base_channels": config["channel"]} if "channel" in config else {}
    arguments = arguments_of(UNet, {"img_channels": 3, **config}, num_classes=rows, **renamed)
    own, others = CONDITIONS[config.get("condition", "")]
    arguments["cond_channels"] = own * arguments["img_channels"] + others
    arguments["num_groups"] = choose_groups(arguments["num_groups"], arguments["base_channels"])
    check_levels(arguments["channel_mults"], arguments["attention_resolutions"])
    return arguments


def class_rows(config: Mapping[str, Any], num_classes: int) -> tuple[int | None, int | None]:
    """(rows of the class embeddings, the null class): None where there is none."""
    if not config.get("class_conditional"):
        return None, None
    if num_classes < 1:
        raise SettingError("class_conditional: the images have no classes; sort them into class folders")
    return (num_classes + 1, num_classes) if config.get("label_dropout") else (num_classes, None)


def make_condition(config: Mapping[str, Any]) -> Condition:
    """The Condition of train.py's settings. ValueError: they do not fit together."""
    kind, size = config.get("condition", ""), tuple(config["input_shape"])
    check_choice("condition", kind, CONDITIONS)
    scale = config.get("condition_scale", Condition().scale) if kind == "low_res" else 1
    if any(side % scale for side in size):
        raise SettingError(f"input_shape {size} is no multiple of condition_scale {scale}")
    name, value = {"gray": ("img_channels", 3), "pairs": ("resize_mode", "stretch")}.get(kind, ("", None))
    if config.get(name, value) != value:
        raise SettingError(f"condition {kind} needs {name} {value}")
    return Condition(kind, scale, bool(config.get("label_dropout"))) if kind else Condition()


def choose_groups(num_groups: int | str, channel: int) -> int:
    """`num_groups`; for "auto" the most groups, up to 32, that have at least four channels each.

    In a group of one channel, group norm removes the shift by time and class.
    """
    if num_groups != "auto":
        return num_groups
    return max(n for n in range(1, MAX_GROUPS + 1) if channel % n == 0 and n <= max(1, channel // 4))


def check_levels(channel_mults: Sequence[int], attention_resolutions: Sequence[int]) -> None:
    """ValueError unless attention_resolutions are existing levels."""
    last = len(channel_mults) - 1
    unknown = [level for level in attention_resolutions if level not in range(last + 1)]
    if unknown:
        raise SettingError(f"attention_resolutions must be levels from 0 to {last} (see channel_mults), not {unknown}")


def check_input_shape(input_shape: Sequence[int], levels: int) -> None:
    """ValueError unless every level but the last can halve `input_shape` (height, width)."""
    factor = 2 ** (levels - 1)
    if any(size % factor for size in input_shape):
        found = f"input_shape {tuple(input_shape)} does not fit {levels} levels"
        raise SettingError(f"{found}: height and width must be multiples of {factor}")


class NoInit(TorchFunctionMode):
    """Skips torch.nn.init. On the meta device its normal_ imports torch._dynamo, which is slow."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        skipped = getattr(func, "__module__", "") == "torch.nn.init"
        return None if skipped else func(*args, **(kwargs or {}))


def meta_unet(**arguments: Any) -> UNet:
    """UNet(**arguments) on the meta device: shapes without memory."""
    with torch.device("meta"), NoInit():
        return UNet(**arguments)


def count_parameters(arguments: Mapping[str, Any]) -> int:
    """The number of parameters of UNet(**arguments)."""
    return sum(parameter.numel() for parameter in meta_unet(**arguments).parameters())


def count_flops(arguments: Mapping[str, Any], input_shape: Sequence[int]) -> int:
    """Floating-point operations of UNet(**arguments) for one image (height, width), forward."""
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton, a fifth of a second at each start

    network = meta_unet(**arguments)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        x, t = torch.empty(1, arguments["img_channels"], *input_shape), torch.zeros(1, dtype=torch.long)
        network(x, t, y=t)  # without classes it ignores y
    return counter.get_total_flops()


def clean_keys(weights: Weights) -> Weights:
    """The weights without `module` and `_orig_mod` in their keys."""
    wrappers = ("module", "_orig_mod")  # of DistributedDataParallel and torch.compile
    return {".".join(part for part in key.split(".") if part not in wrappers): weights[key] for key in weights}


def prefixes(weights: Weights) -> tuple[str, ...]:
    """What the keys of the file's networks begin with, the network before its EMA."""
    return ("model.", "ema_model.") if "model.init_conv.weight" in weights else ("ema_model.",)


def read_architecture(weights: Weights, prefix: str) -> dict[str, Any]:
    """The UNet's arguments, from the shapes of the weights with this prefix; else ValueError."""
    shapes = {key.removeprefix(prefix): tuple(value.shape) for key, value in weights.items() if key.startswith(prefix)}
    inputs, outputs = shapes.get("init_conv.weight", ())[1:2], shapes.get("out_conv.weight", ())[:1]
    if inputs and outputs and inputs != outputs:
        raise SettingError("these weights are conditioned on an image, which only this project's own files describe")
    try:
        base_channels, img_channels = shapes["init_conv.weight"][:2]
        widths, blocks, attention = read_levels(shapes)
        return {
            "img_channels": img_channels,
            "base_channels": base_channels,
            "channel_mults": tuple(width // base_channels for width in widths),
            "num_res_blocks": blocks,
            "time_emb_dim": shapes.get("time_mlp.1.weight", [None])[0],
            "num_classes": shapes.get("downs.0.class_bias.weight", [None])[0],
            "attention_resolutions": attention,
            "norm": None if "out_norm.weight" not in shapes else "bn" if "out_norm.running_mean" in shapes else "gn",
        }
    except (LookupError, ValueError, ZeroDivisionError):
        raise SettingError("this is not a state dict of a GaussianDiffusion of this project") from None


def read_levels(shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[int], int, tuple[int, ...]]:
    """(channels of each level, residual blocks per level, levels with attention), from `downs`."""
    layers = {key.split(".")[1] for key in shapes if key.startswith("downs.")}
    levels = 1 + sum(f"downs.{i}.downsample.weight" in shapes for i in layers)
    blocks = (len(layers) - levels + 1) // levels
    firsts = [level * (blocks + 1) for level in range(levels)]  # the first block of each level
    widths = [shapes[f"downs.{i}.conv_1.weight"][0] for i in firsts]
    attention = tuple(level for level, i in enumerate(firsts) if f"downs.{i}.attention.to_qkv.weight" in shapes)
    return widths, blocks, attention


def check_sizes(weights: Weights, config: Mapping[str, Any], num_classes: int) -> None:
    """ValueError unless the settings describe the network of the weights, which have clean keys.

    It comes before the network is built, on the meta device: a small file may claim any size.
    """
    arguments, T = unet_arguments(config, num_classes), arguments_of(make_betas, config)["num_timesteps"]
    mults, held = arguments["channel_mults"], sum(map(Tensor.numel, weights.values()))
    width = max(arguments["base_channels"] * max(mults), arguments["img_channels"], num_classes)
    if width > held or arguments["num_res_blocks"] * len(mults) > len(weights):
        raise SettingError("the weights do not fit this network: its settings are for far more than the file holds")
    network, tables = meta_unet(**arguments).state_dict(), {name: torch.empty(T, device="meta") for name in TABLES}
    own = {f"{prefix}{name}": value for prefix in prefixes(weights) for name, value in network.items()}
    check_fit(own | tables, weights)
    check_betas(weights["betas"].cpu().double().numpy())


def check_fit(own: Weights, weights: Weights) -> None:
    """ValueError: unknown, missing or mis-shaped keys. own, weights: of network and file."""
    wrong = [key for key in weights if key in own and weights[key].shape != own[key].shape]
    problems = {
        "unknown": [key for key in weights if key not in own],
        "missing": [key for key in own if key not in weights],
        "of another shape": [f"{key} {tuple(weights[key].shape)} instead of {tuple(own[key].shape)}" for key in wrong],
    }
    if any(problems.values()):
        found = "; ".join(f"{len(keys)} {what}: {', '.join(keys[:3])}" for what, keys in problems.items() if keys)
        raise SettingError(f"the weights do not fit this network: {found}")


def change_classes(weights: Weights, known: Sequence[str], classes: Sequence[str], config: Mapping) -> Weights:
    """The EMA of a state dict, as the weights of a network for other classes (kind "ema").

    known: the names of its classes, [] for numbers. classes, config: the names and the settings of
    the new network. A class of both keeps its rows. A new one gets the null class's, or the mean;
    without classes the bias of the time does. Weights without classes or condition get zeros.
    """
    weights = {key: value.float() for key, value in clean_keys(weights).items() if not key.startswith("model.")}
    rows, null_class = class_rows(config, len(classes))
    for key in [key for key in weights if key.endswith(".time_bias.bias")]:
        embedding = key.replace(".time_bias.bias", ".class_bias.weight")
        old, named, null = weights.pop(embedding, None), {}, torch.zeros_like(weights[key])
        if old is not None:
            named = dict(zip(known or map(str, range(len(old))), old))
            null = old[-1] if len(old) > len(named) else old.mean(0)
        if rows is None:
            weights[key] = weights[key] + null
        else:
            new = [named.get(name, null) for name in classes]
            weights[embedding] = torch.stack(new + [null] * (null_class is not None))
    first, images = weights["ema_model.init_conv.weight"], len(weights["ema_model.out_conv.weight"])
    cond_channels = unet_arguments(config, len(classes))["cond_channels"]
    if first.shape[1] == images:
        weights["ema_model.init_conv.weight"] = torch.nn.functional.pad(first, (0, 0, 0, 0, 0, cond_channels))
    return weights
