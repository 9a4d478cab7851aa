"""CtrLoRA: the shared network, its adapters, and several of them in one pass."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from controlkit.bases.base import Base
from controlkit.bases.residuals import Residuals
from controlkit.bases.stable_diffusion import SD15_SCHEDULER, SD15_TEXT_ENCODER, SD15_UNET, SD15_VAE, StableDiffusion
from controlkit.bases.text import Text
from controlkit.controls.control import Acts, Reads
from controlkit.controls.ctrlora import BaseControlNet, CtrLoRA
from controlkit.controls.ctrlora.base_controlnet import build_base_control
from controlkit.controls.ctrlora.lora import AdaptedLinear, LoRA
from refusals import refused

WIDTH = 16
UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 8,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 2,
}


def tiny_base(**changes) -> Base:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = CLIPTextConfig(
            vocab_size=8, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        return StableDiffusion(
            name="tiny",
            tokenizer=None,
            text_encoder=CLIPTextModel(text),
            vae=AutoencoderKL(
                block_out_channels=(8, 8),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                norm_num_groups=4,
                latent_channels=4,
                scaling_factor=0.5,
            ),
            unet=UNet2DConditionModel(**{**UNET, **changes}),
            scheduler_config=dict(SD15_SCHEDULER),
        )


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny_base()


def shaken(module: nn.Module, seed: int = 1, size: float = 0.3) -> None:
    """Move every parameter by noise, so that no zero hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def trained_control(base: Base, ranks: dict[str, int], *, shares_base: bool = False) -> BaseControlNet:
    """A base control and adapters as after a training: no tensor of them is at its first value."""
    control = BaseControlNet.for_base(base)
    shaken(control, size=0.05)
    for seed, (name, rank) in enumerate(ranks.items()):
        shaken(control.add_adapter(name, rank, shares_base=shares_base, seed=seed), seed, size=0.1)
    return control.eval().requires_grad_(False)


