"""Models as folders of the library diffusers (DDPMPipeline), and back.

diffusers' own classes check the settings and write the folders. Our UNet is a UNet2DModel with
other names, so its weights are only renamed. Classes differ: we add a class after the activation,
diffusers adds it before, and DDPMPipeline passes none. One class, by default the null class, is
therefore added to the biases of the time embedding.
"""

import contextlib
import inspect
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from nets import build
from nets.architecture import clean_keys, read_architecture
from nets.schedules import find_schedule
from nets.unet import UNet
from utils.checkpoint.file import Checkpoint, load_checkpoint, save_checkpoint
from utils.checkpoint.integrity import first_not_finite
from utils.checkpoint.runs import open_weights
from utils.errors import UserError, one_line
from utils.files import atomic_folder, begin_export
from utils.terminal import first_few

WEIGHTS = "diffusion_pytorch_model"  # .safetensors or .bin
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


@contextlib.contextmanager
def as_user_error(text, kind=UserError):
    """Turn whatever a library raises in the block into one line of ours that begins with `text`."""
    try:
        yield
    except Exception as error:
        raise kind(f"{text} ({one_line(error)})") from error


def import_diffusers():
    """UNet2DModel, DDPMScheduler and DDPMPipeline. UserError where diffusers is not installed."""
    with as_user_error("folders of diffusers need the package diffusers: pip install diffusers"):
        from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    return UNet2DModel, DDPMScheduler, DDPMPipeline


def export_model(run, folder, class_name=""):
    """Writes a run's EMA network as a folder for DDPMPipeline.from_pretrained.

    class_name: the class that it samples; "" is the null class, for a network that has one.
    UserError where `folder` exists, or where a UNet2DModel cannot express the network.
    """
    UNet2DModel, DDPMScheduler, DDPMPipeline = import_diffusers()
    folder = begin_export(folder)
    checkpoint = open_weights(run)
    diffusion, classes = build.from_checkpoint(checkpoint)
    settings, weights = to_unet2d(diffusion.ema_model, diffusion.img_size, choose_label(diffusion, classes, class_name))
    unet = UNet2DModel(**settings)
    unet.load_state_dict(weights)
    with atomic_folder(folder) as unfinished, as_user_error(f"{folder}: could not be written", OSError):
        DDPMPipeline(unet, DDPMScheduler(**scheduler_settings(diffusion))).save_pretrained(unfinished)
    print(f'DDPMPipeline.from_pretrained("{folder}")(num_inference_steps={diffusion.num_timesteps}) samples with it')


def choose_label(diffusion, classes, class_name):
    """The row of the class embeddings to add; None without classes. UserError lists the known."""
    if class_name and class_name not in classes:
        known = f"known: {', '.join(classes)}" if classes else "this model was trained without classes"
        raise UserError(f"unknown class_name {class_name!r}; {known}")
    if not class_name and classes and diffusion.null_class is None:
        raise UserError(
            "this model has no null class, and the pipeline passes none: choose a --class_name among "
            f"{', '.join(classes)}"
        )
    return classes.index(class_name) if class_name else diffusion.null_class


def to_unet2d(network, input_shape, label=None):
    """(settings, weights) of the UNet2DModel that computes `network`, a UNet, for class `label`.

    label: None without classes. UserError that names what a UNet2DModel cannot express.
    """
    found = read_architecture({**network.state_dict(), "betas": torch.zeros(1)}, "")
    check_expressible(network, found)
    weights = {name: value for name, value in network.state_dict().items() if ".class_bias." not in name}
    for name, module in network.named_modules():
        if name.endswith("class_bias"):
            bias = name.replace("class_bias", "time_bias") + ".bias"
            weights[bias] = weights[bias] + module.weight[label].detach()
    names, renamed = layer_names(len(found["channel_mults"]), found["num_res_blocks"]), {}
    for key, value in weights.items():
        keys = diffusers_keys(key, names)
        value = value.flatten(1) if ".attention.to_" in key and value.ndim > 1 else value
        renamed |= {name: part.contiguous() for name, part in zip(keys, value.chunk(len(keys)))}
    return unet2d_settings(found, input_shape, network.downs[0].conv_2[0].p, network.out_norm.num_groups), renamed


def check_expressible(network, found):
    """UserError that names what a UNet2DModel lacks of a UNet. found: read_architecture's."""
    norm = None if isinstance(network.out_norm, nn.Identity) else type(network.out_norm).__name__
    activation = getattr(network.activation, "__name__", network.activation)
    parts = {
        f"norm {norm} (only group norm)": norm != "GroupNorm",
        f"initial_pad {network.initial_pad} (only 0)": network.initial_pad != 0,
        "time_emb_dim None (only with time)": network.time_mlp is None,
        "time_emb_scale (only 1)": network.time_mlp is not None and network.time_mlp[0].scale != 1,
        f"activation {activation} (only silu)": network.activation is not F.silu,
        f"channel_mults {found['channel_mults']} (the first must be 1)": found["channel_mults"][0] != 1,
    }
    lacking = [part for part, given in parts.items() if given]
    if lacking:
        raise UserError(f"diffusers' UNet2DModel cannot express this network: {', '.join(lacking)}")


