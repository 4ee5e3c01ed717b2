"""Checkpoints in the formats of others.

python -m utils.convert weights RUN FILE                       EMA weights in half precision
python -m utils.convert reference RUN FILE                     a state dict for the reference's code
python -m utils.convert diffusers RUN FOLDER [--class_name X]  a folder for DDPMPipeline
python -m utils.convert import SOURCE FILE                     a checkpoint from weights of others

RUN is a run's folder or a checkpoint. SOURCE is a folder of diffusers, or a file of
w86763777/pytorch-ddpm. The last argument is what is written; it must not exist yet.
"""

import argparse
from pathlib import Path

import torch

from nets import build
from nets.architecture import arguments_of, read_architecture
from nets.schedules import make_betas
from nets.unet import MAX_GROUPS, UNet
from utils.checkpoint.file import Checkpoint, save_checkpoint
from utils.checkpoint.integrity import first_not_finite, save_tensors
from utils.checkpoint.runs import open_weights
from utils.convert.diffusers_folder import export_model, import_model
from utils.convert.pytorch_ddpm import import_file
from utils.errors import UserError, run_script
from utils.files import begin_export
from utils.settings import expand_home
from utils.terminal import plural

# Argument of the reference's UNet: its default, and train.py's option for such a network.
REFERENCE_UNET = {
    "img_channels": (3, "--img_channels 3"),
    "channel_mults": ((1, 2, 4, 8), "--channel_mults 1,2,4,8"),
    "num_res_blocks": (3, "--num_res_blocks 3"),
    "attention_resolutions": ((1,), "--attention_resolutions 1,"),
    "num_classes": (None, "--class_conditional False"),
    "time_emb_dim": (512, ""),  # train.py trains no others
    "norm": ("gn", ""),
}
REFERENCE_SETTINGS = {"channel": 128, "input_shape": (32, 32), "num_timesteps": 1000}  # of its ddpm.py


def export_weights(run, file):
    """Write a run's EMA weights in half precision, which are enough to sample."""
    file, checkpoint, diffusion = open_run(run, file)
    weights = {
        name: value.half() if name.startswith("ema_model.") else value
        for name, value in diffusion.state_dict().items()
        if not name.startswith("model.")
    }
    if first_not_finite(weights) is not None:
        raise UserError(f"{checkpoint.path}: its weights hold numbers beyond half precision (65504)")
    save_checkpoint(Checkpoint(file, weights, "ema", checkpoint.config, checkpoint.classes))
    print_sizes(checkpoint.path, file)


def export_reference(run, file):
    """Write a run's weights as a bare float32 state dict, where the reference's code can use it."""
    file, checkpoint, diffusion = open_run(run, file)
    own, network = arguments_of(UNet, {}), read_architecture(diffusion.state_dict(), "model.")
    if other := [f"{name} {value}" for name, value in diffusion.model.details.items() if value != own[name]]:
        raise UserError(f"the reference's code cannot compute this network: {', '.join(other)}")
    groups = getattr(diffusion.model.out_norm, "num_groups", MAX_GROUPS)
    if diffusion.prediction != "eps" or groups != MAX_GROUPS:
        raise UserError(
            f"this network predicts {diffusion.prediction} and has {plural(groups, 'group')} in its norms; the "
            f"reference's code needs another: train one with --prediction eps --num_groups {MAX_GROUPS}"
        )
    save_tensors(file, diffusion.state_dict())
    print_sizes(checkpoint.path, file)
    print_reference_advice(diffusion, network)


def print_reference_advice(diffusion, network):
    """Say how the reference's code loads these weights; nothing where it does so unchanged."""
    betas = diffusion.betas
    other = [name for name, (default, _) in REFERENCE_UNET.items() if network[name] != default]
    if other:
        arguments = ", ".join(f"{name}={network[name]!r} instead of {REFERENCE_UNET[name][0]!r}" for name in other)
        options = " ".join(filter(None, (REFERENCE_UNET[name][1] for name in other)))
        print(
            "warning: the reference's unchanged code cannot load these weights. Either give its UNet these "
            f"arguments, in its ddpm.py and train.py: {arguments}. Or train the network that it builds (295.5 "
            f"million parameters with channel 128): python train.py {options}"
        )
    found = {"channel": network["base_channels"], "input_shape": tuple(diffusion.img_size), "num_timesteps": len(betas)}
    settings = [f"{name} = {found[name]}" for name, default in REFERENCE_SETTINGS.items() if found[name] != default]
    if settings:
        print(f"settings to change in the reference's ddpm.py: {', '.join(settings)}")
    if not torch.allclose(betas, torch.from_numpy(make_betas(num_timesteps=len(betas))).float(), rtol=1e-4):
        print("the schedule is not the reference's linear one: its code takes the schedule from this file")


def open_run(run, file):
    """(Path to write, Checkpoint, GaussianDiffusion) of a run. UserError where `file` exists."""
    file, checkpoint = begin_export(file), open_weights(run)
    return file, checkpoint, build.from_checkpoint(checkpoint)[0]


def print_sizes(source, file):
    before, after = (path.stat().st_size / 2**20 for path in (source, file))
    print(f"{source} ({before:.1f} MiB) -> {file} ({after:.1f} MiB)")


def import_weights(source, file):
    (import_file if Path(source).is_file() else import_model)(source, file)


COMMANDS = {
    "weights": export_weights,
    "reference": export_reference,
    "diffusers": export_model,
    "import": import_weights,
}


def main(arguments=None):
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m utils.convert", description=__doc__, formatter_class=as_written)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("source", help="RUN, or SOURCE")
    parser.add_argument("target", help="what is written")
    parser.add_argument("--class_name", help="the class that the folder for DDPMPipeline samples; the null class")
    options = parser.parse_args(arguments)
    if options.class_name is not None and options.command != "diffusers":
        parser.error("--class_name is an option of diffusers")
    more = [options.class_name] if options.class_name else []
    COMMANDS[options.command](expand_home(options.source), expand_home(options.target), *more)


if __name__ == "__main__":
    run_script(main)
