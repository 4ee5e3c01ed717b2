"""Reads the documents, says what is wrong in them, and where two languages differ.

Each check takes a Page and returns its faults as lines with the file and the line.
"""

import fnmatch
import importlib
import re
import shlex
import unittest.mock
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import fields
from decimal import Decimal
from functools import cache
from io import StringIO
from itertools import zip_longest
from pathlib import Path

from conftest import PROJECT
from torch.distributed.run import get_args_parser

from nets.samplers import DEFAULT_STEPS
from utils import settings
from utils.training.settings_schema import RUN_SETTINGS

ALL = [
    PROJECT / "README.md",
    *sorted((PROJECT / "docs").glob("*.md")),
    *sorted((PROJECT / "logs").glob("*.md")),
    PROJECT / "datasets/README.md",
    PROJECT / "results/README.md",
    PROJECT / "benchmarks/NOTES.md",
]
RESULTS = sorted((PROJECT / "benchmarks/results").glob("*.md"))  # pages that the benchmarks write
TRANSLATED = {  # English page: Chinese page
    path.with_name(path.name.replace(".zh-CN", "")) if path.stem != "README.zh-CN" else PROJECT / "README.md": path
    for path in ALL
    if path.stem.endswith(".zh-CN")
}
LATER_OPTION = "--signals-to-handle"  # of torchrun: PyTorch 2.6 lacks it, as the document says
# What commands and paths say for the reader's own.
PLACEHOLDER = re.compile(r"[A-Z]+(:\d+)?|.*<\w+>.*|epoch_XXXX.*|my_\w+")


class Page:
    """A document. Its parts keep their place, so that a fault can name the line."""

    def __init__(self, path: Path, text: str | None = None) -> None:
        self.path, self.name = path, path.relative_to(PROJECT).as_posix()
        self.text = path.read_text(encoding="utf-8") if text is None else text
        self.blocks, prose = take_apart(self.text)  # [(line, language, text)]; the rest, line by line
        self.prose = blank(r"\$`[^`]+`\$", prose)  # without formulas
        # `[^`]+` over the end of a paragraph would begin at a code mark's end.
        self.spans = self.find(r"`((?:[^`\n]|\n(?!\n))+)`", self.prose)  # [(line, text)] of the code marks
        self.plain = blank(r"`(?:[^`\n]|\n(?!\n))+`", self.prose)  # without code

    def find(self, pattern, text):
        """[(line, what the pattern's group is, a line break being a space)]."""
        places = re.finditer(pattern, text, flags=re.M)
        return [(text.count("\n", 0, match.start()) + 1, " ".join(match[1].split())) for match in places]

    def links(self):
        return self.find(r'(?:\]\(|(?:src|href)=")([^)\s"]+)', self.plain)

    def headings(self):
        return self.find(r"^(#+ .*)$", self.prose)

    def tables(self):
        return self.find(r"^(\|.*)$", self.prose)

    def at(self, line, fault):
        return f"{self.name}:{line}: {fault}"


def take_apart(text):
    """(code blocks, the text with spaces in their place)."""
    blocks, prose, fence, before = [], [], False, ""
    for number, line in enumerate(text.splitlines(), 1):
        indented = line.startswith("    ") and (not before.strip() or before.startswith("    "))
        prose.append(" " * len(line) if fence or indented or line.startswith("```") else line)
        if line.startswith("```"):
            fence = not fence
            blocks += [(number + 1, line.strip("` "), [])] * fence
        elif fence or indented:
            if not fence and not before.strip():
                blocks.append((number, "", []))
            blocks[-1][2].append(line if fence else line.strip())
        before = line
    assert not fence, "a code block does not end"
    return [(number, language, "\n".join(lines)) for number, language, lines in blocks], "\n".join(prose)


def blank(pattern, text):
    """The text with spaces for what the pattern finds."""
    return re.sub(pattern, lambda match: re.sub(r"[^\n]", " ", match[0]), text, flags=re.S)


