"""The layout: who may import whom, what the top level holds, and that importing a script does
nothing. Nothing is imported here.
"""

import ast
import re
import subprocess
import sys

import pytest
from conftest import PROJECT

SCRIPTS = {"txt_annotation", "train", "predict"}
FILES = {
    ".gitignore",
    "LICENSE",
    "README.md",
    "pyproject.toml",
    "requirements.txt",
    "predict.py",
    "train.py",
    "txt_annotation.py",
}
FOLDERS = {".ci", "benchmarks", "datasets", "docs", "logs", "nets", "results", "tests", "utils"}
STANDARD = set(sys.stdlib_module_names)
# The sub-packages of utils, and which of the others each may import. All may import the plain
# modules above them.
PACKAGES = {
    "utils.data": set(),
    "utils.sampling": {"utils.data", "utils.checkpoint"},
    "utils.training": {"utils.data", "utils.sampling", "utils.checkpoint"},
    "utils.checkpoint": {"utils.training"},
    "utils.evaluate": {"utils.data", "utils.sampling", "utils.checkpoint"},
    "utils.convert": {"utils.checkpoint", "utils.training"},
}


# A command is no part of what others import: it may import checkpoints too.
COMMANDS = {"utils.report": {"utils.checkpoint"}}
# The declarations of settings name the choices of nets. No other module beside the commands does.
NAMES_CHOICES = "utils.training.settings_schema"


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_name(path, root):
    """utils/data/cache.py -> utils.data.cache.

    A package's __init__.py has the name of the package.
    """
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def read_modules(root, *folders):
    """{dotted name: path} of all modules below the folders, at any depth, and of the scripts."""
    paths = [path for folder in folders for path in (root / folder).rglob("*.py")]
    return {module_name(path, root): path for path in sorted(paths)}