def inputs(batch: int = 2, seed: int = 0) -> tuple[Tensor, Text, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    t = torch.randint(0, 1000, (batch,), generator=generator)
    text = Text(torch.randn(batch, 5, WIDTH, generator=generator))
    return t, text, torch.randn(batch, 4, 8, 8, generator=generator)


def tensors(residuals: Residuals) -> list[Tensor]:
    assert "middle" in residuals
    return list(residuals.tensors())


def difference(a: Residuals, b: Residuals) -> float:
    """The greatest difference, relative to the greatest value."""
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    assert all(x.shape == y.shape for x, y in pairs)
    return max(((x - y).abs().max() / y.abs().max().clamp(min=1e-6)).item() for x, y in pairs)


class TestNetwork:
    def test_a_new_control_changes_nothing(self, base):
        control = BaseControlNet.for_base(base)
        control.add_adapter("mine", 4)
        for names in (None, ("mine",), ("mine", None)):
            made = control(None, *inputs(), adapters=names)
            assert all((r == 0).all() for r in tensors(made))

    def test_residuals_have_the_shapes_of_the_base_s_skips(self, base):
        control = trained_control(base, {})
        t, text, hint = inputs()
        made = control(None, t, text, hint)
        x_t = torch.randn(2, 4, 8, 8)
        plain = base.predict(x_t, t, text)
        assert base.predict(x_t, t, text, made).shape == plain.shape
        assert len(made.family("skip")) == len(control.network.controlnet_down_blocks)
        assert not torch.allclose(base.predict(x_t, t, text, made), plain)

    def test_it_declares_and_keeps_that_it_never_reads_the_noise(self, base):
        control = trained_control(base, {"a": 2})
        assert (control.kind, CtrLoRA.kind) == ("ctrlora-base", "ctrlora")
        assert control.reads == CtrLoRA.reads == Reads.TIME | Reads.TEXT
        assert control.acts == CtrLoRA.acts == Acts.RESIDUALS
        made = [control(x, *inputs()) for x in (None, torch.randn(2, 4, 8, 8), torch.full((1,), torch.nan))]
        assert difference(made[1], made[0]) == difference(made[2], made[0]) == 0

    @pytest.mark.parametrize("which", ["t", "text", "hint"])
    def test_it_reads_time_text_and_hint(self, base, which):
        control = trained_control(base, {})
        t, text, hint = inputs()
        other = dict(zip(("t", "text", "hint"), inputs(seed=9), strict=True))
        changed = {"t": t, "text": text, "hint": hint, which: other[which]}
        assert difference(control(None, **changed), control(None, t, text, hint)) > 1e-4

    def test_encoder_and_middle_are_copies_of_the_base_s(self, base):
        control = BaseControlNet.for_base(base)
        own, given_state = control.file_state(), base.unet.state_dict()
        copied = [name for name in own if not name.startswith("controlnet_")]
        assert all(torch.equal(own[name], given_state[name]) for name in copied)
        assert {n for n in given_state if not n.startswith(("up_blocks", "conv_norm_out", "conv_out"))} == set(copied)
        shaken(control)
        assert not any(torch.equal(own[name], given_state[name]) for name in copied)

    def test_a_batch_of_one_stands_for_all(self, base):
        control = trained_control(base, {})
        _, text, hint = inputs(1)
        times = torch.tensor([10, 500, 900])
        many = control(None, times, text, hint)
        one_by_one = [control(None, time, text, hint) for time in times]
        for position, one in enumerate(one_by_one):
            assert difference(many.map(lambda r, at=position: r[at : at + 1]), one) < 1e-5

    def test_a_base_that_reads_a_class_is_refused(self):
        with refused("incompatible", "tiny", "class"):
            BaseControlNet.for_base(tiny_base(num_class_embeds=4))


class TestHint:
    def test_the_image_reaches_the_autoencoder_in_0_to_1(self, base, monkeypatch):
        control = BaseControlNet.for_base(base)
        image = torch.rand(2, 3, 16, 16)
        seen = []
        encode = base.vae.encode
        monkeypatch.setattr(base.vae, "encode", lambda x: (seen.append(x), encode(x))[1])
        hint = control.encode(image, base)
        assert torch.equal(seen[0], image)
        assert torch.equal(hint, encode(image).latent_dist.mode() * 0.5)

    def test_a_posterior_sample_depends_on_its_seed_alone(self, base):
        control = BaseControlNet.for_base(base)
        image = torch.rand(3, 3, 16, 16)
        drawn = control.encode(image, base, seed=7)
        assert torch.equal(drawn, control.encode(image, base, seed=7))
        assert not torch.allclose(drawn, control.encode(image, base, seed=8))
        assert torch.allclose(drawn[1:2], control.encode(image[1:2], base, seed=7), atol=1e-6)
        posterior = base.vae.encode(image).latent_dist
        noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(7))
        assert torch.allclose(drawn, (posterior.mean + posterior.std * noise) * 0.5, atol=1e-6)
        control.add_adapter("a", 2)
        assert torch.equal(CtrLoRA(control, "a", posterior_seed=7).encode(image, base), drawn)

    def test_another_range_or_size_is_refused(self, base):
        control = BaseControlNet.for_base(base)
        with pytest.raises(ValueError, match=r"\[0, 1\].* -1 to 1"):
            control.encode(2 * torch.eye(16).expand(1, 3, 16, 16) - 1, base)
        with refused("wrong-size", "height 17"):
            control.encode(torch.rand(1, 3, 17, 16), base)


