"""The contract of a control: what it reads, where it acts, and all that the rest of the house asks of a system.

A system is one class in one file of this folder (a large one may be a folder), registered by `registry.control`.
Loading, saving, converting, describing, training and sampling ask the class and never its name.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Flag, auto
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.residuals import Residuals
from controlkit.bases.taps import Tap, TapFunction
from controlkit.bases.text import Text
from controlkit.controls.hints import Hint

if TYPE_CHECKING:
    from controlkit.controls.file_format import Checkpoint, FileFormat


class Reads(Flag):
    """What a control's residuals depend on besides its hint and its own weights: what decides how often they run."""

    NOTHING = 0
    """Computed once for a condition."""
    NOISE = auto()
    """The noisy latent x_t: computed at every step for every image."""
    TIME = auto()
    """The time t: computed once for a step, shared by all images if NOISE is absent."""
    TEXT = auto()
    """The prompt: computed for both halves of classifier-free guidance."""


class Acts(Flag):
    """Where a control acts."""

    RESIDUALS = auto()
    """It adds residuals at sites of the base (`Control.forward`)."""
    TAPS = auto()
    """It acts inside of the base's own pass, at every step (`Control.taps`)."""
    TOKENS = auto()
    """It adds tokens to those of the prompt (`Control.tokens`)."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """One thing that a control is given."""

    name: str = "image"
    kind: Literal["image", "value"] = "image"
    """A condition image, `[B, 3, H, W]` in [0, 1]; or a plain value of JSON, such as boxes with phrases."""
    condition: str | None = None
    """Of an image: the condition that makes it of a photo; None is the control's own."""
    required: bool = True
    """Whether a control cannot do without."""
    check: Callable[[Any], str | None] | None = None
    """What is wrong with a value, in words that follow its name, such as "must be a list of boxes"; None if nothing is.
    It is asked before anything is loaded."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """One way to train a system: a `system` of recipes, from any source of data."""

    system: str
    """What recipes call it."""
    also: tuple[str, ...] = ()
    """Other names for it in recipes."""
    several: bool = False
    """Whether it trains several conditions at once."""
    options: type | None = None
    """A dataclass whose fields are more settings of the recipe, or other defaults of those there are. A field called
    `start` or `control` names a control's file: the companion where the system has one, else what to go on from."""
    doc: str = ""
    """One sentence that explains it."""


