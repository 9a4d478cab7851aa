"""The interface of a control: what it reads, where it acts, and everything else that the package asks of a system.

A system is one class in one file of this folder (a large one may be a folder), registered by `registry.control`.
Loading, saving, converting, describing, training and sampling use the class and never its name.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Flag, auto
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.residuals import Residuals
from controlkit.bases.taps import Tap, TapFunction
from controlkit.bases.text import Text
from controlkit.controls.hints import ConditionDrop, Hint
from controlkit.controls.inputs import Input, takes_one_image, words_of_inputs
from controlkit.errors import UserError

if TYPE_CHECKING:
    from controlkit.controls.file_format import Checkpoint, FileFormat


class Reads(Flag):
    """What a control's residuals depend on besides its hint and its weights: determines how often they are computed."""

    NOTHING = 0
    """Computed once per condition image."""
    NOISE = auto()
    """The noisy latent x_t: computed at every step for every image."""
    TIME = auto()
    """The time t: computed once per step, shared by all images unless NOISE is set."""
    TEXT = auto()
    """The prompt: computed for both branches of classifier-free guidance, unless `Control.one_prompt`."""


class Acts(Flag):
    """Where a control acts."""

    RESIDUALS = auto()
    """It adds residuals at injection sites of the base (`Control.forward`)."""
    TAPS = auto()
    """It acts inside the base's forward pass, at every step (`Control.taps`)."""
    TOKENS = auto()
    """It appends tokens to those of the prompt (`Control.tokens`)."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """One way to train a system: a `system` of recipes, for any data source."""

    system: str
    """Its name in recipes."""
    also: tuple[str, ...] = ()
    """Aliases in recipes."""
    several: bool = False
    """Whether it trains several conditions at once."""
    options: type | None = None
    """A dataclass of further recipe settings and of other defaults for existing ones. A field `start` or `control`
    names a control file: the companion if the system has one, else the initial weights."""
    one_file: bool = False
    """Whether several conditions are trained into one file, called by the recipe's setting `name`."""
    together: bool = False
    """Whether each sample has images of all conditions at once (`Source.batch_together`), the control's inputs of the
    same names."""
    doc: str = ""
    """One sentence of documentation."""