def scheduler_settings(diffusion):
    """The arguments of a DDPMScheduler that steps like our ddpm: variance beta, clipped x_0."""
    # float32's own digits: 0.02, not 0.019999999552965164.
    betas = [float(str(beta)) for beta in diffusion.betas.cpu().numpy()]
    return {
        "num_train_timesteps": len(betas),
        "trained_betas": betas,
        "prediction_type": PREDICTIONS[diffusion.prediction],
        # starts at T - 1 for any number of steps, as we do
        "variance_type": "fixed_large",
        "timestep_spacing": "trailing",
    }


def import_model(folder, file):
    """Write a checkpoint from a folder of diffusers, where train.py could have built its network.

    predict.py samples with it, and train.py starts from it. No code of the folder runs, and nothing
    is downloaded. UserError that names what is missing, damaged or not ours.
    """
    UNet2DModel, DDPMScheduler, _ = import_diffusers()
    file = begin_export(file)
    unet = read_json(Path(folder, "unet/config.json"))
    schedule = read_schedule(read_json(Path(folder, "scheduler/scheduler_config.json")), DDPMScheduler)
    weights = read_weights(Path(folder, "unet"))
    config = read_unet_settings(unet, weights, UNet2DModel) | schedule
    diffusion = build.from_config(config)
    names = layer_names(len(config["channel_mults"]), config["num_res_blocks"])
    own = {name: value for name, value in diffusion.state_dict().items() if not name.startswith("model.")}
    for key, value in diffusion.ema_model.state_dict().items():
        parts = torch.cat([weights[name] for name in diffusers_keys(key, names)])
        own[f"ema_model.{key}"] = parts.reshape(value.shape).to(value.dtype)
    save_checkpoint(Checkpoint(file, own, "ema", config))
    print(f"python predict.py --model_path {file}  samples with it")


def read_json(path):
    if not path.is_file():
        raise UserError(f"{path} is not there: a folder that diffusers' DDPMPipeline saved has it")
    with as_user_error(f"{path} is damaged: no JSON of settings"):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def read_weights(folder):
    """The state dict in a folder. safetensors holds no code, and load_checkpoint refuses it."""
    from safetensors.torch import load_file  # comes with diffusers

    path = folder / f"{WEIGHTS}.safetensors"
    if not path.exists():
        return clean_keys(load_checkpoint(folder / f"{WEIGHTS}.bin").weights)
    with as_user_error(f"{path}: damaged"):
        return load_file(path)


def read_schedule(scheduler, DDPMScheduler):
    """A scheduler's settings -> train.py's schedule and prediction. UserError where not ours."""
    given = defaults(DDPMScheduler) | scheduler
    prediction = next((ours for ours, theirs in PREDICTIONS.items() if theirs == given["prediction_type"]), None)
    if prediction is None:
        raise UserError(
            f"this is not one of our models: prediction_type is {given['prediction_type']!r}; known: "
            f"{', '.join(PREDICTIONS.values())}"
        )
    named = ", ".join(f"{name} {given[name]!r}" for name in ("beta_schedule", "rescale_betas_zero_snr"))
    with as_user_error(f"its scheduler_config.json is damaged, or this is not one of our schedules: {named}"):
        schedule = find_schedule(DDPMScheduler.from_config(scheduler).betas)
    return {**schedule, "prediction": prediction}


def read_unet_settings(unet, weights, UNet2DModel):
    """The settings of a UNet2DModel -> those of train.py, by field name.

    Our network of these settings, as a UNet2DModel, must have all given settings and the shapes of
    the weights. UserError that names each part that is not ours.
    """
    given = {"_class_name": None} | defaults(UNet2DModel) | unet
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    damaged = "its network's config.json is damaged, or not of one of our networks"
    with as_user_error(damaged), torch.device("meta"):  # no memory yet
        given["time_embedding_dim"] = given["time_embedding_dim"] or given["block_out_channels"][0] * 4
        config = to_config(given, len(weights))
        names = ("img_channels", "channel", "channel_mults", "num_res_blocks")
        options = {name: config[name] for name in ("dropout", "attention_resolutions", "num_groups")}
        settings, expected = to_unet2d(UNet(*(config[name] for name in names), **options), config["input_shape"])
    wanted = defaults(UNet2DModel) | settings | {name: given[name] for name in ("sample_size", "num_train_timesteps")}
    foreign = [f"{name} is {given[name]!r} (ours: {ours!r})" for name, ours in wanted.items() if given[name] != ours]
    if foreign:
        raise UserError(f"this is not one of our networks: {'; '.join(foreign)}")
    check_weights(weights, expected)
    return config


