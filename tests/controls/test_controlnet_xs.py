"""ControlNet-XS through taps: diffusers' own fused network, gradients, guidance, files, training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetXSAdapter, UNet2DConditionModel, UNetControlNetXSModel
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny
from controlkit.apps.cli import main
from controlkit.bases.load import load_base
from controlkit.bases.meta import meta_base
from controlkit.bases.stable_diffusion import StableDiffusion
from controlkit.bases.text import concatenate
from controlkit.bases.unet import unet_inputs
from controlkit.controls.apply import predict_under
from controlkit.controls.control import Acts, Reads
from controlkit.controls.controlnet_xs import ControlNetXS, control_channels
from controlkit.data.pairs import write_pairs
from controlkit.formats.card import card_of
from controlkit.formats.convert import convert
from controlkit.formats.describe import describe, describe_system
from controlkit.formats.load import load_control, save_control
from controlkit.images import to_tensor
from controlkit.sampling.plan import ActiveControl, Plan
from controlkit.sampling.sampler import sample
from controlkit.training.control_objective import ControlObjective
from controlkit.training.recipe import Recipe
from controlkit.training.recipes import read_recipe, recipes
from controlkit.training.run import run as train_recipe
from refusals import refused

SD15 = {"block_out_channels": [320, 640, 1280, 1280], "norm_num_groups": 32, "attention_head_dim": 8}
LEARNS = {"learn_time_embedding": True, "time_embedding_mix": 0.95}


def with_unet(base, unet, name):
    """The tiny base with another UNet."""
    return StableDiffusion(
        name=name,
        tokenizer=base.tokenizer,
        text_encoder=base.text_encoder,
        vae=base.vae,
        unet=unet,
        scheduler_config=dict(tiny.SD1_SCHEDULE),
    )


@pytest.fixture(scope="module")
def sd_base(tiny_base):
    """The structure of Stable Diffusion 1.5: two layers a block, four blocks of which the last has no attention."""
    torch.manual_seed(0)
    attending = ("CrossAttnDownBlock2D",) * 3, ("CrossAttnUpBlock2D",) * 3
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32, 48, 48),
        layers_per_block=2,
        down_block_types=(*attending[0], "DownBlock2D"),
        up_block_types=("UpBlock2D", *attending[1]),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return with_unet(tiny_base, unet, "tiny-sd")


@pytest.fixture(scope="module")
def xl_base():
    """The structure of Stable Diffusion XL: heads and transformers of each block's own, and sizes beside the time."""
    base = tiny.build_tiny_sdxl()
    torch.manual_seed(0)
    changed = {
        "layers_per_block": 2,
        "block_out_channels": [16, 32, 48],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 3],
        "attention_head_dim": [1, 3, 5],
    }
    base.unet = UNet2DConditionModel(**{**tiny.SDXL_PARTS["unet"], **changed}).eval().requires_grad_(False)
    return base


@pytest.fixture(scope="module")
def hint_image(condition_image):
    return to_tensor([condition_image])


