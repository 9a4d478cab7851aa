"""The rules of the three ways to act: rows of guidance, several taps at one point, recomputation, removal, tokens, and
that a plan changes when work is done and never what comes out."""

from __future__ import annotations

import pytest
import torch
from made_up import Adding, Member, Stateful, Tapping, Telling
from torch import nn
from without_plan import naive

import tiny
from controlkit.bases.prompt_encoding import TextOptions
from controlkit.bases.residuals import Residuals
from controlkit.bases.taps import Tap
from controlkit.bases.text import concatenate
from controlkit.controls.apply import predict_under
from controlkit.controls.control import Acts, Reads
from controlkit.images import to_tensor
from controlkit.sampling.plan import ActiveControl, Plan
from controlkit.sampling.residual_cache import ResidualCache, digest
from controlkit.sampling.sampler import sample, sample_prompts
from refusals import refused

STEPS = 4
SETTINGS = {"prompt": "red apple", "seeds": (1, 2, 3), "steps": STEPS, "guidance": 4.0}
TIMES = torch.tensor([801, 401])


@pytest.fixture
def hint(condition_image):
    return to_tensor([condition_image]).mean((1, 2, 3))[:, None]


@pytest.fixture(scope="module")
def texts(tiny_base):
    return [tiny_base.encode_text([prompt]) for prompt in ("", "red apple")]


@pytest.fixture(scope="module")
def x_t():
    """Two images, once for each half of guidance."""
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(4))
    return torch.cat([noise, noise])


