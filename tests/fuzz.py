"""Thousands of broken inputs against all commands: `PYTHONPATH=. python tests/fuzz.py [KIND ...]
[--share 0.1] [--seed 0]`.

Each case has a folder of its own. It fails by a traceback, an error of more than one line or with
raw control characters, more than 20 s of CPU time or a minute without an end, more than 2.5 GB, a
file outside its folder, a change of what is named "mine", or values that are not those of the file.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from conftest import ONE_SAMPLE, PROJECT, TINY, write_pictures
from PIL import Image

import predict
import train
import txt_annotation
from utils import report
from utils.checkpoint.file import load_checkpoint
from utils.convert import __main__ as convert
from utils.errors import run_script
from utils.evaluate import __main__ as evaluate
from utils.settings import choice
from utils.terminal import printable
from utils.training.settings_schema import RUN_SETTINGS

SECONDS, MEMORY, ADDRESS_SPACE = 20, 2.5 * 2**30, 6 * 2**30
CASES_A_WORKER = 50
COUNTS = {
    "pictures": 2000,
    "lists": 200,
    "options_txt_annotation": 500,
    "options_train": 500,
    "options_predict": 500,
    "checkpoints": 300,
    "folders": 60,
    "npz": 60,
    "flips": 200,
    "links": 200,
    "foreign": 100,
    "tables": 200,
    "configs": 200,
    "directories": 200,
    "kills": 60,
}
PICTURES_A_CASE = 20  # one run of txt_annotation.py looks at so many
RUN = [*TINY, "--num_groups", "32", "--precision", "fp32", "--class_conditional", "True"]
NASTY = (
    "",
    "--",
    "-1",
    "0",
    "1",
    "1e400",
    "nan",
    "-inf",
    "9" * 400,
    "None",
    "True",
    "[]",
    "{}",
    "()",
    "1,",
    "1,2",
    "1,2,3,4",
    "'",
    '"',
    "\\",
    "\x1b[31mred",
    "猫",
    "\udce9",
    ".",
    "..",
    "a/b",
    "x" * 300,
    "meta",
    "xla",
    "hpu",
    "cuda:99",
    "cpu",
    "latest",
    str(10**9),
    str(2**63),
    "-0.5",
    "0.5",
    "3",
    "a;b",
    "%s%n",
    "train_lines.txt",
    "datasets",
)
NUMBERS = (
    "-1",
    "0",
    "1",
    "3",
    "7",
    "1e400",
    "nan",
    "-inf",
    "9" * 400,
    str(10**9),
    str(2**63),
    "-0.5",
    "0.5",
    "1e-300",
    "1,2",
    "0,",
    "8,8",
)
WRONG = (
    None,
    -1,
    10**9,
    "x",
    [],
    {},
    float("nan"),
    10**400,
    True,
    (1,) * 40,
    0.5,
    b"x",
    "\x1b[2J",
    torch.zeros(2, 3),
    2**70,
)


class TooLong(BaseException):
    """A case that takes more than its seconds."""


# The cases: each prepares its folder (the current one) and returns the commands to run in it


def pictures(draw, base):
    Path("datasets").mkdir()
    originals = sorted((base / "pictures").iterdir())
    for number in range(PICTURES_A_CASE):
        original = draw.choice(originals)
        Path("datasets", f"{number:02d}{original.suffix}").write_bytes(mutated(draw, original.read_bytes()))
    listing = ["--verify", draw.choice(["True", "False"])]
    reading = [
        *TINY,
        "--dry_run",
        "True",
        "--resize_mode",
        draw.choice(["crop", "stretch", "pad"]),
        "--batch_size",
        "1",
    ]
    return [(txt_annotation, listing), (train, reading)]


def lists(draw, base):
    shutil.copytree(base / "workplace" / "datasets", "datasets")
    paths = sorted(str(path.resolve()) for path in Path("datasets").rglob("*.png"))
    lines = [f"{draw.randrange(2)};{path}" for path in paths]
    for _ in range(draw.randrange(1, 4)):
        place = draw.randrange(len(lines))
        lines[place] = draw.choice(
            [
                "",
                "x" * 10_000,
                "\0",
                f'"{paths[0]}"',
                "relative.png",
                f"999999999999;{paths[0]}",
                paths[0],
                f"-1;{paths[0]}",
                "1;",
                ";",
                f" {lines[place]}",
                f"1;{base}",
                f"{lines[place]}\r",
                "\x1b[31m",
                "1;" + "/".join("a" * 3000),
                f"{10**400};{paths[0]}",
            ]
        )
    text = "\n".join(lines)
    content = draw.choice(
        [lambda: text.encode(), lambda: text.encode("utf-16"), lambda: mutated(draw, text.encode())]
    )()
    Path("train_lines.txt").write_bytes(content)
    if draw.random() < 0.8:
        Path("train_classes.txt").write_bytes(draw.choice([b"even\nodd\n", b"", b"one\n", b"\xff\xfe\n\n", b"a\na\n"]))
    return [(train, [*TINY, "--dry_run", "True", "--class_conditional", draw.choice(["True", "False"])])]


def options(module, declared, common):
    def prepare(draw, base):
        shutil.copytree(base / "workplace", ".", dirs_exist_ok=True)
        names = [draw.choice(sorted(declared)) for _ in range(draw.choice([1, 1, 2, 3]))]
        pairs = {name: draw.choice(nasty(draw, declared[name])) for name in names}
        pairs.pop("download", None)  # it would ask the network
        if pairs.get("num_images") == str(10**9):  # legitimate, and endless
            del pairs["num_images"]
        typed = [word for name, value in pairs.items() for word in (f"--{name}", value)]
        if draw.random() < 0.3:
            typed = [f"--{name}={value}" for name, value in pairs.items()]
        known = [word for name, value in common.items() if name not in pairs for word in (f"--{name}", value)]
        return [(module, [*known, *typed])]

    return prepare


def nasty(draw, setting):
    """Values to type for a setting: mostly such as its declaration lets through."""
    if draw.random() < 0.3:
        return NASTY
    choices = tuple(map(str, setting.choices))
    return (*choices, *NUMBERS) if setting.kind in (int, float) else ("True", "False", *choices, *NASTY)


def as_pairs(words):
    return {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2])}


def checkpoints(draw, base):
    path = next(Path(base, "workplace", "logs").glob("*/last.pth"))
    content = path.read_bytes()
    if draw.random() < 0.3:
        Path("last.pth").write_bytes(mutated(draw, content))
    else:
        state = torch.load(io.BytesIO(content), weights_only=True)
        for _ in range(draw.randrange(1, 3)):
            state = with_one_changed(draw, state)
        torch.save(state, "last.pth")
    shutil.copytree(base / "workplace" / "datasets", "datasets")
    shutil.copy(base / "workplace" / "train_classes.txt", ".")
    shutil.copy(base / "workplace" / "train_lines.txt", ".")
    commands = [
        (predict, ["--model_path", "last.pth", *ONE_SAMPLE]),
        (train, ["--resume", "last.pth", "--dry_run", "True"]),
        (train, ["--resume", "last.pth", "--epochs", "2", "--preview_period", "0"]),
        (convert, ["weights", "last.pth", "small.pth"]),
        (convert, ["reference", "last.pth", "bare.pth"]),
    ]
    return [draw.choice(commands)]


def folders(draw, base):
    shutil.copytree(base / "folder", "folder")
    for _ in range(draw.randrange(1, 3)):
        path = draw.choice([path for path in sorted(Path("folder").rglob("*")) if path.is_file()])
        way = draw.random()
        if path.suffix == ".json" and way < 0.7:
            try:
                values = json.loads(path.read_text())
            except ValueError:
                continue
            values[draw.choice(sorted(values))] = draw.choice(
                [None, -1, 10**9, "x", [], {}, 0.5, True, [1] * 40, 10**30]
            )
            path.write_text(json.dumps(values))
        elif way < 0.9:
            path.write_bytes(mutated(draw, path.read_bytes()))
        else:
            path.unlink()
    return [(convert, ["import", "folder", "back.pth"])]


def npz(draw, base):
    shape = draw.choice(
        [(6, 8, 8, 3), (6, 8, 8, 1), (0, 8, 8, 3), (6, 8, 8), (6, 8, 8, 4), (1, 1, 1, 3), (6, 300, 2, 3)]
    )
    kind = draw.choice([np.uint8, np.uint8, np.uint8, np.float32, np.int64, object])
    array = np.zeros(shape, kind)
    content = io.BytesIO()
    draw.choice([np.savez, np.savez_compressed])(
        content, **{draw.choice(["arr_0", "arr_0", "images"]): np.asfortranarray(array)}
    )
    content = content.getvalue()
    Path("samples.npz").write_bytes(mutated(draw, content) if draw.random() < 0.6 else content)
    shutil.copytree(base / "workplace" / "datasets", "datasets")
    shutil.copy(base / "workplace" / "train_classes.txt", ".")
    shutil.copy(base / "workplace" / "train_lines.txt", ".")
    return [(evaluate, ["--samples", "samples.npz", "--distances", "False", "--nearest_images", "3"])]


def flips(draw, base):
    """One bit of a checkpoint; the values that are read are compared instead of a command's end."""
    path = next(Path(base, "workplace", "logs").glob("*/last.pth"))
    content = bytearray(path.read_bytes())
    bit = draw.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    Path("last.pth").write_bytes(bytes(content))

    def main(_):
        read, written = (vars(load_checkpoint(name)) | {"path": None} for name in ("last.pth", path))
        assert same(read, written), f"bit {bit} changes what is read"

    return [(argparse.Namespace(main=main), [])]