def shaken(control, seed=1, scale=0.15):
    """A control none of whose convolutions is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in control.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * scale
    return control.eval().requires_grad_(False)


def fresh(base, seed=1, **options):
    torch.manual_seed(seed)
    return ControlNetXS.for_base(base, "canny", **{"size_ratio": 0.5, **options})


def inputs_of(base, rows=2):
    generator = torch.Generator().manual_seed(7)
    x_t = torch.randn(rows, 4, 16, 16, generator=generator)
    t = torch.linspace(20, 900, rows).long()
    return x_t, t, base.encode_text(["red apple", "cat face", "sailboat"][:rows])


def images(rows=2):
    return torch.rand(rows, 3, 64, 64, generator=torch.Generator().manual_seed(9))


def plain(config):
    return {name: value for name, value in config.items() if name[0] != "_"}


def halves_of(base):
    """One step of two images under guidance, the rows of each half one after another: a plan's inputs, and a call's."""
    x_t, _, text = inputs_of(base)
    parts = [text.map(lambda part, row=row: part[row : row + 1]) for row in range(2)]
    return torch.tensor([400]), parts, torch.cat([x_t, x_t]), concatenate(*(part.expand(2) for part in parts))


def ours(base, control, image, weight=1.0):
    t, parts, x_t, text = halves_of(base)
    plan = Plan([ActiveControl(control, control.encode(image, base), weight=weight)], t, parts)
    return base.predict(x_t, t.expand(4), text, plan.residuals(0, x_t), plan.taps(0, x_t, base))


def theirs(base, control, image, weight=1.0):
    t, _, x_t, text = halves_of(base)
    fused = UNetControlNetXSModel.from_unet(base.unet, control.network).eval().requires_grad_(False)
    both = torch.cat([image, image])
    return fused(x_t, t, **unet_inputs(text), controlnet_cond=both, conditioning_scale=weight, return_dict=False)[0]


def plainly(base):
    t, _, x_t, text = halves_of(base)
    return base.predict(x_t, t.expand(4), text)


def furthest(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


class TestParity:
    @pytest.mark.parametrize("weight", [1.0, 0.5])
    @pytest.mark.parametrize("options", [{}, LEARNS], ids=["base-time", "own-time"])
    @pytest.mark.parametrize("family", ["sd_base", "xl_base"])
    def test_it_equals_diffusers_fused_network(self, family, options, weight, request):
        base = request.getfixturevalue(family)
        control = shaken(fresh(base, **options))
        expected = theirs(base, control, images(), weight)
        assert furthest(ours(base, control, images(), weight), expected) <= 1e-4
        assert furthest(expected, plainly(base)) > 1e-1
        assert furthest(expected, ours(base, control, images(), 1.5 - weight)) > 1e-2

    def test_rows_of_a_batch_have_times_of_their_own(self, sd_base):
        control = shaken(fresh(sd_base, **LEARNS))
        x_t, t, text = inputs_of(sd_base)
        fused = UNetControlNetXSModel.from_unet(sd_base.unet, control.network).eval().requires_grad_(False)
        expected = fused(x_t, t, **unet_inputs(text), controlnet_cond=images(), return_dict=False)[0]
        made = predict_under(control, sd_base, x_t, t, text, control.encode(images(), sd_base))
        assert furthest(made, expected) <= 1e-4

    def test_one_of_channels_that_no_norm_group_divides_equals_diffusers(self, sd_base):
        """As the smallest that its authors published (14M for Stable Diffusion 2.1), which has 4, 8, 16 and 16."""
        network = ControlNetXSAdapter.from_unet(
            sd_base.unet,
            block_out_channels=[4, 8, 16, 16],
            num_attention_heads=[1, 1, 2, 2],
            conditioning_embedding_out_channels=(16, 32, 64),
            conditioning_channel_order="bgr",
        )
        control = shaken(ControlNetXS.from_config(plain(network.config)))
        assert furthest(ours(sd_base, control, images()), theirs(sd_base, control, images())) <= 1e-4
        assert furthest(ours(sd_base, control, images()), ours(sd_base, control, images().flip(1))) > 1e-3

    @pytest.mark.parametrize("family", ["sd_base", "xl_base"])
    def test_a_new_one_has_diffusers_settings_and_names(self, family, request):
        base = request.getfixturevalue(family)
        control = fresh(base)
        expected = ControlNetXSAdapter.from_unet(
            base.unet, size_ratio=0.5, conditioning_embedding_out_channels=(16, 32, 64)
        )
        assert json.dumps(control.config(), sort_keys=True) == json.dumps(plain(expected.config), sort_keys=True)
        shapes = {name: value.shape for name, value in expected.state_dict().items()}
        assert {name: value.shape for name, value in control.file_state().items()} == shapes

    def test_it_has_the_known_size_and_cost(self):
        """52.7M parameters at Stable Diffusion 1.5, and a seventh of a ControlNet's 283 GFLOP a call."""
        facts = describe_system("controlnet-xs", "sd15", size=512)
        assert facts["parameters"] == facts["trainable"] == 52_661_392
        cost = facts["GFLOP at 512 x 512"]
        assert set(cost) == {"once for a condition", "each step of each image"}
        assert cost["each step of each image"] == pytest.approx(283 / 7, rel=0.05)


