"""T2I-Adapter: features into the encoder's stages, the same images as diffusers', once for a condition."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionXLAdapterPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from PIL import Image
from torch.nn import functional

from controlkit.apps.cli import main
from controlkit.bases.families import KNOWN_BASES
from controlkit.bases.load import load_base
from controlkit.bases.residuals import Residuals
from controlkit.bases.stable_diffusion import StableDiffusion
from controlkit.bases.unet import encoder_stages
from controlkit.controls.control import Acts, Reads
from controlkit.controls.file_format import Reference, TensorFile
from controlkit.controls.t2i_adapter import T2IAdapterControl, config_for, feature_stages
from controlkit.formats.card import card_of
from controlkit.formats.convert import convert
from controlkit.formats.describe import describe
from controlkit.formats.load import load_control, save_control
from controlkit.formats.metadata import read_metadata
from controlkit.images import to_tensor
from controlkit.nano.base_objective import save_base
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.residual_cache import ResidualCache
from controlkit.sampling.sampler import sample
from controlkit.training.recipes import build_recipe
from controlkit.training.run import objective_of, run
from refusals import check, refused
from tiny import SD1_SCHEDULE, build_tiny_sdxl

SETTINGS = {"prompt": "red apple", "negative_prompt": "cat face", "seeds": (3, 11), "steps": 4, "guidance": 4.0}


@pytest.fixture(scope="module")
def sd_base(tiny_base):
    """With Stable Diffusion 1's order of blocks: the last has no cross attention and no halving."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    return StableDiffusion(
        name="tiny-sd",
        tokenizer=tiny_base.tokenizer,
        text_encoder=tiny_base.text_encoder,
        vae=tiny_base.vae,
        unet=unet,
        scheduler_config=dict(SD1_SCHEDULE),
    )


@pytest.fixture(scope="module")
def hint_image(condition_image):
    return to_tensor([condition_image])


def fresh(base, condition="canny", seed=1, **shape):
    torch.manual_seed(seed)
    control = T2IAdapterControl.for_base(base, condition, **shape).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in control.parameters():
            parameter.mul_(2)  # a tiny base hardly heeds the features of a fresh network
    return control


def use(control, image, base, **settings):
    return ActiveControl(control, control.encode(image, base), **settings)


def ours(base, uses=(), **changes):
    return torch.cat(list(sample(base, uses=uses, **{**SETTINGS, **changes})))


def theirs(base, adapter, image, scale=1.0):
    pipeline = StableDiffusionAdapterPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=base.unet,
        adapter=adapter,
        scheduler=DDIMScheduler.from_config(base.scheduler_config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        [SETTINGS["prompt"]] * 2,
        negative_prompt=[SETTINGS["negative_prompt"]] * 2,
        image=image,
        adapter_conditioning_scale=scale,
        num_inference_steps=SETTINGS["steps"],
        guidance_scale=SETTINGS["guidance"],
        generator=[torch.Generator().manual_seed(seed) for seed in SETTINGS["seeds"]],
        height=base.size,
        width=base.size,
        eta=0.0,
        output_type="np",
    ).images
    return torch.from_numpy(made).movedim(-1, 1)


def theirs_xl(base, adapter, image, *, steps, factor=1.0):
    pipeline = StableDiffusionXLAdapterPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        text_encoder_2=base.text_encoder_2,
        tokenizer=base.tokenizer,
        tokenizer_2=base.tokenizer_2,
        unet=base.unet,
        adapter=adapter,
        scheduler=DDIMScheduler.from_config(base.scheduler_config),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "red apple",
        negative_prompt="cat face",
        image=image,
        num_inference_steps=steps,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(3),
        height=base.size,
        width=base.size,
        output_type="pt",
        adapter_conditioning_factor=factor,
    ).images