def any_command(draw):
    """One that reads or writes a run, its outputs or its caches."""
    return draw.choice(
        [
            (txt_annotation, []),
            (train, [*RUN, "--resume", "latest", "--epochs", "2", "--preview_period", "1", "--preview_steps", "1"]),
            (predict, [*ONE_SAMPLE, "--individual_files", "True", "--npz", "True", "--trajectory", "True"]),
            (evaluate, ["--num_images", "4", "--steps", "1", "--distances", "False", "--nearest_images", "2"]),
            (report, []),
            (convert, ["weights", str(next(Path("logs").glob("*"))), "small.pth"]),
        ]
    )


def with_run(prepare):
    """A copy of the tiny run in which `prepare(draw, run)` changes something; any two commands."""

    def prepare_case(draw, base):
        shutil.copytree(base / "workplace", ".", dirs_exist_ok=True)
        prepare(draw, next(Path("logs").glob("*")))
        return [any_command(draw), any_command(draw)]

    return prepare_case


def links(draw, run):
    """Links, and pipes, in place of names that the project writes."""
    mine = Path("..", "mine")
    (mine / "mine_too").mkdir(parents=True)
    (mine / "mine.txt").write_text("mine")
    names = [run / name for name in ("config.json", ".lock", "epoch_loss.csv", "speed.csv", "epoch_loss.png")]
    names += [run / name for name in ("last.pth", "epoch_0002.pth", "report.html", "tensorboard")]
    names += [Path("results/train_out", run.name), *Path("datasets/.cache").iterdir(), Path("train_classes.txt")]
    names += [Path("results/evaluate_out", f"evaluate_{name}") for name in ("results.json", "nearest_results.png")]
    names += [Path("results/predict_out", f"predict_{name}") for name in ("1x1_results.png", "results.npz")]
    names += [Path("results/predict_out", name) for name in ("seed_0000000001.png", "predict_trajectory_results.gif")]
    for path in draw.sample(names, draw.choice([1, 1, 2, 5])):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        target = draw.choice(["mine.txt", "mine_too", "missing", "", None])
        os.mkfifo(path) if target is None else path.symlink_to((mine / target).resolve())


