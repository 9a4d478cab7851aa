"""CtrLoRA (Xu et al., ICLR 2025, arXiv 2410.09400): one condition, or several in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from controlkit.bases.base import Base, Text, concatenate
from controlkit.bases.residuals import Residuals
from controlkit.controls.base_control import BaseControl, network_of
from controlkit.controls.control import Control, Reads, Site, copy_misfit
from controlkit.controls.lora import AdaptedLinear, AdaptedZeroConv


class CtrLoRA(Control):
    """One condition of a `BaseControl`: the base control under one adapter, as a control of its own.

    Several of one base control can be used at a time, each with its own image and weight; `forward_together`
    runs them in one pass.

    Args:
        base_control: shared, not copied.
        adapter: name of its adapter.
        condition: name of the condition it was trained on.
        posterior_seed: see `BaseControl.encode`.
    """

    kind: ClassVar[str] = BaseControl.kind
    reads: ClassVar[Reads] = BaseControl.reads
    site: ClassVar[Site] = BaseControl.site

    def __init__(
        self,
        base_control: BaseControl,
        adapter: str,
        condition: str | None = None,
        *,
        posterior_seed: int | None = None,
    ) -> None:
        super().__init__()
        self.base_control = base_control
        self.adapter = adapter
        self.condition = condition
        self.posterior_seed = posterior_seed

    def encode(self, condition_image: Tensor, base: Base) -> Tensor:
        return self.base_control.encode(condition_image, base, seed=self.posterior_seed)

    def forward(self, x_t: Tensor | None, t: Tensor, text: Text | None, hint: Tensor) -> Residuals:
        return self.base_control(None, t, text, hint, adapters=(self.adapter,))

    def weights(self) -> Iterable[nn.Parameter]:
        own = self.base_control.adapters[self.adapter].parameters()
        return [*self.base_control.network.parameters(), *own]

    @property
    def shared_network(self) -> nn.Module:
        return self.base_control

    @classmethod
    def forward_together(
        cls, controls: Sequence[Control], t: Tensor, text: Text, hints: Sequence[Tensor]
    ) -> list[Residuals]:
        """The residuals of several conditions of one base control, in one pass.

        Args:
            controls: of this class, all of the same base control.
            t: `[B]` or a scalar, the same for all.
            text: of batch `B` or 1, the same for all.
            hints: one for each control, `[B, ...]` or `[1, ...]`, all of one size.

        Returns:
            One for each control, with a batch of `B`, equal to that of `control(None, t, text, hint)`.

        Raises:
            ValueError: the controls have different base controls, or the hints different sizes.
        """
        shared = {id(control.shared_network) for control in controls}
        if len(shared) != 1 or len(hints) != len(controls):
            raise ValueError(f"{len(controls)} controls of {len(shared)} base controls got {len(hints)} hints")
        sizes = {tuple(hint.shape[1:]) for hint in hints}
        if len(sizes) != 1:
            raise ValueError(f"hints of one pass must have one size, not {sorted(sizes)}")
        own = [cast(CtrLoRA, control) for control in controls]
        batch = max(t.numel(), len(text), *(len(hint) for hint in hints))
        made = own[0].base_control(
            None,
            t.expand(batch).repeat(len(own)),
            concatenate(*[text.expand(batch)] * len(own)),
            torch.cat([hint.expand(batch, *hint.shape[1:]) for hint in hints]),
            adapters=[control.adapter for control in own],
        )
        return [made.rows(place * batch, (place + 1) * batch) for place in range(len(own))]

    def misfit(self, base: Base) -> str | None:
        return copy_misfit(self.config(), base)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.base_control.adapters[self.adapter].parameters() if p.requires_grad]

    def config(self) -> dict[str, Any]:
        return {**self.base_control.config(), "rank": self.base_control.adapters[self.adapter].rank}


def count_base_control(unet_config: Mapping[str, Any]) -> dict[str, int]:
    """Parameters of the base control of a UNet, counted without memory.

    Returns:
        `parameters`, `zero_convolutions` among them, and `tensors`.
    """
    with torch.device("meta"):
        control = BaseControl(network_of(unet_config))
    zero = [layer for layer in control.layers.values() if isinstance(layer, AdaptedZeroConv)]
    return {
        "parameters": sum(p.numel() for p in control.parameters()),
        "zero_convolutions": sum(p.numel() for layer in zero for p in layer.parameters()),
        "tensors": len(list(control.parameters())),
    }


def count_adapter(unet_config: Mapping[str, Any], rank: int) -> dict[str, int]:
    """Parameters of an adapter for a UNet, counted without memory.

    Returns:
        `parameters`, the sum of `lora`, `zero_convolutions` and `norms`; and `tensors`.
    """
    with torch.device("meta"):
        control = BaseControl(network_of(unet_config))
        adapter = control.add_adapter("counted", rank)
    counts = {"lora": 0, "zero_convolutions": 0, "norms": 0}
    for path, layer in control.layers.items():
        part = adapter.part(path, layer) or layer
        kind = {AdaptedLinear: "lora", AdaptedZeroConv: "zero_convolutions"}.get(type(layer), "norms")
        counts[kind] += sum(parameter.numel() for parameter in part.parameters())
    return {"parameters": sum(counts.values()), **counts, "tensors": len(list(adapter.parameters()))}
