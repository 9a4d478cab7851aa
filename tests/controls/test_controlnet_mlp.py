"""ControlNet-mlp: a perceptron on each pixel of the condition image, run once for a condition."""

from __future__ import annotations

import dataclasses
import json
from functools import cache

import torch
from PIL import Image

from controlkit.bases import meta
from controlkit.bases.load import load_base
from controlkit.controls.apply import predict_under
from controlkit.controls.control import Reads
from controlkit.controls.controlnet_mlp import ControlNetMLP
from controlkit.formats.card import card_of
from controlkit.formats.convert import convert
from controlkit.formats.describe import describe, describe_system
from controlkit.formats.detect import detect
from controlkit.formats.load import load_control, save_control
from controlkit.images import to_tensor
from controlkit.sampling.generate import generate
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.residual_cache import ResidualCache
from controlkit.sampling.sampler import sample
from controlkit.sampling.uses import ControlUse
from controlkit.training.recipes import build_recipe
from controlkit.training.run import run
from refusals import refused

meta_base = cache(meta.meta_base)
T = torch.tensor([21])


def fresh(base, condition="canny", seed=1) -> ControlNetMLP:
    torch.manual_seed(seed)
    return ControlNetMLP.for_base(base, condition)


def acting(base, seed=2) -> ControlNetMLP:
    """One whose zero convolutions are not zero."""
    control = fresh(base).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for module in (control.zero_convs, control.middle_zero_conv):
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return control


def images(rows=2, side=64, seed=0):
    return torch.rand(rows, 3, side, side, generator=torch.Generator().manual_seed(seed))


def furthest(a, b) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