class TestEffect:
    @pytest.mark.parametrize("options", [{}, {**LEARNS, "time_embedding_mix": 0.4}], ids=["base-time", "own-time"])
    def test_a_new_one_changes_nothing_at_all(self, tiny_base, options):
        control = fresh(tiny_base, **options)
        assert (control.reads, control.acts) == (Reads.NOTHING, Acts.TAPS)
        x_t, t, text = inputs_of(tiny_base)
        with torch.no_grad():
            made = predict_under(control, tiny_base, x_t, t, text, control.encode(images(), tiny_base))
        assert torch.equal(made, tiny_base.predict(x_t, t, text))

    @pytest.mark.parametrize("options", [{}, LEARNS], ids=["base-time", "own-time"])
    def test_under_conditional_only_the_other_rows_are_those_without_control(self, sd_base, options, hint_image):
        control = shaken(fresh(sd_base, **options))
        t, parts, x_t, text = halves_of(sd_base)
        use = ActiveControl(control, control.encode(hint_image, sd_base), weight=0.7, conditional_only=True)
        plan = Plan([use], t, parts)
        made = sd_base.predict(x_t, t.expand(4), text, plan.residuals(0, x_t), plan.taps(0, x_t, sd_base))
        assert torch.equal(made[:2], plainly(sd_base)[:2])
        assert furthest(made[2:], ours(sd_base, control, hint_image.expand(2, -1, -1, -1), 0.7)[2:]) <= 1e-5
        assert furthest(made[2:], plainly(sd_base)[2:]) > 1e-2

    def test_it_acts_beside_a_controlnet_and_another_of_its_kind(self, tiny_base, tiny_control, hint_image):
        """It reads the base's features as they are under all controls; the order of the request does not matter."""
        controls = [shaken(fresh(tiny_base, seed), seed) for seed in (1, 2)]
        uses = [ActiveControl(one, one.encode(hint_image, tiny_base), weight=0.6) for one in (*controls, tiny_control)]
        settings = {"prompt": "red apple", "seeds": (3, 4), "steps": 2, "guidance": 3.0}
        made = torch.cat(list(sample(tiny_base, uses=uses, **settings)))
        assert furthest(made, torch.cat(list(sample(tiny_base, uses=uses[::-1], **settings)))) <= 1e-4
        for kept in (uses[:2], uses[1:], uses[::2]):
            assert furthest(made, torch.cat(list(sample(tiny_base, uses=kept, **settings)))) > 1e-3

    def test_images_do_not_depend_on_their_batch_and_end_with_its_span(self, tiny_base, hint_image):
        control = shaken(fresh(tiny_base, **LEARNS))
        use = ActiveControl(control, control.encode(hint_image, tiny_base), end=0.5)
        settings = {"prompt": "red apple", "steps": 4, "guidance": 3.0}
        together = torch.cat(list(sample(tiny_base, uses=[use], seeds=range(3), **settings)))
        alone = [torch.cat(list(sample(tiny_base, uses=[use], seeds=[seed], **settings))) for seed in range(3)]
        assert furthest(together, torch.cat(alone)) <= 1e-4
        whole = torch.cat(list(sample(tiny_base, uses=[dataclasses.replace(use, end=1)], seeds=range(3), **settings)))
        assert furthest(together, whole) > 1e-3


class TestGradients:
    @pytest.mark.parametrize("options", [{}, LEARNS], ids=["base-time", "own-time"])
    @pytest.mark.parametrize("family", ["sd_base", "xl_base", "tiny"])
    def test_they_are_the_same_with_and_without_checkpointing(self, tiny_base, family, options, request):
        base = tiny_base if family == "tiny" else request.getfixturevalue(family)
        control = shaken(fresh(base, **options)).requires_grad_(True).train()
        runs = []
        for block in control.network.down_blocks:
            block.resnets[0].register_forward_hook(lambda *_: runs.append(1))
        x_t, t, text = inputs_of(base)

        def gradients():
            runs.clear()
            control.zero_grad()
            predict_under(control, base, x_t, t, text, control.encode(images(), base)).pow(2).mean().backward()
            return {name: parameter.grad.clone() for name, parameter in control.named_parameters()}

        plain = gradients()
        blocks = len(control.network.down_blocks)
        assert len(runs) == blocks
        assert [name for name, gradient in plain.items() if not gradient.abs().max() > 0] == []
        base.checkpoint_activations()
        try:
            checkpointed = gradients()
        finally:
            base.unet.disable_gradient_checkpointing()
        assert len(runs) == 2 * blocks
        for name, gradient in plain.items():
            assert furthest(checkpointed[name], gradient) <= 1e-6 * max(1, gradient.abs().max().item()), name
        assert not any(parameter.grad is not None for parameter in base.unet.parameters())


