"""Models as folders of the library diffusers (DDPMPipeline), and back.

Our UNet is a UNet2DModel with other names, so its weights are only renamed. Classes differ: we add
a class after the activation, diffusers adds it before, and DDPMPipeline passes none. One class, by
default the null class, is therefore added to the biases of the time embedding. google/ddpm-* on
huggingface.co and what diffusers' examples train come in too.
"""

import contextlib
from pathlib import Path

import torch

from nets import build
from nets.architecture import arguments_of, check_fit, clean_keys, read_architecture, unet_arguments
from nets.errors import check_choice
from nets.schedules import find_schedule
from nets.unet import UNet
from utils.checkpoint.file import Checkpoint, load_checkpoint, save_checkpoint
from utils.checkpoint.integrity import first_not_finite
from utils.checkpoint.runs import open_weights
from utils.errors import UserError, one_line
from utils.files import atomic_folder, begin_export, read_json
from utils.settings import check_saved
from utils.terminal import as_command, first_few
from utils.training.settings_schema import CARRIED, RUN_SETTINGS

WEIGHTS = "diffusion_pytorch_model"  # .safetensors or .bin
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
# A layer of our UNet -> its name in UNet2DModel.
LAYERS = {
    "init_conv": "conv_in",
    "time_mlp.1": "time_embedding.linear_1",
    "time_mlp.3": "time_embedding.linear_2",
    "out_norm": "conv_norm_out",
    "out_conv": "conv_out",
}
# A layer of one of its blocks -> its name in the level of UNet2DModel, whose blocks are numbered.
BLOCK_LAYERS = {
    "norm_1": "resnets.{}.norm1",
    "conv_1": "resnets.{}.conv1",
    "time_bias": "resnets.{}.time_emb_proj",
    "norm_2": "resnets.{}.norm2",
    "conv_2.1": "resnets.{}.conv2",
    "residual_connection": "resnets.{}.conv_shortcut",
    "attention.norm": "attentions.{}.group_norm",
    "attention.to_qkv": "attentions.{}.to_qkv",
    "attention.to_out": "attentions.{}.to_out.0",
    "downsample": "downsamplers.0.conv",
    "upsample.1": "upsamplers.0.conv",
}
# Older names of a layer of attention.
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


