"""A CtrLoRA adapter merged into its base control: a control in one file.

It still reads the latent of the condition image and never the noisy latent, so it is not a plain ControlNet: diffusers
and other ControlNet tools cannot run it.
"""

from __future__ import annotations

from controlkit.controls.encoder_copy.network import HEADS, missing_heads
from controlkit.controls.file_format import Checkpoint, Reference, Written
from controlkit.errors import UserError

_ARCHITECTURE = "modelspec.architecture"
_OF_BASE = ("control.base", "control.base_fingerprint")
"""Metadata on the base of a control."""


def write(checkpoint: Checkpoint, reference: Reference) -> Written:
    """A base control with its own names: W + up @ down, and the adapter's norms and zero convolutions."""
    from controlkit.controls.ctrlora.base_controlnet import BaseControlNet, build_base_control

    base = checkpoint.companion
    if base is None:
        raise UserError("merging needs the base control of the adapter; pass it (--base-control)", "missing-companion")
    if base.config.get(HEADS) is None and checkpoint.config.get(HEADS) is not None:
        base.config[HEADS] = checkpoint.config[HEADS]
    if (missing := missing_heads(base.config)) is not None:
        raise UserError(
            f"{base.path} does not record {missing}; pass the base that it was made for (--base)", "missing-setting"
        )
    shared = build_base_control(base.config, base.float_tensors())
    try:
        shared.load_adapter("merged", checkpoint.float_tensors())
    except ValueError as error:
        raise UserError(f"the adapter does not fit this base control: {error}", "incompatible") from error
    control = shared.merged("merged")
    tensors = {name: value.to(base.tensors[name].dtype) for name, value in control.file_state().items()}
    adapter_metadata = {key: value for key, value in checkpoint.metadata.items() if key != "control.kind"}
    # The base control may have been transferred, so that its base is another than the one that the adapter records.
    of_base = {key: base.metadata[key] for key in _OF_BASE if key in base.metadata}
    metadata = {**base.metadata, **adapter_metadata, **of_base}
    dropped = ("control.base_control", "control.base_control_fingerprint", "control.rank", "control.transferred_from")
    for key in (*dropped, _ARCHITECTURE, "modelspec.title"):
        metadata.pop(key, None)
    if _ARCHITECTURE in base.metadata:
        metadata[_ARCHITECTURE] = base.metadata[_ARCHITECTURE]
    metadata["control.merged"] = checkpoint.metadata.get("modelspec.title") or checkpoint.condition or "an adapter"
    merged = Checkpoint(BaseControlNet.kind, control.config(), tensors, metadata)
    metadata["control.fingerprint"] = BaseControlNet.fingerprint_of(merged)
    note = (
        "the merged control reads the latent of the condition image, so it is not a plain ControlNet: controlkit runs"
        " it, other ControlNet tools do not"
    )
    return Written(tensors=tensors, checkpoint=merged, notes=(note,))
