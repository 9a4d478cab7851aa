"""Settings that all training runs share, and those that identify a run."""

from __future__ import annotations

import dataclasses
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from controlkit.errors import UserError

RESERVED_NAMES = ("state", "state.previous", "state.damaged", "latents")
"""Stems of a run's own files, which its results must not use."""

_TOGETHER = "base"
"""Stem of what all conditions of a run share, where each has a file of its own."""

_LONGEST_NAME = 200
"""Bytes of a name. File systems allow 255, which must suffice for temporary files, too."""

TIME_SAMPLINGS = ("uniform", "cubic", "logit-normal")
"""The names of `bases.schedules.TIME_SAMPLINGS`, repeated because that module imports torch."""

_LEAST = {
    "steps": 1,
    "batch_size": 1,
    "warmup_steps": 0,
    "weight_decay": 0,
    "seed": 0,
    "log_every": 1,
    "save_every": 1,
    "preview_every": 1,
    "patience": 1,
    "latent_channels": 1,
    "text_width": 1,
    "text_layers": 1,
    "variants": 1,
    "crops": 1,
    "rank": 1,
    "token_count": 1,
    "score_pictures": 1,
    "gradient_accumulation_steps": 1,
    "kl_weight": 0,
    "gradient_weight": 0,
    "square_weight": 0,
    "data_workers": 0,
}
"""Minimum of settings, in whichever recipe."""

_CHOICES = {
    "precision": ("fp32", "bf16", "auto"),
    "optimizer": ("adamw", "adamw8bit"),
    "graphs": ("auto", "on", "off"),
}
"""The possible values of settings."""

_ADDED = {"flip": False, "crops": 1, "gradient_checkpointing": False, "optimizer": "adamw", "least_scale": 0.6}
_ADDED |= {"sd_locked": True, "only_mid_control": False}
_ADDED |= {"global_average_pooling": False, "gaussian_convolutions": False}
_ADDED |= {"image_column": None, "conditioning_image_column": None, "caption_column": None}
"""Settings added later, with the value that reproduces runs from before; with it, they do not identify a run."""

CHANGEABLE = ("batch_size", "gradient_accumulation_steps", "precision")
"""Settings that `change_on_resume` may name: those that the state of a run does not depend on."""

