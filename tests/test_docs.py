"""What the documents say: links lead somewhere, commands and names exist, both languages agree."""

import ast
import re

import documents
import pytest
from conftest import PROJECT, command, run, run_main
from documents import ALL, CHECKS, RESULTS, TRANSLATED, Page, faults_of_translation

import docs.settings


def by_name(paths):
    return pytest.mark.parametrize("path", paths, ids=[path.relative_to(PROJECT).as_posix() for path in paths])


def faults_of(text, check, name="docs/page.md"):
    return CHECKS[check](Page(PROJECT / name, text))


@by_name([*ALL, *RESULTS])
def test_each_document_is_right(path):
    assert [fault for check in CHECKS.values() for fault in check(Page(path))] == []


@by_name(TRANSLATED)
def test_both_languages_have_the_same_structure(path):
    """A fault names the page and the line that lack what the other language has."""
    assert faults_of_translation(Page(path), Page(TRANSLATED[path])) == []


def test_every_document_is_read_and_has_its_chinese_page():
    alone = {"docs/contributing.md", "logs/README.md", "logs/emoji.md", "datasets/README.md", "results/README.md"}
    alone.add("benchmarks/NOTES.md")
    english = {path for path in ALL if ".zh-CN" not in path.name}
    assert {path.relative_to(PROJECT).as_posix() for path in english - set(TRANSLATED)} == alone
    assert set(TRANSLATED) <= english and len(TRANSLATED) >= 12


@pytest.mark.parametrize(("name", "chinese"), [("settings.md", False), ("settings.zh-CN.md", True)])
def test_the_pages_of_settings_are_those_of_the_code(name, chinese):
    """Where this fails, `python -m docs.settings` writes them anew."""
    assert (PROJECT / "docs" / name).read_text(encoding="utf-8") == docs.settings.page(chinese)


def test_each_help_text_has_its_chinese():
    assert docs.settings.faults_of_chinese() == []


# Each place of a document that a pattern finds is broken by itself. What the pattern finds owes
# nothing to how the checks read: that no place is passed over is the point.
BREAKS = {
    "links": (r"\]\((?!https:)[^)\s#]+", lambda match: match[0] + "x", 140),
    "commands": (r"(?<![\w-])--(?=[a-z])|\bpython (-m )?(?=[a-z])", lambda match: match[0] + "x", 350),
    "names": (r"`[\w/]+(?=\.(py|md|toml)`)", lambda match: match[0] + "x", 95),
    "defaults": (r"^\| `\w+`[^|\n]*\| [^|\n]*\d(?=[^|\n]*\|[^|\n]*\|$)", lambda match: match[0] + "7", 20),
}


@pytest.mark.parametrize("check", BREAKS)
def test_whatever_is_broken_is_seen(check):
    (pattern, change, least), places, passed = BREAKS[check], 0, []
    for path in ALL:
        text = Page(path).text
        theirs = "^\\|[^|]*" if path.name.startswith("reference.") else "$^"  # the other project's names
        hidden = documents.blank(f"(?m:^```(python|text|bibtex)\n.*?^```)|(?m:{theirs})", text)
        for match in re.finditer(pattern, hidden, flags=re.M):
            places += 1
            broken = text[: match.start()] + change(match) + text[match.end() :]
            if not CHECKS[check](Page(path, broken)):
                passed.append((path.name, text[match.start() - 20 : match.end() + 20]))
    assert passed == [] and places >= least


@by_name(TRANSLATED)
def test_a_number_that_differs_between_the_languages_is_seen(path):
    """Each of two digits and more, outside code, links and formulas."""
    page, passed = Page(path), []
    for match in re.finditer(r"(?<![\w.,])\d[\d,.]*\d", documents.blank(r"\]\([^)]*\)", page.plain)):
        text = page.text[: match.end() - 1] + str(9 - int(match[0][-1])) + page.text[match.end() :]
        if not faults_of_translation(Page(path, text), Page(TRANSLATED[path])):
            passed.append(page.text[match.start() - 20 : match.end() + 20])
    assert passed == []


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        ("links", "[a](training.md#presets)", "[a](training.md#preset)"),
        ("links", "# A b\n[a](#a-b)", "# A b\n[a](#a_b)"),
        ("commands", "`python train.py --preset quick`", "`python train.py --preset quik`"),
        ("commands", "`python train.py --input_shape 64,64`", "`python train.py --input_shape 64`"),
        ("commands", "`python train.py --accumulate N`", "`python train.py --accumulates N`"),
        ("commands", "`--batch_size\n8`", "`--batch_size\neight`"),
        ("commands", "`--help`", "--help"),
        ("commands", "    python predict.py --seed 0", "    python predict.py --seed zero"),
        ("commands", "    pip install -r requirements.txt && python predict.py", "    pip install -r requirement.txt"),
        ("commands", "    X=1 python train.py && python predict.py", "    X=1 python train.py && python predict.py 7"),
        ("commands", "```powershell\nruff check .; ruff check .\n```", "```powershell\nruff check .; ruff chek .\n```"),
        ("commands", "    timeout 9 python train.py", "    timeout 9 python train.py --epoch 9"),
        ("commands", "    python train.py --epochs 2 \\\n      --seed 1", "    python train.py \\\n      --sed 1"),
        (
            "commands",
            '    python -m benchmarks.recipes --recipes "X=a:1;b:2"',
            '    python -m benchmarks.recipes --recipe "X=a:1;b:2"',
        ),
        ("commands", "`pip install scipy`", "`pip install scypi`"),
        ("commands", "`python -m utils.convert import a b`", "`python -m utils.convert import a`"),
        ("commands", "`python -m benchmarks.speed --rounds 5`", "`python -m benchmarks.speed --round 5`"),
        ("commands", "`torchrun --nproc_per_node 2 train.py`", "`torchrun --nproc_per_nodes 2 train.py`"),
        ("commands", "`torchrun --nproc_per_node 2 train.py --seed 1`", "`torchrun train.py --sed 1`"),
        ("commands", "`python txt_annotation.py --download mnist`", "`python txt_annotation.py --download mnit`"),
        ("names", "`diffusion.py`, `utils/*.py`", "`guide.py`"),
        ("names", "`GaussianDiffusion`, `batch_size`", "`GaussDiffusion`"),
        (
            "defaults",
            "| setting | default |\n|---|---|\n| `epochs` | 1000 |",
            "| setting | default |\n| `epochs` | 100 |",
        ),
    ],
)
def test_each_check_sees_its_fault(check, right, wrong):
    assert faults_of(right, check) == [] and faults_of(wrong, check)


