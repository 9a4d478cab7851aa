"""A ControlNet's options: the base's decoder trained along, the middle alone, pooling, Gaussian convolutions."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny
from controlkit.bases.load import load_base
from controlkit.bases.taps import Tap
from controlkit.bases.unet import unet_inputs
from controlkit.controls.apply import predict_under
from controlkit.controls.controlnet import ControlNet
from controlkit.controls.controlnet.decoder import MODULES
from controlkit.controls.controlnet_mlp import ControlNetMLP
from controlkit.controls.controlnet_xs import ControlNetXS
from controlkit.formats.card import card_of
from controlkit.formats.convert import convert
from controlkit.formats.describe import describe, describe_system
from controlkit.formats.load import load_control, save_control
from controlkit.formats.metadata import read_metadata
from controlkit.formats.transfer import transfer
from controlkit.images import to_tensor
from controlkit.sampling.generate import generate
from controlkit.sampling.plan import ActiveControl, Plan
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.residual_cache import ResidualCache
from controlkit.sampling.sampler import initial_noise, sample
from controlkit.sampling.uses import ControlUse
from controlkit.training.control_objective import ControlObjective
from controlkit.training.memory import checkpoint_activations
from controlkit.training.recipe import identifying
from controlkit.training.recipes import build_recipe
from controlkit.training.run import run
from refusals import refused

CPU = torch.device("cpu")
ORIGINAL = {
    "output_blocks.0.0.in_layers.2": [32, 64, 3, 3],
    "output_blocks.0.0.skip_connection": [32, 64, 1, 1],
    "output_blocks.0.1.transformer_blocks.0.attn2.to_k": [32, 16],
    "output_blocks.1.0.in_layers.2": [32, 48, 3, 3],
    "output_blocks.1.0.emb_layers.1": [32, 64],
    "output_blocks.1.1.proj_in": [32, 32, 1, 1],
    "output_blocks.1.2.conv": [32, 32, 3, 3],
    "output_blocks.2.0.in_layers.2": [16, 48, 3, 3],
    "output_blocks.3.0.out_layers.3": [16, 16, 3, 3],
    "out.0": [16],
    "out.2": [4, 16, 3, 3],
}
"""Some weights of `ControlledUnetModel` (lllyasviel/ControlNet, cldm/cldm.py) of the tiny base's shape."""


def shaken(module, seed=1, size=0.3):
    """Every parameter moved by noise, so that no zero hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return module


def new(base, **options) -> ControlNet:
    torch.manual_seed(5)
    return ControlNet.for_base(base, "canny", **options).eval().requires_grad_(False)


def acting(base, **options) -> ControlNet:
    """One whose every tensor was moved, the decoder's too."""
    return shaken(new(base, **options), size=0.05).requires_grad_(False)


def inputs(base, rows=2):
    generator = torch.Generator().manual_seed(0)
    x_t, images = torch.randn(rows, 4, 16, 16, generator=generator), torch.rand(rows, 3, 64, 64, generator=generator)
    return x_t, torch.tensor([21, 801])[:rows], base.encode_text(["red apple", "cat face"][:rows]), images


def predicted(base, control, x_t, t, text, images):
    with torch.no_grad():
        return predict_under(control, base, x_t, t, text, control.encode(images, base))


def furthest(a, b) -> float:
    return (a - b).abs().max().item()


