"""Options that set a field of a settings class: their help states the default that the class has."""

from __future__ import annotations

import argparse
import re
from types import ModuleType
from typing import Any

import pytest

from controlkit.apps import adapt, generate, pairs
from controlkit.data.making import MakeSettings
from controlkit.sampling.request import GenerateRequest
from controlkit.settings import describe_settings
from controlkit.training.recipes import adapter_settings, build_recipe

_FLAGS = {"no": False, "yes": True}


def stated(verb: ModuleType) -> dict[str, str]:
    """Field that an option sets -> the default in its help, as far as the comma."""
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    found = {action.dest: re.search(r"\(default: ([^,;)]+)", action.help or "") for action in parser._actions}
    return {dest: match[1] for dest, match in found.items() if match}


def same(text: str, value: Any) -> bool:
    if isinstance(value, bool):
        return _FLAGS[text] is value
    return float(text) == value if isinstance(value, (int, float)) else text == value


@pytest.mark.parametrize(("verb", "kind", "least"), [(generate, GenerateRequest, 10), (pairs, MakeSettings, 1)])
def test_a_default_that_help_states_is_the_fields(verb, kind, least) -> None:
    texts = stated(verb)
    fields = {field.name: field.default for field in describe_settings(kind)}
    # Without a default the base decides; of a sequence, help states the length; of a switch, also what is done instead.
    compared = [
        name
        for name in texts.keys() & fields.keys()
        if fields[name] is not None
        and not isinstance(fields[name], tuple)
        and (not isinstance(fields[name], bool) or texts[name] in _FLAGS)
    ]
    assert len(compared) >= least, compared
    assert {name: texts[name] for name in compared if not same(texts[name], fields[name])} == {}


def test_defaults_of_adapters_are_stated_for_nano_and_for_other_bases() -> None:
    parser = argparse.ArgumentParser()
    adapt.add_arguments(parser)
    given = {"system": "ctrlora-adapter", "pairs": "pairs", "control": "nano/base", "out": "run"}
    made = [build_recipe({**given, "base": base, **adapter_settings(base)}, origin="test") for base in ("nano", "sd15")]
    compared = 0
    for action in parser._actions:
        if match := re.search(r"\(default: (\S+) for nano, else (\S+)\)", action.help or ""):
            for recipe, text in zip(made, match.groups(), strict=True):
                assert same(text, getattr(recipe, action.dest)), (action.dest, recipe.base, text)
                compared += 1
    assert compared >= 10
