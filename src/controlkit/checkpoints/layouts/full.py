"""A control inside of the whole Stable Diffusion that it was trained in: one checkpoint of the original code.

ControlNet 1.0's files are such: their decoder was trained along with the control (lllyasviel/ControlNet #13), and
#625 shows that its weights differ from Stable Diffusion 1.5's. Nobody but the original code uses that decoder: all
converters, this one too, take the control alone, and say so. CtrLoRA has them as training checkpoints and from
scripts/tool_combine_weights.py.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from controlkit.checkpoints.content import CONTROLNET, CTRLORA, CTRLORA_BASE, KINDS, Content, Options, some
from controlkit.checkpoints.files import write_tensors
from controlkit.checkpoints.layouts.layout import Layout
from controlkit.checkpoints.layouts.ldm import from_original, to_original
from controlkit.checkpoints.recognise import CONTROL_PREFIX, UNET_PREFIX, Found
from controlkit.errors import UserError

_STABLE_DIFFUSION = re.compile(
    # The networks, and their moving average.
    r"(model|first_stage_model|cond_stage_model|conditioner|model_ema)\."
    # The noise schedule, which the original code keeps as buffers.
    r"|(betas|logvar|lvlb_weights|scale_factor|posterior_\w+|(\w+_)?alphas_cumprod(_prev)?)$"
)
"""Names in a whole Stable Diffusion checkpoint that are not the control's."""


def read(found: Found, options: Options) -> Content:
    """The control; everything else of Stable Diffusion is kept aside."""
    kind, file = found.kind or "", found.file
    inside: dict[str, Tensor] = {}
    aside: dict[str, Tensor] = {}
    unknown: list[str] = list(file.others)
    for name, value in file.tensors.items():
        if name.startswith(CONTROL_PREFIX):
            inside[name.removeprefix(CONTROL_PREFIX)] = value
        elif _STABLE_DIFFUSION.match(name):
            aside[name] = value
        else:
            unknown.append(name)
    if kind == CTRLORA:
        content = _read_combined(found, inside, options, tuple(unknown))
    else:
        content = from_original(
            found.path, kind, KINDS[kind], inside, file.metadata, options, others=tuple(unknown), prefix=CONTROL_PREFIX
        )
    content.leftover = aside
    content.notes.append(_on_the_decoder(kind, aside))
    return content


def write(content: Content, path: Path, options: Options) -> list[str]:
    """The control and the Stable Diffusion that came with it."""
    if not any(name.startswith(UNET_PREFIX) for name in content.leftover):
        raise UserError(
            "only a file of layout full can be written as full: the control that was given comes without the"
            " Stable Diffusion that belongs to it; --to original writes the control alone"
        )
    tensors = {f"{CONTROL_PREFIX}{name}": value for name, value in to_original(content).items()}
    write_tensors(path, {**content.leftover, **tensors}, content.file_metadata(path), None)
    content.notes = [note for note in content.notes if "decoder" not in note]
    return []


def _read_combined(found: Found, inside: dict[str, Tensor], options: Options, unknown: tuple[str, ...]) -> Content:
    """An adapter and its base control from one checkpoint: both have the adapter's zero convolutions and norms."""
    tables = {name for name in inside if name.startswith("loras_dict.")}
    if tables:
        raise UserError(
            f"{found.path} is a raw checkpoint of CtrLoRA's base training, with the LoRA of every base condition"
            f" ({some(tables, 1)}); extract base control and adapters from it with the reference's"
            " scripts/tool_extract_weights.py, which knows which is which"
        )
    network = {name: value for name, value in inside.items() if ".lora_layer." not in name}
    metadata = found.file.metadata
    base = from_original(
        found.path, CTRLORA_BASE, KINDS[CTRLORA_BASE], network, metadata, options, others=unknown, prefix=CONTROL_PREFIX
    )
    own = {
        name: value
        for name, value in inside.items()
        if ".lora_layer." in name
        or name.startswith(("zero_convs.", "middle_block_out."))
        or re.search(r"\.1\.(norm|transformer_blocks\.\d+\.norm\d)\.(weight|bias)$", name)
    }
    content = from_original(found.path, CTRLORA, KINDS[CTRLORA], own, metadata, options, prefix=CONTROL_PREFIX)
    content.base_control = base
    return content


def _on_the_decoder(kind: str, aside: dict[str, Tensor]) -> str:
    decoder = sum(name.startswith(f"{UNET_PREFIX}output_blocks.") for name in aside)
    told = f"the file also carries a whole Stable Diffusion ({len(aside)} tensors); only the control is taken from it"
    if kind == CONTROLNET and decoder:
        told += (
            f", so its decoder ({decoder} tensors), which ControlNet 1.0 trained along with the control, is dropped,"
            " and pictures differ a little from the original code's"
        )
    return told


LAYOUT = Layout(
    name="full",
    says="a control with the whole Stable Diffusion around it, as in ControlNet 1.0 and training checkpoints",
    reads=read,
    writes=write,
    kinds=(CONTROLNET,),
)
