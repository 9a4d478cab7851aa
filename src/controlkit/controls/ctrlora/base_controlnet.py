"""The Base ControlNet, CtrLoRA's shared network, and its adapters by name."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.identity import hash_of_halves
from controlkit.bases.residuals import Residuals
from controlkit.bases.text import Text
from controlkit.bases.unet import unet_inputs
from controlkit.controls.control import Control, OneImage, Reads, Training
from controlkit.controls.ctrlora.formats import BASE_FORMATS
from controlkit.controls.ctrlora.lora import (
    Adapted,
    AdaptedLinear,
    AdaptedZeroConv,
    Adapter,
    Affine,
    LoRA,
    adapt_layers,
    check_state,
    rank_of,
)
from controlkit.controls.encoder_copy.names import config_of
from controlkit.controls.encoder_copy.network import (
    HINT_SETTINGS,
    base_needed,
    checked_config,
    copy_incompatibility,
    missing_heads,
    network_of,
    with_heads,
)
from controlkit.controls.file_format import Checkpoint
from controlkit.controls.hints import Hint
from controlkit.controls.inputs import check_range
from controlkit.controls.registry import control
from controlkit.errors import UserError

_ZERO_CONVOLUTIONS = ("controlnet_down_blocks", "controlnet_mid_block")
_TRANSFERRED = "control.transferred_from"
"""Metadata key of the comma-separated fingerprints that a base control had before transfers to other bases."""


@dataclass(frozen=True, kw_only=True)
class BaseTraining:
    """Recipe settings of base training."""

    rank: int = 128
    """Rank of the LoRA of every layer."""
    start: str | None = None
    """Initial base control, with the adapters of it in its folder that are called as trained conditions
    (`canny.safetensors`); default: a copy of the base's encoder, and new LoRA."""
    prompt_drop: float = 0.3
    """Fraction of prompts replaced by the empty prompt (Xu et al. 2025; 0.3 in the reference)."""


@dataclass(frozen=True, kw_only=True)
class FullTraining:
    """Recipe settings of full training for one condition."""

    control: str | None = None
    """Initial base control; default: a copy of the base's encoder."""
    prompt_drop: float = 0.3
    """Fraction of prompts replaced by the empty prompt (0.3 in CtrLoRA's reference)."""


