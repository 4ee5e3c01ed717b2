"""How a script ends: the user's mistake in one line, ours as a traceback; memory that runs out."""

import contextlib
import sys
import traceback

from utils.terminal import printable, safe_output

# PyTorch's words: for GPUs, Linux, Windows, cuBLAS.
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
# Of cuDNN and cuBLAS for that, and for other faults.
MAYBE_NO_MEMORY = ("CUDNN_STATUS_INTERNAL_ERROR", "nable to find an engine", "CUBLAS_STATUS_NOT_INITIALIZED")
FULL = 0.02  # fraction of a GPU's memory that is free when these words mean its end


class UserError(ValueError):
    """What the user can mend. Its text is one line that says what to do."""

    for_user = True  # nets' SettingError has it too, as `nets` and `utils` do not import each other


def run_script(main):
    """Runs a script. The user's mistake is one line on stderr and exit code 1, ours a traceback."""
    with safe_output():
        try:
            main()
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            raise SystemExit(130) from None
        except Exception as error:
            if not (message := user_message(error)):
                raise
            print(f"error: {printable(' '.join(message.splitlines()))}", file=sys.stderr)
            raise SystemExit(1) from None


def user_message(error):
    """The text for the user of what the user can mend; None for a mistake of ours."""
    if is_out_of_memory(error):
        return "out of memory: lower --batch_size, or the size of the images or of the network"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}; check this path, or name another"
    return str(error) if isinstance(error, OSError) or getattr(error, "for_user", False) else None


def one_line(error, limit=160):
    """The text of an exception in one line of at most `limit` characters, else its type."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def is_out_of_memory(error):
    """Whether this is Python's or PyTorch's word for it, on any device."""
    text = str(error) if isinstance(error, RuntimeError) else ""
    if any(words in text for words in MAYBE_NO_MEMORY):
        import torch  # here: listing images does without it

        with contextlib.suppress(RuntimeError):  # of a driver that no longer answers
            free, total = torch.cuda.mem_get_info()
            return free < FULL * total
    return isinstance(error, MemoryError) or any(words in text for words in NO_MEMORY)


@contextlib.contextmanager
def explain_out_of_memory(advice):
    """Turns memory that runs out in the block into a UserError with advice(): what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the step that failed
        import torch

        torch.cuda.empty_cache()  # it does nothing without a GPU
        raise UserError(f"out of memory: {advice()}") from None


def try_optional(package, work, load):
    """load(), or None and a line that `work` is missing, where the package raises anything."""
    try:
        return load()
    except Exception as error:
        missing = isinstance(error, ImportError)
        said = f"`pip install {package}` brings it" if missing else f"{package} is here, but fails"
        print(f"{work}: {said} ({type(error).__name__}: {one_line(error, 120)})")
        return None
