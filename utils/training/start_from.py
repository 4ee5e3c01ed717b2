"""A new run that begins with the weights of another: `--start_from`."""

from dataclasses import replace

from utils import distributed
from utils.checkpoint import Checkpoint, load_checkpoint
from utils.errors import UserError
from utils.run_folders import find_weights
from utils.training.resume import FIXED

# What the weights belong to. Size and classes of the images may change, their channels may not.
CHANGEABLE = ("preset", "start_from", "input_shape", "img_channels", "class_conditional")
CARRIED = tuple(name for name in FIXED if name not in CHANGEABLE)


def find_start(path):
    """(file, checkpoint without a training state) of a run's folder or a file, on all processes."""
    path = distributed.from_main(find_weights(path)[0] if distributed.is_main() else None)
    checkpoint = load_checkpoint(path, lazily=True)
    names = ("weights", "weights_kind", "config", "classes")
    return path, Checkpoint((name, checkpoint[name]) for name in names)


def start_config(config, typed, checkpoint, source):
    """`config` with the network and the schedule of the checkpoint's settings.

    typed: the options of the command line, {name: value}. ValueError for one that cannot hold, and
    for weights of another number of channels.
    """
    saved = {name: getattr(type(config)(), name) for name in (*CARRIED, "img_channels")} | checkpoint["config"]
    if saved["img_channels"] != config.img_channels:
        raise UserError(
            f"--start_from {source}: it has img_channels = {saved['img_channels']}, and this run has "
            f"{config.img_channels}: set --img_channels {saved['img_channels']}, or start without it"
        )
    for name in CARRIED:
        if typed.get(name, "auto") not in ("auto", saved[name]):
            raise UserError(
                f"--{name} {typed[name]}: {source} was built with {name} = {saved[name]}, which cannot "
                "change; leave it out, or start without --start_from"
            )
    if distributed.is_main():
        print(f"starting from {source}, with its network and schedule")
    return replace(config, **{name: saved[name] for name in CARRIED})
