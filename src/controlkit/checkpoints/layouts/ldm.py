"""Tensors of a ControlNet or of CtrLoRA under the names of the original code, without its prefix."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from controlkit.checkpoints.content import CONFIG_ERRORS, Content, Options, check_names, expected_shapes, said_config
from controlkit.checkpoints.structure import Structure, config_of
from controlkit.checkpoints.tensors import on_one_line
from controlkit.errors import UserError


def from_original(
    path: Path,
    kind: str,
    says: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    options: Options,
    *,
    others: tuple[str, ...] = (),
    prefix: str = "",
) -> Content:
    """The content of tensors under the original's names, each of them accounted for.

    Args:
        says: what the file was taken for.
        prefix: that names have in the file, for messages.

    Raises:
        UserError: names or shapes are not those of such a network.
    """
    unet_config = options.unet_config or {}
    label = "class_embedding" if unet_config.get("class_embed_type") else "add_embedding"
    try:
        structure = Structure.of_original(tensors, label)
        rename = structure.to_diffusers()
        renamed = {name: new for name in tensors if (new := rename(name)) is not None}
        content = Content(kind, {}, {new: tensors[name] for name, new in renamed.items()}, dict(metadata))
        content.config = said_config(metadata) or config_of(content.tensors, options.unet_config)
        expected = expected_shapes(kind, content.config, content.rank)
        wanted = Structure.of_diffusers(expected).to_original()
    except CONFIG_ERRORS as error:
        raise UserError(f"{path} looks like {says}, but {on_one_line(error)}") from error
    in_file = {f"{prefix}{wanted(name) or name}": shape for name, shape in expected.items()}
    check_names(path, says, in_file, {f"{prefix}{name}": value for name, value in tensors.items()}, others)
    # In the order of the network, which is the order of its fingerprint.
    content.tensors = {name: content.tensors[name] for name in expected}
    return content


def to_original(content: Content) -> dict[str, Tensor]:
    """Its tensors under the original's names.

    Raises:
        UserError: a tensor has no name there.
    """
    rename = Structure.of_diffusers(content.tensors).to_original()
    renamed = {name: rename(name) for name in content.tensors}
    if lost := [name for name, new in renamed.items() if new is None]:
        raise UserError(f"the original code has no name for {len(lost)} tensors of this control, such as {lost[0]}")
    return {str(renamed[name]): value for name, value in content.tensors.items()}
