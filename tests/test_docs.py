"""What the documents say: links lead somewhere, options exist, both languages say the same."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from conftest import PROJECT

import predict
import train
import txt_annotation
from utils.evaluate import __main__ as evaluate

ENGLISH = [
    PROJECT / "README.md",
    *(
        path
        for path in sorted((PROJECT / "docs").glob("*.md"))
        if "zh-CN" not in path.name and path.name != "contributing.md"
    ),
]
ALL = [*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md"), *(PROJECT / "logs").glob("*.md")]
OPTIONS = {name for module in (train, predict, txt_annotation, evaluate) for name in module.Config.__dataclass_fields__}


def text_of(path):
    return path.read_text(encoding="utf-8")


def chinese(path):
    return PROJECT / "docs" / f"{path.stem}.zh-CN.md"


def by_name(paths):
    return pytest.mark.parametrize("path", paths, ids=[path.name for path in paths])


def prose(text):
    return re.sub(r"^(    .*|```.*?```)$", "", text, flags=re.M | re.S)


def commands(text):
    """The code blocks, without what a comment says."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S)
    lines = re.findall(r"^    (\S.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M)
    return [re.sub(r"\s+# .*", "", line) for block in (*blocks, "\n".join(lines)) for line in block.splitlines()]


@by_name(ALL)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text_of(path))):
        if not target.startswith(("http", "#")):
            assert (path.parent / target.split("#")[0]).exists(), f"{path.name}: {target}"


@by_name(ENGLISH)
def test_both_languages_have_the_same_headings_commands_and_code(path):
    english, other = text_of(path), text_of(chinese(path))
    levels = [
        re.findall(r"^#+", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M) for text in (english, other)
    ]
    assert levels[0] == levels[1]
    assert commands(english) == commands(other)
    assert len(re.findall(r"^\|", english, flags=re.M)) == len(re.findall(r"^\|", other, flags=re.M))


@by_name(ENGLISH)
def test_both_languages_have_the_same_numbers_and_names(path):
    """All numbers of two digits and more, and all that stands in code marks."""
    found = []
    for text in (text_of(path), text_of(chinese(path))):
        numbers = re.findall(r"(?<![\w.])\d[\d,]*\.?\d+", re.sub(r"\]\([^)]*\)", "", prose(text)))
        names = re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", prose(text))
        found.append((sorted(numbers), sorted({" ".join(name.split()) for name in names})))
    assert found[0] == found[1]


@by_name(ALL)
def test_options_exist(path):
    own = {
        "help",
        "standalone",
        "nproc_per_node",
        "nnodes",
        "node_rank",
        "rdzv_backend",
        "rdzv_endpoint",
        "signals-to-handle",
        "preset",
    }
    scripts = r"python (?:-m utils\.evaluate|train\.py|predict\.py|txt_annotation\.py)[^`|&]*"
    for line in re.findall(scripts, text_of(path)):
        unknown = set(re.findall(r"--([\w-]+)", line)) - OPTIONS - own
        assert not unknown, f"{path.name}: {line}"


def test_the_front_page_is_short():
    for path in (PROJECT / "README.md", PROJECT / "docs" / "README.zh-CN.md"):
        assert len(text_of(path).splitlines()) <= 150
        paragraphs = re.split(r"\n\s*\n", prose(text_of(path)))
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


def test_commands_of_seconds_run(tmp_path):
    """Those of the front page that draw or ask, as a reader types them."""
    import os
    import sys

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("train.py", "predict.py", "txt_annotation.py"):
        done = subprocess.run(
            [sys.executable, str(PROJECT / name), "--help"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0 and "--" in done.stdout
    (tmp_path / "logs").symlink_to(PROJECT / "logs")
    drawn = next(
        line
        for line in re.findall(r"`(python predict\.py[^`]*)`", text_of(PROJECT / "README.md"))
        if "class_name" in line
    )
    words = drawn.replace("\n", " ").split()[2:]
    done = subprocess.run(
        [sys.executable, str(PROJECT / "predict.py"), *words, "--steps", "2"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0 and Path(tmp_path, "results/predict_out/predict_5x5_results.png").is_file()
