"""Models as folders that the library diffusers loads (DDPMPipeline), and back.

Our UNet is a UNet2DModel with other names, so the weights are only renamed. Classes alone are not: a class is added after the
activation here and before it there, and the pipeline passes none. One class, by default the null class, is therefore folded
into the biases of the time embedding. diffusers itself is not needed for this.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from nets import build
from nets.schedules import generate_cosine_schedule
from nets.weights import find_schedule, read_architecture
from utils.checkpoint import FORMAT, all_finite, find_weights, load_checkpoint, save_checkpoint
from utils.files import atomic_folder, atomic_write

try:
    from safetensors import SafetensorError
    from safetensors import torch as safetensors
except ImportError:  # an optional extra: diffusers reads PyTorch's own format too
    safetensors = None
WEIGHTS = "diffusion_pytorch_model"  # .safetensors or .bin
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def to_unet2d(network, input_shape, label=None):
    """(settings, weights) of the UNet2DModel that computes what `network`, a UNet, does for class `label` (None: without classes).

    ValueError that names what a UNet2DModel cannot express.
    """
    found = read_architecture({**network.state_dict(), "betas": torch.zeros(1)}, "")
    check_expressible(network, found)
    weights = {name: value for name, value in network.state_dict().items() if ".class_bias." not in name}
    if found["num_classes"] is not None:
        for name, module in network.named_modules():
            if name.endswith("class_bias"):
                bias = name.replace("class_bias", "time_bias") + ".bias"
                weights[bias] = weights[bias] + module.weight[label].detach()
    settings = unet2d_settings(found, input_shape, network.downs[0].conv_2[0].p, network.out_norm.num_groups)
    return settings, rename(weights, layer_names(len(found["channel_mults"]), found["num_res_blocks"]))


def check_expressible(network, found):
    """ValueError that names each part of a UNet that diffusers' UNet2DModel lacks. found: read_architecture's."""
    norms = {module.__class__.__name__ for module in network.modules() if isinstance(module, nn.InstanceNorm2d | nn.BatchNorm2d)}
    norm = norms.pop() if norms else found["norm"]
    parts = {
        f"norm {norm} (only group norm)": norm != "gn",
        f"initial_pad {network.initial_pad} (only 0)": network.initial_pad != 0,
        "time_emb_dim None (only with time)": network.time_mlp is None,
        "time_emb_scale (only 1)": network.time_mlp is not None and network.time_mlp[0].scale != 1,
        f"activation {getattr(network.activation, '__name__', network.activation)} (only silu)": network.activation is not F.silu,
        f"channel_mults {found['channel_mults']} (the first must be 1)": found["channel_mults"][0] != 1,
    }
    lacking = [part for part, given in parts.items() if given]
    if lacking:
        raise ValueError(f"diffusers' UNet2DModel cannot express this network: {', '.join(lacking)}")


def scheduler_settings(diffusion):
    """The scheduler_config.json of a DDPMScheduler that takes the steps of our ddpm solver: x_0 clipped, the variance beta."""
    betas = [float(str(beta)) for beta in diffusion.betas.cpu().numpy()]  # float32's own digits: 0.02, not 0.019999999552965164
    return {
        "_class_name": "DDPMScheduler", "num_train_timesteps": len(betas), "trained_betas": betas,
        "beta_schedule": "linear", "beta_start": betas[0], "beta_end": betas[-1],  # not used, as trained_betas are given
        "prediction_type": PREDICTIONS[diffusion.prediction], "variance_type": "fixed_large",
        "clip_sample": True, "clip_sample_range": 1.0, "thresholding": False, "rescale_betas_zero_snr": False,
        "timestep_spacing": "trailing", "steps_offset": 0,  # starts at T - 1 for any number of steps, as we do
    }  # fmt: skip


def export_model(checkpoint_path, folder, class_name=""):
    """Write a checkpoint's averaged network as a folder for DDPMPipeline.from_pretrained. ValueError where that cannot be.

    class_name: the class that it will draw; "" is the null class, for a network that has one.
    """
    refuse_to_overwrite(folder)
    path, _ = find_weights(checkpoint_path)
    diffusion, classes = build.from_checkpoint(load_checkpoint(path, lazily=True))
    label = choose_label(diffusion, classes, class_name)
    settings, weights = to_unet2d(diffusion.ema_model, diffusion.img_size, label)
    if not all_finite(weights):
        raise ValueError(f"{path}: its weights hold NaN or infinity")
    index = {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    with atomic_folder(folder) as unfinished:
        write_json(unfinished / "model_index.json", index)
        write_json(unfinished / "scheduler" / "scheduler_config.json", scheduler_settings(diffusion))
        write_json(unfinished / "unet" / "config.json", settings)
        write_weights(unfinished / "unet", weights)
    return diffusion


def choose_label(diffusion, classes, class_name):
    """The row of the class embeddings to fold in; None for a network without classes. ValueError that lists the known classes."""
    if diffusion.num_classes is None:
        if class_name:
            raise ValueError(f"--class_name {class_name}: this model was trained without classes")
        return None
    if class_name and class_name not in classes:
        raise ValueError(f"unknown class_name {class_name!r}; known: {', '.join(classes)}")
    if class_name:
        return classes.index(class_name)
    if diffusion.null_class is None:
        raise ValueError(f"this model has no null class, and the pipeline passes none: choose a --class_name among {', '.join(classes)}")
    return diffusion.null_class


def refuse_to_overwrite(path):
    """ValueError where `path` exists, unless it is an empty folder."""
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} is there already: choose another name, or move it away")


def write_json(path, values):
    with atomic_write(path, "w", encoding="utf-8") as file:
        json.dump(values, file, indent=2)


def write_weights(folder, weights):
    if safetensors:
        with atomic_write(folder / f"{WEIGHTS}.safetensors") as file:
            file.write(safetensors.save(weights, metadata={"format": "pt"}))
    else:
        save_checkpoint(folder / f"{WEIGHTS}.bin", weights)


def import_model(folder, file):
    """Write a checkpoint of this project from a folder of diffusers, where its network is one that train.py could have built.

    It draws with predict.py, and train.py goes on from it. ValueError that names what is not ours.
    """
    refuse_to_overwrite(file)
    folder = Path(folder)
    unet, scheduler = read_json(folder / "unet" / "config.json"), read_json(folder / "scheduler" / "scheduler_config.json")
    config = {**read_unet_settings(unet), **read_scheduler_settings(scheduler)}
    diffusion = build.from_config(config)
    names = layer_names(len(config["channel_mults"]), config["num_res_blocks"])
    weights = rename_back(read_weights(folder / "unet"), diffusion.ema_model.state_dict(), names)
    tables = {name: value for name, value in diffusion.state_dict().items() if not name.startswith(("model.", "ema_model."))}
    weights = {f"ema_model.{name}": value for name, value in weights.items()} | tables
    save_checkpoint(file, {"format": FORMAT, "config": config, "classes": [], "weights": weights, "weights_kind": "ema"})
    return diffusion


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is not there: a folder that diffusers' DDPMPipeline saved has it") from None
    except ValueError:
        raise ValueError(f"{path} is damaged: no JSON") from None


def read_weights(folder):
    path = folder / f"{WEIGHTS}.safetensors"
    if not path.exists():
        return load_checkpoint(folder / f"{WEIGHTS}.bin")["weights"]
    if safetensors is None:
        raise ValueError(f"{path}: reading it needs `pip install safetensors`")
    try:
        return safetensors.load(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error})") from None


def read_scheduler_settings(scheduler):
    """A scheduler's config -> settings of train.py. Whatever solver it is for: only schedule and prediction belong to the model.

    ValueError for a prediction or a schedule that is not ours.
    """
    predictions = {theirs: ours for ours, theirs in PREDICTIONS.items()}
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in predictions:
        raise ValueError(f"this is not one of our models: prediction_type is {prediction!r}; known: {', '.join(predictions)}")
    if scheduler.get("rescale_betas_zero_snr"):
        raise ValueError("this is not one of our models: rescale_betas_zero_snr is on, whose last beta is 1")
    return {**find_schedule(read_betas(scheduler)), "prediction": predictions[prediction]}


def read_betas(scheduler):
    """The betas of a scheduler's config, (T,) float64. ValueError for a beta_schedule that is none of ours."""
    T, kind = scheduler.get("num_train_timesteps", 1000), scheduler.get("beta_schedule", "linear")
    if scheduler.get("trained_betas") is not None:
        return np.asarray(scheduler["trained_betas"], dtype=np.float64)
    if kind == "linear":
        return np.linspace(scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02), T)
    if kind == "squaredcos_cap_v2":
        return generate_cosine_schedule(T)
    raise ValueError(f"this is not one of our models: beta_schedule is {kind!r} (ours: linear, squaredcos_cap_v2, or trained_betas)")


