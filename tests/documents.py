"""Reads the documents and finds what is wrong in them.

Each check takes a path and the text, so that a test can break the text on purpose, and returns the
faults as lines.
"""

import fnmatch
import importlib
import re
import shlex
import unittest.mock
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import fields
from functools import cache
from io import StringIO
from typing import NamedTuple

from conftest import PROJECT
from torch.distributed.run import get_args_parser

from nets.samplers import DEFAULT_STEPS
from utils import settings
from utils.data.downloads import DATASETS
from utils.training.settings_schema import RUN_SETTINGS

LATER_OPTION = "--signals-to-handle"  # of torchrun: PyTorch 2.6 lacks it, as the document says
ALL = [
    PROJECT / "README.md",
    *sorted((PROJECT / "docs").glob("*.md")),
    *sorted((PROJECT / "logs").glob("*.md")),
    PROJECT / "datasets/README.md",
    PROJECT / "results/README.md",
]
ENGLISH = [PROJECT / "README.md"] + [
    path for path in ALL if path.parent.name == "docs" and "zh-CN" not in path.name and path.name != "contributing.md"
]
SCRIPTS = ("train", "predict", "txt_annotation", "utils.evaluate")
# What the commands and the paths of a document may say for the reader's own.
PLACEHOLDER = re.compile(r"[A-Z]+(:\d+)?|.*<\w+>.*|epoch_XXXX.*|my_\w+")
# Paths that a run makes, or that stand for the reader's files. Each must still be in some document.
MADE = (
    *("logs/<*", "20*/", "*last.pth", "best.pth", "epoch_*.pth", "epoch_loss.csv", "epoch_loss.png", "speed.csv"),
    *("config.json", "tensorboard/", "report.html", "evaluate*_results.*", ".cache/", ".downloads/"),
    *("train_lines.txt", "results/*_out/*", "train_out/*", "predict_out/*", "predict_?x?_results.png"),
    *("datasets/cats/", "datasets/dogs/", "cats/*", "dogs/*"),
)


class Document(NamedTuple):
    """A Markdown text, taken apart line by line."""

    prose: str  # without code blocks
    blocks: list  # (language, text) of each code block; an indented one has the language ""


def take_apart(text):
    prose, blocks, fence, before = [], [], None, ""
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            if fence is None:
                blocks.append((line.strip("` "), []))
            fence = blocks[-1] if fence is None else None
        elif fence is not None:
            fence[1].append(line)
        elif line.startswith("    ") and (not before.strip() or before.startswith("    ")):
            if not before.strip():
                blocks.append(("", []))
            blocks[-1][1].append(line.strip())
        else:
            prose.append(line)
        before = line
    assert fence is None, "a code block does not end"
    return Document("\n".join(prose), [(language, "\n".join(lines)) for language, lines in blocks])


def without_math(prose):
    return re.sub(r"\$\$.*?\$\$|\$[^$]*\$", " ", prose, flags=re.S)


def code_spans(prose):
    """All that stands in code marks, a line break being a space."""
    return [
        " ".join(span.split())
        for paragraph in re.split(r"\n\s*\n", without_math(prose))
        for span in re.findall(r"`([^`]+)`", paragraph)
    ]


def without_code(prose):
    return "\n\n".join(re.sub(r"`[^`]+`", "`", part) for part in re.split(r"\n\s*\n", without_math(prose)))


# Links


def link_targets(text):
    prose = without_code(take_apart(text).prose)
    return re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'(?:src|href)="([^"]+)"', prose)


def anchors(text):
    """The names that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.*)$", take_apart(text).prose, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def faults_of_links(path, text):
    targets, faults = link_targets(text), []
    if len(targets) < without_code(take_apart(text).prose).count("]("):
        faults.append("a link that is not read")
    for target in targets:
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        to = (path.parent / name).resolve() if name else path
        if name and not to.exists():
            faults.append(f"{target} is not there")
        elif anchor and anchor not in anchors(text if to == path else to.read_text(encoding="utf-8")):
            faults.append(f"{target}: no such heading")
    return faults


# Commands

PROGRAM = re.compile(r"([A-Z_]+=\S+ )*(python|torchrun|pip|ruff|tensorboard) ")
OPTION = r"(?<![\w-])--[a-z]"
# Commands of others, as they stand.
OTHERS = {
    "python -m pytest",
    "ruff check .",
    "ruff format --check .",
    "pip config set global.index-url ADDRESS",
    "hf download google/ddpm-celebahq-256 --local-dir celebahq",
    "%cd ddpm",
    "tensorboard --logdir logs",
}


def commands(text):
    """Each command of the code blocks and the code marks, without comments and environment."""
    document = take_apart(text)
    blocks = [block for language, block in document.blocks if language not in ("python", "math")]
    lines = "\n".join(blocks).splitlines() + list(filter(PROGRAM.match, code_spans(document.prose)))
    found = []
    for line in lines:
        line = re.sub(r"^!|\b[A-Z_]+=\S+ |(^|\s)#.*", "", line)
        found += [shlex.split(part) for part in line.split("&&") if part.strip()]
    return found


def options_alone(text):
    """The words of code marks that begin with an option: `--epochs 8`, and `--epochs` alone."""
    return [shlex.split(span) for span in code_spans(take_apart(text).prose) if span.startswith("--")]


def import_target(target):
    """The module that `python train.py` or `python -m utils.evaluate` runs. ValueError: none."""
    path = PROJECT / target.replace(".", "/")
    if path.with_suffix(".py").is_file():
        return importlib.import_module(target)
    if (path / "__main__.py").is_file():
        return importlib.import_module(f"{target}.__main__")
    raise ValueError(f"no module {target}")


def options_of(module):
    """The names of a module's settings; none where it has no block of them."""
    return {field.name for field in fields(module.Config)} if hasattr(module, "Config") else set()


