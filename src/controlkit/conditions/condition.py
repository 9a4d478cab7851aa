"""`Condition` and its registry.

A condition is a function `image [H, W, 3] uint8 RGB -> condition image [H, W, 3] uint8 RGB` with keyword
parameters that have defaults, plus the facts that training and evaluation need::

    @condition(
        "canny",
        summary="white edges on black (Canny 1986, OpenCV)",
        fidelity=EDGE_F1,
        random={"low": uniform_int(50, 150), "high": uniform_int(150, 250)},
    )
    def canny(image: np.ndarray, *, low: int = 100, high: int = 200) -> np.ndarray: ...

The same image, parameters and seed always give the same condition image.
"""

from __future__ import annotations

import inspect
import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np

from controlkit._version import __version__
from controlkit.conditions.code import essential_code, imported_beside
from controlkit.conditions.models import LearnedModel, weights_state
from controlkit.errors import UserError, nearest
from controlkit.files import sha256_of
from controlkit.plugins import is_same_source, load_named, running

RandomValue = Callable[[np.random.Generator], Any]
"""Samples the value of a parameter for one training image."""

VARIABLE = "CONTROLKIT_CONDITIONS"
"""Environment variable: modules or Python files that register conditions, separated as in PATH."""

LEAST_SIDE = 16
"""Smallest height and width of an image in pixels. Any size from there on works, and the size is preserved."""

Mirror = Callable[..., np.ndarray]
"""Condition image => condition image of the flipped image, both `uint8 [H, W, 3]`. Keyword-only parameters get the
values of the condition's parameters of the same names."""

Resize = Literal["smooth", "nearest"]

BLACK, WHITE = (0, 0, 0), (255, 255, 255)


def left_right(image: np.ndarray) -> np.ndarray:
    """Horizontal flip of `[H, W, ...]`."""
    return np.ascontiguousarray(image[:, ::-1])


@dataclass(frozen=True)
class Distribution:
    """A `RandomValue` with a description."""

    text: str
    """`uniform from 0.5 to 2`."""
    function: RandomValue
    """Samples a value."""

    def __call__(self, rng: np.random.Generator) -> Any:
        """One sample."""
        return self.function(rng)

    def __str__(self) -> str:
        return self.text


_FILES = (
    *("edges", "line_drawings", "colour", "degradations", "weather", "masks", "regions", "provided"),
    *("learned.edges", "learned.line_detectors", "learned.depth", "learned.segmentation", "learned.detection"),
    *("learned.pose", "learned.wholebody", "learned.densepose", "learned.surfaces", "learned.mediapipe"),
)
"""Modules that register conditions, in the order of `controlkit condition --list`."""

