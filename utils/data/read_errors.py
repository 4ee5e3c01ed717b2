"""What an exception of reading an image file means: damage of the file, or a failing system."""

import errno

from utils.errors import UserError, one_line

# Errors of the system that are about one file: it is gone, or may not be read.
ABOUT_THE_FILE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)


def is_damage(error):
    """Whether the file's content is the cause. Too little memory, EIO, EACCES, ... may pass."""
    if isinstance(error, OSError):  # Pillow's own have no number
        return error.errno in (None, errno.EINVAL)  # EINVAL: the content names a place before the file's start
    return not isinstance(error, MemoryError)


def is_about_the_file(error):
    """Whether a failure concerns this file alone: it is damaged, gone, or may not be read."""
    return is_damage(error) or getattr(error, "errno", None) in ABOUT_THE_FILE


def attempt(read, path, is_bad=is_about_the_file):
    """(read(path), None), or (None, reason) for a bad file. UserError where the system fails."""
    try:
        return read(path), None
    except Exception as error:  # Pillow's decoders raise all kinds
        if is_bad(error):
            return None, describe_error(error)
        fault = f"{path} cannot be read now ({describe_error(error)})"
        raise UserError(f"{fault}: see to the system, or lower num_workers, and run this again") from error


def describe_error(error):
    """Why an image file could not be decoded, in one line for the user."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError):
        return "out of memory"
    return getattr(error, "strerror", None) or f"damaged ({one_line(error)})"