class TestAdapter:
    def test_what_it_holds_is_chosen_by_where_a_layer_stands(self, base):
        control = BaseControlNet.for_base(base)
        adapter = control.add_adapter("mine", 4)
        network = control.network
        linears = {path for path, module in network.named_modules() if isinstance(module, nn.Linear)}
        norms = {
            f"{path}.{inner}"
            for path, module in network.named_modules()
            if isinstance(module, Transformer2DModel)
            for inner, norm in module.named_modules()
            if isinstance(norm, (nn.GroupNorm, nn.LayerNorm))
        }
        zero = {p for p, m in network.named_modules() if p.startswith("controlnet_") and isinstance(m, nn.Conv2d)}
        expected = {f"{path}.lora_layer.{end}.weight" for path in linears for end in ("down", "up")}
        expected |= {f"{path}.{end}" for path in norms | zero for end in ("weight", "bias")}
        assert set(adapter.state_dict()) == expected
        assert len(norms) == 2 * 4  # a group norm and three layer norms in each of two transformers
        assert not any(".resnets." in path and "norm" in path for path in adapter.state_dict())

    def test_it_starts_from_the_base_s_norms_and_zero_convolutions(self, base):
        control = trained_control(base, {})
        alone = control(None, *inputs())
        adapter = control.add_adapter("mine", 4, seed=3)
        assert difference(control(None, *inputs(), adapters=["mine"]), alone) == 0
        own, shared = adapter.state_dict(), control.file_state()
        copied = set(own) & set(shared)
        assert copied and all(torch.equal(own[name], shared[name]) for name in copied)
        ups = [value for name, value in own.items() if name.endswith("up.weight")]
        downs = [value for name, value in own.items() if name.endswith("down.weight")]
        assert all((up == 0).all() for up in ups)
        drawn = torch.cat([down.flatten() for down in downs])
        assert abs(float(drawn.std()) - 1 / 4) < 0.01 and abs(float(drawn.mean())) < 0.01
        again = control.add_adapter("again", 4, seed=3).state_dict()
        assert all(torch.equal(value, again[name]) for name, value in own.items())

    @pytest.mark.parametrize("shape", [(3, 8), (3, 5, 8)])
    def test_a_linear_layer_computes_w_plus_up_down(self, base, shape):
        control = trained_control(base, {"a": 3})
        path, layer = next((p, m) for p, m in control.layers.items() if isinstance(m, AdaptedLinear))
        x = torch.randn(*shape[:-1], layer.in_features)
        control.select("a")
        lora = control.adapters["a"].part(path, layer)
        weight = layer.weight + lora.up.weight @ lora.down.weight
        assert torch.allclose(layer(x), nn.functional.linear(x, weight, layer.bias), atol=1e-5)

    @torch.no_grad()
    @settings(max_examples=20, deadline=None)
    @given(
        ranks=st.lists(st.sampled_from([None, 1, 3, 8]), min_size=1, max_size=3),
        inputs=st.integers(1, 40),
        bias=st.booleans(),
    )
    def test_folding_for_one_call_changes_nothing_but_the_time(self, ranks, inputs, bias):
        torch.manual_seed(0)
        layer = AdaptedLinear(12, 20, bias=bias)
        layer.active = tuple(None if rank is None else LoRA(layer, rank) for rank in ranks)
        for lora in layer.active:
            if lora is not None:
                nn.init.normal_(lora.up.weight)
        x = torch.randn(2 * len(ranks), inputs, 12)
        apart = layer(x)  # With gradients, the products are kept apart.
        with torch.no_grad():
            folds = layer._should_fold(x)
            together = layer(x)
            assert not layer.double()._should_fold(x.double())
        assert folds == (any(layer.active) and 2 * inputs * (12 + 20) > 2 * 12 * 20)
        torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)

    def test_merging_is_exact_and_leaves_the_original(self, base):
        control = trained_control(base, {"a": 3, "b": 2})
        before = copy.deepcopy(control.state_dict())
        merged = control.merged("a")
        assert not merged.adapters and not merged.trainable_parameters()
        wanted = control(None, *inputs(), adapters=["a"])
        assert difference(merged(None, *inputs()), wanted) < 1e-5
        assert all(torch.equal(value, before[name]) for name, value in control.state_dict().items())
        path, layer = next((p, m) for p, m in control.layers.items() if isinstance(m, AdaptedLinear))
        lora = control.adapters["a"].part(path, layer)
        exact = layer.weight.double() + lora.up.weight.double() @ lora.down.weight.double()
        assert (merged.layers[path].weight - exact).abs().max() < 1e-6

    def test_adapters_are_selected_removed_and_independent(self, base):
        control = trained_control(base, {"a": 3, "b": 2, "with.dots": 1, "float": 1})
        alone = control(None, *inputs())
        control.select("a")
        under_a = control(None, *inputs())
        assert difference(under_a, alone) > 1e-3
        assert difference(CtrLoRA(control, "b")(None, *inputs()), under_a) > 1e-3
        assert control.selected == ("a",)
        control.remove_adapter("b")
        assert difference(control(None, *inputs()), under_a) == 0
        control.remove_adapter("a")
        assert control.selected == (None,)
        assert difference(control(None, *inputs()), alone) == 0
        assert list(control.adapters) == ["with.dots", "float"]

    def test_names_and_ranks_that_cannot_be_are_refused(self, base):
        control = trained_control(base, {"a": 3})
        with pytest.raises(ValueError, match="already"):
            control.add_adapter("a", 3)
        with pytest.raises(ValueError, match=r"'b'.* a$"):
            control.select("b")
        with pytest.raises(ValueError, match="'b'"):
            control(None, *inputs(), adapters=["a", "b"])
        with pytest.raises(ValueError, match="one per group"):
            control.select([])
        with pytest.raises(ValueError, match="does not divide into 2 groups"):
            control(None, *inputs(3), adapters=["a", None])
        for rank in (0, -1, 2.0, True):
            with pytest.raises(ValueError, match="above 0"):
                control.add_adapter("c", rank)


