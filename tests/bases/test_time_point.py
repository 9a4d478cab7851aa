"""The point at the embedding of the time, taps that no weight scales, and blocks that run again more than once."""

from __future__ import annotations

import copy

import pytest
import torch

import tiny
from controlkit.bases.taps import Tap
from controlkit.controls.control import Acts, Reads
from controlkit.sampling.plan import ActiveControl, Plan


@pytest.fixture
def inputs(tiny_base):
    torch.manual_seed(3)
    return torch.randn(2, 4, 16, 16), torch.tensor([40, 700]), tiny_base.encode_text(["red apple", "cat face"])


@pytest.mark.parametrize("make", [tiny.build_tiny_base, tiny.build_tiny_sdxl], ids=["sd", "sdxl"])
def test_all_blocks_see_what_a_tap_adds_to_the_time(make):
    """The same as another bias of the last layer of the time's embedding."""
    base = make()
    shift = torch.linspace(-2, 2, base.unet.time_embedding.linear_2.out_features)
    x_t, t, text = torch.randn(2, 4, 16, 16), torch.tensor([40, 700]), base.encode_text(["red apple", "cat face"])
    plain = base.predict(x_t, t, text)
    made = base.predict(x_t, t, text, taps={"time": [Tap(function=lambda stream: shift.expand_as(stream))]})
    one = base.predict(x_t, t, text, taps={"time": [Tap(function=lambda stream: shift[None], rows=(1, 2))]})
    assert torch.equal(base.predict(x_t, t, text), plain)
    with torch.no_grad():
        base.unet.time_embedding.linear_2.bias += shift
    expected = base.predict(x_t, t, text)
    assert (made - expected).abs().max() <= 1e-5 < 1e-2 < (made - plain).abs().max()
    assert (one[1] - expected[1]).abs().max() <= 1e-5 and (one[0] - plain[0]).abs().max() <= 1e-6


class _Shifting(torch.nn.Module):
    """What a plan asks of a control that acts by taps."""

    title, reads, acts = "a fake control", Reads.NOTHING, Acts.TAPS
    conditional_only = reads_tokens = False

    def __init__(self, weighted, replaces):
        super().__init__()
        self.tap = Tap(function=lambda stream: stream + 1, weighted=weighted, replaces=replaces)

    def taps(self, base, x_t, t, text, hint):
        return {"time": self.tap}

    def unconditional(self, hint):
        return None

    def replacements(self):
        return {}


@pytest.mark.parametrize("replaces", [False, True])
def test_a_weight_scales_no_tap_that_says_so(tiny_base, inputs, replaces):
    x_t, _, text = inputs
    stream = torch.linspace(0, 1, 8)[None]
    whole, half, none = {}, {}, {}
    for weight, made in ((1.0, whole), (0.5, half), (0.0, none)):
        for weighted in (True, False):
            use = ActiveControl(_Shifting(weighted, replaces), torch.zeros(1), weight=weight)
            taps = Plan([use], torch.tensor([40]), [text]).taps(0, x_t, tiny_base)
            made[weighted] = [tap.function(stream) for tap in taps.get("time", ())]
    assert none == {True: [], False: []}  # without weight it does not act at all
    assert torch.equal(whole[True][0], whole[False][0]) and torch.equal(half[False][0], whole[False][0])
    expected = stream + 0.5 if replaces else (stream + 1) / 2
    assert torch.allclose(half[True][0], expected)


def test_several_backward_passes_over_checkpointed_blocks_agree(tiny_base, inputs):
    base = copy.deepcopy(tiny_base)
    x_t, t, text = inputs
    scale = torch.nn.Parameter(torch.tensor(0.3))
    taps = {point: [Tap(function=lambda stream: stream * scale)] for point in ("time", "encoder.1.in", "decoder.1")}

    def gradients(times):
        loss = base.predict(x_t, t, text, taps=taps).pow(2).mean()
        return [torch.autograd.grad(loss, scale, retain_graph=True)[0] for _ in range(times)]

    (expected,) = gradients(1)
    base.checkpoint_activations()
    assert expected != 0
    assert all(torch.equal(made, expected) for made in gradients(3))
