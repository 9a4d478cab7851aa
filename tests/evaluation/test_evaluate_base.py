"""The whole evaluation of the base that ships (minutes)."""

from __future__ import annotations

import pytest

from controlkit.bases.load import load_base
from controlkit.evaluation.base import evaluate_base


@pytest.mark.slow
def test_nano_is_as_good_as_its_documents_say():
    autoencoder, colour, distribution, retrieval = evaluate_base(load_base())
    assert autoencoder.facts["psnr"] >= 26
    assert colour.facts["colour_accuracy"] >= 0.9
    assert distribution.facts["share_of_baseline"] < 1
    assert retrieval.facts["retrieval_top5"] > 5 / 50