class TestState:
    def test_round_trip(self, base):
        control = trained_control(base, {"a": 3})
        again = build_base_control(control.config(), copy.deepcopy(control.file_state()))
        again.load_adapter("copied", control.adapter_state_dict("a"), rank=3)
        assert again.config() == control.config()
        assert again.fingerprint() == control.fingerprint()
        assert again.adapters["copied"].rank == CtrLoRA(again, "copied").config()["rank"] == 3
        assert not any(parameter.requires_grad for parameter in again.adapters["copied"].parameters())
        for names in (("copied", "a"), (None, None)):
            mine, theirs = (names[0] and [names[0]]), (names[1] and [names[1]])
            assert difference(again(None, *inputs(), adapters=mine), control(None, *inputs(), adapters=theirs)) == 0
        shaken(again.adapters["copied"])
        assert difference(again(None, *inputs(), adapters=["copied"]), control(None, *inputs())) > 1e-3

    def test_an_adapter_that_shares_the_base_is_written_whole(self, base):
        control = trained_control(base, {"a": 3}, shares_base=True)
        state = control.adapter_state_dict("a")
        control.add_adapter("own", 3)
        assert list(state) == list(control.adapter_state_dict("own"))
        under_a = control(None, *inputs(), adapters=["a"])
        control.load_adapter("loaded", state)
        assert difference(control(None, *inputs(), adapters=["loaded"]), under_a) == 0

    def test_loading_draws_no_random_numbers(self, base):
        control = trained_control(base, {"a": 3})
        before = torch.get_rng_state()
        control.load_adapter("b", control.adapter_state_dict("a"))
        assert torch.equal(torch.get_rng_state(), before)

    def test_what_does_not_fit_is_refused(self, base):
        control = trained_control(base, {"a": 3})
        state = control.adapter_state_dict("a")
        with pytest.raises(ValueError, match="has rank 3, not 4"):
            control.load_adapter("b", state, rank=4)
        with pytest.raises(ValueError, match="no LoRA"):
            control.load_adapter("b", control.file_state())
        name = next(name for name in state if name.endswith("down.weight"))
        with pytest.raises(ValueError, match="ranks 2, 3"):
            control.load_adapter("b", {**state, name: state[name][:2]})
        with pytest.raises(ValueError, match="1 tensors are missing"):
            control.load_adapter("b", {key: state[key] for key in list(state)[1:]})
        with pytest.raises(ValueError, match=r"1 tensors are unknown here, the first is extra"):
            control.load_adapter("b", {**state, "extra": torch.zeros(1)})
        wider = trained_control(tiny_base(cross_attention_dim=24), {})
        with pytest.raises(ValueError, match=r"another base control: .* has the shape \(3, 16\), not \(3, 24\)"):
            wider.load_adapter("b", state)
        assert list(control.adapters) == ["a"] and not wider.adapters
        assert wider.fingerprint() != control.fingerprint()
        with pytest.raises(RuntimeError, match="Missing key"):
            build_base_control(control.config(), {})


