"""LoRAs of the base: diffusers' images from the same files, beside controls, and what does not fit."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from parity import NEGATIVE, PROMPT, SEEDS, STEPS, assert_same, generators, ours, parts
from PIL import Image
from safetensors.torch import save_file

from controlkit.bases.flux import Flux
from controlkit.controls.ctrlora import BaseControlNet, CtrLoRA
from controlkit.images import to_tensor
from controlkit.sampling.generate import generate
from controlkit.sampling.loras import _of_transformer, merged, read_lora
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.residual_cache import ResidualCache
from controlkit.sampling.sampler import sample_prompts
from controlkit.sampling.saved_settings import read_settings
from controlkit.sampling.uses import ControlUse, LoraUse
from refusals import refused
from tiny import (
    build_tiny_flux,
    build_tiny_flux2,
    build_tiny_flux2_klein,
    build_tiny_qwen_image,
    build_tiny_sana,
    build_tiny_sd3,
    build_tiny_sdxl,
    build_tiny_z_image,
)

RANK = 3
UNET = "down_blocks.1.attentions.0.transformer_blocks.0"
LAYERS = [
    *(f"{UNET}.attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    f"{UNET}.ff.net.0.proj",
    "down_blocks.1.attentions.0.proj_in",
    "down_blocks.1.resnets.0.conv1",
    "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
]
TEXT = [
    f"encoder.layers.0.{name}"
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
]


def halves(base, seed=0, rank=RANK, layers=LAYERS, text=TEXT):
    """Component and module -> its two halves."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for component, names in (("unet", layers), ("text_encoder", text)):
        for name in names:
            module = getattr(base, component).get_submodule(name)
            weight = module.weight
            down = torch.randn(rank, *weight.shape[1:], generator=generator) * 0.3
            up = torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=generator) * 0.3
            made[component, name] = (down, up)
    return made


def of_kohya(layers, alpha):
    state = {}
    for (component, name), (down, up) in layers.items():
        stem = f"lora_unet_{name}" if component == "unet" else f"lora_te_text_model_{name}"
        stem = stem.replace(".", "_")
        state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(alpha)}
    return state


def of_diffusers(layers, alpha):
    """Names of today, which have no alpha: here, it is in the weights."""
    state = {}
    for (component, name), (down, up) in layers.items():
        stem = f"{component}.{name}" if component == "unet" else f"{component}.text_model.{name}"
        state |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up * (alpha / len(down))}
    return state


def of_old_diffusers(layers, alpha):
    """The attention processors' names of diffusers 0.2x."""
    state = {}
    for (component, name), (down, up) in layers.items():
        up = up * (alpha / len(down))
        if ".attn" in name:
            stem, _, last = name.replace("to_out.0", "to_out").rpartition(".")
            state |= {f"unet.{stem}.processor.{last}_lora.down.weight": down}
            state |= {f"unet.{stem}.processor.{last}_lora.up.weight": up}
        elif component == "text_encoder":
            stem = f"text_encoder.text_model.{name}.lora_linear_layer"
            state |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
        else:
            state |= {f"unet.{name}.lora.down.weight": down, f"unet.{name}.lora.up.weight": up}
    return state


WRITERS = {"kohya": of_kohya, "diffusers": of_diffusers, "diffusers of before": of_old_diffusers}


def with_loras(base, *uses, **settings):
    loras = [(read_lora(use, base), use.weight) for use in uses]
    with merged(base, loras, [use.file for use in uses]):
        return ours(base, **settings)


def theirs(pipeline, **changes):
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "pt", "eta": 0.0}
    words = {"negative_prompt": [NEGATIVE] * 2, "generator": generators()}
    return pipeline([PROMPT] * 2, **words, **{**settings, **changes}).images


