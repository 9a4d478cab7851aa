"""The layers that adapters change, and the adapters: LoRA, zero convolutions and transformer norms.

An adaptable layer keeps its own weights with their own names, and references the active parts of adapters: none, one,
or one per group of the batch, if several adapters run in one pass.

Why not PEFT, which has LoRA and `modules_to_save`: it rejects a mixed batch (`adapter_names`) as soon as a norm is in
`modules_to_save`, and CtrLoRA trains the norms (measured, PEFT 0.21). The mixed batch is what makes several conditions
cost one pass, and the layers below are shorter than the workaround would be. Their state is also strict and complete by
construction: one file has one adapter, with the names of the base network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

_FOLD_RATIO = 2.0
"""Minimum saving in operations for folding, which also writes a full matrix."""


class LoRA(nn.Module):
    """A low-rank change of a linear layer: W + up @ down, with scale exactly 1 (no alpha).

    Initialisation: down `[rank, in]` from N(0, (1 / rank)^2), up `[out, rank]` zero (xyfJASON/ctrlora,
    cldm/lora.py:58-68).
    """

    def __init__(
        self,
        layer: nn.Linear,
        rank: int,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        device = torch.device(device or layer.weight.device)
        self.down = nn.Linear(layer.in_features, rank, bias=False, device="meta")
        self.up = nn.Linear(rank, layer.out_features, bias=False, device="meta")
        self.to(layer.weight.dtype)
        if device.type != "meta":
            self.to_empty(device=device)
            # Sampled on the CPU in float32: a seed gives the same adapter on every device.
            values = torch.randn(self.down.weight.shape, generator=generator) / rank
            self.down.weight.data.copy_(values)
            nn.init.zeros_(self.up.weight)

    def change(self) -> Tensor:
        """up @ down `[out, in]`, in float32."""
        return self.up.weight.float() @ self.down.weight.float()


class Affine(nn.Module):
    """An adapter's own weight and bias of a norm or a zero convolution."""

    def __init__(self, layer: Any, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().to(device, copy=True))
        self.bias = nn.Parameter(layer.bias.detach().to(device, copy=True))


class AdaptedLinear(nn.Linear):
    """A linear layer with one LoRA per group of the batch."""

    active: tuple[LoRA | None, ...] = ()
    """One per group; None is the layer without LoRA."""

    def forward(self, input: Tensor) -> Tensor:
        if self._should_fold(input):
            return self._folded(input)
        y = F.linear(input, self.weight, self.bias)
        if not any(self.active):
            return y
        if len(self.active) == 1:
            lora = cast(LoRA, self.active[0])
            return y + F.linear(F.linear(input, lora.down.weight), lora.up.weight)
        down, up = self._stacked()
        groups = len(self.active)
        x = input.reshape(groups, -1, self.in_features)
        # Not in place, which autocast would not cast.
        changed = torch.baddbmm(y.reshape(groups, -1, self.out_features), torch.bmm(x, down.mT), up.mT)
        return changed.view(y.shape)

    def _should_fold(self, input: Tensor) -> bool:
        """Whether computing W + up @ down for this call costs less than the two products with the input.

        With n inputs per group they cost 2 n rank (in + out) operations, the sum 2 rank in out. In half precision the
        sum would round the change away, and gradients need up and down separately.
        """
        if not any(self.active) or torch.is_grad_enabled() or self.weight.dtype != torch.float32:
            return False
        rows = input.numel() // (self.in_features * len(self.active))
        return rows * (self.in_features + self.out_features) > _FOLD_RATIO * self.in_features * self.out_features

    def _folded(self, input: Tensor) -> Tensor:
        if len(self.active) == 1:
            lora = cast(LoRA, self.active[0])
            return F.linear(input, torch.addmm(self.weight, lora.up.weight, lora.down.weight), self.bias)
        down, up = self._stacked()
        groups = len(self.active)
        weights = torch.baddbmm(self.weight.expand(groups, -1, -1), up, down)
        x = input.reshape(groups, -1, self.in_features)
        y = torch.bmm(x, weights.mT) if self.bias is None else torch.baddbmm(self.bias, x, weights.mT)
        return y.view(*input.shape[:-1], self.out_features)

    def _stacked(self) -> tuple[Tensor, Tensor]:
        """down `[groups, rank, in]` and up `[groups, out, rank]`; smaller ranks are zero-padded."""
        rank = max(lora.down.out_features for lora in self.active if lora is not None)
        downs, ups = [], []
        for lora in self.active:
            missing = rank - (0 if lora is None else lora.down.out_features)
            down = self.weight.new_empty(0, self.in_features) if lora is None else lora.down.weight
            up = self.weight.new_empty(self.out_features, 0) if lora is None else lora.up.weight
            downs.append(F.pad(down, (0, 0, 0, missing)))
            ups.append(F.pad(up, (0, missing)))
        return torch.stack(downs), torch.stack(ups)


