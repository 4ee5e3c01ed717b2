"""The checkpoint: weights, settings, classes and, where a run can resume, its training state."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from utils.checkpoint.integrity import check_plain, check_tensors, first_not_finite, load_tensors, save_tensors
from utils.errors import UserError
from utils.settings import LARGEST, check_saved, choice, fitted, number, shown, text, whole
from utils.training.run_settings import RUN_SETTINGS

FORMAT = 1
# What a run did whose file lacks one of these settings: they came later.
BEFORE = {"num_groups": 32, "icc": False, "schedule_shift": 0.0}


class TrainingState(NamedTuple):
    """What resuming needs beside the weights. The randomness follows from the position."""

    epoch: int  # the position: so many epochs are done
    images: int  # of the next epoch that are done
    batch_size: int
    fingerprint: str  # of the training images, see `utils.checkpoint.resume`
    sums: torch.Tensor | None  # (processes, 11), of the meters; None at the start of an epoch
    optimizer: dict  # its state dict
    scaler: dict  # the GradScaler's
    bad_in_row: int  # steps with gradients that were not finite
    tables: tuple = ()  # (rows of the losses, rows of the speed), which older versions kept here


@dataclass
class Checkpoint:
    """What a file of weights holds. A bare state dict has weights alone."""

    path: Path
    weights: dict[str, torch.Tensor]  # the state dict of a GaussianDiffusion
    kind: str = "full"  # or "ema": without the keys model.*
    config: dict[str, Any] = field(default_factory=dict)  # train.py's settings, as they were asked for
    classes: list[str] = field(default_factory=list)  # their names
    ema_step: int | None = None  # optimizer steps that the EMA has counted
    resolved: dict[str, Any] = field(default_factory=dict)  # what "auto" was on the run's machine
    given: list[str] = field(default_factory=list)  # the settings of the command line and the preset
    training: TrainingState | None = None


def save_checkpoint(checkpoint: Checkpoint) -> None:
    """Writes the file at `checkpoint.path`, whole or not at all. OSError: the disk refuses."""
    values = {name: getattr(checkpoint, name) for name in ("config", "classes", "weights")}
    values = {"format": FORMAT, **values, "weights_kind": checkpoint.kind}
    values |= {"resolved": checkpoint.resolved, "given": checkpoint.given} if checkpoint.resolved else {}
    values |= {} if checkpoint.ema_step is None else {"ema_step": checkpoint.ema_step}
    if (state := checkpoint.training) is not None:
        position = {name: getattr(state, name) for name in ("epoch", "images", "batch_size")}
        values["position"] = {**position, "pictures": state.fingerprint}
        values |= {name: getattr(state, name) for name in ("sums", "optimizer", "scaler", "bad_in_row")}
    save_tensors(checkpoint.path, values)


def load_checkpoint(path: Path | str, lazily: bool = False) -> Checkpoint:
    """A checkpoint of this project, or a bare state dict such as the reference saves, on the CPU.

    lazily: maps the file, so that what is never used (the optimizer's state) takes no memory.
    UserError for another file, a damaged one, and weights that hold NaN or infinity.
    """
    path = Path(path)
    loaded = load_tensors(path, lazily)
    if isinstance(loaded, dict) and loaded and all(map(torch.is_tensor, loaded.values())):
        loaded = {"weights": loaded}
    if not isinstance(loaded, dict) or not isinstance(loaded.get("weights"), dict):
        found = ", ".join(map(str, list(loaded)[:5])) if isinstance(loaded, dict) else type(loaded).__name__
        raise UserError(f"{path}: neither a checkpoint of this project nor a state dict (it holds: {found})")
    if type(loaded.get("format", FORMAT)) is not int or loaded.get("format", FORMAT) > FORMAT:
        raise UserError(f"{path}: written by a newer version of this project; update yours to read it")
    try:
        checkpoint = read_contents(path, loaded)
    except (UserError, RecursionError) as error:
        raise UserError(f"{path}: damaged, or edited: {error}") from None
    if (name := first_not_finite(checkpoint.weights)) is not None:
        raise UserError(f"{path}: its weights hold NaN or infinity (the first is {name}): take an older checkpoint")
    return checkpoint


def read_contents(path, loaded):
    """The Checkpoint of a file's dict. UserError that names the first value that it cannot have."""
    check_tensors(loaded["weights"])
    check_plain({name: value for name, value in loaded.items() if name != "weights"}, "it")
    config, resolved = (loaded.get(name, {}) for name in ("config", "resolved"))
    for name, found in (("config", config), ("resolved", resolved)):
        expect(name, found, isinstance(found, dict), "a dict of settings by name")
    classes, given = (loaded.get(name, []) for name in ("classes", "given"))
    for name, found in (("classes", classes), ("given", given)):
        named = isinstance(found, list) and all(type(item) is str for item in found)
        expect(name, found, named and len(set(found)) == len(found), "a list of different names")
    kind = fit("weights_kind", loaded.get("weights_kind", "full"), choice(("full", "ema")))
    ema_step = fit("ema_step", loaded.get("ema_step"), whole(0, LARGEST, None))
    config = check_saved({**BEFORE, **config}, RUN_SETTINGS) if config else {}
    resolved = check_saved(resolved, RUN_SETTINGS)
    training = read_training(loaded) if "position" in loaded else None
    return Checkpoint(path, loaded["weights"], kind, config, classes, ema_step, resolved, given, training)


def read_training(loaded):
    """The TrainingState of a file's dict; whether it fits the weights is seen on resuming."""
    missing = [name for name in ("optimizer", "scaler", "sums", "bad_in_row") if name not in loaded]
    expect("its training state", missing, not missing, "whole: these are missing")
    position, sums, scaler, optimizer = (loaded[name] for name in ("position", "sums", "scaler", "optimizer"))
    expect("position", position, isinstance(position, dict), "epoch, images, batch_size and pictures")
    epoch, images = (fit(name, position.get(name), whole(0)) for name in ("epoch", "images"))
    batch_size = fit("batch_size", position.get("batch_size"), whole(1))
    expect("images", images, images % batch_size == 0, f"a multiple of the batch size, {batch_size}")
    table = torch.is_tensor(sums) and sums.ndim == 2 and len(sums) > 0 and sums.is_floating_point()
    expect("sums", sums, sums is None or table, "a table of numbers")
    states = optimizer.get("state") if isinstance(optimizer, dict) else None
    kept = isinstance(states, dict) and all(isinstance(state, dict) for state in states.values())
    expect("optimizer", optimizer, kept, "the state of an optimizer")
    expect("scaler", scaler, isinstance(scaler, dict), "a dict of numbers")
    for name, value in scaler.items():
        fit(f"scaler's {name}", value, number(-1e300, 1e300))
    fingerprint, bad_in_row = fit("pictures", position.get("pictures"), text()), loaded["bad_in_row"]
    tables = tuple(read_rows(name, loaded[name]) for name in ("history", "speed") if name in loaded)
    return TrainingState(
        epoch, images, batch_size, fingerprint, sums, optimizer, scaler, fit("bad_in_row", bad_in_row, whole(0)), tables
    )


def read_rows(name, rows):
    """The rows of a table: [{column: text}], as its file has them."""
    listed = isinstance(rows, list) and all(isinstance(row, dict) and type(row.get("epoch")) is int for row in rows)
    expect(name, rows, listed, "a list of rows")
    return [{column: "" if cell is None else str(cell) for column, cell in row.items()} for row in rows]


def fit(name, value, setting):
    """`value` as `setting` has it. UserError that names the value."""
    return fitted(f"{name} is {shown(value)}", value, setting)


def expect(name, value, fits, expected):
    """UserError that names the value, and what is expected, unless it fits."""
    if not fits:
        raise UserError(f"{name} is {shown(value)}: expected {expected}")
