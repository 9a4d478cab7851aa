"""What a control's file holds, apart from its layout: every layout is read into this and written from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, ControlNetXSAdapter, T2IAdapter
from torch import Tensor

from controlkit.checkpoints.files import FAMILIES
from controlkit.controls.base_control import BaseControl, network_of
from controlkit.errors import UserError

CONTROLNET = "controlnet"
CTRLORA_BASE = "ctrlora-base"
CTRLORA = "ctrlora"
T2I_ADAPTER = "t2i-adapter"
CONTROLNET_XS = "controlnet-xs"

KINDS = {
    CONTROLNET: "a ControlNet",
    CTRLORA_BASE: "a base control of CtrLoRA",
    CTRLORA: "an adapter of CtrLoRA",
    T2I_ADAPTER: "a T2I-Adapter",
    CONTROLNET_XS: "a ControlNet-XS",
}
"""Kind, as `control.kind` has it -> what to call it."""

ARCHITECTURES = {
    CONTROLNET: "control-net",
    CTRLORA_BASE: "ctrlora-base",
    CTRLORA: "ctrlora",
    T2I_ADAPTER: "t2i-adapter",
    CONTROLNET_XS: "control-net-xs",
}
"""Kind -> the second half of modelspec's `architecture`."""
CONFIG_ERRORS = (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError, ZeroDivisionError)
"""What building a network raises where a config is not one of such a network."""

HEADS = "attention_head_dim"
"""The one setting of a network that the shapes of its tensors do not tell."""


@dataclass
class Content:
    """One control, or part of one, as tensors under diffusers' names."""

    kind: str
    config: dict[str, Any]
    """Of the network, as diffusers has it; for an adapter, of its base control."""
    tensors: dict[str, Tensor]
    """Under diffusers' names, in the dtypes of the file. An adapter's are named as `Adapter` names them."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Of the file, all of it."""
    leftover: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of the file that are no part of the control, under the file's names; few layouts have a place
    for them."""
    notes: list[str] = field(default_factory=list)
    """Sentences on what was found or left out."""
    base_control: Content | None = None
    """An adapter's base control, if the same file holds it or it was given."""

    @property
    def condition(self) -> str | None:
        """Name of the condition that it was trained on, if the file says it."""
        return self.metadata.get("control.condition") or None

    @property
    def rank(self) -> int | None:
        """Of an adapter's LoRA."""
        ranks = (value.shape[0] for name, value in self.tensors.items() if name.endswith(".lora_layer.down.weight"))
        return next(ranks, None)

    @property
    def parameters(self) -> int:
        """Numbers in all of its tensors."""
        return sum(value.numel() for value in self.tensors.values())

    def file_metadata(self, path: Path) -> dict[str, str]:
        """Metadata for a safetensors file of it, in whatever layout: what it came with, and what is always said."""
        family = FAMILIES.get(self.config.get("cross_attention_dim", 0), "unknown")
        said = {
            "format": "pt",
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": f"{family}/{ARCHITECTURES[self.kind]}",
            "modelspec.implementation": "controlkit",
            "modelspec.title": path.stem,
            "control.condition": "",
            "control.hint_range": "[0, 1]",
            **self.metadata,
            "control.kind": self.kind,
            "control.config": json.dumps(self.config),
        }
        if self.kind == CTRLORA:
            said["control.rank"] = str(self.rank)
        return said


@dataclass(frozen=True, kw_only=True)
class Options:
    """What reading or writing a layout may need besides the file."""

    unet_config: Mapping[str, Any] | None = None
    """Of the base's UNet: settings that shapes do not tell."""
    unet: Callable[[], Mapping[str, Tensor]] | None = None
    """The weights of the base's UNet under diffusers' names, for files that hold only what differs from it."""
    rank: int | None = None
    """Of a low-rank layout that is written."""

    @cached_property
    def unet_weights(self) -> Mapping[str, Tensor] | None:
        """The weights that `unet` gives, read once."""
        return None if self.unet is None else self.unet()


def some(names: Collection[str], most: int = 3) -> str:
    """`a, b, c and 5 more`."""
    first = sorted(names)[:most]
    rest = len(names) - len(first)
    return ", ".join(first) + (f" and {rest} more" if rest else "")


def check_names(
    path: Path,
    what: str,
    expected: Mapping[str, Sequence[int]],
    given: Mapping[str, Tensor],
    others: Sequence[str] = (),
) -> None:
    """Hold a file to exactly the names and shapes that it should have.

    Args:
        what: it is taken for, as in "a ControlNet".
        others: names of entries of the file that are no tensors.

    Raises:
        UserError: says which are missing, which are not known, or which have another shape.
    """
    problems = []
    if missing := set(expected) - set(given):
        problems.append(f"{len(missing)} of its {len(expected)} tensors are missing: {some(missing)}")
    if unknown := (set(given) | set(others)) - set(expected):
        problems.append(f"{len(unknown)} tensors do not belong to it: {some(unknown)}")
    wrong = [
        f"{name} has the shape {tuple(given[name].shape)}, not {tuple(shape)}"
        for name, shape in sorted(expected.items())
        if name in given and tuple(given[name].shape) != tuple(shape)
    ]
    if wrong:
        problems.append(wrong[0] + (f", and {len(wrong) - 1} more shapes are wrong" if len(wrong) > 1 else ""))
    if problems:
        raise UserError(f"{path} looks like {what}, but {'; '.join(problems)}")


def expected_shapes(kind: str, config: Mapping[str, Any], rank: int | None = None) -> dict[str, torch.Size]:
    """Names and shapes of the network of `config`, under diffusers' names; counted on the meta device.

    Raises:
        ValueError, TypeError, KeyError: the config is not one of such a network.
    """
    return dict(_shapes(kind, json.dumps(config), rank))


@lru_cache(maxsize=16)
def _shapes(kind: str, config: str, rank: int | None) -> tuple[tuple[str, torch.Size], ...]:
    """`expected_shapes`; several adapters of one base control are counted once."""
    settings = json.loads(config)
    told = settings.get(HEADS) is not None or settings.get("num_attention_heads") is not None
    if kind not in (T2I_ADAPTER, CONTROLNET_XS) and not told:
        settings[HEADS] = settings["block_out_channels"][0]  # shapes do not depend on it
    network: Any
    with torch.device("meta"):
        if kind == T2I_ADAPTER:
            network = T2IAdapter.from_config(settings)
        elif kind == CONTROLNET_XS:
            network = ControlNetXSAdapter.from_config(settings)
        elif kind == CONTROLNET:
            network = ControlNetModel.from_config(settings)
        else:
            control = BaseControl(network_of(settings))
            network = control.add_adapter("expected", rank or 1) if kind == CTRLORA else control.network
    return tuple((name, value.shape) for name, value in network.state_dict().items())


def require_heads(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a network whose number of attention heads nothing tells.

    Raises:
        UserError: says how to tell it.
    """
    if config.get(HEADS) is None and config.get("num_attention_heads") is None:
        raise UserError(
            f"{path} does not say how many attention heads its network has, and its shapes are of no base that is"
            " known; give the base that it was made for (--base)"
        )


def said_config(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The config that a file of ours in this layout carries; foreign files have none."""
    try:
        config = json.loads(metadata.get("control.config", "null"))
    except ValueError:
        return None
    return config if isinstance(config, dict) else None