class AdaptedGroupNorm(nn.GroupNorm):
    """A group norm with one affine per group of the batch."""

    active: tuple[Affine | None, ...] = ()
    """One per group; None is the layer's own."""

    def forward(self, input: Tensor) -> Tensor:
        if len(self.active) < 2:
            affine = _affine_of(self)
            return F.group_norm(input, self.num_groups, affine.weight, affine.bias, self.eps)
        return _affine_by_group(self, F.group_norm(input, self.num_groups, None, None, self.eps), channel=1)


class AdaptedLayerNorm(nn.LayerNorm):
    """A layer norm with one affine per group of the batch."""

    active: tuple[Affine | None, ...] = ()
    """One per group; None is the layer's own."""

    def forward(self, input: Tensor) -> Tensor:
        shape = list(self.normalized_shape)
        if len(self.active) < 2:
            affine = _affine_of(self)
            return F.layer_norm(input, shape, affine.weight, affine.bias, self.eps)
        return _affine_by_group(self, F.layer_norm(input, shape, None, None, self.eps), channel=-1)


class AdaptedZeroConv(nn.Conv2d):
    """A zero convolution (1 x 1) with one set of weights per group of the batch."""

    active: tuple[Affine | None, ...] = ()
    """One per group; None is the layer's own."""

    def forward(self, input: Tensor) -> Tensor:
        if len(self.active) < 2:
            affine = _affine_of(self)
            return F.conv2d(input, affine.weight, affine.bias)
        affines = [part or self for part in self.active]
        groups = input.chunk(len(affines))
        return torch.cat([F.conv2d(x, o.weight, o.bias) for x, o in zip(groups, affines, strict=True)])


Adapted = AdaptedLinear | AdaptedGroupNorm | AdaptedLayerNorm | AdaptedZeroConv


def adapt_layers(network: nn.Module, zero_convolutions: Sequence[str]) -> dict[str, Adapted]:
    """Replace, in place, every layer of `network` that an adapter changes; its parameters stay the same.

    These are all linear layers, the norms inside of the transformers (found by walking them, so that the
    norms of the ResNet blocks stay as they are), and the zero convolutions.

    Args:
        zero_convolutions: paths of the modules that are, or hold, the zero convolutions.

    Returns:
        Path -> layer, in the order of the network.
    """
    kinds: dict[str, type[nn.Module]] = {}
    for path, module in network.named_modules():
        if isinstance(module, nn.Linear):
            kinds[path] = AdaptedLinear
        elif isinstance(module, Transformer2DModel):
            for inner, norm in module.named_modules(prefix=path):
                if isinstance(norm, nn.GroupNorm):
                    kinds[inner] = AdaptedGroupNorm
                elif isinstance(norm, nn.LayerNorm):
                    kinds[inner] = AdaptedLayerNorm
    for root in zero_convolutions:
        for path, module in network.get_submodule(root).named_modules(prefix=root):
            if isinstance(module, nn.Conv2d):
                kinds[path] = AdaptedZeroConv
    order = [path for path, _ in network.named_modules() if path in kinds]
    for path in order:
        network.set_submodule(path, _replacement(network.get_submodule(path), kinds[path]))
    return {path: cast(Adapted, network.get_submodule(path)) for path in order}