class TestComputation:
    def test_it_is_a_perceptron_on_each_pixel_with_pooling_between(self, tiny_base):
        """At 4 pixels to one of the latent: 16, 32 and 64 channels up to its size, then a layer, a halving, a layer."""
        control = acting(tiny_base)
        state, made = control.state_dict(), []

        def dense(name, x):
            weight = state[f"{name}.weight"][:, :, 0, 0]
            return (x.movedim(1, -1) @ weight.T + state[f"{name}.bias"]).movedim(-1, 1)

        def halved(x):
            return x.unflatten(-1, (-1, 2)).mean(-1).unflatten(-2, (-1, 2)).mean(-2)

        stream = dense("hint_network.0.conv", images())
        for number in (1, 2):
            stream = dense(f"hint_network.{number}.conv", halved(stream.relu()))
        assert furthest([stream], [control.encode(images(), tiny_base)]) <= 1e-5
        for number, halving in enumerate((False, False, True, False)):
            stream = dense(f"blocks.{number}.conv", halved(stream.relu()) if halving else stream.relu())
            made.append(dense(f"zero_convs.{number}", stream))
        made.append(dense("middle_zero_conv", dense("middle.conv", stream.relu())))
        residuals = control(None, T, None, control.encode(images(), tiny_base))
        assert list(residuals) == ["skip.0", "skip.1", "skip.2", "skip.3", "middle"]
        assert furthest(residuals.tensors(), made) <= 1e-5

    def test_a_value_depends_on_the_square_below_it_alone(self, tiny_base):
        control, one = acting(tiny_base), images(1)
        other = one.clone()
        other[:, :, 16:24, 32:40] = 1 - other[:, :, 16:24, 32:40]
        a, b = (control(None, T, None, control.encode(image, tiny_base)) for image in (one, other))
        for site, residual in a.items():
            pixels = tiny_base.sites[site][1]
            changed = (residual - b[site]).abs().sum(1)[0] > 0
            inside = torch.zeros_like(changed)
            inside[16 // pixels : 24 // pixels, 32 // pixels : 40 // pixels] = True
            assert torch.equal(changed, inside)

    def test_a_new_one_changes_nothing_at_all(self, tiny_base):
        x_t, t = torch.randn(2, 4, 16, 16), torch.tensor([21, 801])
        text = tiny_base.encode_text(["red apple", "cat face"])
        with torch.no_grad():
            alone = tiny_base.predict(x_t, t, text)
            for control, changes in ((fresh(tiny_base), False), (acting(tiny_base), True)):
                under = predict_under(control, tiny_base, x_t, t, text, control.encode(images(), tiny_base))
                assert torch.equal(under, alone) is not changes

    def test_a_new_one_keeps_the_size_of_its_signal(self):
        with torch.device("meta"):
            config = ControlNetMLP.for_base(meta_base("sd15")).config()
        torch.manual_seed(0)
        narrow = {**config, "blocks": [(channels // 4, depth) for channels, depth in config["blocks"]]}
        control = ControlNetMLP.from_config(narrow)
        seen = []
        control.middle.register_forward_hook(lambda _module, _inputs, output: seen.append(output.square().mean()))
        flat = images(8, 1).expand(-1, -1, 64, 64)  # which pooling leaves as it is
        control(None, T, None, control.encode(flat, None))
        assert 0.1 < seen[0] / flat.square().mean() < 10


class TestTraining:
    def test_gradients_reach_all_that_trains_and_nothing_else(self, tiny_base):
        control = acting(tiny_base).requires_grad_(True)
        x_t, t, text = torch.randn(2, 4, 16, 16), torch.tensor([21, 801]), tiny_base.encode_text(["a", "b"])
        hint = control.encode(images(), tiny_base)
        predict_under(control, tiny_base, x_t, t, text, hint).pow(2).mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in control.trainable_parameters())
        assert all(p.grad is None for network in tiny_base.networks for p in network.parameters())

    def test_a_new_one_follows_from_its_seed(self, tiny_base):
        one, same, other = (
            ControlNetMLP.for_training(tiny_base, ["canny"], {}, name="a", seed=seed).state_dict() for seed in (3, 3, 4)
        )
        assert all(torch.equal(value, same[name]) for name, value in one.items())
        assert not torch.equal(one["middle.conv.weight"], other["middle.conv.weight"])

    def settings(self, tmp_path, base_folder, **data):
        return build_recipe(
            {
                "out": str(tmp_path / "run"),
                "base": str(base_folder),
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

    def test_it_trains_resumes_loads_and_generates(self, tmp_path, base_folder, icons_file, condition_image):
        recipe = self.settings(tmp_path, base_folder, system="controlnet-mlp", icons=str(icons_file))
        assert list(run(recipe)) == ["canny: edge F1"]
        broken = dataclasses.replace(recipe, out=str(tmp_path / "broken"))
        run(dataclasses.replace(broken, steps=1))
        run(broken)
        path, base = tmp_path / "run" / "canny.safetensors", load_base(base_folder)
        control, again = (load_control(tmp_path / out / "canny.safetensors", base) for out in ("run", "broken"))
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in control.state_dict().items())
        assert control.condition == "canny" and control.middle_zero_conv.weight.abs().max() > 0
        assert "A ControlNet-mlp" in card_of(path) and "| steps | 2 |" in card_of(path)
        Image.fromarray(condition_image).save(tmp_path / "edges.png")
        use = ControlUse(control=str(path), image=str(tmp_path / "edges.png"), prepared=True)
        request = GenerateRequest(prompt="red apple", base=str(base_folder), controls=(use,), seeds=(1,), steps=2)
        assert generate(request).images[0].image.size == (64, 64)

    def test_it_trains_from_pairs(self, tmp_path, base_folder, condition_image):
        lines = []
        for number in range(4):
            name = f"{number}.png"
            for folder in ("source", "target"):
                (tmp_path / "pairs" / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(condition_image).rotate(90 * number).save(tmp_path / "pairs" / folder / name)
            lines.append(json.dumps({"source": f"source/{name}", "target": f"target/{name}", "prompt": "ring"}))
        (tmp_path / "pairs" / "prompt.json").write_text("\n".join(lines))
        data = {"system": "controlnet-mlp-pairs", "pairs": str(tmp_path / "pairs"), "held_out": 0.3, "name": "mine"}
        run(self.settings(tmp_path, base_folder, **data))
        assert load_control(tmp_path / "run" / "mine.safetensors", load_base(base_folder)).kind == "controlnet-mlp"


class TestUse:
    def test_it_runs_once_for_a_condition_whatever_the_seeds_and_steps(self, tiny_base, condition_image):
        control = acting(tiny_base)
        assert control.reads is Reads.NOTHING
        use = ActiveControl(control, control.encode(to_tensor([condition_image]), tiny_base))
        rows, kept = [], ResidualCache()
        control.register_forward_pre_hook(lambda _module, given: rows.append(len(given[3])))
        settings = {"prompt": "red apple", "steps": 3, "guidance": 4.0}
        made = torch.cat(list(sample(tiny_base, uses=[use], seeds=range(5), batch_size=2, cache=kept, **settings)))
        assert rows == [1]
        alone = [torch.cat(list(sample(tiny_base, uses=[use], seeds=[seed], **settings))) for seed in range(5)]
        assert furthest([made], [torch.cat(alone)]) <= 1e-4
        again = torch.cat(list(sample(tiny_base, uses=[use], seeds=[0], cache=kept, **settings)))
        assert len(rows) == 6 and furthest([again], alone[:1]) <= 1e-4
        without = torch.cat(list(sample(tiny_base, seeds=range(5), **settings)))
        assert furthest([made], [without]) > 1e-2

    def test_its_file_comes_back_and_has_no_other_format(self, tiny_base, tmp_path):
        control = acting(tiny_base)
        path = save_control(tmp_path / "a.safetensors", control, tiny_base, dtype=torch.float32)
        assert (detect(path).kind, detect(path).format_name) == ("controlnet-mlp", "controlkit")
        back = load_control(path, tiny_base)
        assert back.config() == control.config()
        assert all(torch.equal(value, back.state_dict()[name]) for name, value in control.state_dict().items())
        facts = describe(str(path))
        assert (facts["reads"], facts["enters at"]) == ("nothing", "decoder skips and middle")
        assert facts["needs"] == "a base whose encoder has blocks of 16 16 at 1/4, 16 32 at 1/8"
        with refused("unsupported", path, "a ControlNet-mlp", "original", "controlkit"):
            convert(path, tmp_path / "b.safetensors", "original")

    def test_bases_that_do_not_fit_are_refused_in_words(self, tiny_base, tmp_path):
        path = save_control(tmp_path / "a.safetensors", fresh(tiny_base), tiny_base)
        with refused("incompatible", path, "sd15", "by 4", "by 8"):
            load_control(path, meta_base("sd15"))
        with refused("incompatible", path, "nano", "16 16 at 1/4, 16 32 at 1/8", "48 48 at 1/4"):
            load_control(path, meta_base("nano"))

    def test_what_it_costs(self):
        facts = describe_system("controlnet-mlp", "sd15", size=512)
        # 16, 32, 96 and 256 channels, then those of 12 blocks and the middle, and a zero convolution behind each
        assert (facts["parameters"], facts["trainable"], facts["tensors"]) == (21_943_488, 21_943_488, 60)
        assert list(facts["GFLOP at 512 x 512"]) == ["once for a condition"]
        assert 0 < facts["GFLOP at 512 x 512"]["once for a condition"] < 0.05 * 803  # a UNet call