def read_options(target, words):
    """Has a script or module read the words of a command line. ValueError where it refuses them.

    The one place that knows how each of them is asked. Options with placeholders are left out.
    """
    module = import_target(target)
    if hasattr(module, "Config"):
        words = without_placeholders(words, options_of(module))
        with suppress(SystemExit), redirect_stdout(StringIO()):  # --help ends the program
            declared = getattr(module, "SETTINGS", RUN_SETTINGS)
            if target == "train":
                declared = declared | {"preset": settings.choice(module.PRESETS)}
            typed = settings.typed_options(module.Config, declared, "", words)
            if set(typed.get("names", "loss").split(",")) - set(getattr(module, "FIGURES", ("loss",))):
                raise ValueError(f"no figure {typed['names']}")
            if typed.get("download", "mnist") not in DATASETS:
                raise ValueError(f"no data set {typed['download']}")
    elif target == "utils.convert":
        nothing = dict.fromkeys(module.COMMANDS, lambda *_: None)
        with unittest.mock.patch.object(module, "COMMANDS", nothing):
            module.main(words or ["import", "FOLDER", "FILE"])
    elif len(words) > 1 or any(word.startswith("--") for word in words):
        raise ValueError("it takes a folder")


def without_placeholders(words, known):
    """The words without `--accumulate N` and the like, whose names must be known."""
    places = [place for place, word in enumerate(words[1:]) if PLACEHOLDER.fullmatch(word)]
    if unknown := [words[place] for place in places if words[place].removeprefix("--") not in known]:
        raise ValueError(f"unrecognized arguments: {unknown}")
    return [word for place, word in enumerate(words) if place not in places and place - 1 not in places]


@cache
def refusal(words):
    """Why a command would be refused; "" where it would not."""
    try:
        with redirect_stderr(StringIO()):
            check_command(*words)
    except (ValueError, SystemExit) as error:
        return f"{shlex.join(words)}: {error}"
    return ""


def check_command(program, *words):
    """ValueError, or the SystemExit of a parser, for what would be refused."""
    if " ".join((program, *words)) in OTHERS:
        return
    if program == "torchrun":
        words = words if any(word.endswith(".py") for word in words) else (*words, "train.py")
        parser = get_args_parser()
        if LATER_OPTION not in parser.format_help():
            parser.add_argument(LATER_OPTION)
        given = parser.parse_args(words)
        check_command("python", given.training_script, *given.training_script_args)
    elif program == "python" and words[0] == "-m":
        read_options(words[1], words[2:])
    elif program == "python" and words[0].endswith(".py"):
        read_options(words[0].removesuffix(".py"), words[1:])
    elif program == "pip" and words[0] == "install":
        check_packages(words[1:])
    else:
        raise ValueError("no known command")


def check_packages(words):
    for option, word in zip(("", *words), words):
        if option == "-r" and not (PROJECT / word).is_file():
            raise ValueError(f"no file {word}")
        if "-r" not in (option, word) and word not in sources():
            raise ValueError(f"the project knows no package {word}")


def faults_of_commands(path, text):
    """Also an option outside code marks, which nothing would check."""
    document, lines = take_apart(text), commands(text)
    faults = [refusal(tuple(words)) for words in lines]
    targets = [*SCRIPTS, *(words[2] for words in lines if words[:2] == ["python", "-m"] and "benchmarks" in words[2])]
    for name, *values in options_alone(text):
        if not values:
            known = any(name[2:] in {"help", *options_of(import_target(target))} for target in targets)
            faults.append("" if known else f"{name} is no option")
        else:  # one of the scripts takes them
            ways = [refusal(("python", "-m", target, name, *values)) for target in targets]
            faults.append("" if "" in ways else ways[0])
    read = sum(word.startswith("--") for words in (*lines, *options_alone(text)) for word in words)
    there = "\n".join([document.prose, *(block for language, block in document.blocks if language != "python")])
    faults.append("" if read == len(re.findall(OPTION, there)) else "an option outside code marks")
    return list(filter(None, faults))


