"""Files are whole or not there: every system call of `atomic_write` is made to fail, and to be the
last one before a kill.
"""

import errno
import os
import re
import resource
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import read_file

from utils import files as atomic
from utils.checkpoint.integrity import save_tensors
from utils.errors import UserError
from utils.files import atomic_folder, atomic_write, locked, output_folder, read_json, remove_leftovers, resolve_output

OLD, NEW = b"old" * 1000, b"new" * 50_000
CALLS = ("open", "write", "fsync", "replace", "close")


class Faulty:
    """Counts the system calls below `atomic_write` and lets `fault` happen before or after the one
    that is wanted.
    """

    def __init__(self, wanted, when, fault):
        self.left, self.when, self.fault = wanted, when, fault

    def wrap(self, function):
        def call(*arguments, **options):
            self.left -= 1
            if self.left == 0 and self.when == "before":
                self.fault()
            result = function(*arguments, **options)
            if self.left == 0 and self.when == "after":
                self.fault()
            return result

        return call


def use_raw_calls(patch, faulty):
    """Have `atomic_write` write through os.open, os.write and os.fsync, unbuffered, so that each
    call can be hit.
    """

    class File:
        def __init__(self, path, mode):
            self.descriptor = faulty.wrap(os.open)(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            faulty.wrap(os.close)(self.descriptor)

        def write(self, content):
            for start in range(0, len(content), 40_000):
                faulty.wrap(os.write)(self.descriptor, content[start : start + 40_000])

        def flush(self):
            pass

        def fileno(self):
            return self.descriptor

    patch.setattr(atomic, "open", File, raising=False)
    patch.setattr(atomic.os, "fsync", faulty.wrap(os.fsync))
    patch.setattr(atomic.os, "replace", faulty.wrap(os.replace))


def write(path, content=NEW):
    with atomic_write(path) as file:
        file.write(content)


def count_calls(folder, monkeypatch):
    faulty = Faulty(10**9, "before", None)
    with monkeypatch.context() as patch:
        use_raw_calls(patch, faulty)
        write(folder / "counted")
    return 10**9 - faulty.left


def test_the_faults_cover_every_call(tmp_path, monkeypatch):
    # open, four writes, fsync, close, replace, fsync of the folder
    assert count_calls(tmp_path, monkeypatch) == 9
    assert (tmp_path / "counted").read_bytes() == NEW


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("wanted", range(1, 10))
def test_a_kill_at_any_call_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch, wanted, when):
    path = tmp_path / "file"
    path.write_bytes(OLD)
    child = os.fork()
    if child == 0:
        use_raw_calls(monkeypatch, Faulty(wanted, when, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        write(path)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    replaced = wanted > 8 or (wanted == 8 and when == "after")
    assert path.read_bytes() == (NEW if replaced else OLD)
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("wanted", range(1, 9))
def test_a_full_disk_at_any_call_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, wanted, when):
    path = tmp_path / "file"
    path.write_bytes(OLD)

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        use_raw_calls(patch, Faulty(wanted, when, full))
        with pytest.raises(OSError, match="No space left"):
            write(path)
    assert path.read_bytes() == (NEW if (wanted, when) == (8, "after") else OLD)
    if (wanted, when) != (1, "after"):  # an open that fails after the fact leaves a name that nobody knows of
        assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(("mode", "content"), [("wb", b"few bytes"), ("w", "a line\n")])
def test_all_bytes_are_on_the_disk_before_the_name(tmp_path, monkeypatch, mode, content):
    """Few bytes wait in Python's own buffer, which fsync knows nothing of, unless it is flushed."""
    calls, fsync, replace = [], os.fsync, os.replace

    def recorded_fsync(descriptor):
        found = os.fstat(descriptor)
        calls.append(("fsync", found.st_size) if stat.S_ISREG(found.st_mode) else "fsync of the folder")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    with atomic_write(tmp_path / "file", mode) as file:
        file.write(content)
    assert calls == [("fsync", len(content)), "replace", "fsync of the folder"]


def test_an_error_inside_the_block_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_bytes(OLD)
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "file") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert (tmp_path / "file").read_bytes() == OLD
    assert os.listdir(tmp_path) == ["file"]


def write_folder(path):
    with atomic_folder(path) as folder:
        for name in ("a", "b"):
            (folder / name).write_bytes(NEW)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["sync", "replace"])
