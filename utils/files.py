"""Files that are whole or not there: every writer of the project goes through `atomic_write`."""

import contextlib
import errno
import glob
import os
import secrets
import shutil
import stat
from pathlib import Path

from tqdm import tqdm

from utils.errors import UserError

PROJECT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def atomic_write(path, mode="wb", **open_arguments):
    """Open a file that appears under `path` only when the block has ended well.

    The bytes go to a temporary name, are flushed to the disk, and take the place of `path` in one
    step (`os.replace`): a kill, a crash or a full disk at any instant leaves the old file or the
    new one. A link stays: the file that it names is replaced. A device or a FIFO stays too: it is
    written to directly. OSError where nobody reads from a FIFO.
    """
    if is_stream(path):  # without O_NONBLOCK, opening a FIFO would wait for its reader
        flags = os.O_WRONLY | os.O_APPEND | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
        with open(os.open(path, flags), mode, **open_arguments) as file:
            with contextlib.suppress(OSError, AttributeError):
                os.set_blocking(file.fileno(), True)
            yield file
        return
    with _replacing(_behind_links(path)) as temporary, open(temporary, mode, **open_arguments) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def atomic_folder(path):
    """Yields an empty folder to fill. It takes the name `path` only when the block ends well.

    An empty folder of that name is replaced, a link to one stays. OSError for all else in the way.
    """
    path = _behind_links(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    with _replacing(path) as temporary:
        temporary.mkdir()
        yield temporary
        with contextlib.suppress(AttributeError):  # all files before the name: one call is cheaper than a flush of each
            os.sync()
        with contextlib.suppress(OSError):
            path.rmdir()


@contextlib.contextmanager
def _replacing(path):
    """Yields a temporary name in the folder of `path`. What the block makes of it becomes `path`.

    Missing folders are made. What the block raises is raised again, with the temporary removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: machines that share the folder may share process numbers too.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        _remove(temporary)
        raise
    with contextlib.suppress(OSError, AttributeError):  # the rename survives a power cut; Windows flushes no folders
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(path):
    """Deletes a file or a folder with all it holds, as far as the system lets it."""
    with contextlib.suppress(OSError):  # of the checks too, where a network drive is gone
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def begin_export(path):
    """Deletes what a killed export left beside `path`. ValueError unless that is new or empty."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is there already: choose another name, or move it away")
    remove_leftovers(path.parent, glob.escape(path.name))


def is_stream(path):
    """Whether `path` is a device, a FIFO, a socket, or this process's own output."""
    try:
        found = Path(path).stat()
    except (OSError, ValueError):
        return False
    if not stat.S_ISREG(found.st_mode):
        return not stat.S_ISDIR(found.st_mode)
    for descriptor in (1, 2):  # /dev/stdout names a file after `> file`: a new file there would hide what is printed
        with contextlib.suppress(OSError):
            if os.path.samestat(found, os.fstat(descriptor)):
                return True
    return False


def _behind_links(path):
    """The Path that a chain of links leads to, even to nothing. OSError for a circle."""
    if not os.path.islink(path):
        return Path(path)
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return target


def remove_leftovers(folder, name="*"):
    """Deletes what killed writers left of `name` in `folder`. A living one would lose its work."""
    for temporary in Path(folder).glob(f".{name}.{'[0-9a-f]' * 8}.tmp"):
        _remove(temporary)


@contextlib.contextmanager
def locked(folder, refusal):
    """Locks the folder while this process is in the block. ValueError(refusal): another one is."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(Path(folder) / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(refusal) from None
        except OSError:  # some file systems have no locks
            pass
        yield


class TolerantWriter:
    """Writes to a run's folder that may fail. Training continues; its end looks into `failed`."""

    def __init__(self, folder):
        self.folder, self.gone = folder, False
        self.failed = set()  # names whose last write failed

    def __call__(self, name, write):
        """Calls write(). Returns whether the system let it; says so where it did not."""
        self.failed.add(name)
        gone_before, self.gone = self.gone, not self.folder.is_dir()  # `atomic_write` would make it again
        if self.gone:
            if not gone_before:
                tqdm.write(
                    f"NOT SAVED: {self.folder} was removed or renamed; training continues, and saves once it is back"
                )
            return False
        try:
            write()
        except OSError as error:
            reason = error if error.filename else f"{name}: {error}"
            tqdm.write(f"NOT SAVED: {reason}; training continues, and the next save tries again")
            return False
        self.failed.discard(name)
        return True