# Links


def anchors(page):
    """The names that GitHub gives to the headings."""
    names = [re.sub(r"[^\w\- ]", "", heading.lstrip("# ").lower()) for _, heading in page.headings()]
    return {name.replace(" ", "-") for name in names}


def faults_of_links(page):
    faults = []
    for line, target in page.links():
        name, _, anchor = target.partition("#")
        to = (page.path.parent / name).resolve() if name else page.path
        if target.startswith("https://"):
            continue
        if name and not to.exists():
            faults.append(page.at(line, f"{target} is not there"))
        elif anchor and anchor not in anchors(Page(to) if name else page):
            faults.append(page.at(line, f"{target}: no such heading"))
    return faults


# Commands

BEFORE = r"[A-Z_]+=\S+ |timeout \d+ "
PROGRAM = re.compile(rf"({BEFORE})*(python|torchrun|pip|ruff|tensorboard) ")
OTHERS = {  # commands of others, as they stand
    "python -m pytest",
    "ruff check .",
    "ruff format --check .",
    "hf download google/ddpm-celebahq-256 --local-dir celebahq",
    "%cd ddpm",
    "tensorboard --logdir logs",
}


def commands(page):
    """[(line, words)] of each command of the code blocks and the code marks, without comments."""
    found = [span for span in page.spans if PROGRAM.match(span[1])]
    for first, language, text in page.blocks:
        if language in ("", "bash", "powershell"):
            for command in re.finditer(r"(?:\\\n|.)+", text):  # a line, or several that \ joins
                found.append((first + text.count("\n", 0, command.start()), command[0].replace("\\\n", " ")))
    parts = []
    for line, command in found:
        for part in re.split(r"&&|;(?=\s)", re.sub(r"(^|\s)#.*", "", command)):
            parts.append((line, shlex.split(re.sub(rf"^\s*!?({BEFORE})*", "", part))))
    return [(line, words) for line, words in parts if words]


def import_target(target):
    """The module that `python train.py` or `python -m utils.evaluate` runs. ValueError: none."""
    path = PROJECT / target.replace(".", "/")
    if path.with_suffix(".py").is_file():
        return importlib.import_module(target)
    if (path / "__main__.py").is_file():
        return importlib.import_module(f"{target}.__main__")
    raise ValueError(f"no module {target}")


def options_of(module):
    return {field.name for field in fields(module.Config)} if hasattr(module, "Config") else set()


def read_options(target, words):
    """Has a script or module read the words of a command line. ValueError where it refuses them."""
    module = import_target(target)
    if hasattr(module, "Config"):
        places = [place for place, word in enumerate(words[1:]) if PLACEHOLDER.fullmatch(word)]
        if unknown := [words[place] for place in places if words[place].removeprefix("--") not in options_of(module)]:
            raise ValueError(f"unrecognized arguments: {unknown}")
        words = [word for place, word in enumerate(words) if place not in places and place - 1 not in places]
        declared = getattr(module, "SETTINGS", RUN_SETTINGS)
        if target == "train":
            declared = declared | {"preset": settings.choice(module.PRESETS)}
        with suppress(SystemExit), redirect_stdout(StringIO()):  # --help ends the program
            settings.typed_options(module.Config, declared, "", words)
    elif target == "utils.convert":
        nothing = dict.fromkeys(module.COMMANDS, lambda *_: None)
        with unittest.mock.patch.object(module, "COMMANDS", nothing):
            module.main(words or ["import", "FOLDER", "FILE"])
    elif len(words) > 1 or any(word.startswith("--") for word in words):
        raise ValueError("it takes a folder")


@cache
def refusal(*words):
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
        for word in words[1:]:
            known = word in ("-r", "--index-url") or word.startswith("https://")
            if not (known or (PROJECT / word).is_file() or word in text_of_sources()):
                raise ValueError(f"there is no file and no package {word}")
    else:
        raise ValueError("no known command")