@pytest.mark.parametrize("kill", [True, False])
def test_a_folder_is_whole_or_not_there(tmp_path, monkeypatch, name, when, kill):
    """Whatever happens at its two system calls, a kill or a full disk, before or after them."""
    path = tmp_path / "folder"
    path.mkdir()  # an empty one gives way

    def fault():
        if kill:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(atomic.os, name, Faulty(1, when, fault).wrap(getattr(os, name)))
        try:
            write_folder(path)
        except OSError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (-signal.SIGKILL if kill else 7)
    whole = (name, when) == ("replace", "after")
    assert sorted(os.listdir(path)) == ["a", "b"] if whole else not path.exists() or os.listdir(path) == []
    if whole or not kill:
        assert [entry for entry in os.listdir(tmp_path) if entry != "folder"] == []
    if not whole:
        write_folder(path)  # what a kill left is in nobody's way
    assert all((path / entry).read_bytes() == NEW for entry in ("a", "b"))


def test_a_folder_that_is_in_the_way_stays(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_bytes(OLD)
    with pytest.raises(OSError):
        write_folder(tmp_path / "folder")
    assert os.listdir(tmp_path / "folder") == ["mine"] and os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_only_what_killed_writers_left_is_removed(tmp_path, kind):
    """A living writer, of another process, keeps its file; a foreign name is nobody's leftover."""
    foreign = [".x.tmp", ".x.0123456.tmp", "x.01234567.tmp", ".y.01234567.tmp", ".x.0123456g.tmp"]
    for name in foreign:
        (tmp_path / name).write_bytes(OLD)
    ready = os.pipe()
    child = os.fork()
    if child == 0:
        with atomic_folder(tmp_path / "x") if kind == "folder" else atomic_write(tmp_path / "x") as entry:
            (entry / "a").write_bytes(NEW) if kind == "folder" else entry.write(NEW)
            os.write(ready[1], b".")
            signal.pause()
        os._exit(0)
    os.read(ready[0], 1)
    remove_leftovers(tmp_path, "x")
    before = os.listdir(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    remove_leftovers(tmp_path, "x")
    assert len(before) == len(foreign) + 1
    assert sorted(os.listdir(tmp_path)) == sorted(foreign)


# Links, devices and pipes


@pytest.mark.parametrize("target", ["there", "not there", "a folder"])
def test_a_link_at_a_fixed_name_is_replaced(tmp_path, target):
    """A folder from someone else cannot redirect a write: what the link names stays as it was."""
    real, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to("real")
    if target == "there":
        real.write_bytes(OLD)
    elif target == "a folder":
        real.mkdir()
    write(link)
    assert not link.is_symlink() and link.read_bytes() == NEW
    if target == "there":
        assert real.read_bytes() == OLD
    elif target == "a folder":
        assert os.listdir(real) == []
    else:
        assert not real.exists()


@pytest.mark.parametrize("target", ["there", "not there", "in a new folder"])
@pytest.mark.parametrize("links", [1, 2])
def test_a_link_that_the_user_typed_is_followed(tmp_path, target, links):
    """The link stays, its target is replaced whole, and the old content survives an error."""
    real = tmp_path / ("new/real" if target == "in a new folder" else "real")
    link = real
    for number in range(links):
        link, link_to = tmp_path / f"link{number}", link
        link.symlink_to(os.path.relpath(link_to, tmp_path))
    if target == "there":
        real.write_bytes(OLD)
    with pytest.raises(ZeroDivisionError), atomic_write(resolve_output(link)) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert real.read_bytes() == OLD if target == "there" else not real.exists()
    write(resolve_output(link))
    assert link.is_symlink() and not real.is_symlink() and real.read_bytes() == link.read_bytes() == NEW
    assert [name for name in (*os.listdir(tmp_path), *os.listdir(real.parent)) if name.endswith(".tmp")] == []


def test_a_circle_of_links_gives_way_to_the_file(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    write(resolve_output(tmp_path / "a"))
    assert sum((tmp_path / name).is_symlink() for name in ("a", "b")) == 1
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == NEW


@pytest.fixture(params=["pipe", "socket", "device"])
def special(request, tmp_path, monkeypatch):
    """A path of no file. The device is one of its own, with the numbers of the null device."""
    path = tmp_path / request.param
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "socket":
        monkeypatch.chdir(tmp_path)  # names of sockets are short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    else:
        try:
            os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("only root may make devices, and not in every container")
    return path


@pytest.mark.parametrize("through_a_link", [False, True])
def test_what_is_no_file_is_refused_and_stays(tmp_path, special, through_a_link):
    path = tmp_path / "link" if through_a_link else special
    if through_a_link:
        path.symlink_to(special.name)
    before = os.lstat(special)
    refusal = f"{path} is a device, a pipe, a socket"
    for attempt in (resolve_output, write, lambda path: save_tensors(path, {"weights": {}})):
        with pytest.raises(UserError, match=re.escape(refusal)):
            attempt(path)
    with pytest.raises(UserError, match="choose another folder"):
        write_folder(path)
    assert os.path.samestat(os.lstat(special), before)
    assert sorted(os.listdir(tmp_path)) == sorted({special.name, path.name})


@pytest.mark.skipif(not Path("/proc/self/fd/1").exists(), reason="names of open files need /proc")
@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_the_processes_own_output(tmp_path, kind):
    """Named as a file, as `/dev/stdout` does: what is printed before and after is not lost."""
    script = (
        "from utils.files import atomic_write\nprint('before', flush=True)\n"
        "try:\n    with atomic_write('/proc/self/fd/1'):\n        pass\nexcept ValueError as error:\n    print(error)"
    )
    options = {"cwd": Path(__file__).resolve().parent.parent, "check": True, "text": True}
    if kind == "pipe":
        printed = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, **options).stdout
    else:
        with open(tmp_path / "out", "a") as file:
            subprocess.run([sys.executable, "-c", script], stdout=file, **options)
        printed = (tmp_path / "out").read_text()
    before, refusal = printed.splitlines()
    assert (
        before == "before" and refusal.startswith("/proc/self/fd/1 is a device, a pipe") and "choose a file" in refusal
    )


def test_a_folder_behind_a_link(tmp_path):
    """As for files: the link stays where the user typed it, and is never followed elsewhere."""
    (tmp_path / "real").mkdir()
    for name, target in (("link", "real"), ("dangling", "later")):
        (tmp_path / name).symlink_to(target)
        with pytest.raises(UserError, match="is a file or a link"):
            write_folder(tmp_path / name)
        write_folder(resolve_output(tmp_path / name))
        assert (tmp_path / name).is_symlink() and sorted(os.listdir(tmp_path / target)) == ["a", "b"]
    assert sorted(os.listdir(tmp_path)) == ["dangling", "later", "link", "real"]


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("../elsewhere"), os.mkfifo])
def test_the_lock_of_a_run_is_no_link_and_no_pipe(tmp_path, make):
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / ".lock")
    with locked(tmp_path / "run", "busy"):
        pass
    assert not (tmp_path / "elsewhere").exists() and (tmp_path / "run" / ".lock").is_file()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"a": [1]}', {"a": [1]}),
        ("\ufeff{}".encode(), {}),
        (b"[1]", None),
        (b"{", None),
        (b"\xff\xfe\xff", None),
        (b"[" * 100_000, None),
        (b"", None),
    ],
)
def test_json_of_settings(tmp_path, content, expected):
    (tmp_path / "file.json").write_bytes(content)
    assert read_json(tmp_path / "file.json") == expected
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for a writer
    assert [read_json(tmp_path / name) for name in ("", "missing", "pipe")] == [None, None, None]


