"""nano's evaluation sets: drawings of icons that are what their names say."""

from __future__ import annotations

import numpy as np
import pytest

from controlkit.evaluation.sets import evaluation_set, evaluation_sets
from controlkit.nano.evaluation_sets import SETS, read_set
from controlkit.nano.icons import background_colour, is_held_out


@pytest.mark.parametrize("name", sorted(SETS))
def test_evaluation_images_are_what_they_say(name):
    drawings = read_set(name).examples
    assert len(drawings) >= 96
    for drawing in drawings:
        assert drawing.image.shape == (64, 64, 3)
        assert drawing.concept.replace("-", " ") in drawing.caption
        assert (drawing.style == "openmoji") == (name == "openmoji")
        if name != "openmoji":
            assert is_held_out(drawing.concept) == (name == "held-out")
    colours = [background_colour(drawing.image) == drawing.colour for drawing in drawings]
    assert np.mean(colours) > 0.97


def test_images_drawn_again_have_the_same_captions_and_other_places():
    once, again = read_set("seen").examples, read_set("seen-again").examples
    assert [drawing.caption for drawing in once] == [drawing.caption for drawing in again]
    assert not any(np.array_equal(a.image, b.image) for a, b in zip(once, again, strict=True))


def test_they_are_found_by_name():
    assert SETS.items() <= evaluation_sets().items()
    for name in SETS:
        found = evaluation_set(name)
        assert found.name == name and found.captions == read_set(name).captions
