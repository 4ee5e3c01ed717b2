"""What the documents say: links lead somewhere, commands and names exist, both languages agree."""

import ast
import fnmatch
import re

import documents
import pytest
from conftest import PROJECT, command, run, run_main
from documents import ALL, CHECKS, ENGLISH, faults_of_translation, take_apart


def text_of(path):
    return path.read_text(encoding="utf-8")


def by_name(paths):
    return pytest.mark.parametrize("path", paths, ids=[path.relative_to(PROJECT).as_posix() for path in paths])


@by_name(ALL)
def test_each_document_is_right(path):
    assert {name: check(path, text_of(path)) for name, check in CHECKS.items()} == dict.fromkeys(CHECKS, [])


@by_name(ENGLISH)
def test_both_languages_have_the_same_code_links_names_and_numbers(path):
    assert faults_of_translation(path, text_of(path)) == []


def test_every_document_is_read():
    assert len(ALL) == len(set(ALL)) >= 25 and len(ENGLISH) >= 11
    assert {documents.other_language(path) for path in ENGLISH} == set(PROJECT.glob("docs/*.zh-CN.md"))


# A check that finds nothing to look at would never fail: so much there is at least.
LEAST = {
    "README.md": {"links": 30, "commands": 15, "options": 5, "paths": 8, "names": 40, "defaults": 10, "numbers": 18},
    "docs/training.md": {"links": 8, "commands": 11, "options": 7, "names": 55, "defaults": 12, "numbers": 40},
    "docs/sampling.md": {"links": 2, "commands": 10, "options": 4, "names": 30, "defaults": 10},
    "docs/benchmarks.md": {"links": 10, "commands": 5, "options": 6, "names": 20, "numbers": 150},
    "docs/reference.md": {"links": 2, "commands": 4, "names": 40, "paths": 14, "numbers": 10},
    "docs/troubleshooting.md": {"commands": 5, "options": 12, "names": 20},
    "docs/reading.md": {"links": 2, "paths": 25},
    "docs/how_it_works.md": {"links": 25, "commands": 4, "names": 30, "numbers": 18},
    "docs/contributing.md": {"commands": 6, "paths": 20, "names": 45},
    "logs/README.md": {"paths": 10, "names": 14},
    "logs/emoji.md": {"links": 1, "commands": 4, "options": 6, "numbers": 55},
    "datasets/README.md": {"commands": 4, "names": 12},
    "results/README.md": {"paths": 4, "names": 6},
}


@pytest.mark.parametrize("name", LEAST)
def test_the_checks_find_what_they_look_at(name):
    path = PROJECT / name
    text = text_of(path)
    found = {
        "links": documents.link_targets(text),
        "commands": documents.commands(text),
        "options": documents.options_alone(text),
        "paths": list(filter(documents.is_path, documents.own_spans(path, text))),
        "names": documents.own_spans(path, text),
        "defaults": documents.default_cells(text),
        "numbers": list(documents.numbers(text).elements()),
    }
    assert {what: len(found[what]) for what, least in LEAST[name].items() if len(found[what]) < least} == {}


def test_no_exception_outlives_what_it_was_for():
    spans = {span for path in ALL for span in filter(documents.is_path, documents.own_spans(path, text_of(path)))}
    assert [pattern for pattern in documents.MADE if not fnmatch.filter(spans, pattern)] == []
    said = {" ".join(words) for path in ALL for words in documents.commands(text_of(path))}
    assert said | {"ruff format --check ."} >= documents.OTHERS


# Each place of a document that the pattern finds is broken by itself. What the pattern finds
# owes nothing to how the checks read: that no place is passed over is the point.
BREAKS = {
    "links": (r"\]\((?!https:)[^)\s#]+", lambda match: match[0] + "x"),
    "options": (r"(?<![\w-])--(?=[a-z])", lambda match: "--x"),
    "targets": (r"\bpython (-m )?(?=[a-z])", lambda match: match[0] + "x"),
    "paths": (r"`[\w/]+(?=\.(py|md|txt)`)", lambda match: match[0] + "x"),
    "defaults": (r"^\| `\w+`[^|\n]*\| [^|\n]*\d(?=[^|\n]*\|[^|\n]*\|$)", lambda match: match[0] + "7"),
}
CHECKED_BY = {"options": "commands", "targets": "commands"}
BREAKS_IN = {"links": 140, "options": 240, "targets": 110, "paths": 95, "defaults": 36}