@pytest.fixture
def tiny_xs(sd_base):
    return ControlNetXSAdapter.from_unet(
        sd_base.unet,
        block_out_channels=[32, 32, 48, 64],
        num_attention_heads=4,
        conditioning_embedding_out_channels=(16, 32, 64),
    )


def runs_on(control, base):
    """Whether it changes what the base predicts; a control that was shaken does."""
    x_t, t, text = inputs_of(base)
    made = predict_under(control, base, x_t, t, text, control.encode(images(), base))
    return furthest(made, base.predict(x_t, t, text)) > 1e-3


class TestFiles:
    def test_a_folder_of_diffusers_is_recognised_counted_and_run(self, tmp_path, tiny_xs, sd_base):
        shaken(ControlNetXS(tiny_xs))
        tiny_xs.save_pretrained(tmp_path / "xs")
        facts = describe(str(tmp_path / "xs"))
        assert (facts["kind"], facts["layout"]) == ("controlnet-xs", "diffusers")
        assert facts["parameters"] == sum(parameter.numel() for parameter in tiny_xs.parameters())
        assert "16, 32, 48, 48 channels" in facts["needs"]
        control = load_control(tmp_path / "xs", sd_base)
        assert runs_on(control, sd_base)
        assert furthest(ours(sd_base, control, images()), theirs(sd_base, control, images())) <= 1e-4
        with refused("unsupported", tmp_path / "xs", "a ControlNet-XS", "original"):
            convert(tmp_path / "xs", tmp_path / "o.safetensors", "original")

    def test_it_goes_into_our_format_and_comes_back_bit_for_bit(self, tmp_path, tiny_xs, sd_base):
        shaken(ControlNetXS(tiny_xs))
        tiny_xs.save_pretrained(tmp_path / "xs")
        convert(tmp_path / "xs", tmp_path / "ours.safetensors", "controlkit", condition="canny")
        facts = describe(str(tmp_path / "ours.safetensors"))
        assert (facts["kind"], facts["layout"], facts["condition"]) == ("controlnet-xs", "controlkit", "canny")
        control = load_control(tmp_path / "ours.safetensors", sd_base)
        assert control.condition == "canny" and runs_on(control, sd_base)
        convert(tmp_path / "ours.safetensors", tmp_path / "back", "diffusers")
        back = ControlNetXSAdapter.from_pretrained(tmp_path / "back")
        before, after = (json.dumps(plain(network.config), sort_keys=True) for network in (tiny_xs, back))
        assert before == after
        for (name, one), (other, two) in zip(tiny_xs.state_dict().items(), back.state_dict().items(), strict=True):
            assert name == other
            assert torch.equal(one, two), name

    def test_one_with_a_tensor_too_few_is_refused(self, tmp_path, tiny_xs):
        tiny_xs.save_pretrained(tmp_path / "xs")
        path = tmp_path / "xs" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        tensors.pop(sorted(tensors)[0])
        save_file(tensors, path)
        with refused("damaged-file", tmp_path / "xs", "1 of its"):
            convert(tmp_path / "xs", tmp_path / "ours.safetensors", "controlkit")

    def test_the_weights_without_their_config_are_named_and_refused(self, tmp_path, tiny_xs):
        """Nothing in them tells how many attention heads there are."""
        tiny_xs.save_pretrained(tmp_path / "xs")
        with refused("damaged-file", "a ControlNet-XS", "attention heads", "config.json"):
            load_control(tmp_path / "xs" / "diffusion_pytorch_model.safetensors")

    @pytest.mark.parametrize("options", [{}, LEARNS], ids=["base-time", "own-time"])
    def test_one_of_single_layers_is_kept_in_our_format_alone(self, tmp_path, tiny_base, options):
        control = shaken(fresh(tiny_base, **options))
        path = save_control(tmp_path / "a.safetensors", control, tiny_base, made={"steps": 7}, dtype=torch.float32)
        loaded = load_control(path, tiny_base)
        assert loaded.config() == json.loads(json.dumps(control.config()))
        assert furthest(ours(tiny_base, loaded, images()), ours(tiny_base, control, images())) == 0
        with refused("unsupported", path, "ControlNetXSAdapter", "layers_per_block [1, 1]", "controlkit"):
            convert(path, tmp_path / "folder", "diffusers")
        assert not (tmp_path / "folder").exists()
        assert "A ControlNet-XS for the base `tiny`" in card_of(path)
        facts = describe(str(path))
        assert facts["parameters"] == sum(parameter.numel() for parameter in control.parameters())

    def test_the_cost_of_a_file_on_its_base(self, tmp_path, base_folder, tiny_base):
        path = save_control(tmp_path / "a.safetensors", fresh(tiny_base), tiny_base)
        cost = describe(str(path), base=str(base_folder))["GFLOP at 64 x 64"]
        assert cost["each step of each image"] > 0 and cost["once for a condition"] > 0

    def test_one_of_another_base_is_refused(self, tmp_path, tiny_base, sd_base, xl_base):
        path = save_control(tmp_path / "a.safetensors", fresh(sd_base), sd_base)
        with refused("incompatible", path, "tiny", "[16, 32, 48, 48]"):
            load_control(path, tiny_base)
        assert "layers" in fresh(sd_base).incompatibility(with_layers(sd_base, 1))
        assert "text width" in fresh(with_layers(sd_base, 2, cross_attention_dim=24)).incompatibility(sd_base)
        grey = ControlNetXSAdapter.from_unet(sd_base.unet, size_ratio=0.5, conditioning_channels=1)
        assert "1 channels, not 3" in ControlNetXS(grey).incompatibility(sd_base)
        deep = ControlNetXSAdapter.from_unet(sd_base.unet, size_ratio=0.5)
        assert "divides the image by 8, the base's autoencoder by 4" in ControlNetXS(deep).incompatibility(sd_base)


