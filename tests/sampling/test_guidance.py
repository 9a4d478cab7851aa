"""Modes, layers and masks: exact against diffusers, against a loop without a plan, and against what they mean."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline, UNet2DConditionModel
from fake_control import FakeControl
from parity import assert_same, ours, parts, theirs
from PIL import Image

from controlkit.bases.residuals import Residuals
from controlkit.bases.stable_diffusion import StableDiffusion
from controlkit.bases.unet import sites_of
from controlkit.controls.control import Acts, Reads
from controlkit.controls.controlnet_xs import ControlNetXS
from controlkit.controls.t2i_adapter import T2IAdapterControl
from controlkit.images import to_tensor
from controlkit.sampling.generate import generate
from controlkit.sampling.inputs import parse_control_use
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.residual_cache import ResidualCache
from controlkit.sampling.sampler import initial_noise, sample
from controlkit.sampling.uses import CONDITIONAL_MODES, MODES, ControlUse
from controlkit.sampling.weighting import Weighting, resolution_weights, soft_weights
from refusals import refused
from tiny import SD1_SCHEDULE, build_tiny_sd3, fresh_control, randomise_zero_convolutions

SD1 = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "layers_per_block": 2,
}
LEFT = torch.cat([torch.ones(1, 1, 64, 32), torch.zeros(1, 1, 64, 32)], 3)


@pytest.fixture(scope="module")
def hint_image(condition_image):
    return to_tensor([condition_image])


@pytest.fixture(scope="module")
def thirteen(tiny_base):
    """A base with the 13 decoder sites of Stable Diffusion 1 at its four resolutions, 64 x 64 images."""
    torch.manual_seed(3)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=2,
        cross_attention_dim=tiny_base.unet.config.cross_attention_dim,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return StableDiffusion(
        name="thirteen",
        tokenizer=tiny_base.tokenizer,
        text_encoder=tiny_base.text_encoder,
        vae=tiny_base.vae,
        unet=unet,
        scheduler_config=SD1_SCHEDULE,
    )


@pytest.fixture(scope="module")
def thirteen_control(thirteen):
    return randomise_zero_convolutions(fresh_control(thirteen))


def acting(mode, base, control, image, **settings):
    return ActiveControl.in_mode(mode, base, control=control, hint=control.encode(image, base), **settings)


def pipeline_image(base, control, image, **settings):
    pipeline = StableDiffusionControlNetPipeline(**parts(base), controlnet=control.to_diffusers())
    size = {"height": base.size, "width": base.size}
    return theirs(pipeline, image=image.expand(2, -1, -1, -1), guess_mode=True, **size, **settings)


class TestWeights:
    def test_soft_weights_of_stable_diffusion_are_powers_of_0_825(self):
        weights = soft_weights(sites_of(SD1, 8))
        decoder = [weights[f"skip.{place}"] for place in range(12)] + [weights["middle"]]
        assert decoder == pytest.approx([0.825 ** (12 - place) for place in range(13)], rel=1e-12)
        assert decoder == pytest.approx(torch.logspace(-1, 0, 13).tolist(), rel=0.0065)
        assert [weights[f"encoder.{place}"] for place in range(12)] == decoder[:12]
        assert [weights[f"stage.{place}"] for place in range(5)] == [0.25, 0.62, 0.825, 1.0, 1.0]

    def test_resolution_weights_are_64_over_the_height_at_512_pixels(self):
        sites = sites_of(SD1, 8)
        literal, normalised = resolution_weights(sites), resolution_weights(sites, normalised=True)
        heights = [64] * 3 + [32] * 3 + [16] * 3 + [8] * 4
        decoder = [f"skip.{place}" for place in range(12)] + ["middle"]
        assert [literal[site] for site in decoder] == [64 / height for height in heights]
        assert sum(literal[site] for site in decoder) == 53
        assert all(normalised[site] * 8 == literal[site] for site in sites)

    def test_on_any_unet_they_grow_with_depth(self, tiny_base):
        for weights in (soft_weights(tiny_base.sites), resolution_weights(tiny_base.sites, normalised=True)):
            decoder = [weights[site] for site in tiny_base.sites if site.startswith("skip.")] + [weights["middle"]]
            assert all(0 < one <= other for one, other in pairwise(decoder)) and decoder[-1] == 1


class TestAgainstDiffusers:
    def test_guess_mode_with_the_weights_of_diffusers_is_guess_mode(self, thirteen, thirteen_control, hint_image):
        expected = pipeline_image(thirteen, thirteen_control, hint_image, controlnet_conditioning_scale=0.8)
        layers = torch.logspace(-1, 0, 13).tolist()
        use = acting("control", thirteen, thirteen_control, hint_image, weight=0.8, layers=layers)
        assert_same(ours(thirteen, [use]), expected, 1e-3)

    @pytest.mark.parametrize("guidance", [4.0, 1.0])
    def test_guess_mode_is_that_of_diffusers_up_to_its_logspace(self, thirteen, thirteen_control, hint_image, guidance):
        expected = pipeline_image(thirteen, thirteen_control, hint_image, guidance_scale=guidance)
        result = ours(thirteen, [acting("guess", thirteen, thirteen_control, hint_image)], guidance=guidance)
        effect = (expected - ours(thirteen, guidance=guidance)).abs().max()
        # No weight differs by more than 0.6 %.
        assert (result - expected).abs().max() <= 0.02 * effect and effect > 2e-2
        unweighted = ours(thirteen, [acting("control", thirteen, thirteen_control, hint_image)], guidance=guidance)
        assert (unweighted - expected).abs().max() > 0.2 * effect

    def test_a_control_that_pools_its_residuals_has_no_soft_weights_in_guess_mode(self, tiny_base, hint_image):
        pooled = randomise_zero_convolutions(fresh_control(tiny_base))
        pooled.network.register_to_config(global_pool_conditions=True)
        pooled.network.config["global_pool_conditions"] = True
        expected = pipeline_image(tiny_base, pooled, hint_image)
        assert_same(ours(tiny_base, [acting("guess", tiny_base, pooled, hint_image)]), expected, 1e-3)
        assert ActiveControl.mode_in("guess", tiny_base, pooled) == "control"
        assert ActiveControl.mode_in("cfg-rw", tiny_base, pooled) == "cfg-rw"


def eager(base, control, hint, *, mode, weights, seeds=(3, 11), steps=4, guidance=4.0, mask=None, weight=1.0):
    """A loop over steps, images and branches that knows neither plan nor batches."""
    images = []
    for seed in seeds:
        solver = base.schedule.solver("ddim", steps, base.device, base.name)
        x_t = initial_noise(base, [seed], base.size, base.size) * solver.initial
        for index, t in enumerate(solver.timesteps):
            branches = []
            for positive, prompt in enumerate(("cat face", "red apple")):
                text = base.encode_text([prompt])
                residuals = None
                if positive or mode not in CONDITIONAL_MODES:
                    made = control(x_t, t.expand(1), text, hint)
                    residuals = Residuals(
                        {
                            site: tensor * weight * weights[site] * (1 if mask is None else pooled(mask, tensor))
                            for site, tensor in made.items()
                        }
                    )
                branches.append(base.predict(x_t, t, text, residuals))
            x_t = solver.step(branches[0] + guidance * (branches[1] - branches[0]), x_t, index)
        images.append((base.decode(x_t) + 1) / 2)
    return torch.cat(images)


def pooled(mask, tensor):
    side = mask.shape[-1] // tensor.shape[-1]
    return torch.nn.functional.avg_pool2d(mask, side)


def planned(base, use, **settings):
    common = {"prompt": "red apple", "negative_prompt": "cat face", "seeds": (3, 11), "steps": 4, "guidance": 4.0}
    return torch.cat(list(sample(base, uses=[use], **common, **settings)))


class TestAgainstALoop:
    @pytest.mark.parametrize("mode", MODES)
    def test_every_mode_with_a_mask_and_a_weight(self, thirteen, thirteen_control, hint_image, mode):
        sites = thirteen.sites
        weights = {
            "soft": soft_weights(sites),
            "guess": soft_weights(sites),
            "cfg-rw": resolution_weights(sites, normalised=True),
            "cfg-rw-literal": resolution_weights(sites),
        }.get(mode, dict.fromkeys(sites, 1.0))
        soft = torch.linspace(0, 1, 64).expand(1, 1, 64, 64).contiguous()
        use = acting(mode, thirteen, thirteen_control, hint_image, weight=0.3, mask=soft)
        with torch.inference_mode():
            hint = thirteen_control.encode(hint_image, thirteen)
            expected = eager(thirteen, thirteen_control, hint, mode=mode, weights=weights, mask=soft, weight=0.3)
        assert_same(planned(thirteen, use), expected, 1e-4)
        assert_same(planned(thirteen, use, batch_size=1), expected, 1e-4)

    @pytest.mark.parametrize("reads", [Reads.NOTHING, Reads.TIME, Reads.TEXT, Reads.TIME | Reads.TEXT])
    @pytest.mark.parametrize("mode", ["soft", "cfg-rw"])
    def test_what_runs_ahead_is_weighted_as_what_runs_at_every_step(self, tiny_base, hint_image, reads, mode):
        settings = {"layers": (0.5, 1, 0, -1, 2), "mask": LEFT, "weight": 0.7}
        every_step = FakeControl(reads).pretending_to_read(reads | Reads.NOISE)
        expected = planned(tiny_base, acting(mode, tiny_base, every_step, hint_image, **settings))
        result = planned(tiny_base, acting(mode, tiny_base, FakeControl(reads), hint_image, **settings))
        assert_same(result, expected, 1e-5)

    def test_a_cache_keeps_residuals_before_weights_and_masks(self, tiny_base, hint_image):
        """Another mask, mode or weight under the same cache makes what it makes without one."""
        control, cache = FakeControl(Reads.TIME | Reads.TEXT), ResidualCache()
        runs = []
        settings = [
            ("guess", {"mask": LEFT}),
            ("guess", {"mask": 1 - LEFT}),
            ("cfg-rw", {}),
            ("control", {"layers": (0, 0, 0, 0, 1)}),
        ]
        images = []
        for mode, more in settings:
            use = acting(mode, tiny_base, control, hint_image, **more)
            images.append(planned(tiny_base, use, cache=cache))
            runs.append(sum(control.batches))
            assert torch.equal(images[-1], planned(tiny_base, use))
            control.batches.clear()
        assert runs[0] == 4 and runs[1:] == [0, 0, 0]
        assert all((one - other).abs().max() > 1e-2 for one, other in pairwise(images))


class TestMasks:
    def test_a_mask_of_ones_is_none_and_one_of_zeros_is_no_control(self, tiny_base, tiny_control, hint_image):
        plain = planned(tiny_base, acting("balanced", tiny_base, tiny_control, hint_image))
        ones = acting("balanced", tiny_base, tiny_control, hint_image, mask=torch.ones_like(LEFT))
        assert torch.equal(planned(tiny_base, ones), plain)
        control = FakeControl(Reads.NOISE)
        zeros = acting("balanced", tiny_base, control, hint_image, mask=torch.zeros_like(LEFT))
        without = torch.cat(
            list(sample(tiny_base, prompt="red apple", negative_prompt="cat face", seeds=(3, 11), steps=4, guidance=4))
        )
        assert torch.equal(planned(tiny_base, zeros), without)
        assert control.batches == []

    def test_halves(self, tiny_base, tiny_control, hint_image):
        """Residuals are untouched in one half and zero in the other; both halves together are the control."""
        with torch.inference_mode():
            text = tiny_base.encode_text(["red apple"])
            x_t = initial_noise(tiny_base, [0], 64, 64)
            residuals = tiny_control(x_t, torch.tensor([500]), text, tiny_control.encode(hint_image, tiny_base))
        left, right = (Weighting.of("control", tiny_base, tiny_control, mask=mask) for mask in (LEFT, 1 - LEFT))
        for site, tensor in residuals.items():
            half = tensor.shape[-1] // 2
            assert torch.equal(left(residuals)[site][..., :half], tensor[..., :half]) and tensor.any()
            assert not left(residuals)[site][..., half:].any()
            assert torch.equal(left(residuals)[site] + right(residuals)[site], tensor)
        both = [acting("control", tiny_base, tiny_control, hint_image, mask=mask) for mask in (LEFT, 1 - LEFT)]
        settings = {"prompt": "red apple", "seeds": (3,), "steps": 3}
        together = next(sample(tiny_base, uses=both, **settings))
        whole = [acting("control", tiny_base, tiny_control, hint_image)]
        assert_same(together, next(sample(tiny_base, uses=whole, **settings)), 1e-5)

    def test_soft_edges_are_averaged_to_each_site_whatever_its_size(self, tiny_base):
        """Sizes that no site divides round up, as the UNet does."""
        control = FakeControl(Reads.NOTHING)
        mask = torch.rand(1, 1, 44, 52)
        weighting = Weighting.of("control", tiny_base, control, mask=mask)
        sides = {site: (-(-44 // factor), -(-52 // factor)) for site, (_, factor) in tiny_base.sites.items()}
        ones = Residuals({site: torch.ones(2, 3, *side) for site, side in sides.items()})
        masked = weighting(ones)
        for site, tensor in masked.items():
            assert tensor.shape == ones[site].shape and tensor.min() > 0 and tensor.max() < 1
            assert tensor.mean().item() == pytest.approx(mask.mean().item(), abs=0.03)
        pooled_residuals = Residuals({site: torch.ones(2, 3, 1, 1) for site in sides})
        assert all(torch.equal(weighting(pooled_residuals)[site], masked[site]) for site in sides)

    def test_a_transformer_takes_masks_in_the_order_of_its_tokens(self):
        base, control = build_tiny_sd3(t5=False), FakeControl(Reads.NOTHING)
        weighting = Weighting.of("balanced", base, control, mask=LEFT)
        side = 64 // base.size_multiple
        masked = weighting(Residuals({"block.0": torch.ones(1, side * side, 5)}))["block.0"]
        expected = torch.cat([torch.ones(side, side // 2), torch.zeros(side, side // 2)], 1).flatten()
        assert torch.equal(masked[0, :, 3], expected)


class TestLayers:
    def test_one_site_alone(self, tiny_base, tiny_control, hint_image):
        middle = acting("control", tiny_base, tiny_control, hint_image, layers=(0, 0, 0, 0, 1))
        by_weights = acting("control", tiny_base, tiny_control, hint_image, weight=(0.0, 0.0, 0.0, 0.0, 1.0))
        assert torch.equal(planned(tiny_base, middle), planned(tiny_base, by_weights))
        nowhere = FakeControl(Reads.NOISE)
        planned(tiny_base, acting("control", tiny_base, nowhere, hint_image, layers=(0, 0, 0, 0, 0)))
        assert nowhere.batches == []

    def test_a_wrong_number_of_them_is_refused(self, tiny_base, tiny_control, hint_image):
        with refused("out-of-range", "2 layers", "5 residuals", "skip.0", "middle"):
            planned(tiny_base, acting("control", tiny_base, tiny_control, hint_image, layers=(1, 0)))


class TestRefusals:
    @pytest.mark.parametrize(
        ("mode", "settings", "said"),
        [
            *((mode, {}, f"mode {mode}") for mode in ("soft", "guess", "cfg-rw", "cfg-rw-literal")),
            ("control", {"mask": LEFT}, "a mask"),
            ("balanced", {"layers": (1.0,)}, "layers"),
        ],
    )
    def test_a_control_inside_the_base_has_no_residuals_to_weight(self, sd1_scheduled_base, mode, settings, said):
        control = ControlNetXS.for_base(sd1_scheduled_base, size_ratio=0.5)
        assert control.acts == Acts.TAPS
        with refused("unsupported", control.title, said):
            ActiveControl.in_mode(mode, sd1_scheduled_base, control=control, hint=torch.zeros(1), **settings)

    @pytest.mark.parametrize("mode", ["cfg-rw", "cfg-rw-literal", "guess", "soft"])
    def test_weights_by_resolution_need_sites_of_different_resolutions(self, mode):
        base = build_tiny_sd3(t5=False)
        with refused("incompatible", mode, base.name):
            ActiveControl.in_mode(mode, base, control=FakeControl(Reads.NOTHING), hint=torch.zeros(1))

    def test_modes_of_residuals_fit_features_of_encoder_stages(self, thirteen, hint_image):
        torch.manual_seed(0)
        control = T2IAdapterControl.for_base(thirteen).eval().requires_grad_(False)
        images = {mode: planned(thirteen, acting(mode, thirteen, control, hint_image)) for mode in MODES}
        assert all((images[mode] - images["control"]).abs().max() > 1e-3 for mode in MODES if mode != "control")


NAMES = {
    "Balanced": "balanced",
    "My prompt is more important": "soft",
    "ControlNet is more important": "guess",
    "guess_mode": "guess",
    "cfg-rw-normalised": "cfg-rw",
}


def test_names_of_other_tools():
    for name, mode in NAMES.items():
        assert ControlUse(control="canny", image="a.png", mode=name).mode == mode
        assert parse_control_use(f"canny=a.png@0.5,mode={name}").mode == mode


def test_everything_of_a_control_in_a_request(tiny_base, tiny_control, tmp_path, condition_image, monkeypatch):
    """From files: mask, layers, mode, span and parameters act as the same settings of `ActiveControl`."""
    monkeypatch.chdir(tmp_path)
    photo = np.asarray(Image.fromarray(condition_image).convert("RGB"))
    Image.fromarray(photo).save("photo.png")
    Image.fromarray((LEFT[0, 0].numpy() * 255).astype(np.uint8)).save("mask.png")
    text = "canny=photo.png@0.8:0-0.5,mode=guess,mask=mask.png,layers=1:1:0.5:1:1,low=20,high=60"
    use = parse_control_use(text)
    request = GenerateRequest(prompt="red apple", controls=(use,), seeds=(1,), steps=4)
    assert GenerateRequest.from_json(request.to_json()) == request
    monkeypatch.setattr(tiny_control, "condition", "canny")
    made = generate(request, base=tiny_base, controls=[tiny_control])
    from controlkit import find_condition

    hint_image = to_tensor([find_condition("canny")(photo, low=20, high=60)])
    active = acting(
        "guess", tiny_base, tiny_control, hint_image, weight=0.8, end=0.5, mask=LEFT, layers=(1, 1, 0.5, 1, 1)
    )
    expected = next(sample(tiny_base, prompt="red apple", uses=[active], seeds=(1,), steps=4))
    assert np.abs(to_tensor([made.images[0].image]).numpy() - expected.numpy()).max() <= 0.5 / 255 + 1e-6
    assert list(made.masks) == ["mask0"] and len(made.sha256["controls"][0]["mask"]) == 64


def test_steps_outside_of_start_and_end_run_nothing_of_the_control(tiny_base, tiny_control, tmp_path, monkeypatch):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "white.png")
    calls = []
    forward = type(tiny_control).forward
    monkeypatch.setattr(type(tiny_control), "forward", lambda self, *args: calls.append(1) or forward(self, *args))
    for start, end, count in ((0.0, 1.0, 10), (0.2, 0.5, 3), (0.5, 1.0, 5)):
        use = ControlUse(control="canny", image=str(tmp_path / "white.png"), prepared=True, start=start, end=end)
        generate(
            GenerateRequest(prompt="red apple", controls=(use,), steps=10), base=tiny_base, controls=[tiny_control]
        )
        assert len(calls) == count
        calls.clear()
