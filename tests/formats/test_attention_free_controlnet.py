"""ControlNets without cross attention, such as the small ones for Stable Diffusion XL, as single files."""

from __future__ import annotations

import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file, save_file

from controlkit.errors import UserError
from controlkit.formats.convert import convert
from controlkit.formats.load import load_control
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.sampler import sample
from tiny import build_tiny_sdxl


@pytest.fixture(scope="module")
def base():
    return build_tiny_sdxl()


@pytest.fixture
def small(base, tmp_path):
    """A ControlNet without transformers, in the original layout and with no metadata."""
    torch.manual_seed(0)
    config = {key: value for key, value in base.unet.config.items() if not key.startswith("_")}
    shared = ("block_out_channels", "layers_per_block", "norm_num_groups", "cross_attention_dim", "attention_head_dim")
    told = ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
    network = ControlNetModel(
        **{key: config[key] for key in (*shared, *told)},
        down_block_types=("DownBlock2D",) * len(config["block_out_channels"]),
        mid_block_type="UNetMidBlock2D",
        conditioning_embedding_out_channels=(8, 16, 16),
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    network.save_pretrained(tmp_path / "folder")
    original = convert(tmp_path / "folder", tmp_path / "original.safetensors", "original", base=None).path
    save_file(load_file(original), tmp_path / "small.safetensors")
    return network, tmp_path / "small.safetensors"


def test_the_width_of_the_text_is_the_base_s(base, small):
    network, path = small
    control = load_control(path, base)
    assert control.network.config["cross_attention_dim"] == base.unet.config["cross_attention_dim"]
    assert all(
        torch.equal(value, control.to_diffusers().state_dict()[name]) for name, value in network.state_dict().items()
    )
    hint = control.encode(torch.rand(1, 3, 64, 64), base)
    settings = {"prompt": "red apple", "seeds": [0], "steps": 2}
    controlled = torch.cat(list(sample(base, uses=[ActiveControl(control, hint)], **settings)))
    assert (controlled - torch.cat(list(sample(base, **settings)))).abs().max() > 1e-3


def test_without_a_base_it_is_refused_with_what_to_do(small):
    with pytest.raises(UserError, match="--base"):
        load_control(small[1])