class Control(nn.Module, ABC):
    """Condition image -> hint -> residuals, taps or tokens for a base.

    A new control does not change the base if its system is designed so (`starts_at_zero`).
    """

    kind: ClassVar[str]
    """The system's name in files, recipes and on the command line: `controlnet`, `ctrlora`, ..."""
    title: ClassVar[str]
    """Its name in text, with an article: `a ControlNet`."""
    paper: ClassVar[str] = ""
    """Authors, year and arXiv number."""
    architecture: ClassVar[str | None] = None
    """Second part of modelspec's `modelspec.architecture`; None is `kind`."""
    tag: ClassVar[str | None] = None
    """Its tag on the Hugging Face hub; None is `kind`."""

    inputs: tuple[Input, ...] = (Input(),)
    """Its inputs; a control may set its own, which its class knows by `class_of`."""
    reads: ClassVar[Reads]
    """What its residuals depend on; for a system with a choice, all that one may read (`reading` is what one does)."""
    one_prompt: ClassVar[bool] = False
    """Whether its residuals for the prompt act on the unconditional branch, too, in place of those for the negative
    prompt."""
    acts: ClassVar[Acts] = Acts.RESIDUALS
    enters: ClassVar[str]
    """Where it acts, as text: `decoder skips and middle`."""
    reads_tokens: ClassVar[bool] = False
    """Whether its text includes the tokens of other controls."""
    starts_at_zero: ClassVar[bool] = True
    """Whether a new one leaves the base unchanged."""

    Options: ClassVar[type | None] = None
    """A dataclass of the keyword options of `for_base`, which are also settings of its recipes."""
    trainings: ClassVar[tuple[Training, ...] | None] = None
    """Ways to train it; None is one condition with the settings of `Options`, as KIND or KIND-pairs."""
    hint_is_frozen: ClassVar[bool] = False
    """Whether `encode` uses no weights but the base's autoencoder's, so that training can cache hints."""
    formats: ClassVar[tuple[FileFormat, ...]] = ()
    """File formats of other tools. The native one, `config` and `file_state` in safetensors, needs no entry."""
    diffusers_class: ClassVar[str | None] = None
    """diffusers class whose folders contain it with the same names, if there is one."""
    convert_flags: ClassVar[tuple[str, ...]] = ()
    """Flags of `convert` for facts that the tensors of a file do not determine, such as `pooled`."""
    not_elsewhere: ClassVar[str] = ""
    """Why other tools cannot run it, for the error if a format cannot hold it."""
    companion: ClassVar[str | None] = None
    """Kind of the control that it depends on; the file is found by its fingerprint."""
    companion_key: ClassVar[str] = "control.companion"
    """Metadata key of the companion's file name; with the suffix `_fingerprint`, of its fingerprint."""

    condition: str | None
    """Name of the condition that it was trained on (`controlkit.conditions`), or None."""
    condition_drop: ConditionDrop | None = None
    """Conditions that training leaves out at random."""

    # Computation

    @abstractmethod
    def encode(self, inputs: Any, base: Base) -> Hint:
        """The part of the computation that depends on the condition image alone.

        Args:
            inputs: condition images `[B, 3, H, W]` in [0, 1] if `Control.inputs` has one entry, an image. Else a
                mapping from the names of the inputs in use to such images and to JSON values.

        Returns:
            A tensor `[B, ...]`, or a mapping of named ones.
        """

    def forward(self, x_t: Tensor | None, t: Tensor, text: Text | None, hint: Hint) -> Residuals:
        """Residuals for noisy latents `x_t` `[B, C, h, w]` at times `t` `[B]` under `text` and `hint`.

        Arguments that `reads` does not name may be None and are ignored.
        """
        raise TypeError(f"{self.title} adds no residuals")

    def taps(self, base: Base, x_t: Tensor, t: Tensor, text: Text, hint: Hint) -> Mapping[str, TapFunction | Tap]:
        """Point of `Base.points` -> function, for one call of the base with these rows.

        Functions may share state that belongs to this call alone. A block may run twice, the second time when gradient
        checkpointing recomputes it, so state must be overwritten, never accumulated. A `Tap` with `replaces` replaces
        the stream by its output.
        """
        return {}

    def unconditional(self, hint: Hint) -> Hint | None:
        """The hint that stands for no condition, of the same shapes, if it was trained with one; else None.

        The unconditional branch of CFG gets it for taps that act on both branches, which otherwise run with `hint`, and
        for tokens, which otherwise are those of `hint`, or zeros if the control acts on the conditional branch only.
        Residuals do not use it.
        """
        return None

    def replacements(self) -> Mapping[str, nn.Module]:
        """Path of a module of the base's denoiser -> module of the same interface that runs in its place.

        They run wherever the control acts, and no conditioning scale affects them. They are trained with the control.
        """
        return {}

    def tokens(self, hint: Hint) -> Tensor:
        """Tokens `[B, n, D]` to append to those of the prompt; n is the same for every hint."""
        raise TypeError(f"{self.title} adds no tokens")

    def incompatibility(self, base: Base) -> str | None:
        """Why it cannot act on `base`, in a few words such as "its channels: 3, the base's: 4"; None if it can."""
        return None

    @property
    def reading(self) -> Reads:
        """What its residuals depend on: `reads`, or a part of it."""
        return self.reads

    @property
    def conditional_only(self) -> bool:
        """Whether it acts on the conditional branch of CFG only."""
        return False

    @property
    def conditions(self) -> tuple[str, ...]:
        """The conditions that it follows, each by `for_condition`; empty if the file records none."""
        return () if self.condition is None else (self.condition,)

    @classmethod
    def conditions_in(cls, config: Mapping[str, Any]) -> tuple[str, ...]:
        """The names of which its condition must be one; empty if its config does not determine them."""
        return ()

    def with_values(self, values: Mapping[str, Any]) -> Control:
        """The control that the plain values among its inputs select, such as one of its conditions.

        Args:
            values: by the names of its inputs of kind `value`.

        Raises:
            UserError: they select nothing that it has.
        """
        return self

    # Running several in one pass, and cache keys

    @property
    def shared_network(self) -> nn.Module | None:
        """Network shared with other controls; controls of one network run in one pass (`forward_together`)."""
        return None

    @classmethod
    def forward_together(
        cls, controls: Sequence[Control], x_t: Tensor | None, t: Tensor, text: Text | None, hints: Sequence[Hint]
    ) -> list[Residuals]:
        """The residuals of several controls of one shared network.

        Args:
            x_t: `[B, C, h, w]`, the same for all; None if none of them reads it.
            t: `[B]`.
            text: of batch `B`; None if none of them reads it.
            hints: one per control, of batch `B`.
        """
        return [control(x_t, t, text, hint) for control, hint in zip(controls, hints, strict=True)]

    def weights(self) -> Iterable[nn.Parameter]:
        """All parameters that its residuals depend on."""
        return self.parameters()

    def hint_settings(self) -> Hashable:
        """What a frozen hint depends on besides the inputs and the base's autoencoder, for its cache key."""
        return json.dumps(self.config(), sort_keys=True)

    def frozen_encoder(self) -> str:
        """Identity of the weights of a frozen network of its own that makes its hints; empty if it has none."""
        return ""

    def state(self) -> Hashable:
        """What its residuals depend on besides weights, hint and `reads`, such as a selection."""
        return None

    def is_trained_alone(self) -> bool:
        """Whether it was trained on a fixed companion, so that training the companion cannot train it further."""
        return False

    # Construction

    @classmethod
    @abstractmethod
    def for_base(cls, base: Base, condition: str | None = None, **options: Any) -> Control:
        """A new control for `base`, on its device and in its dtype.

        Args:
            options: those of `Options`.

        Raises:
            UserError: the system does not support this base.
        """

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """JSON values from which `from_config` builds the same network."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any], condition: str | None = None) -> Control:
        """A network of `config` with arbitrary weights.

        Raises:
            ValueError, TypeError, KeyError: the config is invalid.
        """

    def file_state(self) -> dict[str, Tensor]:
        """The tensors of its file, with the system's own names."""
        return dict(self.state_dict())

    def load_file_state(self, state: Mapping[str, Tensor]) -> None:
        """Load the tensors of a file; names must match exactly."""
        self.load_state_dict(dict(state), strict=True, assign=True)

    @classmethod
    def shapes(cls, config: Mapping[str, Any]) -> dict[str, torch.Size]:
        """Names and shapes of the tensors of a file of `config`, from the meta device.

        Raises:
            ValueError, TypeError, KeyError: the config is invalid.
        """
        return dict(_shapes(cls, json.dumps(dict(config))))

    @classmethod
    def config_of(cls, tensors: Mapping[str, Tensor], unet_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The config inferred from tensors with the system's own names, for files without one.

        Args:
            unet_config: of the base, for settings that shapes do not determine.

        Raises:
            ValueError: it cannot be inferred.
        """
        raise ValueError("its config is not in the metadata and cannot be inferred from shapes")

    @classmethod
    def is_native(cls, tensors: Mapping[str, Tensor]) -> bool:
        """Whether a file without metadata has the system's own names; False if unknown."""
        return False

    @classmethod
    def missing_setting(cls, config: Mapping[str, Any]) -> str | None:
        """A setting that an inferred config still lacks, as text to follow "does not record"; None if it is
        complete."""
        return None

    # Files

    @classmethod
    def class_of(cls, config: Mapping[str, Any] | None) -> type[Control]:
        """The class of a file, or a subclass with the inputs of its control, if those depend on the config.

        Args:
            config: from the metadata of the file; None if it has none.
        """
        return cls

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, companion: Control | None = None) -> Control:
        """The control of a checkpoint, in float32 and frozen.

        Args:
            companion: its companion, loaded, if the system has one.
        """
        with torch.device("meta"):
            control = cls.from_config(checkpoint.config, checkpoint.condition)
        control.load_file_state(checkpoint.float_tensors())
        return control.eval().requires_grad_(False)

    def file_metadata(self) -> dict[str, str]:
        """Metadata of its file besides that of every control."""
        return {}

    @classmethod
    def fingerprint_of(cls, checkpoint: Checkpoint) -> str:
        """The fingerprint of a checkpoint, by which dependent controls identify it as their companion."""
        raise TypeError(f"{cls.title} is not a companion of another control")

    def fingerprint(self) -> str:
        """`fingerprint_of`, for a loaded control."""
        raise TypeError(f"{self.title} is not a companion of another control")

    def saved_fingerprint(self, dtype: torch.dtype) -> str | None:
        """Its fingerprint once saved in `dtype`; None if no control depends on it."""
        return None

    def keep_identity(self) -> None:
        """Called before a cast of its weights: its fingerprint remains that of the current weights."""

    def store_frozen(self, dtype: torch.dtype) -> None:
        """Cast frozen weights to `dtype`, for use under autocast; trainable weights keep theirs."""

    @classmethod
    def settle_checkpoint(cls, checkpoint: Checkpoint, flags: Collection[str]) -> None:
        """Complete a checkpoint that is converted with facts that its tensors do not determine.

        Args:
            flags: those of `convert_flags` in use.
        """

    @classmethod
    def usage(cls, file: str, base: str, condition: str | None) -> list[str]:
        """Lines of its model card that show how to use the file.

        Args:
            file: its name.
            base: name of the base.
            condition: that the file records.
        """
        source = "IMAGE" if takes_one_image(cls) else "INPUTS.json"
        note = [] if takes_one_image(cls) else ["", f"`INPUTS.json` lists its inputs: {words_of_inputs(cls)}."]
        return [f'    controlkit generate "PROMPT" --base {base} --control {file}={source} --seeds 4', *note]

    # Training

    @classmethod
    def for_training(
        cls,
        base: Base,
        conditions: Sequence[str],
        options: Mapping[str, Any],
        *,
        name: str,
        seed: int,
        start: Control | None = None,
        companion: Control | None = None,
    ) -> Control:
        """A control ready to train: `start` as it is, or a new one.

        Args:
            options: the recipe's settings that belong to the system (`Options`, `Training.options`).
            name: of the control and its file.
            seed: of random initialisation.

        Raises:
            UserError: an option other than its default contradicts `start`.
        """
        (condition,) = conditions
        if start is None:
            torch.manual_seed(seed)
            start = cls.for_base(base, condition, **options)
        else:
            _check_options(start, options)
        start.condition = condition
        return start.requires_grad_(True).train()

    @classmethod
    def options_of(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The values of `Options` that a config determines, by name; the others only initialise a new control."""
        return {name: config[name] for name in _defaults(cls.Options) if name in config}

    def trained_modules(self) -> dict[str, nn.Module]:
        """Modules that a run trains, by their names in its state."""
        return {"control": self}

    @abstractmethod
    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters that training updates."""

    def training_notes(self, learning_rate: float) -> list[str]:
        """Notes for the user before it trains at this peak learning rate."""
        return []

    def for_condition(self, condition: str) -> Control:
        """Of a control that follows several conditions: the one for this condition, until the next call."""
        return self

    def finished(self, name: str) -> dict[str, Control]:
        """Results of a run: file name -> control."""
        return {name: self}

    def copied_network(self) -> nn.Module | None:
        """The network initialised as a copy of part of the base, which offset transfer shifts; None if there is
        none."""
        return None

    def copied_from(self, base: Base) -> Mapping[str, Tensor]:
        """The tensors of a new control for `base` that are made from the base alone, by their names in
        `copied_network`; others are ignored."""
        return base.denoiser.state_dict()

    def mark_transferred(self) -> None:
        """Called before its weights are transferred to another base."""

    # Description

    @classmethod
    def needs(cls, config: Mapping[str, Any]) -> str:
        """Its requirements, as text, such as "a base whose UNet has ..."."""
        return "a base"

    @classmethod
    def facts(cls, config: Mapping[str, Any]) -> dict[str, str]:
        """Lines of `inspect` and of the card for a network of `config`, besides those of every system."""
        return {}

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of its file, in total and by part."""
        return {"parameters": sum(tensor.numel() for tensor in self.file_state().values())}

    @classmethod
    def variants(cls, base: Base, **options: Any) -> dict[str, Control]:
        """Controls to count when the system is described for a base, on the meta device; the key "" is the default."""
        return {"": cls.for_base(base, **options)}


class OneImage(Control):
    """A control with one condition image: `encode(condition_image, base)`."""

    @abstractmethod
    def encode(self, condition_image: Tensor, base: Base) -> Hint:
        """Condition images `[B, 3, H, W]` in [0, 1] => hint `[B, ...]`, computed once per condition image."""


def words_of_reads(control: Control | type[Control]) -> str:
    """What a control reads besides its hint, as text; taps read the base's features at every step."""
    reads = control.reading if isinstance(control, Control) else control.reads
    words = [flag.name.lower() for flag in reads if flag.name]
    return ", ".join([*words, *(["the base's features"] if Acts.TAPS in control.acts else [])]) or "nothing"


def residuals_together(
    controls: Sequence[Control], x_t: Tensor | None, t: Tensor, text: Text | None, hints: Sequence[Hint]
) -> list[Residuals]:
    """The residuals of one control, or of several of one shared network; as `Control.forward_together`."""
    if len(controls) == 1:
        return [controls[0](x_t, t, text, hints[0])]
    return controls[0].forward_together(controls, x_t, t, text, hints)


def _check_options(start: Control, options: Mapping[str, Any]) -> None:
    """Check that options other than their defaults are those of the control that training starts from.

    Raises:
        UserError: one is not, or it initialises new controls only.
    """
    existing = start.options_of(start.config())
    for name, default in _defaults(start.Options).items():
        wanted = options.get(name, default)
        if wanted == default or (name in existing and existing[name] == wanted):
            continue
        if name not in existing:
            raise UserError(
                f"{name} initialises a new control, but start gives the weights; remove one", "contradiction"
            )
        raise UserError(
            f"{name} is {wanted!r}, but {existing[name]!r} in the control to start from, whose value is kept; remove"
            f" {name}, or start from another control",
            "contradiction",
        )


def _defaults(options: type | None) -> dict[str, Any]:
    return {} if options is None else {field.name: field.default for field in fields(options)}


@lru_cache(maxsize=32)
def _shapes(kind: type[Control], config: str) -> tuple[tuple[str, torch.Size], ...]:
    """`Control.shapes`, cached."""
    with torch.device("meta"):
        control = kind.from_config(json.loads(config))
    return tuple((name, value.shape) for name, value in control.file_state().items())