@contextlib.contextmanager
def as_user_error(text):
    """Turn whatever a library raises in the block into one line of ours that begins with `text`."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{text} ({one_line(error)})") from error


def import_diffusers():
    """UNet2DModel, DDPMScheduler and DDPMPipeline. UserError where diffusers is not installed."""
    with as_user_error("folders of diffusers need the package diffusers: pip install diffusers"):
        from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    return UNet2DModel, DDPMScheduler, DDPMPipeline


def export_model(run, folder, class_name=""):
    """Write a run's EMA network as a folder for DDPMPipeline.from_pretrained.

    class_name: the class that it samples; "" is the null class, for a network that has one.
    """
    UNet2DModel, DDPMScheduler, DDPMPipeline = import_diffusers()
    folder = begin_export(folder)
    diffusion, classes = build.from_checkpoint(open_weights(run))
    settings, weights = to_unet2d(diffusion.ema_model, diffusion.img_size, choose_label(diffusion, classes, class_name))
    unet = UNet2DModel(**settings)
    unet.load_state_dict(weights)
    scheduler = DDPMScheduler(
        num_train_timesteps=diffusion.num_timesteps,
        trained_betas=[float(str(beta)) for beta in diffusion.betas.numpy()],  # 0.02, not 0.019999999552965164
        prediction_type=PREDICTIONS[diffusion.prediction],
        variance_type="fixed_large",  # beta, as in our ddpm
        timestep_spacing="trailing",  # starts at T - 1 for any number of steps, as we do
    )
    with as_user_error(f"{folder}: could not be written"), atomic_folder(folder) as unfinished:
        DDPMPipeline(unet, scheduler).save_pretrained(unfinished)
    steps = f"num_inference_steps={diffusion.num_timesteps}"
    print(f"DDPMPipeline.from_pretrained({str(folder)!r})({steps}) samples with it")


def choose_label(diffusion, classes, class_name):
    """The row of the class embeddings to add; None without classes."""
    if class_name and classes:
        check_choice("class_name", class_name, classes)
        return classes.index(class_name)
    if class_name:
        raise UserError(f"class_name {class_name!r}: the model was trained without classes")
    if classes and diffusion.null_class is None:
        raise UserError(f"without a null class it needs a --class_name; known: {first_few(classes)}")
    return diffusion.null_class


def to_unet2d(network, input_shape, label=None):
    """(settings, weights) of the UNet2DModel that computes `network` for the class id `label`."""
    weights, renamed = dict(network.state_dict()), {}
    found = read_architecture(weights, "")
    widths = tuple(found["base_channels"] * mult for mult in found["channel_mults"])
    fits = {"norm": found["norm"] == "gn", "time_emb_dim": found["time_emb_dim"] is not None}
    fits["channel_mults"] = found["channel_mults"][0] == 1  # diffusers' first layer has the width of level 0
    if lacking := [f"{name} {found[name]}" for name, fit in fits.items() if not fit]:
        raise UserError(f"diffusers' UNet2DModel cannot express this network: {', '.join(lacking)}")
    for key in [key for key in weights if key.endswith("class_bias.weight")]:
        bias = key.replace("class_bias.weight", "time_bias.bias")
        weights[bias] = weights[bias] + weights.pop(key)[label]
    for key, value in weights.items():
        keys = diffusers_keys(key, found["num_res_blocks"])
        value = value.flatten(1) if ".attention.to_" in key and value.ndim > 1 else value
        renamed |= {name: part.contiguous() for name, part in zip(keys, value.chunk(len(keys)))}
    kinds = ["Attn" * (level in found["attention_resolutions"]) for level in range(len(widths))]
    settings = {
        "_class_name": "UNet2DModel",
        "flip_sin_to_cos": False,
        "sample_size": input_shape[0] if input_shape[0] == input_shape[1] else tuple(input_shape),
        "in_channels": found["img_channels"],
        "out_channels": found["img_channels"],
        "block_out_channels": widths,
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        "layers_per_block": found["num_res_blocks"],
        "time_embedding_dim": found["time_emb_dim"],
        "norm_num_groups": network.out_norm.num_groups,
        "dropout": network.downs[0].conv_2[0].p,
        **network.details,  # diffusers has the same names
    }
    return settings, renamed


def diffusers_keys(key, num_res_blocks):
    """UNet2DModel's keys for one of ours: it has three linear layers for q, k, v, ours one 1x1."""
    layer, leaf = key.rsplit(".", 1)
    if layer in LAYERS:
        return [f"{LAYERS[layer]}.{leaf}"]
    part, number, name = layer.split(".", 2)
    # The layers of a level: its blocks, and all but the last level's resampling.
    layers = {"downs": num_res_blocks + 1, "mid": 2, "ups": num_res_blocks + 2}[part]
    level, block = divmod(int(number), layers)
    place = {"downs": f"down_blocks.{level}", "mid": "mid_block", "ups": f"up_blocks.{level}"}[part]
    theirs = f"{place}.{BLOCK_LAYERS[name].format(block)}.{leaf}"
    return [theirs.replace("to_qkv", split) for split in ("to_q", "to_k", "to_v")] if "to_qkv" in theirs else [theirs]