@pytest.mark.parametrize("layout", WRITERS)
def test_a_lora_draws_as_diffusers(tiny_base, tmp_path, layout):
    file = tmp_path / "lora.safetensors"
    save_file(WRITERS[layout](halves(tiny_base), 2.0), file)
    made = with_loras(tiny_base, LoraUse(file=str(file), weight=0.7))
    pipeline = StableDiffusionPipeline(**parts(copy.deepcopy(tiny_base)))
    pipeline.load_lora_weights(str(file), adapter_name="lora")
    pipeline.set_adapters(["lora"], [0.7])
    expected = theirs(pipeline)
    assert_same(made, expected, 1e-3)
    assert (made - ours(tiny_base)).abs().max() > 2e-2


def test_text_encoders_alone_draw_as_diffusers(tiny_base, tmp_path):
    file = tmp_path / "lora.safetensors"
    save_file(of_diffusers(halves(tiny_base, layers=[]), RANK), file)
    pipeline = StableDiffusionPipeline(**parts(copy.deepcopy(tiny_base)))
    pipeline.load_lora_weights(str(file), adapter_name="lora")
    made = with_loras(tiny_base, LoraUse(file=str(file)))
    assert_same(made, theirs(pipeline), 1e-3)
    assert (made - ours(tiny_base)).abs().max() > 5e-3


def test_several_weighted_loras_beside_a_control_draw_as_diffusers(tiny_base, tiny_control, condition_image, tmp_path):
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_file(of_diffusers(halves(tiny_base), RANK), files[0])
    save_file(of_kohya(halves(tiny_base, seed=1, rank=2, text=[]), 1.0), files[1])
    image = to_tensor([condition_image])
    use = ActiveControl(tiny_control, tiny_control.encode(image, tiny_base), weight=0.8)
    uses = [LoraUse(file=str(file), weight=weight) for file, weight in zip(files, (0.8, -0.5), strict=True)]
    made = with_loras(tiny_base, *uses, uses=[use])
    pipeline = StableDiffusionControlNetPipeline(
        **parts(copy.deepcopy(tiny_base)), controlnet=copy.deepcopy(tiny_control.to_diffusers())
    )
    for name, file in zip("ab", files, strict=True):
        pipeline.load_lora_weights(str(file), adapter_name=name)
    pipeline.set_adapters(["a", "b"], [0.8, -0.5])
    expected = theirs(pipeline, image=image.expand(2, -1, -1, -1), controlnet_conditioning_scale=0.8)
    assert_same(made, expected, 1e-3)
    assert (made - with_loras(tiny_base, uses[0], uses=[use])).abs().max() > 1e-2
    assert (made - with_loras(tiny_base, *uses)).abs().max() > 1e-2


@pytest.mark.parametrize("names", ["diffusers", "original"])
def test_a_lora_of_xl_draws_as_diffusers(tmp_path, names):
    base = build_tiny_sdxl()
    original = {
        "down_blocks.1.attentions.0": "input_blocks_3_1",
        "mid_block.attentions.0": "middle_block_1",
        "up_blocks.0.attentions.1": "output_blocks_1_1",
    }
    text = "encoder.layers.0.self_attn.out_proj"
    state, generator = {}, torch.Generator().manual_seed(2)
    for path, stem in original.items():
        module = f"{path}.transformer_blocks.0.attn2.to_k"
        known = f"{path if names == 'diffusers' else stem}.transformer_blocks.0.attn2.to_k".replace(".", "_")
        width, inputs = base.unet.get_submodule(module).weight.shape
        state[f"lora_unet_{known}.lora_down.weight"] = torch.randn(2, inputs, generator=generator)
        state[f"lora_unet_{known}.lora_up.weight"] = torch.randn(width, 2, generator=generator)
    for which, width in (("1", 16), ("2", 12)):
        stem = f"lora_te{which}_text_model_{text}".replace(".", "_")
        state[f"{stem}.lora_down.weight"] = torch.randn(2, width, generator=generator)
        state[f"{stem}.lora_up.weight"] = torch.randn(width, 2, generator=generator)
    file = tmp_path / "lora.safetensors"
    save_file(state, file)
    lora = read_lora(LoraUse(file=str(file)), base)
    assert len(lora.layers) == 5 and not lora.notes
    words = {"prompts": [PROMPT], "negative_prompt": NEGATIVE}
    settings = {**words, "seeds": SEEDS, "steps": STEPS, "guidance": 4.0}
    plain = torch.cat(list(sample_prompts(base, **settings)))
    with merged(base, [(lora, 1.0)], ["lora"]):
        made = torch.cat(list(sample_prompts(base, **settings)))
    components = {component.name: copy.deepcopy(getattr(base, component.name)) for component in base.components[:-1]}
    scheduler = DDIMScheduler.from_config(base.scheduler_config)
    pipeline = StableDiffusionXLPipeline(**components, scheduler=scheduler)
    pipeline.load_lora_weights(str(file), adapter_name="lora")
    assert_same(made, theirs(pipeline), 1e-3)
    assert (made - plain).abs().max() > 1e-2


