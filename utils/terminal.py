"""Output that no name and no terminal can break. Import it first: it also answers Ctrl-C during the other imports."""
import contextlib
import os
import re
import sys

CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # all but tab, newline and carriage return


def printable(text):
    """`text` with its control characters escaped: a name must not move the cursor or recolour the terminal."""
    return CONTROLS.sub(lambda match: repr(match[0])[1:-1], str(text))


class SafeStream:
    """A text stream that shows what it cannot encode as escapes. Once its reader is gone it drops the rest.

    clean: also escape control characters. Progress bars need them on stderr.
    """

    def __init__(self, stream, clean):
        self.stream, self.clean, self.broken = stream, clean, False

    def write(self, text):
        if self.broken:
            return len(text)
        with self.tolerance():
            encoding = getattr(self.stream, "encoding", None) or "utf-8"
            text = printable(text) if self.clean else text
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self):
        with self.tolerance():
            self.stream.flush()

    @contextlib.contextmanager
    def tolerance(self):
        """OSError within is the end of the output, not of the work. The file descriptor then leads nowhere."""
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
    """Within, sys.stdout and sys.stderr are SafeStreams, also where the process was started without them."""
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
