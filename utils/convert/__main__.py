"""Checkpoints for others: small files to give away, files for the reference's code, folders of
diffusers, and back.

python -m utils.convert weights RUN FILE                       EMA weights in half precision
python -m utils.convert reference RUN FILE                     a state dict for the reference
python -m utils.convert diffusers RUN FOLDER [--class_name X]  for diffusers' DDPMPipeline
python -m utils.convert import FOLDER FILE                     diffusers' folder as a checkpoint
"""

import argparse
from pathlib import Path

from nets import build
from nets.unet import MAX_GROUPS
from utils.checkpoint import FORMAT, all_finite, load_checkpoint, save_checkpoint
from utils.convert.diffusers_folder import export_model, import_model
from utils.errors import run_script
from utils.files import refuse_to_overwrite
from utils.run_folders import find_weights


def export_weights(run, file):
    """Write a run's EMA weights in half precision: enough to sample, at most a quarter of the
    checkpoint.

    ValueError where `file` is there already, or where half precision cannot hold the weights.
    """
    path, checkpoint, diffusion = open_run(run, file)
    kept = {name: value for name, value in diffusion.state_dict().items() if not name.startswith("model.")}
    weights = {name: value.half() if name.startswith("ema_model.") else value for name, value in kept.items()}
    if not all_finite(weights):
        raise ValueError(f"{path}: its weights hold NaN or infinity, or numbers beyond half precision (65504)")
    described = {
        "format": FORMAT,
        "config": checkpoint["config"],
        "classes": checkpoint["classes"],
        "weights_kind": "ema",
    }
    write(file, {**described, "weights": weights}, path)


def export_reference(run, file):
    """Write a run's weights as a bare state dict in float32, with the keys of the reference's code.

    ValueError where `file` is there already, or where the reference's code would misread the
    network.
    """
    path, _, diffusion = open_run(run, file)
    if diffusion.prediction != "eps":
        raise ValueError(
            "the reference's code takes what a network predicts for the noise; this one predicts "
            f"{diffusion.prediction}"
        )
    groups = getattr(diffusion.model.out_norm, "num_groups", MAX_GROUPS)
    if groups != MAX_GROUPS:
        raise ValueError(
            f"the reference's code builds group norms of {MAX_GROUPS} groups; this network has {groups}: train one "
            "with "
            f"--num_groups {MAX_GROUPS}"
        )
    if not all_finite(diffusion.state_dict()):
        raise ValueError(f"{path}: its weights hold NaN or infinity")
    write(file, diffusion.state_dict(), path)


def open_run(run, file):
    """(path, checkpoint, GaussianDiffusion) of a run's folder or file.

    ValueError where `file` is there.
    """
    refuse_to_overwrite(file)
    path = find_weights(run)[0]
    checkpoint = load_checkpoint(path, lazily=True)
    return path, checkpoint, build.from_checkpoint(checkpoint)[0]


def write(file, content, source):
    """Save `content` and print its size beside the size of the checkpoint that it comes from."""
    save_checkpoint(file, content)
    before, after = (Path(path).stat().st_size / 2**20 for path in (source, file))
    print(f"{source} ({before:.1f} MiB) -> {file} ({after:.1f} MiB)")


RUN = ("run", "a run's folder, or a checkpoint")
FILE, FOLDER = ((kind, f"the {kind} to write; it must not be there yet") for kind in ("file", "folder"))
COMMANDS = {  # name: (the function, what it does, its arguments)
    "weights": (export_weights, "EMA weights in half precision, as a small file", (RUN, FILE)),
    "reference": (export_reference, "a bare state dict with the keys of the reference implementation", (RUN, FILE)),
    "diffusers": (export_model, "a checkpoint -> a folder for diffusers", (RUN, FOLDER)),
    "import": (
        import_model,
        "a folder of diffusers -> a checkpoint",
        (("folder", "what DDPMPipeline.save_pretrained wrote"), FILE),
    ),
}


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {name: commands.add_parser(name, help=text) for name, (_, text, _) in COMMANDS.items()}
    for name, (_, _, positional) in COMMANDS.items():
        for argument, text in positional:
            parsers[name].add_argument(argument, metavar=argument.upper(), help=text)
    parsers["diffusers"].add_argument(
        "--class_name", default="", help="the class that it will draw (default: the null class)"
    )
    options = vars(parser.parse_args(arguments))
    function, *_ = COMMANDS[options.pop("command")]
    function(**options)


if __name__ == "__main__":
    run_script(main)
