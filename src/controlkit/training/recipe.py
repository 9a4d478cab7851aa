"""What every recipe has: the settings that all training runs share, and what tells one run from another."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from controlkit.errors import UserError

RESERVED_NAMES = ("state", "state.previous", "state.damaged", "latents")
"""Files of a run, less their ending, which nothing that it makes may be called."""

TIME_SAMPLINGS = ("uniform", "cubic", "logit-normal")
"""What `bases.schedules.TIME_SAMPLINGS` explains, named here too because that module loads torch."""

_LEAST = {
    "steps": 1,
    "batch_size": 1,
    "warmup_steps": 0,
    "weight_decay": 0,
    "seed": 0,
    "log_every": 1,
    "save_every": 1,
    "preview_every": 1,
    "latent_channels": 1,
    "text_width": 1,
    "text_layers": 1,
    "variants": 1,
    "rank": 1,
    "score_pictures": 1,
    "gradient_accumulation_steps": 1,
    "snr_gamma": 0,
}
"""The smallest value of settings that have one, in whichever recipe they stand."""

_ADDED = {"flip": False, "gradient_checkpointing": False, "optimizer": "adamw", "least_scale": 0.6}
_ADDED |= {"image_column": None, "conditioning_image_column": None, "caption_column": None}
"""Settings that came when there were recorded runs already, and the value with which a run is what those were."""

FORMER = {"warmup_steps": 100}
"""Settings that were numbers before they could be None, and the number that recorded runs have where None stands now;
they count as that number in what identifies a run."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every training run has."""

    system: ClassVar[str]
    objective: ClassVar[str]
    """`module:class` of what it trains, imported when it is needed."""

    out: str
    """Folder of the run: state, logs, previews and the finished files."""
    steps: int
    """Optimiser steps in all. A finished run goes on when the same recipe is run with more."""
    batch_size: int = 32
    """Images a step."""
    gradient_accumulation_steps: int | None = None
    """Batches whose gradients are averaged for one optimiser step; None is 1."""
    learning_rate: float = 3e-4
    """Peak learning rate of AdamW."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises from zero; null for 100, or a fifth of `steps` if that is less."""
    min_lr_rate: float = 0.02
    """Where the cosine schedule ends, as a fraction of `learning_rate`. 1 keeps the rate constant."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    beta2: float = 0.99
    """AdamW's second-moment decay."""
    max_grad_norm: float | None = 1.0
    """Largest gradient norm."""
    ema: float | None = None
    """Decay of the exponential moving average of the weights, which is what is saved; None for none."""
    optimizer: str = "adamw"
    """`adamw`, or `adamw8bit`, whose moments take 8 bits each (needs bitsandbytes; pays where much is trained)."""
    precision: str = "fp32"
    """`fp32`, or `bf16` for autocast (pays only where the processor has bf16 arithmetic), or `auto`: bf16 on a CUDA
    device that has it. In training from pairs, frozen weights are stored in bf16, too."""
    device: str = "auto"
    """`auto` (CUDA, then MPS, then CPU) or a torch device."""
    seed: int = 0
    """Everything that is drawn at random follows from this and the step's number."""
    log_every: int = 20
    """Steps between lines of the log."""
    save_every: int = 500
    """Steps between checkpoints of the state."""
    preview_every: int = 500
    """Steps between previews with their scores."""

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, least in _LEAST.items():
            value = values.get(name)
            if value is not None and not (value >= least and math.isfinite(value)):
                raise UserError(f"{name} is {values[name]}; it must be at least {least}")
        for name in ("learning_rate", "max_grad_norm"):
            if values[name] is not None and not (values[name] > 0 and math.isfinite(values[name])):
                raise UserError(f"{name} is {values[name]}; it must be above 0")
        _check_time_sampling(values.get("time_sampling"))
        for name in ("min_lr_rate", "prompt_drop"):
            if name in values and not 0 <= values[name] <= 1:
                raise UserError(f"{name} is {values[name]}; it must be between 0 and 1")
        if not 0 <= self.beta2 < 1:
            raise UserError(f"beta2 is {self.beta2}; it must be from 0 to just below 1")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed is {self.seed}; it must be from 0 to below 2^63")
        if self.precision not in ("fp32", "bf16", "auto"):
            raise UserError(f"precision is {self.precision!r}; it must be fp32, bf16 or auto")
        if self.optimizer not in ("adamw", "adamw8bit"):
            raise UserError(f"optimizer is {self.optimizer!r}; it must be adamw or adamw8bit")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"ema is {self.ema}; it must be between 0 and 1, or null for none")

    @property
    def results(self) -> tuple[str, ...]:
        """Files and folders in `out` that the finished run writes."""
        return ()


