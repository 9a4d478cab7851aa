"""What controls of bases with a transformer share: one network, and hints that are latents."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.controls.control import Control
from controlkit.errors import UserError

BASE_BLOCKS = "base_blocks"
"""Entry of a control's config: number of the base's blocks, if not that of the released models."""


class TransformerControl(Control):
    """A control of bases with one kind of transformer, whose network reads the latent of the condition image."""

    architecture: ClassVar[str | None] = "control-net"
    tag: ClassVar[str | None] = "controlnet"
    hint_is_frozen: ClassVar[bool] = True
    transformer: ClassVar[type[nn.Module]]
    """Class of the base's transformer."""
    family_title: ClassVar[str]
    """Name of the base's family, in text."""

    network: Any

    @classmethod
    def transformer_of(cls, base: Base) -> Any:
        """The base's transformer.

        Raises:
            UserError: the base has another network.
        """
        if not isinstance(base.denoiser, cls.transformer):
            raise UserError(
                f"{cls.title} needs the transformer of {cls.family_title}; {base.name} has a"
                f" {type(base.denoiser).__name__}",
                "incompatible",
            )
        return base.denoiser

    def incompatibility(self, base: Base) -> str | None:
        if not isinstance(base.denoiser, self.transformer):
            return f"it needs the transformer of {self.family_title}; the base has a {type(base.denoiser).__name__}"
        return self.difference(base.denoiser)

    @abstractmethod
    def difference(self, transformer: Any) -> str | None:
        """As `incompatibility`, for a base with the right kind of transformer."""

    def file_state(self) -> dict[str, Tensor]:
        return dict(self.network.state_dict())

    def load_file_state(self, state: Mapping[str, Tensor]) -> None:
        self.network.load_state_dict(dict(state), strict=True, assign=True)

    def hint_settings(self) -> Hashable:
        return None

    def trainable_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def parameter_counts(self) -> dict[str, int]:
        return {"parameters": sum(parameter.numel() for parameter in self.parameters())}


class TransformerCopy(TransformerControl):
    """One whose network has copies of blocks of the base's transformer."""

    def difference(self, transformer: Any) -> str | None:
        for what, (mine, theirs) in self.sizes_beside(transformer).items():
            if mine != theirs:
                return f"its {what}: {mine}, the base's: {theirs}"
        return None

    @abstractmethod
    def sizes_beside(self, transformer: Any) -> Mapping[str, tuple[Any, Any]]:
        """Sizes that must be equal, in words -> that of the control and that of the base's transformer."""

    def copied_network(self) -> nn.Module | None:
        network: nn.Module = self.network
        return network


def with_weights_of(network: nn.Module, transformer: nn.Module, base: Base) -> nn.Module:
    """The network with the weights of the transformer that have the same names, on the base's device and in its
    dtype."""
    own = network.state_dict()
    network.load_state_dict({name: value for name, value in transformer.state_dict().items() if name in own}, False)
    return nn.Module.to(network, base.device, base.dtype)


def spread(family: str, outputs: Sequence[Tensor], blocks: int, *, in_turns: bool = False) -> dict[str, Tensor]:
    """The output after each of the base's blocks: for runs of blocks, or in turns.

    Args:
        family: of the sites: `block` of `block.0`.
        outputs: of the control's blocks, which may be fewer.
        blocks: number of the base's.
    """
    if not outputs:
        return {}
    run = math.ceil(blocks / len(outputs))
    return {f"{family}.{place}": outputs[place % len(outputs) if in_turns else place // run] for place in range(blocks)}


def used_of(outputs: int, blocks: int) -> int:
    """How many of so many outputs `spread` uses for the base's blocks."""
    return math.ceil(blocks / math.ceil(blocks / min(outputs, blocks))) if outputs and blocks else 0


def count_of(names: Collection[str], family: str) -> int:
    """Number of modules `FAMILY.N` with parameters."""
    return len({name.split(".")[1] for name in names if re.match(rf"{family}\.\d+\.", name)})
