"""A CtrLoRA adapter (Xu et al., ICLR 2025, arXiv 2410.09400): one condition, or several in one pass."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.residuals import Residuals
from controlkit.bases.text import Text, concatenate
from controlkit.controls.control import Control, OneImage, Reads, Training
from controlkit.controls.ctrlora.base_controlnet import BaseControlNet
from controlkit.controls.ctrlora.formats import ADAPTER_FORMATS, rank_in
from controlkit.controls.ctrlora.lora import AdaptedLinear, AdaptedZeroConv
from controlkit.controls.encoder_copy.names import config_of
from controlkit.controls.encoder_copy.network import base_needed, checked_config, copy_incompatibility
from controlkit.controls.file_format import Checkpoint, on_one_line
from controlkit.controls.hints import Hint
from controlkit.controls.registry import control
from controlkit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class AdapterTraining:
    """Recipe settings of an adapter."""

    control: str
    """Base control: a file, or the name of a shipped one."""
    name: str = "adapter"
    """Name of the adapter and its file."""
    rank: int = 4
    """Rank of the LoRA of every layer."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW, for nano; see `adapter_settings` for larger bases."""
    prompt_drop: float = 0.3
    """Fraction of prompts replaced by the empty prompt (0.3 in CtrLoRA's reference)."""


