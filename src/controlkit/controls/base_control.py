"""The shared network of CtrLoRA (Xu et al., ICLR 2025, arXiv 2410.09400), and its adapters by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

from controlkit.bases.base import Base, Text, hash_of_halves
from controlkit.bases.residuals import Residuals
from controlkit.controls.control import Control, Reads, Site, copy_misfit
from controlkit.controls.lora import Adapted, AdaptedLinear, Adapter, LoRA, adapt_layers, check_state, rank_of

_ZERO_CONVOLUTIONS = ("controlnet_down_blocks", "controlnet_mid_block")
_HINT_SETTINGS = (
    "conditioning_channels",
    "conditioning_embedding_out_channels",
    "controlnet_conditioning_channel_order",
    "global_pool_conditions",
)
_ROUNDING = 1e-3


class BaseControl(Control):
    """Encoder and middle of the base; its input is the VAE latent of the condition image, not the noisy one.

    The network is diffusers' `ControlNetModel` without its hint network; it never sees x_t. Adapters
    (`Adapter`) are added by name and selected: none (the network alone), one, or one for each group of a
    batch.

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
        self._fingerprint: str | None = None
        self.transferred_from: tuple[str, ...] = ()
        """Fingerprints of the base controls that it was moved from to another base; adapters made on them are taken."""

    @classmethod
    def for_base(cls, base: Base) -> BaseControl:
        """A new one: encoder and middle copied from `base`, zero convolutions; all of it trainable.

        Raises:
            ValueError: the base's UNet reads a class.
        """
        if base.unet.config.get("class_embed_type") or base.unet.config.get("num_class_embeds"):
            raise ValueError(f"the UNet of {base.name} reads a class besides time and text; CtrLoRA passes none")
        with torch.device("meta"):
            control = cls(network_of(dict(base.unet.config)))
        given = base.unet.state_dict()
        state = {}
        for name, value in control.network.state_dict().items():
            if name.startswith(_ZERO_CONVOLUTIONS):
                state[name] = torch.zeros(value.shape, device=base.device, dtype=base.dtype)
            else:
                state[name] = given[name].clone()
        control.network.load_state_dict(state, strict=True, assign=True)
        return control

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Name -> adapter, in the order in which they were added."""
        added = cast(Iterable[Adapter], self._adapters.values())
        return {adapter.name: adapter for adapter in added}

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
        self._check_free(name)
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

    def select(self, names: str | Sequence[str | None] | None) -> None:
        """Make one adapter active, or none, or one for each of as many equal, consecutive groups of a batch.

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
        """The flat state of one adapter, always whole.

        An adapter that shares the base's zero convolutions and norms gets them written out, so that every
        adapter file has the same names.

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
        self._check_free(name)
        adapter = Adapter(name, self.layers, found, device="meta")
        check_state(name, adapter.state_dict(), state)
        weight = self.network.conv_in.weight
        like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype, "copy": True}
        moved = {key: value.detach().to(**like) for key, value in state.items()}
        adapter.load_state_dict(moved, strict=True, assign=True)
        self._adapters[_key(name)] = adapter.requires_grad_(False).train(self.training)
        return adapter

    @torch.no_grad()
    def merged(self, name: str) -> BaseControl:
        """A new base control, with no adapters, that computes what this one does under the adapter `name`.

        Its linear layers are W + up @ down, its zero convolutions and norms the adapter's. What the adapter
        does not change shares memory with this one, so it is frozen.

        Raises:
            ValueError: there is none of this name.
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
        """Hash of the network's weights (as float16), by which an adapter knows its base control."""
        return self._fingerprint or hash_of_halves(self.network.state_dict().values())

    def keep_fingerprint(self) -> None:
        """Stay with the fingerprint that it has now when the weights are cast to another dtype.

        It is let go of where the weights change: where the network trains (`train_base`) or is moved to another base.
        """
        self._fingerprint = self.fingerprint()

    def mark_transferred(self) -> None:
        """Note that the weights are about to be moved to another base, from the fingerprint that it has now."""
        self.transferred_from = (*self.transferred_from, self.fingerprint())
        self._fingerprint = None

    def store_network(self, dtype: torch.dtype) -> None:
        """Store the frozen network in `dtype`, and leave adapters in theirs, which then run under autocast.

        The fingerprint stays that of the weights as they were.
        """
        self.keep_fingerprint()
        nn.Module.to(self.network, dtype)  # diffusers' own method warns of what autocast sees to

    @torch.no_grad()
    def encode(self, condition_image: Tensor, base: Base, *, seed: int | None = None) -> Tensor:
        """Condition images `[B, 3, H, W]` in [0, 1] => scaled latents `[B, latent_channels, h, w]`.

        The autoencoder gets the range [0, 1] as it is, unlike pictures: the reference trains so
        (xyfJASON/ctrlora, datasets/custom_dataset.py:75).

        Args:
            seed: draw a sample of the posterior, as the reference does, instead of its mode; every image of
                the batch gets the same noise, so that none depends on its neighbours.

        Raises:
            ValueError: a value lies outside of [0, 1].
            UserError: the size does not fit the base.
        """
        base.check_size(condition_image.shape[-1], condition_image.shape[-2])
        low, high = condition_image.aminmax()
        if low < -_ROUNDING or high > 1 + _ROUNDING:
            raise ValueError(f"a condition image must be in [0, 1]; this one has {low:.3g} to {high:.3g}")
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
            adapters: for this pass alone, in the place of what is selected: one name for each of as many
                equal, consecutive groups of the batch. All of them run in one pass.

        Raises:
            ValueError: an adapter is not there, or the batch does not divide into the groups.
        """
        assert text is not None
        batch = max(len(hint), len(text), t.numel())
        groups = len(self._selected if adapters is None else adapters)
        if groups > 1 and batch % groups:
            raise ValueError(f"a batch of {batch} does not divide into {groups} groups, one for each adapter")
        with self._selecting(adapters):
            down, mid = self.network(
                hint.expand(batch, *hint.shape[1:]),
                t.expand(batch),
                **text.expand(batch).inputs(),
                controlnet_cond=hint.new_zeros(()),
                return_dict=False,
            )
        return Residuals(tuple(down), mid)

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
        """Adapter training: select this adapter and train its tensors, and nothing else.

        Raises:
            ValueError: there is none of this name, or it has no zero convolutions and norms of its own.
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

    def misfit(self, base: Base) -> str | None:
        return copy_misfit(self.config(), base)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def config(self) -> dict[str, Any]:
        kept = self.network.config.items()
        return {key: value for key, value in kept if not key.startswith("_") and key not in _HINT_SETTINGS}

    def base_state_dict(self) -> dict[str, Tensor]:
        """The network's weights, without adapters, under diffusers' names."""
        return self.network.state_dict()

    def _check_free(self, name: str) -> None:
        if _key(name) in self._adapters:
            raise ValueError(f"there is an adapter called {name!r} already; remove it or take another name")

    def _find(self, name: str) -> Adapter:
        if _key(name) not in self._adapters:
            known = ", ".join(self.adapters) or "none"
            raise ValueError(f"there is no adapter called {name!r}; there are: {known}")
        return cast(Adapter, self._adapters[_key(name)])

    @contextmanager
    def _selecting(self, names: Sequence[str | None] | None) -> Iterator[None]:
        before = self._selected
        if names is None or tuple(names) == before:
            yield
            return
        if torch.is_grad_enabled() and self.network.is_gradient_checkpointing:
            raise ValueError("with gradient checkpointing, use select(): the backward pass runs the layers again")
        self.select(names)
        try:
            yield
        finally:
            self.select(before)


def build_base_control(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> BaseControl:
    """A `BaseControl` from `config()` and `base_state_dict()`; a missing or unknown key is an error."""
    with torch.device("meta"):
        control = BaseControl(network_of(config))
    control.network.load_state_dict(dict(state), strict=True, assign=True)
    return control.eval()


def network_of(config: Mapping[str, Any]) -> ControlNetModel:
    """Encoder and middle, with fresh weights, of the UNet of `config` (its own or `BaseControl.config()`)."""
    known = inspect.signature(ControlNetModel.__init__).parameters
    kept = {key: value for key, value in config.items() if key in known and key not in _HINT_SETTINGS}
    return ControlNetModel(**kept)


def _key(name: str) -> str:
    """`name` as a key of a ModuleDict, which refuses dots and the names of its own methods."""
    return "adapter:" + re.sub(r"[.%]", lambda match: f"%{ord(match[0]):02X}", name)
