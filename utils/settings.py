"""Settings: the dataclass at the top of a script, and one declaration (`Setting`) for each field.

The dataclass has its type, default and help text, the declaration what it may be. The command line,
--help, the dataclass itself, presets and saved checkpoints are all held against the declaration.
"""

import ast
import difflib
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from utils.errors import UserError
from utils.reference_names import REFERENCE_NAMES

LARGEST = 2**53  # no setting needs more, and a float holds each whole number up to it
MISFIT = object()  # what `Setting.fit` returns for a value that the setting cannot have
NOUNS = {int: "whole number", float: "number", bool: "True or False", str: "text"}


class Setting(NamedTuple):
    """What a setting may be: one of `choices`, or a value of `kind` within its range."""

    kind: type | None  # int, float, bool or str: of the value, or of each value of a tuple; None: choices alone
    lowest: float = -LARGEST
    highest: float = LARGEST
    choices: tuple = ()  # words, numbers or None
    count: range | None = None  # how many values its tuple has; None: it is no tuple
    path: bool = False  # a text that is a path: a ~ before it is the user's home folder
    fixed: str = ""  # "run": a resumed run keeps it; "weights": so does a run that starts from its weights

    def fit(self, value: Any, typed: str | None = None) -> Any:
        """`value` (from the text `typed` of a command line) as the setting has it, or MISFIT."""
        for choice in self.choices:
            if any(type(choice) is type(found) and choice == found for found in (value, typed or value)):
                return choice
        if self.count is None:
            return self.fit_one(value, typed)
        values = value if isinstance(value, (tuple, list)) else (value,)
        fitted = tuple(map(self.fit_one, values))
        return fitted if len(fitted) in self.count and MISFIT not in fitted else MISFIT

    def fit_one(self, value, typed=None):
        """`fit` of a single value, whatever the choices."""
        if self.kind is str:
            value = value if isinstance(value, str) else MISFIT if typed is None else typed
            return expand_home(value) if self.path and value is not MISFIT else value
        if self.kind is float and type(value) is int and abs(value) <= LARGEST:
            value = float(value)
        # NaN is in no range.
        return value if type(value) is self.kind and self.lowest <= value <= self.highest else MISFIT

    def __str__(self) -> str:
        """What it may be, in words: `a whole number from 1 to 64`, `one of 'l1', 'l2'`."""
        if self.kind is None:
            return f"one of {', '.join(map(repr, self.choices))}"
        limits = f" from {self.lowest} to {self.highest}" if self.highest < LARGEST else f" of at least {self.lowest}"
        noun = NOUNS[self.kind] + "s" * (self.count is not None) + limits * (self.lowest > -LARGEST)
        if self.count is None:
            noun = f"a {noun}" if self.kind in (int, float) else noun
        elif len(self.count) > 1:
            noun += " with commas between them (a single one as 1,)"
        else:
            noun = f"{self.count[0]} {noun} with commas between them"
        return " or ".join([noun, *map(repr, self.choices)])


def expand_home(path: str) -> str:
    """The path with its user's home folder for a ~ before it. UserError: none is known."""
    if (expanded := os.path.expanduser(path)).startswith("~"):
        raise UserError(f"{path}: there is no home folder for its ~: set HOME, or write ./{path} if it is a name")
    return expanded


def whole(lowest: int, highest: int = LARGEST, *choices: Any, **more: Any) -> Setting:
    return Setting(int, lowest, highest, choices, **more)


def number(lowest: float, highest: float = LARGEST, *choices: Any, **more: Any) -> Setting:
    return Setting(float, lowest, highest, choices, **more)


def choice(choices: Iterable, **more: Any) -> Setting:
    return Setting(None, choices=tuple(choices), **more)


text, pathname, flag = partial(Setting, str), partial(Setting, str, path=True), partial(Setting, bool)
PAIR, SEVERAL = range(2, 3), range(1, 33)  # counts of a tuple's values


def settings(config_class: type) -> type:
    """Decorator: a dataclass of settings. It refuses nothing, as an import must not fail."""
    for name in config_class.__annotations__:  # a dataclass refuses lists and the like as defaults
        value = vars(config_class).get(name)
        setattr(config_class, name, tuple(value) if isinstance(value, (list, set, dict)) else value)
    return dataclass(config_class)


def parse(config_class: type, declared: dict[str, Setting], description: str, arguments: Iterable | None = None) -> Any:
    """The settings of a script: the defaults of its dataclass, and over them the command line."""
    options = typed_options(config_class, declared, description, arguments)
    return config_class(**{**defaults(config_class, declared), **options})


