"""Names, shapes, weights and outputs of salesforce/UniControl's own class, at a small size.

The outputs were recorded from `ControlNet` of cldm/cldm_unicontrol.py (1.0) and cldm_unicontrol_v11.py (1.1) of commit
472c6cd with these weights and inputs, `model_channels=32` and the other settings of models/cldm_v15_unicontrol.yaml.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch

WIDTH, CONTEXT, TASKS = 32, 768, 13
TASK, PLACE = "depth", 3
"""The task of the recorded outputs, and its place among the adapters."""


def convolution(name, channels, out, size):
    return {f"{name}.weight": (out, channels, size, size), f"{name}.bias": (out,)}


def linear(name, channels, out, bias=True):
    return {f"{name}.weight": (out, channels), **({f"{name}.bias": (out,)} if bias else {})}


def norm(name, channels):
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def resnet(name, channels, out):
    layers = {
        **norm(f"{name}.in_layers.0", channels),
        **convolution(f"{name}.in_layers.2", channels, out, 3),
        **linear(f"{name}.emb_layers.1", 4 * WIDTH, out),
        **norm(f"{name}.out_layers.0", out),
        **convolution(f"{name}.out_layers.3", out, out, 3),
    }
    return layers if channels == out else {**layers, **convolution(f"{name}.skip_connection", channels, out, 1)}


def transformer(name, channels):
    block = f"{name}.transformer_blocks.0"
    layers = {**norm(f"{name}.norm", channels), **convolution(f"{name}.proj_in", channels, channels, 1)}
    for attention, width in (("attn1", channels), ("attn2", CONTEXT)):
        layers |= linear(f"{block}.{attention}.to_q", channels, channels, bias=False)
        layers |= linear(f"{block}.{attention}.to_k", width, channels, bias=False)
        layers |= linear(f"{block}.{attention}.to_v", width, channels, bias=False)
        layers |= linear(f"{block}.{attention}.to_out.0", channels, channels)
    layers |= linear(f"{block}.ff.net.0.proj", channels, 8 * channels)
    layers |= linear(f"{block}.ff.net.2", 4 * channels, channels)
    for place in (1, 2, 3):
        layers |= norm(f"{block}.norm{place}", channels)
    return {**layers, **convolution(f"{name}.proj_out", channels, channels, 1)}


def original_shapes() -> dict[str, tuple[int, ...]]:
    """Name -> shape of the state dict of its class."""
    time = 4 * WIDTH
    shapes = {**linear("time_embed.0", WIDTH, time), **linear("time_embed.2", time, time)}
    shapes |= {**linear("task_id_hypernet.0", 768, time), **linear("task_id_hypernet.2", time, time)}
    for task in range(TASKS):
        stack = f"input_hint_block_list_moe.{task}"
        shapes |= convolution(f"{stack}.0", 3, 16, 3)
        shapes |= {**convolution(f"{stack}.2", 16, 16, 3), **convolution(f"{stack}.4", 16, 32, 3)}
    for place in (0, 1):
        shapes |= convolution(f"input_hint_block_zeroconv_0.{place}", 32, 32, 3)
        shapes |= convolution(f"input_hint_block_zeroconv_1.{place}", 256, WIDTH, 3)
    for place, (channels, out) in enumerate(((32, 32), (32, 96), (96, 96), (96, 256))):
        shapes |= convolution(f"input_hint_block_share.{2 * place}", channels, out, 3)
    shapes |= {**linear("task_id_layernet_zeroconv_0", time, 32), **linear("task_id_layernet_zeroconv_1", time, 256)}
    shapes |= convolution("input_blocks.0.0", 4, WIDTH, 3)
    outputs, channels, block = [WIDTH], WIDTH, 1
    for level, factor in enumerate((1, 2, 4, 4)):
        for _ in range(2):
            shapes |= resnet(f"input_blocks.{block}.0", channels, factor * WIDTH)
            channels = factor * WIDTH
            if level < 3:
                shapes |= transformer(f"input_blocks.{block}.1", channels)
            outputs.append(channels)
            block += 1
        if level < 3:
            shapes |= convolution(f"input_blocks.{block}.0.op", channels, channels, 3)
            outputs.append(channels)
            block += 1
    for place, width in enumerate(outputs):
        shapes |= convolution(f"zero_convs.{place}.0", width, width, 1)
        shapes |= linear(f"task_id_layernet.{place}", time, width)
    shapes |= {**resnet("middle_block.0", channels, channels), **transformer("middle_block.1", channels)}
    shapes |= resnet("middle_block.2", channels, channels)
    return shapes | convolution("middle_block_out.0", channels, channels, 1)


def original_state(version: str) -> dict[str, torch.Tensor]:
    """Weights of a scale that preserves that of signals; version 1.0 has zero convolutions that it never uses."""
    state = {}
    for name, shape in original_shapes().items():
        values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
        is_norm = ("norm" in name and len(shape) == 1) or ".in_layers.0." in name or ".out_layers.0." in name
        is_scale = name.startswith("task_id_layernet") and name.endswith("bias")
        if is_norm or is_scale:
            values = values * 0.1 + (name.endswith("weight") or is_scale)
        else:
            values = values * (0.1 if len(shape) == 1 else 1 / math.sqrt(math.prod(shape[1:])))
        unused = version == "1.0" and name.startswith(
            ("input_hint_block_zeroconv_0.1", "input_hint_block_zeroconv_1.1")
        )
        state[name] = torch.from_numpy(values.astype(np.float32) * (not unused))
    return state


def inputs() -> dict[str, torch.Tensor]:
    """Noisy latents, times, prompts, a condition image, and the encoded instruction, whose first token is read."""
    shapes = {"x_t": (2, 4, 8, 8), "text": (2, 77, CONTEXT), "image": (2, 3, 64, 64), "instruction": (1, 77, CONTEXT)}
    made = {}
    for name, shape in shapes.items():
        values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
        made[name] = torch.from_numpy(values)
    return {**made, "image": made["image"].sigmoid(), "t": torch.tensor([37, 801])}


def digest(output: torch.Tensor) -> list[float]:
    """Six numbers of a tensor: its mean, mean magnitude, and four elements."""
    flat = output.detach().double().flatten()
    elements = flat[torch.linspace(0, len(flat) - 1, 4).long()]
    return [round(float(value), 5) for value in (flat.mean(), flat.abs().mean(), *elements)]


RECORDED: dict[str, list[list[float]]] = {
    "1.0": [
        [-0.04224, 0.71836, 1.16117, 1.59669, -0.08679, -0.31776],
        [-0.00399, 1.43003, 0.97235, -0.26056, 0.59732, -1.31391],
        [0.19534, 1.77199, 1.43769, -0.2038, -2.14662, 3.54229],
        [0.07359, 1.65855, -3.41188, 2.09747, 0.33501, -0.34775],
        [0.10529, 1.99111, 1.50975, 0.10921, 0.10151, 2.7663],
        [0.19124, 2.37819, 0.47884, 0.77027, 1.25657, 0.60494],
        [-0.1277, 2.3378, -1.09671, 2.1204, 0.23296, -6.14671],
        [0.00655, 2.71002, 0.90469, -5.53953, -2.83226, -0.34101],
        [-0.00748, 2.88851, 1.50159, -4.29551, 4.81085, 0.27125],
        [-0.08113, 1.79921, 3.38205, 3.03191, 1.32424, -0.27462],
        [-0.17208, 1.78157, -1.8106, -0.53603, -0.26645, 3.80473],
        [0.21611, 1.65183, -0.32933, -2.91296, 1.61082, -1.1813],
        [0.25111, 2.30275, 0.57277, -1.47861, -6.88394, -3.09226],
    ],
    "1.1": [
        [-0.01733, 0.72218, 1.15855, 1.70125, -0.03019, -0.4785],
        [0.03088, 1.43403, 1.0444, -0.34739, 0.65467, -1.34423],
        [0.19652, 1.77221, 1.21554, -0.16032, -2.40333, 3.42957],
        [0.07371, 1.67575, -3.56643, 2.00362, 0.46292, -0.22818],
        [0.12197, 1.99995, 1.70269, -0.04247, 0.04541, 2.75673],
        [0.20941, 2.39032, 0.27877, 0.77694, 1.19844, 0.79539],
        [-0.12589, 2.33841, -1.18319, 2.08267, 0.34191, -6.50061],
        [-0.012, 2.70377, 1.07957, -5.55449, -2.76799, -0.52974],
        [-0.02363, 2.88909, 1.51049, -4.11385, 5.11398, 0.29899],
        [-0.07774, 1.77077, 3.66831, 3.0655, 1.20131, -0.18209],
        [-0.156, 1.76889, -1.81016, -0.55543, -0.24669, 3.6959],
        [0.20938, 1.63505, -0.10404, -3.00079, 1.62344, -1.19876],
        [0.23919, 2.27815, 0.25656, -1.58564, -6.94772, -3.22018],
    ],
}
"""Version -> `digest` of each of the 13 outputs."""