def foreign(draw, run):
    """Old files of others beside ours, named nearly as ours are."""
    key, word = "0123456789abcdef01234567", draw.choice(["mine", ".mine"])
    names = [f"{word}.json", f"{word}{key}.pixels", f"{key}.mine", f".{key}.json.mine.tmp", f".mine.{key}.tmp"]
    names += [f"{word}.features.pth", f"epoch_{word}.pth", f"seed_{word}.png", f".{word}.{key[:8]}", f"{word}.tmp"]
    for folder in ("datasets/.cache", "results/evaluate_out", "results/predict_out", run):
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name in (f"{letter}{name}" for name in names for letter in ("", "a", "b")):
            Path(folder, name).write_text("{}")
            os.utime(Path(folder, name), (1e9, 1e9))


def tables(draw, run):
    path = run / draw.choice(["epoch_loss.csv", "speed.csv"])
    rows = [line.split(",") for line in path.read_text().splitlines()]
    for _ in range(draw.choice([1, 2, 5])):
        row = draw.choice(rows)
        row[draw.randrange(len(row))] = draw.choice([*NUMBERS, *NASTY, "1,5", '"', "\n", "\0", "epoch"])
    text = "\n".join(map(",".join, rows)).encode(errors="surrogateescape")
    path.write_bytes(text if draw.random() < 0.7 else mutated(draw, text))


