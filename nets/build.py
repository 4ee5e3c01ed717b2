"""The one place that builds a GaussianDiffusion: from the settings of a run, or from the shapes in a bare file of weights."""

import re
import warnings

import torch

from .diffusion import GaussianDiffusion
from .schedules import find_schedule, make_betas
from .unet import UNet

MAX_GROUPS = 32  # the reference's group norm


def from_config(config, num_classes=0):
    """The GaussianDiffusion of train.py's settings, a dict by field name; missing ones have the reference's defaults.

    num_classes: how many class names there are. With `class_conditional` the network has that many rows, and one more, the null
    class, where `label_dropout` is above 0. ValueError for settings that do not fit together.
    """
    channel_mults = tuple(config.get("channel_mults", (1, 2, 2, 2)))
    attention_resolutions = tuple(config.get("attention_resolutions", (1,)))
    input_shape = tuple(config.get("input_shape", (32, 32)))
    img_channels = config.get("img_channels", 3)
    check_levels(channel_mults, attention_resolutions)
    check_input_shape(input_shape, len(channel_mults))
    rows, null_class = class_rows(config, num_classes)
    network = UNet(
        img_channels,
        base_channels=config.get("channel", 128),
        channel_mults=channel_mults,
        num_res_blocks=config.get("num_res_blocks", 2),
        num_classes=rows,
        dropout=config.get("dropout", 0.1),
        attention_resolutions=attention_resolutions,
        num_groups=choose_groups(config.get("num_groups", MAX_GROUPS), config.get("channel", 128)),
        activation_checkpointing=config.get("activation_checkpointing", False),
    )
    betas = make_betas(config.get("schedule", "linear"), config.get("num_timesteps", 1000),
                       config.get("schedule_low", 1e-4), config.get("schedule_high", 0.02))
    return GaussianDiffusion(
        network, input_shape, img_channels, rows, betas,
        loss_type=config.get("loss_type", "l2"),
        ema_decay=config.get("ema_decay", 0.9999),
        ema_start=config.get("ema_start", 2000),
        prediction=config.get("prediction", "eps"),
        loss_weighting=config.get("loss_weighting", "none"),
        min_snr_gamma=config.get("min_snr_gamma", 5.0),
        ema_warmup=config.get("ema_warmup", False),
        null_class=null_class,
    )


def from_checkpoint(checkpoint, input_shape=None):
    """(GaussianDiffusion in eval mode, class names) of a loaded checkpoint: a dict with `weights`, `weights_kind`, `config`, `classes`.

    An empty `config` is a bare state dict, whose classes are called by their numbers; without classes there are no names.
    input_shape: another (height, width) than it was trained for. ValueError where settings and weights do not fit together.
    """
    overrides = {"input_shape": input_shape} if input_shape else {}
    if checkpoint["config"]:
        diffusion = from_config({**checkpoint["config"], **overrides}, len(checkpoint["classes"]))
        load_weights(diffusion, checkpoint["weights"], checkpoint["weights_kind"])
    else:
        diffusion = from_weights(checkpoint["weights"], **overrides)
    if diffusion.num_classes is None:
        return diffusion.eval(), []
    named = diffusion.num_classes - (diffusion.null_class is not None)
    return diffusion.eval(), checkpoint["classes"] or [str(number) for number in range(named)]


def class_rows(config, num_classes):
    """(rows of the class embeddings, the null class): (None, None) without classes."""
    if not config.get("class_conditional", False):
        return None, None
    if num_classes < 1:
        raise ValueError("class_conditional is on, but the images have no classes: sort them into class folders and list them again")
    if config.get("label_dropout", 0.0) > 0:
        return num_classes + 1, num_classes
    return num_classes, None


