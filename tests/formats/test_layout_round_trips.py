"""Every layout of a control and back, bit for bit, and residuals that stay what they were."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter
from layout_files import equal, residuals, shaken, t2i_adapter, trained_pair, weights_of
from safetensors.torch import load_file, save_file

from controlkit.bases.load import load_base
from controlkit.controls.controlnet.control_lora import _low_rank
from controlkit.controls.ctrlora.base_controlnet import build_base_control
from controlkit.controls.file_format import Reference
from controlkit.formats.companions import read_checkpoint
from controlkit.formats.convert import convert
from controlkit.formats.detect import detect
from controlkit.formats.load import load_control, save_control, shipped_controls
from controlkit.formats.metadata import read_metadata
from refusals import refused
from tiny import fresh_control

CONTROLNET_LAYOUTS = ("controlkit", "diffusers", "original", "bare")


def out_of(folder, layout):
    return folder / (f"{layout}" if layout in ("diffusers", "peft") else f"{layout}.safetensors")


def through(path, layouts, folder, **options):
    """Convert from layout to layout; the last file."""
    for number, layout in enumerate(layouts):
        path = convert(path, out_of(folder / str(number), layout), layout, **options).path
        assert detect(path).format_name == ("controlkit" if layout == "merged" else layout)
    return path


@pytest.fixture
def controlnet(tiny_control, tiny_base, tmp_path):
    return save_control(tmp_path / "a.safetensors", tiny_control, tiny_base, made={"steps": 7}, dtype=torch.float32)


@pytest.mark.parametrize("between", CONTROLNET_LAYOUTS)
@pytest.mark.parametrize("last", CONTROLNET_LAYOUTS)
def test_a_controlnet_comes_back_from_every_pair_of_layouts(controlnet, tmp_path, between, last):
    back = through(controlnet, (between, last, "controlkit"), tmp_path)
    assert equal(weights_of(controlnet), weights_of(back))
    assert read_metadata(back) == read_metadata(controlnet)


@pytest.mark.parametrize("layout", CONTROLNET_LAYOUTS)
def test_every_layout_of_a_controlnet_loads_and_computes_the_same(
    controlnet, tiny_control, tiny_base, tmp_path, layout
):
    control = load_control(through(controlnet, (layout,), tmp_path), tiny_base)
    assert control.condition == "canny"
    for mine, theirs in zip(residuals(tiny_control, tiny_base), residuals(control, tiny_base), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_stay_unless_one_is_asked_for(tiny_control, tiny_base, tmp_path, dtype):
    path = save_control(tmp_path / "a.safetensors", tiny_control, tiny_base, dtype=dtype)
    assert {value.dtype for value in weights_of(through(path, ("original", "diffusers"), tmp_path)).values()} == {dtype}
    asked = through(path, ("original",), tmp_path / "asked", dtype="float16")
    assert {value.dtype for value in weights_of(asked).values()} == {torch.float16}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_float8_is_cast_to_every_dtype(controlnet, dtype, tmp_path):
    in_float8 = {name: value.to(torch.float8_e4m3fn) for name, value in weights_of(controlnet).items()}
    save_file(in_float8, tmp_path / "8.safetensors", read_metadata(controlnet))
    made = convert(tmp_path / "8.safetensors", tmp_path / "cast.safetensors", "controlkit", dtype=dtype)
    cast = {name: value.to(getattr(torch, dtype)) for name, value in in_float8.items()}
    assert equal(weights_of(made.path), cast) and not made.notes


def test_a_file_of_the_original_code_needs_no_metadata(controlnet, tiny_control, tiny_base, base_folder, tmp_path):
    """As .pth of lllyasviel/ControlNet: a plain dictionary, with or without a wrapper, in either container."""
    state = weights_of(through(controlnet, ("original",), tmp_path))
    torch.save(state, tmp_path / "plain.pth")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "wrapped.ckpt")
    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for name in ("plain.pth", "wrapped.ckpt", "old.bin"):
        control = load_control(tmp_path / name, tiny_base)
        assert control.condition is None
        assert equal(control.state_dict(), tiny_control.state_dict())
        back = convert(tmp_path / name, tmp_path / f"{name}.safetensors", "controlkit", base=str(base_folder))
        assert equal(weights_of(back.path), weights_of(controlnet))


def test_the_base_is_asked_for_where_channels_are_no_multiples_of_the_first(tmp_path):
    shipped = shipped_controls()["canny"]  # of 48, 96 and 160 channels
    plain, out = tmp_path / "plain.pth", tmp_path / "again.safetensors"
    torch.save(load_file(shipped), plain)
    with refused("missing-setting", plain, "attention heads", "--base"):
        convert(plain, out, "controlkit")
    convert(plain, out, "controlkit", base="nano")
    assert load_control(out, load_base("nano")).config()["attention_head_dim"] == 8


def test_a_network_of_no_known_base_needs_the_base_for_its_heads(controlnet, tiny_base, base_folder, tmp_path):
    save_file(weights_of(through(controlnet, ("bare",), tmp_path)), tmp_path / "b.safetensors")
    with refused("missing-setting", tmp_path / "b.safetensors", "attention heads", "--base"):
        load_control(tmp_path / "b.safetensors")
    with refused("missing-setting", tmp_path / "b.safetensors", "attention heads", "--base"):
        convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "controlkit")
    made = convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "controlkit", base=str(base_folder))
    config = json.loads(read_metadata(made.path)["control.config"])
    assert (config["attention_head_dim"], config["norm_num_groups"]) == (4, 8)
    assert equal(weights_of(made.path), weights_of(controlnet))


def test_diffusers_loads_the_folder_with_no_code_of_ours(controlnet, tiny_control, tmp_path):
    folder = through(controlnet, ("original", "diffusers"), tmp_path)
    network, told = ControlNetModel.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert equal(network.state_dict(), tiny_control.file_state())
    assert network.config["attention_head_dim"] == tiny_control.network.config["attention_head_dim"]


@pytest.mark.parametrize(
    "changes",
    [
        {"use_linear_projection": True},
        {
            "block_out_channels": (16, 32, 32),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "transformer_layers_per_block": (1, 2, 3),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 40,
        },
        {"layers_per_block": 2, "mid_block_type": "UNetMidBlock2D"},
        {"layers_per_block": 3, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 24},
    ],
    ids=["as SD2", "as SDXL", "no transformer in the middle", "class embedding"],
)
def test_other_shapes_of_unet(tmp_path, changes):
    """Blocks, layers, depths, projections and labels of other families, at toy size, without metadata."""
    torch.manual_seed(0)
    settings = {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "norm_num_groups": 8,
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "conditioning_embedding_out_channels": (8, 16, 16),
        **changes,
    }
    network = shaken(ControlNetModel(**settings))
    network.save_pretrained(tmp_path / "first")
    state = weights_of(convert(tmp_path / "first", tmp_path / "o.safetensors", "original").path)
    save_file(state, tmp_path / "foreign.safetensors")
    found = detect(tmp_path / "foreign.safetensors")
    content = read_checkpoint(found.path, Reference(unet_config=dict(network.config)))
    assert equal(content.tensors, network.state_dict())
    again = ControlNetModel.from_config(content.config)
    assert {n: v.shape for n, v in again.state_dict().items()} == {n: v.shape for n, v in network.state_dict().items()}
    kept = {key: network.config[key] for key in content.config if key not in ("transformer_layers_per_block",)}
    assert json.loads(json.dumps({key: content.config[key] for key in kept})) == json.loads(json.dumps(kept))


class TestCtrLoRA:
    @pytest.fixture
    def pair(self, tiny_base, tmp_path):
        return trained_pair(tiny_base, tmp_path)

    @pytest.mark.parametrize("between", ["controlkit", "original", "bare", "peft"])
    @pytest.mark.parametrize("last", ["controlkit", "original", "bare", "peft"])
    def test_an_adapter_comes_back_from_every_pair_of_layouts(self, pair, tiny_base, tmp_path, between, last):
        control, path, _ = pair
        back = through(path, (between, last, "controlkit"), tmp_path)
        assert equal(weights_of(path), weights_of(back))
        old, new = read_metadata(path), read_metadata(back)
        assert {key for key in old if old[key] != new[key]} <= {"control.config"}
        (tmp_path / "base.safetensors").rename(back.parent / "base.safetensors")
        loaded = load_control(back, tiny_base)
        for mine, theirs in zip(residuals(control, tiny_base), residuals(loaded, tiny_base), strict=True):
            assert torch.equal(mine, theirs)

    @pytest.mark.parametrize("between", ["controlkit", "original", "bare"])
    @pytest.mark.parametrize("last", ["controlkit", "original", "bare"])
    def test_a_base_control_comes_back_from_every_pair_of_layouts(self, pair, tmp_path, between, last):
        _, _, path = pair
        back = through(path, (between, last, "controlkit"), tmp_path)
        assert equal(weights_of(path), weights_of(back))
        assert read_metadata(back) == read_metadata(path)

    @pytest.mark.parametrize("layouts", [("original",), ("bare", "original")])
    def test_a_base_control_comes_back_without_what_was_added(self, pair, tiny_base, tmp_path, layouts):
        _, _, path = pair
        made = through(path, layouts, tmp_path)
        names = set(weights_of(made))
        lora = {name for name in names if ".lora_layer." in name}
        assert len(names) - len(lora) == len(weights_of(path))
        assert len(lora) == 2 * sum(v.ndim == 2 for n, v in weights_of(path).items() if n.endswith(".weight"))
        back = through(made, ("controlkit",), tmp_path / "back")
        assert equal(weights_of(path), weights_of(back))
        assert read_metadata(back) == read_metadata(path)

    def test_the_reference_s_pair_loads_from_two_pickles(self, pair, tiny_base, tmp_path):
        control, path, base_path = pair
        folder = tmp_path / "reference"
        folder.mkdir()
        shared: dict = {}
        for source, name in ((path, "lora.ckpt"), (base_path, "base.ckpt")):
            torch.save(weights_of(through(source, ("original",), tmp_path / name)), folder / name)
        for name in (folder / "lora.ckpt", f"{folder}/lora.ckpt+{folder}/base.ckpt"):
            loaded = load_control(name, tiny_base, shared=shared)
            for mine, theirs in zip(residuals(control, tiny_base), residuals(loaded, tiny_base), strict=True):
                assert torch.equal(mine, theirs)
        assert len(shared) == 1
        torch.save(torch.load(folder / "base.ckpt", weights_only=True), folder / "another.ckpt")
        with refused("missing-companion", "another.ckpt, base.ckpt", "ADAPTER+BASE", "--base-control"):
            load_control(folder / "lora.ckpt", tiny_base)
        (folder / "another.ckpt").unlink()
        (folder / "base.ckpt").unlink()
        with refused("missing-companion", folder / "lora.ckpt", "base control", "ADAPTER+BASE"):
            load_control(folder / "lora.ckpt", tiny_base)

    def test_leftover_lora_of_a_base_file_is_kept_where_it_has_a_place(self, pair, tiny_base, base_folder, tmp_path):
        _, path, base_path = pair
        with_lora = weights_of(through(base_path, ("original",), tmp_path))
        adapter = weights_of(through(path, ("original",), tmp_path / "adapter"))
        with_lora |= {name: value for name, value in adapter.items() if ".lora_layer." in name}
        save_file(with_lora, tmp_path / "left.safetensors")
        again = convert(tmp_path / "left.safetensors", tmp_path / "again.safetensors", "original")
        assert equal(weights_of(again.path), with_lora)
        assert any("LoRA tensors" in note for note in again.notes)
        mine = convert(
            tmp_path / "left.safetensors", tmp_path / "mine.safetensors", "controlkit", base=str(base_folder)
        )
        assert equal(weights_of(mine.path), weights_of(base_path))
        assert read_metadata(mine.path)["control.fingerprint"] == read_metadata(base_path)["control.fingerprint"]

    def test_merged_needs_no_second_file_and_is_no_controlnet(self, pair, tiny_base, tmp_path):
        control, path, _ = pair
        made = convert(path, tmp_path / "merged.safetensors", "merged")
        assert any("not a plain ControlNet" in note for note in made.notes)
        loaded = load_control(made.path, tiny_base)
        assert loaded.condition == "palette"
        for mine, theirs in zip(residuals(control, tiny_base), residuals(loaded, tiny_base), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
        for source in (made.path, path):
            with refused("unsupported", source, "diffusers", "plain ControlNet"):
                convert(source, tmp_path / "folder", "diffusers")
        assert load_control(through(made.path, ("original",), tmp_path), tiny_base).condition == "palette"

    def test_a_merged_control_is_rounded_to_a_dtype_once(self, pair, tiny_base, tmp_path):
        _, path, _ = pair
        exact = weights_of(convert(path, tmp_path / "merged.safetensors", "merged").path)
        half = convert(path, tmp_path / "half.safetensors", "merged", dtype="bfloat16").path
        assert equal(weights_of(half), {name: value.bfloat16() for name, value in exact.items()})
        assert read_metadata(half)["control.fingerprint"] == load_control(half, tiny_base).fingerprint()

    def test_a_training_checkpoint_gives_adapter_and_merged_control(self, pair, tiny_base, base_folder, tmp_path):
        """As the reference's Lightning checkpoints: Stable Diffusion, base control and LoRA in one file."""
        control, path, base_path = pair
        whole = weights_of(through(base_path, ("original",), tmp_path))
        whole = {name: value for name, value in whole.items() if ".lora_layer." not in name}
        whole |= weights_of(through(path, ("original",), tmp_path / "adapter"))
        whole["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(1)
        torch.save({"state_dict": whole, "global_step": 1}, tmp_path / "step.ckpt")
        loaded = load_control(tmp_path / "step.ckpt", tiny_base)
        for mine, theirs in zip(residuals(control, tiny_base), residuals(loaded, tiny_base), strict=True):
            assert torch.equal(mine, theirs)
        made = convert(tmp_path / "step.ckpt", tmp_path / "adapter.safetensors", "controlkit")
        assert equal(weights_of(made.path), weights_of(path))
        convert(tmp_path / "step.ckpt", tmp_path / "m.safetensors", "merged", base=str(base_folder))

    def test_peft_loads_the_folder_and_computes_the_same(self, pair, tiny_base, tmp_path):
        from peft import PeftModel

        control, path, base_path = pair
        folder = through(path, ("peft",), tmp_path)
        base = read_checkpoint(base_path)
        plain = build_base_control(base.config, base.tensors)
        expected = residuals(control, tiny_base)
        network = PeftModel.from_pretrained(plain.network, folder).eval()
        generator = torch.Generator().manual_seed(0)
        torch.randn(2, 4, 16, 16, generator=generator)
        hint = plain.encode(torch.rand(1, 3, 64, 64, generator=generator), tiny_base)
        with torch.no_grad():
            down, mid = network(
                hint.expand(2, -1, -1, -1),
                torch.tensor([10, 900]),
                encoder_hidden_states=tiny_base.encode_text(["a", "b"]).tokens,
                controlnet_cond=hint.new_zeros(()),
                return_dict=False,
            )
        for mine, theirs in zip(expected, [*down, mid], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)

    def test_peft_s_alpha_is_folded_into_the_change(self, pair, tmp_path):
        _, path, _ = pair
        folder = through(path, ("peft",), tmp_path)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 2 * config["r"]}))
        made = weights_of(through(folder, ("controlkit",), tmp_path / "back"))
        ups = [name for name in made if name.endswith(".up.weight")]
        assert ups and all(torch.equal(made[name], 2 * weights_of(path)[name]) for name in ups)

    def test_what_a_peft_folder_says_of_its_layers_is_true_or_refused(self, pair, tmp_path):
        folder = through(pair[1], ("peft",), tmp_path)
        config = json.loads((folder / "adapter_config.json").read_text())
        for changes, code, facts in (
            ({"r": 2 * config["r"]}, "damaged-file", (config["r"], 2 * config["r"])),
            ({"fan_in_fan_out": True}, "unsupported", ("fan_in_fan_out",)),
            ({"use_dora": True, "lora_bias": True}, "unsupported", ("use_dora", "lora_bias")),
            ({"rank_pattern": {"a": 2}}, "unsupported", ("rank_pattern",)),
        ):
            (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
            with refused(code, folder, *facts):
                load_control(folder)


@pytest.mark.parametrize("kind", ["full_adapter", "full_adapter_xl", "light_adapter"])
@pytest.mark.parametrize("between", ["controlkit", "original", "diffusers"])
@pytest.mark.parametrize("last", ["controlkit", "original", "diffusers"])
def test_a_t2i_adapter_comes_back_from_every_pair_of_layouts(tmp_path, kind, between, last):
    t2i_adapter(kind).save_pretrained(tmp_path / "first")
    back = through(tmp_path / "first", (between, last, "diffusers"), tmp_path)
    assert equal(weights_of(back), weights_of(tmp_path / "first"))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (back, tmp_path / "first")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("kind", ["full_adapter", "full_adapter_xl", "light_adapter"])
def test_a_t2i_adapter_without_metadata_comes_back(tmp_path, kind):
    adapter = t2i_adapter(kind)
    adapter.save_pretrained(tmp_path / "first")
    state = adapter.state_dict()
    back = through(tmp_path / "first", ("original", "controlkit", "original", "diffusers"), tmp_path)
    again = T2IAdapter.from_pretrained(back)
    assert equal(again.state_dict(), state)
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: v for k, v in adapter.config.items() if k[0] != "_"
    }
    image = torch.rand(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(adapter(image), again(image), strict=True))
    foreign = weights_of(through(back, ("original",), tmp_path / "foreign"))
    torch.save(foreign, tmp_path / "t2iadapter.pth")
    made = convert(tmp_path / "t2iadapter.pth", tmp_path / "last", "diffusers")
    assert equal(weights_of(made.path), state)
    loaded = load_control(tmp_path / "t2iadapter.pth")
    assert loaded.kind == "t2i-adapter" and equal(loaded.file_state(), state)


