"""The original networks of Uni-ControlNet, re-stated: names and shapes of their tensors, and their outputs computed
from those tensors with torch's functions alone (ShihaoZhaoZSH/Uni-ControlNet, models/local_adapter.py and
global_adapter.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Size:
    """Settings of a local adapter; the defaults are those for Stable Diffusion 1.5."""

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    features: tuple[int, ...] = (192, 256, 384, 512)
    context: int = 768
    heads: int = 8
    images: int = 7

    @property
    def time(self) -> int:
        return 4 * self.channels[0]

    def blocks(self):
        """Of each block of the encoder: level, channels in and out, and what it is."""
        yield 0, 4, self.channels[0], "first"
        width, last = self.channels[0], len(self.channels) - 1
        for level, out in enumerate(self.channels):
            for layer in range(2):
                yield level, width, out, ("modulated" if layer == 0 else "plain") + ("" if level == last else "+")
                width = out
            if level < last:
                yield level, out, out, "down"


SMALL = Size(channels=(32, 64, 64, 64), features=(24, 40, 48, 56))


def local_shapes(size: Size = Size()) -> dict[str, tuple[int, ...]]:  # noqa: C901
    """Names and shapes of a local adapter's tensors."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name, out, into, *kernel):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into, *kernel), (out,)

    def norm(name, width):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def resnet(name, into, out, features=None):
        for place, width in (("in", into), ("out", out)):
            if features is None:
                norm(f"{name}.{place}_layers.0", width)
            else:
                layer(f"{name}.norm_{place}.conv_gamma", width, features, 3, 3)
                layer(f"{name}.norm_{place}.conv_beta", width, features, 3, 3)
        layer(f"{name}.in_layers.2", out, into, 3, 3)
        layer(f"{name}.emb_layers.1", out, size.time)
        layer(f"{name}.out_layers.3", out, out, 3, 3)
        if into != out:
            layer(f"{name}.skip_connection", out, into, 1, 1)

    def transformer(name, width):
        norm(f"{name}.norm", width)
        layer(f"{name}.proj_in", width, width, 1, 1)
        layer(f"{name}.proj_out", width, width, 1, 1)
        inner = f"{name}.transformer_blocks.0"
        for attention, read in (("attn1", width), ("attn2", size.context)):
            shapes[f"{inner}.{attention}.to_q.weight"] = (width, width)
            shapes[f"{inner}.{attention}.to_k.weight"] = shapes[f"{inner}.{attention}.to_v.weight"] = (width, read)
            layer(f"{inner}.{attention}.to_out.0", width, width)
        layer(f"{inner}.ff.net.0.proj", 8 * width, width)
        layer(f"{inner}.ff.net.2", width, 4 * width)
        for number in (1, 2, 3):
            norm(f"{inner}.norm{number}", width)

    layer("time_embed.0", size.time, size.channels[0])
    layer("time_embed.2", size.time, size.time)
    extractor = ((0, 3 * size.images, 32), (2, 32, 64), (4, 64, 64), (6, 64, 128), (8, 128, 128))
    for place, into, out in extractor:
        layer(f"feature_extractor.pre_extractor.{place}", out, into, 3, 3)
    for level, (into, out) in enumerate(zip((128, *size.features), size.features, strict=False)):
        layer(f"feature_extractor.extractors.{level}.0", out, into, 3, 3)
        layer(f"feature_extractor.zero_convs.{level}", out, out, 3, 3)
    for index, (level, into, out, what) in enumerate(size.blocks()):
        block = f"input_blocks.{index}"
        if what == "first":
            layer(f"{block}.0", out, into, 3, 3)
        elif what == "down":
            layer(f"{block}.0.op", out, into, 3, 3)
        else:
            resnet(f"{block}.0", into, out, size.features[level] if what.startswith("modulated") else None)
            if what.endswith("+"):
                transformer(f"{block}.1", out)
        layer(f"zero_convs.{index}.0", out, out, 1, 1)
    last = size.channels[-1]
    resnet("middle_block.0", last, last)
    transformer("middle_block.1", last)
    resnet("middle_block.2", last, last)
    layer("middle_block_out.0", last, last, 1, 1)
    return shapes


def global_shapes(width: int = 768) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a global adapter's tensors."""
    shapes: dict[str, tuple[int, ...]] = {}
    for number, into, out in ((1, width, 2 * width), (2, 2 * width, 4 * width)):
        inner = 4 * into
        shapes |= {f"ff{number}.net.0.proj.weight": (2 * inner, into), f"ff{number}.net.0.proj.bias": (2 * inner,)}
        shapes |= {f"ff{number}.net.2.weight": (out, inner), f"ff{number}.net.2.bias": (out,)}
        shapes |= {f"norm{number}.weight": (into,), f"norm{number}.bias": (into,)}
    return shapes


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of these shapes that keep the scale of what passes through them."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        scale = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.2
        state[name] = torch.randn(shape, generator=generator) * scale
    return state