def configs(draw, run):
    path = run / "config.json"
    values = json.loads(path.read_text())
    for _ in range(draw.choice([1, 2, 5, 20])):
        odd = [None, -1, 10**9, "x", [], {}, 0.5, True, [1] * 40, 10**30, "\x1b[2J", float("nan")]
        values[draw.choice([*values, "other", ""])] = draw.choice(odd)
    text = json.dumps(values).encode()
    path.write_bytes(text if draw.random() < 0.7 else mutated(draw, text))


def directories(draw, run):
    """Checkpoints whose list of parts, at the end of a zip file, is damaged."""
    for path in run.glob("*.pth"):
        content = path.read_bytes()
        place = content.index(b"PK\1\2")
        path.write_bytes(content[:place] + mutated(draw, content[place:]))


KINDS = {
    "pictures": pictures,
    "lists": lists,
    "options_txt_annotation": options(txt_annotation, txt_annotation.SETTINGS, {}),
    "options_train": options(
        train, {**RUN_SETTINGS, "preset": choice(train.PRESETS)}, {**as_pairs(TINY), "dry_run": "True"}
    ),
    "options_predict": options(predict, predict.SETTINGS, as_pairs(ONE_SAMPLE)),
    "checkpoints": checkpoints,
    "folders": folders,
    "npz": npz,
    "flips": flips,
    **{prepare.__name__: with_run(prepare) for prepare in (links, foreign, tables, configs, directories)},
}


def mutated(draw, content):
    """The bytes with a few changed, cut off, doubled or put in."""
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 5, 20])):
        place = draw.randrange(len(content) + 1)
        way = draw.randrange(6)
        if way == 0:
            del content[place:]
        elif way == 1:
            content[place:place] = draw.randbytes(draw.randrange(1, 50))
        elif way == 2:
            content[place:place] = content[place : place + draw.randrange(1, 200)]
        elif way == 3:
            del content[place : place + draw.randrange(1, 50)]
        elif content and place < len(content):
            content[place] = draw.choice([0, 255, 127, 128, draw.randrange(256)])
    return bytes(content)


def with_one_changed(draw, values):
    """A copy of nested dicts with one value replaced, taken out or put in."""
    copy = dict(values)
    if not copy:
        return {"x": 1}
    name = draw.choice(sorted(copy, key=str))
    if isinstance(copy[name], dict) and draw.random() < 0.8:
        copy[name] = with_one_changed(draw, copy[name])
    elif draw.random() < 0.1:
        del copy[name]
    else:
        copy[name] = draw.choice(WRONG)
    return copy


