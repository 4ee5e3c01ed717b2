"""Every command of the project: --help, and the refusal of an option that it does not have."""

import ast
import runpy
import sys

import pytest
from conftest import PROJECT

# A module may be imported already when it runs as the main one: it runs again.
pytestmark = pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")
IGNORED = {"tests", "datasets", "logs", "results", "build", "venv"}  # tests/ has tools of its own


def find_commands():
    """{the command as it is typed: its path} of all files with `if __name__ == "__main__"`."""
    found = {}
    for path in sorted(PROJECT.rglob("*.py")):
        parts = path.relative_to(PROJECT).with_suffix("").parts
        if parts[0] in IGNORED or parts[0].startswith("."):
            continue
        nodes = ast.parse(path.read_text(encoding="utf-8")).body
        if any(isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" for node in nodes):
            module = ".".join(parts).removesuffix(".__main__")
            found[f"python -m {module}" if len(parts) > 1 else f"python {path.name}"] = path
    return found


COMMANDS = find_commands()


def run_command(command, monkeypatch, *arguments):
    """The exit code of a command that runs in this process, as the main module."""
    monkeypatch.setattr(sys, "argv", ["replaced by runpy", *arguments])
    try:
        if command.startswith("python -m "):
            runpy.run_module(command.removeprefix("python -m "), run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(COMMANDS[command]), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0


def test_all_commands_are_found():
    scripts = {"python train.py", "python predict.py", "python txt_annotation.py"}
    modules = {"utils.evaluate", "utils.convert", "utils.report", "docs.figures", "docs.fine_tuning"}
    benchmarks = {"solvers", "ablations", "speed", "scale", "recipes", "quality", "time_to_quality", "denoisers"}
    modules |= {f"benchmarks.{name}" for name in benchmarks}
    assert scripts | {f"python -m {module}" for module in modules} <= COMMANDS.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_command_does_and_how_it_is_typed(command, monkeypatch, capsys):
    assert run_command(command, monkeypatch, "--help") == 0
    out, err = capsys.readouterr()
    docstring = ast.get_docstring(ast.parse(COMMANDS[command].read_text(encoding="utf-8")))
    assert docstring.splitlines()[0] in out and command in out and err == ""
    usages = [line for line in out.splitlines() if line.startswith("usage: ")]
    assert all(line.startswith(f"usage: {command} ") for line in usages), usages


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_ends_a_command_before_it_does_anything(command, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run_command(command, monkeypatch, "--nothing", "1") in (1, 2)
    out, err = capsys.readouterr()
    assert out == "" and "error: " in err.splitlines()[-1] and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