def test_a_folder_of_peft_is_scaled_by_its_configuration(tiny_base, tmp_path):
    layers = halves(tiny_base, text=[])
    state = {}
    for (_, name), (down, up) in layers.items():
        state |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
    save_file(state, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "alpha_pattern": {"conv1": 3}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    lora = read_lora(LoraUse(file=str(tmp_path)), tiny_base)
    assert {(name, layer.scale) for (_, name), layer in lora.layers.items()} == {
        (name, 1.0 if name.endswith("conv1") else 2.0) for name in LAYERS
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    lora = read_lora(LoraUse(file=str(tmp_path)), tiny_base)
    assert lora.layers["unet", LAYERS[0]].scale == pytest.approx(6 / RANK**0.5)
    (tmp_path / "adapter_config.json").write_text("[]")
    with refused("wrong-type", "adapter_config.json", "mapping"):
        read_lora(LoraUse(file=str(tmp_path)), tiny_base)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with refused("unsupported", "DoRA"):
        read_lora(LoraUse(file=str(tmp_path)), tiny_base)
    (tmp_path / "adapter_config.json").unlink()
    save_file(state, tmp_path / "adapter_model.safetensors", {"lora_adapter_metadata": '{"unet.lora_alpha": 6'})
    with refused("damaged-file", "lora_adapter_metadata", tmp_path):
        read_lora(LoraUse(file=str(tmp_path)), tiny_base)


@pytest.mark.parametrize(("layout", "name"), [("kohya", "lora"), ("diffusers", "lora"), ("kohya", "adapter_model")])
def test_the_configuration_of_another_adapter_scales_no_file(tiny_base, tmp_path, layout, name):
    file = tmp_path / f"{name}.safetensors"
    save_file(WRITERS[layout](halves(tiny_base), 2.0), file)
    alone = read_lora(LoraUse(file=str(file)), tiny_base)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 24}))
    beside = read_lora(LoraUse(file=str(file)), tiny_base)
    assert all(layer.scale == alone.layers[place].scale == 1.0 for place, layer in beside.layers.items())


def test_a_file_saved_by_diffusers_keeps_its_alpha(tiny_base, tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet = copy.deepcopy(tiny_base.unet)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=5, target_modules=["to_q"], init_lora_weights=False))
    metadata = {"unet": unet.peft_config["default"].to_dict()}
    layers = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata["unet"]
    )
    lora = read_lora(LoraUse(file=str(tmp_path)), tiny_base)
    assert lora.layers and {layer.scale for layer in lora.layers.values()} == {2.5}
    x_t, text = torch.randn(1, 4, 16, 16), tiny_base.encode_text([PROMPT])
    with merged(tiny_base, [(lora, 1.0)], ["lora"]), torch.no_grad():
        made = tiny_base.predict(x_t, torch.tensor([500]), text)
    expected = unet(x_t, torch.tensor([500]), encoder_hidden_states=text.tokens).sample
    assert torch.allclose(made, expected, atol=1e-4)