@control
class CtrLoRA(OneImage):
    """A `BaseControlNet` with one of its adapters selected: the control of one condition.

    Several adapters of one base control can be used together, each with its own image and weight; `forward_together`
    runs them in one pass.

    Args:
        base_control: shared, not copied.
        adapter: name of its adapter.
        condition: name of the condition that it was trained on.
        posterior_seed: see `BaseControlNet.encode`.
    """

    kind: ClassVar[str] = "ctrlora"
    title: ClassVar[str] = "an adapter of CtrLoRA"
    paper: ClassVar[str] = BaseControlNet.paper
    reads: ClassVar[Reads] = BaseControlNet.reads
    enters: ClassVar[str] = BaseControlNet.enters
    hint_is_frozen: ClassVar[bool] = True
    not_elsewhere: ClassVar[str] = BaseControlNet.not_elsewhere
    formats = ADAPTER_FORMATS
    companion: ClassVar[str | None] = BaseControlNet.kind
    companion_key: ClassVar[str] = "control.base_control"
    trainings = (
        Training(
            system="ctrlora-adapter",
            options=AdapterTraining,
            doc="A CtrLoRA adapter for a new condition.",
        ),
    )

    def __init__(
        self,
        base_control: BaseControlNet,
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

    def forward(self, x_t: Tensor | None, t: Tensor, text: Text | None, hint: Hint) -> Residuals:
        return self.base_control(None, t, text, hint, adapters=(self.adapter,))

    def hint_settings(self) -> Hashable:
        return self.posterior_seed

    def is_trained_alone(self) -> bool:
        return self.base_control.own_part_of(self.adapter) is not None

    def weights(self) -> Iterable[nn.Parameter]:
        adapter = self.base_control.adapters[self.adapter].parameters()
        return [*self.base_control.network.parameters(), *adapter]

    @property
    def shared_network(self) -> nn.Module:
        return self.base_control

    @classmethod
    def forward_together(
        cls, controls: Sequence[Control], x_t: Tensor | None, t: Tensor, text: Text | None, hints: Sequence[Hint]
    ) -> list[Residuals]:
        """The residuals of several adapters of one base control, in one pass.

        Args:
            controls: of this class, all of the same base control.
            x_t: ignored.
            t: `[B]` or a scalar, the same for all.
            text: of batch `B` or 1, the same for all.
            hints: one per control, `[B, ...]` or `[1, ...]`, all of one size.

        Returns:
            One per control, of batch `B`, equal to that of `control(None, t, text, hint)`.

        Raises:
            ValueError: the controls have different base controls, or the hints different sizes.
        """
        assert text is not None
        networks = {id(control.shared_network) for control in controls}
        if len(networks) != 1 or len(hints) != len(controls):
            raise ValueError(f"{len(controls)} controls of {len(networks)} base controls got {len(hints)} hints")
        latents = [cast(Tensor, hint) for hint in hints]
        sizes = {tuple(hint.shape[1:]) for hint in latents}
        if len(sizes) != 1:
            raise ValueError(f"hints of one pass must have the same size, got {sorted(sizes)}")
        adapters = [cast(CtrLoRA, control) for control in controls]
        batch = max(t.numel(), len(text), *(len(hint) for hint in latents))
        residuals = adapters[0].base_control(
            None,
            t.expand(batch).repeat(len(adapters)),
            concatenate(*[text.expand(batch)] * len(adapters)),
            torch.cat([hint.expand(batch, *hint.shape[1:]) for hint in latents]),
            adapters=[control.adapter for control in adapters],
        )
        return [residuals.rows(place * batch, (place + 1) * batch) for place in range(len(adapters))]

    def incompatibility(self, base: Base) -> str | None:
        return copy_incompatibility(self.config(), base)

    @classmethod
    def for_base(cls, base: Base, condition: str | None = None, *, rank: int = 4, **options: Any) -> CtrLoRA:
        """A new adapter on a new base control; both are trainable."""
        shared = BaseControlNet.for_base(base)
        adapter = shared.add_adapter("adapter", rank)
        adapter.requires_grad_(True)
        return cls(shared, adapter.name, condition)

    def config(self) -> dict[str, Any]:
        return {**self.base_control.config(), "rank": self.base_control.adapters[self.adapter].rank}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], condition: str | None = None) -> CtrLoRA:
        network_config = checked_config(config)
        rank = network_config.pop("rank")
        shared = BaseControlNet.from_config(network_config)
        shared.add_adapter("adapter", rank)
        return cls(shared, "adapter", condition)

    @classmethod
    def config_of(cls, tensors: Mapping[str, Tensor], unet_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return {**config_of(tensors, unet_config), "rank": rank_in(tensors)}

    @classmethod
    def is_native(cls, tensors: Mapping[str, Tensor]) -> bool:
        families = {name.partition(".")[0] for name in tensors}
        lora = any(".lora_layer." in name for name in tensors)
        return lora and "controlnet_down_blocks" in families and "controlnet_cond_embedding" not in families

    def file_state(self) -> dict[str, Tensor]:
        return self.base_control.adapter_state_dict(self.adapter)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, companion: Control | None = None) -> CtrLoRA:
        """The adapter on its base control, under a name that is not taken there.

        Raises:
            UserError: it does not fit the base control.
        """
        shared = cast(BaseControlNet, companion)
        name = checkpoint.path.stem if checkpoint.path is not None else "adapter"
        while name in shared.adapters:
            name += "'"
        rank = checkpoint.metadata.get("control.rank")
        try:
            shared.load_adapter(name, checkpoint.float_tensors(), rank=None if rank is None else int(rank))
        except ValueError as error:
            raise UserError(
                f"{checkpoint.path} does not fit its base control: {on_one_line(error)}", "incompatible"
            ) from error
        return cls(shared, name, checkpoint.condition)

    def file_metadata(self) -> dict[str, str]:
        return {
            "control.rank": str(self.base_control.adapters[self.adapter].rank),
            f"{self.companion_key}_fingerprint": self.base_control.fingerprint(),
        }

    def store_frozen(self, dtype: torch.dtype) -> None:
        self.base_control.store_frozen(dtype)

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
    ) -> CtrLoRA:
        (condition,) = conditions
        shared = cast(BaseControlNet, companion)
        shared.add_adapter(name, options["rank"], seed=seed)
        shared.train_adapter(name)
        return cls(shared, name, condition)

    def trained_modules(self) -> dict[str, nn.Module]:
        return {"adapter": self.base_control.adapters[self.adapter]}

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.base_control.adapters[self.adapter].parameters() if p.requires_grad]

    def parameter_counts(self) -> dict[str, int]:
        counts = {"lora": 0, "zero_convolutions": 0, "norms": 0}
        adapter = self.base_control.adapters[self.adapter]
        for path, layer in self.base_control.layers.items():
            part = adapter.part(path, layer) or layer
            kind = {AdaptedLinear: "lora", AdaptedZeroConv: "zero_convolutions"}.get(type(layer), "norms")
            counts[kind] += sum(parameter.numel() for parameter in part.parameters())
        return {"parameters": sum(counts.values()), **counts}

    @classmethod
    def needs(cls, config: Mapping[str, Any]) -> str:
        return base_needed(config)

    @classmethod
    def variants(cls, base: Base, **options: Any) -> dict[str, Control]:
        """The base control, and with `rank` an adapter."""
        variants: dict[str, Control] = {"base control": BaseControlNet.for_base(base)}
        if (rank := options.get("rank")) is not None:
            variants[f"adapter of rank {rank}"] = cls.for_base(base, rank=rank)
        return variants