@control
class BaseControlNet(OneImage):
    """Encoder and middle block of the base; its input is the VAE latent of the condition image, not the noisy one.

    The network is diffusers' `ControlNetModel` without its hint network; it never reads x_t. Adapters (`Adapter`) are
    added by name and selected: none (the network alone), one, or one per group of a batch.

    Three training modes: `train_base` (the network and the LoRA of every adapter that shares its zero convolutions and
    norms), `train_adapter` (one adapter only), `freeze`. New adapters are frozen.
    """

    kind: ClassVar[str] = "ctrlora-base"
    title: ClassVar[str] = "a base control of CtrLoRA"
    paper: ClassVar[str] = "Xu et al. 2025, arXiv 2410.09400"
    tag: ClassVar[str | None] = "ctrlora"
    reads: ClassVar[Reads] = Reads.TIME | Reads.TEXT
    enters: ClassVar[str] = "decoder skips and middle"
    hint_is_frozen: ClassVar[bool] = True
    not_elsewhere: ClassVar[str] = (
        "CtrLoRA reads the latent of the condition image and not the noisy latent, so it is not a plain ControlNet"
    )
    formats = BASE_FORMATS
    trainings = (
        Training(
            system="ctrlora-base",
            several=True,
            options=BaseTraining,
            doc="CtrLoRA's base control: one shared network and one LoRA per condition, trained together.",
        ),
        Training(
            system="ctrlora-full",
            options=FullTraining,
            doc="CtrLoRA's network, fully trained for one condition.",
        ),
    )

    def __init__(self, network: ControlNetModel) -> None:
        super().__init__()
        network.controlnet_cond_embedding = nn.Identity()
        self.network = network
        self.condition = None
        self.layers: dict[str, Adapted] = adapt_layers(network, _ZERO_CONVOLUTIONS)
        """Path -> layer that adapters change, in the order of the network."""
        self._adapters = nn.ModuleDict()
        self._selected: tuple[str | None, ...] = (None,)
        self._fingerprint: str | None = None
        self.transferred_from: tuple[str, ...] = ()
        """Fingerprints of the base controls that it was moved from to another base; adapters made on them are taken."""

    @classmethod
    def for_base(cls, base: Base, condition: str | None = None, **options: Any) -> BaseControlNet:
        """A new one: encoder and middle block copied from `base`, zero convolutions; all trainable.

        Raises:
            UserError: the base's UNet is class-conditional.
        """
        if base.unet.config.get("class_embed_type") or base.unet.config.get("num_class_embeds"):
            raise UserError(
                f"the UNet of {base.name} is class-conditional, which CtrLoRA does not support", "incompatible"
            )
        with torch.device("meta"):
            new = cls(network_of(dict(base.unet.config)))
        unet_state = base.unet.state_dict()
        state = {}
        for name, value in new.network.state_dict().items():
            if name.startswith(_ZERO_CONVOLUTIONS):
                state[name] = torch.zeros(value.shape, device=base.device, dtype=base.dtype)
            else:
                state[name] = unet_state[name].to(base.device, copy=True)
        new.network.load_state_dict(state, strict=True, assign=True)
        new.condition = condition
        return new

    @classmethod
    def from_config(cls, config: Mapping[str, Any], condition: str | None = None) -> BaseControlNet:
        new = cls(network_of(with_heads(checked_config(config)))).eval()
        new.condition = condition
        return new

    @classmethod
    def config_of(cls, tensors: Mapping[str, Tensor], unet_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return config_of(tensors, unet_config)

    @classmethod
    def is_native(cls, tensors: Mapping[str, Tensor]) -> bool:
        families = {name.partition(".")[0] for name in tensors}
        lora = any(".lora_layer." in name for name in tensors)
        return "controlnet_down_blocks" in families and "controlnet_cond_embedding" not in families and not lora

    @classmethod
    def missing_setting(cls, config: Mapping[str, Any]) -> str | None:
        return missing_heads(config)

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Name -> adapter, in the order of addition."""
        adapters = cast(Iterable[Adapter], self._adapters.values())
        return {adapter.name: adapter for adapter in adapters}

    @property
    def selected(self) -> tuple[str | None, ...]:
        """The active adapter of each group of the batch; `(None,)` is the network alone."""
        return self._selected

    def add_adapter(self, name: str, rank: int, *, shares_base: bool = False, seed: int | None = None) -> Adapter:
        """Add a frozen adapter: new LoRA; zero convolutions and norms start from the network's.

        (As xyfJASON/ctrlora, cldm/cldm_ctrlora_finetune.py:96-104.)

        Args:
            rank: of the LoRA of every layer.
            shares_base: LoRA only, for base training: the network's zero convolutions and norms serve all.
            seed: of the new LoRA; torch's global generator if None.

        Raises:
            ValueError: the name is taken or the rank is not a positive integer.
        """
        self._check_free(name)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        adapter = Adapter(name, self.layers, rank, shares_base=shares_base, generator=generator)
        self._adapters[_key(name)] = adapter.train(self.training)
        return adapter

    def remove_adapter(self, name: str) -> None:
        """Remove an adapter; if it was selected, the network alone is selected.

        Raises:
            ValueError: there is no such adapter.
        """
        self._find(name)
        del self._adapters[_key(name)]
        if name in self._selected:
            self.select(None)

    def select(self, names: str | Sequence[str | None] | None) -> None:
        """Activate one adapter, none, or one for each of as many equal, consecutive groups of a batch.

        Raises:
            ValueError: there is no such adapter, or the sequence is empty.
        """
        selected = (names,) if names is None or isinstance(names, str) else tuple(names)
        if not selected:
            raise ValueError("no adapter given; pass one per group of the batch, or None")
        distinct = selected[:1] if len(set(selected)) == 1 else selected
        chosen = [None if name is None else self._find(name) for name in distinct]
        for path, layer in self.layers.items():
            parts = tuple(None if adapter is None else adapter.part(path, layer) for adapter in chosen)
            layer.active = parts  # type: ignore[assignment]
        self._selected = selected

    def adapter_state_dict(self, name: str) -> dict[str, Tensor]:
        """The complete flat state of one adapter.

        For an adapter that shares the base's zero convolutions and norms they are included, so that all adapter files
        have the same names.

        Raises:
            ValueError: there is no such adapter.
        """
        adapter = self._find(name)
        adapter_state = adapter.state_dict()
        if not adapter.shares_base:
            return adapter_state
        state = {}
        for path, layer in self.layers.items():
            parts = ("lora_layer.down.weight", "lora_layer.up.weight")
            if isinstance(layer, AdaptedLinear):
                state.update({f"{path}.{part}": adapter_state[f"{path}.{part}"] for part in parts})
            else:
                state.update({f"{path}.{key}": value for key, value in layer.state_dict().items()})
        return state

    def load_adapter(self, name: str, state: Mapping[str, Tensor], *, rank: int | None = None) -> Adapter:
        """Add a frozen adapter from its flat state, with its own zero convolutions and norms.

        Args:
            rank: declared by the file, if it is; the shapes must agree.

        Raises:
            ValueError: the state is not an adapter's, or is for another base control or rank.
        """
        file_rank = rank_of(state)
        if rank is not None and rank != file_rank:
            raise ValueError(f"the adapter {name!r} has rank {file_rank}, not {rank}")
        self._check_free(name)
        adapter = Adapter(name, self.layers, file_rank, device="meta")
        check_state(name, adapter.state_dict(), state)
        weight = self.network.conv_in.weight
        target: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype, "copy": True}
        moved = {key: value.detach().to(**target) for key, value in state.items()}
        adapter.load_state_dict(moved, strict=True, assign=True)
        self._adapters[_key(name)] = adapter.requires_grad_(False).train(self.training)
        return adapter

    def own_part_of(self, name: str) -> str | None:
        """The first zero convolution or norm in which an adapter differs from the network; None if there is none.

        Raises:
            ValueError: there is no such adapter.
        """
        adapter = self._find(name)
        for path, layer in self.layers.items():
            part = adapter.part(path, layer)
            if isinstance(part, Affine) and not all(
                torch.equal(value, layer.get_parameter(key)) for key, value in part.named_parameters()
            ):
                return path
        return None

    def share_base(self, name: str) -> Adapter:
        """Let the network's zero convolutions and norms serve an adapter in place of its own, as in base training.

        Raises:
            ValueError: there is no such adapter, or its own zero convolutions and norms differ from the network's.
        """
        own = self._find(name)
        if (path := self.own_part_of(name)) is not None:
            raise ValueError(f"the adapter {name!r} has zero convolutions and norms of its own ({path})")
        shared = Adapter(name, self.layers, own.rank, shares_base=True)
        names = shared.state_dict().keys()
        shared.load_state_dict({key: value for key, value in own.state_dict().items() if key in names})
        self._adapters[_key(name)] = shared.train(self.training)
        return shared

    @torch.no_grad()
    def merged(self, name: str) -> BaseControlNet:
        """A new base control without adapters that computes what this one does with the adapter `name`.

        Its linear layers are W + up @ down, its zero convolutions and norms the adapter's. Other weights share memory
        with this one, so it is frozen.

        Raises:
            ValueError: there is no such adapter.
        """
        adapter = self._find(name)
        state = dict(self.network.state_dict())
        for path, layer in self.layers.items():
            part = adapter.part(path, layer)
            if isinstance(part, LoRA):
                weight = layer.weight
                state[f"{path}.weight"] = (weight.float() + part.change()).to(weight.dtype)
            elif part is not None:
                state.update({f"{path}.{key}": value.clone() for key, value in part.state_dict().items()})
        return build_base_control(self.config(), state).requires_grad_(False).train(self.training)

    def fingerprint(self) -> str:
        """Hash of the network's weights (as float16), which adapters record."""
        return self._fingerprint or hash_of_halves(self.network.state_dict().values())

    @classmethod
    def fingerprint_of(cls, checkpoint: Checkpoint) -> str:
        return build_base_control(with_heads(checkpoint.config), checkpoint.float_tensors()).fingerprint()

    def saved_fingerprint(self, dtype: torch.dtype) -> str:
        return hash_of_halves(value.to(dtype) for value in self.file_state().values())

    def keep_identity(self) -> None:
        """Keep the current fingerprint when the weights are cast to another dtype.

        It is dropped when the weights change: in `train_base`, or by a transfer to another base.
        """
        self._fingerprint = self.fingerprint()

    def mark_transferred(self) -> None:
        """Record the current fingerprint before the weights are transferred to another base."""
        self.transferred_from = (*self.transferred_from, self.fingerprint())
        self._fingerprint = None

    def store_frozen(self, dtype: torch.dtype) -> None:
        """Cast the network to `dtype` if it does not train; adapters keep theirs.

        The fingerprint remains that of the weights before the cast.
        """
        if not any(parameter.requires_grad for parameter in self.network.parameters()):
            self.keep_identity()
            nn.Module.to(self.network, dtype)  # diffusers' method warns of a dtype problem that autocast prevents

    @torch.no_grad()
    def encode(self, condition_image: Tensor, base: Base, *, seed: int | None = None) -> Tensor:
        """Condition images `[B, 3, H, W]` in [0, 1] => scaled latents `[B, latent_channels, h, w]`.

        The autoencoder gets them in [0, 1], unlike images: the reference trains so (xyfJASON/ctrlora,
        datasets/custom_dataset.py:75).

        Args:
            seed: sample the posterior, as the reference does, instead of its mode; every image of the batch gets the
                same noise, so that none depends on its neighbours.

        Raises:
            ValueError: a value is outside [0, 1].
            UserError: the size does not fit the base.
        """
        base.check_size(condition_image.shape[-1], condition_image.shape[-2])
        check_range(condition_image)
        if seed is None:
            hint = base.encode_image(condition_image)
        else:
            weight = base.vae.encoder.conv_in.weight
            posterior = base.vae.encode(condition_image.to(weight.device, weight.dtype)).latent_dist
            noise = torch.randn(posterior.mean.shape[1:], generator=torch.Generator().manual_seed(seed))
            sample = posterior.mean + posterior.std * noise.to(posterior.mean)
            hint = base.scaled(sample)
        return hint.to(self.network.conv_in.weight)

    def forward(
        self,
        x_t: Tensor | None,
        t: Tensor,
        text: Text | None,
        hint: Hint,
        *,
        adapters: Sequence[str | None] | None = None,
    ) -> Residuals:
        """Residuals for `hint` `[B, latent_channels, h, w]` at times `t` `[B]` under `text` `[B, L, D]`.

        A batch of 1 is expanded to that of the others.

        Args:
            x_t: ignored.
            adapters: for this pass, instead of the selection: one name for each of as many equal, consecutive groups of
                the batch. All run in one pass.

        Raises:
            ValueError: there is no such adapter, or the batch does not divide into the groups.
        """
        assert text is not None and isinstance(hint, Tensor)
        batch = max(len(hint), len(text), t.numel())
        groups = len(self._selected if adapters is None else adapters)
        if groups > 1 and batch % groups:
            raise ValueError(f"a batch of {batch} does not divide into {groups} groups, one per adapter")
        with self._selecting(adapters):
            down, middle = self.network(
                hint.expand(batch, *hint.shape[1:]),
                t.expand(batch),
                **unet_inputs(text.expand(batch)),
                controlnet_cond=hint.new_zeros(()),
                return_dict=False,
            )
        return Residuals.numbered("skip", down, middle=middle)

    def state(self) -> Hashable:
        return self._selected

    def train_base(self) -> None:
        """Base training: the network, and the LoRA of every adapter that shares its other layers."""
        self._fingerprint, self.transferred_from = None, ()
        self.requires_grad_(False)
        self.network.requires_grad_(True)
        for adapter in self.adapters.values():
            adapter.requires_grad_(adapter.shares_base)

    def train_adapter(self, name: str) -> None:
        """Adapter training: select this adapter and train only its tensors.

        Raises:
            ValueError: there is no such adapter, or it shares the base's zero convolutions and norms.
        """
        adapter = self._find(name)
        if adapter.shares_base:
            raise ValueError(f"the adapter {name!r} shares the base's zero convolutions; train the base instead")
        self.freeze()
        adapter.requires_grad_(True)
        self.select(name)

    def freeze(self) -> None:
        """Train nothing."""
        self.requires_grad_(False)

    def hint_settings(self) -> Hashable:
        return None

    def incompatibility(self, base: Base) -> str | None:
        return copy_incompatibility(self.config(), base)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def config(self) -> dict[str, Any]:
        settings = self.network.config.items()
        return {key: value for key, value in settings if not key.startswith("_") and key not in HINT_SETTINGS}

    def file_state(self) -> dict[str, Tensor]:
        """The network's weights, without adapters, with diffusers' names."""
        return dict(self.network.state_dict())

    def load_file_state(self, state: Mapping[str, Tensor]) -> None:
        self.network.load_state_dict(dict(state), strict=True, assign=True)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, companion: Control | None = None) -> BaseControlNet:
        control = build_base_control(checkpoint.config, checkpoint.float_tensors())
        control.condition = checkpoint.condition
        control.transferred_from = earlier_fingerprints(checkpoint.metadata)
        return control.requires_grad_(False)

    def file_metadata(self) -> dict[str, str]:
        return {_TRANSFERRED: ",".join(self.transferred_from)} if self.transferred_from else {}

    @classmethod
    def usage(cls, file: str, base: str, condition: str | None) -> list[str]:
        if condition is not None:  # an adapter merged into it, or one that was trained whole
            return super().usage(file, base, condition)
        return [f"    controlkit adapt PAIRS --base {base} --control {file} --name mine"]

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
    ) -> BaseControlNet:
        """`start`, or a new one; with a LoRA of `rank` per condition if the options have a rank.

        Raises:
            UserError: an adapter of `start` has another rank, or was trained alone.
        """
        control = cls.for_base(base) if start is None else cast(BaseControlNet, start)
        if "rank" in options:
            for index, condition in enumerate(conditions):
                if condition in control.adapters:
                    _go_on(control, condition, options["rank"])
                else:
                    control.add_adapter(condition, options["rank"], shares_base=True, seed=seed + index)
        else:
            (control.condition,) = conditions
        control.train_base()
        return control.train()

    def for_condition(self, condition: str) -> Control:
        """The base control with this condition's adapter; itself if it has none.

        The adapter stays selected for the backward pass, in which gradient checkpointing recomputes the layers.
        """
        from controlkit.controls.ctrlora.adapter import CtrLoRA

        if not self.adapters:
            return self
        self.select(condition)
        return CtrLoRA(self, condition, condition)

    def finished(self, name: str) -> dict[str, Control]:
        if not self.adapters:
            return {name: self}
        return {"base": self, **{adapter: self.for_condition(adapter) for adapter in self.adapters}}

    def parameter_counts(self) -> dict[str, int]:
        zero = [layer for layer in self.layers.values() if isinstance(layer, AdaptedZeroConv)]
        counts = {"zero_convolutions": sum(p.numel() for layer in zero for p in layer.parameters())}
        return {**super().parameter_counts(), **counts}

    def copied_network(self) -> nn.Module:
        return self.network

    @classmethod
    def needs(cls, config: Mapping[str, Any]) -> str:
        return base_needed(config)

    def _check_free(self, name: str) -> None:
        if _key(name) in self._adapters:
            raise ValueError(f"there is already an adapter {name!r}; remove it or choose another name")

    def _find(self, name: str) -> Adapter:
        if _key(name) not in self._adapters:
            known = ", ".join(self.adapters) or "none"
            raise ValueError(f"there is no adapter {name!r}; known: {known}")
        return cast(Adapter, self._adapters[_key(name)])

    @contextmanager
    def _selecting(self, names: Sequence[str | None] | None) -> Iterator[None]:
        before = self._selected
        if names is None or tuple(names) == before:
            yield
            return
        if torch.is_grad_enabled() and self.network.is_gradient_checkpointing:
            raise ValueError("with gradient checkpointing, use select(): the backward pass recomputes the layers")
        self.select(names)
        try:
            yield
        finally:
            self.select(before)