# The settings of UNet2DModel that make it our UNet, and what diffusers takes for one that a file leaves out where that differs.
OURS = {
    "center_input_sample": False, "time_embedding_type": "positional", "freq_shift": 0, "flip_sin_to_cos": False,
    "mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 1, "downsample_padding": 1, "downsample_type": "conv",
    "upsample_type": "conv", "act_fn": "silu", "attention_head_dim": None, "attn_norm_num_groups": None, "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default", "add_attention": True, "class_embed_type": None, "num_class_embeds": None,
}  # fmt: skip
ABSENT = {"flip_sin_to_cos": True, "attention_head_dim": 8}
TIME_EMB_DIM, NUM_GROUPS = 512, 32  # what train.py builds, and what diffusers takes for a number that is left out
RESIDUAL = {
    "norm_1": "norm1", "conv_1": "conv1", "time_bias": "time_emb_proj", "norm_2": "norm2", "conv_2.1": "conv2",
    "residual_connection": "conv_shortcut",
}  # fmt: skip
ATTENTION = {"norm": "group_norm", "to_qkv": "to_qkv", "to_out": "to_out.0"}
QKV = ("to_q", "to_k", "to_v")  # one layer here, three there


def layer_names(levels, num_res_blocks):
    """{name of a layer of our UNet: its name in UNet2DModel}, whether or not a network has it."""
    names = {
        "init_conv": "conv_in", "time_mlp.1": "time_embedding.linear_1", "time_mlp.3": "time_embedding.linear_2",
        "out_norm": "conv_norm_out", "out_conv": "conv_out",
        **residual_names("mid.0", "mid_block", 0), **residual_names("mid.1", "mid_block", 1),
    }  # fmt: skip
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
    return {f"{ours}.{name}": f"{theirs}.resnets.{block}.{other}" for name, other in RESIDUAL.items()} | {
        f"{ours}.attention.{name}": f"{theirs}.attentions.{block}.{other}" for name, other in ATTENTION.items()
    }


