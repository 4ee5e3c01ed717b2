"""Settings: a dataclass at the top of a script. Each field is also a command-line option."""

import ast
import difflib
import inspect
import io
import sys
import textwrap
import tokenize
import types
import typing
from dataclasses import dataclass, fields, replace
from pathlib import Path

from utils.errors import UserError
from utils.reference_names import REFERENCE_NAMES


def settings(config_class):
    """Decorator: makes a dataclass of a script's block, unchecked, as an import must not fail."""
    for name in config_class.__annotations__:
        value = vars(config_class).get(name)
        if isinstance(value, (list, set, dict)):  # dataclass refuses these as defaults
            value = tuple(value) if isinstance(value, list) else str(value)
        setattr(config_class, name, value)
    return dataclass(config_class)


def parse_config(config_class, description, arguments=None):
    """The settings of a script: the values of its block, and over them the command line."""
    return replace(block_settings(config_class), **typed_options(config_class, description, arguments))


def block_settings(config_class):
    """The block, each value checked as a typed one. ValueError names the first misfit."""
    file, hints = Path(inspect.getfile(config_class)).name, typing.get_type_hints(config_class)
    for name, value in vars(config_class).items():
        if name in REFERENCE_NAMES:
            raise UserError(
                f"{name} in the settings of {file} is a name of the reference: here it is "
                f"{REFERENCE_NAMES[name]}; take the line out"
            )
        if name not in hints and not name.startswith("_") and not callable(value):
            raise UserError(
                f"{name} = {value!r} in the settings of {file} has no type, so it is no setting: "
                f"write {name}: {type(value).__name__} = {value!r}, or take the line out"
            )
    values = {}
    for field in fields(config_class):
        line = f"{field.name} = {field.default!r} in the settings of {file}"
        values[field.name] = _fitted(line, field.default, hints[field.name])
    return config_class(**values)


def typed_options(config_class, description, arguments=None):
    """The options of the command line: {field name: value}. ValueError for a mistake."""
    hints, typed = typing.get_type_hints(config_class), {}
    words = iter(map(str, sys.argv[1:] if arguments is None else arguments))
    for word in words:
        if word in ("-h", "--help"):
            print(help_text(config_class, description))
            raise SystemExit(0)
        option, equals, text = word.partition("=")
        name = option[2:] if option.startswith("--") else ""
        if name in REFERENCE_NAMES and name not in hints:
            raise UserError(f"--{name} is a name of the reference: here it is {REFERENCE_NAMES[name]}")
        if name not in hints:
            nearest = "".join(f" (did you mean --{near}?)" for near in difflib.get_close_matches(name, hints, 1))
            raise UserError(f"unrecognized arguments: {word}{nearest}; --help lists every setting")
        text = text if equals else next(words, None)
        if text is None or (not equals and text.startswith("--") and text[2:].partition("=")[0] in hints):
            raise UserError(f"argument --{name}: expected one argument; --help lists every setting")
        typed[name] = parse_value(name, text, hints[name])
    return typed


def help_text(config_class, description):
    """The text for --help: each setting with its comment, its choices and its default."""
    hints, comments, indent = typing.get_type_hints(config_class), trailing_comments(config_class), " " * 8
    lines = [f"usage: {Path(sys.argv[0]).name} [--NAME VALUE ...]", "", (description or "").strip(), ""]
    for field in fields(config_class):
        comment = comments.get(field.name, "")
        choices = ", ".join(name for name in _choices(hints[field.name]) if name and name not in comment)
        text = f"{comment}{f' [{choices}]' if choices else ''} (default: {field.default!r})"
        lines += [f"  --{field.name} VALUE", *textwrap.wrap(text, 96, initial_indent=indent, subsequent_indent=indent)]
    return "\n".join(lines)


def _choices(kind):
    """The words that a field of this type may be; [] where it is no choice of words."""
    if typing.get_origin(kind) is typing.Literal:
        return list(map(str, typing.get_args(kind)))
    return [choice for argument in typing.get_args(kind) for choice in _choices(argument)]


