"""What is trained and measured in making nano."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from steps import Outcome
from workshop import Workshop

from controlkit.errors import UserError

RECIPES = Path("recipes/nano")

ICON_PACKAGES = (
    *("@iconify-json/noto@1.2.9", "@iconify-json/fluent-emoji-flat@1.2.6", "@iconify-json/twemoji@1.2.5"),
    *("@iconify-json/emojione@1.2.3", "@iconify-json/openmoji@1.2.29"),
)
"""npm packages of the icon sets. Other versions draw other icons, and everything is trained anew."""

BASE_CONDITIONS = (
    *("canny", "softedge_sobel", "scribble", "color_regions", "silhouette", "grayscale"),
    *("blur", "inpaint", "outpaint"),
)
"""Those of recipes/nano/ctrlora-base.yaml, whose adapters are trained with the base control."""

ADAPTERS = {
    "palette": "palette",
    "pixel": "pixel",
    "lineart_color_hints": "lineart_color_hints",
    "lineart": "lineart_xdog",
}
"""Adapters that are trained on the finished base control => their conditions."""

FURTHER = ("raindrop", "low_light", "illusion")
"""Conditions of adapters that are trained to be told of, not to ship."""


SYSTEMS: dict[str, tuple[str, ...]] = {
    "controlnet-mlp": ("system=controlnet-mlp",),
    "controlnet-lite": ("system=controlnet-lite", "design=paper"),
    "t2i-adapter": ("system=t2i-adapter",),
    "controlnet-precomputed": ("system=controlnet-precomputed",),
    "controlnet-precomputed-text": ("system=controlnet-precomputed", "reads_text=true"),
    "ctrlora-full": ("system=ctrlora-full",),
    "controlnet-xs": ("system=controlnet-xs", "size_ratio=0.5"),
    "controlnet": ("system=controlnet",),
}
"""Controls that are trained on the same images to compare them => settings of recipes/nano/systems.yaml."""


TOGETHER = {
    "t2i-adapter": "palette",
    "controlnet-precomputed": "palette",
    "controlnet-precomputed-text": "silhouette",
    "controlnet-lite": "palette",
    "controlnet-mlp": "palette",
    "controlnet-xs": "palette",
    "ctrlora-full": "palette",
}
"""Systems that are sampled together with another control => the adapter that is the other one."""
WITH_CANNY = ("palette", "nano/grayscale", "silhouette", "pixel")
"""Adapters that are sampled together with the canny ControlNet."""
BALANCED = ("palette", "nano/canny")
"""Adapters that are sampled together in the mode `balanced`."""


@dataclass(frozen=True, kw_only=True)
class MakeSettings:
    """What is trained and measured. The defaults are those of the pages."""

    adapter_steps: tuple[str, ...] = ("palette=1000", "pixel=1000", "lineart_color_hints=1000", "lineart=500")
    """Optimiser steps of each adapter."""
    further_steps: tuple[str, ...] = ("raindrop=500", "low_light=300", "illusion=300")
    """Optimiser steps of each adapter that does not ship."""
    pairs: int = 1000
    """Pairs to learn each adapter from."""
    systems: tuple[str, ...] = tuple(SYSTEMS)
    """Systems that are compared on canny."""
    systems_steps: int = 1600
    """Optimiser steps of each."""
    local_steps: int = 3600
    """Optimiser steps of Uni-ControlNet's local adapter."""
    union_steps: int = 3600
    """Optimiser steps of ControlNet Union."""
    global_steps: int = 1500
    """Optimiser steps of Uni-ControlNet's global adapter."""
    unicontrol_steps: int = 1800
    """Optimiser steps of UniControl, and of one with a frozen HyperNet."""
    gligen_steps: int = 2400
    """Optimiser steps of GLIGEN."""
    scenes: int = 96
    """Scenes on which GLIGEN is evaluated."""
    images: int = 96
    """Images of each set on which canny controls are evaluated."""
    adapter_images: int = 32
    """The same for adapters."""
    guidance_images: int = 48
    """Images on which modes, guidance scales and weights are compared."""
    sampling_steps: int = 20
    """DDIM steps."""
    quick_start_steps: int = 100
    """Optimiser steps of the README's adapter."""
    gallery_steps: int = 900
    """Optimiser steps of each LoRA on the sheet of docs/generate.md."""
    new_condition: tuple[str, ...] = ()
    """Settings of the study new-condition, `key=value`."""
    convergence: tuple[str, ...] = ("images=24",)
    """Settings of the study convergence."""
    several_conditions: tuple[str, ...] = ("images=32",)
    """Settings of the study several-conditions."""
    community_model: tuple[str, ...] = ()
    """Settings of the study community-model."""
    several_canny: tuple[str, ...] = ("images=16", "timed=[1]")
    """Settings of the study several-conditions of the canny ControlNet with adapters."""
    several_systems: tuple[str, ...] = ("images=16", "timed=[1]")
    """Settings of the study several-conditions of other systems."""
    several_balanced: tuple[str, ...] = ("images=32", "timed=[1]")
    """Settings of the study several-conditions in the mode `balanced`."""
    guidance_modes: tuple[str, ...] = ()
    """Settings of the study guidance-modes."""
    image_prompt: tuple[str, ...] = ()
    """Settings of the study image-prompt."""
    task_instructions: tuple[str, ...] = ("images=24",)
    """Settings of the study task-instructions."""
    ambiguous_content: tuple[str, ...] = ()
    """Settings of the study ambiguous-content."""


def system_file(shop: Workshop, system: str) -> Path:
    """Where the control of a system is that is trained to be told of, not to ship."""
    return shop.made / "systems" / f"{system}.safetensors"


def npm_pack(folder: Path, *packages: str) -> Outcome:
    """Download packages into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["npm", "pack", *packages], cwd=folder, check=True, stdout=sys.stderr)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"npm pack {' '.join(packages)} failed ({error}); it needs npm and a registry", "download-failed"
        ) from error
    return Outcome()


def counts(texts: Sequence[str]) -> dict[str, int]:
    """`name=number` texts as a mapping."""
    try:
        return {name: int(number) for name, _, number in (text.partition("=") for text in texts)}
    except ValueError as error:
        raise UserError(f"{', '.join(texts)}: expected name=number", "wrong-type") from error


def system_log(shop: Workshop, system: str) -> Path:
    """Where the log of that training is."""
    return system_file(shop, system).with_suffix(".jsonl")
