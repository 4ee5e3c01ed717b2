"""Output that no name and no terminal can break. Imported first, it also answers Ctrl-C."""

import contextlib
import os
import re
import sys

# What a terminal acts on or cannot show: controls, line separators, directions, surrogates.
RAW_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text, stream=None, keep=""):
    """`text` in one line that `stream` (None: sys.stdout) can show, with escapes for all else.

    keep: raw characters that stay as they are; None: all of them.
    """

    def escape(match):
        return match[0] if match[0] in keep else match[0].encode("unicode_escape").decode()

    text = str(text) if keep is None else RAW_CHARACTERS.sub(escape, str(text))
    encoding = getattr(stream or sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def first_few(words, limit=3, others="more"):
    """The first `limit` words, and how many others there are, as text."""
    words = list(map(str, words))
    return ", ".join(words[:limit]) + (f" and {len(words) - limit} {others}" if len(words) > limit else "")


def plural(count, noun, ending="s"):
    """A number and its noun, such as `1 image`, `1,000 images`."""
    return f"{count:,} {noun}{ending * (count != 1)}"


class SafeStream:
    """A text stream that escapes what it cannot show, and drops all text once its reader is gone.

    clean: also escape raw characters, except tab and newline. Progress bars need them on stderr.
    """

    def __init__(self, stream, clean):
        self.stream, self.keep, self.broken = stream, "\t\n" if clean else None, False

    def write(self, text):
        if self.broken:
            return len(text)
        with self.tolerance():
            self.stream.write(printable(text, self.stream, self.keep))
        return len(text)

    def flush(self):
        with self.tolerance():
            self.stream.flush()

    @contextlib.contextmanager
    def tolerance(self):
        """An OSError within ends the output, not the work. The descriptor then leads nowhere."""
        try:
            yield
        except OSError:
            self.broken = True
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def safe_output():
    """Within, sys.stdout and sys.stderr are SafeStreams, even where the process has neither."""
    for descriptor in range(3):  # a file opened later must not become stderr
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    out, err = (stream or open(os.devnull, "w") for stream in before)  # noqa: SIM115 (closed with the process)
    sys.stdout, sys.stderr = SafeStream(out, clean=True), SafeStream(err, clean=False)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def end_quietly(kind, error, trace):
    """An excepthook: Ctrl-C ends in one word, all else as Python has it."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = end_quietly
