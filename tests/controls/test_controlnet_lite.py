"""ControlNet-lite: both designs compute what they should, and files of the CtrLoRA repository go in and out."""

from __future__ import annotations

import dataclasses
import json
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from controlkit.bases import meta
from controlkit.bases.load import load_base
from controlkit.bases.stable_diffusion import StableDiffusion
from controlkit.controls.apply import predict_under
from controlkit.controls.controlnet_lite import SITES, ControlNetLite, write_original
from controlkit.controls.file_format import Checkpoint
from controlkit.errors import UserError
from controlkit.formats.card import card_of
from controlkit.formats.convert import convert
from controlkit.formats.describe import describe, describe_system
from controlkit.formats.detect import detect
from controlkit.formats.load import load_control, save_control
from controlkit.images import to_tensor
from controlkit.sampling.generate import generate
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.sampler import sample
from controlkit.sampling.uses import ControlUse
from controlkit.training.recipes import build_recipe
from controlkit.training.run import run
from refusals import refused

DESIGNS = tuple(SITES)
meta_base = cache(meta.meta_base)


def original_shapes(width: int, multiples: tuple[int, ...], layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the state of `ControlNetLite` in xyfJASON/ctrlora, cldm/cldm_lite.py, at 8 pixels to one of
    the latent, of 4 channels."""
    shapes: dict[str, tuple[int, ...]] = {}

    def add(name, *weight):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]

    add("time_embed.0", 4 * width, width)
    add("time_embed.2", 4 * width, 4 * width)
    hint = [(16, 3), (16, 16), (32, 16), (32, 32), (96, 32), (96, 96), (256, 96), (width, 256)]
    for place, (out, given) in enumerate(hint):
        add(f"input_hint_block.{2 * place}", out, given, 3, 3)
    channels = [width]
    add("input_blocks.0.0", width, 4, 3, 3)
    for level, multiple in enumerate(multiples):
        for _ in range(layers):
            add(f"input_blocks.{len(channels)}.0", channels[-1])
            add(f"input_blocks.{len(channels)}.2", multiple * width, channels[-1], 3, 3)
            channels.append(multiple * width)
        if level + 1 < len(multiples):
            add(f"input_blocks.{len(channels)}.0.op", channels[-1], channels[-1], 3, 3)
            channels.append(channels[-1])
    for number, wide in enumerate(channels):
        add(f"zero_convs.{number}.0", wide, wide, 1, 1)
    add("middle_block.0", channels[-1])
    add("middle_block.2", channels[-1], channels[-1], 3, 3)
    add("middle_block_out.0", channels[-1], channels[-1], 1, 1)
    return shapes


def original_state(*shape, seed=0) -> dict[str, torch.Tensor]:
    """Random weights under which activations keep their size."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, size in original_shapes(*shape).items():
        value = torch.randn(size, generator=generator)
        state[name] = value * 1.5 / value[0].numel() ** 0.5 if value.ndim > 1 else 0.3 * value + name.endswith("weight")
    return state


def original_residuals(state, x_t, image) -> list[torch.Tensor]:
    """What that code computes of a state, by the functions of torch."""

    def conv(name, x, **how):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **how)

    def layer(name, x):
        x = F.group_norm(x, 32, state[f"{name}.0.weight"], state[f"{name}.0.bias"], eps=1e-5)
        return conv(f"{name}.2", F.silu(x), padding=1)

    hint = image
    for place in range(0, 16, 2):
        hint = conv(f"input_hint_block.{place}", hint, padding=1, stride=2 if place in (4, 8, 12) else 1)
        hint = F.silu(hint) if place < 14 else hint
    stream, made, number = conv("input_blocks.0.0", x_t, padding=1) + hint, [], 0
    while True:
        made.append(conv(f"zero_convs.{number}.0", stream))
        number += 1
        if f"input_blocks.{number}.0.op.weight" in state:
            stream = conv(f"input_blocks.{number}.0.op", stream, padding=1, stride=2)
        elif f"input_blocks.{number}.2.weight" in state:
            stream = layer(f"input_blocks.{number}", stream)
        else:
            return [*made, conv("middle_block_out.0", layer("middle_block", stream))]


def fresh(base, design, condition="canny", seed=1) -> ControlNetLite:
    torch.manual_seed(seed)
    return ControlNetLite.for_base(base, condition, design=design)


def acting(base, design, **settings) -> ControlNetLite:
    """One whose zero convolutions are not zero."""
    control = fresh(base, design, **settings).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    for module in (control.zero_convs, control.middle_zero_conv, control.hint_network.conv_out):
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return control