class TestTogether:
    @settings(max_examples=12, deadline=None)
    @given(
        ranks=st.lists(st.integers(1, 9), min_size=1, max_size=5),
        batch=st.integers(1, 3),
        alone=st.booleans(),
        linear=st.booleans(),
    )
    def test_one_pass_equals_one_after_the_other(self, ranks, batch, alone, linear):
        base = tiny_base(use_linear_projection=linear)
        control = trained_control(base, {str(number): rank for number, rank in enumerate(ranks)})
        names = [*control.adapters, *([None] if alone else [])]
        t, text, hint = inputs(batch * len(names))
        together = control(None, t, text, hint, adapters=names)
        assert control.selected == (None,)
        for group, name in enumerate(names):
            own = slice(group * batch, (group + 1) * batch)
            one = control(None, t[own], Text(text.tokens[own]), hint[own], adapters=[name])
            assert difference(together.map(lambda r, own=own: r[own]), one) < 1e-5

    def test_adapters_that_share_the_base_mix_with_those_that_do_not(self, base):
        control = trained_control(base, {"a": 3}, shares_base=True)
        shaken(control.add_adapter("b", 2), size=0.1)
        t, text, hint = inputs(2)
        together = control(None, t, text, hint, adapters=["a", "b"])
        for group, name in enumerate(("a", "b")):
            own = slice(group, group + 1)
            one = control(None, t[own], Text(text.tokens[own]), hint[own], adapters=[name])
            assert difference(together.map(lambda r, own=own: r[own]), one) < 1e-5

    def test_controls_of_one_base_control_run_together(self, base):
        control = trained_control(base, {"a": 3, "b": 2})
        controls = [CtrLoRA(control, name) for name in ("a", "b", "a")]
        t, text, _ = inputs(4)
        hints = [torch.randn(1, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.randn(1, 4, 8, 8)]
        assert len({id(one.shared_network) for one in controls}) == 1
        made = CtrLoRA.forward_together(controls, None, t, text, hints)
        for one, hint, residuals in zip(controls, hints, made, strict=True):
            assert difference(residuals, one(None, t, text, hint)) < 1e-5

    def test_what_cannot_run_together_is_refused(self, base):
        first = CtrLoRA(trained_control(base, {"a": 2}), "a")
        second = CtrLoRA(trained_control(base, {"a": 2}), "a")
        t, text, hint = inputs(1)
        with pytest.raises(ValueError, match="2 base controls"):
            CtrLoRA.forward_together([first, second], None, t, text, [hint, hint])
        with pytest.raises(ValueError, match="same size"):
            CtrLoRA.forward_together([first, first], None, t, text, [hint, hint[..., :4]])
        with pytest.raises(ValueError, match="1 controls of 1 base controls got 2 hints"):
            CtrLoRA.forward_together([first], None, t, text, [hint, hint])

    def test_gradients_of_one_pass_equal_those_of_each(self, base):
        control = trained_control(base, {"a": 3, "b": 2})
        gradients = []
        for passes in ([["a", "b"]], [["a"], ["b"]]):
            control.requires_grad_(False).zero_grad()
            for adapter in control.adapters.values():
                adapter.requires_grad_(True)
            t, text, hint = inputs(2)
            for place, names in enumerate(passes):
                own = slice(None) if len(passes) == 1 else slice(place, place + 1)
                made = control(None, t[own], Text(text.tokens[own]), hint[own], adapters=names)
                sum(r.pow(2).sum() for r in tensors(made)).backward()
            gradients.append([parameter.grad.clone() for parameter in control.trainable_parameters()])
        assert gradients[0] and all(gradient.any() for gradient in gradients[0])
        for one, other in zip(*gradients, strict=True):
            assert torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()) + 1e-7)


