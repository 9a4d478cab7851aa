"""Precomputed ControlNet: the encoder copy on the condition image, or on it and the prompt, run once for all steps."""

from __future__ import annotations

import dataclasses
import json
from functools import cache

import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image

import tiny
from controlkit.bases import meta
from controlkit.bases.load import load_base
from controlkit.controls.apply import predict_under
from controlkit.controls.control import Reads
from controlkit.controls.controlnet_precomputed import PrecomputedControlNet
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
from controlkit.training.control_objective import ControlObjective
from controlkit.training.memory import checkpoint_activations
from controlkit.training.recipes import build_recipe
from controlkit.training.run import run
from refusals import refused

meta_base = cache(meta.meta_base)
T = torch.tensor([21])
both = pytest.mark.parametrize("reads_text", [False, True], ids=["alone", "text"])


def fresh(base, *, reads_text=False, seed=1) -> PrecomputedControlNet:
    torch.manual_seed(seed)
    return PrecomputedControlNet.for_base(base, "canny", reads_text=reads_text)


def acting(base, *, reads_text=False, seed=2) -> PrecomputedControlNet:
    """One whose zero convolutions are not zero."""
    control = fresh(base, reads_text=reads_text).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for module in (control.network.controlnet_down_blocks, control.network.controlnet_mid_block):
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return control


def images(rows=2, seed=0):
    return torch.rand(rows, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def furthest(a, b) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


class TestComputation:
    @both
    @pytest.mark.parametrize("build", [tiny.build_tiny_base, tiny.build_tiny_sdxl])
    def test_it_is_a_controlnet_of_diffusers_at_time_zero_without_noise(self, build, reads_text):
        """A new one has the blocks of the base; in diffusers' network the hint is all that enters if the latent's
        convolution is zero."""
        base = build()
        control, text = acting(base, reads_text=reads_text), base.encode_text(["red apple", "cat face"])
        network = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(16, 32, 64))
        network.controlnet_cond_embedding.load_state_dict(control.hint_network.state_dict())
        for name in ("controlnet_down_blocks", "controlnet_mid_block"):
            getattr(network, name).load_state_dict(getattr(control.network, name).state_dict())
        torch.nn.init.zeros_(network.conv_in.weight)
        torch.nn.init.zeros_(network.conv_in.bias)
        empty = base.encode_text([""]).expand(2)
        read = text if reads_text else empty
        added = {"text_embeds": empty["pooled"], "time_ids": empty["time_ids"]} if "pooled" in empty else None
        with torch.no_grad():
            down, middle = network(
                torch.randn(2, 4, 16, 16),
                torch.zeros(2),
                read.tokens,
                images(),
                added_cond_kwargs=added,
                return_dict=False,
            )
            residuals = control(None, T, text if reads_text else None, control.encode(images(), base))
        assert list(residuals) == ["skip.0", "skip.1", "skip.2", "skip.3", "middle"]
        assert furthest(residuals.tensors(), (*down, middle)) <= 1e-4

    @both
    def test_a_new_one_changes_nothing_at_all(self, tiny_base, reads_text):
        x_t, t = torch.randn(2, 4, 16, 16), torch.tensor([21, 801])
        text = tiny_base.encode_text(["red apple", "cat face"])
        with torch.no_grad():
            alone = tiny_base.predict(x_t, t, text)
            for make, changes in ((fresh, False), (acting, True)):
                control = make(tiny_base, reads_text=reads_text)
                under = predict_under(control, tiny_base, x_t, t, text, control.encode(images(), tiny_base))
                assert torch.equal(under, alone) is not changes


class TestTraining:
    @both
    def test_gradients_reach_all_that_trains_with_and_without_checkpointing(self, reads_text):
        base, found = tiny.build_tiny_base(), []
        for checkpointing in (False, True):
            control = acting(base, reads_text=reads_text).requires_grad_(True).train()
            if checkpointing:
                checkpoint_activations(base, control)
            generator = torch.Generator().manual_seed(1)
            x_t, t = torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([21, 801])
            hint, text = control.encode(images(), base), base.encode_text(["a", "b"])
            predict_under(control, base, x_t, t, text, hint).pow(2).mean().backward()
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in control.trainable_parameters())
            assert all(p.grad is None for network in base.networks for p in network.parameters())
            found.append([parameter.grad for parameter in control.parameters()])
        for plain, recomputed in zip(*found, strict=True):
            torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))

    def settings(self, tmp_path, base_folder, **data):
        return build_recipe(
            {
                "out": str(tmp_path / "run"),
                "base": str(base_folder),
                "condition": "canny",
                "steps": 3,
                "batch_size": 2,
                "score_pictures": 1,
                "warmup_steps": 0,
                "learning_rate": 0.01,
                "save_every": 1,
                "preview_every": 100,
                "device": "cpu",
                **data,
            }
        )

    @both
    def test_it_trains_resumes_loads_and_generates(
        self, tmp_path, base_folder, icons_file, condition_image, monkeypatch, reads_text
    ):
        data = {"system": "controlnet-precomputed", "icons": str(icons_file), "reads_text": reads_text}
        recipe = self.settings(tmp_path, base_folder, **data)
        assert list(run(recipe)) == ["canny: edge F1"]
        broken = dataclasses.replace(recipe, out=str(tmp_path / "broken"))
        loss = ControlObjective.loss

        def until_two(objective, step):
            if step == 2:
                raise RuntimeError("power cut")
            return loss(objective, step)

        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
            patch.setattr(ControlObjective, "loss", until_two)
            run(broken)
        run(broken)
        path, base = tmp_path / "run" / "canny.safetensors", load_base(base_folder)
        control, again = (load_control(tmp_path / out / "canny.safetensors", base) for out in ("run", "broken"))
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in control.state_dict().items())
        assert control.condition == "canny" and control.network.controlnet_mid_block.weight.abs().max() > 0
        card = card_of(path)
        assert "A precomputed ControlNet" in card and f"| reads the prompt | {'yes' if reads_text else 'no'} |" in card
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
        data = {"system": "controlnet-precomputed-pairs", "pairs": str(tmp_path / "pairs"), "held_out": 0.3}
        run(self.settings(tmp_path, base_folder, name="mine", **data))
        loaded = load_control(tmp_path / "run" / "mine.safetensors", load_base(base_folder))
        assert loaded.kind == "controlnet-precomputed" and loaded.reading is Reads.NOTHING


