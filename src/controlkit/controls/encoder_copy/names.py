"""Key mapping between diffusers' names and the original code's, for a UNet's encoder and controls that copy it.

Original: CompVis/stable-diffusion, ldm/modules/diffusionmodules/openaimodel.py, and lllyasviel/ControlNet,
cldm/cldm.py. There `input_blocks` numbers the first convolution, layers and downsamplers consecutively; diffusers has
blocks of layers. The mapping follows from the number of layers in each block, which comes from a file's own names, so
it works for any model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from controlkit.controls.encoder_copy.network import HEADS

RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
"""Module of a ResNet block in diffusers -> in the original code."""
_NOT_IN_SHAPES = (
    HEADS,
    "num_attention_heads",
    "norm_num_groups",
    "norm_eps",
    "act_fn",
    "flip_sin_to_cos",
    "freq_shift",
    "downsample_padding",
    "mid_block_scale_factor",
    "only_cross_attention",
    "upcast_attention",
    "resnet_time_scale_shift",
    "addition_embed_type",
    "addition_time_embed_dim",
    "class_embed_type",
)
"""Settings that a control shares with the base's UNet and shapes do not determine."""
_MUST_MATCH = ("block_out_channels", "layers_per_block", "down_block_types", "cross_attention_dim")
"""Settings that must be equal in a control and its base."""


@dataclass(frozen=True)
class Structure:
    """Blocks and layers of an encoder, its middle block and its hint network."""

    blocks: tuple[tuple[bool, ...], ...]
    """Per block, per layer: whether it has a transformer."""
    mid: bool
    """Whether the middle block has a transformer between two ResNet blocks."""
    hint: int
    """Number of convolutions of the hint network; 0 without one."""
    label: str = "add_embedding"
    """diffusers' name of the size or class embedding."""

    @classmethod
    def of_original(cls, names: Collection[str], label: str = "add_embedding") -> Structure:
        """From the original's names in a file, of a network or an adapter.

        Raises:
            ValueError: they are not those of such a network.
        """
        parts: dict[int, set[str]] = {}
        for name in names:
            if match := re.match(r"input_blocks\.(\d+)\.(\d)\.(\w+)", name):
                index, part, inner = int(match[1]), match[2], match[3]
                parts.setdefault(index, set()).add("halving" if inner == "op" else part)
        blocks: list[list[bool]] = [[]]
        for index in range(1, max(parts, default=0) + 1):
            inside = parts.get(index, set())
            if "0" in inside:
                blocks[-1].append("1" in inside)
            else:  # an adapter has no tensors in a downsampler
                blocks.append([])
        if not all(blocks):
            raise ValueError("its input_blocks are not those of a UNet's encoder")
        hints = {name.split(".")[1] for name in names if name.startswith("input_hint_block.")}
        mid = any(re.match(r"middle_block\.1\.(norm|proj_in|transformer_blocks)", name) for name in names)
        return cls(tuple(map(tuple, blocks)), mid, len(hints), label)

    @classmethod
    def of_diffusers(cls, names: Collection[str]) -> Structure:
        """From diffusers' names in a file, of a network or an adapter.

        Raises:
            ValueError: they are not those of such a network.
        """
        layers_of_block: dict[int, dict[int, bool]] = {}
        for name in names:
            if match := re.match(r"down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.", name):
                layers = layers_of_block.setdefault(int(match[1]), {})
                layer = int(match[3])
                layers[layer] = layers.get(layer, False) or match[2] == "attentions"
        blocks = [
            [layers_of_block[block][layer] for layer in sorted(layers_of_block[block])]
            for block in sorted(layers_of_block)
        ]
        if not blocks or sorted(layers_of_block) != list(range(len(blocks))):
            raise ValueError("its down_blocks are not those of a UNet's encoder")
        hints = {name.rpartition(".")[0] for name in names if name.startswith("controlnet_cond_embedding.")}
        label = "class_embedding" if any(name.startswith("class_embedding.") for name in names) else "add_embedding"
        mid = any(name.startswith("mid_block.attentions.") for name in names)
        return cls(tuple(map(tuple, blocks)), mid, len(hints), label)

    def modules(self) -> dict[str, str]:
        """Path of a module in diffusers' names -> in the original's."""
        paths = {
            "time_embedding.linear_1": "time_embed.0",
            "time_embedding.linear_2": "time_embed.2",
            f"{self.label}.linear_1": "label_emb.0.0",
            f"{self.label}.linear_2": "label_emb.0.2",
            "conv_in": "input_blocks.0.0",
            "controlnet_mid_block": "middle_block_out.0",
        }
        index = 1
        for block, layers in enumerate(self.blocks):
            path = f"down_blocks.{block}"
            for layer, transformer in enumerate(layers):
                paths |= _resnet(f"{path}.resnets.{layer}", f"input_blocks.{index}.0")
                if transformer:
                    paths[f"{path}.attentions.{layer}"] = f"input_blocks.{index}.1"
                index += 1
            if block + 1 < len(self.blocks):
                paths[f"{path}.downsamplers.0.conv"] = f"input_blocks.{index}.0.op"
                index += 1
        paths |= {f"controlnet_down_blocks.{place}": f"zero_convs.{place}.0" for place in range(index)}
        paths |= _resnet("mid_block.resnets.0", "middle_block.0")
        paths |= _resnet("mid_block.resnets.1", f"middle_block.{2 if self.mid else 1}")
        if self.mid:
            paths["mid_block.attentions.0"] = "middle_block.1"
        last = self.hint - 1
        for place in range(self.hint):
            name = "conv_in" if place == 0 else "conv_out" if place == last else f"blocks.{place - 1}"
            paths[f"controlnet_cond_embedding.{name}"] = f"input_hint_block.{2 * place}"
        return paths

    def to_original(self) -> Callable[[str], str | None]:
        """diffusers' name of a tensor => the original's; None if there is none."""
        return _renamer(self.modules())

    def to_diffusers(self) -> Callable[[str], str | None]:
        """The original's name of a tensor => diffusers'; None if there is none."""
        return _renamer({original: own for own, original in self.modules().items()})


