"""Files that are whole or not there: every writer of the project goes through `atomic_write`."""

import contextlib
import glob
import json
import os
import secrets
import shutil
import tempfile
from pathlib import Path

from tqdm import tqdm

from utils.errors import UserError

PROJECT = Path(__file__).resolve().parent.parent
HELD = set()  # folders that this process has locked: where one was removed or renamed, no writer makes it again


def resolve_output(path):
    """The Path to write to for one that the user typed: links are followed, even to nothing."""
    if os.path.exists(path):
        own = any(os.path.samestat(os.stat(path), os.fstat(descriptor)) for descriptor in (1, 2))
        if own or not (os.path.isfile(path) or os.path.isdir(path)):
            raise UserError(f"{path} is a device, a pipe, a socket or this program's own output: choose a file")
    return Path(os.path.realpath(path))


@contextlib.contextmanager
def atomic_write(path, mode="wb", **open_arguments):
    """Open a file that takes the name `path` only when the block has ended well.

    A kill or a full disk at any instant leaves the old file or the new one. A link of that name is
    replaced, so nobody can redirect a write: what the user typed goes through `resolve_output`.
    """
    resolve_output(path)
    with _replacing(Path(path)) as temporary, open(temporary, mode, **open_arguments) as file:
        _lock(file.fileno())
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def atomic_folder(path):
    """Yield an empty folder that takes the name `path` only when the block has ended well."""
    if os.path.islink(path) or os.path.exists(path) and not os.path.isdir(path):
        raise UserError(f"{path} is a file or a link: choose another folder")
    with _replacing(Path(path)) as temporary, contextlib.ExitStack() as stack:
        temporary.mkdir()
        with contextlib.suppress(OSError):  # Windows opens no folders
            _lock(stack.enter_context(_opened(temporary)))
        yield temporary
        if hasattr(os, "sync"):  # all files before the name: one call is cheaper than a flush of each
            os.sync()
        with contextlib.suppress(OSError):  # Windows replaces no folder
            os.rmdir(path)


@contextlib.contextmanager
def _replacing(path):
    """Yield a temporary name in the folder of `path`. What the block makes of it becomes `path`."""
    if path.parent not in HELD:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(temporary_name(path.name))
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        _remove(temporary)
        raise
    with contextlib.suppress(OSError), _opened(path.parent) as descriptor:
        os.fsync(descriptor)  # the rename survives a power cut


def temporary_name(name):
    """A name of its own for what becomes `name`, as `remove_leftovers` knows it."""
    # No process number: machines that share the folder may share these too.
    return f".{name}.{secrets.token_hex(4)}.tmp"


@contextlib.contextmanager
def _opened(path):
    """A descriptor of a file or a folder. OSError: there is none, as for folders on Windows."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait for a writer
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor, kind="LOCK_EX"):
    """Lock what is open, until it is closed. False: another process has locked it."""
    try:
        import fcntl

        fcntl.flock(descriptor, getattr(fcntl, kind) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows, and file systems without locks
        pass
    return True


def _remove(path):
    try:
        path.unlink()
    except OSError:
        shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(folder, name="*"):
    """Delete what killed writers left of `name`, a pattern, in a folder. Living ones hold locks."""
    for temporary in Path(folder).glob(f".{name}.{'[0-9a-f]' * 8}.tmp"):
        with contextlib.suppress(OSError), _opened(temporary) as descriptor:
            if not _lock(descriptor, "LOCK_SH"):  # NFS locks what is open for reading in no other way
                continue
        _remove(temporary)


def begin_export(path):
    """`path`, resolved. UserError unless it is new or empty. What a killed export left goes."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is there already: choose another name, or move it away")
    remove_leftovers(path.parent, glob.escape(path.name))
    return resolve_output(path)


def read_json(path):
    """The dict in a JSON file; None where it is missing, damaged, or holds something else."""
    try:
        found = json.loads(Path(path).read_bytes()) if os.path.isfile(path) else None  # a pipe would never end
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


@contextlib.contextmanager
def locked(folder, refusal):
    """Lock the folder while this process is in the block. UserError(refusal): another one is."""
    path = Path(folder) / ".lock"
    if path.is_symlink() or path.is_fifo():  # opening a pipe would wait for a reader
        path.unlink()
    with open(path, "a") as file:
        if not _lock(file.fileno()):
            raise UserError(refusal)
        HELD.add(path.parent)
        try:
            yield
        finally:
            HELD.discard(path.parent)


@contextlib.contextmanager
def output_folder(path, *names):
    """The folder that the user typed, made, and locked while the block runs: two would mix files.

    names: patterns of what is written there. What killed writers left of them goes. UserError: the
    results cannot be written, said before the work, or another process writes to the folder.
    """
    folder = Path(os.path.realpath(path))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror}): choose another --save_dir") from None
    fixed = [*folder.glob("predict_*results.*"), *folder.glob("evaluate_*results.*")]
    if blocked := [path for path in fixed if path.exists() and not path.is_file()]:
        raise UserError(f"{blocked[0]} is no file: move it away, or choose another --save_dir")
    with locked(folder, f"another process writes to {folder}: wait for its end, or choose another --save_dir"):
        for name in names:
            remove_leftovers(folder, name)
        yield folder


class TolerantWriter:
    """Writes to a run's folder that may fail. Training continues; its end looks into `failed`."""

    def __init__(self, folder):
        self.folder, self.failed = folder, set()  # names whose last write failed

    def __call__(self, name, write):
        """Calls write(). Returns whether the system let it; says so where it did not."""
        self.failed.add(name)
        try:
            if not self.folder.is_dir():
                raise OSError(f"{self.folder} was removed or renamed")
            write()
        except (OSError, UserError) as error:
            tqdm.write(f"NOT SAVED: {name}: {error}; training continues, and the next save tries again")
            return False
        self.failed.discard(name)
        return True
