"""The one place that builds a GaussianDiffusion: from the settings of a run, or from the shapes in a bare file of weights."""

from .diffusion import GaussianDiffusion
from .schedules import make_betas
from .unet import MAX_GROUPS, UNet, check_input_shape, check_levels, choose_groups
from .weights import check_fit, check_sizes, class_rows, clean_keys, read_architecture


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


def load_weights(diffusion, state_dict, kind="full"):
    """Puts a state dict into `diffusion`. kind "ema": `model.*` is absent and filled from the average; half precision is fine.

    Prefixes of DistributedDataParallel and torch.compile are understood. ValueError that names unknown, missing and mis-shaped keys.
    """
    if kind not in ("full", "ema"):
        raise ValueError(f"unknown kind of weights {kind!r}; known: full, ema")
    weights = clean_keys(state_dict)
    if kind == "ema":
        weights |= {key.removeprefix("ema_"): value for key, value in weights.items() if key.startswith("ema_model.")}
    check_fit(diffusion.state_dict(), weights)
    diffusion.load_state_dict(weights)
