"""CtrLoRA (Xu et al., ICLR 2025, arXiv 2410.09400): one shared base control and a small adapter for each condition."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

from controlkit.bases.base import Base, Text
from controlkit.bases.residuals import Residuals
from controlkit.controls.control import Control, Reads, Site
from controlkit.controls.lora import Adapted, AdaptedLinear, AdaptedZeroConv, Adapter, adapt_layers, check_state, rank_of
from controlkit.files import sha256_of

_ZERO_CONVOLUTIONS = ("controlnet_down_blocks", "controlnet_mid_block")
_HINT_SETTINGS = (
    "conditioning_channels",
    "conditioning_embedding_out_channels",
    "controlnet_conditioning_channel_order",
    "global_pool_conditions",
)
_ROUNDING = 1e-3


class BaseControl(Control):
    """Encoder and middle of the base, fed with the VAE latent of the condition image instead of the noisy latent.

    The network is diffusers' `ControlNetModel` without its hint network; it never sees x_t. Adapters (`Adapter`)
    are added by name and selected: none (the network alone), one, or one for each group of a batch.

    Three states of training: `train_base` (the network and the LoRA of every adapter that shares its zero
    convolutions and norms), `train_adapter` (one adapter, nothing else), `freeze`. New adapters are frozen.
    """

    kind: ClassVar[str] = "ctrlora"
    reads: ClassVar[Reads] = Reads.TIME | Reads.TEXT
    site: ClassVar[Site] = Site.DECODER_SKIPS

    def __init__(self, network: ControlNetModel) -> None:
        super().__init__()
        network.controlnet_cond_embedding = nn.Identity()
        self.network = network
        self.condition = None
        self.layers: dict[str, Adapted] = adapt_layers(network, _ZERO_CONVOLUTIONS)
        """Path -> layer that adapters change, in the order of the network."""
        self._adapters = nn.ModuleDict()
        self._selected: tuple[str | None, ...] = (None,)

    @classmethod
    def for_base(cls, base: Base) -> BaseControl:
        """A new one: encoder and middle copied from `base`, zero convolutions; all of it trainable.

        Raises:
            ValueError: the base's UNet reads more than time and text.
        """
        if base.unet.config.get("addition_embed_type") or base.unet.config.get("class_embed_type"):
            raise ValueError(f"the UNet of {base.name} reads more than time and text, which CtrLoRA does not pass on")
        with torch.device("meta"):
            control = cls(_network(dict(base.unet.config)))
        given = base.unet.state_dict()
        state = {}
        for name, value in control.network.state_dict().items():
            new = name.startswith(_ZERO_CONVOLUTIONS)
            state[name] = torch.zeros(value.shape, device=base.device, dtype=base.dtype) if new else given[name].clone()
        control.network.load_state_dict(state, strict=True, assign=True)
        return control

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Name -> adapter, in the order in which they were added."""
        return {adapter.name: adapter for adapter in self._adapters.values()}

    @property
    def selected(self) -> tuple[str | None, ...]:
        """The active adapter of each group of the batch; `(None,)` is the network alone."""
        return self._selected

    def add_adapter(self, name: str, rank: int, *, shares_base: bool = False, seed: int | None = None) -> Adapter:
        """Add a frozen adapter: fresh LoRA; zero convolutions and norms start from the network's.

        (As xyfJASON/ctrlora, cldm/cldm_ctrlora_finetune.py:96-104.)

        Args:
            rank: of every LoRA.
            shares_base: LoRA only, for base training: the network's zero convolutions and norms serve all.
            seed: of the fresh LoRA; torch's global generator if None.

        Raises:
            ValueError: the name is taken or the rank is not a positive whole number.
        """
        if name in self.adapters:
            raise ValueError(f"there is an adapter called {name!r} already; remove it first or take another name")
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        adapter = Adapter(name, self.layers, rank, shares_base=shares_base, generator=generator)
        self._adapters[_key(name)] = adapter.train(self.training)
        return adapter

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; if it was selected, the network alone is selected.

        Raises:
            ValueError: there is none of this name.
        """
        self._find(name)
        del self._adapters[_key(name)]
        if name in self._selected:
            self.select(None)

    def select(self, names: str | None | Sequence[str | None]) -> None:
        """Make one adapter active, or none, or one for each of as many equal, consecutive groups of the batch.

        Raises:
            ValueError: an adapter is not there, or the sequence is empty.
        """
        wanted = (names,) if names is None or isinstance(names, str) else tuple(names)
        if not wanted:
            raise ValueError("no adapter was named; give one for each group of the batch, or None")
        distinct = wanted[:1] if len(set(wanted)) == 1 else wanted
        chosen = [None if name is None else self._find(name) for name in distinct]
        for path, layer in self.layers.items():
            parts = tuple(None if adapter is None else adapter.part(path, layer) for adapter in chosen)
            layer.active = parts  # type: ignore[assignment]
        self._selected = wanted

    def adapter_state_dict(self, name: str) -> dict[str, Tensor]:
        """The flat state of one adapter, always whole: an adapter that shares the base's zero convolutions and
        norms gets them written out, so that every adapter file has the same names.

        Raises:
            ValueError: there is none of this name.
        """
        adapter = self._find(name)
        own = adapter.state_dict()
        if not adapter.shares_base:
            return own
        state = {}
        for path, layer in self.layers.items():
            parts = ("lora_layer.down.weight", "lora_layer.up.weight")
            if isinstance(layer, AdaptedLinear):
                state.update({f"{path}.{part}": own[f"{path}.{part}"] for part in parts})
            else:
                state.update({f"{path}.{key}": value for key, value in layer.state_dict().items()})
        return state

    def load_adapter(self, name: str, state: Mapping[str, Tensor], *, rank: int | None = None) -> Adapter:
        """Add a frozen adapter from its flat state; it has its own zero convolutions and norms.

        Args:
            rank: what the file announces, if it does; the shapes must agree.

        Raises:
            ValueError: the state is not one adapter's, or was made for another base or rank.
        """
        found = rank_of(state)
        if rank is not None and rank != found:
            raise ValueError(f"the adapter {name!r} has rank {found}, not {rank}")
        if name in self.adapters:
            raise ValueError(f"there is an adapter called {name!r} already; remove it first or take another name")
        adapter = Adapter(name, self.layers, found, device="meta")
        check_state(name, adapter.state_dict(), state)
        weight = self.network.conv_in.weight
        moved = {key: value.detach().to(weight.device, weight.dtype, copy=True) for key, value in state.items()}
        adapter.load_state_dict(moved, strict=True, assign=True)
        self._adapters[_key(name)] = adapter.requires_grad_(False).train(self.training)
        return adapter

    @torch.no_grad()
    def merged(self, name: str) -> BaseControl:
        """A new base control, with no adapters, that computes what this one does under the adapter `name`: its
        linear layers are W + up @ down, its zero convolutions and norms the adapter's.

        What the adapter does not change shares memory with this one.

        Raises:
            ValueError: there is none of this name.
        """
        adapter = self._find(name)
        state = dict(self.network.state_dict())
        for path, layer in self.layers.items():
            part = adapter.part(path, layer)
            if isinstance(layer, AdaptedLinear):
                weight = layer.weight
                state[f"{path}.weight"] = (weight.float() + part.change()).to(weight.dtype)  # type: ignore[union-attr]
            elif part is not None:
                state.update({f"{path}.{key}": value.clone() for key, value in part.state_dict().items()})
        return build_base_control(self.config(), state).train(self.training)

    def fingerprint(self) -> str:
        """Hash of the network's weights (as float16), by which an adapter knows the base control it belongs to."""
        parts = (value.detach().to("cpu", torch.float16).contiguous() for value in self.network.state_dict().values())
        return sha256_of(*(part.numpy().tobytes() for part in parts))[:16]

    @torch.no_grad()
    def encode(self, condition_image: Tensor, base: Base, *, seed: int | None = None) -> Tensor:
        """Condition images `[B, 3, H, W]` in [0, 1] => scaled latents `[B, latent_channels, h, w]`.

        The autoencoder gets the range [0, 1] as it is, unlike pictures: the reference trains so
        (xyfJASON/ctrlora, datasets/custom_dataset.py:75).

        Args:
            seed: draw a sample of the posterior, as the reference does, instead of its mode; every image of the
                batch gets the same noise, so that none depends on its neighbours.

        Raises:
            ValueError: a value lies outside of [0, 1].
            UserError: the size does not fit the base.
        """
        base.check_size(condition_image.shape[-1], condition_image.shape[-2])
        low, high = condition_image.aminmax()
        if low < -_ROUNDING or high > 1 + _ROUNDING:
            raise ValueError(f"a condition image must be in [0, 1]; this one reaches from {low:.3g} to {high:.3g}")
        if seed is None:
            hint = base.encode_picture(condition_image)
        else:
            weight = base.vae.encoder.conv_in.weight
            posterior = base.vae.encode(condition_image.to(weight.device, weight.dtype)).latent_dist
            noise = torch.randn(posterior.mean.shape[1:], generator=torch.Generator().manual_seed(seed))
            sample = posterior.mean + posterior.std * noise.to(posterior.mean)
            hint = sample * base.vae.config.scaling_factor
        return hint.to(self.network.conv_in.weight)

    def forward(
        self,
        x_t: Tensor | None,
        t: Tensor,
        text: Text | None,
        hint: Tensor,
        *,
        adapters: Sequence[str | None] | None = None,
    ) -> Residuals:
        """Residuals for `hint` `[B, latent_channels, h, w]` at times `t` `[B]` under `text` `[B, L, D]`.

        A batch of 1 in one of them is repeated to the batch of the others.

        Args:
            x_t: never looked at.
            adapters: for this pass alone, in the place of what is selected: one name for each of as many equal,
                consecutive groups of the batch. All of them run in one pass.

        Raises:
            ValueError: an adapter is not there, or the batch does not divide into the groups.
        """
        assert text is not None
        batch = max(len(hint), len(text.tokens), t.numel())
        groups = len(self._selected if adapters is None else adapters)
        if groups > 1 and batch % groups:
            raise ValueError(f"a batch of {batch} does not divide into {groups} equal groups, one for each adapter")
        with self._selecting(adapters):
            down, mid = self.network(
                hint.expand(batch, *hint.shape[1:]),
                t.expand(batch),
                encoder_hidden_states=text.expand(batch).tokens,
                controlnet_cond=hint.new_zeros(()),
                return_dict=False,
            )
        return Residuals(tuple(down), mid)

    def train_base(self) -> None:
        """Base training: the network and the LoRA of all adapters that share its zero convolutions and norms."""
        self.requires_grad_(False)
        self.network.requires_grad_(True)
        for adapter in self.adapters.values():
            adapter.requires_grad_(adapter.shares_base)

    def train_adapter(self, name: str) -> None:
        """Adapter training: select this adapter and train its tensors, and nothing else.

        Raises:
            ValueError: there is none of this name, or it has no zero convolutions and norms of its own.
        """
        adapter = self._find(name)
        if adapter.shares_base:
            raise ValueError(f"the adapter {name!r} shares the base's zero convolutions: it is trained with the base")
        self.freeze()
        adapter.requires_grad_(True)
        self.select(name)

    def freeze(self) -> None:
        """Train nothing."""
        self.requires_grad_(False)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def config(self) -> dict[str, Any]:
        kept = self.network.config.items()
        return {key: value for key, value in kept if not key.startswith("_") and key not in _HINT_SETTINGS}

    def base_state_dict(self) -> dict[str, Tensor]:
        """The network's weights, without adapters, under diffusers' names."""
        return self.network.state_dict()

    def _find(self, name: str) -> Adapter:
        if _key(name) not in self._adapters:
            known = ", ".join(self.adapters) or "none"
            raise ValueError(f"there is no adapter called {name!r}; there are: {known}")
        return self.adapters[name]

    @contextmanager
    def _selecting(self, names: Sequence[str | None] | None) -> Iterator[None]:
        before = self._selected
        if names is None or tuple(names) == before:
            yield
            return
        if torch.is_grad_enabled() and self.network.is_gradient_checkpointing:
            raise ValueError("with gradient checkpointing, choose adapters by select(): the backward pass runs anew")
        self.select(names)
        try:
            yield
        finally:
            self.select(before)


