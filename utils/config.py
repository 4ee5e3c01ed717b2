"""Settings: a dataclass at the top of a script, every field of which is also a command-line option."""

import argparse
import ast
import difflib
import inspect
import io
import re
import sys
import tokenize
import types
import typing
from dataclasses import fields

SINGLE_DASH = re.compile(r"-(?!-|h$)")  # how a value may start: every option starts with two dashes


def parse_config(config_class, description, arguments=None):
    """The settings of a script: the values of its block, with what the command line says instead."""
    return config_class(**typed_options(config_class, description, arguments))


def typed_options(config_class, description, arguments=None):
    """Only what the command line says: {field name: value}. A mistake there ends in a ValueError of one line."""
    parser = _Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.names = [field.name for field in fields(config_class)]
    types_, comments = typing.get_type_hints(config_class), trailing_comments(config_class)
    for field in fields(config_class):
        text = f"{comments.get(field.name, '')} (default: {field.default!r})".replace("%", "%%").strip()
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, metavar="VALUE", help=text)
    typed = vars(parser.parse_args(_join_values(sys.argv[1:] if arguments is None else arguments)))
    return {name: parse_value(name, text, types_[name]) for name, text in typed.items()}


def _join_values(arguments):
    """`--seed -1` as `--seed=-1`: argparse takes -1,2 and a class called -dash for options."""
    joined = []
    for argument in map(str, arguments):
        if joined and SINGLE_DASH.match(argument) and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


class _Parser(argparse.ArgumentParser):
    """argparse with errors as ValueError, and the nearest known name for one that is misspelt."""

    def error(self, message):
        unknown = [word.split("=")[0].lstrip("-") for word in message.split() if word.startswith("--")]
        near = difflib.get_close_matches(unknown[0], self.names, 1) if unknown and "unrecognized" in message else []
        raise ValueError(f"{message}{f' (did you mean --{near[0]}?)' if near else ''}; --help lists every setting")


def parse_value(name, text, expected):
    """A value written as in Python (`32`, `2e-4`, `True`, `64,64`, `1,`); a word needs no quotes.

    Args: name: the setting, for the message. text: what was typed. expected: its type in the dataclass.
    Raises ValueError, saying what was expected, where the value does not fit.
    """
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that literal_eval documents
        value = {"true": True, "false": False, "none": None}.get(text.strip().lower(), text)
    for kind in typing.get_args(expected) if _is_union(expected) else (expected,):
        fitted = _fit(value, text, kind)
        if fitted is not _NO_FIT:
            return fitted
    raise ValueError(f"--{name} {text}: expected {describe(expected)}")


_NO_FIT = object()


def _is_union(kind):
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _fit(value, text, kind):
    """`value` as `kind`, or _NO_FIT. True is no number here, and 3 is a fine float."""
    origin = typing.get_origin(kind)
    if origin is tuple:
        return _fit_tuple(value, text, typing.get_args(kind))
    if origin is typing.Literal:
        return value if value in typing.get_args(kind) else _NO_FIT
    if kind is str:
        return value if isinstance(value, str) else text
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value if type(value) is kind else _NO_FIT


def _fit_tuple(value, text, kinds):
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(values)
    fitted = tuple(_fit(item, str(item), kind) for item, kind in zip(values, kinds))
    return fitted if len(values) == len(kinds) and _NO_FIT not in fitted else _NO_FIT


def describe(kind):
    """A type in words, for messages: `one of 'fp32', 'bf16'`, `2 values: int, int`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if _is_union(kind):
        return " or ".join(describe(argument) for argument in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(argument) for argument in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"{arguments[0].__name__} values with commas between them, one alone as '1,'"
        return f"{len(arguments)} {arguments[0].__name__} values with commas between them, as '64,64'"
    return {bool: "True or False", int: "a whole number", float: "a number", str: "text"}.get(kind, kind.__name__)


def check_values(config, **minimums):
    """Raise ValueError unless each named setting is in range, (lowest, highest or None), both allowed, or still "auto"."""
    types_ = typing.get_type_hints(type(config))
    for name, (lowest, highest) in minimums.items():
        values = getattr(config, name)
        for value in values if isinstance(values, tuple) else (values,):
            if value != "auto" and (not value >= lowest or (highest is not None and value > highest)):
                span = f"at least {lowest}" if highest is None else f"between {lowest} and {highest}"
                raise ValueError(f"{name} is {value}: it must be {span} ({describe(types_[name])})")


def trailing_comments(config_class):
    """{field name: the comment behind it in the source}: written once, it is the --help text too."""
    lines = io.StringIO(inspect.getsource(config_class)).readline
    names, comments = {}, {}
    for token in tokenize.generate_tokens(lines):
        if token.type == tokenize.NAME:
            names.setdefault(token.start[0], token.string)
        elif token.type == tokenize.COMMENT and token.start[0] in names:
            comments[names[token.start[0]]] = token.string.lstrip("# ")
    return comments
