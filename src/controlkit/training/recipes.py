"""Recipes: every setting of a training run, typed, read from YAML.

A recipe file names its `system` and sets fields of that system's class below. Unknown keys, wrong types and
contradictions are errors before anything is loaded. Recipes of controls are made of two parts: where the data comes
from, which stands here, and the settings of the system, which stand with it (`Control.trainings`).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import yaml

from controlkit.bases.known import NANO_DEFAULTS, defaults_in
from controlkit.data.readers.columns import Columns
from controlkit.errors import UserError, nearest
from controlkit.nano.icons import LEAST_SCALE, TRAINED_STYLES
from controlkit.settings import build_settings, read_overrides
from controlkit.training.recipe import Recipe

RESERVED_NAMES = ("state", "state.previous", "state.damaged", "latents")
"""Files of a run, less their ending, which nothing that it makes may be called."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderRecipe(Recipe):
    """The autoencoder of an embedded base, from scratch, on icons."""

    system: ClassVar[str] = "autoencoder"

    icons: str
    """File of rendered icons (`recipes/nano/build_pictures.py`)."""
    channels: tuple[int, ...] = (16, 32, 64)
    """Channels of each resolution; one fewer halvings than entries."""
    latent_channels: int = 4
    """Channels of the latent."""
    kl_weight: float = 2e-5
    """Weight of the mean KL divergence of a latent element to a unit normal."""
    gradient_weight: float = 0.5
    """Weight of the L1 distance of horizontal and vertical differences, which keeps edges sharp."""
    square_weight: float = 1.0
    """Weight of the squared error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_channels(self.channels)

    @property
    def results(self) -> tuple[str, ...]:
        return ("vae",)


@dataclass(frozen=True, kw_only=True)
class BaseRecipe(Recipe):
    """The text encoder and UNet of an embedded base, together, on icons: from scratch, or from a base that there is."""

    system: ClassVar[str] = "base"

    icons: str
    """File of rendered icons."""
    autoencoder: str | None = None
    """Folder of the run that trained the autoencoder; this or `start`."""
    start: str | None = None
    """The base to start from, all of it: `nano` or a diffusers folder. Channels and text settings are its own then."""
    styles: tuple[str, ...] | None = None
    """Styles of icons to train on; None for all four. One alone makes a community model of a base."""
    concepts: str | None = None
    """Text file of the concepts to train on, one a line; None for all that can be drawn."""
    least_scale: float = LEAST_SCALE
    """Side of the smallest icon in a drawing, as a fraction of the drawing's."""
    time_sampling: str | None = None
    """How times of the noise schedule are drawn: `uniform`, `cubic` (more of the noisy ones) or `logit-normal` (more of
    those in the middle). None is the base's own: uniform for Stable Diffusion and nano."""
    snr_gamma: float | None = None
    """Weights the loss by min-SNR with this gamma (Hang et al. 2023 take 5); None weights all times alike."""
    channels: tuple[int, ...] = (48, 96, 160)
    """Channels of each resolution of the UNet."""
    attention: tuple[bool, ...] = (False, True, True)
    """Which resolutions have transformer blocks."""
    text_width: int = 128
    """Width of the text encoder and of cross attention."""
    text_layers: int = 2
    """Layers of the text encoder."""
    prompt_drop: float = 0.1
    """Share of prompts replaced by the empty prompt."""
    variants: int = 6
    """Drawings of each icon (background, scale, place) whose latents are kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.autoencoder is None) == (self.start is None):
            raise UserError("give either autoencoder (to train from scratch) or start (to go on from a base)")
        if not 0.1 <= self.least_scale <= 1:
            raise UserError(f"least_scale is {self.least_scale}; it must lie from 0.1 to 1")
        _check_channels(self.channels)
        if self.styles is not None and not set(self.styles) <= set(TRAINED_STYLES):
            raise UserError(f"styles are {list(self.styles)}; known: {', '.join(TRAINED_STYLES)}")
        if len(self.attention) != len(self.channels):
            raise UserError(
                f"attention has {len(self.attention)} entries and channels {len(self.channels)}; give one for each"
            )

    @property
    def results(self) -> tuple[str, ...]:
        return ("base",)


@dataclass(frozen=True, kw_only=True)
class ControlRecipe(Recipe, ABC):
    """What training a control on a frozen base has in common, wherever its data comes from."""

    training: ClassVar[Any]
    """The `Training` of its system."""
    control_class: ClassVar[Any]
    """The class of its system."""

    base: str = "nano"
    """The base that it steers."""
    gradient_checkpointing: bool = False
    """Compute activations a second time in the backward pass: much less memory, about a third more time."""
    time_sampling: str | None = None
    """How times of the noise schedule are drawn: `uniform`, `cubic` (more of the noisy ones) or `logit-normal` (more of
    those in the middle). None is the base's own: uniform for Stable Diffusion and nano."""
    snr_gamma: float | None = None
    """Weights the loss by min-SNR with this gamma (Hang et al. 2023 take 5); None weights all times alike."""
    prompt_drop: float = 0.5
    """Share of prompts replaced by the empty prompt."""

    @property
    @abstractmethod
    def condition_names(self) -> tuple[str, ...]:
        """The conditions that it trains."""

    @property
    def options(self) -> dict[str, Any]:
        """The settings that are the system's own."""
        kind = self.training.options
        return {} if kind is None else {field.name: getattr(self, field.name) for field in dataclasses.fields(kind)}

    @property
    def started_from(self) -> str | None:
        """The control to go on from, or the one that its system is nothing without."""
        return self.options.get("start") or self.options.get("control")

    def summary(self) -> dict[str, Any]:
        """How a file came to be, for its metadata."""
        told = {key: getattr(self, key) for key in ("steps", "batch_size", "learning_rate", "prompt_drop", "seed")}
        start = getattr(self, "start", None)
        return told if start is None else {**told, "start": start}


