"""Values of requests as JSON has them, checked strictly: nothing is converted but lists to tuples."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import reprlib
from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from controlkit.errors import UserError, nearest


def is_finite(value: float) -> bool:
    """Whether a float can hold it; integers of JSON and Python may be larger."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def plain_mapping(values: Any, what: str) -> dict[str, Any]:
    """A mapping as JSON stores it: tuples as lists, paths as text.

    Args:
        what: its name in errors.

    Raises:
        UserError: it is empty or no mapping, or has a value that JSON cannot store.
    """
    try:
        plain = json.loads(json.dumps(values, default=os.fspath, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the {what} must be JSON values and paths: {error}", "wrong-type") from error
    if not isinstance(plain, dict) or not plain:
        raise UserError(f"the {what} must be a mapping from names, not {values!r}", "wrong-type")
    return plain


def checked_fields(kind: type, values: Any, what: str) -> dict[str, Any]:
    """`values` with lists turned into tuples, after checking keys and types against the fields of a dataclass.

    Args:
        kind: the dataclass.
        what: the name of `values` in errors.

    Raises:
        UserError: `values` is no mapping, a key is unknown or missing, or a value has the wrong type.
    """
    if not isinstance(values, dict):
        raise UserError(f"{what} must be a mapping of settings, not {type(values).__name__}", "wrong-type")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            raise UserError(f"unknown setting {str(key)!r}{nearest(str(key), list(fields))}", "unknown-key")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise UserError(f"{what} lacks {name}, which is required", "missing-setting")
    hints = _hints_of(kind)
    for key, value in values.items():
        if not _has_type(value, hints[key]):
            raise UserError(f"{key} is {value!r}; expected {_in_words(hints[key])}", "wrong-type")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def settle_fields(instance: Any, what: str = "") -> None:
    """Turn the fields of a frozen dataclass into values of JSON where Python has others, and check their types.

    Lists and arrays become tuples, paths text, and numbers of numpy and torch plain ones.

    Args:
        what: the name of the instance in errors, if it is part of another.

    Raises:
        UserError: a value has the wrong type.
    """
    kind: type = type(instance)
    for name, hint, plain, items in _expected_in(kind):
        value = getattr(instance, name)
        if type(value) in plain or (type(value) is tuple and items and all(type(each) in items for each in value)):
            continue
        settled = _settled(value, hint)
        if not _has_type(settled, hint) or not _has_parts(settled, hint):
            subject = f"{name} of {what}" if what else name
            message = f"{subject} is {reprlib.repr(value)}; expected {_in_words(hint)}"
            if getattr(value, "ndim", 0) or hasattr(value, "getbands"):
                message += "; an image in memory is passed by a name: generate(request, images={name: image})"
            raise UserError(message, "wrong-type")
        object.__setattr__(instance, name, settled)


@functools.cache
def _expected_in(kind: type) -> list[tuple[str, Any, frozenset[type], frozenset[type]]]:
    """Name, type, exact types of values that are right as they are, and of items of such tuples, of each field."""
    expected = []
    for name, hint in _hints_of(kind).items():
        parts = [hint] if get_origin(hint) in (tuple, dict) or not get_args(hint) else list(get_args(hint))
        plain = {int, float} if float in parts else set()
        plain |= {part for part in parts if isinstance(part, type)}
        plain |= {dict for part in parts if get_origin(part) is dict}
        items = {get_origin(get_args(part)[0]) or get_args(part)[0] for part in parts if get_origin(part) is tuple}
        expected.append((name, hint, frozenset(plain), frozenset(items | ({int} if float in items else set()))))
    return expected


def _settled(value: Any, hint: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "dtype") and getattr(value, "ndim", None) == 0:
        return value.item()
    is_list = get_origin(hint) is tuple or any(get_origin(each) is tuple for each in get_args(hint))
    if is_list and isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
        return tuple(_settled(each, None) for each in value)
    return value


def _has_parts(value: Any, hint: Any) -> bool:
    """Whether the items of a tuple of dataclasses are those."""
    item = get_args(hint)[0] if get_origin(hint) is tuple else None
    return not (isinstance(item, type) and dataclasses.is_dataclass(item)) or all(isinstance(e, item) for e in value)


@functools.cache
def _hints_of(kind: Any) -> dict[str, Any]:
    """Evaluated once per class: every combination of axes is checked."""
    return get_type_hints(kind)


def _has_type(value: Any, hint: Any) -> bool:
    """Whether a value of JSON fits a type; true and false are no numbers."""
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        return isinstance(value, (list, tuple)) and (item not in _PLAIN or all(_has_type(each, item) for each in value))
    if get_origin(hint) is dict:
        return isinstance(value, dict)
    if get_args(hint):
        return any(_has_type(value, each) for each in get_args(hint))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


_PLAIN = {
    str: ("text", "texts"),
    bool: ("true or false", "booleans"),
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    NoneType: ("null", ""),
}
"""Type -> one value and several in words."""


def _in_words(hint: Any) -> str:
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        usual = getattr(item, "__name__", "") if dataclasses.is_dataclass(item) else "mappings"
        return f"a list of {_PLAIN.get(item, ('', usual))[1]}"
    if get_origin(hint) is dict:
        return "a mapping from names"
    if get_args(hint):
        return " or ".join(_in_words(each) for each in get_args(hint))
    return _PLAIN[hint][0]
