"""Outputs of ControlNets whose copied blocks are fewer than the base's, as in diffusers' transformers."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence

from torch import Tensor


def spread(family: str, outputs: Sequence[Tensor], blocks: int, *, in_turns: bool = False) -> dict[str, Tensor]:
    """The output after each of the base's blocks: for runs of blocks, or in turns.

    Args:
        family: of the sites: `block` of `block.0`.
        outputs: of the control's blocks.
        blocks: number of the base's.
    """
    if not outputs:
        return {}
    run = math.ceil(blocks / len(outputs))
    return {f"{family}.{place}": outputs[place % len(outputs) if in_turns else place // run] for place in range(blocks)}


def count_of(names: Collection[str], family: str) -> int:
    """Number of linear layers `FAMILY.N`."""
    return len([name for name in names if re.fullmatch(rf"{family}\.\d+\.weight", name)])
