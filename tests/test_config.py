"""Settings: what may be typed for each kind of field, what --help says, and which errors are one
line.
"""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

import predict
import train
import txt_annotation
from utils.config import (
    block_settings,
    check_values,
    parse_config,
    parse_value,
    settings,
    trailing_comments,
    typed_options,
)
from utils.errors import run_script
from utils.reference_names import REFERENCE_NAMES


@dataclass
class Settings:
    # A group
    batch_size: int = 64  # pictures a step; 100 % of them
    init_lr: float = 2e-4  # "#" in a comment, too
    loss_type: str = "l2 # no comment"  # l1 or l2
    compile: Literal["auto"] | bool = "auto"  # auto, True or False
    shape: tuple[int, int] = (32, 32)  # two of them
    mults: tuple[int, ...] = (1, 2)  # as many as you like
    limit: int | None = None  # or nothing


def parse(*arguments):
    return parse_config(Settings, "", list(arguments))


@pytest.mark.parametrize("text", ["-dash", "-", "-1", "-h2", "-e", "- a b"])
def test_a_text_may_start_with_a_dash(text):
    assert parse("--loss_type", text, "--batch_size", "3") == Settings(loss_type=text, batch_size=3)
    assert parse(f"--loss_type={text}").loss_type == text
    assert parse("--loss_type=--two").loss_type == "--two"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("batch_size", "32", 32),
        ("batch_size", "-3", -3),
        ("batch_size", " 7", 7),
        ("init_lr", "2e-4", 2e-4),
        ("init_lr", "3", 3.0),
        ("init_lr", "-.5", -0.5),
        ("init_lr", "-1e3", -1000.0),
        ("loss_type", "l1", "l1"),
        ("loss_type", "'l1'", "l1"),
        ("loss_type", "3", "3"),
        ("loss_type", "True", "True"),
        ("loss_type", "None", "None"),
        ("loss_type", "", ""),
        ("loss_type", "a b, c.png", "a b, c.png"),
        ("compile", "auto", "auto"),
        ("compile", "True", True),
        ("compile", "false", False),
        ("shape", "64,48", (64, 48)),
        ("shape", "(64, 48)", (64, 48)),
        ("shape", "[64, 48]", (64, 48)),
        ("shape", "-1,2", (-1, 2)),
        ("mults", "1,", (1,)),
        ("mults", "1", (1,)),
        ("mults", "1,2,2,2", (1, 2, 2, 2)),
        ("mults", "()", ()),
        ("limit", "5", 5),
        ("limit", "None", None),
        ("limit", "none", None),
    ],
)
def test_values_are_written_as_in_python(name, text, value):
    for arguments in ([f"--{name}", text], [f"--{name}={text}"]):
        found = getattr(parse(*arguments), name)
        assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("batch_size", "2.5", "expected a whole number"),
        ("batch_size", "True", "a whole number"),
        ("batch_size", "many", "a whole number"),
        ("batch_size", "__import__('os').getcwd()", "a whole number"),
        ("batch_size", "{[]: 1}", "a whole number"),
        ("batch_size", "(" * 300, "a whole number"),
        ("batch_size", "1+1", "a whole number"),
        ("batch_size", "None", "a whole number"),
        ("init_lr", "fast", "expected a number"),
        ("init_lr", "True", "a number"),
        ("init_lr", "nan", "a number"),
        ("compile", "maybe", "one of 'auto' or True or False"),
        ("compile", "1", "one of 'auto' or True or False"),
        ("shape", "64", "2 int values with commas between them, as '64,64'"),
        ("shape", "1,2,3", "2 int values"),
        ("shape", "a,b", "2 int values"),
        ("shape", "1.5,2", "2 int values"),
        ("shape", "", "2 int values"),
        ("mults", "1,x", "one alone as '1,'"),
        ("mults", "1,2.0", "int values"),
        ("mults", "1 2", "int values"),
        ("limit", "x", "a whole number or None"),
        ("limit", "9" * 400, "a whole number or None"),
        ("batch_size", str(2**63), "a whole number"),
        ("init_lr", "9" * 400, "a number"),
        ("init_lr", "1e30", "a number"),
        ("init_lr", "1e999", "a number"),
    ],
)
def test_other_values_are_refused_with_what_was_expected(name, text, words):
    with pytest.raises(ValueError, match=f"^--{name} ") as raised:
        parse(f"--{name}", text)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batchsize", "3"], "did you mean --batch_size?"),
        (["--batch-size=3"], "did you mean --batch_size?"),
        (["--zzz", "3"], "unrecognized arguments: --zzz"),
        (["train"], "unrecognized arguments: train"),
        (["--batch", "3"], "unrecognized"),
        (["--batch_size"], "expected one argument"),
        (["--batch_size", "--shape", "1,2"], "expected one"),
    ],
)
def test_unknown_options_are_refused_with_the_nearest_one(arguments, words):
    with pytest.raises(ValueError, match="--help lists every setting") as raised:
        parse(*arguments)
    assert words in str(raised.value)


