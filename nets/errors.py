"""What a caller can mend: a setting, a class or a file that does not fit."""

from collections.abc import Iterable
from typing import Any


class SettingError(ValueError):
    """A setting, an argument or a file that does not fit. Scripts print it as one line."""

    for_user = True  # see utils/errors.py


def check_choice(name: str, value: Any, known: Iterable) -> None:
    """SettingError that lists the known values unless `value` is one of them."""
    if value not in known:
        raise SettingError(f"unknown {name} {value!r}; known: {', '.join(map(str, known))}")