def local_outputs(state, x, t, context, images, size: Size = SMALL) -> list[torch.Tensor]:  # noqa: C901
    """The residuals of the encoder's blocks and of the middle one.

    Args:
        images: `[B, 3 * images, H, W]` in [0, 1].
    """

    def conv(name, stream, stride=1):
        weight = state[f"{name}.weight"]
        return functional.conv2d(stream, weight, state[f"{name}.bias"], stride, weight.shape[-1] // 2)

    def linear(name, stream):
        return functional.linear(stream, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(name, stream, eps=1e-5):
        return functional.group_norm(stream, 32, state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def normed(name, place, stream, features):
        if features is None:
            return norm(f"{name}.{place}_layers.0", stream)
        gamma, beta = (conv(f"{name}.norm_{place}.conv_{part}", features) for part in ("gamma", "beta"))
        return functional.group_norm(stream, 32) * (1 + gamma) + beta

    def resnet(name, stream, features=None):
        hidden = conv(f"{name}.in_layers.2", functional.silu(normed(name, "in", stream, features)))
        hidden = hidden + linear(f"{name}.emb_layers.1", functional.silu(embedding))[:, :, None, None]
        hidden = conv(f"{name}.out_layers.3", functional.silu(normed(name, "out", hidden, features)))
        skipped = stream if hidden.shape == stream.shape else conv(f"{name}.skip_connection", stream)
        return skipped + hidden

    def attention(name, stream, read):
        def split(tensor):
            return tensor.unflatten(-1, (size.heads, -1)).transpose(1, 2)

        queries, keys, values = (
            split(linear(f"{name}.to_{part}", x)) for part, x in (("q", stream), ("k", read), ("v", read))
        )
        scores = queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5
        return linear(f"{name}.to_out.0", (scores.softmax(-1) @ values).transpose(1, 2).flatten(2))

    def layer_norm(name, stream):
        return functional.layer_norm(stream, stream.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def transformer(name, stream):
        hidden = conv(f"{name}.proj_in", norm(f"{name}.norm", stream, 1e-6)).flatten(2).transpose(1, 2)
        inner = f"{name}.transformer_blocks.0"
        own = layer_norm(f"{inner}.norm1", hidden)
        hidden = hidden + attention(f"{inner}.attn1", own, own)
        hidden = hidden + attention(f"{inner}.attn2", layer_norm(f"{inner}.norm2", hidden), context)
        value, gate = linear(f"{inner}.ff.net.0.proj", layer_norm(f"{inner}.norm3", hidden)).chunk(2, -1)
        hidden = hidden + linear(f"{inner}.ff.net.2", value * functional.gelu(gate))
        return stream + conv(f"{name}.proj_out", hidden.transpose(1, 2).unflatten(2, stream.shape[2:]))

    half = size.channels[0] // 2
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
    embedding = linear("time_embed.0", torch.cat([angles.cos(), angles.sin()], 1))
    embedding = linear("time_embed.2", functional.silu(embedding))
    stream = images
    for place, stride in ((0, 1), (2, 2), (4, 1), (6, 2), (8, 1)):
        stream = functional.silu(conv(f"feature_extractor.pre_extractor.{place}", stream, stride))
    features = []
    for level in range(len(size.features)):
        stream = functional.silu(conv(f"feature_extractor.extractors.{level}.0", stream, 2))
        features.append(conv(f"feature_extractor.zero_convs.{level}", stream))
    outputs, stream = [], x
    for index, (level, _, _, what) in enumerate(size.blocks()):
        block = f"input_blocks.{index}"
        if what == "first":
            stream = conv(f"{block}.0", stream)
        elif what == "down":
            stream = conv(f"{block}.0.op", stream, 2)
        else:
            stream = resnet(f"{block}.0", stream, features[level] if what.startswith("modulated") else None)
            stream = transformer(f"{block}.1", stream) if what.endswith("+") else stream
        outputs.append(conv(f"zero_convs.{index}.0", stream))
    stream = resnet("middle_block.2", transformer("middle_block.1", resnet("middle_block.0", stream)))
    return [*outputs, conv("middle_block_out.0", stream)]


def global_outputs(state, embeddings) -> torch.Tensor:
    """Tokens `[B, 4, D]` of embeddings `[B, D]`."""
    stream = embeddings
    for number in (1, 2):
        norm = (state[f"norm{number}.weight"], state[f"norm{number}.bias"])
        stream = functional.layer_norm(stream, stream.shape[-1:], *norm)
        first, second = (f"ff{number}.net.{place}" for place in ("0.proj", "2"))
        value, gate = functional.linear(stream, state[f"{first}.weight"], state[f"{first}.bias"]).chunk(2, -1)
        stream = functional.linear(value * functional.gelu(gate), state[f"{second}.weight"], state[f"{second}.bias"])
    return stream.unflatten(1, (4, -1))