FORMER = {"warmup_steps": 100}
"""Settings that became optional, with their number in runs from before. In what identifies a run, None counts as that
number."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of every training run."""

    system: ClassVar[str]
    objective: ClassVar[str]
    """`module:class` of the objective, imported when it is needed."""

    out: str
    """Folder of the run: state, logs, previews and results."""
    steps: int
    """Total optimiser steps. With more steps, the same recipe continues a finished run."""
    batch_size: int = 32
    """Images per step."""
    gradient_accumulation_steps: int | None = None
    """Batches per optimiser step, whose gradients are averaged; null for 1."""
    learning_rate: float = 3e-4
    """Peak learning rate of AdamW."""
    warmup_steps: int | None = None
    """Steps of linear learning rate warm-up; null for 100, or a fifth of `steps` if that is less."""
    min_lr_rate: float = 0.02
    """End of the cosine schedule as a fraction of `learning_rate`; 1 for a constant rate."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    beta2: float = 0.99
    """AdamW's second-moment decay."""
    max_grad_norm: float | None = 1.0
    """Maximum gradient norm; null for no clipping."""
    ema: float | None = None
    """Decay of the exponential moving average of the weights, which is saved in their place; null for none."""
    optimizer: str = "adamw"
    """`adamw`, or `adamw8bit` with moments in 8 bits (needs bitsandbytes; worthwhile for many parameters)."""
    precision: str = "fp32"
    """`fp32`, `bf16` for autocast (faster only with bf16 hardware), or `auto`: bf16 on a CUDA device that supports it
    and on a CPU with AMX. With bf16, the frozen weights under a control are stored in bf16, too."""
    device: str = "auto"
    """`auto` (CUDA, then MPS, then CPU) or a torch device."""
    seed: int = 0
    """Seed of everything random, together with the number of the step."""
    data_workers: int | None = None
    """Processes that prepare batches ahead of their steps, with the same results; 0 prepares them in the step. Null is
    automatic: 0 on the CPU, else one per core but one, at most 8."""
    graphs: str = "auto"
    """Whether the base's denoiser runs as a CUDA graph in training steps: `auto` where that is possible, `on` (an error
    where it is not) or `off`."""
    log_every: int = 20
    """Steps between lines of the log. On a GPU, losses are read and checked as often."""
    save_every: int = 500
    """Steps between checkpoints of the training state."""
    preview_every: int = 500
    """Steps between previews, which are scored."""
    patience: int | None = None
    """Previews without a better held-out score after which the run ends, with the weights of the best preview; null for
    all `steps`."""
    change_on_resume: tuple[str, ...] = ()
    """Settings whose new values a run may resume with, though it began with others: `batch_size`,
    `gradient_accumulation_steps`, `precision`."""

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, least in _LEAST.items():
            value = values.get(name)
            if value is not None and not (value >= least and math.isfinite(value)):
                raise UserError(f"{name} is {values[name]}; it must be at least {least}", "out-of-range")
        for name in ("learning_rate", "max_grad_norm", "snr_gamma"):
            value = values.get(name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UserError(f"{name} is {value}; it must be above 0", "out-of-range")
        _check_time_sampling(values.get("time_sampling"))
        _check_fractions(values)
        _check_changeable(self.change_on_resume)
        if not 0 <= self.beta2 < 1:
            raise UserError(f"beta2 is {self.beta2}; it must be at least 0 and below 1", "out-of-range")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed is {self.seed}; it must be at least 0 and below 2^63", "out-of-range")
        for name, (*most, last) in _CHOICES.items():
            if values[name] not in (*most, last):
                raise UserError(f"{name} is {values[name]!r}; it must be {', '.join(most)} or {last}", "unknown-name")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"ema is {self.ema}; it must be above 0 and below 1, or null for none", "out-of-range")

    @property
    def results(self) -> tuple[str, ...]:
        """Files and folders that the finished run writes into `out`."""
        return ()


def _check_time_sampling(name: str | None) -> None:
    if name is not None and name not in TIME_SAMPLINGS:
        raise UserError(f"time_sampling is {name!r}; expected one of {', '.join(TIME_SAMPLINGS)}", "unknown-name")


def _check_changeable(names: Sequence[str]) -> None:
    for name in names:
        if name not in CHANGEABLE:
            raise UserError(f"change_on_resume has {name!r}; expected any of {', '.join(CHANGEABLE)}", "unknown-name")


def _check_fractions(values: Mapping[str, Any]) -> None:
    for name in ("min_lr_rate", "prompt_drop", "keep_all", "drop_all", "drop_each"):
        if name in values and not 0 <= values[name] <= 1:
            raise UserError(f"{name} is {values[name]}; it must be between 0 and 1", "out-of-range")
    if not 0 < values.get("size_ratio", 1) <= 1:
        raise UserError(f"size_ratio is {values['size_ratio']}; it must be above 0 and at most 1", "out-of-range")
    if (both := values.get("keep_all", 0) + values.get("drop_all", 0)) > 1:
        raise UserError(f"keep_all + drop_all is {both:g}; it must be at most 1", "out-of-range")


def _check_name(name: str, setting: str = "name", reserved: Sequence[str] = RESERVED_NAMES) -> None:
    if not name or "/" in name or name.startswith("."):
        raise UserError(f"{setting} {name!r} is not a valid file name", "wrong-type")
    if (length := len(os.fsencode(name))) > _LONGEST_NAME:
        raise UserError(
            f"{setting} has {length} bytes; a file's name has room for {_LONGEST_NAME}: choose a shorter one",
            "out-of-range",
        )
    if name in reserved:
        raise UserError(f"{setting} {name!r} is reserved for the run's own files; choose another", "would-overwrite")