def same(one, other):
    """Whether two nested values are equal, tensors bit for bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if torch.is_tensor(one) else one == other


# A worker runs many cases in one process


def work(kind, numbers, seed, base, results):
    """Runs the cases and writes a line of JSON for each, before and after."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    for number in numbers:
        print(json.dumps({"case": number}), file=results, flush=True)
        failure, refused = run_case(
            KINDS[kind], random.Random(f"{kind} {seed} {number}"), base, base / f"{kind}_{number}"
        )
        print(json.dumps({"case": number, "failure": failure, "refused": refused}), file=results, flush=True)


def forked(function, *arguments):
    """(lines that function(*arguments, file) writes in a child process, how the child ended)."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        with contextlib.suppress(BaseException), os.fdopen(writer, "w") as file:
            function(*arguments, file)
            code = 0
        os._exit(code)
    os.close(writer)
    lines = [b""]
    with contextlib.suppress(TimeoutError):
        while chunk := read_within(reader, 3 * SECONDS):
            lines.append(chunk)
    os.close(reader)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)  # ended already, unless a case hangs where no alarm is heard
    return b"".join(lines).decode().splitlines(), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def read_within(descriptor, seconds):
    if not select.select([descriptor], [], [], seconds)[0]:
        raise TimeoutError
    return os.read(descriptor, 2**16)


def run_case(prepare, draw, base, folder):
    """(what is wrong or None, whether the last command was refused)."""
    work = folder / "outer" / "work"
    work.mkdir(parents=True)
    os.chdir(work)
    refused = False
    try:
        commands = prepare(draw, base)
        before = listing(base, folder)
        for module, arguments in commands:
            failure, refused = run_command(module, arguments)
            if failure is None and listing(base, folder) != before:
                failure = "it writes elsewhere"
            if failure:
                return f"{getattr(module, '__name__', 'file')} {arguments}: {failure}"[:2000], refused
        return None, refused
    finally:
        os.chdir(base)
        shutil.rmtree(folder, ignore_errors=True)


def run_command(module, arguments):
    """(what is wrong or None, whether it was refused)."""
    out, err, before = io.StringIO(), io.StringIO(), peak_memory()
    signal.signal(signal.SIGPROF, stop_case)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # CPU time: what else the machine does plays no part
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_script(lambda: module.main(arguments))
    except SystemExit as end:
        code = end.code
    except TooLong:
        return f"more than {SECONDS} s", False
    except BaseException as error:  # noqa: BLE001 (a traceback is what is looked for)
        return f"{type(error).__name__}: {error} at {where(error)}", False
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    lines = [line for line in err.getvalue().split("\n") if line.startswith("error: ")]
    if code not in (0, 1) or len(lines) != code:
        return f"exit code {code} with the errors {lines}", code == 1
    if any(line != printable(line) for line in lines + out.getvalue().split("\n")):
        return f"control characters: {lines} {out.getvalue()[-300:]!r}", code == 1
    peak = peak_memory()
    return (f"{peak / 2**30:.1f} GB of memory" if peak > max(before, MEMORY) else None), code == 1


def peak_memory():
    """The most bytes that this process has held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def stop_case(*_):
    raise TooLong


def where(error):
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    return f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"


def listing(base, folder):
    """What lies beside the case's folder and in the project, and what in the folder is "mine"."""
    found = {
        path.name
        for path in base.iterdir()
        if path != folder and not path.name.startswith(("run_", folder.name.rsplit("_", 1)[0]))
    }
    return (
        found,
        frozenset(path.name for path in PROJECT.iterdir()),
        frozenset(path.name for path in (PROJECT / "datasets").iterdir()),
        {path: path.is_file() and path.read_bytes() for path in folder.rglob("*") if "mine" in str(path)},
    )


# The parent


def run_kind(kind, count, seed, base):
    """(cases, refused, [failures]) of one kind, in processes of some fifty cases each."""
    refused, failures, number = 0, [], 0
    while number < count:
        numbers = range(number, min(count, number + CASES_A_WORKER))
        written, code = forked(work, kind, numbers, seed, base)
        lines = [json.loads(line) for line in written]
        ended = [line for line in lines if "failure" in line]
        refused += sum(line["refused"] for line in ended)
        failures += [f"case {line['case']}: {line['failure']}" for line in ended if line["failure"]]
        number += len(ended)
        if len(ended) < len(numbers):
            failures.append(f"case {number}: its process ended with {code}")
            number += 1
    return count, refused, failures


