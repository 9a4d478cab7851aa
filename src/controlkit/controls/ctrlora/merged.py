"""An adapter of CtrLoRA baked into its base control: a control that needs no second file.

It stays a control that is conditioned on the latent of the condition image and never sees the noise, so it is no
plain ControlNet: diffusers and other tools of ControlNets cannot run it.
"""

from __future__ import annotations

from controlkit.controls.encoder_copy.network import HEADS, missing_heads
from controlkit.controls.file_format import Checkpoint, Reference, Written
from controlkit.errors import UserError


def write(checkpoint: Checkpoint, reference: Reference) -> Written:
    """A base control under its own names: W + up @ down, the adapter's norms and zero convolutions."""
    from controlkit.controls.ctrlora.base_controlnet import BaseControlNet, built

    base = checkpoint.companion
    if base is None:
        raise UserError("merging needs the base control that the adapter was made on; give it (--base-control)")
    if base.config.get(HEADS) is None and checkpoint.config.get(HEADS) is not None:
        base.config[HEADS] = checkpoint.config[HEADS]
    if (missing := missing_heads(base.config)) is not None:
        raise UserError(f"{base.path} does not say {missing}; give the base that it was made for (--base)")
    shared = built(base.config, base.float_tensors())
    try:
        shared.load_adapter("merged", checkpoint.float_tensors())
    except ValueError as error:
        raise UserError(f"the adapter does not fit the base control that was given: {error}") from error
    control = shared.merged("merged")
    tensors = {name: value.to(base.tensors[name].dtype) for name, value in control.file_state().items()}
    own = {key: value for key, value in checkpoint.metadata.items() if key != "control.kind"}
    metadata = {**base.metadata, **own}
    dropped = ("control.base_control", "control.base_control_fingerprint", "control.rank", "control.transferred_from")
    for key in (*dropped, "modelspec.architecture", "modelspec.title"):
        metadata.pop(key, None)
    metadata["control.merged"] = checkpoint.metadata.get("modelspec.title") or checkpoint.condition or "an adapter"
    made = Checkpoint(BaseControlNet.kind, control.config(), tensors, metadata)
    metadata["control.fingerprint"] = BaseControlNet.fingerprint_of(made)
    note = (
        "the merged control is conditioned on the latent of the condition image, so it is not a plain ControlNet:"
        " controlkit runs it, other tools of ControlNets do not"
    )
    return Written(tensors=tensors, checkpoint=made, notes=(note,))
