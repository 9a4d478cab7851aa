"""LoRAs of the base (Hu et al. 2021, arXiv 2106.09685) from files of kohya, diffusers and peft.

They are merged into its weights, which leaves the structure of its networks as it is: injection sites, taps and
replaced modules stay in place.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.libraries import quiet_libraries
from controlkit.controls.control import Control
from controlkit.errors import UserError
from controlkit.files import read_json
from controlkit.formats.tensors import read_tensor_file
from controlkit.sampling.uses import LoraUse

_HALF = re.compile(
    r"(?P<path>.+?)(?:\.processor)?\.(?:(?P<attention>to_(?:q|k|v|out))_lora|lora(?:_linear_layer)?)[._]"
    r"(?P<half>down|up|A|B)(?:\.\w+)?\.weight"
)
"""Name of one of the two matrices of a layer: of peft (`lora_A`), of diffusers now (`lora.down`) and before
(`processor.to_q_lora.down`, `lora_linear_layer.down`)."""
_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
_DOWN, _UP = (
    rf"((lora_|lora\.|lora_linear_layer\.)?{half}|lora_{letter})" for half, letter in (("down", "A"), ("up", "B"))
)
_PART_OF_LAYER = re.compile(rf"\.(({_DOWN}|{_UP})\.weight|alpha)$")
_TEXT_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_PEFT_PREFIX = "base_model.model."
_COMFYUI_PREFIX = "diffusion_model."
_OF_ORIGINAL = re.compile(r"(?!lora_)(?!.*\.processor\.)")
"""Names of layers as original networks call them, with or without ComfyUI's prefix."""
_OTHER_KINDS = (
    ("hada_", "a LoHa (LyCORIS)"),
    ("lokr_", "a LoKr (LyCORIS)"),
    ("oft_", "an OFT"),
    ("dora_scale", "a DoRA"),
    ("lora_magnitude_vector", "a DoRA"),
    ("lora_mid", "a LoCon with a Tucker decomposition"),
)
"""Part of a tensor's name -> kind of file, of those that are not supported."""
_NAMED = 8
"""Names in one note."""


@dataclass(frozen=True)
class _Layer:
    """One layer of a LoRA: it adds `scale * up @ down`."""

    down: Tensor
    up: Tensor
    scale: float

    def delta(self, like: Tensor) -> Tensor:
        """What it adds to a weight, in float32 on its device."""
        down, up = (half.to(like.device, torch.float32).flatten(1) for half in (self.down, self.up))
        return (up @ down).reshape(like.shape) * self.scale


@dataclass(frozen=True)
class Lora:
    """The layers of a file, found in a base."""

    layers: Mapping[tuple[str, str], _Layer]
    """Component and path of a module -> its layer."""
    notes: tuple[str, ...]
    """Remarks for the user: tensors that fit no layer of the base."""


def lora_file(file: str | Path) -> Path:
    """The file of tensors of a LoRA: itself, or that of a folder of diffusers or peft.

    Raises:
        UserError: there is none.
    """
    path = Path(file)
    names = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "pytorch_lora_weights.bin")
    found = next((path / name for name in (*names, "adapter_model.bin") if (path / name).is_file()), path)
    if not found.is_file():
        raise UserError(
            f"there is no LoRA at {file}; expected a file, or a folder with {names[0]} or {names[1]}", "missing-file"
        )
    return found


