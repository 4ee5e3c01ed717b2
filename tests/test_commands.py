"""Every command of the project: --help, and the refusal of an option that it does not have."""

import ast
import re
import runpy
import sys

import pytest
from conftest import PROJECT

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
    with pytest.raises(SystemExit) as end:
        if command.startswith("python -m "):
            runpy.run_module(command.removeprefix("python -m "), run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(COMMANDS[command]), run_name="__main__")
    return end.value.code


def test_all_commands_are_found():
    scripts = {"python train.py", "python predict.py", "python txt_annotation.py"}
    modules = {
        "utils.evaluate",
        "utils.convert",
        "utils.report",
        "docs.figures",
        "docs.fine_tuning",
        "benchmarks.speed",
    }
    assert scripts | {f"python -m {module}" for module in modules} <= COMMANDS.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_command_and_says_what_it_does(command, monkeypatch, capsys):
    assert run_command(command, monkeypatch, "--help") == 0
    out, err = capsys.readouterr()
    assert re.search(rf"^usage: {re.escape(command)}( |$)", out, flags=re.M) and err == ""
    docstring = ast.get_docstring(ast.parse(COMMANDS[command].read_text(encoding="utf-8")))
    assert docstring.splitlines()[0] in out


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_is_refused_in_one_line(command, monkeypatch, capsys):
    assert run_command(command, monkeypatch, "--nothing", "1") == 1
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"error: .*--nothing.*\n", err)
