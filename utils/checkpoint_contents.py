"""What a checkpoint may hold: kinds and ranges of values, checked before anything is built."""

import hashlib
from typing import NamedTuple

import torch

from utils.config import shown
from utils.errors import UserError


class Kind(NamedTuple):
    """A value of type `kind`, `lowest` to `highest`; `count` of them in a tuple; or of `words`."""

    kind: type
    lowest: float | None = None
    highest: float | None = None
    count: range | None = None
    words: tuple = ()

    def allows(self, value):
        if self.words and isinstance(value, str) and value in self.words:
            return True
        if self.count is not None:
            one = self._replace(count=None)
            return type(value) is tuple and len(value) in self.count and all(map(one.allows, value))
        fits = type(value) is self.kind or (self.kind is float and type(value) is int)
        return fits and (self.lowest is None or self.lowest <= value <= self.highest)

    def __str__(self):
        noun = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}[self.kind]
        span = "" if self.lowest is None else f" from {self.lowest} to {self.highest}"
        several = "" if self.count is None else f", {self.count[0]}{' or more' * (len(self.count) > 1)} of them"
        return f"{noun}{span}{several}{''.join(f' or {word}' for word in self.words)}"


MOST = 2**53  # no count of a run is larger, and a float holds each whole number up to it
COUNT, FINITE = Kind(int, 0, MOST), Kind(float, -1e300, 1e300)
NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64)
TRAINING = ("optimizer", "scaler", "sums", "bad_in_row")
# The settings of train.py that shape networks and images. Resuming checks the others.
SETTINGS = {
    "input_shape": Kind(int, 1, 2**14, range(2, 3)),
    "img_channels": Kind(int, 1, MOST),
    "channel": Kind(int, 1, MOST),
    "channel_mults": Kind(int, 1, MOST, range(1, 33)),
    "num_res_blocks": Kind(int, 0, MOST),
    "attention_resolutions": Kind(int, 0, 31, range(33)),
    "num_groups": Kind(int, 1, MOST, words=("auto",)),
    "dropout": Kind(float, 0, 1),
    "activation_checkpointing": Kind(bool),
    "class_conditional": Kind(bool),
    "label_dropout": Kind(float, 0, 1),
    "schedule": Kind(str),
    "num_timesteps": Kind(int, 1, MOST),
    "schedule_low": Kind(float, 0, 1e6),
    "schedule_high": Kind(float, 0, 1e6),
    "schedule_shift": Kind(float, -5, 5),
    "prediction": Kind(str),
    "loss_type": Kind(str),
    "loss_weighting": Kind(str),
    "min_snr_gamma": Kind(float, 0, 1e6),
    "ema_decay": Kind(float, 0, 1),
    "ema_start": COUNT,
    "ema_warmup": Kind(bool),
    "resize_mode": Kind(str),
    "background": Kind(int, 0, 255, range(3, 4)),
    "val_split": Kind(float, 0, 1),
}


def check_contents(checkpoint):
    """ValueError that names the first value of a wrong kind or out of range.

    Lists among the settings become tuples. Settings that are not in SETTINGS stay as they are:
    `train.py` holds its own against their types. `nets.architecture` compares the sizes.
    """
    check_tensors(checkpoint["weights"])
    expect("weights_kind", checkpoint["weights_kind"] in ("full", "ema"), checkpoint["weights_kind"], "full or ema")
    config, classes = checkpoint["config"], checkpoint["classes"]
    named = isinstance(config, dict) and all(type(name) is str for name in config)
    expect("config", named, config, "a dict of settings by name")
    config = {name: tuple(value) if type(value) is list else value for name, value in config.items()}
    checkpoint["config"] = config
    for name, setting in SETTINGS.items():
        if name in config:
            expect(name, setting.allows(config[name]), config[name], setting)
    texts = isinstance(classes, list) and all(type(name) is str for name in classes)
    expect("classes", texts and len(set(classes)) == len(classes), classes, "a list of different names")
    for name in ("ema_step", "bad_in_row"):
        expect(name, COUNT.allows(checkpoint.get(name, 0)), checkpoint.get(name), COUNT)