class TestTraining:
    def backward(self, control: BaseControlNet) -> set[str]:
        """Names of the parameters that get a gradient from a loss on a base's prediction."""
        made = control(None, *inputs())
        sum(r.pow(2).sum() for r in tensors(made)).backward()
        return {name for name, parameter in control.named_parameters() if parameter.grad is not None}

    def test_adapter_training_touches_one_adapter(self, base):
        control = trained_control(base, {"a": 3, "b": 2})
        control.train_adapter("b")
        own = control.adapters["b"]
        assert {id(p) for p in control.trainable_parameters()} == {id(p) for p in own.parameters()}
        assert CtrLoRA(control, "b").trainable_parameters() == list(own.parameters())
        assert CtrLoRA(control, "a").trainable_parameters() == []
        touched = self.backward(control)
        assert touched == {name for name in touched if name.startswith("_adapters.adapter:b.")}
        assert len(touched) == len(list(own.parameters()))
        before = copy.deepcopy(control.file_state())
        torch.optim.SGD(control.trainable_parameters(), lr=0.1).step()
        assert all(torch.equal(value, before[name]) for name, value in control.file_state().items())
        control.add_adapter("c", 1)
        assert len(control.trainable_parameters()) == len(list(own.parameters()))
        control.freeze()
        assert control.trainable_parameters() == []

    def test_base_training_shares_norms_and_zero_convolutions(self, base):
        control = trained_control(base, {"a": 3, "b": 3}, shares_base=True)
        control.add_adapter("of its own", 2)
        control.train_base()
        expected = {f"network.{name}" for name in control.file_state()}
        loras = {f"_adapters.adapter:{n}.{key}" for n in "ab" for key in control.adapters[n].state_dict()}
        trainable = {name for name, parameter in control.named_parameters() if parameter.requires_grad}
        assert trainable == expected | loras
        assert all(".lora_layer." in name for name in loras)
        control.select("a")
        touched = self.backward(control)
        assert touched == expected | {name for name in loras if ":a." in name}
        with pytest.raises(ValueError, match="train the base instead"):
            control.train_adapter("a")

    def test_a_fresh_adapter_learns(self, base):
        control = trained_control(base, {})
        control.add_adapter("new", 4, seed=0)
        control.train_adapter("new")
        wanted = [r + 0.1 for r in tensors(control(None, *inputs()))]
        wanted = [r.detach() for r in wanted]
        optimizer = torch.optim.AdamW(control.trainable_parameters(), lr=1e-2)
        losses = []
        for _ in range(12):
            made = tensors(control(None, *inputs()))
            loss = sum((r - w).pow(2).mean() for r, w in zip(made, wanted, strict=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.3 * losses[0]

    def test_gradient_checkpointing_gives_the_same_gradients(self, base):
        gradients = []
        for checkpointing in (False, True):
            control = trained_control(base, {"a": 3, "b": 2}).train()
            control.train_adapter("a")
            if checkpointing:
                control.network.enable_gradient_checkpointing()
                with pytest.raises(ValueError, match="use select"):
                    control(None, *inputs(), adapters=["b"])
            self.backward(control)
            gradients.append([parameter.grad for parameter in control.trainable_parameters()])
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))


def adapter_of_sd15(rank: int) -> CtrLoRA:
    with torch.device("meta"):
        return CtrLoRA.from_config({**SD15_UNET, "rank": rank})


class TestCounting:
    def test_the_base_control_of_sd15(self):
        with torch.device("meta"):
            control = BaseControlNet.from_config(SD15_UNET)
        assert control.parameter_counts() == {"parameters": 360_192_640, "zero_convolutions": 11_479_680}
        assert len(control.file_state()) == 324

    def test_an_adapter_of_rank_128_for_sd15(self):
        control = adapter_of_sd15(128)
        assert control.parameter_counts() == {
            "parameters": 36_945_536,
            "lora": 25_419_776,
            "zero_convolutions": 11_479_680,
            "norms": 46_080,
        }
        assert len(control.file_state()) == 246

    @pytest.mark.parametrize(("rank", "millions"), [(32, 17.88), (64, 24.24), (256, 62.37), (512, 113.20)])
    def test_other_ranks(self, rank, millions):
        assert round(adapter_of_sd15(rank).parameter_counts()["parameters"] / 1e6, 2) == millions

    def test_the_known_configurations_are_stable_diffusion_s(self):
        with torch.device("meta"):
            networks = (
                UNet2DConditionModel(**SD15_UNET),
                AutoencoderKL(**SD15_VAE),
                CLIPTextModel(CLIPTextConfig(**SD15_TEXT_ENCODER)),
            )
        counts = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
        assert counts == [859_520_964, 83_653_863, 123_060_480]

    def test_counting_agrees_with_the_network(self, base):
        control = trained_control(base, {"a": 3})
        adapter = CtrLoRA.shapes({**dict(base.unet.config), "rank": 3})
        assert adapter == {name: value.shape for name, value in control.adapter_state_dict("a").items()}
        counted = BaseControlNet.shapes(control.config())
        assert counted == {name: value.shape for name, value in control.file_state().items()}
