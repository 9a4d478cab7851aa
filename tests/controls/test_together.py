"""Any two controls of any systems act together: what each adds is what it adds alone, whatever the order."""

from __future__ import annotations

from functools import cache
from itertools import combinations_with_replacement

import pytest
import torch
from made_up import Tapping
from without_plan import naive, one_call

import tiny
from controlkit.bases.text import concatenate
from controlkit.controls.control import Acts
from controlkit.images import to_tensor
from controlkit.sampling.plan import ActiveControl, Plan
from controlkit.sampling.residual_cache import ResidualCache
from controlkit.sampling.sampler import sample
from refusals import refused

SYSTEMS = tiny.unet_systems()
PAIRS = list(combinations_with_replacement(SYSTEMS, 2))
OPTIONS = {"controlnet-xs": {"size_ratio": 0.5}}  # the tiny base divides no smaller
TIMES = torch.tensor([801, 401])
MODES = (("balanced", "balanced"), ("control", "balanced"), ("control", "control"))
WEIGHTS = (0.8, 1.0)


@pytest.fixture(scope="module")
def control(tiny_base):
    """A control that changes images, by its system and seed."""

    @cache
    def make(name, seed):
        torch.manual_seed(seed)
        made = SYSTEMS[name].for_base(tiny_base, **OPTIONS.get(name, {})).eval().requires_grad_(False)
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
        return made.for_condition(made.conditions[0]) if len(made.conditions) > 1 else made

    return make


@pytest.fixture(scope="module")
def hint(tiny_base, control, condition_image):
    image = to_tensor([condition_image])

    @cache
    def make(name, seed):
        with torch.no_grad():
            return tiny.any_hint(control(name, seed), image if seed else 1 - image, tiny_base)

    return make


@pytest.fixture(scope="module")
def use(tiny_base, control, hint):
    def make(name, seed, mode="balanced", **settings):
        settings.setdefault("weight", WEIGHTS[seed])
        return ActiveControl.in_mode(mode, tiny_base, control=control(name, seed), hint=hint(name, seed), **settings)

    return make


@pytest.fixture(scope="module")
def texts(tiny_base):
    return [tiny_base.encode_text([prompt]) for prompt in ("", "red apple")]


@pytest.fixture(scope="module")
def x_t():
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def planned(base, uses, texts, x_t):
    """One call of the base, both halves of guidance at once."""
    both = torch.cat([x_t, x_t])
    plan = Plan(uses, TIMES, texts)
    text = concatenate(*(part.expand(len(x_t)) for part in plan.text(0)))
    return base.predict(both, TIMES[0], text, plan.residuals(0, both), plan.taps(0, both, base))


def halves(base, uses, texts, x_t):
    """The same, one half after the other."""
    t = TIMES[0].expand(len(x_t))
    text = [part.expand(len(x_t)) for part in texts]
    return torch.cat([one_call(base, uses, x_t, t, text[half], positive=bool(half)) for half in (0, 1)])


def furthest(one, other):
    return float((one - other).abs().max())


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_every_pair_of_systems_acts_together(first, second, tiny_base, use, texts, x_t):
    for modes in MODES:
        uses = [use(first, 0, modes[0]), use(second, 1, modes[1])]
        both = planned(tiny_base, uses, texts, x_t)
        assert both.isfinite().all()
        assert furthest(both, halves(tiny_base, uses, texts, x_t)) <= 1e-4
        assert furthest(both, planned(tiny_base, uses[::-1], texts, x_t)) <= 1e-4
        if modes == ("control", "control"):
            # No control at all on the other half, but tokens that stand for none.
            tokens = [one for one in uses if Acts.TOKENS in one.control.acts]
            assert torch.allclose(both[:2], planned(tiny_base, tokens, texts, x_t)[:2], atol=1e-5)
    off = [use(first, 0, weight=0.0), use(second, 1, weight=0.0)]
    uses = [use(first, 0), use(second, 1)]
    both = planned(tiny_base, uses, texts, x_t)
    for place, one in enumerate(uses):
        alone = planned(tiny_base, [one], texts, x_t)
        beside_nothing = [off[1 - place], one] if place else [one, off[1 - place]]
        assert torch.equal(planned(tiny_base, beside_nothing, texts, x_t), alone)
        assert furthest(both, alone) > 1e-4


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_every_pair_samples_as_a_loop_without_plan_and_cache_does(first, second, tiny_base, use):
    uses = [use(first, 0, end=0.5), use(second, 1, "control")]
    settings = {"steps": 2, "guidance": 3.0}
    expected = naive(tiny_base, uses, ["red apple"], (1, 2), **settings)
    cache = ResidualCache()
    for _ in range(2):
        made = sample(tiny_base, prompt="red apple", seeds=(1, 2), uses=uses, batch_size=2, cache=cache, **settings)
        assert furthest(torch.cat(list(made)), expected) <= 1e-4


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_masks_divide_the_image_between_a_pair(first, second, tiny_base, use, texts, x_t):
    left = torch.zeros(1, 1, 64, 64)
    left[..., :32] = 1
    able = [SYSTEMS[name].acts == Acts.RESIDUALS for name in (first, second)]
    for name, can in zip((first, second), able, strict=True):
        if not can:
            with refused("unsupported", SYSTEMS[name].title, "mask"):
                use(name, 0, mask=left)
    masks = [left if able[0] else None, 1 - left if able[1] else None]
    uses = [use(first, 0, mask=masks[0]), use(second, 1, mask=masks[1])]
    both = planned(tiny_base, uses, texts, x_t)
    assert furthest(both, halves(tiny_base, uses, texts, x_t)) <= 1e-4
    if any(able):
        assert furthest(both, planned(tiny_base, [use(first, 0), use(second, 1)], texts, x_t)) > 1e-4
        nowhere = torch.zeros_like(left)
        place = able.index(True)
        hidden = use((first, second)[place], place, mask=nowhere)
        other = uses[1 - place]
        assert torch.equal(planned(tiny_base, [hidden, other], texts, x_t), planned(tiny_base, [other], texts, x_t))


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_tokens_of_a_pair_are_in_the_order_of_the_request(first, second, use, texts):
    uses = [use(first, 0), use(second, 1)]
    telling = [one for one in uses if Acts.TOKENS in one.control.acts]
    length = texts[1].tokens.shape[1]
    made = Plan(uses, TIMES, texts).text(0)
    expected = [one.control.tokens(one.hint) * one.weight for one in telling]
    assert torch.equal(made[1].tokens[:, :length], texts[1].tokens)
    assert made[0].tokens.shape == made[1].tokens.shape
    if telling:
        assert torch.allclose(made[1].tokens[:, length:], torch.cat(expected, 1), atol=1e-6)
    else:
        assert made[1].tokens.shape[1] == length


@pytest.mark.parametrize("name", [name for name, kind in SYSTEMS.items() if Acts.TAPS in kind.acts])
def test_a_replacement_at_its_points_refuses_it_in_words(name, tiny_base, use, texts, x_t):
    tapping = use(name, 0)
    taps = Plan([tapping], TIMES, texts).taps(0, torch.cat([x_t, x_t]), tiny_base)
    assert taps
    for point in taps:
        alone = ActiveControl(Tapping(point, replaces=True), torch.ones(1, 1))
        with refused("contradiction", point, "no other control"):
            planned(tiny_base, [tapping, alone], texts, x_t)
