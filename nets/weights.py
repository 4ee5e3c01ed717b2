"""What a bare file of weights shows: the architecture, the schedule, and settings to go on with."""

import re
import warnings

import numpy as np
import torch

from .schedules import MAX_BETA, SCHEDULES, check_betas
from .unet import MAX_GROUPS, TIME_EMB_DIM


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


def clean_keys(state_dict):
    """The state dict without the parts that wrappers put into its keys; ValueError unless it maps names to tensors."""
    if not isinstance(state_dict, dict) or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise ValueError("this is not a state dict: it should map names to tensors")
    return {".".join(part for part in key.split(".") if part not in ("module", "_orig_mod")): value for key, value in state_dict.items()}


def some(names, limit=3):
    """The first few names, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def known_settings(checkpoint):
    """The settings of train.py to resume a checkpoint with: its own, or those that its weights show."""
    # Groups leave no trace in weights: a file that does not name them has the reference's.
    config = {"num_groups": MAX_GROUPS, **(checkpoint["config"] or config_from_weights(checkpoint["weights"]))}
    # Without a counter the EMA is an old one: a warm-up would replace most of it within a few steps.
    return config if "ema_step" in checkpoint else {**config, "ema_warmup": False}


def config_from_weights(state_dict):
    """The settings of train.py that a bare state dict shows. ValueError where they cannot express its network."""
    settings, _ = read_settings(clean_keys(state_dict))
    time_emb_dim, norm = settings.pop("time_emb_dim"), settings.pop("norm")
    if time_emb_dim != TIME_EMB_DIM or norm != "gn":
        raise ValueError(f"a network with time_emb_dim {time_emb_dim} and norm {norm!r} can be drawn with, not trained on: "
                         f"train.py builds {TIME_EMB_DIM} and 'gn'")
    if "schedule" not in settings:
        warnings.warn("the betas of these weights are those of no schedule here: they are kept as they are", stacklevel=2)
    return settings


def read_settings(weights):
    """(settings by train.py's names, number of classes) of a bare state dict, besides `time_emb_dim` and `norm`.

    `schedule` is missing where the betas are those of no schedule here.
    """
    found = read_architecture(weights, "model." if "model.init_conv.weight" in weights else "ema_model.")
    betas = weights["betas"].double().cpu().numpy()
    try:
        schedule = find_schedule(betas)
    except ValueError:
        schedule = {"num_timesteps": len(betas)}
    settings = {
        "img_channels": found["img_channels"], "channel": found["base_channels"], "channel_mults": found["channel_mults"],
        "num_res_blocks": found["num_res_blocks"], "attention_resolutions": found["attention_resolutions"],
        "time_emb_dim": found["time_emb_dim"], "norm": found["norm"],
        "class_conditional": found["num_classes"] is not None, "label_dropout": 0.0, **schedule,
    }  # fmt: skip
    return settings, found["num_classes"] or 0


def find_schedule(betas):
    """The inverse of `make_betas`, to float32's digits: a dict of schedule, num_timesteps and, for linear, schedule_low and _high.

    ValueError where the betas are those of no schedule here.
    """
    betas = check_betas(betas)
    T, free = len(betas), max(np.flatnonzero(betas < MAX_BETA), default=0)  # the last beta that the cap has not touched
    last = betas[0] + (betas[free] - betas[0]) * (T - 1) / free if free else betas[0]  # of the line, before it was capped
    low, high = (float(f"{beta * T / 1000:.6g}") for beta in (betas[0], last))
    for schedule, make in SCHEDULES.items():
        if np.allclose(make(T, low, high), betas, rtol=1e-5, atol=1e-9):
            limits = {"schedule_low": low, "schedule_high": high} if schedule == "linear" else {}
            return {"schedule": schedule, "num_timesteps": T, **limits}
    raise ValueError(f"this is not one of our models: its betas are those of no schedule of ours ({', '.join(SCHEDULES)})")