def run_kills(_, count, seed, base):
    """Kills commands at random moments.

    The next run of each must end well and leave nothing half behind.
    """
    draw, failures = random.Random(seed), []
    folder = base / "run_kills"
    shutil.copytree(base / "workplace", folder)
    commands = [
        ["txt_annotation.py"],
        ["train.py", *TINY, "--epochs", "2", "--save_minutes", "0", "--resume", "latest"],
        ["predict.py", *ONE_SAMPLE, "--npz", "True"],
        ["-m", "utils.convert", "weights", str(base / "workplace" / "logs"), "small.pth"],
        ["-m", "utils.evaluate", "--samples", "datasets", "--distances", "False"],
        ["-m", "utils.report"],
    ]
    run = str(next(Path(base, "workplace", "logs").glob("*")))
    for number in range(count):
        words = [run if word.endswith("logs") else word for word in draw.choice(commands)]
        words = words if words[0] == "-m" else [str(PROJECT / words[0]), *words[1:]]
        for path in folder.glob("small.pth"):
            path.unlink()
        environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
        options = {
            "cwd": folder,
            "env": environment,
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.PIPE,
            "text": True,
        }
        process = subprocess.Popen([sys.executable, *words], **options)
        time.sleep(draw.uniform(0.5, 6))
        process.kill()
        process.communicate()
        again = subprocess.run([sys.executable, *words], **options, timeout=120)
        left = [path.name for path in folder.rglob(".*.tmp")]
        if again.returncode not in (0, 1) or "Traceback" in again.stderr or left:
            failures.append(
                f"case {number}: {words[:3]} after a kill: code {again.returncode}, "
                f"{again.stderr[-300:]!r}, left {left}"
            )
        if again.returncode == 1 and "is there already" not in again.stderr:
            failures.append(f"case {number}: {words[:3]} after a kill: {again.stderr[-300:]!r}")
    return count, 0, failures


def make_fixtures(base):
    """What the cases start from: pictures of many kinds, a tiny run, and a folder of diffusers."""
    workplace = base / "workplace"
    write_pictures(workplace / "datasets", count=8)
    os.chdir(workplace)
    run_command(txt_annotation, [])
    ended = run_command(train, [*RUN, "--epochs", "1"])
    assert ended == (None, False), ended
    run = str(next(Path("logs").glob("*")))
    with contextlib.suppress(ImportError):
        assert run_command(convert, ["diffusers", run, str(base / "folder")]) == (None, False)
    folder = base / "pictures"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F", "I"):
        for kind in ("png", "jpg", "gif", "tif", "bmp", "webp", "ppm"):
            image = Image.fromarray(pixels).convert("L" if mode == "I;16" else mode)
            with contextlib.suppress(OSError, ValueError, KeyError):
                image.save(folder / f"{mode.replace(';', '_')}.{kind}")
    for path in folder.iterdir():  # a format that cannot hold a mode leaves an empty file
        if path.stat().st_size == 0:
            path.unlink()
    os.chdir(base)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(COUNTS)}; none: all")
    parser.add_argument("--share", type=float, default=1.0, help="of the full counts")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder).resolve()
        make_fixtures(base)
        for kind in arguments.kinds or COUNTS:
            cases = max(1, round(COUNTS[kind] * arguments.share / (PICTURES_A_CASE if kind == "pictures" else 1)))
            count, refused, failures = (run_kills if kind == "kills" else run_kind)(kind, cases, arguments.seed, base)
            note = f" of {PICTURES_A_CASE} pictures each" if kind == "pictures" else ""
            print(f"{kind}: {count} cases{note}, {refused} refused in a line, {len(failures)} failures", flush=True)
            for failure in failures:
                print(f"  {failure}", flush=True)
            failed |= bool(failures)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    torch.set_num_threads(1)  # a process with threads cannot be forked
    main()