def parse_value(name, text, expected):
    """A value written as in Python (`32`, `2e-4`, `True`, `64,64`, `1,`); a word needs no quotes.

    name: the setting, for the ValueError where `text` does not fit its type, `expected`.
    """
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that literal_eval documents
        value = {"true": True, "false": False, "none": None}.get(text.strip().lower(), text)
    return _fitted(f"--{name} {text}", value, expected, text)


def fit_saved(name, value, expected, source):
    """A value of a file as its setting's type; lists become tuples. ValueError names `source`."""
    return _fitted(f"{source}: {name} is {shown(value)}", value, expected)


def shown(value):
    """A value of a file as text for a message. Python prints no number of more than 4300 digits."""
    try:
        text = ascii(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:60]}..."


_NO_FIT = object()
_UNIONS = (typing.Union, types.UnionType)
LARGEST = 2.0**63


def _fitted(what, value, kind, text=None):
    """`value` as `kind`. ValueError, with `what` and the expected type, where it does not fit."""
    fitted = _fit(value, kind, text)
    if fitted is _NO_FIT:
        raise UserError(f"{what}: expected {describe(kind)}")
    return fitted


def _fit(value, kind, text):
    """`value` as `kind`, or _NO_FIT. text: what was typed. True is no number, 3 a fine float."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in _UNIONS:
        fits = (_fit(value, argument, text) for argument in arguments)
        return next((fitted for fitted in fits if fitted is not _NO_FIT), _NO_FIT)
    if origin is tuple:
        values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        kinds = arguments[:1] * len(values) if arguments[-1] is Ellipsis else arguments
        fitted = tuple(_fit(item, kind, None if text is None else str(item)) for item, kind in zip(values, kinds))
        return fitted if len(values) == len(kinds) and _NO_FIT not in fitted else _NO_FIT
    if origin is typing.Literal:
        return next(
            (
                choice
                for choice in arguments
                for found in (value, text)  # "none" may be a choice
                if type(choice) is type(found) and choice == found
            ),
            _NO_FIT,
        )
    if kind is str:
        return value if isinstance(value, str) else _NO_FIT if text is None else text
    if type(value) in (int, float) and not abs(value) < LARGEST:  # PyTorch counts in 64 bits; NaN is no smaller
        return _NO_FIT
    if kind is float and type(value) is int:
        return float(value)
    return value if type(value) is kind else _NO_FIT


def describe(kind):
    """A type in words, for messages: `one of 'fp32', 'bf16'`, `2 values: int, int`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in _UNIONS:
        return " or ".join(map(describe, arguments))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"{arguments[0].__name__} values with commas between them, one alone as '1,'"
    if origin is tuple:
        return f"{len(arguments)} {arguments[0].__name__} values with commas between them, as '64,64'"
    return {bool: "True or False", int: "a whole number", float: "a number", str: "text"}.get(kind, kind.__name__)


def check_values(config, **minimums):
    """ValueError for a value of another type, no known choice, or a setting out of range.

    minimums: setting=(lowest, highest or None), both allowed; "auto" is always in range.
    """
    hints = typing.get_type_hints(type(config))
    for name, kind in hints.items():
        _fitted(f"{name} is {getattr(config, name)!r}", getattr(config, name), kind)
    for name, (lowest, highest) in minimums.items():
        values = getattr(config, name)
        for value in values if isinstance(values, tuple) else (values,):
            if value != "auto" and (not value >= lowest or (highest is not None and value > highest)):
                span = f"at least {lowest}" if highest is None else f"between {lowest} and {highest}"
                raise UserError(f"{name} is {value}: it must be {span} ({describe(hints[name])})")


def trailing_comments(config_class):
    """{field name: the comment behind it in the source, or above it}: the text of --help."""
    names, comments = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(config_class)).readline):
        if token.type == tokenize.NAME:
            names.setdefault(token.start[0], token.string)
        elif token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ")
    return {
        name: comments.get(line, comments.get(line - 1))
        for line, name in names.items()
        if line in comments or (line - 1 in comments and line - 1 not in names)
    }
