"""Uni-ControlNet: the original classes' files and outputs, any of several conditions, an image as a prompt, both
together, and their training."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
import uni_controlnet_reference as reference
from PIL import Image
from safetensors.torch import load_file, save_file

from controlkit.apps.cli import main
from controlkit.bases.image_encoders import LITE0, embed_images, encoder_key
from controlkit.bases.load import load_base
from controlkit.bases.meta import meta_base
from controlkit.bases.text import Text
from controlkit.conditions import find
from controlkit.controls.apply import predict_under
from controlkit.controls.control import Acts, Reads
from controlkit.controls.inputs import Input
from controlkit.controls.uni_controlnet import GlobalAdapter, LocalAdapter
from controlkit.controls.uni_controlnet.formats import local_names
from controlkit.controls.uni_controlnet.local_adapter import RELEASED
from controlkit.formats.card import card_of
from controlkit.formats.convert import convert
from controlkit.formats.describe import describe, describe_system
from controlkit.formats.load import load_control, save_control
from controlkit.formats.transfer import transfer
from controlkit.images import to_tensor
from controlkit.sampling.generate import generate
from controlkit.sampling.plan import ActiveControl, Plan
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.residual_cache import ResidualCache
from controlkit.sampling.sampler import sample
from controlkit.sampling.uses import ControlUse
from controlkit.training.recipes import build_recipe, read_recipe
from controlkit.training.run import objective_of
from controlkit.training.run import run as train
from refusals import refused

NAMES = ("canny", "palette", "grayscale")
TIMES = torch.tensor([900, 500, 100])


def shaken(control, seed=2, scale=0.1):
    """One that changes images."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in control.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * scale
    return control.eval().requires_grad_(False)


def fresh_local(base, names=NAMES, seed=1):
    torch.manual_seed(seed)
    return LocalAdapter.for_base(base, names=names)


@pytest.fixture(scope="module")
def local(tiny_base):
    """Tests leave it as it is."""
    return shaken(fresh_local(tiny_base))


@pytest.fixture(scope="module")
def image_prompt(tiny_base):
    """A global adapter. Tests leave it as it is."""
    torch.manual_seed(3)
    return shaken(GlobalAdapter.for_base(tiny_base), scale=0.3)


@pytest.fixture(scope="module")
def image(condition_image):
    return to_tensor([condition_image])


@pytest.fixture
def local_file(local, tiny_base, tmp_path):
    return save_control(tmp_path / "local.safetensors", local, tiny_base, made={"steps": 4}, dtype=torch.float32)


@pytest.fixture
def global_file(image_prompt, tiny_base, tmp_path):
    return save_control(tmp_path / "global.safetensors", image_prompt, tiny_base, dtype=torch.float32)


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    image = Image.fromarray(pixels).resize((64, 64))
    image.save(tmp_path / "photo.png")
    return np.asarray(image)


