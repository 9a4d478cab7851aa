"""The support matrix says what is so, and the pages show it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from controlkit.bases.meta import meta_base
from controlkit.controls.registry import find, registry
from controlkit.formats import matrix
from controlkit.formats.convert import format_names
from controlkit.formats.describe import describe_system
from controlkit.training.recipes import recipes
from tiny import OF_TRANSFORMERS, tiny_of_known

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"<!-- systems:matrix -->\n\n(.*?)\n\n<!-- /systems -->", re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def support():
    return {each.system: each for each in matrix.support_matrix()}


def test_pages_show_the_matrix_of_the_registry(support, monkeypatch):
    monkeypatch.setattr(matrix, "support_matrix", lambda: list(support.values()))
    table = matrix.matrix_table()
    shown = {page.name: BLOCK.findall(page.read_text(encoding="utf-8")) for page in PAGES}
    assert shown["systems.md"]
    for page, blocks in shown.items():
        for block in blocks:
            assert block == table, f"{page} differs from `python -m controlkit.formats.matrix`:\n{table}"


def test_it_has_every_system_with_its_recipes_and_formats(support):
    assert set(support) == set(registry())
    assert all(recipes()[system].control_class is find(name) for name in support for system in support[name].trainings)
    named = {name for each in support.values() for name in (*each.read, *each.written)}
    assert named == set(format_names())


def test_offset_transfer_is_claimed_of_controls_with_a_copy(support, tiny_base):
    for name, kind in registry().items():
        options = {"size_ratio": 0.5} if name == "controlnet-xs" else {}  # the tiny base divides no smaller
        base = tiny_base if "nano" in support[name].bases else tiny_of_known(OF_TRANSFORMERS[name])
        control = find(kind.companion or name).for_base(base, **options)
        assert support[name].offset == (control.copied_network() is not None), name


def test_a_control_for_a_base_that_it_names_fits_that_base(support):
    bases = {name: meta_base(name) for name in ("nano", "sdxl", "sd3-medium", "flux1-dev")}
    for name, kind in registry().items():
        assert OF_TRANSFORMERS.get(name, "nano") in support[name].bases
        for base, on_meta in bases.items():
            if base in support[name].bases and name != "controlnet-xs":
                with torch.device("meta"):
                    assert kind.for_base(on_meta).incompatibility(on_meta) is None, (name, base)


def test_a_system_is_described_for_a_base_that_it_is_made_for():
    assert describe_system("controlnet-mlp")["base"] == "nano"
    assert {name: describe_system(name, size=256)["base"] for name in OF_TRANSFORMERS} == OF_TRANSFORMERS


def test_a_system_of_ones_own_is_in_it(fresh_registry, monkeypatch):
    monkeypatch.setattr(matrix, "KNOWN_BASES", {})
    monkeypatch.setenv("CONTROLKIT_CONTROLS", str(ROOT / "examples" / "my_control.py"))
    (own,) = [each for each in matrix.support_matrix() if each.system == "modulation"]
    assert own.cells()[1:5] == ("`modulation`", "an image", "taps", "no")
    assert "spade" in own.written and not own.offset
