"""Settings: what may be typed for each kind of field, what --help says, and which errors are one
line.
"""

import inspect
import os
import re
import tempfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import with_defaults

import predict
import train
import txt_annotation
from nets import LOSS_WEIGHTINGS, LOSSES, PREDICTIONS, SAMPLERS, SCHEDULES, SPACINGS, GaussianDiffusion, UNet, build
from nets.errors import SettingError
from nets.schedules import make_betas
from utils.checkpoint.file import load_checkpoint
from utils.data.cache import cache_folder
from utils.data.image_format import RESIZE_MODES
from utils.device import DTYPES
from utils.errors import UserError, run_script
from utils.evaluate import __main__ as evaluate
from utils.reference_names import REFERENCE_NAMES
from utils.settings import (
    LARGEST,
    MISFIT,
    PAIR,
    SEVERAL,
    choice,
    defaults,
    fitted,
    flag,
    number,
    parse,
    preset_values,
    settings,
    source_comments,
    text,
    typed_options,
    whole,
)
from utils.training.optimizer import DECAYS, OPTIMIZERS
from utils.training.settings_schema import RUN_SETTINGS


@settings
class Settings:
    # A group
    batch_size: int = 64  # images per step; 100 % of them
    init_lr: float = 2e-4  # "#" in a comment, too
    loss_type: str = "l2 # no comment"  # l1 or l2
    compile: bool | str = "auto"  # auto, True or False

    # Another group
    shape: tuple[int, int] = (32, 32)  # two of them
    mults: tuple[int, ...] = (1, 2)  # as many as you like
    limit: int | None = None  # or nothing


DECLARED = {
    "batch_size": whole(-10),
    "init_lr": number(-1000, 1000),
    "loss_type": text(),
    "compile": flag(choices=("auto",)),
    "shape": whole(-1, 64, count=PAIR),
    "mults": whole(-5, 64, count=range(33)),
    "limit": whole(-5, LARGEST, None),
}
SCRIPTS = {
    train: RUN_SETTINGS,
    predict: predict.SETTINGS,
    txt_annotation: txt_annotation.SETTINGS,
    evaluate: evaluate.SETTINGS,
}


def parsed(*arguments):
    return parse(Settings, DECLARED, "", list(arguments))


@pytest.mark.parametrize("text", ["-dash", "-", "-1", "-h2", "-e", "- a b"])
def test_a_text_may_start_with_a_dash(text):
    assert parsed("--loss_type", text, "--batch_size", "3") == Settings(loss_type=text, batch_size=3)
    assert parsed(f"--loss_type={text}").loss_type == text
    assert parsed("--loss_type=--two").loss_type == "--two"


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
        found = getattr(parsed(*arguments), name)
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
        ("compile", "maybe", "True or False or 'auto'"),
        ("compile", "1", "True or False or 'auto'"),
        ("shape", "64", "2 whole numbers"),
        ("shape", "1,2,3", "2 whole numbers"),
        ("shape", "a,b", "2 whole numbers"),
        ("shape", "1.5,2", "2 whole numbers"),
        ("shape", "", "2 whole numbers"),
        ("mults", "1,x", "a single one as 1,"),
        ("mults", "1,2.0", "whole numbers"),
        ("mults", "1 2", "whole numbers"),
        ("limit", "x", "or None"),
        ("limit", "9" * 400, "or None"),
        ("batch_size", str(2**63), "a whole number"),
        ("init_lr", "9" * 400, "a number"),
        ("init_lr", "1e30", "a number"),
        ("init_lr", "1e999", "a number"),
    ],
)
def test_other_values_are_refused_with_what_was_expected(name, text, words):
    with pytest.raises(ValueError, match=f"^--{name} ") as raised:
        parsed(f"--{name}", text)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batchsize", "3"], "did you mean batch_size?"),
        (["--batch-size=3"], "did you mean batch_size?"),
        (["--zzz", "3"], "--zzz is no setting; --help"),
        (["train"], "train is no setting"),
        (["--batch", "3"], "--batch is no setting"),
        (["--batch_size"], "expected one argument"),
        (["--batch_size", "--shape", "1,2"], "expected one"),
    ],
)
def test_unknown_options_are_refused_with_the_nearest_one(arguments, words):
    with pytest.raises(ValueError, match="--help lists every setting") as raised:
        parsed(*arguments)
    assert words in str(raised.value)


