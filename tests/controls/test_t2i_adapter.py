"""T2I-Adapter: features into the encoder's stages, the same images as diffusers', once for a condition."""

from __future__ import annotations

import json

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

from controlkit.apps.cli import main
from controlkit.bases.families import KNOWN_BASES
from controlkit.bases.residuals import Residuals
from controlkit.bases.stable_diffusion import StableDiffusion
from controlkit.bases.unet import encoder_stages
from controlkit.controls.control import Acts, Reads
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
        pipeline = StableDiffusionXLAdapterPipeline(
            vae=base.vae,
            text_encoder=base.text_encoder,
            text_encoder_2=base.text_encoder_2,
            tokenizer=base.tokenizer,
            tokenizer_2=base.tokenizer_2,
            unet=base.unet,
            adapter=control.to_diffusers(),
            scheduler=DDIMScheduler.from_config(base.scheduler_config),
        )
        pipeline.set_progress_bar_config(disable=True)
        expected = pipeline(
            "red apple",
            negative_prompt="cat face",
            image=hint_image,
            num_inference_steps=3,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(3),
            height=base.size,
            width=base.size,
            output_type="pt",
        ).images
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