class Control(nn.Module, ABC):
    """Condition -> hint -> residuals, taps or tokens for a base.

    At initialisation it changes nothing where the system is designed so (`starts_at_zero`).
    """

    kind: ClassVar[str]
    """The system's name in files, recipes and on the command line: `controlnet`, `ctrlora`, ..."""
    title: ClassVar[str]
    """What to call one of it, with its article: `a ControlNet`."""
    paper: ClassVar[str] = ""
    """Authors, year and arXiv number."""
    architecture: ClassVar[str | None] = None
    """The second half of modelspec's `modelspec.architecture`; None is `kind`."""
    tag: ClassVar[str | None] = None
    """Its tag on the Hugging Face hub; None is `kind`."""

    inputs: ClassVar[tuple[Input, ...]] = (Input(),)
    """What it is given."""
    reads: ClassVar[Reads]
    acts: ClassVar[Acts] = Acts.RESIDUALS
    enters: ClassVar[str]
    """Where it acts, in words: `decoder skips and middle`."""
    reads_tokens: ClassVar[bool] = False
    """Whether its text is the one that has the tokens of other controls."""
    starts_at_zero: ClassVar[bool] = True
    """Whether a new one changes nothing."""

    Options: ClassVar[type | None] = None
    """A dataclass of the keyword options of `for_base`; they are settings of its recipes, too."""
    trainings: ClassVar[tuple[Training, ...] | None] = None
    """Ways to train it; None is one condition with the settings of `Options`, as KIND or KIND-pairs."""
    hint_is_frozen: ClassVar[bool] = False
    """Whether `encode` depends on no weight but the base's autoencoder's, so that training makes hints once and caches
    them."""
    formats: ClassVar[tuple[FileFormat, ...]] = ()
    """Files of other tools that hold one. The native one, `config` and `file_state` in safetensors, needs no entry."""
    diffusers_class: ClassVar[str | None] = None
    """The class of diffusers whose folders hold one under the same names, if there is one."""
    convert_flags: ClassVar[tuple[str, ...]] = ()
    """Flags of `convert` that tell what the tensors of a file do not, such as `pooled`."""
    not_elsewhere: ClassVar[str] = ""
    """Why other tools cannot run it, for the error where a format cannot carry it."""
    companion: ClassVar[str | None] = None
    """Kind of the control that one of these is nothing without; its file is found by its fingerprint."""
    companion_key: ClassVar[str] = "control.companion"
    """Under which its file's metadata names the companion's file; with `_fingerprint` behind, its fingerprint."""

    condition: str | None
    """Name of the condition that it was trained on (`controlkit.conditions`), or None."""

    # What it does

    @abstractmethod
    def encode(self, inputs: Any, base: Base) -> Hint:
        """What depends on the condition alone, computed once.

        Args:
            inputs: the condition images `[B, 3, H, W]` in [0, 1] if `inputs` has one entry, an image. Else a mapping
                from the names of those that were given to such images, and to plain values.

        Returns:
            A tensor `[B, ...]`, or a mapping of named ones.
        """

    def forward(self, x_t: Tensor | None, t: Tensor, text: Text | None, hint: Hint) -> Residuals:
        """Residuals for noisy latents `x_t` `[B, C, h, w]` at times `t` `[B]` under `text` and `hint`.

        What `reads` does not name may be None, and is not looked at.
        """
        raise TypeError(f"{self.title} adds no residuals")

    def taps(self, base: Base, x_t: Tensor, t: Tensor, text: Text, hint: Hint) -> Mapping[str, TapFunction | Tap]:
        """For one call of the base with these rows: what it does at which of `Base.points`.

        Functions may share a state that belongs to this call alone. A block may run twice, the second time in the
        backward pass of gradient checkpointing, so a state is written anew each time and never added to. A `Tap` with
        `replaces` in the place of a function puts what it returns in the place of the stream.
        """
        return {}

    def tokens(self, hint: Hint) -> Tensor:
        """Tokens `[B, n, D]` that follow those of the prompt; n is the same for every hint."""
        raise TypeError(f"{self.title} adds no tokens")

    def incompatibility(self, base: Base) -> str | None:
        """Why it cannot act on `base`, in a few words such as "its channels: 3, the base's: 4"; None if it can."""
        return None

    @property
    def conditional_only(self) -> bool:
        """Whether, under guidance, it is meant for the half that has the prompt alone."""
        return False

    # Running several in one pass, and knowing when one changed

    @property
    def shared_network(self) -> nn.Module | None:
        """The network that several controls share; those of one network run in one pass (`forward_together`)."""
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
            hints: one for each control, of batch `B`.
        """
        return [control(x_t, t, text, hint) for control, hint in zip(controls, hints, strict=True)]

    def weights(self) -> Iterable[nn.Parameter]:
        """Every parameter that its residuals depend on."""
        return self.parameters()

    def hint_settings(self) -> Hashable:
        """What a frozen hint depends on besides the inputs and the base's autoencoder, for its key in the cache."""
        return json.dumps(self.config(), sort_keys=True)

    def state(self) -> Hashable:
        """What its residuals depend on besides its weights, its hint and what it reads, such as a choice among them."""
        return None

    # Building it

    @classmethod
    @abstractmethod
    def for_base(cls, base: Base, condition: str | None = None, **options: Any) -> Control:
        """A new one for `base`, on its device and in its dtype.

        Args:
            options: those of `Options`.

        Raises:
            UserError: the system does not suit this base.
        """

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Plain values from which `from_config` rebuilds the same network."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any], condition: str | None = None) -> Control:
        """A network of `config` with whatever weights.

        Raises:
            ValueError, TypeError, KeyError: the config is not one of such a network.
        """

    def file_state(self) -> dict[str, Tensor]:
        """The tensors of its file, under the system's own names."""
        return dict(self.state_dict())

    def load_file_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the tensors of a file in place of its own; a missing or unknown name is an error."""
        self.load_state_dict(dict(state), strict=True, assign=True)

    @classmethod
    def shapes(cls, config: Mapping[str, Any]) -> dict[str, torch.Size]:
        """Names and shapes of the tensors of a file of `config`, counted on the meta device.

        Raises:
            ValueError, TypeError, KeyError: the config is not one of such a network.
        """
        return dict(_shapes(cls, json.dumps(dict(config))))

    @classmethod
    def config_of(cls, tensors: Mapping[str, Tensor], unet_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The config that tensors under the system's own names tell, for files that do not say it.

        Args:
            unet_config: of the base, for settings that shapes do not tell.

        Raises:
            ValueError: they do not tell it.
        """
        raise ValueError("shapes do not tell its config, and the file does not say it")

    @classmethod
    def is_native(cls, tensors: Mapping[str, Tensor]) -> bool:
        """Whether the names of a file without metadata are this system's own; False where that cannot be told."""
        return False

    @classmethod
    def missing_setting(cls, config: Mapping[str, Any]) -> str | None:
        """What a config that was made of shapes still leaves open, in words that follow "does not say"."""
        return None

    # Files

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, companion: Control | None = None) -> Control:
        """The control of a file that was read, in float32 and frozen.

        Args:
            companion: its companion, loaded, where the system has one.
        """
        with torch.device("meta"):
            control = cls.from_config(checkpoint.config, checkpoint.condition)
        control.load_file_state(checkpoint.float_tensors())
        return control.eval().requires_grad_(False)

    def file_metadata(self) -> dict[str, str]:
        """What its file says besides what every control's says."""
        return {}

    @classmethod
    def fingerprint_of(cls, checkpoint: Checkpoint) -> str:
        """By which those that need it as their companion know it."""
        raise TypeError(f"{cls.title} is no companion of another control")

    def fingerprint(self) -> str:
        """The same of one that is loaded."""
        raise TypeError(f"{self.title} is no companion of another control")

    def saved_fingerprint(self, dtype: torch.dtype) -> str | None:
        """The fingerprint that it has when its file is saved in `dtype`; None if it is no companion of another."""
        return None

    def keep_identity(self) -> None:
        """Called before its weights are cast: what others know it by stays that of the weights as they are now."""

    def store_frozen(self, dtype: torch.dtype) -> None:
        """Store what does not train in `dtype`, for use under autocast; what trains keeps its own."""

    @classmethod
    def settle_checkpoint(cls, checkpoint: Checkpoint, flags: Collection[str]) -> None:
        """Write down in a checkpoint that is converted what its tensors do not tell.

        Args:
            flags: those of `convert_flags` that were given.
        """

    @classmethod
    def usage(cls, file: str, base: str) -> list[str]:
        """Lines of its model card that show how to use the file."""
        given = "IMAGE" if takes_one_image(cls) else "INPUTS.json"
        named = [] if takes_one_image(cls) else ["", f"`INPUTS.json` names its inputs: {words_of_inputs(cls)}."]
        return [f'    controlkit generate "PROMPT" --base {base} --control {file}={given} --seeds 4', *named]

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
        """A control that is ready to train: `start`, or a new one.

        Args:
            options: the settings of the recipe that are the system's own (`Options`, `Training.options`).
            name: of the control and of its file.
            seed: of whatever is drawn at random.
        """
        (condition,) = conditions
        if start is None:
            torch.manual_seed(seed)
            start = cls.for_base(base, condition, **options)
        start.condition = condition
        return start.requires_grad_(True).train()

    def trained_modules(self) -> dict[str, nn.Module]:
        """What a run trains, by the names that its state has for it."""
        return {"control": self}

    @abstractmethod
    def trainable_parameters(self) -> list[nn.Parameter]:
        """What training changes."""

    def for_condition(self, condition: str) -> Control:
        """Of one that trains several conditions, the control that follows this one; for the backward pass, too."""
        return self

    def finished(self, name: str) -> dict[str, Control]:
        """What a run leaves: name of each file -> the control in it."""
        return {name: self}

    def copied_network(self) -> nn.Module | None:
        """The network that began as a copy of a part of the base's, which offset transfer moves; None without one."""
        return None

    def mark_transferred(self) -> None:
        """Called before its weights are moved to another base."""

    # Words

    @classmethod
    def needs(cls, config: Mapping[str, Any]) -> str:
        """What it needs, in words, such as "a base whose UNet has ..."."""
        return "a base"

    @classmethod
    def facts(cls, config: Mapping[str, Any]) -> dict[str, str]:
        """What `inspect` says of a network of `config` besides what it says of every system."""
        return {}

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of its file, in all and by what they are."""
        return {"parameters": sum(tensor.numel() for tensor in self.file_state().values())}

    @classmethod
    def variants(cls, base: Base, **options: Any) -> dict[str, Control]:
        """What to count when the system is described for a base, on the meta device; the key "" is the thing itself."""
        return {"": cls.for_base(base, **options)}


class OneImage(Control):
    """A control that takes one condition image: `encode(condition_image, base)`."""

    @abstractmethod
    def encode(self, condition_image: Tensor, base: Base) -> Hint:
        """Condition images `[B, 3, H, W]` in [0, 1] => hint `[B, ...]`, computed once for a condition."""


def takes_one_image(control: type[Control] | Control) -> bool:
    """Whether one condition image is all that a control has to be given."""
    needed = [one for one in control.inputs if one.required]
    return len(needed) == 1 and needed[0].kind == "image"


def words_of_inputs(control: type[Control] | Control) -> str:
    """What a control is given, in words: `canny (image), boxes (value, optional)`."""
    told = (f"{one.name} ({one.kind}{'' if one.required else ', optional'})" for one in control.inputs)
    return ", ".join(told)


def encode_images(control: Control, images: Tensor, base: Base) -> Hint:
    """The hint of condition images `[B, 3, H, W]` in [0, 1], for a control of which `takes_one_image` holds."""
    (name,) = (one.name for one in control.inputs if one.required)
    return control.encode(images if len(control.inputs) == 1 else {name: images}, base)


def words_of_reads(control: Control | type[Control]) -> str:
    """What a control reads besides its hint, as words; taps are given the base's features at every step."""
    words = [flag.name.lower() for flag in control.reads if flag.name]
    return ", ".join([*words, *(["the base's features"] if Acts.TAPS in control.acts else [])]) or "nothing"


@lru_cache(maxsize=32)
def _shapes(kind: type[Control], config: str) -> tuple[tuple[str, torch.Size], ...]:
    """`Control.shapes`; several files of one network are counted once."""
    with torch.device("meta"):
        control = kind.from_config(json.loads(config))
    return tuple((name, value.shape) for name, value in control.file_state().items())
