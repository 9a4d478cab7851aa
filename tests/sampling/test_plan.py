"""What a control reads decides when it runs, and never what comes out."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from fake_control import FakeControl

from controlkit.bases.residuals import Residuals
from controlkit.controls.control import Reads
from controlkit.images import to_tensor
from controlkit.sampling.plan import ROWS_AT_ONCE, ActiveControl, Plan, rows_at_once
from controlkit.sampling.residual_cache import ResidualCache
from controlkit.sampling.sampler import sample, sample_prompts


@pytest.fixture
def hint_image(condition_image):
    return to_tensor([condition_image])


def draw(base, control, image, **changes):
    settings = {"prompt": "red apple", "seeds": (1, 2, 3), "steps": 6, "guidance": 4.0}
    weights = {key: changes.pop(key) for key in ("start", "end", "weight") if key in changes}
    use = ActiveControl(control, control.encode(image, base), **weights)
    return torch.cat(list(sample(base, uses=[use], **{**settings, **changes})))


READS_NO_NOISE = [Reads.TIME | Reads.TEXT, Reads.TIME, Reads.TEXT, Reads.NOTHING]


@pytest.mark.parametrize("reads", READS_NO_NOISE)
@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_a_control_that_does_not_read_the_noise_draws_the_same_as_one_that_does(tiny_base, hint_image, reads, guidance):
    every_step = FakeControl(reads).pretending_to_read(reads | Reads.NOISE)
    ahead = FakeControl(reads)
    settings = {"guidance": guidance, "start": 0.1, "end": 0.9, "weight": 0.7}
    expected = draw(tiny_base, every_step, hint_image, **settings)
    result = draw(tiny_base, ahead, hint_image, **settings)
    assert (result - expected).abs().max() <= 1e-5
    plain = torch.cat(list(sample(tiny_base, prompt="red apple", seeds=(1, 2, 3), steps=6, guidance=guidance)))
    assert (result - plain).abs().max() > 1e-2
    halves = 2 if guidance > 1 and Reads.TEXT in reads else 1
    assert every_step.batches == [3 * halves] * 4
    assert sum(ahead.batches) <= 4 * halves


def test_it_is_run_once_a_step_and_prompt_whatever_the_number_of_seeds(tiny_base, hint_image):
    for seeds in [(0,), tuple(range(7))]:
        control = FakeControl(Reads.TIME | Reads.TEXT)
        draw(tiny_base, control, hint_image, seeds=seeds, steps=20, batch_size=3)
        assert sum(control.batches) == 20 * 2
        assert len(control.batches) == math.ceil(20 * 2 / ROWS_AT_ONCE)


@pytest.mark.parametrize(("reads", "rows"), [(Reads.TEXT, 2), (Reads.NOTHING, 1)])
def test_one_that_reads_no_time_is_run_once(tiny_base, hint_image, reads, rows):
    """And for both halves of guidance only if it reads the prompt."""
    control = FakeControl(reads)
    draw(tiny_base, control, hint_image, steps=20)
    assert control.batches == [rows]


@pytest.mark.parametrize("reads", [Reads.NOTHING, Reads.TIME | Reads.TEXT, Reads.NOISE | Reads.TIME | Reads.TEXT])
def test_on_the_conditional_half_alone_it_runs_for_that_half_and_adds_nothing_to_the_other(tiny_base, reads):
    control = FakeControl(reads)
    texts = [tiny_base.encode_text([prompt]) for prompt in ("", "red apple")]
    hint = torch.full((1, 1), 0.3)
    x_t = torch.randn(4, tiny_base.latent_channels, 16, 16)
    both, half = (
        Plan([ActiveControl(control, hint, conditional_only=only)], torch.tensor([700, 200]), texts).residuals(0, x_t)
        for only in (False, True)
    )
    assert len(control.batches) == 2
    assert control.batches[0] == control.batches[1] * (2 if Reads.TEXT in reads else 1)
    for one, other in zip(both.tensors(), half.tensors(), strict=True):
        assert len(one) == len(other) == 4
        assert not other[:2].any()
        assert torch.equal(one[2:], other[2:])


def test_one_that_never_acts_is_not_run(tiny_base, hint_image):
    for reads in (Reads.TIME, Reads.NOISE | Reads.TIME):
        control = FakeControl(reads)
        draw(tiny_base, control, hint_image, weight=0.0)
        assert control.batches == []


def test_steps_outside_its_span_are_not_computed(tiny_base, hint_image):
    control = FakeControl(Reads.TIME)
    draw(tiny_base, control, hint_image, steps=10, start=0.2, end=0.5, guidance=1.0)
    assert sum(control.batches) == 3


@pytest.mark.parametrize("megabytes", [0.0, 0.05, 100.0])
def test_a_plan_that_may_keep_little_draws_the_same(tiny_base, hint_image, megabytes, monkeypatch):
    control = FakeControl(Reads.TIME | Reads.TEXT)
    settings = {"seeds": tuple(range(5)), "steps": 20, "batch_size": 2}
    expected = draw(tiny_base, control, hint_image, **settings)
    monkeypatch.setattr(Plan.__init__, "__kwdefaults__", {"megabytes": megabytes})
    control.batches.clear()
    assert torch.equal(draw(tiny_base, control, hint_image, **settings), expected)
    # Three batches of images: what could not be kept is computed again for each.
    assert (sum(control.batches) == 20 * 2) == (megabytes == 100.0)
    assert sum(control.batches) <= 3 * 20 * 2


def bytes_held(plan):
    """Of all tensors that a plan refers to beside its arguments, wherever it keeps them."""

    def tensors(value):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, Residuals):
            yield from value.tensors()
        elif isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                yield from tensors(item)

    own = {name: value for name, value in vars(plan).items() if name not in ("uses", "timesteps", "texts", "cache")}
    storages = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors(own)}
    return sum(storages.values())


@pytest.fixture
def plans(monkeypatch, tiny_base):
    """The plans that are made, and the most bytes that each held while the base predicted."""
    made, most = [], []

    class Recorded(Plan):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            made.append(self)
            most.append(0)

    predict = tiny_base.predict

    def measured(*args):
        most[:] = [max(peak, bytes_held(plan)) for peak, plan in zip(most, made, strict=True)]
        return predict(*args)

    monkeypatch.setattr("controlkit.sampling.sampler.Plan", Recorded)
    monkeypatch.setattr(tiny_base, "predict", measured, raising=False)
    return made, most


@pytest.mark.parametrize("reads", READS_NO_NOISE)
@pytest.mark.parametrize("several", ["prompts", "hints", "nothing"])
def test_a_plan_keeps_nothing_that_no_later_batch_reads(tiny_base, hint_image, reads, several, plans):
    """A plan for one batch holds one window of steps at most while it samples, and nothing afterwards."""
    images = torch.cat([hint_image, 1 - hint_image]) if several == "hints" else hint_image
    prompts = ["red apple", "cat face"] if several == "prompts" else ["red apple"]
    control = FakeControl(reads)
    use = ActiveControl(control, control.encode(images, tiny_base))
    size = 2 if several == "nothing" else 1
    batches = sample_prompts(
        tiny_base, prompts=prompts, seeds=(1, 2), uses=[use], steps=20, guidance=4.0, batch_size=size
    )
    made, most = plans
    for number, _ in enumerate(batches, 1):
        assert len(made) == number
        assert [bytes_held(plan) for plan in made] == [0] * number
    prompt = tiny_base.encode_text(["red apple"])
    one_row = control(None, torch.tensor([5.0]), prompt, use.hint[:1])
    row = sum(tensor.numel() * tensor.element_size() for tensor in one_row.tensors())
    assert 0 < max(most) <= (ROWS_AT_ONCE + 2) * row < 20 * 2 * row


def test_a_plan_for_several_batches_lets_go_after_the_last(tiny_base, hint_image, plans):
    control = FakeControl(Reads.TIME | Reads.TEXT)
    use = ActiveControl(control, control.encode(hint_image, tiny_base))
    held = []
    for _ in sample(tiny_base, prompt="red apple", seeds=range(5), uses=[use], steps=20, batch_size=2):
        ((plan,), _) = plans
        held.append(bytes_held(plan))
    assert held[0] == held[1] > 0
    assert held[2] == 0
    assert sum(control.batches) == 20 * 2  # computed once for all batches


def test_ten_controls_run_in_batches_of_a_bounded_size(tiny_base, hint_image):
    controls = [FakeControl(Reads.TIME | Reads.TEXT) for _ in range(10)]
    uses = [
        ActiveControl(control, control.encode(hint_image, tiny_base), weight=0.1 * place, start=0.1 * (place % 3))
        for place, control in enumerate(controls)
    ]
    settings = {"prompt": "red apple", "seeds": (1, 2), "steps": 10}
    together = torch.cat(list(sample(tiny_base, uses=uses, **settings)))
    every_step = [
        dataclasses.replace(use, control=use.control.pretending_to_read(Reads.NOISE | Reads.TIME | Reads.TEXT))
        for use in uses
    ]
    expected = torch.cat(list(sample(tiny_base, uses=every_step, **settings)))
    assert (together - expected).abs().max() <= 1e-5
    assert max(size for control in controls for size in control.batches) <= ROWS_AT_ONCE


@pytest.mark.parametrize("reads", [Reads.TIME | Reads.TEXT, Reads.NOISE | Reads.TIME | Reads.TEXT])
def test_a_prompt_and_a_hint_for_each_image_equal_one_by_one(tiny_base, hint_image, reads):
    images = torch.cat([hint_image, 1 - hint_image, hint_image * 0.3])
    prompts, seeds = ["red apple", "cat face", "sailboat"], (4, 5, 6)
    control = FakeControl(reads)
    use = ActiveControl(control, control.encode(images, tiny_base))
    together = sample_prompts(tiny_base, prompts=prompts, seeds=seeds, uses=[use], steps=4, guidance=4.0, batch_size=2)
    alone = [
        draw(tiny_base, control, images[i : i + 1], prompt=prompts[i], seeds=seeds[i : i + 1], steps=4)
        for i in range(3)
    ]
    assert (torch.cat(list(together)) - torch.cat(alone)).abs().max() <= 1e-4


def test_what_does_not_read_prompts_runs_once_whatever_their_number(tiny_base, hint_image):
    control, cache = FakeControl(Reads.TIME), ResidualCache()
    use = ActiveControl(control, control.encode(hint_image, tiny_base))

    def drawn(prompts, seeds, cache):
        batches = sample_prompts(tiny_base, prompts=prompts, seeds=seeds, uses=[use], steps=3, cache=cache)
        return torch.cat(list(batches))

    three = drawn(["red apple", "cat face", "sailboat"], (1, 2, 3), cache)
    assert control.batches == [3]  # one row a step
    assert torch.equal(drawn(["red apple"], (1, 4), cache), drawn(["red apple"], (1, 4), None))
    assert torch.allclose(three[:1], drawn(["red apple"], (1,), None), atol=1e-5)


@pytest.mark.parametrize(
    ("width", "height", "rows"), [(64, 64, 32), (512, 512, 32), (1024, 1024, 8), (2048, 1024, 4), (8192, 8192, 1)]
)
def test_fewer_residuals_of_large_images_are_computed_ahead_at_once(width, height, rows):
    assert rows_at_once(width, height) == rows


def test_a_smaller_batch_ahead_draws_the_same(tiny_base, hint_image, monkeypatch):
    control = FakeControl(Reads.TIME | Reads.TEXT)
    expected = draw(tiny_base, control, hint_image, steps=10)
    control.batches.clear()
    monkeypatch.setattr("controlkit.sampling.plan.PIXELS_AT_ONCE", 3 * tiny_base.size**2)
    assert torch.allclose(draw(tiny_base, control, hint_image, steps=10), expected, atol=1e-6)
    assert set(control.batches) == {2}  # both halves of guidance, which are the least
