"""`GenerateRequest`: what to generate, the same from the command line, from Python and from any other front end.

This module imports neither torch nor diffusers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from controlkit.bases.prompt_syntax import check_syntax, parse_weighted
from controlkit.bases.solver_names import SOLVERS, solver_name
from controlkit.errors import UserError, nearest
from controlkit.sampling.axes import check_axes, points_of
from controlkit.sampling.json_values import checked_fields, is_finite, plain_mapping, settle_fields
from controlkit.sampling.seeds import settled_seeds
from controlkit.sampling.uses import ControlUse, LoraUse, check_spans

MAX_SIDE = 16384
"""The longest side of an image."""
MAX_HIRES = 8
"""The largest factor of a second pass."""
DEFAULT_STEPS = 20
SAMPLERS = SOLVERS
"""Names of samplers (`bases/schedules/solvers.py`)."""
GRAPHS = ("auto", "on", "off")
"""Whether networks run as CUDA graphs (`GenerateRequest.graphs`)."""
PROMPT_MODES = ("none", "default", "automatic", "given")
"""Where the prompt comes from (`GenerateRequest.prompt_mode`)."""


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
    meant, and in chunks of that length; not for bases with a transformer."""
    clip_skip: int | None = None
    """Layer of the CLIP text encoders whose states are used, counted from the last, which is 1, as in A1111 (diffusers'
    `clip_skip` is one less for Stable Diffusion 1 and 2, two less for XL and 3). Default: the base's own: 1, or 2 for
    Stable Diffusion XL and 3. Not for FLUX, Z-Image, Qwen-Image and Sana."""
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
    of the base, 3 for nano, 7.5 for Stable Diffusion 1 and 2, 5 for XL and Z-Image, 7 for 3, 4 for FLUX.2 and
    Qwen-Image, 4.5 for Sana, 1 for distilled models. FLUX.1 dev (default: 3.5) and FLUX.2 dev read it as an input of
    their network, without branches."""
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
    noise, as nano's does, takes `ddim`, `dpm++`, `dpm++-2m-sde`, `unipc`, `ddpm` and `lcm`; a rectified flow (bases
    with a transformer) `euler`, `dpm++` and `unipc`. `lcm` needs a model or LoRA distilled for it, 50 steps at the
    most. Default: that of the base, `ddim`, or with a transformer `euler`, of Sana `dpm++`."""
    batch_size: int | None = None
    """Images per batch; changes the memory needed, and images by rounding only. Default: 16 up to 256 x 256, fewer for
    larger ones (4 of 512 x 512)."""
    tiled: bool = False
    """Whether the autoencoder works in overlapping tiles, of its native size or as it says, which bounds its memory for
    large images and changes them a little (diffusers: `enable_tiling`)."""
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
        settle_fields(self)
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
        for name in ("vary", "xy"):
            axes = tuple(plain_mapping(axis, name) for axis in check_axes(getattr(self, name), name))
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
        if not (is_finite(self.mask_blur) and 0 <= self.mask_blur <= MAX_SIDE):
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
        if not (is_finite(self.hires) and 1 < self.hires <= MAX_HIRES):
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


def check_sampling(steps: int, guidance: float | None, sampler: str | None = None) -> None:
    """Check sampling settings; None leaves a setting to the base.

    Raises:
        UserError: `steps` is not from 1 to 1000, `guidance` is not a number of at least 1, or `sampler` is unknown.
    """
    if sampler is not None:
        solver_name(sampler)
    if not 1 <= steps <= 1000:
        raise UserError(f"steps is {steps}; expected 1 to 1000", "out-of-range")
    if guidance is not None and not (is_finite(guidance) and guidance >= 1):
        raise UserError(
            f"guidance is {guidance}; expected 1 or more (1 is off, unless the base reads the scale)", "out-of-range"
        )


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