def test_only_what_is_typed_is_handed_back():
    assert typed_options(Settings, DECLARED, "", []) == {}
    assert typed_options(Settings, DECLARED, "", ["--batch_size", "64", "--limit", "-2"]) == {
        "batch_size": 64,
        "limit": -2,
    }
    assert parsed() == Settings()


def test_help_has_headings_comments_choices_ranges_and_defaults(capsys):
    with pytest.raises(SystemExit) as raised:
        parsed("--help")
    assert raised.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for words in (
        "A group --batch_size VALUE images per step; 100 % of them (a whole number of at least -10; default: 64)",
        '"#" in a comment, too (a number from -1000 to 1000; default: 0.0002)',
        "VALUE l1 or l2 (text; default: 'l2 # no comment')",
        "True or False or 'auto'; default: 'auto'",
        "Another group --shape VALUE two of them (2 whole numbers from -1 to 64 with commas between them; default: ",
    ):
        assert words in printed


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_each_setting_of_the_scripts_is_declared_once_and_explains_itself(script, capsys):
    declared, names = SCRIPTS[script], [field.name for field in fields(script.Config)]
    assert sorted(names) == sorted(declared)
    headings, comments = source_comments(script.Config)
    assert [name for name in names if not comments.get(name)] == []
    assert set(headings) <= set(names)
    defaults(script.Config, declared)
    with pytest.raises(SystemExit):
        parse(script.Config, declared, script.__doc__, ["--help"])
    assert " ".join(capsys.readouterr().out.split()).count("default: ") == len(names)


def undeclared(config_class, declared):
    """The fields whose declaration has another kind than their annotation, or no least number.

    A number may be as large as LARGEST, which every declaration has.
    """
    faults = []
    for field in fields(config_class):
        setting, annotation = declared[field.name], str(field.type)
        kind = setting.kind or type(setting.choices[-1])
        open_below = setting.kind in (int, float) and setting.lowest <= -LARGEST
        if kind.__name__ not in annotation or (setting.count is not None) != ("tuple" in annotation) or open_below:
            faults.append(field.name)
    return faults


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_each_number_has_a_range_and_each_annotation_the_declared_kind(script):
    assert undeclared(script.Config, SCRIPTS[script]) == (["seed"] if script is train else [])  # any seed will do


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_tilde_before_a_path_is_the_home_folder(script, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME" if os.name == "posix" else "USERPROFILE", str(tmp_path))
    home, declared = os.path.join("~", "x"), SCRIPTS[script]
    texts = [name for name, setting in declared.items() if setting.kind is str]
    for name in texts:
        config = parse(script.Config, declared, "", [f"--{name}", home])
        same = name in ("device", "class_name", "preset")  # texts that are no paths
        assert getattr(config, name) == (home if same else str(tmp_path / "x")), name
    assert len(texts) > 1


def test_a_tilde_without_a_home_folder_is_refused(monkeypatch, tmp_path):
    """HOME is unset, and the user is not in the system's list, as in some containers."""
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^~/x: there is no home folder for its ~: set HOME, or write \./~/x"):
        parse(predict.Config, predict.SETTINGS, "", ["--save_dir", "~/x"])
    assert parse(predict.Config, predict.SETTINGS, "", ["--save_dir", "./~/x"]).save_dir == "./~/x"
    (tmp_path / "datasets").mkdir()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: (_ for _ in ()).throw(PermissionError(13, "denied")))
    with pytest.raises(OSError, match="no folder for the cache") as error:
        cache_folder("train_lines.txt")
    assert "~" not in str(error.value) and os.listdir(tmp_path) == ["datasets"]