def state_of(base):
    return {name: value.clone() for name, value in base.unet.state_dict().items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


class TestDecoder:
    def test_a_new_one_changes_nothing_and_leaves_the_base_as_it_is(self, tiny_base):
        before, given = state_of(tiny_base), inputs(tiny_base)
        control = new(tiny_base, sd_locked=False)
        with torch.no_grad():
            alone = tiny_base.predict(*given[:3])
        assert torch.equal(predicted(tiny_base, control, *given), alone)
        assert furthest(predicted(tiny_base, acting(tiny_base, sd_locked=False), *given), alone) > 1e-2
        with torch.no_grad():
            assert torch.equal(tiny_base.predict(*given[:3]), alone)
        assert same(before, tiny_base.unet.state_dict())

    @pytest.mark.parametrize("build", [tiny.build_tiny_base, tiny.build_tiny_sdxl])
    def test_it_predicts_what_diffusers_predicts_with_the_decoder_in_the_unet(self, build):
        base = build()
        control, (x_t, t, text, images) = acting(base, sd_locked=False), inputs(base)
        got = predicted(base, control, x_t, t, text, images)
        base.unet.load_state_dict({**base.unet.state_dict(), **control.decoder.state_dict()})
        control.decoder = None
        given = unet_inputs(text)
        with torch.no_grad():
            down, middle = control.to_diffusers()(x_t, t, **given, controlnet_cond=images, return_dict=False)
            added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            assert furthest(got, base.unet(x_t, t, **given, **added, return_dict=False)[0]) <= 1e-4

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_gradients_reach_the_copy_of_the_decoder_and_not_the_base(self, checkpointing):
        base = tiny.build_tiny_base()
        control = acting(base, sd_locked=False).requires_grad_(True).train()
        reference = tiny.build_tiny_base()
        reference.unet.load_state_dict({**base.unet.state_dict(), **control.decoder.state_dict()})
        reference.unet.requires_grad_(True)
        if checkpointing:
            checkpoint_activations(base, control)
        x_t, t, text, images = inputs(base)
        predict_under(control, base, x_t, t, text, control.encode(images, base)).pow(2).mean().backward()
        residuals = control(x_t, t, text, control.encode(images, base)).map(torch.Tensor.detach)
        reference.predict(x_t, t, text, residuals).pow(2).mean().backward()
        expected = dict(reference.unet.named_parameters())
        for name, parameter in control.decoder.named_parameters():
            assert parameter.grad.abs().sum() > 0
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-7)
        assert all(parameter.grad is not None for parameter in control.trainable_parameters())
        assert all(parameter.grad is None for network in base.networks for parameter in network.parameters())

    def test_recomputed_blocks_get_the_taps_beside_it(self):
        """A tap in the copy of the decoder is hooked there again when checkpointing recomputes its block."""
        base, grads = tiny.build_tiny_base(), []
        for checkpointing in (False, True):
            control = acting(base, sd_locked=False)
            shift = torch.ones(1, 32, 1, 1, requires_grad=True)
            if checkpointing:
                base.unet.train()
                with base.replacing(control.replacements()):
                    base.checkpoint_activations()
                control.train()
            x_t, t, text, _ = inputs(base)
            with base.replacing(control.replacements()):
                tap = Tap(function=lambda stream, shift=shift: stream * shift)
                prediction = base.predict(x_t, t, text, None, {"decoder.1": [tap]})
            prediction.pow(2).mean().backward()
            grads.append(shift.grad)
        assert grads[0].abs().sum() > 0
        torch.testing.assert_close(*grads)

    def test_branches_and_steps_on_which_it_does_not_act_have_the_base_s_own(self, tiny_base, condition_image):
        control = acting(tiny_base, sd_locked=False)
        hint = control.encode(to_tensor([condition_image]), tiny_base)
        texts = [tiny_base.encode_text([prompt]) for prompt in ("", "red apple")]
        x_t, times = torch.randn(2, 4, 16, 16), torch.tensor([801, 21])
        with torch.no_grad():
            for only in (False, True):
                plan = Plan([ActiveControl(control, hint, end=0.5, conditional_only=only)], times, texts)
                calls = [plan.passes(index) for index in (0, 1)]
                paths = set(MODULES)
                rows = [(first, last, set(modules)) for first, last, modules in calls[0]]
                assert rows == ([(0, 1, set()), (1, 2, paths)] if only else [(0, 2, paths)])
                assert [(first, last, set(modules)) for first, last, modules in calls[1]] == [(0, 2, set())]
            alone = torch.cat(list(sample(tiny_base, prompt="red apple", seeds=[1, 2], steps=2, guidance=3.0)))
            made = {}
            for only in (False, True):
                use = ActiveControl(control, hint, conditional_only=only)
                settings = {"uses": [use], "prompt": "red apple", "seeds": [1, 2], "steps": 2, "guidance": 3.0}
                made[only] = torch.cat(list(sample(tiny_base, **settings)))
                assert furthest(made[only], alone) > 1e-2
            assert furthest(made[False], made[True]) > 1e-3
            # One step by hand: the base on the branch without a prompt, the copy on the other.
            schedule = tiny_base.schedule.solver(tiny_base.default_sampler, 1, CPU, "tiny")
            x_t = initial_noise(tiny_base, [1], 64, 64) * schedule.initial
            (time,) = schedule.timesteps
            below = tiny_base.predict(x_t, time, texts[0])
            above = predict_under(control, tiny_base, x_t, time[None], texts[1], hint)
            schedule.begin()
            latent = schedule.step(below + 3.0 * (above - below), x_t, 0)
            use = ActiveControl(control, hint, conditional_only=True)
            (image,) = sample(tiny_base, uses=[use], prompt="red apple", seeds=[1], steps=1, guidance=3.0)
            assert furthest(image, (tiny_base.decode(latent) + 1) / 2) <= 1e-4

    def test_what_another_control_computes_ahead_is_the_same_beside_it(self, tiny_base, condition_image):
        """The copy of the decoder is no part of what a cache of residuals holds."""
        unlocked, other = acting(tiny_base, sd_locked=False), ControlNetMLP.for_base(tiny_base)
        shaken(other, size=0.1).requires_grad_(False)
        image = to_tensor([condition_image])
        first, second = (ActiveControl(one, one.encode(image, tiny_base)) for one in (unlocked, other))
        cache = ResidualCache()
        settings = {"prompt": "red apple", "seeds": [3], "steps": 2, "guidance": 3.0}
        alone = torch.cat(list(sample(tiny_base, uses=[second], cache=cache, **settings)))
        both = torch.cat(list(sample(tiny_base, uses=[first, second], cache=cache, **settings)))
        assert cache.hits and furthest(both, alone) > 1e-3
        assert furthest(both, torch.cat(list(sample(tiny_base, uses=[first, second], **settings)))) <= 1e-5
        assert torch.equal(torch.cat(list(sample(tiny_base, uses=[second], cache=cache, **settings))), alone)

    def test_company_that_cannot_be_is_refused_in_words(self, tiny_base, condition_image):
        control, image = acting(tiny_base, sd_locked=False), to_tensor([condition_image])
        use = ActiveControl(control, control.encode(image, tiny_base))
        settings = {"prompt": "", "seeds": [1], "steps": 2, "guidance": 3.0}
        with refused("contradiction", "up_blocks"):
            next(sample(tiny_base, uses=[use, use], **settings))
        halves = [dataclasses.replace(use, end=0.5), dataclasses.replace(use, start=0.5)]
        assert next(sample(tiny_base, uses=halves, **settings)).isfinite().all()
        tapping = ControlNetXS.for_base(tiny_base, size_ratio=0.5).eval().requires_grad_(False)
        beside = ActiveControl(tapping, tapping.encode(image, tiny_base))
        assert next(sample(tiny_base, uses=[use, beside], **settings)).isfinite().all()
        with refused("contradiction", "a ControlNet-XS", "balanced"):
            next(sample(tiny_base, uses=[dataclasses.replace(use, conditional_only=True), beside], **settings))

    def test_its_file_comes_back_with_the_decoder_under_a_prefix_of_its_own(self, tiny_base, tmp_path):
        control, given = acting(tiny_base, sd_locked=False), inputs(tiny_base)
        path = save_control(tmp_path / "a.safetensors", control, tiny_base)
        stored = {name: value for name, value in load_file(path).items() if name.startswith("unet_decoder.")}
        names = {name for name in tiny_base.unet.state_dict() if name.partition(".")[0] in MODULES}
        assert {name.removeprefix("unet_decoder.") for name in stored} == names
        assert {value.dtype for value in stored.values()} == {torch.float16}
        back = load_control(path, tiny_base)
        assert json.dumps(back.config()) == json.dumps(control.config())
        assert furthest(predicted(tiny_base, back, *given), predicted(tiny_base, control, *given)) < 1e-2
        facts = describe(str(path))
        assert "decoder" in facts and facts["trainable"] == facts["parameters"]
        assert facts["parameters"] == control.parameter_counts()["parameters"]
        assert "| decoder | its own" in card_of(path)
        tensors = load_file(path)
        tensors.pop("unet_decoder.conv_out.bias")
        save_file(tensors, tmp_path / "torn.safetensors", read_metadata(path))
        with refused("damaged-file", "unet_decoder.conv_out.bias"):
            load_control(tmp_path / "torn.safetensors", tiny_base)

    def test_a_base_of_another_decoder_is_refused(self, tiny_base):
        control = new(tiny_base, sd_locked=False)
        other = tiny.build_tiny_base()
        settings = {**other.unet.config, "up_block_types": ("UpBlock2D", "UpBlock2D")}
        other.unet = UNet2DConditionModel(**{k: v for k, v in settings.items() if not k.startswith("_")})
        assert "decoder" in (control.incompatibility(other) or "")
        assert new(tiny_base).incompatibility(other) is None
        with refused("unsupported", "sd_locked"):
            ControlNet.for_base(other, sd_locked=False)

    def test_transfer_moves_the_decoder_with_the_base(self, tiny_base):
        control, other = acting(tiny_base, sd_locked=False), tiny.build_tiny_base()
        shaken(other.unet, 7, 0.1).requires_grad_(False)
        moved, _ = transfer(control, tiny_base, other)
        old, new_ = tiny_base.unet.state_dict(), other.unet.state_dict()
        for name, value in moved.decoder.state_dict().items():
            torch.testing.assert_close(value, control.decoder.state_dict()[name] + new_[name] - old[name])

    @pytest.mark.parametrize(
        ("base", "control", "decoder"),
        [("sd15", 361_279_120, 510_808_004), ("sdxl", 1_251_014_160, 1_324_096_644)],
    )
    def test_what_it_counts(self, base, control, decoder):
        facts = describe_system("controlnet", base)
        assert facts["parameters"] == control
        counts = facts["with sd_locked false"]
        assert (counts["parameters"], counts["decoder"]) == (control + decoder, decoder)


