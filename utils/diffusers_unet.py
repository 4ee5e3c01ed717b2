"""Our UNet as diffusers' UNet2DModel: the same network under other names, its settings and its weights, in both directions."""
import torch

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
    """The config.json of a UNet2DModel, from an architecture of build.read_architecture."""
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