class TestWithBase:
    def test_full_files_keep_their_stable_diffusion_among_themselves_alone(
        self, controlnet, tiny_control, tiny_base, tmp_path
    ):
        state = weights_of(through(controlnet, ("original",), tmp_path))
        state |= {"model.diffusion_model.output_blocks.0.0.in_layers.0.weight": torch.ones(3), "betas": torch.ones(4)}
        state |= {"first_stage_model.decoder.conv_in.weight": torch.ones(2)}
        for name in ("alphas_cumprod_prev", "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef1", "logvar"):
            state[name] = torch.ones(4)
        torch.save(state, tmp_path / "v10.pth")
        found = detect(tmp_path / "v10.pth")
        assert found.format_name == "full"
        same = convert(found.path, tmp_path / "same.safetensors", "full")
        assert equal(weights_of(same.path), state) and not same.notes
        made = convert(found.path, tmp_path / "mine.safetensors", "original")
        (note,) = made.notes
        assert "7 tensors" in note and "decoder (1 tensors)" in note and "is dropped" in note
        assert equal(load_control(found.path, tiny_base).state_dict(), tiny_control.state_dict())
        with refused("unsupported", "full", "Stable Diffusion", "--to original"):
            convert(controlnet, tmp_path / "not.safetensors", "full")

    def test_inpainting_of_controlnet_1_1_is_noted_where_it_may_be_that(self, controlnet, base_folder, tmp_path):
        settings = {"condition": "inpaint", "base": str(base_folder)}
        torch.save(weights_of(through(controlnet, ("original",), tmp_path)), tmp_path / "v11p.pth")
        (note,) = convert(tmp_path / "v11p.pth", tmp_path / "mine.safetensors", "controlkit", **settings).notes
        assert "control_v11p_sd15_inpaint" in note and "-1" in note
        ours = convert(controlnet, tmp_path / "ours.safetensors", "controlkit", **settings)
        assert ours.checkpoint.condition == "inpaint" and not ours.notes

    def test_differences_add_up_again(self, controlnet, tiny_control, tiny_base, base_folder, tmp_path):
        made = convert(controlnet, tmp_path / "d.safetensors", "difference", base=str(base_folder))
        state = weights_of(made.path)
        assert "difference" in state and state["control_model.input_blocks.0.0.weight"].abs().max() < 1e-3
        loaded = load_control(made.path, load_base(base_folder))
        for mine, theirs in zip(residuals(tiny_control, tiny_base), residuals(loaded, tiny_base), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        back = convert(made.path, tmp_path / "back.safetensors", "controlkit", base=str(base_folder))
        for name, value in weights_of(controlnet).items():
            torch.testing.assert_close(weights_of(back.path)[name], value, rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("layout", ["difference", "control-lora"])
    def test_a_change_in_float8_is_not_rounded_with_the_base(self, tiny_base, base_folder, tmp_path, layout):
        """As ComfyUI's users store them: the file's own rounding is all that is lost."""
        controlnet = save_control(
            tmp_path / "a.safetensors", shaken(fresh_control(tiny_base), size=0.02), tiny_base, dtype=torch.float32
        )
        rank = {"rank": 64} if layout == "control-lora" else {}
        made = convert(controlnet, tmp_path / "d.safetensors", layout, base=str(base_folder), **rank)
        stored = weights_of(made.path)
        in_float8 = {name: value.to(torch.float8_e4m3fn) if value.ndim > 1 else value for name, value in stored.items()}
        save_file(in_float8, tmp_path / "8.safetensors", read_metadata(made.path))
        save_file({name: value.float() for name, value in in_float8.items()}, tmp_path / "32.safetensors")
        base = load_base(base_folder)
        loaded = load_control(tmp_path / "8.safetensors", base).file_state()
        expected = load_control(tmp_path / "32.safetensors", base).file_state()
        for name, value in expected.items():
            torch.testing.assert_close(loaded[name], value, rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize("layout", ["difference", "control-lora"])
    def test_a_difference_and_not_the_control_is_rounded_to_a_dtype(self, tiny_base, base_folder, tmp_path, layout):
        control = shaken(fresh_control(tiny_base), size=1e-3)  # so small a change that float16 rounds much of it away
        path = save_control(tmp_path / "a.safetensors", control, tiny_base, dtype=torch.float32)
        options = {"base": str(base_folder), **({"rank": 64} if layout == "control-lora" else {})}
        exact = weights_of(convert(path, tmp_path / "exact.safetensors", layout, **options).path)
        made = convert(path, tmp_path / "half.safetensors", layout, dtype="float16", **options)
        assert equal(weights_of(made.path), {name: value.half() for name, value in exact.items()})
        assert made.to_json()["dtypes"] == {"float16": len(exact)}

    def test_a_difference_beyond_a_dtypes_range_is_refused(self, tiny_control, tiny_base, base_folder, tmp_path):
        control = copy.deepcopy(tiny_control)
        control.network.conv_in.bias.data[0] = 1e5
        path = save_control(tmp_path / "a.safetensors", control, tiny_base, dtype=torch.float32)
        with refused("out-of-range", path, "input_blocks.0.0.bias", "65504"):
            convert(path, tmp_path / "d.safetensors", "difference", base=str(base_folder), dtype="float16")
        assert not (tmp_path / "d.safetensors").exists()

    @pytest.mark.parametrize("layout", ["difference", "control-lora"])
    def test_what_differs_from_a_base_needs_it(self, controlnet, base_folder, tmp_path, layout):
        rank = {"rank": 2} if layout == "control-lora" else {}
        made = convert(controlnet, tmp_path / "d.safetensors", layout, base=str(base_folder), **rank)
        with refused("missing-setting", "--base"):
            load_control(made.path)
        with refused("missing-setting", "--base"):
            convert(controlnet, tmp_path / "e.safetensors", layout, **rank)
        with refused("missing-setting", "--base"):
            convert(made.path, tmp_path / "e.safetensors", "controlkit", base="sd15")

    def test_a_control_lora_keeps_what_its_tensors_do_not_tell(self, tiny_control, tiny_base, base_folder, tmp_path):
        pooled = copy.deepcopy(tiny_control)
        pooled.network.register_to_config(global_pool_conditions=True, controlnet_conditioning_channel_order="bgr")
        save_control(tmp_path / "pooled.safetensors", pooled, tiny_base)
        path = tmp_path / "cl.safetensors"
        convert(tmp_path / "pooled.safetensors", path, "control-lora", base=str(base_folder), rank=2)
        loaded = load_control(path, load_base(base_folder))
        assert loaded.conditional_only and json.dumps(loaded.config()) == json.dumps(pooled.config())

    def test_a_control_lora_of_low_rank_comes_back(self, tiny_control, tiny_base, base_folder, tmp_path):
        network = tiny_control.to_diffusers()
        state = {name: value.clone() for name, value in network.state_dict().items()}
        generator = torch.Generator().manual_seed(0)
        for name, value in state.items():
            if name in tiny_base.unet.state_dict() and value.ndim >= 2:
                change = torch.randn(len(value), 2, generator=generator) @ torch.randn(
                    2, value[0].numel(), generator=generator
                )
                value += 0.02 * change.view(value.shape)
        network.load_state_dict(state)
        network.save_pretrained(tmp_path / "low")
        made = convert(tmp_path / "low", tmp_path / "cl.safetensors", "control-lora", base=str(base_folder), rank=2)
        names = set(weights_of(made.path))
        assert {"lora_controlnet", "input_blocks.0.0.up", "input_blocks.0.0.down", "input_blocks.0.0.bias"} <= names
        loaded = load_control(made.path, load_base(base_folder)).file_state()
        assert state.keys() == loaded.keys()
        for name, value in state.items():
            torch.testing.assert_close(value, loaded[name], rtol=2e-3, atol=2e-3)
        with refused("incompatible", made.path):
            import tiny

            load_control(made.path, tiny.build_tiny_base(text_width=24))


@pytest.mark.parametrize("shape", [(400, 400), (320, 900), (64, 2000)])
def test_a_randomised_decomposition_is_nearly_the_best_and_always_the_same(shape):
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=generator))
    v, _ = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=generator))
    values = torch.arange(1, min(shape) + 1) ** -0.7
    change = u * values @ v.T
    state = torch.get_rng_state()
    up, down = _low_rank(change, 16)
    assert torch.equal(state, torch.get_rng_state())
    assert up.shape == (shape[0], 16) and down.shape == (16, shape[1])
    best = float(values[16:].norm())
    assert best * 0.999 <= float((change - up @ down).norm()) <= best * 1.01
    torch.manual_seed(5)
    assert torch.equal(up, _low_rank(change, 16)[0])
