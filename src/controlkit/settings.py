"""Frozen dataclasses as typed settings: built from plain values, explained from their source."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
from collections.abc import Sequence
from typing import Any, TypeVar

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
    for key in values:
        if key not in known:
            raise UserError(f"{origin}: unknown key {str(key)!r}{nearest(str(key), known)}")
    return _typed(kind, values, origin)


def describe_settings(kind: type) -> list[tuple[str, Any, str]]:
    """(name, default, first line of its docstring) of every field of a settings class."""
    told: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in itertools.pairwise(body.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                told[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return [
        (field.name, None if field.default is dataclasses.MISSING else field.default, told.get(field.name, ""))
        for field in dataclasses.fields(kind)
    ]


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
        raise UserError(f"{origin}: {reason}") from error
