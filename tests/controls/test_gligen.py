"""GLIGEN through taps: diffusers' gated UNet and pipeline, files, boxes, guidance, other controls, training."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionGLIGENPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny
from controlkit.apps.cli import main
from controlkit.bases.meta import meta_base
from controlkit.bases.stable_diffusion import SD15_UNET, StableDiffusion
from controlkit.bases.text import concatenate
from controlkit.bases.unet import attention_blocks
from controlkit.controls.apply import predict_under
from controlkit.controls.controlnet_xs import ControlNetXS
from controlkit.controls.encoder_copy.network import plain_config
from controlkit.controls.gligen import GLIGEN
from controlkit.controls.gligen.boxes import MAX_OBJECTS, boxes_problem
from controlkit.controls.inputs import encode_each
from controlkit.formats.card import card_of
from controlkit.formats.convert import convert
from controlkit.formats.describe import describe, describe_system
from controlkit.formats.load import load_control, save_control
from controlkit.formats.transfer import transfer
from controlkit.images import to_tensor
from controlkit.sampling.generate import generate
from controlkit.sampling.plan import ActiveControl, Plan
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.sampler import initial_noise, sample
from controlkit.sampling.saved_settings import read_settings
from controlkit.sampling.uses import ControlUse
from refusals import check, refused

BOXES = [{"box": [0.0, 0.1, 0.4, 0.6], "phrase": "red apple"}, {"box": [0.5, 0.25, 1, 0.75], "phrase": "cat face"}]
SD1_NAMES = (  # the places of `fuser` in gligen/GLIGEN's UNetModel with the settings of Stable Diffusion 1.4
    *(f"input_blocks.{block}.1.transformer_blocks.0" for block in (1, 2, 4, 5, 7, 8)),
    "middle_block.1.transformer_blocks.0",
    *(f"output_blocks.{block}.1.transformer_blocks.0" for block in range(3, 12)),
)


def small_unet(**changes):
    """Stable Diffusion 1's order of blocks in few channels."""
    torch.manual_seed(4)
    small = {"sample_size": 16, "block_out_channels": (16, 24, 32, 32), "norm_num_groups": 8}
    config = {**SD15_UNET, **small, "cross_attention_dim": 16, "attention_head_dim": 4, **changes}
    return UNet2DConditionModel(**config).eval().requires_grad_(False)


def with_unet(base, unet, name="tiny-sd"):
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
    return with_unet(tiny_base, small_unet())


@pytest.fixture(scope="module")
def xl_base():
    return tiny.build_tiny_sdxl()