def test_the_tables_of_the_benchmarks_are_compared():
    row = "| a | 20.52 | 1,893 |"
    assert faults_of(row, "measured", "docs/benchmarks.md") == []
    assert all(
        faults_of(row.replace(*change), "measured", "docs/benchmarks.md") for change in (("52", "25"), ("1,", "7,"))
    )


@pytest.mark.parametrize(
    ("one", "other", "fault"),
    [
        ("in 12 steps", "一步", "docs/training.zh-CN.md lacks the number 12 of docs/training.md:1"),
        ("", "\n12 步", "docs/training.zh-CN.md:2: number 12 is not in docs/training.md"),
        ("[a](training.md)", "a", "docs/training.zh-CN.md lacks the link docs/training.md of docs/training.md:1"),
        ("`--seed 1`", "", "docs/training.zh-CN.md lacks the code mark --seed 1 of docs/training.md:1"),
        ("a\n\n    python train.py", "", "docs/training.zh-CN.md lacks the code python train.py of docs/training.md:3"),
        ("\n# A", "# A\n\n## B", "docs/training.zh-CN.md:3: heading: ##, where docs/training.md:0 has nothing"),
        ("| a | b |", "| a |", "docs/training.zh-CN.md:1: table row: 1 cells, where docs/training.md:1 has 2 cells"),
        ("295.5 million in 20,000 steps", "2.955 亿，2 万步", None),
        ("    python train.py  # first", "    python train.py  # 先", None),
    ],
)
def test_a_difference_between_the_languages_is_named_with_its_line(one, other, fault):
    english = PROJECT / "docs/training.md"
    pages = Page(english, one), Page(TRANSLATED[english], other)
    assert faults_of_translation(*pages) == [fault] * bool(fault)


def test_a_code_block_that_does_not_end_is_seen():
    with pytest.raises(AssertionError, match="does not end"):
        Page(PROJECT / "README.md", "```python\nx = 1\n")


def test_the_front_page_is_short():
    for path in (PROJECT / "README.md", PROJECT / "docs" / "README.zh-CN.md"):
        assert len(Page(path).text.splitlines()) <= 130


def code_of(path):
    return [text for _, language, text in Page(path).blocks if language == "python"]


def test_the_lines_from_python_run(tmp_path, monkeypatch, capsys):
    """All but the training of minutes: one block after the other, as a reader types them."""
    import torch

    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").symlink_to(PROJECT / "logs")
    *blocks, scripts = code_of(PROJECT / "README.md") + code_of(PROJECT / "docs" / "python.md")
    scope = {}
    for block in blocks:
        exec(compile(block.replace("steps=25", "steps=3"), "python.md", "exec"), scope)
    assert (tmp_path / "four.png").is_file() and scope["x"].shape == (4, 3, 64, 64)
    assert torch.isfinite(scope["loss"]) and scope["diffusion"].ema_step == 1
    called = [node.func.value.id for node in ast.walk(ast.parse(scripts)) if isinstance(node, ast.Call)]
    assert called == ["txt_annotation", "train", "predict"]
    for script, words in re.findall(r"^(\w+)\.main\((.*)\)$", scripts, flags=re.M):
        assert documents.refusal("python", f"{script}.py", *ast.literal_eval(words)) == ""


@pytest.mark.parametrize("script", ["train.py", "predict.py", "txt_annotation.py"])
def test_each_script_answers_help(script, capsys):
    with pytest.raises(SystemExit) as end:
        run_main(script, "--help")
    assert not end.value.code and "--" in capsys.readouterr().out


def test_the_command_of_the_front_page_samples(tmp_path):
    """As a reader types it, but for the number of steps."""
    (tmp_path / "logs").symlink_to(PROJECT / "logs")
    lines = documents.commands(Page(PROJECT / "README.md"))
    words = next(words for _, words in lines if words[1:2] == ["predict.py"] and "--class_name" in words)
    run(command(*words[1:], "--steps", "2"), tmp_path)
    assert (tmp_path / "results/predict_out/predict_5x5_results.png").is_file()