def with_layers(base, layers, **changes):
    unet = UNet2DConditionModel(**{**base.unet.config, "layers_per_block": layers, **changes})
    return with_unet(base, unet, "another")


class TestOptions:
    def test_channels_are_multiples_of_the_norm_groups(self):
        assert control_channels(SD15, 0.2) == [64, 128, 256, 256]
        assert control_channels(SD15, 0.3) == [96, 192, 384, 384]
        assert control_channels(SD15, 0.05) == [32, 32, 64, 64]

    @pytest.mark.parametrize("ratio", [0.0125, 0.049])
    def test_a_ratio_that_leaves_nothing_of_a_block_is_refused(self, ratio):
        with refused("out-of-range", f"size_ratio {ratio}", "32 norm groups", "0.05"):
            control_channels(SD15, ratio)

    def test_a_ratio_that_leaves_too_little_for_the_heads_is_refused_and_the_one_that_it_names_does(self):
        unet = {"block_out_channels": [48, 96], "norm_num_groups": 8, "attention_head_dim": [8, 16]}
        with refused("out-of-range", "attention heads (8, 16)", "0.125"):
            control_channels(unet, 0.1)
        assert control_channels(unet, 0.125) == [8, 16]

    @pytest.mark.parametrize("ratio", [0, -0.5, 1.5, float("nan")])
    def test_a_ratio_that_is_no_share_is_refused(self, tiny_base, ratio):
        with refused("out-of-range", "size_ratio", ratio, "above 0 and at most 1"):
            fresh(tiny_base, size_ratio=ratio)

    def test_a_mix_without_an_embedding_of_its_own_is_refused(self, tiny_base, tmp_path, tiny_xs):
        with refused("incompatible", "time_embedding_mix 0.5", "learn_time_embedding"):
            fresh(tiny_base, time_embedding_mix=0.5)
        with refused("incompatible", "time_embedding_mix", "1.5", "0 to 1"):
            fresh(tiny_base, time_embedding_mix=1.5, learn_time_embedding=True)
        tiny_xs.register_to_config(time_embedding_mix=0.5)
        tiny_xs.save_pretrained(tmp_path / "xs")
        with refused("damaged-file", tmp_path / "xs", "ControlNetXSAdapter", "time_embedding_mix 0.5"):
            load_control(tmp_path / "xs")

    def test_bases_that_it_has_no_shape_for_are_refused(self, tiny_base):
        with refused("incompatible", "4 channels", "9"):
            fresh(with_layers(tiny_base, 1, in_channels=9))
        with refused("incompatible", "layers_per_block", "[3, 3]", "one or two"):
            fresh(with_layers(tiny_base, 3))


@pytest.fixture
def recipe(tmp_path, base_folder, icons_file) -> Recipe:
    return recipes()["controlnet-xs"](
        out=str(tmp_path / "run"),
        icons=str(icons_file),
        base=str(base_folder),
        condition="canny",
        size_ratio=0.5,
        steps=3,
        batch_size=2,
        variants=2,
        score_pictures=2,
        warmup_steps=0,
        learning_rate=0.01,
        min_lr_rate=1.0,
        log_every=1,
        save_every=1,
        preview_every=3,
        device="cpu",
    )