_REGISTRY: dict[str, Condition] = {}


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How well an image follows a condition, as one number."""

    name: str
    """Name in reports: `edge F1`."""
    compare: Callable[[np.ndarray, np.ndarray], float]
    """(reference, result), both `uint8 [H, W, 3]` => score."""
    higher_is_better: bool = True
    """False for distances."""
    against: str = "condition"
    """What the result is compared with. `condition`: its condition image with the one that it was generated from.
    `target`: the result with the target image, for restorations, whose condition images determine no exact result."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One kind of condition image."""

    name: str
    """Its usual name in the field."""
    summary: str = ""
    """One line for `controlkit condition --list`; by default the first of the function's docstring."""
    function: Callable[..., np.ndarray]
    """`(image, **parameters) -> condition image`."""
    fidelity: Fidelity = field(default_factory=lambda: _default_fidelity())
    """The metric of how well a result follows it; by default PSNR between condition images."""
    aliases: tuple[str, ...] = ()
    """Other names in use."""
    random: Mapping[str, RandomValue] = field(default_factory=dict)
    """The parameters that training varies, with their distributions; the others keep their defaults."""
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Minimum and maximum of numeric parameters, both included; a call checks them."""
    channels: int = 3
    """3, or 1 if the three channels are always equal."""
    values: tuple[int, ...] | None = None
    """The only values in its images; None for any from 0 to 255."""
    palette: np.ndarray | None = field(default=None, compare=False)
    """The only colours of its images, `uint8 [N, 3]`; None for any."""
    mirrors: bool = True
    """Whether flipping the image flips the condition image, up to details such as the blocks of JPEG.

    False for random conditions: with the same seed, the mask or noise stays in place."""
    mirror_finished: Mirror | None = left_right
    """Flips a finished condition image. For most, this is the flip of the image. None if its colours distinguish left
    from right, so that it cannot be flipped."""
    croppable: bool = True
    """Whether a finished condition image can be cropped with its image: the crop is close to the condition image of
    the crop, except near its edges, for lengths that are fractions of the short side, and for colours and thresholds
    taken from the entire image. False where it would be another one: a frame around the image, depth normalised from
    the farthest point to the nearest. These should be computed again after a crop."""
    resize: Resize = "smooth"
    """Interpolation of a finished condition image: `nearest` for maps whose colours are labels."""
    background: tuple[int, int, int] = WHITE
    """Background of its images, and the colour behind transparent parts of finished ones: black for white lines,
    skeletons, masks, labels and depth; white for dark lines and photos."""
    provided: bool = False
    """Whether its content comes with the data (annotations, finished condition images) and cannot be computed from
    an image alone."""
    greatest_side: int | None = None
    """Largest height and width in pixels that it can be computed at; None for any."""
    input_size: str = "as it is"
    """The size at which its detector reads the image, in words."""
    requires: LearnedModel | None = None
    """The learned model that it needs, or None. If its weights are files, the condition has a parameter `model`: a
    folder with the weights, or another model on the hub."""

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """Parameters and their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    @cached_property
    def content(self) -> str:
        """Hash of what determines its images: the source file and modules beside it that it imports, the defaults, the
        weights of the learned model on this machine, and the version of this package."""
        code = [path.read_bytes() for path in self._sources] or [b""]
        return sha256_of(
            self.name, code[0], repr(self.defaults), repr(self.requires), __version__, *code[1:], *self._weights
        )

    @cached_property
    def revision(self) -> str:
        """`content` for images that are kept for long: versions of this package that change neither the code, except
        comments, texts and decorators, nor the weights have the same."""
        random = [f"{name} {value}" for name, value in self.random.items() if isinstance(value, Distribution)]
        code = [essential_code(path) for path in self._sources]
        return sha256_of(self.name, repr(self.defaults), repr(random), *code, *self._weights)

    @cached_property
    def _sources(self) -> list[Path]:
        source = inspect.getsourcefile(self.function)
        return imported_beside(Path(source)) if source is not None and Path(source).is_file() else []

    @property
    def _weights(self) -> list[str]:
        return [] if self.requires is None else weights_state(self.requires)

    def __call__(self, image: np.ndarray, **parameters: Any) -> np.ndarray:
        """The condition image of `image`, both `uint8 [H, W, 3]` RGB of the same height and width.

        Raises:
            UserError: a parameter is unknown, of another type or outside its limits; the image is of another type, too
                small or too long; or a condition from outside of this package raised an error or returned anything
                else.
        """
        for key, value in parameters.items():
            if key not in self.defaults:
                raise UserError(
                    f"{self.name} has no parameter {key!r}{nearest(key, list(self.defaults))}", "unknown-key"
                )
            self.check(key, value)
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            given = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
            raise UserError(
                f"{self.name}: the image is {given}; expected an array uint8 [H, W, 3] of RGB, such as"
                ' np.asarray(picture.convert("RGB"))',
                "wrong-type",
            )
        size = f"{image.shape[1]} x {image.shape[0]}"
        if min(image.shape[:2]) < LEAST_SIDE:
            raise UserError(
                f"{self.name}: the image is {size}; conditions need at least {LEAST_SIDE} x {LEAST_SIDE}", "wrong-size"
            )
        if self.greatest_side is not None and max(image.shape[:2]) > self.greatest_side:
            raise UserError(
                f"{self.name}: the image is {size}; it takes at most {self.greatest_side} pixels a side: crop or scale"
                " the image",
                "wrong-size",
            )
        image = np.ascontiguousarray(image)
        condition_image = self._computed(image, parameters)
        # A function may return its input unchanged, as a blur with sigma 0 does.
        return condition_image.copy() if np.may_share_memory(condition_image, image) else condition_image

    @cached_property
    def is_own(self) -> bool:
        """Whether it was registered from outside of this package."""
        return not self.function.__module__.startswith("controlkit.")

    def _computed(self, image: np.ndarray, parameters: Mapping[str, Any]) -> np.ndarray:
        if not self.is_own:
            return self.function(image, **parameters)
        with running(f"the condition {self.name}", inspect.getsourcefile(self.function)):
            result = self.function(image, **parameters)
        height, width, _ = image.shape
        if not isinstance(result, np.ndarray) or result.dtype != np.uint8 or result.shape != image.shape:
            found = type(result).__name__
            if isinstance(result, np.ndarray):
                found = f"{result.dtype} {list(result.shape)}"
            raise UserError(
                f"the condition {self.name} returned {found}; expected uint8 [{height}, {width}, 3], the size of its"
                " image",
                "plugin-failed",
            )
        return result

    def check(self, key: str, value: Any) -> None:
        """Check the type of a number or boolean, and the limits of a number; other parameters pass.

        Args:
            key: one of its parameters.
            value: of it.

        Raises:
            UserError: it is invalid.
        """
        default = self.defaults[key]
        if isinstance(default, bool):
            # Any text is true to Python, also `off`.
            if not isinstance(value, bool | np.bool_):
                raise UserError(f"{self.name}: {key} must be true or false, not {value!r}", "wrong-type")
            return
        if not isinstance(default, (int, float)):
            return
        kind = numbers.Integral if isinstance(default, int) else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            expected = "an integer" if isinstance(default, int) else "a number"
            raise UserError(f"{self.name}: {key} must be {expected} (such as {default}), not {value!r}", "wrong-type")
        widest = (0 if key == "seed" else -(2**63), 2**63 - 1)
        low, high = self.limits.get(key, widest if isinstance(value, numbers.Integral) else (-math.inf, math.inf))
        number = value if isinstance(value, int) else float(value)
        if not low <= number <= high:
            raise UserError(f"{self.name}: {key} must lie from {low} to {high}, not {value!r}", "out-of-range")

    def random_parameters(self, rng: np.random.Generator) -> dict[str, Any]:
        """Every parameter for one training image: those of `random` are sampled, the others are the defaults."""
        return {**self.defaults, **{name: sample(rng) for name, sample in self.random.items()}}

    def mirrored(self, image: np.ndarray, parameters: Mapping[str, Any] | None = None) -> np.ndarray:
        """Flip a finished condition image, `uint8 [H, W, 3]`.

        Args:
            parameters: those with which it was made; None for the defaults.

        Raises:
            UserError: its colours distinguish left from right.
        """
        if self.mirror_finished is None:
            raise no_mirror(self.name)
        accepted = inspect.signature(self.mirror_finished).parameters.values()
        names = {p.name for p in accepted if p.kind is p.KEYWORD_ONLY} & set(parameters or {})
        return self.mirror_finished(image, **{name: (parameters or {})[name] for name in names})

    def score(
        self, condition_image: np.ndarray, result: np.ndarray, target: np.ndarray | None = None, **parameters: Any
    ) -> float:
        """Fidelity of the image `result` to `condition_image`, all `uint8 [H, W, 3]`.

        Args:
            target: the image from which `condition_image` was made; needed where `fidelity.against` is `target`.
            parameters: those with which `condition_image` was made.
        """
        if self.fidelity.against == "target":
            if target is None:
                raise ValueError(f"fidelity to {self.name} compares with the target image, which is missing")
            return self.fidelity.compare(target, result)
        return self.fidelity.compare(condition_image, self(result, **parameters))

    def scores(
        self,
        condition_images: Sequence[np.ndarray],
        results: Sequence[np.ndarray],
        targets: Sequence[np.ndarray],
        parameters: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[float]:
        """`score` of each image, all `uint8 [H, W, 3]`.

        Args:
            parameters: those with which each condition image was made; None for the defaults.
        """
        settings = [{}] * len(condition_images) if parameters is None else parameters
        samples = zip(condition_images, results, targets, settings, strict=True)
        return [self.score(image, result, target, **own) for image, result, target, own in samples]

    def mean_score(
        self,
        condition_images: Sequence[np.ndarray],
        results: Sequence[np.ndarray],
        targets: Sequence[np.ndarray],
        parameters: Sequence[Mapping[str, Any]] | None = None,
    ) -> float:
        """The mean of `scores`."""
        return float(np.mean(self.scores(condition_images, results, targets, parameters)))


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_FORMER_FIELDS = {"draw": "random", "cuts": "croppable", "given": "provided", "seen": "input_size"}
"""Fields of `Condition` by their names of earlier versions, which modules of users may still have."""


def condition(name: str, **fields: Any) -> Callable[[Callable[..., np.ndarray]], Condition]:
    """Register the decorated function as condition `name`; `fields` are the other fields of `Condition`.

    A function of the same name and file replaces the condition of that name, as when a notebook runs a cell again.

    Raises:
        UserError: the name or an alias is that of another condition.
    """
    fields = {_FORMER_FIELDS.get(key, key): value for key, value in fields.items()}

    def register(function: Callable[..., np.ndarray]) -> Condition:
        if "summary" not in fields:
            fields["summary"] = (inspect.getdoc(function) or "").partition("\n")[0]
        if _NAME.fullmatch(name) is None or name == "pictures":
            raise UserError(
                f"cannot register the condition {name!r}: expected a name of letters, digits, _ and -, which a folder"
                " of pairs gets, too; `pictures` is taken there",
                "out-of-range",
            )
        kind = Condition(name=name, function=function, **fields)
        keys = [_plain(key) for key in (name, *kind.aliases)]
        old = _REGISTRY.get(keys[0])
        if old is not None and not (old.name == name and is_same_source(old.function, function)):
            old = None
        for key in keys:
            if key in _REGISTRY and _REGISTRY[key] is not old:
                other = _REGISTRY[key].name
                role = "the name of a condition" if key == _plain(other) else f"an alias of the condition {other}"
                raise UserError(f"cannot register the condition {name}: {key!r} is already {role}", "contradiction")
        for key in [key for key, other in _REGISTRY.items() if other is old]:
            del _REGISTRY[key]
        _REGISTRY.update(dict.fromkeys(keys, kind))
        return kind

    return register


def no_mirror(name: str) -> UserError:
    """The error for flipping finished images of the condition `name`."""
    return UserError(
        f"condition images of {name} cannot be flipped: their colours distinguish left from right. Leave out flip, or"
        " add pairs made from flipped images",
        "unsupported",
    )


@cache
def _load() -> None:
    for file in _FILES:
        import_module(f"controlkit.conditions.{file}")
    load_named(VARIABLE)


def registry() -> dict[str, Condition]:
    """All conditions by name, without aliases."""
    _load()
    return {kind.name: kind for kind in _REGISTRY.values()}


def find(name: str) -> Condition:
    """The condition with this name or alias; case is ignored, and `-` equals `_`.

    Raises:
        UserError: there is none; the message lists the nearest names.
    """
    _load()
    key = _plain(name)
    if key not in _REGISTRY:
        known = list(_REGISTRY) if get_close_matches(key, _REGISTRY, cutoff=0.5) else list(registry())
        raise UserError(f"there is no condition {name!r}{nearest(key, known)}", "unknown-name")
    return _REGISTRY[key]


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_")


def _default_fidelity() -> Fidelity:
    from controlkit.conditions.fidelity import PSNR

    return PSNR


def known_name(name: str) -> str | None:
    """The name of the condition that is called so, also by an alias; None if it is unknown."""
    with suppress(UserError):
        return find(name).name
    return None


def background_of(name: str | None) -> tuple[int, int, int]:
    """Background colour of the condition `name`; white if it is None or unknown."""
    if name is not None:
        with suppress(UserError):
            return find(name).background
    return Condition.background


def is_of_labels(name: str | None) -> bool:
    """Whether colours of the condition `name` are labels, which interpolation would mix; False if it is None or
    unknown."""
    if name is not None:
        with suppress(UserError):
            return find(name).resize == "nearest"
    return False


def uniform(low: float, high: float) -> RandomValue:
    """A float between `low` and `high`."""
    return Distribution(f"uniform from {low} to {high}", lambda rng: float(rng.uniform(low, high)))


def uniform_int(low: int, high: int) -> RandomValue:
    """An integer from `low` to `high`, both included."""
    return Distribution(f"integers, uniform from {low} to {high}", lambda rng: int(rng.integers(low, high + 1)))


def truncated_normal(low: float, high: float) -> RandomValue:
    """A float, normal around the middle of `low` and `high`, which are one standard deviation away; redrawn outside.

    CtrLoRA's `discrete_normal(low, high)` does not redraw, so its values can leave the range and even be negative.
    """

    def draw(rng: np.random.Generator) -> float:
        while not low <= (value := rng.normal((low + high) / 2, (high - low) / 2)) <= high:
            pass
        return float(value)

    return Distribution(f"normal around the middle of {low} to {high}, within it", draw)


def truncated_normal_int(low: int, high: int) -> RandomValue:
    """`truncated_normal`, rounded to an integer."""
    real = truncated_normal(low, high)
    return Distribution(f"integers, {real}", lambda rng: round(real(rng)))


def chance(probability: float) -> RandomValue:
    """True with `probability`."""
    return Distribution(f"true with probability {probability:.0%}", lambda rng: bool(rng.random() < probability))


def seed() -> RandomValue:
    """A seed for random conditions."""
    return Distribution("any seed", lambda rng: int(rng.integers(2**31)))