def imports(path, name, modules, inside=True):
    """The dotted names that a module imports, in full; those within functions too, or not.

    `from utils import distributed` counts as utils.distributed where that is a module.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    nodes = list(ast.walk(tree(path)) if inside else tree(path).body)
    blocks = [node for node in nodes if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    for_checkers = {id(node) for block in blocks for node in ast.walk(block)}  # they are not imported at run time
    for node in (node for node in nodes if id(node) not in for_checkers):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join(filter(None, (*above, node.module)))
            parts = [f"{source}.{alias.name}" for alias in node.names]
            yield from (part if part in modules else source for part in parts)


def top(name):
    return name.split(".")[0]


def package_of(name):
    """The sub-package of utils that a module is in, "utils" for the plain modules, and the
    top-level name for all others.
    """
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "utils" and ".".join(parts[:2]) in PACKAGES else parts[0]


def is_command(name, modules):
    """Whether a module belongs to a command: `python -m` runs it, or the package that it is in."""
    flat = any(
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        for node in tree(modules[name]).body
    )
    return flat or any(
        f"{'.'.join(name.split('.')[:depth])}.__main__" in modules for depth in range(1, name.count(".") + 2)
    )


def opens_nets(name, modules):
    """Whether importing a module of utils imports nets."""
    return (
        top(name) == "utils"
        and name in modules
        and "nets" in map(top, imports(modules[name], name, modules, inside=False))
    )


def faults(root):
    """Every broken import rule in `root`, one line each."""
    modules = read_modules(root, "nets", "utils")
    graph = {name: sorted(set(imports(path, name, modules))) for name, path in modules.items()}
    found = []
    for name, targets in graph.items():
        for target in targets:
            if top(name) == "nets" and top(target) not in STANDARD | {"torch", "numpy", "nets"}:
                found.append(f"{name} imports {target}: nets knows torch and itself only")
            if top(name) == "utils" and top(target) in SCRIPTS | {"tests", "benchmarks", "docs"}:
                found.append(f"{name} imports {target}: utils knows no script")
            if (
                top(name) == "utils"
                and top(target) == "nets"
                and not is_command(name, modules)
                and name != NAMES_CHOICES
            ):
                found.append(f"{name} imports {target}: only commands import nets")
            opened = opens_nets(target, modules) and target != NAMES_CHOICES
            if top(name) == "utils" and opened and not is_command(name, modules):
                found.append(f"{name} imports {target}: nets would come in through a command")
            if (
                top(name) == "utils"
                and package_of(target) in PACKAGES
                and package_of(target)
                not in PACKAGES.get(package_of(name), set()) | COMMANDS.get(name, set()) | {package_of(name)}
            ):
                found.append(f"{name} imports {target}: {package_of(name)} may not know {package_of(target)}")
    return found + circles(
        {name: [target for target in targets if target in modules] for name, targets in graph.items()}
    )


def circles(graph):
    """A line for each module that reaches itself.

    A package's own __init__ does not count.
    """
    found = []
    for start in graph:
        seen, stack = set(), [target for target in graph[start] if target != start]
        while stack:
            name = stack.pop()
            if name not in seen:
                seen.add(name)
                stack += graph[name]
        if start in seen and start != top(start):
            found.append(f"{start} imports itself, by way of others")
    return found


def test_the_import_rules_hold():
    assert faults(PROJECT) == []


@pytest.mark.parametrize(
    "file, line, fault",
    [
        ("nets/unet.py", "import utils.files", "nets knows torch and itself only"),
        ("nets/deep/inner.py", "from PIL import Image", "nets knows torch and itself only"),
        ("utils/data/cache.py", "import train", "utils knows no script"),
        ("utils/data/cache.py", "def f():\n    from nets import build", "only commands import nets"),
        ("utils/deep/er/inner.py", "from nets.unet import UNet", "only commands import nets"),
        ("utils/training/run_files.py", "from utils.evaluate import __main__", "nets would come in through a command"),
        (
            "utils/training/run_files.py",
            "from utils.evaluate import features",
            "utils.training may not know utils.evaluate",
        ),
        ("utils/files.py", "from utils.data import cache", "utils may not know utils.data"),
        ("utils/data/cache.py", "from utils.training.run_files import x", "utils.data may not know utils.training"),
        ("utils/data/cache.py", "from utils.data import decode", "imports itself, by way of others"),
        ("utils/data/cache.py", "from .decode import x", "imports itself, by way of others"),
    ],
)
def test_each_broken_rule_is_seen(tmp_path, file, line, fault):
    """A small project of the same packages, sound but for one line."""
    sound = {
        "nets/unet.py": "import torch",
        "utils/files.py": "import os",
        "utils/data/decode.py": "from . import cache",
        "utils/data/cache.py": "import utils.files",
        "utils/training/run_files.py": "from utils.data import cache",
        "utils/evaluate/__main__.py": "from nets import unet",
        "utils/evaluate/features.py": "from utils.data.cache import x",
    }
    for name, text in {**sound, "utils/__init__.py": "", "utils/data/__init__.py": ""}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert faults(tmp_path) == []
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(f"{sound.get(file, '')}\n{line}\n")
    assert any(fault in found for found in faults(tmp_path)), faults(tmp_path)


def test_a_package_of_utils_is_in_the_layout():
    packages = {
        f"utils.{path.name}" for path in (PROJECT / "utils").iterdir() if path.is_dir() and any(path.glob("*.py"))
    }
    assert packages <= set(PACKAGES)


def test_torchvision_is_needed_for_downloads_alone():
    """The commonest broken installation has one that does not fit torch: it must cost no image."""
    modules = read_modules(PROJECT, "nets", "utils") | {name: PROJECT / f"{name}.py" for name in SCRIPTS}
    found = {name for name, path in modules.items() if "torchvision" in map(top, imports(path, name, modules))}
    assert found == {"utils.data.downloads"}
    path = modules["utils.data.downloads"]
    assert "torchvision" not in map(top, imports(path, "utils.data.downloads", modules, inside=False))


def test_each_package_says_what_it_is_for():
    """The __init__.py of a sub-package is one docstring: it exports nothing."""
    for path in (PROJECT / "utils").rglob("*/__init__.py"):
        body = tree(path).body
        assert ast.get_docstring(tree(path)) and len(body) == 1, path


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_scripts_do_nothing_when_imported(name):
    """They define: what they do stands under the last line's condition, and is one call."""
    body = tree(PROJECT / f"{name}.py").body
    allowed = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef, ast.Assign)
    assert isinstance(body[0], ast.Expr) and ast.get_docstring(tree(PROJECT / f"{name}.py"))
    assert [ast.unparse(node)[:60] for node in body[1:-1] if not isinstance(node, allowed)] == []
    assert ast.unparse(body[-1]).split("\n") == ["if __name__ == '__main__':", "    run_script(main)"]
    calls = {
        ast.unparse(node.func)
        for assign in body
        if isinstance(assign, ast.Assign)
        for node in ast.walk(assign)
        if isinstance(node, ast.Call)
    }
    assert calls <= {
        "whole",
        "number",
        "flag",
        "text",
        "pathname",
        "choice",
        "range",
        "dict.fromkeys",
    }  # declarations of settings