def _go_on(control: BaseControlNet, adapter: str, rank: int) -> None:
    """Train an adapter further together with its base control.

    Raises:
        UserError: it has another rank, or zero convolutions and norms of its own.
    """
    there = control.adapters[adapter].rank
    if there != rank:
        raise UserError(f"the adapter {adapter} beside start has rank {there}; set rank={there}", "contradiction")
    try:
        control.share_base(adapter)
    except ValueError as error:
        raise UserError(
            f"cannot train the adapter {adapter} beside start together with its base control: {error}; it was trained"
            " alone. Move it elsewhere to begin a new one",
            "incompatible",
        ) from error


def build_base_control(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> BaseControlNet:
    """A `BaseControlNet` from `config()` and `file_state()`; names must match exactly."""
    with torch.device("meta"):
        control = BaseControlNet.from_config(config)
    control.load_file_state(state)
    return control.eval()


def earlier_fingerprints(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The fingerprints of a base control before its transfers to other bases and its casts; empty without any."""
    return tuple(filter(None, metadata.get(_TRANSFERRED, "").split(",")))


def _key(name: str) -> str:
    """`name` as a key of a ModuleDict, which rejects dots and names of its own methods."""
    return "adapter:" + re.sub(r"[.%]", lambda match: f"%{ord(match[0]):02X}", name)