def test_layers_in_a_decoder_that_a_control_replaces_are_noted(tiny_base, tiny_control, condition_image, tmp_path):
    file, image = tmp_path / "lora.safetensors", tmp_path / "image.png"
    save_file(of_kohya(halves(tiny_base, text=[]), 1.0), file)
    Image.fromarray(condition_image).save(image)
    own = copy.deepcopy(tiny_control)
    own.unlock(tiny_base)

    def notes(control, **settings):
        use = ControlUse(control="mine", image=str(image), prepared=True, **settings)
        request = GenerateRequest(prompt=PROMPT, steps=1, loras=(LoraUse(file=str(file)),), controls=(use,))
        made = generate(request, base=tiny_base, controls=[control])
        return [note for note in made.notes if str(file) in note]

    (note,) = notes(own)
    assert f"1 of {len(LAYERS)} layers" in note and "mine" in note
    assert not notes(tiny_control) and not notes(own, weight=0.0)


@pytest.mark.parametrize(
    ("build", "place"),
    [
        (build_tiny_sd3, "transformer_blocks.1.attn.to_q"),
        (build_tiny_flux, "transformer_blocks.1.attn.to_q"),
        (build_tiny_z_image, "layers.1.attention.to_q"),
        (build_tiny_qwen_image, "transformer_blocks.1.attn.to_q"),
        (build_tiny_sana, "transformer_blocks.1.attn1.to_q"),
        (build_tiny_flux2, "transformer_blocks.1.attn.to_q"),
        (build_tiny_flux2_klein, "transformer_blocks.1.attn.to_add_out"),
    ],
)
def test_a_lora_of_a_transformer_is_merged(build, place, tmp_path):
    base = build()
    width = base.transformer.get_submodule(place).in_features
    down, up = torch.randn(2, width), torch.randn(width, 2)
    file = tmp_path / "lora.safetensors"
    save_file({f"transformer.{place}.lora_A.weight": down, f"transformer.{place}.lora_B.weight": up}, file)
    before = base.transformer.get_submodule(place).weight.clone()
    with merged(base, [(read_lora(LoraUse(file=str(file)), base), 0.5)], ["lora"]):
        assert torch.allclose(base.transformer.get_submodule(place).weight, before + 0.5 * up @ down, atol=1e-6)
    assert torch.equal(base.transformer.get_submodule(place).weight, before)


def test_a_control_lora_is_to_be_passed_as_a_control(tmp_path):
    base, tensors = build_tiny_flux(), {}
    for half, shape in (("A", (2, 32)), ("B", (16, 2))):
        tensors[f"transformer.x_embedder.lora_{half}.weight"] = torch.zeros(shape)
    save_file(tensors, tmp_path / "canny.safetensors")
    with refused("wrong-kind", "x_embedder", "--control", tmp_path / "canny.safetensors"):
        read_lora(LoraUse(file=str(tmp_path / "canny.safetensors")), base)


@pytest.mark.parametrize("tool", ["kohya", "comfyui", "xlabs"])
def test_loras_of_flux_under_names_of_other_tools(tool):
    """They have one layer for query, key and value; the widths of FLUX.1 are fixed in diffusers."""
    down, up, alpha = torch.randn(2, 3072), torch.randn(9216, 2), torch.tensor(1.0)
    kohya, xlabs = "lora_unet_double_blocks_7_img_attn_qkv", "double_blocks.7.processor.qkv_lora1"
    comfyui = "diffusion_model.double_blocks.7.img_attn.qkv"
    tensors = {
        "kohya": {f"{kohya}.lora_down.weight": down, f"{kohya}.lora_up.weight": up, f"{kohya}.alpha": alpha},
        "comfyui": {f"{comfyui}.lora_A.weight": down, f"{comfyui}.lora_B.weight": up},
        "xlabs": {f"{xlabs}.down.weight": down, f"{xlabs}.up.weight": up},
    }[tool]
    # diffusers leaves out layers of T5 and biases of a whole file without a word.
    left = {
        "lora_te3_encoder_block_0_layer_0_SelfAttention_k": ("lora_down.weight", "lora_up.weight", "alpha"),
        "lora_unet_double_blocks_99_img_attn_proj": ("lora_down.weight", "lora_up.weight", "alpha"),
        "lora_transformer_foo": ("lora_down.weight", "lora_up.weight"),
        "diffusion_model.double_blocks.99.img_attn.proj": ("lora_A.weight", "lora_B.weight"),
        "lora_unet_double_blocks_7_img_attn_qkv": ("diff_b",),
    }
    unknown = {f"{layer}.{part}": torch.ones(2, 2) for layer, parts in left.items() for part in parts}
    text = {f"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_{half}.weight": down for half in ("down", "up")}
    made = _of_transformer({**tensors, **unknown, **text}, Flux)
    assert all(made.pop(name) is value for name, value in unknown.items())
    assert {name.partition(".")[0] for name in made} == {"transformer", "text_encoder"} and len(made) == 6 + 2
    for which, part in zip("qkv", up.chunk(3), strict=True):
        name = f"transformer.transformer_blocks.7.attn.to_{which}.lora"
        product = made[f"{name}_B.weight"] @ made[f"{name}_A.weight"]
        assert torch.allclose(product, part @ down / (2 if tool == "kohya" else 1), atol=1e-5)


