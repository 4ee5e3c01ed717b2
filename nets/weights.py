"""Reads the architecture, the schedule and the settings from a state dict without a config."""

import inspect
import re
import warnings

import numpy as np
import torch

from .errors import SettingError
from .schedules import MAX_BETA, SCHEDULES, check_betas, schedule_tables, shift_betas
from .sizes import check_levels, choose_groups
from .unet import MAX_GROUPS, TIME_EMB_DIM, UNet

# Settings of train.py -> arguments of the UNet. A missing one leaves the argument's own default.
NETWORK = {
    "channel": "base_channels",
    "channel_mults": "channel_mults",
    "num_res_blocks": "num_res_blocks",
    "attention_resolutions": "attention_resolutions",
    "num_groups": "num_groups",
    "time_emb_dim": "time_emb_dim",
    "norm": "norm",
    "dropout": "dropout",
    "activation_checkpointing": "activation_checkpointing",
}
TABLES = tuple(schedule_tables(np.full(1, 0.5)))  # the buffers' names
# The weights that an architecture is read off.
READ = re.compile(r"^init_conv\.weight|^time_mlp\.1\.weight|\.class_bias\.weight|^downs\.\d+\.conv_1\.weight")


def read_architecture(weights, prefix):
    """The UNet's arguments, a dict, from the shapes of the weights with this prefix."""
    layers = ("init_conv", "downs.0.conv_1", "mid.0.conv_1", "out_conv")
    missing = [name for name in ("betas", *(f"{prefix}{layer}.weight" for layer in layers)) if name not in weights]
    shapes = {key.removeprefix(prefix): tuple(value.shape) for key, value in weights.items() if key.startswith(prefix)}
    flat = [key for key, shape in shapes.items() if READ.search(key) and (len(shape) < 2 or 0 in shape)]
    if missing or flat:
        fault = f"it has no {some(missing)}" if missing else f"{flat[0]} has the shape {shapes[flat[0]]}"
        raise SettingError(f"this is not a state dict of a GaussianDiffusion: {fault}")
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
    levels = [[]]
    for i in sorted({int(match[1]) for key in shapes if (match := re.match(r"downs\.(\d+)\.", key))}):
        if f"downs.{i}.downsample.weight" in shapes:
            levels.append([])
        elif f"downs.{i}.conv_1.weight" in shapes:
            levels[-1].append(i)
    if len({len(level) for level in levels}) != 1 or not levels[0]:
        raise SettingError("not a network of this project: its levels have different numbers of residual blocks")
    widths = [shapes[f"downs.{level[0]}.conv_1.weight"][0] for level in levels]
    attention = tuple(i for i, level in enumerate(levels) if f"downs.{level[0]}.attention.to_qkv.weight" in shapes)
    return widths, len(levels[0]), attention


def check_sizes(checkpoint):
    """ValueError unless the settings of a checkpoint describe the network of its tensors.

    It comes before the network is built, on the meta device: a small file may claim any size.
    """
    weights, config = clean_keys(checkpoint["weights"]), checkpoint["config"]
    if config:
        check_claims(config, len(checkpoint["classes"]), weights)
        described, T = unet_arguments(config, len(checkpoint["classes"])), config.get("num_timesteps", 1000)
    else:
        described, T = read_architecture(weights, prefixes(weights)[0]), len(weights["betas"])
    with torch.device("meta"):
        network, tables = UNet(**described).state_dict(), {name: torch.zeros(T) for name in TABLES}
    own = {f"{prefix}{name}": value for prefix in prefixes(weights) for name, value in network.items()}
    check_fit(own | tables, weights)
    check_betas(weights["betas"].double().cpu().numpy())


def prefixes(weights):
    """What the keys of the file's networks begin with, the network before its EMA."""
    return ("model.", "ema_model.") if "model.init_conv.weight" in weights else ("ema_model.",)


def check_claims(config, num_classes, weights):
    """ValueError for settings that ask for more than the file has."""
    values = sum(value.numel() for value in weights.values())
    mults, blocks = config.get("channel_mults", (1, 2, 2, 2)), config.get("num_res_blocks", 2)
    claims = {
        "channel": (config.get("channel", 128) * max(mults, default=1), values),
        "img_channels": (config.get("img_channels", 3), values),
        "num_timesteps": (config.get("num_timesteps", 1000), values),
        "num_res_blocks": (blocks * len(mults), len(weights)),
        "classes": (num_classes, values),
    }
    for name, (claimed, most) in claims.items():
        if claimed > most:
            raise SettingError(
                f"the weights do not fit this network: {name} is {config.get(name, num_classes)}, and the "
                f"file holds {values:,} numbers in {len(weights):,} tensors"
            )


def unet_arguments(config, num_classes):
    """The UNet's arguments from train.py's settings. ValueError: they do not fit together."""
    arguments = {name: parameter.default for name, parameter in inspect.signature(UNet).parameters.items()}
    arguments |= {argument: config[name] for name, argument in NETWORK.items() if name in config}
    arguments |= {"img_channels": config.get("img_channels", 3), "num_classes": class_rows(config, num_classes)[0]}
    arguments["num_groups"] = choose_groups(arguments["num_groups"], arguments["base_channels"])
    check_levels(arguments["channel_mults"], arguments["attention_resolutions"])
    return arguments