def read_lora(use: LoraUse, base: Base) -> Lora:
    """Read a LoRA for a base.

    Raises:
        UserError: the file is missing, damaged, of an unsupported kind, or of another base.
    """
    path = lora_file(use.file)
    file = read_tensor_file(path)
    for part, kind in _OTHER_KINDS:
        if any(part in name for name in file.tensors):
            raise UserError(f"{use.file} is {kind}, which is not supported; expected a LoRA", "unsupported")
    tensors = _with_alphas({name.removeprefix(_PEFT_PREFIX): value for name, value in file.tensors.items()})
    if base.lora_loader is not None:
        tensors = _of_transformer(tensors, base)
    elif any(name.startswith(_KOHYA) for name in tensors):
        tensors = _of_kohya(tensors, use.file, base)
    # peft names the pair so; the folder of another file may hold the configuration of another adapter.
    is_of_peft = path.stem == "adapter_model" and not any(name.endswith(".alpha") for name in file.tensors)
    config = path.parent / "adapter_config.json" if is_of_peft else None
    settings = _adapter_settings(config, file.metadata, use.file)
    halves: dict[tuple[str, str], dict[str, Tensor]] = {}
    unmatched = list(file.others)
    for name, tensor in tensors.items():
        found = _HALF.fullmatch(name)
        place = None if found is None else _place(found, base)
        if found is None or place is None:
            unmatched.append(name)
        else:
            halves.setdefault(place, {})["down" if found["half"] in ("down", "A") else "up"] = tensor
    layers: dict[tuple[str, str], _Layer] = {}
    for (component, module), pair in halves.items():
        if len(pair) < 2:
            unmatched.append(f"{component}.{module} (without its {'up' if 'down' in pair else 'down'} half)")
            continue
        layer = _Layer(**pair, scale=settings.scale(component, module, len(pair["down"])))
        _check_shape(layer, base, component, module, use.file)
        layers[component, module] = layer
    if not layers:
        example = f", such as {unmatched[0]}" if unmatched else ""
        raise UserError(
            f"{use.file} fits no layer of {base.name}: its {len(unmatched)} tensors{example} are of another base, or no"
            " LoRA",
            "incompatible",
        )
    return Lora(layers, _unmatched_note(use.file, unmatched, base))


@contextmanager
def merged(base: Base, loras: Sequence[tuple[Lora, float]], key: Sequence[Any]) -> Iterator[None]:
    """A context in which LoRAs are merged into the base's weights, which are restored afterwards, bit for bit.

    Args:
        loras: with the weight of each.
        key: identifies them and their weights, for `Base.merged`.
    """
    networks = base.named_networks()
    weights = {place: _weight(networks[place[0]], place[1]) for lora, _ in loras for place in lora.layers}
    before = {place: weight.detach().to("cpu", copy=True) for place, weight in weights.items()}
    was, base.merged = base.merged, (*base.merged, *key)
    try:
        with torch.no_grad():
            for place, weight in weights.items():
                # Summed before they are rounded to the weight's dtype.
                total = weight.detach().float()
                for lora, factor in loras:
                    if place in lora.layers and factor:
                        total = total + lora.layers[place].delta(weight) * factor
                weight.copy_(total)
        yield
    finally:
        with torch.no_grad():
            for place, weight in weights.items():
                weight.copy_(before[place])
        base.merged = was


def replacement_notes(
    loras: Iterable[tuple[str, Lora]], controls: Iterable[tuple[str, Control]], base: Base
) -> list[str]:
    """Notes on layers of LoRAs in modules of the base that controls replace, where nothing reads them.

    Args:
        loras: with the name of each.
        controls: those that act, with the name of each.
    """
    denoiser = base.denoiser_component().name
    replacing = [(name, tuple(f"{path}." for path in control.replacements())) for name, control in controls]
    notes = []
    for file, lora in loras:
        for name, paths in replacing:
            idle = [place for place in lora.layers if place[0] == denoiser and f"{place[1]}.".startswith(paths)]
            if idle:
                notes.append(
                    f"{len(idle)} of {len(lora.layers)} layers of {file} are in the part of the base that {name}"
                    " replaces, and have no effect where it acts"
                )
    return notes


@dataclass(frozen=True)
class _AdapterSettings:
    """Rank and alpha as peft and diffusers store them; a file without has a scale of 1."""

    values: Mapping[str, Any]

    def scale(self, component: str, module: str, rank: int) -> float:
        """Of the layer of a module."""
        values = self.values.get(component, self.values.get("", {}))
        if "lora_alpha" not in values:
            return 1.0
        patterns = values.get("alpha_pattern") or {}
        alpha = next((value for name, value in patterns.items() if _is_module(name, module)), values["lora_alpha"])
        return float(alpha) / (rank**0.5 if values.get("use_rslora") else rank)