class TestConversion:
    @pytest.fixture
    def saved(self, tiny_base, tmp_path):
        control = acting(tiny_base, sd_locked=False)
        return control, save_control(tmp_path / "a.safetensors", control, tiny_base, dtype=torch.float32)

    def test_a_full_file_has_a_place_for_it(self, saved, tmp_path, tiny_base):
        control, path = saved
        done = convert(path, tmp_path / "full.safetensors", "full")
        assert any("strict=False" in note for note in done.notes)
        tensors = load_file(done.path)
        shapes = {name: list(tensors[f"model.diffusion_model.{name}.weight"].shape) for name in ORIGINAL}
        assert shapes == ORIGINAL
        assert len(tensors) == len(load_file(path))
        back = convert(done.path, tmp_path / "back.safetensors", "controlkit")
        assert same(load_file(back.path), load_file(path)) and not back.notes
        given = inputs(tiny_base)
        direct = load_control(done.path, tiny_base)
        assert torch.equal(predicted(tiny_base, direct, *given), predicted(tiny_base, control, *given))

    def test_a_file_of_version_1_keeps_its_decoder_if_asked(self, saved, tmp_path, tiny_base, base_folder):
        """Its Stable Diffusion is there in full, trained along or not: no tensor tells."""
        control, path = saved
        inside = load_file(convert(path, tmp_path / "full.safetensors", "full").path)
        rest = {"model.diffusion_model.time_embed.0.bias": torch.ones(64), "first_stage_model.x": torch.ones(2)}
        file = tmp_path / "v1.ckpt"
        torch.save({"state_dict": {**inside, **rest}}, file)
        settings = {"base": str(base_folder)}  # for the number of heads, which no tensor tells
        dropped = convert(file, tmp_path / "alone.safetensors", "controlkit", **settings)
        assert any("--decoder" in note for note in dropped.notes)
        assert not any(name.startswith("unet_decoder.") for name in load_file(dropped.path))
        kept = convert(file, tmp_path / "both.safetensors", "controlkit", decoder=True, **settings)
        assert same(load_file(kept.path), load_file(path)) and not any("decoder" in note for note in kept.notes)
        given = inputs(tiny_base)
        loaded = load_control(kept.path, tiny_base)
        assert torch.equal(predicted(tiny_base, loaded, *given), predicted(tiny_base, control, *given))
        again = convert(file, tmp_path / "again.safetensors", "full", decoder=True, **settings)
        assert same(load_file(again.path), {**inside, **rest}) and not again.notes

    @pytest.mark.parametrize("to", ["controlkit", "full"])
    def test_one_that_has_its_decoder_keeps_it_with_and_without_the_flag(self, saved, tmp_path, to):
        file = convert(saved[1], tmp_path / "with.safetensors", to).path
        plain, asked = (
            convert(file, tmp_path / f"{flag}.safetensors", "controlkit", decoder=flag) for flag in (False, True)
        )
        assert same(load_file(asked.path), load_file(plain.path)) and asked.notes == plain.notes == ()

    def test_a_decoder_that_is_incomplete_is_refused(self, saved, tmp_path, base_folder):
        inside = load_file(convert(saved[1], tmp_path / "full.safetensors", "full").path)
        inside.pop("model.diffusion_model.out.2.bias")
        save_file(inside, tmp_path / "torn.safetensors")
        with refused("damaged-file", "a ControlNet with", "out.2.bias"):
            convert(tmp_path / "torn.safetensors", tmp_path / "b.safetensors", "controlkit", base=str(base_folder))

    @pytest.mark.parametrize("to", ["original", "bare", "diffusers", "difference", "control-lora"])
    def test_formats_without_a_place_for_it_are_refused(self, saved, tmp_path, base_folder, to):
        _, path = saved
        out = tmp_path / ("out" if to == "diffusers" else "out.safetensors")
        with refused("unsupported", path, "sd_locked", "controlkit"):
            convert(path, out, to, base=str(base_folder), rank=2 if to == "control-lora" else None)
        with refused("unsupported"):
            saved[0].to_diffusers()

    def test_a_file_without_stable_diffusion_has_no_decoder_to_keep(self, tiny_base, tmp_path):
        path = save_control(tmp_path / "a.safetensors", new(tiny_base), tiny_base)
        with refused("wrong-kind", path):
            convert(path, tmp_path / "b.safetensors", "controlkit", decoder=True)
        other = save_control(tmp_path / "mlp.safetensors", ControlNetMLP.for_base(tiny_base), tiny_base)
        with refused("contradiction", "--decoder", other, "a ControlNet-mlp"):
            convert(other, tmp_path / "b.safetensors", "controlkit", decoder=True)


