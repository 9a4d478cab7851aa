"""Typed settings as frozen dataclasses: built from plain values, documented by their attribute docstrings."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from controlkit.errors import UserError, nearest

Settings = TypeVar("Settings")


_BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float"))
_WORDS_OF_TRUTH = {"on": True, "yes": True, "off": False, "no": False}
"""Booleans of YAML 1.1 that `YAMLReader` leaves as text."""


class YAMLReader(yaml.SafeLoader):
    """YAML in which booleans and numbers are those of YAML 1.2; 10_000 is a number, too.

    In YAML 1.1, on, off, yes and no are booleans, so that `graphs: off` would not be text, 1e-4 is text, 010 is 8 and
    1:30 is 90. Settings that are booleans take these words still (`build_settings`); parameters of conditions take true
    and false only.
    """


YAMLReader.yaml_implicit_resolvers = {
    first: [entry for entry in entries if entry[0] not in (_BOOL, _INT, _FLOAT)]
    for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
YAMLReader.add_implicit_resolver(_BOOL, re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
YAMLReader.add_implicit_resolver(_INT, re.compile(r"([-+]?\d+(_\d+)*|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789"))
YAMLReader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"([-+]?(\.\d+|\d+(_\d+)*(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+.0123456789"),
)


def _read_int(reader: YAMLReader, node: yaml.ScalarNode) -> int:
    text = str(reader.construct_scalar(node))
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


YAMLReader.add_constructor(_INT, _read_int)


def read_overrides(overrides: Sequence[str], option: str = "--set") -> dict[str, Any]:
    """Parse `key=value` overrides; values are YAML.

    Args:
        option: that of the command line from which they come, for errors.

    Raises:
        UserError: an override has no `=`, or its value is not YAML.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"{option} {override}: expected key=value", "usage")
        try:
            values[key.strip()] = yaml.load(value, YAMLReader)
        except (yaml.YAMLError, ValueError) as error:  # an impossible date is a ValueError
            raise UserError(f"{option} {override}: {value!r} is not a YAML value", "wrong-type") from error
    return values


def check_overrides(overrides: Mapping[str, Any], options: Mapping[str, Any], option: str = "--set") -> None:
    """Check that overrides do not contradict options of the command line.

    Args:
        overrides: as of `read_overrides`.
        options: setting -> value, of the options in use.

    Raises:
        UserError: both name a setting, with different values.
    """
    for key in overrides.keys() & options.keys():
        one, other = options[key], _like(options[key], overrides[key])
        if one != other and str(one) != str(other):
            raise UserError(f"{key} is {one}, and {option} {key}={other}; give one of them", "contradiction")


def _like(option: Any, value: Any) -> Any:
    """The value of an override in the type of an option, as building the settings reads it."""
    if isinstance(option, bool) and isinstance(value, str):
        return _WORDS_OF_TRUTH.get(value.lower(), value)
    return tuple(value) if isinstance(option, tuple) and isinstance(value, list) else value


def build_settings(kind: type[Settings], values: dict[str, Any], origin: str) -> Settings:
    """Build the dataclass `kind` from plain values.

    Args:
        origin: where the values come from, for errors.

    Raises:
        UserError: a key is unknown (with the nearest known ones), a value has the wrong type, or the class rejects it.
    """
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    values = {_current(key, known, origin): value for key, value in values.items()}
    check_keys(values, known, origin)
    return _typed(kind, values, origin)


_FORMER = {"pictures": "images"}
"""Former name of a setting, still read with a note -> its name."""


def _current(key: str, known: Sequence[str], origin: str) -> str:
    """The name of a setting whose key may be a former name."""
    new = _FORMER.get(key, key)
    if key in known or new not in known or new == key:
        return key
    print(f"{origin}: {key} has been renamed to {new}", file=sys.stderr)
    return new


def check_keys(values: Iterable[Any], known: Iterable[str], origin: str) -> None:
    """Reject keys that are not `known`.

    Raises:
        UserError: names `origin`, the key and the nearest known ones.
    """
    known = list(known)
    for key in values:
        if key not in known:
            raise UserError(f"{origin}: unknown key {str(key)!r}{nearest(str(key), known)}", "unknown-key")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of a settings class, for listings."""

    name: str
    default: Any
    """None also where there is no default."""
    required: bool
    what: str
    """Its docstring on one line."""


def describe_settings(kind: type) -> list[Setting]:
    """Every field of a settings class, with its attribute docstring."""
    docstrings: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(owner) or not inspect.get_annotations(owner):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in itertools.pairwise(body.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                docstrings[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return [
        Setting(field.name, _default(field), _is_required(field), docstrings.get(field.name, ""))
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
    hints = get_type_hints(kind)
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name not in values:
            continue
        value, hint = values[field.name], hints[field.name]
        if value is None and not _takes_null(hint):
            raise UserError(f"{origin}: {field.name} is null; expected {_expected(field, hints)}", "wrong-type")
        try:
            plain[field.name] = _with_numbers(value, hint)
        except (ValueError, yaml.YAMLError) as error:
            expected = _expected(field, hints)
            raise UserError(f"{origin}: {field.name} is {value!r}; expected {expected}", "wrong-type") from error
    try:
        return kind(**parser.parse_object(plain).as_dict())
    except ArgumentError as error:
        reason = " ".join(str(error).split())
        key = re.search(r'Parser key "(\w+)"', reason)
        field = next((field for field in dataclasses.fields(kind) if key and field.name == key[1]), None)  # type: ignore[arg-type]
        if field is not None and field.name in values:
            reason = f"{field.name} is {values[field.name]!r}; expected {_expected(field, hints)}"
        raise UserError(f"{origin}: {reason}", "wrong-type") from error


def _with_numbers(value: Any, hint: Any) -> Any:
    """The value of a setting, in which texts are numbers where numbers are expected, and 1e3 is a whole number.

    Raises:
        ValueError, YAMLError: such a text is no number. The parser would read those of YAML 1.1.
    """
    if isinstance(value, list | tuple):
        of_list = [get_args(each)[0] for each in (hint, *get_args(hint)) if get_origin(each) is tuple]
        return [_with_numbers(each, of_list[0] if of_list else Any) for each in value]
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if str in kinds or not (int in kinds or float in kinds):
        return value
    if isinstance(value, str):
        value = yaml.load(value, YAMLReader)
        if not isinstance(value, int | float):
            raise ValueError("no number")
    return int(value) if float not in kinds and isinstance(value, float) and value.is_integer() else value


def _takes_null(hint: Any) -> bool:
    return hint in (None, NoneType, Any) or any(map(_takes_null, get_args(hint)))


_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"}
_MANY = {str: "texts", int: "whole numbers", float: "numbers", bool: "booleans"}


def _expected(field: dataclasses.Field[Any], hints: dict[str, Any]) -> str:
    """The type of a field in words, with its default as an example."""

    def describe(hint: Any) -> str:
        if get_origin(hint) is tuple:
            return f"a list of {_MANY.get(get_args(hint)[0], 'values')}"
        if get_args(hint):
            return " or ".join(map(describe, get_args(hint)))
        return _WORDS.get(hint, str(hint))

    default = _default(field)
    if default is None or default == ():
        return describe(hints[field.name])
    return f"{describe(hints[field.name])}, such as {as_written(default)}"


def as_written(value: Any) -> str:
    """A setting's value as a recipe writes it: `null`, `true`, `[a, b]`."""
    plain = json.loads(json.dumps(value, default=str))  # tuples as lists
    return str(yaml.safe_dump(plain, default_flow_style=True, width=1000).splitlines()[0])