class TestTraining:
    def test_a_run_that_goes_on_ends_with_the_same_file_and_the_verb_generates_with_it(
        self, recipe, tmp_path, base_folder, condition_image, capsys
    ):
        scores = train_recipe(recipe)
        assert list(scores) == ["canny: edge F1"]
        broken = dataclasses.replace(recipe, out=str(tmp_path / "broken"))
        train_recipe(dataclasses.replace(broken, steps=1))
        train_recipe(broken)
        base = load_base(base_folder)
        whole, resumed = (load_control(tmp_path / out / "canny.safetensors", base) for out in ("run", "broken"))
        assert whole.condition == "canny" and whole.config()["block_out_channels"] == [8, 16]
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name
        assert (tmp_path / "run" / "canny.md").is_file()
        # Zero convolutions have moved, and by the third step what lies behind them.
        kind = recipe.control_class
        untrained = kind.for_training(base, ["canny"], recipe.options, name="canny", seed=recipe.seed).state_dict()
        moved = {name for name, value in whole.state_dict().items() if furthest(value, untrained[name]) > 1e-3}
        for part in ("control_to_base_for_conv_in", "up_connections", "mid_block.midblock", "conv_in.weight"):
            assert any(part in name for name in moved), part
        Image.fromarray(condition_image).save(tmp_path / "edges.png")
        words = ["generate", "red apple", "--base", str(base_folder), "--prepared", "--steps", "2", "--json"]
        words += ["--out", str(tmp_path / "drawn")]
        words += ["--control", f"{tmp_path / 'run' / 'canny.safetensors'}={tmp_path / 'edges.png'}@0.9"]
        capsys.readouterr()
        assert main([*words, "--control", f"{tmp_path / 'broken' / 'canny.safetensors'}={tmp_path / 'edges.png'}"]) == 0
        (image,) = json.loads(capsys.readouterr().out)["images"]
        assert np.asarray(Image.open(image)).shape == (64, 64, 3)

    def test_a_step_makes_no_gradient_for_the_base(self, recipe):
        objective = ControlObjective(recipe, torch.device("cpu"))
        objective.loss(0).backward()
        assert all(parameter.grad is None for network in objective.base.networks for parameter in network.parameters())
        assert {id(one) for one in objective.parameters()} == {id(one) for one in objective.control.parameters()}

    def test_from_pairs_in_bf16_with_recomputed_blocks_every_weight_is_trained(self, recipe, tmp_path, condition_image):
        write_pairs(tmp_path / "pairs", [(condition_image, 255 - condition_image, name) for name in "abcd"])
        kept = {name: getattr(recipe, name) for name in ("out", "base", "size_ratio", "batch_size", "device")}
        settings = {"precision": "bf16", "gradient_checkpointing": True, **LEARNS}
        pairs = recipes()["controlnet-xs-pairs"](**kept, **settings, pairs=str(tmp_path / "pairs"), learning_rate=0.01)
        objective = ControlObjective(pairs, torch.device("cpu"))
        (own,) = objective.source.of.values()
        assert objective.base.dtype == torch.bfloat16 and own.hints is None  # what makes the hints is trained
        optimizer = torch.optim.AdamW(objective.parameters(), lr=0.01)
        for step in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = objective.loss(step)
            loss.backward()
            optimizer.step()
        gradients = {name: parameter.grad for name, parameter in objective.control.named_parameters()}
        assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
        assert [name for name, gradient in gradients.items() if not 0 < gradient.abs().max() < 1e3] == []

    def test_a_ratio_that_does_not_fit_ends_a_run_before_it_begins(self, recipe):
        with refused("out-of-range", "size_ratio 0.2", "3.2, 6.4"):
            train_recipe(dataclasses.replace(recipe, size_ratio=0.2))

    def test_the_recipe_for_nano_fits_nano(self):
        path = Path(__file__).parents[2] / "recipes/nano/systems.yaml"
        recipe = read_recipe(path, ["system=controlnet-xs", "size_ratio=0.5"])
        assert (recipe.system, recipe.condition) == ("controlnet-xs", "canny")
        unet = dict(meta_base(recipe.base).unet.config)
        assert control_channels(unet, recipe.options["size_ratio"]) == [32, 48, 80]
