"""`GenerateRequest`: what to generate, the same from the command line, from Python and from any other front end.

This module imports neither torch nor diffusers.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from dataclasses import dataclass
from types import NoneType
from typing import Any, get_type_hints

from controlkit.bases.prompt_syntax import check_syntax, parse_weighted
from controlkit.bases.solver_names import SOLVERS, solver_name
from controlkit.errors import UserError, nearest
from controlkit.sampling.seeds import settled_seeds

MAX_SIDE = 16384
"""The longest side of an image."""
MAX_HIRES = 8
"""The largest factor of a second pass."""
DEFAULT_STEPS = 20
SAMPLERS = SOLVERS
"""Names of samplers (`bases/schedules/solvers.py`)."""
MODES = ("balanced", "control", "soft", "guess", "cfg-rw", "cfg-rw-literal")
"""How a control acts under classifier-free guidance (`ControlUse.mode`)."""
CONDITIONAL_MODES = ("control", "guess", "cfg-rw", "cfg-rw-literal")
"""The modes in which a control acts on the conditional branch only."""
_MODE_ALIASES = {
    "my prompt is more important": "soft",
    "controlnet is more important": "guess",
    "guess_mode": "guess",
    "guess mode": "guess",
    "cfg-rw-normalised": "cfg-rw",
    "cfg-rw-normalized": "cfg-rw",
}
"""Names of A1111 and diffusers, in lower case -> mode."""
GRAPHS = ("auto", "on", "off")
"""Whether networks run as CUDA graphs (`GenerateRequest.graphs`)."""
PROMPT_MODES = ("none", "default", "automatic", "given")
"""Where the prompt comes from (`GenerateRequest.prompt_mode`)."""


@dataclass(frozen=True, kw_only=True)
class ControlUse:
    """One control with its image or inputs, its weight and the steps at which it acts."""

    control: str
    """Name of a control that ships, or a path."""
    image: str | None = None
    """Path of the image (with `prepared`: of the condition image), for a control that takes one; or of a `.json` file
    with `inputs`, whose paths are relative to that file. For a control that takes one plain value, the file holds
    that value."""
    inputs: dict[str, Any] | None = None
    """Inputs by name (`Control.inputs`) in place of `image`: paths of images, and plain values."""
    weight: float = 1.0
    """Conditioning scale: the factor of its residuals (A1111: control weight)."""
    start: float = 0.0
    """Fraction of the steps at which it starts, in [0, 1]."""
    end: float = 1.0
    """Fraction of the steps at which it ends, in [0, 1]."""
    layers: tuple[float, ...] | None = None
    """One more factor for each of its residuals, from the outermost in: decoder skips, then middle. Default: 1."""
    mask: str | None = None
    """Path of a grey image: the control acts in full where it is white, not at all where it is black or transparent.
    Scaled and cropped like `image`, then averaged down to each injection site. Default: everywhere."""
    prepared: bool = False
    """Whether `image` is already a condition image. Otherwise the control's condition is computed from it."""
    parameters: dict[str, Any] | None = None
    """Parameters of that condition, such as `low` of canny, and plain inputs of the control, such as the `task` of a
    control with several. Parameters of one image among several are named `INPUT.PARAMETER`. Default: the condition's
    own."""
    mode: str | None = None
    """How it acts under classifier-free guidance (CFG). Per-site weights multiply `weight` and `layers`.

    | mode | branches | weights by site | known as |
    |---|---|---|---|
    | `balanced` | both | 1 | diffusers' default; A1111: "Balanced" |
    | `control` | conditional | 1 | guidance amplifies the control |
    | `soft` | both | soft | A1111: "My prompt is more important" |
    | `guess` | conditional | soft | diffusers: `guess_mode`; A1111's third Control Mode |
    | `cfg-rw-literal` | conditional | resolution | CFG resolution weighting (Zhang et al. 2023, section 3.4) |
    | `cfg-rw` | conditional | resolution, at most 1 | the same, normalised |

    On the conditional branch only, a control runs half as often. `sampling/weighting.py` defines the weights. Default:
    that of the base, `control` for nano, else `balanced`."""

    def __post_init__(self) -> None:
        if (self.image is None) == (self.inputs is None):
            raise UserError(f"{self.control} needs either an image or named inputs, not both", "contradiction")
        if self.parameters is not None:
            if self.prepared:
                raise UserError(
                    f"{self.control} has condition parameters ({', '.join(self.parameters)}) and a prepared condition"
                    " image; parameters are for an image from which the condition is computed",
                    "contradiction",
                )
            object.__setattr__(self, "parameters", _plain(self.parameters, f"parameters of {self.control}"))
        if self.inputs is not None:
            object.__setattr__(self, "inputs", _plain(self.inputs, f"inputs of {self.control}"))
        if self.layers is not None and not (self.layers and all(map(_is_finite, self.layers))):
            raise UserError(
                f"the layers of {self.control} are {list(self.layers)}; expected one finite number per residual",
                "out-of-range",
            )
        if not _is_finite(self.weight):
            raise UserError(f"the weight of {self.control} is {self.weight}; expected a finite number", "out-of-range")
        if not 0 <= self.start <= self.end <= 1:
            raise UserError(
                f"{self.control} starts at {self.start} and ends at {self.end}; expected 0 <= start <= end <= 1",
                "out-of-range",
            )
        object.__setattr__(self, "mode", mode_name(self.mode))

    def acts_at(self, index: int, steps: int) -> bool:
        """Whether it acts at step `index` of `steps`."""
        return lies_within(index, steps, self.start, self.end)

    @classmethod
    def parse(cls, text: str, **settings: Any) -> ControlUse:
        """Parse `NAME_OR_FILE=IMAGE[@weight[:start-end]][,KEY=VALUE...]`, as on the command line.

        See `control_text.parse_control`.

        Args:
            text: the argument of `--control`.
            settings: defaults of what the text leaves open, such as `prepared` and `mode`.

        Raises:
            UserError: it does not have that form.
        """
        from controlkit.sampling.control_text import parse_control

        parsed = {**settings, **parse_control(text)}
        if parsed.get("prepared") and "parameters" in parsed:
            from controlkit.sampling.inputs import with_plain_inputs

            parsed = with_plain_inputs(parsed)  # the other parameters contradict a prepared image
        return cls(**parsed)