def test_scripts_do_not_import_each_other():
    for name in SCRIPTS:
        assert not {top(target) for target in imports(PROJECT / f"{name}.py", name, {})} & (
            SCRIPTS | {"tests", "benchmarks"}
        )


def test_top_level_holds_what_the_layout_names():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    tops = {name.split("/")[0] for name in listed.stdout.split("\0") if name}
    assert tops <= FILES | FOLDERS, "new at the top level: " + ", ".join(tops - FILES - FOLDERS)
    assert {"predict.py", "train.py", "txt_annotation.py", "nets", "utils", "datasets", "tests"} <= tops


def test_no_module_is_named_for_nothing():
    names = {part for name in read_modules(PROJECT, "nets", "utils") for part in name.split(".")[1:]}
    assert not names & {"utils", "misc", "helpers", "common", "tools"}


def reading_order():
    """The files of docs/reading.md's table, as dotted names in their order."""
    text = (PROJECT / "docs" / "reading.md").read_text(encoding="utf-8")
    files = []
    for line in text.splitlines():
        if re.match(r"\| \d+ \|", line):
            found = re.findall(r"`([\w/]+\.py)`", line)
            folder = found[0].rpartition("/")[0]
            files += [file if "/" in file or not folder else f"{folder}/{file}" for file in found]
    return [module_name(PROJECT / file, PROJECT) for file in files]


def test_the_reading_order_needs_nothing_that_comes_later():
    modules = read_modules(PROJECT, "nets", "utils") | {name: PROJECT / f"{name}.py" for name in SCRIPTS}
    order = reading_order()
    assert len(order) >= 12 and set(order) <= set(modules)
    for place, name in enumerate(order):
        later = set(imports(modules[name], name, modules)) & set(order[place + 1 :])
        assert not later, f"{name} imports {later}"


def test_the_reading_order_is_as_long_as_it_says():
    modules = read_modules(PROJECT, "nets", "utils") | {name: PROJECT / f"{name}.py" for name in SCRIPTS}
    total = sum(modules[name].read_text(encoding="utf-8").count("\n") for name in reading_order())
    for name in ("reading.md", "reading.zh-CN.md"):
        said = re.search(r"([\d,]+)\D{1,8}`wc -l`", (PROJECT / "docs" / name).read_text(encoding="utf-8"))[1]
        assert abs(total - int(said.replace(",", ""))) < 100, total


def test_copies_that_do_not_wait_are_for_cuda_alone():
    """Elsewhere a copy to the host may be read before it has come."""
    found = 0
    for path in [PROJECT / "train.py", PROJECT / "predict.py", *(PROJECT / "utils").rglob("*.py")]:
        source = path.read_text(encoding="utf-8")
        for function in (node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)):
            text = ast.get_source_segment(source, function)
            if "non_blocking=" in text:
                found += 1
                assert '"cuda"' in text, f"{path}: {function.name}"
    assert found >= 3