def test_only_what_is_typed_is_handed_back():
    assert typed_options(Settings, "", []) == {}
    assert typed_options(Settings, "", ["--batch_size", "64", "--limit", "-2"]) == {"batch_size": 64, "limit": -2}
    assert parse() == Settings()


def test_help_is_the_comment_and_the_default(capsys):
    with pytest.raises(SystemExit) as raised:
        parse("--help")
    assert raised.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for words in (
        "--batch_size VALUE pictures a step; 100 % of them (default: 64)",
        '"#" in a comment, too',
        "(default: (1, 2))",
    ):
        assert words in printed
    assert "A group" not in printed and "VALUE l1 or l2 (default: 'l2 # no comment')" in printed


@pytest.mark.parametrize("script", [train, predict, txt_annotation])
def test_each_setting_of_the_scripts_explains_itself(script, capsys):
    comments = trailing_comments(script.Config)
    assert [field.name for field in fields(script.Config) if not comments.get(field.name)] == []
    with pytest.raises(SystemExit):
        parse_config(script.Config, script.__doc__, ["--help"])
    assert capsys.readouterr().out.count("(default:") == len(fields(script.Config))


@pytest.mark.parametrize("script", [train, predict, txt_annotation])
def test_each_default_of_the_scripts_can_be_typed(script):
    for field in fields(script.Config):
        typed = typed_options(script.Config, "", [f"--{field.name}={field.default}"])
        assert typed == {field.name: field.default}


def test_values_out_of_range():
    check_values(Settings(), batch_size=(1, None), shape=(1, 64), init_lr=(0, 1))
    for values, name in (
        ({"batch_size": 0}, "batch_size"),
        ({"shape": (8, 65)}, "shape"),
        ({"init_lr": 2.0}, "init_lr"),
    ):
        with pytest.raises(ValueError, match=f"{name} is .*: it must be "):
            check_values(Settings(**values), batch_size=(1, None), shape=(1, 64), init_lr=(0, 1))
    with pytest.raises(ValueError, match="between 1 and 64"):
        check_values(Settings(shape=(0, 8)), shape=(1, 64))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"compile": "maybe"}, "compile is 'maybe': expected one of 'auto' or True or False"),
        ({"batch_size": "64"}, "a whole number"),
        ({"init_lr": float("nan")}, "init_lr is nan: expected a number"),
        ({"init_lr": 1e30}, "a number"),
        ({"init_lr": float("inf")}, "a number"),
        ({"shape": (8, 8, 8)}, "2 int values"),
        ({"limit": 1.5}, "a whole number or None"),
        ({"loss_type": 2}, "text"),
    ],
)
def test_an_edited_block_is_checked_like_typed_options(values, words):
    check_values(Settings(init_lr=1, mults=[1, 2], limit=None, compile=True))
    with pytest.raises(ValueError, match=words):
        check_values(Settings(**values))


@pytest.mark.parametrize("values", [{"sampler": "euler"}, {"spacing": "karras"}, {"precision": "fp8"}])
def test_an_edited_block_of_predict_is_refused_before_any_work(values):
    with pytest.raises(ValueError, match=f"{next(iter(values))} is .*: expected one of .*(ddim|logsnr|bf16)"):
        predict.check(predict.Config(**values), {})