@dataclass(frozen=True, kw_only=True)
class LoraUse:
    """A LoRA of the base, with its weight."""

    file: str
    """A file of kohya, diffusers or peft, or a folder of the latter two."""
    weight: float = 1.0
    """Factor of what it adds to the base's weights."""

    def __post_init__(self) -> None:
        if not _is_finite(self.weight):
            raise UserError(f"the weight of {self.file} is {self.weight}; expected a finite number", "out-of-range")

    @classmethod
    def parse(cls, text: str) -> LoraUse:
        """Parse `FILE[@weight]`, as on the command line; the name of a file that exists may contain `@`.

        Raises:
            UserError: what follows `@` is no number.
        """
        file, at, weight = text.rpartition("@")
        if not at or os.path.exists(text):
            return cls(file=text)
        try:
            return cls(file=file, weight=float(weight))
        except ValueError as error:
            raise UserError(f"--lora {text}: {weight!r} is not a weight; expected FILE[@weight]", "usage") from error


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """Images to generate."""

    prompt: str
    """Text prompt."""
    prompt_mode: str = "given"
    """Where the prompt comes from: `given` is `prompt`; `none` is no prompt; `default` is that of the base ("a
    professional, detailed, high-quality image"; nano has none, as it knows no such words); `automatic` is a caption of
    a first image made with the default prompt, for each seed (Zhang et al. 2023, arXiv
    2302.05543v1, section 4.1). `prompt` is empty unless given."""
    captioner: str | None = None
    """Captioner of `automatic`: a registered name, or the folder or hub id of a BLIP model. Default: that of the base,
    `concepts` for nano, else BLIP."""
    negative_prompt: str = ""
    """Prompt of the unconditional branch."""
    prompt_syntax: str = "plain"
    """How `prompt` and `negative_prompt` are read. `plain`: as they stand, cut at the tokenizer's length (77 tokens for
    CLIP). `weighted`: as in A1111, `(word:1.2)`, `(word)`, `[word]`, `BREAK`, with a backslash before brackets that are
    meant, and in chunks of that length; not for Stable Diffusion 3."""
    clip_skip: int | None = None
    """Layer of the CLIP text encoders whose states are used, counted from the last, which is 1, as in A1111 (diffusers'
    `clip_skip` is one less for Stable Diffusion 1 and 2, two less for XL and 3). Default: the base's own: 1, or 2 for
    Stable Diffusion XL and 3."""
    embeddings: tuple[str, ...] = ()
    """Files of textual inversions (.safetensors, .pt, .bin). The name of the file, without its suffix, is the word that
    stands for it in the prompts; `WORD=FILE` gives another."""
    loras: tuple[LoraUse, ...] = ()
    """LoRAs merged into the base's weights while images are generated; what they add is summed."""
    base: str = "nano"
    """`nano`, a diffusers folder, a single file, or an id on the Hugging Face hub."""
    controls: tuple[ControlUse, ...] = ()
    """Controls; their residuals are summed."""
    seeds: tuple[int, ...] = (0,)
    """One image per seed, from 0 to 2^64 - 1; an image depends on its own seed only. -1 is replaced by a random seed
    when the request is built."""
    vary: tuple[dict[str, Any], ...] = ()
    """Axes of settings that vary, each a mapping from settings to lists of values, such as `{"guidance": [1, 3, 5]}`.
    Settings of one axis advance together, which pairs them; axes are crossed, and each combination has all seeds.
    Settings are fields of the request, `seed`, and of controls `weight`, `span`, `mode`, `mask`, `layers`, `prepared`,
    `control`, `image` and parameters of the condition: of one control with its number or name before (`1.weight`,
    `canny.weight`), else of all."""
    xy: tuple[dict[str, Any], ...] = ()
    """Like `vary`, one or two axes that are also shown on a sheet: columns, then rows."""
    steps: int = DEFAULT_STEPS
    """Denoising steps."""
    guidance: float | None = None
    """Classifier-free guidance scale; 1 switches it off (Ho and Salimans 2022, eq. 6 with w = scale - 1). Default: that
    of the base, 3 for nano, 7.5 for Stable Diffusion 1 and 2, 5 for XL, 7 for 3."""
    width: int | None = None
    """In pixels. Default: the size of the base."""
    height: int | None = None
    """In pixels. Default: the size of the base."""
    image: str | None = None
    """Path of an image to start from (img2img; Meng et al. 2022, arXiv 2108.01073), scaled and cropped to the size of
    the result."""
    strength: float | None = None
    """Fraction of the steps that run on `image`, in (0, 1]: the higher, the less of it remains. Start and end of
    controls are fractions of the steps that run. Default: 0.8; with a mask 1, which starts from noise."""
    mask: str | None = None
    """Path of a grey image of the size of `image`: inpaint where it is white, keep `image` where it is black or
    transparent."""
    mask_blur: float = 0.0
    """Standard deviation of a Gaussian blur of the mask, in pixels of the result, which blends the edge."""
    only_masked: int | None = None
    """Padding in pixels of `image`: inpaint only the part around the mask, at `width` x `height`, and put it back into
    `image`, whose size the result has (A1111: "Only masked"; diffusers: `padding_mask_crop`). Default: all of it."""
    hires: float | None = None
    """Factor of a second pass, more than 1: images are enlarged (Lanczos) and sampled again from there, as img2img with
    the same prompt, controls and seeds (A1111: Hires. fix). Condition images are computed anew at that size. Only
    without `image`. Default: no second pass."""
    hires_strength: float | None = None
    """`strength` of the second pass. Default: 0.7, as in A1111."""
    sampler: str | None = None
    """Name of the solver, ours (`ddim`, `dpm++`, `dpm++-karras`, `dpm++-2m-sde`, `dpm++-2m-sde-karras`, `unipc`,
    `plms`, `euler`, `euler-karras`, `euler-a`, `heun`, `heun-karras`, `dpm2`, `dpm2-karras`, `dpm2-a`,
    `dpm2-a-karras`, `ddpm`, `lcm`) or that of A1111, ComfyUI or diffusers. `dpm++-2m-sde`, `euler-a`, `dpm2-a`, `ddpm`
    and `lcm` add noise, from the image's seed. Stable Diffusion 1, 2 and XL take all. A schedule that ends in pure
    noise, as nano's does, takes `ddim`, `dpm++`, `dpm++-2m-sde`, `unipc`, `ddpm` and `lcm`; a rectified flow (Stable
    Diffusion 3) `euler`, `dpm++` and `unipc`. `lcm` needs a model or LoRA distilled for it, 50 steps at the most.
    Default: that of the base, `ddim`, or `euler` for Stable Diffusion 3."""
    batch_size: int | None = None
    """Images per batch; changes the memory needed, not the images. Default: 16 up to 256 x 256, fewer for larger ones
    (4 of 512 x 512)."""
    tiled: bool = False
    """Whether the autoencoder works in overlapping tiles of its native size, which bounds its memory for large images
    and changes them a little (diffusers: `enable_tiling`)."""
    vae: str | None = None
    """Autoencoder in place of the base's own: a file (.safetensors, .ckpt, .pt, .bin) in the original or diffusers'
    format, a diffusers folder, or a hub id; of the base's family."""
    device: str = "auto"
    """A torch device; `auto` is CUDA, then MPS, then the CPU."""
    text_device: str | None = None
    """Device of the text encoders, such as `cpu` for large ones (T5). Default: `device`."""
    precision: str = "auto"
    """Dtype of the weights: `fp32`, `fp16` or `bf16`; `auto` is fp16 on CUDA and fp32 elsewhere."""
    low_memory: bool = False
    """Whether the text encoders leave the device once prompts are encoded, and images are decoded one by one: the same
    images, slower, in less memory."""
    graphs: str = "auto"
    """Whether networks run as CUDA graphs, which launch a step at once: `on`, `off`, or `auto`, on CUDA where the
    number of steps pays for the capture and `low_memory` is off. Controls that act inside the base's pass (taps) run
    without. `on` is refused where it cannot be."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", settled_seeds(self.seeds))
        check_graphs(self.graphs)
        check_sampling(self.steps, self.guidance, self.sampler)
        if self.sampler is not None:
            object.__setattr__(self, "sampler", solver_name(self.sampler))
        self._check_prompts()
        for name in ("width", "height"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MAX_SIDE:
                raise UserError(f"{name} is {value}; expected 1 to {MAX_SIDE} pixels", "out-of-range")
        self._check_image()
        self._check_second_pass()
        if self.image is None:  # else the number of steps that run depends on the base, too
            check_spans(self.controls, self.steps)
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}; expected at least 1", "out-of-range")
        if self.vary or self.xy:
            self._check_axes()

    def _check_axes(self) -> None:
        from controlkit.sampling.axes import check_axes, points_of

        for name in ("vary", "xy"):
            axes = tuple(_plain(axis, name) for axis in check_axes(getattr(self, name), name))
            for axis in axes:
                if any(type(seed) is not int for seed in axis.get("seed", ())):
                    raise UserError(f"seed of {name} is {axis['seed']}; expected integers", "wrong-type")
                if "seed" in axis:
                    axis["seed"] = list(settled_seeds(axis["seed"]))
            object.__setattr__(self, name, axes)
        if len(self.xy) > 2:
            raise UserError(f"a sheet has at most two axes, not {len(self.xy)}; use vary for others", "contradiction")
        points_of(self)

    def _check_image(self) -> None:
        for name in ("strength", "mask"):
            if self.image is None and getattr(self, name) is not None:
                raise UserError(
                    f"{name} is {getattr(self, name)}, but there is no image to start from", "contradiction"
                )
        if self.strength is not None and not 0 < self.strength <= 1:
            raise UserError(f"strength is {self.strength}; expected more than 0, at most 1", "out-of-range")
        if self.mask is None and (self.mask_blur or self.only_masked is not None):
            name = "mask_blur" if self.mask_blur else "only_masked"
            raise UserError(f"{name} is {getattr(self, name)}, but there is no mask", "contradiction")
        if not (_is_finite(self.mask_blur) and 0 <= self.mask_blur <= MAX_SIDE):
            raise UserError(f"mask_blur is {self.mask_blur}; expected 0 to {MAX_SIDE} pixels", "out-of-range")
        if self.only_masked is not None and not 0 <= self.only_masked <= MAX_SIDE:
            raise UserError(f"only_masked is {self.only_masked}; expected 0 to {MAX_SIDE} pixels", "out-of-range")

    def _check_second_pass(self) -> None:
        if self.hires is None:
            if self.hires_strength is not None:
                raise UserError(
                    f"hires_strength is {self.hires_strength}, but there is no second pass; set hires, such as 2",
                    "contradiction",
                )
            return
        if self.image is not None:
            raise UserError(
                "hires enlarges images made from noise, and image starts from one; enlarge the image yourself, or run"
                " img2img on the result",
                "contradiction",
            )
        if not (_is_finite(self.hires) and 1 < self.hires <= MAX_HIRES):
            raise UserError(f"hires is {self.hires}; expected a factor above 1, at most {MAX_HIRES}", "out-of-range")
        if self.hires_strength is not None and not 0 < self.hires_strength <= 1:
            raise UserError(f"hires_strength is {self.hires_strength}; expected more than 0, at most 1", "out-of-range")

    def _check_prompts(self) -> None:
        check_prompt_mode(self.prompt_mode)
        check_syntax(self.prompt_syntax)
        if self.prompt_syntax == "weighted":
            for prompt in (self.prompt, self.negative_prompt):
                parse_weighted(prompt)
        if self.clip_skip is not None and self.clip_skip < 1:
            raise UserError(f"clip_skip is {self.clip_skip}; expected 1 (the last layer) or more", "out-of-range")
        if self.prompt_mode != "given" and self.prompt:
            raise UserError(
                f"prompt mode {self.prompt_mode} takes no prompt, but {self.prompt!r} is given; leave one out",
                "contradiction",
            )
        if self.captioner is not None and self.prompt_mode != "automatic":
            raise UserError(
                f"a captioner ({self.captioner}) is for prompt mode automatic, not {self.prompt_mode}", "contradiction"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` turns back into the same request."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> GenerateRequest:
        """Build a request from plain values; unknown keys are errors.

        Raises:
            UserError: a key is unknown, or a value has the wrong type or contradicts another.
        """
        fields = checked_fields(cls, values, "the settings")
        if "controls" in fields:
            fields["controls"] = tuple(
                ControlUse(**checked_fields(ControlUse, use, "a control")) for use in fields["controls"]
            )
        if "loras" in fields:
            fields["loras"] = tuple(LoraUse(**checked_fields(LoraUse, use, "a LoRA")) for use in fields["loras"])
        return cls(**fields)


def check_spans(uses: tuple[ControlUse, ...], steps: int) -> None:
    """Check that each control acts at some of `steps` steps, unless its weight is 0.

    Raises:
        UserError: one does not.
    """
    for use in uses:
        if use.weight and not any(use.acts_at(index, steps) for index in range(steps)):
            raise UserError(
                f"{use.control} acts from {use.start:g} to {use.end:g}, which contains none of the {steps} steps; widen"
                " the range, or set its weight to 0 to switch it off",
                "out-of-range",
            )


def check_sampling(steps: int, guidance: float | None, sampler: str | None = None) -> None:
    """Check sampling settings; None leaves a setting to the base.

    Raises:
        UserError: `steps` is not from 1 to 1000, `guidance` is not a number of at least 1, or `sampler` is unknown.
    """
    if sampler is not None:
        solver_name(sampler)
    if not 1 <= steps <= 1000:
        raise UserError(f"steps is {steps}; expected 1 to 1000", "out-of-range")
    if guidance is not None and not (_is_finite(guidance) and guidance >= 1):
        raise UserError(f"guidance is {guidance}; expected 1 (off) or more", "out-of-range")


def mode_name(mode: str | None) -> str | None:
    """The mode of this name, which may be that of another tool; None leaves it to the base.

    Raises:
        UserError: there is none.
    """
    if mode is None:
        return None
    name = mode.strip().lower()
    name = _MODE_ALIASES.get(name, name)
    if name not in MODES:
        raise UserError(f"there is no mode {mode!r}{nearest(mode, MODES)}", "unknown-name")
    return name


def check_graphs(mode: str) -> None:
    """Check a mode of CUDA graphs.

    Raises:
        UserError: it is none of `GRAPHS`.
    """
    if mode not in GRAPHS:
        raise UserError(f"graphs is {mode!r}; expected {', '.join(GRAPHS)}{nearest(mode, GRAPHS)}", "unknown-name")


def check_prompt_mode(mode: str) -> None:
    """Check a prompt mode.

    Raises:
        UserError: it is none of `PROMPT_MODES`.
    """
    if mode not in PROMPT_MODES:
        raise UserError(f"there is no prompt mode {mode!r}{nearest(mode, PROMPT_MODES)}", "unknown-name")


def _plain(inputs: Any, what: str) -> dict[str, Any]:
    """Inputs or parameters as JSON stores them: tuples as lists, paths as text."""
    try:
        plain = json.loads(json.dumps(inputs, default=os.fspath, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the {what} must be JSON values and paths: {error}", "wrong-type") from error
    if not isinstance(plain, dict) or not plain:
        raise UserError(f"the {what} must be a mapping from names, not {inputs!r}", "wrong-type")
    return plain


def _is_finite(value: float) -> bool:
    """Whether a float can hold it; integers of JSON and Python may be larger."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def lies_within(index: int, steps: int, start: float, end: float) -> bool:
    """Whether step `index` of `steps` lies within the fractions `start` to `end`, counted as in diffusers."""
    return index / steps >= start and (index + 1) / steps <= end


