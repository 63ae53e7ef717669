"""Plain data that was read from a file, as records whose every value is of the kind that its annotation names."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from transom.wording import shortened

_Record = TypeVar("_Record")

_PLAIN = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
_SHOWN = 40


def record(kind: type[_Record], data: object, where: str = "") -> _Record:
    """A dataclass of plain data; lists become tuples where it has tuples.

    Args:
        kind: The dataclass.
        data: What a JSON file had.
        where: What the data is, for errors.

    Raises:
        ValueError: If a field is missing or unknown, or its value is of another kind.
    """
    fields = _mapping(data, where)
    hints = _hints(kind)
    declared = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]  # it is a dataclass
    if unknown := sorted(map(str, fields.keys() - declared.keys())):
        raise ValueError(f"{where or 'it'} has an unknown field {unknown[0]!r}")
    for name, field in declared.items():
        no_default = field.default is field.default_factory is dataclasses.MISSING
        if no_default and name not in fields:
            raise ValueError(f"{where or 'it'} has no {name!r}")
    return kind(**{name: checked(value, hints[name], f"{where}.{name}".lstrip(".")) for name, value in fields.items()})


def checked(value: object, hint: Any, where: str) -> Any:
    """A value, if it is of the kind that an annotation names.

    Args:
        value: What a JSON file had.
        hint: An annotation of plain values, unions, tuples and sequences of one kind, mappings, dataclasses and
            typed dictionaries, whose further keys are let through.
        where: What the value is, for errors.

    Raises:
        ValueError: If it is of another kind.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if hint in _PLAIN:
        kinds = (int, float) if hint is float else (hint,)
        # To Python, true is a number.
        if not isinstance(value, kinds) or (isinstance(value, bool) and hint is not bool):
            raise ValueError(f"{where} is {_shown(value)}, not {_PLAIN[hint]}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return checked(value, inner, where)
    if origin in (tuple, Sequence):
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} is {_shown(value)}, not a list")
        items = [checked(item, arguments[0], f"{where}[{index}]") for index, item in enumerate(value)]
        return tuple(items) if origin is tuple else items
    if origin is Mapping:
        return {key: checked(item, arguments[1], f"{where}.{key}") for key, item in _mapping(value, where).items()}
    if typing.is_typeddict(hint):
        return _typed_dictionary(_mapping(value, where), hint, where)
    return record(hint, value, where)


def _typed_dictionary(value: Mapping[str, Any], hint: Any, where: str) -> dict[str, Any]:
    for name in sorted(hint.__required_keys__ - value.keys()):
        raise ValueError(f"{where} has no {name!r}")
    hints = _hints(hint)
    return {key: checked(item, hints.get(key, Any), f"{where}.{key}") for key, item in value.items()}


# Annotations are text until they are read, which takes long for hundreds of records.
_hints: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'it'} is {_shown(value)}, not an object with fields")
    return value


def _shown(value: object) -> str:
    return shortened(repr(value), _SHOWN)
