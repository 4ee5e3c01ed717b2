"""Checkpoints of w86763777/pytorch-ddpm on GitHub (its model.py, main.py and diffusion.py).

Its network is our UNet with other names, three layers for q, k, v, and sines and cosines of the
timestep that take turns. A file does not show the settings that its users seldom change: 32x32
images, betas from 1e-4 to 0.02, and a network that predicts the noise.
"""

import torch

from nets import build
from nets.schedules import generate_linear_schedule, schedule_tables
from utils.checkpoint.file import Checkpoint, save_checkpoint
from utils.checkpoint.integrity import check_tensors, load_tensors
from utils.convert.diffusers_folder import as_user_error
from utils.files import begin_export
from utils.terminal import as_command

TIME = "time_embedding.timembedding."
NAMES = {  # a part of its keys -> that of ours
    TIME: "time_mlp.",
    "head.": "init_conv.",
    "tail.0.": "out_norm.",
    "tail.2.": "out_conv.",
    "downblocks.": "downs.",
    "middleblocks.": "mid.",
    "upblocks.": "ups.",
    ".block1.0.": ".norm_1.",
    ".block1.2.": ".conv_1.",
    ".temb_proj.1.": ".time_bias.",
    ".block2.0.": ".norm_2.",
    ".block2.3.": ".conv_2.1.",
    ".shortcut.": ".residual_connection.",
    ".attn.group_norm.": ".attention.norm.",
    ".attn.proj_q.": ".attention.to_qkv.",
    ".attn.proj.": ".attention.to_out.",
}


def import_file(source, file):
    """Write a checkpoint from the EMA weights in a file of pytorch-ddpm. No code in it runs."""
    file, loaded = begin_export(file), load_tensors(source)
    with as_user_error(f"{source}: neither a folder of diffusers nor a checkpoint of w86763777/pytorch-ddpm"):
        theirs = loaded.get("ema_model", loaded)
        check_tensors(theirs)
        weights = to_ours(dict(theirs))
        config = build.config_from_weights(weights) | {"input_shape": (32, 32)}
    save_checkpoint(Checkpoint(file, weights, "ema", config))
    print(f"{as_command('python', 'predict.py', '--model_path', file)}  samples with it")


def to_ours(theirs):
    """Its state dict as that of a GaussianDiffusion of ours, kind "ema"."""
    T = len(theirs.pop(f"{TIME}0.weight"))  # a table of sines and cosines, which ours computes
    embedded = theirs[f"{TIME}1.weight"]
    theirs[f"{TIME}1.weight"] = torch.cat((embedded[:, 0::2], embedded[:, 1::2]), 1)
    tables = schedule_tables(generate_linear_schedule(T, 1e-4, 0.02))
    weights = {name: torch.tensor(table, dtype=torch.float32) for name, table in tables.items()}
    for key in [key for key in theirs if ".proj_q." in key]:
        theirs[key] = torch.cat([theirs.pop(key.replace("_q.", part)) for part in ("_q.", "_k.", "_v.")])
    for key, value in theirs.items():
        name = key.replace(".main.", ".downsample." if key.startswith("down") else ".upsample.1.")
        for their_part, our_part in NAMES.items():
            name = name.replace(their_part, our_part)
        weights[f"ema_model.{name}"] = value
    return weights
