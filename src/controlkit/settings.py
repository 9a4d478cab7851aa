"""Frozen dataclasses as typed settings: built from plain values, explained from their source."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from controlkit.errors import UserError, nearest

Settings = TypeVar("Settings")


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`key=value` texts, whose values are YAML, as a mapping.

    Raises:
        UserError: one has no `=`, or its value is not YAML.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"--set {override}: expected key=value")
        try:
            values[key.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:  # a date that there is not is a ValueError
            raise UserError(f"--set {override}: {value!r} is not a YAML value") from error
    return values


def build_settings(kind: type[Settings], values: dict[str, Any], origin: str) -> Settings:
    """The dataclass `kind` from plain values; `origin` stands in errors.

    Raises:
        UserError: a key is unknown (with the nearest known ones), a value has the wrong type, or the class refuses.
    """
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    values = {_current(key, known, origin): value for key, value in values.items()}
    check_keys(values, known, origin)
    return _typed(kind, values, origin)


_FORMER = {"pictures": "images"}
"""Former names of settings, which are read with a note -> their names."""


def _current(key: str, known: Sequence[str], origin: str) -> str:
    """The name of a setting, which may be given by its former one."""
    new = _FORMER.get(key, key)
    if key in known or new not in known or new == key:
        return key
    print(f"{origin}: {key} is called {new} now", file=sys.stderr)
    return new


def check_keys(values: Iterable[Any], known: Iterable[str], origin: str) -> None:
    """Refuse a key that is not `known`, with the nearest that are; `origin` stands in errors."""
    known = list(known)
    for key in values:
        if key not in known:
            raise UserError(f"{origin}: unknown key {str(key)!r}{nearest(str(key), known)}")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of a settings class, for a list of them."""

    name: str
    default: Any
    """None, too, where there is none."""
    required: bool
    """Whether it has to be given."""
    what: str
    """Its docstring on one line."""


def describe_settings(kind: type) -> list[Setting]:
    """Every field of a settings class."""
    told: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(owner) or not inspect.get_annotations(owner):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in itertools.pairwise(body.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                told[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return [
        Setting(field.name, _default(field), _is_required(field), told.get(field.name, ""))
        for field in dataclasses.fields(kind)
    ]


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _typed(kind: type[Settings], values: dict[str, Any], origin: str) -> Settings:
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    # YAML 1.1 reads 3e-4 as text; jsonargparse parses such text again against the field's type.
    given = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    try:
        return kind(**parser.parse_object(given).as_dict())
    except ArgumentError as error:
        reason = " ".join(str(error).split())
        wrong = re.search(r'Parser key "(\w+)"', reason)
        field = next((field for field in dataclasses.fields(kind) if wrong and field.name == wrong[1]), None)  # type: ignore[arg-type]
        if field is not None and field.name in values:
            reason = f"{field.name} is {values[field.name]!r}; expected {_expected(field, get_type_hints(kind))}"
        raise UserError(f"{origin}: {reason}") from error


_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"}
_MANY = {str: "texts", int: "whole numbers", float: "numbers", bool: "trues and falses"}


def _expected(field: dataclasses.Field[Any], hints: dict[str, Any]) -> str:
    """The type of a field in words, with its default as an example."""

    def told(hint: Any) -> str:
        if get_origin(hint) is tuple:
            return f"a list of {_MANY.get(get_args(hint)[0], 'values')}"
        if get_args(hint):
            return " or ".join(map(told, get_args(hint)))
        return _WORDS.get(hint, str(hint))

    default = _default(field)
    if default is None or default == ():
        return told(hints[field.name])
    plain = list(default) if isinstance(default, tuple) else default
    example = yaml.safe_dump(plain, default_flow_style=True, width=1000)
    return f"{told(hints[field.name])}, such as {example.splitlines()[0]}"