def test_a_checkpoint_that_does_not_fit_the_disk_is_an_oserror(tmp_path):
    """The limit on a file's size stands for a full disk: the write fails in the middle of
    PyTorch's own writer.
    """
    path = tmp_path / "last.pth"
    save_tensors(path, {"weights": {"x": torch.zeros(3)}})
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save_tensors(path, {"weights": {"x": torch.zeros(1_000_000)}})
        except OSError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert read_file(path)["weights"]["x"].shape == (3,)
    assert os.listdir(tmp_path) == ["last.pth"]


def test_every_writer_goes_through_atomic_write():
    """No module opens a file for writing by itself, or lets a library do so by name."""
    project = Path(__file__).resolve().parent.parent
    sources = [*project.glob("*.py"), *project.glob("utils/**/*.py"), *project.glob("nets/*.py")]
    assert len(sources) > 20
    banned = (
        r"\.write_text\(",
        r"\.write_bytes\(",
        r"torch\.save\(checkpoint, path",
        r'\.savefig\("',
        r"np\.savez?\((?!file, )",
    )  # an open file is atomic_write's
    found = [
        (path.name, word) for path in sources for word in banned if re.search(word, path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_a_pipe_in_place_of_a_lock_or_a_json_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    os.mkfifo(tmp_path / "config.json")
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(120)
    try:
        assert read_json(tmp_path / "config.json") is None
        with locked(tmp_path, "taken"):
            assert (tmp_path / ".lock").is_file()
            with pytest.raises(UserError, match="taken"), locked(tmp_path, "taken"):
                pass
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def test_folders_of_others_in_an_output_folder_are_no_obstacle(tmp_path):
    (tmp_path / "old_results.2024").mkdir()
    with output_folder(tmp_path) as folder:
        assert folder == tmp_path.resolve()
    (tmp_path / "predict_results.png").mkdir()
    with pytest.raises(UserError, match="predict_results.png is no file"), output_folder(tmp_path):
        pass