def furthest(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


class TestImages:
    @pytest.mark.parametrize(
        ("shape", "colours"), [({}, 3), ({"colours": 1}, 1), ({"light": True}, 3)], ids=["colour", "grey", "light"]
    )
    @pytest.mark.parametrize("weight", [1.0, 0.6])
    def test_they_equal_diffusers(self, sd_base, condition_image, hint_image, shape, colours, weight):
        control = fresh(sd_base, **shape)
        given = Image.fromarray(condition_image).convert("L" if colours == 1 else "RGB")
        expected = theirs(sd_base, control.to_diffusers(), [given] * 2, weight)
        made = ours(sd_base, [use(control, hint_image, sd_base, weight=weight)])
        assert furthest(made, expected) <= 1e-3
        # The comparison means something only if the control changes the image by much more than the tolerance.
        assert furthest(made, ours(sd_base)) > 2e-2

    def test_grey_is_pillow_s_grey(self, sd_base):
        colours = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        grey = np.asarray(Image.fromarray(colours).convert("L"), np.float32) / 255
        hint = fresh(sd_base, colours=1).encode(to_tensor([colours]), sd_base)
        assert hint.shape == (1, 1, 64, 64)
        assert np.abs(hint[0, 0].numpy() - grey).max() < 0.6 / 255

    def test_two_at_once_equal_diffusers(self, sd_base, hint_image):
        controls = [fresh(sd_base, seed=1), fresh(sd_base, seed=2)]
        images = [hint_image, 1 - hint_image]
        expected = theirs(
            sd_base,
            [control.to_diffusers() for control in controls],
            [image.expand(2, -1, -1, -1) for image in images],
            [0.7, 0.4],
        )
        uses = [use(c, i, sd_base, weight=w) for c, i, w in zip(controls, images, (0.7, 0.4), strict=True)]
        assert furthest(ours(sd_base, uses), expected) <= 1e-3

    def test_those_of_the_xl_network_equal_diffusers(self, hint_image):
        """Its features enter after halvings, as at SDXL."""
        base = build_tiny_sdxl()
        control = T2IAdapterControl(T2IAdapter(3, [16, 32], 2, 8, "full_adapter_xl").eval())
        assert control.incompatibility(base) is None
        expected = theirs_xl(base, control.to_diffusers(), hint_image, steps=3)
        made = ours(base, [use(control, hint_image, base)], seeds=(3,), steps=3)
        assert furthest(made, expected) <= 1e-3
        assert furthest(made, ours(base, seeds=(3,), steps=3)) > 1e-2

    def test_the_middle_takes_the_last_feature_of_a_batch_of_one(self, hint_image):
        """diffusers leaves out at the middle what has another batch than the latents; `predict` does not let it."""
        base = build_tiny_sdxl()
        x_t, text = torch.randn(2, 4, 16, 16), base.encode_text(["a", "b"])
        features = [torch.randn(1, wide, 64 // pixels, 64 // pixels) for wide, pixels in base.encoder_stages]
        one, none = Residuals.numbered("stage", features), Residuals.numbered("stage", features[:-1])
        two = one.map(lambda tensor: tensor.expand(2, -1, -1, -1))
        t = torch.tensor([10, 900])
        made = base.predict(x_t, t, text, one)
        assert torch.equal(made, base.predict(x_t, t, text, two))
        assert furthest(made, base.predict(x_t, t, text, none)) > 1e-3


class TestPlan:
    def test_it_runs_once_for_a_condition_whatever_the_seeds_and_steps(self, sd_base, hint_image):
        control = fresh(sd_base)
        calls = []
        control.network.register_forward_pre_hook(lambda _module, args: calls.append(len(args[0])))
        made = ours(sd_base, [use(control, hint_image, sd_base)], seeds=range(5), batch_size=2)
        assert len(calls) == 1
        alone = torch.cat([ours(sd_base, [use(control, hint_image, sd_base)], seeds=[seed]) for seed in range(5)])
        assert furthest(made, alone) <= 1e-4

    @pytest.mark.parametrize("order", [1, -1])
    def test_it_acts_together_with_a_controlnet(self, tiny_base, tiny_control, hint_image, order):
        adapter = fresh(tiny_base)
        assert (adapter.reads, adapter.acts) == (Reads.NOTHING, Acts.RESIDUALS)
        uses = [use(adapter, hint_image, tiny_base, weight=0.8), use(tiny_control, hint_image, tiny_base, end=0.5)]
        made = ours(tiny_base, uses[::order])
        for alone in uses:
            assert furthest(made, ours(tiny_base, [alone])) > 1e-3
        # Without a plan: both computed at the step, for all rows.
        text = tiny_base.encode_text(["a", "b"])
        x_t, t = torch.randn(2, 4, 16, 16), torch.tensor([500, 500])
        both = [one.control(x_t, t, text, one.hint.expand(2, *one.hint.shape[1:])) for one in uses]
        summed = both[0] + both[1]
        assert (len(summed.family("skip")), len(summed.family("stage"))) == (len(both[1].family("skip")), 2)
        assert "middle" in summed
        assert furthest(tiny_base.predict(x_t, t, text, summed), tiny_base.predict(x_t, t, text, both[1])) > 1e-3

    def test_a_cache_keeps_its_features(self, sd_base, hint_image):
        control, cache = fresh(sd_base), ResidualCache()
        uses = [use(control, hint_image, sd_base)]
        first = ours(sd_base, uses, cache=cache)
        assert torch.equal(ours(sd_base, uses, cache=cache, prompt=SETTINGS["prompt"]), first)
        assert cache.hits > 0 and len(cache) == 1


class TestFirstStepsOnly:
    """`cond_tau` of the original and `adapter_conditioning_factor` of diffusers are the end of a use."""

    def test_the_end_equals_diffusers_factor(self, hint_image):
        base = build_tiny_sdxl()
        control = T2IAdapterControl(T2IAdapter(3, [16, 32], 2, 8, "full_adapter_xl").eval())
        expected = theirs_xl(base, control.to_diffusers(), hint_image, steps=5, factor=0.4)
        made = ours(base, [use(control, hint_image, base, end=0.4)], seeds=(3,), steps=5)
        assert furthest(made, expected) <= 1e-3
        for end in (0.0, 0.2, 1.0):
            assert furthest(made, ours(base, [use(control, hint_image, base, end=end)], seeds=(3,), steps=5)) > 2e-3

    def test_nothing_is_added_or_computed_after_it(self, sd_base, hint_image, monkeypatch):
        control, runs, added = fresh(sd_base), [], []
        control.network.register_forward_pre_hook(lambda *_: runs.append(1))
        predict = sd_base.predict
        monkeypatch.setattr(sd_base, "predict", lambda *args: (added.append(args[3] is not None), predict(*args))[1])
        ours(sd_base, [use(control, hint_image, sd_base, end=0.5)], steps=4)
        assert (added, len(runs)) == ([True, True, False, False], 1)
        ours(sd_base, [use(control, hint_image, sd_base, weight=0.0)], steps=2)
        assert (added[4:], len(runs)) == ([False, False], 1)


class TestTraining:
    def test_noisy_times_are_drawn_more_often(self, sd_base):
        values = {"system": "t2i-adapter", "out": "a", "steps": 1, "icons": "i", "condition": "canny"}
        recipe = build_recipe(values)
        times = sd_base.schedule.draw_times(4000, torch.Generator().manual_seed(0), recipe.time_sampling)
        # (1 - u^3) T has the mean 3 T / 4; the median of u^3 is an eighth.
        assert times.float().mean() == pytest.approx(750, abs=15)
        assert (times >= 875).float().mean() == pytest.approx(0.5, abs=0.03)
        assert build_recipe({**values, "time_sampling": None}).time_sampling is None

    def test_it_goes_on_from_a_file_of_its_own_network(self, sd_base, icons_file, tmp_path):
        save_base(sd_base, tmp_path / "base")
        control = fresh(load_base(tmp_path / "base"), colours=1, light=True)
        start = save_control(tmp_path / "a.safetensors", control, sd_base, dtype=torch.float32)
        start = convert(start, tmp_path / "sketch.pth.safetensors", "original").path
        values = {"system": "t2i-adapter", "base": str(tmp_path / "base"), "icons": str(icons_file), "steps": 1}
        values |= {"condition": "sketch", "batch_size": 2, "score_pictures": 1, "learning_rate": 1e-6}
        run(build_recipe({**values, "start": str(start), "out": str(tmp_path / "run")}))
        made = load_control(tmp_path / "run" / "sketch.safetensors", sd_base)
        assert made.config() == control.config() and made.condition == "sketch"
        before = control.file_state()
        for name, value in made.file_state().items():
            torch.testing.assert_close(value, before[name], atol=2e-3, rtol=2e-3)
        same = {**values, "start": str(start), "out": str(tmp_path / "other")}
        assert objective_of(build_recipe({**same, "colours": 1, "light": True})).control.config() == control.config()

    def test_options_that_contradict_the_file_to_start_from_are_refused(self, sd_base, icons_file, tmp_path):
        save_base(sd_base, tmp_path / "base")
        start = save_control(tmp_path / "a.safetensors", fresh(load_base(tmp_path / "base")), sd_base)
        values = {"system": "t2i-adapter", "base": str(tmp_path / "base"), "icons": str(icons_file), "steps": 1}
        values |= {"condition": "canny", "start": str(start), "out": str(tmp_path / "run")}
        with refused("contradiction", "colours is 1", 3, "start"):
            objective_of(build_recipe({**values, "colours": 1}))
        with refused("contradiction", "light is True", False, "start"):
            objective_of(build_recipe({**values, "light": True}))

    @pytest.mark.parametrize("colours", [0, 2])
    def test_condition_images_are_colour_or_grey(self, tiny_base, colours):
        with refused("out-of-range", "colours", colours, 3, 1):
            T2IAdapterControl.for_base(tiny_base, colours=colours)

    def test_options_choose_the_network(self, sd_base, icons_file, tmp_path):
        save_base(sd_base, tmp_path / "base")
        values = {"system": "t2i-adapter", "base": str(tmp_path / "base"), "icons": str(icons_file), "steps": 1}
        values |= {"condition": "canny", "batch_size": 2, "score_pictures": 1, "out": str(tmp_path / "run")}
        run(build_recipe({**values, "light": True, "colours": 1}))
        made = load_control(tmp_path / "run" / "canny.safetensors", sd_base).config()
        assert (made["adapter_type"], made["in_channels"]) == ("light_adapter", 1)


class TestResiduals:
    a = Residuals.numbered("skip", [torch.ones(1, 2, 4, 4)], middle=torch.ones(1, 2, 2, 2))
    b = Residuals.numbered("stage", [torch.ones(3, 2, 4, 4), torch.ones(3, 2, 2, 2)])

    def test_sums_of_different_sites_have_both(self):
        for total in (self.a + self.b, self.b + self.a):
            assert len(total.tensors()) == len(total) == 4 and total.batch == 3
        longer = self.b + Residuals.numbered("stage", self.b.family("stage")[:1])
        assert longer.batch == 3 and longer["stage.0"].max() == 2 and longer["stage.1"].max() == 1

    def test_weights_for_each_layer(self):
        half = (self.a + self.b).scaled([1.0, 2.0, 3.0, 4.0])
        assert [tensor.max() for tensor in half.tensors()] == [1, 2, 3, 4]
        assert [tensor.max() for tensor in self.b.scaled([0.25, 1.0]).tensors()] == [0.25, 1]
        with pytest.raises(ValueError, match=r"got 1 weights for 2 residuals: stage\.0, stage\.1"):
            self.b.scaled([1.0])
        with pytest.raises(ValueError, match=r"2 residuals: skip\.0, middle"):
            self.a.scaled([1.0])
        assert [len(tensor) for tensor in self.b.rows(1, 2).tensors()] == [1, 1]

    def test_gradients_reach_the_adapter_through_the_frozen_base(self, sd_base, hint_image):
        torch.manual_seed(0)
        control = T2IAdapterControl.for_base(sd_base)
        hint, text = control.encode(hint_image, sd_base), sd_base.encode_text(["a"])
        x_t, t = torch.randn(1, 4, 16, 16), torch.tensor([500])
        sd_base.predict(x_t, t, text, control(x_t, t, text, hint)).pow(2).mean().backward()
        assert all(parameter.grad is not None for parameter in control.trainable_parameters())
        assert sum(parameter.grad.abs().sum() for parameter in control.trainable_parameters()) > 0


@pytest.mark.parametrize("name", [name for name, (_, parts) in KNOWN_BASES.items() if "unet" in parts])
def test_features_have_the_shapes_of_the_encoder_s_stages(name):
    """Where diffusers' UNet adds them, at full width but small size, on the meta device."""
    unet = KNOWN_BASES[name][1]["unet"]
    stages = encoder_stages(unet, 8)
    config = config_for(unet, 8)
    assert feature_stages(config) in (stages, stages[:-1])
    with torch.device("meta"):
        features = T2IAdapter(**config)(torch.empty(1, 3, 128, 128))
    assert [(f.shape[1], 128 // f.shape[2]) for f in features] == list(feature_stages(config))


def original_shapes(channels, colours, light=False):
    """Names and shapes in a file of TencentARC/T2I-Adapter (branch SD): `Adapter(nums_rb=2, ksize=1, sk=True,
    use_conv=False)`, or `Adapter_light(nums_rb=4)`, as its ldm/inference_base.py builds them."""
    convolutions = {}
    before = 64 * colours
    if not light:
        convolutions["conv_in"] = (before, channels[0], 3)
    for stage, wide in enumerate(channels):
        if light:
            convolutions[f"body.{stage}.in_conv"] = (before, wide // 4, 1)
            for block in range(4):
                for name in ("block1", "block2"):
                    convolutions[f"body.{stage}.body.{block}.{name}"] = (wide // 4, wide // 4, 3)
            convolutions[f"body.{stage}.out_conv"] = (wide // 4, wide, 1)
        else:
            if stage and wide != channels[stage - 1]:
                convolutions[f"body.{2 * stage}.in_conv"] = (channels[stage - 1], wide, 1)
            for block in range(2 * stage, 2 * stage + 2):
                convolutions[f"body.{block}.block1"] = (wide, wide, 3)
                convolutions[f"body.{block}.block2"] = (wide, wide, 1)
        before = wide
    shapes = {f"{name}.weight": (out, inner, side, side) for name, (inner, out, side) in convolutions.items()}
    return shapes | {f"{name}.bias": (out,) for name, (_, out, _) in convolutions.items()}


def original_features(state, image, stages, light=False):
    """The features of a file with the original's names, by the formulas of its ldm/modules/encoders/adapter.py."""

    def convolve(x, name):
        weight = state[f"{name}.weight"]
        return functional.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def block(x, name):
        return convolve(convolve(x, f"{name}.block1").relu(), f"{name}.block2") + x

    x = functional.pixel_unshuffle(image, 8)
    x = x if light else convolve(x, "conv_in")
    features = []
    for stage in range(stages):
        x = functional.avg_pool2d(x, 2) if stage else x
        if light:
            x = convolve(x, f"body.{stage}.in_conv")
            for number in range(4):
                x = block(x, f"body.{stage}.body.{number}")
            x = convolve(x, f"body.{stage}.out_conv")
        else:
            x = convolve(x, f"body.{2 * stage}.in_conv") if f"body.{2 * stage}.in_conv.weight" in state else x
            for number in range(2 * stage, 2 * stage + 2):
                x = block(x, f"body.{number}")
        features.append(x)
    return features


class TestFilesOfTheOriginal:
    @pytest.mark.parametrize(
        ("colours", "light", "parameters", "tensors"),
        [(3, False, 77_369_280, 38), (1, False, 77_000_640, 38), (3, True, 18_689_200, 80)],
        ids=["colour", "grey", "light"],
    )
    def test_their_names_and_shapes_are_those_of_stable_diffusion_s(self, colours, light, parameters, tensors):
        shapes = original_shapes((320, 640, 1280, 1280), colours, light)
        assert len(shapes) == tensors and sum(map(math.prod, shapes.values())) == parameters
        state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        (layout,) = T2IAdapterControl.formats
        file = TensorFile(Path("adapter.pth"), state)
        checkpoint = layout.read(T2IAdapterControl, file, Reference(), layout.detect(file))
        unet = KNOWN_BASES["sd15"][1]["unet"]
        assert checkpoint.config == config_for(unet, 8, colours=colours, light=light)
        assert checkpoint.parameters == parameters
        back = layout.write(checkpoint, Reference()).tensors
        assert {name: tuple(value.shape) for name, value in back.items()} == shapes

    @pytest.mark.parametrize("prefix", ["", "adapter."], ids=["inference", "training"])
    @pytest.mark.parametrize("light", [False, True], ids=["full", "light"])
    @pytest.mark.parametrize("colours", [3, 1])
    def test_features_equal_those_of_the_original(self, tmp_path, colours, light, prefix):
        torch.manual_seed(0)
        shapes = original_shapes((16, 32, 48, 48), colours, light)
        state = {name: torch.randn(shape) / math.prod(shape[1:]) ** 0.5 for name, shape in shapes.items()}
        torch.save({f"{prefix}{name}": value for name, value in state.items()}, tmp_path / "adapter.pth")
        control = load_control(tmp_path / "adapter.pth")
        image = torch.rand(2, colours, 128, 64)
        expected = original_features(state, image, 4, light)
        made = control(None, torch.tensor([1]), None, image).tensors()
        assert len(made) == 4
        assert max(furthest(a, b) for a, b in zip(made, expected, strict=True)) <= 1e-4

    def test_another_network_of_its_names_is_refused(self, tmp_path):
        """The original's class has options that no released file uses, such as skips with weights."""
        state = {name: torch.zeros(shape) for name, shape in original_shapes((16, 32, 32), 3).items()}
        torch.save({**state, "body.0.skep.weight": torch.zeros(16, 16, 1, 1)}, tmp_path / "adapter.pth")
        with refused("damaged-file", "adapter.pth", "body.0.skep.weight"):
            load_control(tmp_path / "adapter.pth")


class TestFiles:
    @pytest.mark.parametrize("layout", ["controlkit", "diffusers", "original"])
    @pytest.mark.parametrize("shape", [{}, {"colours": 1}, {"light": True}], ids=["colour", "grey", "light"])
    def test_it_loads_from_every_layout_and_draws_the_same(self, sd_base, hint_image, tmp_path, layout, shape):
        control = fresh(sd_base, "lineart", **shape)
        path = save_control(tmp_path / "a.safetensors", control, sd_base, made={"steps": 7}, dtype=torch.float32)
        out = convert(path, tmp_path / ("f" if layout == "diffusers" else "b.safetensors"), layout).path
        loaded = load_control(out, sd_base)
        assert (loaded.kind, loaded.condition) == ("t2i-adapter", "lineart")
        mine, back = (c(None, torch.tensor([1]), None, c.encode(hint_image, sd_base)) for c in (control, loaded))
        assert all(torch.equal(a, b) for a, b in zip(mine.tensors(), back.tensors(), strict=True))

    def test_its_file_says_what_it_is(self, sd_base, tmp_path):
        path = save_control(tmp_path / "a.safetensors", fresh(sd_base), sd_base, made={"steps": 7})
        said = read_metadata(path)
        assert (said["control.kind"], said["control.condition"]) == ("t2i-adapter", "canny")
        assert said["modelspec.architecture"].endswith("/t2i-adapter")
        assert "A T2I-Adapter" in card_of(path) and "| steps | 7 |" in card_of(path)
        facts = describe(str(path))
        assert (facts["reads"], facts["enters at"]) == ("nothing", "encoder stages")
        assert facts["GFLOP at 64 x 64"]["once for a condition"] > 0
        assert "16 channels at 1/4, 32 at 1/8, 32 at 1/16" in facts["needs"]

    def test_one_of_another_base_is_refused(self, sd_base, tiny_base, tmp_path):
        path = save_control(tmp_path / "a.safetensors", fresh(sd_base), sd_base)
        with refused("incompatible", path, "tiny", "16 channels at 1/4, 32"):
            load_control(path, tiny_base)
        odd = T2IAdapterControl(T2IAdapter(4, [16, 32, 32], 2, 4))
        assert "4 channels" in str(odd.incompatibility(sd_base))

    def test_the_base_tells_the_xl_network_from_the_other(self, tiny_base, tmp_path):
        """Their tensors are the same; without metadata only the base knows where its stages halve."""
        control = fresh(tiny_base)
        assert control.config()["adapter_type"] == "full_adapter_xl"
        path = save_control(tmp_path / "a.safetensors", control, tiny_base, dtype=torch.float32)
        made = convert(path, tmp_path / "b.safetensors", "original").path
        assert load_control(made, tiny_base).config() == control.config()
        from safetensors.torch import load_file

        torch.save(load_file(made), tmp_path / "foreign.pth")
        assert load_control(tmp_path / "foreign.pth", tiny_base).config() == control.config()
        assert load_control(tmp_path / "foreign.pth").config()["adapter_type"] == "full_adapter"

    @pytest.mark.parametrize("layout", ["diffusers", "original"])
    def test_the_verb_generates_with_it(self, sd_base, tmp_path, condition_image, layout, capsys):
        save_base(sd_base, tmp_path / "base")
        fresh(sd_base).to_diffusers().save_pretrained(tmp_path / "folder")
        file = tmp_path / "folder"
        if layout == "original":
            file = convert(file, tmp_path / "t2iadapter_canny.safetensors", "original").path
        Image.fromarray(condition_image).save(tmp_path / "edges.png")
        words = ["generate", "red apple", "--base", str(tmp_path / "base"), "--prepared", "--steps", "2", "--json"]
        words += ["--control", f"{file}={tmp_path / 'edges.png'}@0.9", "--out", str(tmp_path / "out")]
        assert main(words) == 0
        (image,) = json.loads(capsys.readouterr().out)["images"]
        assert Image.open(image).size == (64, 64)

    def test_no_adapter_for_an_encoder_of_another_shape(self):
        unet = {**KNOWN_BASES["sd15"][1]["unet"], "block_out_channels": [320, 640, 960, 1280, 1280]}
        unet["down_block_types"] = ["DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
        unet["down_block_types"] += ["CrossAttnDownBlock2D"]
        with refused("incompatible", "T2I-Adapter", "320 channels"):
            config_for(unet, 8)

    def test_transfer_says_that_there_is_nothing_to_move(self, tiny_base, base_folder, tmp_path, capsys):
        path = save_control(tmp_path / "a.safetensors", fresh(tiny_base), tiny_base)
        words = ["transfer", str(path), "--from", str(base_folder), "--to", str(base_folder)]
        assert main([*words, "--out", str(tmp_path / "b.safetensors")]) == 2
        check(capsys.readouterr().err, "wrong-kind", tmp_path / "a.safetensors", "t2i-adapter")