def unet2d_settings(found, input_shape, dropout, num_groups):
    """The config.json of a UNet2DModel, from an architecture of read_architecture."""
    kinds = ["Attn" * (level in found["attention_resolutions"]) for level in range(len(found["channel_mults"]))]
    height, width = input_shape
    return {
        "_class_name": "UNet2DModel", **OURS,
        "sample_size": height if height == width else [height, width],
        "in_channels": found["img_channels"], "out_channels": found["img_channels"],
        "block_out_channels": [found["base_channels"] * mult for mult in found["channel_mults"]],
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "layers_per_block": found["num_res_blocks"], "time_embedding_dim": found["time_emb_dim"],
        "norm_num_groups": num_groups, "dropout": dropout,
    }  # fmt: skip


def rename(weights, names):
    """Our weights under diffusers' names. Its attention has linear layers, three of them, where ours has one 1x1 convolution."""
    renamed = {}
    for key, value in weights.items():
        layer, leaf = key.rsplit(".", 1)
        value = value.flatten(1) if ".attention.to_" in key and leaf == "weight" else value
        if layer.endswith("to_qkv"):
            stem = names[layer].removesuffix("to_qkv")
            renamed |= {f"{stem}{name}.{leaf}": part.contiguous() for name, part in zip(QKV, value.chunk(3))}
        else:
            renamed[f"{names[layer]}.{leaf}"] = value.contiguous()
    return renamed


def rename_back(weights, own, names):
    """The inverse of `rename`. own: our state dict, for names and shapes. ValueError that names what does not fit."""
    renamed, left = {}, dict(weights)
    for key, value in own.items():
        layer, leaf = key.rsplit(".", 1)
        theirs = names[layer]
        wanted = [theirs.replace("to_qkv", name) for name in QKV] if layer.endswith("to_qkv") else [theirs]
        missing = [f"{name}.{leaf}" for name in wanted if f"{name}.{leaf}" not in left]
        if missing:
            raise ValueError(f"its weights lack {', '.join(missing)}: not one of our networks")
        parts = torch.cat([left.pop(f"{name}.{leaf}") for name in wanted])
        if parts.numel() != value.numel() or parts.shape[0] != value.shape[0]:
            raise ValueError(f"its weights {theirs}.{leaf} have the shape {tuple(parts.shape)}, ours {tuple(value.shape)}")
        renamed[key] = parts.reshape(value.shape).to(value.dtype)
    if left:
        raise ValueError(f"its weights hold {', '.join(list(left)[:3])}, which our network does not have")
    return renamed


def read_unet_settings(unet):
    """The config.json of a UNet2DModel -> settings of train.py, by field name. ValueError that names each part that is not ours."""
    get = unet.get
    widths = list(get("block_out_channels", (224, 448, 672, 896)))
    downs, ups = list(get("down_block_types", ())), list(get("up_block_types", ()))
    channels = get("in_channels", 3)
    wanted = {name: (get(name, ABSENT.get(name, value)), value) for name, value in OURS.items()} | {
        "_class_name": (get("_class_name"), "UNet2DModel"),
        "time_embedding_dim": (get("time_embedding_dim") or widths[0] * 4, TIME_EMB_DIM),
        "out_channels": (get("out_channels", 3), channels),
        "block_out_channels": (widths, [width - width % widths[0] for width in widths]),
        "down_block_types": (downs, [kind if kind in ("DownBlock2D", "AttnDownBlock2D") else "(Attn)DownBlock2D" for kind in downs]),
        "up_block_types": (ups, [kind.replace("Down", "Up") for kind in reversed(downs)]),
    }
    foreign = [f"{name} is {found!r} (ours: {ours!r})" for name, (found, ours) in wanted.items() if found != ours]
    if foreign:
        raise ValueError(f"this is not one of our networks: {'; '.join(foreign)}")
    size = get("sample_size") or 32
    return {
        "input_shape": tuple(size) if isinstance(size, (list, tuple)) else (size, size), "img_channels": channels, "channel": widths[0],
        "channel_mults": tuple(width // widths[0] for width in widths), "num_res_blocks": get("layers_per_block", 2),
        "num_groups": get("norm_num_groups", NUM_GROUPS),
        "attention_resolutions": tuple(level for level, kind in enumerate(downs) if kind.startswith("Attn")),
        "dropout": float(get("dropout", 0.0)), "class_conditional": False, "label_dropout": 0.0,
    }  # fmt: skip