def test_fp16_trains_on_cuda_alone(monkeypatch):
    monkeypatch.setattr(train, "choose_device", lambda *_: torch.device("mps"))
    with pytest.raises(UserError, match="precision 'fp16' trains on CUDA alone: choose 'fp32' or 'bf16'"):
        train.resolve(train.Config(precision="fp16"))
    assert train.resolve(train.Config(precision="bf16"))[0].precision == "bf16"


def test_a_number_without_a_range_is_seen():
    assert undeclared(Settings, DECLARED) == []
    assert undeclared(Settings, {**DECLARED, "batch_size": whole(-LARGEST)}) == ["batch_size"]
    assert undeclared(Settings, {**DECLARED, "mults": number(0, 1, count=SEVERAL)}) == ["mults"]


@pytest.mark.parametrize(
    ("command", "choices"),
    [
        (
            "train",
            (SCHEDULES, PREDICTIONS, LOSSES, LOSS_WEIGHTINGS, OPTIMIZERS, DECAYS, SAMPLERS, DTYPES, RESIZE_MODES),
        ),
        ("train", (train.PRESETS,)),
        ("predict", (SAMPLERS, SPACINGS, DTYPES)),
        ("utils.evaluate.__main__", (SAMPLERS, SPACINGS, DTYPES, RESIZE_MODES)),
    ],
)
def test_help_lists_every_choice(command, choices, capsys):
    module = __import__(command, fromlist=["main"])
    with pytest.raises(SystemExit):
        module.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for table in choices:
        assert ", ".join(map(repr, filter(None, table))) in printed


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_each_default_of_the_scripts_can_be_typed(script):
    for field in fields(script.Config):
        typed = typed_options(script.Config, SCRIPTS[script], "", [f"--{field.name}={field.default}"])
        assert typed == {field.name: field.default}