def check_fit(own, weights):
    """ValueError: unknown, missing or mis-shaped keys. own, weights: of network and file."""
    problems = {
        "unknown": [key for key in weights if key not in own],
        "missing": [key for key in own if key not in weights],
        "of another shape": [
            f"{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}"
            for key, value in weights.items()
            if key in own and value.shape != own[key].shape
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{len(keys)} {what}: {some(keys)}" for what, keys in problems.items() if keys)
        raise SettingError(f"the weights do not fit this network: {found}")


def class_rows(config, num_classes):
    """(rows of the class embeddings, the null class): (None, None) without classes."""
    if not config.get("class_conditional", False):
        return None, None
    if num_classes < 1:
        raise SettingError(
            "class_conditional is on, but the images have no classes: sort them into class folders and list them again"
        )
    return (num_classes + 1, num_classes) if config.get("label_dropout", 0.0) > 0 else (num_classes, None)


def change_classes(state_dict, known, classes, null_row):
    """The EMA's weights of a state dict, for a network with other classes.

    known: the names of its classes, [] for numbers. classes: the names of the new ones, [] for a
    network without. A class of both keeps its rows. A new one gets the null class's, or the mean.
    Without classes these are added to the bias of the time, and weights without classes get zeros:
    each leaves the output as it was. null_row: whether the new network has a null class.
    """
    weights = {key: value.float() for key, value in clean_keys(state_dict).items() if not key.startswith("model.")}
    for key in [key for key in weights if key.endswith(".time_bias.bias")]:
        embedding = key.replace(".time_bias.bias", ".class_bias.weight")
        rows = weights.pop(embedding, None)
        named, null = {}, torch.zeros_like(weights[key])
        if rows is not None:
            named = dict(zip(known or map(str, range(len(rows))), rows))
            null = rows[-1] if len(rows) > len(named) else rows.mean(0)
        if classes:
            weights[embedding] = torch.stack([named.get(name, null) for name in classes] + [null] * null_row)
        else:
            weights[key] = weights[key] + null
    return weights


def clean_keys(state_dict):
    """The state dict without `module` and `_orig_mod` in its keys; ValueError for other objects."""
    if not isinstance(state_dict, dict) or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise SettingError("this is not a state dict: it should map names to tensors")
    wrappers = ("module", "_orig_mod")  # of DistributedDataParallel and torch.compile
    return {".".join(part for part in key.split(".") if part not in wrappers): state_dict[key] for key in state_dict}


def some(names):
    """The first three names and the number of the others, as text."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def known_settings(checkpoint):
    """train.py's settings of a checkpoint: its config, or what its weights determine."""
    check_sizes(checkpoint)
    # Weights do not determine num_groups. Without it in the config, it is the reference's.
    config = checkpoint["config"] or config_from_weights(checkpoint["weights"])
    # A config without icc is of a run that ignored colour profiles, one without a shift had none.
    config = {"num_groups": MAX_GROUPS, "icc": not checkpoint["config"], "schedule_shift": 0.0, **config}
    # Without ema_step the EMA is a finished one. A warm-up would replace most of it in a few steps.
    return config if "ema_step" in checkpoint else {**config, "ema_warmup": False}


def config_from_weights(state_dict):
    """train.py's settings of a bare state dict; ValueError for a network that they cannot build."""
    settings, _ = read_settings(clean_keys(state_dict))
    time_emb_dim, norm = settings.pop("time_emb_dim"), settings.pop("norm")
    if time_emb_dim != TIME_EMB_DIM or norm != "gn":
        raise SettingError(
            f"train.py cannot train a network with time_emb_dim {time_emb_dim} and norm {norm!r}: "
            f"it needs {TIME_EMB_DIM} and 'gn'. predict.py can sample with it."
        )
    if "schedule" not in settings:
        warnings.warn("the betas of these weights match no known schedule: they are used unchanged", stacklevel=2)
    return settings


def read_settings(weights):
    """(settings, number of classes) of a bare state dict with clean keys.

    The settings are train.py's, time_emb_dim and norm. `schedule` is missing for unknown betas.
    """
    found = read_architecture(weights, prefixes(weights)[0])
    betas, classes = weights["betas"].double().cpu().numpy(), found["num_classes"]
    try:
        schedule = find_schedule(betas)
    except ValueError:
        schedule = {"num_timesteps": len(betas)}
    settings = {name: found[argument] for name, argument in NETWORK.items() if argument in found}
    settings |= {"img_channels": found["img_channels"], "class_conditional": classes is not None, "label_dropout": 0.0}
    return settings | schedule, classes or 0


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
    for schedule in ("cosine", "sigmoid"):
        shift = find_shift(betas, SCHEDULES[schedule](T, low, high))
        if shift:
            return {"schedule": schedule, "num_timesteps": T, "schedule_shift": shift}
    raise SettingError(f"this is not one of our models: its betas match no schedule of ours ({', '.join(SCHEDULES)})")


def find_shift(betas, unshifted):
    """The `shift` of `shift_betas` that leads from `unshifted` to `betas`, else None."""
    odds, before = ((1 - values[0]) / values[0] for values in (betas, unshifted))  # the SNR of timestep 0
    shift = round(0.5 * float(np.log(odds / before)), 6)
    return shift if np.allclose(shift_betas(unshifted, shift), betas, rtol=1e-5, atol=1e-9) else None