class CtrLoRA(Control):
    """One condition of a `BaseControl`: the base control under one adapter, as a control of its own.

    Several of one base control can be used at a time, each with its own image and weight; `forward_together` runs
    them in one pass.

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

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.base_control.adapters[self.adapter].parameters() if p.requires_grad]

    def config(self) -> dict[str, Any]:
        return {**self.base_control.config(), "rank": self.base_control.adapters[self.adapter].rank}


def forward_together(controls: Sequence[CtrLoRA], t: Tensor, text: Text, hints: Sequence[Tensor]) -> list[Residuals]:
    """The residuals of several conditions of one base control, in one pass.

    Args:
        controls: all of the same base control.
        t: `[B]` or a scalar, the same for all.
        text: `[B, L, D]` or `[1, L, D]`, the same for all.
        hints: one for each control, `[B, ...]` or `[1, ...]`, all of one size.

    Returns:
        One for each control, with a batch of `B`, equal to that of `control(None, t, text, hint)`.

    Raises:
        ValueError: there is no control, they have different base controls, or hints of different sizes.
    """
    shared = {id(control.base_control) for control in controls}
    if len(shared) != 1 or len(hints) != len(controls):
        raise ValueError(f"got {len(controls)} controls of {len(shared)} base controls, with {len(hints)} hints")
    if len({hint.shape[1:] for hint in hints}) != 1:
        raise ValueError(f"hints of one pass must have one size, not {[tuple(hint.shape[1:]) for hint in hints]}")
    groups = len(controls)
    batch = max(t.numel(), len(text.tokens), *(len(hint) for hint in hints))
    stacked = torch.cat([hint.expand(batch, *hint.shape[1:]) for hint in hints])
    times = t.expand(batch).repeat(groups)
    tokens = Text(text.expand(batch).tokens.repeat(groups, 1, 1))
    names = [control.adapter for control in controls]
    made = controls[0].base_control(None, times, tokens, stacked, adapters=names)
    return [made.map(lambda r, at=group: r[at * batch : (at + 1) * batch]) for group in range(groups)]


def build_base_control(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> BaseControl:
    """A `BaseControl` from `config()` and `base_state_dict()` (strict: a missing or unknown key is an error)."""
    with torch.device("meta"):
        control = BaseControl(_network(config))
    control.network.load_state_dict(dict(state), strict=True, assign=True)
    return control.eval()


def count_base_control(unet_config: Mapping[str, Any]) -> dict[str, int]:
    """Parameters of the base control of a UNet, counted without memory: `parameters`, of which
    `zero_convolutions`, and `tensors`."""
    with torch.device("meta"):
        control = BaseControl(_network(unet_config))
    zero = [layer for layer in control.layers.values() if isinstance(layer, AdaptedZeroConv)]
    return {
        "parameters": sum(p.numel() for p in control.parameters()),
        "zero_convolutions": sum(p.numel() for layer in zero for p in layer.parameters()),
        "tensors": len(list(control.parameters())),
    }


def count_adapter(unet_config: Mapping[str, Any], rank: int) -> dict[str, int]:
    """Parameters of an adapter for a UNet, counted without memory: `parameters` = `lora` + `zero_convolutions` +
    `norms`, and `tensors`."""
    with torch.device("meta"):
        control = BaseControl(_network(unet_config))
        adapter = control.add_adapter("counted", rank)
    counts = {"lora": 0, "zero_convolutions": 0, "norms": 0}
    for path, layer in control.layers.items():
        part = adapter.part(path, layer)
        kind = {AdaptedLinear: "lora", AdaptedZeroConv: "zero_convolutions"}.get(type(layer), "norms")
        counts[kind] += sum(parameter.numel() for parameter in part.parameters())  # type: ignore[union-attr]
    return {"parameters": sum(counts.values()), **counts, "tensors": len(list(adapter.parameters()))}


def _network(config: Mapping[str, Any]) -> ControlNetModel:
    """The encoder and middle of the UNet that `config` describes (a UNet's own, or from `BaseControl.config`)."""
    known = inspect.signature(ControlNetModel.__init__).parameters
    kept = {key: value for key, value in config.items() if key in known and key not in _HINT_SETTINGS}
    return ControlNetModel(**kept)


def _key(name: str) -> str:
    """`name` as a key of a ModuleDict, which refuses dots and the names of its own methods."""
    return "adapter:" + re.sub(r"[.%]", lambda match: f"%{ord(match[0]):02X}", name)
