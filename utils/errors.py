"""How a script ends: a user's mistake as one line, memory that runs out with advice, a mistake of ours as a traceback."""

import contextlib
import sys
import traceback
from pathlib import Path

from utils.files import PROJECT

NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # PyTorch's words, for GPUs, Linux and Windows


def run_script(main):
    """Run a script: a user's mistake is one line on stderr and exit code 1, a mistake of ours a traceback.

    The user's are the ValueErrors that this project raises itself, the system's refusals (OSError), and too little memory.
    """
    try:
        main()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        line = _for_user(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(1) from None


def _for_user(error):
    """What to tell the user in one line; None for a mistake of ours."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}; check this path, or name another"
    if isinstance(error, OSError) or (isinstance(error, ValueError) and _raised_here(error)):
        return _line(error)
    if isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY):
        return "out of memory: lower --batch_size, or the size of the pictures or of the network"
    return None


def _line(error):
    return " ".join(str(error).splitlines())


def _raised_here(error):
    """Whether it was raised by a line of this project itself, rather than by a library that it calls."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    return PROJECT in raised_in.parents and "site-packages" not in raised_in.parts


def is_out_of_memory(error):
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY))


@contextlib.contextmanager
def explain_out_of_memory(advice):
    """Turns running out of memory within into a ValueError for the user; advice() says what to lower, with the memory freed again."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the step that failed
        import torch  # here: listing images needs none of it

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise ValueError(f"out of memory: {advice()}") from None
