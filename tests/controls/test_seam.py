"""Generic code knows no system: all that is known of one stands in its own file of `controls/`."""

from __future__ import annotations

import re
from pathlib import Path

import controlkit
from controlkit.controls.registry import registry

PACKAGE = Path(controlkit.__file__).parent
APART = ("controls", "nano", "assets")
CONTRACT = ("apply", "control", "file_format", "hints", "inputs", "registry")
"""Modules of `controls/` that are no system."""


def lines():
    """Room, file and text of every line of code outside of `controls/`."""
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE)
        if place.parts[0] not in APART:
            for line in path.read_text(encoding="utf-8").splitlines():
                yield place.parts[0], place, line


def test_few_lines_outside_of_controls_name_a_system():
    """Words of people (conditions that come from ControlNet's annotators, studies of papers), and little else. In the
    server they are the names of A1111's protocol."""
    name = re.compile("controlnet|ctrlora|t2i|base_?control", re.IGNORECASE)
    found = [f"{place}: {line.strip()}" for room, place, line in lines() if room != "server" and name.search(line)]
    assert len(found) < 150, "\n".join(found)


def test_no_generic_module_imports_a_system():
    """Studies are experiments with the systems of papers; all else asks the registry."""
    system = re.compile(rf"(?:from|import) controlkit\.controls\.(?!(?:{'|'.join(CONTRACT)})\b)\w+")
    found = [
        f"{place}: {line.strip()}" for room, place, line in lines() if room != "studies" and system.match(line.strip())
    ]
    assert found == []


def test_every_system_says_what_generic_code_asks():
    for kind in registry().values():
        assert kind.title.partition(" ")[0] in ("a", "an") and kind.enters
        assert len(kind.inputs) == len({one.name for one in kind.inputs}) > 0
        names = [one.name for one in kind.formats]
        assert len(names) == len(set(names)) and not {"controlkit", "diffusers"} & set(names)
        assert all(one.detect is None or one.read is not None for one in kind.formats)
        assert kind.companion is None or kind.companion in registry()