_JSON_TYPES: dict[Any, tuple[type | tuple[type, ...], str]] = {
    str: (str, "text"),
    str | None: ((str, NoneType), "text or null"),
    dict[str, Any] | None: ((dict, NoneType), "a mapping from names, or null"),
    bool: (bool, "true or false"),
    int: (int, "an integer"),
    float: ((int, float), "a number"),
    int | None: ((int, NoneType), "an integer or null"),
    tuple[int, ...]: ((list, tuple), "a list of integers"),
    tuple[str, ...]: ((list, tuple), "a list of texts"),
    tuple[float, ...] | None: ((list, tuple, NoneType), "a list of numbers, or null"),
    tuple[ControlUse, ...]: ((list, tuple), "a list of controls"),
    tuple[LoraUse, ...]: ((list, tuple), "a list of LoRAs"),
    float | None: ((int, float, NoneType), "a number or null"),
    tuple[dict[str, Any], ...]: ((list, tuple), "a list of mappings from settings to values"),
}
"""Type of a field -> the JSON types it accepts, and their description."""
_ITEMS: dict[Any, tuple[type, ...]] = {
    tuple[int, ...]: (int,),
    tuple[str, ...]: (str,),
    tuple[float, ...] | None: (int, float),
}
"""Type of a list field -> the types of its items."""


_hints_of = functools.cache(get_type_hints)
"""Evaluated once per class: every combination of axes is checked."""


def checked_fields(kind: type, values: Any, what: str) -> dict[str, Any]:
    """`values` with lists turned into tuples, after checking keys and types against the fields of `kind`."""
    if not isinstance(values, dict):
        raise UserError(f"{what} must be a mapping of settings, not {type(values).__name__}", "wrong-type")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            raise UserError(f"unknown setting {str(key)!r}{nearest(str(key), list(fields))}", "unknown-key")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise UserError(f"{what} lacks {name}, which is required", "missing-setting")
    hints = _hints_of(kind)
    for key, value in values.items():
        accepted, expected = _JSON_TYPES[hints[key]]
        numbers = _ITEMS.get(hints[key], ())
        items = value if numbers and isinstance(value, (list, tuple)) else ()
        wrong_number = isinstance(value, bool) and hints[key] is not bool
        if not isinstance(value, accepted) or wrong_number or any(type(item) not in numbers for item in items):
            raise UserError(f"{key} is {value!r}; expected {expected}", "wrong-type")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