def inputs(base, rows=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    side = base.size // base.factor
    x_t = torch.randn(rows, base.latent_channels, side, side, generator=generator)
    image = torch.rand(rows, 3, base.size, base.size, generator=generator)
    return x_t, torch.tensor([21, 801])[:rows], base.encode_text(["red apple", "cat face"][:rows]), image


def furthest(a, b) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


class TestFilesOfTheCtrLoRARepository:
    SHAPE = (32, (1, 2), 1)

    @pytest.fixture
    def state(self):
        return original_state(*self.SHAPE)

    def written(self, state, path, prefix="control_model.", **others):
        torch.save({"state_dict": {**{f"{prefix}{name}": value for name, value in state.items()}, **others}}, path)
        return path

    def test_names_and_shapes_at_sd15_are_those_of_its_class(self):
        """90 tensors of 107,735,440 numbers, 2,050,560 of them an embedding of the time that nothing reads."""
        with torch.device("meta"):
            control = ControlNetLite.for_base(meta_base("sd15"), design="ctrlora")
        written = write_original(Checkpoint(control.kind, control.config(), control.file_state()), "")
        assert {name: tuple(value.shape) for name, value in written.tensors.items()} == original_shapes(
            320, (1, 2, 4, 4), 2
        )
        assert (len(written.tensors), sum(value.numel() for value in written.tensors.values())) == (90, 107_735_440)
        assert sum(parameter.numel() for parameter in control.trainable_parameters()) == 107_735_440 - 2_050_560

    @pytest.mark.parametrize("shape", [SHAPE, (32, (1, 2, 4), 2)], ids=["two levels", "three levels"])
    @pytest.mark.parametrize("prefix", ["control_model.", ""], ids=["prefix", "bare"])
    def test_residuals_are_those_that_its_weights_make(self, tmp_path, shape, prefix):
        state = original_state(*shape)
        path = self.written(state, tmp_path / "a.pth", prefix)
        control = load_control(path)
        assert (control.kind, control.config()["design"]) == ("controlnet-lite", "ctrlora")
        assert detect(path).format_name == ("original" if prefix else "bare")
        generator = torch.Generator().manual_seed(3)
        x_t, image = torch.randn(2, 4, 8, 12, generator=generator), torch.rand(2, 3, 64, 96, generator=generator)
        made = control(x_t, torch.tensor([1, 2]), None, control.encode(image, None))
        expected = original_residuals(state, x_t, image)
        assert list(made) == [*(f"encoder.{number}" for number in range(len(expected) - 1)), "middle"]
        assert furthest(made.tensors(), expected) <= 1e-4
        assert min(tensor.abs().mean() for tensor in expected) > 0.3

    def test_every_tensor_comes_back_bit_for_bit(self, state, tmp_path):
        path = self.written(state, tmp_path / "a.pth")
        for number, layout in enumerate(("controlkit", "bare", "controlkit", "original")):
            path = convert(path, tmp_path / f"{number}.safetensors", layout).path
            assert detect(path).kind == "controlnet-lite"
        back = load_file(path)
        assert back.keys() == {f"control_model.{name}" for name in state}
        assert all(torch.equal(back[f"control_model.{name}"], value) for name, value in state.items())

    def test_the_one_of_a_training_checkpoint_is_taken_out_of_it(self, state, tmp_path):
        others = {
            "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 4, 3, 3),
            "model.diffusion_model.input_blocks.1.0.emb_layers.1.weight": torch.zeros(32, 128),
            "first_stage_model.encoder.conv_in.weight": torch.zeros(8, 3, 3, 3),
            "betas": torch.zeros(1000),
        }
        path = self.written(state, tmp_path / "last.ckpt", **others)
        assert (detect(path).kind, detect(path).format_name) == ("controlnet-lite", "full")
        assert "Stable Diffusion (4 tensors)" in describe(str(path))["notes"]
        made = convert(path, tmp_path / "a.safetensors", "original").path
        assert {name.removeprefix("control_model.") for name in load_file(made)} == set(state)

    def test_one_that_lost_a_tensor_is_still_one(self, state, tmp_path):
        for lost in state:
            rest = {name: value for name, value in state.items() if name != lost}
            path = self.written(rest, tmp_path / "a.pth")
            assert (detect(path).kind, detect(path).format_name) == ("controlnet-lite", "original")
            with refused("damaged-file", path, "a ControlNet-lite", "1 of its", lost):
                load_control(path)

    @pytest.mark.parametrize(
        ("change", "fact"),
        [
            ({"stray": torch.zeros(2)}, "1 tensors do not belong to it: stray"),
            ({"control_model.middle_block.2.bias": torch.zeros(3)}, "shape (3,), not (64,)"),
            ({"control_model.input_blocks.9.0.weight": torch.zeros(3)}, "input_blocks.4.2"),
        ],
    )
    def test_what_does_not_belong_is_named(self, state, tmp_path, change, fact):
        path = self.written(state, tmp_path / "a.pth", **change)
        with refused("damaged-file", path, fact):
            load_control(path)

    def test_a_controlnet_is_none(self, tiny_control, tiny_base, tmp_path):
        path = save_control(tmp_path / "a.safetensors", tiny_control, tiny_base)
        for layout in ("original", "bare"):
            made = convert(path, tmp_path / f"{layout}.safetensors", layout).path
            assert (detect(made).kind, detect(made).format_name) == ("controlnet", layout)

    def test_the_paper_s_design_has_no_place_there(self, tiny_base, tmp_path):
        path = save_control(tmp_path / "a.safetensors", fresh(tiny_base, "paper"), tiny_base)
        with refused("unsupported", "ControlNet-lite", "design paper", "controlkit"):
            convert(path, tmp_path / "b.safetensors", "original")
        with refused("unsupported", path, "diffusers", "CtrLoRA"):
            convert(path, tmp_path / "folder", "diffusers")


class TestComputation:
    def test_the_paper_s_design_is_one_convolution_a_block(self, tiny_base):
        control = acting(tiny_base, "paper")
        x_t, t, _, image = inputs(tiny_base)
        hint = control.encode(image, tiny_base)
        state, made = control.state_dict(), []

        def conv(name, x, **how):
            return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **how)

        stream = conv("blocks.0.conv", x_t, padding=1) + hint
        for number, stride in enumerate((1, 2, 1), 1):  # of the tiny base: a layer, a halving, a layer
            made.append(conv(f"zero_convs.{number - 1}", stream))
            stream = conv(f"blocks.{number}.conv", stream.relu(), padding=1, stride=stride)
        made.append(conv("zero_convs.3", stream))
        made.append(conv("middle_zero_conv", conv("middle.conv", stream.relu(), padding=1)))
        residuals = control(x_t, t, None, hint)
        assert list(residuals) == ["skip.0", "skip.1", "skip.2", "skip.3", "middle"]
        assert furthest(residuals.tensors(), made) <= 1e-5

    @pytest.mark.parametrize("design", DESIGNS)
    def test_a_new_one_changes_nothing_at_all(self, tiny_base, design):
        x_t, t, text, image = inputs(tiny_base)
        control = fresh(tiny_base, design)
        with torch.no_grad():
            hint = control.encode(image, tiny_base)
            assert torch.equal(predict_under(control, tiny_base, x_t, t, text, hint), tiny_base.predict(x_t, t, text))
            acts = acting(tiny_base, design)
            other = predict_under(acts, tiny_base, x_t, t, text, acts.encode(image, tiny_base))
        assert furthest([other], [tiny_base.predict(x_t, t, text)]) > 1e-2

    def test_a_new_one_keeps_the_size_of_its_signal(self):
        """Without a norm, torch's own weights would leave a thousandth of it at the middle."""
        base = meta_base("sd15")
        with torch.device("meta"):
            config = ControlNetLite.for_base(base).config()
        narrow = {**config, "blocks": [(channels // 8, depth) for channels, depth in config["blocks"]]}
        torch.manual_seed(0)
        control = ControlNetLite.from_config(narrow)
        seen = []
        control.middle.register_forward_hook(lambda _module, _inputs, output: seen.append(output.std().item()))
        control(torch.randn(2, 4, 32, 32), torch.tensor([1, 1]), None, torch.zeros(1, 1, 1, 1))
        assert 0.3 < seen[0] < 3


class TestTraining:
    @pytest.mark.parametrize("design", DESIGNS)
    def test_gradients_reach_all_that_trains_and_nothing_else(self, tiny_base, design):
        control = acting(tiny_base, design).requires_grad_(True)
        x_t, t, text, image = inputs(tiny_base)
        hint = control.encode(image, tiny_base)
        predict_under(control, tiny_base, x_t, t, text, hint).pow(2).mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in control.trainable_parameters())
        assert all(p.grad is None for network in tiny_base.networks for p in network.parameters())
        assert all("time_embed" not in name for name, _ in control.named_parameters())

    @pytest.mark.parametrize("design", DESIGNS)
    def test_gradient_checkpointing_changes_no_gradient(self, tiny_base, design):
        control = acting(tiny_base, design).requires_grad_(True)
        x_t, t, text, image = inputs(tiny_base)
        gradients = []
        for checkpointed in (False, True):
            control.zero_grad()
            if checkpointed:
                tiny_base.checkpoint_activations()
            try:
                hint = control.encode(image, tiny_base)
                predict_under(control, tiny_base, x_t, t, text, hint).pow(2).mean().backward()
            finally:
                tiny_base.unet.disable_gradient_checkpointing()
            gradients.append([parameter.grad.clone() for parameter in control.parameters()])
        assert furthest(*gradients) <= 1e-6

    @pytest.mark.parametrize("design", DESIGNS)
    def test_a_new_one_follows_from_its_seed(self, tiny_base, design):
        def made(seed):
            return ControlNetLite.for_training(tiny_base, ["canny"], {"design": design}, name="a", seed=seed)

        one, same, other = (made(seed).state_dict() for seed in (3, 3, 4))
        assert all(torch.equal(value, same[name]) for name, value in one.items())
        assert not torch.equal(one["blocks.1.conv.weight"], other["blocks.1.conv.weight"])

    def settings(self, tmp_path, base_folder, design, **data):
        return build_recipe(
            {
                "out": str(tmp_path / "run"),
                "base": str(base_folder),
                "design": design,
                "condition": "canny",
                "steps": 2,
                "batch_size": 2,
                "score_pictures": 1,
                "warmup_steps": 0,
                "min_lr_rate": 1.0,
                "learning_rate": 0.01,
                "save_every": 1,
                "preview_every": 100,
                "device": "cpu",
                **data,
            }
        )

    @pytest.mark.parametrize("design", DESIGNS)
    def test_a_run_ends_with_a_file_that_loads_and_generates(
        self, tmp_path, base_folder, icons_file, design, condition_image
    ):
        recipe = self.settings(tmp_path, base_folder, design, system="controlnet-lite", icons=str(icons_file))
        assert list(run(recipe)) == ["canny: edge F1"]
        path = tmp_path / "run" / "canny.safetensors"
        control = load_control(path, load_base(base_folder))
        assert control.config()["design"] == design and control.condition == "canny"
        assert control.middle_zero_conv.weight.abs().max() > 0
        assert "A ControlNet-lite" in card_of(path) and "| steps | 2 |" in card_of(path)
        assert describe(str(path))["kind"] == "controlnet-lite"
        Image.fromarray(condition_image).save(tmp_path / "edges.png")
        use = ControlUse(control=str(path), image=str(tmp_path / "edges.png"), prepared=True)
        request = GenerateRequest(prompt="red apple", base=str(base_folder), controls=(use,), seeds=(1,), steps=2)
        assert generate(request).images[0].image.size == (64, 64)

    def test_a_continued_run_equals_one_in_one_go(self, tmp_path, base_folder, icons_file):
        recipe = self.settings(tmp_path, base_folder, "ctrlora", system="controlnet-lite", icons=str(icons_file))
        run(recipe)
        broken = dataclasses.replace(recipe, out=str(tmp_path / "broken"))
        run(dataclasses.replace(broken, steps=1))
        run(broken)
        one, other = (load_control(tmp_path / out / "canny.safetensors").state_dict() for out in ("run", "broken"))
        assert all(torch.equal(value, other[name]) for name, value in one.items())

    def test_it_trains_from_pairs(self, tmp_path, base_folder, condition_image):
        lines = []
        for number in range(4):
            name = f"{number}.png"
            for folder in ("source", "target"):
                (tmp_path / "pairs" / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(condition_image).rotate(90 * number).save(tmp_path / "pairs" / folder / name)
            lines.append(json.dumps({"source": f"source/{name}", "target": f"target/{name}", "prompt": "ring"}))
        (tmp_path / "pairs" / "prompt.json").write_text("\n".join(lines))
        data = {"system": "controlnet-lite-pairs", "pairs": str(tmp_path / "pairs"), "held_out": 0.3, "name": "mine"}
        run(self.settings(tmp_path, base_folder, "paper", **data))
        assert load_control(tmp_path / "run" / "mine.safetensors", load_base(base_folder)).kind == "controlnet-lite"

    def test_a_design_that_there_is_not(self, tmp_path, base_folder, tiny_base):
        with pytest.raises(UserError, match=r"design is 'papr'.*paper.*ctrlora"):
            self.settings(tmp_path, base_folder, "papr", system="controlnet-lite", icons="a.npz")
        with refused("unknown-name", "design", "papr", "paper, ctrlora"):
            ControlNetLite.for_base(tiny_base, design="papr")


class TestUse:
    @pytest.mark.parametrize("design", DESIGNS)
    def test_under_guidance_one_pass_serves_both_halves(self, tiny_base, condition_image, design):
        """It reads no text, so the plan runs it for the images alone; what comes out is what running it for all rows
        gives."""
        control = acting(tiny_base, design)
        hint = control.encode(to_tensor([condition_image]), tiny_base)
        rows = []
        control.register_forward_pre_hook(lambda _module, given: rows.append(len(given[0])))
        settings = {"prompt": "red apple", "seeds": (3, 11), "steps": 3, "guidance": 4.0}
        made = torch.cat(list(sample(tiny_base, uses=[ActiveControl(control, hint)], **settings)))
        assert rows == [2] * 3

        class Direct(StableDiffusion):
            """Under the control at every call, without a plan."""

            def __init__(self):
                self.__dict__.update(tiny_base.__dict__)

            def predict(self, x_t, t, text, residuals=None, taps=None):
                own = control(x_t, t, text, hint)
                return super().predict(x_t, t, text, own)

        direct = torch.cat(list(sample(Direct(), **settings)))
        assert furthest([made], [direct]) <= 1e-4
        assert furthest([made], [torch.cat(list(sample(tiny_base, **settings)))]) > 1e-2

    def test_neither_time_nor_text_is_looked_at(self, tiny_base):
        control = acting(tiny_base, "paper")
        x_t, t, text, image = inputs(tiny_base)
        hint = control.encode(image, tiny_base)
        assert furthest(control(x_t, t, text, hint).tensors(), control(x_t, t + 7, None, hint).tensors()) == 0
        assert furthest(control(x_t, t, text, hint).tensors(), control(x_t + 1, t, text, hint).tensors()) > 0.1

    def test_bases_that_do_not_fit_are_refused_in_words(self, tiny_base, tmp_path):
        control = fresh(tiny_base, "ctrlora")
        path = save_control(tmp_path / "a.safetensors", control, tiny_base)
        with refused("incompatible", path, "sd15", "by 4", "by 8"):
            load_control(path, meta_base("sd15"))
        nano = str(control.incompatibility(meta_base("nano")))
        assert "its blocks: 16 16 at 1/4, 16 32 at 1/8, the base's: 48 48 at 1/4, 48 96 at 1/8, 96 160 at 1/16" in nano
        config = {**control.config(), "in_channels": 9}
        assert ControlNetLite.from_config(config).incompatibility(tiny_base) == "its latent channels: 9, the base's: 4"

        class Bare(StableDiffusion):
            """Of another structure."""

            def __init__(self):
                self.__dict__.update(tiny_base.__dict__, sites={"block.0": (16, 4)})

        with refused("incompatible", "tiny", "encoder.N", "middle", "a ControlNet-lite"):
            ControlNetLite.for_base(Bare(), design="ctrlora")
        assert "no sites encoder.N" in str(control.incompatibility(Bare()))

    def test_what_it_costs_and_reads(self, tiny_base, tmp_path):
        facts = describe_system("controlnet-lite", "sd15", size=512)
        assert (facts["parameters"], facts["tensors"], facts["reads"]) == (105_670_160, 68, "noise")
        other = facts["design ctrlora"]
        assert (other["parameters"], other["unused"], other["trainable"]) == (107_735_440, 2_050_560, 105_684_880)
        cost = facts["GFLOP at 512 x 512"]
        assert cost["once for a condition"] == pytest.approx(14.7, rel=0.02)  # the hint network, as ControlNet's
        assert "once a step" not in cost and 0 < cost["each step of each image"] < 0.1 * 803  # a UNet call

    @pytest.mark.parametrize("config", [{"blocks": []}, {"blocks": [[16, 1]]}, {"blocks": [[16, 0], [16, 2]]}])
    def test_a_config_of_no_encoder(self, tiny_base, config):
        with pytest.raises(ValueError, match="expected"):
            ControlNetLite.from_config({**fresh(tiny_base, "paper").config(), **config})