def import_model(folder, file):
    """Write a checkpoint from a folder of diffusers whose network our UNet expresses.

    No code of the folder runs, and nothing is downloaded.
    """
    UNet2DModel, DDPMScheduler, _ = import_diffusers()
    file = begin_export(file)
    # The first pipelines on huggingface.co have no folders of parts.
    parts = {part: Path(folder, part) for part in ("unet", "scheduler")}
    parts = {part: path if path.is_dir() else Path(folder) for part, path in parts.items()}
    unet = read_settings(parts["unet"] / "config.json", UNet2DModel)
    scheduler = read_settings(parts["scheduler"] / "scheduler_config.json", DDPMScheduler)
    weights = read_weights(parts["unet"])
    config = to_config(unet, weights, UNet2DModel) | to_schedule(scheduler, DDPMScheduler)
    if unet["flip_sin_to_cos"]:  # the embedding's cosines come first
        embedded = weights["time_embedding.linear_1.weight"]
        weights["time_embedding.linear_1.weight"] = embedded.roll(embedded.shape[1] // 2, 1)
    diffusion = build.from_config(config)
    own = {name: value for name, value in diffusion.state_dict().items() if not name.startswith("model.")}
    for key, value in diffusion.ema_model.state_dict().items():
        parts = torch.cat([weights[name] for name in diffusers_keys(key, config["num_res_blocks"])])
        own[f"ema_model.{key}"] = parts.reshape(value.shape).to(value.dtype)
    save_checkpoint(Checkpoint(file, own, "ema", config))
    print(f"{as_command('python', 'predict.py', '--model_path', file)}  samples with it")


def read_settings(path, kind):
    """The settings in a JSON file, and the defaults of their class for those that it leaves out."""
    if (found := read_json(path)) is None:
        raise UserError(f"{path} is not there, or damaged: a folder that diffusers' DDPMPipeline saved has it")
    given = {"_class_name": None} | arguments_of(kind, {}) | found
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def read_weights(folder):
    """The state dict in a folder. safetensors holds no code, and load_checkpoint refuses it."""
    from safetensors.torch import load_file  # comes with diffusers

    path = folder / f"{WEIGHTS}.safetensors"
    if not path.exists():
        weights = clean_keys(load_checkpoint(folder / f"{WEIGHTS}.bin").weights)
    else:
        with as_user_error(f"{path}: damaged"):
            weights = load_file(path)
    for old, new in OLD_NAMES.items():
        weights = {key.replace(old, new): value for key, value in weights.items()}
    if first_not_finite(weights) is not None:
        raise UserError(f"{path}: its weights hold NaN or infinity")
    return weights


def to_schedule(scheduler, DDPMScheduler):
    """A scheduler's settings -> train.py's schedule and prediction. UserError where not ours."""
    named = [f"{name} {scheduler[name]!r}" for name in ("prediction_type", "beta_schedule", "rescale_betas_zero_snr")]
    with as_user_error(f"its scheduler_config.json is damaged, or this is not one of ours: {', '.join(named)}"):
        check_saved({"num_timesteps": scheduler["num_train_timesteps"]}, RUN_SETTINGS)  # its tables need memory
        prediction = {theirs: ours for ours, theirs in PREDICTIONS.items()}[scheduler["prediction_type"]]
        return {**find_schedule(DDPMScheduler.from_config(scheduler).betas), "prediction": prediction}


def to_config(given, weights, UNet2DModel):
    """The settings of a UNet2DModel -> those of train.py and CARRIED, by name.

    UserError unless our network of these settings has all given settings and the weights' shapes.
    """
    given = given | {"flip_sin_to_cos": False}  # the weights are put in order
    damaged = "its network's config.json is damaged, or not of one of our networks"
    with as_user_error(damaged), torch.device("meta"):  # no memory yet
        widths, size = given["block_out_channels"], given["sample_size"] or 32
        kinds = enumerate(given["down_block_types"])
        nearest = {  # of our networks
            "input_shape": size if isinstance(size, tuple) else (size, size),
            "img_channels": given["in_channels"],
            "channel": widths[0],
            "channel_mults": tuple(width // widths[0] for width in widths),
            "num_res_blocks": given["layers_per_block"],
            "attention_resolutions": tuple(level for level, kind in kinds if kind.startswith("Attn")),
            "num_groups": given["norm_num_groups"],
            "dropout": given["dropout"],
            "class_conditional": False,
            "label_dropout": 0.0,
            "time_emb_dim": given["time_embedding_dim"] or widths[0] * 4,
        }
        nearest |= {name: given[name] for name in CARRIED if name in given}
        config = check_saved(nearest, RUN_SETTINGS | CARRIED)
        settings, expected = to_unet2d(UNet(**unet_arguments(config, 0)), config["input_shape"])
    given = given | {"time_embedding_dim": config["time_emb_dim"]}
    free = {name: given[name] for name in ("sample_size", "num_train_timesteps")}
    wanted = arguments_of(UNet2DModel, {}) | settings | free
    foreign = [f"{name} is {given[name]!r} (ours: {ours!r})" for name, ours in wanted.items() if given[name] != ours]
    if foreign:
        raise UserError(f"this is not one of our networks: {'; '.join(foreign)}")
    check_fit(expected, weights)
    own = arguments_of(UNet, {})
    return {name: value for name, value in config.items() if name not in CARRIED or value != own[name]}
