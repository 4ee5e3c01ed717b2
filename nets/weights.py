"""Reads the architecture, the schedule and the settings from a state dict without a config."""

import re
import warnings

import numpy as np
import torch

from .schedules import MAX_BETA, SCHEDULES, check_betas
from .unet import MAX_GROUPS, TIME_EMB_DIM


def read_architecture(weights, prefix):
    """The UNet's arguments, a dict, from the shapes of the weights with this prefix."""
    layers = ("init_conv", "downs.0.conv_1", "mid.0.conv_1", "out_conv")
    needed = ["betas", *(f"{prefix}{layer}.weight" for layer in layers)]
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
    """(channels of each level, residual blocks per level, levels with attention), from `downs`."""
    layers = {int(match[1]) for match in (re.match(r"downs\.(\d+)\.", key) for key in shapes) if match}
    levels = [[]]
    for i in sorted(layers):
        if f"downs.{i}.downsample.weight" in shapes:
            levels.append([])
        elif f"downs.{i}.conv_1.weight" in shapes:
            levels[-1].append(i)
    if len({len(level) for level in levels}) != 1 or not levels[0]:
        raise ValueError("not a network of this project: its levels have different numbers of residual blocks")
    widths = [shapes[f"downs.{level[0]}.conv_1.weight"][0] for level in levels]
    attention = tuple(i for i, level in enumerate(levels) if f"downs.{level[0]}.attention.to_qkv.weight" in shapes)
    return widths, len(levels[0]), attention


def clean_keys(state_dict):
    """The state dict without `module` and `_orig_mod` in its keys; ValueError for other objects."""
    if not isinstance(state_dict, dict) or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise ValueError("this is not a state dict: it should map names to tensors")
    wrappers = ("module", "_orig_mod")  # of DistributedDataParallel and torch.compile
    return {".".join(part for part in key.split(".") if part not in wrappers): state_dict[key] for key in state_dict}


def some(names, limit=3):
    """The first `limit` names and the number of the others, as text."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def known_settings(checkpoint):
    """train.py's settings of a checkpoint: its config, or what its weights determine."""
    # Weights do not determine num_groups. Without it in the config, it is the reference's.
    config = {"num_groups": MAX_GROUPS, **(checkpoint["config"] or config_from_weights(checkpoint["weights"]))}
    # Without ema_step the EMA is a finished one. A warm-up would replace most of it in a few steps.
    return config if "ema_step" in checkpoint else {**config, "ema_warmup": False}


def config_from_weights(state_dict):
    """train.py's settings of a bare state dict; ValueError for a network that they cannot build."""
    settings, _ = read_settings(clean_keys(state_dict))
    time_emb_dim, norm = settings.pop("time_emb_dim"), settings.pop("norm")
    if time_emb_dim != TIME_EMB_DIM or norm != "gn":
        raise ValueError(f"train.py cannot train a network with time_emb_dim {time_emb_dim} and norm {norm!r}: "
                         f"it needs {TIME_EMB_DIM} and 'gn'. predict.py can sample with it.")
    if "schedule" not in settings:
        warnings.warn("the betas of these weights match no known schedule: they are used unchanged", stacklevel=2)
    return settings


def read_settings(weights):
    """(settings, number of classes) of a bare state dict with clean keys.

    The settings are train.py's, time_emb_dim and norm. `schedule` is missing for unknown betas.
    """
    found = read_architecture(weights, "model." if "model.init_conv.weight" in weights else "ema_model.")
    betas = weights["betas"].double().cpu().numpy()
    try:
        schedule = find_schedule(betas)
    except ValueError:
        schedule = {"num_timesteps": len(betas)}
    settings = {
        "img_channels": found["img_channels"], "channel": found["base_channels"], "norm": found["norm"],
        "channel_mults": found["channel_mults"], "num_res_blocks": found["num_res_blocks"],
        "attention_resolutions": found["attention_resolutions"], "time_emb_dim": found["time_emb_dim"],
        "class_conditional": found["num_classes"] is not None, "label_dropout": 0.0, **schedule,
    }  # fmt: skip
    return settings, found["num_classes"] or 0


def find_schedule(betas):
    """The arguments of `make_betas` for (float32) betas, a dict; ValueError for unknown betas."""
    betas = check_betas(betas)
    T, free = len(betas), max(np.flatnonzero(betas < MAX_BETA), default=0)  # free: the last index below the cap
    last = betas[0] + (betas[free] - betas[0]) * (T - 1) / free if free else betas[0]  # the last beta without the cap
    low, high = (float(f"{beta * T / 1000:.6g}") for beta in (betas[0], last))
    for schedule, make in SCHEDULES.items():
        if np.allclose(make(T, low, high), betas, rtol=1e-5, atol=1e-9):
            limits = {"schedule_low": low, "schedule_high": high} if schedule == "linear" else {}
            return {"schedule": schedule, "num_timesteps": T, **limits}
    raise ValueError(f"this is not one of our models: its betas match no schedule of ours ({', '.join(SCHEDULES)})")