def inputs_of(base, rows=2):
    x_t = torch.randn(rows, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    return x_t, torch.linspace(20, 900, rows).long(), base.encode_text(["red apple", "cat face"][:rows])


def prediction(control, base, inputs):
    x_t, t, text = inputs_of(base)
    hint = control.encode(inputs, base)
    rows = (
        hint.expand(2, -1) if isinstance(hint, torch.Tensor) else {k: v.expand(2, -1, -1, -1) for k, v in hint.items()}
    )
    return predict_under(control, base, x_t, t, text, rows)


def furthest(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


class TestOriginal:
    @pytest.fixture
    def states(self):
        shapes = {"local": reference.local_shapes(reference.SMALL), "global": reference.global_shapes(64)}
        return {part: reference.random_state(each) for part, each in shapes.items()}

    @pytest.fixture(params=["original", "bare"])
    def layout(self, request):
        return request.param

    def written(self, states, part, layout, tmp_path):
        path = tmp_path / f"{part}-{layout}.safetensors"
        prefix = f"{part}_adapter." if layout == "original" else ""
        save_file({f"{prefix}{name}": value for name, value in states[part].items()}, path)
        return path

    def joint(self, states, tmp_path):
        joint = {f"{part}_adapter.{name}": value for part, state in states.items() for name, value in state.items()}
        joint["model.diffusion_model.input_blocks.0.0.weight"] = torch.ones(1)
        save_file(joint, tmp_path / "uni.safetensors")
        return tmp_path / "uni.safetensors"

    def test_names_shapes_and_sizes_are_those_of_the_original(self):
        with torch.device("meta"):
            local, image_prompt = (kind.for_base(meta_base("sd15")) for kind in (LocalAdapter, GlobalAdapter))
        names = local_names(local.file_state())
        assert {names[name]: tuple(x.shape) for name, x in local.file_state().items()} == reference.local_shapes()
        assert {k: tuple(x.shape) for k, x in image_prompt.file_state().items()} == reference.global_shapes()
        facts = describe_system("uni-controlnet-local", "sd15", size=512)
        assert facts["parameters"] == facts["trainable"] == 411_903_552
        assert (facts["extractor"], facts["denormalisation"]) == (8_211_392, 43_511_680)
        assert describe_system("uni-controlnet-global", "sd15")["parameters"] == 47_213_568

    def test_outputs_of_the_local_adapter_equal_the_original(self, states, layout, tmp_path):
        control = load_control(self.written(states, "local", layout, tmp_path))
        generator = torch.Generator().manual_seed(5)
        x_t, context = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 81, 768, generator=generator)
        images, t = torch.rand(2, 21, 128, 128, generator=generator), torch.tensor([17, 900])
        images[:, 3:9] = 0
        assert control.names == RELEASED
        given = {name: images[:, 3 * i : 3 * i + 3] for i, name in enumerate(RELEASED) if i not in (1, 2)}
        residuals = control(x_t, t, Text(context), control.encode(given, None))
        expected = reference.local_outputs(states["local"], x_t, t, context, images)
        made = [*residuals.family("skip"), residuals["middle"]]
        assert len(made) == len(expected) == 13
        assert max(furthest(*each) for each in zip(made, expected, strict=True)) <= 1e-4
        assert min(each.abs().max() for each in expected) > 0.1

    def test_and_tokens_of_the_global_one(self, states, layout, tmp_path):
        control = load_control(self.written(states, "global", layout, tmp_path))
        embeddings = torch.randn(2, 64, generator=torch.Generator().manual_seed(5))
        tokens = control.tokens(embeddings)
        assert furthest(tokens, reference.global_outputs(states["global"], embeddings)) <= 1e-5
        # The original's unconditional branch has an embedding of zeros, whose tokens are none.
        nothing = reference.global_outputs(states["global"], torch.zeros_like(embeddings))
        null = control.tokens(control.unconditional(embeddings))
        assert furthest(null, nothing) <= 1e-5 and nothing.abs().max() > 1e-2

    @pytest.mark.parametrize("part", ["local", "global"])
    def test_every_layout_is_read_and_written_bit_for_bit(self, states, part, layout, tmp_path):
        path = self.written(states, part, layout, tmp_path)
        facts = describe(str(path))
        assert (facts["kind"], facts["layout"]) == (f"uni-controlnet-{part}", layout)
        assert facts["parameters"] == sum(value.numel() for value in states[part].values())
        convert(path, tmp_path / "own.safetensors", "controlkit")
        convert(tmp_path / "own.safetensors", tmp_path / "back.safetensors", layout)
        before, after = load_file(path), load_file(tmp_path / "back.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[name]) for name, value in before.items())

    def test_both_in_one_file_are_taken_out_of_it_one_by_one(self, states, tmp_path):
        path = self.joint(states, tmp_path)
        with refused("wrong-kind", "two controls", "--kind"):
            load_control(path)
        for part, state in states.items():
            out = tmp_path / f"{part}.safetensors"
            arguments = ["convert", str(path), str(out), "--to", "original", "--kind", f"uni-controlnet-{part}"]
            assert main(arguments) == 0
            taken = load_file(out)
            assert {name.removeprefix(f"{part}_adapter.") for name in taken} == state.keys()
            assert all(torch.equal(taken[f"{part}_adapter.{name}"], value) for name, value in state.items())
        with refused("wrong-kind", path):
            convert(path, tmp_path / "x.safetensors", "controlkit", kind="controlnet")
        with refused("unknown-name", "uni-controlnet"):
            convert(path, tmp_path / "x.safetensors", "controlkit", kind="uni-controlnet-locale")

    @pytest.mark.parametrize("part", ["local", "global"])
    def test_a_damaged_file_is_refused(self, states, part, tmp_path):
        name = {"local": "input_blocks.4.0.norm_in.conv_beta.bias", "global": "ff2.net.2.bias"}[part]
        del states[part][name]
        with refused("damaged-file", "1 of its", f"{part}_adapter.{name}"):
            load_control(self.written(states, part, "original", tmp_path))


class TestLocal:
    def test_a_new_one_changes_nothing(self, tiny_base, image):
        new = fresh_local(tiny_base)
        assert (new.reads, new.acts) == (Reads.NOISE | Reads.TIME | Reads.TEXT, Acts.RESIDUALS)
        x_t, t, text = inputs_of(tiny_base)
        assert torch.equal(prediction(new, tiny_base, {"canny": image}), tiny_base.predict(x_t, t, text))

    def test_its_copy_starts_as_the_encoder_of_the_base(self, tiny_base, image):
        new = fresh_local(tiny_base)
        x_t, t, text = inputs_of(tiny_base)
        hint = {name: value.expand(2, -1, -1, -1) for name, value in new.encode({"canny": image}, tiny_base).items()}
        seen = []
        for block in (new.network.mid_block, tiny_base.unet.mid_block):
            block.register_forward_hook(lambda *given: seen.append(given[-1]))
        new(x_t, t, text, hint)
        tiny_base.predict(x_t, t, text)
        for block in (new.network.mid_block, tiny_base.unet.mid_block):
            block._forward_hooks.clear()
        assert furthest(*seen) <= 1e-4

    def test_every_image_counts_in_its_own_place_and_missing_ones_are_zeros(self, local, tiny_base, image):
        nothing = torch.zeros_like(image)
        alone = {name: prediction(local, tiny_base, {name: image}) for name in NAMES}
        assert furthest(alone["canny"], prediction(local, tiny_base, {"canny": nothing})) > 1e-3
        for name, other in zip(NAMES, (*NAMES[1:], NAMES[0]), strict=True):
            assert furthest(alone[name], alone[other]) > 1e-3
            assert torch.equal(prediction(local, tiny_base, {other: nothing, name: image}), alone[name])
        both = prediction(local, tiny_base, {"canny": image, "palette": 1 - image})
        assert min(furthest(both, each) for each in alone.values()) > 1e-3
        with refused("missing-setting", *NAMES):
            local.encode({}, tiny_base)

    def test_one_condition_of_it_takes_one_image(self, local, tiny_base, image):
        assert local.conditions == NAMES and local.condition is None
        view = local.for_condition("palette")
        assert view.inputs == (Input(),) and view.conditions == ("palette",)
        assert torch.equal(prediction(view, tiny_base, image), prediction(local, tiny_base, {"palette": image}))
        with refused("unknown-name", "'pallet'", "palette"):
            local.for_condition("pallet")
        single = fresh_local(tiny_base, ("canny",))
        assert [entry.required for entry in single.inputs] == [True] and single.condition == "canny"

    def test_calls_leave_nothing_behind(self, local, tiny_base, image):
        first = prediction(local, tiny_base, {"canny": image})
        prediction(local, tiny_base, {"canny": 1 - image})
        assert torch.equal(prediction(local, tiny_base, {"canny": image}), first)
        with torch.no_grad():
            prediction(local, tiny_base, {"canny": image})
        assert all(norm.current is None for norms in local._norms() for norm in norms)


class TestGlobal:
    def test_its_tokens_follow_those_of_the_prompt(self, image_prompt, tiny_base, image):
        assert (image_prompt.acts, image_prompt.conditional_only) == (Acts.TOKENS, True)
        hint = image_prompt.encode(image, tiny_base)
        assert torch.equal(hint, embed_images(LITE0, image)) and hint.shape == (1, 1280)
        assert image_prompt.tokens(hint).shape == (1, 4, 16)
        x_t, t, text = inputs_of(tiny_base)
        made = prediction(image_prompt, tiny_base, image)
        assert furthest(made, tiny_base.predict(x_t, t, text)) > 1e-4
        assert furthest(made, prediction(image_prompt, tiny_base, 1 - image)) > 1e-5

    def test_the_encoder_is_that_of_the_base_or_chosen(self, tiny_base, tmp_path, image):
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        torch.manual_seed(0)
        small = CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32,
            patch_size=8, projection_dim=24,
        )  # fmt: skip
        network = CLIPVisionModelWithProjection(small).eval()
        network.save_pretrained(tmp_path / "clip")
        control = GlobalAdapter.for_base(tiny_base, image_encoder=str(tmp_path / "clip"))
        wide = torch.cat([image * 0, image, image * 0], 3)  # cropped to its centre
        hint = control.encode(wide, tiny_base)
        mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        scaled = torch.nn.functional.interpolate(image, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
        pixels = (scaled - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]
        assert hint.shape == (1, 24) and furthest(hint, network(pixels).image_embeds) <= 0.05
        assert control.config()["image_encoder"] == str(tmp_path / "clip")
        with refused("missing-weights", "nowhere", LITE0):
            GlobalAdapter.for_base(tiny_base, image_encoder=str(tmp_path / "nowhere"))

    def test_hints_are_of_the_weights_of_the_encoder_not_of_its_path(self, tiny_base, tmp_path):
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        small = CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32,
            patch_size=8, projection_dim=24,
        )  # fmt: skip
        found = []
        for _ in range(2):
            CLIPVisionModelWithProjection(small).save_pretrained(tmp_path / "clip")
            encoder_key.cache_clear()  # which lasts as long as a process, as the network does
            found.append(GlobalAdapter.for_base(tiny_base, image_encoder=str(tmp_path / "clip")))
            keys = [(control.hint_settings(), control.frozen_encoder()) for control in (found[-1], found[-1])]
            assert keys[0] == keys[1]
            found[-1] = keys[0]
        assert found[0][0] != found[1][0] and found[0][1] != found[1][1] != ""
        assert GlobalAdapter.for_base(tiny_base, image_encoder=LITE0).frozen_encoder() == ""

    def test_one_of_another_width_is_refused(self, global_file, tiny_base):
        assert load_control(global_file, tiny_base).conditions == ("identity",)
        with refused("incompatible", global_file, "nano", "16", "128"):
            load_control(global_file, load_base("nano"))


class TestTogether:
    @pytest.fixture
    def uses(self, local, image_prompt, tiny_base, image):
        def make(local_weight=1.0, global_weight=1.0, **settings):
            hints = local.encode({"canny": image}, tiny_base), image_prompt.encode(1 - image, tiny_base)
            return [
                ActiveControl(local, hints[0], local_weight, **settings),
                ActiveControl(image_prompt, hints[1], global_weight),
            ]

        return make

    @pytest.fixture
    def texts(self, tiny_base):
        return [tiny_base.encode_text([prompt]) for prompt in ("", "red apple")]

    def draw(self, base, uses, **settings):
        settings = {"seeds": (1,), "steps": 3, "guidance": 3.0, **settings}
        return torch.cat(list(sample(base, prompt="red apple", uses=uses, **settings)))

    @pytest.mark.parametrize("guided_only", [False, True])
    def test_the_local_one_reads_the_tokens_of_the_global_one_in_both_branches(
        self, uses, texts, tiny_base, local, image_prompt, guided_only
    ):
        """As the original: `apply_model` for the prompt, and for the negative prompt with an embedding of zeros."""
        steer, tell = uses(0.7, 0.5, conditional_only=guided_only)
        plan = Plan([steer, tell], TIMES, texts)
        x_t = inputs_of(tiny_base)[0][:1].repeat(2, 1, 1, 1)
        tokens = image_prompt.tokens(tell.hint)
        nothing = image_prompt.tokens(torch.zeros_like(tell.hint))
        residuals = plan.residuals(1, x_t)
        for row, (text, own) in enumerate(zip(texts, (nothing, tokens), strict=True)):
            extended = text.extended(own * 0.5)
            assert furthest(plan.text(1)[row].tokens, extended.tokens) <= 1e-6
            expected = local(x_t[:1], TIMES[1:2], extended, steer.hint)
            for site, residual in expected.items():
                scale = 0.0 if guided_only and row == 0 else 0.7
                assert furthest(residuals[site][row : row + 1], residual * scale) <= 1e-5

    def test_the_strength_of_each_has_an_effect(self, uses, tiny_base):
        """In the original's demo the local one's has none: it sets an attribute that nothing reads."""
        full, plain = self.draw(tiny_base, uses()), self.draw(tiny_base, [])
        for weights in ((0.5, 1.0), (1.0, 0.5), (0.0, 1.0), (1.0, 0.0)):
            assert furthest(self.draw(tiny_base, uses(*weights)), full) > 1e-3
        assert torch.equal(self.draw(tiny_base, uses(0.0, 0.0)), plain)
        assert torch.equal(self.draw(tiny_base, uses(1.0, 0.0)), self.draw(tiny_base, uses()[:1]))

    def test_images_do_not_depend_on_their_batch_nor_on_a_cache(self, uses, tiny_base):
        together = self.draw(tiny_base, uses(), seeds=range(3))
        cache = ResidualCache()
        for _ in range(2):
            alone = [self.draw(tiny_base, uses(), seeds=[seed], cache=cache) for seed in range(3)]
            assert furthest(together, torch.cat(alone)) <= 1e-4

    def test_generate_takes_any_of_the_images_and_an_image_prompt(
        self, local_file, global_file, tiny_base, photo, tmp_path
    ):
        (tmp_path / "two.json").write_text(json.dumps({"canny": "photo.png", "palette": "photo.png"}))
        steered = ControlUse(control=str(local_file), image=str(tmp_path / "two.json"), weight=0.8)
        told = ControlUse(control=str(global_file), image=str(tmp_path / "photo.png"))
        settings = {"prompt": "red apple", "base": "tiny", "steps": 2}
        results = {
            name: generate(GenerateRequest(controls=controls, **settings), base=tiny_base)
            for name, controls in {"steered": (steered,), "told": (told,), "both": (steered, told)}.items()
        }
        for name in ("canny", "palette"):
            found = np.asarray(results["both"].conditions[f"condition0-{name}"])
            assert np.array_equal(found, find(name)(photo))
        assert np.array_equal(np.asarray(results["told"].conditions["condition0"]), photo)
        pixels = [np.asarray(result.images[0].image, float) for result in results.values()]
        assert all(np.abs(a - b).max() > 0 for a, b in zip(pixels, [*pixels[1:], pixels[0]], strict=True))
        wrong = ControlUse(control=str(local_file), inputs={"hed": str(tmp_path / "photo.png")})
        with refused("unknown-key", "'hed'"):
            generate(GenerateRequest(controls=(wrong,), **settings), base=tiny_base)


class TestFiles:
    def test_they_load_as_they_were_saved(self, local_file, global_file, local, image_prompt, tiny_base):
        for path, control in ((local_file, local), (global_file, image_prompt)):
            loaded = load_control(path, tiny_base)
            assert loaded.config() == json.loads(json.dumps(control.config()))
            assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in control.state_dict().items())

    def test_card_and_inspect_describe_them(self, local_file, global_file, capsys):
        card = card_of(local_file)
        assert "A local adapter of Uni-ControlNet for the base `tiny`" in card and "canny, palette, grayscale" in card
        assert "`INPUTS.json`" in card and "hed" not in card
        assert "efficientnet-lite0" in card_of(global_file)
        for path, words in ((local_file, "grayscale (image, optional)"), (global_file, "efficientnet-lite0")):
            assert main(["inspect", str(path), "--json"]) == 0
            facts = json.loads(capsys.readouterr().out)
            assert facts["kind"] == f"uni-controlnet-{path.stem}" and words in json.dumps(facts)

    def test_transfer_moves_the_copy_alone(self, local, tiny_base):
        target = copy.copy(tiny_base)
        target.__dict__.pop("fingerprint", None)
        target.unet = copy.deepcopy(tiny_base.unet)
        with torch.no_grad():
            target.unet.conv_in.weight += 0.25
        moved, offset = transfer(local, tiny_base, target)
        assert offset.moved > 0
        before, after = local.state_dict(), moved.state_dict()
        assert [name for name, x in before.items() if not torch.equal(x, after[name])] == ["network.conv_in.weight"]