@pytest.mark.parametrize(
    ("names", "alpha"),
    [
        ("diffusion_model.layers.1.attention.to_q.lora_A diffusion_model.layers.1.attention.to_q.lora_B", None),
        ("diffusion_model.layers.1.attention.to_q.lora_down diffusion_model.layers.1.attention.to_q.lora_up", 1.0),
        ("lora_unet_layers_1_attention_to_q.lora_down lora_unet_layers_1_attention_to_q.lora_up", 1.0),
    ],
)
def test_loras_of_z_image_under_names_of_other_tools(names, alpha, tmp_path):
    """ComfyUI's, ai-toolkit's and kohya's."""
    base, place = build_tiny_z_image(), "layers.1.attention.to_q"
    halves = [torch.randn(2, 32), torch.randn(32, 2)]
    tensors = {f"{name}.weight": half for name, half in zip(names.split(), halves, strict=True)}
    if alpha is not None:
        tensors[f"{names.split()[0].removesuffix('.lora_down')}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "lora.safetensors")
    before = base.transformer.get_submodule(place).weight.clone()
    lora = read_lora(LoraUse(file=str(tmp_path / "lora.safetensors")), base)
    with merged(base, [(lora, 1.0)], ["lora"]):
        added = base.transformer.get_submodule(place).weight - before
    assert torch.allclose(added, halves[1] @ halves[0] * (1 if alpha is None else alpha / 2), atol=1e-5)
    assert not lora.notes


@pytest.mark.parametrize(
    "names",
    [
        "diffusion_model.{}.lora_A diffusion_model.{}.lora_B",  # ai-toolkit's
        "diffusion_model.{}.lora_down diffusion_model.{}.lora_up",
        "lora_unet_{_}.lora_down lora_unet_{_}.lora_up",  # musubi-tuner's
        "{}.lora_A.default {}.lora_B.default",  # DiffSynth-Studio's
    ],
)
@pytest.mark.parametrize(
    "place",
    ["transformer_blocks.1.attn.to_q", "transformer_blocks.1.attn.add_k_proj", "transformer_blocks.1.img_mod.1"],
)
def test_loras_of_qwen_image_under_names_of_other_tools(names, place, tmp_path):
    base = build_tiny_qwen_image()
    layer = base.transformer.get_submodule(place)
    halves = [torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)]
    named = names.replace("{}", place).replace("{_}", place.replace(".", "_")).split()
    save_file({f"{name}.weight": half for name, half in zip(named, halves, strict=True)}, tmp_path / "lora.safetensors")
    before = layer.weight.clone()
    lora = read_lora(LoraUse(file=str(tmp_path / "lora.safetensors")), base)
    with merged(base, [(lora, 1.0)], ["lora"]):
        added = base.transformer.get_submodule(place).weight - before
    assert torch.allclose(added, halves[1] @ halves[0], atol=1e-5) and not lora.notes


