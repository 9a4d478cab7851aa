"""Unchanged clients get their images: `webuiapi` itself, and bodies as the sources of others build them."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def webui(server):
    webuiapi = pytest.importorskip("webuiapi")
    return webuiapi.WebUIApi(host="127.0.0.1", port=server.port, sampler="DDIM", steps=4)


def test_webuiapi_draws_from_a_prompt(webui):
    result = webui.txt2img(prompt="red apple", width=64, height=64, seed=7, batch_size=2)
    assert [image.size for image in result.images] == [(64, 64)] * 2
    assert result.info["all_seeds"] == [7, 8]
    assert "Seed: 7" in result.image.info["parameters"]
