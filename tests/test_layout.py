"""The house: which room imports which, what the top level holds, and that importing a script does nothing. Nothing is imported."""
import ast
import subprocess
import sys

import pytest
from conftest import PROJECT

SCRIPTS = {"txt_annotation", "train", "predict"}
FILES = {
    ".gitignore", "LICENSE", "README.md", "pyproject.toml", "requirements.txt", "predict.py", "train.py", "txt_annotation.py",
}  # fmt: skip
FOLDERS = {".ci", "benchmarks", "datasets", "docs", "logs", "nets", "results", "tests", "utils"}
STANDARD = set(sys.stdlib_module_names)


def modules(folder):
    return sorted((PROJECT / folder).glob("*.py"))


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path, inside=True):
    """The modules that a file imports, relative ones by their full name; those within functions too, or not."""
    package = path.parent.name
    for node in ast.walk(tree(path)) if inside else tree(path).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, (package if node.level else "", node.module)))
            yield module
            if module in ("nets", "utils"):  # from utils import distributed
                yield from (f"{module}.{alias.name}" for alias in node.names)


def packages(path, inside=True):
    return {name.split(".")[0] for name in imports(path, inside)}


def is_command(path):
    """Whether a module is to be run by itself: it does something under `if __name__ == "__main__"`."""
    return any(isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" for node in tree(path).body)


def test_networks_import_torch_and_themselves_only():
    for path in modules("nets"):
        foreign = packages(path) - STANDARD - {"torch", "numpy", "nets"}
        assert not foreign, f"{path.name} imports {foreign}"


def test_utilities_import_no_script_and_only_commands_import_networks():
    for path in modules("utils"):
        found = packages(path)
        assert not found & SCRIPTS, f"{path.name} imports a script"
        assert not found & {"tests", "benchmarks"}
        assert "nets" not in found or is_command(path), f"{path.name} is no command, and imports nets"


def test_networks_do_not_come_in_through_a_command():
    commands = {f"utils.{path.stem}" for path in modules("utils") if "nets" in packages(path, inside=False)}
    assert commands
    for path in modules("utils"):
        found = set(imports(path, inside=False)) & commands
        assert not found or is_command(path), f"{path.name} imports {found}"


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_scripts_do_nothing_when_imported(name):
    """They define: what they do stands under the last line's condition, and is one call."""
    body = tree(PROJECT / f"{name}.py").body
    allowed = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef, ast.Assign)
    assert isinstance(body[0], ast.Expr) and ast.get_docstring(tree(PROJECT / f"{name}.py"))
    assert [ast.unparse(node)[:60] for node in body[1:-1] if not isinstance(node, allowed)] == []
    assert ast.unparse(body[-1]).split("\n") == ["if __name__ == '__main__':", "    run_script(main)"]
    calls = [node for assign in body if isinstance(assign, ast.Assign) for node in ast.walk(assign) if isinstance(node, ast.Call)]
    assert calls == []


def test_top_level_holds_what_the_layout_names():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    tops = {name.split("/")[0] for name in listed.stdout.split("\0") if name}
    assert tops <= FILES | FOLDERS, "new at the top level: " + ", ".join(tops - FILES - FOLDERS)
    assert {"predict.py", "train.py", "txt_annotation.py", "nets", "utils", "datasets", "tests"} <= tops


def test_no_module_is_named_for_nothing():
    assert not {path.stem for folder in ("nets", "utils") for path in modules(folder)} & {"utils", "misc", "helpers", "common", "tools"}