class TestMiddle:
    def test_the_middle_alone_is_what_diffusers_adds_there(self, tiny_base):
        control, (x_t, t, text, images) = acting(tiny_base, only_mid_control=True), inputs(tiny_base)
        network = control.to_diffusers()
        with torch.no_grad():
            residuals = control(x_t, t, text, control.encode(images, tiny_base))
            _, middle = network(x_t, t, text.tokens, images, return_dict=False)
            assert list(residuals) == ["middle"] and furthest(residuals["middle"], middle) <= 1e-5
            expected = tiny_base.unet(
                x_t, t, text.tokens,
                down_block_additional_residuals=tuple(torch.zeros(()) for _ in range(4)),
                mid_block_additional_residual=middle,
            ).sample  # fmt: skip
            assert furthest(predicted(tiny_base, control, x_t, t, text, images), expected) <= 1e-4

    def test_other_tools_compute_the_same_from_its_file(self, tiny_base, tmp_path):
        """Its convolutions to the skips are zero and stay so: a tool that knows no such setting adds nothing there."""
        control = ControlNet.for_training(
            tiny_base, ["canny"], {"only_mid_control": True, "gaussian_convolutions": True}, name="a", seed=1
        )
        assert control.network.controlnet_mid_block.weight.abs().max() > 0
        frozen = list(control.network.controlnet_down_blocks.parameters())
        assert not any(parameter.requires_grad or parameter.abs().max() for parameter in frozen)
        assert len(control.trainable_parameters()) == len(list(control.parameters())) - len(frozen)
        path = save_control(tmp_path / "a.safetensors", control, tiny_base, dtype=torch.float32)
        given = inputs(tiny_base)
        folder = convert(path, tmp_path / "folder", "diffusers").path
        assert ControlNetModel.from_pretrained(folder) is not None
        weights = folder / "diffusion_pytorch_model.safetensors"
        save_file(
            {k: v.clone() for k, v in load_file(weights).items()}, weights
        )  # without the metadata, which other tools do not read
        plain = load_control(folder, tiny_base)
        assert not plain.only_mid_control and load_control(path, tiny_base).only_mid_control
        assert torch.equal(predicted(tiny_base, plain, *given), predicted(tiny_base, control, *given))
        assert describe(str(path))["adds to"] == "the middle block only"


