"""Values of a GGUF file's metadata, each read as what it must be or refused by its name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from transom.errors import ConfigError
from transom.wording import shortened
from transom.zoo.checkpoints.gguf_header import Header

_SIZE_LIMIT = 2**31
"""Sizes lie below it: a larger one is a flipped bit, and products of two such fit the counts of tensors."""


class Metadata:
    """The keys under one architecture's prefix. Remembers which were read, so that the others can be judged."""

    def __init__(self, header: Header, architecture: str) -> None:
        """Take the keys that begin with `architecture` and a dot."""
        self.path: Path = header.path
        self.prefix = f"{architecture}."
        self.values = {
            key.removeprefix(self.prefix): value
            for key, value in header.metadata.items()
            if key.startswith(self.prefix)
        }
        self.unread = set(self.values)

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def refuse(self, key: str, why: str) -> ConfigError:
        """An error about one key."""
        self.unread.discard(key)
        return ConfigError(f"{self.path}: {self.prefix}{key} is {shown(self.values.get(key))}, {why}")

    def size(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        """An integer of any width.

        Raises:
            ConfigError: If there is neither a value nor a default, or the value is no integer or out of range.
        """
        self.unread.discard(key)
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, float):
            raise self.refuse(
                key, "expected a number without a fraction, stored as an integer: convert the model again"
            )
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refuse(key, "expected a number: convert the model again")
        if not minimum <= value < _SIZE_LIMIT:
            raise self.refuse(key, f"expected at least {minimum} and less than 2**31: convert the model again")
        return value

    def sizes(self, key: str, num_layers: int, default: int | None = None) -> tuple[int, ...]:
        """An integer for every layer: an array, or one for all of them.

        Raises:
            ConfigError: As `size` does, or if the array has another length.
        """
        value = self.values.get(key)
        if not isinstance(value, np.ndarray | list):
            return (self.size(key, default),) * num_layers
        self.unread.discard(key)
        array = np.asarray(value)
        if array.dtype.kind not in "iu" or array.shape != (num_layers,):
            raise self.refuse(key, f"expected one integer for each of {num_layers} layers: convert the model again")
        sizes = tuple(array.tolist())
        if not all(1 <= size < _SIZE_LIMIT for size in sizes):
            raise self.refuse(key, "expected at least 1 and less than 2**31: convert the model again")
        return sizes

    def same_size_in_every_layer(self, key: str, num_layers: int, default: int | None = None) -> int:
        """An integer, or an array of one integer a layer that are all equal.

        Raises:
            ConfigError: As `sizes` does, or if layers differ.
        """
        distinct = sorted(set(self.sizes(key, num_layers, default)))
        if len(distinct) > 1:
            raise self.refuse(key, f"so layers differ ({distinct[:5]}): only models of equal layers are supported")
        return distinct[0]

    def number(self, key: str, default: float | None = None, *, zero: bool = False) -> float:
        """A number above zero, or zero if that is allowed; integers are taken too.

        Raises:
            ConfigError: If there is neither a value nor a default, or the value is no number or out of range.
        """
        self.unread.discard(key)
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(key, "expected a number: convert the model again")
        number = as_stated(value)
        with np.errstate(over="ignore"):
            single = float(np.float32(number))
        if not math.isfinite(single) or number < 0 or (single == 0 and not (zero and number == 0)):
            least = "zero or more" if zero else "more than zero"
            raise self.refuse(key, f"expected a number that float32 holds, {least}: convert the model again")
        return number

    def one_of(self, *names: str) -> float | None:
        """A number that goes by several keys; None if none of them is there.

        Raises:
            ConfigError: If a value is no positive number, or two differ.
        """
        stated = {key: self.number(key) for key in names if key in self}
        if len(set(stated.values())) > 1:
            first, *_, last = stated
            raise self.refuse(last, f"but {first} is {stated[first]}: they must agree, convert the model again")
        return next(iter(stated.values()), None)

    def agree(self, key: str, number: float) -> None:
        """Raise `ConfigError` if a key says another number than the one that follows from others."""
        if key in self and abs(self.number(key) - number) > 1e-6 * number:
            raise self.refuse(key, f"but llama.cpp takes {number:.7g}: another one is not supported")

    def only(self, key: str, allowed: Sequence[object], *, required: bool = False) -> None:
        """Raise `ConfigError` if a key says another value than those allowed, or is missing though it is required."""
        self.unread.discard(key)
        value = self.values.get(key, None if required else allowed[0])
        # True is 1 to Python, but a flag that is a number is a damaged file. Arrays are compared by element.
        if not any(isinstance(value, bool | int | float | str) and value == one for one in allowed) or isinstance(
            value, bool
        ) != isinstance(allowed[0], bool):
            raise self.refuse(key, f"only {' or '.join(map(repr, allowed))} is supported: choose another model")

    def rope_factor(self, lines: list[str]) -> float | None:
        """By what positions are divided: `rope.scaling.factor`, or the old key `rope.scale_linear`; zero is none.

        Args:
            lines: Gets one if a factor stands there that nothing applies.

        Returns:
            None if no key says.

        Raises:
            ConfigError: If the keys contradict each other or ask for other scaling than linear.
        """
        kind = self.string("rope.scaling.type", "linear")
        if kind not in ("none", "linear"):
            raise self.refuse("rope.scaling.type", "only none and linear are known: choose another model")
        names = [key for key in ("rope.scaling.factor", "rope.scale_linear") if key in self]
        factors = {key: self.number(key, zero=True) or 1.0 for key in names}
        if len(set(factors.values())) > 1:
            raise self.refuse("rope.scale_linear", "but rope.scaling.factor differs: convert the model again")
        factor = next(iter(factors.values()), None)
        if kind == "none" and factor not in (None, 1):
            lines.append(f"{self.prefix}{names[0]} is {factor}, but rope.scaling.type is none: nothing is scaled")
            return 1.0
        return factor

    def string(self, key: str, default: str) -> str:
        """A string.

        Raises:
            ConfigError: If the value is no string.
        """
        self.unread.discard(key)
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise self.refuse(key, "expected a string: convert the model again")
        return value


def as_stated(value: float) -> float:
    """The number that was meant: singles print as their shortest decimal (1e-06, not 9.99999997e-07)."""
    with np.errstate(over="ignore"):
        single = np.float32(value)
    return float(str(single)) if isinstance(value, float) and float(single) == value else float(value)


def shown(value: object) -> str:
    """A value for an error message, on one line and short."""
    if isinstance(value, np.ndarray | list):
        values = list(value[:4]) if isinstance(value, list) else value[:4].tolist()
        text = ", ".join(repr(item)[:20] for item in values)
        return f"[{text}{', ...' if len(value) > 4 else ''}] ({len(value)} values)"
    return shortened(repr(value), 60)