PYTHON = r"^```python\n.*?^```"


def hide(text, pattern):
    """The text with spaces in the place of what the pattern finds."""
    return re.sub(pattern, lambda match: re.sub(r"[^\n]", " ", match[0]), text, flags=re.M | re.S)


def broken_texts(path, kind):
    """(the text with one place broken, what stood there), for each place outside Python."""
    text, (pattern, change) = text_of(path), BREAKS[kind]
    theirs = r"^\|[^|]*" if path.name.startswith("reference.") else r"$^"  # its first column is the other project's
    for match in re.finditer(pattern, hide(text, f"{PYTHON}|{theirs}"), flags=re.M):
        yield text[: match.start()] + change(match) + text[match.end() :], text[match.start() - 20 : match.end() + 20]


@pytest.mark.parametrize("kind", BREAKS)
def test_whatever_is_broken_is_seen(kind):
    check, places, passed = CHECKS[CHECKED_BY.get(kind, kind)], 0, []
    for path in ALL:
        for text, place in broken_texts(path, kind):
            places += 1
            if not check(path, text):
                passed.append((path.name, place))
    assert passed == [] and places >= BREAKS_IN[kind]


@by_name(ENGLISH)
def test_a_number_that_differs_between_the_languages_is_seen(path):
    """Each of two digits and more, outside code, links and formulas."""
    text, passed = text_of(path), []
    hidden = hide(text, r"```.*?```|^    .*?$|`[^`]*`|\$[^$]+\$|\]\([^)]*\)")
    for match in re.finditer(r"(?<![\w.,])\d[\d,.]*\d", hidden):
        if not faults_of_translation(path, text[: match.end() - 1] + str(9 - int(match[0][-1])) + text[match.end() :]):
            passed.append(text[match.start() - 20 : match.end() + 20])
    assert passed == []


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        ("links", "[a](training.md#presets)", "[a](training.md#preset)"),
        ("links", "# A b\n[a](#a-b)", "# A b\n[a](#a_b)"),
        ("commands", "`python train.py --preset quick`", "`python train.py --preset quik`"),
        ("commands", "`python train.py --input_shape 64,64`", "`python train.py --input_shape 64`"),
        ("commands", "`python train.py --epochs 8`", "`python train.py --epochs eight`"),
        ("commands", "`python train.py --dry_run True`", "`python train.py --dry_run yes`"),
        ("commands", "`python train.py --accumulate N`", "`python train.py --accumulates N`"),
        ("commands", "`--batch_size 8`", "`--batch_size 8 9`"),
        ("commands", "`--batch_size\n8`", "`--batch_size\neight`"),
        ("commands", "`--help`", "--help"),
        ("commands", "    python predict.py --seed 0", "    python predict.py --seed zero"),
        ("commands", "    pip install -r requirements.txt && python predict.py", "    pip install -r requirement.txt"),
        ("commands", "    X=1 python train.py && python predict.py", "    X=1 python train.py && python predict.py 7"),
        ("commands", "```\nruff check .\n```", "```\nruff chek .\n```"),
        ("commands", "`pip install scipy`", "`pip install scypi`"),
        ("commands", "`python -m utils.convert weights a b`", "`python -m utils.convert weight a b`"),
        ("commands", "`python -m utils.convert import a b`", "`python -m utils.convert import a`"),
        ("commands", "`python -m docs.figures --names loss`", "`python -m docs.figures --names los`"),
        ("commands", "`python -m benchmarks.speed --rounds 5`", "`python -m benchmarks.speed --round 5`"),
        ("commands", "`torchrun --nproc_per_node 2 train.py`", "`torchrun --nproc_per_nodes 2 train.py`"),
        ("commands", "`torchrun --nproc_per_node 2 train.py --seed 1`", "`torchrun train.py --sed 1`"),
        ("commands", "`python txt_annotation.py --download mnist`", "`python txt_annotation.py --download mnit`"),
        ("paths", "`utils/files.py`", "`utils/file.py`"),
        ("paths", "`logs/<run>/best.pth`", "`log/<run>/best.pth`"),
        ("paths", "`diffusion.py`, `utils/*.py`", "`guide.py`"),
        ("names", "`atomic_write` in `utils/files.py`", "`load_image` in `utils/files.py`"),
        ("names", "`GaussianDiffusion`", "`GaussDiffusion`"),
        ("facts", "the 270 flags", "the 271 flags"),
        ("facts", "全部 1,296 个表情", "全部 1,269 个表情"),
        ("facts", "half precision: 10.3 MB", "half precision: 10.8 MB"),
        ("facts", "from 0 to 4294967295", "from 0 to 4294967296"),
    ],
)
def test_each_check_sees_its_fault(check, right, wrong):
    path = PROJECT / "docs/page.md"
    assert CHECKS[check](path, right) == [] and CHECKS[check](path, wrong)