class TestPooling:
    def test_it_pools_as_diffusers_does_on_the_branch_with_the_prompt(self, tiny_base):
        control, (x_t, t, text, images) = acting(tiny_base, global_average_pooling=True), inputs(tiny_base)
        network = control.to_diffusers()
        assert network.config.global_pool_conditions
        with torch.no_grad():
            down, middle = network(x_t, t, text.tokens, images, return_dict=False)
            residuals = control(x_t, t, text, control.encode(images, tiny_base)).tensors()
        assert all(one.shape[2:] == (1, 1) for one in residuals)
        assert max(furthest(a, b) for a, b in zip(residuals, (*down, middle), strict=True)) <= 1e-5
        assert control.conditional_only and not new(tiny_base).conditional_only


class TestGaussian:
    def test_a_new_one_changes_the_base_from_the_start(self, tiny_base):
        given = inputs(tiny_base)
        control = new(tiny_base, gaussian_convolutions=True)
        with torch.no_grad():
            alone = tiny_base.predict(*given[:3])
        assert furthest(predicted(tiny_base, control, *given), alone) > 1e-2
        for convolution in (*control.network.controlnet_down_blocks, control.network.controlnet_mid_block):
            assert not convolution.bias.any()
            assert 0.5 < convolution.weight.std() * convolution.in_channels**0.5 < 1.5
        plain = new(tiny_base)
        rest = {name for name in plain.file_state() if not name.startswith(("controlnet_down", "controlnet_mid"))}
        copied = [name for name in rest if "cond_embedding" not in name]
        assert all(torch.equal(plain.file_state()[name], control.file_state()[name]) for name in copied)
        assert not control.file_state()["controlnet_cond_embedding.conv_out.weight"].any()