def check_training(checkpoint, parts):
    """`check_contents` for the training state of a resumed run; it must fit train.py's Parts."""
    missing = [name for name in TRAINING if name not in checkpoint]
    if missing:
        raise UserError(f"it has a position, but no {', '.join(missing)}")
    position, sums, scaler, optimizer = (checkpoint[name] for name in ("position", "sums", "scaler", "optimizer"))
    numbers = ("epoch", "images", "batch_size")
    counts = isinstance(position, dict) and all(COUNT.allows(position.get(name)) for name in numbers)
    placed = counts and type(position.get("pictures")) is str
    expect("position", placed, position, "epoch, images, batch_size and pictures")
    table = torch.is_tensor(sums) and sums.ndim == 2 and sums.is_floating_point()
    expect("sums", sums is None or table, sums, "a table of numbers")
    state = isinstance(optimizer, dict) and isinstance(optimizer.get("state"), dict)
    expect("optimizer", state, optimizer, "the state of an optimizer")
    finite = isinstance(scaler, dict) and all(map(FINITE.allows, scaler.values()))
    expect("scaler", finite, scaler, "a dict of numbers")
    for name in ("history", "speed"):  # older versions kept the tables here
        rows = checkpoint.get(name, [])
        listed = isinstance(rows, list) and all(
            isinstance(row, dict) and COUNT.allows(row.get("epoch")) for row in rows
        )
        expect(name, listed, rows, "a list of rows")
    check_training_fits(checkpoint, parts)


def check_training_fits(checkpoint, parts):
    """ValueError unless moments, sums, scaler and position fit the weights."""
    parameters = [parameter for group in parts.optimizer.param_groups for parameter in group["params"]]
    muon = checkpoint["config"].get("optimizer_type") == "muon"
    sums, scaler, position = checkpoint["sums"], parts.scaler.state_dict(), checkpoint["position"]
    fits = {
        "optimizer": all(
            number in range(len(parameters)) and are_moments(kept, parameters[number], muon)
            for number, kept in checkpoint["optimizer"]["state"].items()
        ),
        "sums": sums is None or (len(sums) > 0 and sums.shape[1:] == parts.meter.sums.shape),
        "scaler": not checkpoint["scaler"] or set(scaler) <= set(checkpoint["scaler"]),
        "position": position["batch_size"] > 0 and position["images"] % position["batch_size"] == 0,
    }
    wrong = [name for name, fit in fits.items() if not fit]
    if wrong:
        raise UserError(
            f"the checkpoint is damaged, or edited: its {' and '.join(wrong)} cannot be those of a "
            "training of its weights"
        )


def are_moments(kept, parameter, muon):
    """Whether `kept` is what Adam keeps of a parameter: a step count, and moments of its shape.

    muon: the optimizer is Muon, which keeps no second moment of a convolution's weight.
    """
    names = ("exp_avg",) if muon and parameter.ndim == 4 else ("exp_avg", "exp_avg_sq")
    shapes = {"step": (), **dict.fromkeys(names, parameter.shape)}
    return isinstance(kept, dict) and all(
        torch.is_tensor(kept.get(name)) and kept[name].shape == shape for name, shape in shapes.items()
    )


def expect(name, fits, found, expected):
    """ValueError, with the value found and what is expected, unless it fits."""
    if not fits:
        raise UserError(f"{name} is {shown(found)}, not {expected}")


def check_tensors(state_dict):
    """ValueError unless it maps names to plain tensors of numbers that the file really holds.

    A tensor of a few bytes can claim any shape by repeating them.
    """
    if not isinstance(state_dict, dict):
        raise UserError(f"its weights are {shown(state_dict)}, no state dict")
    for name, value in state_dict.items():
        plain = torch.is_tensor(value) and value.layout == torch.strided and value.device.type == "cpu"
        whole = plain and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
        if type(name) is not str or not whole or value.dtype not in NUMBERS:
            raise UserError(f"{shown(name)} in its weights is no tensor of plain numbers")


def first_not_finite(state_dict):
    """The name of the first floating-point tensor that holds NaN or infinity; None without any."""
    floats = ((name, value) for name, value in state_dict.items() if value.is_floating_point())
    return next((name for name, value in floats if not value.isfinite().all()), None)


def all_finite(state_dict):
    """Whether no tensor holds NaN or infinity. Nothing else is ever saved."""
    return first_not_finite(state_dict) is None


def weights_digest(state_dict):
    """A short digest of all values of a network. It names the network in files of its images."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in state_dict.items():
        digest.update(name.encode())
        value = value.detach().cpu()
        digest.update(value.flatten().view(torch.uint8).numpy().data if value.ndim else str(value.item()).encode())
    return digest.hexdigest()