FLUX2_LAYERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "double_blocks.1.img_attn.proj": "transformer_blocks.1.attn.to_out.0",
    "double_blocks.1.txt_mlp.0": "transformer_blocks.1.ff_context.linear_in",
    "single_blocks.1.linear1": "single_transformer_blocks.1.attn.to_qkv_mlp_proj",
}
"""Layers of FLUX.2 as the original calls them, and as diffusers does."""
IN_BLOCKS = [layer for layer in FLUX2_LAYERS if "_blocks" in layer]


@pytest.mark.parametrize(
    ("names", "layer"),
    [
        *(("diffusion_model.{}.lora_A diffusion_model.{}.lora_B", layer) for layer in FLUX2_LAYERS),  # ai-toolkit's
        *(("diffusion_model.{}.lora_down diffusion_model.{}.lora_up alpha", layer) for layer in FLUX2_LAYERS),
        *(("base_model.model.{}.lora_A base_model.model.{}.lora_B", layer) for layer in FLUX2_LAYERS),
        *(("diffusion_model.{}.down diffusion_model.{}.up alpha", layer) for layer in FLUX2_LAYERS),
        *(("diffusion_model.{}.lora.down diffusion_model.{}.lora.up", layer) for layer in FLUX2_LAYERS),
        *(("lora_unet_{_}.lora_down lora_unet_{_}.lora_up alpha", layer) for layer in IN_BLOCKS),  # kohya's
    ],
)
def test_loras_of_flux2_under_names_of_other_tools(names, layer, tmp_path, capsys):
    base, place = build_tiny_flux2(), FLUX2_LAYERS[layer]
    weight = base.transformer.get_submodule(place).weight
    halves = [torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)]
    named = names.replace("{}", layer).replace("{_}", layer.replace(".", "_")).split()
    state = {f"{name}.weight": half for name, half in zip(named, halves, strict=False)}
    scale = 1.0
    if "alpha" in names:
        scale, state[f"{named[0].rpartition('.')[0]}.alpha"] = 0.25, torch.tensor(0.5)
    save_file(state, tmp_path / "lora.safetensors")
    before = weight.clone()
    lora = read_lora(LoraUse(file=str(tmp_path / "lora.safetensors")), base)
    with merged(base, [(lora, 1.0)], ["lora"]):
        added = base.transformer.get_submodule(place).weight - before
    expected = halves[1] @ halves[0] * scale
    if "adaLN" in layer:  # the original has shift before scale
        expected = torch.cat(expected.chunk(2)[::-1])
    assert torch.allclose(added, expected, atol=1e-5) and not lora.notes
    assert not capsys.readouterr().err


@pytest.mark.parametrize("layer", ["attention.qkv", "attention.out", "feed_forward.w1"])
def test_layers_of_z_image_as_the_original_calls_them(layer, tmp_path):
    """ComfyUI's: query, key and value are one layer."""
    base = build_tiny_z_image()
    width = {"attention.qkv": 96, "attention.out": 32, "feed_forward.w1": 85}[layer]
    down, up = torch.randn(2, 32), torch.randn(width, 2)
    name = f"diffusion_model.layers.1.{layer}"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "lora.safetensors")
    block = base.transformer.layers[1]
    own = {
        "attention.qkv": ["attention.to_q", "attention.to_k", "attention.to_v"],
        "attention.out": ["attention.to_out.0"],
    }
    places = own.get(layer, [layer])
    before = torch.cat([block.get_submodule(place).weight.clone() for place in places])
    lora = read_lora(LoraUse(file=str(tmp_path / "lora.safetensors")), base)
    with merged(base, [(lora, 1.0)], ["lora"]):
        after = torch.cat([block.get_submodule(place).weight for place in places])
        assert torch.allclose(after - before, up @ down, atol=1e-5)
    assert not lora.notes


