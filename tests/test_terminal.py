"""What scripts print: no name, terminal or missing stream ends them."""

import io
import os
import subprocess
import sys

import pytest
from conftest import ENVIRONMENT, PROJECT, TINY, command, newest_run, read_file, run, write_pictures

from utils.terminal import SafeStream, as_command


class Pipe(io.StringIO):
    """A stream whose reader leaves after `takes` writes."""

    encoding = "utf-8"

    def __init__(self, takes):
        super().__init__()
        self.takes = takes

    def write(self, text):
        if not self.takes:
            raise BrokenPipeError(32, "Broken pipe")
        self.takes -= 1
        return super().write(text)


@pytest.mark.parametrize(
    ("system", "path", "shown"),
    [
        ("posix", "logs/a-b_1.pth", "logs/a-b_1.pth"),
        ("posix", "my runs/$a", "'my runs/$a'"),
        ("nt", r"C:\runs\a-b.pth", r"C:\runs\a-b.pth"),
        ("nt", "C:\\R&D runs\\mine", r'"C:\R&D runs\mine"'),
    ],
)
def test_a_command_is_quoted_for_the_shell_of_the_system(monkeypatch, system, path, shown):
    with monkeypatch.context() as patch:
        patch.setattr("os.name", system)
        command = as_command("python", "train.py", "--resume", path)
    assert command == f"python train.py --resume {shown}"


@pytest.mark.parametrize(("encoding", "accent"), [("cp1252", "é"), ("ascii", r"\xe9"), ("utf-8", "é")])
@pytest.mark.parametrize("clean", [True, False])
def test_a_stream_shows_what_it_cannot_encode_and_no_control_characters(encoding, accent, clean):
    raw = io.BytesIO()
    stream = SafeStream(io.TextIOWrapper(raw, encoding=encoding, newline=""), clean)
    stream.write("é 猫 \udce9 \x1b[31mred\x9b0m\ttab\n" if clean else "é 猫 \udce9 \x1b[31m\r\ttab\n")
    stream.flush()
    cat = "猫" if encoding == "utf-8" else r"\u732b"
    rest = "\\x1b[31mred\\x9b0m\ttab\n" if clean else "\x1b[31m\r\ttab\n"  # progress bars move the cursor
    assert raw.getvalue().decode(encoding) == rf"{accent} {cat} \udce9 " + rest


def test_a_reader_that_leaves_ends_the_output_only():
    pipe = Pipe(takes=1)
    stream = SafeStream(pipe, clean=False)
    for text in ("one", "two", "three"):
        assert stream.write(text) == len(text)
    stream.flush()
    assert pipe.getvalue() == "one"


def start(arguments, cwd, **options):
    environment = {**ENVIRONMENT, **options.pop("env", {})}
    return subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, timeout=240, **options)


def test_names_that_the_terminal_lacks(tmp_path):
    """A folder, classes and files whose names cp1252 and ASCII cannot show, in a project of such a
    name.
    """
    project = tmp_path / "猫proj"
    project.mkdir()
    write_pictures(project / "datasets", count=4)
    (project / "datasets" / "even").rename(project / "datasets" / "猫\x1b[31m")
    os.rename(os.fsencode(project / "datasets" / "odd"), os.fsencode(project / "datasets") + b"/\xe9\xff")
    for variables in (
        {"PYTHONIOENCODING": "cp1252"},
        {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ):
        done = start(command("txt_annotation.py"), project, env=variables)
        assert done.returncode == 0, done.stderr
        assert b"2 classes" in done.stdout and b"\x1b" not in done.stdout and b"Traceback" not in done.stderr


def test_a_missing_stderr_and_a_closed_pipe(tmp_path):
    write_pictures(tmp_path / "datasets")
    run(command("txt_annotation.py"), tmp_path)
    training = " ".join(command("train.py", *TINY, "--epochs", "2")).replace("()", "'()'")
    done = subprocess.run(
        ["bash", "-c", f"{training} 2>&- | head -n 1"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, timeout=240
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert read_file(newest_run(tmp_path) / "last.pth")["position"]["epoch"] == 2


def test_a_reader_that_left_before_the_first_line_ends_no_script_with_an_error(tmp_path):
    """What is printed waits in a buffer: the last flush is Python's own, at exit."""
    script = "from utils.errors import run_script\nrun_script(lambda: print('done'))"
    end, pipe = os.pipe()
    os.close(end)
    options = {"cwd": PROJECT, "env": {**os.environ, "PYTHONUNBUFFERED": ""}, "stderr": subprocess.PIPE, "timeout": 60}
    done = subprocess.run([sys.executable, "-c", script], stdout=pipe, **options)
    os.close(pipe)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to a process")
def test_ctrl_c_during_the_imports_is_one_word():
    script = (
        "import runpy, sys, threading, _thread\n"
        "class Slow:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': raise KeyboardInterrupt\n"
        f"sys.meta_path.insert(0, Slow()); sys.path.insert(0, {str(PROJECT)!r})\n"
        f"sys.argv = ['train.py']; runpy.run_path({str(PROJECT / 'train.py')!r}, run_name='__main__')\n"
    )
    done = start([sys.executable, "-c", script], PROJECT)
    assert done.returncode != 0 and done.stderr.strip().endswith(b"stopped") and b"Traceback" not in done.stderr