def test_the_tables_of_benchmarks_md_are_compared():
    path, row = PROJECT / "docs/benchmarks.md", "| a | 20.52 | 1,893 |"
    assert CHECKS["measured"](path, row) == []
    assert CHECKS["measured"](path, row.replace("20.52", "20.25")) and CHECKS["measured"](path, row.replace("1,", "7,"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("295.5 million", "2.956 亿"),
        ("10,000 steps", "2 万步"),
        ("in 12 steps", "一步"),
        ("[a](training.md)", "[a](sampling.zh-CN.md)"),
        ("[a](training.md)", "a"),
        ("`--seed 1`", "`--seed 2`"),
        ("    python train.py", "    python predict.py"),
        ("    python train.py", "python train.py"),
        ("# A", "## A"),
        ("| a | b |", "| a |"),
    ],
)
def test_a_difference_between_the_languages_is_seen(one, other):
    path = PROJECT / "docs/training.md"
    assert faults_of_translation(path, one, one.replace(".md", ".zh-CN.md")) == []
    assert faults_of_translation(path, one, other)


def test_the_languages_count_in_their_own_units():
    path = PROJECT / "docs/training.md"
    assert faults_of_translation(path, "295.5 million in 20,000 steps", "2.955 亿，2 万步") == []


def test_a_code_block_that_does_not_end_is_seen():
    with pytest.raises(AssertionError, match="does not end"):
        take_apart("```python\nx = 1\n")


def test_the_front_page_is_short():
    for path in (PROJECT / "README.md", PROJECT / "docs" / "README.zh-CN.md"):
        assert len(text_of(path).splitlines()) <= 150
        paragraphs = re.split(r"\n\s*\n", take_apart(text_of(path)).prose)
        assert (
            max(
                len(paragraph.splitlines())
                for paragraph in paragraphs
                if "|" not in paragraph and not re.match(r"\d\.|- ", paragraph)
            )
            <= 5
        )


def code_of(path):
    return re.findall(r"^```python\n(.*?)^```", text_of(path), flags=re.M | re.S)


def test_the_lines_from_python_run(tmp_path, monkeypatch, capsys):
    """All but the training of minutes: one block after the other, as a reader types them."""
    import torch

    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").symlink_to(PROJECT / "logs")
    *blocks, scripts = code_of(PROJECT / "README.md") + code_of(PROJECT / "docs" / "python.md")
    scope = {}
    for block in blocks:
        exec(compile(block.replace("steps=25", "steps=3"), "python.md", "exec"), scope)
    assert (tmp_path / "four.png").is_file() and scope["x"].shape == (4, 3, 32, 32)
    assert torch.isfinite(scope["loss"]) and scope["diffusion"].ema_step == 1
    called = [node.func.value.id for node in ast.walk(ast.parse(scripts)) if isinstance(node, ast.Call)]
    assert called == ["txt_annotation", "train", "predict"]
    for script, words in re.findall(r"^(\w+)\.main\((.*)\)$", scripts, flags=re.M):
        assert documents.refusal(("python", f"{script}.py", *ast.literal_eval(words))) == ""


@pytest.mark.parametrize("script", ["train.py", "predict.py", "txt_annotation.py"])
def test_each_script_answers_help(script, capsys):
    with pytest.raises(SystemExit) as end:
        run_main(script, "--help")
    assert not end.value.code and "--" in capsys.readouterr().out


def test_the_command_of_the_front_page_samples(tmp_path):
    """As a reader types it, but for the number of steps."""
    (tmp_path / "logs").symlink_to(PROJECT / "logs")
    lines = documents.commands(text_of(PROJECT / "README.md"))
    words = next(words for words in lines if words[1:2] == ["predict.py"] and "--class_name" in words)
    run(command(*words[1:], "--steps", "2"), tmp_path)
    assert (tmp_path / "results/predict_out/predict_5x5_results.png").is_file()
