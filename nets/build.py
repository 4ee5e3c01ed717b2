"""Builds a GaussianDiffusion from settings or from a file of weights. Every script uses it."""

import torch

from .diffusion import GaussianDiffusion
from .errors import SettingError, check_choice
from .guidance import check_weaker_model
from .schedules import make_betas
from .sizes import check_input_shape
from .unet import UNet
from .weights import change_classes, check_fit, check_sizes, class_rows, clean_keys, read_settings, unet_arguments

# train.py's settings that are arguments of the same name. A missing one leaves the default.
SCHEDULE = ("schedule", "num_timesteps", "schedule_low", "schedule_high", "schedule_shift")
OBJECTIVE = ("loss_type", "ema_decay", "ema_start", "prediction", "loss_weighting", "min_snr_gamma", "ema_warmup")


def from_config(config, num_classes=0):
    """The GaussianDiffusion for train.py's settings, a dict by field name.

    num_classes: the number of class names. With class_conditional the network has an embedding per
    class, and label_dropout > 0 adds the null class. ValueError: settings that do not fit together.
    """
    input_shape, img_channels = tuple(config.get("input_shape", (32, 32))), config.get("img_channels", 3)
    rows, null_class = class_rows(config, num_classes)
    arguments = unet_arguments(config, num_classes)
    check_input_shape(input_shape, len(arguments["channel_mults"]))
    betas = make_betas(**{name: config[name] for name in SCHEDULE if name in config})
    objective = {name: config[name] for name in OBJECTIVE if name in config}
    network = UNet(**arguments)
    return GaussianDiffusion(network, input_shape, img_channels, rows, betas, null_class=null_class, **objective)


def from_checkpoint(checkpoint, input_shape=None):
    """(GaussianDiffusion in eval mode, class names) of a loaded checkpoint.

    checkpoint: a dict with weights, weights_kind, config and classes. An empty config means a bare
    state dict; the class names are then "0", "1", ... A network without classes has no names.
    input_shape: (height, width); None is the config's, or 32x32 for a bare state dict.
    ValueError where settings and weights do not fit together.
    """
    check_sizes(checkpoint)
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


def guiding_model(checkpoint, own, diffusion, use_ema=True):
    """The GaussianDiffusion of a weaker checkpoint, to guide `diffusion`, which is that of `own`.

    ValueError where it cannot be built, is of another kind, or has the same weights.
    """
    for name, found in (
        ("classes", [part["classes"] for part in (checkpoint, own)]),
        ("input_shape", [part["config"].get("input_shape") for part in (checkpoint, own)]),
    ):
        if all(found) and found[0] != found[1]:
            raise SettingError(f"the guiding model learned another {name}: take an earlier file of the same run")
    try:
        guide, _ = from_checkpoint(checkpoint, diffusion.img_size)
    except ValueError as error:
        raise SettingError(f"the guiding model: {error}") from None
    check_weaker_model(diffusion, 1.0, guide)
    networks = [part.ema_model if use_ema else part.model for part in (diffusion, guide)]
    weights, others = ([value.half() for value in network.parameters()] for network in networks)  # as small files have
    if len(weights) == len(others) and all(map(torch.equal, weights, others)):
        raise SettingError(
            "the guiding model has the same weights and leads nowhere: take an earlier file of the same run"
        )
    return guide


def from_weights(state_dict, input_shape=(32, 32)):
    """The GaussianDiffusion of a bare state dict, with its weights.

    Shapes and betas determine the settings; the others (groups, prediction, padding) are the
    reference's defaults. Instance norm is read as group norm. The EMA counter is ema_start, so that
    the first update does not overwrite the EMA. ValueError for other files.
    """
    weights = clean_keys(state_dict)
    settings, num_classes = read_settings(weights)
    diffusion = from_config({**settings, "input_shape": input_shape}, num_classes)
    load_weights(diffusion, weights, "full" if "model.init_conv.weight" in weights else "ema")
    diffusion.ema_step = diffusion.ema_start
    return diffusion


def with_classes(checkpoint, config, classes):
    """The checkpoint with its EMA as the weights of a network for other classes, names."""
    rows, null_class = class_rows(config, len(classes))
    chosen = list(classes) if rows else []
    weights = change_classes(checkpoint["weights"], checkpoint["classes"], chosen, null_class is not None)
    return {**checkpoint, "weights": weights, "weights_kind": "ema", "classes": chosen}


def load_weights(diffusion, state_dict, kind="full"):
    """Loads a state dict into `diffusion`. kind "ema": `model.*` is missing and becomes the EMA.

    Half precision and the prefixes of DistributedDataParallel and torch.compile are fine.
    ValueError: unknown, missing or mis-shaped keys.
    """
    check_choice("kind of weights", kind, ("full", "ema"))
    weights = clean_keys(state_dict)
    if kind == "ema":
        weights |= {key.removeprefix("ema_"): value for key, value in weights.items() if key.startswith("ema_model.")}
    check_fit(diffusion.state_dict(), weights)
    diffusion.load_state_dict(weights)