# Paths and names in code marks


@cache
def files():
    """All files and folders of the project that documents speak of, relative to it."""
    emoji = PROJECT / "datasets/noto_emoji"
    found = [*PROJECT.glob("*"), emoji, *emoji.glob("*"), *PROJECT.glob("logs/emoji.*")]
    for top in ("nets", "utils", "tests", "benchmarks", "docs"):
        found += (PROJECT / top).rglob("*")
    return {path.relative_to(PROJECT).as_posix() for path in found if "__pycache__" not in path.parts}


@cache
def sources():
    """The text of all code and requirements."""
    texts = [name for name in files() if name.endswith((".py", ".toml", "requirements.txt"))]
    own = [name for name in texts if not name.endswith(("documents.py", "test_docs.py"))]
    return "\n".join((PROJECT / name).read_text(encoding="utf-8") for name in own)


@cache
def words_of_sources():
    return set(re.findall(r"\w+", sources()))


def own_spans(path, text):
    """The code marks but those of the other project: the first column of reference.md's tables."""
    prose = take_apart(text).prose
    if path.name.startswith("reference."):
        prose = re.sub(r"^\|[^|]*\|", "|", prose, flags=re.M)
    return code_spans(prose)


PATH_ENDING = re.compile(r"\w\.(py|md|txt|csv|json|png|pth|toml|html)$|/$")


def is_path(span):
    return re.fullmatch(r"[\w.<>?*/-]+", span) and ("/" in span.strip("/") or PATH_ENDING.search(span))


def faults_of_paths(path, text):
    faults = []
    for span in filter(is_path, own_spans(path, text)):
        there = (path.parent / span).exists() or fnmatch.filter(files(), span.strip("/"))
        if "/" not in span.strip("/"):  # the folder is clear from the text
            there = there or fnmatch.filter(files(), f"*/{span.strip('/')}")
        if not there and not any(fnmatch.fnmatch(span, pattern) for pattern in MADE):
            faults.append(f"{span} is not there")
    return faults


def is_name(span):
    """Whether it looks like a name of the code: `batch_size`, `UNet`, `nets.samplers.timesteps`."""
    name = re.fullmatch(r"[A-Za-z_]\w+(\.[a-z_]\w+)*(\(\))?", span)
    return name and ("_" in span or span != span.lower()) and not PLACEHOLDER.fullmatch(span)


def faults_of_names(path, text):
    """Names that no code has; in "`NAME` in `FILE`" those that it has not."""
    faults = []
    for span in filter(is_name, own_spans(path, text)):
        if span.removesuffix("()").rpartition(".")[2] not in words_of_sources():
            faults.append(f"{span}: nothing has this name")
    for name, file in re.findall(r"`(\w+)`\s+in\s+`([\w/]+\.py)`", take_apart(text).prose):
        if file in files() and not re.search(rf"\b{name}\b", (PROJECT / file).read_text(encoding="utf-8")):
            faults.append(f"{file} has no {name}")
    return faults


# Numbers


def default_cells(text):
    """(names, cell of the default) of each row of the tables of settings."""
    found, inside = [], False
    for line in take_apart(text).prose.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif cells[:2] in (["setting", "default"], ["设置", "默认值"]):
            inside = True
        elif inside and not cells[0].startswith("---"):
            found.append((re.findall(r"`(\w+)`", cells[0]), "predict" if "predict.py" in cells[0] else "", cells[1]))
    return found


def faults_of_defaults(path, text):
    """The tables of settings show the defaults that the scripts have."""
    faults = []
    for names, script, cell in default_cells(text):
        script = script or ("predict" if path.name.startswith("sampling") else "train")
        defaults = defaults_of(script)
        shown = [part.strip() for part in re.sub(r"[(（].*", "", cell).split("·")]
        shown = shown * len(names) if len(shown) == 1 else shown
        if len(shown) != len(names):
            faults.append(f"{names}: {cell}")
        for name, value in zip(names, shown):
            if name not in defaults or not shows(value, defaults[name]):
                faults.append(f"{name}: {value!r} is not its default {defaults.get(name)!r}")
    return faults


def defaults_of(script):
    """The defaults of a script's settings. predict.py's steps are 0 for what suits the solver."""
    known = {field.name: field.default for field in fields(import_target(script).Config)}
    return {**known, "steps": DEFAULT_STEPS} if script == "predict" else known