def config_of(tensors: Mapping[str, Tensor], unet_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config of a network, or of an adapter's base control, from tensors with diffusers' names.

    Shapes determine nearly all of it. The rest comes from `unet_config` if that matches, else from Stable Diffusion 1,
    2 and XL; if neither is known, the number of attention heads is left out.

    Raises:
        ValueError: the tensors are not those of such a network.
    """
    structure = Structure.of_diffusers(tensors)
    layers = {len(block) for block in structure.blocks}
    if len(layers) != 1:
        raise ValueError(
            "its blocks differ in their number of layers, which diffusers' ControlNetModel does not support"
        )
    types = ["CrossAttnDownBlock2D" if all(block) else "DownBlock2D" for block in structure.blocks]
    channels = [_out(tensors, f"down_blocks.{b}.resnets.0.time_emb_proj") for b in range(len(types))]
    attentions = [path for path in (_attention(b, t) for b, t in enumerate(types)) if path]
    attentions += ["mid_block.attentions.0"] if structure.mid else []
    depths = [_depth(tensors, f"down_blocks.{b}.attentions.0") or 1 for b in range(len(types))]
    width, linear = _text_settings(tensors, attentions, unet_config)
    config: dict[str, Any] = {
        "block_out_channels": channels,
        "layers_per_block": layers.pop(),
        "down_block_types": types,
        "mid_block_type": "UNetMidBlock2DCrossAttn" if structure.mid else "UNetMidBlock2D",
        "cross_attention_dim": width,
        "transformer_layers_per_block": depths if set(depths) != {1} else 1,
        "use_linear_projection": linear,
        **_default_settings(channels, width, linear),
        **_labels(tensors),
    }
    if "conv_in.weight" in tensors:
        config["in_channels"] = tensors["conv_in.weight"].shape[1]
    config |= _hint_config(tensors)
    required = _MUST_MATCH if attentions else tuple(key for key in _MUST_MATCH if key != "down_block_types")
    if unet_config is not None and all(_same(config[key], unet_config.get(key)) for key in required):
        config |= {key: unet_config[key] for key in _NOT_IN_SHAPES if key in unet_config}
    return config


def _text_settings(
    tensors: Mapping[str, Tensor], attentions: list[str], unet_config: Mapping[str, Any] | None
) -> tuple[int, bool]:
    """Width of the text, and whether the transformers project with linear layers.

    Raises:
        ValueError: there is no cross attention and no base to infer them from.
    """
    if not attentions:
        if unet_config is None:
            raise ValueError("without cross attention, its text width is unknown; pass the base (--base)")
        return unet_config["cross_attention_dim"], bool(unet_config.get("use_linear_projection"))
    width = _in(tensors, f"{attentions[0]}.transformer_blocks.0.attn2.to_k")
    projection = tensors.get(f"{attentions[0]}.proj_in.weight")
    lora = f"{attentions[0]}.proj_in.lora_layer.down.weight" in tensors
    return width, lora or (projection is not None and projection.ndim == 2)


def _resnet(own: str, original: str) -> dict[str, str]:
    return {f"{own}.{inner}": f"{original}.{original_inner}" for inner, original_inner in RESNET_NAMES.items()}


def _renamer(paths: Mapping[str, str]) -> Callable[[str], str | None]:
    def rename(name: str) -> str | None:
        module, rest = name, ""
        while module:
            if module in paths:
                return paths[module] + rest
            module, dot, last = module.rpartition(".")
            rest = f"{dot}{last}{rest}"
        return None

    return rename


def _out(tensors: Mapping[str, Tensor], path: str) -> int:
    return _weight_of(tensors, path, ("weight", "lora_layer.up.weight")).shape[0]


def _in(tensors: Mapping[str, Tensor], path: str) -> int:
    return _weight_of(tensors, path, ("weight", "lora_layer.down.weight")).shape[1]


def _weight_of(tensors: Mapping[str, Tensor], path: str, endings: tuple[str, ...]) -> Tensor:
    for ending in endings:
        value = tensors.get(f"{path}.{ending}")
        if value is not None and value.ndim >= 2:
            return value
    raise ValueError(f"its layer {path} is missing")


def _attention(block: int, kind: str) -> str:
    return f"down_blocks.{block}.attentions.0" if kind == "CrossAttnDownBlock2D" else ""


def _depth(tensors: Mapping[str, Tensor], path: str) -> int:
    pattern = re.compile(re.escape(path) + r"\.transformer_blocks\.(\d+)\.")
    return max((int(match[1]) + 1 for name in tensors if (match := pattern.match(name))), default=0)


def _default_settings(channels: list[int], width: int, linear: bool) -> dict[str, Any]:
    """Heads and groups of Stable Diffusion: 8 heads in version 1, 64 channels per head since."""
    settings: dict[str, Any] = {"norm_num_groups": 32 if all(c % 32 == 0 for c in channels) else 1}
    if linear and width in (1024, 2048) and all(c % 64 == 0 for c in channels):
        settings[HEADS] = [c // 64 for c in channels]
    elif width == 768 and not linear and all(c % 32 == 0 for c in channels):
        settings[HEADS] = 8
    return settings


def _labels(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    for label in ("add_embedding", "class_embedding"):
        if any(name.startswith(f"{label}.linear_1.") for name in tensors):
            width = _in(tensors, f"{label}.linear_1")
            if label == "add_embedding":
                settings = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
            else:
                settings = {"class_embed_type": "projection"}
            return {**settings, "projection_class_embeddings_input_dim": width}
    return {}


def _hint_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    first = tensors.get("controlnet_cond_embedding.conv_in.weight")
    if first is None:
        return {}
    pairs = sum(bool(re.fullmatch(r"controlnet_cond_embedding\.blocks\.\d+\.weight", name)) for name in tensors) // 2
    widths = [_out(tensors, f"controlnet_cond_embedding.blocks.{2 * pair + 1}") for pair in range(pairs)]
    return {"conditioning_channels": first.shape[1], "conditioning_embedding_out_channels": [first.shape[0], *widths]}


def _same(own: Any, reference: Any) -> bool:
    return (list(own) == list(reference)) if isinstance(reference, list | tuple) else own == reference