def test_layers_of_flux_that_fit_nowhere_are_named(tmp_path):
    base, place = build_tiny_flux(), "transformer_blocks.1.attn.to_q"
    halves = {
        f"transformer.{place}.lora_A.weight": torch.ones(2, 16),
        f"transformer.{place}.lora_B.weight": torch.ones(16, 2),
    }
    layer = "lora_te3_encoder_block_0_layer_0_SelfAttention_k"
    save_file({**halves, f"{layer}.lora_down.weight": torch.ones(2, 4)}, tmp_path / "lora.safetensors")
    lora = read_lora(LoraUse(file=str(tmp_path / "lora.safetensors")), base)
    assert len(lora.layers) == 1 and layer in lora.notes[0]


def test_the_base_is_as_before_also_after_an_error(tiny_base, tmp_path):
    file = tmp_path / "lora.safetensors"
    save_file(of_kohya(halves(tiny_base), 1.0), file)
    before = {name: value.clone() for name, value in tiny_base.unet.state_dict().items()}
    with (
        pytest.raises(RuntimeError, match="stop"),
        merged(tiny_base, [(read_lora(LoraUse(file=str(file)), tiny_base), 1.0)], ["lora"]),
    ):
        assert tiny_base.merged == ("lora",)
        raise RuntimeError("stop")
    assert tiny_base.merged == ()
    assert all(torch.equal(value, before[name]) for name, value in tiny_base.unet.state_dict().items())


def test_tensors_that_fit_no_layer_are_named(tiny_base, tmp_path):
    file = tmp_path / "lora.safetensors"
    state = of_kohya(halves(tiny_base), 1.0)
    other = "lora_unet_up_blocks_9_attentions_0_transformer_blocks_0_attn1_to_q"
    more = {f"{other}.lora_down.weight": torch.ones(1, 4), f"{other}.lora_up.weight": torch.ones(4, 1)}
    save_file({**state, **more, "stray": torch.ones(1), "unet.conv_in.lora_A.weight": torch.ones(1, 4, 3, 3)}, file)
    (note,) = read_lora(LoraUse(file=str(file)), tiny_base).notes
    for name in ("up_blocks.9", "stray", "unet.conv_in", "lora.safetensors"):
        assert name in note
    save_file(more, file)
    with refused("incompatible", "lora.safetensors", "up_blocks.9"):
        read_lora(LoraUse(file=str(file)), tiny_base)
    save_file({"unet.conv_in.lora_A.weight": torch.ones(1, 7), "unet.conv_in.lora_B.weight": torch.ones(16, 1)}, file)
    with refused("incompatible", "unet.conv_in", "16 x 7", "16 x 36"):
        read_lora(LoraUse(file=str(file)), tiny_base)


@pytest.mark.parametrize("name", ["lora_unet_x.hada_w1_a", "lora_unet_x.lokr_w1", "lora_unet_x.dora_scale"])
def test_other_kinds_are_refused_by_name(tiny_base, tmp_path, name):
    file = tmp_path / "lora.safetensors"
    save_file({name: torch.ones(1)}, file)
    with refused("unsupported", "lora.safetensors", "LoRA"):
        read_lora(LoraUse(file=str(file)), tiny_base)
    with refused("missing-file", "none"):
        read_lora(LoraUse(file=str(tmp_path / "none")), tiny_base)


def test_the_cache_of_residuals_knows_loras(tiny_base, condition_image, tmp_path):
    shared = BaseControlNet.for_base(tiny_base)
    shared.add_adapter("canny", rank=2, seed=0)
    control = CtrLoRA(shared.eval().requires_grad_(False), "canny", "canny")
    use = ActiveControl(control, control.encode(to_tensor([condition_image]), tiny_base))
    files = [tmp_path / "unet.safetensors", tmp_path / "text.safetensors"]
    save_file(of_kohya(halves(tiny_base, text=[]), 1.0), files[0])
    save_file(of_kohya(halves(tiny_base, layers=[]), 1.0), files[1])
    cache = ResidualCache()
    plain = ours(tiny_base, uses=[use], cache=cache)
    for count, file in enumerate(files, 2):
        lora = LoraUse(file=str(file))
        made = with_loras(tiny_base, lora, uses=[use], cache=cache)
        assert torch.equal(made, with_loras(tiny_base, lora, uses=[use]))
        assert cache.misses == count * STEPS and cache.hits == 0
    assert torch.equal(ours(tiny_base, uses=[use], cache=cache), plain) and cache.hits == STEPS