def to_config(given, most_layers):
    """train.py's settings nearest to those of a UNet2DModel. UserError for numbers none has."""
    widths, size, blocks = given["block_out_channels"], given["sample_size"] or 32, given["layers_per_block"]
    shape = size if isinstance(size, tuple) else (size, size)
    if not all(type(number) is int and number > 0 for number in (*shape, *widths, blocks, given["norm_num_groups"])):
        raise UserError("its sizes must be whole numbers above 0")
    if blocks * len(widths) > most_layers:
        raise UserError("it has more layers than weights")
    return {
        "input_shape": shape,
        "img_channels": given["in_channels"],
        "channel": widths[0],
        "channel_mults": tuple(width // widths[0] for width in widths),
        "num_res_blocks": blocks,
        "attention_resolutions": tuple(
            level for level, kind in enumerate(given["down_block_types"]) if kind.startswith("Attn")
        ),
        "num_groups": given["norm_num_groups"],
        "dropout": float(given["dropout"]),
        "class_conditional": False,
        "label_dropout": 0.0,
    }


def check_weights(weights, expected):
    """UserError that names the weights that are missing, unknown, mis-shaped or NaN."""
    problems = [f"lack {name}" for name in expected if name not in weights]
    problems += [f"hold {name}, which ours does not have" for name in weights if name not in expected]
    problems += [
        f"{name} have the shape {tuple(weights[name].shape)}, ours {tuple(value.shape)}"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    problems += [] if first_not_finite(weights) is None else ["hold NaN or infinity"]
    if problems:
        raise UserError(f"this is not one of our networks: its weights {first_few(problems)}")


def defaults(kind):
    """What a class of diffusers takes for each setting that a file leaves out."""
    return {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}


RESIDUAL = {
    "norm_1": "norm1",
    "conv_1": "conv1",
    "time_bias": "time_emb_proj",
    "norm_2": "norm2",
    "conv_2.1": "conv2",
    "residual_connection": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", "to_qkv": "to_qkv", "to_out": "to_out.0"}
QKV = ("to_q", "to_k", "to_v")  # one layer here, three there


def layer_names(levels, num_res_blocks):
    """{name of a layer of our UNet: its name in UNet2DModel}, whether or not a network has it."""
    names = {
        "init_conv": "conv_in",
        "time_mlp.1": "time_embedding.linear_1",
        "time_mlp.3": "time_embedding.linear_2",
        "out_norm": "conv_norm_out",
        "out_conv": "conv_out",
        **residual_names("mid.0", "mid_block", 0),
        **residual_names("mid.1", "mid_block", 1),
    }
    for ours, theirs, blocks, resample in (
        ("downs", "down_blocks", num_res_blocks, ("downsample", "downsamplers.0.conv")),
        ("ups", "up_blocks", num_res_blocks + 1, ("upsample.1", "upsamplers.0.conv")),
    ):
        for level in range(levels):
            first = level * (blocks + 1)  # each level is followed by its resampling, but for the last
            for block in range(blocks):
                names |= residual_names(f"{ours}.{first + block}", f"{theirs}.{level}", block)
            names[f"{ours}.{first + blocks}.{resample[0]}"] = f"{theirs}.{level}.{resample[1]}"
    return names


def residual_names(ours, theirs, block):
    """The layers of one residual block and of its attention."""
    residual = {f"{ours}.{name}": f"{theirs}.resnets.{block}.{other}" for name, other in RESIDUAL.items()}
    return residual | {
        f"{ours}.attention.{name}": f"{theirs}.attentions.{block}.{other}" for name, other in ATTENTION.items()
    }


def unet2d_settings(found, input_shape, dropout, num_groups):
    """A UNet2DModel's arguments that are not its defaults, for read_architecture's `found`."""
    kinds = ["Attn" * (level in found["attention_resolutions"]) for level in range(len(found["channel_mults"]))]
    height, width = input_shape
    return {
        "_class_name": "UNet2DModel",
        "flip_sin_to_cos": False,
        "attention_head_dim": None,
        "sample_size": height if height == width else (height, width),
        "in_channels": found["img_channels"],
        "out_channels": found["img_channels"],
        "block_out_channels": tuple(found["base_channels"] * mult for mult in found["channel_mults"]),
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        "layers_per_block": found["num_res_blocks"],
        "time_embedding_dim": found["time_emb_dim"],
        "norm_num_groups": num_groups,
        "dropout": dropout,
    }


def diffusers_keys(key, names):
    """UNet2DModel's keys for one of ours: it has three linear layers for q, k, v, ours one 1x1."""
    layer, leaf = key.rsplit(".", 1)
    return [f"{names[layer].replace('to_qkv', name)}.{leaf}" for name in (QKV if layer.endswith("to_qkv") else QKV[:1])]