@dataclass(frozen=True, kw_only=True)
class ControlRecipe(Recipe, ABC):
    """Training a control of any system on a frozen base, with data from any source.

    `recipes.py` adds the settings of a system (`Training.options`) and of a source of data (`Source.Settings`). Calling
    the class of a system creates a recipe of the source that is named among the settings.
    """

    objective: ClassVar[str] = "controlkit.training.control_objective:ControlObjective"
    training: ClassVar[Any]
    """The `Training` of its system."""
    control_class: ClassVar[Any]
    """The class of its system."""
    source: ClassVar[Any] = None
    """The class of its source of data."""

    base: str = "nano"
    """The base model."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: much less memory, about a third more time."""
    time_sampling: str | None = None
    """Distribution of training times: `uniform`, `cubic` (more noisy ones) or `logit-normal` (more in the middle); null
    is the base's own: uniform for Stable Diffusion and nano."""
    snr_gamma: float | None = None
    """Gamma of min-SNR loss weighting, above 0 (5 in Hang et al. 2023); null weights all times equally."""
    prompt_drop: float = 0.5
    """Fraction of prompts replaced by the empty prompt."""
    score_pictures: int = 32
    """Held-out images on which each preview scores fidelity to the condition."""

    def __new__(cls, **settings: Any) -> Self:
        kind: type[Any] = cls
        if cls.source is None:
            from controlkit.training.recipes import with_source

            kind = with_source(cls, settings)
        return super().__new__(kind)

    @property
    @abstractmethod
    def condition_names(self) -> tuple[str, ...]:
        """The trained conditions."""

    @property
    @abstractmethod
    def control_name(self) -> str:
        """Name of the control."""

    @property
    def options(self) -> dict[str, Any]:
        """The settings of the system."""
        kind = self.training.options
        return {} if kind is None else {field.name: getattr(self, field.name) for field in dataclasses.fields(kind)}

    @property
    def started_from(self) -> str | None:
        """The control that training starts from, or the one that its system requires."""
        return self.options.get("start") or self.options.get("control")

    def summary(self) -> dict[str, Any]:
        """Training settings for the metadata of the results."""
        metadata = {key: getattr(self, key) for key in ("steps", "batch_size", "learning_rate", "prompt_drop", "seed")}
        start = getattr(self, "start", None)
        return metadata if start is None else {**metadata, "start": start}


@dataclass(frozen=True, kw_only=True)
class OneCondition(ControlRecipe):
    """A control of one condition."""

    condition: str
    """Name of the condition (`controlkit condition --list`)."""
    name: str | None = None
    """Name of the control and of its file; null for the name of the condition."""

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
        _check_name(self.control_name, "condition" if self.name is None else "name")


@dataclass(frozen=True, kw_only=True)
class SeveralConditions(ControlRecipe):
    """A control of several conditions together."""

    conditions: tuple[str, ...]
    """Names of the conditions; each step trains one of them, all equally often."""

    @property
    def condition_names(self) -> tuple[str, ...]:
        return self.conditions

    @property
    def control_name(self) -> str:
        return getattr(self, "name", self.conditions[0])

    @property
    def results(self) -> tuple[str, ...]:
        if self.training.one_file:
            return (f"{self.control_name}.safetensors",)
        return tuple(f"{name}.safetensors" for name in (_TOGETHER, *self.conditions))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.conditions:
            raise UserError("conditions is empty; it must list at least one name", "missing-setting")
        if len(set(self.conditions)) != len(self.conditions):
            raise UserError(f"conditions must be different names, got {list(self.conditions)}", "contradiction")
        if self.training.one_file:
            _check_name(self.control_name)
        else:
            for name in self.conditions:
                _check_name(name, "condition", (*RESERVED_NAMES, _TOGETHER))


def identifying(recipe: Recipe) -> dict[str, Any]:
    """The settings that identify a run; those of `_ADDED` only if they differ from earlier runs."""
    return identifying_settings(dataclasses.asdict(recipe))


def identifying_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`identifying`, of the settings of a recipe that may be recorded in a file."""
    known = {**settings, **{name: value for name, value in FORMER.items() if settings.get(name) is None}}
    return {name: value for name, value in known.items() if name not in _ADDED or value != _ADDED[name]}