class TestUse:
    @both
    def test_it_runs_once_whatever_the_seeds_and_steps(self, tiny_base, condition_image, reads_text):
        """For a condition, or for a condition and both prompts of guidance."""
        control = acting(tiny_base, reads_text=reads_text)
        assert control.reading is (Reads.TEXT if reads_text else Reads.NOTHING)
        use = ActiveControl(control, control.encode(to_tensor([condition_image]), tiny_base))
        rows, kept = [], ResidualCache()
        control.register_forward_pre_hook(lambda _module, given: rows.append(len(given[3])))
        settings = {"prompt": "red apple", "steps": 3, "guidance": 4.0}
        made = torch.cat(list(sample(tiny_base, uses=[use], seeds=range(5), batch_size=2, cache=kept, **settings)))
        assert rows == [2 if reads_text else 1]
        alone = [torch.cat(list(sample(tiny_base, uses=[use], seeds=[seed], **settings))) for seed in range(5)]
        assert furthest([made], [torch.cat(alone)]) <= 1e-4
        again = torch.cat(list(sample(tiny_base, uses=[use], seeds=[0], cache=kept, **settings)))
        assert len(rows) == 6 and furthest([again], alone[:1]) <= 1e-4
        other = {**settings, "prompt": "cat face"}
        list(sample(tiny_base, uses=[use], seeds=[0], cache=kept, **other))
        assert len(rows) == (7 if reads_text else 6)
        without = torch.cat(list(sample(tiny_base, seeds=range(5), **settings)))
        assert furthest([made], [without]) > 1e-2

    @both
    def test_its_file_comes_back_and_has_no_other_format(self, tiny_base, tmp_path, reads_text):
        control = acting(tiny_base, reads_text=reads_text)
        path = save_control(tmp_path / "a.safetensors", control, tiny_base, dtype=torch.float32)
        assert (detect(path).kind, detect(path).format_name) == ("controlnet-precomputed", "controlkit")
        back = load_control(path, tiny_base)
        assert json.dumps(back.config()) == json.dumps(control.config()) and back.reading is control.reading
        assert back.state_dict().keys() == control.state_dict().keys()
        assert all(torch.equal(value, back.state_dict()[name]) for name, value in control.state_dict().items())
        same = convert(path, tmp_path / "same.safetensors", "controlkit").path
        assert load_control(same, tiny_base).state_dict().keys() == control.state_dict().keys()
        facts = describe(str(path))
        assert (facts["reads"], facts["enters at"]) == ("text" if reads_text else "nothing", "decoder skips and middle")
        for to in ("original", "diffusers"):
            with refused("unsupported", path, "a precomputed ControlNet", to, "controlkit"):
                convert(path, tmp_path / ("b" if to == "diffusers" else "b.safetensors"), to)

    def test_bases_that_do_not_fit_are_refused_in_words(self, tiny_base, tmp_path):
        path = save_control(tmp_path / "a.safetensors", fresh(tiny_base), tiny_base)
        with refused("incompatible", path, "sd15", "by 4", "by 8"):
            load_control(path, meta_base("sd15"))
        with refused("incompatible", path, "nano", "[16, 32]"):
            load_control(path, meta_base("nano"))

    def test_what_it_costs(self):
        facts = describe_system("controlnet-precomputed", "sd15", size=512)
        # Those of a ControlNet without the latent's convolution, the time embedding and its projections in 12 resnets;
        # and the embedding of the empty prompt, 77 x 768, which is not trained.
        trained = 361_279_120 - 11_840 - 2_050_560 - 1281 * (2 * 320 + 2 * 640 + 6 * 1280)
        assert (facts["trainable"], facts["parameters"]) == (trained, trained + 77 * 768)
        assert facts["with reads_text"]["parameters"] == trained == 346_919_120
        assert facts["reads"] == "nothing"
        assert list(facts["GFLOP at 512 x 512"]) == ["once for a condition"]
        assert 260 < facts["GFLOP at 512 x 512"]["once for a condition"] < 300  # a ControlNet's, at every step: 283
