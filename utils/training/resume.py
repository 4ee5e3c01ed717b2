"""Resuming: which settings win, and the state put back."""

import hashlib
import typing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from utils import distributed
from utils.checkpoint import LAST
from utils.checkpoint_contents import check_training
from utils.config import fit_saved
from utils.device import is_available
from utils.errors import UserError
from utils.training.loss_history import earlier_rows
from utils.training.optimizer import restore_optimizer

BEGINNING = ("preset", "start_from")  # how a run began; older ones have neither
# What a run is built from. label_dropout > 0 adds the null class: it cannot come or go either.
FIXED = (
    "input_shape",
    "img_channels",
    "channel",
    "channel_mults",
    "num_res_blocks",
    "attention_resolutions",
    "num_groups",
    "class_conditional",
    "schedule",
    "num_timesteps",
    "schedule_low",
    "schedule_high",
    "schedule_shift",
    "prediction",
    *BEGINNING,
)


def merge_config(block, typed, checkpoint, source):
    """The settings to resume with: the checkpoint's, and over them only the typed options.

    block: the script's Config. typed: {name: value}. source: the checkpoint's path, for messages.
    It prints which values of the block are not used. ValueError for a typed setting that the run
    was built with.
    """
    # "auto" is what the run has already.
    typed = {name: value for name, value in typed.items() if name not in FIXED or value != "auto"}
    kinds, saved = typing.get_type_hints(type(block)), checkpoint["config"]
    fitted = {name: fit_saved(name, saved[name], kinds[name], source) for name in kinds.keys() & saved.keys()}
    base = replace(type(block)(), **fitted)
    for name, value in typed.items():
        same = getattr(base, name) == value if name != "label_dropout" else (base.label_dropout > 0) == (value > 0)
        if name in {*saved, *BEGINNING} and name in (*FIXED, "label_dropout") and not same:
            there = repr("") if getattr(base, name) == "" else getattr(base, name)
            raise UserError(
                f"--{name} {value}: {source} was built with {name} = {there}, "
                "which cannot change; leave it out, or start a fresh run"
            )
    left = sorted(set(kinds) - set(typed) - {"resume"})
    unused = [name for name in left if getattr(block, name) not in ("auto", getattr(base, name))]
    if unused:
        print(f"not used, as the run goes on with its own (type them as options to change them): {', '.join(unused)}")
    if "position" not in checkpoint:  # a run of its own, on whatever is here
        base = replace(base, device="auto", precision="auto", compile="auto", start_from="")
    elif "device" not in typed and not is_available(base.device):
        print(f"the run was on {base.device}, which is not here: device, precision and compile are chosen anew")
        base = replace(base, device="auto", precision="auto", compile="auto")
    return replace(base, **typed)


def check_classes(config, classes, checkpoint):
    """ValueError unless the classes of the images are those that the run was built with."""
    known = checkpoint["classes"] if config.class_conditional and checkpoint else []
    if known and known != classes:
        raise UserError(
            f"the run's classes are {', '.join(known)}, and the list's are "
            f"{', '.join(classes) or 'none'}: they cannot change"
        )


class Start(NamedTuple):
    """The position at which a run begins or resumes."""

    epoch: int = 0
    images: int = 0  # of this epoch that are done
    sums: torch.Tensor | None = None  # this process's running sums of the epoch
    tables: tuple = ()  # (rows of the losses, rows of the speed) of the epochs before


def restore(checkpoint, source, parts, config):
    """Restores optimizer and scaler, and returns the Start. The weights are in place already.

    A checkpoint without a training state (weights only) starts a run of its own.
    """
    if not checkpoint or "position" not in checkpoint:
        if checkpoint and not config.start_from and distributed.is_main():
            print(f"a file of weights alone: a run of its own starts from them at epoch 1; a {LAST} would go on")
        return Start()
    check_training(checkpoint, parts)
    before = checkpoint["config"].get("optimizer_type", "adam")
    if "muon" in {before, config.optimizer_type} and before != config.optimizer_type:
        if distributed.is_main():
            print(f"the optimizer was {before} and is {config.optimizer_type}: its moments begin anew")
    else:
        restore_optimizer(parts.optimizer, checkpoint["optimizer"])
    if checkpoint["scaler"]:
        parts.scaler.load_state_dict(checkpoint["scaler"])
    steps = ("init_lr", "grad_clip", "precision", "optimizer_type")  # a bad gradient may be their fault
    if all(checkpoint["config"].get(name) == getattr(config, name) for name in steps):
        parts.meter.bad_in_row.fill_(checkpoint["bad_in_row"])  # else it has a new chance
    position = checkpoint["position"]
    epoch, images, batch_size = (position[name] for name in ("epoch", "images", "batch_size"))
    changed = []
    if position["pictures"] != images_fingerprint(parts.dataset):
        changed.append("the pictures are not those of before")
    if batch_size != parts.batch_size:
        changed.append(f"the batch size was {batch_size} and is {parts.batch_size}")
    if changed and distributed.is_main():
        print(f"{'; '.join(changed)}{': going on with the next epoch' if images else ''}")
    tables = earlier_rows(checkpoint, Path(source).parent)
    if changed and images:
        return Start(epoch + 1, 0, None, tables)
    return Start(epoch, images, _own_sums(checkpoint["sums"]), tables)


def _own_sums(per_rank):
    """This process's row of the saved sums. After a change of their number rank 0 takes all."""
    if per_rank is None:
        return None
    if len(per_rank) == distributed.world_size():
        return per_rank[distributed.rank()]
    return per_rank.sum(0) * float(distributed.is_main())


def images_fingerprint(dataset):
    """A digest of the content and the classes of the training images, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for content, label in zip(dataset.hashes, dataset.labels.tolist()):
        digest.update(f"{content} {label};".encode())
    return digest.hexdigest()