@pytest.mark.parametrize(
    ("value", "setting", "words"),
    [
        (0, whole(1), "a whole number of at least 1"),
        ((8, 65), whole(1, 64, count=PAIR), "2 whole numbers from 1 to 64 with commas between them"),
        ((), whole(1, count=SEVERAL), "whole numbers of at least 1 with commas between them (a single one as 1,)"),
        (2.0, number(0, 1), "a number from 0 to 1"),
        (float("nan"), number(0), "a number of at least 0"),
        (float("inf"), number(0), "a number"),
        ("maybe", flag(choices=("auto",)), "True or False or 'auto'"),
        ("64", whole(1), "a whole number"),
        (2, text(), "text"),
        ("c", choice("ab"), "one of 'a', 'b'"),
        (True, choice((3, 1)), "one of 3, 1"),
        (2**53 + 1, whole(1), "a whole number"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_what_would(value, setting, words):
    with pytest.raises(UserError, match="^it is wrong: expected ") as error:
        fitted("it is wrong", value, setting)
    assert words in str(error.value)


def test_values_that_fit_keep_or_get_their_type():
    for value, setting, found in (
        (1, number(0, 1), 1.0),
        ([1, 2], whole(1, 9, count=PAIR), (1, 2)),
        (None, whole(1, 9, None), None),
        ("auto", number(0, 1, "auto"), "auto"),
        (True, flag(), True),
        (3, choice((3, 1)), 3),
    ):
        assert setting.fit(value) == found and type(setting.fit(value)) is type(found)
    assert whole(1, 9, None).fit(3) == 3 and whole(1, 9, None).fit("x") is MISFIT
    assert number(0, 1).fit(True) is MISFIT and whole(0, 1).fit(1.0) is MISFIT


PRESETS = {
    "": {},
    "fine": {"batch_size": 3},
    "list": {"mults": [1, 2]},
    "key": {"batchsize": 3},
    "range": {"shape": (1, 65)},
}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("key", r"PRESETS\['key'\]: batchsize is no setting \(did you mean batch_size\?\)"),
        ("range", r"PRESETS\['range'\]: shape is \(1, 65\): expected 2 whole numbers from -1 to 64"),
        ("list", r"PRESETS\['list'\]: mults is a list, \[1, 2\]: write it as a tuple, \(1, 2\)"),
        ("other", "preset 'other': expected one of '', 'fine', 'list', 'key', 'range'"),
    ],
)
def test_a_preset_that_cannot_be_is_refused_by_name(name, words):
    assert preset_values(PRESETS, "fine", DECLARED) == {"batch_size": 3}
    with pytest.raises(UserError, match=words):
        preset_values(PRESETS, name, DECLARED)


def limits(setting):
    """The values at the ends of what a setting may be."""
    numbers = [setting.lowest, setting.highest] if setting.kind in (int, float) else []
    numbers = [setting.kind(value) for value in numbers]
    if setting.count is not None:
        numbers = [(value,) * count for value in numbers for count in (setting.count[0], setting.count[-1]) if count]
    return [
        *numbers,
        *setting.choices,
        *([True, False] if setting.kind is bool else []),
        *(["a"] * (setting.kind is str)),
    ]


def test_what_train_accepts_every_reader_of_its_checkpoints_accepts(tmp_path, monkeypatch):
    """Each setting at each of its limits: typed, in a file that resume, start_from, predict,
    evaluate and convert open by `load_checkpoint`, and where the network of the file is built.
    """
    monkeypatch.chdir(tmp_path)
    count, tiny = 0, {"channel": 8, "channel_mults": (1,), "num_res_blocks": 1, "attention_resolutions": ()}
    tiny |= {"num_timesteps": 20, "num_groups": 1, "class_conditional": False, "schedule": "cosine"}
    large = {"channel", "channel_mults", "num_res_blocks", "num_groups", "num_timesteps", "input_shape", "resume"}
    built = {name for take in (UNet, make_betas, GaussianDiffusion) for name in inspect.signature(take).parameters}
    for name, setting in RUN_SETTINGS.items():
        for value in limits(setting):
            assert setting.fit(value) == value and type(setting.fit(value)) is type(value), name
            torch.save({"weights": {"a": torch.zeros(1)}, "config": {name: value}}, tmp_path / "file.pth")
            checkpoint = load_checkpoint(tmp_path / "file.pth")
            assert checkpoint.config[name] == value
            count += 1
            if name in large or name in ("preset", "start_from", "attention_resolutions", "class_conditional"):
                continue
            asked, *_ = train.read_settings([f"--{name}={value}"])
            assert getattr(asked, name) == value
            try:
                train.check(asked)
                if name not in built:
                    continue
                diffusion = build.from_config({**tiny, name: value})
            except SettingError as error:  # what does not fit together is refused before training, in one line
                known = ("schedule_shift", "schedule_low", "schedule_high", "lr_decay_type", "schedule", "condition")
                assert name in known, error
                continue
            weights = {"weights": diffusion.state_dict(), "config": {**tiny, name: value}}
            torch.save(weights, tmp_path / "file.pth")
            build.from_checkpoint(load_checkpoint(tmp_path / "file.pth"))
    assert count > 120


@pytest.mark.parametrize("values", [{"sampler": "euler"}, {"spacing": "karras"}, {"precision": "fp8"}])
def test_an_edited_block_of_predict_is_refused_before_any_work(monkeypatch, values):
    monkeypatch.setattr(predict, "Config", with_defaults(predict.Config, **values))
    with pytest.raises(ValueError, match=f"{next(iter(values))} = .*: expected one of .*(ddim|logsnr|bf16)"):
        predict.read_settings([])


KINDS = {
    "size": whole(1),
    "channel": whole(1),
    "prediction": text(),
    "shape": whole(1, 64, count=PAIR),
    "mults": whole(1, 64, count=SEVERAL),
    "rate": number(0, 10, "auto"),
    "name": text(),
    "flag": flag(),
    "kind": choice("ab"),
}


def edited(lines, missing=()):
    """What `defaults` makes of a dataclass with these lines, in a script that declares KINDS."""
    scope = {"settings": settings, "__name__": __name__}
    exec("@settings\nclass Edited:\n" + "".join(f"    {line}\n" for line in lines.splitlines()), scope)
    present = {*scope["Edited"].__annotations__, *missing}
    return defaults(scope["Edited"], {name: setting for name, setting in KINDS.items() if name in present})


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("shape: tuple[int, int] = [64, 48]", (64, 48)),
        ("mults: tuple[int, ...] = [1, 2]", (1, 2)),
        ("mults: tuple[int, ...] = 1", (1,)),
        ("rate: float = 1", 1.0),
        ("rate: float | str = 3", 3.0),
        ("rate: float | str = 'auto'", "auto"),
        ("name: str = ''", ""),
    ],
)
def test_an_edited_default_is_applied(line, value):
    found = edited(line)[line.split(":")[0]]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("size: int = 3\nchannel = 64", "channel in the settings of .* has no type: write channel: int = 64"),
        ("size: int = 3\nprediction = 'v'", "write prediction: str = 'v'"),
        ("size: int = 3\nchanel: int = 64", r"chanel in the settings of .* is no setting \(did you mean channel\?\)"),
        ("size: int = 3\nchanel = 64", r"is no setting \(did you mean channel\?\); --help"),
        ("size: int = 3", "channel is missing in the settings of .*: put its line back"),
        ("size: int = 3\n# channel: int = 64", "channel is missing in the settings of .*: put its line back"),
        ("size: int = 3\nCuda = True", "Cuda in the settings of .* is a name of the reference: here it is device"),
        ("size: int = 3\nEpoch: int = 300", "Epoch .*: here it is epochs; --help"),
        ("size: int = 3\nMin_lr = 1e-6", "here it is min_lr, the last learning rate itself"),
        ("channel: int = 1\nsize: int = 64.0", "size = 64.0 in the settings of .*: expected a whole number"),
        ("channel: int = 1\nsize: int = 1e3", "expected a whole number"),
        ("channel: int = 1\nsize: int = '32'", "size = '32' .*: expected a whole number"),
        ("channel: int = 1\nsize: int = 0", "size = 0 .*: expected a whole number of at least 1"),
        ("channel: int = 1\nshape: tuple[int, int] = [64, 64, 64]", "expected 2 whole numbers"),
        ("channel: int = 1\nname: str = 5", "expected text"),
        ("channel: int = 1\nflag: bool = 1", "expected True or False"),
        ("channel: int = 1\nkind: str = 'c'", "one of 'a', 'b'"),
        ("channel: int = 1\nsize: int = {3}", "expected a whole number"),
        ("channel: int = 1\nsize: int", "size = None .*: expected a whole number"),
    ],
)
def test_an_edited_default_is_refused_by_name(lines, words):
    with pytest.raises(UserError, match=words) as error:
        edited(lines, missing=("channel", *(["prediction"] if "prediction" in lines else [])))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(REFERENCE_NAMES))
def test_a_setting_of_the_reference_is_refused_with_ours(name):
    """What it names exists, in train.py or predict.py."""
    with pytest.raises(ValueError, match=f"--{name} is a name of the reference: here it is ") as error:
        typed_options(train.Config, RUN_SETTINGS, "", [f"--{name}", "1"])
    first = re.split(r"[:;, (]", str(error.value).split("here it is ")[1])[0]
    fields = {**train.Config.__dataclass_fields__, **predict.Config.__dataclass_fields__}
    assert (first in fields or first in ("nothing", "save_dir")) and name not in fields


def raising(error):
    def main():
        raise error

    return main


def ours(message):
    return lambda: fitted(f"--limit {message}", message, whole(0))


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