def _check_time_sampling(name: str | None) -> None:
    if name is not None and name not in TIME_SAMPLINGS:
        raise UserError(f"time_sampling is {name!r}; expected one of {', '.join(TIME_SAMPLINGS)}")


@dataclass(frozen=True, kw_only=True)
class ControlRecipe(Recipe, ABC):
    """Training a control on a frozen base, whatever its system and wherever its data comes from.

    `recipes.py` adds the settings of a system (`Training.options`) and of a source of data (`Source.Settings`). The
    class of a system makes recipes of the source whose name is among the settings.
    """

    objective: ClassVar[str] = "controlkit.training.control_objective:ControlObjective"
    training: ClassVar[Any]
    """The `Training` of its system."""
    control_class: ClassVar[Any]
    """The class of its system."""
    source: ClassVar[Any] = None
    """The class of its source of data."""

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
    score_pictures: int = 32
    """Held-out images on which each preview scores condition following."""

    def __new__(cls, **settings: Any) -> Self:
        kind: type[Any] = cls
        if cls.source is None:
            from controlkit.training.recipes import with_source

            kind = with_source(cls, settings)
        return super().__new__(kind)

    @property
    @abstractmethod
    def condition_names(self) -> tuple[str, ...]:
        """The conditions that it trains."""

    @property
    @abstractmethod
    def control_name(self) -> str:
        """What the control is called."""

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
class OneCondition(ControlRecipe):
    """A control of one condition."""

    condition: str
    """Name of the condition (`controlkit condition --list`)."""
    name: str | None = None
    """Name of the control and of its file; None is the condition's."""

    @property
    def condition_names(self) -> tuple[str, ...]:
        return (self.condition,)

    @property
    def control_name(self) -> str:
        return self.condition if self.name is None else self.name

    @property
    def results(self) -> tuple[str, ...]:
        return (f"{self.control_name}.safetensors",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name is None:
            return
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise UserError(f"name {self.name!r} is not a valid file name")
        if self.name in RESERVED_NAMES:
            raise UserError(f"name {self.name!r} is reserved for the run's own files; choose another")


@dataclass(frozen=True, kw_only=True)
class SeveralConditions(ControlRecipe):
    """A control of several conditions together."""

    conditions: tuple[str, ...]
    """Names of the base conditions; each step trains one of them, all equally often."""

    @property
    def condition_names(self) -> tuple[str, ...]:
        return self.conditions

    @property
    def control_name(self) -> str:
        return self.conditions[0]

    @property
    def results(self) -> tuple[str, ...]:
        return ("base.safetensors", *(f"{name}.safetensors" for name in self.conditions))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.conditions or len(set(self.conditions)) != len(self.conditions):
            raise UserError(f"conditions must be a list of different names, got {list(self.conditions)}")


def identifying(recipe: Recipe) -> dict[str, Any]:
    """The settings by which one run is told from another; a setting of `_ADDED` counts where it changes something."""
    settings = dataclasses.asdict(recipe)
    settings |= {name: value for name, value in FORMER.items() if settings[name] is None}
    return {name: value for name, value in settings.items() if name not in _ADDED or value != _ADDED[name]}
