"""The checkpoint: weights, settings, classes and, where a run can resume, its training state."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from utils.checkpoint.integrity import check_plain, check_tensors, first_not_finite, load_tensors, save_tensors
from utils.errors import UserError
from utils.settings import LARGEST, check_saved, choice, shown, text, whole
from utils.training.loss_history import as_text
from utils.training.settings_schema import CARRIED, RUN_SETTINGS

FORMAT = 1
POSITION = ("epoch", "images", "batch_size", "pictures")  # TrainingState's fields, as the file has them
STATE = ("sums", "optimizer", "scaler", "bad_in_row")
# What a run did whose file lacks one of these settings: they came later.
BEFORE = {"num_groups": 32, "icc": False, "schedule_shift": 0.0, "timestep_sampling": "uniform", "condition": ""}


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
    config: dict[str, Any] = field(default_factory=dict)  # train.py's settings, as they were asked for, and CARRIED
    classes: list[str] = field(default_factory=list)  # their names
    ema_step: int | None = None  # optimizer steps that the EMA has counted
    resolved: dict[str, Any] = field(default_factory=dict)  # what "auto" was on the run's machine
    defaults: dict[str, Any] = field(default_factory=dict)  # Config's, when the run began
    training: TrainingState | None = None


def save_checkpoint(checkpoint: Checkpoint) -> None:
    """Writes the file at `checkpoint.path`, whole or not at all. OSError: the disk refuses."""
    check_finite(checkpoint)
    values = {"format": FORMAT, "weights_kind": checkpoint.kind}
    for name in ("config", "classes", "weights", "resolved", "defaults", "ema_step"):
        if (value := getattr(checkpoint, name)) is not None:
            values[name] = value
    if (state := checkpoint.training) is not None:
        values |= {"position": dict(zip(POSITION, state)), **dict(zip(STATE, state[len(POSITION) :]))}
    save_tensors(checkpoint.path, values)


def load_checkpoint(path: Path | str, lazily: bool = False) -> Checkpoint:
    """A checkpoint of this project, or a bare state dict such as the reference saves, on the CPU.

    lazily: maps it. UserError for another file, a damaged one, and weights with NaN or infinity.
    """
    path, loaded = Path(path), load_tensors(path, lazily)
    if isinstance(loaded, dict) and loaded and all(map(torch.is_tensor, loaded.values())):
        loaded = {"weights": loaded}
    if not isinstance(loaded, dict) or "weights" not in loaded:
        raise UserError(
            f"{path}: neither a checkpoint of this project nor a state dict (others': python -m utils.convert import)"
        )
    if type(loaded.get("format", FORMAT)) is not int or loaded.get("format", FORMAT) != FORMAT:
        raise UserError(f"{path}: written by a newer version of this project; update yours to read it")
    try:
        checkpoint = read_contents(path, loaded)
    except (UserError, RecursionError) as error:
        raise UserError(f"{path}: damaged, or edited: {error}") from None
    check_finite(checkpoint)
    return checkpoint


def check_finite(checkpoint):
    """UserError for weights that hold NaN or infinity: none are written, and none read."""
    if (name := first_not_finite(checkpoint.weights)) is not None:
        raise UserError(f"{checkpoint.path}: its weights hold NaN or infinity (the first is {name}): take an older one")


CONTAINERS = {  # the type of a value, and of its items or keys
    **dict.fromkeys(("config", "resolved", "defaults", "position"), (dict, str)),
    "classes": (list, str),
    **dict.fromkeys(("history", "speed"), (list, dict)),  # of older versions
}
VALUES = {
    **dict.fromkeys(("epoch", "images", "bad_in_row"), whole(0)),
    "batch_size": whole(1),
    "pictures": text(),
    "ema_step": whole(0, LARGEST, None),
    "weights_kind": choice(("full", "ema")),
}


def read_contents(path, loaded):
    """The Checkpoint of a file's dict. UserError that names the first value that it cannot have."""
    check_tensors(loaded["weights"])
    check_plain({name: value for name, value in loaded.items() if name != "weights"}, "it")
    for name, (kind, item) in CONTAINERS.items():
        value = loaded.get(name, kind())
        named = isinstance(value, kind) and all(isinstance(each, item) for each in value)
        if not named or (name == "classes" and len(set(value)) < len(value)):
            raise UserError(f"{name} cannot be {shown(value)}")
    values = loaded.get("position", {}) | loaded
    values |= check_saved(values, VALUES)
    about = {name: values[name] for name in ("classes", "ema_step") if name in values}
    if values.get("config"):
        about["config"] = check_saved({**BEFORE, **values["config"]}, RUN_SETTINGS | CARRIED)
    about |= {name: check_saved(values.get(name, {}), RUN_SETTINGS) for name in ("resolved", "defaults")}
    training = read_training(values) if "position" in loaded else None
    return Checkpoint(path, loaded["weights"], values.get("weights_kind", "full"), training=training, **about)


def read_training(values):
    """The TrainingState of a file's values; whether it fits the weights is seen on resuming."""
    if missing := [name for name in (*POSITION, *STATE) if name not in values]:
        raise UserError(f"its training state lacks {', '.join(missing)}")
    if values["images"] % values["batch_size"]:
        raise UserError(f"images is {values['images']}: expected a multiple of the batch size, {values['batch_size']}")
    tables = ([as_text(row) for row in values[name]] for name in ("history", "speed") if name in values)
    return TrainingState(*(values[name] for name in (*POSITION, *STATE)), tuple(tables))