@torch.no_grad()
def prediction(base, uses, texts, x_t, index=0, times=TIMES):
    """One call of the base under a plan, both halves of guidance."""
    plan = Plan(uses, times, texts)
    text = concatenate(*(part.expand(len(x_t) // len(texts)) for part in plan.text(index)))
    return base.predict(x_t, times[index], text, plan.residuals(index, x_t), plan.taps(index, x_t, base))


def draw(base, uses, **changes):
    return torch.cat(list(sample(base, uses=uses, **{**SETTINGS, **changes})))


def hooks_of(base):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in base.unet.modules())


class TestGuidance:
    @pytest.mark.parametrize("replaces", [False, True])
    def test_a_tap_for_one_half_sees_its_rows_alone_and_leaves_the_others_exactly_as_they_are(
        self, tiny_base, hint, texts, x_t, replaces
    ):
        control = Tapping("encoder.1", "decoder.2", replaces=replaces)
        plain = prediction(tiny_base, [], texts, x_t)
        half = prediction(tiny_base, [ActiveControl(control, hint, conditional_only=True)], texts, x_t)
        assert [len(stream) for stream in control.seen] == [2, 2] and control.runs == [2]
        assert torch.equal(half[:2], plain[:2])
        assert (half[2:] - plain[2:]).abs().max() > 1e-3
        both = prediction(tiny_base, [ActiveControl(control, hint)], texts, x_t)
        assert (both[:2] - plain[:2]).abs().max() > 1e-3
        assert torch.allclose(both[2:], half[2:], atol=1e-6)

    def test_each_of_several_taps_gets_its_own_rows(self, tiny_base, hint, texts, x_t):
        everywhere, half = Tapping("middle"), Tapping("middle")
        uses = [ActiveControl(everywhere, hint), ActiveControl(half, hint, conditional_only=True)]
        made = prediction(tiny_base, uses, texts, x_t)
        assert (len(everywhere.seen[0]), len(half.seen[0])) == (4, 2)
        assert torch.equal(half.seen[0], everywhere.seen[0][2:])
        assert torch.equal(made[:2], prediction(tiny_base, uses[:1], texts, x_t)[:2])

    @pytest.mark.parametrize("reads", [Reads.NOTHING, Reads.TIME | Reads.TEXT, Reads.NOISE])
    def test_residuals_of_one_half_leave_the_other_exactly_as_it_is(self, tiny_base, hint, texts, x_t, reads):
        sites = ("skip.1", "middle", "stage.0", "encoder.2")
        use = ActiveControl(Adding(tiny_base, sites, reads), hint, conditional_only=True)
        made, plain = (prediction(tiny_base, uses, texts, x_t) for uses in ([use], []))
        assert torch.equal(made[:2], plain[:2])
        assert (made[2:] - plain[2:]).abs().max() > 1e-3

    def test_a_control_that_is_meant_for_one_half_acts_on_it_alone(self, tiny_base, hint, texts, x_t):
        meant = type("Meant", (Tapping,), {"conditional_only": True})("middle")
        plain, made = (prediction(tiny_base, uses, texts, x_t) for uses in ([], [ActiveControl(meant, hint)]))
        assert torch.equal(made[:2], plain[:2]) and not torch.equal(made[2:], plain[2:])

    def test_outside_its_start_and_end_a_control_changes_nothing(self, tiny_base, hint, texts, x_t):
        plain = prediction(tiny_base, [], texts, x_t, index=1)
        for control in (Tapping("middle"), Adding(tiny_base), Telling(tiny_base)):
            use = ActiveControl(control, hint, end=0.5)
            assert not torch.equal(prediction(tiny_base, [use], texts, x_t), prediction(tiny_base, [], texts, x_t))
            assert torch.equal(prediction(tiny_base, [use], texts, x_t, index=1), plain)
            off = ActiveControl(control, hint, weight=0.0)
            assert torch.equal(prediction(tiny_base, [off], texts, x_t, index=1), plain)

    @pytest.mark.parametrize("replaces", [False, True])
    def test_a_weight_scales_what_a_tap_changes(self, tiny_base, hint, texts, x_t, replaces):
        seen = []
        watch = Tapping("decoder.0", act=lambda stream, value: seen.append(stream.clone()))
        control = Tapping("middle", replaces=replaces)
        for weight in (0.0, 0.25, 1.0):
            uses = [ActiveControl(control, hint, weight), ActiveControl(watch, hint)]
            prediction(tiny_base, uses, texts, x_t)
        assert torch.allclose(seen[1] - seen[0], (seen[2] - seen[0]) / 4, atol=1e-5)


class TestSeveralAtOnePoint:
    def test_each_sees_the_value_from_before_any_and_they_are_summed(self, tiny_base, hint, texts, x_t):
        taps = [Tapping("encoder.3", act=lambda stream, value, k=k: stream * k + k) for k in (0.5, -0.2, 3.0)]
        after = Tapping("middle.in", act=lambda stream, value: None)
        uses = [ActiveControl(control, hint) for control in (*taps, after)]
        prediction(tiny_base, uses, texts, x_t)
        first = taps[0].seen[0]
        assert all(torch.equal(control.seen[0], first) for control in taps)
        assert torch.allclose(after.seen[0], first + first * 3.3 + 3.3, atol=1e-5)

    def test_they_come_in_the_order_of_the_request(self, tiny_base, hint, texts, x_t):
        plan = Plan([ActiveControl(Tapping("middle"), hint, weight) for weight in (2.0, 3.0)], TIMES, texts)
        (first, second) = plan.taps(0, x_t, tiny_base)["middle"]
        stream = torch.ones(4, 32, 8, 8)
        assert torch.allclose(first.function(stream) * 1.5, second.function(stream))
        other = Plan(list(reversed(plan.uses)), TIMES, texts).taps(0, x_t, tiny_base)["middle"]
        assert torch.equal(other[0].function(stream), second.function(stream))

    def test_a_replacement_refuses_company_in_words(self, tiny_base, hint):
        alone = ActiveControl(Tapping("middle", replaces=True), hint)
        draw(tiny_base, [alone, ActiveControl(Tapping("decoder.0"), hint)], steps=1)
        with refused("contradiction", "middle"):
            draw(tiny_base, [alone, ActiveControl(Tapping("middle"), hint)])
        assert hooks_of(tiny_base) == 0

    @pytest.mark.parametrize(
        ("site", "point"),
        [("middle", "middle"), ("stage.0", "encoder.2"), ("stage.1", "encoder.3"), ("encoder.2", "encoder.2")],
    )
    def test_residuals_come_before_taps(self, tiny_base, hint, texts, x_t, site, point):
        control, watch = Adding(tiny_base, (site,)), Tapping(point, act=lambda stream, value: None)
        use = ActiveControl(control, hint)
        plan = Plan([use], TIMES, texts)
        plain = Tapping(point, act=lambda stream, value: None)
        prediction(tiny_base, [ActiveControl(plain, hint)], texts, x_t)
        made = prediction(tiny_base, [ActiveControl(watch, hint), use], texts, x_t)
        assert torch.allclose(watch.seen[0], plain.seen[0] + plan.residuals(0, x_t)[site], atol=1e-5)
        # And a tap that changes nothing changes nothing of how the residual enters.
        assert torch.allclose(made, prediction(tiny_base, [use], texts, x_t), atol=1e-5)


class TestTraining:
    @pytest.fixture
    def base(self):
        return tiny.build_tiny_base()

    def loss_and_gradients(self, control, base, backwards=1):
        control.zero_grad()
        generator = torch.Generator().manual_seed(2)
        x_t = torch.randn(2, 4, 16, 16, generator=generator)
        loss = 0.0
        for number, hint in enumerate((0.4, 0.9)):  # two calls before the first backward pass: each has its own state
            t = torch.tensor([700 - number, 20])
            text = base.encode_text(["red apple", "cat face"])
            made = predict_under(control, base, x_t * (number + 1), t, text, torch.full((2, 1), hint))
            loss = loss + made.pow(2).mean()
        for number in range(backwards):
            loss.backward(retain_graph=number + 1 < backwards)
        return loss.item(), [parameter.grad.clone() for parameter in control.parameters()]

    @pytest.mark.parametrize("replaces", [False, True])
    @pytest.mark.parametrize(("first", "second"), [("encoder.0", "encoder.3"), ("encoder.1", "middle")])
    def test_gradients_with_and_without_checkpointing_agree(self, base, first, second, replaces):
        control = Stateful(base, first, second, replaces)
        loss, expected = self.loss_and_gradients(control, base)
        assert all(gradient.abs().max() > 0 for gradient in expected)
        base.checkpoint_activations()
        same, made = self.loss_and_gradients(control, base)
        assert same == pytest.approx(loss, rel=1e-6)
        for one, other in zip(made, expected, strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)
        assert hooks_of(base) == 0

    def test_a_graph_that_is_kept_goes_backwards_twice(self, base):
        control = Stateful(base, "encoder.1", "encoder.3")
        base.checkpoint_activations()
        _, once = self.loss_and_gradients(control, base)
        _, twice = self.loss_and_gradients(control, base, backwards=2)
        for one, two in zip(once, twice, strict=True):
            assert torch.allclose(2 * one, two, rtol=1e-4, atol=1e-7)

    def test_residuals_that_enter_by_hooks_are_there_again_for_recomputed_blocks(self, base):
        """They meet a tap, or enter where the UNet has no argument for them."""
        weight = nn.Parameter(torch.tensor(0.7))
        taps = {"encoder.3": [Tap(function=lambda stream: stream.cos())]}

        def gradient():
            weight.grad = None
            residuals = Residuals(
                {
                    site: torch.ones(1, wide, 64 // pixels, 64 // pixels) * weight
                    for site, (wide, pixels) in base.sites.items()
                    if site in ("encoder.1", "stage.0", "middle")
                }
            )
            made = base.predict(
                torch.ones(1, 4, 16, 16), torch.tensor([5]), base.encode_text(["cat face"]), residuals, taps
            )
            made.pow(2).mean().backward()
            return weight.grad.item()

        expected = gradient()
        base.checkpoint_activations()
        assert expected != 0 and gradient() == pytest.approx(expected, rel=1e-4)

    def test_what_the_taps_of_one_call_did_is_not_seen_by_the_next(self, base):
        control = Stateful(base, "encoder.1", "encoder.3")
        inputs = (torch.ones(1, 4, 16, 16), torch.tensor([5]), base.encode_text(["cat face"]))
        with torch.no_grad():
            first = predict_under(control, base, *inputs, torch.ones(1, 1))
            predict_under(control, base, *inputs, torch.zeros(1, 1))
            assert torch.equal(predict_under(control, base, *inputs, torch.ones(1, 1)), first)


class TestRemoval:
    def test_hooks_are_gone_after_the_call(self, tiny_base, hint, texts, x_t):
        plain = prediction(tiny_base, [], texts, x_t)
        prediction(tiny_base, [ActiveControl(Tapping("middle", "encoder.1"), hint)], texts, x_t)
        assert hooks_of(tiny_base) == 0
        assert torch.equal(prediction(tiny_base, [], texts, x_t), plain)

    @pytest.mark.parametrize("point", ["encoder.0", "middle.in", "decoder.3"])
    def test_and_after_an_exception_in_a_tap(self, tiny_base, hint, texts, x_t, point):
        plain = prediction(tiny_base, [], texts, x_t)

        def fail(stream, value):
            raise KeyboardInterrupt

        uses = [ActiveControl(Tapping("encoder.1"), hint), ActiveControl(Tapping(point, act=fail), hint)]
        with pytest.raises(KeyboardInterrupt):
            prediction(tiny_base, uses, texts, x_t)
        assert hooks_of(tiny_base) == 0 and tiny_base._active_taps is None
        assert torch.equal(prediction(tiny_base, [], texts, x_t), plain)

    def test_and_after_an_exception_in_the_base(self, tiny_base, hint, texts, x_t, monkeypatch):
        with monkeypatch.context() as patched, pytest.raises(RuntimeError):
            patched.setattr(tiny_base.unet.mid_block, "forward", lambda *_, **__: torch.zeros(1) @ torch.zeros(2))
            prediction(tiny_base, [ActiveControl(Tapping("middle", "encoder.1"), hint)], texts, x_t)
        assert hooks_of(tiny_base) == 0

    def test_a_point_that_the_base_lacks_is_refused_before_anything_is_hung(self, tiny_base, hint, texts, x_t):
        with refused("incompatible", "'decoder.12'", "decoder.3"):
            prediction(tiny_base, [ActiveControl(Tapping("middle", "decoder.12"), hint)], texts, x_t)
        assert hooks_of(tiny_base) == 0


class TestTokens:
    def lengths(self, plan, index):
        return [part.tokens.shape[1] for part in plan.text(index)]

    def test_both_halves_have_one_length_zeros_where_the_control_does_not_act(self, tiny_base, hint, texts):
        length = texts[0].tokens.shape[1]
        plan = Plan([ActiveControl(Telling(tiny_base), hint, 0.5, conditional_only=True)], TIMES, texts)
        assert self.lengths(plan, 0) == [length + 2, length + 2]
        without, with_prompt = plan.text(0)
        assert not without.tokens[:, length:].any()
        own = Telling(tiny_base).tokens(hint)
        assert torch.equal(with_prompt.tokens[:, length:], own * 0.5)
        assert torch.equal(with_prompt.tokens[:, :length], texts[1].tokens)

    def test_or_those_that_stand_for_none_with_its_weight(self, tiny_base, hint, texts):
        class Nulled(Telling):
            def unconditional(self, hint):
                return torch.full_like(hint, 3.0)

        length, told = texts[0].tokens.shape[1], Telling(tiny_base)
        for half in (True, False):
            plan = Plan([ActiveControl(Nulled(tiny_base), hint, 0.5, conditional_only=half)], TIMES, texts)
            nothing, own = (part.tokens[:, length:] for part in plan.text(0))
            assert torch.equal(nothing, told.tokens(torch.full_like(hint, 3.0)) * 0.5)
            assert torch.equal(own, told.tokens(hint) * 0.5)

    def test_on_the_conditional_branch_they_act_whatever_the_length_of_the_negative_prompt(
        self, tiny_base, hint, texts, x_t
    ):
        long = tiny_base.encode_text(["cat BREAK cat BREAK cat"], options=TextOptions(syntax="weighted"))
        assert long.tokens.shape[1] == 3 * texts[0].tokens.shape[1]
        uses = [ActiveControl(Telling(tiny_base), hint)]
        made = []
        for negative in (texts[0], long):
            plan = Plan(uses, TIMES, [negative, texts[1]])
            assert len(set(self.lengths(plan, 0))) == 1
            made.append(tiny_base.predict(x_t[:1], TIMES[:1], plan.text(0)[1]))
        without = tiny_base.predict(x_t[:1], TIMES[:1], texts[1])
        assert (made[0] - made[1]).abs().max() < 1e-5 < (made[0] - without).abs().max() / 10

    def test_they_are_there_from_start_to_end_and_in_the_order_of_the_request(self, tiny_base, hint, texts):
        first, second = Telling(tiny_base), Telling(tiny_base, scale=-1.0)
        uses = [ActiveControl(first, hint, end=0.5), ActiveControl(second, hint, conditional_only=True)]
        plan = Plan(uses, TIMES, texts)
        length = texts[0].tokens.shape[1]
        assert self.lengths(plan, 0) == [length + 4] * 2 and self.lengths(plan, 1) == [length + 2] * 2
        assert torch.equal(plan.text(0)[1].tokens[:, length:], torch.cat([first.tokens(hint), second.tokens(hint)], 1))
        assert torch.equal(plan.text(0)[0].tokens[:, length : length + 2], first.tokens(hint))
        assert plan.text(1) is plan.text(1)  # made once

    def test_of_each_image_its_own(self, tiny_base, hint):
        hints = torch.cat([hint, hint * 3, hint * 0])
        use = ActiveControl(Telling(tiny_base), hints)
        settings = {"steps": 2, "guidance": 4.0}
        together = torch.cat(
            list(sample_prompts(tiny_base, prompts=["cat face"], seeds=(1, 2, 3), uses=[use], batch_size=2, **settings))
        )
        for place in range(3):
            own = ActiveControl(Telling(tiny_base), hints[place : place + 1])
            alone = draw(tiny_base, [own], prompt="cat face", seeds=(place + 1,), **settings)
            assert torch.allclose(together[place : place + 1], alone, atol=1e-4)

    def test_a_control_reads_the_tokens_of_others_only_if_it_says_so(self, tiny_base, hint, texts, x_t):
        told = ActiveControl(Telling(tiny_base), hint)
        for make in (lambda **own: Adding(tiny_base, reads=Reads.TEXT, **own), lambda **own: Tapping("middle", **own)):
            plain, reading = make(), make(reads_tokens=True)

            def value(control, *others):
                plan = Plan([ActiveControl(control, hint), *others], TIMES, texts)
                if Acts.RESIDUALS in control.acts:
                    return plan.residuals(0, x_t)["middle"]
                (tap,) = plan.taps(0, x_t, tiny_base)["middle"]
                return tap.function(torch.ones(4, 32, 8, 8))

            assert torch.equal(value(plain, told), value(plain))
            assert torch.equal(value(reading), value(plain))
            assert not torch.allclose(value(reading, told), value(reading), atol=1e-3)

    def test_in_training_too(self, tiny_base, hint):
        class Both(Telling):
            acts = Acts.TOKENS | Acts.RESIDUALS
            reads = Reads.TEXT

            def forward(self, x_t, t, text, hint):
                self.length = text.tokens.shape[1]
                return Residuals()

        text = tiny_base.encode_text(["cat face"])
        inputs = (torch.ones(1, 4, 16, 16), torch.tensor([5]), text, hint)
        for reads_tokens in (False, True):
            control = Both(tiny_base, reads_tokens=reads_tokens)
            with torch.no_grad():
                made = predict_under(control, tiny_base, *inputs)
                extended = text.extended(control.tokens(hint))
                assert torch.equal(made, tiny_base.predict(*inputs[:2], extended))
            assert control.length == text.tokens.shape[1] + 2 * reads_tokens


class NamedHints(Adding):
    """Hints of two tensors, one of them the same for every image."""

    def encode(self, inputs, base):
        return {"own": inputs.mean((1, 2, 3))[:, None], "shared": torch.full((1, 2), 0.7)}


class OneRow(Adding):
    """Residuals of one row whatever the batch, which means the same for all."""

    def forward(self, x_t, t, text, hint):
        return super().forward(x_t, t, text, hint).rows(0, 1)


class TestPlan:
    """Every way to act at once, against a loop that knows no plan."""

    def uses(self, base, images):
        made = [
            (Adding(base, reads=Reads.NOTHING), {"weight": 0.6}),
            (Telling(base), {"weight": 0.5, "end": 0.5}),
            (NamedHints(base, ("skip.2", "stage.0"), Reads.TEXT | Reads.TIME), {"start": 0.25}),
            (Adding(base, ("encoder.1",), Reads.NOISE | Reads.TIME), {"conditional_only": True}),
            (Tapping("middle", "decoder.1"), {"weight": 0.4, "conditional_only": True}),
            (Adding(base, ("middle",), Reads.TEXT, reads_tokens=True), {"weight": 0.3}),
            (Tapping("middle", reads=Reads.TEXT, reads_tokens=True), {"end": 0.75}),
            (Telling(base, scale=-0.3), {"start": 0.25, "conditional_only": True}),
            (OneRow(base, ("stage.1",), Reads.NOTHING), {"conditional_only": True, "start": 0.5}),
            (OneRow(base, ("skip.0",), Reads.NOTHING), {}),
        ]
        # The last two give one row for all, so their hints are of the first image.
        hints = [control.encode(images if place < 8 else images[:1], base) for place, (control, _) in enumerate(made)]
        return [ActiveControl(control, hint, **settings) for (control, settings), hint in zip(made, hints, strict=True)]

    @pytest.fixture
    def images(self, condition_image):
        image = to_tensor([condition_image])
        return torch.cat([image, 1 - image, image * 0.2])

    @pytest.mark.parametrize("batch_size", [2, 3])
    @pytest.mark.parametrize("count", [1, 3], ids=["one hint for all", "a hint for each image"])
    def test_it_draws_what_a_loop_without_one_draws(self, tiny_base, images, count, batch_size):
        prompts = ["red apple", "cat face", "sailboat"][:count]
        expected = naive(tiny_base, self.uses(tiny_base, images[:count]), prompts, (1, 2, 3), STEPS, 4.0)
        uses = self.uses(tiny_base, images[:count])
        settings = {"steps": STEPS, "guidance": 4.0, "batch_size": batch_size}
        made = torch.cat(list(sample_prompts(tiny_base, prompts=prompts, seeds=(1, 2, 3), uses=uses, **settings)))
        assert (made - expected).abs().max() <= 1e-4
        assert (made - draw(tiny_base, [])).abs().max() > 1e-2

    def test_what_can_run_ahead_runs_once_beside_what_cannot(self, tiny_base, images):
        uses = self.uses(tiny_base, images[:1])
        draw(tiny_base, uses)
        rows = [sum(use.control.runs) for use in uses]
        # Nothing: once. Time and text: both halves of three steps. The noise: every image at each of four steps. A tap
        # in one half: every image. Text with tokens that come and go: for each step, both halves.
        assert rows[0] == 1 and rows[2] == 2 * 3 and rows[3] == 3 * 4 and rows[4] == 3 * 4 and rows[5] == 2 * 4

    def test_with_a_cache_it_draws_the_same_and_what_runs_ahead_does_not_run_again(self, tiny_base, images):
        uses = self.uses(tiny_base, images[:1])
        cache = ResidualCache()
        expected = draw(tiny_base, uses)
        assert torch.equal(draw(tiny_base, uses, cache=cache), expected)
        runs = [len(use.control.runs) for use in uses]
        assert torch.equal(draw(tiny_base, uses, cache=cache), expected)
        again = [len(use.control.runs) - before for use, before in zip(uses, runs, strict=True)]
        ahead = [Acts.RESIDUALS in use.control.acts and Reads.NOISE not in use.control.reads for use in uses]
        assert [bool(count) for count in again] == [
            not early and Acts.TOKENS not in use.control.acts for early, use in zip(ahead, uses, strict=True)
        ]
        # Without the tokens before it, what reads them runs anew, and nothing else that runs ahead does.
        runs = [len(use.control.runs) for use in uses]
        fewer = [use for use in uses if Acts.TOKENS not in use.control.acts]
        assert torch.equal(draw(tiny_base, fewer, cache=cache), draw(tiny_base, fewer))
        assert len(uses[5].control.runs) > runs[5]

    def test_the_key_of_a_hint_depends_on_each_of_its_tensors(self):
        hint = {"a": torch.zeros(1, 2), "b": torch.zeros(1, 2, dtype=torch.int64), "c": torch.zeros(1, 0, 4)}
        others = [{**hint, name: tensor + 1} for name, tensor in hint.items() if tensor.numel()]
        others += [{**hint, "c": torch.zeros(1, 1, 4)}, {"a": hint["a"]}, hint["a"]]
        keys = [digest(one) for one in (hint, *others)]
        assert len(set(keys)) == len(keys) and digest(dict(hint)) == keys[0]


class TestOnePass:
    @pytest.mark.parametrize("reads", [Reads.NOISE | Reads.TIME | Reads.TEXT, Reads.NOISE])
    @pytest.mark.parametrize("only", [False, True], ids=["both halves", "one half"])
    def test_controls_of_one_network_that_read_the_noise_run_in_one_pass(
        self, tiny_base, hint, reads, only, monkeypatch
    ):
        network = nn.Identity()
        network.passes = []
        uses = [
            ActiveControl(Member(tiny_base, network, factor, reads=reads), hint * factor, weight, conditional_only=only)
            for factor, weight in ((1.0, 0.5), (0.4, 1.0))
        ]
        together = draw(tiny_base, uses)
        rows = 3 * (2 if Reads.TEXT in reads and not only else 1)
        assert network.passes == [2 * rows] * STEPS
        network.passes.clear()
        monkeypatch.setattr(Member, "shared_network", property(lambda self: None))
        apart = draw(tiny_base, uses)
        assert network.passes == [rows] * 2 * STEPS
        assert (together - apart).abs().max() <= 1e-5
        assert (together - draw(tiny_base, [])).abs().max() > 1e-2

    def test_in_batches_of_a_bounded_size(self, tiny_base, hint):
        network = nn.Identity()
        network.passes = []
        members = [Member(tiny_base, network, 0.1 * number, reads=Reads.NOISE | Reads.TEXT) for number in range(20)]
        draw(tiny_base, [ActiveControl(member, hint, 0.1) for member in members], seeds=(1, 2), steps=1)
        assert network.passes == [32, 32, 16]  # four rows each: two images, both halves

    def test_not_with_what_reads_something_else_or_is_of_another_class(self, tiny_base, hint):
        network = nn.Identity()
        network.passes = []
        other = type("Other", (Member,), {})
        members = [
            Member(tiny_base, network, 1.0, reads=Reads.NOISE),
            Member(tiny_base, network, 1.0, reads=Reads.NOISE | Reads.TEXT),
            other(tiny_base, network, 1.0, reads=Reads.NOISE),
        ]
        draw(tiny_base, [ActiveControl(member, hint, 0.1) for member in members], steps=1)
        assert sorted(network.passes) == [3, 3, 6]