class Adapter(nn.Module):
    """The tensors of one condition on a base control; its state names each tensor after its layer.

    A linear layer `X` has `X.lora_layer.down.weight` and `X.lora_layer.up.weight` (the reference's suffix); a norm or
    zero convolution has `X.weight` and `X.bias`.

    Args:
        name: of the adapter.
        layers: path -> layer, from `adapt_layers`.
        rank: of the LoRA of every layer.
        shares_base: LoRA only; zero convolutions and norms are the base control's, as in base training.
        device: default: that of the layers; on `meta` nothing is initialised.
        generator: of the LoRA's initialisation; torch's global one if None.
    """

    def __init__(
        self,
        name: str,
        layers: Mapping[str, Adapted],
        rank: int,
        *,
        shares_base: bool = False,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"the rank of adapter {name!r} must be an integer above 0, not {rank!r}")
        self.name = name
        self.rank = rank
        self.shares_base = shares_base
        for path, layer in layers.items():
            if isinstance(layer, AdaptedLinear):
                _add_at(self, f"{path}.lora_layer", LoRA(layer, rank, device=device, generator=generator))
            elif not shares_base:
                _add_at(self, path, Affine(layer, device=device))
        self.requires_grad_(False)

    def part(self, path: str, layer: Adapted) -> LoRA | Affine | None:
        """The adapter's part for the layer at `path`; None if it has none."""
        if isinstance(layer, AdaptedLinear):
            return cast(LoRA, self.get_submodule(f"{path}.lora_layer"))
        return None if self.shares_base else cast(Affine, self.get_submodule(path))


def rank_of(state: Mapping[str, Tensor]) -> int:
    """The rank of an adapter, from its state.

    Raises:
        ValueError: it has no LoRA, or LoRA of several ranks.
    """
    ranks = {value.shape[0] for name, value in state.items() if name.endswith(".lora_layer.down.weight")}
    if len(ranks) != 1:
        found = "no LoRA" if not ranks else f"LoRA of ranks {', '.join(map(str, sorted(ranks)))}"
        raise ValueError(f"not the state of an adapter: it has {found}, expected LoRA of one rank")
    return ranks.pop()


def check_state(name: str, expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Check that names and shapes of a state are those of an adapter of this base control.

    Raises:
        ValueError: the first difference.
    """
    missing, unknown = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    for names, what in ((missing, "missing"), (unknown, "unknown here")):
        if names:
            raise ValueError(
                f"the adapter {name!r} does not fit this base control: {len(names)} tensors are {what},"
                f" the first is {names[0]}"
            )
    for key, value in expected.items():
        if value.shape != state[key].shape:
            raise ValueError(
                f"the adapter {name!r} was trained on another base control: {key} has the shape"
                f" {tuple(state[key].shape)}, not {tuple(value.shape)}"
            )


def _add_at(root: nn.Module, path: str, leaf: nn.Module) -> None:
    """Add `leaf` at `path` below `root`, with empty modules in between."""
    *parents, last = path.split(".")
    for name in parents:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = cast(nn.Module, root._modules[name])
    root.add_module(last, leaf)


def _replacement(layer: Any, kind: type[nn.Module]) -> nn.Module:
    new: Any
    if isinstance(layer, nn.Linear):
        new = kind(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    elif isinstance(layer, nn.GroupNorm):
        new = kind(layer.num_groups, layer.num_channels, eps=layer.eps, device="meta")
    elif isinstance(layer, nn.LayerNorm):
        new = kind(layer.normalized_shape, eps=layer.eps, device="meta")
    else:
        new = kind(layer.in_channels, layer.out_channels, kernel_size=1, device="meta")
    new.weight, new.bias = layer.weight, layer.bias
    return new.train(layer.training)


def _affine_of(layer: Any) -> Any:
    """The module whose affine a layer uses if the batch is one group."""
    return (layer.active[0] if layer.active else None) or layer


def _affine_by_group(layer: Any, y: Tensor, channel: int) -> Tensor:
    """y `[B, ...]` times weight plus bias of each sample's group, along dimension `channel`."""
    affines = [part or layer for part in layer.active]
    shape = [len(y)] + [1] * (y.ndim - 1)
    shape[channel] = y.shape[channel]
    each = len(y) // len(affines)
    weight, bias = (
        torch.stack([getattr(affine, name) for affine in affines]).repeat_interleave(each, 0).view(shape)
        for name in ("weight", "bias")
    )
    return torch.addcmul(bias, y, weight)