def shows(value, default):
    """Whether a cell says this default, in figures or in words."""
    if isinstance(default, tuple) and default:
        return value.strip(",") == ",".join(map(str, default))
    if isinstance(default, bool) or isinstance(default, str) and default:
        return value == str(default)
    if isinstance(default, (int, float)):
        return value in (str(default), f"{default:g}")
    return not re.search(r"\d", value)  # none: said in words


def numbers(text):
    """The numbers of the prose that are 10 and more or have a point, as values."""
    prose = re.sub(r"\]\([^)]*\)", "]", without_code(take_apart(text).prose))
    unit = {"": 1, "million": 10**6, "百万": 10**6, "万": 10**4, "亿": 10**8}
    found = re.findall(r"(?<![\w.])(\d[\d,]*(?:\.\d+)?)(?:\s*(million|百万|万|亿))?", prose)
    values = [round(float(number.replace(",", "")) * unit[word], 6) for number, word in found]
    return Counter(value for value in values if value >= 10 or value != int(value))


def faults_of_facts(path, text):
    """Numbers that the repository itself knows."""
    emoji = {folder.name: len(list(folder.glob("*.png"))) for folder in (PROJECT / "datasets/noto_emoji").iterdir()}
    megabytes = (PROJECT / "logs/emoji.pth").stat().st_size / 1e6
    prose, faults = without_math(take_apart(text).prose), []
    for pattern, value in (
        (r"(\d[\d,]*) (?:Noto Emoji|emoji\b|个表情)", sum(emoji.values())),
        (r"(\d[\d,]*) (?:flags|面旗帜)", emoji["flags"]),
        (r"half precision: ([\d.]+) MB", megabytes),
        (r"(?:to|到) (\d{7,})", 2**32 - 1),
    ):
        for match in re.finditer(pattern, prose):
            if abs(float(match[1].replace(",", "")) - value) > 0.05:
                faults.append(f"{match[0]}: {value}")
    return faults


@cache
def measured_values():
    text = "\n".join(path.read_text(encoding="utf-8") for path in (PROJECT / "benchmarks/results").glob("*.md"))
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?:\.\d+)?(?:e\+\d+)?", text)]


def faults_of_measured(path, text):
    """The tables of benchmarks.md show, rounded, what benchmarks/results has."""
    faults = []
    for line in take_apart(text).prose.splitlines() if path.name.startswith("benchmarks.") else ():
        for number in re.findall(r"(?<![\w.])\d[\d,]*\.\d+|(?<![\w.])\d+,\d[\d,]*", line) if line[:1] == "|" else ():
            value, decimals = float(number.replace(",", "")), len(number.partition(".")[2])
            if not any(abs(known - value) <= 0.5001 * 10.0**-decimals for known in measured_values()):
                faults.append(f"{number} is in no file of benchmarks/results")
    return faults


CHECKS = {
    "links": faults_of_links,
    "commands": faults_of_commands,
    "paths": faults_of_paths,
    "names": faults_of_names,
    "defaults": faults_of_defaults,
    "facts": faults_of_facts,
    "measured": faults_of_measured,
}


# The two languages


def other_language(path):
    return PROJECT / "docs" / f"{path.stem}.zh-CN.md"


def resolved(path, text):
    """The targets of the links, a page in one language being the page in the other."""
    targets = [target for target in link_targets(text) if not target.startswith("#")]
    pages = [target if "://" in target else (path.parent / target.partition("#")[0]).resolve() for target in targets]
    readme = {PROJECT / "docs/README.md": PROJECT / "README.md"}
    pages = [page if isinstance(page, str) else page.with_name(page.name.replace(".zh-CN", "")) for page in pages]
    return Counter(str(readme.get(page, page)) for page in pages)


def shape(text):
    """What both languages have alike, each as a Counter."""
    document = take_apart(text)
    blocks = [re.sub(r"\s+# .*", "", block) for _, block in document.blocks]
    levels = re.findall(r"^#+ ", document.prose, flags=re.M)
    cells = [line.count("|") for line in document.prose.splitlines() if line.startswith("|")]
    return {
        "code": Counter(blocks),
        "headings": Counter({level: levels.count(level) for level in levels}),
        "rows of tables": Counter({f"{number} of {count}": 1 for number, count in enumerate(cells)}),
        "code marks": Counter(set(code_spans(document.prose))),
        "numbers": numbers(text),
    }


def faults_of_translation(path, text, other_text=None):
    """What the two pages do not share. path: the English one."""
    other = other_language(path)
    other_text = other.read_text(encoding="utf-8") if other_text is None else other_text
    one, two = shape(text), shape(other_text)
    one["links"], two["links"] = resolved(path, text), resolved(other, other_text)
    return [
        f"{what}, only in {where}: {list(left)}"
        for what in one
        for where, left in (("English", one[what] - two[what]), ("Chinese", two[what] - one[what]))
        if left
    ]
