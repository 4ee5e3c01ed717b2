"""Resuming a run, and starting a new one from its weights: the settings that hold, the state."""

import hashlib
import math
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from utils import distributed
from utils.checkpoint.file import Checkpoint
from utils.device import find_device
from utils.errors import UserError
from utils.terminal import first_few
from utils.training.loss_history import TABLES, best_saved, read_table
from utils.training.optimizer import restore_optimizer
from utils.training.settings_schema import CARRIED, RUN_SETTINGS

MACHINE = ("device", "precision", "compile")
# With another of these, or other images, a validation loss measures something else.
MEASURE = ("loss_type", "loss_weighting", "min_snr_gamma", "resize_mode", "background", "icc")
REFERENCE = {"prediction": "eps", "schedule_shift": 0.0}  # what a bare state dict does not show
WEIGHTS = tuple(name for name, setting in RUN_SETTINGS.items() if setting.fixed == "weights")


def merge_settings(defaults: dict, options: dict, checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's settings, and over them the options. UserError: one cannot change."""
    this_start = ("resume", "dry_run", "save_dir")  # of this start of the script alone
    saved = {name: value for name, value in checkpoint.config.items() if name not in (*this_start, *CARRIED)}
    options = {name: value for name, value in options.items() if not (RUN_SETTINGS[name].fixed and value == "auto")}
    # Without a counter the EMA is finished: a warm-up would replace most of it in a few steps.
    merged = {**defaults, **saved, **({"ema_warmup": False} if checkpoint.ema_step is None else {})}
    for name, value in options.items():
        there = checkpoint.resolved.get(name, merged[name])
        # The last two are how a run began: a bare state dict has neither.
        fixed = RUN_SETTINGS[name].fixed and name in {*saved, "preset", "start_from"} and there != value
        # label_dropout above 0 adds the null class: it cannot come or go either.
        if fixed or (name == "label_dropout" and name in saved and (there > 0) != (value > 0)):
            raise cannot_change(checkpoint, name, value, there, "a fresh run")
    known = {name: ("auto", saved[name], checkpoint.defaults.get(name)) for name in saved.keys() - options.keys()}
    edited = [name for name in known if not RUN_SETTINGS[name].fixed and defaults[name] not in known[name]]
    if ignored := sorted(edited):
        print(f"ignored when resuming (pass on the command line to override): {', '.join(ignored)}")
    if "num_threads" in options:  # also "auto": the run's own number no longer holds
        checkpoint.resolved.pop("num_threads", None)
    return {**merged, **machine(checkpoint, options), **options}


def cannot_change(checkpoint, name, value, there, instead):
    """The UserError for a setting that weights or a run determine."""
    built = f"{checkpoint.path} was built with {name} = {there if there != '' else repr(there)}"
    return UserError(f"--{name} {value}: {built}, which cannot change; set that, or start {instead}")


def machine(checkpoint, options):
    """Where the run resumes, in so far as the checkpoint's own settings cannot hold here."""
    if checkpoint.training is None:  # a run of its own, on whatever is here
        return {**dict.fromkeys(MACHINE, "auto"), "start_from": ""}
    device = checkpoint.config.get("device", "auto")
    with suppress(UserError):
        find_device(options.get("device", device), processes=distributed.world_size())
        return {}
    print(f"the run was on {device}, which is not here: device, precision and compile are chosen again")
    return dict.fromkeys(MACHINE, "auto")


def start_settings(config: dict, options: dict, checkpoint: Checkpoint) -> dict[str, Any]:
    """`config` with the network and schedule of a checkpoint. UserError for what cannot hold."""
    saved, own = {**config, **REFERENCE, **checkpoint.config}, ["condition"] * bool(checkpoint.config.get("condition"))
    asked = options | {name: config[name] for name in ("img_channels", *own)}
    for name in (*WEIGHTS, "img_channels", *own):
        if asked.get(name, "auto") not in ("auto", saved[name], checkpoint.resolved.get(name)):
            raise cannot_change(checkpoint, name, asked[name], saved[name], "without --start_from")
    print(f"starting from {checkpoint.path}, with its network and schedule")
    return {**config, **{name: saved[name] for name in WEIGHTS}}


def check_classes(config, classes, checkpoint):
    """UserError unless the classes of the images are those that the run was built with."""
    known = checkpoint.classes if config.class_conditional and checkpoint else []
    if known and known != classes:  # it names those first that the others lack, as there may be thousands
        pairs = (known, classes), (classes, known)
        before, now = (first_few(sorted(a, key=set(b).__contains__)) for a, b in pairs)
        raise UserError(f"the run's classes are {before}, and cannot change to those of the images: {now or 'none'}")


class ResumePoint(NamedTuple):
    """The position at which a run begins or resumes."""

    epoch: int = 0
    images: int = 0  # of this epoch that are done
    sums: torch.Tensor | None = None  # this process's running sums of the epoch
    tables: tuple = ()  # (rows of the losses, rows of the speed) of the epochs before
    best: tuple = (math.inf, 0)  # (validation loss, epoch) of the weights in best.pth


def restore(checkpoint, context, config):
    """Restores optimizer and scaler -> ResumePoint. Weights alone begin a run of their own."""
    if checkpoint is None or checkpoint.training is None:
        if checkpoint and not config.start_from:
            print("weights only: starting a new run at epoch 1 (use a last.pth to resume)")
        return ResumePoint()
    state, before = checkpoint.training, checkpoint.config | checkpoint.resolved
    muon = before.get("optimizer_type") == "muon"
    check_fits(state, context, muon, checkpoint.path)
    if muon == (config.optimizer_type == "muon"):
        restore_optimizer(context.optimizer, state.optimizer)
    else:
        print(f"the optimizer is now {config.optimizer_type}: its state was reset")
    if state.scaler:
        context.scaler.load_state_dict(state.scaler)
    cause = ("init_lr", "grad_clip", "precision", "optimizer_type")  # of a bad gradient: with another it starts at 0
    if all(before.get(name) == getattr(config, name) for name in cause):
        context.meter.bad_in_row.fill_(state.bad_in_row)
    comparable = all(before.get(name) in (None, getattr(config, name)) for name in MEASURE)
    return resume_point(checkpoint, context, comparable)


def resume_point(checkpoint, context, comparable):
    """The ResumePoint of a checkpoint: its position, or its epoch's start where that cannot hold.

    comparable: validation losses of before and after are of one kind.
    """
    state, changed = checkpoint.training, []
    if state.fingerprint != images_fingerprint(context.dataset):
        comparable = False
        changed.append("the images are not those of before")
    if state.batch_size != context.batch_size:
        changed.append(f"the batch size was {state.batch_size} and is {context.batch_size}")
    if changed:
        print(f"{'; '.join(changed)}{f': epoch {state.epoch + 1} begins again' if state.images else ''}")
    tables = state.tables or [read_table(checkpoint.path.with_name(name), state.epoch) for name in TABLES]
    best = best_saved(tables[0]) if comparable else ResumePoint().best
    if changed:
        return ResumePoint(state.epoch, tables=tables, best=best)
    return ResumePoint(state.epoch, state.images, own_sums(state.sums), tables, best)


def own_sums(per_rank):
    """This process's row of the saved sums. After a change of their number rank 0 takes all."""
    if per_rank is None:
        return None
    if len(per_rank) == distributed.world_size():
        return per_rank[distributed.rank()]
    return per_rank.sum(0) * float(distributed.is_main())


def check_fits(state, context, muon, path):
    """UserError unless moments, sums and scaler fit the weights, and no moment makes them NaN.

    muon: Muon kept the moments.
    """
    parameters, fit = context.optimizer.param_groups[0]["params"], True
    try:
        for number, kept in state.optimizer["state"].items():
            names = ("exp_avg",) if muon and parameters[number].ndim == 4 else ("exp_avg", "exp_avg_sq")
            shapes = {"step": (), **dict.fromkeys(names, parameters[number].shape)}
            fit &= all(kept[name].shape == shape for name, shape in shapes.items())
            fit &= all((kept[name] >= 0).all() for name in shapes if name != "exp_avg")  # NaN is not
            fit &= kept["exp_avg"].isfinite().all()
        fit &= state.sums is None or state.sums.shape[1:] == context.meter.sums.shape
        fit &= not state.scaler or context.scaler.state_dict().keys() <= state.scaler.keys()
        fit &= all(math.isfinite(value) for value in state.scaler.values())
    except (AttributeError, LookupError, OverflowError, TypeError):  # values of another kind
        fit = False
    if not fit:
        what = f"{path}: damaged, or edited: optimizer, sums and scaler do not fit its weights, or hold NaN"
        raise UserError(f"{what}; resume an epoch_XXXX.pth: weights alone begin a new run")


def images_fingerprint(dataset):
    """A digest of the content and the classes of the training images, in their order."""
    content = "".join(f"{name} {label};" for name, label in zip(dataset.hashes, dataset.labels.tolist()))
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
