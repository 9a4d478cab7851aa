"""Stability AI's Control-LoRA: a ControlNet as low-rank changes of the base's UNet, marked by `lora_controlnet`.

A matrix or convolution W of the UNet's encoder becomes W + up @ down; tensors without a counterpart there (hint
network, zero convolutions) and those that are not matrices are stored in full; missing tensors are the base's own. (As
read by ComfyUI: comfy/controlnet.py, ControlLora.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from controlkit.controls.control import Control
from controlkit.controls.controlnet.difference import check_base, wider
from controlkit.controls.encoder_copy.names import Structure, config_of
from controlkit.controls.encoder_copy.original import to_original
from controlkit.controls.file_format import (
    Checkpoint,
    Reference,
    TensorFile,
    Written,
    check_names,
    declared_config,
    on_one_line,
)
from controlkit.errors import UserError
from controlkit.progress import Progress

MARK = "lora_controlnet"
"""Name of the tensor that marks such a file."""

_OVERSAMPLING, _POWER_ITERATIONS = 32, 4
"""Of the randomised SVD. With torch's default of 2 iterations, the error is up to 2 % above the smallest possible."""


def read(kind: type[Control], file: TensorFile, reference: Reference, description: str) -> Checkpoint:
    """The ControlNet: the base's UNet with the changes applied."""
    unet, path = reference.unet_weights, file.path
    if unet is None:
        raise UserError(f"{path} is {description}; pass that base with its weights (--base)", "missing-setting")
    in_file = {name: value for name, value in file.tensors.items() if name != MARK}
    try:
        hints = {name.split(".")[1] for name in in_file if name.startswith("input_hint_block.")}
        structure = dataclasses.replace(Structure.of_diffusers(unet), hint=len(hints))
        diffusers_name, original_name = structure.to_diffusers(), structure.to_original()
        renamed = {new: value for name, value in in_file.items() if (new := diffusers_name(name)) is not None}
        unknown = {name: value for name, value in in_file.items() if diffusers_name(name) is None}
        dtype = next(wider(value).dtype for value in renamed.values() if value.is_floating_point())
        from_base = {name: value.to(dtype) for name, value in unet.items() if original_name(name) is not None}
        stored = _full_tensors(file.path, renamed, unet)
        tensors = {**from_base, **stored}
        config = declared_config(file.metadata) or config_of(tensors, reference.unet_config)
        expected = kind.shapes(config)
    except (ValueError, KeyError, TypeError, RuntimeError, StopIteration) as error:
        raise UserError(f"{path} looks like {description}, but {on_one_line(error)}", "damaged-file") from error
    check_names(path, description, expected, {**tensors, **unknown}, file.others)
    ordered = {name: tensors[name] for name in expected}
    checkpoint = Checkpoint(kind.kind, config, ordered, dict(file.metadata), path=path)
    if missing := set(from_base) - set(stored):
        checkpoint.notes.append(f"{len(missing)} tensors are not in the file and come from the base")
    return checkpoint


def write(checkpoint: Checkpoint, reference: Reference) -> Written:
    """The best changes of the requested rank, by SVD."""
    unet = reference.unet_weights
    if unet is None or reference.rank is None:
        raise UserError(
            "writing a Control-LoRA needs the base with its weights (--base) and the rank (--rank)", "missing-setting"
        )
    check_base("the control", checkpoint, unet)
    tensors: dict[str, Tensor] = {}
    worst, sums = ("", 0.0), (0.0, 0.0)
    names = dict(zip(checkpoint.tensors, to_original(checkpoint), strict=True))
    progress = Progress("layers", len(checkpoint.tensors))
    for name, value in checkpoint.tensors.items():
        progress.advance()
        original = names[name]
        if name not in unet or value.ndim < 2:
            tensors[original] = value
            continue
        change = (value.double() - unet[name].double()).flatten(1).float()
        up, down = _low_rank(change, reference.rank)
        layer = original.removesuffix(".weight")
        tensors[f"{layer}.up"] = up.reshape(*up.shape, *[1] * (value.ndim - 2)).to(value.dtype)
        tensors[f"{layer}.down"] = down.reshape(-1, *value.shape[1:]).to(value.dtype)
        size, lost = float(change.norm()), float((change - up @ down).norm())
        error = lost / size if size else 0.0
        sums = sums[0] + lost**2, sums[1] + size**2
        worst = max(worst, (original, error), key=lambda pair: pair[1])
    tensors[MARK] = torch.zeros(1)
    total = math.sqrt(sums[0] / sums[1]) if sums[1] else 0.0
    note = f"rank {reference.rank} loses {total:.1%} of all changes, and at most {worst[1]:.1%} of one (in {worst[0]})"
    return Written(tensors=tensors, notes=(note,) if worst[0] else ())


def _full_tensors(path: Path, renamed: Mapping[str, Tensor], unet: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the file, with changes applied to the base's weights."""
    tensors: dict[str, Tensor] = {}
    for name, value in renamed.items():
        layer, _, last = name.rpartition(".")
        if last not in ("up", "down"):
            tensors[name] = value
            continue
        pair = [renamed.get(f"{layer}.{part}") for part in ("up", "down")]
        weight = unet.get(f"{layer}.weight")
        if pair[0] is None or pair[1] is None or weight is None:
            raise ValueError(f"the change of {layer} lacks up or down, or the base has no such layer")
        up, down = pair[0].double().flatten(1), pair[1].double().flatten(1)
        if up.shape[0] != weight.shape[0] or up.shape[0] * down.shape[1] != weight.numel():
            raise UserError(
                f"{path} was not made for this base: the change of {layer} is {up.shape[0]} x {down.shape[1]},"
                f" its weight in the base {tuple(weight.shape)}",
                "incompatible",
            )
        tensors[f"{layer}.weight"] = (weight.double() + (up @ down).reshape(weight.shape)).to(wider(value).dtype)
    return tensors


def _low_rank(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """up `[out, rank]` and down `[rank, in]` whose product approximates `change`.

    Large matrices go through the randomised SVD of Halko et al. 2011 (arXiv 0909.4061), with a fixed seed: its error is
    within 1 % of the smallest possible, in a tenth of the time of a full one.
    """
    rank = min(rank, *change.shape)
    if 4 * (rank + _OVERSAMPLING) >= min(change.shape):
        u, s, v_transposed = torch.linalg.svd(change, full_matrices=False)
        v = v_transposed.T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(change, q=rank + _OVERSAMPLING, niter=_POWER_ITERATIONS)
    root = s[:rank].sqrt()  # split evenly, to stay within the range of half precision
    return u[:, :rank] * root, root[:, None] * v[:, :rank].T
