"""Builds a GaussianDiffusion from settings or from a file of weights. Every script uses it."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from . import architecture
from .architecture import Weights, arguments_of, check_sizes, clean_keys, prefixes
from .diffusion import GaussianDiffusion
from .errors import SettingError, check_choice
from .sampling import check_guiding_model
from .schedules import find_schedule, make_betas
from .unet import MAX_GROUPS, UNet

Checkpoint = Any  # of utils/checkpoint/file.py: weights, kind, config ({}: a bare state dict), classes


def from_config(config: Mapping[str, Any], num_classes: int = 0) -> GaussianDiffusion:
    """The GaussianDiffusion for train.py's settings, a dict by field name.

    A setting goes to the constructor that has an argument of its name; a missing one leaves the
    default, and others are ignored. num_classes: the number of class names; label_dropout > 0 adds
    the null class. ValueError: settings that do not fit together.
    """
    size = tuple(config.get("input_shape", (32, 32)))
    own = {"img_size": size, "condition": architecture.make_condition({**config, "input_shape": size})}
    rows, null_class = architecture.class_rows(config, num_classes)
    network = architecture.unet_arguments(config, num_classes)
    architecture.check_input_shape(size, len(network["channel_mults"]))
    own |= {"img_channels": network["img_channels"], "num_classes": rows, "null_class": null_class}
    betas = make_betas(**arguments_of(make_betas, config))
    return GaussianDiffusion(**arguments_of(GaussianDiffusion, config, model=UNet(**network), betas=betas, **own))


def from_checkpoint(checkpoint: Checkpoint, input_shape: Sequence | None = None) -> tuple[GaussianDiffusion, list[str]]:
    """(GaussianDiffusion in eval mode, class names) of a loaded checkpoint.

    The class names of a bare state dict are "0", "1", ... A network without classes has no names.
    input_shape: (height, width); None is the config's, or 32x32 for a bare state dict.
    ValueError where settings and weights do not fit together.
    """
    overrides = {"input_shape": input_shape} if input_shape else {}
    if checkpoint.config:
        diffusion = from_config({**settings_of(checkpoint), **overrides}, len(checkpoint.classes))
        load_weights(diffusion, checkpoint.weights, checkpoint.kind)
    else:
        diffusion = from_weights(checkpoint.weights, **overrides)
    if diffusion.num_classes is None:
        return diffusion.eval(), []
    named = diffusion.num_classes - (diffusion.null_class is not None)
    return diffusion.eval(), checkpoint.classes or [str(number) for number in range(named)]


def guiding_model(checkpoint: Checkpoint, own: Checkpoint, diffusion: GaussianDiffusion) -> GaussianDiffusion:
    """The GaussianDiffusion of a weaker checkpoint, to guide `diffusion`, which is that of `own`.

    ValueError where it cannot be built or is of another kind.
    """
    shapes = [part.config.get("input_shape") for part in (checkpoint, own)]
    for name, (one, other) in {"classes": (checkpoint.classes, own.classes), "input_shape": shapes}.items():
        if one and other and one != other:
            raise SettingError(f"the guiding model learned another {name}: take an earlier file of the same run")
    try:
        guide, _ = from_checkpoint(checkpoint, diffusion.img_size)
    except SettingError as error:
        raise SettingError(f"the guiding model: {error}") from None
    check_guiding_model(diffusion, 1.0, guide)
    # In half precision, as exports have them.
    weights, others = ([value.half() for value in part.ema_model.parameters()] for part in (diffusion, guide))
    if len(weights) == len(others) and all(map(torch.equal, weights, others)):
        raise SettingError("the guiding model has the same weights: take an earlier file of the same run")
    return guide


def from_weights(state_dict: Weights, input_shape: Sequence[int] = (32, 32)) -> GaussianDiffusion:
    """The GaussianDiffusion of a bare state dict, with its weights.

    Shapes and betas determine the settings; the others (groups, prediction, padding) are the
    reference's defaults. The EMA counter is ema_start: the first update must not overwrite the EMA.
    """
    settings, num_classes = read_settings(state_dict)
    diffusion = from_config({**settings, "input_shape": input_shape}, num_classes)
    load_weights(diffusion, state_dict, "full" if "model." in prefixes(clean_keys(state_dict)) else "ema")
    diffusion.ema_step = diffusion.ema_start
    return diffusion


def read_settings(state_dict: Weights) -> tuple[dict[str, Any], int]:
    """(settings, number of classes) of a bare state dict, whose sizes fit each other.

    The settings are train.py's, and time_emb_dim and norm. `schedule` is missing for unknown betas.
    """
    weights = clean_keys(state_dict)
    settings = architecture.read_architecture(weights, prefixes(weights)[0])
    classes, betas = settings.pop("num_classes"), weights.get("betas", torch.zeros(1)).cpu().double().numpy()
    settings |= {"channel": settings.pop("base_channels"), "class_conditional": classes is not None}
    settings |= {"label_dropout": 0.0, "num_timesteps": betas.size}
    with suppress(ValueError):
        settings |= find_schedule(betas)
    check_sizes(weights, settings, classes or 0)
    return settings, classes or 0


def config_from_weights(state_dict: Weights) -> dict[str, Any]:
    """Settings of a bare state dict: train.py's, and time_emb_dim. ValueError: not trainable."""
    settings, _ = read_settings(state_dict)
    settings["num_groups"] = MAX_GROUPS  # the reference's: the weights do not show it
    if settings.pop("norm") != "gn" or settings["time_emb_dim"] is None:
        raise SettingError("train.py trains only networks with group norm and a time embedding (predict.py any)")
    if "schedule" not in settings:
        warnings.warn("the betas of these weights match no known schedule: they are used unchanged", stacklevel=2)
    return settings


def settings_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """train.py's settings of a checkpoint: its config, or what its weights determine."""
    if not checkpoint.config:
        return config_from_weights(checkpoint.weights)
    check_sizes(clean_keys(checkpoint.weights), checkpoint.config, len(checkpoint.classes))
    return checkpoint.config


def load_weights(diffusion: GaussianDiffusion, state_dict: Weights, kind: str = "full") -> None:
    """Loads a state dict into `diffusion`. kind "ema": `model.*` is missing and becomes the EMA.

    Half precision and wrappers' prefixes are fine. ValueError: keys or shapes that do not fit.
    """
    check_choice("kind of weights", kind, ("full", "ema"))
    weights = clean_keys(state_dict)
    if kind == "ema":
        weights |= {key.removeprefix("ema_"): value for key, value in weights.items() if key.startswith("ema_model.")}
    architecture.check_fit(diffusion.state_dict(), weights)
    diffusion.load_state_dict(weights)