def test_settings_are_saved_with_the_image_and_repeat_it(tiny_base, tmp_path):
    file = tmp_path / "lora@2.safetensors"
    save_file(of_kohya(halves(tiny_base), 1.0), file)
    request = GenerateRequest(prompt=PROMPT, loras=(LoraUse.parse(f"{file}@0.5"),), steps=3)
    assert request.loras == (LoraUse(file=str(file), weight=0.5),)
    assert LoraUse.parse(str(file)) == LoraUse(file=str(file))
    assert GenerateRequest.from_json(json.loads(json.dumps(request.to_json()))) == request
    plain = generate(GenerateRequest(prompt=PROMPT, steps=3), base=tiny_base)
    made = generate(request, base=tiny_base)
    assert made.images[0].image.tobytes() != plain.images[0].image.tobytes()
    (path,) = made.save(tmp_path / "out")
    saved = read_settings(path)
    again = generate(saved.to_request(), base=tiny_base)
    assert again.images[0].image.tobytes() == made.images[0].image.tobytes() and not saved.differences(again)
    save_file(of_kohya(halves(tiny_base, seed=4), 1.0), file)
    changed = generate(saved.to_request(), base=tiny_base)
    assert [str(file) in note and "SHA-256" in note for note in saved.differences(changed)] == [True]
    with refused("usage", "x"):
        LoraUse.parse("lora.safetensors@x")


def test_weights_on_an_axis_draw_as_requests_of_their_own(tiny_base, tmp_path):
    files = [tmp_path / "ink.safetensors", tmp_path / "clay.safetensors"]
    for seed, file in enumerate(files):
        save_file(of_kohya(halves(tiny_base, seed), 1.0), file)
    uses = tuple(LoraUse(file=str(file)) for file in files)
    axes = ({"lora.ink.weight": [0, 0.7]}, {"lora.clay.weight": [0, 1.2]})
    request = GenerateRequest(prompt=PROMPT, loras=uses, steps=2, xy=axes)
    whole = generate(request, base=tiny_base)
    assert len({part.images[0].image.tobytes() for part in whole.parts}) == 4
    for part, (ink, clay) in zip(whole.parts, [(0, 0), (0, 1.2), (0.7, 0), (0.7, 1.2)], strict=True):
        alone = tuple(LoraUse(file=use.file, weight=weight) for use, weight in zip(uses, (ink, clay), strict=True))
        single = generate(GenerateRequest(prompt=PROMPT, loras=alone, steps=2), base=tiny_base)
        assert part.images[0].image.tobytes() == single.images[0].image.tobytes()
    whole.save(tmp_path / "out")
    saved = read_settings(tmp_path / "out" / "settings.json")
    again = generate(saved.to_request(), base=tiny_base)
    assert [part.images[0].image.tobytes() for part in again.parts] == [
        part.images[0].image.tobytes() for part in whole.parts
    ]
    assert saved.to_request(loras=[vars(uses[0])]).xy == ()
    files[1].unlink()
    drawn: list[object] = []
    with refused("missing-file", str(files[1])):
        generate(request, base=tiny_base, on_images=drawn.append)
    assert not drawn


def test_the_command_line_builds_the_same_request():
    import argparse

    from controlkit.apps import generate as verb

    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    verb.add_arguments(parser)
    request, _ = verb._request(parser.parse_args(["a", "--lora", "x.safetensors@0.5", "--lora", "y.pt"]))
    assert request == GenerateRequest(
        prompt="a", loras=(LoraUse(file="x.safetensors", weight=0.5), LoraUse(file="y.pt"))
    )
