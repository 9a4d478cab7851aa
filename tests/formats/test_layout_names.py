"""Names and shapes at full size, on the meta device, against counts and against diffusers' own converter."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

from controlkit.bases.stable_diffusion import SD15_UNET
from controlkit.controls import t2i_adapter as t2i
from controlkit.controls.controlnet import ControlNet
from controlkit.controls.ctrlora import BaseControlNet, CtrLoRA
from controlkit.controls.ctrlora.formats import empty_lora
from controlkit.controls.encoder_copy.network import network_of
from controlkit.controls.encoder_copy.original import from_original, to_original
from controlkit.controls.file_format import Checkpoint, Reference, TensorFile
from controlkit.controls.t2i_adapter import T2IAdapterControl

SD21 = {
    **SD15_UNET,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
SDXL = {
    **SD21,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def controlnet_of(unet_config):
    with torch.device("meta"):
        return ControlNetModel.from_config(network_of(unet_config).config)


def shapes(tensors):
    return {name: tuple(value.shape) for name, value in tensors.items()}


def read_back(kind, tensors):
    return from_original(kind, TensorFile(Path("file"), {}), "it", tensors, Reference())


@pytest.mark.parametrize(
    ("unet_config", "tensors", "parameters"),
    [(SD15_UNET, 340, 361_279_120), (SD21, 340, 364_228_240), (SDXL, 844, 1_251_014_160)],
    ids=["SD1.5", "SD2.1", "SDXL"],
)
def test_a_controlnet_under_the_original_names(unet_config, tensors, parameters):
    network = controlnet_of(unet_config)
    state = dict(network.state_dict())
    original = to_original(Checkpoint(ControlNet.kind, dict(network.config), state))
    assert len(original) == tensors
    assert sum(value.numel() for value in original.values()) == parameters
    theirs = convert_controlnet_checkpoint(dict(original), dict(network.config))
    # diffusers' converter leaves out the embedding of sizes, which SDXL has.
    common = [name for name in state if not name.startswith("add_embedding.")]
    assert set(theirs) == set(common)
    assert all(theirs[name] is state[name] for name in common)
    back = read_back(ControlNet, original)
    assert all(back.tensors[name] is value for name, value in state.items())
    wanted = dict(network.config)
    assert all(_plain(wanted[key]) == _plain(value) for key, value in back.config.items())


def test_names_of_sd15_s_controlnet_as_the_original_code_has_them():
    original = shapes(to_original(Checkpoint(ControlNet.kind, {}, dict(controlnet_of(SD15_UNET).state_dict()))))
    expected = {
        "time_embed.0.weight": (1280, 320),
        "time_embed.2.bias": (1280,),
        "input_blocks.0.0.weight": (320, 4, 3, 3),
        "input_blocks.1.0.in_layers.0.weight": (320,),
        "input_blocks.1.0.in_layers.2.weight": (320, 320, 3, 3),
        "input_blocks.1.0.emb_layers.1.weight": (320, 1280),
        "input_blocks.1.0.out_layers.3.weight": (320, 320, 3, 3),
        "input_blocks.1.1.norm.weight": (320,),
        "input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.bias": (320,),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "input_blocks.1.1.transformer_blocks.0.ff.net.0.proj.weight": (2560, 320),
        "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "input_blocks.7.0.skip_connection.weight": (1280, 640, 1, 1),
        "input_blocks.9.0.op.bias": (1280,),
        "input_blocks.11.0.out_layers.0.bias": (1280,),
        "middle_block.0.in_layers.2.weight": (1280, 1280, 3, 3),
        "middle_block.1.transformer_blocks.0.norm3.weight": (1280,),
        "middle_block.2.emb_layers.1.bias": (1280,),
        "middle_block_out.0.weight": (1280, 1280, 1, 1),
        "zero_convs.0.0.bias": (320,),
        "zero_convs.11.0.weight": (1280, 1280, 1, 1),
        "input_hint_block.0.weight": (16, 3, 3, 3),
        "input_hint_block.2.weight": (16, 16, 3, 3),
        "input_hint_block.12.weight": (256, 96, 3, 3),
        "input_hint_block.14.weight": (320, 256, 3, 3),
    }
    assert expected == {name: original.get(name) for name in expected}
    assert len({name.split(".")[1] for name in original if name.startswith("input_hint_block")}) == 8


def test_names_of_sdxl_s_controlnet_as_the_original_code_has_them():
    original = shapes(to_original(Checkpoint(ControlNet.kind, {}, dict(controlnet_of(SDXL).state_dict()))))
    assert original["label_emb.0.0.weight"] == (1280, 2816)
    assert original["input_blocks.8.1.proj_in.weight"] == (1280, 1280)
    assert "input_blocks.8.1.transformer_blocks.9.norm3.weight" in original
    assert "input_blocks.5.1.transformer_blocks.1.norm3.weight" in original
    assert not any(name.startswith("input_blocks.2.1.") for name in original)


def test_the_pair_of_ctrlora_at_full_size():
    with torch.device("meta"):
        control = BaseControlNet(network_of(SD15_UNET))
        control.add_adapter("a", 128)
    config = control.config()
    base = to_original(Checkpoint(BaseControlNet.kind, config, dict(control.file_state())))
    assert (len(base), sum(v.numel() for v in base.values())) == (324, 360_192_640)
    with torch.device("meta"):
        lora = empty_lora(base)
    adapter = to_original(Checkpoint(CtrLoRA.kind, config, control.adapter_state_dict("a")))
    assert (len(adapter), sum(v.numel() for v in adapter.values())) == (246, 36_945_536)
    in_adapter = {name for name in adapter if ".lora_layer." in name}
    assert set(lora) == in_adapter and len(lora) == 164
    # The reference picks the other tensors of an adapter by these words (scripts/tool_extract_weights.py:22-32).
    words = ("zero_convs", "middle_block_out", "norm")
    assert set(adapter) - in_adapter == {name for name in base if any(word in name for word in words)}
    assert shapes(adapter)["middle_block.1.transformer_blocks.0.ff.net.0.proj.lora_layer.up.weight"] == (10240, 128)
    assert shapes(adapter)["input_blocks.1.1.transformer_blocks.0.attn2.to_k.lora_layer.down.weight"] == (128, 768)
    assert shapes(adapter)["time_embed.0.lora_layer.down.weight"] == (128, 320)
    for kind, tensors, mine in (
        (BaseControlNet, base, control.file_state()),
        (CtrLoRA, adapter, control.adapter_state_dict("a")),
    ):
        back = read_back(kind, tensors)
        assert list(back.tensors) == list(mine)
        assert back.config["attention_head_dim"] == 8


@pytest.mark.parametrize(
    ("options", "parameters", "first", "last"),
    [
        ({}, 77_374_400, "conv_in.weight", "body.7.block2.weight"),
        ({"in_channels": 1}, 77_005_760, "conv_in.weight", "body.7.block2.weight"),
        (
            {"adapter_type": "full_adapter_xl", "downscale_factor": 16},
            79_033_280,
            "body.0.block1.bias",
            "body.2.in_conv.bias",
        ),
        (
            {"adapter_type": "light_adapter", "channels": [320, 640, 1280], "num_res_blocks": 4},
            18_689_200,
            "body.0.in_conv.weight",
            "body.3.body.3.block2.weight",
        ),
    ],
    ids=["colour", "grey", "XL", "light"],
)
def test_a_t2i_adapter_at_full_size(options, parameters, first, last):
    with torch.device("meta"):
        network = T2IAdapter(**options)
    state = dict(network.state_dict())
    assert sum(value.numel() for value in state.values()) == pytest.approx(parameters, rel=3e-3)
    original = t2i.to_original(Checkpoint(T2IAdapterControl.kind, dict(network.config), state))
    assert {first, last} <= set(original)
    assert not any(re.match("adapter|.*resnets", name) for name in original)
    back = t2i.from_original(T2IAdapterControl, TensorFile(Path("file"), original), Reference(), "it")
    assert all(back.tensors[name] is value for name, value in state.items())
    assert {key: _plain(network.config[key]) for key in back.config} == {k: _plain(v) for k, v in back.config.items()}


def _plain(value):
    return list(value) if isinstance(value, list | tuple) else value
