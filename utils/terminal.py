"""Output that no name and no terminal can break. Imported first, it also answers Ctrl-C."""

import contextlib
import os
import re
import shlex
import sys

# What a terminal acts on or cannot show: controls, line separators, directions, surrogates.
RAW_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text, keep=""):
    """`text` in one line, with escapes for all control characters but those in `keep`."""
    return RAW_CHARACTERS.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], str(text))


def first_few(words, limit=20):
    """The first `limit` words, and how many others there are, as text."""
    words = list(map(str, words))
    return ", ".join(words[:limit]) + (f" and {len(words) - limit} more" if len(words) > limit else "")


def plural(count, noun, ending="s"):
    """A number and its noun, such as `1 image`, `1,000 images`."""
    return f"{count:,} {noun}{ending * (count != 1)}"


def as_command(*words):
    """A command to copy into this system's shell. A path among the words may hold spaces."""
    words = list(map(str, words))
    if os.name == "nt":  # cmd and PowerShell both take double quotes, which no name holds there
        return " ".join(word if re.fullmatch(r"[\w.:\\/=+-]+", word) else f'"{word}"' for word in words)
    return shlex.join(words)


class SafeStream:
    """A text stream that escapes what it cannot show, and leads nowhere once its reader is gone."""

    def __init__(self, stream, clean):  # clean: without control characters, which progress bars need
        self.stream, self.clean = stream, clean
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text):
        self._attempt(self.stream.write, printable(text, keep="\t\n") if self.clean else text)
        return len(text)

    def flush(self):
        self._attempt(self.stream.flush)

    def _attempt(self, method, *arguments):
        try:
            method(*arguments)
        except OSError:  # ends the output, not the work
            with contextlib.suppress(OSError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def safe_output():
    """Within, sys.stdout and sys.stderr are SafeStreams, even where the process has neither."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # no file that is opened later may become stderr
        pass
    os.close(descriptor)
    out, err = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115 (ends with it)
    with contextlib.redirect_stdout(SafeStream(out, True)), contextlib.redirect_stderr(SafeStream(err, False)):
        try:
            yield
        finally:
            sys.stdout.flush()


def say_stopped_on_ctrl_c(kind, error, trace):
    """An excepthook: Ctrl-C ends in one word, all else as Python has it."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = say_stopped_on_ctrl_c
