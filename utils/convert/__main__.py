"""Checkpoints for others: small files to give away, files for the reference's code, folders of diffusers, and back.

python -m utils.convert weights RUN FILE                          averaged weights in half precision
python -m utils.convert reference RUN FILE                        a bare state dict for the reference's code
python -m utils.convert diffusers RUN FOLDER [--class_name X]     for diffusers' DDPMPipeline.from_pretrained
python -m utils.convert import FOLDER FILE                        a folder of diffusers as a checkpoint
"""

import argparse
from pathlib import Path

from nets import build
from nets.unet import MAX_GROUPS
from utils.checkpoint import FORMAT, all_finite, find_weights, load_checkpoint, save_checkpoint
from utils.convert.diffusers_folder import export_model, import_model
from utils.errors import run_script


def export_weights(run, file, reference=False):
    """Write what drawing needs of a run's checkpoint: its averaged weights in half precision, a quarter of the size or less.

    reference: a bare state dict under the reference's keys in float32 instead, which its code and `from_weights` load. Returns the
    path that was read. ValueError where `file` is there already, or the weights do not fit their settings or the reference.
    """
    path, file = find_weights(run)[0], Path(file)
    if file.exists():
        raise ValueError(f"{file} is there already: choose another name, or move it away")
    checkpoint = load_checkpoint(path, lazily=True)
    diffusion, _ = build.from_checkpoint(checkpoint)
    if reference and diffusion.prediction != "eps":
        raise ValueError(f"the reference's code takes what a network predicts for the noise; this one predicts {diffusion.prediction}")
    groups = getattr(diffusion.model.out_norm, "num_groups", MAX_GROUPS)
    if reference and groups != MAX_GROUPS:
        raise ValueError(f"the reference's code builds group norms of {MAX_GROUPS} groups; this network has {groups}: train one with "
                         f"--num_groups {MAX_GROUPS}")
    weights = diffusion.state_dict()
    if not reference:
        kept = {name: value for name, value in weights.items() if not name.startswith("model.")}
        weights = {name: value.half() if name.startswith("ema_model.") else value for name, value in kept.items()}
    if not all_finite(weights):
        raise ValueError(f"{path}: its weights hold NaN or infinity{'' if reference else ', or numbers beyond half precision (65504)'}")
    described = {"format": FORMAT, "config": checkpoint["config"], "classes": checkpoint["classes"], "weights_kind": "ema"}
    save_checkpoint(file, weights if reference else {**described, "weights": weights})
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("weights", "averaged weights in half precision, as a small file"),
                       ("reference", "a bare state dict with the keys of the reference implementation")):
        command = commands.add_parser(name, help=text)
        command.add_argument("run", metavar="RUN", help="a run's folder, or a checkpoint")
        command.add_argument("file", metavar="FILE", help="the file to write; it must not be there yet")
    diffusers = commands.add_parser("diffusers", help="a checkpoint -> a folder for diffusers")
    diffusers.add_argument("run", metavar="RUN", help="a run's folder, or a checkpoint")
    diffusers.add_argument("folder", metavar="FOLDER", help="the folder to write; it must not be there yet")
    diffusers.add_argument("--class_name", default="", help="the class that it will draw (default: the null class)")
    back = commands.add_parser("import", help="a folder of diffusers -> a checkpoint")
    back.add_argument("folder", metavar="FOLDER", help="what DDPMPipeline.save_pretrained wrote")
    back.add_argument("file", metavar="FILE", help="the checkpoint to write; it must not be there yet")
    arguments = parser.parse_args()
    if arguments.command in ("weights", "reference"):
        path = export_weights(arguments.run, arguments.file, arguments.command == "reference")
        sizes = [Path(name).stat().st_size / 2**20 for name in (path, arguments.file)]
        print(f"{path} ({sizes[0]:.1f} MiB) -> {arguments.file} ({sizes[1]:.1f} MiB)")
    elif arguments.command == "diffusers":
        diffusion = export_model(arguments.run, arguments.folder, arguments.class_name)
        print(f'DDPMPipeline.from_pretrained("{arguments.folder}")(num_inference_steps={diffusion.num_timesteps}) draws with it')
    else:
        import_model(arguments.folder, arguments.file)
        print(f"python predict.py --model_path {arguments.file}  draws with it")


if __name__ == "__main__":
    run_script(main)