def faults_of_commands(page):
    """Of commands, of options alone in code marks, and of options that nothing would check."""
    faults = [page.at(line, why) for line, words in commands(page) if (why := refusal(*words))]
    known = [words for _, words in commands(page) if not refusal(*words)]
    modules = [words[2] for words in known if words[:2] == ["python", "-m"] and "." in words[2]]
    targets = ["train", "predict", "txt_annotation", "utils.evaluate", *modules]
    for line, span in page.spans:
        name, *values = shlex.split(span) if span.startswith("--") else [""]
        if values:  # one of the scripts takes them
            ways = [refusal("python", "-m", target, name, *values) for target in targets]
            faults += [page.at(line, ways[0])] * ("" not in ways)
        elif name and not any(name[2:] in {"help", *options_of(import_target(target))} for target in targets):
            faults.append(page.at(line, f"{name} is no option"))
    outside = page.find(r"(?<![\w-])(--[a-z]\w+)", page.plain)
    return faults + [page.at(line, f"{option} outside code marks") for line, option in outside]


# Paths and names in code marks


@cache
def files():
    """All files and folders of the project that documents speak of, relative to it."""
    found = [*PROJECT.glob("*"), *PROJECT.glob("datasets/noto_emoji/*"), *PROJECT.glob("logs/emoji.*")]
    for top in ("nets", "utils", "tests", "benchmarks", "docs"):
        found += (PROJECT / top).rglob("*")
    return {path.relative_to(PROJECT).as_posix() for path in found if "__pycache__" not in path.parts}


@cache
def text_of_sources():
    names = [name for name in files() if name.endswith((".py", ".toml", "requirements.txt"))]
    own = [name for name in names if not name.endswith(("documents.py", "test_docs.py"))]
    return "\n".join((PROJECT / name).read_text(encoding="utf-8") for name in own)


def faults_of_names(page):
    """Files of the project that are not there, and names that no code has.

    The first column of reference.md's tables is the other project's.
    """
    if page.path.name.startswith("reference."):
        page = Page(page.path, re.sub(r"^\|[^|]*", "|", page.text, flags=re.M))
    faults = []
    for line, span in page.spans:
        if re.fullmatch(r"[\w.*/-]+\.(py|md|toml)|(nets|utils|tests|docs|benchmarks)/[\w./*-]*", span):
            if not (page.path.parent / span).exists() and not fnmatch.filter(files(), f"*{span.strip('/')}"):
                faults.append(page.at(line, f"{span} is not there"))
        elif not PLACEHOLDER.fullmatch(span):
            name = re.fullmatch(r"(?:\w+\.)*([A-Za-z]\w*(?:_\w+|[a-z][A-Z]\w*))(?:\(\))?", span)
            if name and not re.search(rf"\b{name[1]}\b", text_of_sources()):
                faults.append(page.at(line, f"{span}: nothing has this name"))
    return faults


# Numbers


def faults_of_defaults(page):
    """The tables of settings show the scripts' defaults. docs.settings makes its own pages."""
    faults, head = [], []
    for line, row in page.tables() * (page.path.name.partition(".")[0] != "settings"):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        names = re.findall(r"`(\w+)`", cells[0])
        if not names and "---" not in row:
            head = cells
        if not names or head[1] not in ("default", "默认值"):
            continue
        shown = re.sub(r"[(（].*", "", cells[1]).split("·")
        for name, value in zip_longest(names, shown * len(names) if len(shown) == 1 else shown):
            known = defaults_of(page, row)
            if name not in known or value is None or not shows(value.strip(" `"), known[name]):
                faults.append(page.at(line, f"{name}: {value} is not its default {known.get(name)!r}"))
    return faults


def defaults_of(page, row):
    """The defaults of a row's script. predict.py's steps are 0 for what suits the solver."""
    by_page = {"sampling": "predict", "evaluating": "utils.evaluate"}.get(page.path.name.partition(".")[0], "train")
    script = "predict" if "predict.py" in row else by_page
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


