"""What a caller can mend: a setting, a class or a file that does not fit."""

import difflib
from collections.abc import Iterable
from typing import Any

LISTED = 20  # values in a message


class SettingError(ValueError):
    """A setting, an argument or a file that does not fit. Scripts print it as one line."""

    for_user = True  # see utils/errors.py


def check_choice(name: str, value: Any, known: Iterable) -> None:
    """SettingError that lists the known values, of many those alike, unless `value` is one."""
    if value not in known:
        words = list(map(str, known))
        few = (difflib.get_close_matches(str(value), words, LISTED) or words)[:LISTED] if len(words) > LISTED else words
        more = f" and {len(words) - len(few)} more" * (len(few) < len(words))
        raise SettingError(f"unknown {name} {value!r}; known: {', '.join(few)}{more}")
