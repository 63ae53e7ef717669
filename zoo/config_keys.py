"""One JSON object of a config, read key by key; every error names the file, the key and the value that stands there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NoReturn

from transom.errors import ConfigError
from transom.wording import shortened

# Of float32, which models compute in: the smallest number without leading zeros, and the largest.
_LEAST, _LARGEST = 2.0**-126, 2.0**128 - 2.0**104


@dataclasses.dataclass(frozen=True, eq=False)
class Keys:
    """An object of a config.

    Attributes:
        path: The file.
        values: By key.
        prefix: What stands before its keys in errors, such as "text_config.".
    """

    path: Path
    values: dict[str, Any]
    prefix: str = ""

    def label(self, key: str) -> str:
        """A key as errors call it."""
        return self.prefix + key

    def get(self, key: str) -> Any:
        """A value; None where it is absent or null."""
        return self.values.get(key)

    def refuse(self, key: str, reason: str) -> NoReturn:
        """Raise `ConfigError` about a key."""
        raise ConfigError(f"{self.path}: {self.label(key)} is {short(self.get(key))}: {reason}")

    def whole(self, key: str, default: int, most: int = 2**31 - 1) -> int:
        """A whole number from 1 to `most`, or raise `ConfigError`; the default if it is absent, but not if null."""
        value = self.values.get(key, default)
        if type(value) is not int or not 1 <= value <= most:
            self.refuse(key, f"expected a whole number from 1 to {most:,}")
        return value

    def number(self, key: str, default: float) -> float:
        """A positive finite number, or raise `ConfigError`; the default if the key is absent, but not if null."""
        value = self.values.get(key, default)
        if not is_positive(value):
            self.refuse(key, "expected a positive finite number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false, or raise `ConfigError`; the default if the key is absent, but not if null."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            self.refuse(key, "expected true or false")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """A copy of an object, or raise `ConfigError`; empty where it is absent or null."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            self.refuse(key, "expected an object")
        return dict(value or {})


def is_positive(value: Any) -> bool:
    """Whether a value is a number above zero that float32 holds with all its digits; true and false are none."""
    return not isinstance(value, bool) and isinstance(value, int | float) and _LEAST <= value <= _LARGEST


def short(value: Any) -> str:
    """A value as it stands in the file, for errors."""
    return shortened(json.dumps(value))