@dataclass(frozen=True, kw_only=True)
class SteeringRecipe(ControlRecipe, ABC):
    """What training a control on a frozen base, on millions of pictures, has in common."""

    icons: str | None = None
    """File of rendered icons; this or `multigen`."""
    multigen: str | None = None
    """Folder of MultiGen-20M (`json_files`, `images`, `conditions`), whose tasks are the conditions."""
    variants: int = 4
    """Drawings of each icon whose latents are kept."""
    score_pictures: int = 32
    """Held-out pictures on which each preview scores condition following."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.icons is None) == (self.multigen is None):
            raise UserError("give either icons or multigen: where the pictures come from")


@dataclass(frozen=True, kw_only=True)
class ConditionRecipe(SteeringRecipe):
    """A control of one condition, on pictures whose condition images are made or listed."""

    condition: str
    """Name of the condition (`controlkit condition --list`)."""

    @property
    def condition_names(self) -> tuple[str, ...]:
        return (self.condition,)

    @property
    def results(self) -> tuple[str, ...]:
        return (f"{self.condition}.safetensors",)


@dataclass(frozen=True, kw_only=True)
class ConditionsRecipe(SteeringRecipe):
    """A control of several conditions together."""

    conditions: tuple[str, ...]
    """Names of the base conditions; each step trains one of them, all equally often."""

    @property
    def condition_names(self) -> tuple[str, ...]:
        return self.conditions

    @property
    def results(self) -> tuple[str, ...]:
        return ("base.safetensors", *(f"{name}.safetensors" for name in self.conditions))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.conditions or len(set(self.conditions)) != len(self.conditions):
            raise UserError(f"conditions must be a list of different names, got {list(self.conditions)}")


@dataclass(frozen=True, kw_only=True)
class PairsRecipe(ControlRecipe):
    """What training a control from a folder of pairs has in common."""

    pairs: str
    """Pairs in any layout of docs/pairs.md."""
    image_column: str | None = None
    """The column of images, where `pairs` is a table (JSON lines, CSV, Parquet); None finds it by its name."""
    conditioning_image_column: str | None = None
    """The same of condition images."""
    caption_column: str | None = None
    """The same of captions."""
    name: str = "control"
    """Name of the control and of its file."""
    condition: str = "identity"
    """Condition by which fidelity is scored; `identity` compares the result with the true picture."""
    steps: int = 500
    """Optimiser steps in all."""
    batch_size: int = 16
    """Pairs a step."""
    save_every: int = 100
    """Steps between checkpoints of the state."""
    preview_every: int = 100
    """Steps between previews with their scores."""
    held_out: float = 0.1
    """Share of the pairs that are not trained on, and judged by."""
    prompt_drop: float = 0.3
    """Share of prompts replaced by the empty prompt (0.3 in CtrLoRA's reference)."""
    flip: bool = False
    """Mirror half of the pairs at random, condition image and picture together. Not for pictures with writing, or
    prompts that say left and right."""
    score_pictures: int = 16
    """Held-out pairs on which each preview scores condition following."""

    @property
    def columns(self) -> Columns:
        """The columns of a table that are named."""
        return Columns(
            image=self.image_column, conditioning_image=self.conditioning_image_column, caption=self.caption_column
        )

    @property
    def condition_names(self) -> tuple[str, ...]:
        return (self.condition,)

    @property
    def results(self) -> tuple[str, ...]:
        return (f"{self.name}.safetensors",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.held_out < 1:
            raise UserError(f"held_out is {self.held_out}; it must be from 0 to below 1")
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise UserError(f"name is {self.name!r}; it must do as the name of a file")
        if self.name in RESERVED_NAMES:
            raise UserError(f"name is {self.name!r}, as files of the run itself are called; give another")


def adapter_settings(base: str) -> dict[str, Any]:
    """Settings of an adapter that depend on its base, where none are given.

    What the base's folder says, as nano's does (docs/ctrlora.md); else those of Xu et al. 2025 (section 4.1), with
    batches of 4.
    """
    defaults = NANO_DEFAULTS if base == "nano" else defaults_in(Path(base))
    if isinstance(own := defaults.get("adapter"), dict):
        return dict(own)
    paper = {"rank": 128, "learning_rate": 1e-5, "batch_size": 4, "min_lr_rate": 1.0, "warmup_steps": 0, "beta2": 0.999}
    return {**paper, "steps": 1000, "preview_every": 500, "precision": "auto"}


def _check_channels(channels: Sequence[int]) -> None:
    if not channels or any(width < 8 or width % 8 for width in channels):
        raise UserError(f"channels are {list(channels)}; they must be multiples of 8, one for each resolution")


def _recipe_of(kind: Any, training: Any) -> type[Recipe]:
    """The recipe of one `Training` of a system: that of its data, with the system's own settings."""
    data: type[Recipe] = PairsRecipe
    if training.data == "conditions":
        data = ConditionsRecipe if training.several else ConditionRecipe
    own = (training.options,) if training.options is not None else ()
    facts = {
        "__doc__": training.doc or f"{kind.title}.",
        "__module__": __name__,
        "__annotations__": {},
        "system": training.system,
        "training": training,
        "control_class": kind,
    }
    _refuse_clashes(kind, own, data)
    name = "".join(part.title() for part in training.system.split("-"))
    return dataclass(frozen=True, kw_only=True)(type(f"{name}Recipe", (*own, data), facts))


_OF_BASES: dict[str, type[Recipe]] = {kind.system: kind for kind in (AutoencoderRecipe, BaseRecipe)}


def _refuse_clashes(kind: Any, own: tuple[type, ...], data: type[Recipe]) -> None:
    """A setting of a system may give one of every recipe another default, and mean nothing else by it."""
    common = {field.name: str(field.type) for field in dataclasses.fields(data)}
    for options in own:
        for field in dataclasses.fields(options):
            if str(field.type) != common.get(field.name, str(field.type)):
                raise UserError(
                    f"{kind.title} has a setting {field.name} ({field.type}), which means something else in every"
                    f" recipe ({common[field.name]}); call it otherwise"
                )


@cache
def recipes() -> dict[str, type[Recipe]]:
    """Every `system` that `controlkit train` trains -> the class of its recipes."""
    from controlkit.controls.registry import registry, trainings_of

    made = dict(_OF_BASES)
    for kind in registry().values():
        for training in trainings_of(kind):
            if training.system in made:
                raise UserError(f"{kind.title} trains as {training.system!r}, which another system does already")
            made[training.system] = _recipe_of(kind, training)
    return made


def recipe_class(system: str) -> type[Recipe]:
    """The class of the recipes of a system; systems of controls are loaded only if it is not one of a base's.

    Raises:
        UserError: there is no such system.
    """
    if system in _OF_BASES:
        return _OF_BASES[system]
    if system not in recipes():
        raise UserError(f"system is {system!r}{nearest(system, list(recipes()))}")
    return recipes()[system]


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the YAML file `path`, with `key=value` overrides laid over it.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown (with the nearest known ones), a value has
            the wrong type, or two settings contradict each other.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except FileNotFoundError as error:
        files = [*Path(path).parent.glob("*.yaml"), *Path("recipes").rglob("*.yaml")]
        known = [*recipes(), *dict.fromkeys(map(str, sorted(files)))]
        raise UserError(f"cannot read the recipe {path}: there is no such file{nearest(str(path), known)}") from error
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:  # a date that there is not is a ValueError
        raise UserError(f"the recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"the recipe {path} must be a mapping of settings, not {type(values).__name__}")
    values.update(read_overrides(overrides))
    return build_recipe(values, origin=str(path))


def build_recipe(values: dict[str, Any], origin: str = "recipe") -> Recipe:
    """A `Recipe` of the class that `values["system"]` names, from plain values; `origin` stands in errors."""
    values = dict(values)
    system = values.pop("system", None)
    if not isinstance(system, str):
        raise UserError(f"{origin}: system is {system!r}{nearest(str(system), list(recipes()))}")
    try:
        kind = recipe_class(system)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
    return build_settings(kind, values, f"{origin}: system {system}")