class TestTraining:
    def recipe(self, base_folder, icons_file, out, **settings):
        return build_recipe(
            {
                "system": "controlnet",
                "out": str(out),
                "icons": str(icons_file),
                "base": str(base_folder),
                "condition": "canny",
                "steps": 4,
                "batch_size": 2,
                "variants": 2,
                "score_pictures": 1,
                "warmup_steps": 0,
                "learning_rate": 0.01,
                "save_every": 2,
                "preview_every": 100,
                "device": "cpu",
                **settings,
            }
        )

    @pytest.mark.parametrize("settings", [{"sd_locked": False}, {"only_mid_control": True}], ids=["decoder", "middle"])
    def test_a_stopped_run_ends_as_one_in_one_go(
        self, base_folder, icons_file, tmp_path, monkeypatch, settings, condition_image
    ):
        recipe = self.recipe(base_folder, icons_file, tmp_path / "run", ema=0.9, **settings)
        run(recipe)
        broken = dataclasses.replace(recipe, out=str(tmp_path / "broken"))
        loss = ControlObjective.loss

        def until_three(objective, step):
            if step == 3:
                raise RuntimeError("power cut")
            return loss(objective, step)

        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
            patch.setattr(ControlObjective, "loss", until_three)
            run(broken)
        run(broken)
        once, twice = (load_file(tmp_path / out / "canny.safetensors") for out in ("run", "broken"))
        assert same(once, twice)
        base = load_base(base_folder)
        control = load_control(tmp_path / "run" / "canny.safetensors", base)
        own = {} if control.decoder is None else control.decoder.state_dict()
        moved = [name for name, value in own.items() if not torch.equal(value, base.unet.state_dict()[name])]
        assert bool(moved) is (settings == {"sd_locked": False})
        Image.fromarray(condition_image).save(tmp_path / "edges.png")
        use = ControlUse(
            control=str(tmp_path / "run" / "canny.safetensors"), image=str(tmp_path / "edges.png"), prepared=True
        )
        request = GenerateRequest(prompt="red apple", base=str(base_folder), controls=(use,), seeds=(1,), steps=2)
        assert generate(request).images[0].image.size == (64, 64)

    def test_what_it_goes_on_from(self, base_folder, icons_file, tmp_path, capsys):
        base = load_base(base_folder)
        plain = save_control(tmp_path / "plain.safetensors", new(base), base, dtype=torch.float32)
        both = save_control(tmp_path / "both.safetensors", acting(base, sd_locked=False), base, dtype=torch.float32)

        def begun(**settings):
            return ControlObjective(self.recipe(base_folder, icons_file, tmp_path / "run", **settings), CPU).control

        unlocked = begun(start=str(plain), sd_locked=False)
        assert "2e-06" in capsys.readouterr().err
        assert all(torch.equal(v, base.unet.state_dict()[n]) for n, v in unlocked.decoder.state_dict().items())
        continued = begun(start=str(both), sd_locked=False)
        assert same(continued.file_state(), load_control(both, base).file_state())
        with refused("contradiction", "sd_locked: false"):
            begun(start=str(both))
        with refused("contradiction", "gaussian_convolutions", "start"):
            begun(start=str(plain), gaussian_convolutions=True)
        capsys.readouterr()
        begun(start=str(plain))
        assert "2e-06" not in capsys.readouterr().err

    def test_it_stays_what_it_goes_on_from(self, base_folder, icons_file, tmp_path):
        base = load_base(base_folder)

        def begun(start, **settings):
            control = acting(base, **{"only_mid_control": False, **start})
            if control.only_mid_control:
                control._silence_skips()
            file = save_control(tmp_path / "start.safetensors", control, base, dtype=torch.float32)
            recipe = self.recipe(base_folder, icons_file, tmp_path / "run", start=str(file), **settings)
            return ControlObjective(recipe, CPU).control

        middle = begun({"only_mid_control": True})
        assert middle.only_mid_control
        skips = list(middle.network.controlnet_down_blocks.parameters())
        assert not any(parameter.requires_grad or parameter.any() for parameter in skips)
        assert begun({}, only_mid_control=True).only_mid_control
        assert begun({"global_average_pooling": True}).conditional_only
        assert begun({}, global_average_pooling=True).conditional_only

    def test_runs_from_before_these_settings_go_on(self, base_folder, icons_file, tmp_path):
        recipe = self.recipe(base_folder, icons_file, tmp_path / "run")
        new_settings = {field.name for field in dataclasses.fields(ControlNet.Options)}
        assert new_settings and not new_settings & set(identifying(recipe))
        assert "sd_locked" in identifying(dataclasses.replace(recipe, sd_locked=False))
        assert json.dumps(recipe.options)