def shaken(control, seed=1, scale=0.2):
    """A control whose gates are open."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in control.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * scale
        for fuser in control.fusers:
            fuser.alpha_attn += 0.8
            fuser.alpha_dense -= 0.7
    return control.eval().requires_grad_(False)


def fresh(base, seed=1):
    torch.manual_seed(seed)
    return GLIGEN.for_base(base, "boxes")


@pytest.fixture(scope="module")
def control(sd_base):
    return shaken(fresh(sd_base))


def gated(base, control):
    """diffusers' UNet with the control's layers in it."""
    unet = UNet2DConditionModel(**{**plain_config(base.unet), "attention_type": "gated"})
    names = {f"fusers.{n}": f"{block.module}.fuser" for n, block in enumerate(attention_blocks(base.unet.config))}
    layers = {
        next(
            (f"{new}.{name.removeprefix(f'{old}.')}" for old, new in names.items() if name.startswith(f"{old}.")), name
        ): v
        for name, v in control.state_dict().items()
    }
    unet.load_state_dict({**base.unet.state_dict(), **layers}, strict=True)
    return unet.eval().requires_grad_(False)


def grounding(base, rows):
    """Arguments of diffusers for one list of boxes a row; an empty list is the null condition."""
    boxes, masks = torch.zeros(len(rows), MAX_OBJECTS, 4), torch.zeros(len(rows), MAX_OBJECTS)
    vectors = torch.zeros(len(rows), MAX_OBJECTS, base.text_encoder.config.hidden_size)
    for row, entries in enumerate(rows):
        for place, entry in enumerate(entries):
            ids = base.tokenizer(entry["phrase"], return_tensors="pt").input_ids
            vectors[row, place] = base.text_encoder(ids).pooler_output[0].detach()
            boxes[row, place], masks[row, place] = torch.tensor(entry["box"]), 1
    return {"gligen": {"boxes": boxes, "masks": masks, "positive_embeddings": vectors}}


def inputs_of(base, rows=2):
    generator = torch.Generator().manual_seed(7)
    x_t = torch.randn(rows, 4, 16, 16, generator=generator)
    return x_t, torch.linspace(20, 900, rows).long(), base.encode_text(["red apple", "cat face", "sailboat"][:rows])


def furthest(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


class TestParity:
    def test_rows_with_boxes_of_their_own_equal_diffusers_gated_unet(self, sd_base, control):
        x_t, t, text = inputs_of(sd_base, 3)
        rows = [BOXES, BOXES[1:], []]
        hint = encode_each(control, [{"boxes": row} for row in rows], sd_base)
        made = predict_under(control, sd_base, x_t, t, text, hint)
        reference = gated(sd_base, control)
        expected = reference(x_t, t, text.tokens, cross_attention_kwargs=grounding(sd_base, rows)).sample
        assert furthest(made, expected) <= 1e-4
        plain = sd_base.predict(x_t, t, text)
        assert ((expected - plain).abs().amax((1, 2, 3)) > 0.05).all()
        other = grounding(sd_base, [list(reversed(BOXES)), [{**BOXES[0], "box": BOXES[1]["box"]}], BOXES])
        moved = reference(x_t, t, text.tokens, cross_attention_kwargs=other).sample
        assert ((moved - expected).abs().amax((1, 2, 3))[1:] > 1e-3).all()

    @pytest.mark.parametrize("tau", [1.0, 0.3])
    def test_images_equal_those_of_diffusers_pipeline(self, sd_base, control, tau):
        """Guidance with null tokens on the unconditional branch; tau is the end of the control."""
        pipeline = StableDiffusionGLIGENPipeline(
            vae=sd_base.vae,
            text_encoder=sd_base.text_encoder,
            tokenizer=sd_base.tokenizer,
            unet=gated(sd_base, control),
            scheduler=DDIMScheduler.from_config(tiny.SD1_SCHEDULE),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        noise = initial_noise(sd_base, [5], 64, 64)
        expected = pipeline(
            "red apple",
            gligen_phrases=[entry["phrase"] for entry in BOXES],
            gligen_boxes=[entry["box"] for entry in BOXES],
            gligen_scheduled_sampling_beta=tau,
            num_inference_steps=10,
            guidance_scale=3.0,
            latents=noise,
            output_type="pt",
        ).images
        hint = control.encode({"boxes": BOXES}, sd_base)
        use = ActiveControl(control, hint, end=tau)
        (made,) = sample(sd_base, prompt="red apple", seeds=[5], uses=[use], steps=10, guidance=3.0)
        assert furthest(made, expected) <= 1e-4
        without = next(iter(sample(sd_base, prompt="red apple", seeds=[5], steps=10, guidance=3.0)))
        assert furthest(made, without) > 1e-2

    def test_its_size_is_that_of_the_paper_s_models(self):
        """209.1M parameters on Stable Diffusion 1.4, of which 1.08M make grounding tokens."""
        facts = describe_system("gligen", "sd15")
        assert (facts["parameters"], facts["of them for grounding tokens"]) == (209_102_240, 1_083_968)
        with torch.device("meta"):
            whole = UNet2DConditionModel(**SD15_UNET, attention_type="gated")
            plain = UNet2DConditionModel(**SD15_UNET)
        sizes = [sum(parameter.numel() for parameter in unet.parameters()) for unet in (whole, plain)]
        assert sizes[0] - sizes[1] == facts["parameters"]


class TestTaps:
    def test_a_new_one_changes_nothing_and_its_gates_learn_first(self, sd_base):
        x_t, t, text = inputs_of(sd_base)
        control = fresh(sd_base).train()
        made = predict_under(control, sd_base, x_t, t, text, encode_each(control, [{"boxes": BOXES}] * 2, sd_base))
        assert torch.equal(made, sd_base.predict(x_t, t, text))
        made.square().mean().backward()
        moved = {name for name, p in control.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert moved == {f"fusers.{n}.alpha_{which}" for n in range(16) for which in ("attn", "dense")}

    def test_with_open_gates_a_new_one_learns_in_every_layer(self, sd_base):
        x_t, t, text = inputs_of(sd_base)
        torch.manual_seed(1)
        control = GLIGEN.for_base(sd_base, "boxes", gate=0.5).train()
        assert all(fuser.alpha_attn.tanh().item() == pytest.approx(0.5) for fuser in control.fusers)
        hint = encode_each(control, [{"boxes": BOXES}] * 2, sd_base)
        predict_under(control, sd_base, x_t, t, text, hint).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in control.parameters())
        with refused("out-of-range", "gate is 1", "below 1"):
            GLIGEN.for_base(sd_base, "boxes", gate=1)

    def test_tokens_of_a_new_one_differ_between_boxes_and_between_phrases(self, sd_base):
        control = fresh(sd_base).requires_grad_(False)

        def share_that_differs(entries):
            """Of the variance of tokens, as the attention sees them."""
            tokens = [control.encode({"boxes": [entry]}, sd_base)["objects"][0, 0] for entry in entries]
            seen = control.fusers[0].norm1(control.fusers[0].linear(torch.stack(tokens)))
            return (seen.var(0).mean() / seen.square().mean()).item()

        corners = [(x / 4, y / 4) for x in range(3) for y in range(3)]
        assert share_that_differs([{"box": [x, y, x + 0.4, y + 0.4], "phrase": "red apple"} for x, y in corners]) > 0.15
        phrases = ["red apple", "cat face", "sailboat", "tree", "house", "heart"]
        assert share_that_differs([{**BOXES[0], "phrase": phrase} for phrase in phrases]) > 0.15

    def test_checkpointing_changes_no_gradient(self, tiny_base):
        gradients = []
        for on in (False, True):
            base = with_unet(tiny_base, small_unet())
            control = shaken(fresh(base)).requires_grad_(True)
            if on:
                base.checkpoint_activations()
                base.unet.train()
            hint = encode_each(control, [{"boxes": BOXES}, {"boxes": BOXES[:1]}], base)
            predict_under(control, base, *inputs_of(base), hint).square().mean().backward()
            gradients.append([parameter.grad for parameter in control.parameters()])
        assert all(a.abs().max() > 0 for a in gradients[0][-20:])
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*gradients, strict=True) if a is not None)

    def test_on_the_conditional_branch_alone_the_other_rows_are_as_without_it(self, sd_base, control):
        x_t, _, text = inputs_of(sd_base)
        parts = [text.map(lambda part, row=row: part[row : row + 1]) for row in range(2)]
        t, stacked = torch.tensor([400]), torch.cat([x_t, x_t])
        both = concatenate(*(part.expand(2) for part in parts))
        use = ActiveControl(control, control.encode({"boxes": BOXES}, sd_base), conditional_only=True)
        plan = Plan([use], t, parts)
        made = sd_base.predict(stacked, t.expand(4), both, plan.residuals(0, stacked), plan.taps(0, stacked, sd_base))
        plain = sd_base.predict(stacked, t.expand(4), both)
        assert torch.equal(made[:2], plain[:2]) and furthest(made[2:], plain[2:]) > 1e-2

    def test_the_weight_scales_all_that_it_adds_and_two_are_summed(self, sd_base, control, monkeypatch):
        x_t, t, text = inputs_of(sd_base, 1)
        hints = [control.encode({"boxes": boxes}, sd_base) for boxes in (BOXES, BOXES[1:])]

        def added(uses):
            """What is added at the first point, where the hidden states do not depend on taps before."""
            plan = Plan(uses, t, [text])
            stream = torch.randn(1, 256, 16, generator=torch.Generator().manual_seed(0))
            return sum(tap.function(stream) for tap in plan.taps(0, x_t, sd_base)["attention.0"])

        first, second = (added([ActiveControl(control, hint)]) for hint in hints)
        assert furthest(added([ActiveControl(control, hints[0], weight=0.5)]), 0.5 * first) < 1e-5
        both = added([ActiveControl(control, hints[0]), ActiveControl(control, hints[1], weight=2.0)])
        assert furthest(both, first + 2 * second) < 1e-5

    def test_it_acts_beside_other_taps_and_residuals(self, sd_base, control, condition_image):
        image = to_tensor([condition_image])
        torch.manual_seed(2)
        xs = ControlNetXS.for_base(sd_base, "canny", size_ratio=0.5)
        with torch.no_grad():
            for parameter in xs.parameters():
                parameter += torch.randn(parameter.shape) * 0.1
        net = tiny.randomise_zero_convolutions(tiny.fresh_control(sd_base))
        uses = [
            ActiveControl(control, control.encode({"boxes": BOXES}, sd_base)),
            ActiveControl(xs.requires_grad_(False), xs.encode(image, sd_base)),
            ActiveControl(net, net.encode(image, sd_base)),
        ]

        def images(chosen):
            return next(iter(sample(sd_base, prompt="red apple", seeds=[1], steps=2, guidance=2.0, uses=chosen)))

        together = images(uses)
        for left_out in range(3):
            assert furthest(together, images([use for place, use in enumerate(uses) if place != left_out])) > 1e-4
        assert furthest(together, images(uses)) == 0


class TestBases:
    @pytest.mark.parametrize("family", ["tiny_base", "sd_base", "xl_base"])
    def test_every_unet_with_attention_has_its_points(self, family, request):
        base = request.getfixturevalue(family)
        control = shaken(fresh(base))
        x_t, t, text = inputs_of(base)
        hint = control.encode({"boxes": BOXES}, base)
        hint = {name: value.expand(2, -1, -1) for name, value in hint.items()}
        assert furthest(predict_under(control, base, x_t, t, text, hint), base.predict(x_t, t, text)) > 1e-2

    def test_bases_without_those_points_or_of_another_shape_are_refused_in_words(self, sd_base, tiny_base, control):
        sd3 = tiny.build_tiny_sd3(t5=False)
        with refused("incompatible", "tiny-sd3", "attention.N"):
            fresh(sd3)
        assert "attention.N" in control.incompatibility(sd3)
        assert "channels" in control.incompatibility(tiny_base)
        heads = with_unet(sd_base, small_unet(attention_head_dim=8))
        assert control.incompatibility(heads) is not None and control.incompatibility(sd_base) is None
        none = small_unet(down_block_types=["DownBlock2D"] * 4, up_block_types=["UpBlock2D"] * 4, mid_block_type=None)
        with refused("incompatible", "attention.N"):
            fresh(with_unet(sd_base, none))
        with refused("unsupported", "as it is"):
            transfer(control, sd_base, heads)


class TestBoxes:
    @pytest.mark.parametrize(
        ("value", "facts"),
        [
            ({"box": [0, 0, 1, 1], "phrase": "x"}, ["dict"]),
            ([], ["0 boxes", "30"]),
            ([BOXES[0]] * 31, ["31 boxes", "30"]),
            ([BOXES[0], [0, 0, 1, 1]], ["entry 2", "list"]),
            ([{"box": [0, 0, 1, 1]}], ["entry 1", "'box'"]),
            ([{"box": [0, 0, 1, 1], "phrase": "x", "mask": 1}], ["'mask'"]),
            ([{"box": [0, 0, 1, 1], "phrase": "  "}], ["phrase", "empty"]),
            ([{"box": [0, 0, 1, 1], "phrase": None}], ["phrase"]),
            ([{"box": [0, 0, 1.2, 1], "phrase": "x"}], ["entry 1", "1.2"]),
            ([{"box": [-0.1, 0, 1, 1], "phrase": "x"}], ["-0.1"]),
            ([{"box": [0.5, 0, 0.5, 1], "phrase": "x"}], ["empty", "0.5"]),
            ([{"box": [0, 0.9, 1, 0.1], "phrase": "x"}], ["y0 below y1"]),
            ([{"box": [0, 0, 1], "phrase": "x"}], ["four numbers"]),
            ([{"box": [0, 0, 1, True], "phrase": "x"}], ["four numbers"]),
            ([{"box": [0, 0, 1, float("nan")], "phrase": "x"}], ["JSON"]),
            ([{"box": "0,0,1,1", "phrase": "x"}], ["four numbers"]),
        ],
    )
    def test_malformed_boxes_are_refused_before_anything_is_loaded(
        self, value, facts, sd_base, control, tmp_path, capsys
    ):
        assert boxes_problem(value) is not None and boxes_problem(BOXES) is None
        path = save_control(tmp_path / "mine.safetensors", control, sd_base)
        file = tmp_path / "boxes.json"
        file.write_text(json.dumps(value))
        assert main(["generate", "x", "--base", "no-such-base", "--control", f"{path}={file}"]) == 2
        check(capsys.readouterr().err, "wrong-type", "boxes", *facts)

    def test_boxes_move_with_the_inpainted_part(self, sd_base, control, tmp_path, monkeypatch):
        path = str(save_control(tmp_path / "mine.safetensors", control, sd_base))
        drawing = Image.new("RGB", (128, 128), "teal")
        mask = Image.new("L", drawing.size)
        mask.paste(255, (64, 64, 128, 128))
        given, encode = [], GLIGEN.encode
        monkeypatch.setattr(
            GLIGEN, "encode", lambda self, inputs, base: given.append(inputs["boxes"]) or encode(self, inputs, base)
        )
        boxes = [{"box": [0.5, 0.75, 1, 1], "phrase": "a"}, {"box": [0, 0, 0.25, 0.25], "phrase": "b"}]
        settings = {"prompt": "x", "image": "drawing", "mask": "mask", "only_masked": 0, "steps": 2}
        images = {"drawing": drawing, "mask": mask}

        def notes_with(*entries):
            use = ControlUse(control=path, inputs={"boxes": list(entries)})
            return generate(GenerateRequest(**settings, controls=[use]), base=sd_base, images=images).notes

        assert not notes_with(*boxes)
        assert given.pop() == [{"box": [0, 0.5, 1, 1], "phrase": "a"}]
        assert notes_with(boxes[1]) == [f"no boxes of {path} are in the inpainted part"] and given.pop() == []

    def test_files_that_are_missing_or_no_json_and_uses_without_boxes_are_refused(self, sd_base, control, tmp_path):
        path = str(save_control(tmp_path / "mine.safetensors", control, sd_base))
        with refused("missing-file", "none.json"):
            generate(
                GenerateRequest(prompt="x", controls=[ControlUse(control=path, image=str(tmp_path / "none.json"))])
            )
        (tmp_path / "bad.json").write_text("[{")
        with refused("damaged-file", "bad.json"):
            generate(GenerateRequest(prompt="x", controls=[ControlUse(control=path, image=str(tmp_path / "bad.json"))]))
        with refused("missing-setting", "boxes"):
            generate(GenerateRequest(prompt="x", controls=[ControlUse(control=path, image="a.png")]))

    def test_the_command_line_and_python_draw_the_same_image_that_its_settings_restore(
        self, tiny_base, base_folder, tmp_path
    ):
        control = shaken(fresh(tiny_base))
        path = save_control(tmp_path / "mine.safetensors", control, tiny_base, dtype=torch.float32)
        boxes = tmp_path / "boxes.json"
        boxes.write_text(json.dumps(BOXES))
        out = tmp_path / "out"
        shared = ["--base", str(base_folder), "--steps", "2", "--seed", "3", "--out", str(out)]
        main(["generate", "red apple", "--control", f"{path}={boxes}@0.7:0-0.5", *shared])
        use = ControlUse(control=str(path), inputs={"boxes": BOXES}, weight=0.7, end=0.5)
        request = GenerateRequest(prompt="red apple", base=str(base_folder), controls=[use], steps=2, seeds=[3])
        made = np.asarray(generate(request).images[0].image)
        (png,) = out.glob("*.png")
        from PIL import Image

        with Image.open(png) as image:
            assert np.array_equal(np.asarray(image), made)
        restored = read_settings(png)
        assert restored.request.controls[0].inputs == {"boxes": BOXES}
        plain = generate(dataclasses.replace(request, controls=[])).images[0].image
        assert not np.array_equal(np.asarray(plain), made)


def original_file(base, control, *, unet=True):
    """A checkpoint in the original's names, of a small UNet with Stable Diffusion 1's blocks."""
    own = {}
    for name, value in control.state_dict().items():
        _, _, rest = name.partition("fusers.")
        place, _, layer = rest.partition(".")
        own[f"{SD1_NAMES[int(place)]}.fuser.{layer}" if rest else name] = value
    if not unet:
        return own
    around = {"input_blocks.0.0.weight": base.unet.conv_in.weight, "out.2.bias": base.unet.conv_out.bias}
    return {**around, "time_embed.0.bias": torch.zeros(64), **own}


@pytest.fixture
def sd_folder(sd_base, tmp_path):
    from controlkit.nano.base_objective import save_base

    save_base(sd_base, tmp_path / "sd")
    return tmp_path / "sd"


class TestFiles:
    def test_our_file_says_what_it_is(self, tiny_base, base_folder, tmp_path):
        control = shaken(fresh(tiny_base))
        path = save_control(tmp_path / "mine.safetensors", control, tiny_base, made={"steps": 4}, dtype=torch.float32)
        loaded = load_control(path, tiny_base)
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in control.state_dict().items())
        facts = describe(str(path), str(base_folder))
        assert facts["kind"] == "gligen" and facts["inputs"] == "boxes (value)" and facts["condition"] == "boxes"
        assert facts["gated attention"] == "in 4 transformer blocks"
        card = card_of(path)
        assert "INPUTS.json" in card and "boxes (value)" in card and "gligen" in card

    def test_fewer_grounding_tokens_are_kept_in_our_file_only(self, sd_base, sd_folder, tmp_path):
        control = shaken(GLIGEN.for_base(sd_base, "boxes", max_objects=2))
        path = save_control(tmp_path / "two.safetensors", control, sd_base, dtype=torch.float32)
        loaded = load_control(path, sd_base)
        hint = loaded.encode({"boxes": BOXES[:1]}, sd_base)
        assert {name: value.shape[1] for name, value in hint.items()} == {"objects": 2, "null": 2}
        assert torch.equal(hint["objects"][:, 1], hint["null"][:, 0])
        with refused("out-of-range", "3 boxes", "takes 2"):
            loaded.encode({"boxes": [*BOXES, *BOXES[:1]]}, sd_base)
        assert describe(str(path))["boxes"] == "1 to 2"
        for name, out in (("original", "out.safetensors"), ("diffusers-unet", "out")):
            with refused("unsupported", path, "max_objects=30"):
                convert(path, tmp_path / out, name, base=str(sd_folder))
        for number in (0, 31):
            with refused("out-of-range", f"max_objects is {number}"):
                GLIGEN.for_base(sd_base, max_objects=number)

    def test_configs_without_a_number_of_tokens_have_that_of_published_models(self, sd_base):
        config = fresh(sd_base).config()
        del config["max_objects"]
        assert GLIGEN.from_config(config).max_objects == MAX_OBJECTS

    def test_names_of_the_original_at_stable_diffusion_1(self):
        """Read strictly: these are the names and shapes in gligen/GLIGEN's model of SD1.4, on the meta device."""
        base = meta_base("sd15")
        with torch.device("meta"):
            control = GLIGEN.for_base(base)
        assert [block.module for block in attention_blocks(SD15_UNET)][
            6
        ] == "mid_block.attentions.0.transformer_blocks.0"
        names = original_file(base, control, unet=False)
        assert names["position_net.linears.0.weight"].shape == (512, 768 + 64)
        assert names["output_blocks.11.1.transformer_blocks.0.fuser.ff.net.0.proj.weight"].shape == (2560, 320)
        assert names["middle_block.1.transformer_blocks.0.fuser.linear.weight"].shape == (1280, 768)
        assert len(names) == 280

    @pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
    @pytest.mark.parametrize("unet", [True, False])
    def test_files_of_the_original_are_read_and_written(self, sd_base, sd_folder, control, tmp_path, unet, prefix):
        path = tmp_path / "original.safetensors"
        tensors = original_file(sd_base, control, unet=unet)
        save_file({f"{prefix}{name}": value.clone() for name, value in tensors.items()}, path)
        loaded = load_control(path, sd_base)
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in control.state_dict().items())
        back = convert(path, tmp_path / "back.safetensors", "original", base=str(sd_folder))
        expected = original_file(sd_base, control, unet=False)
        written = load_file(back.path)
        assert set(written) == set(expected) and all(torch.equal(written[name], expected[name]) for name in expected)
        assert ("UNet" in " ".join(back.notes)) is unet

    def test_the_released_checkpoint_wraps_the_model_and_its_settings(self, sd_base, control, tmp_path):
        """As `save_ckpt_and_result` of gligen/GLIGEN saves it: settings of OmegaConf among them, which are not run."""

        class DictConfig:
            def __reduce__(self):
                return DictConfig, (), {"_content": {}}

        DictConfig.__module__, DictConfig.__qualname__ = "omegaconf.dictconfig", "DictConfig"
        module = type(torch)("omegaconf.dictconfig")
        module.DictConfig = DictConfig
        path = tmp_path / "diffusion_pytorch_model.bin"
        with pytest.MonkeyPatch.context() as patch:
            import sys

            patch.setitem(sys.modules, "omegaconf", type(torch)("omegaconf"))
            patch.setitem(sys.modules, "omegaconf.dictconfig", module)
            model = original_file(sd_base, control)
            parts = {"autoencoder": {"w": torch.ones(1)}, "text_encoder": {}, "diffusion": {}, "iters": 9}
            torch.save({"model": model, **parts, "config_dict": {"_content": {"model": DictConfig()}}}, path)
        loaded = load_control(path, sd_base)
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in control.state_dict().items())

    def test_diffusers_folders_are_read_and_written(self, sd_base, sd_folder, control, tmp_path):
        unet = gated(sd_base, control)
        unet.save_pretrained(tmp_path / "unet")
        for source in (tmp_path / "unet", tmp_path / "unet" / "diffusion_pytorch_model.safetensors"):
            loaded = load_control(source, sd_base)
            assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in control.state_dict().items())
        convert(tmp_path / "unet", tmp_path / "ours.safetensors", "controlkit")
        convert(tmp_path / "ours.safetensors", tmp_path / "back", "diffusers-unet", base=str(sd_folder))
        again = UNet2DConditionModel.from_pretrained(tmp_path / "back").state_dict()
        assert set(again) == set(unet.state_dict())
        for name, value in unet.state_dict().items():  # the folder of the base has float16
            same = again[name] if "fuser" in name or "position_net" in name else again[name].half()
            assert torch.equal(same, value.to(same.dtype)), name
        with refused("missing-setting", "--base"):
            convert(tmp_path / "ours.safetensors", tmp_path / "other", "diffusers-unet")

    def test_damaged_and_unsupported_files_are_refused_in_words(self, sd_base, control, tmp_path):
        path = tmp_path / "file.safetensors"
        whole = {name: value.clone() for name, value in original_file(sd_base, control).items()}

        def refuse(tensors, code, *facts):
            save_file(tensors, path)
            with refused(code, *facts):
                load_control(path, sd_base)

        lost = f"{SD1_NAMES[9]}.fuser.alpha_attn"
        refuse({name: value for name, value in whole.items() if name != lost}, "damaged-file", lost)
        refuse({**whole, "position_net.more": torch.ones(1)}, "damaged-file", "position_net.more")
        refuse({**whole, "downsample_net.x": torch.ones(1)}, "damaged-file", "downsample_net.x")
        refuse({**whole, lost: torch.ones(3)}, "damaged-file", lost, "(3,)")
        refuse({**whole, "input_blocks.0.0.weight": torch.zeros(16, 9, 3, 3)}, "unsupported", "inpainting")
        other = {name.replace("linears.", "linears_text."): value for name, value in whole.items()}
        refuse(other, "wrong-kind", "boxes")
        save_file(whole, path)
        with refused("damaged-file", "--base"):
            load_control(path)