def _adapter_settings(config: Path | None, metadata: Mapping[str, str], file: str) -> _AdapterSettings:
    """From peft's `adapter_config.json`, or the metadata of diffusers' files.

    Raises:
        UserError: they are damaged, or ask for more than a LoRA.
    """
    values: dict[str, dict[str, Any]] = {}
    if config is not None and config.is_file():
        values[""] = _mapping(read_json(config), str(config))
    elif (text := metadata.get("lora_adapter_metadata")) is not None:
        what = f"lora_adapter_metadata of {file}"
        try:
            stored = _mapping(json.loads(text), what)
        except ValueError as error:
            raise UserError(f"{what} is not JSON ({error})", "damaged-file") from error
        for name, value in stored.items():
            component, _, setting = name.partition(".")
            values.setdefault(component, {})[setting] = value
    for settings in values.values():
        if settings.get("use_dora") or settings.get("peft_type", "LORA") != "LORA":
            kind = "DoRA" if settings.get("use_dora") else settings["peft_type"]
            raise UserError(
                f"{file} is an adapter of type {kind}, which is not supported; expected a LoRA", "unsupported"
            )
    return _AdapterSettings(values)


def _mapping(values: Any, what: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise UserError(f"{what} must be a mapping of settings, not {values!r}", "wrong-type")
    return values


def _is_module(pattern: str, module: str) -> bool:
    """Whether a key of peft's patterns means a module: its end, or a regular expression of it."""
    if pattern.startswith("^"):
        return re.match(pattern, module) is not None
    return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None


def _with_alphas(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with each `X.alpha` multiplied into the upper half of X: by alpha / rank, as in kohya."""
    scaled = dict(tensors)
    for name, alpha in tensors.items():
        stem = name.removesuffix(".alpha")
        pair = next(
            (
                (f"{stem}.{down}.weight", f"{stem}.{up}.weight")
                for down, up in (("lora_down", "lora_up"), ("lora.down", "lora.up"), ("lora_A", "lora_B"))
                if f"{stem}.{down}.weight" in tensors and f"{stem}.{up}.weight" in tensors
            ),
            None,
        )
        if stem != name and pair is not None:
            scaled[pair[1]] = tensors[pair[1]].float() * (float(alpha) / len(tensors[pair[0]]))
            del scaled[name]
    return scaled


def _of_kohya(tensors: Mapping[str, Tensor], file: str, base: Base) -> dict[str, Tensor]:
    """Tensors under kohya's names under those of diffusers; others unchanged.

    Raises:
        UserError: diffusers cannot map the names.
    """
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin

    halves = {name: value for name, value in tensors.items() if name.startswith(_KOHYA) and ".lora_" in name}
    try:
        mapped, _ = StableDiffusionXLLoraLoaderMixin.lora_state_dict(dict(halves), unet_config=base.denoiser.config)
    except (ValueError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} has names of layers that diffusers cannot map: {reason}", "unsupported") from error
    return {**{name: value for name, value in tensors.items() if name not in halves}, **mapped}


def _of_transformer(tensors: Mapping[str, Tensor], base: Base | type[Base]) -> dict[str, Tensor]:
    """Tensors of a LoRA for a transformer under other tools' names under those of diffusers, with kohya's alphas
    multiplied in; others unchanged, and layers that diffusers does not know.

    diffusers is given one layer at a time: of a whole file it leaves out some without a word.
    """
    loader = getattr(importlib.import_module("diffusers.loaders"), base.lora_loader or "")
    known = re.compile(base.lora_names)
    renamed: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if known.match(name) is None or (layer := _PART_OF_LAYER.sub("", name)) == name:
            renamed[name] = value
        else:
            layers.setdefault(layer, {})[name] = value
    for layer, parts in layers.items():
        # diffusers knows some layers by kohya's names alone, others by ComfyUI's.
        others = (_as_kohya, _as_comfyui) if _OF_ORIGINAL.match(layer) else ()
        named = (each for each in (*(rename(layer, parts) for rename in others), parts) if each)
        mapped = next((found for each in named if (found := _mapped(loader, each))), None)
        renamed |= parts if mapped is None else base.lora_of(layer, mapped)
    return renamed


def _mapped(loader: Any, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of one layer under diffusers' names; empty if diffusers does not know it."""
    try:
        with quiet_libraries():  # which warn of names that another attempt maps
            mapped = loader.lora_state_dict(dict(parts))
    except Exception:  # of many types, for names that it does not know
        return {}
    return {} if set(mapped) == set(parts) else dict(mapped)


def _as_kohya(layer: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of one layer that is called as in the original network, as by ComfyUI, under kohya's names."""
    path = layer.removeprefix(_COMFYUI_PREFIX).replace(".", "_")
    ends = {
        name: name.removeprefix(layer).replace("lora_A", "lora_down").replace("lora_B", "lora_up") for name in parts
    }
    return {f"lora_unet_{path}{ends[name]}": value for name, value in parts.items()}


def _as_comfyui(layer: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of one layer that is called as in the original network under ComfyUI's names, with its alpha multiplied
    in; empty without both halves."""
    ends = {name.removeprefix(layer): value for name, value in parts.items()}
    down = next((value for end, value in ends.items() if re.fullmatch(rf"\.{_DOWN}\.weight", end)), None)
    up = next((value for end, value in ends.items() if re.fullmatch(rf"\.{_UP}\.weight", end)), None)
    if down is None or up is None:
        return {}
    alpha = ends.get(".alpha")
    scale = 1.0 if alpha is None else float(alpha) / len(down)
    stem = _COMFYUI_PREFIX + layer.removeprefix(_COMFYUI_PREFIX)
    return {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up * scale}


def _place(found: re.Match[str], base: Base) -> tuple[str, str] | None:
    """Component and path of a module; None if the base has none."""
    networks = base.named_networks()
    component, _, path = found["path"].partition(".")
    denoiser = base.denoiser_component().name
    if component not in networks:  # peft's adapters of one network do not name it
        component, path = denoiser, found["path"]
    attention = found["attention"]
    if attention is not None:
        last = f"{attention}.0" if attention == "to_out" else attention
        path = f"{path}.{last if component == denoiser else _TEXT_ATTENTION[attention]}"
    # transformers 5 left out a level of some text encoders.
    for candidate in (path, path.removeprefix("text_model."), f"text_model.{path}"):
        with suppress(AttributeError):
            if isinstance(networks[component].get_submodule(candidate), nn.Linear | nn.Conv2d):
                return component, candidate
    return None


def _weight(network: nn.Module, module: str) -> Tensor:
    return network.get_parameter(f"{module}.weight")


def _check_shape(layer: _Layer, base: Base, component: str, module: str, file: str) -> None:
    weight = _weight(base.named_networks()[component], module)
    expected = (weight.shape[0], weight[0].numel())
    given = (len(layer.up), layer.down[0].numel())
    if given == (expected[0], 2 * expected[1]) and component == base.denoiser_component().name:
        raise UserError(
            f"{file} is a LoRA whose {module} also reads a condition image: pass it as a control"
            f" (--control {file}=IMAGE)",
            "wrong-kind",
        )
    if given != expected or layer.up.flatten(1).shape[1] != len(layer.down):
        raise UserError(
            f"{file} changes {given[0]} x {given[1]} weights of {component}.{module}, which has {expected[0]} x"
            f" {expected[1]} in {base.name}: it was trained for another base",
            "incompatible",
        )


def _unmatched_note(file: str, unmatched: Sequence[str], base: Base) -> tuple[str, ...]:
    if not unmatched:
        return ()
    more = f" and {len(unmatched) - _NAMED} more" if len(unmatched) > _NAMED else ""
    names = ", ".join(unmatched[:_NAMED])
    return (f"{file}: {len(unmatched)} tensors fit no layer of {base.name} and are left out: {names}{more}",)