def block(text):
    """The settings of a block with this text, as `block_settings` gives them."""
    scope = {"settings": settings, "Literal": Literal, "__name__": __name__}
    exec("@settings\nclass Edited:\n" + "".join(f"    {line}\n" for line in text.splitlines()), scope)
    return block_settings(scope["Edited"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("shape: tuple[int, int] = [64, 48]", (64, 48)),
        ("mults: tuple[int, ...] = [1, 2]", (1, 2)),
        ("mults: tuple[int, ...] = 1", (1,)),
        ("rate: float = 1", 1.0),
        ("rate: Literal['auto'] | float = 3", 3.0),
        ("name: str = ''", ""),
    ],
)
def test_an_edited_block_is_applied_whole(text, value):
    found = getattr(block(text), text.split(":")[0])
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("size: int = 3\nchannel = 64", "channel = 64 in the settings of .* has no type, .*: write channel: int = 64"),
        ("size: int = 3\nCuda = True", "Cuda in the settings of .* is a name of the reference: here it is device"),
        ("size: int = 3\nEpoch: int = 300", "Epoch .*: here it is epochs; take the line out"),
        ("size: int = 3\nMin_lr = 1e-6", "here it is min_lr, the last learning rate itself"),
        ("size: int = 3\nprediction = 'v'", "write prediction: str = 'v'"),
        ("size: int = 64.0", "size = 64.0 in the settings of .*: expected a whole number"),
        ("size: int = 1e3", "expected a whole number"),
        ("size: int = '32'", "size = '32' .*: expected a whole number"),
        ("shape: tuple[int, int] = [64, 64, 64]", "expected 2 int values"),
        ("name: str = 5", "expected text"),
        ("flag: bool = 1", "expected True or False"),
        ("kind: Literal['a', 'b'] = 'c'", "one of 'a', 'b'"),
        ("size: int = {3}", "expected a whole number"),
        ("size: int", "size = None .*: expected a whole number"),
    ],
)
def test_an_edited_block_is_refused_by_name(text, words):
    with pytest.raises(ValueError, match=words) as error:
        block(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(REFERENCE_NAMES))
def test_a_setting_of_the_reference_is_refused_with_ours(name):
    """What it names exists, in train.py or predict.py."""
    with pytest.raises(ValueError, match=f"--{name} is a name of the reference: here it is ") as error:
        typed_options(train.Config, "", [f"--{name}", "1"])
    first = re.split(r"[:, (]", str(error.value).split("here it is ")[1])[0]
    fields = {**train.Config.__dataclass_fields__, **predict.Config.__dataclass_fields__}
    assert (first in fields or first in ("nothing", "save_dir")) and name not in fields


def raising(error):
    def main():
        raise error

    return main


def ours(message):
    return lambda: parse_value("limit", message, int)


@pytest.mark.parametrize(
    ("main", "code", "line"),
    [
        (ours("x"), 1, "error: --limit x: expected a whole number"),
        (ours("two\nlines"), 1, "error: --limit two lines: expected a whole number"),
        (
            lambda: Path("nowhere/at/all").read_text(),
            1,
            "error: nowhere/at/all: No such file or directory; check this path, or name another",
        ),
        (raising(OSError("the disk is full")), 1, "error: the disk is full"),
        (
            raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
            1,
            "error: out of memory: lower --batch_size",
        ),
        (lambda: torch.empty(2**60), 1, "error: out of memory: lower --batch_size"),
        (raising(KeyboardInterrupt()), 130, "stopped"),
    ],
)
def test_mistakes_of_a_user_are_one_line(main, code, line, capsys):
    with pytest.raises(SystemExit) as raised:
        run_script(main)
    printed = capsys.readouterr()
    assert raised.value.code == code and printed.out == ""
    assert printed.err.startswith(line) and printed.err.count("\n") == 1


def unpacking():
    first, second = [1, 2, 3]
    return first, second


@pytest.mark.parametrize(
    "main",
    [
        lambda: torch.zeros(2).reshape(3),
        lambda: torch.distributions.Normal(0.0, -1.0),
        raising(KeyError("x")),
        lambda: 1 / 0,
        lambda: np.zeros(6).reshape(4),
        lambda: int("x"),
        lambda: [].index(3),
        unpacking,
        lambda: len(slice(1)),
    ],
)
def test_mistakes_of_ours_keep_their_traceback(main, capsys):
    with pytest.raises((RuntimeError, ValueError, KeyError, ZeroDivisionError, TypeError)):
        run_script(main)
    assert capsys.readouterr().err == ""
