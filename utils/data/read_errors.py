"""What an exception of reading an image file means: damage of the file, or a failing system."""

import errno
import struct
import zlib

from PIL import UnidentifiedImageError

from utils.errors import UserError, one_line

# Errors of the system that are about one file: it is gone, or may not be read.
ABOUT_THE_FILE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)


def is_damage(error):
    """Whether the file's content is the cause. Too little memory, EIO, EMFILE, ... may pass."""
    if isinstance(error, OSError):  # Pillow's own have no number
        return error.errno in (None, errno.EINVAL)  # EINVAL: the content names a place before the file's start
    return not isinstance(error, MemoryError)


def is_about_the_file(error):
    """Whether a failure concerns this file alone: it is damaged, gone, or may not be read."""
    return is_damage(error) or (isinstance(error, OSError) and error.errno in ABOUT_THE_FILE)


def describe_error(error):
    """Why an image file could not be decoded, in one line for the user."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture, or of an unknown format"  # Pillow's own text repeats the path
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    cause = error.__cause__ or error  # Pillow raises some again as SyntaxError
    bare = isinstance(error, LookupError) or isinstance(cause, (struct.error, EOFError, zlib.error))
    return f"damaged ({one_line(error)})" if bare else one_line(error)


def system_failure(path, error):
    """The UserError that ends a pass over many files. The file itself may be whole."""
    fault = f"{path} cannot be read now ({describe_error(error)}): see to the disk or the system and run this again"
    if isinstance(error, MemoryError):
        fault = f"out of memory while decoding {path}: lower num_workers, or end other programs"
    return UserError(f"{fault}; nothing was kept")