class TestTraining:
    @pytest.fixture
    def settings(self, tmp_path, base_folder, icons_file):
        def make(part, **more):
            own = {
                "local": {"conditions": ["canny", "palette"]},
                "global": {"condition": "identity", "name": "global"},
            }
            source = {} if "pairs" in more else {"icons": str(icons_file), "variants": 1}
            return {
                "system": f"uni-controlnet-{part}",
                "out": str(tmp_path / part),
                **source,
                "base": str(base_folder),
                **own[part],
                "steps": 4,
                "batch_size": 3,
                "score_pictures": 2,
                "warmup_steps": 0,
                "min_lr_rate": 1.0,
                "learning_rate": 0.01,
                "preview_every": 4,
                "device": "cpu",
                **more,
            }

        return make

    @pytest.fixture
    def pairs(self, tmp_path):
        """Pairs of some images, each with the conditions named for it."""
        folder, rng = tmp_path / "pairs", np.random.default_rng(0)
        folder.mkdir()

        def write(*conditions_of_each):
            lines = []
            for number, names in enumerate(conditions_of_each):
                target = rng.integers(0, 255, (64, 64, 3), np.uint8)
                files = {name: f"{name}-{number}.png" for name in names}
                for file, image in ((f"{number}.png", target), *((files[name], find(name)(target)) for name in names)):
                    Image.fromarray(image).save(folder / file)
                lines.append({"image": f"{number}.png", "conditions": files, "prompt": "cat face"})
            (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            return {"pairs": str(folder)}

        return write

    @pytest.mark.parametrize("part", ["local", "global"])
    def test_a_run_in_parts_ends_as_one_in_one_go(self, settings, part, tmp_path):
        whole = build_recipe(settings(part))
        assert whole.results == (f"{part}.safetensors",)
        scores = train(whole)
        expected = {"local": {"canny", "palette"}, "global": {"identity"}}[part]
        assert {name.partition(": ")[0] for name in scores} == expected
        parts = {**settings(part), "out": str(tmp_path / "parts")}
        train(build_recipe({**parts, "steps": 2}))
        train(build_recipe(parts))
        one, other = (load_control(folder / f"{part}.safetensors") for folder in (tmp_path / part, tmp_path / "parts"))
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
        more = settings(part, start=str(tmp_path / part / f"{part}.safetensors"), out=str(tmp_path / "more"))
        assert objective_of(build_recipe(more)).control.kind == one.kind
        if part == "global":
            with refused("contradiction", "token_count is 7", 4, "start"):
                objective_of(build_recipe({**more, "token_count": 7}))

    def test_conditions_are_dropped_as_in_the_paper(self, settings, monkeypatch):
        objective = objective_of(build_recipe(settings("local", batch_size=500)))
        kept = objective.prepare(3).kept
        # All .1 + .8 / 4, none .1 + .8 / 4, one alone .8 / 4 each.
        counts = {
            row: int((kept == torch.tensor(row, dtype=torch.bool)).all(1).sum())
            for row in ((1, 1), (0, 0), (1, 0), (0, 1))
        }
        assert list(counts.values()) == pytest.approx([150, 150, 100, 100], abs=30)
        seen = []
        encode = LocalAdapter.encode
        monkeypatch.setattr(LocalAdapter, "encode", lambda self, x, base: seen.append(x) or encode(self, x, base))
        small = objective_of(build_recipe(settings("local", batch_size=8)))
        small.loss(0)
        given = seen[0]
        assert given.keys() == {"canny", "palette"}
        assert {bool(image.any()) for images in given.values() for image in images} == {True, False}

    def test_an_image_prompt_is_dropped_as_an_embedding_of_zeros(self, settings, monkeypatch):
        seen = []
        tokens = GlobalAdapter.tokens
        monkeypatch.setattr(GlobalAdapter, "tokens", lambda self, hint: seen.append(hint) or tokens(self, hint))
        objective = objective_of(build_recipe(settings("global", batch_size=8)))
        first, again = objective.loss(0), objective.loss(0)
        assert torch.equal(first, again)  # dropout and all
        dropped = (seen[0] == 0).all(1)
        assert 0 < dropped.sum() < 8 and torch.equal(seen[0], seen[1])
        never = settings("global", batch_size=8, drop_all=0.0, drop_each=0.0)
        objective_of(build_recipe(never)).loss(0)
        assert not (seen[-1] == 0).all(1).any()

    def test_checkpointing_changes_no_gradient(self, settings):
        gradients = []
        for on in (False, True):
            objective = objective_of(build_recipe(settings("local", gradient_checkpointing=on, drop_all=0.0)))
            with torch.no_grad():
                for parameter in objective.parameters():
                    parameter.add_(torch.linspace(-0.05, 0.05, parameter.numel()).view(parameter.shape))
            objective.loss(0).backward()
            gradients.append([parameter.grad for parameter in objective.parameters()])
        for one, other in zip(*gradients, strict=True):
            assert one is not None and torch.allclose(one, other, rtol=1e-4, atol=1e-6)

    def test_the_local_one_trains_on_pairs_of_all_conditions(self, settings, pairs):
        names = ("canny", "grayscale")
        recipe = settings("local", **pairs(*[names] * 6), conditions=list(names), flip=True)
        objective = objective_of(build_recipe(recipe))
        batch = objective.source.batch_together(names, objective.sampling_step(1))
        for name in names:
            single = objective.source.batch(name, objective.sampling_step(1))
            assert torch.equal(single.condition_images, batch.condition_images[name])
            assert torch.equal(single.latents, batch.latents)
        assert {score.partition(": ")[0] for score in train(build_recipe(recipe))} == set(names)

    def test_and_refuses_those_of_different_images(self, settings, pairs):
        names = ("canny", "grayscale")
        objective = objective_of(build_recipe(settings("local", **pairs(*[names] * 6), conditions=list(names))))
        objective.source.of["canny"].pairs.pop()
        with refused("bad-data", *names, "different images"):
            objective.source.prepare(objective.base, objective.control)

    def test_the_global_one_trains_on_pairs_with_cached_embeddings(self, settings, pairs, tmp_path, monkeypatch):
        recipe = settings("global", **pairs(*[("identity",)] * 6))
        objective = objective_of(build_recipe(recipe))
        with monkeypatch.context() as patched:
            patched.setattr(GlobalAdapter, "encode", lambda *_: pytest.fail("the embeddings are not cached"))
            assert torch.isfinite(objective.loss(0))
        train(build_recipe(recipe))
        assert load_control(tmp_path / "global" / "global.safetensors").condition == "identity"

    def test_other_conditions_than_those_to_start_from_are_refused(self, settings, local_file):
        with refused("contradiction", "canny, palette, grayscale", "canny, palette"):
            objective_of(build_recipe(settings("local", start=str(local_file))))

    def test_the_recipes_of_nano_are_some(self):
        assert len(read_recipe("recipes/nano/uni-controlnet-local.yaml").conditions) == 7
        assert read_recipe("recipes/nano/uni-controlnet-global.yaml").control_name == "global"

    def test_evaluate_scores_each_condition_of_a_file(self, local_file, base_folder, capsys):
        arguments = ["evaluate", "control", str(local_file), "--base", str(base_folder), "--sets", "openmoji"]
        assert main([*arguments, "--images", "2", "--steps", "2", "--json"]) == 0
        (report,) = json.loads(capsys.readouterr().out)["reports"]
        assert [row[0].rpartition(", ")[0].rpartition(", ")[2] for row in report["rows"]] == list(NAMES)
