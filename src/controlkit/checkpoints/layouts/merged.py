"""An adapter of CtrLoRA baked into its base control: a control that needs no second file.

It stays a control that is conditioned on the latent of the condition image and never sees the noise, so it is no
plain ControlNet: diffusers and other tools of ControlNets cannot run it.
"""

from __future__ import annotations

from pathlib import Path

from controlkit.checkpoints.content import CTRLORA, CTRLORA_BASE, HEADS, Content, Options, require_heads
from controlkit.checkpoints.files import write_tensors
from controlkit.checkpoints.layouts.layout import Layout
from controlkit.checkpoints.tensors import as_float32
from controlkit.controls.base_control import build_base_control
from controlkit.errors import UserError


def write(content: Content, path: Path, options: Options) -> list[str]:
    """One file of the layout controlkit, of kind ctrlora-base: W + up @ down, the adapter's norms and zero
    convolutions."""
    base = content.base_control
    if base is None:
        raise UserError("merging needs the base control that the adapter was made on; give it (--base-control)")
    if base.config.get(HEADS) is None and content.config.get(HEADS) is not None:
        base.config[HEADS] = content.config[HEADS]
    require_heads(path, base.config)
    control = build_base_control(base.config, as_float32(base.tensors))
    try:
        control.load_adapter("merged", as_float32(content.tensors))
    except ValueError as error:
        raise UserError(f"the adapter does not fit the base control that was given: {error}") from error
    state = control.merged("merged").base_state_dict()
    tensors = {name: value.to(base.tensors[name].dtype) for name, value in state.items()}
    metadata = {**base.metadata, **{key: content.metadata[key] for key in content.metadata if key != "control.kind"}}
    own = ("control.base_control", "control.base_control_fingerprint", "control.rank")
    for key in (*own, "control.transferred_from", "modelspec.architecture", "modelspec.title"):
        metadata.pop(key, None)
    metadata["control.merged"] = content.metadata.get("modelspec.title") or content.condition or "an adapter"
    made = Content(CTRLORA_BASE, control.config(), tensors, metadata)
    metadata["control.fingerprint"] = build_base_control(made.config, as_float32(tensors)).fingerprint()
    write_tensors(path, tensors, made.file_metadata(path), None)
    return [
        "the merged control is conditioned on the latent of the condition image, so it is not a plain ControlNet:"
        " controlkit runs it, other tools of ControlNets do not"
    ]


LAYOUT = Layout(
    name="merged",
    says="an adapter baked into its base control, in one file of layout controlkit",
    writes=write,
    kinds=(CTRLORA,),
)