def defaults(config_class: type, declared: dict[str, Setting]) -> dict[str, Any]:
    """The dataclass as {name: value}, checked as options are. UserError: its first fault."""
    place, typed = f"in the settings of {Path(inspect.getfile(config_class)).name}", config_class.__annotations__
    for name, value in vars(config_class).items():
        if name in typed or not (name.startswith("_") or callable(value)):
            check_known(name, declared, f"{name} {place}")
            if name not in typed:
                raise UserError(f"{name} {place} has no type: write {name}: {type(value).__name__} = {value!r}")
    for name in declared:
        if name not in typed:
            raise UserError(f"{name} is missing {place}: put its line back, with the value that you want")
    return {
        field.name: fitted(f"{field.name} = {field.default!r} {place}", field.default, declared[field.name])
        for field in fields(config_class)
    }


def preset_values(presets: dict[str, dict], name: str, declared: dict[str, Setting]) -> dict[str, Any]:
    """The settings of a preset. UserError for an unknown preset, setting or value."""
    values = {}
    for setting, value in presets[fitted(f"preset {name!r}", name, choice(presets))].items():
        check_known(setting, declared, f"PRESETS[{name!r}]: {setting}")
        if isinstance(value, list):
            raise UserError(f"PRESETS[{name!r}]: {setting} is a list, {value}: write it as a tuple, {tuple(value)}")
        values[setting] = fitted(f"PRESETS[{name!r}]: {setting} is {value!r}", value, declared[setting])
    return values


def typed_options(config_class: type, declared: dict[str, Setting], description: str, arguments=None) -> dict[str, Any]:
    """The options of the command line: {name: value}. UserError for a mistake. --help ends it."""
    options = {}
    words = iter(map(str, sys.argv[1:] if arguments is None else arguments))
    for word in words:
        if word in ("-h", "--help"):
            print(help_text(config_class, declared, description))
            raise SystemExit(0)
        option, equals, value = word.partition("=")
        name = option[2:] if option.startswith("--") else ""
        check_known(name, declared, option)
        value = value if equals else next(words, None)
        if value is None or (not equals and value.startswith("--") and value[2:].partition("=")[0] in declared):
            raise UserError(f"argument --{name}: expected one argument; --help lists every setting")
        options[name] = fitted(f"--{name} {value}", read_literal(value), declared[name], value)
    return options


def check_known(name, declared, what):
    """UserError, with `what`, unless there is such a setting."""
    if name in ("local-rank", "local_rank"):
        raise UserError("--local-rank comes from torch.distributed.launch: start with torchrun instead")
    if name not in declared:
        near = "".join(f" (did you mean {near}?)" for near in difflib.get_close_matches(name, declared, 1))
        ours = f"a name of the reference: here it is {REFERENCE_NAMES[name]}" if name in REFERENCE_NAMES else ""
        raise UserError(f"{what} is {ours or f'no setting{near}'}; --help lists every setting")


def read_literal(typed):
    """A value written as in Python (`32`, `2e-4`, `True`, `64,64`); any other text is itself."""
    try:
        return ast.literal_eval(typed.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that literal_eval documents
        return {"true": True, "false": False, "none": None}.get(typed.strip().lower(), typed)


def fitted(what: str, value: Any, setting: Setting, typed: str | None = None) -> Any:
    """`value` as the setting has it. UserError, with `what`, where it does not fit."""
    if (found := setting.fit(value, typed)) is MISFIT:
        raise UserError(f"{what}: expected {setting}")
    return found


def shown(value: Any) -> str:
    """A value of a file as text for a message. Python prints no number of more than 4300 digits."""
    try:
        return ascii(value)[:60]
    except ValueError:
        return "a number of thousands of digits"


def check_saved(config: dict, declared: dict[str, Setting]) -> dict[str, Any]:
    """The settings of a file that are declared, each as it is declared. UserError for a misfit."""
    return {
        name: fitted(f"{name} is {shown(config[name])}", config[name], setting)
        for name, setting in declared.items()
        if name in config
    }


def help_text(config_class: type, declared: dict[str, Setting], description: str) -> str:
    """The text for --help: headings, and each setting with help, choices, range, default."""
    headings, comments = source_comments(config_class)
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # of a module that `python -m` runs
    command = f"-m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name
    lines = [f"usage: python {command} [--NAME VALUE ...]", "", (description or "").strip(), ""]
    for name, field in config_class.__dataclass_fields__.items():
        lines += ["", headings[name]] if name in headings else []
        about = f"{comments.get(name, '')} ({declared[name]}; default: {field.default!r})"
        lines += [f"  --{name} VALUE", textwrap.indent(textwrap.fill(about, 88), " " * 8)]
    return "\n".join(lines)


def source_comments(config_class: type) -> tuple[dict[str, str], dict[str, str]]:
    """({field name: heading above it}, {field name: comment behind it}), from the source."""
    headings, comments, heading = {}, {}, ""
    for line in inspect.getsource(config_class).splitlines():
        if alone := re.match(r" +# (.*)", line):
            heading = alone[1]
        elif found := re.match(r" +(\w+): .*?(?:  # (.*))?$", line):
            headings |= {found[1]: heading} if heading else {}
            heading, comments[found[1]] = "", found[2] or ""
    return headings, comments
