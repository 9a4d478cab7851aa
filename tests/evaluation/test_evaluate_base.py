"""The whole evaluation of the base that ships (minutes)."""

from __future__ import annotations

import pytest

from controlkit.bases.load import load_base
from controlkit.evaluation.base import evaluate_base


@pytest.mark.slow  # hundreds of images of every set: minutes of a core
def test_nano_is_as_good_as_its_documents_say():
    autoencoder, colour, held_out, seen, retrieval = evaluate_base(load_base())
    assert autoencoder.facts["psnr"] >= 27
    assert colour.facts["colour_accuracy"] >= 0.95
    # By joint FD-lite0, concepts that were never trained on are no nearer than with captions shuffled (docs/nano.md).
    assert held_out.facts["paired_share_left"] < 1
    assert seen.facts["joint_share_left"] < 0.9
    assert seen.facts["paired_share_left"] < 0.7
    assert seen.facts["joint_share_left"] < held_out.facts["joint_share_left"]
    assert retrieval.facts["retrieval_share_of_ceiling"] >= 0.6
