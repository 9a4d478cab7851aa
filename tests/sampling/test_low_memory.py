"""Sampling in less memory: text encoders aside, images decoded one by one; the images are the same."""

from __future__ import annotations

import copy

import pytest
import torch

from controlkit.sampling.generate import generate
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.sampler import sample_prompts

SETTINGS = {"prompts": ["red apple", "cat face", "sailboat"], "seeds": range(3), "batch_size": 2, "steps": 3}


def text_devices(base) -> set[str]:
    return {parameter.device.type for encoder in base.text_encoders for parameter in encoder.parameters()}


def test_images_are_the_same(tiny_base):
    made = [torch.cat(list(sample_prompts(tiny_base, low_memory=low, **SETTINGS))) for low in (False, True)]
    assert (made[0] - made[1]).abs().max() < 1e-5
    assert not tiny_base.vae.use_slicing


def test_images_are_decoded_one_by_one(tiny_base, monkeypatch):
    sizes, decode = [], tiny_base.vae._decode
    monkeypatch.setattr(tiny_base.vae, "_decode", lambda z, **more: sizes.append(len(z)) or decode(z, **more))
    for low, expected in ((True, [1, 1, 1]), (False, [2, 1])):
        sizes.clear()
        list(sample_prompts(tiny_base, low_memory=low, **SETTINGS))
        assert sizes == expected


def test_text_encoders_are_on_the_device_for_prompts_alone(tiny_base):
    """The meta device stands for the accelerator."""
    base = copy.deepcopy(tiny_base).to("meta")
    with base.text_encoders_loaded(aside=False):
        assert text_devices(base) == {"meta"}
    assert text_devices(base) == {"meta"}
    base = copy.deepcopy(tiny_base)
    moves = []
    for encoder in base.text_encoders:
        encoder.to = lambda device, moves=moves: moves.append(str(device))
    with base.text_encoders_loaded(aside=True):
        assert moves == ["cpu"]
        base.denoiser.to("meta")
        moves.clear()
    assert moves == ["cpu"]
    moves.clear()
    with pytest.raises(ZeroDivisionError), base.text_encoders_loaded(aside=True):
        assert moves == ["meta"]
        1 / 0  # noqa: B018
    assert moves == ["meta", "cpu"]
    moves.clear()
    with base.text_encoders_loaded(aside=False):  # back, though the next call does not ask for it
        assert moves == ["meta"]
    with base.text_encoders_loaded(aside=False):
        pass
    assert moves == ["meta"]
    moves.clear()
    base.text_device = torch.device("cpu")
    with base.text_encoders_loaded(aside=True):
        assert moves == ["cpu"]


def test_a_request_in_low_memory(tiny_base, monkeypatch):
    asked = []
    loaded = tiny_base.text_encoders_loaded
    monkeypatch.setattr(tiny_base, "text_encoders_loaded", lambda *, aside: asked.append(aside) or loaded(aside=aside))
    request = GenerateRequest(prompt="red apple", steps=2, low_memory=True)
    assert GenerateRequest.from_json(request.to_json()) == request
    generate(request, base=tiny_base)
    assert asked == [True]