UNITS = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "万": 10**4, "亿": 10**8}


def numbers(page):
    """[(line, value)] of the numbers outside code that are 10 and more or have a point."""
    text = blank(r"\]\([^)]*\)", page.plain)
    found = page.find(rf"(?<![\w.])(\d[\d,]*(?:\.\d+)?(?:\s*(?:{'|'.join(UNITS)}))?)", text)
    values = []
    for line, number in found:
        digits = re.match(r"[\d,.]+", number)[0]
        value = Decimal(digits.replace(",", "")) * UNITS.get(number[len(digits) :].strip(), 1)
        values += [(line, f"{value.normalize():,f}")] * (value >= 10 or value != int(value))
    return values


@cache
def measured_values():
    text = "\n".join(path.read_text(encoding="utf-8") for path in RESULTS)
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?:\.\d+)?(?:e\+\d+)?", text)]


def faults_of_measured(page):
    """The tables of benchmarks.md show, rounded, what benchmarks/results has."""
    faults = []
    for line, row in page.tables() * page.path.name.startswith("benchmarks."):
        for number in re.findall(r"(?<![\w.])\d[\d,]*\.\d+|(?<![\w.])\d+,\d[\d,]*", row):
            value, decimals = float(number.replace(",", "")), len(number.partition(".")[2])
            if not any(abs(known - value) <= 0.5001 * 10.0**-decimals for known in measured_values()):
                faults.append(page.at(line, f"{number} is in no file of benchmarks/results"))
    return faults


CHECKS = {
    "links": faults_of_links,
    "commands": faults_of_commands,
    "names": faults_of_names,
    "defaults": faults_of_defaults,
    "measured": faults_of_measured,
}


# The two languages


def faults_of_translation(english, chinese):
    """What the two pages do not share, each with its line."""
    faults = []
    for what, one, other in zip(("heading", "table row"), sequences(english), sequences(chinese)):
        different = ((a, b) for a, b in zip_longest(one, other, fillvalue=(0, "nothing")) if a[1] != b[1])
        for (line, here), (place, there) in list(different)[:1]:  # whatever follows is moved
            faults.append(chinese.at(place, f"{what}: {there}, where {english.name}:{line} has {here}"))
    one, other = contents(english), contents(chinese)
    for what in one:
        for value, line in missing(one[what], other[what]):
            faults.append(f"{chinese.name} lacks the {what} {value} of {english.name}:{line}")
        for value, line in missing(other[what], one[what]):
            faults.append(chinese.at(line, f"{what} {value} is not in {english.name}"))
    return faults


def sequences(page):
    """What both pages have in the same order: levels of headings, numbers of cells."""
    levels = [(line, heading.partition(" ")[0]) for line, heading in page.headings()]
    return levels, [(line, f"{row.count('|') - 1} cells") for line, row in page.tables()]


def contents(page):
    """What both pages have somewhere: {kind: [(line, value)]}."""
    return {
        "code": [(line, re.sub(r"(^|\s+)# .*", "", text)) for line, _, text in page.blocks],
        "code mark": [(line, span) for span, line in {span: line for line, span in reversed(page.spans)}.items()],
        "link": [(line, page_of(page, target)) for line, target in page.links() if not target.startswith("#")],
        "number": numbers(page),
    }


def page_of(page, target):
    """The target of a link, the English page for the Chinese one."""
    if "://" in target:
        return target
    to = (page.path.parent / target.partition("#")[0]).resolve()
    english = {chinese: path for path, chinese in TRANSLATED.items()}.get(to, to)
    return english.with_name(english.name.replace(".zh-CN", "")).relative_to(PROJECT).as_posix()


def missing(one, other):
    """[(value, line)] that `one` has more often than `other`: its last ones."""
    lacking, left = [], Counter(value for _, value in other)
    for line, value in one:
        left[value] -= 1
        lacking += [(value, line)] * (left[value] < 0)
    return lacking