def choose_groups(num_groups, channel):
    """`num_groups`, or for "auto" as many as divide `channel` with four or more channels in each, up to the reference's 32.

    A group of one channel is normalised by itself, which takes away what time and class added to it: the level is blind to them.
    """
    if num_groups != "auto":
        return num_groups
    return max(groups for groups in range(1, MAX_GROUPS + 1) if channel % groups == 0 and groups <= max(1, channel // 4))


def check_levels(channel_mults, attention_resolutions):
    """ValueError unless there is a level, and attention is at levels that exist."""
    if not channel_mults:
        raise ValueError("channel_mults is empty: the network needs at least one level, such as 1,")
    unknown = [level for level in attention_resolutions if level not in range(len(channel_mults))]
    if unknown:
        raise ValueError(f"attention_resolutions are levels from 0 to {len(channel_mults) - 1} (one a channel_mult), not {unknown}")


def check_input_shape(input_shape, levels):
    """ValueError, naming the nearest sizes that fit, unless (height, width) can be halved at each of `levels` but the last."""
    factor = 2 ** (levels - 1)
    if any(size < 1 or size % factor for size in input_shape):
        near = [tuple(max(move(size), 1) * factor for size in input_shape) for move in (lambda s: s // factor, lambda s: -(-s // factor))]
        raise ValueError(f"input_shape {tuple(input_shape)} cannot be halved {levels - 1} times: height and width must be multiples of "
                         f"{factor}, such as {' or '.join(str(shape) for shape in dict.fromkeys(near))}")


def from_weights(state_dict, input_shape=(32, 32)):
    """The GaussianDiffusion that a bare state dict belongs to, with these weights in it.

    Read off the shapes: channels, levels, blocks, attention, classes, the time embedding, batch norm or none; off the buffer: the
    betas. Instance norm looks like group norm, and what leaves no trace (groups, prediction, padding) is the reference's default.
    Its average counts as started: the first update must not overwrite it. ValueError for a file of something else.
    """
    weights = clean_keys(state_dict)
    kind = "full" if "model.init_conv.weight" in weights else "ema"
    architecture = read_architecture(weights, "model." if kind == "full" else "ema_model.")
    check_input_shape(input_shape, len(architecture["channel_mults"]))
    network = UNet(**architecture)
    diffusion = GaussianDiffusion(network, input_shape, architecture["img_channels"], architecture["num_classes"],
                                  weights["betas"].double().cpu().numpy())
    load_weights(diffusion, weights, kind)
    diffusion.ema_step = diffusion.ema_start
    return diffusion


def read_architecture(weights, prefix):
    """The UNet's arguments, read off the shapes of the weights below `prefix`."""
    needed = ["betas", *(prefix + name for name in ("init_conv.weight", "downs.0.conv_1.weight", "mid.0.conv_1.weight", "out_conv.weight"))]
    missing = [name for name in needed if name not in weights]
    if missing:
        raise ValueError(f"this is not a state dict of a GaussianDiffusion: it has no {some(missing)}")
    shapes = {key.removeprefix(prefix): tuple(value.shape) for key, value in weights.items() if key.startswith(prefix)}
    base_channels, img_channels = shapes["init_conv.weight"][:2]
    widths, blocks, attention = read_levels(shapes)
    return {
        "img_channels": img_channels,
        "base_channels": base_channels,
        "channel_mults": tuple(width // base_channels for width in widths),
        "num_res_blocks": blocks,
        "time_emb_dim": shapes["time_mlp.1.weight"][0] if "time_mlp.1.weight" in shapes else None,
        "num_classes": shapes["downs.0.class_bias.weight"][0] if "downs.0.class_bias.weight" in shapes else None,
        "attention_resolutions": attention,
        "norm": None if "out_norm.weight" not in shapes else "bn" if "out_norm.running_mean" in shapes else "gn",
    }


def read_levels(shapes):
    """(width of each level, residual blocks a level, levels with attention), from the layers on the way down."""
    layers = {int(match[1]) for match in (re.match(r"downs\.(\d+)\.", key) for key in shapes) if match}
    levels = [[]]
    for i in sorted(layers):
        if f"downs.{i}.downsample.weight" in shapes:
            levels.append([])
        elif f"downs.{i}.conv_1.weight" in shapes:
            levels[-1].append(i)
    if len({len(level) for level in levels}) != 1 or not levels[0]:
        raise ValueError("this state dict has levels with different numbers of residual blocks: not a network of this project")
    widths = [shapes[f"downs.{level[0]}.conv_1.weight"][0] for level in levels]
    attention = tuple(i for i, level in enumerate(levels) if f"downs.{level[0]}.attention.to_qkv.weight" in shapes)
    return widths, len(levels[0]), attention


def load_weights(diffusion, state_dict, kind="full"):
    """Puts a state dict into `diffusion`. kind "ema": `model.*` is absent and filled from the average; half precision is fine.

    Prefixes of DistributedDataParallel and torch.compile are understood. ValueError that names unknown, missing and mis-shaped keys.
    """
    if kind not in ("full", "ema"):
        raise ValueError(f"unknown kind of weights {kind!r}; known: full, ema")
    weights = clean_keys(state_dict)
    if kind == "ema":
        weights |= {key.removeprefix("ema_"): value for key, value in weights.items() if key.startswith("ema_model.")}
    own = diffusion.state_dict()
    problems = {
        "unknown": [key for key in weights if key not in own],
        "missing": [key for key in own if key not in weights],
        "of another shape": [f"{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}" for key, value in weights.items()
                             if key in own and value.shape != own[key].shape],
    }
    if any(problems.values()):
        found = "; ".join(f"{len(keys)} {what}: {some(keys)}" for what, keys in problems.items() if keys)
        raise ValueError(f"the weights do not fit this network: {found}")
    diffusion.load_state_dict(weights)


def clean_keys(state_dict):
    """The state dict without the parts that wrappers put into its keys; ValueError unless it maps names to tensors."""
    if not isinstance(state_dict, dict) or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise ValueError("this is not a state dict: it should map names to tensors")
    return {".".join(part for part in key.split(".") if part not in ("module", "_orig_mod")): value for key, value in state_dict.items()}


def some(names, limit=3):
    """The first few names, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def known_settings(checkpoint):
    """The settings of train.py that a checkpoint is to be gone on with, by field name: its own, or those that its weights show."""
    # Groups leave no trace in weights: what does not name them has the reference's.
    config = {"num_groups": MAX_GROUPS, **(checkpoint["config"] or config_from_weights(checkpoint["weights"]))}
    # Without a counter the average is an old one: a warm-up would replace most of it within a few steps.
    return config if "ema_step" in checkpoint else {**config, "ema_warmup": False}


def config_from_weights(state_dict):
    """The settings of train.py that a bare state dict shows, by field name. ValueError where they cannot express its network."""
    weights = clean_keys(state_dict)
    found = read_architecture(weights, "model." if "model.init_conv.weight" in weights else "ema_model.")
    if found["time_emb_dim"] != 512 or found["norm"] != "gn":
        raise ValueError(f"a network with time_emb_dim {found['time_emb_dim']} and norm {found['norm']!r} can be drawn with, not trained "
                         "on: train.py builds 512 and 'gn'")
    betas = weights["betas"].double().cpu().numpy()
    try:
        schedule = find_schedule(betas)
    except ValueError:
        schedule = {"num_timesteps": len(betas)}
        warnings.warn("the betas of these weights are those of no schedule here: they are kept as they are", stacklevel=2)
    return {
        "img_channels": found["img_channels"], "channel": found["base_channels"], "channel_mults": found["channel_mults"],
        "num_res_blocks": found["num_res_blocks"], "attention_resolutions": found["attention_resolutions"],
        "class_conditional": found["num_classes"] is not None, "label_dropout": 0.0, **schedule,
    }
